"""NeRF training: rays, grids that grow, a scene that is known, checkpoints, and whole runs of run_nerf.py."""

import json
import math
import os
import subprocess
import sys
from itertools import count
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import pose
import run_nerf
from box_scene import CUBE, H, W, box_field, cfg_of, flags, poses, train, write
from my import checkpoint, config
from my.errors import UserError, run_main
from my.media import read_video
from my.run_dir import read_history
from voxnerf import nerf as nerf_module
from voxnerf.likeness import psnr, ssim
from voxnerf.nerf import NeRF, find_empty_space, grid_shape, occupied_box, optimise, resample
from voxnerf.pixels import PixelCameras
from voxnerf.rays import pixel_rays
from voxnerf.render import render_image
from voxnerf.scene import load_scene
from voxnerf.state import parameter_names

ROOT = Path(run_nerf.__file__).parent


# ---------------------------------------------------------------- rays and batches


def test_rays_of_any_pixels_are_those_of_whole_images():
    c2w = poses(3)
    K = np.stack([pose.intrinsics(H, W, fov) for fov in (40, 50, 60)])
    whole = [pixel_rays(H, W, *camera) for camera in zip(K, c2w)]
    cameras = PixelCameras(torch.from_numpy(K), torch.from_numpy(c2w))
    camera, y, x = torch.tensor([[2, 0, 1, 2], [0, 13, 5, 7], [15, 3, 0, 7]])
    for rays, each in zip(cameras.rays(camera, y[:, None], x[:, None]), zip(*whole)):
        want = torch.stack(each)[camera, y * W + x][:, None]
        assert rays.dtype == torch.float32 and rays.shape == want.shape and torch.allclose(rays, want, atol=1e-7)


def test_batch_pairs_rays_with_their_pixels(scene):
    """An image whose pixels tell where they are."""
    n = len(scene.images)
    frame, y, x = torch.meshgrid(torch.arange(n), torch.arange(H), torch.arange(W), indexing="ij")
    nerf = NeRF(cfg_of(), scene._replace(images=torch.stack([frame, y, x], dim=-1).to(torch.uint8)))
    rays_o, rays_d, colors, bg = nerf.draw_batch(3)
    where = (colors * 255).round().long().unbind(-1)
    want_o, want_d = nerf.cameras.rays(where[0], where[1][:, None], where[2][:, None])
    assert torch.equal(rays_o, want_o[:, 0]) and torch.equal(rays_d, want_d[:, 0])
    assert all(len(i.unique()) == size for i, size in zip(where, (n, H, W)))  # from all over
    assert (bg == 1).all()


def test_rays_of_a_pixel_cover_it(scene):
    """Three rays per pixel edge: each within a ninth of its own, anywhere in it, and side by side in the batch."""
    n = len(scene.images)
    frame, y, x = torch.meshgrid(torch.arange(n), torch.arange(H), torch.arange(W), indexing="ij")
    nerf = NeRF(cfg_of(subpixels=3), scene._replace(images=torch.stack([frame, y, x], dim=-1).to(torch.uint8)))
    rays_o, rays_d, colors, bg = nerf.draw_batch(3)
    assert rays_o.shape == rays_d.shape == (256 * 9, 3) and colors.shape == bg.shape == (256, 3)
    frame, y, x = (colors * 255).round().long().unbind(-1)
    at_camera = (scene.K[0] @ scene.c2w[frame, :3, :3].mT @ rays_d.double().view(256, 9, 3).mT).mT  # (256, 9, 3)
    passed = at_camera[..., :2] / at_camera[..., 2:] - torch.stack([x, y], dim=-1)[:, None]  # from the pixel's centre
    parts = (passed + 0.5) * 3 - torch.tensor([[i % 3, i // 3] for i in range(9)])
    assert -1e-3 < parts.min() < 0.02 and 0.98 < parts.max() < 1 + 1e-3
    assert not torch.equal(nerf.draw_batch(4)[1], rays_d)


def test_pixels_are_the_mean_of_their_rays(scene, monkeypatch):
    """In the loss, before backgrounds that differ from pixel to pixel, and in what is rendered."""
    scene = scene._replace(alpha=torch.zeros_like(scene.alpha))
    nerf = NeRF(cfg_of(subpixels=2), scene)
    nerf.field = box_field()
    nerf.optimizer = nerf_module.new_adam(nerf.field, 0.0, "auto")
    rays_o, rays_d, colors, bg = nerf.draw_batch(5)
    with torch.no_grad():
        seen = [nerf_module.render_rays(nerf.field, rays_o[i::4], rays_d[i::4], bg).color for i in range(4)]
    want = (sum(seen) / 4 - colors).square().mean()
    monkeypatch.setattr(NeRF, "keep_to_schedule", lambda *args: None)
    torch.testing.assert_close(nerf.step(5, 0.0)["loss"], want)
    picture, depth = nerf.render(scene.K[0], scene.c2w[0], H, W)
    fine = render_image(nerf.field, scene.K[0], scene.c2w[0], H, W, subpixels=2)
    assert picture.shape == (H, W, 3) and depth.shape == (H, W)
    assert picture[5, 7] == pytest.approx(fine.color[:, 10:12, 14:16].mean(dim=(1, 2)).tolist(), abs=1e-6)
    assert depth[5, 7] == pytest.approx(fine.depth[10:12, 14:16].mean().item(), abs=1e-5)


def test_transparent_pixels_stand_before_random_colours(scene):
    """Of a pixel that is 0.6 on white at alpha 0.6, 0.4 is white: 0.2 + 0.4 bg on any other."""
    images, alpha = torch.full_like(scene.images, 51 * 3), torch.full_like(scene.alpha, 51 * 3)
    _, _, colors, bg = NeRF(cfg_of(), scene._replace(images=images, alpha=alpha)).draw_batch(3)
    torch.testing.assert_close(colors, 0.2 + 0.4 * bg)
    assert bg.min() < 0.1 and bg.max() > 0.9 and not torch.equal(bg[:, 0], bg[:, 1])


def test_draws_depend_on_seed_and_step_alone(scene):
    a, b, c = (NeRF(cfg_of(seed=seed), scene) for seed in (0, 0, 1))
    colors = [x.draw_batch(step)[2] for x, step in ((a, 4), (b, 4), (a, 5), (c, 4))]
    assert torch.equal(colors[0], colors[1])
    assert not torch.equal(colors[0], colors[2]) and not torch.equal(colors[0], colors[3])


def test_share_of_rays_through_a_box():
    """A camera at distance 2.5 that sees 50 degrees of height, and one that looks away."""
    K, c2w = torch.from_numpy(pose.intrinsics(100, 100, 50)), torch.from_numpy(poses(1, lift=0.0))
    away = c2w[0] @ torch.diag(torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
    one, both = (PixelCameras(K.repeat(n, 1, 1), poses_) for n, poses_ in ((1, c2w), (2, torch.stack([c2w[0], away]))))
    box = torch.from_numpy(0.5 * CUBE)  # its front is 2 away, and covers a square of 0.5 / (2 tan 25 deg)
    covered = (0.25 / math.tan(math.radians(25))) ** 2
    assert one.share_through(box, [(100, 100)], n=100) == pytest.approx(covered, rel=0.03)
    assert both.share_through(box, [(100, 100)] * 2, n=100) == pytest.approx(covered / 2, rel=0.03)


def test_scene_in_other_units_is_refused(scene):
    far = scene.c2w.clone()
    far[:, :3, 3] *= 100
    with pytest.raises(
        UserError,
        match=r"^0.0% of the training views' rays .* half edge 1 round .* 260 to 305 away .*"
        r"larger --model.bbox_len$",
    ):
        NeRF(cfg_of(), scene._replace(c2w=far))
    NeRF(cfg_of(model={"bbox_len": 100.0}), scene._replace(c2w=far))


def test_cameras_that_look_away_are_refused(scene, capsys):
    """Poses in OpenCV's axes: y and z columns of the other sign. Cameras stand 2.5 and more away, in x or y."""
    turned = scene._replace(c2w=scene.c2w * torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    assert PixelCameras(scene.K, scene.c2w).facing() == pytest.approx(1)
    assert PixelCameras(turned.K, turned.c2w).facing() == pytest.approx(-1)
    for bbox_len in (1.0, 2.0):
        with pytest.raises(
            UserError,
            match="^the cameras look away from the field: are the poses in the axes of "
            "OpenCV or COLMAP.* 2nd and 3rd columns",
        ):
            NeRF(cfg_of(model={"bbox_len": bbox_len}), turned)
    assert not capsys.readouterr().err
    NeRF(cfg_of(model={"bbox_len": 3.0}), turned)  # a room is seen from within
    assert "the cameras stand in the field and look away from its middle" in capsys.readouterr().err
    NeRF(cfg_of(model={"bbox_len": 3.0}), scene)
    assert not capsys.readouterr().err


def test_cameras_that_look_away_from_a_scene_beside_the_origin(scene):
    """Half of a ring about (20, 0, 0) looks away from the origin; the others do not: it is no matter of axes."""
    beside = scene.c2w.clone()
    beside[:, 0, 3] += 20
    with pytest.raises(UserError, match="centre and scale the poses of the scene"):
        NeRF(cfg_of(), scene._replace(c2w=beside))


def test_number_of_steps(scene):
    """12 images of 14 x 16 are 2688 pixels: 3 epochs in batches of 1000 are 8.064 steps."""
    assert NeRF(cfg_of(n_epoch=3, bs=1000), scene).n_steps == 9


# ---------------------------------------------------------------- grids


def test_grid_shape_keeps_the_number_of_voxels():
    assert grid_shape([[-1, -1, -1], [1, 1, 1]], 12) == [12, 12, 12]
    assert grid_shape([[0, 0, 0], [4, 2, 1]], 8) == [16, 8, 4]  # 512 cubes of edge 1/4
    assert grid_shape([[0, 0, 0], [1000, 1, 1]], 2)[1:] == [1, 1]


def test_resampling_keeps_a_linear_function():
    """Values x + 10 y + 100 z on 4 x 5 x 6 voxels of edge 1, read on a part of them at twice the rate."""

    def linear(x, y, z):
        return (z[:, None, None] * 100 + y[:, None] * 10 + x)[None, None]

    centres = [torch.arange(n) + 0.5 for n in (4, 5, 6)]
    box, part = np.array([[0, 0, 0], [4, 5, 6.0]]), np.array([[1, 1, 1], [3, 4, 5.0]])
    fine = [1 + (torch.arange(n) + 0.5) / 2 for n in (4, 6, 8)]
    assert torch.allclose(resample(linear(*centres), box, part, [4, 6, 8]), linear(*fine), rtol=1e-5)
    assert torch.allclose(resample(linear(*centres), box, box, [4, 5, 6]), linear(*centres), rtol=1e-5)


def test_resampling_goes_on_beyond_the_outermost_centres():
    grid = torch.tensor([1.0, 3.0]).view(1, 1, 1, 1, 2)  # centres at 0.5 and 1.5
    box = np.array([[0, 0, 0], [2.0, 1, 1]])
    assert resample(grid, box, box, [4, 1, 1]).flatten().tolist() == [1, 1.5, 2.5, 3]


def test_occupied_box():
    mask = torch.zeros(1, 1, 6, 5, 4)  # Z, Y, X
    mask[0, 0, 2:4, 4, 1] = 1
    assert occupied_box(mask, np.array([[0, 0, 0], [4, 5, 6.0]])).tolist() == [[1, 4, 2], [2, 5, 4]]
    assert occupied_box(mask, np.array([[-2, 0, 0], [6, 5, 6.0]]))[:, 0].tolist() == [0, 2]


def test_field_is_the_same_after_it_has_grown(scene):
    """Twice the voxels per edge: the old values, interpolated; the optimizer starts afresh."""
    nerf = NeRF(cfg_of(), scene)
    with torch.no_grad():
        nerf.field.density.normal_(generator=torch.Generator().manual_seed(0))
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    nerf.field.density.data, old = resample(nerf.field.density.data, CUBE, CUBE, [4] * 3), nerf.field
    with torch.no_grad():
        nerf.grow(0.25)  # as many voxels as it has: nothing changes
        assert torch.allclose(nerf.field.sigma(points), old.sigma(points)) and nerf.field is not old
        nerf.grow(1.0)
    assert nerf.field.density.shape == (1, 1, 16, 16, 16) and nerf.field.step_size == 2 / 16
    assert not any(x.any() for state in nerf.optimizer.state.values() for x in state.values())
    assert nerf.optimizer.param_groups[0]["params"][0] is next(nerf.field.parameters())


def test_growth_crops_to_what_is_occupied(scene):
    nerf = NeRF(cfg_of(), scene)  # 4^3 voxels of edge 1/2
    with torch.no_grad():
        nerf.field.density[..., 1, 2, :] = 60  # z from -0.5 to 0, y from 0 to 0.5, x all along
        find_empty_space(nerf.field)
        nerf.grow(1.0)
    assert nerf.box.tolist() == [[-1, -0.5, -1], [1, 1, 0.5]]  # and a voxel round it
    assert nerf.field.density.shape[2:] == tuple(grid_shape(nerf.box, 16)[::-1])
    assert nerf.field.alpha_mask.shape == nerf.field.density.shape and nerf.field.alpha_mask.any()


def test_harmonics_come_with_growth(scene, monkeypatch):
    """At the first growth that is late enough; what is seen then stays the same."""
    monkeypatch.setattr(nerf_module, "GROWTH", ((0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.5)))
    monkeypatch.setattr(nerf_module, "HARMONICS", 0.5)
    nerf = NeRF(cfg_of(bs=672, view_dependent=True), scene)  # 4 steps
    seen = [nerf.field.color.shape[1]]
    for _ in optimise(nerf):
        seen.append(nerf.field.color.shape[1])
    assert seen == [3, 3, 3, 27, 27]
    nerf = NeRF(cfg_of(view_dependent=True), scene)
    points, rays_d = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(1)) - 0.5
    before = nerf.field.features(points, rays_d)
    nerf.grow(0.25)
    assert nerf.field.view_dependent
    torch.testing.assert_close(nerf.field.features(points, rays_d / rays_d.norm(dim=1, keepdim=True)), before)


def test_empty_field_gets_no_mask(scene):
    nerf = NeRF(cfg_of(), scene)
    find_empty_space(nerf.field)
    assert nerf.field.alpha_mask is None
    nerf.grow(0.5)
    assert nerf.box.tolist() == CUBE.tolist() and nerf.field.density.shape[2:] == (8, 8, 8)


# ---------------------------------------------------------------- schedule


def test_schedule_is_a_function_of_progress(scene, monkeypatch):
    monkeypatch.setattr(nerf_module, "GROWTH", ((0.0, 0.25), (0.5, 0.5), (0.75, 1.0)))
    monkeypatch.setattr(nerf_module, "MASKS", (0.6,))
    monkeypatch.setattr(nerf_module, "LR_FACTORS", {"density": 2.0})
    nerf = NeRF(cfg_of(bs=672, lr=0.5), scene)  # 4 steps
    seen = []
    for _step, progress, _ in optimise(nerf):
        lr = {name: group["lr"] for name, group in zip(parameter_names(nerf.field), nerf.optimizer.param_groups)}
        seen.append((progress, nerf.field.density.shape[-1], nerf.n_events, lr["d_scale"], lr["density"]))
    assert [row[:3] for row in seen] == [(0.25, 4, 0), (0.5, 4, 0), (0.75, 8, 1), (1, 16, 3)]
    assert [row[3] for row in seen] == pytest.approx([0.5 * 0.1**p for p in (0, 0.25, 0.5, 0.75)])
    assert [row[4] for row in seen] == pytest.approx([2 * row[3] for row in seen])


def test_minutes_squeeze_the_run(scene, monkeypatch):
    """A clock that ticks 6 s each time it is read: a minute is over after 9 of the 8400 steps."""
    monkeypatch.setattr(nerf_module, "WARM_UP", 3)
    ticks = count(0, 6)
    nerf = NeRF(cfg_of(n_epoch=100, bs=32, max_minutes=1), scene, clock=lambda: next(ticks))
    done = train(nerf)
    assert nerf.n_steps == 8400 and [step for step, *_ in done] == list(range(1, 10))
    assert [progress for _, progress, _ in done] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
    assert nerf.field.density.shape[-1] == 16  # it has grown nevertheless


def test_a_slow_start_masks_and_crops_nothing(scene):
    """Nine steps in all, as above: too few to know what is empty."""
    ticks = count(0, 6)
    nerf = NeRF(cfg_of(n_epoch=100, bs=32, max_minutes=1), scene, clock=lambda: next(ticks))
    train(nerf)
    assert nerf.n_events == 0 and nerf.field.alpha_mask is None and nerf.field.density.shape[-1] == 4


def test_a_run_takes_a_step_however_few_its_minutes(scene):
    ticks = count()  # a second each
    nerf = NeRF(cfg_of(max_minutes=0.001), scene, clock=lambda: next(ticks))
    assert [(step, progress) for step, progress, _ in train(nerf)] == [(1, 1.0)]


def test_steps_end_a_run_within_its_minutes(scene):
    nerf = NeRF(cfg_of(bs=672, max_minutes=1), scene, clock=lambda: 0.0)
    assert [progress for _, progress, _ in train(nerf)] == [0.25, 0.5, 0.75, 1]


# ---------------------------------------------------------------- a scene that is known


def test_recovers_a_known_scene(scene, test_scene):
    nerf = NeRF(cfg_of(n_epoch=24), scene)
    train(nerf)
    rows = nerf.evaluate(test_scene)
    assert [row["name"] for row in rows] == test_scene.names
    assert min(row["psnr"] for row in rows) > 30 and min(row["ssim"] for row in rows) > 0.98
    assert np.prod(nerf.box[1] - nerf.box[0]) < 8  # cropped


def test_views_are_what_was_measured(scene, test_scene):
    nerf = NeRF(cfg_of(), scene)
    view = next(nerf.views(test_scene))
    assert view.truth.shape == view.picture.shape == (H, W, 3) and view.depth.shape == (H, W)
    assert np.abs(view.picture - 1).max() < 0.01 and np.abs(view.depth - 10).max() < 0.5  # nothing there yet
    error = np.mean((view.truth / 255.0 - view.picture) ** 2)
    assert view.psnr == pytest.approx(-10 * math.log10(error), abs=1e-4)


def test_psnr_and_ssim_by_hand():
    """An error of 0.1 everywhere is 20 dB, none counts as 100 dB.

    Constants a and b have SSIM (2ab + C1) / (a^2 + b^2 + C1), with C1 = 0.01^2.
    """
    assert psnr(torch.tensor(0.01)).item() == pytest.approx(20) and psnr(torch.tensor(0.0)).item() == 100
    a, b = torch.full((12, 13, 3), 0.2), torch.full((12, 13, 3), 0.6)
    assert ssim(a, b) == pytest.approx((0.24 + 1e-4) / (0.4 + 1e-4), rel=1e-3)
    assert ssim(a, a) == pytest.approx(1) and math.isnan(ssim(a[:10], a[:10]))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("stop", [1, 4, 9])  # the coarse grid; masked; cropped and grown
@pytest.mark.parametrize("options", [{}, {"view_dependent": True, "subpixels": 2}])
def test_resumed_training_ends_the_same(scene, tmp_path, monkeypatch, stop, options):
    monkeypatch.setattr(nerf_module, "GROWTH", ((0.0, 0.5), (0.5, 1.0)))
    monkeypatch.setattr(nerf_module, "MASKS", (0.2,))
    cfg = cfg_of(bs=269, model={"density_shift": -1.0, "grid_size": 10}, **options)  # 10 steps, and soon a mask
    straight, stopped = NeRF(cfg, scene), NeRF(cfg, scene)
    losses = [float(stats["loss"]) for _, _, stats in train(straight)]
    train(stopped, last_step=stop)
    stopped.save(tmp_path, stop)
    resumed = NeRF(cfg, scene)
    assert resumed.load(checkpoint.latest(tmp_path)) == stop
    assert [float(stats["loss"]) for _, _, stats in train(resumed, stop)] == losses[stop:]
    for a, b in zip(straight.field.state_dict().values(), resumed.field.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert straight.field.alpha_mask is not None and straight.field.step_size == resumed.field.step_size


def test_minutes_already_used_count(scene, tmp_path):
    clock = iter([0, 90, 1000, 1000, 1030])
    cfg = cfg_of(max_minutes=4)
    NeRF(cfg, scene, clock=lambda: next(clock)).save(tmp_path, 0)  # at 1.5 minutes
    resumed = NeRF(cfg, scene, clock=lambda: next(clock))
    resumed.load(checkpoint.latest(tmp_path))
    assert resumed.progress(0) == pytest.approx((1.5 + 0.5) / 4)


def test_checkpoint_of_another_grid_is_rebuilt(scene, tmp_path):
    nerf = NeRF(cfg_of(), scene)
    with torch.no_grad():
        nerf.box = CUBE * [0.5, 1, 0.25]
        nerf.grow(0.5)
    nerf.save(tmp_path, 0)
    other = NeRF(cfg_of(), scene)
    assert other.load(checkpoint.latest(tmp_path)) == 0
    assert other.field.density.shape == nerf.field.density.shape and np.array_equal(other.box, nerf.box)
    assert torch.equal(other.field.color, nerf.field.color) and other.field.alpha_mask is None


def test_checkpoint_of_another_command_is_refused(scene, tmp_path):
    checkpoint.save(tmp_path, 3, {"field/density": torch.zeros(1, 1, 2, 2, 2)}, {"left_out": []})
    with pytest.raises(UserError, match="the checkpoint is of run_sjc.py, and this run is of run_nerf.py"):
        NeRF(cfg_of(), scene).load(checkpoint.latest(tmp_path))


# ---------------------------------------------------------------- run_nerf.py


@pytest.fixture(scope="module")
def folder(scene, test_scene, tmp_path_factory):
    """The same scene on disk."""
    folder = write(tmp_path_factory.mktemp("data") / "box", scene, test_scene)
    assert torch.allclose(load_scene(folder, "train").K, scene.K)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and few frames of video."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_nerf, "N_FRAMES", 4)
    return tmp_path


def test_what_a_run_leaves(here, folder, capsys):
    run_nerf.main(flags(folder, "--test_every", "20"))
    assert {p.name for p in here.iterdir()} == {
        "full_config.yml",
        "history.json",
        "heartbeat.json",
        "starts.json",
        "ckpt",
        "pane",
        "test_42",
    }
    assert [p.name for p in checkpoint.checkpoints("ckpt")] == ["step_0000038", "step_0000042"]
    panes = sorted((here / "pane").iterdir())
    assert len(panes) == 10 and iio.imread(panes[-1]).shape == (H, 3 * W, 3)
    truth = iio.imread(folder / "test_00.png")
    assert (iio.imread(panes[-1])[:, :W] == truth).all()
    test = here / "test_42"
    assert {p.name for p in test.iterdir()} == {"view", "pane", "video.mp4", "metrics.json"}
    assert [p.name for p in sorted((test / "view").iterdir())] == ["000.png", "001.png", "002.png"]
    assert (iio.imread(test / "pane" / "000.png") == iio.imread(panes[-1])).all()  # the same field, the same view
    assert read_video(test / "video.mp4").shape == (4, 266, 2 * 304, 3)  # 14 x 32 pixels, 19 times as large
    heartbeat = json.loads((here / "heartbeat.json").read_text())
    assert heartbeat["done"] and heartbeat["step"] == heartbeat["n_steps"] == 42
    check_numbers(here, capsys.readouterr().out)


def check_numbers(here, printed):
    """The history, the metrics and the table of a run agree."""
    rows = {row["step"]: row for row in read_history("history.json")}
    assert {10, 20, 30, 40, 42} <= set(rows) and {"loss", "psnr", "minutes"} <= set(rows[10])
    assert rows[20]["test_psnr"] > 5 and "test_psnr" not in rows[30]
    assert list(rows) == sorted(rows) and rows[42]["minutes"] > rows[10]["minutes"] > 0
    metrics = json.loads((here / "test_42" / "metrics.json").read_text())
    assert [view["name"] for view in metrics["views"]] == ["./test_00.png", "./test_01.png", "./test_02.png"]
    assert metrics["mean"]["psnr"] == pytest.approx(np.mean([view["psnr"] for view in metrics["views"]]))
    assert metrics["step"] == 42 and 0 < metrics["mean"]["ssim"] <= 1
    assert f"mean           {metrics['mean']['psnr']:8.2f} {metrics['mean']['ssim']:6.4f}" in printed
    assert f"box: 12 training views of {W}x{H}, 3 test views" in printed and "done: test_42/pane" in printed


def test_stopped_run_is_resumed_to_the_same_end(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(run_nerf, "N_FRAMES", 2)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    monkeypatch.chdir(straight)
    run_nerf.main(flags(folder))
    monkeypatch.chdir(stopped)
    with monkeypatch.context() as patch:
        patch.setattr(run_nerf, "draw_pane", stop_at(21))
        with pytest.raises(KeyboardInterrupt):
            run_nerf.main(flags(folder))
    assert checkpoint.latest("ckpt").name == "step_0000017" and not Path("test_42").exists()
    run_nerf.main(["--resume", "True"])
    a, b = (load_file(run / "ckpt" / "step_0000042" / checkpoint.TENSORS) for run in (straight, stopped))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([{**row, "minutes": 0} for row in read_history(run / "history.json")] for run in (straight, stopped))
    assert a == b


def stop_at(last):
    """Draws no pane, and stops the run from the keyboard at step `last`."""

    def draw(path, *_):
        if path.stem == f"step_{last:07d}":
            raise KeyboardInterrupt

    return draw


def test_time_limited_run_ends_with_a_checkpoint(here, folder, capsys):
    run_nerf.main(flags(folder, "--max_minutes", "0.001", n_epoch=10000))
    step = checkpoint.step_of(checkpoint.latest("ckpt"))
    assert step < 420000 and (here / f"test_{step}" / "metrics.json").exists()
    heartbeat = json.loads((here / "heartbeat.json").read_text())
    assert heartbeat["done"] and heartbeat["n_steps"] == step


def test_resume_keeps_the_options_and_the_scene(here, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    cfg = run_nerf.read_config(["--scene", "box", "--lr", "0.5"])
    assert cfg.scene == str(folder)  # it holds in any folder
    monkeypatch.chdir(here)
    config.write(cfg, "full_config.yml")
    assert run_nerf.read_config(["--resume", "True"]).model_dump() == {**cfg.model_dump(), "resume": True}
    with pytest.raises(UserError, match="--resume True: --lr 0.1 .was 0.5.; .* ckpt_minutes, deterministic, device"):
        run_nerf.read_config(["--resume", "True", "--lr", "0.1"])


def test_published_defaults(here):
    cfg = run_nerf.read_config([])
    model = cfg.model
    assert (model.model_type, model.bbox_len, model.grid_size, model.step_ratio) == ("VoxRF", 1.5, 128, 0.5)
    assert (model.density_shift, model.ray_march_weight_thres, model.c) == (-10, 1e-4, 3)
    assert (cfg.scene, cfg.n_epoch, cfg.bs, cfg.lr) == ("lego", 2, 4096, 0.02)


@pytest.mark.parametrize("argv", [["-h"], ["--dry_run", "True"], ["--lr", "fast"]])
def test_light_commands_import_nothing_heavy(here, argv):
    code = (
        "import sys; import run_nerf; from my.errors import run_main\n"
        "try: run_main(run_nerf.main, sys.argv[1:])\n"
        "except SystemExit as e: print(e.code)\n"
        "print('MODULES', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert not {"torch", "torchmetrics", "imageio"} & set(done.stdout.splitlines()[-1].split())


def test_dry_run_writes_the_configuration_and_stops(here, folder, capsys):
    run_nerf.main(flags(folder, "--dry_run", "True"))
    assert [p.name for p in here.iterdir()] == ["full_config.yml"]
    kept = yaml.safe_load((here / "full_config.yml").read_text())
    assert kept.pop("made_by")["version"] and yaml.safe_load(capsys.readouterr().out) == kept


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--bs", "0"], ["--bs", "greater than 0"]),
        (["--grid_size", "9"], ["perhaps you meant --model.grid_size"]),
        (["--model.c", "4"], ["--model.c: expected one of 3"]),
        (["--device", "warp"], ["--device warp: not available here; use auto, cpu"]),
        (["--scene", "nosuch", "--device", "cpu"], ["--scene nosuch: looked for a folder at", "none is there"]),
        (["--downscale", "5", "--device", "cpu"], ["--downscale 5", "is 16x14, which only these divide: 1, 2"]),
        (["--model.grid_size", "20000", "--device", "cpu"], ["--model.grid_size 20000: takes 512000 GB", "it can be"]),
        (["--bs", "100000000", "--subpixels", "2", "--device", "cpu"], ["--bs 100000000 at 4 rays per pixel: takes"]),
        (["--model.step_ratio", "1e-9"], ["--model.step_ratio", "greater than or equal to 0.01"]),
        (["--resume", "True"], ["no full_config.yml here"]),
    ],
)
def test_mistakes_end_in_one_line(here, folder, capsys, argv, words):
    scene = [] if {"--scene", "--resume"} & set(argv) else ["--scene", str(folder)]
    with pytest.raises(SystemExit) as ended:
        run_main(run_nerf.main, [*scene, *argv])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (here / "ckpt").exists()


def test_running_inside_the_project_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="go to an experiment directory"):
        run_nerf.main(["--dry_run", "True"])
