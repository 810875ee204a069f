"""The exact denoiser of all pictures of the toy world. They are too many to make, and none of them is made.

A picture is linear in the maps of its pose. For the maps z = (body, accents in red, green and blue, 1 - coverage), its
channel k is v_k . z with v_k = (colour_k, 1 for accents in k, background_k), and bad pictures are affine in it. So the
products of x with the maps of a pose give its squared distances to every picture of that pose, and the weighted mean of
pictures is a weighted sum of maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from adapt import PLAIN_BACKGROUNDS, Level
from my.ahead import to_device
from my.exact import exact_device
from toyworld import COLORS
from toyworld.render import FADED, FOGGY, blurred

PART = 64  # poses whose maps are resized at once


class Look(NamedTuple):
    """How pictures look: `kept` times the picture of clear or blurred maps, + `light` + `veil` times the background."""

    blurry: bool = False
    kept: float = 1.0
    light: float = 0.0
    veil: float = 0.0


LOOKS = {
    "": Look(),
    "blurry": Look(blurry=True),  # a plain background stays what it is
    "faded": Look(kept=FADED, light=1 - FADED),
    "foggy": Look(kept=FOGGY, veil=1 - FOGGY),  # 1 - FOGGY coverage = FOGGY (1 - coverage) + (1 - FOGGY)
}  # by the word of DEGRADATIONS, "" for pictures that are not bad: what `toyworld.degraded` makes of them


class Set:
    """All pictures of n poses in one look: each colour of COLORS on each of PLAIN_BACKGROUNDS, q pictures per pose.

    z: (n, 5, N) float64 maps of N pixels. Pictures are RGB in [0, 1] here.
    """

    def __init__(self, z: torch.Tensor, look: Look) -> None:
        colors, behind = np.array([*COLORS.values()]), np.array(PLAIN_BACKGROUNDS)
        v = np.zeros((len(colors), len(behind), 3, 5))
        v[..., 0], v[..., 1:4], v[..., 4] = colors[:, None], np.eye(3), behind
        offset = look.light + look.veil * np.tile(behind, (len(colors), 1))
        self.z, self.kept = z, look.kept
        self.v, self.offset = to_device(v.reshape(-1, 3, 5), z.device), to_device(offset, z.device)  # (q, 3, 5), (q, 3)
        square = torch.einsum("qki,nij,qkj->nq", self.v, z @ z.transpose(1, 2), self.v)
        cross = torch.einsum("qk,qkj,nj->nq", self.offset, self.v, z.sum(2))
        self.square = self.kept**2 * square + 2 * self.kept * cross + z.shape[2] * self.offset.square().sum(1)

    def distances(self, t: torch.Tensor) -> torch.Tensor:
        """Return |y - t|^2 - |t|^2 (n, q) of the pictures y and of one picture t (3, N)."""
        products = (self.z.flatten(0, 1) @ t.T).view(len(self.z), 5, 3)
        ty = self.kept * torch.einsum("njk,qkj->nq", products, self.v) + self.offset @ t.sum(1)
        return self.square - 2 * ty

    def weighted(self, w: torch.Tensor) -> torch.Tensor:
        """Return sum_i w_i y_i (3, N) of the pictures y with weights w (n, q)."""
        shares = torch.einsum("nq,qkj->knj", w, self.v).flatten(1)
        return self.kept * (shares @ self.z.flatten(0, 1)) + (w.sum(0) @ self.offset)[:, None]


class AllPairs:
    """The pictures of every pair of colour and object: D(x, sigma) over them.

    maps: (n, 5, H, W) uint8 of n poses of objects, as `toyworld.coverage_maps` returns them.
    likely: (n) how likely the pictures of each pose are, up to a factor.
    size: edge of pictures.

    It computes in float64, where |y|^2 - 2 x y keeps enough digits, on the host for devices without.
    """

    def __init__(self, maps: torch.Tensor, likely: torch.Tensor, size: int, device: torch.device) -> None:
        self.maps, self.size, self.device = maps, size, exact_device(device)
        self.log_likely = to_device(likely.double().log().numpy(), self.device)[:, None]
        self._z: dict[bool, torch.Tensor] = {}
        self._sets: dict[str, Set] = {}

    def _set(self, bad: str) -> Set:
        """Return the pictures in the look of a word of LOOKS."""
        if bad not in self._sets:
            blurry = LOOKS[bad].blurry
            if blurry not in self._z:
                self._z[blurry] = to_device(resized(self.maps, self.size, blurry).numpy(), self.device)
            self._sets[bad] = Set(self._z[blurry], LOOKS[bad])
        return self._sets[bad]

    def posterior_mean(self, x: torch.Tensor, sigma: Level, bad: Sequence[str] = ("",)) -> torch.Tensor:
        """Return the mean (3, size, size) of pictures y, RGB in [-1, 1], weighted by N(x; y, sigma^2 I) and `likely`.

        bad: words of LOOKS, whose pictures are taken together.
        """
        sets = [self._set(word) for word in bad]
        sigma = sigma.to(self.device, torch.float64) if isinstance(sigma, torch.Tensor) else sigma
        t = (x.to(self.device, torch.float64).flatten(1) + 1) / 2
        distances = torch.stack([each.distances(t) for each in sets])
        logits = distances * (-2 / sigma**2) + self.log_likely  # 4 d / 2: the range is twice
        weights = logits.flatten().softmax(0).view_as(logits)
        mean = torch.stack([each.weighted(w) for each, w in zip(sets, weights)]).sum(0)
        return (2 * mean - 1).view_as(x).to(x)


def resized(maps: torch.Tensor, size: int, blurry: bool) -> torch.Tensor:
    """Return z (n, 5, size * size) float64 of maps (n, 5, H, W) uint8; `blurry` blurs them first."""
    parts = []
    for part in maps.split(PART):
        z = part.double() / 255
        z[:, 4] = 1 - z[:, 4]
        parts.append(F.interpolate(blurred(z) if blurry else z, (size, size), mode="area").flatten(2))
    return torch.cat(parts)
