"""Fields in checkpoints of the published code of SJC: a dict of tensors that torch.save wrote, step_<n>.pt.

    density (1, 1, Z, Y, X), color (1, C, Z, Y, X), d_scale ()      the field
    bg (1, C, h, h)                                                 its background texture, where it has one
    aabb (2, 3)                                                     its box, world units, where the file states it
    alphaMask.mask, .shape, .aabb                                   what rays may see, where the file states it

The mask is a boolean volume (Z, Y, X), whole or as the bits of bytes, first bit first (numpy.packbits). It is written
with capital letters, with "_" or without. Nothing in the file is executed: `my.tensor_file` reads it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from my.errors import UserError, note, shown, some
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    import numpy as np
    import torch

    from voxnerf.field import VoxRF

FIELD = ("density", "color", "d_scale")  # tensors that every field has
BOX, TEXTURE = "aabb", "bg"
MASK = "alphamask"  # beginning of the names of a mask's parts, in small letters without "_"
SMALL = 16  # elements up to which a tensor that is not known is a number of the training, such as an edge or a count
WHOSE = "no checkpoint of the published code of SJC"


class March(Protocol):
    """The options of a field that its tensors do not state."""

    bbox_len: float
    step_ratio: float
    density_shift: float
    ray_march_weight_thres: float


class Published:
    """A checkpoint of the published code: `facts` {option of run_sjc.py: what the file has}, and its field.

    Raises UserError for a file that cannot be read, that is no such checkpoint, or that holds what is not known here
    and may change the field. What is small and not known is noted.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.file = Path(path), TensorFile(path)
        shapes = self.file.shapes
        for name in FIELD:
            if name not in shapes:
                raise UserError(f"{path}: has no {name}: it is {WHOSE}; give a step_*.pt of it")
        self.shape = shapes["density"][2:]  # (Z, Y, X)
        self.channels = shapes["color"][1] if len(shapes["color"]) == 5 else 0
        self._refuse_shapes()
        self.box = self._read_box(BOX)
        self._refuse_unknown()
        self.facts: dict[str, Any] = {
            "vox.grid_size": max(self.shape),
            "vox.c": self.channels,
            "vox.blend_bg_texture": TEXTURE in shapes,
        }
        if TEXTURE in shapes:
            self.facts |= {"vox.bg_texture_hw": shapes[TEXTURE][-1], "plain_bg": False}
        if self.box is not None:
            self.facts["vox.bbox_len"] = float(abs(self.box).max())

    def _refuse_shapes(self) -> None:
        """Raise UserError where the tensors of the field do not fit one another."""
        shapes, c = self.file.shapes, self.channels
        texture = shapes.get(TEXTURE, (1, c, 1, 1))
        wanted = {
            "density": (1, 1, *self.shape),
            "color": (1, c, *self.shape),
            "d_scale": (),
            TEXTURE: (1, c, texture[-1] if texture else 0, texture[-1] if texture else 0),
        }
        for name, shape in wanted.items():
            if name in shapes and (shapes[name] != shape or 0 in shape):
                raise UserError(
                    f"{self.path}: {name} has the shape {shown(list(shapes[name]))}: it is {WHOSE}, which has "
                    "density (1, 1, Z, Y, X), color (1, C, Z, Y, X), bg (1, C, h, h) and d_scale ()"
                )
        if len(self.shape) != 3 or min(self.shape) < 2:
            raise UserError(f"{self.path}: density has the shape {shown(list(shapes['density']))}: it is {WHOSE}")
        whole = self.file.quantised(name for name in wanted if name in shapes)
        if whole:
            raise UserError(f"{self.path}: {some(whole)} has whole numbers: it is {WHOSE}")

    def _refuse_unknown(self) -> None:
        """Raise UserError for a tensor that is not known here, or note it where it is small."""
        known = {*FIELD, TEXTURE, BOX}
        others = {name: shape for name, shape in self.file.shapes.items() if name not in known and not of_mask(name)}
        for name, shape in others.items():
            if math.prod(shape) > SMALL:
                raise UserError(
                    f"{self.path}: {shown(name)} {shown(list(shape))} is not known here, and may change what the field "
                    "looks like; leave it out of the file"
                )
        others |= {name: () for name in self.file.numbers if not of_mask(name)}
        if others:
            note(f"{self.path}: not read: {some(others)}")
        if masks := [name for name in {**self.file.shapes, **self.file.numbers} if of_mask(name)]:
            raise UserError(f"{self.path}: has a mask, {some(masks)}")  # TODO

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the file in float32; raises UserError where a number of it is not finite."""
        value = self.file.tensor(name).float()
        if not value.isfinite().all():
            raise UserError(f"{self.path}: {shown(name)} has numbers that are not finite; give another checkpoint")
        return value

    def _read_box(self, name: str) -> np.ndarray | None:
        """Return the corners (2, 3) of a box that the file states, None where it states none."""
        if name not in self.file.shapes:
            return None
        if math.prod(self.file.shapes[name]) != 6:
            raise UserError(
                f"{self.path}: {name} has the shape {shown(list(self.file.shapes[name]))}, a box has (2, 3)"
            )
        box = self.tensor(name).reshape(2, 3).double().numpy()
        if not (box[1] > box[0]).all():
            raise UserError(f"{self.path}: {name} is {shown(box.tolist())}, and no box; give another checkpoint")
        return box

    def field(self, kind: str, march: March) -> VoxRF:
        """Return the field, of a kind of `voxnerf.field.FIELDS`; raises UserError for numbers that are not finite."""
        from voxnerf.field import make_field

        b = march.bbox_len
        box = [[-b] * 3, [b] * 3] if self.box is None else self.box.tolist()
        texture = self.file.shapes.get(TEXTURE)
        field = make_field(
            kind,
            box,
            self.shape[::-1],
            self.channels,
            march.step_ratio,
            march.density_shift,
            march.ray_march_weight_thres,
            texture is not None,
            texture[-1] if texture else 1,
        )
        state = {name: self.tensor(name) for name in (*FIELD, *[TEXTURE] * (texture is not None))}
        field.load_state_dict({**state, BOX: field.aabb})
        return field


def of_mask(name: str) -> bool:
    """Whether a name is that of a mask, or of a part of it."""
    return name.lower().replace("_", "").startswith(MASK)
