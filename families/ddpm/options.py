"""The options of unconditional diffusers pipelines, and what a run needs of one. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from families.ddpm import pipeline
from families.family import Family, Place
from my.file_system import expanded, real

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Found(NamedTuple):
    """What a run needs of this family."""

    place: Place
    pipeline: pipeline.Pipeline | None  # None where it has to come from the hub or its cache


class Options(Family):
    """An unconditional pipeline of diffusers in pixel space."""

    checkpoint: str | None = Field(None, description="folder or hub id of the pipeline, such as google/ddpm-cifar10-32")

    reads = ("compile",)

    def absolute(self) -> None:
        if self.checkpoint and os.path.exists(expanded(self.checkpoint)):  # else it is a hub id
            self.checkpoint = str(real(self.checkpoint))

    def check(self, run: FamilyConfig) -> Found:
        place = pipeline.find(self.checkpoint)
        return Found(place, pipeline.read(place.flag, place.path) if place.path else None)

    def asked(self, run: FamilyConfig, found: Found) -> list[str]:
        return [""]

    def to_download(self, found: Found) -> Place | None:
        return None if found.place.path or pipeline.cached(found.place.repos[0]) else found.place

    def checkpoints(self, found: Found) -> dict[str, Path]:
        return {"model": found.place.path} if found.place.path else {}
