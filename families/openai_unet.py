"""OpenAI's names of a UNet's parameters, and the names of the same parameters in diffusers.

guided-diffusion (arXiv 2105.05233) published its UNet under these names. Latent diffusion (arXiv 2112.10752), and so
Stable Diffusion, took over the UNet with its names. Its blocks are numbered through:

    input_blocks.0                 the first convolution
    input_blocks.1 and on          per level, from the finest on: n residual blocks, then a downsampler
    middle_block.0, .1, .2         residual block, attention, residual block
    output_blocks.0 and on         per level, from the coarsest on: n + 1 residual blocks, the upsampler in the last

Within a block, 0 is the residual block, 1 is the attention if the level attends, and the upsampler is behind these. The
networks of this project have no downsampler in the coarsest level, and no upsampler in the finest. No heavy imports.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

V = TypeVar("V")

FIRST = "input_blocks.0.0.weight"
LAST = "out.2"
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # within a residual block: diffusers' name -> OpenAI's
ENDS = {
    "conv_in": FIRST.removesuffix(".weight"),
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": LAST,
}  # outside of the blocks: the same
MIDDLE = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}
IN_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
IN_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def published_name(name: str, n_resnets: int, attends: Sequence[bool], attention: Callable[[str], str]) -> str:
    """Return OpenAI's name of a module or a parameter of diffusers' UNet.

    An example of `name` is "down_blocks.0.resnets.1.conv1.weight". `n_resnets` is the number of residual blocks per
    level on the way down. `attends` says for each level, from the finest on, whether it has attentions. `attention`
    turns diffusers' name within an attention, such as "to_q.weight", into OpenAI's. Raises KeyError for a name that no
    parameter of OpenAI's UNet corresponds to.
    """
    module, _, leaf = name.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{leaf}"
    if m := IN_MIDDLE.fullmatch(name):
        return f"middle_block.{MIDDLE[m[1], m[2]]}.{_within(m[1], m[3], attention)}"
    m = IN_LEVEL.fullmatch(name)
    if m is None:
        raise KeyError(name)
    way, level, kind, i = m[1], int(m[2]), m[3], int(m[4])
    if way == "down":
        block = 1 + level * (n_resnets + 1) + (n_resnets if kind == "downsamplers" else i)
        return f"input_blocks.{block}.{int(kind == 'attentions')}.{_within(kind, m[5], attention)}"
    at = int(kind == "attentions")
    if kind == "upsamplers":
        i, at = (
            n_resnets,
            1 + attends[len(attends) - 1 - level],
        )  # diffusers counts the levels upwards from the coarsest
    return f"output_blocks.{level * (n_resnets + 1) + i}.{at}.{_within(kind, m[5], attention)}"


def _within(kind: str, inner: str, attention: Callable[[str], str]) -> str:
    """Return OpenAI's name within a residual block, an attention or a sampler.

    A sampler is a convolution or a residual block.
    """
    if kind == "attentions":
        return attention(inner)
    module, _, leaf = inner.rpartition(".")
    sampler = {"downsamplers": {"conv": "op"}, "upsamplers": {"conv": "conv"}}.get(kind, {})
    return f"{(RESNET | sampler)[module]}.{leaf}"


def below(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    """Return {the rest of the name: value} of all names that start with `prefix`."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def numbers(names: Iterable[str], pattern: str) -> set[int]:
    """Return the numbers that the first group of `pattern` matches at the start of names."""
    return {int(m[1]) for m in (re.match(pattern, name) for name in names) if m}
