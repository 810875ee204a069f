"""The ray march in plain PyTorch: the readable reference, any dtype, wherever PyTorch runs.

It reads every sample of every ray with `grid_sample`. `voxnerf/fused/` computes the same many times faster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from voxnerf.field import VoxRF
from voxnerf.rays import Rays

Gathered = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # what `march` returns
MarchFunction = Callable[[VoxRF, Rays, float], Gathered]


def march(field: VoxRF, rays: Rays, emptiness_scale: float) -> Gathered:
    """Return what n rays gather inside the field's box; see `voxnerf.render` for the equations.

    emptiness_scale: s.
    Returns:
        sum_i w_i c_i (n, C), sum_i w_i t_i (n,), sum_i w_i (n,), sum_i log(1 + s w_i) (n,).
    """
    t, points, inside = sample_points(field, rays)
    w = sample_weights(field, points, inside)
    lit = inside & (w.detach() > field.ray_march_weight_thres)  # (n, k)
    rays_d = rays.d.to(t)[:, None].expand_as(points)
    c = field.features(points.flatten(0, 1), rays_d.flatten(0, 1)).unflatten(0, t.shape)
    c = torch.where(lit[..., None], c, 0)
    return (
        (w[..., None] * c).sum(dim=1),
        (w * t).sum(dim=1),
        w.sum(dim=1),
        torch.log1p(emptiness_scale * w).sum(dim=1),
    )


def sample_points(field: VoxRF, rays: Rays) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the samples of n rays, k per ray: distances (n, k), points (n, k, 3), and which of them count (n, k) bool.

    A sample counts if it lies in the box and the field's mask, if there is one, does not hide it. k is the number of
    samples on the box's diagonal, whatever the rays are: nothing here waits for the device.
    """
    t_min = rays.t_min
    i = torch.arange(int(field.box_diagonal / field.step_size) + 2, dtype=t_min.dtype, device=t_min.device)
    t = t_min[:, None] + i * field.step_size  # (n, k)
    points = rays.o.to(t)[:, None] + rays.d.to(t)[:, None] * t[..., None]  # (n, k, 3)
    inside = i < rays.n_samples[:, None]
    if field.alpha_mask is not None:
        inside = inside & field.occupied(points.flatten(0, 1)).view(t.shape)
    return t, points, inside


def sample_weights(field: VoxRF, points: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return compositing weights (n, k) of samples at `points` (n, k, 3), 0 where not `inside` (n, k)."""
    sigma = field.sigma(points.flatten(0, 1)).view(inside.shape)
    return weights_from_thickness(torch.where(inside, sigma, 0) * field.step_size)


def weights_from_thickness(tau: torch.Tensor) -> torch.Tensor:
    """Return compositing weights w (n, k) of optical thickness tau (n, k) >= 0, front to back."""
    T = torch.exp(tau - tau.cumsum(dim=1))  # (n, k); sums, since cumprod's backward is slow
    return T * -torch.expm1(-tau)
