"""Pictures as a CLIP reads them: resized, cropped and normalised as its preprocessor states.

This is done here, because the library's own classes differ between its versions, and some need torchvision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from my.errors import shown
from my.media import to_uint8

MAX_EDGE = 4096  # pixels of a picture that a network reads
BICUBIC = 3  # number of the resampling where a preprocessor states none, as in CLIP's own


class Preprocessor(NamedTuple):
    """What is done to a square picture."""

    size: tuple[int, int]  # (H, W) after resizing
    resample: int  # of PIL
    crop: tuple[int, int] | None  # (H, W) of the middle, None where all is kept
    scale: float  # by which values from 0 to 255 are multiplied
    mean: tuple[float, ...]  # RGB, subtracted after that
    std: tuple[float, ...]  # RGB, divided by

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Return what the network reads (3, h, w) float32 of a square picture (n, n, 3), RGB in [0, 1] or uint8."""
        image = Image.fromarray(to_uint8(picture)).resize(self.size[::-1], Image.Resampling(self.resample))
        x = np.asarray(image, dtype=np.float64)
        if self.crop:
            top, left = ((there - kept) // 2 for there, kept in zip(x.shape, self.crop))
            x = x[top : top + self.crop[0], left : left + self.crop[1]]
        return ((x * self.scale - self.mean) / self.std).transpose(2, 0, 1).astype(np.float32)


def read(settings: Mapping[str, Any]) -> Preprocessor:
    """Return the preprocessor of the settings in a CLIP's preprocessor_config.json; ValueError for what is not read."""
    resample = settings.get("resample", BICUBIC)
    if resample not in [kind.value for kind in Image.Resampling]:
        raise ValueError(f"its resample is {shown(resample)}, not a number of a resampling of PIL")
    if not settings.get("do_resize", True):
        raise ValueError("its do_resize is false, and pictures of runs have other sizes")
    normalised = settings.get("do_normalize", True)
    scale = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1
    if not is_number(scale) or scale <= 0:
        raise ValueError(f"its rescale_factor is {shown(scale)}, not a number above 0")
    size = edges(settings, "size")
    crop = edges(settings, "crop_size") if settings.get("do_center_crop", True) else None
    if crop and (crop[0] > size[0] or crop[1] > size[1]):
        raise ValueError(f"its crop_size, {crop}, is larger than its size, {size}")
    return Preprocessor(
        size,
        resample,
        crop,
        scale,
        colour(settings, "image_mean") if normalised else (0, 0, 0),
        colour(settings, "image_std") if normalised else (1, 1, 1),
    )


def edges(settings: Mapping[str, Any], name: str) -> tuple[int, int]:
    """Return the (H, W) that a setting states: a number, its "shortest_edge", or its "height" and "width"."""
    value = settings.get(name)
    stated = value if isinstance(value, dict) else {"shortest_edge": value}
    both: list[Any] = [stated.get(key, stated.get("shortest_edge")) for key in ("height", "width")]
    if not all(type(edge) is int and 0 < edge <= MAX_EDGE for edge in both):
        raise ValueError(f"its {name} is {shown(value)}, not edges of 1 to {MAX_EDGE} pixels")
    return both[0], both[1]


def colour(settings: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Return the three numbers that a setting states; a standard deviation is above 0."""
    value = settings.get(name)
    if not (isinstance(value, list) and len(value) == 3 and all(map(is_number, value))):
        raise ValueError(f"its {name} is {shown(value)}, not three numbers")
    if name.endswith("std") and min(value) <= 0:
        raise ValueError(f"its {name} is {shown(value)}, not three numbers above 0")
    return tuple(value)


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a finite number; true and false are none."""
    return type(value) in (int, float) and bool(np.isfinite(value))
