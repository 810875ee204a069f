"""A field as 3D Gaussians, one per occupied voxel, in the PLY layout that viewers of Gaussian splats read."""

from __future__ import annotations

import numpy as np

from mesh import Mesh
from mesh.files import turned
from mesh.surface import densities
from my.errors import UserError
from voxnerf.field import OCCUPIED_ALPHA, VoxRF
from voxnerf.sh import SH_0

PROPERTIES = (
    "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()
)  # of a Gaussian, in the order of the file
SPREAD = 0.5  # standard deviation of a Gaussian in edges of a voxel: neighbours blend into a smooth body


def gaussians(field: VoxRF, coloured: Mesh) -> dict[str, np.ndarray]:
    """Return the occupied voxels of a field as Gaussians, {property: (n,) float32}, in the frame of the files.

    A voxel is occupied as in `VoxRF.update_alpha_mask`. Its Gaussian has the colour of the nearest vertex of the mesh
    `coloured`: what the voxel looks like from outside. Scales are natural logarithms, and the opacity is a logit.
    Raises UserError where no voxel is occupied.
    Source of the layout: 3D Gaussian Splatting (Kerbl et al. 2023), at degree 0 of the spherical harmonics.
    """
    from scipy.spatial import cKDTree

    thickness = densities(field, max(field.density.shape[2:])) * field.voxel_edge  # (Z, Y, X), at voxel centres
    at = np.argwhere(-np.expm1(-thickness) > OCCUPIED_ALPHA)
    if not len(at):
        raise UserError("this field is empty: no voxel is occupied; train it longer")
    assert coloured.colors is not None
    lo, edges = field.aabb[0].cpu().numpy(), (1 / field.voxels_per_unit).cpu().numpy()
    centres, n = lo + (at[:, ::-1] + 0.5) * edges, len(at)
    rgb = coloured.colors[cKDTree(coloured.vertices).query(centres)[1]] / 255
    columns = [*turned(centres).T, *np.zeros((3, n)), *((rgb - 0.5) / SH_0).T]
    columns += [logit(peak_opacity(thickness[tuple(at.T)])), *np.full((3, n), np.log(SPREAD * field.voxel_edge))]
    columns += [np.ones(n), *np.zeros((3, n))]  # no rotation
    return {name: column.astype(np.float32) for name, column in zip(PROPERTIES, columns)}


def peak_opacity(thickness: np.ndarray) -> np.ndarray:
    """Return the opacity at the middle of a Gaussian that stands for a voxel of optical thickness (n,).

    A layer of Gaussians, one per square of edge e, is on average as thick as the voxels: the mean of
    tau exp(-r^2 / 2 s^2) over the square is tau 2 pi s^2 / e^2.
    """
    return -np.expm1(-thickness / (2 * np.pi * SPREAD**2))


def logit(p: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of p (n,) in [0, 1); it stays finite."""
    p = np.minimum(p, 1 - 1e-7)
    return np.log(p / (1 - p))
