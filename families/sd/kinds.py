"""What kind of model a file has that is not a whole Stable Diffusion, and what the user can do with the file.

The names of the tensors tell the kind. Each pattern below matches names that the publishers of a format write. The
first pattern that matches a name decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from families.sd.layout import CLIP, OPEN_CLIP, TEXT, UNET, VAE, Shapes
from my.errors import shown

PLAIN = "use a text-to-image checkpoint of Stable Diffusion 1.x or 2.x"
BESIDE = "it belongs beside a checkpoint, and is not supported"
WHOLE = "give the whole checkpoint: UNet, VAE and text encoder"


class NotStableDiffusion(ValueError):
    """Says in words what a file is instead, and what to do."""


class Kind(NamedTuple):
    """One kind of model or adapter."""

    pattern: str  # some tensor of such a file has a name that it matches
    what: str  # the kind, in words
    to_do: str = PLAIN


OF_A_RUN = Kind(
    r"^(field|optim)/",
    "a checkpoint that a run of this project wrote: a voxel field, no diffusion model",
    "to go on with that run, give --resume True in its folder; to start one, give a Stable Diffusion",
)
ADDED = (  # small files that belong beside a checkpoint
    Kind(r"motion_modules?\.|temporal_transformer\.", "an AnimateDiff motion module", BESIDE),
    Kind(r"lllite_", "a ControlNet-LLLite", BESIDE),
    Kind(r"(^|\.)control_model\.|controlnet_|input_hint_block|^zero_convs\.|^lora_controlnet$", "a ControlNet", BESIDE),
    Kind(r"^ip_adapter\.|^image_proj(_model)?\.|\.to_[kv]_ip\.", "an IP-Adapter", BESIDE),
    Kind(r"^(adapter\.)?body\.\d+\.(block1|in_conv|resnets)\b", "a T2I-Adapter", BESIDE),
    Kind(
        r"lora_(unet|te|up|down|linear)|\.lora_[AB]\.|[._]lora\.(up|down)\.|\.(hada_w1|lokr_w1|oft_blocks|oft_diag)",
        "a LoRA, or an adapter like it",
        "give it as --sd.lora, beside a checkpoint",
    ),
    Kind(
        r"^string_to_(param|token)\b|^emb_params$|^clip_[lg]$|^<.*>$",
        "a textual-inversion embedding",
        "embeddings are not supported: describe it in the prompt, or look for a LoRA of it (--sd.lora)",
    ),
    Kind(
        r"(_custom_diffusion\.|^modifier_token)",
        "a Custom Diffusion adapter",
        "it is not supported: merge it into a checkpoint with the tool that made it, or look for a LoRA of it",
    ),
    Kind(r"^(\d+\.)?\d+\.linear\.\d+\.(weight|bias)$|^(320|640|768|1280)\.[01]\.linear", "a hypernetwork", BESIDE),
)
OTHERS = (  # whole models of another kind
    Kind(r"camera_embed\.|\.ip_embed|image_embed\.", "a multi-view model, such as MVDream or ImageDream"),
    Kind(r"(^|\.)(cc|clip_camera)_projection\.", "Zero123, which draws other views of a picture"),
    Kind(r"time_stack\.|temporal_res_block\.|time_mixer\.|time_mix_", "Stable Video Diffusion"),
    Kind(r"temopral_conv\.|temp_convs\.|temp_attentions\.", "a text-to-video model"),
    Kind(r"^edm_(vpred|mean|std)\b", "a model with the noise levels of EDM, such as Playground 2.5"),
    Kind(r"conditioner\.embedders\.1\.|add_embedding\.linear_1|^lora_te2_", "Stable Diffusion XL"),
    Kind(r"diffusion_model\.label_emb\.0\.0\.weight", "the refiner of Stable Diffusion XL, or a model with classes"),
    Kind(r"joint_blocks\.|context_block\.", "Stable Diffusion 3"),
    Kind(r"double_layers\.|cond_seq_linear", "AuraFlow"),
    Kind(r"double_blocks\.|single_blocks\.|single_transformer_blocks\.", "Flux, or a transformer like it"),
    Kind(r"adaln_single\.|caption_projection\.|y_embedder\.y_proj|^t_block\.1\.", "PixArt, or a transformer like it"),
    Kind(r"clip_txt_pooled_mapper|clip_txt_mapper|effnet_mapper|^clf\.1\.", "Stable Cascade, or Wuerstchen"),
    Kind(r"encoder_hid_proj\.|encoder_proj\.|encoder_pooling\.", "DeepFloyd IF, or Kandinsky"),
    Kind(r"add_embedding\.(image_proj|image_norm|text_proj)|ln_model_n\.", "Kandinsky"),
    Kind(r"time_embed(ding)?\.cond_proj\.", "a latent consistency model, which is told its guidance"),
    Kind(
        r"transformer_blocks\.\d+\.(img_mod|norm1_context|norm1\.linear)|patchify_proj|^patch_embedding\."
        r"|cap_embedder\.",
        "a diffusion transformer, no Stable Diffusion",
    ),
    Kind(r"(^|\.)(body|sub)\.\d+\.(RDB|rdb)\d\.", "an upscaler of pictures, such as ESRGAN"),
    Kind(r"position_net\.", "GLIGEN, which is told boxes"),
    Kind(
        r"\.(absmax|quant_map|scale_weight|scale_input)$|\.quant_state\.|^scaled_fp8$|\.SCB$",
        "quantised",
        "use the plain weights of it",
    ),
    OF_A_RUN,
    Kind(r"^optimizer|exp_avg", "the state of an optimizer", WHOLE),
)
TAESD = Kind(
    r"^(taesd_)?(en|de)coder\.(layers\.)?\d+\.(weight|conv)|^\d+\.(conv\.\d+\.)?(weight|bias)$",
    "TAESD, a VAE made small",
    "it is not supported: give a whole checkpoint, and if it lacks its VAE, --sd.vae with a full one",
)
ALONE = (  # single parts of a Stable Diffusion
    Kind(
        r"^model_ema\.diffusion_model",
        "the averaged weights (model_ema) of a UNet, without the plain ones",
        "use the file that has both",
    ),
    Kind(
        r"^unet\.(down_blocks|conv_in|mid_block)\.",
        "a diffusers model put into one file",
        "give the diffusers folder, or a file in the CompVis layout",
    ),
    Kind(r"^vision_model\.|^visual\.", "an encoder of pictures alone", WHOLE),
    TAESD,
    Kind(
        r"^(encoder|decoder)\.(conv_in|down|up|mid)|^(post_)?quant_conv\.|^first_stage_model\.|^vae\.",
        "a VAE alone",
        "give it as --sd.vae, beside a checkpoint",
    ),
    Kind(
        r"^(module\.)?(input_blocks|time_embed|middle_block)\.",
        "a UNet alone, of Stable Diffusion, of guided-diffusion or of a consistency model",
        f"{WHOLE}, or see --family gddpm",
    ),
    Kind(r"^model\.diffusion_model\.", "a UNet alone", WHOLE),
    Kind(
        r"^(down_blocks|up_blocks|mid_block|conv_in|time_embedding)\.",
        "the unet of a diffusers folder alone",
        "give the folder that holds unet, vae and text_encoder",
    ),
    Kind(
        r"^(text_model|transformer|token_embedding|embeddings|encoder|cond_stage_model|shared|te|clip)\b",
        "a text encoder alone",
        WHOLE,
    ),
)
ENCODER, DECODER = (
    re.compile(rf"^([\w.]*\.)?{way}coder\.(conv_in|conv_out|mid|down|up)", re.MULTILINE) for way in ("en", "de")
)  # of a VAE
CHANNELS = {
    9: "an inpainting model",
    8: "InstructPix2Pix, or another that reads a picture",
    5: "a depth-to-image model",
    7: "an upscaler",
}  # channels that a UNet takes -> what the model is


def refuse_others(shapes: Shapes, vae_given: bool = False) -> None:
    """Raise NotStableDiffusion for a file that is not a text-to-image Stable Diffusion 1.x or 2.x.

    `shapes` have the published names. With `vae_given`, the file need not have a VAE.
    """
    prefixes: dict[str, str | tuple[str, ...]] = {"UNet": UNET, "VAE": VAE, "text encoder": (CLIP, OPEN_CLIP)}
    has = {what: any(name.startswith(prefix) for name in shapes) for what, prefix in prefixes.items()}
    if not has["UNet"] or sum(has.values()) == 1:
        _refuse(shapes, (*ADDED, *OTHERS, *ALONE))
    else:
        _refuse(shapes, (*ADDED, *OTHERS))
    if not has["UNet"]:
        first = ", ".join(f"{shown(name, 40)} {shown(list(shape), 20)}" for name, shape in list(shapes.items())[:2])
        raise NotStableDiffusion(f"it has no UNet in the CompVis layout; it begins with {first}; {PLAIN}")
    if not any(name.startswith(f"{UNET}middle_block.") for name in shapes):
        raise NotStableDiffusion(
            "it is a pruned UNet without a middle block, such as BK-SDM; give its diffusers folder"
        )
    _refuse_channels(shapes.get(f"{UNET}input_blocks.0.0.weight", ()))
    if not has["text encoder"]:
        other = next((name for name in shapes if name.startswith(TEXT)), None)
        raise NotStableDiffusion(
            f"it has no text encoder{f' that is known ({shown(other)})' if other else ''}, and "
            f"there is no option to give one; {WHOLE}"
        )
    if not has["VAE"] and not vae_given:
        raise NotStableDiffusion(
            "it has no VAE; give one with --sd.vae FILE_OR_FOLDER, such as that of another checkpoint"
        )


def _refuse(shapes: Iterable[str], kinds: Iterable[Kind]) -> None:
    """Raise NotStableDiffusion for the first of the kinds whose pattern matches a name."""
    names = "\n".join(shapes)
    for kind in kinds:
        if re.search(kind.pattern, names, re.MULTILINE):
            raise NotStableDiffusion(f"it is {kind.what}; {kind.to_do}")


def _refuse_channels(shape: Sequence[int]) -> None:
    """Raise NotStableDiffusion where the weight of a UNet's first convolution takes other than 4 channels."""
    channels = shape[1] if len(shape) == 4 else 4
    if channels != 4:
        what = CHANNELS.get(channels, "another model")
        raise NotStableDiffusion(f"it is {what}, whose UNet takes {shown(channels)} channels instead of 4; {PLAIN}")


def refuse_other_vaes(shapes: Iterable[str]) -> None:
    """Raise NotStableDiffusion where the file of an --sd.vae has no VAE of Stable Diffusion's kind.

    `shapes` have the names in the file.
    """
    for kind in (*ADDED, OF_A_RUN, TAESD):
        if any(re.search(kind.pattern, name) for name in shapes):
            raise NotStableDiffusion(f"it is {kind.what}, and no VAE of Stable Diffusion; give such a file or folder")
    names = "\n".join(shapes)
    if DECODER.search(names) and not ENCODER.search(names):
        raise NotStableDiffusion("it is the decoder of a VAE alone; give a file or a folder that has its encoder, too")
    if any("time_mix" in name or "time_stack" in name or "time_conv_out" in name for name in shapes):
        raise NotStableDiffusion("it is the VAE of a video model; give one of Stable Diffusion 1.x or 2.x")


def refuse_other_latents(config: Mapping[str, Any]) -> None:
    """Raise NotStableDiffusion where the configuration of a VAE states other than 4 channels of latents."""
    channels = config["latent_channels"]
    if channels != 4:
        what = "of Stable Diffusion 3 or Flux" if channels == 16 else "of another model"
        raise NotStableDiffusion(
            f"it is the VAE {what}, whose latents have {shown(channels)} channels instead of 4; "
            "give one of Stable Diffusion 1.x or 2.x"
        )
