"""Fit the field of a run to the truth: what its grid, its cameras and its decoder can reach at best.

    python -m benchmarks.ceiling --preset ideal --sd.prompt "a blue duck"

It takes the options of run_sjc.py, and leaves a run as that does. The score is that of a model which knows the one true
picture of each training camera: D(x, sigma) is that picture. What a real run lacks against this one, its score lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from adapt import PLAIN_BACKGROUNDS, ScoreAdapter, make_adapter
from my import script
from my.errors import UserError, run_main
from options.sjc import SJCConfig
from rules import chained_gradient
from run_sjc import read_config, train
from sjc import SJC
from toyworld import compose, coverage_maps
from toyworld.captions import read_prompt

if TYPE_CHECKING:
    import pose

SIZE = 64  # edge of the true pictures, pixels


class Fit(SJC):
    """An optimisation whose denoiser is the truth of the toy world."""

    def __init__(self, cfg: SJCConfig, adapter: ScoreAdapter) -> None:
        super().__init__(cfg, adapter)
        self.color, self.object = read_prompt(cfg.texts.prompt, "--sd.prompt")

    @torch.no_grad()
    def gradient(
        self, x: torch.Tensor, n: torch.Tensor, cameras: list[pose.Camera], sigma: float, i: int
    ) -> torch.Tensor:
        """Return what step `i` chains (b, C, H, W): Eq. 16 of arXiv 2212.00774, with the truth for the denoised."""
        maps = coverage_maps(self.object, cameras, SIZE)
        pictures = compose(maps, self.color, PLAIN_BACKGROUNDS[self.draw_background(i)])
        size = self.adapter.picture_size
        truth = self.adapter.encode(F.interpolate(pictures, (size, size), mode="area").to(x.device))
        return chained_gradient(truth, x, x, sigma, var_red=True) / self.cfg.batch_views


def prepare(cfg: SJCConfig, found: Any) -> Callable[[], None]:
    """Return the run of the current folder; raises UserError where it has no plain backgrounds."""
    if not cfg.plain_bg:
        raise UserError("--plain_bg False: the truth stands before plain backgrounds; take --preset ideal or mini")
    fit = Fit(cfg, make_adapter(cfg, script.pick_device(cfg.device), found))
    return lambda: train(fit, 0)


def main(argv: list[str] | None = None) -> None:
    """Fit a field in the current folder."""
    cfg = read_config(argv)
    if cfg.resume is True:
        raise UserError("--resume True: a fit is not continued; start it in an empty folder")
    script.begin(cfg, prepare, argv)


if __name__ == "__main__":
    run_main(main)
