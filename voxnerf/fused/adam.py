"""Adam that leaves alone the voxels that no ray can reach, and so is many times faster on sparse fields."""

from __future__ import annotations

import torch
from torch import Tensor

from voxnerf.adam import Adam, Rates
from voxnerf.finite import all_finite
from voxnerf.fused import kernels
from voxnerf.fused.flags import mask_flags
from voxnerf.fused.launch import array, interleaved, launch, volume
from voxnerf.fused.march import rows_of, sweep


class OccupiedAdam(Adam):
    """`Adam` for a `VoxRF`, that steps a grid only where the mask lets rays see it.

    Elsewhere gradients are 0, and it leaves values and moments as they are. Without a mask it is `Adam`.
    """

    @torch.no_grad()
    def finite(self, loss: Tensor) -> Tensor:
        """Return what `Adam.finite` does, in one launch over those voxels of both grids that a step changes."""
        mask = self.field.alpha_mask
        if mask is None:
            return super().finite(loss)
        gradients = {p: p.grad for p in self.field.parameters() if p.grad is not None}
        grids = rows_of(gradients.pop(self.field.density)), rows_of(gradients.pop(self.field.color))
        squares = sweep(kernels.dot, volume(mask.shape), mask_flags(mask)[1], grids, grids)
        return all_finite([loss, squares.sum().sqrt()], list(gradients.values()))

    def update(self, finite: Tensor, p: Tensor, g: Tensor, m: Tensor, v: Tensor, rates: Rates) -> None:
        """Do what `Adam.update` does. Raises ValueError for a grid or a gradient that is not stored channels-last."""
        mask = self.field.alpha_mask
        if mask is None or p.ndim < 5:
            return super().update(finite, p, g, m, v, rates)
        tensors = p, g, m, v
        rows = [rows_of(x) for x in tensors]
        if any(row.data_ptr() != x.data_ptr() for row, x in zip(rows, tensors)):
            raise ValueError("OccupiedAdam needs grids, gradients and moments stored channels-last")
        channels, (_, blocks) = p.shape[1], mask_flags(mask)
        arguments = [volume(mask.shape), array(blocks), array(finite), *rates]
        launch(
            kernels.adam_kernel(channels),
            interleaved(len(blocks), blocks.device),
            [*arguments, *(array(row, kernels.vector(channels)) for row in rows)],
            blocks.device,
        )
        return None
