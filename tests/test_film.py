"""The final video: cameras, frames in batches, backgrounds, transparency, and a folder that appears whole."""

import os

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import asset
import highres_final_vis
import pose
from asset import Asset
from film import frames
from film.files import Film, replacing
from film.frames import Frames, InChunks
from my import media
from my.errors import UserError
from my.host_copy import HostCopy
from options.family import PoseConfig
from options.film import FilmConfig
from published_files import FLAGS, a_field, save, tensors_of
from tiny import Affine
from tiny import config as tiny_config

RED = torch.tensor([0.9, 0.2, 0.1])


class Latent(Affine):
    """Latents are pictures in [-1, 1]; the decoder enlarges them twice, and blurs them over a few pixels."""

    @property
    def picture_size(self):
        return 2 * self.data_shape[1]

    def encode(self, pictures):
        return F.avg_pool2d(2 * pictures - 1, 2)

    def decode(self, x):
        large = F.interpolate((x + 1) / 2, scale_factor=2, mode="bilinear")
        return F.avg_pool2d(F.pad(large, [3] * 4, mode="replicate"), 7, 1).clamp(0, 1)


def red_ball(adapter):
    """An asset whose field is a solid ball of one colour in empty space."""
    cfg = tiny_config(vox={"grid_size": 24}, pose={"rend_hw": 32})
    adapter.data_shape = (3, 32, 32)
    field = asset.new_field(cfg, adapter)
    with torch.no_grad():
        z, y, x = torch.meshgrid(*[torch.arange(24) / 12 - 23 / 24] * 3, indexing="ij")
        field.density[0, 0] = torch.where(x**2 + y**2 + z**2 < 0.36, 60.0, -60.0)
        field.color.copy_(torch.log(RED / (1 - RED))[None, :, None, None, None].expand(field.color.shape))
        field.bg.fill_(0.3)
    return Asset(cfg, adapter, field)


def pictures(made, n=2):
    cameras = pose.ring(n, 1.8, 10)
    return [np.array(frame[0]) for some in made.along(cameras) for frame in some]


# ---------------------------------------------------------------- cameras and options


def test_a_ring_by_hand():
    cameras = pose.ring(4, 2.0, 30.0)
    eyes = [(-(3**0.5), 1, 0), (0, 1, 3**0.5), (3**0.5, 1, 0), (0, 1, -(3**0.5))]  # the front faces -x, left is +z
    for camera, eye in zip(cameras, eyes):
        assert np.allclose(camera.c2w[:3, 3], eye)
        assert np.allclose(camera.c2w[:3, 2], np.array(eye) / 2)  # looks along -z, at the origin
    nearer = pose.ring(4, 2.0, 0.0, squeeze=0.8)
    assert np.allclose([np.linalg.norm(c.c2w[:3, 3]) for c in nearer], [2, 1.6, 2, 1.6])


def test_paths():
    def eyes(**options):
        return [c.c2w[:3, 3] for c in frames.cameras(FilmConfig(**options), 50.0, 1.5)]

    assert len(eyes(n_frames=10)) == 7 and len(eyes(n_frames=10, skip=0)) == 10
    assert len(eyes()) == 140 and np.allclose(eyes(), [c.c2w[:3, 3] for c in pose.spiral(200, 1.5, 1.5)[60:]])
    assert np.allclose(
        eyes(path="circle", n_frames=3, elevation=-20, radius=2), [c.c2w[:3, 3] for c in pose.ring(3, 2, -20)]
    )
    assert np.allclose(np.linalg.norm(eyes(path="ellipse", n_frames=4, elevation=0), axis=1), [1.5, 1.2, 1.5, 1.2])


def test_sizes():
    """Twice the training resolution from 4 x 4 rays per pixel of it, as published; and others that divide."""
    p = PoseConfig(rend_hw=64)
    assert FilmConfig().sizes(p) == (128, 2) and FilmConfig(factor=2).sizes(p) == (128, 1)
    assert FilmConfig(latent_hw=64).sizes(p) == (64, 4) and FilmConfig(factor=6, latent_hw=96).sizes(p) == (96, 4)
    with pytest.raises(UserError, match="^--factor 1: is 64 rays per edge, .* do not divide into --latent_hw 128"):
        FilmConfig(factor=1).sizes(p)


def test_colours():
    assert FilmConfig(background=(255, 0, 51)).color == (1, 0, 0.2)
    assert FilmConfig(background=(1, 0, 0.5)).color == (1, 0, 0.5) and FilmConfig().color is None


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--skip", "3", "--path", "circle"], "^--skip: not read with --path circle; .* give --path spiral"),
        (["--elevation", "3"], "^--elevation: not read with --path spiral; .* give --path circle or ellipse"),
        (["--alpha", "True", "--background", "1,1,1"], "^--background: not read with --alpha True"),
        (["--alpha", "True", "--frames", "drop"], "^--alpha True: mp4 has no alpha; leave out --frames drop"),
        (["--background", "1,2,256"], "^--background 1,2,256: give R,G,B from 0 to 255"),
        *[
            (
                ["--background", given],
                f"^--background: expected a colour as three numbers R,G,B, such as 255,0,0 for red, got '{given}'$",
            )
            for given in ("red", "#ff0000", "1,2", "1,2,3,4")
        ],
        (["--path", "circel"], "perhaps you meant circle"),
        (["--elevation", "90", "--path", "circle"], "^--elevation: must be less than 90"),
        (["--skip", "200"], "^--skip 200: must be less than --n_frames 200"),
        (["a", "b"], "^RUN: takes 1 value, got 2: 'a,b'; give 1"),
    ],
)
def test_options_that_do_not_go_together(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        highres_final_vis.main(argv)


# ---------------------------------------------------------------- frames


def test_chunks_are_halved_where_memory_runs_out():
    sizes = []

    def decode(x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x

    chunks = InChunks(decode, 8)
    x = torch.arange(13.0)[:, None]
    assert torch.equal(chunks(x), 2 * x) and sizes == [8, 4, 2, 2, 2, 2, 2, 2, 1]
    sizes.clear()
    assert torch.equal(chunks(x[:3]), 2 * x[:3]) and sizes == [2, 1]  # what worked is kept


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ValueError("a bug")])
def test_one_frame_that_does_not_fit(error):
    def decode(x):
        raise error

    with pytest.raises(type(error)):
        InChunks(decode, 4)(torch.ones(3, 1))


@pytest.mark.parametrize("make", [Affine, Latent])
def test_frames_are_the_views_of_the_asset(make):
    shown = red_ball(make())
    cameras = pose.ring(3, 1.8)
    made = [frame for some in Frames(shown, 64, 2).along(cameras, at_once=2) for frame in some]
    assert len(made) == 3
    for camera, (picture, depth) in zip(cameras, made):
        whole, far, _ = shown.view(camera, 32, subpixels=4, downscale=2)
        assert np.abs(picture - 255 * whole).max() <= 0.51 and np.allclose(depth, far, atol=1e-5)


@pytest.mark.parametrize("make", [Affine, Latent])
@pytest.mark.parametrize("color", [(0.0, 0.0, 0.0), (0.2, 0.6, 1.0)])
def test_a_background_is_exact_where_the_field_is_empty(make, color):
    shown = red_ball(make())
    (picture, _) = pictures(Frames(shown, 32, 2, color=color))
    wanted = np.rint(255 * np.array(color))
    assert (picture[:4] == wanted).all() and (picture[:, -4:] == wanted).all()
    assert (picture == wanted).all(axis=2).mean() > 0.4
    n = len(picture)
    assert np.abs(picture[n // 2, n // 2] / 255 - RED.numpy()).max() < 0.02


@pytest.mark.parametrize("make", [Affine, Latent])
def test_transparent_frames_have_no_halo(make):
    """Wherever the ball is seen at all it has its own colour, although the pictures are before white."""
    shown = red_ball(make())
    (picture, _) = pictures(Frames(shown, 32, 2, alpha=True))
    rgb, alpha = picture[..., :3] / 255, picture[..., 3]
    assert (alpha == 0).mean() > 0.4 and alpha[len(alpha) // 2, len(alpha) // 2] == 255
    edge = (alpha > 12) & (alpha < 230)
    assert edge.sum() > 20
    assert np.abs(rgb[edge] - RED.numpy()).max() < (0.03 if make is Affine else 0.08)


def test_fog_and_floaters_are_no_part_of_the_object():
    shown = red_ball(Affine())
    with torch.no_grad():
        shown.field.density[shown.field.density < 0] = 0.0  # softplus(-1) = 0.31 per unit: fog
        shown.field.density[0, 0, 1, 1, 1] = 60
    (picture, _) = pictures(Frames(shown, 32, 2, alpha=True))
    assert (picture[:4, :4, 3] == 0).all() and (picture[-4:, -4:, 3] == 0).all() and picture[16, 16, 3] == 255
    mask = torch.zeros_like(shown.field.density)
    shown.field.alpha_mask = mask
    shown.field.clear_fog()
    assert shown.field.alpha_mask is mask  # nothing is occupied in it: it stays


def test_a_field_of_nothing_but_fog_stays():
    field = a_field()
    with torch.no_grad():
        field.density.fill_(-1)
    field.clear_fog()
    assert field.alpha_mask is None


# ---------------------------------------------------------------- files


def frame(value, channels=3):
    picture = np.full((8, 8, channels), value, np.uint8)
    return HostCopy(picture, np.ones((8, 8), np.float32))


def write(folder, values, kind="mp4", keep=True, channels=3):
    with replacing(folder) as scratch, Film(scratch, 5, 30, kind, keep, (0.0, 2.0)) as film:
        for value in values:
            film.add(frame(value, channels))


def test_frames_of_another_call_are_replaced(tmp_path):
    out = tmp_path / "highres_3"
    write(out, [1, 2, 3], "gif")
    (out / "notes.txt").write_text("mine")
    write(out, [9])
    assert {p.name for p in out.iterdir()} == {"img", "img.mp4", "img_depth.mp4", "notes.txt"}
    assert [p.name for p in (out / "img").iterdir()] == ["005.png"] and (iio.imread(out / "img" / "005.png") == 9).all()
    assert os.listdir(tmp_path) == ["highres_3"]
    write(out, [1, 2], keep=False)
    assert {p.name for p in out.iterdir()} == {"img.mp4", "img_depth.mp4", "notes.txt"}


def test_a_failure_leaves_the_old_result(tmp_path):
    out = tmp_path / "highres_3"
    write(out, [7])
    with pytest.raises(ZeroDivisionError), replacing(out) as scratch, Film(scratch, 0, 30, "mp4", True, (0, 2)) as film:
        film.add(frame(1))
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["highres_3"] and os.listdir(out / "img") == ["005.png"]


def test_what_a_killed_process_left_is_cleared(tmp_path, monkeypatch):
    """Killed before the old folder was taken away, and between the two renames."""
    out = tmp_path / "highres_3"
    write(out, [7])
    (tmp_path / ".highres_3.999999999.tmp" / "img").mkdir(parents=True)
    out.rename(tmp_path / ".highres_3.old")
    (tmp_path / ".highres_3.old" / "mine").touch()
    write(out, [8, 9])
    assert os.listdir(tmp_path) == ["highres_3"]
    assert sorted(os.listdir(out / "img")) == ["005.png", "006.png"] and (out / "mine").exists()
    monkeypatch.setattr("my.run_dir.is_alive", lambda pid: True)
    (tmp_path / ".highres_3.1.tmp").mkdir()
    write(out, [1])
    assert (tmp_path / ".highres_3.1.tmp").exists()  # another call is at work


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_are_transparent(tmp_path, kind):
    out = tmp_path / "o"
    with replacing(out) as scratch, Film(scratch, 0, 25, kind, False, (0.0, 2.0)) as film:
        for i in range(3):
            picture = np.zeros((256, 256, 4), np.uint8)
            picture[50:100, 50 : 100 + 20 * i] = picture[150:160, 20:30] = (200, 30, 60, 255)
            film.add(HostCopy(picture, np.ones((8, 8), np.float32)))
    with Image.open(out / f"img.{kind}") as file:
        video = np.stack([np.asarray(part.convert("RGBA")) for part in ImageSequence.Iterator(file)])
    assert video.shape == (3, 256, 256, 4) and (video[:, 0, 0, 3] == 0).all()
    assert (video[2, 60, 130] == (200, 30, 60, 255)).all() and video[1, 60, 130, 3] == 0
    assert iio.improps(out / f"img_depth.{kind}", plugin="pillow").shape[-2:-1] == (512,)


def test_a_video_that_was_cut_is_noticed(tmp_path):
    for kind in ("gif", "webp"):
        path = tmp_path / f"a.{kind}"
        with pytest.raises(media.RunError, match="not all of 1 frames"), media.VideoWriter(path) as video:
            video.append(np.zeros((4, 4, 3)))
            video.writer.close()
            video.scratch.write_bytes(video.scratch.read_bytes()[:-2])
            video.writer = None
        assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the command


def test_the_command_on_a_published_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    field = a_field(grid=8)
    with torch.no_grad():
        field.density.fill_(-60)[..., 2:6, 2:6, 2:6] = 60
    save(tmp_path / "ckpt" / "step_30.pt", tensors_of(field))
    highres_final_vis.main(
        [*FLAGS, "--path", "circle", "--n_frames", "5", "--background", "0,128,255", "--factor", "2"]
    )
    out = tmp_path / "highres_30"
    assert sorted(os.listdir(out / "img")) == [f"{i:03d}.png" for i in range(5)]
    picture = iio.imread(out / "img" / "002.png")
    assert (
        picture.shape == (16, 16, 3) and (picture[0] == (0, 128, 255)).all() and picture[8, 8].tolist() != [0, 128, 255]
    )
    assert (
        "done: highres_30/img.mp4 and highres_30/img_depth.mp4, single frames in highres_30/img"
        in capsys.readouterr().out
    )
    highres_final_vis.main(
        [*FLAGS, "--path", "circle", "--n_frames", "2", "--alpha", "True", "--format", "webp", "--frames", "drop"]
    )
    assert {p.name for p in out.iterdir()} == {"img.webp", "img_depth.webp"}
    assert capsys.readouterr().out.endswith("done: highres_30/img.webp and highres_30/img_depth.webp\n")
