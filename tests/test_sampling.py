"""run_img_sampling.py: pictures depend on seed and number only, every one is written, mistakes end in one line."""

import hashlib
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml

import run_img_sampling
from adapt import make_adapter
from my.errors import RunError, UserError, run_main
from options.sampling import SamplingConfig
from sampling import draw, noise_levels
from tiny import SIZE, Affine, NotANumber, of_pictures

ROOT = Path(run_img_sampling.__file__).parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def flags(tiny_sd):
    return [
        "--sd.checkpoint",
        str(tiny_sd),
        "--sd.prompt",
        "a blue duck",
        "--sd.scale",
        "2",
        "--num_images",
        "5",
        "--batch_size",
        "2",
        "--num_t",
        "3",
        "--device",
        "cpu",
    ]


def last(cfg, adapter, images, subject="a blue duck"):
    *_, x = draw(cfg, adapter, noise_levels(cfg, adapter), [subject] * len(images), images)
    return x


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("options", [{}, {"heun": False}, {"langevin": True}, {"sampler": "smld"}], ids=str)
def test_a_picture_depends_on_seed_and_number_only(tiny_sd, options):
    """In batches of 5, of 2 and alone, backwards, the same up to rounding; other seeds and numbers are others."""
    cfg = SamplingConfig(sd={"checkpoint": str(tiny_sd), "prompt": "a blue duck", "scale": 2}, num_t=4, **options)
    adapter = make_adapter(cfg, "cpu")
    five = last(cfg, adapter, range(5))
    assert five.dtype == torch.float64 and five.shape == (5, 4, 8, 8)
    for images in ([0, 1], [4], [3, 2]):
        torch.testing.assert_close(last(cfg, adapter, images), five[images], rtol=1e-4, atol=1e-4)
    gap = (five[:, None] - five).abs().amax(dim=(2, 3, 4)) + torch.eye(5)
    assert gap.min() > 0.1
    assert (last(cfg.model_copy(update={"seed": 1}), adapter, range(5)) - five).abs().amax(dim=(1, 2, 3)).min() > 0.1


def test_samplers_options_matter(tiny_sd):
    """Each of them gives another picture from the same noise."""
    cfg = SamplingConfig(sd={"checkpoint": str(tiny_sd), "prompt": "a blue duck", "scale": 2}, num_t=4)
    adapter = make_adapter(cfg, "cpu")
    options = [
        {},
        {"heun": False},
        {"langevin": True},
        {"langevin": True, "S_churn": 1.0},
        {"sampler": "smld"},
        {"sampler": "smld", "smld_steps": 2},
        {"sigma_max": 5.0},
        {"sigma_min": 1.0},
    ]
    xs = torch.stack([last(cfg.model_copy(update=o), adapter, [0])[0] for o in options])
    gap = (xs[:, None] - xs).abs().amax(dim=(2, 3, 4)) + torch.eye(len(options))
    assert gap.min() > 1e-3


@pytest.mark.parametrize("options", [{}, {"heun": False}, {"langevin": True}], ids=str)
def test_samples_of_the_exact_model_are_its_pictures(options):
    """From the closed-form denoiser of six pictures, each sample is one of them, and no one takes all."""
    y = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    adapter, cfg = of_pictures({"front view of": y}), SamplingConfig(sd={"scale": 1}, **options)
    x = last(cfg, adapter, range(24))
    distance = (x[:, None] - y).abs().amax(dim=(2, 3, 4))  # (24, 6)
    assert distance.amin(dim=1).max() < 1 / 255
    assert len(set(distance.argmin(dim=1).tolist())) >= 4


def test_levels_are_the_models():
    adapter = Affine()
    levels = noise_levels(SamplingConfig(), adapter)
    assert len(levels) == 40 and set(levels) <= set(adapter.sigmas.tolist())
    assert (levels[0], levels[-1]) == (adapter.sigmas[0], adapter.sigmas[-1])
    adapter.sigmas = torch.tensor([500.0, 79.0, 10.0, 1.0], dtype=torch.float64)
    assert noise_levels(SamplingConfig(), adapter)[0] == 79  # at most 80, unless asked for
    assert noise_levels(SamplingConfig(sigma_max=400), adapter)[0] == 500
    assert noise_levels(SamplingConfig(sampler="smld", num_t=2), adapter).tolist() == [79, 1]


def test_precision_is_a_remedy_where_it_would_change():
    half = "continue with --resume True --sd.precision fp32, or try another checkpoint"
    assert SamplingConfig().remedy("cuda").startswith(half)
    assert SamplingConfig(sd={"precision": "bf16"}).remedy("cpu").startswith(half)
    for cfg, device in (
        (SamplingConfig(), "cpu"),
        (SamplingConfig(sd={"precision": "fp32"}), "cuda"),
        (SamplingConfig(family="ddpm"), "cuda"),
    ):
        assert cfg.remedy(device).startswith("try another checkpoint")


def test_subjects_are_taken_in_turn():
    assert SamplingConfig(num_images=3, prompts=["a", "b"]).subjects(None) == ["a", "b", "a"]
    assert SamplingConfig(num_images=2, sd={"prompt": "c"}).subjects(None) == ["c", "c"]
    assert SamplingConfig(family="ddpm", num_images=2).subjects(None) == ["", ""]


# ---------------------------------------------------------------- the script


def test_every_picture_is_written(here, flags):
    flags = [flag for flag in flags if flag not in ("--sd.prompt", "a blue duck")]
    run_img_sampling.main([*flags, "--prompts", "a blue duck, a red car"])
    files = sorted((here / "imgs").glob("step_*.npy"))
    assert [f.name for f in files] == ["step_0000000.npy", "step_0000002.npy", "step_0000004.npy"]
    batches = [np.load(f) for f in files]
    assert [b.shape for b in batches] == [(2, 16, 16, 3), (2, 16, 16, 3), (1, 16, 16, 3)]
    for i, picture in enumerate(np.concatenate(batches)):
        assert picture.dtype == np.uint8 and (iio.imread(here / "imgs" / f"{i:07d}.png") == picture).all()
    sheet = iio.imread(here / "preview.png")
    assert (sheet[4:116, 4:116] == batches[0][0].repeat(7, 0).repeat(7, 1)).all()  # enlarged 7 times
    assert yaml.safe_load((here / "full_config.yml").read_text())["prompts"] == ["a blue duck", "a red car"]


def left(folder):
    """{path: bytes} of the files in a folder, but for the record of the commands."""
    return {p: p.read_bytes() for p in folder.rglob("*.*") if p.is_file() and p.name != "starts.json"}


def test_resume_draws_what_is_missing(here, flags):
    run_img_sampling.main(flags)
    with pytest.raises(UserError, match="already holds a finished run"):
        run_img_sampling.main(flags)
    files = left(here)
    kept = here / "imgs" / "step_0000000.npy"
    written = kept.stat().st_mtime_ns
    for gone in ("imgs/step_0000002.npy", "imgs/0000003.png", "preview.png"):
        (here / gone).unlink()
    run_img_sampling.main(["--resume", "True"])
    assert left(here) == files
    assert kept.stat().st_mtime_ns == written


@pytest.mark.parametrize("name", ["0000002.png", "step_0000002.npy", "step_0000002.sha256"])
@pytest.mark.parametrize("harm", ["empty", "flip"])
def test_resume_draws_what_is_damaged(here, name, harm):
    """Each of the files of a batch, whichever bit; the other batches stay."""
    batches = [range(2), range(2, 4)]
    for images in batches:
        (here / "imgs").mkdir(exist_ok=True)
        run_img_sampling.write_batch(images, np.full((2, 4, 4, 3), 0.5))
    assert all(map(run_img_sampling.is_drawn, batches)) and not run_img_sampling.is_drawn(range(4, 6))
    path = here / "imgs" / name
    whole = path.read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(b"" if harm == "empty" else whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert list(map(run_img_sampling.is_drawn, batches)) == [True, False]
    path.write_bytes(whole)
    sums = (here / "imgs" / "step_0000002.sha256").read_text().splitlines()
    assert [line.split("  ")[1] for line in sums] == ["0000002.png", "0000003.png", "step_0000002.npy"]
    assert sums[0].split()[0] == hashlib.sha256((here / "imgs" / "0000002.png").read_bytes()).hexdigest()


def test_a_long_sheet_is_cut(here):
    cfg = SamplingConfig(num_images=70, batch_size=70)
    (here / "imgs").mkdir()
    run_img_sampling.write_batch(range(70), np.zeros((70, 112, 112, 3), np.uint8))
    run_img_sampling.preview(cfg, cfg.subjects(None))
    assert iio.imread(here / "preview.png").shape == (8 * (112 + 14 + 4) + 4, 8 * (112 + 4) + 4, 3)


class LateNaN(Affine):
    """A denoiser that is whole in its first batch, and whose decoder then breaks down, as one in half precision may."""

    def decode(self, x):
        self.decoded = getattr(self, "decoded", 0) + 1
        return super().decode(x) if self.decoded < 4 else x * np.nan


def test_a_picture_that_breaks_down_leaves_no_run(here, monkeypatch, flags):
    """It is named, with what to do; nothing of it is written, and the same command can be given again."""
    monkeypatch.setattr("adapt.make_adapter", lambda cfg, device, found=None: NotANumber())
    for _ in range(2):
        with pytest.raises(RunError, match="^picture 0: a blue duck: its value is not finite; try another checkpo"):
            run_img_sampling.main(flags)
        assert {p.name for p in here.iterdir()} == {"full_config.yml", "starts.json"}
    monkeypatch.setattr("adapt.make_adapter", lambda cfg, device, found=None: LateNaN())
    with pytest.raises(RunError, match="^picture 3: "):
        run_img_sampling.main(flags)
    assert sorted(p.name for p in (here / "imgs").iterdir()) == [
        "0000000.png",
        "0000001.png",
        "step_0000000.npy",
        "step_0000000.sha256",
    ]
    monkeypatch.setattr("adapt.make_adapter", lambda cfg, device, found=None: Affine())
    run_img_sampling.main(["--resume", "True"])
    assert len(list((here / "imgs").glob("*.png"))) == 5


def test_a_whole_configuration_as_config_yml_is_taken(here, flags):
    """Its lines are not all asked for: only those that change something have to be read."""
    run_img_sampling.main([*flags, "--dry_run", "True"])
    (here / "full_config.yml").rename("config.yml")
    run_img_sampling.read_config([]).check_files()
    (here / "config.yml").write_text((here / "config.yml").read_text().replace("smld_steps: 5", "smld_steps: 6"))
    with pytest.raises(UserError, match="./config.yml: smld_steps: not read with --sampler karras"):
        run_img_sampling.read_config([]).check_files()


@pytest.mark.parametrize("preset", ["mini", "ideal"])
def test_presets_of_2d(here, preset):
    for argv in (["--preset", preset], ["--preset", preset, "--num_images", "3"]):
        assert run_img_sampling.read_config(argv).sd.prompt == "a blue duck"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--num_images", "0"], ["--num_images", "greater than 0", "got 0"]),
        (["--num_t", "1"], ["--num_t", "greater than 1"]),
        (["--sigma_max", "1", "--sigma_min", "2"], ["--sigma_max 1 must be above --sigma_min 2"]),
        (["--preset", "mini", "--sigma_max", "0.01"], ["--sigma_max 0.01: this model knows 0.02917 to 14.61"]),
        (["--preset", "mini", "--σ_max", "0.01"], ["--sigma_max 0.01"]),
        (["--preset", "mini", "--sigma_min", "15"], ["--sigma_min 15", "14.61"]),
        (["--preset", "mini", "--prompts", "a blue duck, a zebra"], ["--prompts: ", "'zebra'", "it knows"]),
        (
            ["--preset", "mini", "--prompts", "a blue duck", "--sd.negative_prompt", "ugly"],
            ["--sd.negative_prompt: ", "'ugly'"],
        ),
        (["--sd.variant", "mini", "--prompts", ""], ["--prompts: expected a list, each text, got ''"]),
        (["--sd.variant", "mini", "--sd.prompt", " "], ["--sd.prompt: needs words", "got ' '"]),
        (["--preset", "mini", "--prompts", "a blue duck,"], ["--prompts: one of them is empty"]),
        (
            ["--preset", "ideal", "--prompts", "a blue duck"],
            ["--prompts: not read with --family ideal; leave it out, or give --family sd"],
        ),
        (["--preset", "mini", "--gddpm.imgnet_cat", "5"], ["--gddpm.imgnet_cat: not read with --family sd"]),
        (
            ["--preset", "mini", "--prompts", "a red duck", "--sd.prompt", "a blue duck"],
            ["--sd.prompt: not read with --prompts a red duck", "or leave out --prompts"],
        ),
        (["--preset", "mini", "--pose.perp_neg", "True"], ["--pose.perp_neg: nothing here reads it"]),
        (["--preset", "mini", "--pose.rend_hw", "32"], ["--pose.rend_hw: not read with --family sd", "--family ideal"]),
        (
            ["--preset", "mini", "--sampler", "smld", "--heun", "True"],
            ["--heun: not read with --sampler smld; leave it out, or give --sampler karras"],
        ),
        (["--preset", "mini", "--smld_steps", "9"], ["--smld_steps: not read with --sampler karras"]),
        (["--preset", "mini", "--S_churn", "9"], ["--S_churn: not read with --langevin False", "give --langevin True"]),
        (
            ["--preset", "mini", "--langevin", "True", "--S_max", "0.01"],
            ["--S_max 0.01 must not be below --S_min 0.05"],
        ),
        (["--family", "ddpm", "--sd.negative_prompt", "ugly"], ["--sd.negative_prompt: not read with --family ddpm"]),
        (["--family", "gddpm", "--sd.prompt", "a duck"], ["--sd.prompt: not read with --family gddpm", "sd or ideal"]),
        (["--preset", "mini", "--pose.view_words", "octants"], ["--pose.view_words: not read with --family sd"]),
        (
            ["--preset", "mini", "--num_images", "1", "--prompts", "a duck, a car"],
            ["--num_images 1: fewer than the 2 --prompts"],
        ),
        (
            ["--family", "gddpm", "--gddpm.checkpoint", "f.pt", "--gddpm.lsun_cat", "cat"],
            ["--gddpm.lsun_cat: not read with --gddpm.checkpoint", "or leave out --gddpm.checkpoint"],
        ),
        (
            ["--family", "gddpm", "--gddpm.model", "m_imgnet_256_uncond", "--cls_scaling", "2"],
            ["--cls_scaling: it guides to a class, and no class is asked for", "--gddpm.imgnet_cat"],
        ),
        (
            ["--family", "gddpm", "--gddpm.model", "m_imgnet_64", "--gddpm.lsun_cat", "ffhq"],
            ["--gddpm.lsun_cat: not read with --gddpm.model m_imgnet_64", "m_lsun_256"],
        ),
        (
            ["--family", "gddpm", "--gddpm.model", "m_imgnet_64", "--classes", "1", "--gddpm.imgnet_cat", "1"],
            ["--gddpm.imgnet_cat: not read with --classes 1", "leave out --classes"],
        ),
        (
            ["--family", "gddpm", "--gddpm.model", "m_imagenet_64"],
            ["--gddpm.model: expected one of m_imgnet_64", "perhaps you meant m_imgnet_64"],
        ),
        (["--family", "gddpm", "--gddpm.model", "m_imgnet_64", "--classes", "3,1000"], ["--classes", "less than 1000"]),
        (["--family", "gddpm", "--gddpm.imgnet_cat", "-2"], ["--gddpm.imgnet_cat", "greater than or equal to -1"]),
        (["--family", "gddpm", "--classes", "3"], ["--classes: not read with --gddpm.model m_lsun_256", "m_imgnet_64"]),
        (["--family", "gddpm"], ["lsun_bedroom.pt", "--gddpm.checkpoint FILE"]),
        (["--classes", "3"], ["--classes: not read with --family sd", "give --family gddpm"]),
        (["--family", "ddpm"], ["--family ddpm needs --ddpm.checkpoint"]),
        (["--preset", "burger"], ["no preset 'burger' of this script; its presets are ideal, mini"]),
        (["--sampler", "ddim"], ["--sampler: expected one of karras, smld"]),
    ],
)
def test_mistakes_end_in_one_line(here, monkeypatch, capsys, argv, words):
    monkeypatch.setenv("HOME", str(here))
    with pytest.raises(SystemExit) as ended:
        run_main(run_img_sampling.main, [*argv, "--device", "cpu"])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (here / "imgs").exists()  # which would be taken for a run


def test_inside_the_project_it_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="go to an experiment directory"):
        run_img_sampling.main(["--dry_run", "True"])


def test_the_command_line_draws(here):
    """As a user types it, with the embedded model."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "run_img_sampling.py",
            "--preset",
            "mini",
            "--num_images",
            "1",
            "--num_t",
            "2",
            "--heun",
            "False",
        ],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "done: imgs has 1 pictures, preview.png shows them" in done.stdout
    assert "sampling: 100%" in done.stderr and (here / "preview.png").exists()
