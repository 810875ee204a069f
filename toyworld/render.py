"""Pictures of the toy world: objects are sphere-traced once (Hart, 1996), and any colour is then one product."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce

from pose import Camera
from voxnerf.rays import pixel_rays

from .objects import ACCENTS, BODY, OBJECTS
from .words import COLORS

BOUND = 0.70  # radius of a ball at the origin that holds every object
LIGHT = (-0.45, 0.80, 0.40)  # direction towards the light, fixed in world space
AMBIENT = 0.35
MAX_STEPS, STEP_SCALE, HIT = 96, 0.9, 1e-3
BACKGROUND_RANGE = (0.75, 1.0)  # of the random light backgrounds in training data

KEPT = 1024  # results of `coverage_maps`: several runs in one process have the same cameras and objects

BLUR = 0.04  # standard deviation of the Gaussian of blurry pictures, in edges of the picture
FADED, FOGGY = 0.4, 0.4  # what is left of the contrast to white; of the object's opacity


def distance(obj: str, p: torch.Tensor) -> torch.Tensor:
    """Return the signed distance (N,) of points p (N, 3) to the object named `obj`."""
    return torch.stack([d for d, _ in OBJECTS[obj](p)]).amin(dim=0)


def _trace(obj: str, rays_o: torch.Tensor, rays_d: torch.Tensor) -> torch.Tensor:
    """Return the distance along each ray (N,) to the surface, inf where it misses."""
    t_hit = torch.full(rays_o.shape[:1], torch.inf)
    mid = -(rays_o * rays_d).sum(1)
    half2 = BOUND**2 - (rays_o + mid[:, None] * rays_d).pow(2).sum(1)
    live = torch.nonzero(half2 > 0)[:, 0]
    half = half2[live].sqrt()
    t, t_far = (mid[live] - half).clamp(min=0), mid[live] + half
    for _ in range(MAX_STEPS):
        d = distance(obj, rays_o[live] + t[:, None] * rays_d[live])
        hit = d < HIT
        t_hit[live[hit]] = t[hit]
        t = t + STEP_SCALE * d
        keep = ~hit & (t < t_far)
        live, t, t_far = live[keep], t[keep], t_far[keep]
        if not len(live):
            break
    return t_hit


def _normal(obj: str, p: torch.Tensor) -> torch.Tensor:
    """Return the outward unit normal (N, 3): central differences of the distance."""
    offsets = 1e-3 * torch.eye(3)
    both = torch.cat([p + s * o for s in (1, -1) for o in offsets])
    d = distance(obj, both).reshape(2, 3, -1)
    return F.normalize((d[0] - d[1]).T, dim=1)


def coverage_maps(obj: str, cameras: Sequence[Camera], size: int = 64, subpixels: int = 2) -> torch.Tensor:
    """Return the maps (n, 5, size, size) uint8 of an object from n cameras, which `compose` colours.

    Channels: shaded coverage of the body, shaded accents (3, RGB), coverage of the whole object. `subpixels` is the
    number of rays per pixel edge. The maps are kept for the next call with such cameras: do not write to them.
    """
    return _traced(obj, Places(cameras), size, subpixels)


class Places(tuple[Camera, ...]):
    """Cameras as a key: equal where they see the same."""

    def seen(self) -> bytes:
        """Return what decides the pictures."""
        return b"".join(np.append(camera.c2w, camera.fov).tobytes() for camera in self)

    def __hash__(self) -> int:
        return hash(self.seen())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places) and self.seen() == other.seen()


@functools.lru_cache(maxsize=KEPT)
def _traced(obj: str, cameras: Places, size: int, subpixels: int) -> torch.Tensor:
    rays = [pixel_rays(size, size, c.K(size, size), c.c2w, subpixels) for c in cameras]
    rays_o, rays_d = (torch.cat(r) for r in zip(*rays))
    t = _trace(obj, rays_o, rays_d)
    hit = torch.isfinite(t)
    p = rays_o[hit] + t[hit, None] * rays_d[hit]
    parts = OBJECTS[obj](p)
    nearest = torch.stack([d for d, _ in parts]).argmin(dim=0)
    albedo = torch.tensor([(1, 0, 0, 0, 1) if m == BODY else (0, *ACCENTS[m], 1) for _, m in parts])[nearest]
    light = F.normalize(torch.tensor(LIGHT), dim=0)
    half_lambert = 0.5 + 0.5 * (_normal(obj, p) @ light)  # the shadowed side keeps its form
    albedo[:, :4] *= (AMBIENT + (1 - AMBIENT) * half_lambert)[:, None]
    fine = torch.zeros(len(t), 5)
    fine[hit] = albedo
    maps = reduce(fine, "(n h a w b) c -> n c h w", "mean", h=size, w=size, a=subpixels, b=subpixels)
    return (maps * 255).round().to(torch.uint8)


def compose(
    maps: torch.Tensor, color: str | Sequence[float] | torch.Tensor, background: Sequence[float] | torch.Tensor
) -> torch.Tensor:
    """Return pictures (..., 3, H, W) in [0, 1] from maps (..., 5, H, W).

    `color` and `background` are RGB in [0, 1], (3,) or (..., 3); `color` may be a name of COLORS.
    """
    maps = maps.float() / 255
    color = torch.as_tensor(COLORS[color] if isinstance(color, str) else color)
    body, accents, alpha = maps[..., :1, :, :], maps[..., 1:4, :, :], maps[..., 4:, :, :]
    background = torch.as_tensor(background)
    return body * color[..., None, None] + accents + (1 - alpha) * background[..., None, None]


def degraded(
    maps: torch.Tensor,
    color: str | Sequence[float] | torch.Tensor,
    background: Sequence[float] | torch.Tensor,
    how: str,
) -> torch.Tensor:
    """Return what `compose` does for maps (n, 5, H, W), made bad: blurry, faded to white, or the object half fog.

    `how` is one of DEGRADATIONS.
    """
    if how == "foggy":
        return compose(FOGGY * maps, color, background)
    pictures = compose(maps, color, background)
    if how == "faded":
        return 1 - FADED * (1 - pictures)
    assert how == "blurry", how
    return blurred(pictures)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures or maps (n, C, H, W), blurred as blurry pictures are."""
    sigma = BLUR * pictures.shape[-1]
    return gaussian_blur(pictures, sigma, math.ceil(3 * sigma))


def gaussian_blur(pictures: torch.Tensor, sigma: float, reach: int) -> torch.Tensor:
    """Return pictures (n, C, H, W) blurred by a Gaussian of `sigma` pixels, cut at `reach` pixels.

    Beyond their edges pictures go on as they end.
    """
    taps = torch.softmax(-((torch.arange(-reach, reach + 1) / sigma) ** 2) / 2, 0).to(pictures)
    n = pictures.shape[1]
    for shape, pad in (((1, 1, -1, 1), (0, 0, reach, reach)), ((1, 1, 1, -1), (reach, reach, 0, 0))):
        kernel = taps.view(shape).expand(n, -1, -1, -1)
        pictures = F.conv2d(F.pad(pictures, pad, mode="replicate"), kernel, groups=n)
    return pictures
