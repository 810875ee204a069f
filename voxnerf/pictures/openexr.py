"""OpenEXR pictures: linear light, with colours that are multiplied by alpha, in channels R, G, B, A or Y.

Only these pictures need the library OpenEXR; a message asks for it where one of them is to be read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from my.errors import first_line, no_stderr, some
from voxnerf.pictures import MAX_PIXELS, OUTPUT, Header, Unreadable, check_size, from_linear
from voxnerf.pictures.claims import check_exr

MAGIC = b"\x76\x2f\x31\x01"
COLOURS: tuple[tuple[str, ...], ...] = (("R", "G", "B"), ("Y",))
REC_709 = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)  # red, green, blue, white; x and y of each


def begins(path: Path) -> bool:
    """Return whether a file begins as OpenEXR files do; OSError where it cannot be opened."""
    with open(path, "rb") as file:
        return file.read(4) == MAGIC


def header(path: Path) -> Header:
    """Return the `Header` of an OpenEXR file; raises `Unreadable`."""
    return _described(_part(path, header_only=True))[0]


def read(path: Path) -> tuple[Header, np.ndarray]:
    """Return the `Header` of an OpenEXR file and its pixels (H, W, 4) float32, sRGB and straight; raises `Unreadable`.

    Pixels of the display window that the data window leaves out are transparent black (OpenEXR, "Technical
    Introduction", on both windows and on associated alpha).
    """
    head, colour, (x, y) = _described(_part(path, header_only=True))
    channels = _part(path, header_only=False).channels
    stored = [np.asarray(channels[name].pixels, np.float32) for name in colour]
    alpha = np.asarray(channels["A"].pixels, np.float32) if "A" in channels else np.ones_like(stored[0])
    with np.errstate(all="ignore"):
        straight = [np.where(alpha > 0, c / np.where(alpha > 0, alpha, 1), c) for c in stored]
    data = np.stack([*(straight * 3)[:3], alpha], axis=-1)
    width, height = head.size
    rgba = np.zeros((height, width, 4), np.float32)
    inside = data[max(-y, 0) : height - y, max(-x, 0) : width - x]
    rgba[max(y, 0) : max(y, 0) + inside.shape[0], max(x, 0) : max(x, 0) + inside.shape[1]] = inside
    return head, from_linear(rgba, head.remarks)


def _part(path: Path, header_only: bool) -> Any:
    """Return the only part of an OpenEXR file."""
    check_exr(path)
    try:
        import OpenEXR
    except ImportError:
        raise Unreadable("is an OpenEXR picture; to have it read: pip install OpenEXR") from None
    try:
        with OUTPUT, no_stderr(), contextlib.redirect_stdout(None):  # of damage it writes to both, and returns nothing
            parts = OpenEXR.File(str(path), separate_channels=True, header_only=header_only).parts
    except (RuntimeError, ValueError, TypeError, MemoryError, OverflowError) as error:
        raise Unreadable(f"is a damaged OpenEXR file: {first_line(error)}; get it again") from None
    if not parts:
        raise Unreadable("is a damaged OpenEXR file; get it again")
    return parts[0]


def _described(part: Any) -> tuple[Header, tuple[str, ...], tuple[int, int]]:
    """Return the `Header` of a part, its channels of colour, and where its data window begins in its display window."""
    stated = part.header
    names = list(_names(stated))
    colour = next((c for c in COLOURS if set(c) <= set(names)), None)
    if colour is None or {"RY", "BY"} & set(names):
        raise Unreadable(
            f"has the channels {some(names)}, and only R, G, B or Y, with or without A, are read; save "
            "one layer of colour alone"
        )
    (x0, y0), (x1, y1) = _window(stated, "displayWindow")
    (left, top), (right, bottom) = _window(stated, "dataWindow")
    check_size(x1 - x0 + 1, y1 - y0 + 1)
    check_size(right - left + 1, bottom - top + 1)
    if (right - left + 1) * (bottom - top + 1) * len(names) > 8 * MAX_PIXELS:
        raise Unreadable(f"has {len(names)} channels, too many for its size; save R, G, B and A alone")
    remarks = {}
    given = stated.get("chromaticities")
    if given is not None and np.abs(np.ravel(given) - REC_709).max() > 0.01:
        remarks["primaries"] = "states primaries other than Rec. 709's, which sRGB has: its colours are taken as those"
    left_out = sorted(set(names) - {*colour, "A"})
    if left_out:
        remarks["channels"] = f"its channels {some(left_out)} are not used"
    return Header((x1 - x0 + 1, y1 - y0 + 1), remarks=remarks), colour, (left - x0, top - y0)


def _window(stated: dict[str, Any], name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    (left, top), (right, bottom) = stated[name]
    return (int(left), int(top)), (int(right), int(bottom))


def _names(stated: dict[str, Any]) -> Iterator[str]:
    for channel in stated["channels"]:
        if (channel.xSampling, channel.ySampling) != (1, 1):
            raise Unreadable("has channels of fewer pixels than the picture, which are not read; save it as RGB")
        yield channel.name
