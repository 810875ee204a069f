"""The state of an optimisation of a field, as a checkpoint holds it: the field's tensors and the optimizer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from my import checkpoint
from my.errors import RunError
from voxnerf.field import VoxRF

MOMENTS = {torch.optim.Adam: ("exp_avg", "exp_avg_sq"), torch.optim.Adamax: ("exp_avg", "exp_inf")}


def parameter_names(field: VoxRF) -> list[str]:
    """Return the names of a field's parameters, in the order of `field.parameters()`."""
    return [name for name, _ in field.named_parameters()]


def save(
    root: str | Path,
    step: int,
    field: VoxRF,
    optimizer: torch.optim.Optimizer,
    meta: dict[str, Any] | None = None,
    keep: int = 2,
) -> None:
    """Write the state after `step` steps, and the plain values `meta`, as a checkpoint below `root`.

    The newest `keep` checkpoints are kept. Raises RunError for a field that is not finite, and writes nothing then.
    """
    refuse_broken(field, step)
    tensors = {f"field/{name}": tensor for name, tensor in field.state_dict().items()}
    moments = checkpoint.flatten_optimizer(optimizer, parameter_names(field))
    checkpoint.save(root, step, tensors | moments, meta or {}, keep)


def refuse_broken(field: VoxRF, step: int) -> None:
    """Raise RunError where a parameter of a field has a number that is not finite; waits for the device."""
    finite = {name: torch.isfinite(parameter).all() for name, parameter in field.named_parameters()}
    bad = [name for name, whole in finite.items() if not whole]
    if bad:
        raise RunError(
            f"step {step}: the field's {', '.join(bad)} is not finite, and is not saved; a checkpoint, if there is "
            "one, is from before that; start again with smaller numbers, such as a smaller --lr"
        )


def restore(field: VoxRF, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], step: int) -> None:
    """Give a field and its optimizer the tensors of a checkpoint that was saved after `step` steps.

    Raises UserError, and changes nothing, where a tensor is missing, has another shape, or has no place. Before the
    first step an optimizer has no tensors.
    """
    own = _of_field(field, tensors)
    moments = {name: value for name, value in tensors.items() if name.startswith("optim/")}
    checkpoint.check(moments, moment_shapes(field, optimizer) if moments or step else {})
    field.load_state_dict(own)
    checkpoint.restore_optimizer(optimizer, parameter_names(field), tensors)


def restore_field(field: VoxRF, tensors: dict[str, torch.Tensor]) -> None:
    """Give a field its tensors of a checkpoint; raises UserError, and changes nothing, where they do not fit."""
    field.load_state_dict(_of_field(field, tensors))


def _of_field(field: VoxRF, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a field out of those of a checkpoint; raises UserError where they do not fit."""
    own = {name.removeprefix("field/"): value for name, value in tensors.items() if name.startswith("field/")}
    checkpoint.check(own, {name: value.shape for name, value in field.state_dict().items()})
    return own


def moment_shapes(field: VoxRF, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of the tensors that the optimizer's state has after a step, as a checkpoint names them."""
    keys = next(keys for kind, keys in MOMENTS.items() if isinstance(optimizer, kind))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in field.named_parameters():
        shapes |= {f"optim/{name}/{key}": tuple(parameter.shape) for key in keys}
        shapes[f"optim/{name}/step"] = ()
    return shapes
