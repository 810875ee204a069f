"""The cameras of training steps and their rays: drawn, and on the device before their steps need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import pose
from my.ahead import Ahead, to_device
from my.exact import exact_device
from my.seeds import numpy_rng
from voxnerf.field import VoxRF
from voxnerf.rays import Rays, pixel_rays, through

if TYPE_CHECKING:
    from options.sjc import SJCConfig

NUMBERS_PER_RAY = 16  # about: origin, direction, range, and the same in voxels


class Views(NamedTuple):
    """What a step looks at: b cameras, and the rays of their pixels, camera after camera, row after row."""

    cameras: list[pose.Camera]
    rays: Rays  # of b * hw * hw rays


class TrainRays:
    """The views of each step of a run through a field whose box stays.

    own: which of the B views of a step are made.
    """

    def __init__(self, cfg: SJCConfig, field: VoxRF, own: range) -> None:
        self.cfg, self.field, self.own = cfg, field, own
        n_rays = len(own) * cfg.pose.rend_hw**2
        self._views = Ahead(self._make, n_rays * NUMBERS_PER_RAY, field.aabb.device)
        self.of_step = self._views.of_step

    def draw(self, i: int) -> list[pose.Camera]:
        """Return the own cameras of step `i`."""
        p, B, cameras = self.cfg.pose, self.cfg.batch_views, []
        for k in range(i * B + self.own.start, i * B + self.own.stop):  # of the run's views
            opposite = p.antithetic and k % 2 == 1
            step, b = divmod(k - opposite, B)
            rng = numpy_rng(self.cfg.seed, step, f"camera/{b}")
            cameras.append(pose.train_camera(rng, p.R, p.fov_range, p.view_words, opposite))
        return cameras

    def _make(self, first: int, n: int) -> list[Views]:
        """Return the views of n steps."""
        drawn, hw, device = (
            [self.draw(i) for i in range(first, first + n)],
            self.cfg.pose.rend_hw,
            exact_device(self.field.aabb.device),
        )
        K = to_device(np.array([[camera.K(hw, hw) for camera in row] for row in drawn]), device)
        c2w = to_device(np.array([[camera.c2w for camera in row] for row in drawn]), device)
        rays_o, rays_d = pixel_rays(hw, hw, K, c2w)  # (n, b, hw * hw, 3)
        rays = through(self.field, rays_o.flatten(0, 2), rays_d.flatten(0, 2))
        return [Views(row, Rays(*each)) for row, *each in zip(drawn, *(x.unflatten(0, (n, -1)) for x in rays))]
