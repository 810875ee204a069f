"""The five parts of a Stable Diffusion, read from a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.family import WITHOUT
from families.libraries import reason
from families.sd import kinds, noise, vae
from families.sd.diffusers_folder import has_vocabulary, read_json
from families.sd.find import MINI
from families.sd.networks import Parts, from_folder, named, refuse_misfits, refuse_other_formats
from my.errors import Stop, UserError, shown

if TYPE_CHECKING:
    import torch

    from families.sd.options import Options

ELSEWHERE = {  # settings of UNets that take another input besides the prompt -> what model that is
    "class_embed_type": "unCLIP, or another model that is told classes",
    "num_class_embeds": "a model that is told classes",
    "addition_embed_type": "Stable Diffusion XL, or Kandinsky",
    "encoder_hid_dim": "DeepFloyd IF, or Kandinsky",
    "encoder_hid_dim_type": "DeepFloyd IF, or Kandinsky",
    "time_cond_proj_dim": "a latent consistency model",
    "dual_cross_attention": "Versatile Diffusion",
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": vae.OF_FOLDER}  # the supported class of each part
TEXT_MODELS = ("clip_text_model", "clip")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def folder_parts(
    folder: Path, own_vae: Path | None, options: Options, dtype: torch.dtype, empty: bool = False
) -> tuple[Parts, int]:
    """Return (parts, version 1 or 2) of a diffusers folder.

    `own_vae` is the VAE that the user gave instead of the folder's, or None. Raises UserError where the folder is
    damaged, or is of another model.
    """
    try:
        if not has_vocabulary(folder / "tokenizer"):
            raise ValueError("tokenizer has no tokenizer.json and no vocab.json")
        refuse_other_tokenizers(read_json(folder / "tokenizer" / "tokenizer_config.json"))
        refuse_other_folders(folder, own_vae)
        settings = noise.of_folder(read_json(folder / "scheduler" / "scheduler_config.json"), options.prediction_type)
        parts = read_folder(folder, own_vae, dtype, empty)  # takes seconds
        with named("scheduler/scheduler_config.json"):
            parts["scheduler"] = noise.scheduler(settings)
    except Stop:
        raise
    except kinds.NotStableDiffusion as error:
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {error}; {kinds.PLAIN}, or {WITHOUT}") from None
    except Exception as error:  # noqa: BLE001 (damaged settings make the libraries raise errors of any class)
        hint = "get it again with git checkout mini_sd" if folder == MINI else f"get the folder again, or {WITHOUT}"
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {reason(error)}; {hint}") from None
    refuse_misfits(folder, parts)
    if settings.get("prediction_type") is None:
        predicts = "epsilon" if empty else noise.probe_prediction(parts)
        parts["scheduler"].register_to_config(prediction_type=predicts)
    return parts, 2 if parts["text_encoder"].config.hidden_act == "gelu" else 1  # gelu is OpenCLIP's, of 2.x


def refuse_other_tokenizers(settings: Mapping[str, Any]) -> None:
    """Raise NotStableDiffusion where the settings of a tokenizer state another class than CLIP's."""
    name = settings.get("tokenizer_class")
    if name is not None and name not in TOKENIZERS:
        raise kinds.NotStableDiffusion(f"its tokenizer is a {shown(name)}, and only CLIP's is supported")


def refuse_other_folders(folder: Path, own_vae: Path | None) -> None:
    """Refuse a folder that has the five parts, and is of another model or has weights of another kind.

    Raises NotStableDiffusion for another model, ValueError for quantised weights, and UserError for weights that are
    for other libraries only. The folder's VAE is not looked at where `own_vae` replaces it.
    """
    parts = ("unet", "text_encoder", "vae") if own_vae is None else ("unet", "text_encoder")
    for part in parts:
        refuse_other_formats(part, folder / part, folder)
    settings = {part: read_json(folder / part / "config.json") for part in parts}
    for part, of_part in settings.items():
        if "quantization_config" in of_part:
            raise ValueError(f"its {part} is quantised, which is not supported: use the folder's plain weights")
        name = of_part.get("_class_name", CLASSES.get(part))
        if name != CLASSES.get(part):
            raise kinds.NotStableDiffusion(f"its {part} is a {shown(name)}, and only {CLASSES.get(part)} is supported")
    if (folder / "text_encoder_2").is_dir():
        raise kinds.NotStableDiffusion("it is Stable Diffusion XL, which is not supported")
    model = settings["text_encoder"].get("model_type", TEXT_MODELS[0])
    if model not in TEXT_MODELS:
        raise kinds.NotStableDiffusion(f"its text encoder is a {shown(model)}, and only CLIP's is supported")
    unet, channels = settings["unet"], settings.get("vae", {}).get("latent_channels", 4)
    for name, what in ELSEWHERE.items():
        if unet.get(name) not in (None, False):
            raise kinds.NotStableDiffusion(f"by {name} of its UNet it is {what}, which is not supported")
    takes = unet.get("in_channels", 4)
    if takes != channels:
        usual = "an inpainting, depth or upscaling model"
        what = kinds.CHANNELS.get(takes, usual) if type(takes) is int else usual
        raise kinds.NotStableDiffusion(
            f"its UNet takes {shown(takes)} channels and its VAE has {shown(channels)}: {what}, which is not supported"
        )
    if "vae" in settings:
        vae.refuse_other_classes(settings["vae"])


def read_folder(folder: Path, own_vae: Path | None, dtype: torch.dtype, empty: bool) -> Parts:
    """Return the tokenizer and the networks of a folder; the VAE is read from `own_vae` where that is given."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # an error ends in one line of ours
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    with named("tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": from_folder(
            "text_encoder", CLIPTextModel, folder / "text_encoder", empty, dtype=dtype, ignore_mismatched_sizes=True
        ),  # the library then tells which shapes differ
        "unet": from_folder("unet", UNet2DConditionModel, folder / "unet", empty, torch_dtype=dtype),
    }
    if own_vae is None:
        return parts | {"vae": from_folder("vae", AutoencoderKL, folder / "vae", empty, torch_dtype=dtype)}
    return parts | {"vae": vae.read(own_vae, vae.scaling_of(folder / "vae"), dtype, empty)}
