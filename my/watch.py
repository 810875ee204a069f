"""What each training leaves while it runs: history.json, heartbeat.json, and a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from my.run_dir import Heartbeat, History

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY = 10  # steps between lines of history.json

Item = TypeVar("Item", bound=tuple[Any, ...])  # (steps taken, ...)


class Watch(NamedTuple):
    """The files and the bar of a training that `watched` has opened."""

    history: History
    heartbeat: Heartbeat
    bar: tqdm

    def over(self, steps: Iterable[Item]) -> Iterator[Item]:
        """Yield the items (steps taken, ...) of a training; heartbeat and bar move on when the loop has dealt with one.

        The bar is closed after the last item.
        """
        for item in steps:
            yield item
            self.heartbeat.beat(item[0])
            self.bar.update()
        self.bar.close()

    def due(self, step: int, every: int) -> bool:
        """Whether what happens every so many steps, and at the end of the training, happens after `step` steps."""
        return step % every == 0 or step == self.heartbeat.n_steps

    def log(self, step: int, row: dict[str, Any], shown: dict[str, str]) -> None:
        """Add a row to history.json, and show beside the bar what `shown` has."""
        self.history.add(step, **row)
        self.bar.set_postfix(shown, refresh=False)

    def expect(self, n_steps: int) -> None:
        """Set how many steps the training will take, where that is an estimate."""
        self.heartbeat.n_steps = self.bar.total = n_steps


@contextlib.contextmanager
def watched(name: str, n_steps: int, first_step: int) -> Iterator[Watch]:
    """Open the files of a training of `n_steps` steps in the current folder, and a bar called `name`.

    A resumed training begins at `first_step`: history.json keeps its lines up to there. At the end of the block
    heartbeat.json says that the run is complete, or which exception ended it.
    """
    from tqdm import tqdm

    with (
        History("history.json", first_step) as history,
        Heartbeat("heartbeat.json", n_steps, start_step=first_step) as heartbeat,
        tqdm(total=n_steps, initial=first_step, desc=name, unit="step") as bar,
    ):
        yield Watch(history, heartbeat, bar)
