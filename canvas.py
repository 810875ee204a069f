"""The paper's 2D experiments (arXiv 2212.00774, Fig. 4): score chaining where the rendering is a plain canvas.

The canvas x is its own rendering, so the Jacobian J is dx / dx = 1. What remains is the score at pictures without
noise: the canvas is perturbed, and the scores of its perturbed copies are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from karras import karras_sigmas
from my.seeds import numpy_rng, torch_rng
from options.canvas import ANNEALED, UNIFORM, CanvasConfig, Setting
from rules import chained_gradient

if TYPE_CHECKING:
    from adapt import ScoreAdapter


def noise_levels(cfg: CanvasConfig, adapter: ScoreAdapter, setting: Setting) -> list[float]:
    """Return the noise level of each step of a canvas, n_steps entries of the model's table."""
    table = adapter.sigmas.tolist()
    if setting.schedule == UNIFORM:
        return [table[numpy_rng(setting.seed, step, "sigma").integers(len(table))] for step in range(cfg.n_steps)]
    if setting.schedule == ANNEALED:
        low, high = adapter.sigma_range(cfg.sigma_min, cfg.sigma_max)
        return karras_sigmas(cfg.n_steps, low, high, round_sigma=adapter.round_sigma).tolist()
    return [adapter.round_sigma(float(setting.schedule))] * cfg.n_steps


def start(cfg: CanvasConfig, adapter: ScoreAdapter, setting: Setting) -> torch.Tensor:
    """Return the canvas (1, C, H, W) before the first step."""
    noise = torch.randn(1, *adapter.data_shape, generator=torch_rng(setting.seed, 0, "canvas"))
    return (cfg.init_std * noise).to(adapter.device)


@torch.no_grad()
def optimise(cfg: CanvasConfig, adapter: ScoreAdapter, setting: Setting, prompt: str) -> Iterator[torch.Tensor]:
    """Yield the canvas (1, C, H, W) after each step. Every random draw depends on the setting's seed and the step.

    The score is the mean of Eq. 16, or of Eq. 15, over perturbed copies at the step's sigma. A step is
    x += lr sigma^2 score. With Eq. 16 it goes the share lr of the way to the mean of the denoised copies.
    """
    x = start(cfg, adapter, setting)
    D = adapter.denoiser([prompt] * setting.copies, cfg.texts.scale, cfg.texts.negative_prompt)
    for step, sigma in enumerate(noise_levels(cfg, adapter, setting)):
        noise = torch.randn(setting.copies, *x.shape[1:], generator=torch_rng(setting.seed, step, "noise"))
        x_perturbed = x + sigma * noise.to(x)
        g = chained_gradient(D(x_perturbed, sigma), x, x_perturbed, sigma, setting.var_red)
        x = x + cfg.lr * sigma * g.mean(dim=0, keepdim=True)
        yield x
