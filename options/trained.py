"""The options that all commands share which take the trained field of a run. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import Field

from my import config, run_dir
from my.script import OnDevice

Options = TypeVar("Options", bound="TrainedConfig")


class TrainedConfig(OnDevice):
    """Where the field is, and where it is worked on."""

    run: list[str] = Field(
        ["."],
        min_length=1,
        max_length=1,
        description="the run: its folder, finished or not, or a checkpoint in it, such as ckpt/step_0001500",
    )


def read(cls: type[Options], argv: list[str] | None, *, root: Path, prog: str, doc: str | None) -> Options:
    """Return the options of a command; the run may stand before them as a word. What it makes goes to this folder.

    root: the project's folder, in which nothing is made.
    """
    cfg = config.load(cls, argv, prog=prog, doc=doc, positional="run", config_file=None)
    run_dir.refuse_project_dir(root)
    return cfg
