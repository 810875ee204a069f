"""A circle of cameras round a scene, as the scene's own cameras suggest it."""

from __future__ import annotations

import numpy as np
import torch

import pose

MAX_ELEVATION = np.deg2rad(80)  # of an orbit: at the pole, a camera has no upright


def orbit(c2w: np.ndarray | torch.Tensor, n: int) -> np.ndarray:
    """Return n poses (n, 4, 4) float64 of a circle round the origin, as the cameras c2w (m, 4, 4) stand round it.

    It has their mean distance and mean elevation, and turns about their `vertical`.
    """
    c2w = np.asarray(c2w)
    up, eyes = vertical(c2w), c2w[:, :3, 3]
    radius = np.linalg.norm(eyes, axis=1)
    elevation = np.arcsin((eyes @ up / radius.clip(1e-9)).clip(-1, 1)).mean().clip(-MAX_ELEVATION, MAX_ELEVATION)
    side = c2w[0, :3, 0] - (c2w[0, :3, 0] @ up) * up
    side /= np.linalg.norm(side)
    angle = 2 * np.pi * np.arange(n)[:, None] / n
    ring = np.cos(angle) * side + np.sin(angle) * np.cross(up, side)  # (n, 3)
    eyes = radius.mean() * (np.cos(elevation) * ring + np.sin(elevation) * up)
    return np.stack([pose.look_at(eye, up=up) for eye in eyes])


def vertical(c2w: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return the unit vector (3,) that points upwards for cameras c2w (m, 4, 4).

    It is the part of their mean y axis that is at right angles to their x axes. These are level, unless a camera is
    rolled: so an uneven ring of cameras that look down does not tilt the vector.
    """
    c2w = np.asarray(c2w)
    x, y = c2w[:, :3, 0], c2w[:, :3, 1]
    up = np.linalg.solve(x.T @ x / len(x) + 1e-6 * np.eye(3), y.mean(axis=0))
    return up / np.linalg.norm(up)
