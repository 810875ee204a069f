"""OpenAI's guided-diffusion UNet and noisy classifier, as diffusers' UNet2DModel under other names.

Architecture: Dhariwal and Nichol 2021, arXiv 2105.05233, and its variants in Nichol and Dhariwal 2021, arXiv
2102.09672: time added rather than scaling and shifting, and resolutions that convolutions or averages change.
`options` are as in `gddpm.published`; weights go by the parameter names of the published checkpoints.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import nn

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


def build_unet(options):
    """Return the UNet of `options` on the meta device, its weights yet to come."""
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


def average(unet, widths):
    """Let averages and copies of pixels change the resolution of a UNet, rather than convolutions."""
    for block, width in zip(unet.down_blocks[:-1], widths[:-1], strict=True):
        block.downsamplers = nn.ModuleList([Downsample2D(width)])
    for block, width in zip(unet.up_blocks[:-1], widths[:0:-1], strict=True):
        block.upsamplers = nn.ModuleList([Upsample2D(width)])


def level_widths(options):
    """Return the channels of each level of resolution, from the finest on."""
    return tuple(round(options["num_channels"] * m) for m in options["channel_mult"])


def n_heads(options, width):
    """Return the number of heads of an attention over `width` channels."""
    return options["num_heads"] or width // options["num_head_channels"]


class NoisyClassifier(nn.Module):
    """Half a UNet, pooled: logits (B, n_labels) of noisy pictures x (B, 3, H, W) at timesteps t (B,)."""

    def __init__(self, options):
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

    def forward(self, x, t):
        time = self.time_embedding(self.time_proj(t).to(x.dtype))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x, time)
        return self.pool(F.silu(self.conv_norm_out(self.mid_block(x, time))))


class AttentionPool(nn.Module):
    """Logits (B, n_labels) of features (B, C, edge, edge): attention from their mean to all of them and itself.

    Source: the attention pooling of CLIP, arXiv 2103.00020, section 2.4.
    """

    def __init__(self, edge, width, n_labels):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(width, edge**2 + 1))
        self.qkv_proj = nn.Conv1d(width, 3 * width, 1)
        self.c_proj = nn.Conv1d(width, n_labels, 1)

    def forward(self, x):
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positional_embedding
        q, k, v = rearrange(self.qkv_proj(x), "b (three h c) n -> three b h n c", three=3, c=HEAD_WIDTH)
        pooled = rearrange(F.scaled_dot_product_attention(q[:, :, :1], k, v), "b h n c -> b (h c) n")
        return self.c_proj(pooled)[:, :, 0]


# ---------------------------------------------------------------- weights


def published_name(name, options):
    """Return the published name of a parameter of diffusers' network of these options."""
    if name.startswith("pool."):
        return f"{POOL}.{name.removeprefix('pool.')}"
    return openai_unet.published_name(name, options["num_res_blocks"], options["attends"], in_attention)


def in_attention(name):
    """Return the published name of a parameter within an attention."""
    module, _, leaf = name.rpartition(".")
    return f"{ATTENTION[module]}.{leaf}"


def published_shapes(net, options):
    """Return {published name: shape} of every parameter of a network of `options`."""
    shapes = {}
    for name, p in net.state_dict().items():
        rows = 3 if name.split(".")[-2] in QKV else 1  # published in one
        convolution = (1,) if ".attentions." in name and p.ndim == 2 else ()  # of width 1
        shapes[published_name(name, options)] = (rows * p.shape[0], *p.shape[1:], *convolution)
    return shapes


def convert(published, net, options):
    """Return the state of a network of `options` from one by published names, in float32.

    The rows of a published attention are (q or k or v, head, channel), or (head, q or k or v,
    channel) in its older order.
    """
    order = "(three h c)" if options["use_new_attention_order"] else "(h three c)"
    state = {}
    for name, p in net.state_dict().items():
        w, part = published[published_name(name, options)].float(), name.split(".")[-2]
        if part in QKV:
            w = rearrange(w, f"{order} ... -> three (h c) ...", three=3, h=n_heads(options, len(p)))[QKV.index(part)]
        state[name] = w.reshape(p.shape)
    return state
