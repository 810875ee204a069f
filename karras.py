"""Noise schedules and samplers: Karras et al. 2022 (EDM, arXiv 2206.00364), annealed Langevin dynamics.

This module knows no model family. A noise level is sigma. A table of noise levels is float64 and largest first. A
sampler's state is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]  # D(x, sigma)
Noise = Callable[[torch.Tensor], torch.Tensor]  # unit noise like its argument


def linear_betas(beta_start: float, beta_end: float, n: int) -> np.ndarray:
    """Return n betas (n,) at equal steps. Source: DDPM, arXiv 2006.11239, section 4."""
    return np.linspace(beta_start, beta_end, n, dtype=np.float64)


def scaled_linear_betas(beta_start: float, beta_end: float, n: int) -> np.ndarray:
    """Return n betas (n,) whose square roots are at equal steps. Source: latent diffusion, arXiv 2112.10752."""
    return np.linspace(beta_start**0.5, beta_end**0.5, n, dtype=np.float64) ** 2


def sigmas_from_betas(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the noise levels sqrt((1 - abar) / abar) (n,) of `betas` (n,), largest first."""
    abar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    return np.sqrt((1 - abar) / abar)[::-1].copy()


def iddpm_sigmas(n: int, C_1: float = 0.001, C_2: float = 0.008) -> np.ndarray:
    """Return the n noise levels of improved DDPM's cosine schedule, largest first.

    Source: EDM, table 1, column iDDPM: with abar_j = sin^2(pi/2 j / (n (C_2 + 1))) and u_n = 0,
    u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1) - 1); C_1 caps the largest step.
    """
    abar = np.sin(np.pi / 2 * np.arange(n + 1) / (n * (C_2 + 1))) ** 2  # (n + 1,)
    u = np.zeros(n + 1)
    for j in range(n, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], C_1) - 1)
    return u[:n]


def nearest_sigma(sigma: float | np.ndarray, table: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the entries of `table` (n,) nearest to `sigma` (any shape), as float64 numpy."""
    table = np.asarray(table, dtype=np.float64)
    distance = np.abs(np.asarray(sigma, dtype=np.float64)[..., None] - table)
    return table[distance.argmin(axis=-1)]


def karras_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7, round_sigma: Callable[[float], float] | None = None
) -> np.ndarray:
    """Return n >= 2 noise levels (n,) from sigma_max down to sigma_min, without the final 0.

    `round_sigma` maps a level to the nearest one that the denoiser knows; None stands for a denoiser that knows all
    levels. Raises ValueError unless n >= 2 and 0 < sigma_min < sigma_max. Source: EDM, equation 5.
    """
    if n < 2 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"need n >= 2 and 0 < sigma_min < sigma_max, got n={n}, sigma_min={sigma_min}, sigma_max={sigma_max}"
        )
    ramp = np.arange(n) / (n - 1)
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (a + ramp * (b - a)) ** rho
    return sigmas if round_sigma is None else np.array([float(round_sigma(s)) for s in sigmas])


def geometric_sigmas(
    n: int, sigma_min: float, sigma_max: float, round_sigma: Callable[[float], float] | None = None
) -> np.ndarray:
    """Return n >= 2 noise levels (n,) from sigma_max down to sigma_min, each the same share of the level before it.

    Arguments and errors are as in `karras_sigmas`, which tends to this for a large rho. Source: the geometric sequence
    of SMLD, arXiv 1907.05600.
    """
    karras_sigmas(n, sigma_min, sigma_max)  # raises where these are not legal
    sigmas = np.geomspace(sigma_max, sigma_min, n)
    return sigmas if round_sigma is None else np.array([float(round_sigma(s)) for s in sigmas])


def karras_sampler(
    D: Denoiser,
    x: torch.Tensor,
    sigmas: Sequence[float] | np.ndarray,
    heun: bool = True,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
    round_sigma: Callable[[float], float] | None = None,
    randn: Noise | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the state after each of n steps through `sigmas`, the last one to sigma 0.

    EDM Algorithm 1 (`heun`, or its Euler variant); with S_churn > 0 Algorithm 2.

    Args:
        D: denoiser, D(x, sigma) -> estimate of the clean x in any float type, for float64 x and
            a Python float sigma > 0, on the device of x.
        x: starting state at noise level sigmas[0], any shape: unit noise times sigmas[0]. Its device has float64.
        sigmas: (n,) decreasing noise levels, the final 0 left out.
        S_churn: strength of the churn. S_min, S_max: levels between which it acts. S_noise: scale of its noise.
        round_sigma: as in `karras_sigmas`, for the levels that churn raises.
        randn: randn(x) returns unit noise like x. Churn needs it.
    Yields:
        float64 tensors of x's shape, n in all.
    Raises:
        ValueError where a step needs noise and `randn` is None.
    """
    x = x.to(torch.float64)
    levels = [float(sigma) for sigma in sigmas]
    for sigma, sigma_next in zip(levels, [*levels[1:], 0.0]):
        if S_churn > 0 and S_min <= sigma <= S_max:
            gamma = min(S_churn / len(levels), 2**0.5 - 1)
            x, sigma = _raise_noise(x, sigma, (1 + gamma) * sigma, S_noise, round_sigma, randn)
        d = (x - D(x, sigma)) / sigma  # dx/dsigma
        x_next = x + (sigma_next - sigma) * d  # Euler
        if heun and sigma_next > 0:
            d_next = (x_next - D(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma) * (d + d_next) / 2
        x = x_next
        yield x


def _raise_noise(
    x: torch.Tensor,
    sigma: float,
    sigma_hat: float,
    S_noise: float,
    round_sigma: Callable[[float], float] | None,
    randn: Noise | None,
) -> tuple[torch.Tensor, float]:
    """Return x at the higher level sigma_hat, and that level (EDM Algorithm 2, lines 5 and 6)."""
    if randn is None:
        raise ValueError("S_churn > 0 needs randn, which returns unit noise like its argument")
    if round_sigma is not None:
        sigma_hat = max(sigma, float(round_sigma(sigma_hat)))
    return x + (sigma_hat**2 - sigma**2) ** 0.5 * S_noise * randn(x), sigma_hat


def smld_sampler(
    D: Denoiser,
    x: torch.Tensor,
    sigmas: Sequence[float] | np.ndarray,
    randn: Noise,
    n_inner: int = 5,
    step_size: float = 0.2,
) -> Iterator[torch.Tensor]:
    """Yield the state after each of n noise levels of annealed Langevin dynamics, the last one denoised.

    At each level, `n_inner` times: x += alpha / 2 score(x) + sqrt(alpha) z, alpha = step_size sigma^2,
    score = (D(x, sigma) - x) / sigma^2. Source: SMLD, arXiv 1907.05600, its algorithm of annealed
    Langevin dynamics, whose epsilon is step_size sigma_n^2: 0.2 there, with 100 inner steps, as
    remembered, not looked up. The last state is D at the lowest level, which takes the noise off
    that the algorithm leaves (arXiv 2009.05475).

    Args, Yields: as in `karras_sampler`.
    """
    x = x.to(torch.float64)
    levels = [float(sigma) for sigma in sigmas]
    for i, sigma in enumerate(levels):
        for _ in range(n_inner):
            x = x + step_size / 2 * (D(x, sigma) - x) + step_size**0.5 * sigma * randn(x)
        yield x if i + 1 < len(levels) else D(x, sigma).to(x)
