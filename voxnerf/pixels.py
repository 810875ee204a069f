"""The pixels of many images of any sizes, and the cameras that give their rays."""

import torch

from voxnerf.lens import Lenses
from voxnerf.rays import intersect_aabb


class Pixels:
    """All pixels of a scene's images, end to end on a device, that can be drawn from.

    Args:
        scene: a `Scene`; pixels that are not usable are never drawn.
    """

    def __init__(self, scene, device=None):
        self.colors = torch.cat([image.flatten(0, 1) for image in scene.images]).to(device)  # (N, 3) uint8, on white
        self.alpha = torch.cat([alpha.flatten() for alpha in scene.alpha]).to(device)  # (N,) uint8
        self.opaque = bool((self.alpha == 255).all())
        sizes = torch.tensor(scene.sizes, device=device)  # (n, 2)
        self.widths = sizes[:, 1].contiguous()
        self.ends = sizes.prod(dim=1).cumsum(0)  # (n,) where each image's pixels end
        self.usable = None  # or the pixels that may be drawn, (m,)
        if scene.usable is not None:
            self.usable = torch.cat([usable.flatten() for usable in scene.usable]).nonzero()[:, 0].to(device)

    def __len__(self):
        """How many pixels may be drawn."""
        return len(self.colors if self.usable is None else self.usable)

    def draw(self, n, generator):
        """Return `n` pixels (n,), random ones of those that may be drawn, as indices of all."""
        drawn = torch.randint(len(self), (n,), generator=generator).to(self.colors.device, non_blocking=True)
        return drawn if self.usable is None else self.usable[drawn]

    def locate(self, pixel):
        """Return which image pixels (m,) belong to, and their y and x there, each (m,)."""
        image = torch.searchsorted(self.ends, pixel, right=True)
        width = self.widths[image]
        inside = pixel - torch.where(image > 0, self.ends[image - 1], 0)
        return image, inside // width, inside % width


class PixelCameras:
    """n cameras on a device, that give the rays of any of their pixels in one go.

    Args:
        K: (n, 3, 3) float64 intrinsics, as in `pose.intrinsics`.
        c2w: (n, 4, 4) float64 camera-to-world poses.
        lenses: list of n `Lens`, or None for pinholes.
    """

    def __init__(self, K, c2w, device=None, lenses=None):
        K_inv = torch.linalg.inv(K)
        self.to_world = (c2w[:, :3, :3] @ K_inv).to(device)  # (n, 3, 3), of homogeneous pixels
        self.eyes = c2w[:, :3, 3].to(device)  # (n, 3)
        self.lenses = None if lenses is None else Lenses(lenses, device)
        self.R, self.K_inv = c2w[:, :3, :3].to(device), K_inv.to(device)

    def rays(self, camera, y, x, dtype=torch.float32):
        """Return the rays of cameras `camera` (m,) integers through `y`, `x` (m, n), pixels: integers at their centres.

        They are rays_o, rays_d (m, n, 3), origins in world units and unit directions, computed in
        float64 and returned as `dtype`: those that `rays.pixel_rays` gives for the whole image.
        """
        pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(self.to_world)  # (m, n, 3)
        if self.lenses is None:
            rays_d = pixels @ self.to_world[camera].mT
        else:
            rays_d = self.lenses.bend(camera, pixels @ self.K_inv[camera].mT) @ self.R[camera].mT
        rays_d = rays_d / rays_d.norm(dim=-1, keepdim=True)
        return self.eyes[camera][:, None].expand_as(rays_d).to(dtype), rays_d.to(dtype)

    def facing(self):
        """Return the mean cosine between where the cameras look and where the origin is, in [-1, 1]."""
        distance = self.eyes.norm(dim=-1).clamp(min=1e-9)  # a camera at the origin counts as 0
        return ((self.R[:, :, 2] * self.eyes).sum(dim=-1) / distance).mean().item()

    def share_inside(self, half_edge):
        """Return the share of the cameras that stand in a cube round the origin."""
        return (self.eyes.abs().amax(dim=-1) <= half_edge).double().mean().item()

    def share_through(self, box, sizes, usable=None, n=16):
        """Return the share of rays, n x n of each image, that pass through a box (2, 3).

        sizes: (H, W) of each image; usable: (H, W) bool of each, False for pixels that do not count, or None.
        """
        part = torch.linspace(0, 1, n, device=box.device, dtype=torch.float64)
        edges = torch.tensor(sizes, device=box.device, dtype=torch.float64) - 1  # (m, 2)
        y, x = (torch.cartesian_prod(part, part).T[:, None] * edges.T[..., None]).unbind()  # (m, n * n) each
        rays = self.rays(torch.arange(len(self.eyes), device=box.device), y, x, dtype=torch.float64)
        _, _, hits = intersect_aabb(*(each.flatten(0, 1) for each in rays), box)
        if usable is not None:
            near = zip(usable, y.round().long().cpu(), x.round().long().cpu())
            hits = hits[torch.cat([mask[rows, columns] for mask, rows, columns in near]).to(hits.device)]
        return hits.double().mean().item()
