"""What a machine does for one run: it starts run_sjc.py in the folder of the run, and waits for its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from submitit.helpers import Checkpointable, DelayedSubmission

from my import checkpoint
from my.run_dir import is_alive
from sweep import folder

POLL_S = 0.5  # between looks at whether to stop
PATIENCE_S = 60.0  # for a run to end after Ctrl-C, less than submitit's 90 s before the end of a job


class Job(Checkpointable):
    """Runs one command until it ends. Slurm calls it again where it was preempted or out of time: `checkpoint`.

    path: folder of the run, absolute.  command: its words; `--resume True` is added where there is a checkpoint.
    env: variables of the environment beside those of the machine.
    keeper: on this machine, the id of the process of run_sweep.py, whose end ends the run; None on a cluster.
    stop: on this machine, the file whose presence ends the run.
    """

    def __init__(
        self, path: str, command: Sequence[str], env: dict[str, str], keeper: int | None = None, stop: str = ""
    ) -> None:
        self.path, self.command, self.env, self.keeper, self.stop = path, list(command), env, keeper, stop
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Return the exit status of the run, -n where signal n ended it."""
        here = Path(self.path)
        resume = ["--resume", "True"] if checkpoint.latest(here / "ckpt") else []
        started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.monotonic()
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C in the terminal is for run_sweep.py, which tells us
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a run has neither: it ends by this signal
        with open(here / folder.OUT, "wb") as out, open(here / folder.ERR, "wb") as err, blocked(*self._ours()):
            self.child = subprocess.Popen(
                [*self.command, *resume],
                cwd=here,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.child.wait(POLL_S)
                break
            if self._is_to_stop():
                status = end(self.child)
                break
        folder.record(here, started, time.monotonic() - clock, status)
        return status

    def checkpoint(self) -> DelayedSubmission:
        """End the run, and return what goes on with it from its last checkpoint, when Slurm starts the job again."""
        child, self.child = self.child, None
        if child is not None:
            end(child)
        return super().checkpoint()

    def _is_to_stop(self) -> bool:
        return self.keeper is not None and (Path(self.stop).exists() or not is_alive(self.keeper))

    def _ours(self) -> tuple[int, ...]:
        """Return the signals that Slurm sends to every process of a job, and that are for the job, not for its run."""
        return (signal.SIGUSR2, signal.SIGTERM) if self.keeper is None else ()


@contextlib.contextmanager
def blocked(*signals: int) -> Iterator[None]:
    """Hold signals back while the block runs. Processes that are started in it never get them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def end(child: subprocess.Popen[bytes]) -> int:
    """End a process as Ctrl-C does, after PATIENCE_S by force; return its exit status."""
    child.send_signal(signal.SIGINT)
    try:
        return child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()
