"""The page of a run of run_sjc.py: report.html in its folder, one file that shows all that the run left."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from my import config
from my.errors import cut
from my.run_dir import write_atomic
from my.starts import DONE, Start, without_home
from my.version import made_by
from options.sjc import SJCConfig
from pages import facts, shows
from pages.curves import curves
from pages.facts import Facts, real
from pages.live import PAGE
from pages.markup import (
    asset_text,
    document,
    escape,
    image,
    json_data,
    listed,
    number,
    spell_bytes,
    spell_seconds,
    table,
)

RELOAD_S = 15.0, 300.0  # the least and the most seconds between two looks at a page that changes
MOST_STARTS, MOST_NOTES, MOST_WORDS = 20, 50, 20_000  # commands; notes of each; characters of a text
WORDS = {facts.RUNNING: "Running", facts.FINISHED: "Finished", facts.FAILED: "Failed", facts.STOPPED: "Stopped"}


def write(folder: Path, cfg: SJCConfig, step: int = 0, logged: bool = True) -> int:
    """Write the page of the run in a folder, which has taken at least `step` steps; return its bytes.

    A run of the published code is not `logged`: it has no history. Raises UserError where the history of another is
    missing or damaged, OSError where the page cannot be written.
    """
    text = page(facts.gather(folder, cfg, step, logged)).encode()
    write_atomic(folder / PAGE, text)
    return len(text)


def page(run: Facts) -> str:
    """Return the page. Every text in it that is not of this project is escaped."""
    words = title_of(run.cfg)
    turntable, mesh, strip = (make(run.folder, words) for make in (shows.video, shows.mesh, shows.strip))
    if not turntable.html.startswith(("<video", "<picture")):
        turntable = turntable._replace(html=newest_picture(run.folder, words) + turntable.html)
    body = (
        '<a class="skip" href="#main">To the content</a>\n'
        f"<header>\n<h1>{escape(words)}</h1>\n{state(run)}</header>\n"
        '<nav aria-label="Parts of this page"><a href="#curves">Curves</a> <a href="#pictures">Pictures</a> '
        '<a href="#how">How it was made</a> <a href="#options">Options</a></nav>\n'
        '<main id="main" class="run">\n'
        f'<div class="two">\n{section("turntable", "Turntable", turntable.html)}'
        f"{section('view', '3D view', mesh.html)}</div>\n"
        f"{section('curves', 'Curves', curves(run.rows, run.cfg.n_steps))}"
        f"{section('pictures', 'Pictures of the run', strip.html)}"
        f"{section('how', 'How it was made', how(run))}"
        f"{section('options', 'Options', options(run.cfg))}</main>\n"
        f"<footer><p>Written {escape(stamp())} by version {escape(made_by()['version'])}. This file is all there is of "
        "the page: it loads nothing.</p></footer>\n"
        f'<script type="application/json" id="facts">{json_data(as_data(run))}</script>\n'
        f'<script type="application/json" id="live">{json_data(live(run))}</script>\n'
    )
    shown = (turntable, mesh, strip)
    scripts = [asset_text("page.js"), *(script for part in shown for script in part.scripts)]
    policy = "; ".join(part.policy for part in shown if part.policy)
    return document(f"{WORDS[run.state]}: {words}", body, scripts, policy)


def section(name: str, heading: str, html: str) -> str:
    """Return a part of the page, which its heading names."""
    return f'<section id="{name}" aria-labelledby="{name}-h">\n<h2 id="{name}-h">{heading}</h2>\n{html}</section>\n'


def title_of(cfg: SJCConfig) -> str:
    """Return what the run shows, in words."""
    return cfg.texts.prompt if "sd.prompt" in cfg.chosen.reads else f"A field of the family {cfg.family}"


def stamp(at: Any = None) -> str:
    """Return a time in ISO, or now, as people say it, to the minute; what is no time as it is."""
    try:
        moment = datetime.fromisoformat(at) if at is not None else datetime.now(timezone.utc)
        return moment.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError):
        return str(at)


# ---------------------------------------------------------------- how far it is


def state(run: Facts) -> str:
    """Return in a line how far the run is; while it goes on, with a bar, and a switch for the reloading."""
    n = run.cfg.n_steps
    words = f"{WORDS[run.state]}: step {run.step} of {n}"
    if run.state == facts.RUNNING:
        words += f", about {spell_seconds(run.eta_s)} left" if run.eta_s is not None else ", time left not yet known"
    elif run.seconds:
        words += f", in {spell_seconds(run.seconds)}"
    line = f'<p class="state {run.state}" id="state">{escape(words)}</p>\n'
    if run.why:
        line += f'<p class="{run.state}">{escape(run.why)}</p>\n'
    if run.state in (facts.FAILED, facts.STOPPED):
        line += "<p>run_sjc.py --resume True goes on in this folder.</p>\n"
    if run.state == facts.RUNNING:
        line += (
            f'<progress max="{n}" value="{run.step}" aria-labelledby="state"></progress>\n'
            '<p><label><input type="checkbox" id="reload" checked> Reload this page by itself</label> '
            '<span id="news" role="status"></span></p>\n'
        )
    return line


def live(run: Facts) -> dict[str, Any]:
    """Return what the script of the page needs: when it was written, and how many seconds later to look for news."""
    every = None
    if run.state == facts.RUNNING:
        between = (run.per_step or 0.0) * run.cfg.n_steps / 20
        every = min(max(between / 2, RELOAD_S[0]), RELOAD_S[1])
    return {"written": time.time(), "every": every}


def newest_picture(folder: Path, words: str) -> str:
    """Return the last picture of a run that has no video yet, "" where there is none."""
    found = shows.pictures(folder)
    data = shows.thumbnail(found[-1][1]) if found else None
    return f"{image(data, f'{words}, after step {found[-1][0]}')}\n" if data else ""


# ---------------------------------------------------------------- how it was made


def how(run: Facts) -> str:
    """Return the commands of a run, where and how long they ran, and what they said."""
    known = {"seed": run.cfg.seed, "family": run.cfg.family, "preset": run.cfg.preset or "none"}
    if run.per_step:
        known["time per step"] = f"{run.per_step * 1000:.3g} ms"
    if run.seconds:
        known["time"] = spell_seconds(run.seconds)
    html = listed(known)
    hidden = len(run.starts) - MOST_STARTS
    html += f"<p>{hidden} earlier commands are left out.</p>\n" if hidden > 0 else ""
    html += "".join(command(start, i, run) for i, start in list(enumerate(run.starts, 1))[-MOST_STARTS:])
    if not run.starts:
        html += "<p>This run did not record its commands: it is of an earlier version.</p>\n"
    if run.n_damaged:
        html += f"<p>Damaged lines of starts.json, which are left out: {run.n_damaged}.</p>\n"
    return html


def command(start: Start, i: int, run: Facts) -> str:
    """Return the i-th command of a run: its words, facts and notes."""
    without_end = run.why or {facts.RUNNING: "on its way"}.get(
        run.state, "done"
    )  # of the command that writes this page
    ended = {DONE: "done", "": without_end if i == len(run.starts) else "killed"}
    versions = start.facts.get("versions")
    rows = {
        "begun": stamp(start.facts.get("at")),
        "ended": ended.get(start.ended, start.ended),
        "took": spell_seconds(start.seconds) if start.seconds is not None else None,
        "seed": start.facts.get("seed"),
        "device": start.facts.get("device"),
        "threads": start.facts.get("threads"),
        "processes": start.facts.get("processes"),
        "memory, at most": size_of(start.last.get("memory")),
        "GPU memory, at most": size_of(start.last.get("gpu_memory")),
        **(versions if isinstance(versions, dict) else {}),
    }
    known = {name: text_of(value) for name, value in rows.items() if value is not None}
    notes = "".join(f"<li>{escape(text_of(text))}</li>\n" for text in start.notes[:MOST_NOTES])
    words = escape(cut(str(start.facts.get("command", "not recorded")), MOST_WORDS))
    said = f'<h4>Notes and warnings</h4>\n<ul class="notes">\n{notes}</ul>\n' if notes else "<p>No warnings.</p>\n"
    return (
        f"<article>\n<h3>{'Command' if i == 1 else f'Command {i}'}</h3>\n"
        f'<pre tabindex="0"><code>{words}</code></pre>\n'
        f"{listed(known)}\n{said}</article>\n"
    )


def size_of(value: Any) -> str | None:
    """Return a number of bytes out of a file as people say it, None where it is none."""
    n = real(value)
    return spell_bytes(n) if n else None


def text_of(value: Any) -> str:
    """Return a value out of a file as a text with an end."""
    return cut(str(value))


# ---------------------------------------------------------------- options


def options(cfg: SJCConfig) -> str:
    """Return the options of a run: those that are not at their defaults, and all of them, to be opened."""
    defaults, there = config.flat(type(cfg)()), config.flat(cfg)
    changed = [
        (f"--{name}", value_of(value), value_of(defaults[name]))
        for name, value in there.items()
        if value != defaults[name]
    ]
    return (
        f"<p>{len(changed)} of {len(there)} options are not at their defaults:</p>\n"
        f"{table(('option', 'of this run', 'default'), changed, 'Options that are not at their defaults')}"
        '<details id="all"><summary>All options, as full_config.yml has them</summary>\n'
        f'<pre tabindex="0"><code>{escape(without_home(config.show(cfg)))}</code></pre></details>\n'
    )


def value_of(value: Any) -> str:
    """Return the value of an option as a flag takes it."""
    return cut(without_home(str(config.spelled(config.plain(value))))) or "empty"


def as_data(run: Facts) -> dict[str, Any]:
    """Return the facts of the page for programs that read it."""
    last = run.rows[-1] if run.rows else {}
    return {
        "prompt": title_of(run.cfg),
        "state": run.state,
        "step": run.step,
        "n_steps": run.cfg.n_steps,
        "seed": run.cfg.seed,
        "seconds": run.seconds,
        "last": {name: number(real(value)) for name, value in last.items()},
        "command": cut(str(run.starts[-1].facts.get("command", "")), MOST_WORDS) if run.starts else None,
        "options": {name: value_of(value) for name, value in config.flat(run.cfg).items()},
        "made_by": made_by(run.cfg.command),
    }
