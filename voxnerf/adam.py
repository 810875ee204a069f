"""Adam whose step can be left out by a flag on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from voxnerf.field import VoxRF
from voxnerf.finite import all_finite, replace_where


class Rates(NamedTuple):
    """What step t of Adam is told beside the gradient."""

    beta1: float
    beta2: float
    rate: float  # lr / (1 - beta1^t)
    root: float  # sqrt(1 - beta2^t)
    eps: float


class Adam(torch.optim.Adam):
    """Adam (arXiv 1412.6980, Algorithm 1) for a field, with the state of `torch.optim.Adam`, and a group per parameter.

    `whole` is False once a step has ended half-way.
    """

    def __init__(self, field: VoxRF, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__([{"params": [p]} for p in field.parameters()], lr, betas, eps)
        self.field, self.whole = field, True
        for p in field.parameters():  # at once: a step needs no more memory, and a state is never without
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.state[p] = {"step": torch.tensor(0.0), **moments}

    @torch.no_grad()
    def finite(self, loss: Tensor) -> Tensor:
        """Return whether a loss () and the gradients that the parameters have are finite, as `all_finite` does."""
        return all_finite([loss], [p.grad for p in self.field.parameters() if p.grad is not None])

    @torch.no_grad()
    def step_where(self, finite: Tensor) -> None:
        """Take one step with the gradients that the parameters have, or change nothing where `finite` () is False.

        Nothing waits for the device, so the count of steps grows in both cases.
        """
        self.whole = False
        for group in self.param_groups:
            (p,), (beta1, beta2) = group["params"], group["betas"]
            if p.grad is None:
                continue
            state = self.state[p]
            state["step"] += 1
            t = state["step"].item()  # on the CPU
            rates = Rates(beta1, beta2, group["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5, group["eps"])
            self.update(finite, p, p.grad, state["exp_avg"], state["exp_avg_sq"], rates)
        self.whole = True

    def update(self, finite: Tensor, p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Rates) -> None:
        """Update a parameter p and its moments m, v in place by a gradient g, where `finite` () is True.

        m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, p <- p - rate m / (sqrt(v) / root + eps).
        """
        replace_where(finite, m, m.lerp(g, 1 - rates.beta1))
        replace_where(finite, v, (rates.beta2 * v).addcmul_(g, g, value=1 - rates.beta2))
        replace_where(finite, p, p.addcdiv(m, v.sqrt() / rates.root + rates.eps, value=-rates.rate))
