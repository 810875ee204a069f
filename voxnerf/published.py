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
    import torch

    from voxnerf.field import VoxRF

FIELD = ("density", "color", "d_scale")  # tensors that every field has
BOX, TEXTURE = "aabb", "bg"
MASK = "alphamask"  # beginning of the names of a mask's parts, in small letters without "_"
BITS, SHAPE, MASK_BOX = "bits", "shape", "box"
MASK_PARTS = {  # what stands behind MASK in a name -> what it is
    "": BITS,
    "mask": BITS,
    "bits": BITS,
    "volume": BITS,
    "alphavolume": BITS,
    "shape": SHAPE,
    "size": SHAPE,
    "aabb": MASK_BOX,
    "bbox": MASK_BOX,
}
LONGEST = 2048  # voxels per edge
SMALL = 16  # elements up to which a tensor that is not known is a number of the training, such as an edge or a count
TOUCHING = 1e-4  # share of a cell up to which two cells only touch
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
            self.facts["vox.bbox_len"] = round(float(self.box.abs().max()), 6)  # it is of float32

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
        if len(self.shape) != 3 or min(self.shape) < 2 or max(self.shape) > LONGEST:
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

    def _mask_parts(self) -> dict[str, str]:
        """Return {part: name in the file} of its mask, {} without one; UserError for parts that are not known."""
        names = [name for name in {**self.file.shapes, **self.file.numbers} if of_mask(name)]
        parts: dict[str, str] = {}
        for name in names:
            last = name.lower().replace("_", "").removeprefix(MASK).strip(".")
            part = MASK_PARTS.get(last)
            if part is None or part in parts:
                raise UserError(
                    f"{self.path}: {shown(name)} is no known part of a mask, or is there twice; leave the mask out"
                )
            parts[part] = name
        if parts and BITS not in parts:
            raise UserError(f"{self.path}: {some(names)} and no mask with it; get the file again")
        return parts

    def _values(self, name: str) -> torch.Tensor:
        """Return a tensor, an array or several whole numbers of the file as a tensor."""
        import torch

        if name in self.file.sizes:
            return torch.tensor(self.file.sizes[name])
        if name in self.file.arrays:
            return self.file.array(name)
        if name in self.file.shapes:
            return self.file.tensor(name)
        raise UserError(f"{self.path}: {shown(name)} is neither a tensor nor an array; leave the mask out")

    def _visible(self, parts: dict[str, str]) -> torch.Tensor:
        """Return the mask (Z, Y, X) bool; raises UserError where its shape is not that of its bits."""
        import torch

        bits = self._values(parts[BITS])
        if SHAPE not in parts:
            if bits.ndim < 3 or bits.numel() != math.prod(bits.shape[-3:]) or not 0 < max(bits.shape) <= LONGEST:
                raise UserError(f"{self.path}: {shown(parts[BITS])} has bits, and no shape with it; get the file again")
            return bits.reshape(bits.shape[-3:]) > 0
        shape = [int(n) for n in self._values(parts[SHAPE]).flatten()[:8].tolist()]
        shape = shape[-3:] if len(shape) in (3, 5) and set(shape[:-3]) <= {1} else []
        n, flat = math.prod(shape), bits.flatten()
        whole = len(shape) == 3 and min(shape) > 0 and max(shape) <= LONGEST
        if whole and flat.dtype == torch.uint8 and len(flat) == -(-n // 8):
            shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
            flat = ((flat[:, None] >> shifts) & 1).flatten()[:n]
        if not whole or len(flat) != n:
            raise UserError(
                f"{self.path}: {shown(parts[BITS])} has {bits.numel()} values, and {shown(parts[SHAPE])} is "
                f"{shown(shape)}: a mask has a bit or a value for each voxel; get the file again"
            )
        return (flat > 0).view(shape)

    def mask_of(self, field: VoxRF) -> torch.Tensor | None:
        """Return the mask of the file on the grid of its field, as `VoxRF.alpha_mask` (1, 1, Z, Y, X), None without.

        A voxel of the field is visible where a visible voxel of the mask overlaps it. Without a box of its own, the
        mask has that of the field.
        """
        import torch

        parts = self._mask_parts()
        if not parts:
            return None
        box = field.aabb.double()
        if MASK_BOX in parts:
            box = self._box_of(parts[MASK_BOX], self._values(parts[MASK_BOX]))
        grid = self._visible(parts).float()
        for dim, axis in enumerate((2, 1, 0)):  # z, y, x: each product puts the field's axis in front
            n, m = field.density.shape[2 + dim], grid.shape[dim]
            along = overlaps(field.aabb[:, axis].double(), n, box[:, axis], m)
            grid = torch.tensordot(along.float(), grid, ([1], [dim]))
        return (grid.permute(2, 1, 0) > 0).to(field.density).contiguous()[None, None]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the file in float32; raises UserError where a number of it is not finite."""
        value = self.file.tensor(name).float()
        if not value.isfinite().all():
            raise UserError(f"{self.path}: {shown(name)} has numbers that are not finite; give another checkpoint")
        return value

    def _read_box(self, name: str) -> torch.Tensor | None:
        """Return the corners (2, 3) of a box that the file states, None where it states none."""
        if name not in self.file.shapes:
            return None
        return self._box_of(name, self.file.tensor(name))

    def _box_of(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return the corners (2, 3) float64 of a box out of the file; raises UserError where it is none."""
        box = values.double().reshape(2, 3) if values.numel() == 6 else values.new_zeros(2, 3)
        if not (box.isfinite().all() and (box[1] > box[0]).all()):
            raise UserError(f"{self.path}: {shown(name)} is no box (2, 3), its least corner first; get the file again")
        return box

    def field(self, kind: str, march: March) -> VoxRF:
        """Return the field, of a kind of `voxnerf.field.FIELDS`; raises UserError for numbers that are not finite."""
        import torch

        from voxnerf.field import make_field

        b = march.bbox_len
        box = [[-b] * 3, [b] * 3]
        if self.box is not None and not torch.allclose(self.box, torch.tensor(box, dtype=torch.float64), rtol=1e-5):
            box = self.box.tolist()  # else it is the cube, which the file has in float32
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
        field.alpha_mask = self.mask_of(field)
        return field


def of_mask(name: str) -> bool:
    """Whether a name is that of a mask, or of a part of it."""
    return name.lower().replace("_", "").startswith(MASK)


def overlaps(box: torch.Tensor, n: int, other: torch.Tensor, m: int) -> torch.Tensor:
    """Return whether each of `n` cells of an axis from box[0] to box[1] overlaps each of `m` of another one: (n, m)."""
    import torch

    edge, step = (box[1] - box[0]) / n, (other[1] - other[0]) / m
    lo, at = box[0] + torch.arange(n) * edge, other[0] + torch.arange(m) * step
    shared = torch.minimum(lo[:, None] + edge, at + step) - torch.maximum(lo[:, None], at)
    return shared > TOUCHING * torch.minimum(edge, step)
