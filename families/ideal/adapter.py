"""The ideal family: the exact denoiser of a finite set of pictures. No network, no weights.

The set is the toy world's renders of the prompt's object, by training cameras, on the plain light
backgrounds; the view words of a prompt select among them.
"""

from functools import cached_property, partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import pose
from adapt import PLAIN_BACKGROUNDS, PixelAdapter
from karras import scaled_linear_betas, sigmas_from_betas
from my.errors import UserError
from my.seeds import numpy_rng
from toyworld import compose, coverage_maps

RENDER_SIZE = 64
RENDER_BATCH = 16
ANY_VIEW = -1  # the condition of a prompt without view words, and of ""


class IdealAdapter(PixelAdapter):
    """D(x, sigma) = sum_i y_i N(x; y_i, sigma^2 I) / sum_i N(x; y_i, sigma^2 I) over pictures y_i.

    `names` are the view prompts; `paint()` returns {view prompt: the pictures (n_v, 3, size, size),
    RGB in [-1, 1], that it selects}, and is called at the first denoising: a finished run needs none.
    Source: EDM, arXiv 2206.00364, appendix B.3.
    """

    def __init__(self, names, size, paint, device="cpu"):
        self.device = torch.device(device)
        self.names, self.data_shape, self._paint = list(names), (3, size, size), paint
        self.sigmas = torch.as_tensor(sigmas_from_betas(scaled_linear_betas(0.00085, 0.012, 1000)))

    @cached_property
    def views(self):
        """Pictures (n_v, 3, H, W) of each view prompt."""
        pictures = self._paint()
        return [pictures[name].to(self.device) for name in self.names]

    @cached_property
    def all_views(self):
        """Pictures (n, 3, H, W) of all views."""
        return torch.cat(self.views)

    def embed(self, prompts):
        """Return the view index (B,) of each prompt, ANY_VIEW where it names no view."""
        return torch.tensor([self._view_index(p) for p in prompts], device=self.device)

    def _view_index(self, prompt):
        view, of, _ = prompt.partition(" of ")
        if not of:
            return ANY_VIEW
        if f"{view} of" not in self.names:
            raise UserError(
                f"no picture has the view {f'{view} of'!r}: take more with --ideal.n_cameras; "
                f"there are: {', '.join(self.names)}"
            )
        return self.names.index(f"{view} of")

    def _denoise(self, x, sigma, cond):
        return torch.stack(
            [
                self._posterior_mean(xi, sigma, self.all_views if v == ANY_VIEW else self.views[v])
                for xi, v in zip(x, cond.tolist())
            ]
        )

    @staticmethod
    def _posterior_mean(x, sigma, y):
        log_w = -(y - x).square().flatten(1).sum(1) / (2 * sigma**2)
        return torch.einsum("n,nchw->chw", log_w.softmax(0), y)


def paint(color, obj, cameras, size):
    """Return {view prompt: pictures (n_v, 3, size, size) in [-1, 1]} of an object, on every plain background."""
    maps = torch.cat(
        [
            coverage_maps(obj, cameras[i : i + RENDER_BATCH], RENDER_SIZE)
            for i in tqdm(range(0, len(cameras), RENDER_BATCH), desc="taking pictures", leave=False, disable=None)
        ]
    )
    pictures = {}
    for view in dict.fromkeys(c.view for c in cameras):
        mine = maps[[c.view == view for c in cameras]]
        y = torch.cat([compose(mine, color, background) for background in PLAIN_BACKGROUNDS])
        pictures[view] = 2 * F.interpolate(y, (size, size), mode="area") - 1
    return pictures


def make(run, found, device):
    """Return the ideal adapter of a run's configuration and of the (color, object) of its prompt."""
    color, obj = found
    p, rng = run.pose, numpy_rng(run.seed, 0, "ideal/cameras")
    cameras = [pose.train_camera(rng, p.R, p.fov_range, p.view_words) for _ in range(run.chosen.n_cameras)]
    names = dict.fromkeys(c.view for c in cameras)
    return IdealAdapter(names, p.rend_hw, partial(paint, color, obj, cameras, p.rend_hw), device)
