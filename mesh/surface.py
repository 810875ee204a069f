"""The surface of a field: where its density crosses a level.

The level that is found from the field itself is the one whose surface has the silhouettes of the field's renderings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mesh import Mesh
from mesh.colours import cameras
from my.errors import UserError
from voxnerf.field import VoxRF, without_specks
from voxnerf.rays import pixel_rays, sample_range
from voxnerf.render import CHUNK

if TYPE_CHECKING:
    import pose
    from asset import Asset

POINTS = 1 << 20  # points of the grid at a time
SPECK = 0.01  # a connected part with less than this share of the whole volume is left out
FOG = 0.5  # a field whose box has more than this share of its walls inside the surface fills the box
NEAREST = 4  # vertices of a fine mesh that give a vertex of a coarse one its normal
OPAQUE = 0.5  # a pixel of more opacity belongs to the silhouette
N_VIEWS, VIEW_HW = 12, 64  # pictures by which a level is found, and their edge in pixels
GAP = 100.0  # most by which a density may lie below the next, for a level to be half way between both
SAME = 1 + 1e-5  # densities whose ratio is less are the same but for rounding
TINY = 1e-30  # density, per world unit, that stands for none


def extract(field: VoxRF, resolution: int, level: float) -> Mesh:
    """Return the closed surface where the density of a field is `level`, per world unit.

    The density is sampled in `resolution` cells along the longest edge of the box. Between them `before_softplus` of it
    is linear, as in the field itself. A connected part with less than SPECK of the whole volume is left out, and so is
    every hollow that nobody sees. What reaches the walls of the box is cut off flat there.
    Raises UserError where nothing is as dense as `level`, and where the field fills its box.
    """
    from skimage.measure import marching_cubes

    sigma = densities(field, resolution)
    if sigma.max() <= level:
        raise UserError(
            f"--level {level:g}: nothing in this field is as dense: its densest point has {sigma.max():.3g} per world "
            "unit; give less, or auto"
        )
    refuse_fog(sigma > level, level)
    padded = np.pad(before_softplus(sigma) - before_softplus(np.float32(level)), 1, mode="edge")
    solid = solid_of(padded > 0)
    for wall in walls(padded):
        wall[:] = -np.abs(wall)  # the surface crosses half way: at the wall itself
    for wall in walls(solid):
        wall[:] = False
    inward, faces, _, _ = marching_cubes(np.where(solid, np.abs(padded), -np.abs(padded)), 0.0, allow_degenerate=False)
    lo, hi = field.aabb.cpu().double().numpy()
    cells = inward[:, ::-1] - 0.5  # (V, 3) xyz, 0 is the low corner of the box
    vertices = lo + cells * (hi - lo) / sigma.shape[::-1]
    return with_normals(vertices, faces)


@torch.no_grad()
def densities(field: VoxRF, resolution: int) -> np.ndarray:
    """Return the densities (Z, Y, X) float32, per world unit, that rays see at the centres of the cells of a grid."""
    from tqdm import tqdm

    lo, hi = field.aabb.cpu().double()
    n = [max(1, round(x)) for x in (resolution * (hi - lo) / (hi - lo).max()).tolist()]
    x, y, z = (lo[i] + (torch.arange(n[i]) + 0.5) / n[i] * (hi[i] - lo[i]) for i in range(3))
    grid = np.empty((n[2], n[1], n[0]), np.float32)
    slab = max(1, POINTS // (n[0] * n[1]))
    for i in tqdm(range(0, n[2], slab), desc="density", unit="slab"):
        points = torch.stack(torch.meshgrid(z[i : i + slab], y, x, indexing="ij")[::-1], dim=-1)
        grid[i : i + slab] = seen_density(field, points.view(-1, 3).to(field.aabb)).view(points.shape[:3]).cpu().numpy()
    return grid


def seen_density(field: VoxRF, points: torch.Tensor) -> torch.Tensor:
    """Return the density (n,) at `points` (n, 3); it is 0 where the field's mask hides it from rays."""
    sigma = field.sigma(points)
    return sigma if field.alpha_mask is None else sigma * field.occupied(points)


def before_softplus(sigma: np.ndarray) -> np.ndarray:
    """Return the numbers whose softplus is the density: log(exp(sigma) - 1)."""
    sigma = np.maximum(sigma, TINY)
    return sigma + np.log(-np.expm1(-sigma))


def walls(grid: np.ndarray) -> list[np.ndarray]:
    """Return views of the six outermost layers of a grid (Z, Y, X)."""
    return [grid[0], grid[-1], grid[:, 0], grid[:, -1], grid[:, :, 0], grid[:, :, -1]]


def refuse_fog(dense: np.ndarray, level: float) -> None:
    """Raise UserError where the dense cells (Z, Y, X) bool reach the walls of the box nearly everywhere."""
    share = float(np.mean(np.concatenate([wall.ravel() for wall in walls(dense)])))
    if share > FOG:
        raise UserError(
            f"this field fills its box: {share:.0%} of the box's walls are denser than the level {level:.3g}; "
            "it has no shape yet: train it longer, or give a greater --level"
        )


def solid_of(dense: np.ndarray) -> np.ndarray:
    """Return which cells (Z, Y, X) are inside: the dense ones and the hollows among them, without specks."""
    from scipy.ndimage import binary_fill_holes

    filled = torch.from_numpy(binary_fill_holes(dense))[None, None]
    return without_specks(filled, SPECK)[0, 0].numpy()


# ---------------------------------------------------------------- triangles


def with_normals(vertices: np.ndarray, faces: np.ndarray) -> Mesh:
    """Return the mesh of vertices (V, 3) and faces (F, 3); a normal is the mean of its faces', weighted by area."""
    from scipy.sparse import csr_matrix

    vertices = vertices.astype(np.float32)
    at = csr_matrix((np.ones(faces.size), (faces.ravel(), np.arange(faces.size) // 3)), (len(vertices), len(faces)))
    normals = at @ across(vertices, faces)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.where(
        length > TINY, normals / np.maximum(length, TINY), (0, 1, 0)
    )  # of a vertex between two sides: any
    return Mesh(vertices, np.ascontiguousarray(faces, np.int32), normals.astype(np.float32))


def across(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return vectors (F, 3) along the normals of faces, of twice the length of their areas."""
    a, b, c = vertices.astype(np.float64)[faces.T]
    return np.cross(b - a, c - a)


def decimated(mesh: Mesh, n_faces: int) -> Mesh:
    """Return a mesh without colours in at most `n_faces` triangles, where it can be simplified that far.

    Edges are collapsed in the order of the error that this makes (Garland and Heckbert 1997). The result has no hole,
    but where thin parts are pinched together an edge may have four faces.
    """
    from fast_simplification import simplify

    if len(mesh.faces) <= n_faces:
        return with_normals(*cleaned(mesh.vertices, mesh.faces))
    coarse = with_normals(*cleaned(*simplify(mesh.vertices, mesh.faces, target_count=n_faces)))
    return coarse._replace(normals=fine_normals(coarse, mesh))


def fine_normals(coarse: Mesh, fine: Mesh) -> np.ndarray:
    """Return the normals (V, 3) of the fine mesh at the vertices of a coarse one, its own where the two disagree.

    They are means over the nearest NEAREST vertices, weighted by 1 / distance.
    """
    from scipy.spatial import cKDTree

    distance, at = cKDTree(fine.vertices).query(coarse.vertices, NEAREST)
    normals = (fine.normals[at] / np.maximum(distance, 1e-9)[..., None]).sum(axis=1)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), TINY)
    agree = (normals * coarse.normals).sum(axis=1, keepdims=True) > 0.5  # else of the other side of a thin part
    return np.where(agree, normals, coarse.normals).astype(np.float32)


def cleaned(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3) and faces (F, 3) without faces that enclose nothing, and without vertices of no face.

    Such faces have no area, or they are two sides of one triangle.
    """
    faces = faces[np.linalg.norm(across(vertices, faces), axis=1) > 0]
    _, which, n = np.unique(np.sort(faces, axis=1), axis=0, return_inverse=True, return_counts=True)
    faces = faces[n[which.ravel()] == 1]
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used], faces.reshape(-1, 3)


# ---------------------------------------------------------------- the level


@torch.no_grad()
def best_level(asset: Asset) -> float:
    """Return the level of density, per world unit, whose surface has the silhouettes that the field's renderings have.

    A ray meets the surface of a level if its densest sample has that level. So one pass over the rays tells the
    silhouettes of all levels: the best has the greatest intersection over union with the opaque pixels.
    Raises UserError where no pixel is opaque.
    """
    from tqdm import tqdm

    peaks, opaque = [], []
    for camera in tqdm(cameras(asset, N_VIEWS), desc="level", unit="view"):
        peaks.append(densest(asset.field, camera))
        opaque.append(asset.render(camera, VIEW_HW, chunk=CHUNK).opacity.flatten() > OPAQUE)
    peak, is_opaque = torch.cat(peaks), torch.cat(opaque)
    if not is_opaque.any():
        raise UserError("this field is empty: no view has a pixel that is more than half opaque; train it longer")
    peak, order = peak.sort(descending=True)
    n, hits = torch.arange(1, len(peak) + 1, device=peak.device), is_opaque[order].cumsum(0)
    iou = hits / (n + hits[-1] - hits)  # of a level that the n densest rays reach, and no other
    below = torch.cat([peak[1:], peak.new_zeros(1)])  # the next density: the level lies between the two
    best = int(torch.where(peak > SAME * below, iou, -1).argmax())
    return float((peak[best] * torch.maximum(below[best], peak[best] / GAP)).sqrt())


def densest(field: VoxRF, camera: pose.Camera) -> torch.Tensor:
    """Return the greatest density (n,) that the rays of a camera's picture meet; VIEW_HW pixels are its edge."""
    K, step = camera.K(VIEW_HW, VIEW_HW), field.step_size
    rays_o, rays_d = pixel_rays(VIEW_HW, VIEW_HW, K, camera.c2w, device=field.aabb.device)
    t_min, n_samples = sample_range(rays_o, rays_d, field.aabb, step)
    peak = torch.zeros_like(t_min)
    for i in range(int(n_samples.max())):
        inside = i < n_samples
        points = rays_o[inside] + (t_min[inside] + i * step)[:, None] * rays_d[inside]
        peak[inside] = torch.maximum(peak[inside], seen_density(field, points))
    return peak
