"""The steps of a run whose update was left out, since its numbers were not finite, until they are tried again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from my.errors import RunError
from my.host_copy import HostCopy

if TYPE_CHECKING:
    import torch

BLOCK = 10  # steps whose flags are read together
LEFT_OUT = "left_out"  # what the meta of a checkpoint calls the steps that are to be tried again


class NeverFinite(RunError):
    """Ends a run in which a step gave numbers that are not finite, however often it was tried; `how` says that."""

    alike = True

    def __init__(self, i: int, how: str) -> None:
        super().__init__(f"step {i + 1}: its update is not finite, nor is it {how}")


class LeftOut:
    """Knows of each step whether its update was left out, and when it is due to be tried again.

    The flags of a block of steps are copied from the device when the block ends, and read when the next one has ended:
    by then they are there. So step i is due after (i // BLOCK + 2) * BLOCK steps, or at the end of the run. That
    depends on nothing else: a run that was stopped in between tries it at the same moment.
    """

    def __init__(self, known: Iterable[int] = ()) -> None:
        self.known = sorted(known)  # steps that were left out
        self.running: list[tuple[int, torch.Tensor]] = []  # steps of the running block, and their flags on the device
        self.coming: list[tuple[tuple[int, ...], HostCopy]] = []  # steps of the blocks before, and their flags

    def follow(self, i: int, stats: dict[str, Any], last: bool, retry: Callable[[int], object]) -> dict[str, Any]:
        """Take in the statistics of step `i`, of which `masked` () is whether it was left out; try again what is due.

        `retry` does that for a step, and raises where it fails: then the step stays due. Returns the statistics, which
        say as `retried` which steps were tried again; the first step is 1.
        """
        self.add(i, stats["masked"])
        return {**stats, **self.retried(i + 1, last, retry)}

    def retried(self, n_taken: int, last: bool, retry: Callable[[int], object]) -> dict[str, Any]:
        """Try again what is due after `n_taken` steps, as `follow` does; return {} where that is nothing."""
        due = self.due(n_taken, last)
        for late in due:
            retry(late)
            self.done(late)
        return {"retried": [late + 1 for late in due]} if due else {}

    def add(self, i: int, flag: torch.Tensor) -> None:
        """Take in the flag () of step `i`: whether it was left out."""
        self.running.append((i, flag))

    def due(self, n_taken: int, last: bool) -> list[int]:
        """Return the steps to try again after `n_taken` steps; `last` is whether no other step is to come."""
        if n_taken % BLOCK and not last:
            return []
        block = n_taken // BLOCK - 2
        self._copy()
        while self.coming and (last or self.coming[0][0][-1] // BLOCK <= block):
            self._read()
        return [i for i in self.known if last or i // BLOCK <= block]

    def done(self, i: int) -> None:
        """Forget step `i`, which was tried again."""
        self.known.remove(i)

    def all(self) -> list[int]:
        """Return all steps that were left out so far; waits for the device."""
        self._copy()
        while self.coming:
            self._read()
        return list(self.known)

    def _copy(self) -> None:
        """Begin to copy the flags of the running block, which ends."""
        if self.running:
            import torch

            steps, flags = zip(*self.running)
            self.coming.append((steps, HostCopy(torch.stack(flags))))
            self.running = []

    def _read(self) -> None:
        """Read the flags of the oldest block."""
        steps, flags = self.coming.pop(0)
        self.known = sorted({*self.known, *(i for i, flag in zip(steps, flags[0]) if flag)})
