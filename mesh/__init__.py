"""A field as a mesh or as splats: `surface.py` and `splat.py` find it, `colours.py` colours it, `files.py` writes it.

`cast.py` casts rays onto a mesh, and `compare.py` says how near it is to its field.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Mesh(NamedTuple):
    """Triangles, in world units and in the world frame of `pose.py`: y up, the front of an object faces -x."""

    vertices: np.ndarray  # (V, 3) float32
    faces: np.ndarray  # (F, 3) int32, counter-clockwise as seen from outside
    normals: np.ndarray  # (V, 3) float32, unit, outward
    colors: np.ndarray | None = None  # (V, 3) uint8, sRGB
    uv: np.ndarray | None = None  # (V, 2) float32 in [0, 1], v up
    texture: np.ndarray | None = None  # (H, W, 3) uint8, sRGB, row 0 on top
