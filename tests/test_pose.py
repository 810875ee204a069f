"""Cameras and rays against reference arrays and hand-computed numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch

import pose
from voxnerf.field import background_uv
from voxnerf.rays import pixel_rays

REFERENCE = Path(__file__).resolve().parent / "reference"


@pytest.fixture(scope="module")
def ref():
    return dict(np.load(REFERENCE / "pose_a.npz"))


def test_train_poses(ref):
    cameras = []
    for u, v in zip(ref["u_azimuth"], ref["u_elevation"]):
        azimuth, v = 2 * np.pi * u, np.deg2rad(100 * v)
        cameras.append(pose.camera_at(azimuth, v))
        eye = pose.eye_on_sphere(azimuth, v, 1.5)
        np.testing.assert_allclose(eye, cameras[-1].c2w[:3, 3], atol=1e-15)
    assert_close(np.stack([c.c2w for c in cameras]), ref["c2w"])
    assert_close(np.stack([c.c2w[:3, 3] for c in cameras]), ref["eyes"])
    assert [c.view for c in cameras] == ref["view_prompts"].tolist()


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_spiral(ref):
    assert_close(np.stack([c.c2w for c in pose.spiral(20)]), ref["spiral_c2w"])


def test_intrinsics(ref):
    assert_close(np.stack([pose.intrinsics(64, 64, fov) for fov in ref["fov_deg"]]), ref["K"])


@pytest.mark.parametrize("fov", [0, 180, -5])
def test_bad_fov(fov):
    with pytest.raises(ValueError, match="field of view"):
        pose.intrinsics(4, 4, fov)


def test_subpixel_rays(ref):
    K = pose.intrinsics(4, 4, 60)
    rays_o, rays_d = pixel_rays(4, 4, K, ref["c2w"][0], subpixels=4, dtype=torch.float64)
    assert_close(rays_o.numpy(), ref["subpixel_rays_o"])
    assert_close(rays_d.numpy(), ref["subpixel_rays_d"])
    uv = background_uv(rays_d[:32].float())
    np.testing.assert_allclose(uv.numpy(), ref["bg_uv"], atol=1e-6)


def test_view_words():
    straight = np.deg2rad(80)
    sides = [pose.view_prompt(a, straight) for a in np.deg2rad([0, 90, 180, 270])]
    assert sides == ["front view of", "side view of", "backside view of", "side view of"]
    assert pose.view_prompt(np.pi / 2, straight, "sides") == "left side view of"
    assert pose.view_prompt(0, 0.1) == "overhead view of"
    assert len(pose.all_view_prompts("sjc")) == 4
    assert len(pose.all_view_prompts("sides")) == 5
    assert len(pose.all_view_prompts("octants")) == 24
    with pytest.raises(ValueError, match="octants"):
        pose.view_prompt(0, 0, "nosuch")


def test_the_opposite_camera_is_half_a_turn_away():
    near, far = (pose.train_camera(np.random.default_rng(3), words="octants", opposite=o) for o in (False, True))
    assert near.fov == far.fov and near.view != far.view
    np.testing.assert_allclose(far.c2w[:3, 3], near.c2w[:3, 3] * [-1, 1, -1], atol=1e-12)


def test_train_camera_is_drawn_from_rng():
    a, b = (pose.train_camera(np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(a.c2w, b.c2w) and a.fov == b.fov and 40 <= a.fov <= 70
    assert np.linalg.norm(a.c2w[:3, 3]) == pytest.approx(1.5)
    assert np.allclose(a.c2w[:3, :3] @ a.c2w[:3, :3].T, np.eye(3))
    np.testing.assert_allclose(a.c2w[:3, 2] * 1.5, a.c2w[:3, 3])  # looks at the origin along -z
