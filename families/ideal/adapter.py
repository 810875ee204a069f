"""The ideal family: the exact denoiser of a finite set of pictures. It has no network and no weights.

The set is the toy world's renders of the object in the prompt, by training cameras, on the plain light backgrounds. The
view words of a prompt select among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

import pose
from adapt import PLAIN_BACKGROUNDS, PixelAdapter
from karras import scaled_linear_betas, sigmas_from_betas
from my.errors import UserError
from my.seeds import numpy_rng
from toyworld import compose, coverage_maps

if TYPE_CHECKING:
    from families.ideal.options import Found
    from options.family import FamilyConfig

Pictures = dict[str, torch.Tensor]  # {view prompt: (n, 3, size, size), RGB in [-1, 1]}

RENDER_SIZE = 64
RENDER_BATCH = 16
ANY_VIEW = -1  # the condition of "", and of a prompt without view words


class IdealAdapter(PixelAdapter):
    """D(x, sigma) = sum_i y_i N(x; y_i, sigma^2 I) / sum_i N(x; y_i, sigma^2 I) over pictures y_i.

    `names` are the view prompts. `paint()` returns the pictures that each of them selects. It is called at the first
    denoising, for a finished run needs no picture.
    Source: EDM, arXiv 2206.00364, appendix B.3.
    """

    def __init__(
        self, names: Iterable[str], size: int, paint: Callable[[], Pictures], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.names, self.data_shape, self._paint = list(names), (3, size, size), paint
        self.sigmas = torch.as_tensor(sigmas_from_betas(scaled_linear_betas(0.00085, 0.012, 1000)))

    @cached_property
    def views(self) -> list[torch.Tensor]:
        """Pictures (n_v, 3, H, W) per view prompt."""
        pictures = self._paint()
        return [pictures[name].to(self.device, non_blocking=self.device.type == "cuda") for name in self.names]

    @cached_property
    def all_views(self) -> torch.Tensor:
        """Pictures (n, 3, H, W) of all views."""
        return torch.cat(self.views)

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return the index (B,) of the view in each prompt, ANY_VIEW where it names no view, on the host.

        Raises UserError for a view of which there is no picture.
        """
        return torch.tensor([self._view_index(p) for p in prompts])

    def _view_index(self, prompt: str) -> int:
        view, of, _ = prompt.partition(" of ")
        if not of:
            return ANY_VIEW
        if f"{view} of" not in self.names:
            raise UserError(
                f"no picture has the view {f'{view} of'!r}, only {', '.join(self.names)}; take more pictures with "
                "--ideal.n_cameras"
            )
        return self.names.index(f"{view} of")

    def _denoise(self, x: torch.Tensor, sigma: float, cond: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                self._posterior_mean(xi, sigma, self.all_views if v == ANY_VIEW else self.views[v])
                for xi, v in zip(x, cond.tolist())
            ]
        )

    @staticmethod
    def _posterior_mean(x: torch.Tensor, sigma: float, y: torch.Tensor) -> torch.Tensor:
        """Return the mean (3, H, W) of pictures y (n, 3, H, W), weighted by N(x; y_i, sigma^2 I)."""
        rows = y.flatten(1)
        distance = torch.linalg.vector_norm(rows - x.flatten(), dim=1)  # by |y|^2 - 2 xy + |x|^2 digits would cancel
        return ((distance.square() / (-2 * sigma**2)).softmax(0) @ rows).view_as(x)


def paint(color: str, obj: str, cameras: list[pose.Camera], size: int) -> Pictures:
    """Return the pictures of an object, on every plain background, by the view prompts of the cameras."""
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


def make(run: FamilyConfig, found: Found, device: torch.device | str) -> IdealAdapter:
    """Return the ideal adapter of a run's configuration and of what `Options.check` found."""
    p, rng = run.pose, numpy_rng(run.seed, 0, "ideal/cameras")
    cameras = [pose.train_camera(rng, p.R, p.fov_range, p.view_words) for _ in range(found.n_cameras)]
    names = dict.fromkeys(c.view for c in cameras)
    return IdealAdapter(names, p.rend_hw, partial(paint, found.color, found.object, cameras, p.rend_hw), device)
