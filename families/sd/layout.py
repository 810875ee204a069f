"""The CompVis layout of single-file checkpoints: the names of its tensors, and the configuration that the shapes tell.

This module works on names and numbers only. `shapes` is {name: shape} of a file, under the published names;
`families/sd/names.py` turns other spellings into these. The text encoder of Stable Diffusion 1.x has the names of CLIP
in transformers. That of 2.x has OpenCLIP's names, and its last block is not used, because the output of the block
before it is the condition. Source of the layout: latent diffusion, arXiv 2112.10752, and its published weights, all of
whose names `tests/test_sd_layout.py` accounts for.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from families.openai_unet import below, numbers, published_name
from my.errors import shown

Shapes = Mapping[str, Sequence[int]]  # {name of a tensor: its shape}
Config = dict[str, Any]  # options of a class of diffusers or transformers

UNET, VAE, EMA, TEXT = "model.diffusion_model.", "first_stage_model.", "model_ema.", "cond_stage_model."
CLIP, OPEN_CLIP = f"{TEXT}transformer.text_model.", f"{TEXT}model."
NOT_NEEDED = re.compile(
    r"cond_stage_model\.(transformer\.text_model\.embeddings\.position_ids|transformer\.vision_model\..*"
    r"|(transformer\.)?(text|visual)_projection(\..*)?|((transformer|model)\.)?logit_scale"
    r"|model\.(text_projection(\..*)?|attn_mask))"
    r"|first_stage_model\.(loss\..*|model_ema\..*)"
)  # CLIP's other half, and what only training needs
OPEN_CLIP_WIDTH, OPEN_CLIP_BLOCKS = 1024, 24  # of 2.x; converters of diffusers folders leave the last block out
V1_HEADS, V2_HEAD_CHANNELS, TEXT_HEAD_CHANNELS = 8, 64, 64  # of attention; no shape tells them
PIXELS = 512
SCALING = 0.18215  # of the VAEs of 1.x and 2.x
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}  # of every Stable Diffusion 1.x and 2.x


class Source(NamedTuple):
    """Where a parameter is in a file."""

    name: str  # of the tensor
    third: int | None = None  # which third of its rows, where the tensor is three parameters stacked


# ---------------------------------------------------------------- configurations


def is_open_clip(shapes: Iterable[str]) -> bool:
    """Return whether the text encoder has OpenCLIP's names."""
    return any(name.startswith(OPEN_CLIP) for name in shapes)


def is_v2(shapes: Shapes) -> bool:
    """Return whether the text encoder is OpenCLIP's, as in Stable Diffusion 2.x, under either kind of names."""
    width = tuple(shapes.get(f"{CLIP}embeddings.token_embedding.weight", (0,)))[-1]
    return is_open_clip(shapes) or width == OPEN_CLIP_WIDTH


def configurations(shapes: Shapes) -> dict[str, Config]:
    """Return {"unet", "vae", "text_encoder": options of its class in diffusers or transformers}.

    The options are those of a 512-pixel model. "vae" is left out where the file has no VAE. Raises ValueError for
    another architecture, and where a tensor is missing whose shape tells an option.
    """
    vae, v2 = below(shapes, VAE), is_v2(shapes)
    with told_by_shapes():
        text = (
            open_clip_configuration(below(shapes, OPEN_CLIP))
            if is_open_clip(shapes)
            else clip_configuration(below(shapes, CLIP), "gelu" if v2 else "quick_gelu")
        )
        return {
            "unet": unet_configuration(below(shapes, UNET), v2),
            "text_encoder": text,
            **({"vae": vae_configuration(vae)} if vae else {}),
        }


@contextlib.contextmanager
def told_by_shapes() -> Iterator[None]:
    """Turn errors of a block that reads a configuration from shapes into a ValueError that says what is wrong."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"it lacks {shown(error.args[0])}, or that is of another architecture") from None
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        raise ValueError("some tensor has a shape of another architecture") from None


def latent_size(levels: Sequence[Any], pixels: int = PIXELS) -> int:
    """Return the edge of the latents of a picture whose edge is `pixels`, for a VAE with these levels."""
    return pixels // 2 ** (len(levels) - 1)


def count(s: Iterable[str], pattern: str) -> int:
    """Return how many numbers the group of `pattern` takes among the names.

    Raises KeyError where there are none, or where they are not 0, 1, 2 and so on.
    """
    found = numbers(s, pattern)
    missing = set(range(len(found))) - found
    if missing or not found:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", str(min(missing, default=0))))
    return len(found)


def unet_configuration(s: Shapes, v2: bool) -> Config:
    """Return the options of diffusers' UNet2DConditionModel, except `sample_size`."""
    n = count(s, r"input_blocks\.(\d+)\.")
    downs = [i for i in range(n) if f"input_blocks.{i}.0.op.weight" in s]
    per_level = downs[0] if downs else n - 1  # residual blocks of a level, and its downsampler
    firsts = range(1, n, per_level)
    channels = [s[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in firsts]
    attends = [f"input_blocks.{i}.1.norm.weight" in s for i in firsts]
    context = [shape[1] for name, shape in s.items() if name.endswith("attn2.to_k.weight")]
    linear = any(name.endswith("1.proj_in.weight") and len(shape) == 2 for name, shape in s.items())
    return {
        "in_channels": s["input_blocks.0.0.weight"][1],
        "out_channels": s["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": per_level - 1 if downs else per_level,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "cross_attention_dim": context[0],
        "use_linear_projection": linear,
        "attention_head_dim": [c // V2_HEAD_CHANNELS for c in channels] if v2 else V1_HEADS,  # diffusers: heads
        "upcast_attention": v2,  # the attention of 2.1 leaves the range of fp16
    }


def vae_configuration(s: Shapes) -> Config:
    """Return the options of diffusers' AutoencoderKL."""
    channels = [s[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(count(s, r"encoder\.down\.(\d+)\."))]
    return {
        "sample_size": PIXELS,
        "scaling_factor": SCALING,
        "in_channels": s["encoder.conv_in.weight"][1],
        "out_channels": s["decoder.conv_out.weight"][0],
        "latent_channels": s["decoder.conv_in.weight"][1],
        "block_out_channels": channels,
        "layers_per_block": count(s, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def clip_configuration(s: Shapes, hidden_act: str = "quick_gelu") -> Config:
    """Return the options of transformers' CLIPTextConfig for a text encoder under transformers' names."""
    vocabulary, width = s["embeddings.token_embedding.weight"]
    return text_configuration(
        vocabulary,
        width,
        s["embeddings.position_embedding.weight"][0],
        s["encoder.layers.0.mlp.fc1.weight"][0],
        count(s, r"encoder\.layers\.(\d+)\."),
        hidden_act=hidden_act,
    )


def open_clip_configuration(s: Shapes) -> Config:
    """Return the options of transformers' CLIPTextConfig for a text encoder of 2.x, without its last block."""
    vocabulary, width = s["token_embedding.weight"]
    return text_configuration(
        vocabulary,
        width,
        s["positional_embedding"][0],
        s["transformer.resblocks.0.mlp.c_fc.weight"][0],
        used_blocks(s),
        hidden_act="gelu",
    )


def used_blocks(s: Shapes) -> int:
    """Return how many blocks of an OpenCLIP text encoder are used: all but its last, which some files leave out."""
    blocks = count(s, r"transformer\.resblocks\.(\d+)\.")
    converted = s["token_embedding.weight"][1] == OPEN_CLIP_WIDTH and blocks == OPEN_CLIP_BLOCKS - 1
    return blocks if converted else blocks - 1


def text_configuration(vocabulary: int, width: int, length: int, inner: int, layers: int, **options: Any) -> Config:
    """Return the options of transformers' CLIPTextConfig."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": length,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // TEXT_HEAD_CHANNELS),
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        **options,
    }


# ---------------------------------------------------------------- names


def unet_source(name: str, config: Mapping[str, Any]) -> Source:
    """Return the Source of a parameter of diffusers' UNet2DConditionModel; raises KeyError if there is none."""
    attends = [block.startswith("CrossAttn") for block in config["up_block_types"]][::-1]
    return Source(UNET + published_name(name, config["layers_per_block"], attends, lambda inner: inner))


VAE_WORDS = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"\bto_([qkv])\b", r"\1"),
    (r"to_out\.0", "proj_out"),
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3sample."),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def vae_source(name: str, config: Mapping[str, Any]) -> Source:
    """Return the Source of a parameter of diffusers' AutoencoderKL.

    diffusers numbers the decoder's levels from the coarsest on, and the CompVis layout from the finest on.
    """
    last = len(config["block_out_channels"]) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", name)
    for pattern, there in VAE_WORDS:
        name = re.sub(pattern, there, name)
    return Source(VAE + name)


def clip_source(name: str, _config: Mapping[str, Any]) -> Source:
    """Return the Source of a parameter of transformers' CLIPTextModel in 1.x."""
    return Source(CLIP + name.removeprefix("text_model."))


OPEN_CLIP_WORDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
}
OPEN_CLIP_LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def open_clip_source(name: str, _config: Mapping[str, Any]) -> Source:
    """Return the Source of a parameter of transformers' CLIPTextModel in 2.x, where q, k and v are stacked.

    Raises KeyError where the layout has none.
    """
    name = name.removeprefix("text_model.")
    if name in OPEN_CLIP_WORDS:
        return Source(OPEN_CLIP + OPEN_CLIP_WORDS[name])
    if name.startswith("final_layer_norm."):
        return Source(OPEN_CLIP + name.replace("final_layer_norm", "ln_final"))
    m = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
    if m is None:
        raise KeyError(name)
    layer, module, leaf = m.groups()
    block = f"{OPEN_CLIP}transformer.resblocks.{layer}."
    stacked = re.fullmatch(r"self_attn\.([qkv])_proj", module)
    if stacked:
        return Source(f"{block}attn.in_proj_{leaf}", "qkv".index(stacked[1]))
    return Source(f"{block}{OPEN_CLIP_LAYERS[module]}.{leaf}")


def sources(part: str, names: Iterable[str], config: Mapping[str, Any], open_clip: bool = False) -> dict[str, Source]:
    """Return {parameter: Source} for the names of a part's parameters in diffusers or transformers."""
    text_source = open_clip_source if open_clip else clip_source
    source = {"unet": unet_source, "vae": vae_source, "text_encoder": text_source}[part]
    return {name: source(name, config) for name in names}


def ema_name(name: str) -> str:
    """Return the name of the running average of a UNet's parameter. It has no dots behind its prefix."""
    return EMA + name.removeprefix("model.").replace(".", "")


def mismatches(shapes: Shapes, expected: Mapping[Source, Sequence[int]]) -> tuple[list[str], list[str]]:
    """Return, in words, (tensors that a file lacks or has in another shape, tensors that have no place).

    `expected` is {Source: shape} of all parameters.
    """
    whole = {s.name: (shape if s.third is None else (3 * shape[0], *shape[1:])) for s, shape in expected.items()}
    missing = [
        f"{name} {list(shape)}" + (f" (is {shown(list(shapes[name]))})" if name in shapes else "")
        for name, shape in whole.items()
        if name not in shapes or not same(shapes[name], shape)
    ]
    blocks = used_blocks(below(shapes, OPEN_CLIP)) if is_open_clip(shapes) else None
    unused = "" if blocks is None else f"{OPEN_CLIP}transformer.resblocks.{blocks}."
    prefixes = tuple({prefix for prefix in (UNET, VAE, TEXT) if any(name.startswith(prefix) for name in whole)})
    unexpected = [
        f"{name} {shown(list(shape))}"
        for name, shape in shapes.items()
        if name.startswith(prefixes)
        and name not in whole
        and not NOT_NEEDED.fullmatch(name)
        and not (unused and name.startswith(unused))
    ]
    return missing, unexpected


def same(there: Sequence[int], here: Sequence[int]) -> bool:
    """Return whether two shapes agree. A convolution with a kernel of size 1 counts as the matrix that it is."""
    there, here = tuple(there), tuple(here)
    return there == here or (len(here) == 2 and there in ((*here, 1), (*here, 1, 1)))
