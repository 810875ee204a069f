"""The solid objects of the toy world: parts, materials, colours.

Every object fits in a ball of radius 0.70 at the origin and follows the frame of `pose`: y up, its
front faces -x, its own left is +z. An object is a function from points (N, 3) to a list of
(distance (N,), material), one per part. The material `BODY` takes the colour that the caption names.
Every other material is a fixed accent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .sdf import box, capsule, cone, cylinder, ellipsoid, half_space, intersect, sphere, torus
from .words import NAMES

Parts = list[tuple[torch.Tensor, str]]  # (distance (N,), material) of each part of an object

BODY = "body"

ACCENTS = {
    "dark": (0.10, 0.10, 0.12),
    "white": (0.95, 0.95, 0.95),
    "orange": (0.98, 0.50, 0.08),
    "wood": (0.50, 0.32, 0.16),
    "glass": (0.55, 0.72, 0.85),
    "waffle": (0.85, 0.62, 0.32),
    "slate": (0.30, 0.32, 0.40),
    "cream": (0.93, 0.88, 0.74),
    "leaf": (0.45, 0.75, 0.25),
    "meat": (0.35, 0.18, 0.10),
    "pink": (0.96, 0.65, 0.70),
}


def duck(p: torch.Tensor) -> Parts:
    parts = [
        (ellipsoid(p, (0.06, -0.17, 0), (0.42, 0.27, 0.30)), BODY),
        (capsule(p, (-0.17, 0, 0), (-0.24, 0.25, 0), 0.15), BODY),
        (sphere(p, (-0.26, 0.29, 0), 0.20), BODY),
        (cone(p, (0.47, 0.05, 0), 0.13, 0.02, 0.12), BODY),
        (ellipsoid(p, (-0.47, 0.25, 0), (0.13, 0.05, 0.11)), "orange"),
    ]
    for z in (-1, 1):
        parts += [
            (ellipsoid(p, (0.12, -0.12, 0.28 * z), (0.22, 0.13, 0.07)), BODY),
            (sphere(p, (-0.38, 0.37, 0.12 * z), 0.05), "dark"),
        ]
    return parts


def car(p: torch.Tensor) -> Parts:
    parts = [
        (box(p, (0, -0.14, 0), (0.54, 0.13, 0.26), 0.06), BODY),
        (box(p, (0.12, 0.07, 0), (0.29, 0.11, 0.21), 0.05), "glass"),
        (box(p, (0.12, 0.18, 0), (0.25, 0.04, 0.21), 0.03), BODY),
    ]
    for z in (-1, 1):
        parts += [(cylinder(p, (x, -0.25, 0.25 * z), 0.14, 0.05, "z"), "dark") for x in (-0.3, 0.3)]
        parts += [
            (sphere(p, (-0.53, -0.10, 0.16 * z), 0.07), "white"),
            (box(p, (0.54, -0.10, 0.16 * z), (0.02, 0.04, 0.06)), "orange"),
        ]
    return parts


def chair(p: torch.Tensor) -> Parts:
    parts = [
        (box(p, (0, -0.07, 0), (0.29, 0.05, 0.29), 0.02), BODY),
        (box(p, (0.26, 0.25, 0), (0.05, 0.32, 0.29), 0.03), BODY),
    ]
    parts += [(capsule(p, (x, -0.1, z), (x, -0.5, z), 0.045), "wood") for x in (-0.23, 0.25) for z in (-0.23, 0.23)]
    return parts


def rocket(p: torch.Tensor) -> Parts:
    parts = [
        (cylinder(p, (0, -0.05, 0), 0.17, 0.30), BODY),
        (cone(p, (0, 0.41, 0), 0.17, 0.01, 0.17), "white"),
        (cone(p, (0, -0.42, 0), 0.15, 0.09, 0.09), "dark"),
        (sphere(p, (-0.14, 0.08, 0), 0.09), "glass"),
        (torus(p, (-0.165, 0.08, 0), 0.09, 0.025, "x"), "white"),
    ]
    for x, z in ((1, 0), (-0.5, 0.87), (-0.5, -0.87)):
        parts += [
            (capsule(p, (0.14 * x, -0.15, 0.14 * z), (0.36 * x, -0.45, 0.36 * z), 0.05), "slate"),
            (capsule(p, (0.14 * x, -0.30, 0.14 * z), (0.36 * x, -0.48, 0.36 * z), 0.05), "slate"),
        ]
    return parts


def burger(p: torch.Tensor) -> Parts:
    top = intersect(ellipsoid(p, (0, 0.08, 0), (0.46, 0.33, 0.46)), half_space(p, (0, 0.08, 0), (0, -1.0, 0)))
    return [
        (top, BODY),
        (cylinder(p, (0, -0.27, 0), 0.42, 0.09), BODY),
        (cylinder(p, (0, -0.11, 0), 0.46, 0.07), "meat"),
        (box(p, (0, -0.03, 0), (0.36, 0.02, 0.36)), "orange"),
        (cylinder(p, (0, 0.03, 0), 0.50, 0.035), "leaf"),
    ]


def icecream(p: torch.Tensor) -> Parts:
    return [
        (cone(p, (0, -0.25, 0), 0.03, 0.21, 0.32), "waffle"),
        (sphere(p, (0, 0.20, 0), 0.29), BODY),
        (torus(p, (0, 0.06, 0), 0.22, 0.06), BODY),
        (sphere(p, (0, 0.51, 0), 0.08), "dark"),
    ]


def castle(p: torch.Tensor) -> Parts:
    parts = [
        (box(p, (0, -0.22, 0), (0.30, 0.20, 0.30)), BODY),
        (box(p, (0.08, 0.05, 0), (0.14, 0.22, 0.14)), BODY),
        (cone(p, (0.08, 0.36, 0), 0.20, 0.01, 0.10), "slate"),
        (box(p, (-0.31, -0.27, 0), (0.03, 0.15, 0.10)), "dark"),
    ]
    for x in (-0.3, 0.3):
        for z in (-0.3, 0.3):
            parts += [
                (cylinder(p, (x, -0.14, z), 0.11, 0.28), BODY),
                (cone(p, (x, 0.24, z), 0.15, 0.01, 0.11), "slate"),
            ]
    return parts


def house(p: torch.Tensor) -> Parts:
    slope = 0.7071
    roof = intersect(
        half_space(p, (0, 0.36, 0), (0, slope, slope)),
        half_space(p, (0, 0.36, 0), (0, slope, -slope)),
        box(p, (0, 0.18, 0), (0.40, 0.19, 0.40)),
    )
    parts = [
        (box(p, (0, -0.20, 0), (0.35, 0.22, 0.28)), BODY),
        (roof, "slate"),
        (box(p, (0.2, 0.30, -0.17), (0.06, 0.16, 0.06)), "meat"),
        (box(p, (-0.35, -0.26, 0), (0.02, 0.16, 0.09)), "wood"),
    ]
    parts += [(box(p, (x, -0.16, 0.28 * z), (0.09, 0.09, 0.02)), "white") for x in (-0.17, 0.17) for z in (-1, 1)]
    return parts


def snowman(p: torch.Tensor) -> Parts:
    parts = [
        (sphere(p, (0, -0.31, 0), 0.27), BODY),
        (sphere(p, (0, 0.03, 0), 0.20), BODY),
        (sphere(p, (0, 0.30, 0), 0.155), BODY),
        (cylinder(p, (0, 0.42, 0), 0.20, 0.02), "dark"),
        (cylinder(p, (0, 0.50, 0), 0.12, 0.08), "dark"),
        (capsule(p, (-0.14, 0.29, 0), (-0.30, 0.28, 0), 0.035), "orange"),
    ]
    parts += [(sphere(p, (-0.135, 0.35, 0.06 * z), 0.03), "dark") for z in (-1, 1)]
    parts += [(sphere(p, (-0.2, y, 0), 0.035), "dark") for y in (0.10, -0.03)]
    parts += [(capsule(p, (0, 0.08, 0.17 * z), (-0.05, 0.18, 0.42 * z), 0.03), "wood") for z in (-1, 1)]
    return parts


def mushroom(p: torch.Tensor) -> Parts:
    cap = intersect(ellipsoid(p, (0, 0.05, 0), (0.46, 0.42, 0.46)), half_space(p, (0, 0.05, 0), (0, -1.0, 0)))
    parts = [(cap, BODY), (cone(p, (0, -0.22, 0), 0.20, 0.14, 0.28), "cream")]
    for x, y, z in (
        (-0.36, 0.22, 0),
        (0.30, 0.26, 0.16),
        (0.20, 0.28, -0.26),
        (-0.12, 0.32, 0.31),
        (-0.10, 0.40, -0.14),
        (0.05, 0.45, 0.08),
    ):
        parts.append((sphere(p, (x, y, z), 0.085), "white"))
    return parts


def boat(p: torch.Tensor) -> Parts:
    hull = intersect(
        ellipsoid(p, (0, -0.05, 0), (0.58, 0.33, 0.27)),
        half_space(p, (0, -0.07, 0), (0, 1.0, 0)),
        half_space(p, (0.42, 0, 0), (1.0, 0, 0)),
    )
    return [
        (hull, BODY),
        (box(p, (0.16, 0.05, 0), (0.19, 0.14, 0.15)), "white"),
        (box(p, (-0.03, 0.09, 0), (0.02, 0.05, 0.11)), "glass"),
        (cylinder(p, (0.20, 0.30, 0), 0.075, 0.14), "orange"),
        (cylinder(p, (-0.33, 0.06, 0), 0.025, 0.16), "wood"),
    ]


def pig(p: torch.Tensor) -> Parts:
    parts = [
        (ellipsoid(p, (0.08, -0.05, 0), (0.38, 0.27, 0.27)), BODY),
        (sphere(p, (-0.30, 0.09, 0), 0.21), BODY),
        (cylinder(p, (-0.50, 0.05, 0), 0.085, 0.05, "x"), "pink"),
        (torus(p, (0.48, 0.06, 0), 0.06, 0.025, "x"), BODY),
    ]
    for z in (-1, 1):
        parts += [
            (sphere(p, (-0.46, 0.17, 0.10 * z), 0.035), "dark"),
            (cone(p, (-0.24, 0.31, 0.13 * z), 0.08, 0.01, 0.08), BODY),
        ]
        parts += [(capsule(p, (x, -0.2, 0.15 * z), (x, -0.42, 0.15 * z), 0.075), BODY) for x in (-0.12, 0.27)]
    return parts


OBJECTS: dict[str, Callable[[torch.Tensor], Parts]] = {name: globals()[name] for name in NAMES}
