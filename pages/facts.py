"""What the folder of a run of run_sjc.py says of it."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from my import run_dir, starts
from my.errors import shown
from options.sjc import SJCConfig

RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"
FRESH_S = 60.0  # where there are no locks, a run counts as running for so long after its last sign of life


class Facts(NamedTuple):
    """What is known of a run."""

    folder: Path
    cfg: SJCConfig
    rows: list[dict[str, Any]]  # of history.json
    state: str
    why: str  # it failed or stopped
    step: int  # steps taken
    eta_s: float | None  # seconds that are left
    seconds: float | None  # that its commands took together, as far as is known
    per_step: float | None  # seconds
    starts: list[starts.Start]
    n_damaged: int  # lines of starts.json


def gather(folder: Path, cfg: SJCConfig, step: int = 0, logged: bool = True) -> Facts:
    """Return what is known of the run in a folder. It has taken at least `step` steps.

    Raises UserError where a run that is `logged` has no history.json, or a damaged one.
    """
    rows = run_dir.read_history(folder / "history.json") if logged else []
    beat = run_dir.read_heartbeat(folder / "heartbeat.json")
    at = min(max([step, whole(beat.get("step")), *(whole(row["step"]) for row in rows[-1:])]), cfg.n_steps)
    begun, n_damaged = starts.read(folder)
    state, why = state_of(folder, beat, at >= cfg.n_steps)
    known = [seconds for start in begun if (seconds := start.seconds) is not None]
    elapsed, eta = real(beat.get("elapsed_s")), real(beat.get("eta_s"))
    left_then = cfg.n_steps - whole(beat.get("step"))  # when the heartbeat was written, a little earlier
    per_step = eta / left_then if eta and left_then > 0 else None
    if per_step is None and elapsed and len(begun) < 2 and at:
        per_step = elapsed / at
    eta = per_step * (cfg.n_steps - at) if per_step and state == RUNNING else None
    return Facts(folder, cfg, rows, state, why, at, eta, sum(known) if known else elapsed, per_step, begun, n_damaged)


def state_of(folder: Path, beat: dict[str, Any], complete: bool) -> tuple[str, str]:
    """Return (state, why it ended early or "") of a run, by its heartbeat and whether all steps are taken."""
    if complete and (beat.get("done") is True or not beat):
        return FINISHED, ""
    stopped, failed = beat.get("stopped"), beat.get("failed")
    if isinstance(stopped, str) and stopped:
        return STOPPED, f"stopped by {shown(stopped)}"
    if isinstance(failed, str) and failed:
        kind, _, words = failed.partition(": ")
        return FAILED, shown(starts.without_home(words or kind), 1000)
    held = run_dir.is_held(folder)
    if held is None:
        held = since(beat.get("updated")) < FRESH_S
    return (RUNNING, "") if held else (STOPPED, "its process was killed")


def since(stamp: Any) -> float:
    """Return the seconds since a time in ISO; infinity where it is none."""
    try:
        return (datetime.now(timezone.utc) - datetime.fromisoformat(stamp)).total_seconds()
    except (TypeError, ValueError):
        return math.inf


def whole(value: Any) -> int:
    """Return a count out of a file, 0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def real(value: Any) -> float | None:
    """Return a finite number out of a file, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
