"""The pictures of frames as they are trained on, and which of their pixels are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce

from my.errors import UserError, shown
from my.machine import machine_memory
from voxnerf.images import image_size, read_image, read_mask
from voxnerf.lens import Lens, Lenses
from voxnerf.scene.camera import stated_size
from voxnerf.scene.frame import Frame
from voxnerf.scene.places import find_file

MANY = 32  # pictures, from which number on a progress bar is shown
BYTES = 5  # per pixel in memory: RGB, alpha, and whether it is used


class Photo(NamedTuple):
    """One picture, ready to be trained on."""

    rgba: np.ndarray  # (H, W, 4) uint8, RGB on white, and alpha
    usable: np.ndarray | None  # (H, W) bool, False for pixels that are left out; None if all are used


def sizes_of(frames: Sequence[Frame], downscale: int) -> list[tuple[int, int]]:
    """Return the [(width, height)] of the frames' pictures as stored, from their headers.

    Raises UserError if squares of `downscale` pixels do not fill a picture, or if the pictures do not fit into memory.
    """

    def size(frame: Frame) -> tuple[int, int]:
        width, height = image_size(frame.found, size=stated_size(frame))
        if height % downscale or width % downscale:
            common = math.gcd(height, width)
            fit = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
            raise UserError(
                f"--downscale {downscale}: {frame.picture} is {width}x{height}, which only these divide: {fit}"
            )
        return width, height

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size, frames))
    need, memory = BYTES * sum(w * h for w, h in sizes) / downscale**2, machine_memory()
    if need > memory:
        raise UserError(
            f"{len(sizes)} pictures, {frames[0].picture} the first: take {need / 1e9:.0f} GB of memory, "
            f"there are {memory / 1e9:.0f}; reduce them by --downscale"
        )
    return sizes


def read_photos(folder: Path, frames: Sequence[Frame], downscale: int) -> list[Photo]:
    """Return the `Photo` of each frame, without what its masks leave out; raises UserError for the first unfit one."""
    from tqdm import tqdm

    read_photo(folder, frames[0], downscale)  # what is wrong with all of them is told before a bar begins
    with ThreadPoolExecutor() as pool:
        photos = pool.map(lambda frame: read_photo(folder, frame, downscale), frames)
        return list(tqdm(photos, total=len(frames), desc="images", disable=len(frames) < MANY))


def read_photo(folder: Path, frame: Frame, downscale: int = 1) -> Photo:
    """Return the `Photo` of a frame, averaged over squares of pixels; a square is used if all its pixels are."""
    rgba = read_image(frame.found, frame.where, size=stated_size(frame))  # (H, W, 4) in [0, 1]
    for key, value in (("white_transparent", 1), ("black_transparent", 0)):  # of instant-ngp
        if frame.switch(key):
            rgba = rgba.copy()
            rgba[(rgba[..., :3] == value).all(axis=-1), 3] = 0
    usable = usable_pixels(folder, frame, *rgba.shape[:2])
    if usable is not None:
        usable = reduce(usable, "(h a) (w b) -> h w", "min", a=downscale, b=downscale)
    return Photo(on_white(rgba, downscale), usable)


def on_white(rgba: np.ndarray, downscale: int = 1) -> np.ndarray:
    """Return pictures (H, W, 4) in [0, 1] as uint8: RGB on white, and alpha, averaged over squares of pixels."""
    rgba = rgba.astype(np.float32) * 255
    rgb, alpha = rgba[..., :3], rgba[..., 3:] / 255
    white = rgb * alpha + 255 * (1 - alpha)  # before averaging: an edge's pixels count by what they cover
    image = np.concatenate([white, rgba[..., 3:]], axis=-1)
    return np.rint(reduce(image, "(h a) (w b) c -> h w c", "mean", a=downscale, b=downscale)).astype(np.uint8)


# ---------------------------------------------------------------- what is left out


def usable_pixels(folder: Path, frame: Frame, height: int, width: int) -> np.ndarray | None:
    """Return which pixels of a frame's picture are used (H, W) bool, or None for all of them.

    These are left out: pixels where the picture of `mask_path` is 0 (nerfstudio), pixels where dynamic_mask_NAME.png,
    a file beside the picture, is not black (instant-ngp), and pixels farther than fisheye_crop_radius from the middle
    (nerfstudio).
    """
    usable = np.ones((height, width), bool)
    name = frame.get("mask_path")
    if name:
        if not isinstance(name, str):
            raise UserError(f"{frame.where}: mask_path must be text, got {shown(name)}")
        path = find_file(folder, name)
        if path is None:
            raise UserError(
                f"{frame.where}: no mask {shown(str(folder / name), 300)}; put it there, or take mask_path "
                "out to use the whole picture"
            )
        usable &= of_size(read_mask(path, frame.where), path, frame, usable.shape)
    path = frame.found.with_name(f"dynamic_mask_{frame.found.stem}.png")
    if path.is_file():
        moving = np.any(read_image(path, frame.where)[..., :3], axis=-1)
        usable &= ~of_size(np.asarray(moving), path, frame, usable.shape)
    if frame.get("fisheye_crop_radius"):
        radius = frame.number("fisheye_crop_radius", above=0) * width / frame.number("w", width, above=0)
        y, x = np.ogrid[:height, :width]
        usable &= np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) <= radius
    return None if usable.all() else usable


def of_size(mask: np.ndarray, path: Path, frame: Frame, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask; raises UserError unless it is as large as its picture, of `shape` (H, W)."""
    if mask.shape != shape:
        raise UserError(
            f"{frame.where}: the mask {path} is {mask.shape[1]}x{mask.shape[0]}, and its picture is "
            f"{shape[1]}x{shape[0]}; give it that size"
        )
    return mask


def without_blind_pixels(photos: Sequence[Photo], K: np.ndarray, lenses: Sequence[Lens]) -> tuple[list[Photo], int]:
    """Return the photos without the pixels that see no ray through their lens, and the number of these pixels."""
    blind, kept, known = 0, [], {}
    for photo, k, lens in zip(photos, K, lenses):
        key = lens, k.tobytes(), photo.rgba.shape
        if key not in known:
            known[key] = seen_by(lens, k, *photo.rgba.shape[:2])
        sees = known[key]
        if sees is not None:
            blind += int((~sees).sum())
            photo = photo._replace(usable=sees if photo.usable is None else photo.usable & sees)
        kept.append(photo)
    return kept, blind


def seen_by(lens: Lens, K: np.ndarray, height: int, width: int) -> np.ndarray | None:
    """Return which pixel centres (H, W) bool have a ray through the lens, or None for all."""
    if not lens.bends:
        return None
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = torch.stack([(x + K[0, 2]) / K[0, 0], (y + K[1, 2]) / -K[1, 1]], dim=-1).view(1, -1, 2).double()
    _, sees = Lenses([lens]).directions(torch.zeros(1, dtype=torch.long), points)
    return None if sees.all() else sees.view(height, width).numpy()
