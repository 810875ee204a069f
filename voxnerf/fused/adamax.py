"""A step of Adamax in a single pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from voxnerf.fused import kernels
from voxnerf.fused.launch import array, launch, n_threads

WORTH = 256  # floats per item of `launch.MIN_ITEMS`: waking a thread takes as long as updating 100,000 of them


@torch.library.custom_op("sjc::adamax", mutates_args=("p", "m", "u"))
def update_where(
    finite: Tensor,
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    u: list[Tensor],
    rate: float,
    beta2: float,
    speeds: list[float],
    eps: float,
) -> None:
    """Do what `voxnerf.adamax.update_where` does, for float32 tensors."""
    for each_p, grad, each_m, each_u, speed in zip(p, g, m, u, speeds):
        if each_p.stride() != grad.stride():
            grad = torch.empty_like(each_p).copy_(grad)
        n, device = each_p.numel(), each_p.device
        threads = n_threads(device, n // WORTH)
        each = 1 if device.type == "cuda" else -(-n // threads)
        shares = [(0, 1, n)] if device.type == "cuda" else [(k, 1, 1) for k in range(threads)]
        rows = [array(memory(x)) for x in (each_p, grad, each_m, each_u)]
        numbers = [n, each, rate, beta2, speed, eps]
        launch(kernels.adamax_kernel(), shares, [*numbers, array(finite), *rows], device)


def memory(x: Tensor) -> Tensor:
    """Return the memory of a tensor without gaps as a row (n,), in whatever order it has."""
    return x.as_strided((x.numel(),), (1,))
