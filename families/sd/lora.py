"""LoRAs, added to the weights of a model when it is loaded: W + weight (alpha / rank) B A (arXiv 2106.09685).

Where a file states that it is rank-stabilised, the scale is alpha / sqrt(rank) (arXiv 2312.03732). Four more kinds of
tensors are read: LyCORIS's convolution between A and B (arXiv 2309.14859, appendix), biases, whole changes of a weight,
and whole new weights of peft. A file with any other tensor is refused, because a part of a LoRA would be another LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from families.sd import lora_about, lora_names, lora_settings
from families.sd.lora_files import LoRA
from families.sd.lora_settings import MERGE, PEFT_PREFIX, Scales, Settings
from families.sd.wording import several, share, verb
from my.errors import UserError, note, shown, some
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

    from families.sd.lora_names import Layers, Spellings
    from families.sd.networks import Parts

OF_WEIGHT, OF_BIAS = ("up", "token_B", "diff", "weight"), ("bias", "diff_b", "weight_b")  # roles of tensors


class Change(NamedTuple):
    """What a file adds to one layer."""

    file: TensorFile
    layer: str  # flat name of the layer in the file
    part: str  # of the model
    modules: list[str]  # names in the model; where there are three, the file stacks their rows
    tensors: dict[str, str]  # {role: name of the tensor in the file}
    scale: float  # factor of B A

    def tensor(self, role: str) -> torch.Tensor:
        """Return the tensor of a role in float32."""
        return self.file.tensor(self.tensors[role]).float()


def fuse(parts: Parts, lora: LoRA) -> None:
    """Add a LoRA, times its weight, to the UNet and the text encoder in `parts`.

    Raises UserError for a file that is no LoRA, is of an unsupported kind, or does not fit this model in every layer.
    The model is then unchanged.
    """
    spellings = lora_names.named(parts)
    changes: list[Change] = []
    for file in lora.files:
        changes += changes_of(TensorFile(file, "--sd.lora"), parts, spellings)
    refuse_twice(changes)
    for change in changes:
        check(change, parts, lora.weight)
    for change in changes:  # all of them fit
        for kind in ("weight", "bias"):
            apply(change, parts, kind, lora.weight)


def changes_of(file: TensorFile, parts: Parts, spellings: Spellings) -> list[Change]:
    """Return the Changes of a file, and note in one line what a user should know about the file."""
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
            f"{share(len(unknown), len(layers), 'layer')} {verb(len(unknown), 'is', 'are')} not in this model: "
            f"{some(unknown, 2)}",
            f"if it is made for this model, {MERGE}",
        )
    layers = {layer: tensors for layer, tensors in layers.items() if layer not in unused}
    bare = [layer for layer, tensors in layers.items() if set(tensors) == {"alpha"}]
    if bare:
        raise UserError(
            f"{file.label}: {some(bare, 1)} has an alpha and no other tensor: what it scales is missing, or has "
            "names of another kind; use a file with names of one kind"
        )
    scales = Scales(stated)
    changes: list[Change] = []
    unstated: list[str] = []
    for layer, tensors in layers.items():
        part, modules = spellings[layer]
        scale = scale_of(file, layer, part, dotted[layer], tensors, alphas, scales)
        unstated += [layer] * (scale is None)
        changes.append(Change(file, layer, part, modules, tensors, 1.0 if scale is None else scale))
    tell(file, parts, stated, unstated, changes, alphas, unused)
    return changes


def scale_of(
    file: TensorFile,
    layer: str,
    part: str,
    name: str,
    tensors: Mapping[str, str],
    alphas: Mapping[str, float],
    scales: Scales,
) -> float | None:
    """Return the factor of a layer's B A: None where no alpha is stated, and 1 where the layer has no B A.

    `layer` is the flat name of the layer, `name` its name with dots. Raises UserError where two places state different
    alphas, and where the settings state another rank than the tensors have.
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


def refuse_twice(changes: Sequence[Change]) -> None:
    """Raise UserError where two names in the files of a LoRA mean the same module."""
    seen: dict[tuple[str, str], Change] = {}
    for change in changes:
        for module in change.modules:
            other = seen.setdefault((change.part, module), change)
            if other is not change:
                raise UserError(
                    f"{change.file.label}: changes a layer twice, by {some([other.layer, change.layer])}; "
                    "use a file with one LoRA in it"
                )


def tell(
    file: TensorFile,
    parts: Parts,
    stated: Mapping[str, Settings],
    unstated: Sequence[str],
    changes: Sequence[Change],
    alphas: Mapping[str, float],
    unused: Sequence[str],
) -> None:
    """Note in one line which scale is assumed, and what else a user should know about a file."""
    words: list[str | None] = [*lora_about.facts(file, parts)]
    if unused:
        words.append(
            f"{several(len(unused), 'layer')} of it {verb(len(unused), 'changes', 'change')} the text encoder's last "
            f"block, which 2.x does not use: {verb(len(unused), 'it is', 'they are')} left out"
        )
    if unstated:
        words.append(lora_about.no_alpha(file, unstated, len(changes)))
    zero = sum(alpha == 0 for alpha in alphas.values())
    if zero:
        words.append(
            f"{share(zero, len(changes), 'layer')} {verb(zero, 'has', 'have')} alpha 0, and "
            f"{verb(zero, 'adds', 'add')} nothing"
        )
    unknown = [key for found in stated.values() for key in found.unknown]
    if unknown:
        words.append(
            f"its settings state {some(unknown)}, which this version does not know: compare a picture with the one "
            "it should give"
        )
    said = [text for text in words if text]
    if said:
        note(f"{file.path.name}: {'; '.join(said)}")


def refuse(file: TensorFile, layers: Layers, parts: Parts, why: str, otherwise: str) -> NoReturn:
    """Raise UserError for a LoRA that does not fit.

    `otherwise` says what to do if the LoRA is not known to be made for another model.
    """
    made, here = lora_about.made_for(file, layers), lora_about.version(parts)
    if made and made != here:
        otherwise = f"it is made for {made}{f', this checkpoint is {here}' * bool(here)}; use one made for this model"
    raise UserError(f"{file.label}: does not fit this checkpoint: {why}; {otherwise}")


# ---------------------------------------------------------------- one layer


def target(change: Change, parts: Parts, kind: str) -> list[torch.Tensor]:
    """Return the parameter "weight" or "bias" of each module of a Change, [] where a module has none."""
    modules = [parts[change.part].get_submodule(name) for name in change.modules]
    return [] if any(getattr(m, kind, None) is None for m in modules) else [getattr(m, kind) for m in modules]


def check(change: Change, parts: Parts, weight: float) -> None:
    """Raise UserError where a Change does not fit its layer, or makes a number that is not finite."""
    for kind, roles in (("weight", OF_WEIGHT), ("bias", OF_BIAS)):
        given = [role for role in roles if role in change.tensors]
        there = target(change, parts, kind)
        if not given:
            continue
        if not there:
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


def refuse_shape(change: Change, parts: Parts, here: str, roles: Collection[str]) -> NoReturn:
    """Raise UserError for tensors whose shapes do not fit a layer; `here` says what the layer has."""
    roles = [role for role in change.tensors if role != "alpha"] if "up" in roles or "token_B" in roles else roles
    given = " and ".join(shown(list(change.file.shapes[change.tensors[role]]), 40) for role in sorted(roles)[:3])
    refuse(
        change.file,
        {change.layer: change.tensors},
        parts,
        f"{shown(change.layer)} {here} here, which {given} do not make",
        "it is made for a model of other widths: use one made for this checkpoint",
    )


def apply(change: Change, parts: Parts, kind: str, weight: float) -> None:
    """Add a Change to the "weight" or "bias" of its modules, in float32; modules on the meta device are left as is."""
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


def added(change: Change, kind: str, there: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what a Change with a weight of 1 adds to the parameters `there`, whose rows are stacked; float32."""
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


def product(change: Change, role: str) -> torch.Tensor:
    """Return the tensor that the scale multiplies: B A of a layer, (B A)^T of an embedding of words, or a bias.

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


def fits(change: Change, role: str, shape: tuple[int, ...]) -> bool:
    """Return whether the tensors of a role make a change of this shape. Of convolutions, A or T has the kernel."""
    size = {name: tuple(change.file.shapes[tensor]) for name, tensor in change.tensors.items() if name != "alpha"}
    if role == "up":
        return _fits_low_rank(size["down"], size["up"], size.get("mid"), shape)
    if role == "token_B":
        A, B = size["token_A"], size["token_B"]
        return len(A) == len(B) == len(shape) == 2 and 0 < A[0] == B[1] and (A[1], B[0]) == shape
    return math.prod(size[role]) == math.prod(shape) and size[role][:1] == shape[:1]


def _fits_low_rank(A: tuple[int, ...], B: tuple[int, ...], mid: tuple[int, ...] | None, shape: tuple[int, ...]) -> bool:
    """Return whether B A, or B T A where `mid` is the shape of T, has this shape."""
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
