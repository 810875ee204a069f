"""Camera intrinsics, camera-to-world poses and the view prompts that go with them.

World frame: y up, right-handed; an object's front faces -x, its own left is +z. Camera frame:
OpenGL (x right, y up, looking along -z). Pixel centres lie at integer coordinates. All arrays here are float64 and
numpy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from my.errors import UserError

OVERHEAD_DEG = 30.0  # below this elevation draw a camera counts as overhead (published)
HIGH_DEG = 65.0  # `octants` only: below this it counts as high
ELEVATION_SPAN_DEG = 100.0  # elevation draws reach from the pole to a little below the horizon

SIDES: dict[str, tuple[str, ...]] = {
    "sjc": ("front", "side", "backside", "side"),
    "sides": ("front", "left side", "backside", "right side"),
    "octants": ("front", "front left", "left side", "back left", "backside", "back right", "right side", "front right"),
}  # azimuth sectors, counted from the front towards the object's left
VIEW_WORDS = tuple(SIDES)


class Uniform(Protocol):
    """What gives uniform random numbers, such as numpy's Generator."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...


@dataclass(frozen=True)
class Camera:
    """One pinhole camera: `c2w` (4, 4) pose, `fov` horizontal degrees, `view` the view prompt, `azimuth` radians."""

    c2w: np.ndarray
    fov: float
    view: str = ""
    azimuth: float = 0.0

    def K(self, H: int, W: int) -> np.ndarray:
        """Return the (3, 3) intrinsics of this camera for an H x W image."""
        return intrinsics(H, W, self.fov)


def intrinsics(H: int, W: int, fov: float) -> np.ndarray:
    """Return K (3, 3), camera frame to homogeneous pixels (x right, y down).

    `fov` is the horizontal field of view in degrees, in (0, 180); raises ValueError outside.
    """
    if not 0 < fov < 180:
        raise ValueError(f"field of view must lie in (0, 180) degrees, got {fov}")
    f = (W / 2) / np.tan(np.deg2rad(fov) / 2)
    return np.array([[f, 0, -(W / 2 - 0.5)], [0, -f, -(H / 2 - 0.5)], [0, 0, -1]], dtype=np.float64)


def look_at(
    eye: Iterable[float] | np.ndarray,
    target: tuple[float, float, float] = (0.0, 0.0, 0.0),
    up: Sequence[float] | np.ndarray = (0.0, 1.0, 0.0),
) -> np.ndarray:
    """Return the pose c2w (4, 4) of a camera at `eye` looking at `target` (world units)."""
    eye = np.asarray(eye, dtype=np.float64)
    z = _unit(eye - np.asarray(target, dtype=np.float64))  # cameras look along -z
    x = _unit(np.cross(np.asarray(up, dtype=np.float64), z))
    c2w = np.eye(4)
    c2w[:3] = np.stack([x, np.cross(z, x), z, eye], axis=1)
    return c2w


def _unit(v: np.ndarray) -> np.ndarray:
    """Return v (3,) at length 1."""
    return v / np.linalg.norm(v)


def eye_on_sphere(azimuth: float, v: float, radius: float) -> np.ndarray:
    """Return the camera centre (3,) for an azimuth and an elevation draw, both in radians.

    `azimuth` 0 is the object's front and grows towards its left. `v` in (0, pi) is 0 overhead. The
    polar angle is arccos(1 - 2 v / pi). A `v` that is uniform in (0, pi) is then uniform on the sphere.
    """
    v = np.clip(v, 0.01, np.pi - 0.01)
    phi = np.arccos(1 - 2 * v / np.pi)
    return radius * np.array(
        [np.sin(phi) * np.cos(np.pi - azimuth), np.cos(phi), np.sin(phi) * np.sin(np.pi - azimuth)]
    )


def view_prompt(azimuth: float, v: float, words: str = "sjc") -> str:
    """Return the view prompt of a camera, e.g. "front view of" (angles as in `eye_on_sphere`).

    `words` is one of VIEW_WORDS. "sjc" are the published four prompts. "sides" tells left from right. "octants"
    names eight azimuths at three elevations. Raises ValueError for any other.
    """
    if words not in SIDES:
        raise ValueError(f"view words must be one of {', '.join(VIEW_WORDS)}, got {words!r}")
    sides = SIDES[words]
    sector = 2 * np.pi / len(sides)
    side = sides[int(((azimuth + sector / 2) % (2 * np.pi)) // sector) % len(sides)]
    overhead = v < np.deg2rad(OVERHEAD_DEG)
    if words != "octants":
        return f"{'overhead' if overhead else side} view of"
    height = "overhead " if overhead else "high " if v < np.deg2rad(HIGH_DEG) else ""
    return f"{height}{side} view of"


def all_view_prompts(words: str) -> list[str]:
    """Return every view prompt that `view_prompt` can give under `words`, without repeats."""
    azimuths = np.arange(16) * np.pi / 8
    elevations = np.deg2rad([15.0, 45.0, 80.0])
    return list(dict.fromkeys(view_prompt(a, v, words) for v in elevations for a in azimuths))


def prompt_of_view(prompt: str, view: str, style: str = "prefix", texts: Mapping[str, str] | None = None) -> str:
    """Return the prompt with the words of a view; `texts` {view: words} replace the words of `view_prompt`.

    `style` is "prefix" (published), such as "front view of a duck", "suffix", such as "a duck, front view", or "none".
    Where a view's words are empty, the prompt alone is returned.
    """
    words = (texts or {}).get(view, view)
    if style == "none" or not words:
        return prompt
    return f"{words} {prompt}" if style == "prefix" else f"{prompt}, {words.removesuffix(' of')}"


def read_view_texts(texts: Iterable[str], words: str) -> dict[str, str]:
    """Return {view prompt: its text} of a list of VIEW=TEXT, VIEW such as "front" or "front view of".

    An empty TEXT means no words for that view. Raises UserError for anything else, and for a view given twice.
    """
    known = all_view_prompts(words)
    found: dict[str, str] = {}
    for text in texts:
        view, equals, own = (part.strip() for part in text.partition("="))
        view = view if view in known else f"{view} view of"
        if not equals or view not in known:
            raise UserError(
                f"--pose.view_texts {text!r}: expected VIEW=TEXT, TEXT empty for no words, VIEW "
                f"one of {', '.join(v.removesuffix(' view of') for v in known)}"
            )
        if view in found:
            raise UserError(f"--pose.view_texts {text!r}: this view has the text {found[view]!r} already; give one")
        found[view] = own
    return found


def perp_neg_views(camera: Camera) -> tuple[dict[str, float], dict[str, float]]:
    """Return ({view: share} of the positive prompt, {view: weight} of the negative ones) for Perp-Neg.

    This is for the view words "sjc". The camera is between two neighbours of front, side and back. r falls from 1 at
    the first of them to 0 at the second. The positive condition is r of the first and 1 - r of the second. The negative
    weights are `decay`s of r and 1 - r: of the two prompts themselves between front and side, of side and front between
    side and back. From overhead, the view's own prompt is the positive condition, and nothing is negative.
    Source: Perp-Neg, arXiv 2304.04968, its interpolation of views and the constants of its released code.
    """
    if camera.view == "overhead view of":
        return {camera.view: 1.0}, {}
    from_front = abs((np.rad2deg(camera.azimuth) + 180) % 360 - 180)
    if from_front < 90:
        r = 1 - from_front / 90
        return (
            {"front view of": r, "side view of": 1 - r},
            {"front view of": decay(r, 4, 0.5, -2.426), "side view of": decay(1 - r, 4, 0.5, -2.426)},
        )
    r = 2 - from_front / 90
    return (
        {"side view of": r, "backside view of": 1 - r},
        {"side view of": decay(r, 1, 0.5, -0.606), "front view of": decay(r, 1, 0.5, 0.967)},
    )


def decay(u: float, a: float, b: float, c: float) -> float:
    """Return a exp(-b u) + c."""
    return a * float(np.exp(-b * u)) + c


def train_camera(
    rng: Uniform,
    radius: float = 1.5,
    fov: tuple[float, float] = (40.0, 70.0),
    words: str = "sjc",
    opposite: bool = False,
) -> Camera:
    """Draw one training camera on the upper sphere, looking at the origin.

    `fov` is a range in degrees. Azimuth, elevation draw and field of view are uniform, the elevation draw in
    ELEVATION_SPAN_DEG. With `opposite` the camera stands on the other side of the object, half a turn away.
    Source: the published cameras.
    """
    azimuth = 2 * np.pi * rng.random() + opposite * np.pi
    v = np.deg2rad(ELEVATION_SPAN_DEG) * rng.random()
    return camera_at(azimuth, v, radius, fov[0] + (fov[1] - fov[0]) * rng.random(), words)


def camera_at(azimuth: float, v: float, radius: float = 1.5, fov: float = 60.0, words: str = "sjc") -> Camera:
    """Return the camera at `eye_on_sphere(azimuth, v, radius)` looking at the origin."""
    return Camera(look_at(eye_on_sphere(azimuth, v, radius)), fov, view_prompt(azimuth, v, words), azimuth)


def spiral(n: int, radius: float = 1.5, height: float = 1.5, rounds: float = 3, fov: float = 60.0) -> list[Camera]:
    """Return the `n` cameras of the test spiral: from overhead down to the horizon in `rounds`."""
    cameras = []
    for s in np.arange(1, n + 1) / n:
        angle = 2 * np.pi * rounds * s
        r = max(radius * np.sin(s * np.pi / 2), 0.5)
        eye = (r * np.cos(angle), height * (1 - s), r * np.sin(angle))
        cameras.append(Camera(look_at(eye), fov))
    return cameras


def ring(n: int, radius: float = 1.5, elevation: float = 15.0, squeeze: float = 1.0, fov: float = 60.0) -> list[Camera]:
    """Return `n` cameras once round the object, from its front towards its left, which look at the origin.

    They are `elevation` degrees above the horizon at `radius`. Their distance to the left and to the right is
    `squeeze` times that in front and behind, both measured along the horizon.
    """
    polar = np.deg2rad(90 - elevation)
    cameras = []
    for azimuth in 2 * np.pi * np.arange(n) / n:
        level = radius * np.sin(polar)
        eye = (-level * np.cos(azimuth), radius * np.cos(polar), squeeze * level * np.sin(azimuth))
        cameras.append(Camera(look_at(eye), fov, azimuth=azimuth))
    return cameras
