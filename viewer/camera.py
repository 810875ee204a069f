"""Cameras of the browser as cameras of the project.

The browser's are OpenCV's: x right, y down, looking along z. `pose.py` has OpenGL's: x right, y up, looking along -z.
Both have the world's frame, y up, and differ by half a turn round x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

import pose


def camera_of(wxyz: Sequence[float], position: Sequence[float], fov: float, height: int, width: int) -> pose.Camera:
    """Return the camera of a browser.

    Args:
        wxyz: unit quaternion, OpenCV camera to world.  position: of the camera, world units.
        fov: vertical, radians.  height, width: of its picture, in any unit.
    """
    c2w = np.eye(4)
    c2w[:3, :3] = rotation(wxyz) * (1.0, -1.0, -1.0)
    c2w[:3, 3] = position
    return pose.Camera(c2w, math.degrees(across(fov, width / height)))


def rotation(wxyz: Sequence[float]) -> np.ndarray:
    """Return the rotation matrix (3, 3) of a quaternion of any length but 0."""
    w, x, y, z = np.asarray(wxyz, np.float64) / np.linalg.norm(wxyz)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def across(fov: float, factor: float) -> float:
    """Return the angle, radians, that sees `factor` times the width that the angle `fov` sees."""
    return 2 * math.atan(math.tan(fov / 2) * factor)


def fov_down(fov: float, height: int, width: int) -> float:
    """Return the vertical angle, radians, that shows what `fov` degrees show on the shorter side of a picture."""
    return across(math.radians(fov), max(1.0, height / width))
