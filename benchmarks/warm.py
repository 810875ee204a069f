"""The project's commands in processes that stay warm: what one run has imported and rendered, the next one has."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from my.errors import explain

THREADS = "OMP_NUM_THREADS"
SAID = "said.txt"


@contextlib.contextmanager
def processes(n: int) -> Iterator[ProcessPoolExecutor]:
    """Have `n` processes with one CPU thread each. Where the block ends with an error, what waits is not begun."""
    own = os.environ.get(THREADS)
    os.environ[THREADS] = "1"  # they are started anew, when there is work for them, and read it
    pool = ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.pop(THREADS)
        if own is not None:
            os.environ[THREADS] = own


def call(command: Sequence[str], cwd: Path) -> str | None:
    """Run one of the project's commands, a script or a module, in this process and the folder `cwd`.

    Returns None, or why it failed, in one line: SAID in the folder has what it said.
    """
    main = importlib.import_module(command[0].removesuffix(".py")).main
    said, here = io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main([*command[1:]])
    except Exception as error:  # noqa: BLE001 (a bug too is a run that failed, and no reason to end the others)
        Path(SAID).write_text(f"{said.getvalue()}\n{traceback.format_exc()}", encoding="utf-8")
        message, _ = explain(error, "start it again") or (f"{type(error).__name__}: {error}", 1)
        return message
    finally:
        os.chdir(here)
        gc.collect()  # a run's tensors hang in cycles, and Python sees only how many objects there are
    return None
