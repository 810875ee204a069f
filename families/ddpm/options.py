"""The options of unconditional diffusers pipelines, and what a run needs of one. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from families.ddpm import pipeline
from families.family import Family, Place

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Options(Family):
    """An unconditional diffusers pipeline in pixel space."""

    checkpoint: str | None = Field(None, description="its folder or hub id, such as google/ddpm-cifar10-32")

    def absolute(self) -> None:
        path = self.checkpoint and Path(self.checkpoint).expanduser()
        if path and path.exists():  # else it is a hub id
            self.checkpoint = str(path.resolve())

    def check(self, run: FamilyConfig) -> Place:
        return pipeline.find_pipeline(self.checkpoint)

    def asked(self, run: FamilyConfig, found: Place) -> list[str]:
        return [""]

    def to_download(self, found: Place) -> Place | None:
        return None if found.path or pipeline.in_cache(found.repos[0]) else found

    def checkpoints(self, found: Place) -> dict[str, Path]:
        return {"model": found.path} if found.path else {}
