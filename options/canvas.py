"""The typed configuration of the 2D experiments. Imports nothing heavy: `-h` must answer at once."""

from __future__ import annotations

from itertools import product
from typing import ClassVar, NamedTuple

from pydantic import Field, field_validator, model_validator

from families.family import Conditions
from my.config import near_miss
from my.script import FIRST as OF_RUNS
from options.family import FIRST, FamilyConfig

ANNEALED, UNIFORM = "annealed", "uniform"


class Setting(NamedTuple):
    """The settings of one canvas, which is one cell of the figure."""

    schedule: str  # ANNEALED, UNIFORM or a number, the single level of noise
    var_red: bool
    copies: int
    seed: int

    @property
    def row(self) -> str:
        """The title of the cell's row in the figure."""
        noise = self.schedule if self.schedule in (ANNEALED, UNIFORM) else f"single, {self.schedule}"
        return f"sigma: {noise}; Eq. {16 if self.var_red else 15}"

    @property
    def caption(self) -> str:
        """The caption of the cell."""
        return f"{self.copies} {'copy' if self.copies == 1 else 'copies'}, seed {self.seed}"


def read_level(text: str) -> str:
    """Return the shortest way to write the level of noise in `text`; ValueError where there is none."""
    try:
        level = float(text)
    except ValueError:
        level = 0.0
    if not 0 < level < float("inf"):
        raise ValueError(
            f"each must be {ANNEALED}, {UNIFORM} or a number above 0, not {text!r}"
            f"{near_miss(text, (ANNEALED, UNIFORM))}"
        )
    return f"{level:.12g}"


class CanvasConfig(FamilyConfig):
    """Every option of run_2d_sjc.py. Where an option is a list, every value is combined with those of all lists."""

    schedules: list[str] = Field(
        ["1.5", ANNEALED],
        min_length=1,
        description=(
            f"noise levels to compare: a number is one fixed level, {ANNEALED} goes from sigma_max to sigma_min, "
            f"{UNIFORM} draws any level of the model in each step"
        ),
    )
    var_red: list[bool] = Field(
        [True, False],
        min_length=1,
        description="equations to compare: True subtracts the canvas (Eq. 16), False the noisy canvas (Eq. 15)",
    )
    copies: list[int] = Field(
        [1, 8], min_length=1, description="numbers of noisy copies to compare; in each step their scores are averaged"
    )
    n_seeds: int = Field(1, gt=0, description="number of seeds to compare, from --seed on")
    n_steps: int = Field(120, gt=1, description="steps per canvas")
    lr: float = Field(0.1, gt=0, le=1, description="length of a step, as a share of the way to the denoised canvas")
    init_std: float = Field(
        0.0, ge=0, description="standard deviation of the noise on a canvas at its start; without it, it is plain grey"
    )
    sigma_max: float | None = Field(
        None, gt=0, description=f"for {ANNEALED}: first noise level; default the model's largest, but at most 80"
    )
    sigma_min: float | None = Field(
        None, gt=0, description=f"for {ANNEALED}: last noise level; default the model's smallest"
    )

    command: ClassVar[str] = "run_2d_sjc.py"
    first: ClassVar[tuple[str, ...]] = (*FIRST, "schedules", "var_red", "copies", "n_seeds", "n_steps", *OF_RUNS)
    conditions: ClassVar[Conditions] = dict.fromkeys(("sigma_max", "sigma_min"), {"schedules": (ANNEALED,)})

    @field_validator("schedules")
    @classmethod
    def _known(cls, schedules: list[str]) -> list[str]:
        return [name if name in (ANNEALED, UNIFORM) else read_level(name) for name in schedules]

    @model_validator(mode="after")
    def _differ(self) -> CanvasConfig:
        for name in ("schedules", "var_red", "copies"):
            values = getattr(self, name)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"--{name}: {twice[0]} is given twice; leave one out")
        if min(self.copies) < 1:
            raise ValueError(f"--copies must be at least 1, got {min(self.copies)}")
        if self.sigma_min and self.sigma_max and self.sigma_min >= self.sigma_max:
            raise ValueError(f"--sigma_max {self.sigma_max:g} must be above --sigma_min {self.sigma_min:g}")
        return self

    def single_levels(self) -> list[float]:
        """Return the numbers among the schedules."""
        return [float(name) for name in self.schedules if name not in (ANNEALED, UNIFORM)]

    def rows(self) -> list[list[Setting]]:
        """Return the settings that are compared, row by row of the figure."""
        return [
            [
                Setting(schedule, var_red, copies, seed)
                for copies, seed in product(self.copies, range(self.seed, self.seed + self.n_seeds))
            ]
            for schedule, var_red in product(self.schedules, self.var_red)
        ]
