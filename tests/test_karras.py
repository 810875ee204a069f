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
        var = std ** 2 + sigma ** 2
        gap = x[:, None] - means  # (n, 2, C, H, W)
        p = torch.softmax(-gap.flatten(2).square().sum(-1) / (2 * var), dim=1)  # (n, 2)
        clean = means + std ** 2 / var * gap
        return (p[..., None, None, None] * clean).sum(1)

    return D


def schedule(kind):
    if kind == "continuous":
        return karras.karras_sigmas(18, 0.002, 80.0)
    table = TABLES[kind]()
    return karras.karras_sigmas(18, table.min(), min(80.0, table.max()),
                                round_sigma=lambda s: karras.nearest_sigma(s, table))


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
    half = [next(iter(karras.karras_sampler(lambda x, sigma: x / 2, x, [4.0, 2.0], heun)))
            for heun in (False, True)]
    assert [s.item() for s in half] == [3.0, 2.75]


def test_churn_keeps_the_distribution():
    # One Gaussian of std 0.5: samples keep that std with churn, and the seed decides them
    sigmas = karras.karras_sigmas(40, 0.002, 10.0)

    def draw(seed, **churn):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(20000, generator=g, dtype=torch.float64) * sigmas[0]
        *_, x = karras.karras_sampler(lambda x, s: x * 0.25 / (0.25 + s * s), x, sigmas,
                                      randn=lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype),
                                      **churn)
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

    list(karras.karras_sampler(D, torch.ones(1), table[::100], S_churn=5, randn=torch.randn_like,
                               round_sigma=lambda s: karras.nearest_sigma(s, table)))
    assert set(seen) <= set(table) and set(seen) - set(table[::100])


def test_nearest_sigma():
    assert karras.nearest_sigma([2.9, 100.0], [4.0, 2.0, 1.0]).tolist() == [2.0, 4.0]
    assert karras.nearest_sigma(0.0, [4.0, 2.0, 1.0]) == 1.0


@pytest.mark.parametrize("args", [(1, 0.1, 1.0), (5, 0.0, 1.0), (5, 2.0, 1.0)])
def test_bad_schedule(args):
    with pytest.raises(ValueError, match="sigma_min"):
        karras.karras_sigmas(*args)
