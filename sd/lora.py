"""LoRAs, fused into a model once and for all, by peft: W + weight (alpha / rank) B A (arXiv 2106.09685).

A LoRA holds a layer's low-rank change as two tensors, A (rank, in) "down" and B (out, rank) "up", under
names of kohya's trainer (`lora_unet_..._to_q.lora_down.weight`), of peft (`unet....to_q.lora_A.weight`) or of
diffusers (`....to_q.lora.down.weight`). Every tensor of a file is accounted for, or the file refused: half
a LoRA would be another one unasked. The loaders of diffusers, which know fewer names, leave out what they do not know.
"""

import json
import re

from my.errors import UserError, some
from my.tensor_file import TensorFile

TENSOR = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.lora_(down|up|A|B)(?:\.default)?"
                    r"|(?:[._]lora|\.lora_linear_layer)\.(down|up))\.weight")
ALPHA = re.compile(r"(?:base_model\.model\.)?(.+?)(?:[._]lora)?\.alpha")
PREFIXES = {"unet": ("lora_unet_", "unet_", ""),
            "text_encoder": tuple(f"{prefix}{inner}" for prefix in ("lora_te_", "lora_te1_", "text_encoder_")
                                  for inner in ("text_model_", ""))}
METADATA = "lora_adapter_metadata"  # under which diffusers keeps settings, as JSON


def fuse(parts, path, weight):
    """Add `weight` times the LoRA in a file to the UNet and the text encoder in `parts`.

    Raises UserError for a file that is no LoRA, is of another kind, or does not fit this model as a whole.
    """
    file = TensorFile(path, "--sd.lora")
    layers, alphas = read(file), alphas_of(file)
    modules = named(parts)
    asked = dict.fromkeys([*layers, *(layer for layer in alphas if layer not in PREFIXES)])
    unknown = [layer for layer in asked if layer not in modules]
    if unknown:
        refuse(path, f"{len(unknown)} of its {len(asked)} layers are not in this model: {some(unknown)}")
    changes = {part: {} for part in PREFIXES}
    for layer, ab in layers.items():
        A, B = (file.tensor(ab[x]).float() for x in "AB")
        part, name, shape = modules[layer]
        if not fits(A, B, shape):
            refuse(path, f"{layer} is {list(shape)} here, which {list(A.shape)} and {list(B.shape)} do not make")
        alpha = alphas.get(layer, alphas.get(part, len(A)))
        B = weight * alpha / len(A) * B
        if not (B.flatten(1) @ A.flatten(1)).to(parts[part].dtype).isfinite().all():
            raise UserError(f"--sd.lora {path}: what it adds to {layer} is not finite, with weight {weight:g}, alpha "
                            f"{alpha:g} and the numbers in the file; get the file again, or give another weight")
        changes[part][name] = A, B
    for part, of_part in changes.items():  # only once all are known to fit
        parts[part] = merged(parts[part], of_part)


def merged(net, changes):
    """Return a network with B A added to the weights of its modules, by peft; `changes` is {module name: (A, B)}."""
    if not changes:
        return net
    import torch
    from peft import LoraConfig, LoraModel

    ranks = {re.escape(name): len(A) for name, (A, _) in changes.items()}
    tuner = LoraModel(net, LoraConfig(target_modules="|".join(ranks), rank_pattern=ranks, alpha_pattern=ranks), "lora")
    with torch.no_grad():
        for name, pair in changes.items():
            layer = net.get_submodule(name)
            for ours, given in zip((layer.lora_A["lora"].weight, layer.lora_B["lora"].weight), pair):
                ours.copy_(given.reshape(ours.shape))
    return tuner.merge_and_unload()


def read(file):
    """Return {flat name of a layer: {"A": name of its tensor, "B": likewise}} of a TensorFile."""
    layers, others = {}, []
    for name in file.shapes:
        m = TENSOR.fullmatch(name)
        if m:
            layers.setdefault(flat(m[1]), {})["A" if (m[2] or m[3]) in ("down", "A") else "B"] = name
        elif not ALPHA.fullmatch(name):
            others.append(name)
    if not layers and not any("lora" in name.lower() for name in file.shapes):
        raise UserError(f"{file.label}: no LoRA: its tensors begin with {some(file.shapes)}; give a whole "
                        "checkpoint as --sd.checkpoint")
    if others:
        raise UserError(f"{file.label}: {len(others)} of its tensors are of no plain LoRA: {some(others)}; "
                        "other kinds (DoRA, LoHa, LoKr) are not supported: use a plain one")
    halves = [layer for layer, ab in layers.items() if len(ab) < 2]
    if halves or not layers:
        raise UserError(f"{file.label}: incomplete or damaged: "
                        + (f"{some(halves)} has one of its two tensors only" if halves else "it has no layers")
                        + "; get the file again")
    quantised = file.quantised(name for ab in layers.values() for name in ab.values())
    if quantised:
        raise UserError(f"{file.label}: quantised, which is not supported: {some(quantised)}; use a plain one")
    return layers


def alphas_of(file):
    """Return {flat name of a layer: alpha}, and under a part's name, where its metadata tell, that of its layers."""
    try:
        stated = json.loads(file.metadata.get(METADATA, "{}"))
        found = {part: number(stated[key]) for part in PREFIXES if (key := f"{part}.lora_alpha") in stated.keys()}
        found |= {flat(m[1]): number(file.tensor(m[0]).tolist()) for m in map(ALPHA.fullmatch, file.shapes) if m}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UserError(f"{file.label}: the alphas in its tensors or metadata are not one number each; get the file "
                        "again") from None
    other = [key for key in stated if key.endswith((".use_rslora", ".alpha_pattern")) and stated[key]]
    if other:
        raise UserError(f"{file.label}: its metadata ask for {some(other)}, which is not supported: use a plain one")
    return found


def number(value):
    """Return a number, or that in a list of one, as a float; TypeError for anything else."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def named(parts):
    """Return {flat name: (part, name, shape)} of the modules that a LoRA can change, by every prefix that files use."""
    from torch import nn

    found = {}
    for part, prefixes in PREFIXES.items():
        for name, module in parts[part].named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                short = flat(name).removeprefix("text_model_")
                for spelling in (short, short.removesuffix("_0")) if short.endswith("to_out_0") else (short,):
                    found |= {prefix + spelling: (part, name, module.weight.shape) for prefix in prefixes}
    return found


def flat(name):
    """Return the name of a layer as kohya's trainer spells it; an attention's old processors are its own layers."""
    return name.replace(".processor.", ".").replace(".", "_")


def fits(A, B, shape):
    """Whether B A is a change of weights of `shape`; of convolutions, A has the kernel."""
    return (A.ndim > 1 and B.ndim > 1 and 0 < len(A) == B.shape[1:].numel()
            and len(B) == shape[0] and A.shape[1:].numel() == shape[1:].numel())


def refuse(path, why):
    raise UserError(f"--sd.lora {path}: does not fit this checkpoint: {why}; use one made for its version")
