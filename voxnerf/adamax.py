"""Adamax whose step can be left out by a flag on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from voxnerf.finite import replace_where

Tensors = list[Tensor]
Update = Callable[[Tensor, Tensors, Tensors, Tensors, Tensors, float, float, list[float], float], None]


class Adamax(torch.optim.Adamax):
    """Adamax (arXiv 1412.6980, Algorithm 2), with the state of `torch.optim.Adamax`.

    update: `update_where`, or what computes the same faster.  `whole` is False once a step has ended half-way.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], update: Update) -> None:
        super().__init__(groups)
        self.update, self.whole = update, True

    @torch.no_grad()
    def step_where(self, finite: Tensor) -> None:
        """Take one step with the gradients that the parameters have, or change nothing where `finite` () is False.

        Nothing waits for the device, so the count of steps grows in both cases.
        """
        self.whole = False
        rows: dict[tuple[float, float, float], list[tuple[Tensor, Tensor, Tensor, Tensor, float]]] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_inf=torch.zeros_like(p))
                state["step"] = int(state["step"]) + 1  # older checkpoints have it in a tensor
                speed = group["lr"] / (1 - beta1 ** state["step"])
                row = p, p.grad, state["exp_avg"], state["exp_inf"], speed
                rows.setdefault((1 - beta1, beta2, group["eps"]), []).append(row)
        for (rate, beta2, eps), alike in rows.items():
            p, g, m, u, speeds = map(list, zip(*alike))
            self.update(finite, p, g, m, u, rate, beta2, speeds, eps)
        self.whole = True


def update_where(
    finite: Tensor,
    p: Tensors,
    g: Tensors,
    m: Tensors,
    u: Tensors,
    rate: float,
    beta2: float,
    speeds: list[float],
    eps: float,
) -> None:
    """Update parameters p and moments m, u in place by gradients g, where `finite` () is True.

    m <- m + rate (g - m), u <- max(beta2 u, |g| + eps), p <- p - speed m / u.
    """
    for each_p, grad, each_m, each_u, speed in zip(p, g, m, u, speeds):
        replace_where(finite, each_m, each_m.lerp(grad, rate))
        replace_where(finite, each_u, torch.maximum(beta2 * each_u, grad.abs() + eps))
        replace_where(finite, each_p, each_p.addcdiv(each_m, each_u, value=-speed))
