"""The options that all commands share which take the trained field of a run. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import Field

import families
from my import config, run_dir
from my.script import OnDevice
from options.sjc import SJCConfig

Options = TypeVar("Options", bound="OfRun")
STATED = ("preset", "family", *families.NAMES, "vox", "pose", "low_vram")  # options and groups that show a field
OF_RUNS = config.Apart(
    {name: option for name, option in config.options_of(SJCConfig).items() if name.partition(".")[0] in STATED},
    f"{', '.join(f'--{name}' + '.*' * (name in families.NAMES or name in ('vox', 'pose')) for name in STATED)}: "
    "options of run_sjc.py, for a checkpoint of the published code whose folder has no full_config.yml; "
    "run_sjc.py -h lists them",
)


class OfRun(config.Config):
    """Where the field is."""

    run: list[str] = Field(
        ["."],
        min_length=1,
        max_length=1,
        description="the run: its folder, finished or not, or a checkpoint in it, such as ckpt/step_0001500; or a "
        "checkpoint of the published code, step_*.pt, with the options of run_sjc.py that its folder does not state",
    )


class TrainedConfig(OfRun, OnDevice):
    """Where the field is, and where it is worked on."""


def read(cls: type[Options], argv: list[str] | None, *, root: Path, prog: str, doc: str | None) -> Options:
    """Return the options of a command; the run may stand before them as a word. What it makes goes to this folder.

    The options of run_sjc.py that show a field are taken too, and kept apart: `my.config.given_apart` returns them.

    root: the project's folder, in which nothing is made.
    """
    cfg = config.load(cls, argv, prog=prog, doc=doc, positional="run", config_file=None, apart=OF_RUNS)
    run_dir.refuse_project_dir(root)
    return cfg
