"""The pixels of many images of any sizes, and the cameras that give their rays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from my.exact import exact_device
from voxnerf.lens import Lens, Lenses
from voxnerf.rays import intersect_aabb

if TYPE_CHECKING:
    from voxnerf.scene import Scene


class Pixels:
    """All pixels of a scene's images, end to end on a device. Those that are usable can be drawn."""

    def __init__(self, scene: Scene, device: torch.device | str | None = None) -> None:
        self.colors = torch.cat([image.flatten(0, 1) for image in scene.images]).to(device)  # (N, 3) uint8, on white
        self.alpha = torch.cat([alpha.flatten() for alpha in scene.alpha]).to(device)  # (N,) uint8
        self.opaque = bool((self.alpha == 255).all())
        sizes = torch.tensor(scene.sizes, device=device)  # (n, 2)
        self.widths = sizes[:, 1].contiguous()
        self.ends = sizes.prod(dim=1).cumsum(0)  # (n,) where each image's pixels end
        self.usable: torch.Tensor | None = None  # the pixels that may be drawn, (m,); None for all
        if scene.usable is not None:
            self.usable = torch.cat([usable.flatten() for usable in scene.usable]).nonzero()[:, 0].to(device)

    def __len__(self) -> int:
        """Return how many pixels may be drawn."""
        return len(self.colors if self.usable is None else self.usable)

    def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Return `n` random pixels (n,) out of those that may be drawn, as indices of all pixels."""
        drawn = torch.randint(len(self), (n,), generator=generator)
        drawn = drawn.to(self.colors.device, non_blocking=self.colors.is_cuda)
        return drawn if self.usable is None else self.usable[drawn]

    def locate(self, pixel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return which image each of the pixels (m,) is in, and its y and x there, (m,) each."""
        image = torch.searchsorted(self.ends, pixel, right=True)
        width = self.widths[image]
        inside = pixel - torch.where(image > 0, self.ends[image - 1], 0)
        return image, inside // width, inside % width


class PixelCameras:
    """n cameras on the `exact_device` of a device, which give the rays of any of their pixels at once.

    Args:
        K: (n, 3, 3) float64 intrinsics, as in `pose.intrinsics`.
        c2w: (n, 4, 4) float64 camera-to-world poses.
        lenses: n of them, or None for pinholes.
    """

    def __init__(
        self,
        K: torch.Tensor,
        c2w: torch.Tensor,
        device: torch.device | str | None = None,
        lenses: Sequence[Lens] | None = None,
    ) -> None:
        K_inv, device = torch.linalg.inv(K), exact_device(device)
        self.to_world = (c2w[:, :3, :3] @ K_inv).to(device)  # (n, 3, 3), of homogeneous pixels
        self.eyes = c2w[:, :3, 3].to(device)  # (n, 3)
        self.lenses = None if lenses is None else Lenses(lenses, device)
        self.R, self.K_inv = c2w[:, :3, :3].to(device), K_inv.to(device)

    def rays(
        self, camera: torch.Tensor, y: torch.Tensor, x: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rays rays_o, rays_d (m, n, 3) of cameras number `camera` (m,) through the points `y`, `x` (m, n).

        The points are in pixels, with integers at pixel centres. Origins are world units, directions are unit vectors.
        They are computed in float64 and returned as `dtype`, and equal those of `rays.pixel_rays`.
        """
        camera, y, x = (each.to(self.eyes.device) for each in (camera, y, x))
        pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(self.to_world)  # (m, n, 3)
        if self.lenses is None:
            rays_d = pixels @ self.to_world[camera].mT
        else:
            rays_d = self.lenses.bend(camera, pixels @ self.K_inv[camera].mT) @ self.R[camera].mT
        rays_d = rays_d / rays_d.norm(dim=-1, keepdim=True)
        return self.eyes[camera][:, None].expand_as(rays_d).to(dtype), rays_d.to(dtype)

    def facing(self) -> float:
        """Return the mean cosine, in [-1, 1], between where a camera looks and where it sees the origin."""
        distance = self.eyes.norm(dim=-1).clamp(min=1e-9)  # a camera at the origin counts as 0
        return ((self.R[:, :, 2] * self.eyes).sum(dim=-1) / distance).mean().item()

    def share_inside(self, half_edge: float) -> float:
        """Return the share of the cameras that stand in the cube of this half edge round the origin."""
        return (self.eyes.abs().amax(dim=-1) <= half_edge).double().mean().item()

    def share_through(
        self,
        box: torch.Tensor,
        sizes: Sequence[tuple[int, int]],
        usable: Sequence[torch.Tensor] | None = None,
        n: int = 16,
    ) -> float:
        """Return the share of the images' rays, n x n per image, that pass through a box (2, 3).

        sizes: (H, W) of each image.
        usable: (H, W) bool of each image, False for pixels that do not count; None if all count.
        """
        box = box.to(self.eyes.device)
        part = torch.linspace(0, 1, n, device=box.device, dtype=torch.float64)
        edges = torch.tensor(sizes, device=box.device, dtype=torch.float64) - 1  # (m, 2)
        y, x = (torch.cartesian_prod(part, part).T[:, None] * edges.T[..., None]).unbind()  # (m, n * n) each
        rays = self.rays(torch.arange(len(self.eyes), device=box.device), y, x, dtype=torch.float64)
        _, _, hits = intersect_aabb(rays[0].flatten(0, 1), rays[1].flatten(0, 1), box)
        if usable is not None:
            near = zip(usable, y.round().long().cpu(), x.round().long().cpu())
            hits = hits[torch.cat([mask[rows, columns] for mask, rows, columns in near]).to(hits.device)]
        return hits.double().mean().item()
