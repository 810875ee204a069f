"""The ideal family: the exact denoiser of a finite set of pictures. It has no network and no weights.

The set is the toy world's renders of the object in the prompt, by training cameras, on the plain light backgrounds. The
view words of a prompt select among them, and words of bad pictures make them bad. Without an object, the set is that of
every object in every colour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING

import torch

import pose
from adapt import Level, PixelAdapter, posterior_mean
from families.ideal.options import bad_words
from families.ideal.pairs import AllPairs
from families.ideal.pictures import Photographer, Pictures
from karras import scaled_linear_betas, sigmas_from_betas
from my.errors import UserError
from my.seeds import numpy_rng
from toyworld.words import DEGRADATIONS

if TYPE_CHECKING:
    from families.ideal.options import Found
    from options.family import FamilyConfig

ANY_VIEW, ANY_PAIR = -1, -2  # the conditions of a prompt without view words, and of one without an object


class IdealAdapter(PixelAdapter):
    """D(x, sigma) = sum_i y_i N(x; y_i, sigma^2 I) / sum_i N(x; y_i, sigma^2 I) over pictures y_i.

    `names` are the view prompts. `paint(word)` returns the pictures that each of them selects, made bad by a word of
    DEGRADATIONS, or by "" good ones. `world()` returns the coverage maps (n, 5, H, W) of every object, and how likely
    each is (n). Both are called when a denoising first needs them, for a finished run needs no picture.
    Source: EDM, arXiv 2206.00364, appendix B.3.
    """

    def __init__(
        self,
        names: Iterable[str],
        size: int,
        paint: Callable[[str], Pictures],
        world: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.names, self.data_shape, self._paint, self._world = list(names), (3, size, size), paint, world
        self.sigmas = torch.as_tensor(sigmas_from_betas(scaled_linear_betas(0.00085, 0.012, 1000)))
        self._painted: dict[str, Pictures] = {}
        self._sets: dict[tuple[int, int], torch.Tensor] = {}

    @cached_property
    def all_pairs(self) -> AllPairs:
        """The pictures of every object in every colour."""
        return AllPairs(*self._world(), self.data_shape[1], self.device)

    def pictures(self, view: int = ANY_VIEW, bad: int = 0) -> torch.Tensor:
        """Return the pictures (n, 3, H, W) of a condition (view, bad) whose prompt has an object."""
        if (view, bad) not in self._sets:
            names = self.names if view == ANY_VIEW else [self.names[view]]
            parts = [self._by_view(word)[name] for word in named(bad) for name in names]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._sets[view, bad] = y.to(self.device, non_blocking=self.device.type == "cuda")
        return self._sets[view, bad]

    def _by_view(self, word: str) -> Pictures:
        """Return the pictures of all views, bad by a word, on the host."""
        if word not in self._painted:
            self._painted[word] = self._paint(word)
        return self._painted[word]

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return for each prompt a row of (B, 2) integers, on the host: which pictures, and how they are bad.

        The first is the index of its view, ANY_VIEW where it names no view, ANY_PAIR where it names nothing. The second
        has bit i where the prompt has word i of DEGRADATIONS. Raises UserError for a view of which there is no picture.
        """
        return torch.tensor([self._condition(p) for p in prompts])

    def _condition(self, prompt: str) -> tuple[int, int]:
        found, others = bad_words(prompt)
        bad = sum(1 << DEGRADATIONS.index(word) for word in found)
        return self._view_index(prompt) if others else ANY_PAIR, bad

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

    def _denoise(self, x: torch.Tensor, sigma: Level, cond: torch.Tensor) -> torch.Tensor:
        levels = sigma.flatten() if isinstance(sigma, torch.Tensor) else [sigma] * len(x)
        return torch.stack([self._mean(xi, level, *row) for xi, level, row in zip(x, levels, cond.tolist())])

    def _mean(self, x: torch.Tensor, sigma: Level, view: int, bad: int) -> torch.Tensor:
        """Return D(x, sigma) (3, H, W) of one x (3, H, W) for a condition (view, bad)."""
        if view == ANY_PAIR:
            return self.all_pairs.posterior_mean(x, sigma, named(bad))
        return posterior_mean(x, sigma, self.pictures(view, bad))


def named(bad: int) -> list[str]:
    """Return the words of DEGRADATIONS whose bits `bad` has, [""] for none: good pictures."""
    return [word for i, word in enumerate(DEGRADATIONS) if bad >> i & 1] or [""]


def make(run: FamilyConfig, found: Found, device: torch.device | str) -> IdealAdapter:
    """Return the ideal adapter of a run's configuration and of what `Options.check` found."""
    p, rng = run.pose, numpy_rng(run.seed, 0, "ideal/cameras")
    cameras = [pose.train_camera(rng, p.R, p.fov_range, p.view_words) for _ in range(found.n_cameras)]
    names = dict.fromkeys(c.view for c in cameras)
    taker = Photographer(found.color, found.object, cameras, p.rend_hw)
    return IdealAdapter(names, p.rend_hw, taker.paint, taker.world, device)
