"""The project's commands in processes that stay warm: what one run has imported and rendered, the next one has."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from my.errors import explain


@contextlib.contextmanager
def processes(n: int) -> Iterator[ProcessPoolExecutor]:
    """Have `n` processes with one CPU thread each. Where the block ends with an error, what waits is not begun."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes, which are started anew and read it
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def call(command: Sequence[str], cwd: Path) -> str | None:
    """Run one of the project's commands, a script or a module, in this process and the folder `cwd`.

    Returns None, or why it failed, in one line.
    """
    main = importlib.import_module(command[0].removesuffix(".py")).main
    said = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main([*command[1:]])
        except Exception as error:  # noqa: BLE001  # a bug too is a run that failed, and no reason to end the others
            message, _ = explain(error, "start it again") or (f"{type(error).__name__}: {error}", 1)
            return message
    return None
