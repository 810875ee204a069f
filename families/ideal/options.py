"""The options of the toy world's exact score. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from families.family import Family
from my.errors import UserError
from toyworld.captions import read_prompt

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Options(Family):
    """The exact score of the toy world's pictures."""

    n_cameras: int = Field(400, gt=0, description="training cameras that its pictures are taken by")

    reads = ("sd.prompt", "sd.scale", "pose.view_words", "pose.view_style")
    reads_in_2d = ("pose", "pose.view_words")  # its pictures are taken by the cameras of a run

    def check(self, run: FamilyConfig) -> tuple[str, str]:
        """Return the (color, object) of the prompt; raises UserError for one outside the toy world."""
        if run.pose.view_texts or run.pose.view_style == "suffix":
            raise UserError(
                "--family ideal knows views by their prefix only: leave out --pose.view_style suffix and "
                "--pose.view_texts"
            )
        return read_prompt(run.texts.prompt, "--sd.prompt with --family ideal")
