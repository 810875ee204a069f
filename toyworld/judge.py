"""A judge of toy-world pictures: which object, which colour, seen from which side.

A small convolutional network that has seen true renders only (`toyworld.train_judge`): no score
model and no generated picture had a hand in it, so that it can judge what they make.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from my.checkpoint import check
from my.errors import RunError
from pose import SIDES

from .objects import OBJECTS
from .words import COLORS

SIZE = 64  # edge of the pictures it judges
WEIGHTS = Path(__file__).with_name("judge.safetensors")
HEADS = {"object": tuple(OBJECTS), "color": tuple(COLORS), "octant": SIDES["octants"]}
CHANNELS = ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2))  # in, out, stride: 64 px to 4


def octant(camera):
    """Return the index in HEADS["octant"] of the side of the object that faces a `pose.Camera`."""
    x, _, z = camera.c2w[:3, 3]
    return round((np.pi - np.arctan2(z, x)) / (np.pi / 4)) % 8  # azimuth as in `pose.eye_on_sphere`


class Judge(nn.Module):
    """Pictures (n, 3, 64, 64), RGB in [0, 1], to {head: log-probabilities (n, len(HEADS[head]))}."""

    def __init__(self):
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())
            for c_in, c_out, stride in CHANNELS
        ]
        self.features = nn.Sequential(*blocks, nn.Flatten(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(96 * 4 * 4, len(HEADS[name])) for name in HEADS})

    def forward(self, pictures):
        features = self.features(2 * pictures - 1)
        return {name: head(features).log_softmax(1) for name, head in self.heads.items()}


def load(path=WEIGHTS):
    """Return (Judge, {accuracy on held-out true renders}); raises RunError without its weights."""
    if not Path(path).exists():
        raise RunError(f"{path}: no such file; make it with python -m toyworld.train_judge")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        accuracy = json.loads(file.metadata()["accuracy"])
    judge = Judge().eval().requires_grad_(False)
    state = {name: value for name, value in judge.state_dict().items() if value.is_floating_point()}
    check(tensors, {name: value.shape for name, value in state.items()})
    judge.load_state_dict(tensors, strict=False)  # BatchNorm's counters of batches are not kept
    return judge, accuracy


def pair_scores(verdict):
    """Return log p(colour) + log p(object) (n, 6, 12) of every pair, out of a judge's verdict."""
    return verdict["color"][:, :, None] + verdict["object"][:, None, :]


@torch.no_grad()
def hits(verdict, color, obj, side):
    """Return {"object", "pair", "octant"}: (n,) bool, where the first guess is the true index (n,)."""
    first = {name: log_p.argmax(1) for name, log_p in verdict.items()}
    right = first["object"] == obj
    return {"object": right, "pair": right & (first["color"] == color), "octant": first["octant"] == side}
