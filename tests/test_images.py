"""Pictures are read in the depth and the colours that their files state; what is not used is said once."""

import concurrent.futures
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from my.errors import UserError
from picture_files import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGBA,
    chunk,
    png,
    png_of,
    saved,
    tiff,
    with_orientation,
    write_exr,
)
from voxnerf.images import MAX_PIXELS, image_size, read_image, read_mask

rng = np.random.default_rng(0)


@pytest.fixture
def read(tmp_path):
    """Reads the bytes of a picture, written into a folder of its own."""

    def of(data, suffix=".png", **options):
        path = tmp_path / f"picture{suffix}"
        path.write_bytes(data)
        rgba = read_image(path, **options)
        assert rgba.dtype == np.float32 and rgba.flags.c_contiguous and rgba.min() >= 0 and rgba.max() <= 1
        assert image_size(path, **{k: v for k, v in options.items() if k == "size"}) == rgba.shape[1::-1]
        return rgba

    return of


@pytest.fixture
def refused(read):
    """Returns the one line in which the bytes of a picture are refused."""

    def of(data, suffix=".png"):
        with pytest.raises(UserError) as error:
            read(data, suffix, where="frames[3]")
        line = str(error.value)
        assert line.startswith("frames[3]: ") and f"picture{suffix}: " in line and line.isprintable()
        assert len(line.split(f"picture{suffix}")[1]) < 320
        return line

    return of


def opaque(values):
    """Grey values (H, W) or colours (H, W, 3), as RGBA without transparency."""
    values = np.asarray(values, np.float64)
    values = np.stack([values] * 3, axis=-1) if values.ndim == 2 else values
    return np.concatenate([values, np.ones((*values.shape[:2], 1))], axis=-1)


def near(rgba, expected, most=1e-7):
    return np.abs(rgba - np.asarray(expected)).max() <= most


# ---------------------------------------------------------------- PNG


@pytest.mark.parametrize(
    "bits, row, values",
    [(1, 0b10100000, [1, 0, 1]), (2, 0b00011011, [0, 1 / 3, 2 / 3, 1]), (4, 0x0F, [0, 1]), (4, 0x5A, [1 / 3, 2 / 3])],
)
def test_grey_below_8_bits_fills_its_range(read, capsys, bits, row, values):
    assert near(read(png([bytes([row])], len(values), bits, GREY)), opaque([values]))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "bits, row, stated",
    [(1, 0b10000000, 1), (2, 0b01000000, 1), (4, 0x30, 3), (8, b"\x80\0", 128), (16, b"\x80\1\x80\2", 0x8001)],
)
def test_a_grey_value_may_stand_for_transparent(read, bits, row, stated):
    row = row if isinstance(row, bytes) else bytes([row])
    rgba = read(png([row], 2, bits, GREY, (b"tRNS", struct.pack(">H", stated))))
    assert rgba[..., 3].tolist() == [[0, 1]]


def test_16_bits_of_grey_are_kept(read):
    rgba = read(png_of(np.array([[[0], [1], [32768], [65535]]], np.uint16), GREY))
    assert near(rgba, opaque([[0, 1.5259022e-05, 0.50000763, 1]]), 1e-8)


@pytest.mark.parametrize("colour, channels", [(RGB, 3), (RGBA, 4), (GREY_ALPHA, 2)])
def test_16_bits_of_colours_are_kept(read, colour, channels):
    pixels = rng.integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    rgba = read(png_of(pixels, colour))
    expected = pixels / 65535
    if channels == 2:
        expected = expected[..., [0, 0, 0, 1]]
    assert near(rgba, opaque(expected) if channels == 3 else expected)


def test_a_16_bit_colour_may_stand_for_transparent(read):
    rgba = read(png_of(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint16), RGB, (b"tRNS", struct.pack(">3H", 1, 2, 3))))
    assert rgba[..., 3].tolist() == [[0, 1]]


def test_an_8_bit_colour_may_stand_for_transparent(read):
    rgba = read(png_of(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8), RGB, (b"tRNS", struct.pack(">3H", 1, 2, 3))))
    assert near(rgba, [[[1 / 255, 2 / 255, 3 / 255, 0], [1 / 255, 2 / 255, 4 / 255, 1]]])


def test_a_palette_is_looked_up_with_its_alpha(read):
    colours, alpha = bytes([255, 0, 0, 0, 255, 0, 0, 0, 51]), bytes([0, 102])
    rgba = read(png([bytes([0, 1, 2])], 3, 8, PALETTE, (b"PLTE", colours), (b"tRNS", alpha)))
    assert near(rgba, [[[1, 0, 0, 0], [0, 1, 0, 0.4], [0, 0, 0.2, 1]]])
    rgba = read(png([bytes([0b10000000])], 2, 1, PALETTE, (b"PLTE", colours[:6])))
    assert near(rgba, [[[0, 1, 0, 1], [1, 0, 0, 1]]])


def test_alpha_is_straight(read):
    assert near(read(png_of(np.array([[[255, 51, 0, 102]]], np.uint8), RGBA)), [[[1, 0.2, 0, 0.4]]])
    assert near(read(png_of(np.array([[[51, 102]]], np.uint8), GREY_ALPHA)), [[[0.2, 0.2, 0.2, 0.4]]])


def test_an_interlaced_png(read):
    """Adam7 of 2x2 pixels: the first pass has pixel (0, 0), the sixth (1, 0), the seventh the second row."""
    passes = [np.array([[1, 2, 3]]), np.array([[4, 5, 6]]), np.array([[7, 8, 65535], [0, 1, 0]])]
    rows = [row.astype(">u2").tobytes() for row in passes]
    rgba = read(png(rows, 2, 16, RGB, interlaced=1, height=2))
    assert near(rgba, opaque(np.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 65535], [0, 1, 0]]]) / 65535))


@pytest.mark.parametrize(
    "gamma, value, expected, said",
    [(45455, 128, 128 / 255, False), (100000, 127.5, 0.735357, True), (50000, 51, 0.220916, True)],
)
def test_a_gamma_that_is_not_srgbs_is_converted(read, capsys, gamma, value, expected, said):
    """gAMA 1 is linear light. With gAMA 0.5, the value 0.2 is the light 0.04: 1.055 0.04^(1/2.4) - 0.055 = 0.220916."""
    pixels = np.full((1, 2, 1), round(value * 257), np.uint16)
    assert near(read(png_of(pixels, GREY, (b"gAMA", struct.pack(">I", gamma)))), opaque([[expected] * 2]), 1e-5)
    assert ("states gamma" in capsys.readouterr().err) == said


def test_srgb_and_a_profile_go_before_gamma(read, capsys):
    pixels, gamma = np.full((1, 1, 1), 128, np.uint8), (b"gAMA", struct.pack(">I", 100000))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for before in ((b"sRGB", b"\0"), (b"iCCP", b"sRGB\0\0" + zlib.compress(srgb))):
        assert near(read(png_of(pixels, GREY, before, gamma)), opaque([[128 / 255]]))
    assert capsys.readouterr().err == ""


def test_another_profile_is_noted_once_and_quoted_briefly(tmp_path, capsys):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for name, profile in (("a", lab), ("b", lab), ("c", b"no profile")):
        Image.new("RGB", (1, 1)).save(tmp_path / f"{name}.jpg", icc_profile=profile)
        read_image(tmp_path / f"{name}.jpg")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("note: ") and "a.jpg: states the colour profile" in line and "taken for sRGB" in line


@pytest.mark.parametrize("cicp, expected", [((1, 13, 0, 1), None), ((1, 8, 0, 1), 0.736647), ((12, 13, 0, 1), None)])
def test_cicp(read, capsys, cicp, expected):
    rgba = read(png_of(np.full((1, 1, 1), 128, np.uint8), GREY, (b"cICP", bytes(cicp))))
    assert near(rgba, opaque([[expected or 128 / 255]]), 1e-6)
    assert bool(capsys.readouterr().err) == (cicp != (1, 13, 0, 1))


@pytest.mark.parametrize("transfer, name", [(16, "PQ"), (18, "HLG")])
def test_hdr_curves_are_refused(refused, transfer, name):
    line = refused(png_of(np.zeros((1, 1, 3), np.uint16), RGB, (b"cICP", bytes([9, transfer, 0, 1]))))
    assert f"HDR picture with the curve {name}" in line and "save it as OpenEXR" in line


# ---------------------------------------------------------------- TIFF


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff(read, order, packed, channels, dtype):
    top = np.iinfo(dtype).max
    pixels = rng.integers(0, top + 1, (5, 7, channels)).astype(dtype)
    alpha = {"t338": 2} if channels == 4 else {}
    rgba = read(tiff(pixels, 1 if channels == 1 else 2, order, packed, **alpha), ".tif")
    assert near(rgba, pixels / top if channels == 4 else opaque(np.broadcast_to(pixels / top, (5, 7, 3))))


def test_tiff_whose_zero_is_white(read):
    assert near(read(tiff(np.array([[[0], [65535], [16384]]], np.uint16), 0), ".tif"), opaque([[1, 0, 49151 / 65535]]))
    assert near(read(tiff(np.array([[[0], [255], [51]]], np.uint8), 0), ".tif"), opaque([[1, 0, 0.8]]))


def test_tiff_of_12_bits(read):
    data = tiff(bytes([0x80, 0x0F, 0xFF]), 1, width=2, height=1, t258=12)
    assert near(read(data, ".tif"), opaque([[0x800 / 4095, 1]]))


def test_tiff_whose_colours_are_multiplied_by_alpha(read):
    pixels = np.array([[[10000, 20000, 0, 40000], [0, 0, 0, 0]]], np.uint16)
    assert near(read(tiff(pixels, 2, t338=1), ".tif"), [[[0.25, 0.5, 0, 40000 / 65535], [0, 0, 0, 0]]])


def test_tiff_with_a_channel_of_unstated_meaning(read, capsys):
    pixels = np.array([[[1, 2, 3, 4]]], np.uint16)
    assert near(read(tiff(pixels, 2, t338=0), ".tif"), opaque(pixels[..., :3] / 65535))
    assert "not stated to be alpha: it is not used" in capsys.readouterr().err


def test_tiff_of_16_bit_cmyk(read):
    pixels = np.array([[[0, 16384, 65535, 32768]]], np.uint16)
    key = 1 - 32768 / 65535
    assert near(read(tiff(pixels, 5), ".tif"), opaque([[[key, (1 - 16384 / 65535) * key, 0]]]))


def test_a_float_tiff_is_linear(read, capsys):
    rgba = read(tiff(np.array([[[0.5], [0.002], [1]]], np.float32), 1), ".tif")
    assert near(rgba, opaque([[0.735357, 0.02584, 1]]), 1e-6)
    assert "linear light" in capsys.readouterr().err


@pytest.mark.parametrize(
    "pixels, photometric, tags, words",
    [
        (np.zeros((1, 1, 3), np.float32), 2, {}, "TIFF (to 16 bits, or grey floats)"),
        (np.zeros((1, 1, 1), np.int16), 1, {}, "signed numbers"),
        (np.zeros((1, 1, 1), np.uint32), 1, {}, "32-bit integers"),
        (np.zeros((1, 1, 3), np.uint8), 8, {}, "kind LAB"),
        (np.zeros((1, 1, 3), np.uint8), 2, {"t254": 1}, "small preview"),
        (np.zeros((1, 1, 3), np.uint16), 2, {"t284": 2}, "separate planes"),
    ],
)
def test_tiffs_that_are_not_read(refused, pixels, photometric, tags, words):
    assert words in refused(tiff(pixels, photometric, **tags), ".tif")


# ---------------------------------------------------------------- other kinds


def flat(mode, colour):
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize(
    "image, expected",
    [
        (flat("L", 128), [128 / 255] * 3),
        (flat("RGB", (128, 128, 128)), [128 / 255] * 3),
        (flat("CMYK", (0, 51, 255, 0)), [1, 0.8, 0]),
        (flat("CMYK", (0, 0, 0, 204)), [0.2] * 3),
    ],
)
def test_jpeg_of_each_colour_type(read, capsys, image, expected):
    """Pillow writes CMYK as Adobe does, inverted."""
    assert near(read(saved(image, "JPEG", quality=100), ".jpg"), opaque(np.full((16, 16, 3), expected)), 0.005)
    assert ("CMYK" in capsys.readouterr().err) == (image.mode == "CMYK")


def test_jpeg_of_ycck(read):
    """Adobe's transform 2: the first three channels are YCbCr of the inverse of CMY, which is stored inverted itself.

    Y = Cb = Cr = 255 gives R, B above 255, and G = 255 - (0.344 + 0.714) 127 = 120.6. So C and Y are full, and M is
    120.6: red and blue are 0, and green is 134.4.
    """
    data = saved(flat("CMYK", (0, 0, 0, 0)), "JPEG", quality=100)  # 255 everywhere, as it is stored
    start = data.index(b"\xff\xee")
    data = data[:start] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x02" + data[start + 16 :]
    assert near(read(data, ".jpg"), opaque(np.full((16, 16, 3), [0, 134.4 / 255, 0])), 0.003)


@pytest.mark.parametrize(
    "kind, image, expected",
    [
        ("WEBP", flat("RGBA", (255, 51, 0, 102)), [1, 0.2, 0, 0.4]),
        ("BMP", flat("RGB", (255, 51, 0)), [1, 0.2, 0, 1]),
        ("GIF", flat("P", 0), [0, 0, 0, 1]),
        ("PPM", flat("RGB", (255, 51, 0)), [1, 0.2, 0, 1]),
        ("PPM", flat("L", 51), [0.2, 0.2, 0.2, 1]),
        ("TGA", flat("RGBA", (255, 51, 0, 102)), [1, 0.2, 0, 0.4]),
        ("BMP", flat("1", 1), [1, 1, 1, 1]),
        ("TGA", flat("LA", (51, 102)), [0.2, 0.2, 0.2, 0.4]),
    ],
)
def test_other_kinds(read, kind, image, expected):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert near(read(saved(image, kind, **options), f".{kind.lower()}"), np.broadcast_to(expected, (16, 16, 4)))


def test_pnm_of_16_bits(read):
    colours = np.array([[1, 2, 1023], [0, 512, 4]], ">u2")
    assert near(read(b"P6 2 1 1023\n" + colours.tobytes(), ".ppm"), opaque(colours[None] / 1023))
    assert near(read(b"P5 2 1 65535\n" + bytes([128, 0, 0, 1]), ".pgm"), opaque([[32768 / 65535, 1 / 65535]]))


def test_pfm_is_linear(read, capsys):
    """Its rows are stored from the lowest to the highest."""
    data = b"Pf\n1 2\n-1.0\n" + np.array([0.5, 1], "<f4").tobytes()
    assert near(read(data, ".pfm"), opaque([[1], [0.735357]]), 1e-6)
    assert "linear light" in capsys.readouterr().err


def test_avif(read):
    assert near(
        read(saved(flat("RGB", (255, 51, 0)), "AVIF", quality=100), ".avif"),
        np.broadcast_to([1, 0.2, 0, 1], (16, 16, 4)),
        0.02,
    )


def test_tiff_palette(read):
    palette = tuple(256 * x for x in [255, 51] + [0] * 254 + [0, 102] + [0] * 254 + [0, 153] + [0] * 254)
    rgba = read(tiff(np.array([[[0], [1]]], np.uint8), 3, t320=palette), ".tif")
    assert near(rgba, [[[1, 0, 0, 1], [0.2, 0.4, 0.6, 1]]])


@pytest.mark.parametrize("kind, suffix", [("GIF", ".gif"), ("PNG", ".png"), ("WEBP", ".webp"), ("TIFF", ".tif")])
def test_the_first_of_several_pictures_is_used(read, capsys, kind, suffix):
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(flat("RGB", (255, 0, 0)), kind, save_all=True, append_images=[flat("RGB", (0, 255, 0))], **options)
    assert near(read(data, suffix), np.broadcast_to([1, 0, 0, 1], (16, 16, 4)))
    assert "several pictures: the first is used" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b"#?RADIANCE\n", "Radiance HDR"),
        (b"8BPS" + bytes(40), "Photoshop"),
        (b"<html>", "text file"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"\0\0\0\x0cJXL \r\n", "JPEG XL"),
        (b"\0\0\0\x18ftypisom", "video"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (bytes(range(64)), "of no kind that is read"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
    ],
)
def test_what_else_a_file_may_be(refused, data, words):
    assert words in refused(data)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UserError, match="cannot be read: (No such file|Is a directory)"):
            read_image(path)
        with pytest.raises(UserError):
            image_size(path)


# ---------------------------------------------------------------- orientation

STORED = np.array([[[10], [20], [30]], [[40], [50], [60]]], np.uint8)  # 3 wide, 2 high
SHOWN = {
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


def oriented(kind, orientation):
    if kind == "TIFF":
        return tiff(STORED, 1, t274=orientation)
    if kind == "eXIf behind the pixels":
        exif = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1" + struct.pack(">HHI", orientation, 0, 0)
        return png_of(STORED, GREY, after=[(b"eXIf", exif)])
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(STORED[..., 0])
    return with_orientation(image.convert("RGB") if kind == "WEBP" else image, kind, orientation, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "eXIf behind the pixels"])
def test_orientation_is_applied_where_the_stated_size_is_the_turned_ones(read, capsys, kind, orientation):
    data = oriented(kind, orientation)
    stored = opaque(STORED[..., 0] / 255)
    assert near(read(data), stored)
    said = capsys.readouterr().err
    assert (said.count("EXIF orientation") == 1 and "as they are stored" in said) if orientation > 1 else not said
    assert near(read(data, size=(3, 2)), stored) and near(read(data, size=(600, 400)), stored)
    assert near(read(data, size=(5, 5)), stored)  # of neither shape: left to who states it
    turned = opaque(np.array(SHOWN[orientation]) / 255) if orientation > 4 else stored
    assert near(read(data, size=(2, 3)), turned) and near(read(data, size=(401, 600)), turned)


def test_a_square_picture_is_not_turned(read):
    pixels = np.array([[[10], [20]], [[30], [40]]], np.uint8)
    assert near(read(tiff(pixels, 1, t274=6), size=(2, 2)), opaque(pixels[..., 0] / 255))


def test_a_16_bit_tiff_on_its_side(read):
    pixels = np.arange(18, dtype=np.uint16).reshape(2, 3, 3)
    assert near(read(tiff(pixels, 2, t274=6)), opaque(pixels / 65535))


def test_jpeg_says_that_it_was_turned(read, capsys):
    data = with_orientation(Image.new("RGB", (64, 32)), "JPEG", 6)
    assert read(data, size=(32, 64)).shape == (64, 32, 4)
    assert "it is turned, since the scene's w and h say so" in capsys.readouterr().err


def test_damaged_exif_is_noted(read, capsys):
    read(png_of(STORED, GREY, (b"tEXt", b"Raw profile type exif\0\nexif\n4\nzzzz")))
    assert "damaged EXIF data" in capsys.readouterr().err


# ---------------------------------------------------------------- masks


@pytest.fixture
def mask(tmp_path):
    """Reads the bytes of a mask."""

    def of(data, **options):
        (tmp_path / "mask.png").write_bytes(data)
        found = read_mask(tmp_path / "mask.png", **options)
        assert found.dtype == bool
        return found.tolist()

    return of


@pytest.mark.parametrize(
    "data",
    [
        png([bytes([0b01100000])], 3, 1, GREY),
        png([bytes([0, 1, 255])], 3, 8, GREY),
        png_of(np.array([[[0], [1], [65535]]], np.uint16), GREY),
        png_of(np.array([[[0, 0, 0], [0, 0, 1], [255, 255, 255]]], np.uint8), RGB),
        png_of(np.array([[[255, 0], [255, 1], [255, 255]]], np.uint8), GREY_ALPHA),
        png_of(np.array([[[0, 0], [0, 1], [0, 255]]], np.uint8), GREY_ALPHA),
        png_of(np.array([[[0, 255], [9, 255], [9, 9]]], np.uint8), GREY_ALPHA),
        png([bytes([0, 1, 2])], 3, 8, PALETTE, (b"PLTE", bytes([0, 0, 0, 255, 0, 0, 0, 0, 9]))),
        png([bytes([2, 1, 0])], 3, 8, PALETTE, (b"PLTE", bytes([255, 0, 0, 0, 0, 9, 0, 0, 0]))),
    ],
)
def test_a_mask_leaves_out_what_is_0(mask, data):
    assert mask(data) == [[False, True, True]]


def test_masks_of_one_value(mask):
    assert mask(png([bytes([0, 0])], 2, 8, GREY)) == [[False, False]]
    assert mask(png([bytes([255, 255])], 2, 8, GREY)) == [[True, True]]


def test_a_jpeg_mask_is_cut_at_one_half(mask, capsys):
    image = np.zeros((8, 8), np.uint8)
    image[:, 4:] = 255
    image[0, 0] = 60
    assert (np.array(mask(saved(Image.fromarray(image), "JPEG", quality=30))) == (image > 127)).all()
    assert "a mask in JPEG" in capsys.readouterr().err


def test_a_mask_is_turned_like_its_picture(mask):
    assert mask(oriented("PNG", 6), size=(2, 3)) == [[True] * 2] * 3


def test_a_mask_that_is_not_there_names_its_frame(tmp_path):
    with pytest.raises(UserError, match=r"^frames\[0\]: .*none\.png: cannot be read"):
        read_mask(tmp_path / "none.png", "frames[0]")


# ---------------------------------------------------------------- OpenEXR


@pytest.fixture
def exr(tmp_path):
    """Reads an OpenEXR picture of channels (H, W)."""

    def of(header=None, **channels):
        write_exr(tmp_path / "a.exr", header, **channels)
        rgba = read_image(tmp_path / "a.exr")
        assert rgba.dtype == np.float32 and image_size(tmp_path / "a.exr") == rgba.shape[1::-1]
        return rgba

    return of


def row(*values, dtype=np.float32):
    return np.array([values], dtype)


def test_exr_is_converted_to_srgb(exr, capsys):
    rgba = exr(R=row(0.5, 0), G=row(0.002, 1), B=row(0.0031308, 0.18))
    assert near(rgba, [[[0.735357, 0.02584, 0.04045, 1], [0, 1, 0.461356, 1]]], 1e-5)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("dtype, values", [(np.float16, (0.5, 1)), (np.uint32, (0, 1))])
def test_exr_of_other_numbers(exr, dtype, values):
    expected = [[[x, x, x, 1] for x in ({0.5: 0.735357}.get(v, v) for v in values)]]
    assert near(exr(Y=row(*values, dtype=dtype)), expected, 1e-5)


def test_exr_has_colours_multiplied_by_alpha(exr):
    rgba = exr(R=row(0.25, 0), G=row(0.125, 0), B=row(0, 0), A=row(0.25, 0))
    assert near(rgba, [[[1, 0.735357, 0, 0.25], [0, 0, 0, 0]]], 1e-6)


def test_exr_out_of_range_is_counted(exr, capsys):
    rgba = exr(R=row(7.5, 0, np.nan, np.inf), G=row(0, -0.1, 0, 0), B=row(0, 0, 0, 0))
    assert near(rgba[0, :, 0], [1, 0, 0, 1]) and near(rgba[0, :, 1:3], 0)
    said = capsys.readouterr().err
    assert "2 of its 4 pixels are not finite" in said and "2 of its 4 pixels lie outside 0 to 1, up to 7.5" in said


def test_exr_whose_windows_differ(exr):
    """The display window is 4x3 pixels from (0, 0); the data are 2x2 from (-1, 1), of which one column is seen."""
    windows = {"displayWindow": ((0, 0), (3, 2)), "dataWindow": ((-1, 1), (0, 2))}
    rgba = exr(windows, Y=np.array([[0.1, 1], [0.2, 0.5]], np.float32))
    expected = np.zeros((3, 4, 4))
    expected[1, 0], expected[2, 0] = 1, [0.735357] * 3 + [1]
    assert near(rgba, expected, 1e-6)


def test_exr_with_other_channels_and_primaries(exr, capsys):
    exr({"chromaticities": (0.7347, 0.2653, 0.0, 1.0, 0.0001, -0.077, 0.32168, 0.33767)}, Y=row(1), Z=row(5))
    said = capsys.readouterr().err
    assert "channels Z are not used" in said and "primaries other than Rec. 709" in said


def test_exr_without_colours_is_refused(exr):
    with pytest.raises(UserError, match="has the channels L.Combined.R, and only R, G, B or Y, with or without A"):
        exr(**{"L.Combined.R": row(1)})


def test_damaged_exr_is_refused_in_one_line(exr, tmp_path, capfd):
    exr(R=rng.random((64, 64), np.float32), G=rng.random((64, 64), np.float32), B=rng.random((64, 64), np.float32))
    data = (tmp_path / "a.exr").read_bytes()
    capfd.readouterr()
    for size in (4, 40, 300, len(data) // 2, len(data) - 3):
        (tmp_path / "b.exr").write_bytes(data[:size])
        with pytest.raises(UserError, match="b.exr: is a damaged OpenEXR file"):
            read_image(tmp_path / "b.exr")
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.mark.parametrize(
    "flags, rest, words",
    [
        (0x1002, b"", "several parts"),
        (0x802, b"", "deep pixels"),
        (2, b"channels\0chlist\0\0\0\1\0", "too many ch"),
        (2, b"a\0int\0\0\0\0\0" * 2000, "too many attributes"),
    ],
)
def test_exr_claims(tmp_path, flags, rest, words):
    (tmp_path / "a.exr").write_bytes(b"\x76\x2f\x31\x01" + struct.pack("<I", flags) + rest)
    with pytest.raises(UserError, match=f"a.exr: has .*{words}"):
        read_image(tmp_path / "a.exr")


def test_exr_of_too_many_pixels(exr, tmp_path):
    exr(Y=np.zeros((8, 8), np.float32))
    data, window = (tmp_path / "a.exr").read_bytes(), struct.pack("<4i", 0, 0, 7, 7)
    (tmp_path / "a.exr").write_bytes(data.replace(window, struct.pack("<4i", 0, 0, 8191, 8192)))
    with pytest.raises(UserError, match="a.exr: has 8192x8193 pixels, more than 67,108,864; resize it"):
        read_image(tmp_path / "a.exr")


def test_exr_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.exr").write_bytes(b"\x76\x2f\x31\x01")
    monkeypatch.setitem(__import__("sys").modules, "OpenEXR", None)
    with pytest.raises(UserError, match="a.exr: is an OpenEXR picture; to have it read: pip install OpenEXR"):
        read_image(tmp_path / "a.exr")


# ---------------------------------------------------------------- damage, and claims


def counted(call):
    """The most bytes that a call holds at once, of those that Python counts: not those of decoders."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ZEROS = zlib.compress(bytes(2**20))  # 1 MB in 1 KB
SMALL = png([b"\0"], 1, 8, GREY)
JPEG = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
SCANS = JPEG[:-2] + JPEG[JPEG.index(b"\xff\xda") : -2] * 200 + JPEG[-2:]

CLAIMS = {
    "png": png([b""], 2**31 - 1, 16, RGBA, height=2**31 - 1),
    "png just too large": png([b""], 2**13, 8, GREY, height=2**13 + 1),
    "png without pixels": png([], 0, 8, GREY, height=1),
    "png of text": png([b"\0"], 1, 8, GREY, *[(b"zTXt", b"k\0\0" + ZEROS)] * 40),
    "png of text without a name": png([b"\0"], 1, 8, GREY, *[(b"zTXt", b"\0\0" + ZEROS)] * 40),
    "png of text behind the pixels": png([b"\0"], 1, 8, GREY, after=[(b"iTXt", b"k\0\1\0\0\0" + ZEROS)] * 40),
    "png of profiles": png([b"\0"], 1, 8, GREY, *[(b"iCCP", b"p\0\0" + ZEROS)] * 40),
    "png of one large profile": png([b"\0"], 1, 8, GREY, (b"iCCP", b"p\0\0" + zlib.compress(bytes(2**26)))),
    "png of chunks": png([b"\0"], 1, 8, GREY, *[(b"teSt", b"")] * 5000),
    "png of empty chunks of pixels": SMALL[:-12] + chunk(b"IDAT", b"") * 100_000,
    "png with a chunk of 4 GB": SMALL[:33] + b"\xff\xff\xff\xfftEXt" + SMALL[33:],
    "tiff": tiff(b"", 1, width=2**31, height=2**31, t258=8),
    "tiff of one row": tiff(b"", 1, width=2**32 - 1, height=1, t258=8),
    "tiff of many samples": tiff(b"", 2, width=4, height=4, t258=16, t277=65535),
    "tiff of large tiles": tiff(b"", 1, packed=True, width=8, height=8, t258=8, t322=65520, t323=65520, t324=8, t325=8),
    "tiff of 32,000 strips": tiff(b"", 1, width=8, height=8, t258=8, t278=1, t273=(400,) * 32_000),
    "tiff whose EXIF data go round": tiff(b"", 1, width=8, height=2**20, t258=8, t34665=8),
    "png of EXIF data": png([b"\0"], 1, 8, GREY, (b"eXIf", bytes(2**21))),
    "tiff that begins nowhere": b"II+\0\x08\0\0\0" + b"\xff" * 40,
    "tiff of strips": tiff(b"", 1, width=8, height=8, t258=8, t278=1, t273=(400,) * 300_000),
    "jpeg": JPEG.replace(struct.pack(">HH", 64, 64), b"\xff\xff\xff\xff"),
    "jpeg of few bytes in one scan": saved(Image.new("L", (64, 64)), "JPEG").replace(
        struct.pack(">HH", 64, 64), struct.pack(">HH", 8192, 8192)
    ),
    "jpeg of few bytes": JPEG.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 8192, 8192)),
    "jpeg of scans": SCANS,
    "jpeg of segments": JPEG[:2] + b"\xff\xfe\0\2" * 20_000 + JPEG[2:],
    "gif": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;",
    "bmp": b"BM" + struct.pack("<IIIIiiHH", 100, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24) + bytes(50),
    "ppm": b"P6 99999999 99999999 255\n",
    "ppm of one number": b"P6 " + b"9" * 100_000,
    "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 32, 8),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_that_claims_too_much_is_refused(refused, name):
    assert len(CLAIMS[name]) < 3_000_000
    assert counted(lambda: refused(CLAIMS[name])) < 20 * len(CLAIMS[name]) + 20_000_000


def test_the_bound_on_pixels_is_told_before_they_are_decoded(refused, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert MAX_PIXELS == 67_108_864
    assert "has 8192x8193 pixels, more than 67,108,864; resize it" in refused(CLAIMS["png just too large"])


def test_the_size_is_read_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "eXIf behind the pixels"):
        (tmp_path / "a").write_bytes(oriented(kind, 8))
        assert image_size(tmp_path / "a") == (3, 2) and image_size(tmp_path / "a", (20, 30)) == (2, 3)


def test_metadata_in_measure_are_read_over(read):
    text = [(b"zTXt", b"k\0\0" + zlib.compress(b"words"))] * 20 + [(b"tEXt", b"k\0v")] * 200
    assert near(read(png([b"\x80"], 1, 8, GREY, *text)), opaque([[128 / 255]]))


SOUND = {
    "png": png_of(rng.integers(0, 65536, (40, 40, 3)).astype(np.uint16), RGB),
    "tif": tiff(rng.integers(0, 65536, (40, 40, 3)).astype(np.uint16), 2, packed=True),
    "raw.tif": tiff(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8), 2),
    "jpg": saved(Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)), "JPEG"),
    "webp": saved(Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)), "WEBP", lossless=True),
    "gif": saved(Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)), "GIF"),
    "bmp": saved(Image.fromarray(rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)), "BMP"),
    "ppm": b"P6 40 40 65535\n" + bytes(40 * 40 * 6),
}


@pytest.mark.parametrize("kind", SOUND)
def test_a_file_that_ends_too_early_is_refused_in_one_line(refused, capfd, kind):
    data = SOUND[kind]
    for size in (9, 30, 60, len(data) // 2, len(data) - len(data) // 10):
        assert "damaged" in refused(data[:size], f".{kind}")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", SOUND)
def test_damage_ends_in_one_line_or_in_a_picture(read, capfd, kind):
    for seed in range(60):
        broken = np.frombuffer(SOUND[kind], np.uint8).copy()
        r = np.random.default_rng(seed)
        broken[r.integers(0, min(len(broken), 200), 3)] = r.integers(0, 256, 3)
        try:
            read(broken.tobytes(), f".{kind}")
        except UserError as error:
            assert len(str(error)) < 600 and "\n" not in str(error)
    out, err = capfd.readouterr()
    assert out == "" and all(line.startswith("note: ") for line in err.splitlines())


def test_pictures_are_read_in_threads_without_a_warning(tmp_path, capfd):
    """Pillow warns of a large picture and of damaged EXIF; filters of warnings are the process's."""
    names = [tmp_path / f"{i}.jpg" for i in range(40)]
    for name in names:
        name.write_bytes(saved(Image.new("RGB", (32, 16)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff"))
    before = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = {rgba.shape for rgba in pool.map(read_image, names)}
    assert sizes == {(16, 32, 4)} and capfd.readouterr().err == "" and warnings.filters == before


def test_a_note_is_written_once_per_folder_from_any_thread(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(20):
            (tmp_path / folder / f"{i}.jpg").write_bytes(with_orientation(Image.new("RGB", (8, 4)), "JPEG", 6))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, sorted(tmp_path.rglob("*.jpg"))))
    assert capsys.readouterr().err.count("note: ") == 2
