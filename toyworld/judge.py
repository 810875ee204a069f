"""A judge of toy-world pictures: which object, which colour, seen from which side.

It is a small convolutional network, trained by `training.judge` on true renders only. No score model and no generated
picture took part in that, so it can judge what score models make.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from my.checkpoint import check
from my.errors import RunError
from pose import SIDES, Camera

from .objects import OBJECTS
from .words import COLORS

SIZE = 64  # edge of the pictures it judges
WEIGHTS = Path(__file__).with_name("judge.safetensors")
HEADS: dict[str, tuple[str, ...]] = {"object": tuple(OBJECTS), "color": tuple(COLORS), "octant": SIDES["octants"]}
CHANNELS = ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2))  # in, out, stride: 64 px to 4


def octant(camera: Camera) -> int:
    """Return the index in HEADS["octant"] of the side of the object that faces a camera."""
    x, _, z = camera.c2w[:3, 3]
    return round((np.pi - np.arctan2(z, x)) / (np.pi / 4)) % 8  # azimuth as in `pose.eye_on_sphere`


class Judge(nn.Module):
    """The network: five convolutions, and a linear head per question of HEADS."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())
            for c_in, c_out, stride in CHANNELS
        ]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(96 * 4 * 4, len(HEADS[name])) for name in HEADS})

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {head: log-probabilities (n, len(HEADS[head]))} of pictures (n, 3, 64, 64), RGB in [0, 1]."""
        features = self.features(2 * pictures - 1)
        return {name: head(features).log_softmax(1) for name, head in self.heads.items()}


def load(path: str | Path = WEIGHTS) -> tuple[Judge, dict[str, dict[str, float]]]:
    """Return (judge, {"clean", "degraded": {"object", "pair", "octant": its accuracy on held-out true renders}}).

    Raises RunError where the file at `path` is missing, UserError where its weights do not fit.
    """
    if not Path(path).exists():
        raise RunError(f"{path}: no such file; make it with python -m training.judge")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - the file is no dict, and cannot be iterated
        accuracy = json.loads(file.metadata()["accuracy"])
    judge = Judge().eval().requires_grad_(False)
    state = {name: value for name, value in judge.state_dict().items() if value.is_floating_point()}
    check(tensors, {name: value.shape for name, value in state.items()})
    judge.load_state_dict(tensors, strict=False)  # BatchNorm's counters of batches are not kept
    return judge, accuracy


def pair_scores(verdict: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return log p(colour) + log p(object) (n, 6, 12) of every pair, from the judge's log-probabilities."""
    return verdict["color"][:, :, None] + verdict["object"][:, None, :]


@torch.no_grad()
def hits(
    verdict: dict[str, torch.Tensor], color: int | torch.Tensor, obj: int | torch.Tensor, side: int | torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return {"object", "pair", "octant"}: (n,) bool, where the first guess is the true index, one or (n,)."""
    first = {name: log_p.argmax(1) for name, log_p in verdict.items()}
    right = first["object"] == obj
    return {"object": right, "pair": right & (first["color"] == color), "octant": first["octant"] == side}
