"""The cameras of training steps: drawn, and on the device before their steps need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

import pose
from my.seeds import numpy_rng

if TYPE_CHECKING:
    from options.sjc import SJCConfig

AHEAD = 128  # steps whose cameras are copied to the device in one go, so that no step waits for a copy


class AnyCamera(Protocol):
    """What a rendering needs of a camera: a `pose.Camera` has it, and so has a `DeviceCamera`."""

    @property
    def c2w(self) -> np.ndarray | torch.Tensor:
        """The pose (4, 4), camera to world."""

    def K(self, H: int, W: int) -> np.ndarray | torch.Tensor:
        """Return the (3, 3) intrinsics for an H x W image."""


class DeviceCamera(NamedTuple):
    """A training camera on the device, for images of the size that is trained on."""

    matrix: torch.Tensor  # (3, 3)
    c2w: torch.Tensor  # (4, 4)

    def K(self, H: int, W: int) -> torch.Tensor:
        return self.matrix


class TrainCameras:
    """The cameras of each step of a run. Those of AHEAD steps are drawn and copied to the device together."""

    def __init__(self, cfg: SJCConfig, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        self.part = -1  # the cameras at hand are those of AHEAD steps, from step part * AHEAD on
        self.drawn: list[list[pose.Camera]] = []
        self.copied: list[list[DeviceCamera]] = []

    def draw(self, i: int) -> list[pose.Camera]:
        """Return the cameras of step `i`."""
        p = self.cfg.pose
        return [
            pose.train_camera(numpy_rng(self.cfg.seed, i, f"camera/{b}"), p.R, p.fov_range, p.view_words)
            for b in range(self.cfg.batch_views)
        ]

    def of_step(self, i: int) -> tuple[list[pose.Camera], list[DeviceCamera]]:
        """Return the cameras of step `i`, and the same on the device."""
        part, k = divmod(i, AHEAD)
        if part != self.part:
            self.part, self.drawn = part, [self.draw(part * AHEAD + k) for k in range(AHEAD)]
            hw = self.cfg.pose.rend_hw
            K = self._copy([[camera.K(hw, hw) for camera in row] for row in self.drawn])
            c2w = self._copy([[camera.c2w for camera in row] for row in self.drawn])
            self.copied = [list(map(DeviceCamera, *row)) for row in zip(K, c2w)]
        return self.drawn[k], self.copied[k]

    def _copy(self, matrices: list[list[np.ndarray]]) -> torch.Tensor:
        """Return the matrices of AHEAD steps as one float64 tensor on the device."""
        return torch.from_numpy(np.array(matrices)).to(self.device)
