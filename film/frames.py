"""Frames of a field along a path of cameras, before the run's background, a plain colour, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

import pose
from asset import Asset
from my.errors import is_out_of_memory
from my.host_copy import HostCopy
from options.film import FilmConfig
from voxnerf.render import CHUNK, EMPTY, averaged, without_background

MOST = 4  # frames that are decoded at a time
HALF, SOLID = 0.5, 0.8  # opacity from which a decoder shows some, and all, of the own colour of an object
THIN = 0.01  # weight of what is solid only next to an edge: of thin parts there is nothing else
NEARER = 0.8  # distance of the ellipse at the sides, as a share of that in front


def cameras(cfg: FilmConfig, fov: float, radius: float) -> list[pose.Camera]:
    """Return the cameras of a path; `radius` is the distance where the options give none."""
    radius = cfg.radius or radius
    if cfg.path == "spiral":
        return pose.spiral(cfg.n_frames, radius, radius, fov=fov)[cfg.n_skipped :]
    return pose.ring(cfg.n_frames, radius, cfg.elevation, NEARER if cfg.path == "ellipse" else 1.0, fov)


class InChunks:
    """Decodes frames (B, ...) some at a time, and from where the memory runs out half as many; raises for one."""

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor], most: int = MOST) -> None:
        self.decode, self.n = decode, most

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        done: list[torch.Tensor] = []
        at = 0
        while at < len(x):
            part = x[at : at + self.n]
            decoded = self._try(part)
            if decoded is None:
                self.n = max(1, len(part) // 2)
                if x.is_cuda:
                    torch.cuda.empty_cache()
                continue
            done.append(decoded)
            at += len(part)
        return torch.cat(done)

    def _try(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the decoded frames, None where memory ran out for more than one."""
        try:
            return self.decode(x)
        except (RuntimeError, MemoryError) as error:
            if len(x) == 1 or not is_out_of_memory(error):
                raise
            return None


class Frames:
    """The frames of an asset: pictures (H, W, 3), or (H, W, 4) with straight alpha, and depths (h, w).

    hw: edge of the rendering that is decoded.  rays: per edge of a pixel of it.
    color: RGB in [0, 1] behind the object; None is the run's own background.
    alpha: leave out what is behind the object.
    """

    def __init__(
        self, asset: Asset, hw: int, rays: int, color: Sequence[float] | None = None, alpha: bool = False
    ) -> None:
        self.asset, self.hw, self.rays = asset, hw, rays
        self.color = None if color is None else torch.tensor(color, device=asset.adapter.device)[:, None, None]
        self.decode = InChunks(asset.adapter.decode)
        self.plain: torch.Tensor | None = None
        if alpha or color is not None:
            asset.field.clear_fog()
            self.plain = asset.encoded(torch.ones(3, 1, 1, device=asset.adapter.device))
            self.behind = self.decode(asset.stretched(self.plain, hw).T.reshape(1, -1, hw, hw))

    @torch.no_grad()
    def along(self, cameras: Sequence[pose.Camera], at_once: int = MOST) -> Iterator[list[HostCopy]]:
        """Yield copies (picture uint8, depth) of the frames of `cameras`, `at_once` at a time."""
        for i in range(0, len(cameras), at_once):
            views = [self._render(camera) for camera in cameras[i : i + at_once]]
            x, depth, opacity = (torch.stack(maps) for maps in zip(*views))
            pictures = self._composed(self.decode(x), opacity[:, None])
            pictures = (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
            yield [HostCopy(*frame) for frame in zip(pictures, depth)]

    def _render(self, camera: pose.Camera) -> list[torch.Tensor]:
        """Return colour (C, hw, hw), depth and opacity (hw, hw) of a view."""
        r = self.asset.render(camera, self.hw, subpixels=self.rays, downscale=self.rays, chunk=CHUNK, plain=self.plain)
        return averaged(r.color, r.depth, r.opacity, n=self.rays)

    def _composed(self, pictures: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Return decoded pictures (B, 3, H, W) before `color`, or with straight alpha: (B, 4, H, W).

        opacity: (B, 1, h, w).  The pictures are before white. What the decoder made of white is taken out of each by
        the opacity o, P - (1 - o) P_white, within [0, o]. So the new background is exact where o is 0.
        """
        if self.plain is None:
            return pictures
        o = F.interpolate(opacity, pictures.shape[-2:], mode="bilinear").clamp(0, 1)
        o = torch.where(o < EMPTY, 0, o)
        rgb = without_background(pictures, o, self.behind)
        if self.asset.latent:
            rgb = edges_from_inside(rgb, o, pictures.shape[-1] // opacity.shape[-1])
        return torch.cat([rgb, o], dim=1) if self.color is None else o * rgb + (1 - o) * self.color


def edges_from_inside(rgb: torch.Tensor, o: torch.Tensor, scale: int) -> torch.Tensor:
    """Return colours (B, 3, H, W) whose edges, by opacity o (B, 1, H, W), have the colour of what is solid near them.

    A decoder blends an object with what is behind it over another width than the opacity does. Where the object is
    not solid, its colour would be a halo before another background. What has nothing solid near keeps its colour.

    scale: pixels per pixel of the rendering.
    """
    solid = ((o - HALF) / (SOLID - HALF)).clamp(0, 1)
    within = -F.max_pool2d(-solid, 2 * scale + 1, 1, scale)  # not next to an edge
    weighed = within + THIN * solid
    near = F.avg_pool2d(torch.cat([rgb * weighed, weighed], dim=1), 6 * scale + 1, 1, 3 * scale)
    weight = near[:, 3:]
    inside = torch.where(weight > 0, near[:, :3] / weight.clamp(min=torch.finfo(weight.dtype).tiny), rgb)
    return torch.lerp(inside, rgb, within)
