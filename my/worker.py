"""One thread for what a loop should not wait for: pictures, files, and values on their way from the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


def alone() -> None:
    """Have PyTorch use no other thread for what the calling thread asks of it.

    Otherwise a second set of OpenMP threads starts. Then both sets sleep between operations, and a small network on the
    first one takes more than twice as long.
    """
    import torch

    torch.set_num_threads(1)


class Worker:
    """A thread that does jobs one after another, in the order in which they are given; a context manager.

    most: how many jobs may wait. `put` waits where there are more.
    Once a job has raised an exception, no later job is done. The next `put` or `join` raises the exception, or else the
    end of the block. A block that ends with an exception of its own raises that one; it waits for its jobs too.
    """

    def __init__(self, most: int = 16) -> None:
        self.most, self.broken = most, False
        self.given: deque[Future[None]] = deque()
        self.thread = ThreadPoolExecutor(1, "worker", initializer=alone)

    def put(self, job: Callable[..., object], *args: object) -> None:
        """Give it the job of calling `job(*args)`."""
        while self.given and (self.given[0].done() or len(self.given) >= self.most):
            self._take()
        self.given.append(self.thread.submit(self._do, job, *args))

    def join(self) -> None:
        """Wait until all jobs are done."""
        while self.given:
            self._take()

    def _take(self) -> None:
        """Wait for the oldest job. One that has raised an exception stays the oldest."""
        self.given[0].result()
        self.given.popleft()

    def _do(self, job: Callable[..., object], *args: object) -> None:
        if self.broken:
            return
        try:
            job(*args)
        except BaseException:
            self.broken = True
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.thread.shutdown()
        if kind is None:
            self.join()
