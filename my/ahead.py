"""What the steps of a run need, made for many steps at once: few calls do the work, and no step waits for a copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

MOST_STEPS = 128  # of a block
NUMBERS = {"cpu": 2**17, "cuda": 2**23}  # of a block, about: a CPU wants them in its cache, a GPU wants few launches

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Block(Protocol[T_co]):
    """What holds a thing per step: a list, or a tensor with an axis of steps."""

    def __getitem__(self, k: int, /) -> T_co:
        """Return what belongs to step `k` of the block."""
        ...


class Ahead(Generic[T]):
    """What each step needs, made by `make(first step, number of steps)` for a block of steps when one is asked for.

    numbers: how many numbers a step needs, about. Blocks begin at multiples of their length, wherever a run begins.
    """

    def __init__(self, make: Callable[[int, int], Block[T]], numbers: int, device: torch.device) -> None:
        self.make = make
        self.n_steps = max(1, min(MOST_STEPS, NUMBERS.get(device.type, NUMBERS["cpu"]) // numbers))
        self.block: tuple[int, Block[T]] | None = None

    def of_step(self, i: int) -> T:
        """Return what step `i` needs."""
        number, k = divmod(i, self.n_steps)
        if self.block is None or self.block[0] != number:
            self.block = None  # let its memory go before the next one is made
            self.block = number, self.make(number * self.n_steps, self.n_steps)
        return self.block[1][k]


def to_device(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an array as a tensor on a device, without waiting for CUDA. It is made a `dtype` on the host."""
    import torch

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor.to(dtype or tensor.dtype)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()  # a copy from other memory may wait
    return tensor.to(device, non_blocking=device.type == "cuda")
