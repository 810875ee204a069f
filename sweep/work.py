"""All runs of a sweep, from the first start until the last end, with a bar; Ctrl-C ends them all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sweep import folder
from sweep.executors import Executor
from sweep.plan import Run

POLL_S = 0.5


def work(
    runs: Sequence[Run], unfinished: Sequence[Run], executor: Executor, ended: Callable[[Collection[str]], None]
) -> None:
    """Start the unfinished runs, and return when all have ended; `ended` is called after each end, with the
    names of those that are running.

    Any exception, such as that of Ctrl-C, ends all runs, and passes on.
    """
    waiting = list(unfinished)
    by_name = {run.name: run for run in runs}
    for run in unfinished:
        Path(run.name).mkdir(exist_ok=True)
    with Bar(runs, unfinished) as bar:
        try:
            while waiting or executor.jobs:
                executor.start(waiting)
                for name in [name for name, job in executor.jobs.items() if job.done()]:
                    del executor.jobs[name]
                    bar.end(by_name[name])
                    ended(executor.jobs)
                bar.move(len(executor.jobs))
                time.sleep(POLL_S)
        except BaseException:
            executor.stop()
            raise


class Bar:
    """A bar over the steps of all runs, which their heartbeats tell; its estimate of the time left is tqdm's."""

    def __init__(self, runs: Sequence[Run], unfinished: Sequence[Run]) -> None:
        self.runs, self.names = runs, {run.name for run in unfinished}
        self.steps = {run.name: folder.state_of(run).step for run in runs}
        self.ends = Counter[str]({folder.FINISHED: len(runs) - len(unfinished)})

    def __enter__(self) -> Bar:
        from tqdm import tqdm

        total = sum(run.cfg.n_steps for run in self.runs)
        self.bar = tqdm(total=total, initial=sum(self.steps.values()), desc="sweep", unit="step")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def end(self, run: Run) -> None:
        """Print how a run ended."""
        state = folder.state_of(run)
        self.ends[state.status] += 1
        self.names.discard(run.name)
        self.steps[run.name] = state.step
        took = f", {state.seconds:.0f} s" if state.seconds is not None else ""
        self.bar.write(f"{run.name}: {state.status}{took}{': ' * bool(state.why)}{state.why}")

    def move(self, running: int) -> None:
        """Move the bar to the steps that all runs are at."""
        for name in self.names:
            self.steps[name] = max(self.steps[name], folder.step_now(Path(name)))
        counts = [f"{n} {status}" for status, n in [("running", running), *sorted(self.ends.items())] if n]
        self.bar.set_postfix_str(", ".join(counts), refresh=False)
        self.bar.update(sum(self.steps.values()) - self.bar.n)
