"""The fused ray march for PyTorch: it computes what `voxnerf/reference.py` computes, by the kernels beside it.

It is a registered operator, `sjc::march`: it has a gradient, and a shape that is known without running it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import warp as wp
from torch import Tensor

from voxnerf.field import VoxRF
from voxnerf.fused import kernels
from voxnerf.fused.flags import flags_of, n_blocks
from voxnerf.fused.launch import array, interleaved, launch, matrix, n_threads, neighbours, volume
from voxnerf.fused.memory import Recycler, Workspaces
from voxnerf.rays import Rays

SUMS_BITS = 62  # bits that a sum of whole numbers may fill, of the 63 of an int64
MOST_EXPONENT = 120  # of a unit, a float32

_memory = Recycler()
_workspaces = Workspaces()


def march(field: VoxRF, rays: Rays, emptiness_scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what n rays gather, as `voxnerf.reference.march` does; the field must be float32.

    Where `torch.use_deterministic_algorithms` is on, and on a GPU, the gradients are sums of whole numbers: they do not
    depend on the order in which threads add.
    """
    cells, blocks = flags_of(field)
    parameters = field.density, field.color, field.d_scale
    lanes = kernels.LANES[field.density.device.type]
    basis = field.basis(rays.d) if field.view_dependent else rays.t_min.new_empty(0, 1)
    out = torch.ops.sjc.march(
        *parameters,
        rays.start.float().contiguous(),
        rays.slope.float().contiguous(),
        rays.t_min.float().contiguous(),
        rays.n_samples,
        basis.float().contiguous(),
        cells,
        blocks,
        field.step_size,
        field.density_shift,
        field.ray_march_weight_thres,
        field.activation,
        float(emptiness_scale),
        int(field.box_diagonal / field.step_size / lanes) + 2 if _needs_grad(parameters) else 0,
        torch.are_deterministic_algorithms_enabled() and field.density.is_cuda,
    )
    return out[:4]


def _needs_grad(parameters: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)


# Below, n is the number of rays, C that of channels, F that of features of a voxel, B that of factors of a direction.
# A visit is a stretch of samples of a ray that mattered: `march` lists them, and `march_backward` walks the list.


@torch.library.custom_op("sjc::march", mutates_args=())
def _march(
    density: Tensor,  # (1, 1, Z, Y, X)
    color: Tensor,  # (1, F, Z, Y, X)
    d_scale: Tensor,  # ()
    o: Tensor,  # (n, 3) voxels: the point s world units beyond the first sample is o + s d
    d: Tensor,  # (n, 3) voxels per world unit
    t_min: Tensor,  # (n,) distance of the first sample, world units
    n_samples: Tensor,  # (n,) int32
    basis: Tensor,  # (n, B), or (0, 1) for the factor 1 in all directions
    cells: Tensor,  # flags, see `flags_of`
    blocks: Tensor,
    step: float,
    shift: float,
    threshold: float,
    activation: str,
    emptiness_scale: float,
    room: int,  # for the visits of a ray; 0 lists none
    exact: bool,  # whether the gradients are to be sums of whole numbers
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return colour (n, C), depth (n,), opacity (n,), emptiness (n,); and of visits: number (n,), sample, T, tau."""
    device, n = density.device, len(o)
    outputs = _outputs(color, o, basis, room)
    gathered, (n_visits, sample, T, tau) = outputs[:4], outputs[4:]
    channels = gathered[0].shape[1]
    kernel = kernels.march_kernel(channels, basis.shape[1], activation, len(cells) > 0, _lanes(device))
    arguments = [
        array(o, wp.vec3),
        array(d, wp.vec3),
        array(t_min),
        array(n_samples),
        volume(density.shape, step, shift, kernels.x_min(step), threshold),
        array(d_scale),
        array(density),
        array(rows_of(color), kernels.vector(color.shape[1])),
        matrix(basis),
        array(blocks),
        array(cells),
        emptiness_scale,
        int(room > 0),
        *_strides(n, room, device),
        *map(array, (n_visits, sample, T, tau)),
        array(gathered[0], kernels.vector(channels)),
        *map(array, gathered[1:]),
    ]
    launch(kernel, interleaved(n, device), arguments, device)
    return outputs


@_march.register_fake
def _(density: Tensor, color: Tensor, d_scale: Tensor, o: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(color, o, others[3], others[-2])


def _outputs(
    color: Tensor, o: Tensor, basis: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return room for all that `_march` returns."""
    n, device = len(o), o.device
    n_visits, n_entries = n if room else 0, n * room
    return (
        color.new_empty(n, color.shape[1] // basis.shape[1]),
        color.new_empty(n),
        color.new_empty(n),
        color.new_empty(n),
        torch.empty(n_visits, dtype=torch.int32, device=device),
        torch.empty(n_entries, dtype=torch.int32, device=device),
        torch.empty(n_entries, device=device),
        _empty(n_entries * _lanes(device), device),
    )


@torch.library.custom_op("sjc::march_backward", mutates_args=())
def _march_backward(
    g_color: Tensor,
    g_depth: Tensor,
    g_opacity: Tensor,
    g_emptiness: Tensor,
    density: Tensor,
    color: Tensor,
    d_scale: Tensor,
    o: Tensor,
    d: Tensor,
    t_min: Tensor,
    basis: Tensor,
    n_visits: Tensor,
    sample: Tensor,
    T: Tensor,
    tau: Tensor,
    step: float,
    shift: float,
    threshold: float,
    activation: str,
    emptiness_scale: float,
    room: int,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of density, color and d_scale."""
    device, n, rows = density.device, len(o), rows_of(color)
    features, colors = kernels.vector(rows.shape[1]), kernels.vector(g_color.shape[1])
    kernel = kernels.march_backward_kernel(g_color.shape[1], basis.shape[1], activation, _lanes(device), exact)
    grid = volume(density.shape, step, shift, kernels.x_min(step), threshold)
    gradients = g_color, g_depth, g_opacity, g_emptiness
    units = (
        _units(*gradients, color, d_scale, t_min, n_visits, basis, step, activation, emptiness_scale, room)
        if exact
        else tau
    )
    arguments = [
        array(o, wp.vec3),
        array(d, wp.vec3),
        array(t_min),
        grid,
        array(d_scale),
        array(rows, features),
        matrix(basis),
        emptiness_scale,
        *_strides(n, room, device),
        *map(array, (n_visits, sample, T, tau)),
        array(g_color, colors),
        *map(array, gradients[1:]),
        array(units),
    ]
    n_both = density.numel() + rows.numel()
    threads, layout = 1 if exact else n_threads(device, n, n_both), (density.shape, color.shape, device)
    extra = [_workspaces.take(layout, n_both, device) for _ in range(threads - 1)]
    others = [_Gradient.of(floats, density) for floats in extra]
    number = torch.int64 if exact else torch.float32
    first = _Gradient(_zeros(density.numel(), device, number), _zeros(rows.numel(), device, number).view(rows.shape))
    flags = torch.full((threads, n_blocks(density)), kernels.EMPTY, dtype=torch.uint8, device=device)
    launch(
        kernel,
        neighbours(n_visits, threads),
        arguments,
        device,
        [
            [array(own.density), array(own.color, None if exact else features), array(touched)]
            for own, touched in zip((first, *others), flags)
        ],
    )
    for own, touched, floats in zip(others, flags[1:], extra):
        sweep(kernels.move, grid, touched, first, own)
        _workspaces.give_back(layout, floats)
    if exact:
        first = _Gradient(first.density / units[0], first.color / units[1])
    # raw = sum_k weight_k density_k, hence sum over samples of raw dL/draw = sum over voxels of density dL/ddensity
    nothing = density.new_empty(0, 0)
    touched = flags[0] if threads == 1 else flags.amin(dim=0)
    d_scale_grad = sweep(kernels.dot, grid, touched, (first.density, nothing), (density, nothing)).sum()
    return first.density.view_as(density), grid_of(first.color, color), d_scale_grad.view_as(d_scale)


@_march_backward.register_fake
def _(
    g_color: Tensor,
    g_depth: Tensor,
    g_opacity: Tensor,
    g_emptiness: Tensor,
    density: Tensor,
    color: Tensor,
    d_scale: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    voxels = density.new_empty(density.numel(), color.shape[1])
    return torch.empty_like(density), grid_of(voxels, color), torch.empty_like(d_scale)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep for the backward pass what it needs of a march."""
    density, color, d_scale, o, d, t_min, _, basis, _, _, *numbers = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(density, color, d_scale, o, d, t_min, basis, *output[4:])
    ctx.numbers = numbers


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the inputs of a march, from those of what it gathered; None where nobody asked for it."""
    density, color, *_ = saved = ctx.saved_tensors
    n, n_basis = len(saved[3]), saved[6].shape[1]
    shapes = [(n, color.shape[1] // n_basis), (n,), (n,), (n,)]
    given = [density.new_zeros(s) if g is None else g.contiguous() for g, s in zip(gradients, shapes)]
    return *torch.ops.sjc.march_backward(*given, *saved, *ctx.numbers), *[None] * 14


_march.register_autograd(_backward, setup_context=_keep)


# ---------------------------------------------------------------- gradients


class _Gradient(NamedTuple):
    density: Tensor  # (voxels,)
    color: Tensor  # (voxels, features)

    @classmethod
    def of(cls, floats: Tensor, density: Tensor) -> _Gradient:
        """Return the gradient that lies in `floats`, that of the density before that of the colour."""
        n = density.numel()
        return cls(floats[:n], floats[n:].view(n, -1))


def _units(
    g_color: Tensor,
    g_depth: Tensor,
    g_opacity: Tensor,
    g_emptiness: Tensor,
    color: Tensor,
    d_scale: Tensor,
    t_min: Tensor,
    n_visits: Tensor,
    basis: Tensor,
    step: float,
    activation: str,
    emptiness_scale: float,
    room: int,
) -> Tensor:
    """Return the units (2,) of whole numbers for the gradients of density and colour: powers of 2.

    With them, no sum exceeds SUMS_BITS bits: each addend has a bound, and their number too. With h as in
    `voxnerf/fused/kernels.py`, an addend of the density is at most 2 max|h| step exp(d_scale), for the weights of a ray
    have a sum of at most 1.
    """
    n_samples = room * _lanes(color.device)
    most_basis = basis.abs().amax() if len(basis) else basis.new_ones(())
    most_color = color.abs().amax() * most_basis * basis.shape[1] if activation == "raw" else basis.new_ones(())
    each_color = g_color.abs().amax()
    far = torch.where(n_visits > 0, t_min, 0).amax() + n_samples * step  # a ray that misses may have any t_min
    h = g_opacity.abs().amax() + g_depth.abs().amax() * far + g_emptiness.abs().amax() * emptiness_scale
    h = h + g_color.shape[1] * each_color * most_color
    bounds = torch.stack([2 * h * step * d_scale.exp(), each_color * most_basis])
    bits = SUMS_BITS - (n_samples * max(1, len(t_min)) - 1).bit_length()
    units = torch.exp2((bits - bounds.log2().ceil()).clamp(-MOST_EXPONENT, MOST_EXPONENT))
    return torch.where(bounds.isfinite(), units, 1.0)


def _zeros(n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros (n,) for a gradient that is handed out.

    Recycled memory is zeroed as a whole: whoever had it before may have written anywhere.
    """
    if device.type == "cpu" and dtype == torch.float32:
        return _memory.empty(n).zero_()
    return torch.zeros(n, dtype=dtype, device=device)


Grids = tuple[Tensor, Tensor]  # (voxels,) and (voxels, features)


def sweep(run: Any, grid: Any, touched: Tensor, a: Grids, b: Grids) -> Tensor:
    """Do `run` to the voxels of touched blocks of two pairs of grids, and return partial sums of what it returns.

    run: `move` or `dot` of `voxnerf.fused.kernels`.
    grid: the `kernels.Volume` of the grids.
    touched: (blocks,) uint8 flags, FILLED for a touched block.
    """
    sums = torch.empty(grid.blocks[1] * grid.blocks[2], device=touched.device)
    grids = [array(x) for pair in zip(a, b) for x in pair]
    launch(
        kernels.sweep_kernel(run),
        interleaved(len(sums), touched.device),
        [grid, a[1].shape[1], array(touched), *grids, array(sums)],
        touched.device,
    )
    return sums


# ---------------------------------------------------------------- layouts


def rows_of(color: Tensor) -> Tensor:
    """Return features (1, C, Z, Y, X) as (Z*Y*X, C): a view if they are stored channels-last, else a copy."""
    return color.detach()[0].permute(1, 2, 3, 0).reshape(-1, color.shape[1]).contiguous()


def grid_of(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (Z*Y*X, C) as features (1, C, Z, Y, X), shaped as `like`: a view, stored channels-last."""
    return rows.view(*like.shape[2:], -1).permute(3, 0, 1, 2)[None]


def _lanes(device: torch.device) -> int:
    return kernels.LANES[device.type]


def _strides(n: int, room: int, device: torch.device) -> tuple[int, int]:
    """Return how far apart in memory two visits of a ray are, and the first visits of two rays.

    On a CPU the visits of a ray lie side by side. On CUDA (`STRIDED`) visit j of all rays comes before visit j + 1 of
    any, so that rays side by side write side by side.
    """
    return (n, 1) if kernels.STRIDED[device.type] else (1, room)


def _empty(n: int, device: torch.device) -> Tensor:
    return _memory.empty(n) if device.type == "cpu" else torch.empty(n, device=device)
