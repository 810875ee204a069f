"""What picture files claim, checked in their bytes before a decoder believes it.

Pillow bounds much: text and profiles of PNG to 1 MB each, the tags of TIFF to the bytes of the file. What repeats,
and so costs many times the bytes that state it, is counted here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, BinaryIO, Literal

from voxnerf.pictures import KINDS, MAX_PIXELS, Unreadable

MAX_SCANS = 100  # of a JPEG: each is decoded over all pixels; encoders write some 10
MAX_WORK = 2**30  # pixels times scans of a JPEG
PER_BYTE, FREE = 4096, 2**24  # of that work, per byte and in any case; a picture of one colour takes some 3400 per byte
MAX_SEGMENTS = 10_000  # of a JPEG, each up to 64 KB
MAX_PACKED = 32  # chunks of a PNG that unpack to up to 1 MB each
MAX_CHUNKS = 1000  # of a PNG, beside its pixels; programs write up to some 50
MAX_EXIF = 2**20  # bytes of EXIF data in a PNG
LEAST_CHUNK = 512  # bytes, on average, of a PNG's chunks of pixels; programs write 8 KB and more
PIXELS = (b"IDAT", b"fdAT", b"fcTL")
PACKED = (b"iCCP", b"zTXt", b"iTXt")
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # of JPEG, with a length after it, or its end
SCAN, END = 0xDA, 0xD9
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # markers with the size
BIG_TIFF, EXIF_AT, BYTES = 43, (34665, 34853, 40965), (1, 2, 6, 7)  # kinds of TIFF's tags that are kept as bytes
MAX_TAGS, MAX_NUMBERS = 2**16, 2**15  # of a TIFF, and in one tag: its strips, some of one row each
MAX_ATTRIBUTES = 1000  # of an OpenEXR header; programs write up to some 100
MAX_CHANNELS = 2**14  # bytes of its list of channels, each some 20
PARTS, DEEP = 0x1000, 0x800  # flags of OpenEXR's version

SAVE_AS = "save it as PNG, JPEG or OpenEXR"
OTHERS = [  # (where, bytes, what such a file is)
    (0, b"#?RADIANCE", f"is a Radiance HDR picture, which is not read; {SAVE_AS}"),
    (0, b"#?RGBE", f"is a Radiance HDR picture, which is not read; {SAVE_AS}"),
    (0, b"8BPS", f"is a Photoshop document, which is not read; {SAVE_AS}"),
    (0, b"\xff\x0a", f"is a JPEG XL picture, which is not read; {SAVE_AS}"),
    (4, b"JXL ", f"is a JPEG XL picture, which is not read; {SAVE_AS}"),
    (4, b"jP  ", f"is a JPEG 2000 picture, which is not read; {SAVE_AS}"),
    (4, b"ftyphei", f"is a HEIC picture, which is not read; {SAVE_AS}"),
    (4, b"ftyphev", f"is a HEIC picture, which is not read; {SAVE_AS}"),
    (4, b"ftypisom", "is a video; give its frames as pictures"),
    (4, b"ftypmp4", "is a video; give its frames as pictures"),
    (4, b"ftypqt", "is a video; give its frames as pictures"),
    (4, b"ftypcrx", "is a raw photo, which is not read; develop it to PNG or JPEG"),
    (0, b"version https://git-lfs", "is a pointer of Git LFS instead of a picture; fetch it with git lfs pull"),
    (0, b"<", f"is a text file instead of a picture; read are {KINDS}"),
]


def check_claims(path: Path) -> dict[str, Any]:
    """Check the bytes of a picture file, and return what a PNG states that Pillow does not tell; {} for other kinds.

    That is {"bits": its depth, "cicp": 4 numbers, "exif": bytes}, each only where it is stated. Raises `Unreadable` for
    a file of a kind that is known and not read, and for one that repeats what is costly to decode. Raises OSError where
    it cannot be opened.
    """
    with open(path, "rb") as file:
        head = file.read(32)
        if not head:
            raise Unreadable("is empty; get it again, or leave its frame out")
        for start, magic, what in OTHERS:
            if head[start:].startswith(magic):
                raise Unreadable(what)
        file.seek(0)
        if head.startswith(b"\x89PNG"):
            return _png(file)
        if head.startswith(b"\xff\xd8"):
            _jpeg(file.read())
        elif head[:2] in (b"II", b"MM"):
            _tiff(file, "little" if head[:2] == b"II" else "big")
    return {}


def _png(file: BinaryIO) -> dict[str, Any]:
    """Walk the chunks of a PNG (PNG specification, third edition, 5.3); return what it states."""
    facts: dict[str, Any] = {}
    packed = others = pixels = 0
    allowed = MAX_CHUNKS + file.seek(0, 2) // LEAST_CHUNK
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        packed, others = packed + (kind in PACKED), others + (kind not in PIXELS)
        pixels += kind in PIXELS
        if pixels > allowed:
            raise Unreadable("cuts its pixels into too many chunks; save it again")
        if packed > MAX_PACKED or others > MAX_CHUNKS:
            raise Unreadable("has too many chunks of text and profiles; save it again without its metadata")
        if kind == b"eXIf" and length > MAX_EXIF:
            raise Unreadable("has too much EXIF data; save it again without its metadata")
        data = file.read(length) if kind in (b"IHDR", b"cICP", b"eXIf") and length <= MAX_EXIF else b""
        if kind == b"IHDR" and len(data) > 8:
            facts["bits"] = data[8]
        elif kind == b"cICP" and len(data) == 4:
            facts["cicp"] = tuple(data)
        elif kind == b"eXIf":
            facts["exif"] = b"Exif\0\0" + data
        elif kind == b"IEND":
            break
        file.seek(length - len(data) + 4, 1)
    return facts


def _jpeg(data: bytes) -> None:
    """Count the segments of a JPEG, and its scans over its pixels (ITU-T T.81, annex B)."""
    at = segments = scans = pixels = 0
    most = min(MAX_WORK, FREE + PER_BYTE * len(data))
    while found := MARKER.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        if marker == END:
            break
        if marker in FRAMES:
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (3, 5))
            pixels = max(pixels, height * width)
        segments, scans = segments + 1, scans + (marker == SCAN)
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise Unreadable("repeats its scans or segments too often for a JPEG; save it again")
        if scans and pixels <= MAX_PIXELS and pixels * scans > most:
            raise Unreadable(
                f"states {pixels:,} pixels, {scans} times over, in {len(data):,} bytes, which cannot be; "
                "get it again, or save it as PNG"
            )
        at += int.from_bytes(data[at : at + 2], "big")


def _tiff(file: BinaryIO, order: Literal["little", "big"]) -> None:
    """Check how many numbers the tags of a TIFF's first picture and of its EXIF data hold (TIFF 6.0, section 2)."""

    def number(size: int) -> int:
        return int.from_bytes(file.read(size), order)

    file.seek(2)
    wide = number(2) == BIG_TIFF
    file.seek(8 if wide else 4)
    directories, seen = [number(8 if wide else 4)], 0
    while directories and seen < MAX_TAGS:
        start = directories.pop()
        if start >= 2**63:  # beyond any file
            continue
        file.seek(start)
        here = min(number(8 if wide else 2), MAX_TAGS)
        seen += max(here, 1)
        for _ in range(here):
            tag, kind, count = number(2), number(2), number(8 if wide else 4)
            value = number(8 if wide else 4)
            if kind not in BYTES and count > MAX_NUMBERS:
                raise Unreadable("is a TIFF with too many strips, or too much metadata; save it again")
            if tag in EXIF_AT:
                directories.append(value)


def check_exr(path: Path) -> None:
    """Raise `Unreadable` for an OpenEXR file of several parts, of deep pixels, or with a header that goes on and on.

    The library takes time with the square of the number of channels ("OpenEXR File Layout", on attributes).
    """
    with open(path, "rb") as file:
        flags = int.from_bytes(file.read(8)[4:], "little")
        if flags & (PARTS | DEEP):
            raise Unreadable("has several parts or deep pixels, which are not read; save one flat layer alone")
        for _ in range(MAX_ATTRIBUTES):
            name, kind = _text(file), _text(file)
            size = int.from_bytes(file.read(4), "little")
            if not name:
                return
            if kind == b"chlist" and size > MAX_CHANNELS:
                raise Unreadable("has too many channels; save R, G, B and A alone")
            file.seek(size, 1)
    raise Unreadable("has too many attributes; save it again without its metadata")


def _text(file: BinaryIO) -> bytes:
    """Return the bytes of a file up to the next 0, of which OpenEXR allows 255."""
    start = file.tell()
    text = file.read(256).partition(b"\0")[0]
    file.seek(start + len(text) + 1)
    return text
