"""Where a network is, and in which number format and order of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def half_precision(device: torch.device, wide: bool = False) -> torch.dtype:
    """Return the number format in which a large network is both exact and fast enough on a device.

    It is float16 on CUDA. For a network whose numbers leave the range of float16 (`wide`) it is bfloat16, or float32 on
    a GPU that has no bfloat16. Elsewhere it is float32: few CPUs gain from half precision, and most lose.
    """
    if device.type != "cuda":
        return torch.float32
    if not wide:
        return torch.float16
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def image_layout(device: torch.device) -> torch.memory_format:
    """Return the order in memory of pictures and weights of convolutions: channels last on CUDA, as its kernels are."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def place(net: torch.nn.Module, device: torch.device, dtype: torch.dtype | None = None, away: bool = False) -> None:
    """Make a network ready for evaluation on a device, in `dtype` and in `image_layout`; None keeps its dtype.

    It is moved there, or, with `away`, it stays where it is until it is `visiting`.
    """
    net.eval().requires_grad_(False)
    layout, there = image_layout(device), None if away else device
    to: Any = torch.nn.Module.to  # that of diffusers warns, of nothing; and no declared type takes all three
    to(net, there, dtype, memory_format=layout)


def visiting(device: torch.device, *nets: torch.nn.Module) -> AbstractContextManager[None]:
    """Have networks on a device while the block runs: copies of their tensors, which are then dropped.

    Nothing is copied back, and nothing waits for CUDA. A tensor that is there already is not copied.
    """
    return replaced(
        nets, lambda x: x if x.device == device else x.detach().to(device, non_blocking=device.type == "cuda")
    )


def widened(*nets: torch.nn.Module) -> AbstractContextManager[None]:
    """Have networks in float32 while the block runs: copies of their tensors, which are then dropped."""
    return replaced(nets, lambda x: x.detach().float() if x.is_floating_point() and x.dtype != torch.float32 else x)


@contextlib.contextmanager
def replaced(nets: Sequence[torch.nn.Module], other: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Have `other(x)` in the place of each parameter and buffer x of networks while the block runs."""
    own = [
        (module, name, x)
        for net in nets
        for module in net.modules()
        for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    try:
        for module, name, x in own:
            there = other(x)
            if there is not x and isinstance(x, torch.nn.Parameter):
                there = torch.nn.Parameter(there, requires_grad=False)
            setattr(module, name, there)
        yield
    finally:
        for module, name, x in own:
            setattr(module, name, x)
