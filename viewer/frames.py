"""Pictures of a run's field for any camera: what it looks like, its latents, its depth, its opacity."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import pose
from asset import TEST_BACKGROUND, Asset
from my.media import depth_image, to_uint8
from viewer.moments import Moments
from voxnerf.field import VoxRF
from voxnerf.render import CHUNK, Rendering, render_image

MODES = ("picture", "latent", "depth", "opacity")  # latent is for fields of latents
LEAST = 32  # rows of a picture, at least
FIT_EDGE = 8  # of the plain pictures that `LatentColors` is fitted to, in pixels of latents


class View(NamedTuple):
    """What is asked for: a camera, rows and columns of pixels, one of MODES, and the steps of the field."""

    camera: pose.Camera
    height: int
    width: int
    mode: str
    step: int


class Frames:
    """Makes pictures of a run's fields. Several threads may ask it.

    `seconds` {mode: s per pixel} is what pictures took lately; it has no mode that was not made yet.
    """

    def __init__(self, asset: Asset, moments: Moments) -> None:
        self.asset, self.moments = asset, moments
        self.factor = asset.adapter.picture_size // asset.adapter.data_shape[1] if asset.latent else 1
        self.modes = tuple(mode for mode in MODES if mode != "latent" or asset.latent)
        self.latent_colors = LatentColors(asset) if asset.latent else None
        self.seconds: dict[str, float] = {}
        self.rendering = threading.Lock()  # the renderer's memory is for one thread at a time

    def warm_up(self) -> None:
        """Make a small picture of each mode twice: the first takes long, and the second is how long one takes."""
        camera = pose.camera_at(0.0, 1.5, self.asset.cfg.pose.R, self.asset.cfg.pose.FoV)
        for _ in range(2):
            self.seconds.clear()
            for mode in self.modes:
                self.picture(View(camera, 2 * LEAST, 2 * LEAST, mode, self.asset.n_steps_taken))

    def picture(self, view: View, stop: Callable[[], bool] = lambda: False) -> np.ndarray | None:
        """Return a view as uint8 (h, w, 3), or None as soon as `stop()` is true.

        h and w are those of the view, rounded to whole latents where these are decoded.
        Raises RunError where the field of that step cannot be read.
        """
        with self.rendering:
            field = self.moments.at(view.step)
        started = time.perf_counter()
        factor = self.factor if view.mode == "picture" else 1
        height, width = (max(1, round(n / factor)) for n in (view.height, view.width))
        r = self._render(field, view.camera, height, width, stop)
        if r is None or stop():
            return None
        image = self._image(r, view.mode)
        taken = (time.perf_counter() - started) / (image.shape[0] * image.shape[1])
        self.seconds[view.mode] = (taken + self.seconds.get(view.mode, taken)) / 2
        return image

    @torch.no_grad()
    def _render(
        self, field: VoxRF, camera: pose.Camera, height: int, width: int, stop: Callable[[], bool]
    ) -> Rendering | None:
        """Render an image of height x width pixels of the model's space, a few rows at a time; None when stopped."""
        cfg = self.asset.cfg
        bg = self.asset.background(TEST_BACKGROUND, height, width=width)
        rows = max(1, CHUNK // width)
        parts = []
        for first in range(0, height, rows):
            if stop():
                return None
            n = min(rows, height - first)
            K = camera.K(height, width)
            K[1, 2] += first  # the image begins at this row
            part_bg = None if bg is None else bg[first * width : (first + n) * width]
            with self.rendering:
                parts.append(render_image(field, K, camera.c2w, n, width, part_bg, renderer=cfg.renderer))
        return Rendering(*(torch.cat(x, dim=-2) for x in zip(*parts)))

    @torch.no_grad()
    def _image(self, r: Rendering, mode: str) -> np.ndarray:
        """Return a rendering as uint8 (h, w, 3)."""
        if mode == "depth":
            return depth_image(r.depth.cpu().numpy(), *self.asset.depth_range)
        if mode == "opacity":
            return to_uint8(r.opacity[..., None].expand(-1, -1, 3).cpu().numpy())
        if mode == "latent" and self.latent_colors:
            return to_uint8(self.latent_colors(r.color).permute(1, 2, 0).cpu().numpy())
        return to_uint8(self.asset.adapter.decode(r.color[None])[0].permute(1, 2, 0).cpu().numpy())

    def quick(self, view: View, budget: float) -> View:
        """Return the view at the most pixels that take about `budget` seconds, by what the last pictures took.

        It has all, half, a quarter, ... of its rows. Where a decoder is too slow for the fewest, it is of the latents.
        """
        for mode in [view.mode] + ["latent"] * (view.mode == "picture" and "latent" in self.modes):
            for halvings in itertools.count():
                height, width = view.height >> halvings, view.width >> halvings
                if min(height, width) < LEAST and halvings:
                    break
                smaller = view._replace(height=height, width=width, mode=mode)
                if self.seconds.get(mode, 0.0) * height * width <= budget:
                    return smaller
        return smaller


class LatentColors:
    """Colours RGB of latents, for a look at them without their decoder: an affine map.

    It is fitted, by least squares, to the latents of plain pictures: the middle of each, since an encoder leaves a mark
    along the border.
    """

    def __init__(self, asset: Asset) -> None:
        adapter = asset.adapter
        rgb = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)), device=adapter.device)  # (27, 3)
        size = FIT_EDGE * (adapter.picture_size // adapter.data_shape[1])
        latents = []
        with torch.no_grad():
            for color in rgb:
                x = adapter.encode(color[None, :, None, None].expand(1, 3, size, size))
                latents.append(x[0, :, x.shape[2] // 2, x.shape[3] // 2])
        x = torch.stack(latents).cpu().double()
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        fit = np.linalg.lstsq(torch.cat([x, ones], 1).numpy(), rgb.cpu().double().numpy(), rcond=None)[0]
        self.matrix = torch.tensor(fit.T, dtype=torch.float32, device=adapter.device)  # (3, C + 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the colours (3, H, W) of latents x (C, H, W), not clipped."""
        return torch.einsum("oc,chw->ohw", self.matrix[:, :-1], x) + self.matrix[:, -1, None, None]
