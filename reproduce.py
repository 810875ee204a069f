"""Do a finished run again, in a new folder, and compare the two fields number by number.

python reproduce.py ~/sjc_runs/a_blue_duck
python reproduce.py ~/sjc_runs/a_blue_duck --out again

It runs the same command with the options that full_config.yml of the run holds. Where it was stopped, the same words go
on. Exit status 0: both fields are the same, bit for bit. 1: they differ.
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from pathlib import Path
from typing import ClassVar

from pydantic import Field

from my import config
from my.config import Config
from my.errors import RunError, UserError, run_main
from my.file_system import real
from my.run_dir import refuse_project_dir

ROOT = Path(__file__).resolve().parent


class ReproduceConfig(Config):
    """Every option of reproduce.py."""

    run: list[str] = Field(min_length=1, max_length=1, description="the folder of a finished run")
    out: str | None = Field(
        None, description="folder of the new run; default that of the run with _again behind it, in the current folder"
    )

    first: ClassVar[tuple[str, ...]] = ("run", "out")


def main(argv: list[str] | None = None) -> None:
    """Do the run again, and say whether its field is the same."""
    cfg = config.load(ReproduceConfig, argv, prog="reproduce.py", doc=__doc__, positional="run", config_file=None)
    refuse_project_dir(ROOT)
    from rerun import whole

    run = real(cfg.run[0])
    out = real(f"{run.name}_again" if cfg.out is None else cfg.out)
    if out == run:
        raise UserError(f"--out {out}: that is the run itself; give another folder")
    command = whole.command_of(run)
    whole.do_again(run, command, out)
    (step, first), (step_again, second) = (whole.last_field(folder) for folder in (run, out))
    if step != step_again:
        older, *steps = (run, step, step_again) if step < step_again else (out, step_again, step)
        raise RunError(
            f"{older}: its newest whole checkpoint is of step {steps[0]}, and the other run's of step {steps[1]}: "
            "fields of two steps are not compared; put that checkpoint back, or do that run again in an empty folder"
        )
    same, lines = whole.compare(first, second)
    print(*lines, *whole.unlike_facts(run, out), sep="\n")
    if not same:
        raise RunError(f"the field in {out} is not that of {run}: what differs is above")
    n = sum(tensor.numel() for tensor in first.values())
    print(f"done: the field in {out} is the same as in {run}, bit for bit: {n} numbers")


if __name__ == "__main__":
    run_main(main)
