"""The smallest runs there can be: a denoiser that is one line, and a configuration to go with it."""

import math

import numpy as np
import torch

from adapt import Question, ScoreAdapter
from families.ideal.adapter import IdealAdapter
from karras import scaled_linear_betas, sigmas_from_betas
from options.sjc import SJCConfig

SIZE = 6


class Affine(ScoreAdapter):
    """D(x, sigma | c) = x / 2 + c, in 3 channels of SIZE x SIZE; a prompt's c is made of its letters."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.data_shape = (3, SIZE, SIZE)
        self.sigmas = torch.as_tensor(sigmas_from_betas(scaled_linear_betas(0.00085, 0.012, 1000)))

    def _denoise(self, x, sigma, cond):
        return x / 2 + cond

    def embed(self, prompts):
        return torch.tensor([sum(map(ord, p)) % 17 / 17 for p in prompts])[:, None, None, None]

    def encode(self, pictures):
        return 2 * pictures - 1

    def decode(self, x):
        return ((x + 1) / 2).clamp(0, 1)

    @property
    def picture_size(self):
        return SIZE


def of_pictures(views):
    """The ideal adapter of {view prompt: pictures (n, C, H, W)}. It has no bad pictures, and no other objects."""
    return IdealAdapter(views, next(iter(views.values())).shape[2], {"": views}.__getitem__, lambda: None)


class NotANumber(Affine):
    """A denoiser that has broken down."""

    def _denoise(self, x, sigma, cond):
        return x * math.nan


def at_several_levels(adapter, cond, uncond):
    """Return (the answers to questions at several levels of noise, asked at once, what was answered one by one).

    cond, uncond: one condition each.
    """
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, *adapter.data_shape))).float()
    levels = adapter.sigmas[[100, 500, 900]].tolist()
    conds = cond.expand(2, *cond.shape[1:]), uncond.expand(2, *uncond.shape[1:])
    questions = [
        Question(x, levels[0], *conds, 3.0),
        Question(-x, levels[1], conds[0]),
        Question(x[:1], levels[2], *(c[:1] for c in conds), 0.5),
    ]
    return torch.cat(adapter.answers(questions)), torch.cat([adapter.denoise(*question) for question in questions])


def config(**options):
    """A tiny run: field 4^3, SIZE x SIZE pictures, no regulariser unless given."""
    base = {
        "family": "ideal",
        "sd": {"prompt": "a blue duck", "scale": 3},
        "emptiness_weight": 0,
        "n_steps": 6,
        "vox": {"grid_size": 4, "step_ratio": 1},
        "pose": {"rend_hw": SIZE},
    }
    nested = {k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in options.items()}
    return SJCConfig(**{**base, **nested})


def pixel_unet():
    """A tiny unconditional UNet of 8x8 pictures, of diffusers, with random weights that are always the same."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
