"""Blocks of steps made ahead: where they begin, how long they are, and what is in memory meanwhile."""

import weakref

import numpy as np
import pytest
import torch

from benchmarks.pretend import DEVICE, pretended_cuda
from my.ahead import Ahead, to_device

CPU = torch.device("cpu")


def squares(log):
    """Returns what makes the square of each step, and logs the blocks."""

    def make(first, n):
        log.append((first, n))
        return [step**2 for step in range(first, first + n)]

    return make


def test_blocks_begin_at_multiples_of_their_length_wherever_a_run_begins():
    log: list = []
    ahead = Ahead(squares(log), 2**17 // 10, CPU)
    assert [ahead.of_step(i) for i in (25, 29, 30, 31, 7, 25)] == [625, 841, 900, 961, 49, 625]
    assert log == [(20, 10), (30, 10), (0, 10), (20, 10)]


@pytest.mark.parametrize(
    "device, numbers, n_steps",
    [
        ("cpu", 1, 128),
        ("cpu", 2**14, 8),
        ("cpu", 2**20, 1),
        ("cuda", 2**14, 128),
        ("cuda", 2**20, 8),
        ("mps", 2**14, 8),
    ],
)
def test_the_length_of_a_block(device, numbers, n_steps):
    """At most 128 steps and about 2^17 numbers, 2^23 on a GPU; at least one step."""
    assert Ahead(squares([]), numbers, torch.device(device)).n_steps == n_steps


def test_a_block_is_let_go_before_the_next_one_is_made():
    alive: list = []

    def make(first, n):
        assert not any(block() is not None for block in alive)
        block = np.full(n, first)
        alive.append(weakref.ref(block))
        return block

    ahead = Ahead(make, 2**17, CPU)
    assert [ahead.of_step(i) for i in (0, 1, 5)] == [0, 1, 5] and len(alive) == 3


def test_a_copy_to_the_device_is_made_from_pinned_memory(monkeypatch):
    """Out of other memory, a copy to CUDA may wait."""
    pinned, pin = [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or pin(x))
    with pretended_cuda() as machine:
        x = to_device(np.zeros((4, 3)).T, DEVICE)
        assert (x.shape, x.device.type, x.dtype) == ((3, 4), "cuda", torch.float64) and not machine.counts.waits
    assert pinned == [(3, 4)]
    assert to_device(np.arange(6.0).reshape(2, 3).T, CPU).tolist() == [[0, 3], [1, 4], [2, 5]] and len(pinned) == 1
