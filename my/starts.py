"""Which commands made the run of a folder: starts.json, one JSON object per line. Its `kind` says what it is.

start   a command began: its words, seed, device, threads, versions
note    what the command said on stderr, or a warning of Python
use     the most memory that it had taken so far
end     how it ended, and its memory
A process that is killed leaves no end. Each line has the time `at` which it was written, ISO, UTC.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from my import errors, plain_files
from my.errors import UserError, note, shown
from my.machine import peak_memory
from my.run_dir import append
from my.signals import who_stopped

FILE = "starts.json"
MOST_NOTES = 100  # of one command, that the file takes
KINDS = ("start", "note", "use", "end")
OURS = {"version": "this project", "torch": "torch", "warp": "warp"}  # versions that a note tells of, and their names
DONE = "done"  # how a command ended; other words say what stopped it, or what went wrong


class Start(NamedTuple):
    """A command that worked on the run."""

    facts: dict[str, Any]  # what `recorded` was given, and `at`
    notes: list[str]  # in their order
    last: dict[str, Any]  # the last `use` or the `end`, {} where neither is there

    @property
    def ended(self) -> str:
        """How it ended: DONE, or what stopped it or went wrong; "" where the file does not say, as after a kill."""
        return str(self.last.get("how", ""))

    @property
    def seconds(self) -> float | None:
        """Seconds from its start to the last that is known of it; None where that is not known."""
        try:
            begin, end = (datetime.fromisoformat(each["at"]) for each in (self.facts, self.last))
            return max(0.0, (end - begin).total_seconds())
        except (KeyError, TypeError, ValueError):
            return None


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def recorded(**facts: Any) -> Iterator[None]:
    """Record in the current folder that a command begins, what it says while the block runs, and how that ends.

    Notes that were said before count too. Raises OSError where the file cannot be written; not for a note, which was
    printed, and not in place of another exception.
    """
    add("start", **facts)
    left = iter(range(MOST_NOTES))

    def hear(text: str) -> None:
        with contextlib.suppress(OSError):
            if next(left, None) is not None:
                add("note", text=without_home(text))

    with errors.heard_by(hear):
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                add("end", how=how(error), **peak_memory())
            raise
    add("end", how=DONE, **peak_memory())


def tell_other_versions(now: dict[str, str]) -> None:
    """Say in a note which versions of OURS are others `now` than when the run of the current folder began."""
    begun, _ = read(".")
    then = begun[0].facts.get("versions") if begun else None
    if not isinstance(then, dict):
        return
    other = [name for name in OURS if name in then and then[name] != now[name]]
    if other:
        before, after = (", ".join(f"{OURS[name]} {shown(each[name])}" for name in other) for each in (then, now))
        note(f"the run began with {before}, and goes on with {after}: its numbers may change from here on")


def use() -> None:
    """Record how much memory the command in the current folder has taken so far."""
    add("use", **peak_memory())


def how(error: BaseException) -> str:
    """Return how a command ended that ends with an exception."""
    if by := who_stopped(error):
        return f"stopped by {by}"
    kind = "" if isinstance(error, errors.Stop) else f"{type(error).__name__}: "
    return without_home(errors.as_message(f"{kind}{error}").rstrip(": "))


def add(kind: str, **facts: Any) -> None:
    """Append a line to the file in the current folder. A line before it that is not whole stays a line of its own."""
    line = json.dumps({"kind": kind, "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **facts})
    with open(FILE, "ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        half = file.read(1) not in (b"", b"\n")
        append(file, f"{chr(10) * half}{line}\n".encode())  # in one piece: threads may add lines at the same time


@contextlib.contextmanager
def heard_warnings() -> Iterator[None]:
    """While the block runs, what Python warns of is heard as notes are, beside being shown."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        before(message, category, filename, lineno, file, line)
        errors.hear(f"{category.__name__}: {errors.as_message(message)}")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def without_home(text: str) -> str:
    """Return a text in which paths below the home folder begin with ~, so that it does not say whose they are."""
    home = str(Path.home()).rstrip(os.sep)
    return text.replace(home + os.sep, f"~{os.sep}") if home else text


# ---------------------------------------------------------------- reading


def read(folder: str | Path) -> tuple[list[Start], int]:
    """Return (the starts of a run, how many lines of the file are damaged); ([], 0) where there is no file.

    Raises UserError for a file that is too large, or is none.
    """
    path = Path(folder) / FILE
    try:
        if plain_files.size_of(path) > plain_files.MAX_JSON:
            raise ValueError(f"has more than {plain_files.MAX_JSON} bytes")
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except ValueError as error:
        raise UserError(f"{path}: {error}; move it away") from None
    starts: list[Start] = []
    n_damaged = 0
    for line in filter(None, lines):
        try:
            take(starts, plain_files.parse_json(line.decode()))
        except (ValueError, TypeError, KeyError):
            n_damaged += 1
    return starts, n_damaged


def take(starts: list[Start], row: dict[str, Any]) -> None:
    """Add what a line says to the starts before it; ValueError, TypeError or KeyError where it is no such line."""
    kind = row["kind"]
    if kind == "start":
        starts.append(Start(row, [], {}))
    elif kind not in KINDS or not starts:  # what follows a start that is damaged belongs to no start
        raise ValueError
    elif kind == "note":
        starts[-1].notes.append(str(row["text"]))
    else:
        starts[-1] = starts[-1]._replace(last=row)
