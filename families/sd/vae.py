"""The VAE of an --sd.vae, which supplies the one that a checkpoint lacks, or takes the place of its own."""

from families.sd import kinds, layout, names, networks
from families.sd.find import read_json, vae_place
from my.errors import UserError, first_line, shown
from my.tensor_file import TensorFile

FLAG = "--sd.vae"
OF_FOLDER = "AutoencoderKL"
MOVED = ("shift_factor", "latents_mean", "latents_std")  # settings by which other models move their latents


def read(text, scaling, dtype, empty=False):
    """Return diffusers' AutoencoderKL of an --sd.vae for a model of this scaling factor, on the meta device if `empty`.

    Raises UserError where it is none, or one of other latents than Stable Diffusion's.
    """
    path = vae_place(text)
    try:
        net = _of_folder(path, dtype, empty) if path.is_dir() else _of_file(path, dtype, empty)
        kinds.refuse_other_latents(net.config)
    except ValueError as error:
        raise UserError(f"{FLAG} {path}: {first_line(error)}") from None
    there = net.config.scaling_factor
    if path.is_dir() and there is not None and there != scaling:
        raise UserError(
            f"{FLAG} {path}: its scaling_factor is {shown(there)}, and the checkpoint's is {scaling}: it "
            "is of another model's latents; give a VAE of Stable Diffusion 1.x or 2.x"
        )
    net.register_to_config(scaling_factor=scaling)
    return net


def _of_folder(folder, dtype, empty):
    """Return the AutoencoderKL of a diffusers folder; raises ValueError where it is none."""
    from diffusers import AutoencoderKL

    networks.refuse_other_formats("vae", folder, f"{FLAG} {folder}")
    refuse_other_classes(read_json(folder / "config.json"))
    return networks.from_folder("vae", AutoencoderKL, folder, empty, torch_dtype=dtype)


def refuse_other_classes(settings):
    """Raise ValueError for the settings of a VAE of another class, or with latents that are moved."""
    if settings.get("_class_name", OF_FOLDER) != OF_FOLDER:
        raise ValueError(f"the VAE is an {shown(settings['_class_name'])}, and only {OF_FOLDER} is supported")
    for name in MOVED:
        if settings.get(name) is not None:
            raise ValueError(
                f"the VAE has a {name}, as no Stable Diffusion 1.x or 2.x has: its latents are another model's"
            )


def _of_file(path, dtype, empty):
    """Return the AutoencoderKL of a single file, in any spelling; raises UserError or ValueError where it is none."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL

    opened = TensorFile(path, FLAG)
    kinds.refuse_other_vaes(opened.shapes)
    architecture = opened.metadata.get("modelspec.architecture", "")
    if "xl" in architecture.lower():
        raise kinds.NotStableDiffusion(
            f"it is of {shown(architecture)} by its metadata; give a VAE of Stable Diffusion 1.x or 2.x"
        )
    with layout.told_by_shapes():
        file = networks.Published(opened, names.published_vae(opened.shapes))
        config = layout.vae_configuration(layout.below(file.shapes, layout.VAE))
    kinds.refuse_other_latents(config)
    with init_empty_weights(include_buffers=False):
        net = AutoencoderKL(**config)
    sources = {"vae": layout.sources("vae", net.state_dict(), config)}
    networks.refuse_mismatches(file, {"vae": net}, sources, "VAE of Stable Diffusion")
    if not empty:
        networks.fill({"vae": net}, sources, file, dtype)
    return net


def scaling_of(folder):
    """Return the scaling factor of a folder's own VAE, by which its UNet knows latents; Stable Diffusion's if unstated.

    The folder need not be there.
    """
    config = folder / "config.json"
    stated = read_json(config).get("scaling_factor") if config.is_file() else None
    return layout.SCALING if type(stated) not in (int, float) else stated
