"""Noise that is fixed to the surface of an object: a point of it has the same noise in all views and in all steps.

Space is divided into the cells of three lattices, one for each axis, whose cells are long along it. Each cell has unit
normal numbers of its own: a function of (seed, cell). A surface takes the lattice of the axis which it faces, since
from another view a soft surface seems to be nearer or farther. A pixel has the sum over the cells that its subpixels
see, divided by the standard deviation of that sum. With m_c subpixels of a pixel in cell c, and the numbers z_c of that
cell,

    n = sum_c m_c z_c / sqrt(sum_c m_c^2) ~ N(0, 1).

A cell that several pixels of a view see counts for the first of them alone. So the pixels of a view share no cell, and
their noise is independent. Example: a pixel with two subpixels in cell 1 and one in cell 2 has
(2 z_1 + z_2) / sqrt(5).

Source: that noise is Gaussian in a view and consistent between views is the idea of Consistent Flow Distillation (arXiv
2501.05445). What differs: only the noise is taken, and the lattice is a choice of this project. The paper derives its
update of the object from the flow of a diffusion's ODE or SDE, and here the rule stays what `--rule` says.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from my.exact import exact_device
from my.seeds import normal
from voxnerf.rays import pixel_rays
from voxnerf.render import BG_DEPTH, Rendering

SUBPIXELS = 6  # per edge of a pixel
CELLS = 4  # per edge of a pixel that sees the origin in the narrowest view
SOLID = 0.5  # opacity from which a pixel shows a surface
LONG = 16  # edges of a cell along the axis that its surface faces
BITS = 20  # of each coordinate in the number of a cell


def cell_edge(R: float, fov: float, width: int) -> float:
    """Return the short edge of a cell, world units.

    R: distance of the cameras from the origin, world units.  fov: the narrowest view, degrees.  width: in pixels.
    """
    return 2 * R * math.tan(math.radians(fov) / 2) / width / CELLS


@torch.no_grad()
def surface_noise(
    r: Rendering, K: np.ndarray, c2w: np.ndarray, edge: float, fresh: torch.Tensor, seed: int, draw: int = 0
) -> torch.Tensor:
    """Return the noise (b, C, H, W) of b views. Where a pixel shows no surface, it is the `fresh` one (b, C, H, W).

    So it is where other pixels of the view have all cells that a pixel sees.
    Nothing waits for the device. It is computed in float64 on `exact_device`.

    Args:
        r: images (b, h, w), whose size may be another one.
        K, c2w: (b, 3, 3) intrinsics for H x W pixels, and (b, 4, 4) poses.
        edge: the short one of a cell, world units.
        draw: counts what is drawn for a cell.
    """
    C, H, W = fresh.shape[1:]
    points, solid = surface_points(r, K, c2w, H, W)
    cells = cells_of(points, facing(points), edge)
    cells = rearrange(cells, "b (h s) (w t) -> b (h w) (s t)", s=SUBPIXELS, t=SUBPIXELS)
    shares = shared_out(cells)
    z = normal((C,), seed, cells.flatten(), "surface noise", draw, torch.float64).view(*cells.shape, C)
    variance = shares.sum(2)
    n = ((shares > 0)[..., None] * z).sum(2) / variance.clamp(min=1).sqrt()[..., None]
    n = rearrange(n, "b (h w) c -> b c h w", h=H).to(fresh)
    known = solid & (variance.view(solid.shape) > 0)
    return torch.where(known[:, None].to(fresh.device), n, fresh)


def surface_points(r: Rendering, K: np.ndarray, c2w: np.ndarray, H: int, W: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the subpixels see (b, H * SUBPIXELS, W * SUBPIXELS, 3), world units, and where a surface is.

    The mean distance of what is seen is interpolated, weighted with its opacity; the background has no part in it.
    The second result is (b, H, W) bool.
    """
    device = exact_device(r.depth.device)
    depth, opacity = (x.detach().to(device).double() for x in (r.depth, r.opacity))
    maps = torch.stack([depth - (1 - opacity) * BG_DEPTH, opacity], dim=1)  # sum of w t, and of w
    fine = (H * SUBPIXELS, W * SUBPIXELS)
    weighted, weight = F.interpolate(maps, fine, mode="bilinear", antialias=True).flatten(2).unbind(1)
    rays_o, rays_d = pixel_rays(H, W, K, c2w, SUBPIXELS, torch.float64, device)
    points = rays_o + (weighted / weight.clamp(min=1e-6))[..., None] * rays_d
    solid = F.interpolate(opacity[:, None], (H, W), mode="bilinear", antialias=True)[:, 0] >= SOLID
    return points.unflatten(1, fine), solid


def facing(points: torch.Tensor) -> torch.Tensor:
    """Return the axis (b, h, w), 0 to 2, that is nearest to the normal of a surface through points (b, h, w, 3)."""
    across, down = torch.gradient(points, dim=(2, 1))
    return torch.linalg.cross(across, down).abs().argmax(-1)


def cells_of(points: torch.Tensor, axis: torch.Tensor, edge: float) -> torch.Tensor:
    """Return the numbers (...) int64, none below 0, of the cells that hold points (..., 3), world units.

    They repeat after 2^BITS cells along an axis.

    axis: (...) along which cells are long.
    """
    along = axis[..., None] == torch.arange(3, device=axis.device)
    edges = torch.where(along, LONG * edge, edge)
    x, y, z = ((points / edges).floor().long() & (2**BITS - 1)).unbind(-1)
    return ((axis << BITS | x) << BITS | y) << BITS | z


def shared_out(cells: torch.Tensor) -> torch.Tensor:
    """Return for each subpixel 0 where its cell is another pixel's, else an odd number.

    The odd numbers of the m subpixels of a pixel that are in a cell are 1, 3, 5, ...: their sum is m^2.

    cells: (b, n, s) int64, of s subpixels of n pixels. The result is like it.
    """
    b, n, s = cells.shape
    numbers, order = cells.flatten(1).sort(dim=1, stable=True)  # the first pixel comes first among equals
    place = torch.arange(n * s, device=cells.device).expand(b, -1)
    begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    begin = torch.where(begins, place, 0).cummax(dim=1).values  # of those that are equal
    pixel = order // s
    odd = (pixel == pixel.gather(1, begin)) * (2 * (place - begin) + 1)
    return torch.zeros_like(order).scatter(1, order, odd).view(cells.shape)
