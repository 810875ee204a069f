"""Run a step again that gave numbers which are not finite, on the CPU, and say where the first such number appears.

python replay.py flight/step_0000013.safetensors
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from pydantic import Field

from my import config
from my.config import Config
from my.errors import run_main


class ReplayConfig(Config):
    """Every option of replay.py."""

    record: list[str] = Field(min_length=1, max_length=1, description="a flight record, in flight/ of a run's folder")
    attempt: int | None = Field(
        None, ge=0, le=2, description="noise of which attempt: 0, 1, 2; default the recorded one, which was the last"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the step of a flight record again, and say what was found."""
    cfg = config.load(ReplayConfig, argv, prog="replay.py", doc=__doc__, positional="record", config_file=None)
    from rerun.flight import read, replay, report

    record = read(cfg.record[0])
    for line in report(record, replay(record, cfg.attempt), cfg.attempt):
        print(line)


if __name__ == "__main__":
    run_main(main, prints=True)
