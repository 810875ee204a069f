"""LoRAs, fused into a model once and for all: W + weight (alpha / rank) B A (arXiv 2106.09685).

Where a file states it, the scale is alpha / sqrt(rank) (arXiv 2312.03732). Also what else of a file is one sum: the
convolution between A and B of LyCORIS (arXiv 2309.14859, appendix), biases, whole changes, and peft's whole weights.
Every tensor of a file is accounted for, or the file refused: half a LoRA would be another one unasked.
"""

import math
from typing import NamedTuple

from families.sd import lora_about, lora_files, lora_names, lora_settings
from families.sd.lora_settings import MERGE, PEFT_PREFIX
from my.errors import UserError, note, shown, some
from my.tensor_file import TensorFile

OF_WEIGHT, OF_BIAS = ("up", "token_B", "diff", "weight"), ("bias", "diff_b", "weight_b")


class Change(NamedTuple):
    """What a file adds to a layer: `tensors` are its names by role, `modules` the layer's, stacked by rows."""

    file: TensorFile
    layer: str  # its flat name in the file
    part: str
    modules: list[str]
    tensors: dict[str, str]
    scale: float

    def tensor(self, role):
        return self.file.tensor(self.tensors[role]).float()


def fuse(parts, path, weight):
    """Add `weight` times the LoRA in a file or a folder to the UNet and the text encoder in `parts`.

    Raises UserError for what is no LoRA, is of another kind, or does not fit this model as a whole.
    """
    spellings, changes = lora_names.named(parts), []
    for file in lora_files.files_of(path):
        changes += changes_of(TensorFile(file, "--sd.lora"), parts, spellings)
    refuse_twice(changes)
    for change in changes:
        check(change, parts, weight)
    for change in changes:  # only once all are known to fit
        for kind in ("weight", "bias"):
            apply(change, parts, kind, weight)


def changes_of(file, parts, spellings):
    """Return the Changes of a file, and tell in one line what a user should know of it."""
    stated = lora_settings.read(file)
    layers, dotted = lora_names.read(file, whole=any(found.whole for found in stated.values()))
    try:
        alphas = lora_names.alphas_of(file, layers)
    except TypeError:
        raise lora_settings.damaged(file.label) from None
    unused = lora_names.of_unused_block(layers, parts, spellings)
    unknown = [layer for layer in layers if layer not in spellings and layer not in unused]
    if unknown or len(unused) == len(layers):
        unknown = unknown or unused
        refuse(
            file,
            layers,
            parts,
            f"{len(unknown)} of its {len(layers)} layers are not in this model: {some(unknown, 2)}",
            f"if it is made for this model, {MERGE}",
        )
    layers = {layer: tensors for layer, tensors in layers.items() if layer not in unused}
    bare = [layer for layer, tensors in layers.items() if set(tensors) == {"alpha"}]
    if bare:
        raise UserError(
            f"{file.label}: {some(bare, 1)} has an alpha alone: what it scales is missing, or has another "
            "kind of name; use a file with names of one kind"
        )
    scales = lora_settings.Scales(stated)
    changes, unstated = [], []
    for layer, tensors in layers.items():
        part, modules = spellings[layer]
        scale = scale_of(file, layer, part, dotted[layer], tensors, alphas, scales)
        unstated += [layer] * (scale is None)
        changes.append(Change(file, layer, part, modules, tensors, 1.0 if scale is None else scale))
    tell(file, parts, stated, unstated, changes, alphas, unused)
    return changes


def scale_of(file, layer, part, name, tensors, alphas, scales):
    """Return what a layer's B A is times, or None where nothing states its alpha, or it has no B A.

    Raises UserError where two places state different alphas, or another rank than the tensors have.
    """
    name = name.removeprefix(PEFT_PREFIX).removeprefix(f"{part}.")
    down = tensors.get("down", tensors.get("token_A"))
    alpha, rank = scales.alpha(part, name)
    if down is None:
        return 1.0
    has = file.shapes[down][0] if file.shapes[down] else 0
    if rank is not None and rank != has:
        raise UserError(
            f"{file.label}: its settings state rank {rank:g} of {shown(layer)}, whose tensors have rank "
            f"{has}: they are of another file; get both again"
        )
    tensor = alphas.get(layer)
    if None not in (tensor, alpha) and tensor != alpha:
        raise UserError(
            f"{file.label}: states two alphas of {shown(layer)}, {tensor:g} in a tensor and {alpha:g} in "
            "its settings; get the file again"
        )
    alpha = alpha if tensor is None else tensor
    return None if alpha is None else alpha / max(1.0, scales.divisor(part, has))


def refuse_twice(changes):
    """Raise UserError for a module that two names in a LoRA's files mean."""
    seen = {}
    for change in changes:
        for module in change.modules:
            other = seen.setdefault((change.part, module), change)
            if other is not change:
                raise UserError(
                    f"{change.file.label}: changes a layer twice, by {some([other.layer, change.layer])}; "
                    "use a file with one LoRA in it"
                )


def tell(file, parts, stated, unstated, changes, alphas, unused):
    """Print in one line what is taken for want of a statement, and what else a user should know of a file."""
    words, zero = lora_about.facts(file, parts), sum(alpha == 0 for alpha in alphas.values())
    words += (
        [f"{len(unused)} layers of it are of the text encoder's last block, which 2.x does not use: they are left out"]
        if unused
        else []
    )
    words += [lora_about.no_alpha(file, unstated, len(changes))] if unstated else []
    words += [f"alpha is 0 in {zero} of its {len(changes)} layers: they add nothing"] if zero else []
    unknown = [key for found in stated.values() for key in found.unknown]
    words += (
        [
            f"its settings state {some(unknown)}, which this version does not know: compare a picture with the one "
            "it should give"
        ]
        if unknown
        else []
    )
    words = [text for text in words if text]
    if words:
        note(f"{file.path.name}: {'; '.join(words)}")


def refuse(file, layers, parts, why, otherwise):
    """Raise UserError for a LoRA that does not fit: `otherwise` is what to do where it is made for this version."""
    made, here = lora_about.made_for(file, layers), lora_about.version(parts)
    if made and made != here:
        otherwise = f"it is made for {made}{f', this checkpoint is {here}' * bool(here)}; use one made for this model"
    raise UserError(f"{file.label}: does not fit this checkpoint: {why}; {otherwise}")


# ---------------------------------------------------------------- one layer


def target(change, parts, kind):
    """Return the parameters, "weight" or "bias", of a Change's modules; each None where a module has none."""
    return [getattr(parts[change.part].get_submodule(name), kind, None) for name in change.modules]


def check(change, parts, weight):
    """Raise UserError where a Change does not fit its layer, or adds what is not finite."""
    for kind, roles in (("weight", OF_WEIGHT), ("bias", OF_BIAS)):
        given = [role for role in roles if role in change.tensors]
        there = target(change, parts, kind)
        if not given:
            continue
        if None in there:
            refuse_shape(change, parts, "has no bias", given)
        shape = (sum(len(t) for t in there), *there[0].shape[1:])
        for role in given:
            if not fits(change, role, shape):
                refuse_shape(change, parts, f"is {shown(list(shape))}", given)
        if not (weight * added(change, kind, there)).to(there[0].dtype).isfinite().all():
            raise UserError(
                f"{change.file.label}: what it adds to {shown(change.layer)} is not finite, with weight "
                f"{weight:g}, scale {change.scale:g} and the numbers in the file; get the file again, or "
                "give another weight"
            )


def refuse_shape(change, parts, here, roles):
    """Raise UserError for tensors that make no change of a layer, which `here` describes."""
    roles = [role for role in change.tensors if role != "alpha"] if "up" in roles or "token_B" in roles else roles
    given = " and ".join(shown(list(change.file.shapes[change.tensors[role]]), 40) for role in sorted(roles)[:3])
    refuse(
        change.file,
        {change.layer: change.tensors},
        parts,
        f"{shown(change.layer)} {here} here, which {given} do not make",
        "it is made for a model of other widths: use one made for this checkpoint",
    )


def apply(change, parts, kind, weight):
    """Add to the weight or the bias of a Change's modules, in float32; nothing to those without memory."""
    import torch

    if not set(OF_WEIGHT if kind == "weight" else OF_BIAS) & set(change.tensors):
        return
    there = target(change, parts, kind)
    if there[0].is_meta:
        return
    with torch.no_grad():
        addition = weight * added(change, kind, there)
        for parameter, rows in zip(there, addition.split([len(parameter) for parameter in there])):
            parameter.data = (parameter.float() + rows.to(parameter.device)).to(parameter.dtype)


def added(change, kind, there):
    """Return what a Change adds, with a weight of 1, to the parameters `there`, stacked by rows; float32."""
    import torch

    shape = (sum(len(t) for t in there), *there[0].shape[1:])
    scaled, diff, whole = (("up", "token_B"), *OF_WEIGHT[2:]) if kind == "weight" else (("bias",), *OF_BIAS[1:])
    total = torch.zeros(shape)
    for role in scaled:
        if role in change.tensors:
            total += change.scale * product(change, role).reshape(shape)
    if diff in change.tensors:
        total += change.tensor(diff).reshape(shape)
    if whole in change.tensors:
        before = 0 if there[0].is_meta else torch.cat([t.detach().float().cpu() for t in there])
        total += change.tensor(whole).reshape(shape) - before
    return total


def product(change, role):
    """Return what the scale multiplies: B A, a bias, or (B A)^T of an embedding, whose rows are words.

    With a convolution T between B and A it is sum_pq B[o, p] T[p, q, h, w] A[q, i].
    """
    import torch

    if role == "bias":
        return change.tensor("bias")
    if role == "token_B":
        return (change.tensor("token_B") @ change.tensor("token_A")).T
    A, B = (change.tensor(role).flatten(1) for role in ("down", "up"))
    if "mid" not in change.tensors:
        return B @ A
    return torch.einsum("op,pqhw,qi->oihw", B, change.tensor("mid"), A)


def fits(change, role, shape):
    """Whether the tensors of a role are a change of weights of `shape`; of convolutions, A or T has the kernel."""
    size = {name: tuple(change.file.shapes[tensor]) for name, tensor in change.tensors.items() if name != "alpha"}
    if role == "up":
        return _fits_low_rank(size["down"], size["up"], size.get("mid"), shape)
    if role == "token_B":
        A, B = size["token_A"], size["token_B"]
        return len(A) == len(B) == len(shape) == 2 and 0 < A[0] == B[1] and (A[1], B[0]) == shape
    return math.prod(size[role]) == math.prod(shape) and size[role][:1] == shape[:1]


def _fits_low_rank(A, B, mid, shape):
    if len(A) < 2 or len(B) < 2 or len(shape) < 2 or B[0] != shape[0]:
        return False
    if mid is None:
        return 0 < A[0] == math.prod(B[1:]) and math.prod(A[1:]) == math.prod(shape[1:])
    return (
        len(mid) == len(shape) == 4
        and mid[:2] == (math.prod(B[1:]), A[0])
        and math.prod(A[1:]) == shape[1]
        and mid[2:] == shape[2:]
        and 0 < max(mid[:2]) <= max(shape[:2])
    )
