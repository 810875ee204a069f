"""The five parts of a Stable Diffusion, read from a single file in the CompVis layout.

`from_single_file` of diffusers (version 0.42.1) does not serve here, as four trials showed: offline it finds no
configuration of the model; it drops a tensor that has no place without a message; where a tensor is missing, it ends in
an error about meta tensors; and it cannot load a .ckpt of Lightning whose pickle has an object besides the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from families.family import WITHOUT
from families.sd import kinds, layout, names, noise, stated, vae, yaml_beside
from families.sd.layout import Config, Shapes, Source
from families.sd.networks import Net, Parts, Published, fill, refuse_misfits, refuse_mismatches
from families.sd.tokenizer import END, LENGTH, clip_tokenizer
from families.sd.wording import several, verb
from families.sd.yaml_beside import Statement
from my.errors import UserError, first_line, note, shown
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

    from families.sd.options import Options

Facts = dict[str, Statement]  # {fact: who states it, and its value}
SCALE = "scale_factor"  # a tensor that some files have: the scale of latents that training found (scale_by_std)
SCALE_RTOL = 1e-3  # half precision rounds the scale by this much
HIGH_RES = 768  # pixels of the pictures of 2.x with v-prediction


def file_parts(
    path: Path, own_vae: Path | None, options: Options, dtype: torch.dtype, empty: bool = False
) -> tuple[Parts, int]:
    """Return (parts, version 1 or 2) of a single file.

    `own_vae` is the VAE that the user gave instead of the file's, or None. Raises UserError where the file is
    something else, or is not complete.
    """
    opened = TensorFile(path)
    file = Published(opened, names.published(opened.shapes))
    nets, sources, facts = empty_networks(file, opened.metadata, options, own_vae is not None)
    version = 2 if layout.is_v2(file.shapes) else 1
    if options.ema:
        sources["unet"] = averaged(file, sources["unet"])
    if not empty:
        fill(nets, sources, file, dtype)
    skip_layers(path, nets["text_encoder"], facts, version)
    note_other_version(path, facts, version)
    scaling = scale_of_latents(path, file, facts)
    if own_vae is not None:
        nets["vae"] = vae.read(own_vae, scaling, dtype, empty)
    nets["vae"].register_to_config(scaling_factor=scaling)
    scheduler = noise.scheduler(noise.of_file(path, file, facts))
    length = max(LENGTH, nets["text_encoder"].config.max_position_embeddings)
    tokenizer = clip_tokenizer("!" if version == 2 else END, length)
    parts = {"tokenizer": tokenizer, **nets, "scheduler": scheduler}
    refuse_misfits(path, parts)
    prediction, where = predicts(parts, facts, empty)
    scheduler.register_to_config(prediction_type=prediction)
    usual = HIGH_RES if version == 2 and prediction == "v_prediction" else layout.PIXELS
    pixels = facts["pixels"].value if "pixels" in facts else usual
    nets["unet"].register_to_config(sample_size=layout.latent_size(nets["vae"].config.block_out_channels, pixels))
    if not empty:
        tell(file, version, prediction, where, facts, options)
    return parts, version


def note_other_version(path: Path, facts: Facts, version: int) -> None:
    """Note in one line that a file states another version than its weights have."""
    called = facts.get("version")
    if called and called.value != version:
        note(
            f"{path.name} is of version {shown(called.value)} by {called.where}, and of {version} by its weights, "
            "which count; if the results are wrong, get another copy of it"
        )


def scale_of_latents(path: Path, file: Published, facts: Facts) -> float:
    """Return the scale of a file's latents: that of its tensor, else that of the .yaml, else Stable Diffusion's.

    Raises UserError in three cases: tensor and .yaml differ, unless the .yaml says that training finds the scale
    (scale_by_std); the .yaml says so, and there is no tensor; the tensor is not one positive number.
    """
    found, by_std = facts.get("scaling_factor"), facts.get("scale_by_std")
    stated_scale = layout.SCALING if found is None else found.value
    if SCALE not in file.shapes:
        if by_std is not None and (found is None or found.value == 1):
            raise UserError(
                f"{path}: {by_std.where} says scale_by_std: True, and the file lacks the tensor {SCALE}, "
                "which then holds the scale of its latents; write that as scale_factor into the .yaml"
            )
        return stated_scale
    scale = only_number(path, file)
    if math.isclose(scale, stated_scale, rel_tol=SCALE_RTOL):
        return stated_scale
    if found is not None and by_std is None:
        raise UserError(
            f"{path}: the scale of its latents is {scale:g} by its tensor {SCALE}, and {found.value:g} by "
            f"{found.where}; move the .yaml away to use the tensor, or get the file again"
        )
    if not math.isclose(scale, layout.SCALING, rel_tol=SCALE_RTOL):
        note(
            f"{path.name}: the scale of its latents is {scale:g} by its tensor {SCALE}, not {layout.SCALING}; it is "
            "used"
        )
    return scale


def only_number(path: Path, file: Published) -> float:
    """Return the number in the tensor of the scale; raises UserError where it is not one number above 0."""
    shape = tuple(file.shapes[SCALE])
    if shape in ((), (1,)):
        scale = float(file.tensor(SCALE))
        if 0 < scale < yaml_beside.MAX_SCALING:
            return scale
    raise UserError(
        f"{path}: its tensor {SCALE} {shown(list(shape))} is not one number above 0 and below "
        f"{yaml_beside.MAX_SCALING:g}, as the scale of latents is; it is damaged: get the file again"
    )


def predicts(parts: Parts, facts: Facts, empty: bool) -> tuple[str, str]:
    """Return (what the UNet predicts, where that is stated).

    Where it is stated nowhere, `noise.probe_prediction` tells. An `empty` UNet is taken for one that predicts epsilon.
    """
    if "prediction_type" in facts:
        return facts["prediction_type"].value, facts["prediction_type"].where
    return ("epsilon", "") if empty else (noise.probe_prediction(parts), "asked with pure noise, as nothing states it")


def tell(file: Published, version: int, prediction: str, where: str, facts: Facts, options: Options) -> None:
    """Note in one line what a file is, what states that, and how much of the file is not used."""
    table, used = noise.table_name(file.shapes), (layout.UNET, layout.VAE, layout.TEXT)
    others = sum(not name.startswith(used) and name not in (*stated.MARKERS, table, SCALE) for name in file.shapes)
    unused = f"{several(others, 'tensor')} of its training {verb(others, 'is', 'are')}"
    note(
        f"{file.path.name} is Stable Diffusion {version}.x, {prediction.replace('_', '-')} ({where})"
        f"{', zero terminal SNR' * ('zero_snr' in facts)}"
        f"{f'; {unused} not used' if others else ''}"
        f"{'; its averaged weights are used (--sd.ema True)' * options.ema}"
    )


def empty_networks(
    file: Published, metadata: Mapping[str, str], options: Options, vae_given: bool
) -> tuple[dict[str, Net], dict[str, dict[str, Source]], Facts]:
    """Return ({part: network on the meta device}, {part: {parameter: Source}}, facts) of a Published file.

    The file's own VAE is left out where another is given. Raises UserError where the file is of another model, lacks
    tensors, or has tensors that have no place.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes = file.shapes
    classes: dict[str, Callable[..., Net]] = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": lambda **config: CLIPTextModel(CLIPTextConfig(**config)),
    }
    try:
        kinds.refuse_others(shapes, vae_given)
        facts = stated.read(file.path, metadata, shapes, options)
        configs = layout.configurations(shapes)
        if vae_given:
            configs.pop("vae", None)
        settle(file.path, shapes, configs, facts)
        with init_empty_weights(include_buffers=False):
            nets = {part: classes[part](**config) for part, config in configs.items()}
    except kinds.NotStableDiffusion as error:
        raise UserError(f"{file.path}: cannot be read as Stable Diffusion: {error}; or {WITHOUT}") from None
    except ValueError as error:
        raise UserError(f"{file.path}: cannot be read as Stable Diffusion: {first_line(error)}; {WITHOUT}") from None
    sources = {
        part: layout.sources(part, net.state_dict(), configs[part], layout.is_open_clip(shapes))
        for part, net in nets.items()
    }
    refuse_mismatches(file, nets, sources, f"Stable Diffusion {2 if layout.is_v2(shapes) else 1}.x")
    return nets, sources, facts


def settle(path: Path, shapes: Shapes, configs: dict[str, Config], facts: Facts) -> None:
    """Put the heads of attention, which no shape tells, into the configurations.

    Raises UserError where the facts contradict the shapes, and where the heads cannot be known.
    """
    for part, config in configs.items():
        sizes = facts.get(f"{part} sizes")
        if sizes:
            yaml_beside.refuse_other_sizes(sizes.where, sizes.value, config)
    channels = configs["unet"]["block_out_channels"]
    for fact in ("heads", "head_channels"):  # where both are stated, the second counts
        if fact in facts:
            n = facts[fact].value
            if any(c % n for c in channels):
                raise UserError(
                    f"{facts[fact].where}, beside the checkpoint: {n} {fact} do not divide {channels}, the "
                    "channels of its UNet; correct it, or move it away"
                )
            configs["unet"]["attention_head_dim"] = n if fact == "heads" else [c // n for c in channels]
    n = layout.V2_HEAD_CHANNELS
    if layout.is_v2(shapes) and not {"heads", "head_channels"} & set(facts) and any(c % n for c in channels):
        raise UserError(
            f"{path}: nothing tells the heads of its attention, for the {n} channels of each in 2.x do not "
            f"divide {channels}, those of its UNet; state num_heads or num_head_channels in a .yaml beside "
            "it (model: params: unet_config: params:)"
        )


def averaged(file: Published, sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources of a UNet's running averages (EMA); raises UserError where the file lacks one of them."""
    ema = {name: layout.Source(layout.ema_name(source.name)) for name, source in sources.items()}
    missing = [source.name for source in ema.values() if source.name not in file.shapes]
    if missing:
        raise UserError(
            f"--sd.ema True: {file.path} lacks {several(len(missing), 'averaged weight')}, {missing[0]} first; leave "
            "the option out"
        )
    return ema


def skip_layers(path: Path, text_encoder: Net, facts: Facts, version: int) -> None:
    """Make the last layers of a text encoder return their input, where the file's metadata ask for it ("clip skip").

    The metadata state the layer that is read, counted from the last, which is 1. In version 2 the last block is never
    loaded, so that layers 1 and 2 both mean no further skip. The final norm stays in place, as in
    kohya's trainer, which writes this fact. Raises UserError where no layer would be left.
    """
    skipped = max(0, facts["layer"].value - version) if "layer" in facts else 0
    layers = text_encoder.encoder.layers
    if skipped >= len(layers):
        raise UserError(
            f"{path}: its metadata ask for layer {facts['layer'].value} of the text encoder, counted from "
            f"the last; of version {version} it may be 1 to {len(layers) + version - 1}; get "
            "another copy of the file"
        )
    for layer in layers[len(layers) - skipped :]:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    if skipped:
        note(
            f"{path.name}: {several(skipped, 'layer')} at the end of the text encoder "
            f"{verb(skipped, 'is', 'are')} left out, as its metadata ask for (clip skip)"
        )
