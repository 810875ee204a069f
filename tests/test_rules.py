"""The rules of score distillation on Gaussian data, where the denoiser is linear and all is known in closed form."""

import math

import numpy as np
import pytest
import torch

import rules
from adapt import ScoreAdapter
from karras import scaled_linear_betas, sigmas_from_betas
from my.errors import UserError
from options.rule import RULES, rules_where
from rules import Ask, Moment
from sjc import SJC
from tiny import Affine, config

V = 0.3  # variance of the data
MU_C, MU_U, MU_BAD = 0.7, -0.2, 0.4  # means with the text, without, and with bad words
SCALE = 5.0
SIGMA = 1.7
W = SIGMA**2 / (1 + SIGMA**2)
SHAPE = (2, 3, 4, 4)


class Gaussian(ScoreAdapter):
    """The denoiser of N(mu, V): D = (V x + sigma^2 mu) / (V + sigma^2). A prompt is its mu. It counts rows."""

    def __init__(self):
        self.device, self.data_shape, self.rows = torch.device("cpu"), SHAPE[1:], 0
        self.sigmas = torch.as_tensor(sigmas_from_betas(scaled_linear_betas(0.00085, 0.012, 1000)))

    def _denoise(self, x, sigma, cond):
        self.rows += len(x)
        return (V * x + sigma**2 * cond) / (V + sigma**2)

    def embed(self, prompts):
        return torch.tensor([float(p) for p in prompts], dtype=torch.float64)[:, None, None, None]

    encode = decode = None
    picture_size = 4


def drawn(seed):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=SHAPE))


X, N = drawn(0), drawn(1)


def k(sigma):
    """How far D goes from x to mu."""
    return sigma**2 / (V + sigma**2)


def moved(mu, sigma=SIGMA, n=N):
    """D(x + sigma n) - x of the data N(mu, V)."""
    return k(sigma) * (mu - X) + (1 - k(sigma)) * sigma * n


MU_S = MU_U + SCALE * (MU_C - MU_U)
TOWARD = k(SIGMA) * (MU_C - MU_U)  # D_c - D_u
ABOVE, BELOW = 2.0, 0.9


def by_hand_ism():
    """With levels 0.2 and BELOW: k is 2/17 at 0.2, and a step of length l scales x - mu by 1 + l k / sigma."""
    x_s = MU_U + (X - MU_U) * (1 + 2 / 17) * (1 + 0.7 * 10 / 17)  # the first is 0.2 long
    e_u = 27 / 37 * (x_s - MU_U) / BELOW
    return SIGMA * e_u - k(SIGMA) * (x_s + 0.8 * e_u - MU_S)


def by_hand_sdi():
    """With levels BELOW and SIGMA: k is 27/37 at BELOW. The inversion goes away from mu = -0.2 - 7.5 * 0.9."""
    x_hat = -6.95 + (X + 6.95) * (1 + 27 / 37) * (1 + 0.8 * 30 / 37)
    return x_hat + k(SIGMA) * (MU_S - x_hat) - X


LOW, HIGH = (lambda sigma: 100.0), (lambda sigma: 300.0)  # entries of the noise table
CASES = {
    "Eq. 16": (rules.sjc(True), lambda: moved(MU_S) / SIGMA, 2),
    "Eq. 15": (rules.sjc(False), lambda: moved(MU_S) / SIGMA - N, 2),
    "noiseless": (rules.noiseless, lambda: k(SIGMA) * (MU_S - X), 2),
    "sds": (rules.sds, lambda: W * moved(MU_S) / SIGMA, 2),
    "csd": (rules.csd, lambda: W * SCALE * k(SIGMA) * (MU_C - 0.6 * MU_U - 0.4 * MU_BAD) / SIGMA + 0 * X, 3),
    "nfsd, little noise": (rules.nfsd(LOW), lambda: W / SIGMA * (SCALE * TOWARD + moved(MU_U) - SIGMA * N), 2),
    "nfsd": (rules.nfsd(HIGH), lambda: W / SIGMA * (SCALE * TOWARD + k(SIGMA) * (MU_U - MU_BAD)) + 0 * X, 3),
    "bridge, first": (rules.bridge(0.5), lambda: W * moved(MU_S) / SIGMA, 2),
    "asd": (rules.asd(lambda sigma, chance: ABOVE), lambda: W * (moved(MU_S) / SIGMA - moved(MU_C, ABOVE) / ABOVE), 3),
    "ism": (rules.ism(lambda sigma: [0.2, BELOW]), by_hand_ism, 2 + 1 + 2),
    "sdi": (rules.sdi(lambda sigma: [BELOW]), by_hand_sdi, 2 * 2 + 2),
}


def asked(scale=SCALE, c=MU_C, u=MU_U, bad=MU_BAD):
    adapter = Gaussian()
    cond, uncond, bad = (adapter.embed([str(mu)]) for mu in (c, u, bad))
    return Ask(adapter, cond.expand(2, -1, -1, -1), uncond, scale, None, bad)


@pytest.mark.parametrize("name", CASES)
def test_rule_by_hand_and_its_calls(name):
    rule, want, n_calls = CASES[name]
    ask = asked()
    torch.testing.assert_close(rule(ask, X, N, Moment(SIGMA, 0.2, 0.5)), want(), rtol=1e-9, atol=1e-9)
    assert ask.n_calls == n_calls and ask.adapter.rows == n_calls * len(X)


def test_rules_that_change_on_their_way():
    late = Moment(SIGMA, 0.6, 0.5)

    def away_from(mu):
        return W * SCALE * k(SIGMA) * (MU_C - mu) / SIGMA + 0 * X

    for rule in (rules.bridge(0.5), rules.csd):
        ask = asked()
        torch.testing.assert_close(rule(ask, X, N, late), away_from(MU_BAD))
        assert ask.n_calls == 2
    for progress, mu, n_calls in ((0.0, MU_U, 2), (0.1, 0.8 * MU_U + 0.2 * MU_BAD, 3), (0.5, MU_BAD, 2)):
        ask = asked()
        torch.testing.assert_close(rules.csd(ask, X, N, Moment(SIGMA, progress, 0.5)), away_from(mu))
        assert ask.n_calls == n_calls
    ask = asked()
    ask.bad = None
    torch.testing.assert_close(rules.csd(ask, X, N, late), away_from(MU_U))


def test_rules_that_reduce_to_one_another():
    at = Moment(SIGMA, 0.2, 0.0)

    def g(rule, **texts):
        return rule(asked(**texts), X, N, at)

    torch.testing.assert_close(g(rules.sds), W * g(rules.sjc(True)))
    torch.testing.assert_close(g(rules.sjc(False)), g(rules.sjc(True)) - N)
    assert g(rules.csd, u=MU_C, bad=MU_C).abs().max() < 1e-12  # D_c = D_u
    noise_gone = (rules.sjc(True)(asked(), X, N, at) + rules.sjc(True)(asked(), X, -N, at)) / 2
    torch.testing.assert_close(SIGMA * noise_gone, g(rules.noiseless))  # in expectation, D being linear
    no_gap = rules.ism(lambda sigma: [0.2, sigma])  # s = t: classifier guidance at the inverted x
    x_s = rules.inverted(lambda x, sigma: asked().unconditional(x, sigma), X, [0.2, SIGMA])
    d_c, d_u = asked().each(x_s, SIGMA, asked().uncond)
    torch.testing.assert_close(g(no_gap), SCALE * (d_c - d_u))
    torch.testing.assert_close(g(rules.asd(lambda sigma, chance: sigma), scale=1), 0 * X)  # one level, no guidance
    same_level = g(rules.asd(lambda sigma, chance: sigma))
    torch.testing.assert_close(same_level, W * (SCALE - 1) * TOWARD / SIGMA + 0 * X)


def test_inversion_follows_the_flow():
    """Many small steps of it scale the distance to the mean as the standard deviation of the noisy data grows."""
    levels = np.geomspace(1e-3, SIGMA, 4000).tolist()
    x = rules.inverted(lambda x, sigma: asked().unconditional(x, sigma), X, levels)
    torch.testing.assert_close(x, MU_U + (X - MU_U) * math.sqrt((V + SIGMA**2) / V), rtol=2e-3, atol=2e-3)


def test_vsd_of_one_field_is_sds():
    d_s = asked().guided(X + SIGMA * N, SIGMA)
    want = rules.sds(asked(), X, N, Moment(SIGMA, 0.2, 0.5))
    torch.testing.assert_close(rules.vsd_direction(d_s, X + SIGMA * N, X[None], SIGMA), want)


def test_vsd_of_two_fields_by_hand():
    """Of the renderings -a and a, D_q is a tanh(<a, x_sigma> / sigma^2), for each view of its own."""
    a, x_sigma, d_s = drawn(2), X + SIGMA * N, drawn(3)
    inner = (a * x_sigma).sum((1, 2, 3), keepdim=True)
    want = W * (d_s - a * torch.tanh(inner / SIGMA**2)) / SIGMA
    torch.testing.assert_close(rules.vsd_direction(d_s, x_sigma, torch.stack([-a, a]), SIGMA), want)
    assert inner[0].sign() != inner[1].sign()  # the views differ


def test_vsd_ends_where_the_fields_are_the_data():
    """Then no direction is left; sds would move them on."""
    y = drawn(4)[:1].repeat(5, 1, 1, 1) + 0.3 * torch.from_numpy(np.random.default_rng(5).normal(size=(5, 3, 4, 4)))
    x_sigma = y[:1] + SIGMA * N[:1]
    weights = [math.exp(-((x_sigma[0] - each) ** 2).sum().item() / (2 * SIGMA**2)) for each in y]
    d_s = sum(weight * each for weight, each in zip(weights, y))[None] / sum(weights)
    assert rules.vsd_direction(d_s, x_sigma, y[:, None], SIGMA).abs().max() < 1e-12
    assert rules.vsd_direction(d_s, x_sigma, y[:1, None], SIGMA).abs().max() > 0.1


# ---------------------------------------------------------------- in a run


def made(name, adapter=None, **options):
    return rules.make(config(rule=name, **options), adapter or Gaussian())


def test_levels_come_from_the_table():
    """Those of a run: a second level above the first, and an inversion that ends below it."""
    adapter, seen = Gaussian(), []
    adapter._denoise = lambda x, sigma, cond: seen.append(adapter.timestep_on_device(sigma).tolist()) or x / 2
    ask = Ask(adapter, *(adapter.embed(["1"]) for _ in range(2)), 2.0)
    table = adapter.sigmas.tolist()[::-1]

    def levels(name, t, chance=0.5, **options):
        seen.clear()
        made(name, adapter, **options)(ask, X[:1], N[:1], Moment(table[t], 0.0, chance))
        return list(seen)

    assert levels("asd", 600, 1.0) == [[600, 600, 659]]  # one call of the network
    assert levels("asd", 990, 0.9) == [[990, 990, 999]]
    assert levels("asd", 600, 0.5, sigma_range=(500, 990)) == [[600, 600, 605]]
    assert levels("ism", 600) == [[200], [200], [400], [550], [600]]
    assert levels("ism", 20) == [[0], [0], [20]]
    assert levels("sdi", 600) == [[100], [100], [200], [300], [400], [500], [600]]
    ask.bad = ask.uncond
    assert levels("nfsd", 150, bad_words="0") == [[150]] and levels("nfsd", 250, bad_words="0") == [[250]]


@pytest.mark.parametrize("name", rules_where(lambda rule: rule.bad_words == "needed"))
def test_rules_that_need_words(name):
    with pytest.raises(UserError, match=f"--rule {name}: needs words of bad pictures, and a model that knows them"):
        config(rule=name).check_files()


def test_a_guidance_that_leaves_no_direction():
    for rule in ({"rule": "csd"}, {"rule": "bridge", "bad_words": "blurry"}):
        words = f"--sd.scale 0: the directions of --rule {rule['rule']} are s times a difference"
        with pytest.raises(UserError, match=words):
            config(**rule, sd={"scale": 0}).check_files()
    config(rule="bridge", bad_words="blurry", bridge_step=1, sd={"scale": 0}).refuse_unfit()  # it is sds to the end
    assert config(rule="sds", sd={"scale": 0}).texts.scale == 0


@pytest.mark.parametrize("family", ["gddpm", "ddpm"])
def test_rules_that_need_a_text(family):
    """They are refused before anything is said of a checkpoint, which would be in vain."""
    for name in rules_where(lambda rule: rule.text):
        with pytest.raises(UserError, match=f"--rule {name}: needs a model that reads text, .*: sjc, noiseless, sds$"):
            config(rule=name, family=family).check_files()
    for name in ("sds", "sjc", "noiseless"):
        config(rule=name, family=family).refuse_unfit()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--rule", "sds", "--var_red", "False"], "--var_red: not read with --rule sds"),
        (["--bad_words", "foggy"], "--bad_words: not read with --rule sjc"),
        (["--rule", "csd", "--bridge_step", "0.3"], "--bridge_step: not read with --rule csd"),
    ],
)
def test_options_of_other_rules_are_refused(options, words):
    from my.config import load
    from options.sjc import SJCConfig

    cfg = load(SJCConfig, [*options, "--family", "ideal", "--sd.prompt", "a blue duck"], prog="x", doc="")
    with pytest.raises(UserError, match=words):
        cfg.check_files()


@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_reads(name):
    """The facts that refuse options and models are those of the rule, early and late in a run."""
    facts, rule = RULES[name], made(name, Gaussian())

    def by(n=N, **mus):
        """Return the direction early and late."""
        ask = asked(**mus)
        ask.adapter.free_guidance = facts.text
        return torch.stack([rule(ask, X, n, Moment(SIGMA, progress, 0.5)) for progress in (0.2, 0.9)])

    assert torch.equal(by(n=2 * N), by()) != facts.noise
    assert torch.equal(by(bad=9.0), by()) != bool(facts.bad_words)
    assert torch.equal(by(u=9.0), by()) != facts.text


@pytest.mark.parametrize("name", RULES)
def test_perp_neg_is_a_part_of_every_rule(name):
    """It changes D_c, early and late in a run; by hand where a rule is s w / sigma times that."""
    mus = [torch.full(SHAPE, mu, dtype=torch.float64) for mu in (MU_C, MU_U, MU_BAD)]
    away = drawn(2)
    perpendicular = away - MU_U - (away - MU_U).mean((1, 2, 3), keepdim=True)  # to a constant picture
    rule = made(name, Gaussian())

    def by(progress, negatives):
        ask = Ask(Gaussian(), mus[0], mus[1], SCALE, negatives, mus[2])
        g = rule(ask, X, N, Moment(SIGMA, progress, 0.5))
        assert ask.adapter.rows == ask.n_calls * len(X)
        return g

    for progress in (0.2, 0.9):
        change = by(progress, (away[:, None], torch.full((2, 1), 0.5))) - by(progress, None)
        assert change.abs().amax() > 0.01
        if name in ("sds", "csd", "nfsd", "bridge"):
            torch.testing.assert_close(change, -W * SCALE / SIGMA * k(SIGMA) * 0.5 * perpendicular)


@pytest.mark.parametrize("name", RULES)
def test_a_run_by_each_rule(name):
    words = {"bad_words": "foggy"} if RULES[name].bad_words else {}
    fields = []
    for _ in range(2):
        optimisation = SJC(config(rule=name, batch_views=2, **words), Affine())
        for i in range(6):
            stats = optimisation.step(i)
            assert not stats["masked"] and stats["calls"] == optimisation.n_calls >= 2
        fields.append(optimisation.field.color.detach())
    assert torch.equal(*fields)
    assert not torch.equal(fields[0], SJC(config(), Affine()).field.color)


def test_bad_words_stand_behind_the_prompt_of_bridge_alone(monkeypatch):
    told = []
    embed = Affine.embed
    monkeypatch.setattr(Affine, "embed", lambda self, prompts: told.append(prompts) or embed(self, prompts))
    SJC(config(rule="bridge", bad_words="foggy"), Affine())
    assert told[-1][0].endswith("a blue duck, foggy") and len(set(told[-1])) == len(told[-1]) > 1
    SJC(config(rule="nfsd", bad_words="foggy"), Affine())
    assert set(told[-1]) == {"foggy"}


def test_scores_are_clipped_by_bounds_that_move_and_what_is_not_finite_stays():
    g = torch.tensor([-3.0, -1.0, 0.5, 2.0, torch.inf, -torch.inf])
    assert rules.clipped(g, (1.0, 3.0), 0.25).tolist() == [-1.5, -1.0, 0.5, 1.5, torch.inf, -torch.inf]
    assert rules.clipped(torch.tensor([torch.nan]), (1.0, 1.0), 0.5).isnan().all()


@pytest.mark.parametrize("bounds", [(1.0, math.nan), (0.0, 1.0), (1.0, math.inf)])
def test_bounds_that_are_no_positive_numbers_are_refused(bounds):
    with pytest.raises(ValueError, match="score_clip"):
        config(score_clip=bounds)
