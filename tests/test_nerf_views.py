"""Training on views of any size, with masks and through lenses: what is drawn, what counts, and what comes of it."""

import json
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pose
import run_nerf
from box_scene import CUBE, H, W, box_field, cfg_of, poses, train
from my.media import read_video
from voxnerf.lens import Lens
from voxnerf.likeness import mse, psnr, ssim
from voxnerf.nerf import NeRF
from voxnerf.pixels import PixelCameras, Pixels
from voxnerf.rays import pixel_rays
from voxnerf.render import render_image
from voxnerf.scene import Scene

SIZES = [(2, 3), (4, 1), (1, 5), (3, 3)]
BENT = Lens(num=(1.0, 0.5, 0.0, 0.0), p=(0.02, -0.03))  # a strong one


def numbered(usable=None):
    """A scene of several sizes, whose pixels tell their view, y and x."""
    images = [
        torch.stack(torch.meshgrid(torch.tensor([i]), torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)[0]
        for i, (h, w) in enumerate(SIZES)
    ]
    images = [image.to(torch.uint8) for image in images]
    n = len(images)
    K = torch.stack([torch.from_numpy(pose.intrinsics(h, w, 50)) for h, w in SIZES])
    return Scene(
        images,
        [torch.full(size, 255, dtype=torch.uint8) for size in SIZES],
        torch.from_numpy(poses(n)),
        K,
        [f"{i}.png" for i in range(n)],
        usable,
    )


# ---------------------------------------------------------------- what is drawn


def test_pixels_of_several_sizes_are_located():
    scene = numbered()
    pixels = Pixels(scene)
    where = torch.stack(pixels.locate(torch.arange(len(pixels))), dim=-1)
    assert scene.sizes == SIZES and len(pixels) == 6 + 4 + 5 + 9 and torch.equal(where, pixels.colors.long())


def test_batch_pairs_rays_with_pixels_of_any_size():
    scene = numbered()
    nerf = NeRF(cfg_of(), scene)
    _, rays_d, colors, _ = nerf.draw_batch(3)
    view, y, x = (colors * 255).round().long().unbind(-1)
    whole = [pixel_rays(*size, K, c2w)[1] for size, K, c2w in zip(SIZES, scene.K, scene.c2w)]
    want = torch.stack([whole[v][i * SIZES[v][1] + j] for v, i, j in zip(view, y, x)])
    assert len(view.unique()) == 4 and torch.allclose(rays_d, want, atol=1e-7)


def test_pixels_that_do_not_count_are_never_drawn(scene):
    generator = torch.Generator().manual_seed(0)
    usable = [torch.rand(size, generator=generator) < 0.5 for size in SIZES]
    pixels = Pixels(numbered(usable))
    drawn = pixels.draw(2000, generator)
    flags = torch.cat([each.flatten() for each in usable])
    assert len(pixels) == flags.sum() and set(drawn.tolist()) == set(flags.nonzero()[:, 0].tolist())
    half = torch.ones(len(scene.images), H, W, dtype=torch.bool)
    half[:, :, W // 2 :] = False
    assert NeRF(cfg_of(bs=100, n_epoch=2), scene._replace(usable=half)).n_steps == math.ceil(2 * 12 * 14 * 8 / 100)


def test_masks_that_leave_nothing_out_change_nothing(scene):
    """The same draws, the same field, to the last bit."""
    masks = torch.ones(len(scene.images), H, W, dtype=torch.bool)
    a, b = NeRF(cfg_of(), scene), NeRF(cfg_of(), scene._replace(usable=masks))
    train(a)
    train(b)
    assert all(torch.equal(x, y) for x, y in zip(a.field.state_dict().values(), b.field.state_dict().values()))


def test_share_of_rays_that_count():
    """Of one view, the left half of whose rays meets a box that begins left of the middle and ends there."""
    K, c2w = torch.from_numpy(pose.intrinsics(100, 100, 50))[None], torch.from_numpy(poses(1, lift=0.0))
    camera = PixelCameras(K, c2w)
    right = c2w[0, :3, 0]
    box = torch.from_numpy(CUBE) * 50
    axis = right.abs().argmax()
    box[0 if right[axis] > 0 else 1, axis] = 0  # only what lies to the right
    left = torch.zeros(100, 100, dtype=torch.bool)
    left[:, :50] = True
    assert camera.share_through(box, [(100, 100)]) > 0.4
    assert camera.share_through(box, [(100, 100)], [~left]) > 2 * camera.share_through(box, [(100, 100)], [left])


# ---------------------------------------------------------------- what counts


def test_psnr_and_ssim_of_what_counts_by_hand():
    """Right of column 16 the pictures differ by 0.1, left of it they are the same."""
    a = torch.full((20, 32, 3), 0.5)
    b = a.clone()
    b[:, 16:] = 0.6
    left = torch.arange(32).expand(20, 32) < 16
    assert psnr(mse(a, b)).item() == pytest.approx(10 * math.log10(200))
    assert psnr(mse(a, b, left)).item() == 100 and psnr(mse(a, b, ~left)).item() == pytest.approx(20)
    assert ssim(a, b, left) == pytest.approx(1)
    assert ssim(a, b, ~left) == pytest.approx((2 * 0.3 + 1e-4) / (0.25 + 0.36 + 1e-4), rel=1e-3)
    assert math.isnan(ssim(a, b, torch.arange(32).expand(20, 32) < 10))  # no window is 10 wide


def test_ssim_where_all_counts_is_that_of_whole_windows():
    """It leaves out the border, which is padded where there is no mask."""
    a, b = torch.rand(2, 17, 19, 3, generator=torch.Generator().manual_seed(0))
    inner = [
        ssim(a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11], torch.ones(11, 11, dtype=torch.bool))
        for y in range(7)
        for x in range(9)
    ]
    assert ssim(a, b, torch.ones(17, 19, dtype=torch.bool)) == pytest.approx(np.mean(inner), abs=1e-5)


def test_what_is_masked_is_neither_learned_nor_measured(scene, test_scene):
    """Red bars, at another place in each view."""

    def barred(views):
        images, usable = views.images.clone(), torch.ones(views.images.shape[:3], dtype=torch.bool)
        for i in range(len(images)):
            images[i, :, (3 * i) % W : (3 * i) % W + 4] = torch.tensor([255, 0, 0], dtype=torch.uint8)
            usable[i, :, (3 * i) % W : (3 * i) % W + 4] = False
        return views._replace(images=images, usable=usable)

    nerf = NeRF(cfg_of(n_epoch=24), barred(scene))
    train(nerf)
    assert min(row["psnr"] for row in nerf.evaluate(barred(test_scene))) > 28
    assert min(row["psnr"] for row in nerf.evaluate(test_scene)) > 28  # what the bars hid is as it was
    assert max(row["psnr"] for row in nerf.evaluate(barred(test_scene)._replace(usable=None))) < 15


def test_views_of_two_sizes_are_learned(scene, test_scene):
    """Every other one at half the size, with its own intrinsics."""
    half = F.avg_pool2d(scene.images[1::2].permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1).round().to(torch.uint8)
    K = scene.K.clone()
    K[1::2] = torch.from_numpy(pose.intrinsics(H // 2, W // 2, 50))
    images = [half[i // 2] if i % 2 else scene.images[i] for i in range(12)]
    mixed = scene._replace(images=images, K=K, alpha=[torch.full(x.shape[:2], 255, dtype=torch.uint8) for x in images])
    nerf = NeRF(cfg_of(n_epoch=32), mixed)
    train(nerf)
    assert min(row["psnr"] for row in nerf.evaluate(test_scene)) > 25
    assert [view.picture.shape[:2] for view in nerf.views(mixed)][:3] == [(14, 16), (7, 8), (14, 16)]


# ---------------------------------------------------------------- lenses


def near(n, lift=0.7):
    """Cameras so near that the box fills their views, where a lens bends most."""
    c2w = poses(n, lift)
    c2w[:, :3, 3] *= 0.7
    return c2w


def pinhole_point(x_d, y_d):
    """Where BENT moves (x_d, y_d) from, by substituting back and forth: another way than the code's."""
    k1, k2, *_ = BENT.num
    p1, p2 = BENT.p
    x, y = x_d, y_d
    for _ in range(200):
        s = x * x + y * y
        q = 1 + k1 * s + k2 * s * s
        x, y = ((x_d - 2 * p1 * x * y - p2 * (s + 2 * x * x)) / q, (y_d - p1 * (s + 2 * y * y) - 2 * p2 * x * y) / q)
    return x, y


def warped(c2w, height=28, width=32, fine=4, fov=60):
    """The views that BENT would have shown, warped from pinhole pictures of the box, four times as large."""
    f = width / 2 / math.tan(math.radians(fov / 2))
    K, big = (pose.intrinsics(height, width, fov), pose.intrinsics(fine * height * 2, fine * width * 2, 98.1986))
    f_big = big[0, 0]
    y, x = np.mgrid[:height, :width]
    px, py = pinhole_point((x - (width - 1) / 2) / f, (y - (height - 1) / 2) / f)
    at = np.stack([px * f_big / (fine * width), py * f_big / (fine * height)], axis=-1)  # corners at -1 and 1
    images = []
    for each in c2w:
        picture = render_image(box_field(), big, each, 2 * fine * height, 2 * fine * width).color
        picture = F.grid_sample(picture[None].double(), torch.from_numpy(at)[None], align_corners=False)[0]
        images.append((picture.permute(1, 2, 0) * 255).round().to(torch.uint8))
    n = len(images)
    return Scene(
        images,
        [torch.full((height, width), 255, dtype=torch.uint8)] * n,
        torch.from_numpy(c2w),
        torch.from_numpy(K).repeat(n, 1, 1),
        [f"{i}.png" for i in range(n)],
        None,
        [BENT] * n,
    )


@torch.no_grad()
def test_pictures_through_a_lens_are_those_that_it_shows():
    """Of the true field, to what warping blurs; a pinhole is far off."""
    scene = warped(near(2))
    nerf = NeRF(cfg_of(), scene)
    nerf.field = box_field()
    through = [row["psnr"] for row in nerf.evaluate(scene)]
    pinhole = [row["psnr"] for row in nerf.evaluate(scene._replace(lenses=None))]
    assert min(through) > 40 and max(pinhole) < 30, (through, pinhole)


@torch.no_grad()
def test_a_scene_through_a_lens_is_learned():
    bent, truth = warped(near(12)), warped(near(3, lift=0.8))
    results = []
    for views, lenses in ((bent, truth.lenses), (bent._replace(lenses=None), None)):
        nerf = NeRF(cfg_of(bs=512, n_epoch=6), views)
        with torch.enable_grad():
            train(nerf)
        results.append(min(row["psnr"] for row in nerf.evaluate(truth._replace(lenses=lenses))))
    assert results[0] > 30 and results[1] < results[0] - 5, results


# ---------------------------------------------------------------- run_nerf.py


def test_run_on_views_of_two_sizes_with_a_mask_and_a_lens(tmp_path, monkeypatch, capsys, scene):
    """What it says, and what it leaves; the video is a pinhole's."""
    folder, here = tmp_path / "scene", tmp_path / "run"
    folder.mkdir()
    here.mkdir()
    frames = []
    for i, (image, c2w) in enumerate(zip(scene.images, scene.c2w)):
        size = (28, 32) if i % 3 == 0 else (14, 16)
        image = np.kron(image.numpy(), np.ones((size[0] // 14, size[1] // 16, 1), np.uint8))
        iio.imwrite(folder / f"{i:02d}.png", image)
        frames.append({"file_path": f"{i:02d}.png", "transform_matrix": c2w.tolist(), "k1": 0.1 * (i % 2)})
    mask = np.full((28, 32), 255, np.uint8)
    mask[:, :20] = 0
    iio.imwrite(folder / "mask.png", mask)
    frames[0]["mask_path"] = "mask.png"
    frames += [{**frames[1], "file_path": "\x1b[31m.png"}]
    (folder / "transforms.json").write_text(json.dumps({"camera_angle_x": math.radians(50), "frames": frames}))
    monkeypatch.chdir(here)
    monkeypatch.setattr(run_nerf, "N_FRAMES", 2)
    run_nerf.main(
        [
            "--scene",
            str(folder),
            "--device",
            "cpu",
            "--bs",
            "128",
            "--model.grid_size",
            "8",
            "--model.bbox_len",
            "1",
            "--n_epoch",
            "1",
        ]
    )
    out, err = capsys.readouterr()
    assert "scene: 10 training views of 16x14, 32x28, 2 test views" in out
    assert "1 of 13 frames are left out" in err and "\x1b[31m" not in err
    (metrics,) = here.glob("test_*/metrics.json")
    names = {view["name"]: view for view in json.loads(metrics.read_text())["views"]}
    assert list(names) == ["00.png", "08.png"] and names["00.png"]["psnr"] > 0
    assert iio.imread(metrics.parent / "view" / "000.png").shape[:2] == (28, 32)
    assert iio.imread(metrics.parent / "view" / "001.png").shape[:2] == (14, 16)
    assert len(read_video(metrics.parent / "video.mp4")) == 2
