"""True colours of a mesh: what many pictures of its field show on its surface, fused.

A point of the surface takes its colour from the views that see it. Each counts by a weight, the product of

- the cosine of the angle between the surface's normal and the way to the camera, none below `GRAZING`;
- next to nothing at an edge of depth, where a pixel mixes what is in front with what is behind;
- a power of how opaque the field is there, since the background shines through what is not.

A point that the mesh itself hides from a view has no weight there. The colour is the mean of those of the views. The
decoder of a latent field gives a point another colour in each view: outliers count less. Where no view sees the surface
well, its colour is harmonic: it blends those around it. No view is from below the heights of the training's cameras,
since what the field shows there was never trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import pose
from mesh import Mesh
from mesh.cast import GREY, Caster, Hits
from voxnerf.render import CHUNK, without_background

if TYPE_CHECKING:
    from asset import Asset

N_VIEWS = 32
PIXELS_PER_VOXEL = 3  # of fields of pixels
FAR = 100.0  # distance of what is not there, world units
GRAZING = 0.2  # cosine below which a view does not count
FAINT = 1e-3  # weight of the worst pixels: they count only where a part of a mesh has no others
TRUSTED = 0.5  # weight of a point, over all views, from which on its colour is its own alone
SURE = 1.0  # weight of a point, over all views, from which on its colour spreads to points that are not seen
OPACITY_POWER = 4
STEEP = 4.0  # an edge of depth is a step of more than this many pixels' widths between two pixels
USUAL = 0.4  # distance from the mean, in RGB, up to which a view's colour counts in full
ITERATIONS = 2  # of the weights of outliers
POINTS = 2**13  # at a time
TEXELS = 2**19  # at a time
FINE = 3.0  # texels per pixel's edge from which on one texel in four is fused
GUTTER = 4  # texels between charts: the second smaller copy of a texture still has one between them


class Views(NamedTuple):
    """What n cameras see of a field and of its mesh."""

    to_pixels: torch.Tensor  # (n, 3, 4): world to homogeneous pixels
    eyes: torch.Tensor  # (n, 3)
    maps: torch.Tensor  # (n, 5, H, H): RGB in [0, 1], weight of the pixel, distance of the mesh
    pixel: float  # edge of a pixel at the origin, world units
    slack: float  # world units by which a point may lie behind the mesh's distance


def cameras(asset: Asset, n: int) -> list[pose.Camera]:
    """Return n cameras that are spread evenly over the part of the sphere that the training draws cameras from."""
    p, turn = asset.cfg.pose, np.pi * (3 - 5**0.5)  # the golden angle
    heights = (np.arange(n) + 0.5) / n * np.deg2rad(pose.ELEVATION_SPAN_DEG)
    return [pose.camera_at(i * turn % (2 * np.pi), v, p.R, p.FoV) for i, v in enumerate(heights)]


@torch.no_grad()
def picture(asset: Asset, camera: pose.Camera) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a test view of a field: its picture (3, H, H) in [0, 1], and its opacity (h, h), both on the host.

    A decoder gets latents of the size that the training rendered: twice that size was farther from the truth. Where
    there is none, the picture has the colours of the field alone: the background that shines through is taken out.
    """
    if asset.latent:
        image, _, opacity = asset.view(camera)
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(opacity)
    width = 2 * asset.cfg.pose.R * np.tan(np.deg2rad(camera.fov) / 2)  # of the picture at the origin, world units
    hw = max(asset.cfg.pose.rend_hw, round(PIXELS_PER_VOXEL * width / asset.field.voxel_edge))
    white = torch.ones(3, 1, 1, device=asset.adapter.device)
    seen = asset.render(camera, hw, chunk=CHUNK, plain=asset.encoded(white))
    rgb = without_background(asset.adapter.decode(seen.color[None])[0], seen.opacity, white)
    return rgb.cpu(), seen.opacity.cpu()


def views(asset: Asset, caster: Caster, n: int = N_VIEWS) -> Views:
    """Return what the cameras of `cameras` see of an asset and of its mesh."""
    from tqdm import tqdm

    shot = [(c, *picture(asset, c)) for c in tqdm(cameras(asset, n), desc="colours", unit="view")]
    hw = shot[0][1].shape[-1]
    pixel = 2 * asset.cfg.pose.R * np.tan(np.deg2rad(asset.cfg.pose.FoV) / 2) / hw
    steep = max(STEEP * pixel, asset.field.voxel_edge)
    maps, matrices, eyes = [], [], []
    for camera, image, opacity in shot:
        hits = caster.view(camera, hw)
        distance = torch.where(hits.hit, hits.distance, FAR).view(hw, hw).cpu()
        opacity = F.interpolate(opacity[None, None], (hw, hw), mode="bilinear")[0, 0]
        weight = torch.where(at_edges(distance, steep), FAINT, solid(opacity))
        maps.append(torch.cat([image, weight[None], distance[None]]))
        w2c = np.linalg.inv(camera.c2w)
        matrices.append(camera.K(hw, hw) @ w2c[:3])
        eyes.append(camera.c2w[:3, 3])
    to_pixels, at = (torch.from_numpy(np.stack(x)).to(caster.device, torch.float32) for x in (matrices, eyes))
    return Views(to_pixels, at, torch.stack(maps).to(caster.device), pixel, 0.5 * steep)


def at_edges(distance: torch.Tensor, steep: float) -> torch.Tensor:
    """Return which pixels (H, W) bool are on either side of a step of more than `steep` in distances (H, W)."""
    edge = torch.zeros_like(distance, dtype=torch.bool)
    for axis in (0, 1):
        step, n = distance.diff(dim=axis).abs() > steep, distance.shape[axis]
        for first in (0, 1):
            edge.narrow(axis, first, n - 1).logical_or_(step)
    return edge


def solid(opacity: torch.Tensor) -> torch.Tensor:
    """Return weights of pixels of these opacities: 1 where the field is opaque, less where the background shows."""
    return opacity**OPACITY_POWER + FAINT


@torch.no_grad()
def fuse(seen: Views, points: torch.Tensor, normals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the colours (n, 3) in [0, 1] of points with unit normals (n, 3), and their weights (n,): 0 is unseen."""
    parts = [_fuse(seen, *part) for part in zip(points.split(POINTS), normals.split(POINTS))]
    colors, weights = zip(*parts)
    return torch.cat(colors), torch.cat(weights)


def _fuse(seen: Views, points: torch.Tensor, normals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hw, p, n = seen.maps.shape[-1], points.T, normals.T  # (3, n): sums over a short last axis are slow
    x = seen.to_pixels[:, :, :3] @ p + seen.to_pixels[:, :, 3:]
    at = (2 * x[:, :2] / x[:, 2:] + 1) / hw - 1  # (V, 2, n)
    got = F.grid_sample(seen.maps, at.transpose(1, 2)[:, None], padding_mode="border", align_corners=False)[:, :, 0]
    away = seen.eyes[:, :, None] - p  # (V, 3, n)
    distance = away.square().sum(1).sqrt()
    cosine = (away * n).sum(1) / distance
    sees = (cosine > GRAZING) & (distance < got[:, 4] + seen.slack)
    sees &= (at.abs().amax(1) < 1) & (x[:, 2] > 0)  # in the picture, and in front of the camera
    weight = got[:, 3] * cosine * sees
    return robust_mean(got[:, :3], weight).T, weight.sum(0)


def robust_mean(colors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean (3, n) of colours (V, 3, n) of weights (V, n), in which outliers count less.

    One that is farther than USUAL from the mean counts by USUAL / its distance, `ITERATIONS` times: the M-estimate of
    Huber (1964) by weights.
    """
    w = weight
    for _ in range(ITERATIONS):
        off = (colors - _mean(colors, w)).square().sum(1)
        w = weight * (USUAL / off.clamp(min=USUAL**2).sqrt())
    return _mean(colors, w)


def _mean(colors: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (colors * w[:, None]).sum(0) / w.sum(0).clamp(min=1e-20)


class Paint:
    """The colours of the surface of an asset's mesh, at any point.

    `vertices` (V, 3) in [0, 1] are those of the mesh's vertices. All of them have one.
    """

    def __init__(self, asset: Asset, mesh: Mesh, n_views: int = N_VIEWS) -> None:
        device = asset.adapter.device
        self.caster = Caster(mesh.vertices, mesh.faces, device)
        self.views = views(asset, self.caster, n_views)
        self.normals = torch.as_tensor(mesh.normals, dtype=torch.float32, device=device)
        colors, weight = fuse(self.views, self.caster.vertices, self.normals)
        fill = spread(mesh, colors.cpu().numpy(), weight.cpu().numpy())
        self.fill = torch.from_numpy(fill).to(device, torch.float32)
        self.vertices = blended(colors, weight, self.fill)

    def at(self, hits: Hits) -> torch.Tensor:
        """Return the colours (m, 3) in [0, 1] of the m points of the surface that `hits` of `self.caster` found."""
        parts = [self._at(Hits(*part)) for part in zip(*(x[hits.hit].split(POINTS) for x in hits))]
        return torch.cat(parts) if parts else self.vertices[:0]

    def _at(self, hits: Hits) -> torch.Tensor:
        points = self.caster.interpolate(self.caster.vertices, hits)
        normals = F.normalize(self.caster.interpolate(self.normals, hits), dim=1)
        return blended(*fuse(self.views, points, normals), self.caster.interpolate(self.fill, hits))


def blended(own: torch.Tensor, weight: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Return the colours (n, 3) of points: their own, as far as their weights (n,) are trusted, and `fill`."""
    share = (weight / TRUSTED).clamp(max=1)[:, None]
    return share * own + (1 - share) * fill


def spread(mesh: Mesh, colors: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return colours (V, 3) of all vertices, of those that views show (V, 3) and their weights (V,).

    A vertex of weight SURE keeps its colour. Others are harmonic between these: each is the mean of its neighbours,
    which count by 1 / distance. What is seen badly is left out here, since the background bleeds into it: it borders on
    all that is not seen. In a part of the mesh where none is sure, all with any weight keep theirs. A part without any
    has the mean colour of all that keep theirs.
    """
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import spsolve

    n = len(mesh.vertices)
    ends = np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]])
    length = np.linalg.norm(mesh.vertices[ends[:, 0]] - mesh.vertices[ends[:, 1]], axis=1).clip(1e-9)
    graph = coo_matrix((1 / length, ends.T), (n, n)).tocsr()
    graph = graph + graph.T
    part = connected_components(graph, directed=False)[1]
    known = weight >= SURE
    known |= (weight > 0) & ~np.isin(part, part[known])
    free = ~known & np.isin(part, part[known])
    out = np.where(known[:, None], colors, colors[known].mean(0) if known.any() else GREY).astype(np.float64)
    if free.any():
        laplacian = (diags(np.asarray(graph.sum(1)).ravel()) - graph).tocsr()[free]
        out[free] = spsolve(laplacian[:, free].tocsc(), -(laplacian[:, known] @ out[known])).reshape(-1, 3)
    return out.clip(0, 1)


# ---------------------------------------------------------------- onto a mesh


def with_vertex_colors(asset: Asset, mesh: Mesh, n_views: int = N_VIEWS) -> Mesh:
    """Return a mesh with the colours of an asset at its vertices."""
    return mesh._replace(colors=_to_uint8(Paint(asset, mesh, n_views).vertices), uv=None, texture=None)


def with_atlas(asset: Asset, mesh: Mesh, size: int, n_views: int = N_VIEWS) -> Mesh:
    """Return a mesh with the colours of an asset in a texture of `size` x `size`; vertices are doubled along its seams.

    Texels beside a chart repeat the nearest one in it, so that no seam shows under bilinear filtering and in small
    copies of the texture. Where texels are much finer than the pixels of the views, only one in four is fused, and the
    others lie between these.
    """
    paint = Paint(asset, mesh, n_views)
    origin, faces, uv = unwrap(mesh, size)
    vertices = mesh.vertices[origin]
    texel = texel_edge(vertices, faces, uv, size)
    if size % 2 == 0 and FINE * texel < paint.views.pixel:
        half = torch.from_numpy(bake(paint, mesh.faces, faces, uv, size // 2)).permute(2, 0, 1)[None].float()
        fine = F.interpolate(half, (size, size), mode="bilinear", align_corners=False)[0]
        texture = _to_uint8(fine.permute(1, 2, 0) / 255)
    else:
        texture = bake(paint, mesh.faces, faces, uv, size)
    return Mesh(vertices, faces, mesh.normals[origin], uv=uv, texture=texture)


def texel_edge(vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray, size: int) -> float:
    """Return the edge of a texel of an atlas on the surface, world units: the root of the mean area."""
    a, b, c = vertices.astype(np.float64)[faces.T]
    surface = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum()
    (ax, ay), (bx, by), (cx, cy) = (corner.T for corner in uv.astype(np.float64)[faces.T])
    covered = np.abs((bx - ax) * (cy - ay) - (by - ay) * (cx - ax)).sum() * size**2
    return float(np.sqrt(surface / covered))


def unwrap(mesh: Mesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an atlas of a mesh: the old vertex (N,) of each new one, faces (F, 3) of these, and their uv (N, 2), v up.

    Faces keep their order and their first corner. Charts lie GUTTER texels of a texture of `size` x `size` apart.
    """
    import xatlas

    atlas = xatlas.Atlas()
    atlas.add_mesh(mesh.vertices, mesh.faces.astype(np.uint32), mesh.normals)
    charts, pack = xatlas.ChartOptions(), xatlas.PackOptions()
    pack.resolution, pack.padding, pack.bilinear, pack.create_image = size, GUTTER, True, False
    atlas.generate(charts, pack)
    origin, faces, uv = atlas[0]
    return origin.astype(np.int64), faces.astype(np.int32), uv.astype(np.float32)


def bake(paint: Paint, faces: np.ndarray, split: np.ndarray, uv: np.ndarray, size: int) -> np.ndarray:
    """Return the texture (size, size, 3) uint8 of an atlas: the colour of the surface at the centre of each texel.

    Args:
        faces: (F, 3) of the vertices of `paint`.
        split: (F, 3) the same faces, of the vertices of the atlas.
        uv: (N, 2) of the vertices of the atlas, v up.
    """
    from scipy.ndimage import distance_transform_edt

    assert len(faces) == len(split)
    flat = Caster(np.pad(uv, ((0, 0), (0, 1))), split, paint.caster.device)  # the atlas is a mesh in a plane
    texture = np.zeros((size * size, 3), np.uint8)
    covered = np.zeros(size * size, bool)
    for texels in torch.arange(size * size).split(TEXELS):
        u, v = (texels % size + 0.5) / size, 1 - (texels // size + 0.5) / size
        rays_o = torch.stack([u, v, torch.ones_like(u)], dim=1)
        hits = flat.cast(rays_o, torch.tensor([[0.0, 0.0, -1.0]]).expand_as(rays_o))
        hit = hits.hit.cpu().numpy()
        texture[texels.numpy()[hit]] = _to_uint8(paint.at(hits))
        covered[texels.numpy()] = hit
    outside = ~covered.reshape(size, size)
    nearest = distance_transform_edt(outside, return_distances=False, return_indices=True)
    return texture.reshape(size, size, 3)[tuple(nearest)]


def _to_uint8(colors: torch.Tensor) -> np.ndarray:
    return (colors * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
