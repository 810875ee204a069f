"""The exact score of the whole toy world, and of bad pictures: against sums over every picture."""

import math

import pytest
import torch
import torch.nn.functional as F

import rules
import run_sjc
from adapt import PLAIN_BACKGROUNDS, make_adapter
from families.ideal.adapter import ANY_PAIR, ANY_VIEW
from families.ideal.pairs import AllPairs
from families.ideal.pictures import Photographer, rendered
from my.errors import UserError
from pose import camera_at
from sjc import SJC
from tiny import at_several_levels, config, of_pictures
from toyworld import COLORS, DEGRADATIONS, OBJECTS, compose, degraded

SIZE = 16
CAMERAS = [camera_at(0.7, 1.2), camera_at(0.703, 1.2), camera_at(3.0, 0.6)]  # the first two see nearly the same
WORDS = [[""], ["blurry"], ["faded"], ["foggy"], ["blurry", "foggy"], [*DEGRADATIONS]]
LEVELS = [0.0293, 0.1, 0.5, 2.0, 14.6]  # from the least of the table to the largest


@pytest.fixture(scope="module")
def maps():
    """Maps (6, 5, 64, 64) of two objects by CAMERAS."""
    return rendered(["duck", "castle"], CAMERAS)


def all_pairs(maps, likely=None):
    return AllPairs(maps, torch.ones(len(maps)) if likely is None else likely, SIZE, torch.device("cpu"))


def small(y):
    """Pictures (n, 3, 64, 64) in [0, 1] as the adapter has them: SIZE pixels wide, in [-1, 1], float64."""
    return 2 * F.interpolate(y.double(), (SIZE, SIZE), mode="area") - 1


def looks(maps, color, behind, word):
    return small(degraded(maps, color, behind, word) if word else compose(maps, color, behind))


@pytest.fixture(scope="module")
def every(maps):
    """{word: all 288 pictures (48 n, 3, SIZE, SIZE)}, one by one."""
    return {
        word: torch.cat([looks(maps, color, behind, word) for color in COLORS for behind in PLAIN_BACKGROUNDS])
        for word in ("", *DEGRADATIONS)
    }


def brute_force(x, sigma, y):
    """The mean of pictures y as in its definition, in float64, and the largest of their weights."""
    w = (-(y - x).square().sum((1, 2, 3)) / (2 * sigma**2)).softmax(0)
    return (w[:, None, None, None] * y).sum(0), w.max().item()


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
@pytest.mark.parametrize("sigma", LEVELS)
def test_mean_of_all_pairs_is_exact_to_rounding(maps, every, sigma, words):
    pairs, y = all_pairs(maps), torch.cat([every[word] for word in words])
    noise = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    between = (every[words[-1]][0] + every[words[-1]][1]) / 2  # of two pictures that are nearly the same
    for x in (y[7] + sigma * noise, between + 0.1 * sigma * noise):
        want, largest = brute_force(x, sigma, y)
        torch.testing.assert_close(pairs.posterior_mean(x, sigma, words), want, rtol=0, atol=2e-6)
    assert largest < 0.9  # the second x has no single answer at any level
    got = pairs.posterior_mean(x.float(), sigma, words)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_no_digits_cancel_between_two_pictures():
    """In float64 throughout, at little noise, between two pictures that differ: their weights are 1 to e, by hand."""
    maps = rendered(["duck"], [camera_at(0.7, 1.2), camera_at(0.8, 1.2)])
    z, red = maps.double() / 255, torch.tensor(COLORS["red"], dtype=torch.float64)[:, None, None]
    on_white = F.interpolate(z[:, :1] * red + z[:, 1:4] + 1 - z[:, 4:], (SIZE, SIZE), mode="area")
    first, second = 2 * on_white - 1
    apart, sigma = second - first, LEVELS[0]
    x = (first + second) / 2 + sigma**2 / apart.square().sum() * apart
    got = all_pairs(maps).posterior_mean(x, sigma)
    torch.testing.assert_close(got, first + math.e / (1 + math.e) * apart, rtol=0, atol=1e-9)


@pytest.mark.parametrize("word", ["", *DEGRADATIONS])
def test_at_the_least_noise_each_picture_is_its_own_mean(maps, every, word):
    """So the linear looks are those of `compose` and `degraded`."""
    pairs = all_pairs(maps)
    for x in every[word][2::37]:
        torch.testing.assert_close(pairs.posterior_mean(x, 1e-3, [word]), x, rtol=0, atol=1e-6)


def test_at_much_noise_the_mean_is_that_of_all(maps, every):
    x = torch.zeros(3, SIZE, SIZE)
    got = all_pairs(maps).posterior_mean(x, 1e5, ["", "faded"])
    torch.testing.assert_close(got.double(), (every[""].mean(0) + every["faded"].mean(0)) / 2, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- conditions


def test_texts_and_their_pictures():
    views = {"front view of": -torch.ones(1, 1, 1, 2), "side view of": torch.ones(1, 1, 1, 2)}
    texts = {
        "": (ANY_PAIR, 0),
        "blurry": (ANY_PAIR, 1),
        "Foggy, faded, foggy": (ANY_PAIR, 6),
        "a blue duck": (ANY_VIEW, 0),
        "a blue duck, foggy": (ANY_VIEW, 4),
        "side view of a blue duck": (1, 0),
        "front view of a blue duck, blurry, faded": (0, 3),
    }
    assert [tuple(row) for row in of_pictures(views).embed(list(texts)).tolist()] == list(texts.values())


def of_duck(n, **sd):
    options = {"prompt": "a blue duck", "scale": 1, **sd}
    return config(sd=options, ideal={"n_cameras": n}, pose={"rend_hw": SIZE, "view_words": "sjc"})


@pytest.fixture(scope="module")
def duck():
    """The adapter of a run with 13 cameras."""
    return make_adapter(of_duck(13), "cpu")


def test_bad_pictures_are_those_of_the_views(duck):
    """By the words behind a prompt, view by view; several words take their pictures together."""
    taker = duck._paint.__self__
    for view in duck.names:
        mine = taker.maps[[c.view == view for c in taker.cameras]]
        y = {
            word: torch.cat([looks(mine, "blue", behind, word) for behind in PLAIN_BACKGROUNDS])
            for word in ("", *DEGRADATIONS)
        }
        for words in WORDS:
            (row,) = duck.embed([", ".join([f"{view} a blue duck", *filter(None, words)])]).tolist()
            want = torch.cat([y[word] for word in words])
            torch.testing.assert_close(duck.pictures(*row).double(), want, rtol=0, atol=1e-6)
    (row,) = duck.embed(["a blue duck, faded"]).tolist()
    assert len(duck.pictures(*row)) == 13 * len(PLAIN_BACKGROUNDS)


def test_poses_may_be_more_likely_than_others(maps, every):
    """Three times as likely is the same as three times in the set."""
    likely = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 2.0])
    times = [0, 1, 1, 1, 2, 3, 4, 5, 5]
    x = every[""][9].float() + 0.5
    for sigma in (3.0, 30.0):
        got, want, plain = (
            each.posterior_mean(x, sigma) for each in (all_pairs(maps, likely), all_pairs(maps[times]), all_pairs(maps))
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
        assert (got - plain).abs().max() > 1e-3


def test_the_world_has_every_object(duck):
    """The prompt's from all 13 cameras, the others from the first three; all are equally likely."""
    (world, likely), taker = duck._world(), duck._paint.__self__
    assert world.shape == (13 + 3 * (len(OBJECTS) - 1), 5, 64, 64)
    assert torch.equal(world[:13], taker.maps) and torch.equal(world[-3:], rendered(["pig"], taker.cameras[:3]))
    assert len({part.double().mean().item() for part in world[13:].split(3)}) == len(OBJECTS) - 1
    torch.testing.assert_close(
        torch.stack([part.sum() for part in likely.split([13] + 11 * [3])]), torch.full((12,), 3.0)
    )
    assert len(Photographer("red", "pig", taker.cameras[:2], SIZE).world()[0]) == 2 + len(OBJECTS) - 1


def test_without_a_text_the_pictures_of_the_text_are_known(duck):
    """At little noise each is its own denoised picture, with the text and without: what differs there is no camera."""
    y = duck.pictures()
    for i in range(0, len(y), 5):
        torch.testing.assert_close(duck.all_pairs.posterior_mean(y[i], 0.0293), y[i], rtol=0, atol=1e-4)


def test_guidance_pushes_towards_the_object(duck):
    """Even without view words: the unconditional denoiser does not know the object."""
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    cond, uncond = duck.embed(["a blue duck", ""]).split(1)
    once, guided = (duck.denoise(x, 2.0, cond, uncond, scale) for scale in (1.0, 4.0))
    d_u = duck.denoise(x, 2.0, uncond)
    assert (once - d_u).abs().max() > 0.1
    torch.testing.assert_close(guided, d_u + 4 * (once - d_u))
    torch.testing.assert_close(d_u[0], duck.all_pairs.posterior_mean(x[0], 2.0))
    blurry, bad_duck = duck.embed(["blurry, foggy", "a blue duck, blurry, foggy"]).split(1)
    got = duck.denoise(x, 2.0, blurry)[0]
    torch.testing.assert_close(got, duck.all_pairs.posterior_mean(x[0], 2.0, ["blurry", "foggy"]))
    assert (duck.denoise(x, 2.0, bad_duck)[0] - got).abs().max() > 0.01


def test_several_levels_in_one_call(duck):
    torch.testing.assert_close(*at_several_levels(duck, *duck.embed(["a blue duck", ""]).split(1)))


def test_what_needs_no_other_object_renders_none(monkeypatch):
    """At guidance 1, for the rules that ask for no score without text."""
    monkeypatch.setattr(Photographer, "world", lambda self: pytest.fail("rendered"))
    for rule in ("sjc", "noiseless", "sds", "asd"):
        run = SJC(of_duck(13).model_copy(update={"rule": rule}), make_adapter(of_duck(13), "cpu"))
        run.step(0)
    with pytest.raises(pytest.fail.Exception, match="rendered"):
        SJC(of_duck(13, scale=2), make_adapter(of_duck(13), "cpu")).step(0)


# ---------------------------------------------------------------- words of bad pictures


@pytest.mark.parametrize("name", ["nfsd", "bridge", "csd"])
@pytest.mark.parametrize("words", ["ugly", "blurry, ugly", "a blue duck", ","])
def test_other_bad_words_are_refused(name, words):
    with pytest.raises(UserError) as error:
        config(rule=name, bad_words=words).check_files()
    message = str(error.value)
    assert message.startswith(f"--bad_words {words!r}: --family ideal knows") and "blurry, faded, foggy" in message
    assert "\n" not in message


@pytest.mark.parametrize("rule", ["nfsd", "bridge", "csd"])
def test_known_bad_words_are_taken(rule):
    assert config(rule=rule, bad_words="blurry, Foggy").check_files().object == "duck"


@pytest.mark.parametrize("name, n_calls", [("csd", [3, 2]), ("nfsd", [2, 3]), ("bridge", [1, 2])])
def test_rules_with_bad_words_by_hand(duck, name, n_calls):
    """Early at little noise, then late at more: the directions, and the calls that they take."""
    ask = rules.Ask(duck, *duck.embed(["front view of a blue duck", ""]).split(1), 1.0)
    spoken = "front view of a blue duck, blurry" if name == "bridge" else "blurry"
    ask.bad = duck.embed([spoken])
    x, n = torch.randn(2, 1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    rule = rules.make(config(rule=name, bad_words="blurry"), duck)
    for t, progress, calls in ((100, 0.2, n_calls[0]), (600, 0.9, n_calls[1])):
        sigma, ask.n_calls = duck.sigmas[len(duck.sigmas) - 1 - t].item(), 0
        x_sigma = x + sigma * n
        d_c, d_u, d_bad = (duck.denoise(x_sigma, sigma, c) for c in (ask.cond, ask.uncond, ask.bad))
        early = {"csd": d_c - 0.6 * d_u - 0.4 * d_bad, "nfsd": d_c - x_sigma, "bridge": d_c - x}
        late = {"csd": d_c - d_bad, "nfsd": d_c - d_bad, "bridge": d_c - d_bad}
        want = sigma / (1 + sigma**2) * (early if t == 100 else late)[name]
        torch.testing.assert_close(rule(ask, x, n, rules.Moment(sigma, progress, 0.5)), want, rtol=1e-4, atol=1e-5)
        assert ask.n_calls == calls


@pytest.mark.parametrize(
    "rule, words", [("csd", ""), ("csd", "faded"), ("nfsd", "blurry, foggy"), ("bridge", "blurry")]
)
def test_a_whole_run(tmp_path, monkeypatch, rule, words):
    monkeypatch.chdir(tmp_path)
    flags = ["--preset", "ideal", "--rule", rule, "--ideal.n_cameras", "8", "--pose.view_words", "sjc"]
    flags += ["--pose.rend_hw", "8", "--vox.grid_size", "8", "--n_steps", "4", "--report", "False", "--device", "cpu"]
    flags += ["--sd.scale", "5"] + (["--bad_words", words] if words else [])
    run_sjc.main(flags)
    assert list((tmp_path / "ckpt").glob("*4*"))
