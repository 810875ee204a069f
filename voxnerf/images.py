"""Pictures and masks of scenes as numbers: RGB with sRGB's curve and straight alpha, of any bit depth and colour type.

docs/images.md lists the kinds of files that are read, and what is done with the facts that they state. Time and memory
depend on the bytes of a file and on its number of pixels. That number is read before the pixels are decoded, and is at
most `MAX_PIXELS`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from my.errors import UserError, note
from voxnerf.pictures import MAX_PIXELS, OUTPUT, TURNED, Header, Unreadable, openexr, raster, turn

__all__ = ["MAX_PIXELS", "image_size", "read_image", "read_mask"]

Size = tuple[float, float]  # width, height in pixels
Read = TypeVar("Read")
LIKEWISE = "; the same holds for others like it in its folder"

_told: set[tuple[Path, str]] = set()  # (folder, kind) of the notes that were written


class Reader(Protocol):
    """A module that reads one kind of picture files: `raster` or `openexr`."""

    def header(self, path: Path) -> Header: ...

    def read(self, path: Path) -> tuple[Header, np.ndarray]: ...


def image_size(path: Path, size: Size | None = None) -> tuple[int, int]:
    """Return the (width, height) that `read_image(path, size=size)` will have, pixels, from the file's header.

    Raises UserError as `read_image` does, except for errors that show only when the pixels are decoded.
    """
    head = _guarded("", path, lambda kind: kind.header(path))
    width, height = head.size
    return (height, width) if _turns(head, size) else (width, height)


def read_image(path: Path, where: str = "", size: Size | None = None) -> np.ndarray:
    """Return the picture at `path` as (H, W, 4) float32 in [0, 1]: RGB with sRGB's curve, and straight alpha.

    where: the beginning of an error's message, such as the frame that names the picture.
    size: (w, h) that a scene states for it, or None. The pixels are used as they are stored, as capture tools use
    them: EXIF's orientation is applied only where w x h has the shape of the turned picture, and not of the stored
    one. A note
    tells which statements of a file are not used, once per folder and kind.
    Raises UserError, one line, for a file that is missing, damaged, of no kind that is read, or too large.
    """
    return _picture(path, where, size)[1]


def read_mask(path: Path, where: str = "", size: Size | None = None) -> np.ndarray:
    """Return the mask at `path` as (H, W) bool: False, leave out, where the picture is 0.

    A pixel is 0 where each of its colours is black, or where it is transparent. In a picture that is black all over
    the alpha alone is the mask. A palette's colours count, not its indices. JPEG blurs the edge of a mask: there,
    all below one half counts as 0. Arguments and errors are as for `read_image`.
    """
    head, rgba = _picture(path, where, size)
    colour, alpha = rgba[..., :3].max(axis=-1), rgba[..., 3]
    value = colour * alpha if colour.any() else alpha if (alpha < 1).any() else colour
    if head.lossy:
        _tell(
            path,
            "jpeg mask",
            "is a mask in JPEG, which blurs edges: what is darker than one half is left out; PNG keeps masks exactly",
        )
        return value >= 0.5
    return value > 0


def fits(size: Size, stated: Size) -> bool:
    """Return whether pictures of two sizes (width, height) have one shape, but for rounding to whole pixels."""
    return abs(size[0] * stated[1] - stated[0] * size[1]) < max(stated)


def _turns(head: Header, size: Size | None) -> bool:
    """Return whether a picture's EXIF orientation is applied, given the size (w, h) that a scene states, or None."""
    if size is None or head.orientation not in TURNED:
        return False
    width, height = head.size
    return fits((height, width), size) and not fits((width, height), size)


def _picture(path: Path, where: str, size: Size | None) -> tuple[Header, np.ndarray]:
    """Return the header and the pixels (H, W, 4) of a picture, and write the notes on it."""
    head, pixels = _guarded(where, path, lambda kind: kind.read(path))
    turned = _turns(head, size)
    if head.orientation != 1:
        done = (
            "it is turned, since the scene's w and h say so"
            if turned
            else "its pixels are used as they are stored, as capture tools do; if they lie on their side against the "
            "poses, state w and h of the turned picture"
        )
        _tell(path, "orientation", f"has EXIF orientation {head.orientation}: {done}")
    for kind, text in head.remarks.items():
        _tell(path, kind, text)
    return head, np.ascontiguousarray(turn(pixels, head.orientation) if turned else pixels)


def _guarded(where: str, path: Path, call: Callable[[Reader], Read]) -> Read:
    """Return `call(module)` of the module that reads this kind of file; turn its errors into UserError."""
    begin = f"{where}: {path}" if where else f"{path}"
    try:
        return call(openexr if openexr.begins(path) else raster)
    except Unreadable as error:
        raise UserError(f"{begin}: {error}") from None
    except OSError as error:
        raise UserError(f"{begin}: cannot be read: {error.strerror or error}") from None


def _tell(path: Path, kind: str, text: str) -> None:
    """Write a note on a kind of pictures, once per folder."""
    key = Path(path).parent, kind
    with OUTPUT:
        if key not in _told:
            _told.add(key)
            note(f"{path}: {text}{LIKEWISE}")
