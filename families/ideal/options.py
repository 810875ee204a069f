"""The options of the toy world's exact score. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from families.family import Family
from my.errors import UserError
from toyworld.captions import read_prompt

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Found(NamedTuple):
    """What a run needs of this family."""

    color: str
    object: str
    n_cameras: int


class Options(Family):
    """The exact score of the toy world's pictures."""

    n_cameras: int = Field(400, gt=0, description="number of training cameras that take its pictures")

    reads = ("sd.prompt", "sd.scale", "pose.view_words", "pose.view_style")
    reads_in_2d = ("pose", "pose.view_words")  # the cameras of a run take its pictures

    def check(self, run: FamilyConfig) -> Found:
        """Return what the run needs; raises UserError for a prompt outside the toy world, and for any bad words.

        The exact score would take these for no text, or for the prompt.
        """
        if run.told().get("--bad_words"):
            raise UserError(
                "--bad_words: --family ideal knows no bad pictures; take a --rule that needs none, and leave it out"
            )
        if run.pose.view_texts or run.pose.view_style == "suffix":
            raise UserError(
                "--family ideal knows views by their prefix only: leave out --pose.view_style suffix and "
                "--pose.view_texts"
            )
        color, obj = read_prompt(run.texts.prompt, "--sd.prompt with --family ideal")
        return Found(color, obj, self.n_cameras)
