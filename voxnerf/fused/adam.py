"""Adam that leaves alone the voxels that no ray can reach, and so is many times faster on sparse fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from voxnerf.field import VoxRF
from voxnerf.fused import kernels
from voxnerf.fused.flags import mask_flags
from voxnerf.fused.launch import array, interleaved, launch, volume
from voxnerf.fused.march import rows_of


class OccupiedAdam(torch.optim.Adam):
    """Adam (arXiv 1412.6980, Algorithm 1) for a `VoxRF`, that steps a grid only where the mask lets rays see it.

    There every step is that of `torch.optim.Adam`, whose state it keeps. Elsewhere gradients are 0, and it leaves
    values and moments as they are. Without a mask it is `torch.optim.Adam`. There is a group per parameter.
    """

    def __init__(self, field: VoxRF, lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__([{"params": [p]} for p in field.parameters()], lr, betas, eps)
        self.field = field

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step with the gradients that the parameters have.

        Raises ValueError for a grid, a gradient or a moment that is not stored channels-last.
        """
        mask = self.field.alpha_mask
        if mask is None:
            return super().step(closure)
        for group in self.param_groups:
            (p,) = group["params"]
            state = self.state[p]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            step = state["step"].item()  # on the CPU
            rates = [beta1, beta2, group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5, group["eps"]]
            if p.ndim == 5:
                self._step_grid(mask, [p, p.grad, state["exp_avg"], state["exp_avg_sq"]], rates)
            else:
                step_all(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *rates)
        return None

    def _step_grid(self, mask: torch.Tensor, tensors: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        channels = tensors[0].shape[1]
        kernel, dtype = kernels.adam_kernel(channels), kernels.vector(channels)
        rows = [rows_of(x) for x in tensors]
        if any(row.data_ptr() != x.data_ptr() for row, x in zip(rows, tensors)):
            raise ValueError("OccupiedAdam needs grids, gradients and moments stored channels-last")
        _, blocks = mask_flags(mask)
        arguments = [volume(mask.shape), array(blocks), *rates]
        launch(
            kernel,
            interleaved(len(blocks), blocks.device),
            [*arguments, *(array(row, dtype) for row in rows)],
            blocks.device,
        )


def step_all(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    beta1: float,
    beta2: float,
    rate: float,
    root: float,
    eps: float,
) -> None:
    """Update parameter p and moments m, v in place: `rate` is lr / (1 - beta1^t), `root` is sqrt(1 - beta2^t)."""
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.addcdiv_(m, v.sqrt() / root + eps, value=-rate)
