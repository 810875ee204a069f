"""Other spellings of the CompVis layout, brought to the published names.

Each is a fact of a format, by the names of its tensors: training wraps a model (`module.`), `torch.compile` puts
`_orig_mod.` in, generative-models (`sgm`) calls the text encoder `conditioner.embedders.0.`, and NovelAI's files of
2022 as well as recent transformers leave out the level `text_model.`.
"""

import re

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
OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))  # of diffusers' VAEs
OF_DIFFUSERS_VAE = re.compile(r"^(?:vae\.)?(?:en|de)coder\.(?:(?:down|up)_blocks|mid_block)\.")
OF_VAE = re.compile(r"^(?:encoder|decoder|quant_conv|post_quant_conv|loss|model_ema)\b")


def published(names):
    """Return {published name: name in the file} of a whole checkpoint's tensors."""
    names = list(names)
    wrapper = next((m[1] for m in map(WRAPPED.match, names) if m), "")
    found = {}
    for name in names:
        new = name.removeprefix(wrapper).replace(COMPILED, "")
        if new.startswith(SGM_TEXT):
            new = layout.TEXT + new.removeprefix(SGM_TEXT)
        found[BARE_TEXT.sub(r"\1text_model.", new)] = name
    return found


def published_vae(names):
    """Return {published name: name in the file} of a VAE's tensors; of a whole checkpoint, of those of its VAE.

    A VAE comes under the published names with or without their prefix, or under those of diffusers.
    """
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


def of_new_diffusers(name):
    """Return diffusers' name today of a VAE's tensor, whose attention had other names before."""
    name = name.removeprefix("vae.")
    for old, new in OLD_ATTENTION if ".attentions." in name else ():
        name = name.replace(f".{old}.", f".{new}.")
    return name
