"""Starting Warp, handing tensors to it, and running its kernels on several threads.

On a CPU the items of a launch are divided among as many threads as PyTorch uses, at most `MAX_THREADS`. How they are
divided depends only on the numbers of items and of threads, so timing does not change any result. On CUDA a launch is
one call, which does not wait for the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import warp as wp

from my.errors import no_stderr
from voxnerf.fused import kernels

MAX_THREADS = 8
MIN_ITEMS = 512  # per thread: waking a thread costs more time than it saves on fewer
MAX_EXTRA_GRADIENTS = 2**30  # bytes: memory for the gradients of all threads but the first

Share = tuple[int, int, int]  # first item, distance to the next one, number of items


@functools.cache
def start() -> None:
    """Configure and start Warp, once per process; importing this package does not.

    Raises what Warp raises where its library or the driver of a GPU does not work.
    """
    wp.config.log_level = wp.LOG_ERROR
    wp.config.use_precompiled_headers = False  # they need a temporary folder, and Python warns of it at exit
    quiet = contextlib.nullcontext() if torch.cuda.is_available() else no_stderr()  # Warp complains of a missing GPU
    with quiet:
        wp.init()


def array(tensor: torch.Tensor, dtype: Any = None) -> Any:
    """Return Warp's view of the memory of a contiguous tensor, in one row of elements, or of rows of type `dtype`."""
    start()  # every launch needs an array, so that none comes before this
    row = tensor.detach().view(-1)  # edges of length 1 may have any stride: this restores them
    row = row if dtype is None else row.view(-1, dtype._length_)
    return wp.from_torch(row, dtype=dtype, requires_grad=False, return_ctype=True)


def matrix(tensor: torch.Tensor) -> Any:
    """Return Warp's view of the memory of a contiguous tensor with two axes."""
    start()
    tensor = tensor.detach()
    return wp.from_torch(tensor.view(-1).view(tensor.shape), requires_grad=False, return_ctype=True)


@functools.lru_cache(maxsize=64)
def volume(
    shape: Sequence[int], step: float = 0.0, shift: float = 0.0, x_min: float = 0.0, threshold: float = 0.0
) -> Any:
    """Return the `kernels.Volume` of a grid of `shape` (1, C, Z, Y, X); see there for the other numbers."""
    made = kernels.Volume()
    made.size = wp.vec3i(*shape[:1:-1])
    made.blocks = wp.vec3i(*(n // kernels.BLOCK + 1 for n in shape[:1:-1]))  # of n + 1 cells
    made.step, made.shift, made.x_min, made.threshold = step, shift, x_min, threshold
    return made


def launch(
    kernel: wp.Kernel,
    shares: Sequence[Share],
    arguments: Sequence[Any],
    device: torch.device,
    of_share: Sequence[Sequence[Any]] | None = None,
) -> None:
    """Run `kernel` on all shares of its items side by side, and return when a CPU is done.

    shares: the items of each thread. The kernel gets the first two numbers of its share as its first arguments.
    arguments: the arguments that all shares have in common.
    of_share: the last arguments of each share, where they differ.
    """
    cuda = device.type == "cuda"
    where: Any = wp.device_from_torch(device) if cuda else "cpu"
    stream = wp.stream_from_torch(device) if cuda else None

    def run(k: int) -> None:
        first, stride, n = shares[k]
        inputs = [first, stride, *arguments, *(of_share[k] if of_share else [])]
        wp.launch(kernel, n, inputs, device=where, stream=stream)

    others = [_pool().submit(run, k) for k in range(1, len(shares))]
    run(0)  # on this thread, since the others take time to wake
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="march")


# ---------------------------------------------------------------- shares of threads


def n_threads(device: torch.device, n: int, n_floats: int = 0) -> int:
    """Return how many threads a launch over n items gets, if every thread but the first needs `n_floats` floats."""
    if device.type != "cpu":
        return 1
    affordable = 1 + MAX_EXTRA_GRADIENTS // (4 * n_floats) if n_floats else MAX_THREADS
    return max(1, min(torch.get_num_threads(), MAX_THREADS, affordable, n // MIN_ITEMS))


def interleaved(n: int, device: torch.device) -> list[Share]:
    """Return shares of n items: with k threads, a thread gets every k-th item."""
    threads = n_threads(device, n)
    return [(k, threads, len(range(k, n, threads))) for k in range(threads)]


def neighbours(visits: torch.Tensor, threads: int) -> list[Share]:
    """Return shares of rays with about equal sums of `visits` (n,), the work per ray.

    The rays of a share are neighbours, so that two threads touch few voxels in common.
    """
    ends = [len(visits)]
    if threads > 1:
        so_far = visits.cumsum(0)
        inner = torch.searchsorted(so_far, so_far[-1] * torch.arange(1, threads) // threads, right=True)
        ends = [*inner.tolist(), len(visits)]
    return [(first, 1, end - first) for first, end in zip([0, *ends], ends)]
