"""What both readers of picture files share: `raster`, which uses Pillow, and `openexr`."""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np

MAX_PIXELS = 2**26  # 8192 x 8192; as float32 RGBA they take 1 GiB
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
KINDS = "PNG, JPEG, TIFF (to 16 bits, or grey floats), WebP, AVIF, BMP, GIF, PNM, TGA and OpenEXR"
OUTPUT = threading.Lock()  # held while a library's output is dropped, and while a note is written


class Unreadable(ValueError):
    """A picture file is not read; the message says why, and goes behind the file's name."""


class Header(NamedTuple):
    """The facts that a picture file states beside its pixels."""

    size: tuple[int, int]  # (width, height) of the pixels as stored
    orientation: int = 1  # of EXIF, 1 to 8
    lossy: bool = False  # whether values differ a little from those that were written
    remarks: dict[str, str] = {}  # {kind: what a person should know about a picture of this kind}


def check_size(width: int, height: int) -> None:
    """Raise `Unreadable` for a picture without pixels, or with more than `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise Unreadable(f"has {width}x{height} pixels, which is none; get it again, or leave its frame out")
    if width * height > MAX_PIXELS:
        raise too_large(f"{width}x{height}")


def too_large(what: str) -> Unreadable:
    return Unreadable(f"has {what} pixels, more than {MAX_PIXELS:,}; resize it")


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return (H, W, ...) pixels as EXIF's orientation, 1 to 8, says they are to be shown (EXIF 2.32, tag 0x0112)."""
    mirrored = pixels[:, ::-1] if orientation in (2, 4, 5, 7) else pixels
    return np.rot90(mirrored, {3: 2, 4: 2, 5: 1, 6: -1, 7: -1, 8: 1}.get(orientation, 0))


def srgb(linear: np.ndarray) -> np.ndarray:
    """Return linear light in [0, 1] with sRGB's curve, float32 (IEC 61966-2-1:1999, 5.2)."""
    linear = np.asarray(linear, np.float32)
    curved = 1.055 * linear ** np.float32(1 / 2.4) - 0.055
    return np.where(linear <= 0.0031308, 12.92 * linear, curved).astype(np.float32)


def from_linear(rgba: np.ndarray, remarks: dict[str, str]) -> np.ndarray:
    """Return straight linear RGBA (H, W, 4), with any values, as sRGB in [0, 1]; add what was changed to `remarks`."""
    remarks["linear"] = "holds linear light: it is converted to sRGB"
    broken = ~np.isfinite(rgba).all(axis=-1)
    if broken.any():
        remarks["not finite"] = f"{broken.sum()} of its {broken.size} pixels are not finite: NaN becomes 0, infinity 1"
        rgba = np.nan_to_num(rgba, nan=0.0, posinf=1.0, neginf=0.0)
    outside = ((rgba < 0) | (rgba > 1)).any(axis=-1)
    if outside.any():
        remarks["clipped"] = (
            f"{outside.sum()} of its {outside.size} pixels lie outside 0 to 1, up to {rgba.max():.3g}"
            ", and are clipped; expose it differently if they matter"
        )
        rgba = rgba.clip(0, 1)
    return np.concatenate([srgb(rgba[..., :3]), rgba[..., 3:]], axis=-1).astype(np.float32)
