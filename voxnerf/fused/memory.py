"""Recycled CPU memory: pages fresh from the system can cost more than the march that fills them."""

import weakref

import numpy as np
import torch

MAX_FREE = 8  # blocks kept
GRAIN = 2**18  # floats; sizes are rounded up to it, so that blocks fit again
LOOK = 997  # every so many-th float of recycled zeros is looked at


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


class Zeros:
    """Gives out tensors of zeros, and takes their memory back; of that it zeroes only what was written to.

    What kernels wrote is what the borrower says (`Loan.touched`). If PyTorch counts any other write, all
    is zeroed; one that it does not count (through `.data` or numpy) is noticed from some thousand floats on.
    """

    def __init__(self, keep):
        self.keep = keep  # pieces of memory
        self.free = []  # (layout, memory, what was touched)

    def take(self, layout, n, clear, device):
        """Return zeros (n,) float32 and their `Loan`; on a GPU they are new ones.

        layout: what `Loan.touched` refers to; memory of another one is given back to the system.
        clear: called as clear(tensor (n,), touched), zeroes what was touched.
        """
        if device.type != "cpu":
            zeros = torch.zeros(n, device=device)
            return zeros, Loan(zeros)
        self.free = [entry for entry in self.free if entry[0] == layout]
        fits = [i for i, (_, memory, _) in enumerate(self.free) if len(memory) == n]
        if fits:
            _, memory, touched = self.free.pop(fits[-1])
            if torch.is_tensor(touched):
                clear(torch.from_numpy(memory), touched)
            if touched is True or memory[::LOOK].any():
                torch.from_numpy(memory).zero_()
        else:
            memory = np.zeros(n, np.float32)
        view = memory[:]  # lives exactly as long as the tensor's storage
        tensor = torch.from_numpy(view)
        loan = Loan(tensor)
        weakref.finalize(view, self._take_back, layout, memory, loan).atexit = False
        return tensor, loan

    def _take_back(self, layout, memory, loan):
        self.free.append((layout, memory, loan.changed() or loan.touched))
        del self.free[: -self.keep]


class Loan:
    """What is known of a tensor of zeros that is given out."""

    def __init__(self, tensor):
        self.touched = True  # by kernels: anything (True), nothing (False), or the flags that `clear` takes
        self._witness = tensor.detach()  # counts the writes to the tensor,
        self._witness.data = torch.empty(0)  # but does not keep its memory

    def changed(self):
        """Return whether PyTorch has written to the tensor."""
        return self._witness._version > 0
