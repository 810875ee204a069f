"""What picture files claim, checked in their bytes before a decoder believes it.

Pillow bounds much: text and profiles of PNG to 1 MB each, the tags of TIFF to the bytes of the file. What repeats,
and so costs many times the bytes that state it, is counted here.
"""

import re

from voxnerf.pictures import KINDS, Unreadable

MAX_SCANS = 100  # of a JPEG: each is decoded over all pixels; encoders write some 10
MAX_SEGMENTS = 10_000  # of a JPEG, each up to 64 KB
MAX_PACKED = 32  # chunks of a PNG that unpack to up to 1 MB each
MAX_CHUNKS = 1000  # of a PNG, beside its pixels; programs write up to some 50
PIXELS = (b"IDAT", b"fdAT", b"fcTL")
PACKED = (b"iCCP", b"zTXt", b"iTXt")
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # of JPEG, with a length after it, or its end
SCAN, END = 0xDA, 0xD9

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


def check_claims(path):
    """Return what the bytes of a file state that Pillow does not tell, which is of PNG, where stated:
    {"bits": its depth, "cicp": 4 numbers, "exif": bytes}.

    Raises `Unreadable` for a file of a kind that is known and not read, and for one that repeats what costs; OSError
    where it cannot be opened.
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
    return {}


def _png(file):
    """Walk the chunks of a PNG (PNG specification, third edition, 5.3); return what it states."""
    facts, packed, others = {}, 0, 0
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        packed, others = packed + (kind in PACKED), others + (kind not in PIXELS)
        if packed > MAX_PACKED or others > MAX_CHUNKS:
            raise Unreadable("has too many chunks of text and profiles; save it again without its metadata")
        data = file.read(length) if kind in (b"IHDR", b"cICP", b"eXIf") and length < 2**20 else b""
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


def _jpeg(data):
    """Count the segments and the scans of a JPEG (ITU-T T.81, annex B)."""
    at = segments = scans = 0
    while found := MARKER.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        if marker == END:
            break
        segments, scans = segments + 1, scans + (marker == SCAN)
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise Unreadable("repeats its scans or segments too often for a JPEG; save it again")
        at += int.from_bytes(data[at:at + 2], "big")
