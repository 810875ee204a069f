"""The parts of a Stable Diffusion out of a diffusers folder: what its settings state, and its networks."""

from families.family import WITHOUT
from families.libraries import reason
from families.sd import kinds, noise, vae
from families.sd.find import MINI, has_vocabulary, read_json
from families.sd.networks import from_folder, named, refuse_misfits, refuse_other_formats
from my.errors import Stop, UserError, shown

ELSEWHERE = {  # settings of a UNet that is told more than a prompt -> what it then is
    "class_embed_type": "unCLIP, or another that is told classes",
    "num_class_embeds": "one that is told classes",
    "addition_embed_type": "Stable Diffusion XL, or Kandinsky",
    "encoder_hid_dim": "DeepFloyd IF, or Kandinsky",
    "encoder_hid_dim_type": "DeepFloyd IF, or Kandinsky",
    "time_cond_proj_dim": "a latent consistency model",
    "dual_cross_attention": "Versatile Diffusion",
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": vae.OF_FOLDER}  # that are supported
TEXT_MODELS = ("clip_text_model", "clip")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def folder_parts(folder, sd, dtype, empty=False):
    """Return (parts, version) of a diffusers folder, version 1 or 2; UserError where it is none, or damaged."""
    try:
        if not has_vocabulary(folder / "tokenizer"):
            raise ValueError("tokenizer has no tokenizer.json and no vocab.json")
        refuse_other_tokenizers(read_json(folder / "tokenizer" / "tokenizer_config.json"))
        refuse_other_folders(folder, sd)
        settings = noise.of_folder(read_json(folder / "scheduler" / "scheduler_config.json"), sd)
        parts = read_folder(folder, sd, dtype, empty)  # takes seconds
        with named("scheduler/scheduler_config.json"):
            parts["scheduler"] = noise.scheduler(settings)
    except Stop:
        raise
    except kinds.NotStableDiffusion as error:
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {error}; {kinds.PLAIN}, or {WITHOUT}") from None
    except Exception as error:  # whatever damaged settings make of the libraries
        hint = "get it again with git checkout mini_sd" if folder == MINI else f"get the folder again, or {WITHOUT}"
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {reason(error)}; {hint}") from None
    refuse_misfits(folder, parts)
    if settings.get("prediction_type") is None:
        predicts = "epsilon" if empty else noise.probe_prediction(parts)
        parts["scheduler"].register_to_config(prediction_type=predicts)
    return parts, 2 if parts["text_encoder"].config.hidden_act == "gelu" else 1  # OpenCLIP's


def refuse_other_tokenizers(settings):
    """Raise NotStableDiffusion for the settings of a tokenizer that is not CLIP's."""
    name = settings.get("tokenizer_class")
    if name is not None and name not in TOKENIZERS:
        raise kinds.NotStableDiffusion(f"its tokenizer is a {shown(name)}, and only CLIP's is supported")


def refuse_other_folders(folder, sd):
    """Raise ValueError for a folder of another model, or another kind of weights, which has the same five parts."""
    parts = ("unet", "text_encoder") if sd.vae is not None else ("unet", "text_encoder", "vae")
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
        what = kinds.CHANNELS.get(takes if type(takes) is int else None, "an inpainting, depth or upscaling model")
        raise kinds.NotStableDiffusion(
            f"its UNet takes {shown(takes)} channels and its VAE has {shown(channels)}: {what}, which is not supported"
        )
    if "vae" in settings:
        vae.refuse_other_classes(settings["vae"])


def read_folder(folder, sd, dtype, empty):
    """Return tokenizer and networks of a folder, but for a VAE that an --sd.vae takes the place of."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in a line
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    with named("tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": from_folder(
            "text_encoder", CLIPTextModel, folder / "text_encoder", empty, dtype=dtype, ignore_mismatched_sizes=True
        ),  # it then tells which
        "unet": from_folder("unet", UNet2DConditionModel, folder / "unet", empty, torch_dtype=dtype),
    }
    if sd.vae is None:
        return parts | {"vae": from_folder("vae", AutoencoderKL, folder / "vae", empty, torch_dtype=dtype)}
    return parts | {"vae": vae.read(sd.vae, vae.scaling_of(folder / "vae"), dtype, empty)}
