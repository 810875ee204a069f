"""Volume rendering of a voxel field.

Along a ray, samples i = 0, 1, ... lie at t_i = t_min + i step < t_max. With optical thickness
tau_i = sigma_i step,

    alpha_i = 1 - exp(-tau_i),    T_i = prod_{j<i} (1 - alpha_j) = exp(-sum_{j<i} tau_j),
    w_i = T_i alpha_i,            sum_i w_i = 1 - T_end,

colour = sum w_i c_i + T_end bg, and depth = sum w_i t_i + T_end 10 (arXiv 2212.00774, section 5).
Example: two samples of thickness ln 2 and ln 4 have alpha = 1/2 and 3/4, T = 1 and 1/2, hence
w = 1/2 and 3/8 and T_end = 1/8; colours 1 and 2 before background 8 give 1/2 + 3/4 + 1 = 9/4.

The march along the rays is done by `voxnerf/fused.py`, or, in plain PyTorch, by `voxnerf/reference.py`.
"""

import functools
import warnings
from typing import NamedTuple

import torch

from my.errors import UserError
from voxnerf import reference
from voxnerf.rays import pixel_rays, sample_range

BG_DEPTH = 10.0  # depth of the background, world units
RENDERERS = ("auto", "fused", "reference")


class Rendering(NamedTuple):
    """What n rays see: (n, ...) from `render_rays`, images from `render_image`."""

    color: torch.Tensor  # (n, C) or (C, H, W), background included
    depth: torch.Tensor  # (n,) or (H, W), world units along the ray, BG_DEPTH for background
    opacity: torch.Tensor  # (n,) or (H, W), sum of weights
    emptiness: torch.Tensor  # (n,) or (H, W), sum over samples of log(1 + s w)
    n_samples: torch.Tensor  # (n,) or (H, W) int32, samples inside the box


def render_rays(field, rays_o, rays_d, bg=None, emptiness_scale=0.0, renderer="auto"):
    """Render n rays, misses included: these show the background, at opacity 0.

    Args:
        field: a `VoxRF`.
        rays_o, rays_d: (n, 3) world-space origins and unit directions.
        bg: background colour, (n, C) or a constant; None is the field's own.
        emptiness_scale: s of `Rendering.emptiness`.
        renderer: fused (float32 only), reference, or auto, see `pick_march`.
    """
    t_min, n_samples = sample_range(rays_o, rays_d, field.aabb, field.step_size)
    march = pick_march(renderer, field.density)
    light, depth, opacity, emptiness = march(field, rays_o, rays_d, t_min, n_samples, emptiness_scale)
    if bg is None:
        bg = field.background(rays_d)
    return Rendering(
        light + (1 - opacity)[:, None] * bg, depth + (1 - opacity) * BG_DEPTH, opacity, emptiness, n_samples
    )


def pick_march(renderer, like):
    """Return the `march` function of a renderer, for a field with a parameter `like` this.

    auto is fused for float32 on a CPU; the kernels are written for CUDA too, but nobody has run them there yet.
    Raises ValueError where there is no such renderer, or not for this dtype, and UserError where it does not start.
    """
    if renderer not in RENDERERS:
        raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {renderer!r}")
    fit = like.dtype == torch.float32 and like.device.type == "cpu"
    if renderer == "reference" or (renderer == "auto" and not (fit and fused_available())):
        return reference.march
    if like.dtype != torch.float32:
        raise ValueError(f"the fused renderer is for float32 fields, this one is {like.dtype}")
    if not fused_available():
        raise UserError(
            "--renderer fused: needs the package warp-lang, which does not start here; install it, or use "
            "--renderer reference"
        )
    from voxnerf import fused

    return fused.march


@functools.cache
def fused_available():
    """Whether the fused renderer works here; where not, says why in a warning, once."""
    try:
        from voxnerf import fused  # noqa: F401
    except Exception as error:  # a missing package, a missing library, a GPU driver: all end in the slow renderer
        warnings.warn(f"no fused renderer, the slow one is used: {error}", stacklevel=2)
        return False
    return True


def render_image(
    field, K, c2w, H, W, bg=None, subpixels=1, chunk=None, emptiness_scale=0.0, renderer="auto", lens=None
):
    """Render an image of H x W pixels at `subpixels` x `subpixels` rays each.

    Args:
        K, c2w: (3, 3) intrinsics and (4, 4) camera-to-world pose, numpy or torch.
        bg: background colour, (H*s*W*s, C) or a constant; None is the field's own.
        chunk: rays rendered at a time, for large images without gradients; None is all.
        emptiness_scale, renderer: as in `render_rays`.
        lens: a `voxnerf.lens.Lens`; None is a pinhole.
    Returns:
        a `Rendering` of the fine grid: color (C, H*s, W*s), the others (H*s, W*s).
    """
    rays_o, rays_d = pixel_rays(H, W, K, c2w, subpixels, torch.float64, field.aabb.device, lens)
    n = len(rays_o)
    parts = []
    for i in range(0, n, chunk or n):
        rays = slice(i, i + (chunk or n))
        part_bg = bg[rays] if torch.is_tensor(bg) and bg.ndim == 2 else bg
        parts.append(render_rays(field, rays_o[rays], rays_d[rays], part_bg, emptiness_scale, renderer))
    color, *others = (torch.cat(x) for x in zip(*parts))
    shape = (H * subpixels, W * subpixels)
    return Rendering(color.T.reshape(-1, *shape), *(x.view(shape) for x in others))
