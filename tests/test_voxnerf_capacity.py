"""Grids that cannot fit are refused, and the largest that can is named."""

import pytest
import torch

from my.errors import UserError
from my.machine import machine_memory
from voxnerf.capacity import cube_root, device_memory, refuse_large_grid


def test_the_largest_grid_fits_and_the_next_one_does_not():
    memory = 64**3 * 16 * 4  # bytes: 4 floats per voxel, of each a value, a gradient and two moments
    refuse_large_grid("--n", 64, 3, memory)
    for n, room in ((65, memory), (64, memory - 1)):
        with pytest.raises(UserError, match=f"^--n {n}: takes 0 GB of memory and more, there are 0; it can be "):
            refuse_large_grid("--n", n, 3, room)
    with pytest.raises(UserError, match="it can be 64 at the very most$"):
        refuse_large_grid("--n", 10**6, 3, memory)
    with pytest.raises(UserError, match="it can be 63 at the very most$"):
        refuse_large_grid("--n", 64, 3, memory - 1)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 26, 27, 63**3, 64**3 - 1, 64**3, 1000**3 - 1, 1000**3, 10**15 - 1])
def test_cube_root(n):
    assert cube_root(n) ** 3 <= n < (cube_root(n) + 1) ** 3


def test_a_cpu_has_the_memory_of_its_machine():
    assert device_memory(torch.device("cpu")) == machine_memory() > 2**28
