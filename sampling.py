"""Pictures drawn from a diffusion model, by the samplers of `karras.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from karras import geometric_sigmas, karras_sampler, karras_sigmas, smld_sampler
from my.exact import exact_device
from my.seeds import torch_noise

if TYPE_CHECKING:
    from adapt import ScoreAdapter
    from options.sampling import SamplingConfig


def noise_levels(cfg: SamplingConfig, adapter: ScoreAdapter) -> np.ndarray:
    """Return the sampler's noise levels (num_t,), entries of the model's table, largest first.

    Raises UserError where sigma_min and sigma_max are no range of the model's levels.
    """
    low, high = adapter.sigma_range(cfg.sigma_min, cfg.sigma_max)
    schedule = geometric_sigmas if cfg.sampler == "smld" else karras_sigmas
    return schedule(cfg.num_t, low, high, round_sigma=adapter.round_sigma)


@torch.no_grad()
def draw(
    cfg: SamplingConfig, adapter: ScoreAdapter, levels: np.ndarray, subjects: list[str], images: Sequence[int]
) -> Iterator[torch.Tensor]:
    """Yield the state (B, C, H, W) of a batch of B pictures after each level.

    `subjects` are B prompts or classes, and `images` are the pictures' numbers. Each picture has its own noise, which
    depends on cfg.seed and its number alone. Other pictures of the batch change it by rounding at most.
    """
    randn = torch_noise(cfg.seed, images, "image")
    x = torch.empty(len(images), *adapter.data_shape, dtype=torch.float64, device=exact_device(adapter.device))
    x, D = levels[0] * randn(x), adapter.denoiser(subjects, cfg.texts.scale, cfg.texts.negative_prompt)
    if cfg.sampler == "smld":
        yield from smld_sampler(D, x, levels, randn, cfg.smld_steps, cfg.smld_step_size)
        return
    S_churn = cfg.S_churn if cfg.langevin else 0.0
    yield from karras_sampler(
        D, x, levels, cfg.heun, S_churn, cfg.S_min, cfg.S_max, cfg.S_noise, adapter.round_sigma, randn
    )
