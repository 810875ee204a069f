"""What the viewer shows, without a browser: cameras, pictures, the fields of a run over time; one line for mistakes."""

import math
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import asset
import pose
import view
from my import checkpoint, config
from my.errors import RunError, UserError
from my.media import depth_image, to_uint8
from options.sjc import SJCConfig
from sjc import SJC
from tiny import Affine
from tiny import config as tiny_config
from viewer import camera, frames, moments, server
from viewer.frames import Frames, LatentColors, View
from viewer.moments import Moments
from voxnerf import snapshot

HALF = math.sqrt(0.5)


@pytest.fixture
def run(tmp_path):
    """The folder of a tiny run at step 4 of 6, its density the number of steps, and snapshots of steps 1 to 3."""
    cfg = tiny_config()
    config.write(cfg, tmp_path / "full_config.yml")
    optimisation = SJC(cfg, Affine())
    for step in range(1, 5):
        optimisation.step(step - 1)
        with torch.no_grad():
            optimisation.field.density.fill_(step)
        if step < 4:
            snapshot.write(tmp_path, *snapshot.taken(optimisation.field, step))
    optimisation.save(tmp_path / "ckpt", 4)
    return tmp_path


def opened(run):
    source = asset.find(run)
    loaded = asset.load(source, "cpu")
    return Frames(loaded, Moments(loaded, source))


# ---------------------------------------------------------------- cameras


def test_a_browsers_camera_by_hand():
    """Looking along +x from (-R, 0, 0): OpenCV's x, y, z are +z, -y, +x, half a turn round (1, 0, 1)."""
    got = camera.camera_of((0, HALF, 0, HALF), (-1.5, 0, 0), math.pi / 2, 100, 100)
    assert np.allclose(got.c2w, pose.look_at((-1.5, 0, 0))) and got.fov == pytest.approx(90)
    ahead = camera.camera_of((1, 0, 0, 0), (0, 0, -2), 1.0, 10, 10).c2w  # OpenCV's own axes: looking along +z
    assert np.allclose(ahead[:3, :3], np.diag([1, -1, -1])) and np.allclose(ahead[:3, 3], (0, 0, -2))


@pytest.mark.parametrize("eye", [(1.0, 0.4, -0.3), (-0.2, 1.1, 0.7), (0.3, -1.0, 0.9)])
def test_any_camera_of_a_browser(eye):
    """A quaternion of scipy, of the OpenCV camera, gives what `look_at` gives."""
    from scipy.spatial.transform import Rotation

    wanted = pose.look_at(eye)
    x, y, z, w = Rotation.from_matrix(wanted[:3, :3] * (1, -1, -1)).as_quat()
    assert np.allclose(camera.camera_of((2 * w, 2 * x, 2 * y, 2 * z), eye, 1.0, 3, 4).c2w, wanted)


def test_angles_by_hand():
    """tan 45 degrees is 1: a picture that is twice as wide sees 2 atan 2 across, and one twice as high sees it down."""
    assert camera.camera_of((1, 0, 0, 0), (0, 0, 0), math.pi / 2, 100, 200).fov == pytest.approx(
        2 * math.degrees(math.atan(2))
    )
    assert camera.fov_down(90, 200, 100) == pytest.approx(2 * math.atan(2))
    assert camera.fov_down(90, 100, 200) == pytest.approx(math.pi / 2)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("chunk", [16384, 20])
def test_modes_show_what_the_asset_shows(run, monkeypatch, chunk):
    monkeypatch.setattr(frames, "CHUNK", chunk)  # 20 rays are two rows at a time
    made, at = opened(run), pose.spiral(5)[2]
    picture, depth, opacity = made.asset.view(at, 9)
    assert made.modes == ("picture", "depth", "opacity")
    shown = {mode: made.picture(View(at, 9, 9, mode, 4)) for mode in made.modes}
    assert np.array_equal(shown["picture"], to_uint8(picture))
    assert np.array_equal(shown["depth"], depth_image(depth, *made.asset.depth_range))
    assert np.array_equal(shown["opacity"], to_uint8(np.repeat(opacity[..., None], 3, axis=2)))
    assert all(image.dtype == np.uint8 and image.std() > 0 for image in shown.values())


def test_a_wide_picture_is_the_middle_of_a_square_one(run):
    made, at = opened(run), pose.spiral(5)[2]
    wide, square = (made.picture(View(at, height, 16, "picture", 4)) for height in (8, 16))
    assert wide.shape == (8, 16, 3) and np.array_equal(wide, square[4:12])


def test_a_plain_background_is_stretched_both_ways(run):
    made = opened(run)
    made.asset.backgrounds = torch.arange(36.0).view(1, 1, 6, 6)
    got = made.asset.background(0, 8, width=4).view(8, 4)
    rows, columns = (0, 1, 2, 2, 3, 3, 4, 5), (0, 1, 4, 5)
    assert got.tolist() == [[6 * i + j for j in columns] for i in rows]


def test_a_picture_can_be_stopped(run, monkeypatch):
    monkeypatch.setattr(frames, "CHUNK", 9)
    made, calls = opened(run), []
    assert made.picture(View(pose.spiral(5)[2], 9, 9, "picture", 4), lambda: len(calls) == 3 or calls.append(1)) is None
    assert len(calls) == 3 and not made.seconds  # after three of nine rows


def test_latents_are_decoded_or_shown(tmp_path, tiny_sd):
    cfg = SJCConfig(sd={"checkpoint": str(tiny_sd), "prompt": "a blue duck"}, n_steps=1, vox={"grid_size": 4})
    config.write(cfg, tmp_path / "full_config.yml")
    SJC(cfg, asset.make_adapter(cfg, "cpu")).save(tmp_path / "ckpt", 1)
    made, at = opened(tmp_path), pose.spiral(5)[2]
    assert made.modes == frames.MODES and made.factor == 2
    made.warm_up()
    assert set(made.seconds) == set(frames.MODES)
    latent, picture = (made.picture(View(at, 16, 24, mode, 1)) for mode in ("latent", "picture"))
    assert latent.shape == picture.shape == (16, 24, 3)
    coarse = made.asset.render(pose.Camera(at.c2w, at.fov), 8)  # the latents that a picture of 16 x 16 is decoded from
    decoded = made.asset.adapter.decode(coarse.color[None])[0].permute(1, 2, 0)
    assert np.array_equal(made.picture(View(at, 16, 16, "picture", 1)), to_uint8(decoded.detach().numpy()))


def test_colours_of_latents_are_exact_where_the_encoder_is_affine():
    A = torch.tensor([[0.5, -1.0, 0.2], [1.0, 0.3, 0.0], [0.0, 0.4, -0.7], [0.1, 0.1, 0.9]])

    def encode(pictures):
        return torch.einsum("co,bohw->bchw", A, pictures)[..., ::4, ::4] + 0.25

    adapter = SimpleNamespace(device="cpu", picture_size=32, data_shape=(4, 8, 8), encode=encode)
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    got = LatentColors(SimpleNamespace(adapter=adapter))(encode(pictures)[0])
    assert torch.allclose(got, pictures[0][:, ::4, ::4], atol=1e-5)


@pytest.mark.parametrize(
    "seconds, wanted",
    [
        ({}, (128, "picture")),  # nothing is known yet
        ({"picture": 1e-6, "latent": 1e-6}, (128, "picture")),
        ({"picture": 1e-5, "latent": 1e-6}, (64, "picture")),  # 128 x 256 take 0.33 s, a quarter of them 0.08 s
        ({"picture": 1e-4, "latent": 1e-6}, (128, "latent")),
        ({"picture": 1e-3, "latent": 1e-5}, (64, "latent")),
        ({"picture": 1e-3, "latent": 1e-3}, (32, "latent")),  # the least there is
    ],
)
def test_what_fits_the_time_of_a_drag(run, seconds, wanted):
    made = opened(run)
    made.modes, made.seconds = frames.MODES, seconds
    got = made.quick(View(pose.spiral(5)[2], 128, 256, "picture", 4), 0.1)
    assert (got.height, got.mode) == wanted and got.width == 2 * got.height


# ---------------------------------------------------------------- over time


def test_the_moments_of_a_run(run):
    made = opened(run)
    assert made.moments.steps() == [1, 2, 3, 4]
    for step in (2, 4, 1, 3):
        assert (made.moments.at(step).density == step).all()
    at = pose.spiral(5)[2]
    assert not np.array_equal(*(made.picture(View(at, 9, 9, "opacity", step)) for step in (1, 4)))


def test_a_run_that_grows_and_loses_files(run):
    made = opened(run)
    field = made.moments.at(3)
    snapshot.write(run, *snapshot.taken(field, 5))
    SJC(made.asset.cfg, Affine()).save(run / "ckpt", 6)
    assert made.moments.steps() == [1, 2, 3, 4, 5, 6] and (made.moments.at(5).density == 3).all()
    shutil.rmtree(run / "fields")
    assert made.moments.steps() == [3, 4, 5, 6] and made.moments.at(3) is field  # what was shown can be shown again
    with pytest.raises(RunError, match="step 2: its file is gone; choose another"):
        made.moments.at(2)


def test_few_fields_are_kept(run, monkeypatch):
    monkeypatch.setattr(moments, "MOST_BYTES", 1)
    made = opened(run)
    for step in (1, 2):
        made.moments.at(step)
    assert list(made.moments.fields) == [2]


def test_a_damaged_snapshot_is_refused_and_the_others_are_shown(run):
    made, path = opened(run), snapshot.path_of(run, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match="delete this file"):
        made.picture(View(pose.spiral(5)[2], 9, 9, "picture", 2))
    assert made.picture(View(pose.spiral(5)[2], 9, 9, "picture", 3)) is not None


class Control(SimpleNamespace):
    """A slider, a choice or a text of a page."""

    def on_update(self, call):
        self.call = call

    on_click = on_update


def visitor_of(made, image=(480, 640)):
    """A visitor whose page is not there, and the list of their changes."""
    gui = SimpleNamespace(
        add_markdown=lambda text: Control(content=text),
        add_slider=lambda _, least, most, step, value, hint: Control(min=least, max=most, step=step, value=value),
        add_button_group=lambda _, options: Control(value=options[0]),
    )
    at = Control(wxyz=(0, HALF, 0, HALF), position=(-1.5, 0, 0), fov=1.0, image_height=image[0], image_width=image[1])
    scene = SimpleNamespace(set_background_image=lambda *_, **__: None)
    changes = []
    client = SimpleNamespace(gui=gui, camera=at, scene=scene, flush=lambda: None)
    return server.Visitor(client, made, 96, changes.append), changes


def test_what_a_visitor_wants_to_see(run):
    visitor, changes = visitor_of(opened(run))
    got = visitor.view()
    assert (got.height, got.width, got.mode, got.step) == (96, 128, "picture", 4)
    assert np.allclose(got.camera.c2w, pose.look_at((-1.5, 0, 0)))
    visitor.time.value, visitor.mode.value, visitor.size.value = 40, "depth", 64
    visitor.time.call(None)
    got = visitor.view()
    assert (got.height, got.mode, got.step) == (64, "depth", 2) and changes == [visitor]  # 40 % of 6 steps is 2.4


def test_a_visitor_follows_the_run_from_its_end_only(run):
    made = opened(run)
    (follows, changes), (stays, _) = visitor_of(made), visitor_of(made)
    assert (follows.time.min, follows.time.max) == (17, 67) and follows.step == 4
    stays.time.value = 34
    SJC(made.asset.cfg, Affine()).save(run / "ckpt", 6)
    for visitor in (follows, stays):
        visitor.show_steps(made.moments.steps())
    assert (follows.step, stays.step) == (6, 2) and follows.time.max == stays.time.max == 100
    assert changes == [follows]
    follows.show_steps(made.moments.steps())
    assert changes == [follows]  # nothing new, nothing to do


def test_what_is_said_beside_the_picture(run):
    visitor, _ = visitor_of(opened(run))
    visitor.show(None, visitor.view()._replace(step=2))
    assert visitor.text.content == "picture, step 2 of 6; the run is at 4"
    visitor.problem = "its file is gone"
    visitor.say()
    assert visitor.text.content.endswith("at 4\n\n**its file is gone**")


# ---------------------------------------------------------------- mistakes


def refused(run, port=0, host="127.0.0.1"):
    with pytest.raises((UserError, RunError)) as error:
        view.main([str(run), "--port", str(port), "--host", host, "--device", "cpu"])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_runs_that_cannot_be_shown(run, tmp_path):
    assert "nowhere: no such file or folder; give the folder of a run" in refused(tmp_path / "nowhere")
    newest = checkpoint.latest(run / "ckpt")
    whole = (newest / checkpoint.TENSORS).read_bytes()
    for one in checkpoint.checkpoints(run / "ckpt"):
        (one / checkpoint.TENSORS).write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in refused(run)
    shutil.rmtree(run / "ckpt")
    assert "has no checkpoint" in refused(run)
    optimisation = SJC(tiny_config(), Affine())
    with torch.no_grad():
        optimisation.field.color[..., 0] = math.nan
    tensors = {f"field/{name}": tensor for name, tensor in optimisation.field.state_dict().items()}
    checkpoint.save(run / "ckpt", 5, tensors, {})  # as an earlier version may have
    assert "its color has numbers that are not finite" in refused(run)


def test_ports_and_addresses_that_cannot_be_had(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = refused(run, port)
        assert (
            words
            == f"--port {port}: another program listens there, at 127.0.0.1; give another, such as --port {port + 1}"
        )
    assert "--host 203.0.113.1: " in refused(run, host="203.0.113.1")
    assert "no such address" in refused(run, host="no.such.invalid")
