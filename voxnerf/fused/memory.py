"""CPU memory that is used again: pages fresh from the system can cost more time than the march that fills them."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import numpy as np
import torch

MAX_FREE = 8  # blocks of memory that a `Recycler` keeps
GRAIN = 2**18  # floats: sizes are rounded up to a multiple of it, so that a block fits again


class Recycler:
    """Gives out float32 tensors with any content, and takes their memory back when nothing refers to it any more."""

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []

    def empty(self, n: int) -> torch.Tensor:
        """Return a CPU tensor (n,) float32, in the memory of an earlier one where one is free that fits."""
        size = -(-max(n, 1) // GRAIN) * GRAIN
        fits = [i for i, block in enumerate(self.free) if size <= len(block) <= 2 * size]
        block = self.free.pop(min(fits, key=lambda i: len(self.free[i]))) if fits else np.empty(size, np.float32)
        view = block[:n]  # lives exactly as long as the tensor's storage
        weakref.finalize(view, self._take_back, block).atexit = False
        return torch.from_numpy(view)

    def _take_back(self, block: np.ndarray) -> None:
        self.free.append(block)
        del self.free[:-MAX_FREE]


class Workspaces:
    """Keeps tensors of zeros between marches. Nobody else may ever see them, since they are not looked at again.

    The borrower gives a workspace back when it is all zeros again. A workspace that is not given back is forgotten.
    """

    def __init__(self) -> None:
        self.layout: Hashable = None
        self.free: list[torch.Tensor] = []

    def take(self, layout: Hashable, n: int, device: torch.device) -> torch.Tensor:
        """Return zeros (n,) float32. `layout` names what they are for; those of the layout before are let go."""
        if layout != self.layout:
            self.layout, self.free = layout, []
        return self.free.pop() if self.free else torch.zeros(n, device=device)

    def give_back(self, layout: Hashable, zeros: torch.Tensor) -> None:
        """Take back a workspace that is all zeros."""
        if layout == self.layout:
            self.free.append(zeros)
