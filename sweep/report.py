"""What people read of a sweep: a table (CSV, and as text), and a page that needs no network."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from my import plain_files
from my.errors import UserError
from my.run_dir import read_history, write_atomic
from sweep import folder
from sweep.folder import FAILED, FINISHED, RUNNING, State
from sweep.plan import Run
from toyworld.captions import parse_prompt

PAGE, TABLE, RESULTS = "sweep.html", "sweep.csv", "results.json"  # the last is written by evaluate.py
STATISTICS = ("score", "regulariser", "opacity")  # of a run's last step, out of history.json
STYLE = """
:root { color-scheme: light dark; --line: #8885; --good: #1a7f37; --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72 } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 90rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; margin: .5rem 0; overflow-wrap: anywhere }
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(12rem, 100%), 1fr)) }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem }
img, .none { aspect-ratio: 1; border-radius: .25rem; display: block; object-fit: contain; width: 100% }
img.small { image-rendering: pixelated }
.none { align-items: center; background: #8882; display: flex; justify-content: center }
dl { display: grid; gap: 0 .75rem; grid-template-columns: auto 1fr; margin: 0; font-size: .9rem }
dt { opacity: .7 } dd { margin: 0; overflow-wrap: anywhere }
.finished { color: var(--good) } .failed { color: var(--bad) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; white-space: nowrap }
"""
WIDTH, SMALL = slice(16, 20), 128  # bytes of a PNG that say its width; pixels, up to which its pixels are shown
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing of the page runs or is fetched


class Row(NamedTuple):
    """All that is known of a run."""

    run: Run
    state: State
    statistics: dict[str, str]  # {name: number}, with the measures of evaluate.py


def rows_of(runs: Sequence[Run], running: Collection[str] = ()) -> list[Row]:
    """Return what is known of each run of the current folder; `running` are the names of those that have no end yet."""
    measured = evaluated()
    states = {run.name: folder.state_of(run) for run in runs}
    states |= {name: states[name]._replace(status=RUNNING, why="") for name in running}
    return [Row(run, states[run.name], statistics_of(Path(run.name)) | measured.get(run.name, {})) for run in runs]


def statistics_of(path: Path) -> dict[str, str]:
    """Return {name: number} of the last step that a run logged."""
    try:
        last = read_history(path / "history.json")[-1]
    except (UserError, OSError, IndexError):
        return {}
    return {name: number(last[name]) for name in STATISTICS if name in last}


def evaluated() -> dict[str, dict[str, str]]:
    """Return {run: {measure: number}} out of RESULTS; what is older than a run is not of that run."""
    try:
        report = plain_files.read_json(RESULTS, ["summary", "runs"])
        written = Path(RESULTS).stat().st_mtime
        rows = {Path(row["run"]).as_posix(): row for row in report["runs"]}
        found = {name: {key: number(row[key]) for key in report["summary"]} for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    beats = {name: Path(name) / "heartbeat.json" for name in found}
    return {name: row for name, row in found.items() if beats[name].exists() and beats[name].stat().st_mtime <= written}


def number(value: Any) -> str:
    """Return a number in four digits, True or False as yes or no, and None, which was not finite, as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"


def has_truth(run: Run) -> bool:
    """Whether the prompt of a run is of the toy world, whose true views are known."""
    try:
        parse_prompt(run.cfg.texts.prompt)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- tables


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return (heads, the texts of each run) of the table."""
    options = list(dict.fromkeys(option for row in rows for option in row.run.varied))
    names = list(dict.fromkeys(name for row in rows for name in row.statistics))
    heads = ["run", *options, "status", "step", "n_steps", "seconds", *names]
    return heads, [
        [
            row.run.name,
            *(row.run.varied.get(option, "") for option in options),
            row.state.status,
            str(row.state.step),
            str(row.run.cfg.n_steps),
            "" if row.state.seconds is None else f"{row.state.seconds:.0f}",
            *(row.statistics.get(name, "") for name in names),
        ]
        for row in rows
    ]


def table(runs: Sequence[Run]) -> str:
    """Return the table of the runs as aligned text."""
    heads, lines = cells(rows_of(runs))
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in (heads, *lines)
    )


def write(runs: Sequence[Run], running: Collection[str] = ()) -> None:
    """Write TABLE and PAGE for the runs of the current folder; `running` is as in `rows_of`."""
    rows = rows_of(runs, running)
    heads, lines = cells(rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *lines])
    write_atomic(TABLE, text.getvalue())
    write_atomic(PAGE, page(rows))


# ---------------------------------------------------------------- the page


def page(rows: Sequence[Row]) -> str:
    """Return the page: a card for each run with its picture, and the table of all. Every text in it is escaped."""
    heads, lines = cells(rows)
    done = sum(row.state.status == FINISHED for row in rows)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in line)}</tr>\n" for line in lines)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Sweep: {done} of {len(rows)} runs finished</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>Sweep: {done} of {len(rows)} runs finished</h1>\n<main class="runs">\n'
        f"{''.join(map(card, rows))}</main>\n<h2>All runs</h2>\n"
        f'<div class="wide" tabindex="0"><table>\n<tr>{"".join(f"<th>{escape(head)}</th>" for head in heads)}</tr>\n'
        f"{body}</table></div>\n</body>\n</html>\n"
    )


def card(row: Row) -> str:
    """Return a run as a part of the page: picture, what varies, how it ended, numbers."""
    run, state = row.run, row.state
    facts = {"sd.prompt": run.cfg.texts.prompt, **run.varied}
    facts["steps"] = f"{state.step} of {run.cfg.n_steps}"
    if state.seconds is not None:
        facts["time"] = spell_seconds(state.seconds)
    facts |= row.statistics
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    why = f": {escape(state.why)}" if state.status == FAILED else ""
    return (
        f"<article>\n{picture(run)}\n<h2>{escape(run.name)}</h2>\n"
        f'<p class="{state.status}">{state.status}{why}</p>\n<dl>{listed}</dl>\n</article>\n'
    )


def picture(run: Run) -> str:
    """Return the last picture of a run: of its test views, else of its training."""
    path = Path(run.name)
    found = sorted(path.glob(f"test_{run.cfg.n_steps}/view/*.png")) or sorted(path.glob("img/step_*.png"))
    if not found:
        return '<div class="none">no picture yet</div>'
    words = escape(f"{run.cfg.texts.prompt}: {found[-1].relative_to(path)}")
    png = found[-1].read_bytes()
    small = int.from_bytes(png[WIDTH], "big") < SMALL
    return f'<img{" class=small" * small} alt="{words}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def spell_seconds(seconds: float) -> str:
    """Return a time as people say it."""
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if hours < 2 else f"{hours:.1f} h"


def escape(text: str) -> str:
    """Return a text as it may stand in HTML, in quotes too."""
    return html.escape(text, quote=True)
