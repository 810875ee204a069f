"""The five parts of a Stable Diffusion, out of a diffusers folder or a single file, with LoRAs fused in. No network."""

import math

from families.family import WITHOUT
from families.sd import layout, lora, lora_files
from families.sd.files import file_parts
from families.sd.find import MINI
from families.sd.folders import folder_parts
from my.errors import UserError, shown

MAX_SIZE = 1024  # latent pixels, an 8192-pixel picture: beyond it, a setting is a mistake


def load_parts(path, sd, dtype, empty=False, variant=None):
    """Return {"tokenizer", "text_encoder", "unet", "vae", "scheduler"} of a folder or file, networks in `dtype`.

    `sd` are the options that choose prediction type, averaged weights, VAE and LoRAs. `empty` networks are on the
    meta device: all is compared, but weights are not read. `variant` is the one to insist on. Raises
    UserError for what cannot be read as Stable Diffusion.
    """
    parts, version = (folder_parts if path.is_dir() else file_parts)(path, sd, dtype, empty)
    refuse_other_variant(path, variant, version)
    settle_settings(path, parts["unet"], parts["vae"])
    for text in sd.lora:
        lora.fuse(parts, *lora_files.read(text))
    return parts


def settle_settings(path, unet, vae):
    """Give settings that are null Stable Diffusion's own; raises UserError for those that no picture can be made with.

    These are the ones that the shapes of no weights tell, so that loading takes them as they come.
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


def refuse_other_variant(path, variant, version):
    """Raise UserError where the checkpoint is not of the `variant`, or None, that was asked for beside it."""
    of_file = "mini" if path == MINI else f"v{version}"
    if variant not in (None, of_file):
        raise UserError(
            f"--sd.variant {variant}: {path}, given as --sd.checkpoint, is {of_file}; leave one of the two out"
        )
