"""Other spellings of the CompVis layout, and the published names that they stand for.

Trainers put a prefix such as `module.` before all names. `torch.compile` inserts `_orig_mod.`. The text encoder of
generative-models (`sgm`) is called `conditioner.embedders.0.`. NovelAI's files of 2022, and recent versions of
transformers, leave out the level `text_model.`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from families.sd import layout

WRAPPED = re.compile(
    r"^((?:(?:module|model|_forward_module|state_dict|model_state_dict|params|pipeline|net)\.)+)"
    r"(?=model\.diffusion_model\.)"
)
COMPILED = "_orig_mod."
SGM_TEXT = "conditioner.embedders.0."
BARE_TEXT = re.compile(
    rf"^({re.escape(layout.TEXT)}transformer\.)"
    r"(?=(?:embeddings|encoder|final_layer_norm|position_ids)\b)"
)
OLD_ATTENTION = (
    ("query", "to_q"),
    ("key", "to_k"),
    ("value", "to_v"),
    ("proj_attn", "to_out.0"),
)  # before 2023, diffusers' VAEs had the first of these names
OF_DIFFUSERS_VAE = re.compile(r"^(?:vae\.)?(?:en|de)coder\.(?:(?:down|up)_blocks|mid_block)\.")
OF_VAE = re.compile(r"^(?:encoder|decoder|quant_conv|post_quant_conv|loss|model_ema)\b")


def published(names: Iterable[str]) -> dict[str, str]:
    """Return {published name: name in the file} of the tensors of a whole checkpoint."""
    names = list(names)
    wrapper = next((m[1] for m in map(WRAPPED.match, names) if m), "")
    found = {}
    for name in names:
        new = name.removeprefix(wrapper).replace(COMPILED, "")
        if new.startswith(SGM_TEXT):
            new = layout.TEXT + new.removeprefix(SGM_TEXT)
        found[BARE_TEXT.sub(r"\1text_model.", new)] = name
    return found


def published_vae(names: Iterable[str]) -> dict[str, str]:
    """Return {published name: name in the file} of a VAE's tensors, also where the file is a whole checkpoint.

    The tensors may have the published names, with or without their prefix, or the names of diffusers.
    """
    names = list(names)
    found = {new: name for new, name in published(names).items() if new.startswith(layout.VAE)}
    if found:
        return found
    if not any(map(OF_DIFFUSERS_VAE.match, names)):
        return {
            layout.VAE + name.removeprefix("vae."): name for name in names if OF_VAE.match(name.removeprefix("vae."))
        }
    levels = {name.partition("up_blocks.")[2].partition(".")[0] for name in names if "decoder.up_blocks." in name}
    config = {"block_out_channels": [0] * len(levels)}
    return {layout.vae_source(of_new_diffusers(name), config).name: name for name in names}


def of_new_diffusers(name: str) -> str:
    """Return the name that diffusers has today for a tensor of a VAE. Before 2023 its attention had other names."""
    name = name.removeprefix("vae.")
    for old, new in OLD_ATTENTION if ".attentions." in name else ():
        name = name.replace(f".{old}.", f".{new}.")
    return name
