"""Names in LoRA files: which layer of the model each tensor changes, how, and what a file is that is no LoRA.

A layer has the name of diffusers and transformers or of the CompVis layout, with dots (peft, diffusers, ComfyUI) or
underscores (kohya's trainer, LyCORIS), behind a prefix for its part. A tensor's last words tell its role:

    down, up, mid     A (rank, in), B (out, rank) and, between them, a convolution (rank, rank, height, width)
    bias              of up, added to the layer's own
    token_A, token_B  A and B of an embedding of words
    diff, diff_b      the whole change of a weight and of a bias (of norms: w_norm, b_norm)
    weight, weight_b  a whole new weight or bias, of peft's modules_to_save and bias
    alpha             of the layer's scale alpha / rank
"""

import re

from families.sd import kinds, layout
from families.sd.lora_settings import MERGE, PEFT_PREFIX, number
from my.errors import UserError, first_line, some

ADAPTER = r"(?:\.[\w-]{1,100})?"  # its name, "default"
OLD = r"(?:[._]lora|\.lora_linear_layer)"  # of diffusers
ENDING = re.compile(
    rf"\.lora_(?P<low>down|up|mid|A|B){ADAPTER}\.weight\Z|{OLD}\.(?P<old>down|up)\.weight\Z"
    rf"|\.lora_(?:up|B){ADAPTER}\.(?P<bias>bias)\Z|\.lora_embedding_(?P<token>A|B){ADAPTER}\Z"
    rf"|\.(?P<diff>diff|diff_b|w_norm|b_norm)\Z|{OLD}?\.(?P<alpha>alpha)\Z"
)
ROLES = {
    "low": {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid"},
    "old": {"down": "down", "up": "up"},
    "bias": {"bias": "bias"},
    "token": {"A": "token_A", "B": "token_B"},
    "alpha": {"alpha": "alpha"},
    "diff": {"diff": "diff", "diff_b": "diff_b", "w_norm": "diff", "b_norm": "diff_b"},
    "whole": {"weight": "weight", "bias": "weight_b"},
}
WHOLE = re.compile(r"(?:\.base_layer)?\.(?P<whole>weight|bias)\Z")  # in a file of peft's
LONGEST = 500  # characters of a name that is looked at
PAIRS = (("down", "up"), ("token_A", "token_B"))

KINDS = (  # of the tensors that are of no plain LoRA
    (r"lora_magnitude_vector|dora_scale", "DoRA"),
    (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"),
    (r"\.oft_|\.boft_", "OFT"),
    (r"\.on_input$|\.ia3_", "IA3"),
    (r"\.lora_E|\.ranknum", "AdaLoRA"),
    (r"\.vera_|\.randlora_", "VeRA"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"^bundle_emb\.", "a LoRA with embeddings of words in it"),
    (r"\.trainable_tokens", "a LoRA with new words"),
    (r"\.set_weight$", "a change that sets weights anew"),
    (r"scale_weight|scaled_fp8|\.absmax|quant_state|\.weight_scale", "quantised weights"),
    (r"^(unet|text_encoder):\d+:", "the LoRA of an early tool, which numbers its layers"),
)


# ---------------------------------------------------------------- names in a file


def read(file, whole=False):
    """Return {flat name of a layer: {role: name of its tensor}} and {the same: its name with dots} of a TensorFile.

    An alpha may also be the name of a plain number beside the tensors.

    `whole` is whether peft's configuration allows for whole weights. Raises UserError for a file that is no
    plain LoRA, is not whole, or names a tensor twice.
    """
    layers, dotted, others = {}, {}, []
    roles = [(name, *role_of(name, whole)) for name in file.shapes]
    roles += [found for found in ((name, *role_of(name, False)) for name in file.numbers) if found[1] == "alpha"]
    for name, role, layer in roles:
        if role is None:
            others.append(name)
            continue
        tensors = layers.setdefault(flat(layer), {})
        if role in tensors:
            raise UserError(
                f"{file.label}: changes a layer twice, by {some([tensors[role], name])}; use a file with one LoRA in it"
            )
        tensors[role] = name
        dotted.setdefault(flat(layer), layer)
    changing = any(set(tensors) - {"alpha"} for tensors in layers.values())
    if others:
        refuse_others(file, others)
    refuse_parts(file, layers, changing)
    return layers, dotted


def role_of(name, whole):
    """Return (role, name of the layer) of a tensor, or (None, None)."""
    m = ENDING.search(name) if len(name) <= LONGEST else None
    if m is None and whole and name.startswith(PEFT_PREFIX):
        m = WHOLE.search(name)
    layer = name[: m.start()].removeprefix(PEFT_PREFIX) if m else ""
    return (ROLES[m.lastgroup][m[m.lastgroup]], layer) if layer else (None, None)


def refuse_others(file, others):
    """Raise UserError for tensors that are of no plain LoRA, which names the kind where that is known."""
    names = "\n".join(name[:LONGEST] for name in others)
    kind = next((kind for pattern, kind in KINDS if re.search(pattern, names, re.MULTILINE)), None)
    if kind is None and not any("lora" in name.lower() for name in file.shapes):
        refuse_no_lora(file)
    raise UserError(
        f"{file.label}: {len(others)} of its tensors are of no plain LoRA: {some(others, 1)}; "
        f"{f'it is {kind}, which is' if kind else 'that is'} not supported: {MERGE}"
    )


def refuse_no_lora(file):
    """Raise UserError for a file that is none, which says what it is instead, where its names tell."""
    try:
        kinds.refuse_others(file.shapes)
    except kinds.NotStableDiffusion as error:
        what = first_line(error).partition(";")[0]
    else:
        raise UserError(f"{file.label}: no LoRA, but a whole checkpoint; give it as --sd.checkpoint")
    if "embedding" in what:
        to_do = "embeddings are not read: describe in --sd.prompt what it stands for"
    else:
        to_do = "leave it out, or give a LoRA's file"
    if not what.startswith("it is "):
        what = f"its tensors begin with {some(file.shapes, 1)}"
    raise UserError(f"{file.label}: no LoRA: {what}; {to_do}")


def refuse_parts(file, layers, changing):
    """Raise UserError for a layer that lacks one of the tensors of its change, and for numbers that are codes."""
    if not changing:
        raise UserError(f"{file.label}: incomplete or damaged: it has no layers; get the file again")
    for layer, tensors in layers.items():
        alone = {"mid", "bias"} & set(tensors) and "up" not in tensors
        if alone or any((a in tensors) != (b in tensors) for a, b in PAIRS):
            raise UserError(
                f"{file.label}: incomplete or damaged: {some([layer])} has one of its two tensors only; "
                "get the file again"
            )
    quantised = file.quantised(name for tensors in layers.values() for role, name in tensors.items() if role != "alpha")
    if quantised:
        raise UserError(f"{file.label}: quantised, which is not supported: {some(quantised, 1)}; use a plain one")


def alphas_of(file, layers):
    """Return {flat name of a layer: alpha} where one is stated; TypeError where one is not one number."""
    return {layer: alpha_of(file, tensors["alpha"]) for layer, tensors in layers.items() if "alpha" in tensors}


def alpha_of(file, name):
    """Return the alpha in a tensor of one number, or beside the tensors; TypeError for any other."""
    if name in file.numbers:
        return number(file.numbers[name])
    shape = file.shapes[name]
    if any(n != 1 for n in shape) or len(shape) > 8:
        raise TypeError
    return number(file.tensor(name).tolist())


def flat(name):
    """Return the name of a layer as kohya's trainer spells it; an attention's old processors are its own layers."""
    return name.replace(".processor.", ".").replace(".", "_")


# ---------------------------------------------------------------- names in the model

PREFIXES = {
    "unet": ("lora_unet_", "unet_", "", "lycoris_", "diffusion_model_", "model_diffusion_model_"),
    "text_encoder": (
        "lora_te_",
        "lora_te1_",
        "text_encoder_",
        "",
        "lycoris_",
        "te_",
        "te1_",
        "clip_l_",
        "cond_stage_model_transformer_",
        "text_encoders_clip_l_transformer_",
        "text_encoders_clip_h_transformer_",
        "cond_stage_model_",
    ),
}


def of_unused_block(layers, parts, known):
    """Return those flat names of layers that are of OpenCLIP's last block, which 2.x does not use and we do not load.

    `known` are the flat names of the model's own layers.
    """
    config = parts["text_encoder"].config
    if config.hidden_act != "gelu":  # CLIP's, of 1.x, is used to its end
        return []
    block = re.compile(rf"(encoder_layers|transformer_resblocks)_{config.num_hidden_layers}_")
    return [
        layer
        for layer in layers
        if layer not in known
        and (m := block.search(layer))
        and f"{layer[: m.start()]}{m[1]}_0_{layer[m.end() :]}" in known
    ]


def named(parts):
    """Return {flat name: (part, names of modules)} of all that a LoRA can change, by every name that files use.

    There is more than one module where OpenCLIP stacks the rows of queries, keys and values.
    """
    found = {}
    for part, prefixes in PREFIXES.items():
        for name, module in parts[part].named_modules():
            if getattr(module, "weight", None) is None:
                continue
            for spelling, third in spellings(part, name, parts[part].config):
                for prefix in prefixes:
                    found.setdefault(prefix + spelling, (part, {}))[1][name] = third
    return {spelling: (part, sorted(modules, key=modules.get)) for spelling, (part, modules) in found.items()}


def spellings(part, name, config):
    """Yield (flat name without a prefix, which third it is of three stacked modules or 0) of a module."""
    short = flat(name).removeprefix("text_model_")
    source = layout.unet_source if part == "unet" else layout.open_clip_source
    found = {short: 0} | ({f"text_model_{short}": 0} if part == "text_encoder" else {})
    try:
        there, third = source(f"{name}.weight", config)
    except (AttributeError, KeyError):
        pass  # the CompVis layout has no name for it
    else:
        stem = re.sub(r"[._]weight$", "", there.removeprefix(layout.UNET).removeprefix(layout.OPEN_CLIP))
        found |= {flat(stem): third or 0} | ({flat(f"model.{stem}"): third or 0} if part == "text_encoder" else {})
    for spelling, third in found.items():
        yield spelling, third
        if spelling.endswith("to_out_0"):  # the list of the output's layer and its dropout
            yield spelling.removesuffix("_0"), third
