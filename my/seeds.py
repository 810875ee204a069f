"""Randomness as a function of (seed, step, stream), so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from my.exact import exact_device

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


# ---------------------------------------------------------------- noise, made on the device that needs it

WORD = 2**32 - 1  # the bits of one of Philox's words, which are held in int64
PHILOX_M = 0xD2511F53, 0xCD9E8D57
PHILOX_W = 0x9E3779B9, 0xBB67AE85
PHILOX_ROUNDS = 10


def philox(counter: Sequence[torch.Tensor], key: int) -> list[torch.Tensor]:
    """Return the four words of Philox4x32-10 for a counter of four words and a key of 64 bits.

    The words are int64 tensors with values below 2^32, whose shapes broadcast. Source: Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3".
    """
    c, k = list(counter), [key & WORD, key >> 32]
    for _ in range(PHILOX_ROUNDS):
        products = [c[0] * PHILOX_M[0], c[2] * PHILOX_M[1]]  # int64 wraps round, and keeps all 64 bits
        (high0, high1), (low0, low1) = [[p >> 32 & WORD for p in products], [p & WORD for p in products]]
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(word + w) & WORD for word, w in zip(k, PHILOX_W)]
    return c


def normal(
    shape: Sequence[int], seed: int, items: torch.Tensor, stream: str, draw: int = 0, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return unit normal noise (n, *shape) for n `items`, such as steps, on their device.

    The noise of an item depends on (seed, item, stream, draw), and not on the device nor on the other items. It is that
    of Philox4x32-10 and the Box-Muller transform, computed in float64 on `exact_device`: two devices give the same
    float32 numbers, but for a rare difference in the last bit.

    items: (n,) int64, none below 0.
    draw: counts what is drawn for an item.
    """
    import torch

    numel, device = math.prod(shape), items.device
    items = items.to(exact_device(device))
    i = torch.arange(-(-numel // 4), device=items.device)
    item = items[:, None]
    words = philox((i, torch.full_like(i[:1], draw), item & WORD, item >> 32), mix(seed, 0, stream))
    u = [(word.double() + 0.5) / 2**32 for word in words]  # uniform in (0, 1)
    pairs = []
    for first, second in (u[:2], u[2:]):
        radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
        pairs += [radius * angle.cos(), radius * angle.sin()]
    noise = torch.stack(pairs, dim=-1).flatten(1)[:, :numel]
    return noise.reshape(len(items), *shape).to(dtype or torch.float32).to(device)


def torch_noise(seed: int, items: Iterable[int], stream: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function x (B, ...) -> unit noise like x, in which the noise of a row does not depend on the other rows.

    items: B integers, one per row of x. The next noise of a row depends on (seed, item, stream), and on how often the
    function was called. See `normal`.
    """
    import torch

    rows, draws = torch.tensor(list(items)), itertools.count()

    def randn(x: torch.Tensor) -> torch.Tensor:
        return normal(x.shape[1:], seed, rows.to(x.device), stream, next(draws), x.dtype)

    return randn
