"""A mesh against its field at held-out views: numbers by hand, and which views they are."""

import numpy as np
import pytest
import torch
import trimesh

import pose
from asset import Asset
from benchmarks import mesh_quality
from mesh import Mesh, colours, compare
from my.errors import UserError
from tiny import Affine
from tiny import config as tiny_config
from voxnerf.field import make_field

COLOR = 0.75  # of everything, as a picture shows it


@pytest.fixture
def asset():
    """A nearly opaque box of half edge 0.35 in one grey, before white."""
    cfg = tiny_config(vox={"grid_size": 16, "bbox_len": 0.7}, pose={"rend_hw": 16, "FoV": 55}, plain_bg=True)
    field = make_field("V_SJC", [[-0.7] * 3, [0.7] * 3], 16, density_shift=-10.0)
    with torch.no_grad():
        field.density.fill_(-90)[..., 4:12, 4:12, 4:12] = 400
        field.color.fill_(float(torch.logit(torch.tensor(COLOR))))
    return Asset(cfg, Affine(), field)


def box(half, color):
    made = trimesh.creation.box([2 * half] * 3)
    shape = (np.asarray(x, t) for x, t in ((made.vertices, "f4"), (made.faces, "i4"), (made.vertex_normals, "f4")))
    return Mesh(*shape, colors=np.full((8, 3), round(color * 255), np.uint8))


def test_the_same_shape_and_colour(asset):
    iou, psnr = compare.against_field(asset, box(0.35, COLOR))
    assert iou > 0.94 and psnr > 30


def test_a_wrong_colour_costs_what_its_squared_error_is(asset):
    """The pixels of the box are 0.5 off, and no others: their share is read from pictures of black before white."""
    _, psnr = compare.against_field(asset, box(0.35, COLOR - 0.5))
    hw = compare.SMALLEST
    shares = []
    for camera in compare.held_out(asset):
        opacity = asset.render(camera, hw).opacity.detach()
        shares.append(float((opacity > 0.5).float().mean()))
    by_hand = np.mean([-10 * np.log10(share * 0.25) for share in shares])
    assert psnr == pytest.approx(by_hand, abs=0.4)


def test_a_wrong_shape_costs_its_share_of_the_silhouette(asset):
    small, _ = compare.against_field(asset, box(0.175, COLOR))  # about a quarter of the area
    assert 0.15 < small < 0.27
    beside = box(0.175, COLOR)
    off = beside._replace(vertices=beside.vertices + np.float32([0, 9, 0]))
    assert compare.against_field(asset, off)[0] == 0


def test_the_background_is_the_runs_own(asset):
    camera = compare.held_out(asset)[0]
    np.testing.assert_allclose(compare.empty_picture(asset, camera, 8), np.ones((8, 8, 3)), atol=1e-6)
    asset.backgrounds = None
    np.testing.assert_allclose(compare.empty_picture(asset, camera), np.full((16, 16, 3), 0.5), atol=1e-6)
    picture, *_ = asset.view(camera)
    np.testing.assert_allclose(compare.empty_picture(asset, camera)[0, 0], picture[0, 0], atol=1e-6)


def test_views_gave_no_colours(asset):
    held_out, used = (
        np.array([c.c2w[:3, 3] for c in cameras]) / 1.5
        for cameras in (compare.held_out(asset), colours.cameras(asset, colours.N_VIEWS))
    )
    nearest = np.rad2deg(np.arccos((held_out @ used.T).max(axis=1).clip(-1, 1)))
    assert len(held_out) == 12 and nearest.min() > 2
    assert held_out[:, 1].min() > 1 - 2 * pose.ELEVATION_SPAN_DEG / 180


def test_the_table_of_the_benchmark(tmp_path):
    rows = {name: dict.fromkeys(mesh_quality.COLUMNS, value) for name, value in (("a", 1.0), ("b", 2.5))}
    lines = mesh_quality.document({"mini": rows}).splitlines()
    assert lines[2] == "## mini" and lines[-1].startswith("| mean | 1.750 | 1.750 | 1.75 |")
    with pytest.raises(UserError, match="no run of run_sjc.py in it"):
        mesh_quality.found([str(tmp_path)])
    for name in ("x/one", "two"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "full_config.yml").touch()
    assert mesh_quality.found([str(tmp_path)]) == [tmp_path / "two", tmp_path / "x" / "one"]
