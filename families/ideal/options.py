"""The options of the toy world's exact score. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from families.family import Family
from my.errors import UserError, shown
from toyworld.captions import read_prompt
from toyworld.words import DEGRADATIONS

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Found(NamedTuple):
    """What a run needs of this family."""

    color: str
    object: str
    n_cameras: int


def bad_words(text: str) -> tuple[list[str], list[str]]:
    """Return the words of a text that name bad pictures, each once, and the other words."""
    words = text.lower().replace(",", " ").split()
    return [w for w in DEGRADATIONS if w in words], [w for w in words if w not in DEGRADATIONS]


class Options(Family):
    """The exact score of the toy world's pictures."""

    n_cameras: int = Field(400, gt=0, description="number of training cameras that take its pictures")

    reads = ("sd.prompt", "sd.scale", "pose.view_words", "pose.view_style")
    reads_in_2d = ("pose", "pose.view_words")  # the cameras of a run take its pictures

    def check(self, run: FamilyConfig) -> Found:
        """Return what the run needs; raises UserError for a prompt or words of bad pictures outside the toy world."""
        for text in run.told().get("--bad_words", []):
            found, others = bad_words(text)
            if others or not found:
                raise UserError(
                    f"--bad_words {shown(text)!r}: --family ideal knows bad pictures by the words "
                    f"{', '.join(DEGRADATIONS)} alone; give one or more of them"
                )
        if run.pose.view_texts or run.pose.view_style == "suffix":
            raise UserError(
                "--family ideal knows views by their prefix only: leave out --pose.view_style suffix and "
                "--pose.view_texts"
            )
        color, obj = read_prompt(run.texts.prompt, "--sd.prompt with --family ideal")
        return Found(color, obj, self.n_cameras)
