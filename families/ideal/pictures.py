"""What the pictures of the ideal family are made of: the toy world's coverage maps, by a run's training cameras."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
import torch.nn.functional as F
from tqdm import tqdm

import pose
from adapt import PLAIN_BACKGROUNDS
from toyworld import OBJECTS, compose, coverage_maps, degraded

Pictures = dict[str, torch.Tensor]  # {view prompt: (n, 3, size, size), RGB in [-1, 1]}

RENDER_SIZE = 64
RENDER_BATCH = 16
WORLD_SHARE = 4  # one of so many cameras takes the other objects: rendering is what takes long


class Photographer:
    """Takes the pictures of one object and colour on the plain backgrounds, and the maps of every object.

    Nothing is rendered before it is asked for, and nothing twice.
    """

    def __init__(self, color: str, obj: str, cameras: list[pose.Camera], size: int) -> None:
        self.color, self.obj, self.cameras, self.size = color, obj, cameras, size

    @cached_property
    def maps(self) -> torch.Tensor:
        """Coverage maps (n, 5, RENDER_SIZE, RENDER_SIZE) uint8 of the object, from every camera."""
        return rendered([self.obj], self.cameras)

    def paint(self, bad: str) -> Pictures:
        """Return the pictures by the view prompts of the cameras; `bad` is a word of DEGRADATIONS, or "" for none."""
        pictures = {}
        for view in dict.fromkeys(c.view for c in self.cameras):
            mine = self.maps[[c.view == view for c in self.cameras]]
            looks = [
                degraded(mine, self.color, behind, bad) if bad else compose(mine, self.color, behind)
                for behind in PLAIN_BACKGROUNDS
            ]
            pictures[view] = 2 * F.interpolate(torch.cat(looks), (self.size, self.size), mode="area") - 1
        return pictures

    def world(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return coverage maps (n, 5, RENDER_SIZE, RENDER_SIZE) uint8 of every object, and how likely each is (n).

        All objects are equally likely. The one of the prompt is seen by all cameras, so that its pictures are among
        those of all. The others are seen by one of WORLD_SHARE cameras, and at least by one.
        """
        few = self.cameras[: max(1, len(self.cameras) // WORLD_SHARE)]
        others = rendered([obj for obj in OBJECTS if obj != self.obj], few)
        n = len(self.maps)
        return torch.cat([self.maps, others]), torch.cat([torch.full((n,), len(few) / n), torch.ones(len(others))])


def rendered(objects: Iterable[str], cameras: list[pose.Camera]) -> torch.Tensor:
    """Return the coverage maps (n, 5, RENDER_SIZE, RENDER_SIZE) uint8 of objects, each from all cameras."""
    batches = [(obj, cameras[i : i + RENDER_BATCH]) for obj in objects for i in range(0, len(cameras), RENDER_BATCH)]
    bar = tqdm(batches, desc="taking pictures", leave=False, disable=None)
    return torch.cat([coverage_maps(obj, some, RENDER_SIZE) for obj, some in bar])
