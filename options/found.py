"""Where a run's field is on the disk: in a folder of run_sjc.py, or in a checkpoint of the published code.

Imports nothing heavy.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from my import checkpoint, config
from my.config import Given, Layer
from my.errors import RunError, UserError, shown, some
from my.left_out import LEFT_OUT
from my.script import FULL_CONFIG, made_by, refuse_other_run
from options.sjc import SJCConfig
from voxnerf.published import Published

PRESETS = Path(__file__).resolve().parent.parent / "presets"
CKPT = "ckpt"  # the folder of a run's checkpoints
PUBLISHED_NAME = re.compile(r"step_(\d+)\.pt")


class Source(NamedTuple):
    """The field of a run on the disk."""

    cfg: SJCConfig
    folder: Path  # of the run
    path: Path  # of the checkpoint
    step: int  # steps after which that was saved
    published: Published | None = None  # what a checkpoint of the published code holds
    left_out: int = 0  # steps that changed nothing, since their numbers were not finite, and are to be tried again

    @property
    def finished(self) -> bool:
        """Whether the run has taken all of its steps; a file whose name has no step counts as the end of its run."""
        taken = self.step >= self.cfg.n_steps or (self.published is not None and self.step == 0)
        return taken and not self.left_out

    @property
    def progress(self) -> str:
        """How far the run is, in words."""
        again = f", and {self.left_out} of these are to be tried again" if self.left_out else ""
        return f"at step {self.step} of {self.cfg.n_steps}{again}"


def find(where: str | Path, given: Layer | None = None, otherwise: Layer | None = None) -> Source:
    """Return the newest field of a run's folder, finished or not, or the field of a checkpoint in it.

    `given` are options of run_sjc.py, for a checkpoint of the published code whose folder states none, and `otherwise`
    what they are there where they are not given. Raises UserError where there is no field, for options that the folder
    states itself, and for those that the checkpoint contradicts.
    """
    path, given, otherwise = Path(where), given or {}, otherwise or {}
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the folder of a run, or a checkpoint")
    if path.is_file():
        folder = path.resolve().parent.parent if path.resolve().parent.name == CKPT else path.resolve().parent
        return of_published(folder, path, given, otherwise)
    one = path.resolve() if (path / checkpoint.META).exists() else None  # the folder of a checkpoint
    folder = one.parent.parent if one else path
    newest = one or checkpoint.latest(folder / CKPT)
    published = None if newest else newest_published(folder)
    if published:
        return of_published(folder, published, given, otherwise)
    if not (folder / FULL_CONFIG).exists():
        raise UserError(
            f"{folder.resolve()} has no {FULL_CONFIG}: it is not the folder of a run of run_sjc.py; nor has it a "
            f"{CKPT}/step_*.pt of the published code"
        )
    cfg = stated(folder, given)
    if newest is None:
        raise UserError(f"{folder.resolve()} has no checkpoint: run run_sjc.py there first")
    return Source(cfg, folder, newest, checkpoint.recorded_step(newest), left_out=left_out_in(newest))


def left_out_in(path: Path) -> int:
    """Return how many steps a checkpoint says are to be tried again; 0 for one that is damaged, as loading it says."""
    try:
        known = checkpoint.record_of(path)["meta"].get(LEFT_OUT)
    except RunError:
        return 0
    return len(known) if isinstance(known, list) else 0


def find_finished(where: str | Path, given: Layer | None = None) -> Source:
    """Return what `find` does; raises UserError for a run that is not finished too."""
    found = find(where, given)
    if not found.finished:
        whose = made_by(found.folder).get("command", SJCConfig.command)
        to_do = "finish it there first with run_sjc.py --resume True"
        if whose != SJCConfig.command:
            to_do = f"it is of {shown(whose)}, which does not go on with it: start that again in an empty folder"
        raise UserError(f"{found.folder.resolve()}: {found.progress}; {to_do}")
    return found


def stated(folder: Path, given: Layer) -> SJCConfig:
    """Return the configuration that a run's folder states; UserError where options are `given` besides."""
    refuse_other_run(SJCConfig, folder, alike=True)
    if given:
        flags = some(value.where for value in given.values())
        raise UserError(
            f"{flags}: not read: {folder.resolve()} has a {FULL_CONFIG}, which states it; leave it out, or go to a "
            "checkpoint whose folder has none"
        )
    return config.read(SJCConfig, folder / FULL_CONFIG)


# ---------------------------------------------------------------- checkpoints of the published code


def newest_published(folder: Path) -> Path | None:
    """Return the newest step_*.pt of a folder, or of the folder of its checkpoints."""
    found = [
        (int(match[1]), path)
        for path in (*folder.glob(f"{CKPT}/step_*.pt"), *folder.glob("step_*.pt"))
        if (match := PUBLISHED_NAME.fullmatch(path.name))
    ]
    return max(found)[1] if found else None


def of_published(folder: Path, path: Path, given: Layer, otherwise: Layer) -> Source:
    """Return the field of a checkpoint of the published code; its folder states the options, or they are given."""
    match, published = PUBLISHED_NAME.fullmatch(path.name), Published(path)
    step = int(match[1]) if match else 0
    if (folder / FULL_CONFIG).exists():
        cfg = stated(folder, given)
        refuse_contradictions(
            published, {name: Given(v, f"{FULL_CONFIG}: {name}") for name, v in config.flat(cfg).items()}
        )
    else:
        refuse_contradictions(published, given)
        stands = {**published.facts, "n_steps": max(step, 1)}
        facts = {name: Given(value, str(path)) for name, value in stands.items()}
        facts |= {name: value for name, value in otherwise.items() if name not in given}
        cfg = config.of_layer(SJCConfig, given, PRESETS, facts)
        config.refuse_unread(cfg, cfg.read_by())
    if cfg.chosen.channels != cfg.vox.c:
        raise UserError(
            f"{path}: its colours have {cfg.vox.c} channels, and the models of --family {cfg.family} have "
            f"{cfg.chosen.channels}; give another --family"
        )
    return Source(cfg, folder, path, step, published)


def refuse_contradictions(published: Published, given: Layer) -> None:
    """Raise UserError for an option that is not what the checkpoint holds."""
    for name, fact in published.facts.items():
        value = given[name].value if name in given else None
        same = math.isclose(value, fact, rel_tol=1e-5) if isinstance(value, float) else value in (None, fact)
        if not same:
            raise UserError(
                f"{given[name].where} {given[name].value}: {published.path} has {fact}; leave it out, or give the "
                "checkpoint that was made with it"
            )
