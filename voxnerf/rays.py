"""Camera rays and their intersection with the field's box.

World frame as in `pose.py`. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from my.ahead import to_device
from my.exact import exact_device
from voxnerf.lens import Lens, Lenses

if TYPE_CHECKING:
    from voxnerf.field import VoxRF

PARALLEL = 1e-15  # a direction component below this counts as parallel to the slab


class Rays(NamedTuple):
    """n rays, ready to be marched through a field. The others are in the dtype of the field."""

    o: torch.Tensor  # (n, 3) origins, world units, any float dtype
    d: torch.Tensor  # (n, 3) unit directions, any float dtype
    t_min: torch.Tensor  # (n,) distance of the first sample, world units
    n_samples: torch.Tensor  # (n,) int32
    start: torch.Tensor  # (n, 3) position of the first sample in voxels, 0 being the centre of the first voxel
    slope: torch.Tensor  # (n, 3) voxels per world unit


@torch.no_grad()
def through(field: VoxRF, rays_o: torch.Tensor, rays_d: torch.Tensor) -> Rays:
    """Return rays of origins and unit directions (n, 3) with where they pass through the field's box."""
    device, at = field.aabb.device, exact_device(field.aabb.device)
    rays_o, rays_d, aabb = (x.to(at) for x in (rays_o, rays_d, field.aabb))
    t_min, n_samples = sample_range(rays_o, rays_d, aabb, field.step_size)
    first = rays_o + t_min.double()[:, None] * rays_d
    start, slope = (first - aabb[0]) * field.voxels_per_unit - 0.5, rays_d * field.voxels_per_unit
    if at != device:
        rays_o, rays_d = rays_o.to(t_min), rays_d.to(t_min)
    return Rays(*(x.to(device) for x in (rays_o, rays_d, t_min, n_samples, start.to(t_min), slope.to(t_min))))


def pixel_rays(
    H: int,
    W: int,
    K: np.ndarray | torch.Tensor,
    c2w: np.ndarray | torch.Tensor,
    subpixels: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    lens: Lens | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the world-space rays of an image, or of many cameras' images, row-major over its fine grid.

    Pixel i spans i - 0.5 to i + 0.5, and its rays sit at the centres of a subpixels x subpixels
    subdivision (the pixel centre itself for 1). Computed in float64, returned as `dtype`, on `exact_device`.

    Args:
        K: (..., 3, 3) intrinsics, camera frame to homogeneous pixels.
        c2w: (..., 4, 4) camera-to-world poses.
        subpixels: s, rays per pixel edge.
        lens: None is a pinhole; for a single camera.
    Returns:
        rays_o, rays_d: (..., H*s*W*s, 3) each; origins in world units, unit directions.
    """
    K = _float64(K, device)
    c2w = _float64(c2w, K.device)
    y, x = (_subpixel_centres(n, subpixels, K.device) for n in (H, W))
    y, x = torch.meshgrid(y, x, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(-1, 3)  # (n, 3)
    K_inv = torch.linalg.inv_ex(K).inverse  # inv_ex: no error check, hence no wait for the device
    if lens is None or not lens.bends:
        rays_d = pixels @ (c2w[..., :3, :3] @ K_inv).mT  # (..., n, 3)
    else:
        first = torch.zeros(1, dtype=torch.long, device=K.device)
        rays_d = Lenses([lens], K.device).bend(first, (pixels @ K_inv.T)[None])[0] @ c2w[:3, :3].T
    rays_d = rays_d / rays_d.norm(dim=-1, keepdim=True)
    return c2w[..., None, :3, 3].expand_as(rays_d).to(dtype), rays_d.to(dtype)


def _float64(matrix: np.ndarray | torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    if isinstance(matrix, torch.Tensor):
        there = exact_device(device or matrix.device)
        return matrix.to(there, non_blocking=there.type == "cuda").to(torch.float64)
    return to_device(np.asarray(matrix, np.float64), exact_device(device))


def _subpixel_centres(n: int, s: int, device: torch.device) -> torch.Tensor:
    fine = torch.arange(n * s, dtype=torch.float64, device=device)
    return (fine + 0.5) / s - 0.5  # (n*s,)


def intersect_aabb(
    rays_o: torch.Tensor, rays_d: torch.Tensor, aabb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return where rays enter and leave an axis-aligned box (slab method).

    Args:
        rays_o, rays_d: (n, 3) origins and directions; zero components are allowed.
        aabb: (2, 3) min and max corner, xyz, world units.
    Returns:
        t_min, t_max: (n,) entry and exit in units of |rays_d|, clipped at 0: a ray that starts
            inside has t_min 0. For a miss, t_max <= t_min.
        hits: (n,) bool, whether part of the ray ahead of its origin lies inside the box.
    """
    d = torch.where(rays_d.abs() < PARALLEL, PARALLEL, rays_d)  # else 0 * inf = NaN on a face; the sign does not matter
    t_lo, t_hi = (aabb[0] - rays_o) / d, (aabb[1] - rays_o) / d  # (n, 3)
    t_min = torch.minimum(t_lo, t_hi).amax(dim=-1).clamp(min=0)  # (n,)
    t_max = torch.maximum(t_lo, t_hi).amin(dim=-1).clamp(min=0)  # (n,)
    return t_min, t_max, t_max > t_min


@torch.no_grad()
def sample_range(
    rays_o: torch.Tensor, rays_d: torch.Tensor, aabb: torch.Tensor, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distance t_min (n,) of each ray's first sample in the box, and the number of samples (n,) int32.

    The samples lie at t_min + i step < t_max; a ray that misses the box has none. Distances are world units, in the
    dtype of `aabb` (2, 3). They are computed in float64, since float32 would move the samples.
    """
    t_min, t_max, _ = (x.to(aabb) for x in intersect_aabb(*(x.double() for x in (rays_o, rays_d, aabb))))
    return t_min, ((t_max.double() - t_min.double()) / step).ceil().clamp(min=0).int()
