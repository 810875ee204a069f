"""Write the page of a run, report.html in its folder: one file to send. It is the run in the current folder, or RUN.

python report.py
python report.py ~/sjc_runs/a_blue_duck
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from typing import ClassVar

from my import config
from my.errors import run_main
from options.trained import OF_RUNS, OfRun


class ReportConfig(OfRun):
    """Every option of report.py."""

    first: ClassVar[tuple[str, ...]] = ("run",)


def main(argv: list[str] | None = None) -> None:
    """Write the page of the run that the options choose."""
    cfg = config.load(
        ReportConfig, argv, prog="report.py", doc=__doc__, positional="run", config_file=None, apart=OF_RUNS
    )
    from options.found import find
    from pages.live import PAGE
    from pages.markup import spell_bytes
    from pages.run import write

    found = find(cfg.run[0], config.given_apart(cfg))
    size = write(found.folder, found.cfg, *(() if found.published is None else (found.step, False)))
    print(f"done: {(found.folder / PAGE).resolve()}, {spell_bytes(size)}")


if __name__ == "__main__":
    run_main(main)
