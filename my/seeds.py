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
