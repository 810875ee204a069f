"""Rules of score distillation: in which direction a step moves a rendering, given a denoiser.

All rules are written in sigma space. x (b, C, H, W) is the rendering, n ~ N(0, I), x_sigma = x + sigma n, and D the
denoiser: D_c with the text, D_u without, D_bad with words of bad pictures, and, with the guidance s = --sd.scale,

    D_s = D_u + s (D_c - D_u),    e = (x_sigma - D) / sigma,    w = sigma^2 / (1 + sigma^2).

e is the noise that a network predicts, and w = sigma_t^2 in the terms of papers in which x is scaled by
1 / sqrt(1 + sigma^2). Each rule returns the ascent direction g at x, which the renderer's Jacobian chains. It is minus
the gradient of the paper, up to a factor that is the same at all levels where nothing else is said.

The guidance s counts from D_u. Where a paper writes D_c + s' (D_c - D_u), its s' is s = s' + 1 here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from adapt import Question, posterior_mean

if TYPE_CHECKING:
    from adapt import ScoreAdapter
    from options.sjc import SJCConfig

NFSD_ENTRY = 200  # of 1000: below this entry of the noise table, the noise is taken from D_u alone
CSD_TURN = 0.5  # share of the run in which bad words take the place of no words
ASD_SHARE = 0.1  # the second level lies above the first by at most this share of its entries in --sigma_range
ISM_GAP, ISM_STRIDE = 50, 200  # entries between both levels; entries per step of the inversion below them
SDI_STEPS, SDI_SCALE = 10, -7.5  # steps of the inversion from the lowest level to the highest; its guidance
ENTRIES = 1000  # of the noise tables in which papers count

Denoise = Callable[[torch.Tensor, float], torch.Tensor]


class Ask:
    """The denoiser of a step, for the texts of its views. `n_calls` counts evaluations of the network per view."""

    def __init__(
        self,
        adapter: ScoreAdapter,
        cond: torch.Tensor,
        uncond: torch.Tensor,
        scale: float,
        negatives: tuple[torch.Tensor, torch.Tensor] | None = None,
        bad: torch.Tensor | None = None,
    ) -> None:
        self.adapter, self.cond, self.scale, self.negatives = adapter, cond, scale, negatives
        self.uncond, self.bad = uncond.expand_as(cond), None if bad is None else bad.expand_as(cond)
        self.n_calls = 0

    def answers(self, *questions: Question) -> list[torch.Tensor]:
        """Return the answers to several questions, in one call of the network."""
        self.n_calls += sum(len(self.adapter.askable(question).texts()) for question in questions)
        return self.adapter.answers(questions)

    def towards_text(self, x: torch.Tensor, sigma: float, scale: float | None = None) -> Question:
        """Return the question for D_s(x, sigma), with Perp-Neg where the run has it; at scale 1 it is D_c.

        `scale` takes the place of the run's guidance.
        """
        return Question(x, sigma, self.cond, self.uncond, self.scale if scale is None else scale, self.negatives)

    def guided(self, x: torch.Tensor, sigma: float, scale: float | None = None) -> torch.Tensor:
        """Return the answer to `towards_text`."""
        return self.answers(self.towards_text(x, sigma, scale))[0]

    def each(self, x: torch.Tensor, sigma: float, *others: torch.Tensor) -> list[torch.Tensor]:
        """Return D_c(x, sigma), with Perp-Neg where the run has it, and D(x, sigma) for other conditions (b, ...)."""
        return self.answers(self.towards_text(x, sigma, 1.0), *(Question(x, sigma, text) for text in others))

    def unconditional(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Return D_u(x, sigma)."""
        return self.answers(Question(x, sigma, self.uncond))[0]


class Moment(NamedTuple):
    """When a rule is asked: its level of noise, and what else may depend on the step."""

    sigma: float
    progress: float  # share of the run's steps that are taken, in [0, 1)
    chance: float  # uniform in [0, 1), a function of seed and step


Rule = Callable[[Ask, torch.Tensor, torch.Tensor, Moment], torch.Tensor]  # (denoiser, x, n, moment) -> g


def weight(sigma: float) -> float:
    """Return w = sigma^2 / (1 + sigma^2)."""
    return sigma**2 / (1 + sigma**2)


def perturbed(x: torch.Tensor, n: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return x_sigma = x + sigma n."""
    return torch.add(x, n, alpha=sigma)


def chained_gradient(
    D: torch.Tensor, x: torch.Tensor, x_perturbed: torch.Tensor, sigma: float, var_red: bool
) -> torch.Tensor:
    """Return the ascent direction dlog p / dx (B, C, H, W) of the rendering x, up to a factor 1 / sigma.

    `D` is the denoised x_perturbed = x + sigma n. Source: arXiv 2212.00774, Eq. 15 (perturb and
    average: D - x_perturbed) and Eq. 16 (the same in expectation without the noise: D - x).
    """
    return (D - (x if var_red else x_perturbed)) / sigma


def clipped(g: torch.Tensor, bounds: tuple[float, float], progress: float) -> torch.Tensor:
    """Return the direction g, each number cut to plus or minus a bound, which goes linearly from one to another.

    What is not finite stays, for the run to see it. Source: arXiv 2303.15413, where the score of the model is cut, by a
    bound that rises linearly.
    """
    bound = bounds[0] + (bounds[1] - bounds[0]) * progress
    return torch.where(g.isfinite(), g.clamp(-bound, bound), g)


# ---------------------------------------------------------------- one level of noise


def sjc(var_red: bool) -> Rule:
    """Return the rule of Score Jacobian Chaining, `chained_gradient`: (D_s - x) / sigma, or (D_s - x_sigma) / sigma."""

    def rule(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
        x_sigma = perturbed(x, n, at.sigma)
        return chained_gradient(ask.guided(x_sigma, at.sigma), x, x_sigma, at.sigma, var_red)

    return rule


def noiseless(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
    """D_s(x) - x: nothing is perturbed. Where the data are a finite set, it is one step of mean shift."""
    return ask.guided(x, at.sigma) - x


def sds(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
    """w (D_s - x) / sigma = w (n - e_s): Score Distillation Sampling.

    Source: DreamFusion, arXiv 2209.14988, with w(t) = sigma_t^2. Its guidance counts from D_c: its 100 is s = 101.
    """
    return weight(at.sigma) * (ask.guided(perturbed(x, n, at.sigma), at.sigma) - x) / at.sigma


def csd(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
    """w s (D_c - D_other) / sigma: Classifier Score Distillation.

    D_other is D_u. With --bad_words it goes linearly to D_bad until CSD_TURN of the run, and stays there. Source: arXiv
    2310.19415, whose released settings have several such ramps; this is one of them. Its weight is s.
    """
    bad = 0.0 if ask.bad is None else min(1.0, at.progress / CSD_TURN)
    others = [(share, text) for share, text in ((1 - bad, ask.uncond), (bad, ask.bad)) if text is not None and share]
    d_c, *d_others = ask.each(perturbed(x, n, at.sigma), at.sigma, *(text for _, text in others))
    d_other = sum(share * d for (share, _), d in zip(others, d_others))
    return weight(at.sigma) * ask.scale * (d_c - d_other) / at.sigma


def nfsd(entry: Callable[[float], float]) -> Rule:
    """Return the rule w / sigma [s (D_c - D_u) + delta]: Noise-Free Score Distillation.

    delta is D_u - x_sigma below entry NFSD_ENTRY of the noise table, and D_u - D_bad above. Source: arXiv 2310.17590,
    whose s is this one.
    entry: gives the entry of a level, of ENTRIES.
    """

    def rule(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
        assert ask.bad is not None  # the configuration refused it
        x_sigma = perturbed(x, n, at.sigma)
        if entry(at.sigma) < NFSD_ENTRY:
            d_c, d_u = ask.each(x_sigma, at.sigma, ask.uncond)
            delta = d_u - x_sigma
        else:
            d_c, d_u, d_bad = ask.each(x_sigma, at.sigma, ask.uncond, ask.bad)
            delta = d_u - d_bad
        return weight(at.sigma) / at.sigma * (ask.scale * (d_c - d_u) + delta)

    return rule


def bridge(from_progress: float) -> Rule:
    """Return the rule sds up to a share of the run, then w s (D_c - D_bad) / sigma.

    D_bad has the words of bad pictures behind the prompt. s is the guidance of both parts. Source: SDS-Bridge, arXiv
    2406.09417. Its released settings for 3D have no w in the second part.
    """

    def rule(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
        assert ask.bad is not None  # the configuration refused it
        if at.progress < from_progress:
            return sds(ask, x, n, at)
        d_c, d_bad = ask.each(perturbed(x, n, at.sigma), at.sigma, ask.bad)
        return weight(at.sigma) * ask.scale * (d_c - d_bad) / at.sigma

    return rule


def vsd_direction(D_s: torch.Tensor, x_sigma: torch.Tensor, xs: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return w (D_s - D_q) / sigma (b, C, H, W): Variational Score Distillation, its own score known exactly.

    D_q is the denoiser of q, the set of the renderings of K fields by the same cameras: it is known exactly, and no
    network has to learn it. With K = 1 it is the rendering itself, and this is `sds`. Source: ProlificDreamer, arXiv
    2305.16213. From where its guidance 7.5 counts was not looked up.

    D_s, x_sigma: (b, C, H, W) the guided denoised picture, and one field's perturbed rendering.
    xs: (K, b, C, H, W) renderings of all fields.
    """
    D_q = torch.stack([posterior_mean(x, sigma, y) for x, y in zip(x_sigma, xs.unbind(1))])
    return weight(sigma) * (D_s - D_q) / sigma


# ---------------------------------------------------------------- two levels of noise


def asd(shifted: Callable[[float, float], float]) -> Rule:
    """Return the rule w [(D_s(x_sigma) - x) / sigma - (D_c(x_sigma+) - x) / sigma+]: Asynchronous Score Distillation.

    Both have the same noise. sigma+ lies above sigma by at most ASD_SHARE of its entries in --sigma_range. Source:
    arXiv 2407.02040, whose 7.5 is s = 7.5. shifted(sigma, chance): gives sigma+.
    """

    def rule(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
        above = shifted(at.sigma, at.chance)
        d_s, d_c = ask.answers(
            ask.towards_text(perturbed(x, n, at.sigma), at.sigma), ask.towards_text(perturbed(x, n, above), above, 1.0)
        )
        return weight(at.sigma) * ((d_s - x) / at.sigma - (d_c - x) / above)

    return rule


def ism(below: Callable[[float], list[float]]) -> Rule:
    """Return the rule sigma [e_u(x_s, sigma_s) - e_s(x_t, sigma)]: Interval Score Matching.

    x_s is x, inverted without text to a level below sigma, and x_t is x_s after one more step of that inversion. No
    noise is drawn. Source: LucidDreamer, arXiv 2311.11284, whose 7.5 is s = 7.5. Its released code begins the inversion
    with a little noise, and lets the gap between both levels shrink during the run. below(sigma): gives the levels of
    the inversion, the last of which is sigma_s; it has one at least.
    """

    def rule(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
        levels = below(at.sigma)
        x_s = inverted(ask.unconditional, x, levels)
        e_u = (x_s - ask.unconditional(x_s, levels[-1])) / levels[-1]
        x_t = x_s + (at.sigma - levels[-1]) * e_u
        return at.sigma * (e_u - (x_t - ask.guided(x_t, at.sigma)) / at.sigma)

    return rule


def sdi(below: Callable[[float], list[float]]) -> Rule:
    """Return the rule D_s(x_hat) - x: Score Distillation via Inversion.

    x_hat is x, inverted with the guidance SDI_SCALE up to sigma. Source: arXiv 2405.15891. There the level falls during
    the run without chance, as with --sigma_schedule linear, and the inversion adds noise. Its 7.5, and -7.5 in the
    inversion, are these s where its code uses Perp-Neg, else they count from D_c. below(sigma): gives the levels of the
    inversion, without sigma.
    """

    def rule(ask: Ask, x: torch.Tensor, n: torch.Tensor, at: Moment) -> torch.Tensor:
        x_hat = inverted(lambda x, sigma: ask.guided(x, sigma, SDI_SCALE), x, [*below(at.sigma), at.sigma])
        return ask.guided(x_hat, at.sigma) - x

    return rule


def inverted(denoise: Denoise, x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    """Return x, moved from no noise up to the last of `levels`, which rise, by DDIM backwards.

    In sigma space that is Euler's method for dx / dsigma = (x - D(x, sigma)) / sigma, but for the first step. At no
    noise D(x) is x, and the slope 0 / 0: that step takes it at its end. Source: DDIM, arXiv 2010.02502, section 4.3.
    """
    slope_at = levels[0]
    sigma = 0.0
    for level in levels:
        x = x + (level - sigma) * (x - denoise(x, slope_at)) / slope_at
        sigma = slope_at = level
    return x


# ---------------------------------------------------------------- chosen


def make(cfg: SJCConfig, adapter: ScoreAdapter) -> Rule:
    """Return the rule of a run, of which `cfg.refuse_unfit` has had nothing to say."""
    table = adapter.sigmas.tolist()[::-1]
    per_entry = len(table) / ENTRIES

    def entry(sigma: float) -> float:
        return adapter.timestep(sigma) / per_entry

    def shifted(sigma: float, chance: float) -> float:
        t = adapter.timestep(sigma)
        return table[min(round(t + ASD_SHARE * chance * (t - cfg.sigma_range[0])), len(table) - 1)]

    def ladder(sigma: float, stride: float, gap: float) -> list[float]:
        """Return the levels every `stride` entries up to `gap` entries below sigma, the lowest first."""
        top = max(0, adapter.timestep(sigma) - round(gap * per_entry))
        step = max(1, round(stride * per_entry))
        return [table[t] for t in [*range(step, top, step), top]]

    rules: dict[str, Rule] = {
        "sjc": sjc(cfg.var_red),
        "noiseless": noiseless,
        "sds": sds,
        "csd": csd,
        "nfsd": nfsd(entry),
        "bridge": bridge(cfg.bridge_step),
        "asd": asd(shifted),
        "ism": ism(lambda sigma: ladder(sigma, ISM_STRIDE, ISM_GAP)),
        "sdi": sdi(lambda sigma: ladder(sigma, ENTRIES / SDI_STEPS, ENTRIES / SDI_STEPS)),
    }
    return rules[cfg.rule]
