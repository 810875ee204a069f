"""Randomness as a function of (seed, step, stream), so that a resumed run draws what it would."""

import hashlib
import operator

import numpy as np


def mix(seed, step, stream):
    """64 bits that depend on every bit of the integers `seed`, `step` and the name `stream`."""
    triple = f"{operator.index(seed)}/{operator.index(step)}/{stream}"
    return int.from_bytes(hashlib.blake2b(triple.encode(), digest_size=8).digest(), "big")


def numpy_rng(seed, step, stream):
    """A fresh np.random.Generator for `stream`, such as "camera", at `step`."""
    return np.random.default_rng(mix(seed, step, stream))


def torch_rng(seed, step, stream):
    """A fresh torch.Generator for `stream`, such as "noise", at `step`.

    Always on the CPU, so that draws agree on every device: draw there, then move the tensor.
    PyTorch's CPU engine uses the low 32 bits of its seed.
    """
    import torch

    return torch.Generator().manual_seed(mix(seed, step, stream))


def torch_noise(seed, items, stream):
    """A function x (B, ...) -> unit noise like x, of which each of B `items` gets its own, whatever the others are.

    items: integers, one a row of x; a row's next noise depends on (seed, item, stream) and how often it was asked for.
    """
    import torch

    rngs = [torch_rng(seed, item, stream) for item in items]
    return lambda x: torch.stack([torch.randn(x.shape[1:], generator=rng, dtype=x.dtype) for rng in rngs]).to(x.device)
