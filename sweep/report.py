"""What people read of a sweep: a table (CSV, and as text), and a page that needs no network."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from my import plain_files
from my.errors import UserError
from my.run_dir import read_history, write_atomic
from pages import markup
from pages.live import PAGE as PAGE_OF_RUN
from pages.markup import escape, number, spell_seconds
from sweep import folder
from sweep.folder import FAILED, FINISHED, RUNNING, State
from sweep.plan import Run
from toyworld.captions import parse_prompt

PAGE, TABLE, RESULTS = "sweep.html", "sweep.csv", "results.json"  # the last is written by evaluate.py
STATISTICS = ("score", "regulariser", "opacity")  # of a run's last step, out of history.json
CARDS = """
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(12rem, 100%), 1fr)) }
"""


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
        found = {name: {key: number(row[key]) for key in report["summary"] if key in row} for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    beats = {name: Path(name) / "heartbeat.json" for name in found}
    return {name: row for name, row in found.items() if beats[name].exists() and beats[name].stat().st_mtime <= written}


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
    title = f"Sweep: {done} of {len(rows)} runs finished"
    body = (
        f'<h1>{title}</h1>\n<main>\n<div class="runs">\n{"".join(map(card, rows))}</div>\n<h2>All runs</h2>\n'
        f"{markup.table(heads, lines, 'All runs')}</main>\n"
    )
    return markup.document(title, body, style=CARDS)


def card(row: Row) -> str:
    """Return a run as a part of the page: picture, what varies, how it ended, numbers."""
    run, state = row.run, row.state
    facts = {"sd.prompt": run.cfg.texts.prompt, **run.varied}
    facts["steps"] = f"{state.step} of {run.cfg.n_steps}"
    if state.seconds is not None:
        facts["time"] = spell_seconds(state.seconds)
    facts |= row.statistics
    why = f": {escape(state.why)}" if state.status == FAILED else ""
    name = escape(run.name)
    if Path(run.name, PAGE_OF_RUN).exists():
        name = f'<a href="{escape(quote(run.name))}/{PAGE_OF_RUN}">{name}</a>'
    return (
        f"<article>\n{picture(run)}\n<h2>{name}</h2>\n"
        f'<p class="{state.status}">{state.status}{why}</p>\n{markup.listed(facts)}\n</article>\n'
    )


def picture(run: Run) -> str:
    """Return the last picture of a run: of its test views, else of its training."""
    path = Path(run.name)
    found = sorted(path.glob(f"test_{run.cfg.n_steps}/view/*.png")) or sorted(path.glob("img/step_*.png"))
    if not found:
        return '<div class="none">no picture yet</div>'
    return markup.image(found[-1].read_bytes(), f"{run.cfg.texts.prompt}: {found[-1].relative_to(path)}")
