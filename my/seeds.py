"""Randomness as a function of (seed, step, stream), so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def mix(seed: int, step: int, stream: str) -> int:
    """Return 64 bits that depend on every bit of the integers `seed`, `step` and the name `stream`."""
    triple = f"{operator.index(seed)}/{operator.index(step)}/{stream}"
    return int.from_bytes(hashlib.blake2b(triple.encode(), digest_size=8).digest(), "big")


def numpy_rng(seed: int, step: int, stream: str) -> np.random.Generator:
    """Return a fresh np.random.Generator for `stream`, such as "camera", at `step`."""
    return np.random.default_rng(mix(seed, step, stream))


def torch_rng(seed: int, step: int, stream: str) -> torch.Generator:
    """Return a fresh torch.Generator for `stream`, such as "noise", at `step`.

    It is always on the CPU, so that draws agree on every device: draw there, then move the tensor.
    PyTorch's CPU engine uses the low 32 bits of its seed.
    """
    import torch

    return torch.Generator().manual_seed(mix(seed, step, stream))


def torch_noise(seed: int, items: Iterable[int], stream: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function x (B, ...) -> unit noise like x, in which the noise of a row does not depend on the other rows.

    items: B integers, one per row of x. The next noise of a row depends on (seed, item, stream), and on how often the
    function was called.
    """
    import torch

    rngs = [torch_rng(seed, item, stream) for item in items]
    return lambda x: torch.stack([torch.randn(x.shape[1:], generator=rng, dtype=x.dtype) for rng in rngs]).to(x.device)
