"""The fields of a run over time: its snapshots and its newest checkpoints, loaded when they are asked for."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch

from asset import Asset, Source, new_field
from my import checkpoint
from my.errors import RunError
from voxnerf import snapshot, state
from voxnerf.field import VoxRF

MOST_BYTES = 2**30  # of fields that are kept in memory; the one that is shown is kept in any case


class Moments:
    """The steps at which a run has a field, and these fields. A run that goes on gets more of them.

    asset: the asset of `source`. Its own field is there at once.
    Raises RunError where that has numbers that are not finite.
    """

    def __init__(self, asset: Asset, source: Source) -> None:
        self.asset, self.folder = asset, source.folder
        refuse_not_finite(asset.field, str(source.path))
        self.fields: OrderedDict[int, VoxRF] = OrderedDict({asset.n_steps_taken: asset.field})  # the newest used last

    def files(self) -> dict[int, Path]:
        """Return {step: file of a snapshot, or folder of a checkpoint} that the run has now, oldest first."""
        folders = {checkpoint.step_of(path): path for path in checkpoint.checkpoints(self.folder / "ckpt")}
        return dict(sorted((folders | snapshot.found(self.folder)).items()))

    def steps(self) -> list[int]:
        """Return the steps that can be shown, oldest first: those of files, and those in memory."""
        return sorted({*self.files(), *list(self.fields)})

    def at(self, step: int) -> VoxRF:
        """Return the field after `step` steps.

        Raises RunError where its file is gone, damaged, of another field, or has numbers that are not finite.
        """
        if step not in self.fields:
            self.fields[step] = self.load(step)
        self.fields.move_to_end(step)
        most = max(1, MOST_BYTES // bytes_of(self.asset.field))
        while len(self.fields) > most:
            self.fields.popitem(last=False)
        return self.fields[step]

    def load(self, step: int) -> VoxRF:
        """Read the field after `step` steps."""
        path = self.files().get(step)
        if path is None:
            raise RunError(f"step {step}: its file is gone; choose another moment")
        field = new_field(self.asset.cfg, self.asset.adapter)
        try:
            if path.is_dir():
                state.restore_field(field, checkpoint.load(path)[0])
            else:
                snapshot.restore(field, path)
        except FileNotFoundError:
            raise RunError(f"step {step}: its file is gone; choose another moment") from None
        refuse_not_finite(field, str(path))
        return field


def bytes_of(field: VoxRF) -> int:
    """Return the memory of a field's parameters, bytes."""
    return sum(math.prod(p.shape) * p.element_size() for p in field.parameters())


def refuse_not_finite(field: VoxRF, where: str) -> None:
    """Raise RunError for a field that has numbers that are not finite; its message says `where` it is from."""
    bad = [name for name, p in field.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise RunError(f"{where}: its {' and '.join(bad)} has numbers that are not finite; show an earlier step")
