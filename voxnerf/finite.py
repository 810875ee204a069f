"""Flags on the device: whether an update is finite, and what it then changes. Nothing waits for them."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(numbers: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return whether numbers () and the squares of one or more gradients have finite sums, as a flag () on the device.

    A square that is too large counts, since optimizers keep it: of float32, those of gradients above 1.8e19.
    """
    sizes = torch._foreach_norm(gradients)  # one launch for all
    return torch.isfinite(torch.stack([*numbers, *sizes]).sum())


def replace_where(finite: Tensor, old: Tensor, new: Tensor) -> None:
    """Give `old` the values of `new`, in place, where the flag `finite` () is True."""
    torch.where(finite, new, old, out=old)
