"""Volume rendering of a voxel field: the readable reference, in plain PyTorch.

Along a ray, samples i = 0, 1, ... lie at t_i = t_min + i step < t_max. With optical thickness
tau_i = sigma_i step,

    alpha_i = 1 - exp(-tau_i),    T_i = prod_{j<i} (1 - alpha_j) = exp(-sum_{j<i} tau_j),
    w_i = T_i alpha_i,            sum_i w_i = 1 - T_end,

colour = sum w_i c_i + T_end bg, and depth = sum w_i t_i + T_end 10 (arXiv 2212.00774, section 5).
Example: two samples of thickness ln 2 and ln 4 have alpha = 1/2 and 3/4, T = 1 and 1/2, hence
w = 1/2 and 3/8 and T_end = 1/8; colours 1 and 2 before background 8 give 1/2 + 3/4 + 1 = 9/4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from voxnerf.rays import intersect_aabb, pixel_rays

BG_DEPTH = 10.0  # depth of the background, world units


class Rendering(NamedTuple):
    """What n rays see: (n, ...) from `render_rays`, images from `render_image`."""

    color: torch.Tensor  # (n, C) or (C, H, W), background included
    depth: torch.Tensor  # (n,) or (H, W), world units along the ray, BG_DEPTH for background
    opacity: torch.Tensor  # (n,) or (H, W), sum of weights
    weights: torch.Tensor  # (k, n_hit), rays that meet the box only, zero-padded to k samples


def render_rays(field, rays_o, rays_d, bg=None):
    """Render n rays, misses included: these show the background, at opacity 0.

    Args:
        field: a `VoxRF`.
        rays_o, rays_d: (n, 3) world-space origins and unit directions.
        bg: background colour, (n, C) or a constant; None is the field's own.
    Returns:
        a `Rendering`; its `weights` are empty if every ray misses.
    """
    with torch.no_grad():
        box = (x.double() for x in (rays_o, rays_d, field.aabb))  # float32 would move the samples
        t_min, t_max, hits = intersect_aabb(*box)
        t, sample = march(t_min.to(field.aabb), t_max.to(field.aabb), field.step_size)
        ray = sample // t.shape[1]  # (m,)
        cells = field.locate(_points(rays_o.to(t), rays_d.to(t), t, ray, sample))
        if field.alpha_mask is not None:
            keep = field.occupied(cells).nonzero()[:, 0]
            cells, ray, sample = cells.select(keep), ray[keep], sample[keep]
    tau = t.new_zeros(t.numel()).index_copy(0, sample, field.sigma(cells) * field.step_size)
    w = weights_from_thickness(tau.view_as(t))  # (n, k)
    opacity = w.sum(dim=1)
    if bg is None:
        bg = field.background(rays_d)
    color = _composite(field, w, cells, ray, sample) + (1 - opacity)[:, None] * bg
    depth = (w * t).sum(dim=1) + (1 - opacity) * BG_DEPTH
    hits = hits.nonzero()[:, 0]
    return Rendering(color, depth, opacity, (w if len(hits) == len(w) else w[hits]).T)


def march(t_min, t_max, step):
    """Return sample distances t (n, k), and as flat indices (m,) into t those inside the box.

    The first sample of a ray is at t_min, then one per step while t < t_max; k suits the longest
    of the n rays, t_min and t_max (n,).
    """
    k = max(1, int(((t_max - t_min) / step).amax().ceil()))
    i = torch.arange(k, dtype=t_min.dtype, device=t_min.device)
    t = t_min[:, None] + i * step  # (n, k)
    return t, (t < t_max[:, None]).view(-1).nonzero()[:, 0]


def weights_from_thickness(tau):
    """Return compositing weights w (n, k) of optical thickness tau (n, k) >= 0, front to back."""
    T = torch.exp(tau - tau.cumsum(dim=1))  # (n, k); sums, since cumprod's backward is slow
    return T * -torch.expm1(-tau)


def _points(rays_o, rays_d, t, ray, sample):
    t = t.view(-1).index_select(0, sample)[:, None]  # (m, 1)
    return rays_o.index_select(0, ray) + rays_d.index_select(0, ray) * t  # (m, 3)


def _composite(field, w, cells, ray, sample):
    """Return sum_i w_i c_i (n, C), evaluating colour only where w is above the threshold."""
    n = len(w)
    w = w.reshape(-1).index_select(0, sample)  # (m,)
    lit = (w.detach() > field.ray_march_weight_thres).nonzero()[:, 0]  # (m',)
    light = w.index_select(0, lit) * field.features(cells.select(lit)).T  # (C, m')
    ray = ray.index_select(0, lit).expand_as(light)
    return light.new_zeros(len(light), n).scatter_add(1, ray, light).T


def render_image(field, K, c2w, H, W, bg=None, subpixels=1, chunk=None):
    """Render an image of H x W pixels at `subpixels` x `subpixels` rays each.

    Args:
        K, c2w: (3, 3) intrinsics and (4, 4) camera-to-world pose, numpy or torch.
        bg: background colour, (H*s*W*s, C) or a constant; None is the field's own.
        chunk: rays rendered at a time, for large images without gradients; None is all.
    Returns:
        a `Rendering` of the fine grid: color (C, H*s, W*s), depth and opacity (H*s, W*s).
    """
    rays_o, rays_d = pixel_rays(H, W, K, c2w, subpixels, torch.float64, field.aabb.device)
    n = len(rays_o)
    parts = []
    for i in range(0, n, chunk or n):
        rays = slice(i, i + (chunk or n))
        part_bg = bg[rays] if torch.is_tensor(bg) and bg.ndim == 2 else bg
        parts.append(render_rays(field, rays_o[rays], rays_d[rays], part_bg))
    color, depth, opacity = (torch.cat(x) for x in list(zip(*parts))[:3])
    shape = (H * subpixels, W * subpixels)
    return Rendering(color.T.reshape(-1, *shape), depth.view(shape), opacity.view(shape),
                     _cat_weights([part.weights for part in parts]))


def _cat_weights(weights):
    k = max(w.shape[0] for w in weights)
    return torch.cat([F.pad(w, (0, 0, 0, k - w.shape[0])) for w in weights], dim=1)
