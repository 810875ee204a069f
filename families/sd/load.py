"""The five parts of a Stable Diffusion, read from a diffusers folder or a single file, with its LoRAs added.

Nothing here uses the network.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from families.family import WITHOUT
from families.sd import layout, lora
from families.sd.files import file_parts
from families.sd.find import MINI, Found
from families.sd.folders import folder_parts
from families.sd.networks import Net, Parts
from my.errors import UserError, shown

if TYPE_CHECKING:
    import torch

    from families.sd.options import Options

MAX_SIZE = 1024  # latent pixels, an 8192-pixel picture: beyond it, a setting is a mistake


def load_parts(
    path: Path, found: Found, options: Options, dtype: torch.dtype, empty: bool = False, variant: str | None = None
) -> Parts:
    """Return {"tokenizer", "text_encoder", "unet", "vae", "scheduler"}, with the networks in `dtype`.

    `path` is the checkpoint's folder or file. `found` has the VAE that replaces the checkpoint's own, and the LoRAs.
    Of `options`, the type of prediction, the averaged weights and the variant are read. `empty` networks are on the
    meta device: every shape is compared, and no weight is read. `variant` is the version that the checkpoint must be
    of, None for any. Raises UserError where the files are not a Stable Diffusion, or do not fit one another.
    """
    parts, version = (folder_parts if path.is_dir() else file_parts)(path, found.vae, options, dtype, empty)
    refuse_other_variant(path, variant, version)
    settle_settings(path, parts["unet"], parts["vae"])
    for one in found.loras:
        lora.fuse(parts, one)
    return parts


def settle_settings(path: Path, unet: Net, vae: Net) -> None:
    """Set `sample_size` and `scaling_factor` to Stable Diffusion's own where they are null.

    No weight has a shape that depends on these two, so loading accepts any value. Raises UserError for a value with
    which no picture can be made.
    """
    size, scaling = unet.config.sample_size, vae.config.scaling_factor
    if size is None:
        unet.register_to_config(sample_size=layout.latent_size(vae.config.block_out_channels))
    elif type(size) is not int or not 0 < size <= MAX_SIZE:
        raise UserError(
            f"{path}: sample_size in unet/config.json is {shown(size)}, not one whole number from 1 to "
            f"{MAX_SIZE} (pictures are square); correct it, or {WITHOUT}"
        )
    if scaling is None:
        vae.register_to_config(scaling_factor=layout.SCALING)
    elif type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        raise UserError(
            f"{path}: scaling_factor in vae/config.json is {shown(scaling)}, not a number above 0, such as "
            f"{layout.SCALING}; correct it, or {WITHOUT}"
        )


def refuse_other_variant(path: Path, variant: str | None, version: int) -> None:
    """Raise UserError where `variant` was asked for, and the checkpoint is of another version."""
    is_of = "mini" if path == MINI else f"v{version}"
    if variant not in (None, is_of):
        raise UserError(
            f"--sd.variant {variant}: {path}, given as --sd.checkpoint, is {is_of}; leave one of the two out"
        )
