"""Pictures out of a diffusion model, by the samplers of `karras.py`."""

import torch

from karras import geometric_sigmas, karras_sampler, karras_sigmas, smld_sampler
from my.seeds import torch_noise


def noise_levels(cfg, adapter):
    """Return the sampler's noise levels (num_t,), entries of the model's table; UserError for a range that is none."""
    low, high = adapter.sigma_range(cfg.sigma_min, cfg.sigma_max)
    schedule = geometric_sigmas if cfg.sampler == "smld" else karras_sigmas
    return schedule(cfg.num_t, low, high, round_sigma=adapter.round_sigma)


@torch.no_grad()
def draw(cfg, adapter, levels, subjects, images):
    """Yield the state (B, C, H, W) after each level of the pictures that have these numbers, each from its own noise.

    `subjects` are B prompts or classes. A picture depends on (cfg.seed, its number), and on the
    others of its batch only by rounding.
    """
    randn = torch_noise(cfg.seed, images, "image")
    x = torch.empty(len(images), *adapter.data_shape, dtype=torch.float64, device=adapter.device)
    x, D = levels[0] * randn(x), adapter.denoiser(subjects, cfg.texts.scale, cfg.texts.negative_prompt)
    if cfg.sampler == "smld":
        return (yield from smld_sampler(D, x, levels, randn, cfg.smld_steps, cfg.smld_step_size))
    S_churn = cfg.S_churn if cfg.langevin else 0.0
    yield from karras_sampler(
        D, x, levels, cfg.heun, S_churn, cfg.S_min, cfg.S_max, cfg.S_noise, adapter.round_sigma, randn
    )
