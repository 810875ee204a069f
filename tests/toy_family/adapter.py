"""The toy family: every pixel of a picture is drawn on its own, round one mean colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adapt import Level, PixelAdapter
from karras import linear_betas, sigmas_from_betas

if TYPE_CHECKING:
    from families.toy.options import Found

    from options.family import FamilyConfig


class ToyAdapter(PixelAdapter):
    """Score of pictures x0 ~ N(mean, spread^2 I).

    For x = x0 + sigma n, the mean of x0 given x is (spread^2 x + sigma^2 mean) / (spread^2 + sigma^2).
    """

    free_guidance = False  # there is no text to guide by

    def __init__(
        self, mean: tuple[float, float, float], spread: float, size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.mean = torch.tensor(mean, device=self.device)[:, None, None]  # (3, 1, 1), RGB in [-1, 1]
        self.spread = spread
        self.data_shape = (3, size, size)
        self.sigmas = torch.as_tensor(sigmas_from_betas(linear_betas(1e-4, 0.02, 1000)))

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return one empty condition (B, 0) per prompt."""
        return torch.empty(len(prompts), 0, device=self.device)

    def _denoise(self, x: torch.Tensor, sigma: Level, cond: torch.Tensor) -> torch.Tensor:
        return (self.spread**2 * x + sigma**2 * self.mean) / (self.spread**2 + sigma**2)


def make(run: FamilyConfig, found: Found, device: torch.device | str) -> ToyAdapter:
    """Return the toy adapter of a run's configuration and of what `Options.check` found."""
    return ToyAdapter(found.mean, found.spread, run.pose.rend_hw, device)
