"""The fused ray march for PyTorch: what `voxnerf/reference.py` computes, by the kernels of `voxnerf/kernels.py`.

On a CPU the rays are shared out among as many threads as PyTorch uses, each with its own gradient,
so that results do not depend on timing; on CUDA nothing waits for the device.
"""

import contextlib
import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
import warp as wp
from torch.utils.weak import WeakTensorKeyDictionary

from my.errors import no_stderr

wp.config.log_level = wp.LOG_ERROR
wp.config.use_precompiled_headers = False  # their temporary folder would warn at exit
with contextlib.nullcontext() if torch.cuda.is_available() else no_stderr():  # it regrets that there is no GPU
    wp.init()

from voxnerf import kernels  # noqa: E402  (defining kernels starts Warp)
from voxnerf.memory import Loan, Recycler, Zeros  # noqa: E402

MAX_THREADS = 8
MIN_ITEMS = 512  # a thread; waking one costs more than fewer are worth
MAX_EXTRA_GRADIENTS = 2**30  # bytes, of threads beyond the first

_mask_flags = WeakTensorKeyDictionary()  # alpha mask: flags of its cells and blocks
_memory = Recycler()
_zeros = Zeros(2 * MAX_THREADS)


class March(NamedTuple):
    """One march: everything but the parameters."""

    o: torch.Tensor  # (n, 3) float32: s world units beyond the first sample lies o + s d, in voxels
    d: torch.Tensor  # (n, 3)
    t_min: torch.Tensor  # (n,)
    n_samples: torch.Tensor  # (n,) int32
    basis: torch.Tensor  # (n, n_basis)
    mask: torch.Tensor | None  # (1, 1, Z, Y, X)
    field: object
    emptiness_scale: float


def march(field, rays_o, rays_d, t_min, n_samples, emptiness_scale):
    """As `voxnerf.reference.march`; the field is float32."""
    first = rays_o + t_min.double()[:, None] * rays_d
    o, d = (first - field.aabb[0]) * field.voxels_per_unit - 0.5, rays_d * field.voxels_per_unit
    job = March(
        o.float().contiguous(),
        d.float().contiguous(),
        t_min.float().contiguous(),
        n_samples.int().contiguous(),
        field.basis(rays_d).float().contiguous(),
        field.alpha_mask,
        field,
        float(emptiness_scale),
    )
    return _March.apply(field.density, field.color, field.d_scale, job)


class _March(torch.autograd.Function):
    @staticmethod
    def forward(ctx, density, color, d_scale, job):
        keep = any(ctx.needs_input_grad)
        n, device = len(job.o), density.device
        channels = color.shape[1] // job.basis.shape[1]
        outputs = (density.new_empty(n, channels), *(density.new_empty(n) for _ in range(3)))
        rays, volume, (n_visits, visits) = _rays(job), volume_of(job.field), _new_visits(job, keep)
        ctx.job, ctx.marched = job, (rays, volume, n_visits, visits)
        scale = d_scale.detach().exp().view(1)
        kernel, _ = _kernels(job, channels)
        features, colors = kernels.vector(color.shape[1]), kernels.vector(channels)
        cells, blocks = _flags(job, scale)
        arguments = [
            rays,
            volume,
            array(scale),
            array(density.view(-1)),
            array(rows_of(color), features),
            array(job.basis),
            array(blocks),
            array(cells),
            job.emptiness_scale,
            int(keep),
            visits,
            array(outputs[0], colors),
            *map(array, outputs[1:]),
        ]
        launch(kernel, interleaved(n, device), arguments, device)
        ctx.save_for_backward(density, color, d_scale)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_color, *g_sums):
        density, color, d_scale = ctx.saved_tensors
        job, n, device = ctx.job, len(g_color), density.device
        scale = d_scale.exp().view(1)
        _, kernel = _kernels(job, g_color.shape[1])
        features, colors = kernels.vector(color.shape[1]), kernels.vector(g_color.shape[1])
        (rays, volume, n_visits, visits), rows = ctx.marched, rows_of(color)
        arguments = [
            rays,
            volume,
            array(scale),
            array(rows, features),
            array(job.basis),
            job.emptiness_scale,
            visits,
            array(g_color.contiguous(), colors),
            *(array(g.contiguous()) for g in g_sums),
        ]
        threads = n_threads(device, n, density.numel() + rows.numel())
        grads = [_new_gradient(volume, density, rows) for _ in range(threads)]
        flags = torch.full((threads, math.prod(volume.blocks)), kernels.EMPTY, dtype=torch.uint8, device=device)
        launch(
            kernel,
            _neighbours(n_visits, threads),
            arguments,
            device,
            [[array(own.density), array(own.color, features), array(touched)] for own, touched in zip(grads, flags)],
        )
        first, touched = grads[0], flags.amin(dim=0)
        first.loan.touched = touched
        for own, own_touched in zip(grads[1:], flags[1:]):
            sweep(kernels.move, volume, own_touched, first[:2], own[:2])
            own.loan.touched = False
        # raw = sum_k weight_k density_k, hence sum over samples of raw dL/draw = sum over voxels of density dL/ddensity
        nothing = density.new_empty(0, 0)
        d_scale_grad = sweep(kernels.dot, volume, touched, (first.density, nothing), (density, nothing)).sum()
        color_grad = first.color.view(*color.shape[2:], -1).permute(3, 0, 1, 2)[None]
        return first.density.view_as(density), color_grad, d_scale_grad.view_as(d_scale), None


class Gradient(NamedTuple):
    """A gradient, zero at first."""

    density: torch.Tensor  # (voxels,)
    color: torch.Tensor  # (voxels, features)
    loan: Loan


def _new_gradient(volume, density, rows):
    n, n_both = density.numel(), density.numel() + rows.numel()

    def clear(floats, touched):
        grids = floats[:n], floats[n:].view_as(rows)
        sweep(kernels.clear, volume, touched, grids, grids)

    floats, loan = _zeros.take(tuple(volume.size), n_both, clear, density.device)
    return Gradient(floats[:n], floats[n:].view_as(rows), loan)


def sweep(run, volume, touched, a, b):
    """Do `run`, of the kernels, to pairs of grids (voxels,) and (voxels, features) in touched blocks; return sums."""
    device = touched.device
    sums = torch.empty(volume.blocks[1] * volume.blocks[2], device=device)
    grids = [array(grid.view(-1)) for pair in zip(a, b) for grid in pair]
    launch(
        kernels.sweep_kernel(run),
        interleaved(len(sums), device),
        [volume, a[1].shape[1], array(touched), *grids, array(sums)],
        device,
    )
    return sums


# ---------------------------------------------------------------- Warp's view of it


def rows_of(color):
    """Features as (Z*Y*X, C): a view, if `color` is stored channels-last."""
    return color.detach()[0].permute(1, 2, 3, 0).reshape(-1, color.shape[1]).contiguous()


def array(tensor, dtype=None):
    flat = tensor.detach().view(-1)  # restores the strides of edges of length 1
    return wp.from_torch(flat.view(tensor.shape), dtype=dtype, requires_grad=False)


def _kernels(job, channels):
    return kernels.march_kernels(
        channels, job.basis.shape[1], job.field.activation, job.mask is not None, kernels.LANES[job.o.device.type]
    )


def volume_of(field):
    volume = kernels.Volume()
    volume.size = wp.vec3i(*field.density.shape[:1:-1])
    volume.blocks = wp.vec3i(*(n // kernels.BLOCK + 1 for n in volume.size))  # of n + 1 cells
    volume.step, volume.shift = field.step_size, field.density_shift
    volume.x_min, volume.threshold = kernels.x_min(field.step_size), field.ray_march_weight_thres
    return volume


def _rays(job):
    rays = kernels.Rays()
    rays.o, rays.d = array(job.o, wp.vec3), array(job.d, wp.vec3)
    rays.t_min, rays.n_samples = array(job.t_min), array(job.n_samples)
    return rays


def _new_visits(job, keep):
    """Return (the number of visits of each ray (n,), `kernels.Visits` with room for all), to be filled in.

    On a CPU one ray lies behind another, in no more room than all samples take. On CUDA, where their sum is not known
    without waiting, entry j of all rays comes before entry j + 1, so that rays side by side write side by side.
    """
    n, device = len(job.o), job.o.device
    lanes = kernels.LANES[device.type]
    most = job.n_samples.add(lanes - 1).div(lanes, rounding_mode="floor")
    if not keep:
        room, first, stride = 0, most, 1
    elif device.type == "cuda":
        room, stride = n * (int(job.field.box_diagonal / job.field.step_size / lanes) + 2), n
        first = torch.arange(n, dtype=torch.int32, device=device)
    else:
        ends = most.cumsum(0, dtype=torch.int32)
        room, first, stride = int(ends[-1]) if n else 0, ends - most, 1
    n_visits = torch.empty(n if keep else 0, dtype=torch.int32, device=device)
    visits = kernels.Visits()
    visits.sample, visits.T = (
        array(torch.empty(room, dtype=dtype, device=device)) for dtype in (torch.int32, torch.float32)
    )
    visits.tau, visits.n, visits.first = array(_empty(room * lanes, device)), array(n_visits), array(first)
    visits.stride = stride
    return n_visits, visits


def _flags(job, scale):
    """Return uint8 flags of the cells (0 for those not worth a look; none without a mask), and those of the blocks."""
    if job.mask is not None:
        return mask_flags(job.mask)
    field = job.field
    most = block_maxima(field.density.detach()[0, 0])  # of voxels
    for axis, n in enumerate(field.density.shape[2:]):
        for side in {0, n // kernels.BLOCK}:  # blocks whose samples read zeros outside, too: but never more than half
            edge = most.select(axis, side)
            edge.copy_(torch.maximum(edge, 0.49 * edge))
    flags = block_flags(~(scale * most + field.density_shift <= kernels.x_min(field.step_size)))  # NaN is filled
    return flags.new_empty(0), flags


def mask_flags(mask):
    """Return uint8 flags of the cells and of the blocks that a mask (1, 1, Z, Y, X) lets rays see."""
    if mask not in _mask_flags:
        cells = F.max_pool3d(F.pad(mask.float(), (1,) * 6), 2, stride=1)  # (1, 1, Z+1, Y+1, X+1)
        _mask_flags[mask] = (cells > 0).byte().view(-1), block_flags(block_maxima(mask[0, 0]) > 0)
    return _mask_flags[mask]


def block_maxima(grid):
    """Return the largest of the voxels of `grid` (Z, Y, X) that the cells of each block lie between."""
    edge = kernels.BLOCK
    for axis, n in enumerate(grid.shape):
        parts = [grid.narrow(axis, 0, min(edge, n)).amax(axis, keepdim=True)]
        last = n // edge * edge - 1  # first voxel of the last block
        if last > edge:
            parts.append(grid.narrow(axis, edge - 1, last - edge + 2).unfold(axis, edge + 1, edge).amax(-1))
        if last > 0:
            parts.append(grid.narrow(axis, last, n - last).amax(axis, keepdim=True))
        grid = torch.cat(parts, dim=axis)
    return grid


def block_flags(filled):
    """Return the uint8 flags of blocks, in a row, some of them `filled` (Z, Y, X): their distance from these."""
    near, flags = filled.byte(), torch.zeros_like(filled, dtype=torch.uint8)
    for _ in range(kernels.MAX_JUMP):
        flags += 1 - near
        for axis, n in enumerate(filled.shape):
            before, after, beyond = near.narrow(axis, 0, n - 1), near.narrow(axis, 1, n - 1), near.clone()
            beyond.narrow(axis, 1, n - 1).bitwise_or_(before)
            beyond.narrow(axis, 0, n - 1).bitwise_or_(after)
            near = beyond
    return flags.view(-1)


# ---------------------------------------------------------------- threads


@functools.cache
def _pool():
    return ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="march")


def n_threads(device, n, n_floats=0):
    """Threads for a launch over n items, each but the first with `n_floats` floats of its own."""
    if device.type != "cpu":
        return 1
    affordable = 1 + MAX_EXTRA_GRADIENTS // (4 * n_floats) if n_floats else MAX_THREADS
    return max(1, min(torch.get_num_threads(), MAX_THREADS, affordable, n // MIN_ITEMS))


def _empty(n, device):
    return _memory.empty(n) if device.type == "cpu" else torch.empty(n, device=device)


def interleaved(n, device):
    """Share out n items among threads, some of everywhere to each: (first, stride, number) of each thread."""
    threads = n_threads(device, n)
    return [(k, threads, len(range(k, n, threads))) for k in range(threads)]


def _neighbours(visits, threads):
    """Share out rays by their numbers of visits (n,), neighbours to one thread: few voxels then are touched by two."""
    ends = [len(visits)]
    if threads > 1:
        so_far = visits.cumsum(0)
        inner = torch.searchsorted(so_far, so_far[-1] * torch.arange(1, threads) // threads, right=True)
        ends = [*inner.tolist(), len(visits)]
    return [(first, 1, end - first) for first, end in zip([0, *ends], ends)]


def launch(kernel, shares, arguments, device, of_share=None):
    """Run `kernel` over shares (first, stride, number) of its items side by side.

    Share k has `of_share[k]` for its last arguments. The first one runs right here, since threads wake late.
    """
    where = {"device": "cpu"}
    if device.type == "cuda":
        where = {"device": wp.device_from_torch(device), "stream": wp.stream_from_torch(device)}

    def run(k):
        first, stride, n = shares[k]
        wp.launch(kernel, n, [first, stride, *arguments, *(of_share[k] if of_share else [])], **where)

    others = [_pool().submit(run, k) for k in range(1, len(shares))]
    run(0)
    for other in others:
        other.result()
