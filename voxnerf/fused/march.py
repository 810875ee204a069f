"""The fused ray march for PyTorch: it computes what `voxnerf/reference.py` computes, by the kernels beside it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import warp as wp

from voxnerf.field import VoxRF
from voxnerf.fused import kernels
from voxnerf.fused.flags import flags_of
from voxnerf.fused.launch import array, interleaved, launch, n_threads, neighbours
from voxnerf.fused.memory import Recycler, Workspaces

_memory = Recycler()
_workspaces = Workspaces()


class March(NamedTuple):
    """All inputs of one march except the parameters of the field."""

    o: torch.Tensor  # (n, 3) float32, voxels: the point s world units beyond the first sample is o + s d
    d: torch.Tensor  # (n, 3) float32, voxels per world unit
    t_min: torch.Tensor  # (n,) float32, distance of the first sample, world units
    n_samples: torch.Tensor  # (n,) int32
    basis: torch.Tensor  # (n, n_basis) float32
    mask: torch.Tensor | None  # (1, 1, Z, Y, X)
    field: VoxRF
    emptiness_scale: float


def march(
    field: VoxRF,
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    t_min: torch.Tensor,
    n_samples: torch.Tensor,
    emptiness_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what n rays gather, as `voxnerf.reference.march` does; the field must be float32."""
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
    def forward(
        ctx: Any, density: torch.Tensor, color: torch.Tensor, d_scale: torch.Tensor, job: March
    ) -> tuple[torch.Tensor, ...]:
        keep = any(ctx.needs_input_grad)
        n, device = len(job.o), density.device
        channels = color.shape[1] // job.basis.shape[1]
        outputs = (density.new_empty(n, channels), *(density.new_empty(n) for _ in range(3)))
        rays, volume, (n_visits, visits) = _rays(job), volume_of(job.field), _new_visits(job, keep)
        ctx.job, ctx.marched = job, (rays, volume, n_visits, visits)
        scale = d_scale.detach().exp().view(1)
        kernel, _ = _kernels(job, channels)
        features, colors = kernels.vector(color.shape[1]), kernels.vector(channels)
        cells, blocks = flags_of(job.field, scale)
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
    def backward(ctx: Any, g_color: torch.Tensor, *g_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
        n_both = density.numel() + rows.numel()
        threads, layout = n_threads(device, n, n_both), (density.shape, color.shape, device)
        extra = [_workspaces.take(layout, n_both, device) for _ in range(threads - 1)]
        first, *others = (_Gradient.of(floats, density) for floats in (_zeros(n_both, device), *extra))
        flags = torch.full((threads, math.prod(volume.blocks)), kernels.EMPTY, dtype=torch.uint8, device=device)
        launch(
            kernel,
            neighbours(n_visits, threads),
            arguments,
            device,
            [
                [array(own.density), array(own.color, features), array(touched)]
                for own, touched in zip((first, *others), flags)
            ],
        )
        for own, touched, floats in zip(others, flags[1:], extra):
            sweep(kernels.move, volume, touched, first, own)
            _workspaces.give_back(layout, floats)
        # raw = sum_k weight_k density_k, hence sum over samples of raw dL/draw = sum over voxels of density dL/ddensity
        nothing = density.new_empty(0, 0)
        d_scale_grad = sweep(kernels.dot, volume, flags.amin(dim=0), (first.density, nothing), (density, nothing)).sum()
        color_grad = first.color.view(*color.shape[2:], -1).permute(3, 0, 1, 2)[None]
        return first.density.view_as(density), color_grad, d_scale_grad.view_as(d_scale), None


class _Gradient(NamedTuple):
    density: torch.Tensor  # (voxels,)
    color: torch.Tensor  # (voxels, features)

    @classmethod
    def of(cls, floats: torch.Tensor, density: torch.Tensor) -> _Gradient:
        """Return the gradient that lies in `floats`, that of the density before that of the colour."""
        n = density.numel()
        return cls(floats[:n], floats[n:].view(n, -1))


def _zeros(n: int, device: torch.device) -> torch.Tensor:
    """Return zeros (n,) for a gradient that is handed out.

    Recycled memory is zeroed as a whole: whoever had it before may have written anywhere.
    """
    return _memory.empty(n).zero_() if device.type == "cpu" else torch.zeros(n, device=device)


Grids = tuple[torch.Tensor, torch.Tensor]  # (voxels,) and (voxels, features)


def sweep(run: Any, volume: Any, touched: torch.Tensor, a: Grids, b: Grids) -> torch.Tensor:
    """Do `run` to the voxels of touched blocks of two pairs of grids, and return partial sums of what it returns.

    run: `move` or `dot` of `voxnerf.fused.kernels`.
    touched: (blocks,) uint8 flags, FILLED for a touched block.
    """
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


# ---------------------------------------------------------------- what the kernels are given


def rows_of(color: torch.Tensor) -> torch.Tensor:
    """Return features (1, C, Z, Y, X) as (Z*Y*X, C): a view if they are stored channels-last, else a copy."""
    return color.detach()[0].permute(1, 2, 3, 0).reshape(-1, color.shape[1]).contiguous()


def _kernels(job: March, channels: int) -> tuple[wp.Kernel, wp.Kernel]:
    return kernels.march_kernels(
        channels, job.basis.shape[1], job.field.activation, job.mask is not None, kernels.LANES[job.o.device.type]
    )


def volume_of(field: VoxRF) -> Any:
    """Return the `kernels.Volume` of a field."""
    volume = kernels.Volume()
    volume.size = wp.vec3i(*field.density.shape[:1:-1])
    volume.blocks = wp.vec3i(*(n // kernels.BLOCK + 1 for n in field.density.shape[:1:-1]))  # of n + 1 cells
    volume.step, volume.shift = field.step_size, field.density_shift
    volume.x_min, volume.threshold = kernels.x_min(field.step_size), field.ray_march_weight_thres
    return volume


def _rays(job: March) -> Any:
    """Return the `kernels.Rays` of a march."""
    rays = kernels.Rays()
    rays.o, rays.d = array(job.o, wp.vec3), array(job.d, wp.vec3)
    rays.t_min, rays.n_samples = array(job.t_min), array(job.n_samples)
    return rays


def _new_visits(job: March, keep: bool) -> tuple[torch.Tensor, Any]:
    """Return the number of visits per ray (n,), and `kernels.Visits` with room for all of them; a march fills in both.

    On a CPU the entries of a ray lie side by side, and take no more room than all samples do. On CUDA (`STRIDED`) the
    sum of the samples is not known without waiting: there, entry j of all rays comes before entry j + 1 of any, so that
    rays side by side write side by side. Without `keep` there is no room for any entry.
    """
    n, device = len(job.o), job.o.device
    lanes = kernels.LANES[device.type]
    most = job.n_samples.add(lanes - 1).div(lanes, rounding_mode="floor")
    if not keep:
        room, first, stride = 0, most, 1
    elif kernels.STRIDED[device.type]:
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


def _empty(n: int, device: torch.device) -> torch.Tensor:
    return _memory.empty(n) if device.type == "cpu" else torch.empty(n, device=device)
