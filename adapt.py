"""The contract between score chaining and pretrained diffusion models, and what every family shares.

A family is one folder, `families/<family>/`. Its adapter overrides the network call and the conditioning. Noise levels,
snapping and guidance live here.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

import families
from my.errors import UserError

if TYPE_CHECKING:
    from options.family import FamilyConfig

SLACK = 1e-3  # share by which a given level may lie outside the model's table: people write levels with four digits
SIGMA_MAX = 80.0  # largest level of noise of a schedule, unless asked for (EDM, arXiv 2206.00364, Table 1)

PLAIN_BACKGROUNDS = (
    (1.0, 1.0, 1.0),
    (0.85, 0.85, 0.85),
    (1.0, 0.85, 0.80),
    (0.80, 0.90, 1.0),
    (0.85, 1.0, 0.85),
    (1.0, 1.0, 0.80),
    (0.90, 0.82, 1.0),
    (0.80, 0.98, 0.98),
)  # RGB in [0, 1]


class Scheduler(Protocol):
    """What is read of a scheduler of diffusers."""

    betas: torch.Tensor  # (n,)


Level = float | torch.Tensor  # a level of noise out of a model's table, or one of each row: (B, 1, 1, 1) on the device


class Question(NamedTuple):
    """What a denoiser is asked: D(x, sigma), guided away from `uncond` and towards `cond`."""

    x: torch.Tensor  # (B, C, H, W)
    sigma: float  # out of the model's table
    cond: torch.Tensor  # (B, ...)
    uncond: torch.Tensor | None = None  # likewise; None for no guidance
    scale: float = 1.0
    negatives: tuple[torch.Tensor, torch.Tensor] | None = None  # conditions (B, n, ...) and weights (B, n)

    def texts(self) -> list[torch.Tensor]:
        """Return the conditions (B, ...) for which the network is evaluated."""
        if self.uncond is None or (self.scale == 1 and self.negatives is None):
            return [self.cond]
        return [self.cond, self.uncond, *(() if self.negatives is None else self.negatives[0].unbind(1))]

    def answer(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return D_u + scale (D_c - D_u) (B, C, H, W) of D for each of `texts` (arXiv 2207.12598, Eq. 6, in D).

        The negatives change D_c - D_u, by `perp_neg`.
        """
        if len(parts) == 1:
            return parts[0]
        d_cond, d_uncond, *d_others = parts
        toward = d_cond - d_uncond
        if self.negatives is not None and d_others:
            toward = perp_neg(toward, torch.stack(d_others, 1) - d_uncond[:, None], self.negatives[1])
        return d_uncond + self.scale * toward


class ScoreAdapter(ABC):
    """A denoiser D(x, sigma | text): the mean of the clean x0 given x = x0 + sigma n, n ~ N(0, I).

    Space: x is (B, C, H, W) float32, `data_shape` = (C, H, W), in the model's own space: RGB in
    [-1, 1] for pixel models, scaled latents for latent ones. `decode` turns it into a picture,
    `encode` back.
    Noise: `sigmas` (n,) float64, largest first, are the levels the model was trained at. They stay on the host.
    `denoise` takes one of them, and `answers` takes several at once. `round_sigma` finds the nearest to any other.
    Text: `embed` turns prompts into a batch of conditions (B, ...), rows that can be gathered and
    concatenated; the condition of "" is the unconditional one, unless not `free_guidance`: then
    there is none, and `denoise` does not guide. Conditions are on `device`, or on the host where
    the denoiser reads them there.
    Speed: `denoise` does not wait for the device, so that the host can prepare what comes next. Only
    the recording of a network's call waits, once per run.
    Score: grad_x log p(x; sigma) = (D(x, sigma) - x) / sigma^2 (EDM, arXiv 2206.00364, Eq. 3).
    """

    sigmas: torch.Tensor
    data_shape: tuple[int, int, int]
    device: torch.device
    free_guidance: bool = True

    @abstractmethod
    def _denoise(self, x: torch.Tensor, sigma: Level, cond: torch.Tensor) -> torch.Tensor:
        """Return D(x, sigma | cond) (B, C, H, W): the network call."""

    @abstractmethod
    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return the conditions of a list of prompts; raises UserError for words it cannot know."""

    @abstractmethod
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return x (B, C, h, w) of pictures (B, 3, H, W), RGB in [0, 1]."""

    @abstractmethod
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Return pictures (B, 3, H, W), RGB in [0, 1], of x (B, C, h, w), h and w free."""

    @property
    @abstractmethod
    def picture_size(self) -> int:
        """Edge in pixels of the square pictures that the model was trained on."""

    def denoise(
        self,
        x: torch.Tensor,
        sigma: float,
        cond: torch.Tensor,
        uncond: torch.Tensor | None = None,
        scale: float = 1.0,
        negatives: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the answer to one `Question`."""
        return self.answers([Question(x, sigma, cond, uncond, scale, negatives)])[0]

    def answers(self, questions: Sequence[Question]) -> list[torch.Tensor]:
        """Return the answers to several questions, in one call of the network. Each has its own level of noise."""
        questions = [self.askable(question) for question in questions]
        asked = [(q.x, q.sigma, text) for q in questions for text in q.texts()]
        xs, levels, conds = zip(*asked)
        sigma = levels[0]
        if len(set(levels)) > 1:
            sigma = torch.cat([x.new_full((len(x), 1, 1, 1), level) for x, level in zip(xs, levels)])
        parts = iter(self._denoise(torch.cat(xs), sigma, torch.cat(conds)).split([len(x) for x in xs]))
        return [q.answer([next(parts) for _ in q.texts()]) for q in questions]

    def askable(self, question: Question) -> Question:
        """Return the question that this model can be asked: without guidance, where it has no D_u."""
        return question if self.free_guidance else question._replace(uncond=None)

    def fitting(self, prompt: str, spoken: Callable[[str], list[str]]) -> str:
        """Return the prompt, cut at its end where the model would not read each text of `spoken(prompt)` to its end.

        `spoken` takes a prompt and returns texts with it inside, such as those with view words behind it. This one is
        for models that read texts of any length.
        """
        return prompt

    def text_done(self) -> None:  # noqa: B027 (a family may have nothing to free)
        """Free what only `embed` needs. This is called once the conditions of a run are known."""

    @property
    def is_exact(self) -> bool:
        """Whether all networks that `denoise` calls compute in float32."""
        return True

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Have the networks that `denoise` calls compute in float32 while the block runs, which takes more memory."""
        yield

    def keep_pictures(self, device: torch.device) -> None:
        """Keep what `encode` and `decode` need, on `device`, and free the rest: nothing can be denoised any more."""
        self.device = device

    def denoiser(
        self, prompts: list[str], scale: float = 1.0, negative_prompt: str = ""
    ) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """Return D(x, sigma) for a sampler, at the table's level nearest to sigma.

        It takes x (B, C, H, W) of any float type, and returns float32 on the device of x.
        """
        cond = self.embed(prompts)
        uncond = self.embed([negative_prompt]).expand_as(cond)

        def D(x: torch.Tensor, sigma: float) -> torch.Tensor:
            there = x.to(self.device, torch.float32)
            return self.denoise(there, self.round_sigma(sigma), cond, uncond, scale).to(x.device)

        return D

    def round_sigma(self, sigma: float | torch.Tensor) -> float:
        """Return the entry of `sigmas` nearest to `sigma`, a float."""
        return float(self._levels[self._nearest(sigma)])

    def sigma_range(self, sigma_min: float | None = None, sigma_max: float | None = None) -> tuple[float, float]:
        """Return the least and the largest level of a schedule: by default the model's, but at most SIGMA_MAX.

        Raises UserError for a level outside the model's table, and where the first is not below the second.
        """
        least, most = self.sigmas[-1].item(), self.sigmas[0].item()
        low, high = sigma_min or least, sigma_max or min(SIGMA_MAX, most)
        self.refuse_unknown_sigma("--sigma_min", low)
        self.refuse_unknown_sigma("--sigma_max", high)
        if self.round_sigma(low) >= self.round_sigma(high):
            name, value = ("sigma_max", high) if sigma_max else ("sigma_min", low)
            raise UserError(
                f"--{name} {value:g}: sigma_max must be above sigma_min; this model knows {least:.4g} to {most:.4g}"
            )
        return low, high

    def refuse_unknown_sigma(self, flag: str, sigma: float) -> None:
        """Raise UserError for a level outside the model's table: another one would take its place."""
        least, most = self.sigmas[-1].item(), self.sigmas[0].item()
        if not least * (1 - SLACK) <= sigma <= most * (1 + SLACK):
            raise UserError(f"{flag} {sigma:g}: this model knows {least:.4g} to {most:.4g}")

    def timestep(self, sigma: float) -> int:
        """Return the time step that networks take: the index of the entry nearest to `sigma`, from the smallest on."""
        return len(self._levels) - 1 - self._nearest(sigma)

    def timestep_on_device(self, sigma: Level) -> torch.Tensor:
        """Return `timestep` as a tensor on the device, (1,) or one of each row (B,): a copy of a number would wait."""
        if isinstance(sigma, torch.Tensor):
            return (self._rising - sigma.flatten()[:, None]).abs().argmin(1)
        t = self.timestep(sigma)
        return self._timesteps[t : t + 1]

    @property
    def _levels(self) -> np.ndarray:
        """The table `sigmas` as an array of the host."""
        return self.sigmas.numpy()

    @cached_property
    def _timesteps(self) -> torch.Tensor:
        """All time steps (n,) on the device."""
        return torch.arange(len(self.sigmas), device=self.device)

    @cached_property
    def _rising(self) -> torch.Tensor:
        """All levels (n,) float32 on the device, the smallest first."""
        return self.sigmas.flip(0).float().to(self.device)

    def _nearest(self, sigma: float | torch.Tensor) -> int:
        """Return the index of the entry of `sigmas` nearest to `sigma`."""
        return int(np.abs(self._levels - float(sigma)).argmin())

    @torch.no_grad()
    def plain_backgrounds(self) -> torch.Tensor:
        """Return x (n, C, H, W) of the plain light pictures PLAIN_BACKGROUNDS."""
        rgb = torch.tensor(PLAIN_BACKGROUNDS, device=self.device)[:, :, None, None]
        return self.encode(rgb.expand(-1, 3, self.picture_size, self.picture_size))


class PixelAdapter(ScoreAdapter):
    """A family whose x are pictures: RGB in [-1, 1], at the model's own resolution."""

    @property
    def picture_size(self) -> int:
        return self.data_shape[1]

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        return 2 * pictures - 1

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) / 2).clamp(0, 1)


def scheduler_sigmas(scheduler: Scheduler) -> torch.Tensor:
    """Return the noise levels (n,) float64 of a diffusers scheduler, largest first: sqrt((1 - abar) / abar).

    A last level of pure noise, abar = 0 (arXiv 2305.08891), is left out: no x = x0 + sigma n is that noisy. Raises
    UserError for betas that make no noise schedule.
    """
    abar = (1 - scheduler.betas.double()).cumprod(0)  # its own float32 product is 1e-5 off at small sigmas
    abar = abar[:-1] if abar[-1] == 0 else abar
    if not (len(abar) and (abar > 0).all() and (abar < 1).all() and (abar.diff() < 0).all()):
        raise UserError(
            "the betas of its scheduler are no noise schedule: each must lie between 0 and 1; get its "
            "scheduler/scheduler_config.json again"
        )
    return ((1 - abar) / abar).sqrt().flip(0)


def denoised(x: torch.Tensor, sigma: Level, out: torch.Tensor, prediction_type: str = "epsilon") -> torch.Tensor:
    """Return D of a network's answer `out` at x / sqrt(1 + sigma^2), by what it predicts: epsilon, v or the sample.

    Source: EDM, arXiv 2206.00364, Table 1, VP; for v, arXiv 2202.00512, appendix D.
    """
    if prediction_type == "sample":
        return out
    if prediction_type == "v_prediction":
        c_in = (1 + sigma**2) ** -0.5
        return c_in**2 * x - sigma * c_in * out
    return x - sigma * out


def posterior_mean(x: torch.Tensor, sigma: Level, y: torch.Tensor) -> torch.Tensor:
    """Return D(x, sigma) (C, H, W) where the data are the pictures y (n, C, H, W), equally likely.

    It is their mean, weighted by N(x; y_i, sigma^2 I). Source: EDM, arXiv 2206.00364, appendix B.3.
    sigma: a float, or a tensor without axes.
    """
    rows = y.flatten(1)
    distance = torch.linalg.vector_norm(rows - x.flatten(), dim=1)  # by |y|^2 - 2 xy + |x|^2 digits would cancel
    return ((distance.square() / (-2 * sigma**2)).softmax(0) @ rows).view_as(x)


def perp_neg(toward: torch.Tensor, away: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return toward - sum_i w_i (away_i - <away_i, toward> / |toward|^2 toward), (B, C, H, W).

    `toward` (B, C, H, W) and `away` (B, n, C, H, W) are denoised pictures less the unconditional one, and
    `weights` (B, n): of each negative prompt, only what is perpendicular to the positive one is taken away.
    Source: Perp-Neg, arXiv 2304.04968, whose noise predictions are these up to the common factor -1 / sigma.
    """
    dot = (away * toward[:, None]).sum((2, 3, 4), keepdim=True)  # (B, n, 1, 1, 1)
    square = toward.square().sum((1, 2, 3))[:, None, None, None, None].clamp(min=torch.finfo(toward.dtype).tiny)
    perpendicular = away - dot / square * toward[:, None]
    return toward - (weights[:, :, None, None, None] * perpendicular).sum(1)


def make_adapter(run: FamilyConfig, device: torch.device | str, found: Any = None) -> ScoreAdapter:
    """Return the adapter of the family that a run's configuration chooses.

    Raises UserError for a model that cannot be loaded.

    `found` is what `run.check_files` returned; None finds it here.
    """
    found = run.chosen.check(run) if found is None else found
    return families.adapter_module(run.family).make(run, found, device)
