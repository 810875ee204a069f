"""What a run leaves in its folder: files that are whole or absent, a history, a heartbeat."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from my import plain_files
from my.errors import UserError, note, shown, some
from my.file_system import Lock, delete_folder, is_locked, move, real
from my.signals import command_is_done, who_stopped

LOCK = ".lock"  # the file of a folder's lock
PATIENCE_S = 0.5  # for another process that only looks whether the folder is held
WRITTEN = (
    "img",
    "depth",
    "view",
    "pane",
    "imgs",
    "cells",
    "fields",
    "flight",
    "test_*",
    "test_*/*",
)  # folders in those of runs
STOPPED = "stopped"  # what a row of a history has that says which signal ended the run after its step, or "an error"
SCRATCH = re.compile(r"\..+\.([1-9]\d{0,8})\.tmp(\.\w+)?")  # `scratch_of` a process; also a folder's name


def write_atomic(path: str | Path, data: str | bytes) -> None:
    """Put `data` (str or bytes) at `path`: a reader sees the old file or the whole new one."""
    write_together({str(path): data})


def write_together(contents: Mapping[str, str | bytes]) -> None:
    """Put each of `contents`, {path: str or bytes}, at its path; where one cannot be written, no file is changed.

    A reader sees old files or whole new ones. They are put in place in their order.
    """
    scratches = {path: scratch_of(path) for path in contents}
    path = None
    try:
        for path, data in contents.items():
            with open(scratches[path], "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for path, scratch in scratches.items():
            move(scratch, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = path  # for messages: nobody knows the name of the scratch file
        for scratch in scratches.values():
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
        raise


def scratch_of(path: str | Path, ending: str = "") -> Path:
    """Return where this process writes what will be renamed to `path`; `ending` is for writers that go by it."""
    return Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp{ending}")


def clear_scratch(root: str | Path = ".", folders: Iterable[str] = WRITTEN, held: bool = True) -> None:
    """Delete what processes that were killed have left half-written in `root`, and in some folders in it.

    What a living process writes stays. This one is to begin only later: what has its number is of an earlier process,
    which happens where each container counts processes from 1. What cannot be deleted stays too.

    held: whether this process holds `root`. A folder that another holds, or may hold, is left alone: a run that is at
    work on another machine has a number that nobody has here.
    """
    within = (path for pattern in folders for path in Path(root).glob(pattern) if path.is_dir())
    for folder in (Path(root), *within):
        if not (held and folder == Path(root)) and is_held(folder) is not False:
            continue
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                match = SCRATCH.fullmatch(name)
                if match and (int(match[1]) == os.getpid() or not is_alive(int(match[1]))):
                    remove(folder / name)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it. What cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):
            delete_folder(path)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def refuse_output(flag: str, path: str | Path) -> None:
    """Raise UserError where no file can be written at `path`, which was given to a flag: before the work, not after it.

    Raises OSError where its folder takes no file.
    """
    try:
        parent, there = Path(os.path.realpath(path)).parent, Path(path).exists()
    except ValueError as error:  # a character that no name can have
        raise UserError(f"{flag} {shown(str(path))}: {error}; give the name of a file") from None
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {parent}; make it first")
    if there and not Path(path).is_file():
        what = "a folder" if Path(path).is_dir() else "no file on disk"
        raise UserError(f"{flag} {path}: that is {what}; give the name of a file")
    scratch = scratch_of(path)
    try:
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        error.filename = str(path)
        raise


def refuse_unwritable() -> None:
    """Raise OSError where no file can be made in the current folder: before the work, not after it."""
    tempfile.TemporaryFile(dir=".").close()


def refuse_project_dir(project_root: str | Path) -> None:
    """Raise UserError if the current folder is the project's own, or lies inside it."""
    root = Path(project_root).resolve()
    if Path.cwd().resolve().is_relative_to(root):
        raise UserError(
            "results go to the current folder, and this one belongs to the project; go to an "
            f"experiment directory, such as ~/sjc_runs/burger, and start python {root / Path(sys.argv[0]).name} there"
        )


def refuse_inside(flag: str, path: str | Path, project_root: str | Path) -> None:
    """Raise UserError for a folder, which `flag` names, inside the project."""
    if real(path).is_relative_to(Path(project_root).resolve()):
        raise UserError(f"{flag} {path}: lies in the project; give a folder outside it")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the current folder while the block runs; UserError if another process holds it.

    The hold ends with the process, however that ends. Some file systems have no locks: nothing is held there.
    """
    lock = Lock(Path(LOCK).absolute())
    try:
        if lock.acquire(PATIENCE_S) is False:
            pid = " (heartbeat.json has its pid)" if os.path.exists("heartbeat.json") else ""
            raise UserError(f"another process is at work in this folder{pid}; wait for its end, or stop it")
        yield
    finally:
        lock.release()


def is_held(folder: str | Path) -> bool | None:
    """Whether a process holds a folder by `alone`, this one or another; None where there are no locks."""
    return is_locked(Path(folder) / LOCK)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this id on this machine."""
    import psutil

    return psutil.pid_exists(pid)


class History:
    """Appends one JSON object per line, floats in full precision; a non-finite float becomes null.

    path: the file; a new run starts it empty.
    resume_step: the lines up to and including this step are kept, and new ones are appended after them.
    every: after so many steps there is a line. A note says which of those that are kept are missing.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, every: int | None = None) -> None:
        rows: list[dict[str, Any]] = []
        if resume_step is not None and Path(path).exists():
            rows = [row for row in read_history(path) if row["step"] <= resume_step]
        if resume_step is not None and every is not None:
            tell_missing(path, rows, resume_step, every)
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.file = open(path, "ab", buffering=0)

    def add(self, step: int, **values: Any) -> None:
        """Append {"step": step, **values}; 0-d tensors and arrays are stored as numbers."""
        row = plain({"step": step, **values})
        append(self.file, (json.dumps(row, allow_nan=False) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def append(file: FileIO, data: bytes) -> None:
    """Write bytes at the end of a file, all of them or none: what a full disk took of them is taken back."""
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        error.filename = file.name
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def tell_missing(path: str | Path, rows: Iterable[Mapping[str, Any]], last: int, every: int) -> None:
    """Say in a note which lines a history lacks that it has after `every` so many steps, up to the step `last`."""
    there = {row["step"] for row in rows}
    missing = [step for step in range(every, last + 1, every) if step not in there]
    if missing:
        note(
            f"{path} lacks {len(missing)} of its {last // every} lines up to step {last}, those of step "
            f"{some(missing)}; its curves have a gap there, and the run itself is whole"
        )


def plain(value: Any) -> Any:
    """Return `value` as JSON data: scalars out of tensors, None for a float that is not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a history file as dicts; a half-written last line is left out.

    Raises UserError where the file is missing, a line before the last is damaged, or the steps do not go up.
    """
    try:
        *lines, _half = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this the folder of a run?") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = row_of(line)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is damaged; delete that line") from None
        before = rows[-1]["step"] if rows else -1
        stopped = STOPPED in row or (bool(rows) and STOPPED in rows[-1])  # its step may be that of its neighbour
        if row["step"] < before or (row["step"] == before and not stopped):
            raise UserError(
                f"{path}: line {number} has step {shown(row['step'])} behind step {before}; delete the wrong one"
            )
        rows.append(row)
    return rows


def row_of(line: bytes) -> dict[str, Any]:
    """Return a row of a history; ValueError, TypeError or KeyError where the line is none."""
    row = plain_files.parse_json(line.decode())
    if type(row["step"]) is not int or row["step"] < 0:
        raise ValueError
    return plain(row)


def read_heartbeat(path: str | Path) -> dict[str, Any]:
    """Return what a heartbeat's file says, {} where there is none."""
    try:
        return plain_files.read_json(path)
    except (OSError, ValueError):
        return {}


def is_done(folder: str | Path = ".") -> bool:
    """Whether the heartbeat in a folder says that its run is complete."""
    return read_heartbeat(Path(folder) / "heartbeat.json").get("done") is True


def names_in(folder: str | Path) -> list[str]:
    """Return the names in a folder, none where there is no such folder; OSError for one that cannot be read."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


class Heartbeat:
    """Tells other programs how far a run is, in one small JSON file.

    path: the file; it holds step, n_steps, progress in [0, 1], eta_s, elapsed_s, updated (ISO, UTC),
    done, saved (steps after which the newest checkpoint was written, null before the first), pid, and `failed`
    ("Type: message") after an exception inside the `with` block, or `stopped` (its name) after a signal.
    every_s: least number of seconds between writes of `beat`.  start_step: where a resumed run begins.
    saved: what the file is to say of that at first; without it, a resumed run has a checkpoint where it begins.
    clock: returns monotonic seconds.  put: calls its first argument with the others, now or later; `beat` writes by it.
    """

    def __init__(
        self,
        path: str | Path,
        n_steps: int,
        every_s: float = 5.0,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        put: Callable[..., object] = lambda job, *args: job(*args),
        saved: int | None = None,
    ) -> None:
        self.path, self.n_steps, self.every_s, self.clock, self.put = path, n_steps, every_s, clock, put
        self.start_step = self.step = start_step
        self.saved = saved if saved is not None else start_step or None
        self.started = clock()
        self.written = -math.inf

    def beat(self, step: int) -> None:
        """Record that `step` steps are finished; the file is written only where `every_s` have passed."""
        self.step = step
        if self.clock() - self.written >= self.every_s:
            self.put(write_atomic, self.path, self._state(done=False))

    def save(self, step: int) -> None:
        """Record, at once, that the state after `step` steps has been saved."""
        self.step = self.saved = step
        self._write(done=False)

    def finish(self) -> None:
        """Record that the run is complete, which no signal changes any more."""
        command_is_done()
        self._write(done=True)

    def _write(self, done: bool, **extra: Any) -> None:
        write_atomic(self.path, self._state(done, **extra))

    def _state(self, done: bool, **extra: Any) -> str:
        """Return what the file is to hold, and take down when that was."""
        self.written = self.clock()
        elapsed = self.written - self.started
        fresh, left = self.step - self.start_step, self.n_steps - self.step
        state = {
            "step": self.step,
            "n_steps": self.n_steps,
            "progress": self.step / self.n_steps if self.n_steps else 1.0,
            "eta_s": 0.0 if done else elapsed / fresh * left if fresh > 0 else None,
            "elapsed_s": elapsed,
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "done": done,
            "saved": self.saved,
            "pid": os.getpid(),
            **extra,
        }
        return json.dumps(state, indent=2) + "\n"

    def __enter__(self) -> Heartbeat:
        self._write(done=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
            return
        with contextlib.suppress(OSError):  # a full disk must not hide the first error
            by = who_stopped(error) if error else ""
            self._write(done=False, **{"stopped": by} if by else {"failed": f"{kind.__name__}: {error}".rstrip(": ")})
