"""Which cells and blocks of a grid hold anything, as flags that let the march jump over empty space.

A cell is the cube between eight voxel centres, and a block is a cube of cells; see `voxnerf/fused/kernels.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from voxnerf.field import VoxRF
from voxnerf.fused import kernels
from voxnerf.fused.launch import array, interleaved, launch, volume

HALF = 0.5  # between the values of a mask

_mask_flags = WeakTensorKeyDictionary()  # alpha mask: flags of its cells and of its blocks


def flags_of(field: VoxRF) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the uint8 flags of a field's cells, and those of its blocks.

    A cell's flag is 0 where a mask hides it; without a mask there are no flags of cells. For a block see `block_flags`.
    """
    if field.alpha_mask is not None:
        return mask_flags(field.alpha_mask)
    thin = kernels.x_min(field.step_size)
    flags = block_flags(field.density.detach(), field.d_scale.detach(), field.density_shift, thin)
    return flags.new_empty(0), flags


def mask_flags(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the uint8 flags of the cells and of the blocks that a mask (1, 1, Z, Y, X) lets rays see.

    They are computed once per mask tensor, which must not be changed in place.
    """
    if mask not in _mask_flags:
        values = mask.float()
        cells = F.max_pool3d(F.pad(values, (1,) * 6), 2, stride=1)  # (1, 1, Z+1, Y+1, X+1)
        blocks = block_flags(values, values.new_zeros(()), 0.0, HALF)
        _mask_flags[mask] = (cells > 0).byte().view(-1), blocks
    return _mask_flags[mask]


@torch.library.custom_op("sjc::block_flags", mutates_args=())
def block_flags(density: torch.Tensor, d_scale: torch.Tensor, shift: float, x_min: float) -> torch.Tensor:
    """Return the uint8 flags of all blocks of a density (1, 1, Z, Y, X): the distance to the nearest filled block.

    A block is filled if exp(d_scale) density + shift exceeds `x_min` anywhere in it, or is NaN. Distances are counted
    in blocks, along diagonals too, up to MAX_JUMP.
    """
    grid = volume(density.shape, shift=shift, x_min=x_min)
    filled, flags = (new_flags(density) for _ in range(2))
    shares = interleaved(len(flags), density.device)
    launch(kernels.fill_kernel(), shares, [grid, array(d_scale), array(density), array(filled)], density.device)
    launch(kernels.spread_kernel(), shares, [grid, array(filled), array(flags)], density.device)
    return flags


@block_flags.register_fake
def new_flags(density: torch.Tensor, *_: object) -> torch.Tensor:
    """Return room for the flags (blocks,) of a density (1, 1, Z, Y, X)."""
    return torch.empty(n_blocks(density), dtype=torch.uint8, device=density.device)


def n_blocks(grid: torch.Tensor) -> int:
    """Return the number of blocks of a grid (1, C, Z, Y, X)."""
    return math.prod(n // kernels.BLOCK + 1 for n in grid.shape[2:])
