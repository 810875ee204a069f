"""Which cells and blocks of a grid hold anything, as flags that let the march jump over empty space.

A cell is the cube between eight voxel centres, and a block is a cube of cells; see `voxnerf/fused/kernels.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from voxnerf.field import VoxRF
from voxnerf.fused import kernels

EDGE = 0.49  # less than the weight, 1/2, that the outermost voxel of an axis still has at the face of the box

_mask_flags = WeakTensorKeyDictionary()  # alpha mask: flags of its cells and of its blocks


def flags_of(field: VoxRF, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the uint8 flags of a field's cells, and those of its blocks.

    A cell's flag is 0 where a mask hides it; without a mask there are no flags of cells. For a block see `block_flags`.
    scale: (1,) factor of the stored density.
    """
    if field.alpha_mask is not None:
        return mask_flags(field.alpha_mask)
    most = block_maxima(field.density.detach()[0, 0])
    for axis, n in enumerate(field.density.shape[2:]):
        for side in {0, n // kernels.BLOCK}:  # beyond their outermost voxels, a negative density rises towards 0
            edge = most.select(axis, side)
            edge.copy_(torch.maximum(edge, EDGE * edge))
    thin = scale * most + field.density_shift <= kernels.x_min(field.step_size)
    flags = block_flags(~thin)  # a block with NaN is not thin
    return flags.new_empty(0), flags


def mask_flags(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the uint8 flags of the cells and of the blocks that a mask (1, 1, Z, Y, X) lets rays see.

    They are computed once per mask tensor, which must not be changed in place.
    """
    if mask not in _mask_flags:
        cells = F.max_pool3d(F.pad(mask.float(), (1,) * 6), 2, stride=1)  # (1, 1, Z+1, Y+1, X+1)
        _mask_flags[mask] = (cells > 0).byte().view(-1), block_flags(block_maxima(mask[0, 0]) > 0)
    return _mask_flags[mask]


def block_maxima(grid: torch.Tensor) -> torch.Tensor:
    """Return, for each block, the largest of the voxels of `grid` (Z, Y, X) that are corners of its cells."""
    edge = kernels.BLOCK
    for axis, n in enumerate(grid.shape):
        parts = [grid.narrow(axis, 0, min(edge, n)).amax(axis, keepdim=True)]
        last = n // edge * edge - 1  # first voxel of the last block
        if last > edge:
            parts.append(grid.narrow(axis, edge - 1, last - edge + 2).unfold(axis, edge + 1, edge).amax(-1))
        if last > 0:
            parts.append(grid.narrow(axis, last, n - last).amax(axis, keepdim=True))
        grid = torch.cat(parts, dim=axis)
    return grid


def block_flags(filled: torch.Tensor) -> torch.Tensor:
    """Return the uint8 flags of all blocks in a row: a block's distance to the nearest `filled` (Z, Y, X) one.

    Distances are counted in blocks, along diagonals too, up to MAX_JUMP.
    """
    near, flags = filled.byte(), torch.zeros_like(filled, dtype=torch.uint8)
    for _ in range(kernels.MAX_JUMP):
        flags += 1 - near
        for axis, n in enumerate(filled.shape):
            before, after, beyond = near.narrow(axis, 0, n - 1), near.narrow(axis, 1, n - 1), near.clone()
            beyond.narrow(axis, 1, n - 1).bitwise_or_(before)
            beyond.narrow(axis, 0, n - 1).bitwise_or_(after)
            near = beyond
    return flags.view(-1)
