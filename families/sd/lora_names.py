"""Names in LoRA files: which layer of the model a tensor changes, and in which role.

The name of a tensor begins with a prefix for its part of the model. Then comes the name of a layer, as in diffusers and
transformers or as in the CompVis layout, with dots (peft, diffusers, ComfyUI) or with underscores (kohya's trainer,
LyCORIS); with underscores the name is called flat here. The last words tell the tensor's role:

    down, up, mid     A (rank, in), B (out, rank) and, between them, a convolution (rank, rank, height, width)
    bias              is added to the layer's own bias
    token_A, token_B  A and B of an embedding of words
    diff, diff_b      the whole change of a weight and of a bias (w_norm and b_norm of norms)
    weight, weight_b  a whole new weight or bias (peft's options modules_to_save and bias)
    alpha             a number, for the scale alpha / rank
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from families.sd import kinds, layout
from families.sd.lora_settings import MERGE, PEFT_PREFIX, number
from families.sd.wording import verb
from my.errors import UserError, first_line, some

if TYPE_CHECKING:
    from families.sd.networks import Parts
    from my.tensor_file import TensorFile

Layers = Mapping[str, Mapping[str, str]]  # {flat name of a layer: {role: name of its tensor in the file}}
Spellings = Mapping[str, tuple[str, list[str]]]  # {flat name of a layer: (part, names of its modules)}
ADAPTER = r"(?:\.[\w-]{1,100})?"  # name of the adapter, such as "default"
OLD = r"(?:[._]lora|\.lora_linear_layer)"  # as older versions of diffusers write it
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
WHOLE = re.compile(r"(?:\.base_layer)?\.(?P<whole>weight|bias)\Z")  # in a file that peft wrote
LONGEST = 500  # longer names are of no LoRA
PAIRS = (("down", "up"), ("token_A", "token_B"))

KINDS = (  # a pattern of names, and the kind of adapter that has such tensors
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


def read(file: TensorFile, whole: bool = False) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Return ({flat name of a layer: {role: name of its tensor}}, {flat name: name with dots}) of a file.

    An alpha may also be a plain number beside the tensors. `whole` says whether peft's configuration allows for whole
    weights. Raises UserError for a file that is no plain LoRA, for a layer that lacks a tensor, and for two tensors
    with one role.
    """
    layers: dict[str, dict[str, str]] = {}
    dotted: dict[str, str] = {}
    others: list[str] = []
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


def role_of(name: str, whole: bool) -> tuple[str | None, str]:
    """Return (role, name of the layer) of a tensor, or (None, "") for a tensor that no plain LoRA has."""
    m = ENDING.search(name) if len(name) <= LONGEST else None
    if m is None and whole and name.startswith(PEFT_PREFIX):
        m = WHOLE.search(name)
    layer = name[: m.start()].removeprefix(PEFT_PREFIX) if m else ""
    if m is None or m.lastgroup is None or not layer:
        return None, ""
    return ROLES[m.lastgroup][m[m.lastgroup]], layer


def refuse_others(file: TensorFile, others: Sequence[str]) -> NoReturn:
    """Raise UserError for tensors that no plain LoRA has; it says of which kind the file is, where that is known."""
    names = "\n".join(name[:LONGEST] for name in others)
    kind = next((kind for pattern, kind in KINDS if re.search(pattern, names, re.MULTILINE)), None)
    if kind is None and not any("lora" in name.lower() for name in file.shapes):
        refuse_no_lora(file)
    raise UserError(
        f"{file.label}: {len(others)} of its tensors {verb(len(others), 'is', 'are')} of no plain LoRA: "
        f"{some(others, 1)}; "
        f"{f'it is {kind}, which is' if kind else 'that is'} not supported: {MERGE}"
    )


def refuse_no_lora(file: TensorFile) -> NoReturn:
    """Raise UserError for a file that is no LoRA; it says what the file is, where its names tell."""
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


def refuse_parts(file: TensorFile, layers: Layers, changing: bool) -> None:
    """Raise UserError for a file without layers, for a layer that lacks a tensor, and for quantised tensors.

    `changing` says whether any layer has a tensor other than alpha.
    """
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


def alphas_of(file: TensorFile, layers: Layers) -> dict[str, float]:
    """Return {flat name of a layer: alpha} of the layers that have one; raises TypeError where it is not one number."""
    return {layer: alpha_of(file, tensors["alpha"]) for layer, tensors in layers.items() if "alpha" in tensors}


def alpha_of(file: TensorFile, name: str) -> float:
    """Return the alpha in a tensor, or in a number beside the tensors; raises TypeError where it is not one number."""
    if name in file.numbers:
        return number(file.numbers[name])
    shape = file.shapes[name]
    if any(n != 1 for n in shape) or len(shape) > 8:
        raise TypeError
    return number(file.tensor(name).tolist())


def flat(name: str) -> str:
    """Return the name of a layer as kohya's trainer spells it.

    Older versions of diffusers put `processor` before the layers of an attention; that word is left out.
    """
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


def of_unused_block(layers: Collection[str], parts: Parts, known: Container[str]) -> list[str]:
    """Return the flat names of layers in OpenCLIP's last block, which 2.x does not use and which is not loaded.

    `known` has the flat names of the model's own layers.
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


def named(parts: Parts) -> dict[str, tuple[str, list[str]]]:
    """Return {flat name: (part, names of modules)} of all layers that a LoRA can change, under every name in use.

    A name of OpenCLIP's stacked queries, keys and values has three modules.
    """
    found: dict[str, tuple[str, dict[str, int]]] = {}
    for part, prefixes in PREFIXES.items():
        for name, module in parts[part].named_modules():
            if getattr(module, "weight", None) is None:
                continue
            for spelling, third in spellings(part, name, parts[part].config):
                for prefix in prefixes:
                    found.setdefault(prefix + spelling, (part, {}))[1][name] = third
    return {spelling: (part, sorted(modules, key=modules.__getitem__)) for spelling, (part, modules) in found.items()}


def spellings(part: str, name: str, config: Any) -> Iterator[tuple[str, int]]:
    """Yield (flat name without a prefix, third) of a module: its third among stacked modules, 0 for a module alone."""
    short = flat(name).removeprefix("text_model_")
    source = layout.unet_source if part == "unet" else layout.open_clip_source
    found = {short: 0} | ({f"text_model_{short}": 0} if part == "text_encoder" else {})
    try:
        there, third = source(f"{name}.weight", config)
    except KeyError:
        pass  # the CompVis layout has no name for it
    else:
        stem = re.sub(r"[._]weight$", "", there.removeprefix(layout.UNET).removeprefix(layout.OPEN_CLIP))
        found |= {flat(stem): third or 0} | ({flat(f"model.{stem}"): third or 0} if part == "text_encoder" else {})
    for spelling, third in found.items():
        yield spelling, third
        if spelling.endswith("to_out_0"):  # diffusers has the output's layer and its dropout in a list
            yield spelling.removesuffix("_0"), third
