"""Recycled CPU memory: pages fresh from the system can cost more than the march that fills them."""

import weakref

import numpy as np
import torch

MAX_FREE = 8  # blocks kept
GRAIN = 2**18  # floats; sizes are rounded up to it, so that blocks fit again


class Recycler:
    """Gives out uninitialised float32 tensors, and takes their memory back when nothing refers to it any more."""

    def __init__(self):
        self.free = []

    def empty(self, n):
        """Return a CPU tensor (n,) float32, on memory of an earlier one where some fits."""
        size = -(-max(n, 1) // GRAIN) * GRAIN
        fits = [i for i, block in enumerate(self.free) if size <= len(block) <= 2 * size]
        block = self.free.pop(min(fits, key=lambda i: len(self.free[i]))) if fits else np.empty(size, np.float32)
        view = block[:n]  # lives exactly as long as the tensor's storage
        weakref.finalize(view, self._take_back, block).atexit = False
        return torch.from_numpy(view)

    def _take_back(self, block):
        self.free.append(block)
        del self.free[:-MAX_FREE]
