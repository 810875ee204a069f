"""Real spherical harmonics of degree 0 to 2: how a colour may depend on the direction it is seen from."""

from __future__ import annotations

import math

import torch

N_BASIS = 9
SH_0 = math.sqrt(1 / (4 * math.pi))  # the constant one


def sh_basis(d: torch.Tensor) -> torch.Tensor:
    """Return the real orthonormal spherical harmonics (n, 9) at unit directions d (n, 3), no Condon-Shortley sign."""
    x, y, z = d.unbind(-1)
    a, b = math.sqrt(3 / (4 * math.pi)), math.sqrt(15 / (4 * math.pi))
    c = math.sqrt(5 / (16 * math.pi))
    return torch.stack(
        [
            torch.full_like(x, SH_0),
            a * y,
            a * z,
            a * x,
            b * x * y,
            b * y * z,
            c * (3 * z * z - 1),
            b * x * z,
            b / 2 * (x * x - y * y),
        ],
        dim=-1,
    )
