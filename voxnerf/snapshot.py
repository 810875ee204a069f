"""Snapshots of a field in a run: what shows it after some steps, small enough to keep them all.

A snapshot holds float16 numbers of the voxels that matter. A voxel matters where it, or a voxel beside it, has a
density above a threshold. With a threshold of HIDDEN / (the box's diagonal), the optical thickness of all that is left
out along any ray is at most HIDDEN, and so is the change of its opacity. This holds between voxels too: softplus is
convex, hence the density of a sample is at most that of the densest of the eight voxels round it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from my.errors import RunError, UserError, shown
from my.host_copy import HostCopy
from my.run_dir import write_atomic
from my.tensor_file import TensorFile
from voxnerf.field import VoxRF

FOLDER = "fields"
FORMAT, ABOUT = 1, "snapshot"  # the name of what a file says of itself
HIDDEN = 1 / 1024  # optical thickness that may be left out along a ray: a quarter of a step of 8 bits
MOST = torch.finfo(torch.float16).max
NAMES = ("density", "color", "d_scale", "bg")  # what is stored of a field, beside which voxels matter
ADVICE = "delete this file; the run is not harmed"


def path_of(root: str | Path, step: int) -> Path:
    """Return the file of the snapshot after `step` steps of the run in the folder `root`."""
    return Path(root) / FOLDER / f"step_{step:07d}.safetensors"


def found(root: str | Path) -> dict[int, Path]:
    """Return {step: file} of all snapshots of the run in the folder `root`, oldest first."""
    files = {path.name: path for path in (Path(root) / FOLDER).glob("step_*.safetensors")}
    named = {int(match[1]): files[name] for name in files if (match := re.fullmatch(r"step_(\d{7,})\..*", name))}
    return dict(sorted(named.items()))


def taken(field: VoxRF, step: int) -> tuple[HostCopy, dict[str, Any]]:
    """Return what `write` takes: a field as it is now after `step` steps. On CUDA nothing waits for the device."""
    facts = {"step": step, "shift": field.density_shift, "diagonal": field.box_diagonal}
    return HostCopy(*(getattr(field, name) for name in NAMES)), facts


def write(root: str | Path, copy: HostCopy, facts: dict[str, Any]) -> Path:
    """Write what `taken` gave as a snapshot of the run in the folder `root`, whole or not at all; return its path."""
    from safetensors.torch import save

    density, color, d_scale, bg = (None if value is None else torch.from_numpy(np.asarray(value)) for value in copy)
    assert density is not None and color is not None and d_scale is not None
    kept = matters(density, d_scale, facts["shift"], facts["diagonal"])
    tensors = {
        "kept": torch.from_numpy(np.packbits(kept.numpy())),
        "density": half(density[0, :, kept].T),  # (n, 1)
        "color": half(color[0, :, kept].T),  # (n, C)
        "d_scale": d_scale,
        **({} if bg is None else {"bg": half(bg)}),
    }
    path = path_of(root, facts["step"])
    path.parent.mkdir(exist_ok=True)
    about = {"format": FORMAT, "step": facts["step"], "sha256": digest(tensors)}
    write_atomic(path, save(tensors, {ABOUT: json.dumps(about)}))  # of several texts, the library shuffles the order
    return path


def matters(density: torch.Tensor, d_scale: torch.Tensor, shift: float, diagonal: float) -> torch.Tensor:
    """Return which voxels (Z, Y, X) of densities (1, 1, Z, Y, X) a snapshot keeps, bool.

    Outside the grid the density is 0 before its softplus: a voxel at the border is beside such ones. What is not a
    number is kept.
    """
    sigma = F.softplus(F.pad(d_scale.exp() * density, (1,) * 6) + shift)
    dense = (~(sigma <= HIDDEN / diagonal)).to(sigma.dtype)
    return F.max_pool3d(dense, kernel_size=3, stride=1)[0, 0] > 0


def half(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as float16, contiguous; a number beyond its range becomes the nearest that it has."""
    return tensor.clamp(-MOST, MOST).half().contiguous()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors, their names and their shapes."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors):
        sha256.update(f"{name} {tuple(tensors[name].shape)};".encode())
        sha256.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def restore(field: VoxRF, path: str | Path) -> int:
    """Give a field what a snapshot holds, and return the number of steps that it had taken.

    Voxels that do not matter get no colour, and the lowest density of those that do: nothing is seen of them.
    Raises RunError for a file that is missing, damaged, of another format, or of another field.
    """
    try:
        file = TensorFile(path)
        tensors = {name: file.tensor(name) for name in file.shapes}
    except UserError as error:
        raise RunError(f"{str(error).rpartition(';')[0]}; {ADVICE}") from None
    about = about_of(file)
    if about["format"] != FORMAT:
        raise RunError(f"{path}: a snapshot of format {shown(about['format'])}, this code reads {FORMAT}; {ADVICE}")
    if about["sha256"] != digest(tensors) or "kept" not in tensors:
        raise RunError(f"{path} is damaged (its SHA-256 differs); {ADVICE}")
    n_voxels = field.density[0, 0].numel()
    bits = np.unpackbits(tensors["kept"].numpy())
    kept = torch.from_numpy(bits[:n_voxels].astype(bool))
    n = int(kept.sum())
    shapes = {"kept": (-(-n_voxels // 8),), "density": (n, 1), "color": (n, field.color.shape[1]), "d_scale": ()}
    shapes |= {} if field.bg is None else {"bg": tuple(field.bg.shape)}
    if file.shapes != shapes:
        raise RunError(f"{path} is of another field than this run's; {ADVICE}")
    give(field, tensors, kept.view(field.density.shape[2:]))
    return about["step"]


def about_of(file: TensorFile) -> dict[str, Any]:
    """Return what a snapshot says of itself: {format, step, sha256}. Raises RunError for a file that is none."""
    try:
        about = json.loads(file.metadata[ABOUT])
        return {"format": about["format"], "step": int(about["step"]), "sha256": about["sha256"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RunError(f"{file.path} is no snapshot of a field; {ADVICE}") from None


@torch.no_grad()
def give(field: VoxRF, tensors: dict[str, torch.Tensor], kept: torch.Tensor) -> None:
    """Copy the tensors of a snapshot, whose voxels are `kept` (Z, Y, X), into a field."""
    density = torch.full(field.density.shape, unseen(tensors["density"]))
    color = torch.zeros(field.color.shape)
    density[0, :, kept] = tensors["density"].float().T
    color[0, :, kept] = tensors["color"].float().T
    field.density.copy_(density)
    field.color.copy_(color)
    field.d_scale.copy_(tensors["d_scale"])
    if field.bg is not None:
        field.bg.copy_(tensors["bg"])


def unseen(density: torch.Tensor) -> float:
    """Return the density that voxels get which are not in a snapshot: the lowest of those that are, or 0."""
    return min(0.0, density.float().min().item()) if len(density) else 0.0
