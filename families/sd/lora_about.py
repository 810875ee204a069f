"""What the file of a LoRA tells about it: the model that it is made for, and what a user should know.

The metadata are texts, under keys of kohya's trainer (`ss_*`) and of the modelspec convention (`modelspec.*`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from families.sd.lora_files import CONFIG
from families.sd.lora_settings import PEFT_PREFIX
from families.sd.stated import PREDICTION_KEYS, PREDICTIONS
from families.sd.wording import several, verb
from my.errors import shown, some

if TYPE_CHECKING:
    from families.sd.lora_names import Layers
    from families.sd.networks import Parts
    from my.tensor_file import TensorFile

V1, V2, XL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"
BY_NAME = (  # a pattern of flat names of layers, and the only model with such layers
    (r"double_blocks_|single_blocks_|single_transformer_blocks_", "Flux, or a transformer like it"),
    (
        r"joint_blocks_|^(lora_)?transformer_transformer_blocks_|^lora_te3_|^text_encoder_3_",
        "Stable Diffusion 3, or a transformer like it",
    ),
    (r"motion_modules_", "AnimateDiff"),
    (r"^lora_te2_|^text_encoder_2_|clip_g_|label_emb_|add_embedding_|transformer_blocks_[1-9]_", XL),
    (
        r"^(lora_)?(transformer|prior|dit)_(?!resblocks_|text_model_)"
        r"|^(lora_unet|diffusion_model)_(transformer_)?(blocks|layers|caption)_",
        "a diffusion transformer",
    ),
)
CONTEXT = re.compile(r"attn2_to_[kv]$")  # the number of inputs of these layers is the width of the text encoder
QUERY = re.compile(r"self_attn_[qkv]_proj$")
BY_CONTEXT, BY_TEXT = {768: V1, 1024: V2, 2048: XL}, {768: V1, 1024: V2, 1280: XL}
BY_WORDS = (
    (r"stable-diffusion-v1|\bsd_v1|\bsd1", V1),
    (r"stable-diffusion-v2|\bsd_v2|\bsd2", V2),
    (r"stable-diffusion-xl|sdxl", XL),
    (r"stable-diffusion-3|\bsd3", "Stable Diffusion 3"),
    (r"flux", "Flux"),
)
MODEL = ("modelspec.architecture", "ss_base_model_version")
TITLES = ("modelspec.title", "ss_output_name")
FEW_STEPS = re.compile(r"(?<![a-z])(lcm|lightning|hyper-?sd|turbo|tcd|dmd\d?)(?![a-z])")


def made_for(file: TensorFile, layers: Layers) -> str | None:
    """Return in words which model a LoRA is made for, or None; `lora_names.read` returns the `layers`."""
    names = "\n".join(layers)
    by_name = (what for pattern, what in BY_NAME if re.search(pattern, names, re.MULTILINE))
    downs = [(layer, file.shapes[tensors["down"]]) for layer, tensors in layers.items() if "down" in tensors]
    by_shape = (
        table[shape[1]]
        for pattern, table in ((CONTEXT, BY_CONTEXT), (QUERY, BY_TEXT))
        for layer, shape in downs
        if pattern.search(layer) and len(shape) > 1 and shape[1] in table
    )
    return next(by_name, None) or next(by_shape, None) or stated_model(file.metadata)


def stated_model(metadata: Mapping[str, str]) -> str | None:
    """Return the model that the metadata name, or None."""
    words = " ".join(metadata.get(key, "")[:200] for key in MODEL).lower()
    found = next((what for pattern, what in BY_WORDS if re.search(pattern, words)), None)
    return found or (V2 if metadata.get("ss_v2") == "True" else None)


def version(parts: Parts) -> str | None:
    """Return the name of the loaded model's version, or None where its text encoder has another width."""
    return BY_CONTEXT.get(parts["unet"].config.cross_attention_dim)


def facts(file: TensorFile, parts: Parts) -> list[str]:
    """Return what the metadata and the name of a file tell that a user should know, each in words with what to do."""
    found = (_trigger(file.metadata), _prediction(file.metadata, parts), _clip_skip(file.metadata), _few_steps(file))
    return [words for words in found if words]


def _trigger(metadata: Mapping[str, str]) -> str | None:
    """Return in words the trigger phrase, or None."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    return f"its trigger phrase is {shown(phrase)!r}: have it in --sd.prompt" if phrase else None


def _prediction(metadata: Mapping[str, str], parts: Parts) -> str | None:
    """Return in words that the LoRA and the model differ in what is predicted, or None.

    It is None for a UNet without weights, whose type of prediction may not be known yet.
    """
    said = (metadata.get(key, "").strip().lower() for key in PREDICTION_KEYS)
    stated = next((PREDICTIONS[word] for word in said if word in PREDICTIONS), None)
    stated = stated or ("v_prediction" if metadata.get("ss_v_parameterization") == "True" else None)
    here = "scheduler" in parts and parts["scheduler"].config.prediction_type
    if not stated or not here or stated == here or parts["unet"].device.type == "meta":
        return None
    return (
        f"it was trained for {stated.replace('_', '-')}, and this checkpoint is {here.replace('_', '-')}: use the "
        "checkpoint that it was trained on"
    )


def _clip_skip(metadata: Mapping[str, str]) -> str | None:
    """Return in words that the LoRA was trained with clip skip, or None."""
    skip = metadata.get("ss_clip_skip", "")
    if not re.fullmatch(r"\d{1,3}", skip) or int(skip) < 2:
        return None
    return (
        f"it was trained with clip skip {int(skip)}, and the text encoder is read to its end here: if its words "
        "act weakly, give a higher weight"
    )


def _few_steps(file: TensorFile) -> str | None:
    """Return in words that the LoRA is one for drawing in few steps, by its names, or None."""
    words = " ".join((file.path.name, file.path.parent.name, *(file.metadata.get(key, "")[:200] for key in TITLES)))
    found = FEW_STEPS.search(words.lower())
    if found is None:
        return None
    return (
        f"its name says {found[1]}, which is for pictures in few steps: leave it out for 3D, which asks "
        "the model for one noise level at a time"
    )


def no_alpha(file: TensorFile, without: Sequence[str], count: int) -> str | None:
    """Return in words that the layers `without` a stated alpha get a scale of 1, or None where this is usual.

    `count` is the number of all layers.
    """
    stated, rank = (shown(file.metadata.get(key, ""), 20) for key in ("ss_network_alpha", "ss_network_dim"))
    if len(without) < count:
        return (
            f"{len(without)} of its {several(count, 'layer')} {verb(len(without), 'states', 'state')} no alpha, "
            f"{some(without, 1)} first: a scale of 1 is taken"
        )
    if stated and stated != rank:
        return (
            f"its metadata state alpha {stated} and rank {rank}, its tensors no alpha: a scale of 1 is taken, as "
            "web UIs do; for another give PATH:WEIGHT"
        )
    if any(name.startswith(PEFT_PREFIX) for name in file.shapes):
        return (
            f"no alpha is stated: a scale of 1 is taken; put its {CONFIG} beside it, or give PATH:WEIGHT with "
            "alpha / rank as weight"
        )
    return None
