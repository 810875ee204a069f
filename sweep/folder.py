"""What the folder of a run says of it. Nothing here changes a file but `record`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from my import checkpoint, config, plain_files, script
from my.errors import UserError, shown
from my.run_dir import read_heartbeat, write_atomic
from my.signals import ASKING, ENDED
from options.sjc import SJCConfig
from sweep.plan import Run

OUT, ERR, ATTEMPTS = "stdout.txt", "stderr.txt", "attempts.json"
WAITING, RUNNING, STOPPED, FAILED, FINISHED = "waiting", "running", "stopped", "failed", "finished"
STOPPING = {status for n in ASKING for status in (ENDED + n, -n)}  # exit statuses of a run that a signal asked to end
TAIL = 4000  # bytes at the end of stderr in which its last line is looked for


class State(NamedTuple):
    """How far a run is."""

    status: str
    step: int
    seconds: float | None  # of all its attempts
    why: str = ""  # it failed


def state_of(run: Run) -> State:
    """Return how far a run of the current folder is, which no process is at."""
    folder = Path(run.name)
    tries = attempts(folder)
    seconds = sum(attempt["seconds"] for attempt in tries) if tries else None
    newest, beat = checkpoint.latest(folder / "ckpt"), read_heartbeat(folder / "heartbeat.json")
    step = checkpoint.step_of(newest) if newest else 0
    if step >= run.cfg.n_steps and beat.get("done") is True:
        return State(FINISHED, step, seconds)
    if not tries:
        return State(STOPPED if newest else WAITING, step, seconds)
    status = tries[-1]["status"]
    if status in STOPPING:
        return State(STOPPED, step, seconds)
    return State(FAILED, step, seconds, why_failed(folder, status))


def why_failed(folder: Path, status: int) -> str:
    """Return the last line that a run wrote to stderr; for one that a signal ended, which signal."""
    if status < 0:
        return f"ended by signal {-status}"
    return last_line(folder / ERR) or f"ended with status {status}"


def last_line(path: Path) -> str:
    """Return the last line of a text file that is not blank, "" where there is none; a bar's refreshes are lines."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())
    except OSError:
        return ""
    return shown(lines[-1], 300)


def step_now(folder: Path) -> int:
    """Return the step that a run is at, by its heartbeat."""
    step = read_heartbeat(folder / "heartbeat.json").get("step", 0)
    return step if isinstance(step, int) else 0


def attempts(folder: Path) -> list[dict[str, Any]]:
    """Return the attempts at a run: [{"started": ISO, "seconds", "status": its exit status}]."""
    try:
        found = plain_files.read_json(folder / ATTEMPTS, ["attempts"])["attempts"]
        return [{**each, "seconds": float(each["seconds"]), "status": int(each["status"])} for each in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def record(folder: Path, started: str, seconds: float, status: int) -> None:
    """Add an attempt to those of a run."""
    rows = [*attempts(folder), {"started": started, "seconds": round(seconds, 3), "status": status}]
    write_atomic(folder / ATTEMPTS, json.dumps({"attempts": rows}, indent=2) + "\n")


def refuse_others(runs: Sequence[Run]) -> None:
    """Raise UserError where the folder of a run holds a run with other options."""
    free = script.free_on_resume(SJCConfig)
    for run in runs:
        path = Path(run.name) / script.FULL_CONFIG
        if not path.exists() or not checkpoint.latest(path.parent / "ckpt"):
            continue
        script.refuse_other_run(SJCConfig, run.name)
        there, here = config.flat(config.read(SJCConfig, path)), config.flat(run.cfg)
        changed = [name for name in here if name not in free and here[name] != there[name]]
        if changed:
            name = changed[0]
            raise UserError(
                f"{run.name}: holds a run with --{name} {shown(there[name])}, and this sweep has {shown(here[name])}; "
                "move that folder away, or start this sweep in another one"
            )
