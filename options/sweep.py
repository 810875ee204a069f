"""The options of run_sweep.py. This module imports nothing heavy, since `-h` must answer at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from my.config import Config


class SweepConfig(Config):
    """Every option of run_sweep.py."""

    file: list[str] = Field(
        min_length=1, description="one YAML file, the table of runs: docs/sweeps.md says what it holds"
    )
    cluster: Literal["auto", "local", "slurm"] = Field(
        "auto", description="where the runs are: on this machine, or on a cluster; auto is slurm where there is sbatch"
    )
    at_once: int | None = Field(
        None,
        gt=0,
        description="runs at the same time on this machine; default one per GPU, without a GPU as many as cores and "
        "memory allow",
    )
    evaluate: bool = Field(
        False, description="at the end, measure the finished runs whose prompts are of the toy world, with evaluate.py"
    )
    dry_run: bool = Field(False, description="check all runs, print them and their commands, and stop")

    first: ClassVar[tuple[str, ...]] = ("file", "cluster", "at_once", "evaluate", "dry_run")
