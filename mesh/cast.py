"""Rays onto a mesh: what each meets first, and from this silhouettes and pictures.

Warp does it, on the CPU and on CUDA. Rays are in world units, in the world frame of `pose.py`. They hit both sides of a
triangle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mesh import Mesh
from voxnerf.fused import launch
from voxnerf.rays import pixel_rays

if TYPE_CHECKING:
    import pose

CHUNK = 2**18  # rays at a time
GREY = 0.7  # of a mesh without colours


class Hits(NamedTuple):
    """What n rays meet first."""

    distance: torch.Tensor  # (n,) float32, in units of the direction's length; inf for a miss
    face: torch.Tensor  # (n,) int32, -1 for a miss
    weights: torch.Tensor  # (n, 3) float32, barycentric: of the face's three vertices, in their order; 0 for a miss

    @property
    def hit(self) -> torch.Tensor:
        """Which rays meet something, (n,) bool."""
        return self.face >= 0


class Caster:
    """A mesh that rays are cast onto: vertices (V, 3) and faces (F, 3), on a CPU or a CUDA device."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, device: torch.device | str = "cpu") -> None:
        launch.start()
        import warp as wp

        self.device = torch.device(device)
        self.vertices = torch.as_tensor(np.ascontiguousarray(vertices), dtype=torch.float32, device=self.device)
        self.faces = torch.as_tensor(np.ascontiguousarray(faces), dtype=torch.int32, device=self.device)
        arrays: list[Any] = [wp.from_torch(self.vertices, dtype=wp.vec3), wp.from_torch(self.faces.flatten())]
        cuda = self.device.type == "cuda"  # there, the tree is built in the order of PyTorch's own work
        with wp.ScopedStream(wp.stream_from_torch(self.device)) if cuda else contextlib.nullcontext():
            self._mesh = wp.Mesh(*arrays)  # it keeps views of the tensors above

    def cast(self, rays_o: torch.Tensor, rays_d: torch.Tensor) -> Hits:
        """Return what rays of origins and directions (n, 3) meet first; they may start anywhere."""
        import warp as wp

        from mesh import kernels

        rays = [x.to(self.device, torch.float32).contiguous() for x in (rays_o, rays_d)]
        n = len(rays[0])
        hits = Hits(
            torch.full((n,), torch.inf, device=self.device),
            torch.full((n,), -1, dtype=torch.int32, device=self.device),
            torch.zeros(n, 3, device=self.device),
        )
        if n:
            arrays = [launch.array(x, wp.vec3) for x in rays]
            outputs = [launch.array(hits.distance), launch.array(hits.face), launch.array(hits.weights, wp.vec3)]
            shares = launch.interleaved(n, self.device)
            launch.launch(kernels.nearest, shares, [self._mesh.id, *arrays, *outputs], self.device)
        return hits

    def view(self, camera: pose.Camera, hw: int, subpixels: int = 1) -> Hits:
        """Return what the rays of an hw x hw picture meet, `subpixels` x `subpixels` per pixel, row-major."""
        rays = pixel_rays(hw, hw, camera.K(hw, hw), camera.c2w, subpixels, device=self.device)
        parts = [self.cast(*part) for part in zip(*(x.split(CHUNK) for x in rays))]
        return Hits(*(torch.cat(x) for x in zip(*parts)))

    def interpolate(self, values: torch.Tensor, hits: Hits) -> torch.Tensor:
        """Return the values (m, C) at the m rays of `hits` that meet something, of `values` (V, C) at the vertices."""
        corners = values[self.faces[hits.face[hits.hit].long()].long()]  # (m, 3, C)
        return (hits.weights[hits.hit][..., None] * corners).sum(1)


def silhouette(caster: Caster, camera: pose.Camera, hw: int, subpixels: int = 1) -> np.ndarray:
    """Return the share (hw, hw) of each pixel that a mesh covers, float32 in [0, 1]."""
    hit = caster.view(camera, hw, subpixels).hit.float()
    return _pixels(hit[:, None], hw, subpixels)[..., 0].cpu().numpy()


def render(
    mesh: Mesh,
    camera: pose.Camera,
    hw: int,
    subpixels: int = 1,
    background: np.ndarray | Sequence[float] = (1.0, 1.0, 1.0),
    caster: Caster | None = None,
) -> np.ndarray:
    """Return the unlit picture (hw, hw, 3) of a mesh, float32 in [0, 1], sRGB: its own colours before a background.

    Args:
        subpixels: rays per pixel edge, whose colours are averaged as they are, as in the pictures of the fields.
        background: (3,) or (hw, hw, 3), in [0, 1].
        caster: of this mesh's vertices and faces, so that it need not be made again.
    """
    caster = caster or Caster(mesh.vertices, mesh.faces)
    hits = caster.view(camera, hw, subpixels)
    fine = torch.zeros(len(hits.face), 4, device=caster.device)
    fine[hits.hit] = F.pad(surface_colors(mesh, caster, hits), (0, 1), value=1.0)
    picture = _pixels(fine, hw, subpixels)
    behind = torch.as_tensor(np.asarray(background), dtype=torch.float32, device=caster.device)
    return (picture[..., :3] + (1 - picture[..., 3:]) * behind).cpu().numpy()


def surface_colors(mesh: Mesh, caster: Caster, hits: Hits) -> torch.Tensor:
    """Return the colours (m, 3) in [0, 1] of the points that m of the rays meet: texture, vertex colours or grey."""
    if mesh.texture is not None and mesh.uv is not None:
        uv = caster.interpolate(torch.as_tensor(mesh.uv, device=caster.device), hits)
        return lookup(torch.as_tensor(mesh.texture, device=caster.device), uv)
    if mesh.colors is not None:
        return caster.interpolate(torch.as_tensor(mesh.colors, device=caster.device).float() / 255, hits)
    return torch.full((int(hits.hit.sum()), 3), GREY, device=caster.device)


def lookup(texture: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Return the bilinear values (n, C) in [0, 1] of a texture (H, W, C) uint8, row 0 on top, at uv (n, 2), v up."""
    at = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], dim=1)  # (0, 0) is the corner of a texel, not its centre
    image = texture.permute(2, 0, 1)[None].float() / 255
    return F.grid_sample(image, at[None, None], padding_mode="border", align_corners=False)[0, :, 0].T


def _pixels(fine: torch.Tensor, hw: int, subpixels: int) -> torch.Tensor:
    """Return the means (hw, hw, C) over the pixels of rays' values (n, C)."""
    s = subpixels
    return fine.view(hw, s, hw, s, -1).mean(dim=(1, 3))
