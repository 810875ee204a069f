"""Pictures and masks of scenes as numbers."""

import numpy as np
from PIL import Image

from my.errors import UserError, first_line


def image_size(path, size=None):
    """Return the (width, height) of the picture at `path`, pixels, from the file's header; UserError for none."""
    return opened(path, "", lambda picture: picture.size)


def read_image(path, where="", size=None):
    """Return the picture at `path` as (H, W, 4) float32 in [0, 1]: sRGB-encoded RGB, straight alpha; or UserError."""
    return opened(path, where, lambda picture: np.asarray(picture.convert("RGBA")).astype(np.float32) / 255)


def read_mask(path, where="", size=None):
    """Return the mask at `path` as (H, W) bool, False where it is 0: leave out; or UserError."""
    return opened(path, where, lambda picture: np.asarray(picture.convert("L")) > 0)


def opened(path, where, read):
    """Return `read` of the opened picture."""
    try:
        with Image.open(path) as picture:
            return read(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where}{': ' if where else ''}{path}: not a readable image: {first_line(error)}; get it "
                        "again, or leave its frame out") from None
