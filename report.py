"""Write the page of a run, report.html in its folder: one file to send. It is the run in the current folder, or RUN.

python report.py
python report.py ~/sjc_runs/a_blue_duck
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from typing import ClassVar

from pydantic import Field

from my import config
from my.config import Config
from my.errors import UserError, run_main, some


class ReportConfig(Config):
    """Every option of report.py."""

    run: list[str] = Field(["."], min_length=1, description="the run of run_sjc.py: its folder, finished or not")

    first: ClassVar[tuple[str, ...]] = ("run",)


def main(argv: list[str] | None = None) -> None:
    """Write the page of the run that the options choose."""
    cfg = config.load(ReportConfig, argv, prog="report.py", doc=__doc__, positional="run", config_file=None)
    if len(cfg.run) > 1:
        raise UserError(f"report.py takes one run, got {len(cfg.run)}: {some(cfg.run)}; start it once for each")
    from asset import find
    from pages.live import PAGE
    from pages.markup import spell_bytes
    from pages.run import write

    found = find(cfg.run[0])
    size = write(found.folder, found.cfg)
    print(f"done: {(found.folder / PAGE).resolve()}, {spell_bytes(size)}")


if __name__ == "__main__":
    run_main(main)
