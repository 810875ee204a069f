"""--init: a run that begins from the field of another one."""

import math
import shutil

import numpy as np
import pytest
import torch

import pose
import run_sjc
from asset import load_field
from my import checkpoint, config
from my.errors import UserError
from my.run_dir import read_heartbeat
from options.found import find
from options.sjc import SJCConfig
from published_files import a_field, save, tensors_of
from sjc import SJC
from sweep.plan import read_plan
from tiny import Affine
from tiny import config as tiny_config
from voxnerf.field import make_field
from voxnerf.render import render_image
from voxnerf.resample import begin_from

CUBE = [[-1.0] * 3, [1.0] * 3]
POINTS = torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
DIRECTIONS = torch.nn.functional.normalize(POINTS, dim=1)


# ---------------------------------------------------------------- fields


@torch.no_grad()
def test_the_same_grid_has_the_same_density_and_colour():
    """d_scale and the difference of the shifts are in the new density."""
    old, new = a_field(density_shift=-1.0), a_field(density_shift=-4.0)
    new.color.zero_()
    assert begin_from(new, old) == []
    assert new.d_scale == 0 and torch.allclose(new.density, math.exp(0.4) * old.density + 3, atol=1e-5)
    inner = POINTS * 0.99  # within the centres of the outer voxels, whose neighbours outside are 0 in both
    assert torch.allclose(new.sigma(inner), old.sigma(inner), rtol=1e-4, atol=1e-5)
    assert torch.allclose(new.features(POINTS, DIRECTIONS), old.features(POINTS, DIRECTIONS), atol=1e-5)
    assert torch.equal(new.bg, old.bg)


@torch.no_grad()
@pytest.mark.parametrize("grid, half", [(7, 1.0), (12, 0.5), (4, 1.0)])
def test_a_linear_field_stays_linear(grid, half):
    """Trilinear resampling in world units is exact for values that are linear in x, y and z."""
    old = make_field("V_SD", CUBE, 8, 2)
    x, y, z = (torch.arange(8) / 4 - 0.875 for _ in range(3))
    old.density[0, 0] = 2 * x + 3 * y[:, None] - z[:, None, None]
    old.color[0, 1] = 5 * x - y[:, None] + z[:, None, None]
    new = make_field("V_SD", [[-half] * 3, [half] * 3], grid, 2)
    begin_from(new, old)
    at = [(torch.arange(grid) + 0.5) / grid * 2 * half - half for _ in range(3)]
    z, y, x = torch.meshgrid(*at, indexing="ij")
    inside = (x.abs() <= 0.875) & (y.abs() <= 0.875) & (z.abs() <= 0.875)
    assert torch.allclose(new.density[0, 0][inside], (2 * x + 3 * y - z)[inside], atol=1e-5)
    assert torch.allclose(new.color[0, 1][inside], (5 * x - y + z)[inside], atol=1e-5)


@torch.no_grad()
def test_the_border_does_not_fade():
    """Voxels that are nearer to the border than any old voxel's centre have the value of the nearest."""
    old, new = make_field("V_SD", CUBE, 4, 2), make_field("V_SD", CUBE, 11, 2)
    old.density.fill_(2.0)
    old.color.fill_(-3.0)
    begin_from(new, old)
    assert torch.allclose(new.density, torch.tensor(2.0)) and torch.allclose(new.color, torch.tensor(-3.0))


@torch.no_grad()
def test_a_larger_box_is_empty_outside():
    old = a_field(grid=10)
    old.density.fill_(-8)[..., 3:7, 2:8, 3:7] = 30
    new = make_field("V_SJC", [[-2.0] * 3, [2.0] * 3], 20, 3, blend_bg_texture=True, bg_texture_hw=4)
    before = new.color.clone()
    (note, *_) = begin_from(new, old)
    assert note == "the box is of half edge 1 there, of half edge 2 here: what is outside the old box begins empty"
    assert torch.allclose(new.density[..., 5:15, 5:15, 5:15], math.exp(0.4) * old.density, atol=1e-4)
    assert torch.equal(new.color[..., :5], before[..., :5])
    corner = torch.full((1, 3), 1.7)
    assert 0 < new.sigma(corner) * new.box_diagonal < 0.0101
    camera = pose.camera_at(1.0, 1.5, 5.0, 30.0)
    far, near = (render_image(f, camera.K(8, 8), camera.c2w, 8, 8, renderer="reference").opacity for f in (new, old))
    assert (far - near).abs().mean() < 0.03 and near.mean() > 0.2


@torch.no_grad()
def test_a_smaller_box_cuts():
    old, new = a_field(), make_field("V_SJC", [[-0.5] * 3, [0.5] * 3], 6, 3)
    notes = begin_from(new, old)
    assert notes == [
        "the box is of half edge 1 there, of half edge 0.5 here: what is outside the new box is cut off",
        "its background texture is left out: this run learns none",
    ]


@torch.no_grad()
def test_what_a_mask_hides_is_empty():
    old, new = a_field(), a_field()
    old.alpha_mask = torch.zeros_like(old.density)
    old.alpha_mask[..., :3, :, :] = 1
    assert begin_from(new, old) == ["what its mask hides begins empty"]
    kept, gone = new.density[..., :3, :, :], new.density[..., 4:, :, :]
    assert torch.allclose(kept, math.exp(0.4) * old.density[..., :3, :, :], atol=1e-5) and gone.max() < -3


@torch.no_grad()
def test_colours_from_0_to_1_become_those_from_minus_1_to_1():
    old, new = a_field("VoxRF"), a_field("V_SJC")
    begin_from(new, old)
    assert torch.allclose(new.to_color(new.color), old.to_color(old.color), atol=1e-6)
    assert torch.allclose(new.to_color(new.bg), old.to_color(old.bg), atol=1e-6)


@torch.no_grad()
def test_a_texture_of_another_size():
    old, new = a_field(), a_field(bg_texture_hw=9)
    old.bg[:] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    begin_from(new, old)
    assert torch.allclose(new.bg, old.bg[..., :1, :1].expand(new.bg.shape))
    none = a_field(blend_bg_texture=False)
    before = new.bg.clone()
    assert begin_from(new, none) == ["it has no background texture: this one begins as in any run"]
    assert torch.equal(new.bg, before)


# ---------------------------------------------------------------- runs


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a finished tiny run; the denoiser of every run here is tiny."""
    monkeypatch.setattr("sjc.make_adapter", lambda *_: Affine())
    folder = tmp_path / "first"
    folder.mkdir()
    cfg = tiny_config(n_steps=3)
    config.write(cfg, folder / "full_config.yml")
    optimisation = SJC(cfg, Affine())
    for i in range(3):
        optimisation.step(i)
    optimisation.save(folder / "ckpt", 3)
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    return folder


FLAGS = [
    *("--family", "ideal", "--sd.prompt", "a red duck", "--n_steps", "2", "--emptiness_weight", "0"),
    *("--vox.grid_size", "6", "--vox.step_ratio", "1", "--pose.rend_hw", "6", "--device", "cpu"),
]


def tensors(step):
    return checkpoint.load(f"ckpt/step_{step:07d}")[0]


def test_a_run_begins_from_another(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_sjc, "save_test_views", lambda _: None)
    run_sjc.main([*FLAGS, "--init", "../first"])
    assert (
        f"note: --init {finished}: the grid is resampled from 4 x 4 x 4 voxels to 6 x 6 x 6" in capsys.readouterr().err
    )
    kept = config.read(SJCConfig, "full_config.yml")
    sha256 = checkpoint.sha256_of(finished / "ckpt" / "step_0000003" / checkpoint.TENSORS)
    assert (kept.init, kept.init_sha256) == (str(finished), sha256)
    old, new = load_field(find(finished), Affine())[0], SJC(kept, Affine())
    begin_from(new.field, old)
    whole = tensors(2)
    shutil.rmtree("ckpt/step_0000001", ignore_errors=True)
    shutil.rmtree("ckpt/step_0000002")
    new.save("ckpt", 0)
    expected = tensors(0)
    shutil.rmtree(finished)  # a resumed run has its own checkpoint
    run_sjc.main(["--resume", "True"])
    assert expected.keys() == {name for name in whole if name.startswith("field/")}
    for name, value in tensors(2).items():
        assert torch.equal(value, whole[name]), name


def test_a_killed_run_has_what_it_began_from(finished, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_sjc, "follow", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sjc.main([*FLAGS, "--init", str(finished)])
    new = SJC(config.read(SJCConfig, "full_config.yml"), Affine())
    begin_from(new.field, load_field(find(finished), Affine())[0])
    for name, value in tensors(0).items():
        assert torch.equal(value, new.field.state_dict()[name.removeprefix("field/")])
    monkeypatch.setattr(checkpoint, "set_aside", lambda folder: pytest.fail(f"{folder} is away for a moment"))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_sjc.main(["--resume", "True"])
        assert read_heartbeat("heartbeat.json")["saved"] == 0
    shutil.rmtree("ckpt")
    with pytest.raises(UserError, match="was at step 0, and ckpt has nothing of it"):
        run_sjc.main([*FLAGS, "--init", str(finished)])


def test_the_same_command_goes_on(finished, monkeypatch):
    """Though it does not give the checksum, which the run has filled in."""

    def stopped(*_):
        raise KeyboardInterrupt

    argv = [*FLAGS, "--init", "../first"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_sjc, "follow", stopped)
        run_sjc.main(argv)
    shutil.rmtree(finished)
    goes_on = run_sjc.read_config(argv)
    assert goes_on.goes_on and goes_on.init == str(finished) and len(goes_on.init_sha256) == 64
    for other in ([*FLAGS, "--init", "../other"], [*argv, "--init_sha256", "0" * 64]):
        with pytest.raises(UserError, match="a run that is not finished, and its options are others: --init"):
            run_sjc.read_config(other)


def test_another_checksum_is_refused(finished):
    with pytest.raises(UserError, match="has the SHA-256 [0-9a-f]{16}..., and this run is to begin from 0000"):
        run_sjc.main([*FLAGS, "--init", str(finished), "--init_sha256", "0" * 64])
    with pytest.raises(UserError, match="^--init_sha256: not read without --init"):
        run_sjc.main([*FLAGS, "--init_sha256", "0" * 64])


@pytest.mark.parametrize(
    "there, flags, words",
    [
        (
            {"model_type": "V_SD"},
            [],
            "is a field V_SD of 3 channels, and this run's is V_SJC of 3: .* of another space",
        ),
        (
            {},
            ["--vox.model_type", "VoxRF"],
            "is a field V_SJC of 3 .* VoxRF of 3, which has no colour below 0; give --vox.model_type V_SJC",
        ),
        (
            {},
            ["--vox.model_type", "V_SD"],
            "is a field V_SJC of 3 channels, and this run's is V_SD of 3: .* another space",
        ),
        ({"c": 4}, [], "is a field V_SJC of 4 channels, and this run's is V_SJC of 3"),
    ],
)
def test_colours_that_do_not_fit(finished, there, flags, words):
    config.write(tiny_config(n_steps=3, vox=there), finished / "full_config.yml")
    with pytest.raises(UserError, match=f"^--init {finished}: {words}"):
        run_sjc.main([*FLAGS, *flags, "--init", str(finished)])
    assert not list(finished.parent.glob("second/*"))


def test_what_is_no_field(finished):
    with pytest.raises(
        UserError, match="^--init /nowhere: no such file or folder; give the folder of a run, or a checkpoint$"
    ):
        run_sjc.main([*FLAGS, "--init", "/nowhere"])
    with pytest.raises(UserError, match="^--init .*step_3.pt: no such file"):
        run_sjc.main([*FLAGS, "--init", str(finished / "step_3.pt")])
    (finished / "ckpt" / "step_0000003" / checkpoint.TENSORS).unlink()
    with pytest.raises(UserError, match="tensors.safetensors is missing; give another checkpoint"):
        run_sjc.main([*FLAGS, "--init", str(finished)])
    shutil.rmtree(finished / "ckpt")
    with pytest.raises(UserError, match=f"^--init {finished} has no checkpoint"):
        run_sjc.main([*FLAGS, "--init", str(finished)])


def test_an_unfinished_run_and_other_latents_are_noted(finished, capsys):
    vox = {"model_type": "V_SD", "c": 3}
    config.write(tiny_config(n_steps=9, vox=vox), finished / "full_config.yml")
    cfg = tiny_config(vox=vox, ideal={"n_cameras": 9}, init=str(finished))
    cfg.source()
    err = capsys.readouterr().err
    assert "this run is at step 3 of 9; that field is taken" in err and "of another model" not in err


def test_a_published_checkpoint(finished, tmp_path):
    field = a_field(grid=6)
    path = save(tmp_path / "step_5.pt", tensors_of(field))
    cfg = tiny_config(vox={"grid_size": 6}, init=str(path))
    optimisation = SJC(cfg, Affine())
    optimisation.begin(cfg.source())
    assert torch.allclose(optimisation.field.density, math.exp(0.4) * field.density, atol=1e-5)
    assert cfg.init_sha256 == checkpoint.sha256_of(path)


def test_in_a_sweep(finished):
    with open("sweep.yml", "w") as file:
        file.write("options: {family: ideal, init: ../first}\naxes: {sd.prompt: [a red duck, a blue pig]}\n")
    for run in read_plan("sweep.yml").runs:
        assert run.flags[run.flags.index("--init") + 1] == str(finished)
        assert run.cfg.init_sha256


def test_test_views_are_transparent(finished, monkeypatch):
    import imageio.v3 as iio

    monkeypatch.setattr(run_sjc, "N_TEST_VIEWS", 2)
    run_sjc.main([*FLAGS, "--alpha", "True", "--init", str(finished)])
    views = [iio.imread(f"test_2/view/{i:03d}.png") for i in range(2)]
    assert views[0].shape == (6, 6, 4) and len(np.unique(views[1][..., 3])) > 1
