"""The parts of a Stable Diffusion out of a single file in the CompVis layout."""

import math

from families.family import WITHOUT
from families.sd import kinds, layout, names, noise, stated, vae, yaml_beside
from families.sd.networks import Published, fill, refuse_misfits, refuse_mismatches
from families.sd.tokenizer import END, LENGTH, clip_tokenizer
from my.errors import UserError, first_line, note, shown
from my.tensor_file import TensorFile

SCALE = "scale_factor"  # a tensor: the scale of latents that was found in training (scale_by_std)
SCALE_RTOL = 1e-3  # by which half precision rounds it
HIGH_RES = 768  # pixels of the pictures of 2.x with v-prediction


def file_parts(path, sd, dtype, empty=False):
    """Return (parts, version) of a single file, version 1 or 2; UserError where it is something else, or not whole."""
    opened = TensorFile(path)
    file = Published(opened, names.published(opened.shapes))
    nets, sources, facts = empty_networks(file, opened.metadata, sd)
    version = 2 if layout.is_v2(file.shapes) else 1
    if sd.ema:
        sources["unet"] = averaged(file, sources["unet"])
    if not empty:
        fill(nets, sources, file, dtype)
    skip_layers(path, nets["text_encoder"], facts, version)
    called = facts.get("version")
    if called and called.value != version:
        note(
            f"{path.name} is of version {shown(called.value)} by {called.where}, and of {version} by its weights, "
            "which count; if the results are wrong, get another copy of it"
        )
    scaling = scale_of_latents(path, file, facts)
    if sd.vae is not None:
        nets["vae"] = vae.read(sd.vae, scaling, dtype, empty)
    nets["vae"].register_to_config(scaling_factor=scaling)
    scheduler = noise.scheduler(noise.of_file(path, file, facts))
    length = max(LENGTH, nets["text_encoder"].config.max_position_embeddings)
    tokenizer = clip_tokenizer("!" if version == 2 else END, length)
    parts = {"tokenizer": tokenizer, **nets, "scheduler": scheduler}
    refuse_misfits(path, parts)
    prediction, where = predicts(parts, facts, empty)
    scheduler.register_to_config(prediction_type=prediction)
    pixels = (
        facts["pixels"].value
        if "pixels" in facts
        else (HIGH_RES if version == 2 and prediction == "v_prediction" else layout.PIXELS)
    )
    nets["unet"].register_to_config(sample_size=layout.latent_size(nets["vae"].config.block_out_channels, pixels))
    if not empty:
        tell(file, version, prediction, where, facts, sd)
    return parts, version


def scale_of_latents(path, file, facts):
    """Return the scale of a file's latents: of its tensor, else of the .yaml, else Stable Diffusion's.

    Raises UserError where the two differ, unless the .yaml leaves it to the tensor, and where the tensor is no scale.
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


def only_number(path, file):
    """Return the number in the tensor of the scale; raises UserError where it is none that latents can have."""
    shape = tuple(file.shapes[SCALE])
    if shape in ((), (1,)):
        scale = float(file.tensor(SCALE))
        if 0 < scale < yaml_beside.MAX_SCALING:
            return scale
    raise UserError(
        f"{path}: its tensor {SCALE} {shown(list(shape))} is not one number above 0 and below "
        f"{yaml_beside.MAX_SCALING:g}, as the scale of latents is; it is damaged: get the file again"
    )


def predicts(parts, facts, empty):
    """Return (what the UNet predicts, where that is stated); where nothing states it, the UNet is asked."""
    if "prediction_type" in facts:
        return facts["prediction_type"].value, facts["prediction_type"].where
    return ("epsilon", "") if empty else (noise.probe_prediction(parts), "asked with pure noise, as nothing states it")


def tell(file, version, prediction, where, facts, sd):
    """Note in one line what a file is, by what, and what of it is not used."""
    table, used = noise.table_name(file.shapes), (layout.UNET, layout.VAE, layout.TEXT)
    others = sum(not name.startswith(used) and name not in (*stated.MARKERS, table, SCALE) for name in file.shapes)
    note(
        f"{file.path.name} is Stable Diffusion {version}.x, {prediction.replace('_', '-')} ({where})"
        f"{', zero terminal SNR' * ('zero_snr' in facts)}"
        f"{f'; {others} tensors of its training are not used' if others else ''}"
        f"{'; its averaged weights (--sd.ema True) are' * sd.ema}"
    )


def empty_networks(file, metadata, sd):
    """Return ({part: network without memory}, {part: {parameter: Source}}, facts) of a Published file.

    Raises UserError where the file is of something else, or lacks tensors, or has some without a place.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    shapes, classes = (
        file.shapes,
        {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": lambda **c: CLIPTextModel(CLIPTextConfig(**c)),
        },
    )
    try:
        kinds.refuse_others(shapes, vae_given=sd.vae is not None)
        facts = stated.read(file.path, metadata, shapes, sd)
        configs = layout.configurations(shapes)
        if sd.vae is not None:
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


def settle(path, shapes, configs, facts):
    """Put into the configurations what no shapes tell; raises UserError for what contradicts the shapes."""
    for part, config in configs.items():
        if f"{part} sizes" in facts:
            yaml_beside.refuse_other_sizes(facts[f"{part} sizes"].where, facts[f"{part} sizes"].value, config)
    channels = configs["unet"]["block_out_channels"]
    for fact in ("heads", "head_channels"):  # the second is the one that counts where there are both
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


def averaged(file, sources):
    """Return the sources of the running averages (EMA) of a UNet; UserError where the file does not have them all."""
    ema = {name: layout.Source(layout.ema_name(source.name)) for name, source in sources.items()}
    missing = [source.name for source in ema.values() if source.name not in file.shapes]
    if missing:
        raise UserError(
            f"--sd.ema True: {file.path} lacks {len(missing)} averaged weights, {missing[0]} first; leave "
            "the option out"
        )
    return ema


def skip_layers(path, text_encoder, facts, version):
    """Let the last layers of a text encoder pass on what they get, as its file asks for ("clip skip").

    Version 2 has its last block left out already: what it then gives is layer 1 to a trainer, which counts without
    that block, and layer 2 to others. The final norm stays, as in the trainer that writes the fact.
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
        note(f"{path.name}: the text encoder's last {skipped} layer(s) are left out, as its metadata say (clip skip)")
