"""Signed distances to solid primitives, in world units: negative inside, positive outside.

Every primitive takes points p (N, 3) and returns (N,); `intersect` combines such distances. Distances of `ellipsoid`
are first-order estimates. The tracer shortens its steps because of them. Formulas: the standard closed forms of
distance-field modelling (Hart, "Sphere tracing", 1996).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

AXES: dict[str, tuple[int, int, int]] = {"x": (0, 1, 2), "y": (1, 0, 2), "z": (2, 0, 1)}


def _local(p: torch.Tensor, center: Sequence[float]) -> torch.Tensor:
    """Return points p (N, 3) relative to `center` (3,)."""
    return p - p.new_tensor(center)


def sphere(p: torch.Tensor, center: Sequence[float], r: float) -> torch.Tensor:
    """Distance to a ball of radius `r`."""
    return _local(p, center).norm(dim=1) - r


def ellipsoid(p: torch.Tensor, center: Sequence[float], radii: Sequence[float]) -> torch.Tensor:
    """Estimated distance to an ellipsoid with semi-axes `radii` (3,)."""
    q = _local(p, center)
    r = p.new_tensor(radii)
    k0 = (q / r).norm(dim=1)
    k1 = (q / r**2).norm(dim=1).clamp(min=1e-6)
    return k0 * (k0 - 1) / k1


def box(p: torch.Tensor, center: Sequence[float], half: Sequence[float], rounding: float = 0.0) -> torch.Tensor:
    """Distance to an axis-aligned box of half-sizes `half` (3,), edges rounded by `rounding`."""
    q = _local(p, center).abs() - p.new_tensor(half) + rounding
    return q.clamp(min=0).norm(dim=1) + q.amax(dim=1).clamp(max=0) - rounding


def cylinder(p: torch.Tensor, center: Sequence[float], r: float, half_height: float, axis: str = "y") -> torch.Tensor:
    """Distance to a solid cylinder along `axis`."""
    return cone(p, center, r, r, half_height, axis)


def cone(
    p: torch.Tensor, center: Sequence[float], r_low: float, r_high: float, half_height: float, axis: str = "y"
) -> torch.Tensor:
    """Distance to a capped cone along `axis`, of radius `r_low` at its low end and `r_high` at its high end."""
    q = _local(p, center)
    along, *across = AXES[axis]
    h = q[:, along]
    rho = torch.hypot(q[:, across[0]], q[:, across[1]])
    # distance to the caps, and to the slanted side as a segment in the (rho, h) half-plane
    rim = torch.where(h < 0, r_low, r_high)
    cap_rho, cap_h = (rho - rim).clamp(min=0), h.abs() - half_height
    d_rho, d_h = r_high - r_low, 2 * half_height
    t = (((rho - r_low) * d_rho + (h + half_height) * d_h) / (d_rho**2 + d_h**2)).clamp(0, 1)
    side_rho, side_h = rho - r_low - t * d_rho, h + half_height - t * d_h
    inside = (side_rho < 0) & (cap_h < 0)
    d2 = torch.minimum(cap_rho**2 + cap_h**2, side_rho**2 + side_h**2)
    return torch.where(inside, -1.0, 1.0) * d2.sqrt()


def torus(p: torch.Tensor, center: Sequence[float], R: float, r: float, axis: str = "y") -> torch.Tensor:
    """Distance to a torus around `axis` with ring radius `R` and tube radius `r`."""
    q = _local(p, center)
    along, *across = AXES[axis]
    ring = torch.hypot(q[:, across[0]], q[:, across[1]]) - R
    return torch.hypot(ring, q[:, along]) - r


def capsule(p: torch.Tensor, a: Sequence[float], b: Sequence[float], r: float) -> torch.Tensor:
    """Distance to all points within `r` of the segment from `a` to `b`."""
    q, ab = _local(p, a), p.new_tensor(b) - p.new_tensor(a)
    t = ((q @ ab) / (ab @ ab)).clamp(0, 1)
    return (q - t[:, None] * ab).norm(dim=1) - r


def half_space(p: torch.Tensor, point: Sequence[float], normal: Sequence[float]) -> torch.Tensor:
    """Distance to the half-space behind the plane through `point` with unit `normal`."""
    return _local(p, point) @ p.new_tensor(normal)


def intersect(*distances: torch.Tensor) -> torch.Tensor:
    """Lower bound (N,) on the distance to the intersection of solids, from the distance (N,) to each."""
    return torch.stack(distances).amax(dim=0)
