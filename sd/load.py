"""The five parts of a Stable Diffusion, out of a diffusers folder or a single file, with LoRAs fused in. No network."""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from my.errors import UserError
from my.tensor_file import TensorFile
from sd import layout
from sd.find import MINI, WITHOUT, has_vocabulary, read_json, read_lora
from sd.tokenizer import END, clip_tokenizer

FIRST = 3  # of the missing and of the unexpected tensors that an error names
PROBE_SIZE = 32  # latent pixels
ECHO = 0.5  # correlation of output and input, above which a network predicts the noise


def load_parts(path, sd, dtype):
    """Return {"tokenizer", "text_encoder", "unet", "vae", "scheduler"} of a folder or file, networks in `dtype`.

    `sd` are the options that choose prediction type, averaged weights and LoRAs. Raises UserError for
    what cannot be read as Stable Diffusion, and for words of the prompt that the model cannot know.
    """
    parts = folder_parts(path, sd, dtype) if path.is_dir() else file_parts(path, sd, dtype)
    refuse_misfits(path, parts)
    for lora in sd.lora:
        fuse_lora(parts, *read_lora(lora))
    return parts


def refuse_misfits(path, parts):
    """Raise UserError for parts that are not of one another."""
    tokenizer, text, unet, vae = parts["tokenizer"], parts["text_encoder"].config, parts["unet"].config, parts["vae"]
    channels = vae.config.latent_channels
    for what, here, there in (
            ("the text encoder's width and the UNet's context", text.hidden_size, unet.cross_attention_dim),
            ("the channels that the UNet takes and the VAE's", unet.in_channels, channels),
            ("the channels that the UNet gives and the VAE's", unet.out_channels, channels),
            ("the tokens that the tokenizer gives and the text encoder takes",
             min(tokenizer.model_max_length, text.max_position_embeddings), tokenizer.model_max_length),
            ("the words of the tokenizer and of the text encoder", max(len(tokenizer), text.vocab_size),
             text.vocab_size)):
        if here != there:
            raise UserError(f"{path}: its parts are not of one model: {what} differ, {here} and {there}; {WITHOUT}")


# ---------------------------------------------------------------- diffusers folders


def folder_parts(folder, sd, dtype):
    """Return the parts of a diffusers folder."""
    try:
        if not has_vocabulary(folder / "tokenizer"):
            raise ValueError("tokenizer has no tokenizer.json and no vocab.json")
        read_json(folder / "scheduler" / "scheduler_config.json", "beta_schedule")  # diffusers would guess one
        read_json(folder / "tokenizer" / "tokenizer_config.json")
        _refuse_other_folders(folder)
        parts = _read_folder(folder, dtype)  # takes seconds
    except UserError:
        raise
    except Exception as error:  # whatever damaged settings make of the libraries
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        hint = "get it again with git checkout mini_sd" if folder == MINI else WITHOUT
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {why}; {hint}") from None
    if sd.prediction_type != "auto":
        parts["scheduler"].register_to_config(prediction_type=sd.prediction_type)
    return parts


def _refuse_other_folders(folder):
    """Raise ValueError for a folder of another model, which has the same five parts."""
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    if (folder / "text_encoder_2").is_dir():
        raise ValueError("it is Stable Diffusion XL, which is not supported")
    takes, has = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if takes != has:
        raise ValueError(f"its UNet takes {takes} channels and its VAE has {has}: an inpainting, depth or upscaling "
                         "model, which is not supported")


def _read_folder(folder, dtype):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in a line
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        "text_encoder": _load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        "unet": _load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        "vae": _load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
    }


def _load_network(cls, folder, **dtype):
    """Return the network in `folder`; raises ValueError where weights are missing (they would be random)."""
    with _without_pickles(folder) as safe:
        net, info = cls.from_pretrained(safe, local_files_only=True, output_loading_info=True, use_safetensors=True,
                                        **dtype)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder.name} lacks {len(missing)} of its weights, {missing[0]} first")
    return net


@contextlib.contextmanager
def _without_pickles(folder):
    """Yield `folder`, or, where its weights are in a .bin file only (a pickle), a temporary one with them made safe."""
    from safetensors.torch import save_file

    pickles = {"pytorch_model.bin": "model.safetensors",
               "diffusion_pytorch_model.bin": "diffusion_pytorch_model.safetensors"}
    there = [name for name in pickles if (folder / name).is_file()]
    if not there or (folder / pickles[there[0]]).exists():
        yield folder
        return
    file = TensorFile(folder / there[0])
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / "config.json", scratch)
        save_file({name: file.tensor(name).contiguous() for name in file.shapes},
                  Path(scratch) / pickles[there[0]], metadata={"format": "pt"})
        yield Path(scratch)


# ---------------------------------------------------------------- single files


def file_parts(path, sd, dtype):
    """Return the parts of a single file in the CompVis layout."""
    from diffusers import DDIMScheduler

    file = TensorFile(path)
    v2, prediction = layout.is_v2(file.shapes), stated_prediction(file, sd)
    nets, sources = empty_networks(file)
    if sd.ema:
        sources["unet"] = averaged(file, sources["unet"])
    fill(nets, sources, file, dtype)
    scheduler = DDIMScheduler(**layout.SCHEDULE, prediction_type=prediction or "epsilon")
    parts = {"tokenizer": clip_tokenizer("!" if v2 else END), **nets, "scheduler": scheduler}
    if prediction is None:
        prediction = probe_prediction(parts)
        scheduler.register_to_config(prediction_type=prediction)
    if v2 and prediction == "v_prediction":  # the 768-pixel model
        nets["unet"].register_to_config(sample_size=768 // 2 ** (len(nets["vae"].config.block_out_channels) - 1))
    others = sum(not name.startswith((layout.UNET, layout.VAE, layout.TEXT)) for name in file.shapes)
    print(f"note: {path.name} is Stable Diffusion {'2' if v2 else '1'}.x, {prediction.replace('_', '-')}"
          f"{f'; {others} tensors of its training are not used' if others else ''}"
          f"{'; its averaged weights (--sd.ema True) are' * sd.ema}", file=sys.stderr)
    return parts


def empty_networks(file):
    """Return ({part: network without memory}, {part: {parameter: Source}}) of a TensorFile.

    Raises UserError where the file is of something else, or lacks tensors, or has some without a place.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        configs = layout.configurations(file.shapes)
        with init_empty_weights(include_buffers=False):
            nets = {"text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
                    "unet": UNet2DConditionModel(**configs["unet"]), "vae": AutoencoderKL(**configs["vae"])}
    except ValueError as error:
        why = (str(error).splitlines() or ["its shapes fit no network"])[0]
        raise UserError(f"{file.path}: cannot be read as Stable Diffusion: {why}; {WITHOUT}") from None
    v2 = layout.is_v2(file.shapes)
    sources = {part: layout.sources(part, net.state_dict(), configs[part], v2) for part, net in nets.items()}
    expected = {sources[part][name]: tuple(there.shape)
                for part, net in nets.items() for name, there in net.state_dict().items()}
    for what, found in zip(("lacks", "has no place for"), layout.mismatches(file.shapes, expected, v2)):
        if found:
            first = ", ".join(found[:FIRST]) + ", ..." * (len(found) > FIRST)
            raise UserError(f"{file.path}: not a whole Stable Diffusion {'2' if v2 else '1'}.x: {what} {len(found)} "
                            f"tensors: {first}; get the file again, or {WITHOUT}")
    return nets, sources


def averaged(file, sources):
    """Return the sources of the running averages (EMA) of a UNet; UserError where the file does not have them all."""
    ema = {name: layout.Source(layout.ema_name(source.name)) for name, source in sources.items()}
    missing = [source.name for source in ema.values() if source.name not in file.shapes]
    if missing:
        raise UserError(f"--sd.ema True: {file.path} lacks {len(missing)} averaged weights, {missing[0]} first; leave "
                        "the option out")
    return ema


def fill(nets, sources, file, dtype):
    """Give the networks their parameters out of a TensorFile, one at a time, in `dtype`."""
    from tqdm import tqdm

    with tqdm(total=sum(map(len, sources.values())), desc="loading", unit="tensor", leave=False) as bar:
        for part, net in nets.items():
            tensors = {}
            for name, there in net.state_dict().items():
                source = sources[part][name]
                tensor = file.tensor(source.name)
                tensor = tensor if source.third is None else tensor.chunk(3)[source.third]
                tensors[name] = tensor.reshape(there.shape).to(dtype, copy=True)
                bar.update()
            net.load_state_dict(tensors, assign=True)


def stated_prediction(file, sd):
    """Return "epsilon" or "v_prediction" where options, metadata or version tell, else None."""
    if sd.prediction_type != "auto":
        return sd.prediction_type
    stated = file.metadata.get("modelspec.prediction_type", "")  # of the modelspec convention for .safetensors
    if stated.lower() in ("v", "epsilon"):
        return "v_prediction" if stated.lower() == "v" else "epsilon"
    if "v_pred" in file.shapes:  # an empty tensor by which trainers mark v-prediction
        return "v_prediction"
    if sd.variant == "v2" and (sd.checkpoint is None or sd.v2_highres):
        return "v_prediction" if sd.v2_highres else "epsilon"
    return None if layout.is_v2(file.shapes) else "epsilon"


def probe_prediction(parts):
    """Return "epsilon" or "v_prediction" from what the UNet answers to pure noise at the last step.

    There x_t is nearly the noise n itself: a network that predicts n gives its input back, while
    v = sqrt(abar) n - sqrt(1 - abar) x0 (arXiv 2202.00512, appendix D) hardly depends on it.
    """
    import torch

    tokenizer, text_encoder, unet = (parts[name] for name in ("tokenizer", "text_encoder", "unet"))
    n = torch.randn(1, unet.config.in_channels, PROBE_SIZE, PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        length = tokenizer.model_max_length
        ids = tokenizer([""], padding="max_length", max_length=length, return_tensors="pt").input_ids
        cond = text_encoder(ids).last_hidden_state
        out = unet(n.to(unet.dtype), len(parts["scheduler"].betas) - 1, cond.to(unet.dtype)).sample.float()
    echo = torch.corrcoef(torch.stack([n.flatten(), out.flatten()]))[0, 1]
    return "epsilon" if echo > ECHO else "v_prediction"


# ---------------------------------------------------------------- LoRA


def fuse_lora(parts, path, weight):
    """Add `weight` times a LoRA to the UNet and the text encoder, once and for all (arXiv 2106.09685).

    Raises UserError for a file that is no LoRA, or none for this model.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # that a LoRA is of one network only, for instance
    file = TensorFile(path)
    if not any("lora" in name.lower() for name in file.shapes):
        first = ", ".join(list(file.shapes)[:FIRST])
        raise UserError(f"--sd.lora {path}: no LoRA: its tensors begin with {first}; give a whole checkpoint as "
                        "--sd.checkpoint")
    pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    try:
        pipe.load_lora_weights({name: file.tensor(name).float() for name in file.shapes}, adapter_name="lora")
        if not pipe.get_list_adapters():
            raise ValueError("none of its layers is in this model")
        pipe.fuse_lora(lora_scale=weight)
    except (ValueError, KeyError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"--sd.lora {path}: does not fit this checkpoint: {why}; use one made for its version") \
            from None
    pipe.unload_lora_weights()
