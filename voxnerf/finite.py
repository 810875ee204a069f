"""Flags on the device: whether an update is finite, and what it then changes. Nothing waits for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(numbers: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return whether numbers () and one or more gradients are finite, as a flag () on their device.

    So must be the sum of all their squares, since Adam keeps squares: in float32, that of a number above 1.8e19 is not.
    """
    sizes = torch._foreach_norm(gradients)  # one launch for all
    return torch.linalg.vector_norm(torch.stack([*numbers, *sizes])) < math.inf  # NaN is not


def replace_where(finite: Tensor, old: Tensor, new: Tensor) -> None:
    """Give `old` the values of `new`, in place, where the flag `finite` () is True."""
    torch.where(finite, new, old, out=old)
