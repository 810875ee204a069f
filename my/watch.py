"""What each training leaves while it runs: history.json, heartbeat.json, and a progress bar."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from my.host_copy import HostCopy
from my.run_dir import STOPPED, Heartbeat, History
from my.signals import Heed, Stopped, gently
from my.worker import Worker

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY = 10  # steps between lines of history.json

Item = TypeVar("Item", bound=tuple[Any, ...])  # (steps taken, ...)
Judge = Callable[
    [dict[str, Any]], tuple[dict[str, Any], dict[str, str]]
]  # values -> (row, {name: text beside the bar})


@dataclass
class Watch:
    """The files and the bar of a training that `watched` has opened, and the worker that writes the files.

    save: writes a checkpoint after so many steps.  minutes: after how many minutes at most there is one.
    """

    history: History
    heartbeat: Heartbeat
    bar: tqdm
    worker: Worker
    heed: Heed
    save: Callable[[int], object]
    minutes: float | None
    saved_at: float  # seconds, of `time.monotonic`

    def over(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Yield the items (steps taken, ...) of a training; heartbeat and bar move on when the loop has dealt with one.

        After the last item it waits for the worker, and closes the bar. Where a signal asks the training to end, it
        does so once the loop has dealt with an item: a checkpoint is written, and Stopped raised.
        """
        self.heed.waits = True
        for item in steps:
            yield item
            self.heartbeat.beat(item[0])
            self.bar.update(item[0] - self.bar.n)
            if self.heed.asked:
                self.stop(item[0], self.heed.asked)
        self.heed.waits = False
        if self.heed.asked:  # since the last look
            self.stop(self.heartbeat.step, self.heed.asked)
        self.worker.join()
        self.bar.close()

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint after `step` steps, once the worker has done its jobs."""
        self.worker.join()
        self.save(step)
        self.heartbeat.save(step)
        self.saved_at = time.monotonic()

    def rescue(self, step: int) -> None:
        """Write a checkpoint after `step` steps, where there is none yet, for a training that ends in an exception.

        Its state is whole. So it is saved though a job of the worker may have failed, too. The step may have no row of
        its own in the history, which says why.
        """
        with contextlib.suppress(Exception):
            self.worker.join()
        if self.heartbeat.saved != step:
            self.save(step)
            self.heartbeat.save(step)
        self.history.add(step, **{STOPPED: "an error"})

    def stop(self, step: int, number: int) -> NoReturn:
        """Write a checkpoint after `step` steps, where there is none yet, and raise Stopped for a signal."""
        if self.heartbeat.saved != step:
            self.checkpoint(step)
        stopped = Stopped(number, f"the state after step {step} is saved")
        self.history.add(step, **{STOPPED: str(stopped)})
        self.bar.close()
        raise stopped

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end of the training, happens after `step` steps."""
        return step % every == 0 or step == self.heartbeat.n_steps

    @property
    def late(self) -> bool:
        """Whether the last checkpoint is so many minutes old that there is to be another."""
        return self.minutes is not None and time.monotonic() - self.saved_at >= 60 * self.minutes

    def log(self, step: int, values: dict[str, Any], judge: Judge) -> None:
        """Add to history.json the row that `judge` makes of `values`, and show beside the bar what it gives for that.

        Nothing waits here. The worker calls `judge`, once the tensors among the values have come from the device. An
        empty row is not added. An exception of `judge` stops the training, as any exception of the worker.
        """
        self.worker.put(self._log, step, list(values), HostCopy(*values.values()), judge)

    def _log(self, step: int, names: list[str], values: HostCopy, judge: Judge) -> None:
        row, shown = judge(dict(zip(names, values)))
        if row:
            self.history.add(step, **row)
            self.bar.set_postfix(shown, refresh=False)

    def expect(self, n_steps: int) -> None:
        """Set how many steps the training will take, where that is an estimate."""
        self.heartbeat.n_steps = self.bar.total = n_steps


@contextlib.contextmanager
def watched(
    name: str,
    n_steps: int,
    first_step: int,
    save: Callable[[int], object],
    minutes: float | None = None,
    saved: int | None = None,
) -> Iterator[Watch]:
    """Open the files of a training of `n_steps` steps in the current folder, and a bar called `name`.

    `save` and `minutes` are as in `Watch`, and `saved` as in `Heartbeat`.

    A resumed training begins at `first_step`: history.json keeps its lines up to there, and a note says which of them
    are missing. At the end of the block the
    worker has done its jobs, and heartbeat.json says that the run is complete, or which exception ended it.
    """
    from tqdm import tqdm

    worker = Worker()
    with (
        gently() as heed,
        History("history.json", first_step, LOG_EVERY) as history,
        Heartbeat("heartbeat.json", n_steps, start_step=first_step, put=worker.put, saved=saved) as heartbeat,
        tqdm(total=n_steps, initial=first_step, desc=name, unit="step") as bar,
        worker,  # the first to end: its jobs use the others
    ):
        yield Watch(history, heartbeat, bar, worker, heed, save, minutes, time.monotonic())
