"""How much memory there is, and whether a training of a voxel grid fits into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from my.errors import UserError
from my.machine import machine_memory

if TYPE_CHECKING:
    import torch

COPIES = 4  # of a grid: its values, their gradients, and two moments of the optimizer
FLOAT = 4  # bytes


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that a device has: those of the GPU, or of the machine for a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return machine_memory()


def refuse_large_grid(flag: str, n: int, channels: int, memory: int) -> None:
    """Raise UserError if the training of a grid of n^3 voxels cannot fit into `memory`, bytes; name the largest n.

    A voxel has one density and `channels` floats of colour. What a step needs besides the grid is not counted.

    flag: the option that gave n, for the message.
    """
    voxel = COPIES * FLOAT * (1 + channels)  # bytes
    if n**3 * voxel > memory:
        raise UserError(
            f"{flag} {n}: takes {n**3 * voxel / 1e9:.0f} GB of memory and more, there are {memory / 1e9:.0f}; it can "
            f"be {cube_root(memory // voxel)} at the very most"
        )


def cube_root(n: int) -> int:
    """Return the largest integer whose cube is at most `n`."""
    root = round(n ** (1 / 3))
    return root if root**3 <= n else root - 1
