"""The five parts of a Stable Diffusion, out of a diffusers folder or a single file, with LoRAs fused in. No network."""

import contextlib
import math
import re
import shutil
import tempfile
from pathlib import Path

from my.errors import UserError, first_line, note
from my.tensor_file import TensorFile
from sd import layout, lora, lora_files
from sd.find import MINI, WITHOUT, has_vocabulary, read_json, reason
from sd.tokenizer import END, clip_tokenizer

FIRST = 3  # of the missing and of the unexpected tensors that an error names
PROBE_SIZE = 32  # latent pixels
ECHO = 0.5  # correlation of output and input, above which a network predicts the noise
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # that `adapt.denoised` knows
NETWORKS = {"text_encoder": ("model", "pytorch_model"), "unet": ("diffusion_pytorch_model",) * 2,
            "vae": ("diffusion_pytorch_model",) * 2}  # part of a folder -> stems of its .safetensors and its .bin
UNUSED = re.compile(r"position_ids$|_projection\.|^vision_model\.|logit_scale$")  # of CLIP's other half
MAX_SIZE = 1024  # latent pixels, an 8192-pixel picture: beyond it, a setting is a mistake
MAX_SETTING = 1_000_000  # that a setting of a network may be, however few weights it has


def load_parts(path, sd, dtype, empty=False, variant=None):
    """Return {"tokenizer", "text_encoder", "unet", "vae", "scheduler"} of a folder or file, networks in `dtype`.

    `sd` are the options that choose prediction type, averaged weights and LoRAs. `empty` networks are on the
    meta device: all is compared, but weights are not read. `variant` is the one to insist on. Raises
    UserError for what cannot be read as Stable Diffusion.
    """
    parts = (folder_parts if path.is_dir() else file_parts)(path, sd, dtype, empty, variant)
    refuse_misfits(path, parts)
    settle_settings(path, parts["unet"], parts["vae"])
    for text in sd.lora:
        lora.fuse(parts, *lora_files.read(text))
    return parts


def refuse_misfits(path, parts):
    """Raise UserError for parts that are not of one another."""
    tokenizer, text, unet, vae = parts["tokenizer"], parts["text_encoder"].config, parts["unet"].config, parts["vae"]
    channels = vae.config.latent_channels
    if "model_max_length" not in tokenizer.init_kwargs:  # the library then takes it for endless
        tokenizer.model_max_length = text.max_position_embeddings
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


def settle_settings(path, unet, vae):
    """Give settings that are null Stable Diffusion's own; raises UserError for those that no picture can be made with.

    These are the ones that the shapes of no weights tell, so that loading takes them as they come.
    """
    size, scaling = unet.config.sample_size, vae.config.scaling_factor
    if size is None:
        unet.register_to_config(sample_size=layout.latent_size(vae.config.block_out_channels))
    elif type(size) is not int or not 0 < size <= MAX_SIZE:
        raise UserError(f"{path}: sample_size in unet/config.json is {size!r}, not one whole number from 1 to "
                        f"{MAX_SIZE} (pictures are square); correct it, or {WITHOUT}")
    if scaling is None:
        vae.register_to_config(scaling_factor=layout.SCALING)
    elif type(scaling) not in (int, float) or not 0 < scaling < math.inf:
        raise UserError(f"{path}: scaling_factor in vae/config.json is {scaling!r}, not a number above 0, such as "
                        f"{layout.SCALING}; correct it, or {WITHOUT}")


def refuse_other_variant(path, variant, v2):
    """Raise UserError where the checkpoint is not of the `variant`, or None, that was asked for beside it."""
    version = "mini" if path == MINI else "v2" if v2 else "v1"
    if variant not in (None, version):
        raise UserError(f"--sd.variant {variant}: {path}, given as --sd.checkpoint, is {version}; leave one of the two "
                        "out")


# ---------------------------------------------------------------- diffusers folders


def folder_parts(folder, sd, dtype, empty=False, variant=None):
    """Return the parts of a diffusers folder."""
    try:
        if not has_vocabulary(folder / "tokenizer"):
            raise ValueError("tokenizer has no tokenizer.json and no vocab.json")
        read_json(folder / "tokenizer" / "tokenizer_config.json")
        _refuse_other_folders(folder, sd)
        parts = _read_folder(folder, dtype, empty)  # takes seconds
    except UserError:
        raise
    except Exception as error:  # whatever damaged settings make of the libraries
        hint = "get it again with git checkout mini_sd" if folder == MINI else f"get the folder again, or {WITHOUT}"
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {reason(error)}; {hint}") from None
    refuse_other_variant(folder, variant, v2=parts["text_encoder"].config.hidden_act == "gelu")  # OpenCLIP's
    if sd.prediction_type != "auto":
        parts["scheduler"].register_to_config(prediction_type=sd.prediction_type)
    return parts


def _refuse_other_folders(folder, sd):
    """Raise ValueError for a folder of another model, or another kind of weights, which has the same five parts."""
    schedule = read_json(folder / "scheduler" / "scheduler_config.json", "beta_schedule")  # diffusers would guess one
    predicts = schedule.get("prediction_type", "epsilon")
    if predicts not in PREDICTIONS and sd.prediction_type == "auto":
        raise ValueError(f"its scheduler's prediction_type is {predicts!r}; known are {', '.join(PREDICTIONS)}")
    steps = schedule.get("num_train_timesteps", 1)
    if type(steps) is not int or not 0 < steps <= MAX_SETTING:
        raise ValueError(f"num_train_timesteps in scheduler/scheduler_config.json is {steps!r}, not 1 to {MAX_SETTING}")
    unet, vae, text = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    for part, settings in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        if "quantization_config" in settings:
            raise ValueError(f"its {part} is quantised, which is not supported: use the folder's plain weights")
    if (folder / "text_encoder_2").is_dir():
        raise ValueError("it is Stable Diffusion XL, which is not supported")
    takes, has = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if takes != has:
        raise ValueError(f"its UNet takes {takes} channels and its VAE has {has}: an inpainting, depth or upscaling "
                         "model, which is not supported")


def _read_folder(folder, dtype, empty):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said in a line
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    with _named("tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    with _named("scheduler/scheduler_config.json"):
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
    return {
        "tokenizer": tokenizer, "scheduler": scheduler,
        "text_encoder": _load_network(CLIPTextModel, folder / "text_encoder", empty, dtype=dtype,
                                      ignore_mismatched_sizes=True),  # it then tells which
        "unet": _load_network(UNet2DConditionModel, folder / "unet", empty, torch_dtype=dtype),
        "vae": _load_network(AutoencoderKL, folder / "vae", empty, torch_dtype=dtype),
    }


@contextlib.contextmanager
def _named(part):
    """Put the name of a part before whatever damaged files and settings make of the libraries."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{part}: {reason(error)}") from None


def _load_network(cls, folder, empty, **options):
    """Return the network in `folder`; raises ValueError for weights that are missing (they would be random) or over."""
    with _named(folder.name):
        stem, variant, files = weight_files(folder)
        refuse_quantised(files)
        refuse_endless(read_json(folder / "config.json"), files)
        with _without_pickles(folder, files, ".".join(filter(None, (stem, variant, "safetensors")))) as safe:
            net, info = cls.from_pretrained(safe, local_files_only=True, output_loading_info=True, variant=variant,
                                            use_safetensors=True, device_map="meta" if empty else None, **options)
        for name, there, expected in sorted(info["mismatched_keys"]):
            raise ValueError(f"{name} is {tuple(there)} in the weights, and {tuple(expected)} by config.json")
    for what, keys in (("lacks", "missing_keys"), ("has no place for", "unexpected_keys")):
        names = sorted(name for name in info[keys] if not UNUSED.search(name))
        if names:
            raise ValueError(f"{folder.name} {what} {len(names)} of its weights, {names[0]} first")
    return net


def weight_files(folder):
    """Return (stem, variant or None, TensorFiles) of the weights of a folder's network, several files of one included.

    Plain .safetensors come before plain .bin, and these before a variant such as fp16. Raises ValueError for none.
    """
    stems = dict(zip((".safetensors", ".bin"), NETWORKS[folder.name]))
    found = {}  # (whether it is a variant, whether it is a pickle, variant) -> paths
    for path in sorted(folder.iterdir()):
        stem = stems.get(path.suffix)
        m = stem and re.fullmatch(rf"{stem}(?:\.(\w+?))?(?:-\d+-of-\d+)?", path.stem)
        if m:
            found.setdefault((m[1] is not None, path.suffix == ".bin", m[1]), []).append(path)
    if not found:
        raise ValueError(f"no {stems['.safetensors']}.safetensors and no {stems['.bin']}.bin; get the folder again")
    first = min(found, key=lambda key: (key[0], key[1], key[2] or ""))
    return stems[".safetensors"], first[2], [TensorFile(path) for path in found[first]]


def refuse_quantised(files):
    """Raise ValueError for weights that are whole numbers: what they stand for is told in no plain checkpoint."""
    names = [name for file in files for name in file.quantised(file.shapes) if not UNUSED.search(name)]
    if names:
        raise ValueError(f"quantised, which is not supported: {names[0]}, ...: use plain weights")


def refuse_endless(settings, files):
    """Raise ValueError for settings of a network beyond what its weights can be of: building it would not end."""
    tensors = sum(len(file.shapes) for file in files)
    most = max(MAX_SETTING, sum(math.prod(shape) for file in files for shape in file.shapes.values()))
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        limit = tensors if "layers" in name else most
        if len(values) > tensors or any(type(n) in (int, float) and not n <= limit for n in values):
            raise ValueError(f"{name}, {str(value)[:40]}, is beyond what weights of {tensors} tensors can be of")


@contextlib.contextmanager
def _without_pickles(folder, files, name):
    """Yield `folder`, or, where its weights are in a .bin file (a pickle), a temporary one with them made safe."""
    from safetensors.torch import save_file

    if files[0].path.suffix != ".bin":
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / "config.json", scratch)
        save_file({key: file.tensor(key).contiguous().clone() for file in files for key in file.shapes},
                  Path(scratch) / name, metadata={"format": "pt"})
        yield Path(scratch)


# ---------------------------------------------------------------- single files


def file_parts(path, sd, dtype, empty=False, variant=None):
    """Return the parts of a single file in the CompVis layout."""
    from diffusers import DDIMScheduler

    file = TensorFile(path)
    v2, prediction = layout.is_v2(file.shapes), stated_prediction(file, sd)
    nets, sources = empty_networks(file)
    refuse_other_variant(path, variant, v2)
    if sd.ema:
        sources["unet"] = averaged(file, sources["unet"])
    if not empty:
        fill(nets, sources, file, dtype)
    scheduler = DDIMScheduler(**layout.SCHEDULE, prediction_type=prediction or "epsilon")
    parts = {"tokenizer": clip_tokenizer("!" if v2 else END), **nets, "scheduler": scheduler}
    if empty:
        return parts
    if prediction is None:
        prediction = probe_prediction(parts)
        scheduler.register_to_config(prediction_type=prediction)
    if v2 and prediction == "v_prediction":  # the 768-pixel model
        nets["unet"].register_to_config(sample_size=layout.latent_size(nets["vae"].config.block_out_channels, 768))
    others = sum(not name.startswith((layout.UNET, layout.VAE, layout.TEXT)) for name in file.shapes)
    note(f"{path.name} is Stable Diffusion {'2' if v2 else '1'}.x, {prediction.replace('_', '-')}"
         f"{f'; {others} tensors of its training are not used' if others else ''}"
         f"{'; its averaged weights (--sd.ema True) are' * sd.ema}")
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
        raise UserError(f"{file.path}: cannot be read as Stable Diffusion: {first_line(error)}; {WITHOUT}") from None
    v2 = layout.is_v2(file.shapes)
    sources = {part: layout.sources(part, net.state_dict(), configs[part], v2) for part, net in nets.items()}
    expected = {sources[part][name]: tuple(there.shape)
                for part, net in nets.items() for name, there in net.state_dict().items()}
    for what, found in zip(("lacks", "has no place for"), layout.mismatches(file.shapes, expected, v2)):
        if found:
            first = ", ".join(found[:FIRST]) + ", ..." * (len(found) > FIRST)
            raise UserError(f"{file.path}: not a whole Stable Diffusion {'2' if v2 else '1'}.x: {what} {len(found)} "
                            f"tensors: {first}; get the file again, or {WITHOUT}")
    quantised = file.quantised({source.name for source in expected})
    if quantised:
        raise UserError(f"{file.path}: quantised, which is not supported: {min(quantised)}, ...; use plain weights, or "
                        f"{WITHOUT}")
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
