"""Pictures that Pillow reads, with all the bits that are stored, and without Pillow's warnings.

Pillow keeps 8 bits of each 16-bit colour. Its decoders are asked twice, for the first and for the second byte.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from my.errors import first_line, no_stderr
from voxnerf.pictures import KINDS, OUTPUT, TURNED, Header, Unreadable, check_size, from_linear, too_large, turn
from voxnerf.pictures.claims import check_claims
from voxnerf.pictures.colour import applied_gamma, colour_remarks

if TYPE_CHECKING:
    from PIL import Image

Opened = Any  # an image file of Pillow: what it has beside the pixels depends on its format
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "AVIF", "BMP", "GIF", "PPM", "TGA")  # of Pillow; JPEG opens MPO too
ORIENTATION = 0x0112  # tag of EXIF and TIFF
UPRIGHT = {6: 8, 8: 6}  # what undoes an orientation; each other undoes itself
BITS, PHOTOMETRIC, SUBFILE, PLANAR, EXTRA, SAMPLE_FORMAT, DNG = 258, 262, 254, 284, 338, 339, 50706  # tags of TIFF
WHITE_IS_ZERO, SEPARATE, SIGNED, UNSPECIFIED = 0, 2, 2, 0  # their values
LEAST_TILE = 256  # pixels of a TIFF's tiles, whose sides are multiples of 16 (TIFF 6.0, section 15)
AGAIN = "get it again, or leave its frame out"


def header(path: Path) -> Header:
    """Return the `Header` of a picture; raises `Unreadable`, and OSError where the file cannot be opened."""
    with _opened(path) as (image, facts):
        return _header(image, facts)


def read(path: Path) -> tuple[Header, np.ndarray]:
    """Return the `Header` of a picture and its pixels (H, W, 4) float32, sRGB and straight; raises as `header`."""
    with _opened(path) as (image, facts):
        head = _header(image, facts)
        linear = image.mode == "F"
        rgba = _rgba(path, image, facts)
        if image.format == "TIFF":  # Pillow turns these, and no others
            rgba = turn(rgba, UPRIGHT.get(head.orientation, head.orientation))
        if linear:
            return head, from_linear(rgba, head.remarks)
        return head, applied_gamma(rgba, image.info, facts)


# ---------------------------------------------------------------- Pillow, held


class _Quiet:
    """A context in which Pillow neither warns nor logs, from any number of threads at once."""

    def __init__(self) -> None:
        self.lock, self.depth = threading.Lock(), 0
        self.kept = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self.lock:
            self.depth += 1
            if self.depth == 1:
                self.kept = warnings.catch_warnings()
                self.kept.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                logging.getLogger("PIL").addHandler(logging.NullHandler())

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                self.kept.__exit__(None, None, None)


_quiet = _Quiet()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Opened, dict[str, Any]]]:
    """Yield a Pillow image whose pixels are still to be decoded, and what `check_claims` found."""
    facts = check_claims(path)
    with _quiet, _image(path) as image:
        check_size(*image.size)
        yield image, facts


@contextlib.contextmanager
def _image(path: Path, rawmode: str | None = None) -> Iterator[Opened]:
    """Yield a Pillow image, to be decoded as `rawmode` says where it is given.

    Pillow gets an open file: with a name, it maps the pixels of some TIFFs into memory, and turns them wrongly.
    """
    from PIL import Image

    with open(path, "rb") as file, _pillow(Image.open, file, "r", FORMATS) as image:
        if rawmode is not None:
            image.tile = [
                tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *tile.args[1:]))
                for tile in image.tile
            ]
        yield image


def _pillow(call: Callable[..., Any], *args: Any) -> Any:
    """Return what a function of Pillow returns; turn its errors, which damaged files cause, into `Unreadable`."""
    from PIL import Image, UnidentifiedImageError

    try:
        return call(*args)
    except UnidentifiedImageError:
        raise Unreadable(f"is damaged, or of no kind that is read, which are {KINDS}; {AGAIN}") from None
    except Image.DecompressionBombError:
        raise too_large(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}") from None
    except Exception as error:  # noqa: BLE001 (Pillow's decoders raise whatever damaged bytes lead them to)
        raise Unreadable(f"is damaged: {first_line(error)}; {AGAIN}") from None


def _load(image: Opened) -> None:
    """Decode the pixels of a Pillow image."""
    codec = image.tile[0].codec_name if image.tile else ""
    with contextlib.ExitStack() as stack:
        if codec == "libtiff":  # which writes its errors to stderr
            stack.enter_context(OUTPUT)
            stack.enter_context(no_stderr())
        _pillow(image.load)


# ---------------------------------------------------------------- what a picture states


def _header(image: Opened, facts: dict[str, Any]) -> Header:
    """Return the `Header` of a Pillow image that is not decoded yet."""
    remarks = _tiff_remarks(image) if image.format == "TIFF" else {}
    remarks |= colour_remarks(image.mode, image.info, facts)
    if getattr(image, "is_animated", False):
        remarks["frames"] = "holds several pictures: the first is used"
    try:
        orientation = _pillow(_exif, image, facts).get(ORIENTATION, 1)
    except Unreadable:
        orientation, remarks["exif"] = 1, "has damaged EXIF data, which are not used"
    size = image.size
    if image.format == "TIFF" and image.tag_v2.get(ORIENTATION) in TURNED:
        size = size[::-1]  # as stored
    if orientation not in range(1, 9):
        orientation = 1
    return Header(size, orientation, image.format in ("JPEG", "MPO"), remarks)


def _exif(image: Opened, facts: dict[str, Any]) -> Image.Exif:
    """Return the EXIF data of an image. A PNG without any gets empty data, else Pillow would decode it."""
    if image.format == "PNG" and "Raw profile type exif" not in image.info:
        image.info.setdefault("exif", facts.get("exif", b""))
    return image.getexif()


def _tiff_remarks(image: Opened) -> dict[str, str]:
    """Return {kind: remark} on a TIFF; raises `Unreadable` for one whose first picture would be misread."""
    tags = image.tag_v2
    if DNG in tags or tags.get(SUBFILE, 0) & 1:
        raise Unreadable("is a raw photo, or begins with a small preview, and is not read; develop it to PNG or JPEG")
    if len(image.tile) > 4 * image.height + image.width * image.height / LEAST_TILE:
        raise Unreadable(f"is cut into {len(image.tile)} strips or tiles, too many for its size; save it again")
    if SIGNED in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)):
        raise Unreadable("holds signed numbers, which are not read; save it with 8 or 16 bits without sign")
    if tags.get(PLANAR) == SEPARATE and max(np.atleast_1d(tags.get(BITS, 1))) > 8:
        raise Unreadable("keeps 16-bit colours in separate planes, which is not read; save it interleaved, or as PNG")
    if UNSPECIFIED in np.atleast_1d(tags.get(EXTRA, 1)):
        return {"channels": "has a channel more than its colours, not stated to be alpha: it is not used"}
    return {}


# ---------------------------------------------------------------- its pixels


def _rgba(path: Path, image: Opened, facts: dict[str, Any]) -> np.ndarray:
    """Return the pixels (H, W, 4) float32 of an image, in Pillow's orientation, in [0, 1] unless they are floats."""
    args: Any = image.tile[0].args if image.tile else ""
    rawmode = args if isinstance(args, str) else args[0]
    if isinstance(rawmode, str) and rawmode.partition(";16")[2] in ("B", "L", "N") and image.mode[0] != "I":
        return _with_alpha(*_sixteen(path, image, rawmode))
    if image.tile and image.tile[0].codec_name.startswith("ppm") and image.mode == "RGB" and args[1] > 255:
        return _deep_ppm(path, image.tile[0], image.size)
    _load(image)
    mode, transparent = image.mode, image.info.get("transparency")
    if mode in ("1", "L") and transparent is not None:  # Pillow spreads pixels over 8 bits, and not this
        transparent = transparent > 0 if mode == "1" else transparent * (255 // (2 ** facts.get("bits", 8) - 1))
    if mode in ("1", "L", "RGB", "CMYK", "F"):
        return _with_alpha(np.asarray(image), 1 if mode in ("1", "F") else 255, transparent, mode)
    if mode[0] == "I":
        return _with_alpha(*_grey(image), transparent, mode)
    return _eight(image)


def _eight(image: Opened) -> np.ndarray:
    """Return a Pillow image of palettes, alpha or luminance as (H, W, 4) float32 in [0, 1]."""
    if image.mode not in ("P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX", "YCbCr"):
        raise Unreadable(f"has colours of the kind {image.mode}, which is not read; save it as RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGB" if image.mode in ("RGBX", "YCbCr") else "RGBA")
    return _with_alpha(np.asarray(image), 255)


def _grey(image: Opened) -> tuple[np.ndarray, int]:
    """Return the pixels of a grey image of more than 8 bits, and the value of its white."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise Unreadable("holds 32-bit integers, which are not read; save it with 8 or 16 bits")
    top = 2 ** max(np.atleast_1d(tags.get(BITS, 16))) - 1
    grey = np.asarray(image)
    return (top - grey if tags and tags.get(PHOTOMETRIC, 0) == WHITE_IS_ZERO else grey), int(top)


def _sixteen(path: Path, image: Opened, rawmode: str) -> tuple[np.ndarray, int, Any, str]:
    """Return the 16-bit pixels of an image, 65535, its transparent colour, and its kind of colours.

    A raw mode ";16B" takes the first byte of each pair, and ";16L" the second: together they are all of it.
    """
    kind, _, order = rawmode.partition(";16")
    if kind == "LA":  # of which Pillow has no other raw mode: its four bytes are read as four channels
        first, second = np.split(_bytes(path, "RGBA").reshape(*image.size[::-1], 2, 2), 2, axis=-1)
        first, second = first[..., 0], second[..., 0]
    else:
        first, second = (_bytes(path, f"{kind.upper()};16{order}") for order in "BL")
    little = order == "L" or order == "N" and sys.byteorder == "little"
    high, low = (second, first) if little else (first, second)
    pixels = high.astype(np.uint16) << 8 | low
    return pixels, 65535, image.info.get("transparency"), "RGBa" if kind == "RGBa" else image.mode


def _bytes(path: Path, rawmode: str) -> np.ndarray:
    """Return the bytes (H, W, C) that a raw mode takes out of a picture's pixels."""
    with _image(path, rawmode) as image:
        _load(image)
        return np.asarray(image)


def _deep_ppm(path: Path, tile: Any, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels (H, W, 4) float32 of a PPM of 16 bits, of which Pillow keeps 8."""
    if tile.codec_name != "ppm":
        raise Unreadable("is a PPM of 16 bits in text, which is not read; save it as PNG")
    width, height = size
    pixels = np.fromfile(path, ">u2", width * height * 3, offset=tile.offset)
    if pixels.size < width * height * 3:
        raise Unreadable(f"is damaged: it ends too early; {AGAIN}")
    return _with_alpha(pixels.reshape(height, width, 3), tile.args[1])


def _with_alpha(pixels: np.ndarray, top: int, transparent: Any = None, mode: str = "") -> np.ndarray:
    """Return pixels (H, W) or (H, W, 1 to 4), `top` the value of white, as straight RGBA (H, W, 4) float32.

    transparent: the value or colour that stands for no picture at all (PNG specification, third edition, 11.3.2.1).
    """
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    channels = pixels.shape[2]
    rgba = np.ones((*pixels.shape[:2], 4), np.float32)
    if mode == "CMYK":
        key = 1 - pixels[..., 3:].astype(np.float32) / top
        rgba[..., :3] = (1 - pixels[..., :3].astype(np.float32) / top) * key
        return rgba
    rgba[..., :3] = pixels[..., :1] if channels < 3 else pixels[..., :3]
    rgba[..., :3] /= np.float32(top)
    if channels in (2, 4):
        rgba[..., 3] = pixels[..., -1] / np.float32(top)
    elif transparent is not None:
        rgba[..., 3] = (pixels != np.asarray(transparent)).any(axis=-1)
    if mode == "RGBa":  # alpha is multiplied in: at 0 there is no colour to restore
        rgba[..., :3] = (rgba[..., :3] / np.maximum(rgba[..., 3:], 1 / np.float32(top))).clip(0, 1)
    return rgba
