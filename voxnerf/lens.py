"""Lenses that bend rays: OpenCV's radial-tangential and fisheye models, and their inverses.

Normalised image coordinates as in OpenCV: x to the right, y down, 1 ahead. A point (x, y) of them at
r^2 = x^2 + y^2 is seen at (x_d, y_d), which the focal lengths and the principal point then map to pixels.

Radial-tangential (OpenCV, "Camera Calibration and 3D Reconstruction"), with q(s) = N(s) / D(s):

    N(s) = 1 + n1 s + n2 s^2 + n3 s^3 + n4 s^4,    D(s) = 1 + d1 s + d2 s^2 + d3 s^3
    x_d = x q(r^2) + 2 p1 x y + p2 (r^2 + 2 x^2),    y_d = y q(r^2) + p1 (r^2 + 2 y^2) + 2 p2 x y

OpenCV's k1, k2, k3 are n1, n2, n3, and its k4, k5, k6 are d1, d2, d3. Fisheye (OpenCV, "Fisheye camera
model", after Kannala and Brandt 2006): at the angle theta off the axis, theta_d = theta N(theta^2), with
k1 to k4 as n1 to n4, and (x_d, y_d) = theta_d / r (x, y). It sees beyond 90 degrees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from my.exact import exact_device

WIDEST = math.tan(math.radians(85))  # radius of a radial-tangential lens beyond which no ray is looked for
HALVINGS = 26  # bisections of the interval that a radius lies in, before Newton's iterations
NEWTON = 8  # iterations
TINY = 1e-15  # coefficients up to this turn no ray
EXACT = 1e-9  # how far an inverse may be off, in normalised image coordinates


class Lens(NamedTuple):
    """The coefficients of one lens; without any it is a pinhole, or an equidistant fisheye."""

    fisheye: bool = False
    num: tuple[float, ...] = (0.0,) * 4  # n1 to n4
    den: tuple[float, ...] = (0.0,) * 3  # d1 to d3; 0 for a fisheye
    p: tuple[float, ...] = (0.0,) * 2  # p1, p2; 0 for a fisheye

    @property
    def bends(self) -> bool:
        """Whether this is anything but a pinhole."""
        return self.fisheye or any((*self.num, *self.den, *self.p))

    @property
    def reach(self) -> float:
        """Return the largest radius r (angle theta for a fisheye) up to which what is seen only moves outwards.

        That is where d/dr [r q(r^2)] has its first zero, or q its first pole. Beyond, the model folds back.
        """
        N, D = (np.poly1d([*(c if abs(c) > TINY else 0.0 for c in row[::-1]), 1.0]) for row in (self.num, self.den))
        s = np.poly1d([1.0, 0.0])
        turns = (N + 2 * s * N.deriv()) * D - 2 * s * N * D.deriv()
        roots = np.concatenate([turns.roots, D.roots])
        real = roots[np.abs(roots.imag) <= 1e-9 * np.abs(roots)].real
        return float(min([(math.pi if self.fisheye else WIDEST), *np.sqrt(real[real > 0])]))


class Lenses:
    """n lenses on the `exact_device` of a device, which turn image points of any of them into directions at once."""

    def __init__(self, lenses: Sequence[Lens], device: torch.device | str | None = None) -> None:
        reach = {lens: lens.reach for lens in set(lenses)}  # most often there is one
        values = [(*lens.num, *lens.den, *lens.p, reach[lens]) for lens in lenses]
        device = exact_device(device)
        self.fisheye = torch.tensor([lens.fisheye for lens in lenses], device=device)  # (n,)
        self.values = torch.tensor(values, dtype=torch.float64, device=device)  # (n, 10)

    def directions(self, lens: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how lenses number `lens` (m,) see image points (m, n, 2) float64: directions, and which are in reach.

        The points are (x_d, y_d) of the module's docstring. The directions (m, n, 3) are in the camera's
        OpenGL frame (x right, y up, looking along -z), of any length. A point that the lens does not reach, (m, n) bool
        False, gets the direction of the farthest point along its radius that the lens reaches.
        """
        values = self.values[lens][:, None]  # (m, 1, 10)
        num, den, p, reach = values[..., :4], values[..., 4:7], values[..., 7:9], values[..., 9]
        seen = points.norm(dim=-1)  # (m, n)
        r, inside = invert_radius(seen, reach, num, den)
        toward = points / seen[..., None].clamp(min=1e-300)
        flat, exact = undistort(points, toward * r[..., None], num, den, p)
        exact &= flat.norm(dim=-1) <= reach * (1 + EXACT)
        flat = torch.where(exact[..., None], flat, toward * r[..., None])
        fisheye = self.fisheye[lens][:, None]  # (m, 1)
        ahead = torch.where(fisheye, torch.cos(r), torch.ones_like(r))
        sideways = torch.where(fisheye[..., None], toward * torch.sin(r)[..., None], flat)
        return (torch.stack([sideways[..., 0], -sideways[..., 1], -ahead], dim=-1), torch.where(fisheye, inside, exact))

    def bend(self, lens: torch.Tensor, rays: torch.Tensor) -> torch.Tensor:
        """Return the directions (m, n, 3) that lenses number `lens` (m,) see where pinholes see `rays` (m, n, 3).

        Both are directions in the camera's OpenGL frame. Those of the pinholes are (x, y, -1).
        """
        return self.directions(lens, torch.stack([rays[..., 0], -rays[..., 1]], dim=-1))[0]


def ratio(s: torch.Tensor, num: torch.Tensor, den: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q(s) = N(s) / D(s) and its derivative, of s (...) and coefficients (..., 4), (..., 3)."""
    N, dN = horner(s, num)
    D, dD = horner(s, den)
    return N / D, (dN * D - N * dD) / (D * D)


def horner(s: torch.Tensor, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1 + c1 s + c2 s^2 + ..., and its derivative."""
    value, slope = torch.zeros_like(s), torch.zeros_like(s)
    steps: list[torch.Tensor | float] = [*coefficients.unbind(-1)[::-1], 1.0]
    for c in steps:
        slope = slope * s + value
        value = value * s + c
    return value, slope


def distort(
    points: torch.Tensor, num: torch.Tensor, den: torch.Tensor, p: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return (x_d, y_d) of points (..., 2), radial-tangential, and the Jacobian's entries a, b, d.

    The Jacobian is [[a, b], [b, d]]: it is symmetric, as both are slopes of one potential.
    """
    x, y = points.unbind(-1)
    p1, p2 = p.unbind(-1)
    s = x * x + y * y
    q, dq = ratio(s, num, den)
    x_d = x * q + 2 * p1 * x * y + p2 * (s + 2 * x * x)
    y_d = y * q + p1 * (s + 2 * y * y) + 2 * p2 * x * y
    a = q + 2 * x * x * dq + 2 * p1 * y + 6 * p2 * x
    b = 2 * x * y * dq + 2 * p1 * x + 2 * p2 * y
    d = q + 2 * y * y * dq + 6 * p1 * y + 2 * p2 * x
    return torch.stack([x_d, y_d], dim=-1), (a, b, d)


def undistort(
    seen: torch.Tensor, guess: torch.Tensor, num: torch.Tensor, den: torch.Tensor, p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the points (..., 2) that the lens shows at `seen` (..., 2), and whether each is found, (...) bool.

    Newton's iterations begin at `guess` (..., 2).
    """
    points = guess
    for _ in range(NEWTON):
        there, (a, b, d) = distort(points, num, den, p)
        u, v = (there - seen).unbind(-1)
        det = a * d - b * b
        points = points - torch.stack([d * u - b * v, a * v - b * u], dim=-1) / det[..., None]
    there, (a, b, d) = distort(points, num, den, p)
    off = (there - seen).norm(dim=-1)
    return points, (off <= EXACT * (1 + seen.norm(dim=-1))) & (a * d - b * b > 0)  # False for NaN


def invert_radius(
    seen: torch.Tensor, reach: torch.Tensor, num: torch.Tensor, den: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return r (...) in [0, reach] with r q(r^2) = `seen` (...), and whether there is one; else r is `reach`."""
    low, high = torch.zeros_like(seen), reach.expand_as(seen)
    inside = seen <= high * ratio(high * high, num, den)[0]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        beyond = middle * ratio(middle * middle, num, den)[0] > seen
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    r = (low + high) / 2
    for _ in range(NEWTON // 2):
        q, dq = ratio(r * r, num, den)
        better = r - (r * q - seen) / (q + 2 * r * r * dq)
        r = torch.where((better >= low) & (better <= high), better, r)
    return torch.where(inside, r, reach.expand_as(seen)), inside
