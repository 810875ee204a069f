"""Schedules and samplers against reference arrays, hand-computed numbers and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch

import karras

REFERENCE = Path(__file__).resolve().parent / "reference"
TABLES = {
    "sd": lambda: karras.sigmas_from_betas(karras.scaled_linear_betas(0.00085, 0.012, 1000)),
    "ddpm_linear": lambda: karras.sigmas_from_betas(karras.linear_betas(1e-4, 0.02, 1000)),
    "ddpm_cosine": lambda: karras.iddpm_sigmas(1000),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    want = np.load(REFERENCE / "sigmas.npz")[name]
    np.testing.assert_allclose(TABLES[name](), want, rtol=1e-12, atol=0)


def test_table_by_hand():
    # betas 1/2, 1/4: abar 1/2, 3/8, so sigma^2 = 1 and (5/8)/(3/8) = 5/3, largest first
    np.testing.assert_allclose(karras.sigmas_from_betas([0.5, 0.25]), [(5 / 3) ** 0.5, 1.0])


@pytest.fixture(scope="module")
def ref():
    return dict(np.load(REFERENCE / "sampler_a.npz"))


def mixture_denoiser(means, std):
    """E[clean | x] for an equal mixture of isotropic Gaussians: shrink to each mean, then blend."""
    means = torch.as_tensor(means)

    def D(x, sigma):
        var = std**2 + sigma**2
        gap = x[:, None] - means  # (n, 2, C, H, W)
        p = torch.softmax(-gap.flatten(2).square().sum(-1) / (2 * var), dim=1)  # (n, 2)
        clean = means + std**2 / var * gap
        return (p[..., None, None, None] * clean).sum(1)

    return D


def schedule(kind):
    if kind == "continuous":
        return karras.karras_sigmas(18, 0.002, 80.0)
    table = TABLES[kind]()
    return karras.karras_sigmas(
        18, table.min(), min(80.0, table.max()), round_sigma=lambda s: karras.nearest_sigma(s, table)
    )


@pytest.mark.parametrize("kind", ["continuous", "ddpm_linear"])
@pytest.mark.parametrize("heun", [True, False], ids=["heun", "euler"])
def test_sampler(ref, kind, heun):
    sigmas = schedule(kind)
    np.testing.assert_allclose(sigmas, ref[f"{kind}_ts"], rtol=1e-9)
    D = mixture_denoiser(ref["mixture_means"], float(ref["component_std"]))
    x = torch.as_tensor(ref["unit_noise"]) * sigmas[0]
    states = list(karras.karras_sampler(D, x, sigmas, heun=heun))
    assert len(states) == 18
    name = f"{kind}_{'heun' if heun else 'euler'}"
    for state, want in [(states[8], ref[f"{name}_step9"]), (states[-1], ref[f"{name}_final"])]:
        assert np.abs(state.numpy() - want).max() < 1e-9 * np.abs(want).max()
    if name == "continuous_heun":
        want = ref["edm_reference_heun18_final"]
        assert np.abs(states[-1].numpy() - want).max() < 1e-9


def test_steps_by_hand():
    # D = 0 makes x/sigma constant: Euler and Heun are exact, and the last state is 0
    x = torch.tensor([4.0])
    for heun in (True, False):
        states = list(karras.karras_sampler(lambda x, sigma: 0 * x, x, [4.0, 2.0, 1.0], heun))
        assert [s.item() for s in states] == [2.0, 1.0, 0.0]
        assert states[0].dtype == torch.float64
    # D = x / 2 gives dx/dsigma = x / (2 sigma): from 4 at sigma 4 to sigma 2, Euler 3, and
    # Heun 4 - 2 (1/2 + 3/4) / 2 = 2.75
    half = [next(iter(karras.karras_sampler(lambda x, sigma: x / 2, x, [4.0, 2.0], heun))) for heun in (False, True)]
    assert [s.item() for s in half] == [3.0, 2.75]


def test_churn_keeps_the_distribution():
    # One Gaussian of std 0.5: samples keep that std with churn, and the seed decides them
    sigmas = karras.karras_sigmas(40, 0.002, 10.0)

    def draw(seed, **churn):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(20000, generator=g, dtype=torch.float64) * sigmas[0]
        *_, x = karras.karras_sampler(
            lambda x, s: x * 0.25 / (0.25 + s * s),
            x,
            sigmas,
            randn=lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype),
            **churn,
        )
        return x

    churned = draw(0, S_churn=20)
    assert churned.std().item() == pytest.approx(0.5, abs=0.015)
    assert torch.equal(churned, draw(0, S_churn=20))
    assert not torch.allclose(churned, draw(0))
    assert torch.equal(draw(0), draw(0, S_churn=20, S_min=20))  # outside the range: no churn


def test_churn_visits_only_known_levels():
    table = TABLES["sd"]()
    seen = []

    def D(x, sigma):
        seen.append(sigma)
        return 0 * x

    list(
        karras.karras_sampler(
            D,
            torch.ones(1),
            table[::100],
            S_churn=5,
            randn=torch.randn_like,
            round_sigma=lambda s: karras.nearest_sigma(s, table),
        )
    )
    assert set(seen) <= set(table) and set(seen) - set(table[::100])


def test_nearest_sigma():
    assert karras.nearest_sigma([2.9, 100.0], [4.0, 2.0, 1.0]).tolist() == [2.0, 4.0]
    assert karras.nearest_sigma(0.0, [4.0, 2.0, 1.0]) == 1.0


@pytest.mark.parametrize("args", [(1, 0.1, 1.0), (5, 0.0, 1.0), (5, 2.0, 1.0)])
def test_bad_schedule(args):
    with pytest.raises(ValueError, match="sigma_min"):
        karras.karras_sigmas(*args)


def test_geometric_sigmas():
    np.testing.assert_allclose(karras.geometric_sigmas(4, 0.01, 10.0), [10, 1, 0.1, 0.01])
    np.testing.assert_allclose(
        karras.geometric_sigmas(5, 0.01, 10.0), karras.karras_sigmas(5, 0.01, 10.0, rho=1e6), rtol=1e-4
    )
    assert karras.geometric_sigmas(2, 0.1, 9.0, lambda s: round(s) + 0.5).tolist() == [9.5, 0.5]
    with pytest.raises(ValueError, match="sigma_min"):
        karras.geometric_sigmas(5, 2.0, 1.0)


# ---------------------------------------------------------------- exact oracles: what samples are distributed like


N = 20000
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.5, 0.1], [0.0, 0.1, 0.2]], dtype=torch.float64)


def gaussian_denoiser(x, sigma):
    """E[x0 | x] = mu + C (C + sigma^2)^-1 (x - mu) for x0 of N(mu, C), x (n, 3)."""
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * torch.eye(3, dtype=torch.float64))
    return MEAN + (x - MEAN) @ gain.T


def noise(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64)


def last(states):
    *_, x = states
    return x


def assert_gaussian(x, covariance=COVARIANCE, bias=0.0):
    """Mean and covariance of x (N, 3) within 5 standard errors of N(MEAN, covariance), plus a stated bias.

    Standard errors: sqrt(C_ii / N) of a mean, sqrt((C_ii C_jj + C_ij^2) / N) of a covariance.
    """
    variance = covariance.diagonal()
    assert ((x.mean(0) - MEAN).abs() < 5 * (variance / N).sqrt() + bias).all()
    error = ((variance[:, None] * variance + covariance**2) / N).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * error + bias).all()


@pytest.mark.parametrize("heun, n, churn", [(True, 40, 0), (False, 400, 0), (True, 80, 40)])
def test_samples_of_a_gaussian(heun, n, churn):
    """Its own mean and covariance; the sampler's error is below 0.004 here, the largest standard error 0.01."""
    sigmas, randn = karras.karras_sigmas(n, 0.002, 80.0), noise()
    x = sigmas[0] * randn(torch.empty(N, 3))
    assert_gaussian(last(karras.karras_sampler(gaussian_denoiser, x, sigmas, heun, churn, randn=randn)), bias=0.01)


def test_samples_of_a_mixture():
    """Two Gaussians of std 0.3 at -1 and 2, shares 0.3 and 0.7, by Heun: shares, and mean and std of each."""
    means, shares = torch.tensor([[-1.0], [2.0]], dtype=torch.float64), torch.tensor([0.3, 0.7], dtype=torch.float64)

    def D(x, sigma):
        var = 0.3**2 + sigma**2
        p = torch.softmax(shares.log() - (x - means.T).square() / (2 * var), dim=1)  # (N, 2)
        return (p * (means.T + 0.3**2 / var * (x - means.T))).sum(1, keepdim=True)

    sigmas = karras.karras_sigmas(40, 0.002, 80.0)
    x = last(karras.karras_sampler(D, sigmas[0] * noise()(torch.empty(N, 1)), sigmas))[:, 0]
    for mean, share, mine in ((-1, 0.3, x < 0.5), (2, 0.7, x >= 0.5)):
        n = share * N
        assert mine.double().mean().item() == pytest.approx(share, abs=5 * (0.21 / N) ** 0.5 + 0.005)
        assert x[mine].mean().item() == pytest.approx(mean, abs=5 * 0.3 / n**0.5 + 0.005)
        assert x[mine].std().item() == pytest.approx(0.3, abs=5 * 0.3 / (2 * n) ** 0.5 + 0.005)


def errors(heun, steps):
    """The largest error at the lowest sigma of the sampler against the exact flow, for each number of steps.

    For x0 of N(0, s^2) the flow keeps x / sqrt(s^2 + sigma^2) constant.
    """
    s, found = 0.5, []
    for n in steps:
        sigmas = karras.karras_sigmas(n, 0.02, 10.0)
        x = torch.tensor([1.0, -3.0], dtype=torch.float64) * sigmas[0]
        states = list(karras.karras_sampler(lambda x, sigma: x * s**2 / (s**2 + sigma**2), x, sigmas, heun))
        exact = x * ((s**2 + sigmas[-1] ** 2) / (s**2 + sigmas[0] ** 2)) ** 0.5
        found.append((states[-2] - exact).abs().max().item())  # the last step goes on to 0
    return found


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)], ids=["euler", "heun"])
def test_order_of_convergence(heun, order):
    """The error falls as n^-1 with Euler, as n^-2 with Heun: slopes between n = 64, 128, 256, 512."""
    steps = [64, 128, 256, 512]
    slopes = -np.diff(np.log(errors(heun, steps))) / np.diff(np.log(steps))
    np.testing.assert_allclose(slopes, order, atol=0.1)


# ---------------------------------------------------------------- annealed Langevin dynamics


def test_langevin_by_hand():
    # D = 0, so a step is x (1 - step_size / 2) + sqrt(step_size) sigma z; z = 1 throughout, step_size 1/4
    x = torch.tensor([8.0])
    states = karras.smld_sampler(lambda x, sigma: 0 * x, x, [4.0, 2.0], torch.ones_like, 2, 0.25)
    # 8 -> 7 + 2 = 9 -> 7.875 + 2 = 9.875, yielded; the last state is D
    assert [s.item() for s in states] == [9.875, 0.0]


def test_langevin_keeps_the_level_of_noise():
    """At one sigma, steps of size a on N(0, v), v = s^2 + sigma^2, settle at variance v / (1 - a sigma^2 / 4 v)."""
    s, sigma, a, randn = 1.0, 2.0, 0.5, noise()
    v, seen = s**2 + sigma**2, []

    def D(x, sigma):
        seen.append(x)
        return x * s**2 / v

    list(karras.smld_sampler(D, sigma * randn(torch.empty(N)), [sigma], randn, 100, a))
    want = v / (1 - a * sigma**2 / (4 * v))
    assert want > 1.1 * v  # so that the step's bias is seen
    assert seen[-1].var().item() == pytest.approx(want, abs=5 * want * (2 / N) ** 0.5)


def langevin_covariance(sigmas, n_inner, step_size):
    """The exact covariance (3, 3) of its samples for `gaussian_denoiser`: each step is linear, so iterate it.

    Along an eigenvector of C of eigenvalue c: v -> (1 - a sigma^2 / 2 (c + sigma^2))^2 v + a sigma^2,
    at the end v (c / (c + sigma^2))^2.
    """
    c, axes = torch.linalg.eigh(COVARIANCE)
    v = torch.full_like(c, sigmas[0] ** 2)
    for sigma in sigmas:
        for _ in range(n_inner):
            v = (1 - step_size * sigma**2 / (2 * (c + sigma**2))) ** 2 * v + step_size * sigma**2
    return axes @ torch.diag(v * (c / (c + sigmas[-1] ** 2)) ** 2) @ axes.T


def test_langevin_samples_of_a_gaussian():
    """The mean, and the covariance that so many steps give, within sampling error; more of them give C itself."""
    sigmas, randn = karras.geometric_sigmas(20, 0.01, 10.0), noise()
    x = MEAN + sigmas[0] * randn(torch.empty(N, 3))
    assert_gaussian(
        last(karras.smld_sampler(gaussian_denoiser, x, sigmas, randn, 10, 0.1)), langevin_covariance(sigmas, 10, 0.1)
    )
    torch.testing.assert_close(langevin_covariance(sigmas, 2000, 0.05), COVARIANCE, rtol=0.02, atol=0.01)
