"""Posed images of a scene, in the layout of Blender (NeRF-synthetic) or of instant-ngp and nerfstudio.

`transforms` finds the frames of each split, and `places` their pictures. `camera` reads their poses, intrinsics and
lenses, and `photos` their pictures and masks. `facts` knows the other keys of such a file, and `other_tools` recognises
folders of tools that write no such file. docs/scenes.md lists all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from my.env import ENV, data_root
from my.errors import UserError, note
from my.file_system import expanded
from voxnerf.lens import Lens
from voxnerf.scene.camera import intrinsics_of, lens_of, pose_of, read_all
from voxnerf.scene.frame import Frame, Remarks
from voxnerf.scene.orbit import orbit, vertical
from voxnerf.scene.other_tools import VIDEO, VIDEOS, advice
from voxnerf.scene.photos import Photo, read_photos, sizes_of, without_blind_pixels
from voxnerf.scene.transforms import SPLITS, read_splits

__all__ = ["Scene", "find_scene", "load_scene", "load_scenes", "orbit", "vertical"]


class Scene(NamedTuple):
    """n posed images, each of its own size H x W and with its own camera."""

    images: Sequence[torch.Tensor]  # n of (H, W, 3) uint8, on white
    alpha: Sequence[torch.Tensor]  # n of (H, W) uint8, 255 where an image is opaque
    c2w: torch.Tensor  # (n, 4, 4) float64, camera to world
    K: torch.Tensor  # (n, 3, 3) float64, as in `pose.intrinsics`
    names: list[str]  # n file paths, as in the transforms file
    usable: Sequence[torch.Tensor] | None = (
        None  # n of (H, W) bool, False for pixels that count nowhere; None where all count
    )
    lenses: list[Lens] | None = None  # n; None where all are pinholes

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image, pixels."""
        return [(image.shape[0], image.shape[1]) for image in self.images]


def find_scene(name: str) -> Path:
    """Return the folder that a `--scene` means: a path, or a name below the data root of env.json.

    Raises UserError saying where it looked.
    """
    tried = list(dict.fromkeys([expanded(name).absolute(), data_root() / "nerf_synthetic" / name, data_root() / name]))
    for folder in tried:
        if folder.is_dir():
            return folder
    if tried[0].is_file() and tried[0].suffix.lower() in VIDEOS:
        raise UserError(f"--scene {name}: is a video; {advice(VIDEO)}")
    if tried[0].is_file():
        raise UserError(f"--scene {name}: is a file; give the folder that it is in")
    raise UserError(
        f"--scene {name}: looked for a folder at {', '.join(map(str, tried))}: none is there; give the "
        f"path of one with --scene FOLDER (data root: {ENV})"
    )


def load_scenes(
    folder: str | Path, splits: Sequence[str] = ("train", "test"), downscale: int = 1, strict: bool = False
) -> list[Scene]:
    """Return the `Scene` of each of some splits, of train, val and test, of a folder in either layout.

    Images are averaged over squares of `downscale` pixels. docs/scenes.md lists how each fact of a scene is used, and
    which views are tested. Notes name what is not used. Frames whose picture is missing are left out, unless `strict`.
    Raises UserError, one line, for a folder, a file or an entry that is missing or impossible.
    """
    strange = [split for split in splits if split not in SPLITS]
    if strange:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {strange[0]!r}")
    folder, remarks = Path(folder), Remarks()
    frames = read_splits(folder, strict)
    scenes = [scene_of(folder, frames[split], downscale, remarks) for split in splits]
    remarks.tell(folder, sum(len(frames[split]) for split in splits))
    return scenes


def load_scene(folder: str | Path, split: str, downscale: int = 1, strict: bool = False) -> Scene:
    """Return the `Scene` of one split, as `load_scenes` does."""
    return load_scenes(folder, [split], downscale, strict)[0]


def scene_of(folder: Path, frames: Sequence[Frame], downscale: int, remarks: Remarks) -> Scene:
    """Return the `Scene` of some frames, without those that have no pixel left."""
    sizes = dict(zip((frame.where for frame in frames), sizes_of(frames, downscale)))
    c2w = np.stack(read_all(frames, lambda frame: pose_of(frame, remarks)))
    K = np.stack(read_all(frames, lambda frame: intrinsics_of(frame, *sizes[frame.where], downscale, remarks)))
    lenses = read_all(frames, lambda frame: lens_of(frame, remarks))
    photos, blind = without_blind_pixels(read_photos(folder, frames, downscale), K, lenses)
    remarks.blind += blind
    kept = views_with_pixels(folder, frames, photos)
    rgba = [torch.from_numpy(photos[i].rgba) for i in kept]
    lenses = [lenses[i] for i in kept]
    return Scene(
        [image[..., :3] for image in rgba],
        [image[..., 3] for image in rgba],
        torch.from_numpy(c2w[kept]),
        torch.from_numpy(K[kept]),
        [frames[i].name for i in kept],
        usable_of([photos[i] for i in kept]),
        lenses if any(lens.bends for lens in lenses) else None,
    )


def views_with_pixels(folder: Path, frames: Sequence[Frame], photos: Sequence[Photo]) -> list[int]:
    """Return the numbers of the views with pixels that no mask leaves out; raises UserError if there is none."""
    kept = [i for i, photo in enumerate(photos) if photo.usable is None or photo.usable.any()]
    hint = "a mask is 0 (black) where pixels are to be left out"
    if not kept:
        raise UserError(
            f"{frames[0].where}: its mask leaves no pixel, nor do those of all {len(frames)} views of its split; {hint}"
        )
    if len(kept) < len(photos):
        note(f"{folder}: {len(photos) - len(kept)} views are left out, as masks leave no pixel of them; {hint}")
    return kept


def usable_of(photos: Sequence[Photo]) -> list[torch.Tensor] | None:
    """Return which pixels of each photo count, or None where all do."""
    if all(photo.usable is None for photo in photos):
        return None
    return [
        torch.from_numpy(np.ones(photo.rgba.shape[:2], bool) if photo.usable is None else photo.usable)
        for photo in photos
    ]
