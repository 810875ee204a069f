"""The ray march in plain PyTorch: the readable reference, any dtype, wherever PyTorch runs.

It masks, samples with `grid_sample` and scatters. `voxnerf/fused/` computes the same several times faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from voxnerf.field import VoxRF

Gathered = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # what `march` returns
MarchFunction = Callable[[VoxRF, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], Gathered]


def march(
    field: VoxRF,
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    t_min: torch.Tensor,
    n_samples: torch.Tensor,
    emptiness_scale: float,
) -> Gathered:
    """Return what n rays gather inside the field's box; see `voxnerf.render` for the equations.

    Args:
        rays_o, rays_d: (n, 3) world-space origins and unit directions.
        t_min, n_samples: (n,) distance of the first sample, world units, and number of samples.
        emptiness_scale: s.
    Returns:
        sum_i w_i c_i (n, C), sum_i w_i t_i (n,), sum_i w_i (n,), sum_i log(1 + s w_i) (n,).
    """
    t, points, inside = sample_points(field, rays_o, rays_d, t_min, n_samples)
    w = sample_weights(field, points, inside)
    lit = inside & (w.detach() > field.ray_march_weight_thres)  # (n, k)
    c = points.new_zeros(*t.shape, field.c)
    c[lit] = field.features(points[lit], rays_d.to(t)[:, None].expand_as(points)[lit])
    return (
        (w[..., None] * c).sum(dim=1),
        (w * t).sum(dim=1),
        w.sum(dim=1),
        torch.log1p(emptiness_scale * w).sum(dim=1),
    )


def sample_points(
    field: VoxRF, rays_o: torch.Tensor, rays_d: torch.Tensor, t_min: torch.Tensor, n_samples: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the samples of n rays, k per ray: distances (n, k), points (n, k, 3), and which of them count (n, k) bool.

    A sample counts if it lies in the box and the field's mask, if there is one, does not hide it.
    """
    i = torch.arange(max(1, int(n_samples.amax())), dtype=t_min.dtype, device=t_min.device)
    t = t_min[:, None] + i * field.step_size  # (n, k)
    points = rays_o.to(t)[:, None] + rays_d.to(t)[:, None] * t[..., None]  # (n, k, 3)
    inside = i < n_samples[:, None]
    if field.alpha_mask is not None:
        inside[inside.clone()] = field.occupied(points[inside])
    return t, points, inside


def sample_weights(field: VoxRF, points: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return compositing weights (n, k) of samples at `points` (n, k, 3), 0 where not `inside` (n, k)."""
    sigma = points.new_zeros(inside.shape)
    sigma[inside] = field.sigma(points[inside])
    return weights_from_thickness(sigma * field.step_size)


def weights_from_thickness(tau: torch.Tensor) -> torch.Tensor:
    """Return compositing weights w (n, k) of optical thickness tau (n, k) >= 0, front to back."""
    T = torch.exp(tau - tau.cumsum(dim=1))  # (n, k); sums, since cumprod's backward is slow
    return T * -torch.expm1(-tau)
