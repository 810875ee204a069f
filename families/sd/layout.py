"""The CompVis layout of single-file checkpoints: names, and configurations read off the shapes.

Names and numbers only: `shapes` is {name: shape} of a file, under the published names, to which `sd/names.py` brings
other spellings. Stable Diffusion 1.x holds its text encoder as transformers' CLIP, 2.x as OpenCLIP, of which the last
block is not used (its penultimate output is the condition). Source of the layout: latent diffusion, arXiv 2112.10752,
and its published weights, all of whose names `tests/test_sd_layout.py` accounts for.
"""

import contextlib
import re
from typing import NamedTuple

from my.errors import shown

UNET, VAE, EMA, TEXT = "model.diffusion_model.", "first_stage_model.", "model_ema.", "cond_stage_model."
CLIP, OPEN_CLIP = f"{TEXT}transformer.text_model.", f"{TEXT}model."
NOT_NEEDED = re.compile(
    r"cond_stage_model\.(transformer\.text_model\.embeddings\.position_ids|transformer\.vision_model\..*"
    r"|(transformer\.)?(text|visual)_projection(\..*)?|((transformer|model)\.)?logit_scale"
    r"|model\.(text_projection(\..*)?|attn_mask))"
    r"|first_stage_model\.(loss\..*|model_ema\..*)"
)  # CLIP's other half, training
OPEN_CLIP_WIDTH, OPEN_CLIP_BLOCKS = 1024, 24  # of 2.x; converters from diffusers folders leave the last block out
V1_HEADS, V2_HEAD_CHANNELS, TEXT_HEAD_CHANNELS = 8, 64, 64  # of attention: not to be seen in any shape
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
    """Where a parameter is in a file: the name there, and which third of it where three are stacked."""

    name: str
    third: int | None = None


# ---------------------------------------------------------------- configurations


def is_open_clip(shapes):
    """Whether the text encoder is under OpenCLIP's names."""
    return any(name.startswith(OPEN_CLIP) for name in shapes)


def is_v2(shapes):
    """Whether the text encoder is OpenCLIP's, as in Stable Diffusion 2.x, whatever its names."""
    width = tuple(shapes.get(f"{CLIP}embeddings.token_embedding.weight", (0,)))[-1]
    return is_open_clip(shapes) or width == OPEN_CLIP_WIDTH


def configurations(shapes):
    """Return {"unet", "vae", "text_encoder": options of the diffusers or transformers class} that `shapes` are of.

    For 512-pixel models. Without "vae" where the file has none. Raises ValueError for a file that lacks the tensors
    that tell, or is of another architecture.
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
def told_by_shapes():
    """Say in a ValueError what the shapes, which the block reads a configuration off, do not tell."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"it lacks {shown(error.args[0])}, or that is of another architecture") from None
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        raise ValueError("some tensor has a shape of another architecture") from None


def latent_size(levels, pixels=PIXELS):
    """Return the edge of a picture's latents, of a VAE with these levels."""
    return pixels // 2 ** (len(levels) - 1)


def below(shapes, prefix):
    """Return {name below `prefix`: shape}."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def count(s, pattern):
    """Return how many numbers the group of `pattern` has among the names, counting from 0; KeyError for none."""
    numbers = {int(m[1]) for m in (re.match(pattern, name) for name in s) if m}
    missing = set(range(len(numbers))) - numbers
    if missing or not numbers:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", str(min(missing, default=0))))
    return len(numbers)


def unet_configuration(s, v2):
    """Return the options of diffusers' UNet2DConditionModel, but for its size."""
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


def vae_configuration(s):
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


def clip_configuration(s, hidden_act="quick_gelu"):
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


def open_clip_configuration(s):
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


def used_blocks(s):
    """Return how many blocks of an OpenCLIP text encoder are used: all but the last, where that is there."""
    blocks = count(s, r"transformer\.resblocks\.(\d+)\.")
    converted = s["token_embedding.weight"][1] == OPEN_CLIP_WIDTH and blocks == OPEN_CLIP_BLOCKS - 1
    return blocks if converted else blocks - 1


def text_configuration(vocabulary, width, length, inner, layers, **options):
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

IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}


def unet_source(name, config):
    """Return the Source of a parameter of diffusers' UNet2DConditionModel."""
    per_level = config["layers_per_block"] + 1
    stem, _, leaf = name.rpartition(".")
    if stem in UNET_ENDS:
        return Source(f"{UNET}{UNET_ENDS[stem]}.{leaf}")
    m = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name)
    if m:
        return Source(f"{UNET}middle_block.{MIDDLE[m[1], m[2]]}.{in_block(m[1], m[3])}")
    way, level, kind, j, rest = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
    level, j = int(level), int(j)
    if kind == "downsamplers":
        return Source(f"{UNET}input_blocks.{(level + 1) * per_level}.0.op.{rest.removeprefix('conv.')}")
    if kind == "upsamplers":
        after = 2 if config["up_block_types"][level].startswith("CrossAttn") else 1
        return Source(f"{UNET}output_blocks.{level * per_level + per_level - 1}.{after}.{rest}")
    block = f"input_blocks.{level * per_level + j + 1}" if way == "down" else f"output_blocks.{level * per_level + j}"
    return Source(f"{UNET}{block}.{'01'[kind == 'attentions']}.{in_block(kind, rest)}")


def in_block(kind, rest):
    """Return the name within a residual block; within an attention both layouts agree."""
    layer, _, leaf = rest.rpartition(".")
    return f"{IN_RESNET[layer]}.{leaf}" if kind == "resnets" else rest


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


def vae_source(name, config):
    """Return the Source of a parameter of diffusers' AutoencoderKL, whose decoder counts its levels backwards."""
    last = len(config["block_out_channels"]) - 1
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{last - int(m[1])}", name)
    for pattern, there in VAE_WORDS:
        name = re.sub(pattern, there, name)
    return Source(VAE + name)


def clip_source(name, _config):
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


def open_clip_source(name, _config):
    """Return the Source of a parameter of transformers' CLIPTextModel in 2.x, where q, k and v are stacked."""
    name = name.removeprefix("text_model.")
    if name in OPEN_CLIP_WORDS:
        return Source(OPEN_CLIP + OPEN_CLIP_WORDS[name])
    if name.startswith("final_layer_norm."):
        return Source(OPEN_CLIP + name.replace("final_layer_norm", "ln_final"))
    layer, module, leaf = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name).groups()
    block = f"{OPEN_CLIP}transformer.resblocks.{layer}."
    stacked = re.fullmatch(r"self_attn\.([qkv])_proj", module)
    if stacked:
        return Source(f"{block}attn.in_proj_{leaf}", "qkv".index(stacked[1]))
    return Source(f"{block}{OPEN_CLIP_LAYERS[module]}.{leaf}")


def sources(part, names, config, open_clip=False):
    """Return {parameter: Source} of a part's parameters, under diffusers' or transformers' names."""
    text_source = open_clip_source if open_clip else clip_source
    source = {"unet": unet_source, "vae": vae_source, "text_encoder": text_source}[part]
    return {name: source(name, config) for name in names}


def ema_name(name):
    """Return the name of the running average of a UNet's parameter: its dots are left out."""
    return EMA + name.removeprefix("model.").replace(".", "")


def mismatches(shapes, expected):
    """Return (missing or of a wrong shape, unexpected) of a file in words, given {Source: shape} of all parameters."""
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


def same(there, here):
    """Whether shapes agree, a 1x1 convolution counting as the matrix that it is."""
    there, here = tuple(there), tuple(here)
    return there == here or (len(here) == 2 and there in ((*here, 1), (*here, 1, 1)))
