"""The options of the toy family, and what a run needs of it. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from families.family import Family
from my.errors import UserError

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Found(NamedTuple):
    """What a run needs of this family."""

    mean: tuple[float, float, float]  # RGB in [-1, 1]
    spread: float


class Options(Family):
    """Pictures of one colour."""

    color: tuple[float, float, float] = Field((0.2, 0.4, 0.9), description="mean colour of the pictures, RGB in [0, 1]")
    spread: float = Field(0.5, gt=0, description="standard deviation of the colour of each pixel")

    reads_in_2d = ("pose.rend_hw",)  # its pictures have the size of a rendering

    def check(self, run: FamilyConfig) -> Found:
        """Return what the run needs; raises UserError for a colour that no picture can have."""
        if not all(0 <= value <= 1 for value in self.color):
            raise UserError(f"--toy.color {','.join(map(str, self.color))}: each number must be between 0 and 1")
        red, green, blue = (2 * value - 1 for value in self.color)
        return Found((red, green, blue), self.spread)

    def asked(self, run: FamilyConfig, found: Found) -> list[str]:
        """Return the one empty prompt: this family reads no text."""
        return [""]
