"""run_2d_sjc.py: the canvas against closed forms, modes of an exact denoiser, the figure, mistakes in one line."""

import imageio.v3 as iio
import pytest
import torch

import run_2d_sjc
from adapt import PixelAdapter, make_adapter
from canvas import noise_levels, optimise
from my import checkpoint
from my.errors import RunError, UserError, run_main
from my.seeds import torch_rng
from options.canvas import ANNEALED, UNIFORM, CanvasConfig, Setting
from tiny import SIZE, Affine, NotANumber, of_pictures

EQ16 = Setting("1.5", True, 1, 0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last(cfg, adapter, setting, prompt=""):
    *_, x = optimise(cfg, adapter, setting, prompt)
    return x[0]


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("var_red, sign", [(True, 1), (False, -1)])
def test_a_step_by_hand(var_red, sign):
    """D = x / 2 + c: from x = 0 with noise n, Eq. 16 gives sigma n / 2 + c, Eq. 15 gives -sigma n / 2 + c; times lr."""
    adapter, cfg = Affine(), CanvasConfig(lr=0.25, sd={"scale": 1})
    (c,) = adapter.embed(["a duck"]).flatten().tolist()
    sigma = adapter.round_sigma(1.5)
    x = next(optimise(cfg, adapter, Setting("1.5", var_red, 1, 7), "a duck"))
    n = torch.randn(1, 3, SIZE, SIZE, generator=torch_rng(7, 0, "noise"))
    torch.testing.assert_close(x, 0.25 * (sign * sigma * n / 2 + c))


def test_copies_are_averaged():
    """With D linear, so many copies have the noise of one, over the root of their number."""
    cfg = CanvasConfig()
    one, many = (next(optimise(cfg, Affine(), Setting("1.5", True, k, 0), "")).std().item() for k in (1, 400))
    assert many == pytest.approx(one / 20, rel=0.3)


class Gaussian(PixelAdapter):
    """The exact denoiser of N(mean, std^2), pixel by pixel."""

    def __init__(self, mean=0.3, std=1.0, size=64):
        self.device, self.data_shape = torch.device("cpu"), (3, size, size)
        self.sigmas, self.mean, self.std = Affine().sigmas, mean, std

    def embed(self, prompts):
        return torch.zeros(len(prompts))

    def _denoise(self, x, sigma, cond):
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)


@pytest.mark.parametrize("var_red", [True, False])
@pytest.mark.parametrize("sigma", ["0.5", "1.5"])
def test_noise_that_stays_on_the_canvas(var_red, sigma):
    """At one sigma the canvas settles at the mean, with the noise that the equation lets through.

    With k = s^2 / (s^2 + sigma^2), a step is x += lr ((k - 1) (x - mean) + a sigma n / sqrt(K)), where a
    is k in Eq. 16 and k - 1 in Eq. 15: less noise remains by Eq. 16 where sigma > s, more below.
    """
    adapter, cfg = Gaussian(), CanvasConfig(n_steps=300, lr=0.2)
    level = adapter.round_sigma(float(sigma))
    k = 1 / (1 + level**2)
    a = k if var_red else 1 - k
    want = (0.2 * a * level) ** 2 / 2 / (1 - (1 - 0.2 * (1 - k)) ** 2)
    x = last(cfg, adapter, Setting(sigma, var_red, 2, 0))
    n = x.numel()
    assert x.mean().item() == pytest.approx(0.3, abs=5 * (want / n) ** 0.5)
    assert x.var().item() == pytest.approx(want, rel=5 * (2 / n) ** 0.5)


# ---------------------------------------------------------------- exact denoisers


@pytest.mark.parametrize("var_red", [True, False])
def test_the_canvas_becomes_one_of_the_pictures(var_red):
    """Annealed, on the closed-form denoiser of six pictures, whatever the seed; and not always the same one."""
    y = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    adapter = of_pictures({"front view of": y})
    cfg = CanvasConfig(init_std=1.0, sd={"scale": 1})
    x = torch.stack([last(cfg, adapter, Setting(ANNEALED, var_red, 1, seed), "a pig") for seed in range(8)])
    distance = (x[:, None] - y).abs().amax(dim=(2, 3, 4))  # (8, 6)
    assert distance.amin(dim=1).max() < 0.05  # of a range of 2
    assert len(set(distance.argmin(dim=1).tolist())) > 1


def test_schedules():
    adapter, cfg = Affine(), CanvasConfig(n_steps=50, sigma_max=10.0)
    table = set(adapter.sigmas.tolist())
    single, annealed, uniform = (
        noise_levels(cfg, adapter, EQ16._replace(schedule=s)) for s in ("1.5", ANNEALED, UNIFORM)
    )
    assert set(single) == {adapter.round_sigma(1.5)} and len(single) == len(annealed) == len(uniform) == 50
    assert annealed == sorted(annealed, reverse=True)
    assert (annealed[0], annealed[-1]) == (adapter.round_sigma(10.0), adapter.sigmas[-1])
    assert len(set(uniform)) > 40 and set(uniform) | set(annealed) <= table
    assert uniform == noise_levels(cfg, adapter, EQ16._replace(schedule=UNIFORM, copies=3))


def test_a_canvas_depends_on_its_setting_only():
    cfg, adapter = CanvasConfig(n_steps=5), Affine()
    a = last(cfg, adapter, EQ16)
    assert torch.equal(a, last(CanvasConfig(n_steps=5, schedules=["3"], copies=[4], seed=9), adapter, EQ16))
    for other in (
        EQ16._replace(seed=1),
        EQ16._replace(var_red=False),
        EQ16._replace(schedule="2"),
        EQ16._replace(copies=2),
    ):
        assert not torch.equal(a, last(cfg, adapter, other))


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def flags(tiny_sd):
    return [
        "--sd.checkpoint",
        str(tiny_sd),
        "--sd.prompt",
        "a blue duck",
        "--sd.scale",
        "2",
        "--n_steps",
        "3",
        "--schedules",
        "1.5,annealed",
        "--copies",
        "1,2",
        "--n_seeds",
        "1",
        "--device",
        "cpu",
    ]


def test_the_figure_has_every_cell(here, flags, tiny_sd):
    run_2d_sjc.main(flags)
    cells = sorted(p.stem for p in (here / "cells").iterdir())
    assert len(cells) == 8
    assert {"sigma_annealed_eq15_copies_2_seed_0", "sigma_1.5_eq16_copies_1_seed_0"} <= set(cells)
    grid = iio.imread(here / "grid.png")
    assert grid.shape == (4 * (14 + 112 + 14 + 4) + 4, 2 * (112 + 4) + 4, 3)  # pictures of 16, enlarged 7 times
    first = iio.imread(here / "cells" / "sigma_1.5_eq16_copies_1_seed_0.png")
    assert (grid[18:130, 4:116] == first.repeat(7, 0).repeat(7, 1)).all()
    cfg = CanvasConfig(sd={"checkpoint": str(tiny_sd), "prompt": "a blue duck", "scale": 2}, n_steps=3)
    adapter = make_adapter(cfg, "cpu")
    alone = adapter.decode(last(cfg, adapter, EQ16, "a blue duck")[None])[0].permute(1, 2, 0).numpy()
    assert abs(alone * 255 - first).max() <= 0.51


def test_resume_computes_what_is_missing(here, flags, monkeypatch):
    import canvas

    computed, original = [], canvas.optimise

    def killed_after_three(cfg, adapter, setting, prompt):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(setting)
        return original(cfg, adapter, setting, prompt)

    monkeypatch.setattr(canvas, "optimise", killed_after_three)
    with pytest.raises(KeyboardInterrupt):
        run_2d_sjc.main(flags)
    monkeypatch.setattr(canvas, "optimise", lambda *args: (computed.append(args[2]), original(*args))[1])
    run_2d_sjc.main(["--resume", "True"])
    assert len(computed) == len(set(computed)) == 8 and (here / "grid.png").exists()
    with pytest.raises(UserError, match="already holds a finished run"):
        run_2d_sjc.main(flags)


def test_a_checkpoint_of_something_else_is_refused(here):
    cfg = CanvasConfig(family="ideal", n_steps=3, schedules=["1.5"], copies=[1], n_seeds=1)
    for names, words in (
        (["field/density"], "the checkpoint is of run_sjc.py, and this run is of run_2d_sjc.py"),
        (["sigma_9_eq16_copies_1_seed_0"], "sigma_9_eq16_copies_1_seed_0 is .* there, absent here"),
        ([run_2d_sjc.cell_name(cfg.rows()[0][0])], "sigma_1.5_eq.* is .1, 2, 2. there, .* here"),
    ):
        checkpoint.save("ckpt", 1, dict.fromkeys(names, torch.zeros(1, 2, 2)), {})
        with pytest.raises(UserError, match=words):
            run_2d_sjc.compute(cfg, Affine(), "")


def test_a_canvas_that_breaks_down(here):
    """It is named, with what to do; nothing is left that would be taken for a run."""
    cfg = CanvasConfig(n_steps=3)
    with pytest.raises(RunError, match="^sigma_1.5_eq16_copies_1_seed_0, step 3: the canvas is not finite; try anot"):
        run_2d_sjc.compute(cfg, NotANumber(), "a duck")
    assert not list(here.iterdir())


def test_a_decoder_that_breaks_down(here):
    class Broken(Affine):
        def decode(self, x):
            return x * float("nan")

    cfg = CanvasConfig(n_steps=3, schedules=["2"])
    with pytest.raises(RunError, match="^sigma_2_eq16_copies_1_seed_0: the decoded canvas is not finite"):
        run_2d_sjc.draw_figure(cfg, Broken(), run_2d_sjc.compute(cfg, Broken(), "a duck"))
    assert not list((here / "cells").iterdir()) and not (here / "grid.png").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--schedules", "1.5,anneald"],
            ["--schedules", "annealed, uniform or a number above 0, not 'anneald'", "perhaps you meant annealed"],
        ),
        (["--schedules", "1.5,1.50"], ["--schedules: 1.5 is given twice; leave one out"]),
        (["--preset", "mini", "--schedules", "1.5,1.5001"], ["--schedules 1.5,1.5001: both are the level 1.499"]),
        (
            ["--preset", "mini", "--schedules", "1.5", "--sigma_max", "9"],
            ["--sigma_max: not read with --schedules 1.5; leave it out, or give --schedules annealed"],
        ),
        (["--preset", "burger"], ["no preset 'burger' of this script; its presets are ideal, mini"]),
        (["--sd.prompt", ""], ["--sd.prompt: needs words", "got ''"]),
        (["--schedules", "0"], ["--schedules", "not '0'"]),
        (["--schedules", "[]"], ["--schedules: needs at least 1 value", "got ''"]),
        (["--copies", ""], ["--copies: expected a list, each an integer, got ''"]),
        (["--copies", "0"], ["--copies must be at least 1, got 0"]),
        (["--var_red", "True,True"], ["--var_red: True is given twice"]),
        (["--var_red", "both"], ["--var_red: expected a list, each True or False"]),
        (["--n_seeds", "0"], ["--n_seeds", "greater than 0"]),
        (["--lr", "2"], ["--lr", "less than or equal to 1"]),
        (["--sigma_max", "1", "--sigma_min", "2"], ["--sigma_max 1 must be above --sigma_min 2"]),
        (["--preset", "mini", "--sigma_max", "0.01"], ["--sigma_max 0.01", "0.02917"]),
        (["--sd.checkpoint", "nosuch"], ["nosuch: looked for", "--preset mini"]),
    ],
)
def test_mistakes_end_in_one_line(here, capsys, argv, words):
    with pytest.raises(SystemExit) as ended:
        run_main(run_2d_sjc.main, [*argv, "--device", "cpu"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (here / "ckpt").exists()  # which would be taken for a run


def test_the_miniature_gives_its_prompt():
    """Annealed, by Eq. 16: a judge that has seen true renders only names the object and the colour of each canvas."""
    from toyworld import COLORS, OBJECTS
    from toyworld import judge as judges

    cfg = CanvasConfig(sd={"variant": "mini", "prompt": "a red house", "scale": 3}, n_steps=30)
    adapter, judge = make_adapter(cfg, "cpu"), judges.load()[0]
    x = torch.stack([last(cfg, adapter, Setting(ANNEALED, True, 1, seed), "a red house") for seed in range(1)])
    with torch.no_grad():
        hits = judges.hits(judge(adapter.decode(x)), list(COLORS).index("red"), list(OBJECTS).index("house"), 0)
    assert hits["pair"].all()
