"""The paper's 2D experiments (arXiv 2212.00774, Fig. 4): score chaining where the rendering is a plain canvas.

The canvas x is its own rendering, J = dx / dx = 1: what remains is the score at non-noisy pictures,
perturbed and averaged, and the choices that go with it.
"""

import torch

from karras import karras_sigmas
from my.seeds import numpy_rng, torch_rng
from options.canvas import ANNEALED, UNIFORM
from sjc import chained_gradient


def noise_levels(cfg, adapter, setting):
    """Return the noise level of each of a canvas's steps (n_steps,), entries of the model's table."""
    table = adapter.sigmas.tolist()
    if setting.schedule == UNIFORM:
        return [table[numpy_rng(setting.seed, step, "sigma").integers(len(table))] for step in range(cfg.n_steps)]
    if setting.schedule == ANNEALED:
        low, high = adapter.sigma_range(cfg.sigma_min, cfg.sigma_max)
        return karras_sigmas(cfg.n_steps, low, high, round_sigma=adapter.round_sigma).tolist()
    return [adapter.round_sigma(float(setting.schedule))] * cfg.n_steps


def start(cfg, adapter, setting):
    """Return the canvas (1, C, H, W) before the first step."""
    noise = torch.randn(1, *adapter.data_shape, generator=torch_rng(setting.seed, 0, "canvas"))
    return (cfg.init_std * noise).to(adapter.device)


@torch.no_grad()
def optimise(cfg, adapter, setting, prompt):
    """Yield the canvas (1, C, H, W) after each step, from `setting` and its seed alone.

    The score is the mean over perturbed copies of Eq. 16, or Eq. 15, at this step's sigma; a step is
    x += lr sigma^2 score, which with Eq. 16 goes the share lr of the way to the denoised copies' mean.
    """
    x = start(cfg, adapter, setting)
    D = adapter.denoiser([prompt] * setting.copies, cfg.texts.scale, cfg.texts.negative_prompt)
    for step, sigma in enumerate(noise_levels(cfg, adapter, setting)):
        noise = torch.randn(setting.copies, *x.shape[1:], generator=torch_rng(setting.seed, step, "noise"))
        x_perturbed = x + sigma * noise.to(x)
        g = chained_gradient(D(x_perturbed, sigma), x, x_perturbed, sigma, setting.var_red)
        x = x + cfg.lr * sigma * g.mean(dim=0, keepdim=True)
        yield x
