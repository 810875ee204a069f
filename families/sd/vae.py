"""The VAE of an --sd.vae. It replaces the checkpoint's own VAE, or serves a checkpoint that has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.openai_unet import below
from families.sd import kinds, layout, names, networks
from families.sd.diffusers_folder import read_json
from my.errors import UserError, first_line, shown
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

    from families.sd.networks import Net

FLAG = "--sd.vae"
OF_FOLDER = "AutoencoderKL"
MOVED = ("shift_factor", "latents_mean", "latents_std")  # settings of VAEs that shift their latents


def read(path: Path, scaling: float, dtype: torch.dtype, empty: bool = False) -> Net:
    """Return the VAE in the file or the diffusers folder `path`, on the meta device if `empty`.

    `scaling` is the scaling factor that the checkpoint's UNet was trained with. Raises UserError where `path` has no
    VAE, or the VAE of a model with other latents than Stable Diffusion's.
    """
    is_folder = path.is_dir()
    try:
        net = _of_folder(path, dtype, empty) if is_folder else _of_file(path, dtype, empty)
        kinds.refuse_other_latents(net.config)
    except ValueError as error:
        raise UserError(f"{FLAG} {path}: {first_line(error)}") from None
    there = net.config.scaling_factor
    if is_folder and there is not None and there != scaling:
        raise UserError(
            f"{FLAG} {path}: its scaling_factor is {shown(there)}, and the checkpoint's is {scaling}: it "
            "is of another model's latents; give a VAE of Stable Diffusion 1.x or 2.x"
        )
    net.register_to_config(scaling_factor=scaling)
    return net


def _of_folder(folder: Path, dtype: torch.dtype, empty: bool) -> Net:
    """Return the VAE of a diffusers folder.

    Raises ValueError where the folder has another kind of VAE or is damaged, and UserError where its weights are for
    another library.
    """
    from diffusers import AutoencoderKL

    networks.refuse_other_formats("vae", folder, f"{FLAG} {folder}")
    refuse_other_classes(read_json(folder / "config.json"))
    return networks.from_folder("vae", AutoencoderKL, folder, empty, torch_dtype=dtype)


def refuse_other_classes(settings: Mapping[str, Any]) -> None:
    """Raise ValueError where the settings of a VAE state another class, or a shift of the latents."""
    if settings.get("_class_name", OF_FOLDER) != OF_FOLDER:
        raise ValueError(f"the VAE is an {shown(settings['_class_name'])}, and only {OF_FOLDER} is supported")
    for name in MOVED:
        if settings.get(name) is not None:
            raise ValueError(
                f"the VAE has a {name}, as no Stable Diffusion 1.x or 2.x has: its latents are another model's"
            )


def _of_file(path: Path, dtype: torch.dtype, empty: bool) -> Net:
    """Return the VAE of a single file, in any spelling of the names.

    Raises ValueError where the names or shapes are not those of Stable Diffusion's VAE, and UserError where the file
    cannot be read or is not complete.
    """
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
        config = layout.vae_configuration(below(file.shapes, layout.VAE))
    kinds.refuse_other_latents(config)
    with init_empty_weights(include_buffers=False):
        net: Net = AutoencoderKL(**config)
    sources = {"vae": layout.sources("vae", net.state_dict(), config)}
    networks.refuse_mismatches(file, {"vae": net}, sources, "VAE of Stable Diffusion")
    if not empty:
        networks.fill({"vae": net}, sources, file, dtype)
    return net


def scaling_of(folder: Path) -> float:
    """Return the scaling factor that the config.json of a folder's own VAE states.

    It is Stable Diffusion's where the file is missing or states no number.
    """
    config = folder / "config.json"
    stated: Any = read_json(config).get("scaling_factor") if config.is_file() else None
    return stated if type(stated) in (int, float) else layout.SCALING
