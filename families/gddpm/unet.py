"""The UNet and the noisy classifier of guided-diffusion, as diffusers' UNet2DModel with other parameter names.

Architecture: Dhariwal and Nichol 2021, arXiv 2105.05233, and its variants in Nichol and Dhariwal 2021, arXiv
2102.09672: there, time is added instead of scaling and shifting, and convolutions or averages change the resolution.
`options` are as in `families.gddpm.published`. Weights have the parameter names of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import nn
from torch.utils._pytree import tree_map

from families import openai_unet
from families.gddpm.layout import GROUPS, HEAD_WIDTH, POOL

QKV = ("to_q", "to_k", "to_v")
ATTENTION = {
    "group_norm": "norm",
    "to_q": "qkv",
    "to_k": "qkv",
    "to_v": "qkv",
    "to_out.0": "proj_out",
}  # diffusers' name -> the published one


def build_unet(options: dict[str, Any]) -> UNet2DModel:
    """Return the UNet of `options` on the meta device, that is, without weights."""
    attends, widths = options["attends"], level_widths(options)
    plain = "Resnet{}sampleBlock2D" if options["resblock_updown"] else "{}Block2D"
    down, up = (
        tuple((f"Attn{way}Block2D" if here else plain.format(way)) for here in order)
        for way, order in (("Down", attends), ("Up", attends[::-1]))
    )
    between = "resnet" if options["resblock_updown"] else "conv"
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=options["image_size"],
            in_channels=3,
            out_channels=6 if options["learn_sigma"] else 3,
            block_out_channels=widths,
            layers_per_block=options["num_res_blocks"],
            down_block_types=down,
            up_block_types=up,
            downsample_type=between,
            upsample_type=between,
            attention_head_dim=None,
            resnet_time_scale_shift="scale_shift" if options["use_scale_shift_norm"] else "default",
            norm_num_groups=GROUPS,
            attn_norm_num_groups=GROUPS,
            num_class_embeds=options["n_classes"],
            time_embedding_dim=4 * options["num_channels"],
        )
        unet.time_proj = Timesteps(options["num_channels"], flip_sin_to_cos=True, downscale_freq_shift=0)
        unet.time_embedding = TimestepEmbedding(options["num_channels"], 4 * options["num_channels"])
    if not options["resblock_updown"] and not options["conv_resample"]:
        average(unet, widths)
    for attention in (m for m in unet.modules() if hasattr(m, "to_q")):
        attention.heads = n_heads(options, attention.inner_dim)  # the same number at every width, in one of the models
        attention.scale = (attention.inner_dim // attention.heads) ** -0.5
    return unet.eval()


def halve(unet: UNet2DModel, dtype: torch.dtype) -> None:
    """Have the blocks of a UNet in a half precision `dtype`; what is before and behind them stays in float32.

    So does the published code. The embeddings of time and class are computed in float32, and so are the first
    convolution, the last norm and the last convolution.
    """

    def inner(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        now = next(block.parameters()).dtype  # another than `dtype` while the block is widened
        return cast(args, now), cast(kwargs, now)

    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.to(dtype).register_forward_pre_hook(inner, with_kwargs=True)
    unet.conv_norm_out.register_forward_pre_hook(lambda _norm, args: cast(args, torch.float32))


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with all tensors of real numbers in it, also inside tuples and dictionaries, in `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, value)


def average(unet: UNet2DModel, widths: tuple[int, ...]) -> None:
    """Replace the convolutions that change the resolution of a UNet by averages and copies of pixels."""
    for block, width in zip(unet.down_blocks[:-1], widths[:-1], strict=True):
        block.downsamplers = nn.ModuleList([Downsample2D(width)])
    for block, width in zip(unet.up_blocks[:-1], widths[:0:-1], strict=True):
        block.upsamplers = nn.ModuleList([Upsample2D(width)])


def level_widths(options: dict[str, Any]) -> tuple[int, ...]:
    """Return the number of channels per level of resolution, from the finest on."""
    return tuple(round(options["num_channels"] * m) for m in options["channel_mult"])


def n_heads(options: dict[str, Any], width: int) -> int:
    """Return the number of heads of an attention over `width` channels."""
    return options["num_heads"] or width // options["num_head_channels"]


class NoisyClassifier(nn.Module):
    """The downward half of a UNet, pooled: logits of noisy pictures x (B, 3, H, W) at timesteps t (B,)."""

    conv_in: nn.Conv2d
    time_proj: Timesteps
    time_embedding: TimestepEmbedding
    down_blocks: nn.ModuleList
    mid_block: nn.Module

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.n_labels = options["n_labels"]
        whole = build_unet(options)
        for name in ("conv_in", "time_proj", "time_embedding", "down_blocks", "mid_block", "conv_norm_out"):
            setattr(self, name, getattr(whole, name))
        width = level_widths(options)[-1]
        edge = options["image_size"] // 2 ** (len(options["channel_mult"]) - 1)
        with torch.device("meta"):
            self.conv_norm_out = nn.GroupNorm(GROUPS, width)
            self.pool = AttentionPool(edge, width, options["n_labels"])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, n_labels)."""
        time = self.time_embedding(self.time_proj(t).to(x.dtype))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x, time)
        return self.pool(F.silu(self.conv_norm_out(self.mid_block(x, time))))


class AttentionPool(nn.Module):
    """Logits (B, n_labels) of features (B, C, edge, edge): attention from their mean to all of them and itself.

    Source: the attention pooling of CLIP, arXiv 2103.00020, section 2.4.
    """

    def __init__(self, edge: int, width: int, n_labels: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(width, edge**2 + 1))
        self.qkv_proj = nn.Conv1d(width, 3 * width, 1)
        self.c_proj = nn.Conv1d(width, n_labels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, n_labels)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding
        q, k, v = rearrange(self.qkv_proj(x), "b (three h c) n -> three b h n c", three=3, c=HEAD_WIDTH)
        pooled = rearrange(F.scaled_dot_product_attention(q[:, :, :1], k, v), "b h n c -> b (h c) n")
        return self.c_proj(pooled)[:, :, 0]


# ---------------------------------------------------------------- weights


def published_name(name: str, options: dict[str, Any]) -> str:
    """Return the published name of a parameter of diffusers' network of these options."""
    if name.startswith("pool."):
        return f"{POOL}.{name.removeprefix('pool.')}"
    return openai_unet.published_name(name, options["num_res_blocks"], options["attends"], in_attention)


def in_attention(name: str) -> str:
    """Return the published name of a parameter within an attention."""
    module, _, leaf = name.rpartition(".")
    return f"{ATTENTION[module]}.{leaf}"


def published_shapes(net: nn.Module, options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {published name: shape} of all parameters of a network of `options`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, p in net.state_dict().items():
        rows = 3 if name.split(".")[-2] in QKV else 1  # published as one tensor
        convolution = (1,) if ".attentions." in name and p.ndim == 2 else ()  # published as a convolution of width 1
        shapes[published_name(name, options)] = (rows * p.shape[0], *p.shape[1:], *convolution)
    return shapes


def convert(published: Mapping[str, torch.Tensor], net: nn.Module, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the state of a network of `options`, in float32, from tensors by their published names.

    The rows of a published attention are ordered (q or k or v, head, channel), or, in the older order, (head, q or k
    or v, channel).
    """
    order = "(three h c)" if options["use_new_attention_order"] else "(h three c)"
    state = {}
    for name, p in net.state_dict().items():
        w, part = published[published_name(name, options)].float(), name.split(".")[-2]
        if part in QKV:
            w = rearrange(w, f"{order} ... -> three (h c) ...", three=3, h=n_heads(options, len(p)))[QKV.index(part)]
        state[name] = w.reshape(p.shape)
    return state
