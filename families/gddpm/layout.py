"""What a file in the layout of guided-diffusion is: its architecture by names and shapes, or what else the file is.

Names and numbers only. Source of the layout: the parameter names of the published checkpoints (arXiv 2105.05233).
`tests/test_gddpm.py` accounts for all of them. Improved-diffusion (arXiv 2102.09672) has the same layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from families.openai_unet import FIRST, LAST, numbers
from my.errors import shown, some

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # {name of a tensor: its shape}
Options = dict[str, Any]  # of a network, as `published.OPTIONS` has them
T = TypeVar("T")

GROUPS = 32  # of each group normalisation
POOL = LAST  # the pooling of a classifier stands where a UNet has its last convolution
HEAD_WIDTH = 64  # channels per head of a classifier, which shapes do not tell
GREY = "it draws grey pictures (1 channel), and this family reads RGB only"
OTHERS = (  # (pattern that the name of some tensor matches, what the file then is, what to do)
    (r"lora_(unet|te|up|down)|\.lora_[AB]\.|\.lora\.(up|down)\.", "a LoRA", "give it as --sd.lora, with --family sd"),
    (r"control_model\.|controlnet_cond_embedding|input_hint_block", "a ControlNet, which gives no score", ""),
    (
        r"^(cond_stage_model|conditioner)\.",
        "a Stable Diffusion checkpoint",
        "give it as --sd.checkpoint, with --family sd",
    ),
    (r"^first_stage_model\.", "a latent diffusion model without text", ""),
    (
        r"transformer_blocks\.",
        "the UNet of a Stable Diffusion alone",
        "give the whole checkpoint as --sd.checkpoint, with --family sd",
    ),
    (
        r"^(unet\.)?(down_blocks|up_blocks|mid_block)\.",
        "the unet of a diffusers pipeline alone",
        "give the pipeline's folder as --ddpm.checkpoint, with --family ddpm",
    ),
    (
        r"(^|\.)transformer\.resblocks\.|(^|\.)token_embedding\.|(^|\.)encoder_kv\.",
        "GLIDE, or a model like it, which takes text",
        "",
    ),
    (r"string_to_(param|token)|^emb_params$", "a textual-inversion embedding", "give a whole checkpoint"),
    (r"(^|\.)all_modules\.\d", "a model of score_sde, which is told levels of noise", ""),
    (r"(^|\.)(enc|dec)\.\d+x\d+_", "a model of EDM, which is told levels of noise", ""),
    (r"(^|\.)init_conv\.|(^|\.)downs\.0\.", "a model of denoising-diffusion-pytorch", ""),
    (
        r"(^|\.)down\.0\.block\.0\.|(^|\.)mid\.block_1\.",
        "a UNet of the first DDPM's layout",
        "convert it to a diffusers folder, and give that as --ddpm.checkpoint, with --family ddpm",
    ),
    (r"(joint|double|single)_blocks\.", "a diffusion transformer", ""),
    (r"^(encoder|decoder)\.|^(post_)?quant_conv\.", "a VAE alone, which gives no score", ""),
    (r"^text_model\.", "a text encoder alone, which gives no score", ""),
)
INSTEAD = "give a UNet of guided-diffusion"
INSTEAD_OF_IT = "give a classifier as the published ones are, or --cls_scaling 0"
IN_CHANNELS = {
    1: GREY,
    4: "it takes 4 channels, as a model in a VAE's latents or for inpainting does",
    6: "it is an upsampler, which takes a small picture beside the noise",
    7: "it is an upsampler for inpainting",
}


class NotGuidedDiffusion(ValueError):
    """The file is something else. The message says in words what it is, and what to do."""


def prefix(shapes: Shapes) -> str:
    """Return the prefix of the names of the network, such as "module."; of several, that of running averages.

    Raises NotGuidedDiffusion for a file that is something else.
    """
    names = "\n".join(shapes)
    for pattern, what, to_do in OTHERS:
        if re.search(pattern, names, re.MULTILINE):
            raise NotGuidedDiffusion(f"it is {what}; {to_do or INSTEAD}")
    found = [name.removesuffix(FIRST) for name in shapes if name == FIRST or name.endswith(f".{FIRST}")]
    if not found:
        begins = some(f"{shown(name, 50)} {shown(list(shape), 30)}" for name, shape in list(shapes.items())[:3])
        raise NotGuidedDiffusion(
            f"it has no {FIRST}, as every guided-diffusion model has; it begins with {begins}; {INSTEAD}"
        )
    return next((p for p in found if "ema" in p.lower()), found[0])


def unet(s: Shapes) -> Options:
    """Return the options of the UNet whose shapes are `s`, as far as shapes tell them.

    Raises NotGuidedDiffusion for the shapes of another network.
    """
    if not any(name.startswith("output_blocks.") for name in s):
        raise NotGuidedDiffusion(
            "it is a noisy classifier; give it as --gddpm.classifier, and a UNet as --gddpm.checkpoint"
        )
    options = reading(lambda: half(s, levels(s)))
    taken, given = s[FIRST][1], reading(lambda: bounded(s[f"{POOL}.weight"])[0])
    if taken != 3:
        raise NotGuidedDiffusion(f"{IN_CHANNELS.get(taken, f'it takes {shown(taken)} channels, not 3')}; {INSTEAD}")
    if given not in (3, 6):
        raise NotGuidedDiffusion(f"it gives {shown(given)} channels, not 3, or 6 with a variance; {INSTEAD}")
    return options | {"learn_sigma": given == 6}


def classifier(s: Shapes) -> Options:
    """Return the options of the noisy classifier whose shapes are `s`: also `n_labels`, its number of classes.

    Shapes do not tell its heads. They are taken to be those of the published classifiers: 64 channels per head, in the
    older order. Raises NotGuidedDiffusion for the shapes of another network.
    """
    if any(name.startswith("output_blocks.") for name in s):
        raise NotGuidedDiffusion(
            "it is a UNet; give it as --gddpm.checkpoint, and a noisy classifier as --gddpm.classifier"
        )
    if f"{POOL}.c_proj.weight" not in s:
        raise NotGuidedDiffusion(
            "it does not pool by attention, as the published classifiers do; give one that does, or --cls_scaling 0"
        )
    options = reading(lambda: half(s, classifier_levels(s)))
    cells = reading(lambda: bounded(s[f"{POOL}.positional_embedding"])[1] - 1)
    edge = math.isqrt(cells)
    if edge < 1 or edge**2 != cells:
        raise NotGuidedDiffusion(f"its pooling is of {cells} places, which are no square; {INSTEAD_OF_IT}")
    attending = [m for m, here in zip(options["channel_mult"], options["attends"]) if here]
    for multiple in (*attending, options["channel_mult"][-1]):
        if round(options["num_channels"] * multiple) % HEAD_WIDTH:
            raise NotGuidedDiffusion(f"a level that attends has no multiple of {HEAD_WIDTH} channels; {INSTEAD_OF_IT}")
    return options | {
        "n_labels": reading(lambda: bounded(s[f"{POOL}.c_proj.weight"])[0]),
        "num_head_channels": HEAD_WIDTH,
        "num_heads": None,
        "use_new_attention_order": False,
        "learn_sigma": False,
        "image_size": edge << len(options["channel_mult"]) - 1,
    }


def reading(read: Callable[[], T]) -> T:
    """Return what `read()` finds in shapes; raises NotGuidedDiffusion where they lack it."""
    try:
        return read()
    except NotGuidedDiffusion:
        raise
    except KeyError as error:
        raise NotGuidedDiffusion(
            f"it lacks {shown(str(error.args[0]))}, or that is of another architecture; {INSTEAD}"
        ) from None
    except (IndexError, ValueError, TypeError, ZeroDivisionError):
        raise NotGuidedDiffusion(f"some tensor has a shape of another architecture; {INSTEAD}") from None


def half(s: Shapes, n_levels: int) -> Options:
    """Return the options that the downward half of a network tells, which has `n_levels` levels of resolution."""
    n = n_blocks(s, "input_blocks")
    if n % n_levels:
        raise NotGuidedDiffusion(f"its {n} input blocks are no {n_levels} levels of equally many; {INSTEAD}")
    per_level = n // n_levels  # residual blocks, and one that halves the resolution; in the first, the convolution
    if per_level < 2:
        raise NotGuidedDiffusion(f"it has levels without a residual block; {INSTEAD}")
    (time, num_channels), starts = s["time_embed.0.weight"], range(1, n, per_level)
    widths = [bounded(s[f"input_blocks.{i}.0.out_layers.3.weight"])[0] for i in starts]
    wrong = next((width for width in widths if width % GROUPS), None)
    if wrong or not time == 4 * num_channels > 0:
        raise NotGuidedDiffusion(
            f"it has {f'a level of {shown(wrong)}' if wrong else shown(num_channels)} channels, "
            f"which no such UNet can have; {INSTEAD}"
        )
    rows = s["input_blocks.1.0.emb_layers.1.weight"][0]
    halves = [f"input_blocks.{i}.0" for i in range(per_level, n, per_level)]
    pooled = any(f"{name}.op.weight" not in s and f"{name}.in_layers.2.weight" not in s for name in halves)
    return {
        "num_channels": num_channels,
        "channel_mult": tuple(w / num_channels for w in widths),
        "num_res_blocks": per_level - 1,
        "attends": tuple(f"input_blocks.{i}.1.qkv.weight" in s for i in starts),
        "n_classes": bounded(s["label_emb.weight"])[0] if "label_emb.weight" in s else None,
        "use_scale_shift_norm": rows == 2 * widths[0],
        "resblock_updown": any(f"{name}.in_layers.2.weight" in s for name in halves) or n_levels == 1,
        "conv_resample": not pooled,
    }


def bounded(shape: Shape) -> Shape:
    """Return a shape without a zero, whose numbers the size of the file bounds; raises ValueError for others."""
    if not all(shape):
        raise ValueError
    return shape


def levels(s: Shapes) -> int:
    """Return how many levels of resolution a UNet has: one more than the times that it halves the resolution."""
    n = n_blocks(s, "output_blocks")
    ups = {
        i
        for i in range(n)
        for at in (1, 2)
        if f"output_blocks.{i}.{at}.conv.weight" in s or f"output_blocks.{i}.{at}.in_layers.2.weight" in s
    }
    gaps = [
        i
        for i in range(n)
        if not any(f"input_blocks.{i}.0.{leaf}" in s for leaf in ("weight", "in_layers.2.weight", "op.weight"))
    ]
    return 1 + (len(ups) or len(gaps))


def classifier_levels(s: Shapes) -> int:
    """Return how many levels of resolution a classifier has, by its input blocks.

    A residual block that halves the resolution has no attention. So neighbouring blocks with attention belong to one
    level.
    """
    n = n_blocks(s, "input_blocks")
    others = [i for i in range(1, n) if f"input_blocks.{i}.0.in_layers.2.weight" not in s]
    if others:  # convolutions halve it, or averages
        return 1 + len(others)
    attends = "".join("01"[f"input_blocks.{i}.1.qkv.weight" in s] for i in range(n))
    runs = {len(run) for run in attends.split("0") if run}
    if len(runs) != 1:
        raise NotGuidedDiffusion(f"its shapes do not tell its levels of resolution; {INSTEAD_OF_IT}")
    return n // (runs.pop() + 1)


def n_blocks(s: Shapes, kind: str) -> int:
    """Return one more than the highest index of the blocks `kind`, such as "input_blocks".

    Raises KeyError where there is none, and NotGuidedDiffusion for an index that the number of tensors excludes.
    """
    indices = numbers(s, rf"{kind}\.(\d{{1,6}})\.")
    if not indices:
        raise KeyError(f"{kind}.0")
    if max(indices) >= len(s):
        raise NotGuidedDiffusion(f"it numbers {kind} to {max(indices)}, and has {len(s)} tensors; {INSTEAD}")
    return max(indices) + 1
