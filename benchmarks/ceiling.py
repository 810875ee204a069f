"""Fit the field of a run to the truth: what its grid, its cameras and its decoder reach with the truth for the score.

    python -m benchmarks.ceiling --preset ideal --sd.prompt "a blue duck"

It takes the options of run_sjc.py but those of the score, and leaves a run as that does. The score is that of a model
which knows the one true picture of each training camera: D(x, sigma) is that picture, at every sigma. What is chained
is D - x, minus the gradient of half the squared error. What a preset says of the score and of noise is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F

from adapt import PLAIN_BACKGROUNDS, ScoreAdapter, make_adapter
from benchmarks import other_score
from families.family import Conditions
from my import script
from my.errors import UserError, run_main
from options.sjc import SJCConfig
from sjc import SJC
from toyworld import compose, coverage_maps
from toyworld.captions import read_prompt

if TYPE_CHECKING:
    import pose

SIZE = 64  # edge of the true pictures, pixels
OF_SCORE = (
    *(*other_score.OF_RULE, "noise", "sigma_range", "sigma_anneal", "sigma_schedule", "cls_scaling", "compile"),
    *("sd.scale", "sd.negative_prompt", "sd.lora", "sd.ema", "sd.precision", "ideal.n_cameras"),
    *("pose.view_words", "pose.view_style", "pose.view_texts", "pose.perp_neg"),
)  # options that only a model's score reads, or what is chained of it


class FitConfig(SJCConfig):
    """The options of run_sjc.py, of which a fit reads no score and no beginning."""

    command: ClassVar[str] = "benchmarks.ceiling"
    continues: ClassVar[bool] = False
    conditions: ClassVar[Conditions] = dict.fromkeys(OF_SCORE) | other_score.NEW  # None: nothing reads it


class Fit(SJC):
    """An optimisation whose denoiser is the truth of the toy world."""

    def __init__(self, cfg: SJCConfig, adapter: ScoreAdapter) -> None:
        super().__init__(cfg, adapter)
        self.color, self.object = read_prompt(cfg.texts.prompt, "--sd.prompt")

    @torch.no_grad()
    def gradient(
        self, x: torch.Tensor, n: torch.Tensor, cameras: list[pose.Camera], sigma: float, i: int
    ) -> torch.Tensor:
        """Return what step `i` chains (b, C, H, W): the truth less the rendering."""
        maps = coverage_maps(self.object, cameras, SIZE)
        pictures = compose(maps, self.color, PLAIN_BACKGROUNDS[self.draw_background(i)])
        size = self.adapter.picture_size
        truth = self.adapter.encode(F.interpolate(pictures, (size, size), mode="area").to(x.device))
        return (truth - x) / self.cfg.batch_views


def fit(cfg: SJCConfig, found: Any) -> Fit:
    """Return the optimisation; raises UserError where it has no plain backgrounds."""
    if not cfg.plain_bg:
        raise UserError("--plain_bg False: the truth stands before plain backgrounds; take --preset ideal or mini")
    return Fit(cfg, make_adapter(cfg, script.pick_device(cfg.device), found))


def main(argv: list[str] | None = None) -> None:
    """Fit a field in the current folder."""
    other_score.run(other_score.read_options(FitConfig, argv, __doc__), fit, argv)


if __name__ == "__main__":
    run_main(main, go_on=other_score.go_on)
