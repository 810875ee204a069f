"""The surface of a field: where its density crosses a level."""

from __future__ import annotations

import numpy as np
import torch

from mesh import Mesh
from voxnerf.field import VoxRF

CHUNK = 1 << 20  # points of the grid at a time


@torch.no_grad()
def densities(field: VoxRF, resolution: int) -> np.ndarray:
    """Return the density (Z, Y, X) float32, per world unit, at the centres of `resolution` cells per longest edge."""
    lo, hi = field.aabb.cpu().double()
    n = [max(1, round(x)) for x in (resolution * (hi - lo) / (hi - lo).max()).tolist()]
    x, y, z = (lo[i] + (torch.arange(n[i]) + 0.5) / n[i] * (hi[i] - lo[i]) for i in range(3))
    grid = np.empty((n[2], n[1], n[0]), np.float32)
    slab = max(1, CHUNK // (n[0] * n[1]))
    for i in range(0, n[2], slab):
        points = torch.stack(torch.meshgrid(z[i : i + slab], y, x, indexing="ij")[::-1], dim=-1)
        sigma = field.sigma(points.view(-1, 3).to(field.aabb))
        grid[i : i + slab] = sigma.view(points.shape[:3]).cpu().numpy()
    return grid


def extract(field: VoxRF, resolution: int, level: float) -> Mesh:
    """Return the surface where the density of a field is `level`, per world unit. It is closed, without specks."""
    from skimage.measure import marching_cubes

    grid = densities(field, resolution)
    lo, hi = field.aabb.cpu().double().numpy()
    edge = (hi - lo) / grid.shape[::-1]
    corners, faces, _, _ = marching_cubes(np.pad(grid, 1), level)
    vertices = (lo + (corners[:, ::-1] - 0.5) * edge).astype(np.float32)
    a, b, c = vertices[faces].astype(np.float64).transpose(1, 0, 2)
    if (np.einsum("ij,ij->i", a, np.cross(b, c))).sum() < 0:
        faces = faces[:, ::-1]
    normals = np.zeros((len(vertices), 3))
    across = np.cross(b - a, c - a)
    for i in range(3):
        np.add.at(normals, faces[:, i], across)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-30)
    return Mesh(vertices, faces.astype(np.int32), normals.astype(np.float32))
