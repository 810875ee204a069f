"""Picture files made byte by byte, so that tests know what is in them: PNG, TIFF, JPEG with EXIF, OpenEXR."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # colour types of PNG


def chunk(kind, data):
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows, width, bits, colour, *before, interlaced=0, height=None, after=()):
    """A PNG of `rows`, the bytes of each, behind other (kind, data) chunks."""
    raw = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", width, height or len(rows), bits, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(raw)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def png_of(pixels, colour, *before, **more):
    """A PNG of pixels (H, W, C) uint8 or uint16."""
    bits = 8 * pixels.dtype.itemsize
    rows = [row.astype(f">u{bits // 8}").tobytes() for row in pixels]
    return png(rows, pixels.shape[1], bits, colour, *before, **more)


def tiff(pixels, photometric, order="<", packed=False, width=None, height=None, **tags):
    """A TIFF of pixels (H, W, C) of any type, or of bytes; tags {number as "t338": value or tuple} go over its own."""
    data, fields = pixels, {}
    if isinstance(pixels, np.ndarray):
        height, width, samples = pixels.shape
        data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        fields = {
            258: (8 * pixels.dtype.itemsize,) * samples,
            277: samples,
            339: ({"u": 1, "i": 2, "f": 3}[pixels.dtype.kind],) * samples,
        }
    data = zlib.compress(data) if packed else data
    fields |= {
        256: width,
        257: height,
        259: 8 if packed else 1,
        262: photometric,
        278: height,
        273: 0,
        279: len(data),
    } | {int(key[1:]): value for key, value in tags.items()}
    fields = {tag: value if isinstance(value, tuple) else (value,) for tag, value in sorted(fields.items())}
    directory, extra, base = b"", b"", 8 + 2 + 12 * len(fields) + 4
    longs = {tag for tag in fields if tag in (256, 257, 273, 278, 279)}
    end = base + sum(2 * len(v) for t, v in fields.items() if t not in longs and len(v) > 2)
    for tag, values in fields.items():
        values = (end,) if tag == 273 and values == (0,) else values
        kind, code = (4, "I") if tag in longs else (3, "H")
        body = struct.pack(order + code * len(values), *values)
        if len(body) > 4:
            body, extra = struct.pack(order + "I", base + len(extra)), extra + body
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return start + struct.pack(order + "H", len(fields)) + directory + b"\0\0\0\0" + extra + data


def saved(image, kind, **options):
    """The bytes of a Pillow image, written as a kind of file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(image, kind, orientation, **options):
    """The bytes of a Pillow image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, kind, exif=exif, **options)


def write_exr(path, header=None, **channels):
    """Write an OpenEXR file of channels (H, W)."""
    import OpenEXR

    stated = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    OpenEXR.File({**stated, **(header or {})}, channels).write(str(path))
