"""True colours of a mesh: those of a field that is known, from pictures of it, also of one that a decoder shows."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh

import pose
from asset import Asset
from mesh import Mesh, colours
from mesh.cast import Caster, lookup
from tiny import Affine
from tiny import config as tiny_config
from toyworld import sdf
from voxnerf.field import make_field
from voxnerf.rays import pixel_rays

ORANGE, BLUE = np.array([230, 128, 26]) / 255, np.array([26, 51, 204]) / 255
GRID, EDGE = 40, 1.4 / 40
N_VIEWS = 24


class Decoder(Affine):
    """A latent space whose decoder repeats pixels, and makes some pictures lighter."""

    picture_size = 12

    def __init__(self, lighter=0.0):
        super().__init__()
        self.n, self.lighter = 0, lighter

    def decode(self, x):
        self.n += 1
        picture = super().decode(x).repeat_interleave(2, -1).repeat_interleave(2, -2)
        return (picture + self.lighter * (self.n % 11 in (3, 8))).clamp(0, 1)


def asset_of(distance, color_of, adapter=None):
    """The asset of a field that is solid where `distance` of points (n, 3) is negative, in colours (n, 3) in [0, 1]."""
    cfg = tiny_config(
        vox={"grid_size": GRID, "bbox_len": 0.7, "step_ratio": 0.5}, pose={"rend_hw": 64, "FoV": 55}, plain_bg=True
    )
    field = make_field("V_SJC", [[-0.7] * 3, [0.7] * 3], GRID, density_shift=-10.0, step_ratio=0.5)
    at = (torch.arange(GRID) + 0.5) * EDGE - 0.7
    z, y, x = torch.meshgrid(at, at, at, indexing="ij")
    points = torch.stack([x, y, z], dim=-1).view(-1, 3)
    with torch.no_grad():
        field.density.view(-1).copy_((10 - 400 * distance(points) / EDGE).clamp(-90, 300))
        colors = torch.as_tensor(color_of(points), dtype=torch.float32)
        field.color.copy_(torch.logit(colors, 1e-6).T.view(1, 3, GRID, GRID, GRID))
    return Asset(cfg, adapter or Affine(), field)


def two_colors(points):
    return np.where(np.asarray(points)[:, 1:2] > 0, ORANGE, BLUE)


def mesh_of(made):
    return Mesh(
        *(np.asarray(x, t) for x, t in ((made.vertices, "f4"), (made.faces, "i4"), (made.vertex_normals, "f4")))
    )


def ball(p):
    return sdf.sphere(p, (0, 0, 0), 0.5)


def cuboid(p):
    return sdf.box(p, (0, 0, 0), (0.42, 0.42, 0.42))


def fine_box(half, center=(0, 0, 0)):
    made = trimesh.creation.box(2 * np.array(half)).apply_translation(center)
    for _ in range(4):
        made = made.subdivide()
    return made


SPHERE, BOX = mesh_of(trimesh.creation.icosphere(4, 0.5)), mesh_of(fine_box((0.42, 0.42, 0.42)))


@pytest.mark.parametrize("shape, distance", [(SPHERE, ball), (BOX, cuboid)], ids=["sphere", "box"])
@pytest.mark.parametrize("latent", [False, True])
def test_two_colours(shape, distance, latent):
    asset = asset_of(distance, two_colors, Decoder() if latent else None)
    assert asset.latent == latent
    got = colours.with_vertex_colors(asset, shape, N_VIEWS).colors
    clear = np.abs(shape.vertices[:, 1]) > 2 * EDGE  # elsewhere the field itself blends its colours
    clear &= shape.vertices[:, 1] > (-0.15 if latent else -0.35)  # few views see lower ones, and at their silhouettes
    clear &= (np.abs(shape.vertices) > 0.4199).sum(axis=1) < 2  # the edges of a box of voxels are round
    error = np.abs(got / 255.0 - two_colors(shape.vertices))[clear]
    assert clear.mean() > 0.4 and error.max() * 255 <= 2


def test_a_point_has_the_colour_of_its_pixel(monkeypatch):
    """Points on the rays of the pixels of one camera, in a picture whose pixels all differ."""
    hw, camera = 12, pose.camera_at(0.7, 1.2, 1.5, 55)
    image = torch.rand(3, hw, hw, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(colours, "cameras", lambda asset, n: [camera])
    monkeypatch.setattr(colours, "picture", lambda asset, camera: (image, torch.ones(hw, hw)))
    rays_o, rays_d = pixel_rays(hw, hw, camera.K(hw, hw), camera.c2w)
    seen = colours.views(asset_of(ball, two_colors), Caster(10 + SPHERE.vertices, SPHERE.faces), 1)
    color, weight = colours.fuse(seen, rays_o + 1.3 * rays_d, -rays_d)
    assert (weight - 1 - colours.FAINT).abs().max() < 1e-5  # full weight: nothing hides, and it looks straight
    assert (color - image.flatten(1).T).abs().max() < 1e-4
    tilted = rays_d + 2 * torch.linalg.cross(rays_d, torch.tensor([[0.0, 1.0, 0.0]]), dim=1)
    cosine = -(tilted * -rays_d).sum(1) / tilted.norm(dim=1)
    _, weight = colours.fuse(seen, rays_o + 1.3 * rays_d, -tilted / tilted.norm(dim=1, keepdim=True))
    assert (weight / (1 + colours.FAINT) - cosine).abs().max() < 1e-4
    assert (colours.fuse(seen, rays_o + 1.3 * rays_d, rays_d)[1] == 0).all()  # seen from behind
    assert (colours.fuse(seen, rays_o - 1.3 * rays_d, rays_d)[1] == 0).all()  # behind the camera


def test_the_mean_by_hand():
    colors = torch.tensor([0.45, 0.5, 0.55])[:, None, None].expand(3, 3, 1)
    weight = torch.tensor([1.0, 2.0, 5.0])[:, None]
    np.testing.assert_allclose(colours.robust_mean(colors, weight)[:, 0], [0.525] * 3, atol=1e-6)
    assert colours.robust_mean(colors, torch.zeros(3, 1)).isfinite().all()  # of a point that no view sees


def test_outliers_among_the_views_count_less():
    """Four of five agree: the mean is 0.16 off. In grey, a distance in RGB is sqrt(3) times that of one channel."""
    colors = torch.tensor([0.1] * 4 + [0.9])[:, None, None].expand(5, 3, 1)
    got = colours.robust_mean(colors, torch.ones(5, 1))[0, 0].item()
    by_hand = 0.26
    for _ in range(colours.ITERATIONS):
        many, one = (min(1, colours.USUAL / (math.sqrt(3) * abs(c - by_hand))) for c in (0.1, 0.9))
        by_hand = (4 * many * 0.1 + one * 0.9) / (4 * many + one)
    assert got == pytest.approx(by_hand, abs=1e-6) and got < 0.22


def test_a_decoder_that_errs_in_some_views():
    asset = asset_of(ball, two_colors, Decoder(0.3))
    got = colours.with_vertex_colors(asset, SPHERE, N_VIEWS).colors / 255.0
    clear = (np.abs(SPHERE.vertices[:, 1]) > 2 * EDGE) & (SPHERE.vertices[:, 1] > 0)
    assert np.abs(got - two_colors(SPHERE.vertices))[clear].mean() < 0.06


def test_what_hides_a_point_does_not_colour_it(monkeypatch):
    """Two boxes, one behind the other as the only camera sees them. The far one faces it, but in no pixel."""
    near, far, half = (-0.3, 0.0, 0.0), (0.25, 0.0, 0.0), (0.16, 0.25, 0.25)

    def distance(p):
        return torch.minimum(sdf.box(p, near, half), sdf.box(p, far, half))

    asset = asset_of(distance, lambda p: np.where(np.asarray(p)[:, :1] < 0, ORANGE, BLUE))
    monkeypatch.setattr(colours, "cameras", lambda asset, n: [pose.camera_at(0.0, np.pi / 2, 1.5, 55)])
    mesh = mesh_of(trimesh.util.concatenate([fine_box(half, near), fine_box(half, far)]))
    points, normals = torch.tensor([[-0.46, 0.1, 0.1], [0.09, 0.1, 0.1]]), torch.tensor([[-1.0, 0, 0]] * 2)
    color, weight = colours.fuse(colours.views(asset, Caster(mesh.vertices, mesh.faces), 1), points, normals)
    assert weight[0] > 0.5 and np.abs(color[0].numpy() - ORANGE).max() * 255 < 2
    assert weight[1] == 0
    alone = mesh_of(fine_box(half, far))  # the same pictures, and nothing in front of it in the mesh
    color, weight = colours.fuse(colours.views(asset, Caster(alone.vertices, alone.faces), 1), points, normals)
    assert weight[1] > 0.5 and np.abs(color[1].numpy() - ORANGE).max() * 255 < 2


def test_a_point_that_no_view_sees_has_its_neighbours_colour():
    around = [(1, 0, 0), (0, 2, 0), (-1, 0, 0), (0, -2, 0)]
    faces = np.array([(0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 1)], np.int32)
    mesh = Mesh(np.array([(0, 0, 0), *around], np.float32), faces, np.tile(np.float32([0, 0, 1]), (5, 1)))
    shown = np.array([(0.9, 0.9, 0.9), (1, 0, 0), (0, 1, 0), (0.5, 0, 0), (0, 0, 1)])
    weight = np.array([0, 1, 1, 1, 1]) * colours.SURE
    got = colours.spread(mesh, shown, weight)
    np.testing.assert_allclose(got[0], (0.5, 1 / 6, 1 / 6))  # (1 a + 1/2 b + 1 c + 1/2 d) / 3
    np.testing.assert_array_equal(got[1:], shown[1:])
    weight[0] = 0.9 * colours.SURE  # seen, but badly
    np.testing.assert_allclose(colours.spread(mesh, shown, weight)[0], (0.5, 1 / 6, 1 / 6))
    np.testing.assert_allclose(colours.spread(mesh, shown, np.ones(5)), shown)
    own, fill = torch.ones(3, 3), torch.zeros(3, 3)
    share = colours.blended(own, torch.tensor([0, 0.25, 2]) * colours.TRUSTED, fill)
    np.testing.assert_allclose(share, [[0] * 3, [0.25] * 3, [1] * 3])


def test_parts_of_a_mesh_that_are_seen_badly_or_not_at_all():
    triangle = np.eye(3, dtype=np.float32)
    mesh = Mesh(np.concatenate([triangle] * 3), np.arange(9, dtype=np.int32).reshape(3, 3), np.zeros((9, 3), "f4"))
    shown = np.repeat([ORANGE, BLUE, (0.1, 0.2, 0.3)], 3, axis=0)
    badly = colours.SURE / 10
    got = colours.spread(mesh, shown, np.array([1, 1, 1, badly, badly, badly, 0, 0, 0]))
    np.testing.assert_allclose(got[:6], shown[:6])  # the second part has its own colours, bad as they are
    np.testing.assert_allclose(got[6:], [(ORANGE + BLUE) / 2] * 3)
    np.testing.assert_allclose(colours.spread(mesh, shown, np.zeros(9)), 0.7)


def test_an_atlas_shows_the_surface_without_seams():
    asset = asset_of(ball, two_colors)
    mesh = colours.with_atlas(asset, SPHERE, 256, N_VIEWS)
    assert mesh.texture.shape == (256, 256, 3) and len(mesh.vertices) > len(SPHERE.vertices)
    np.testing.assert_array_equal(mesh.vertices[mesh.faces], SPHERE.vertices[SPHERE.faces])
    np.testing.assert_array_equal(mesh.normals[mesh.faces], SPHERE.normals[SPHERE.faces])
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1 and mesh.colors is None
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), len(mesh.faces) * 4).reshape(4, -1, 3)
    weights[0, :, 0], weights[0, :, 1:] = 0, 0.5  # in the middle of an edge, which may be a seam
    for w in weights:
        points = (mesh.vertices[mesh.faces] * w[..., None]).sum(1)
        uv = torch.from_numpy((mesh.uv[mesh.faces] * w[..., None]).sum(1)).float()
        clear = (np.abs(points[:, 1]) > 2.5 * EDGE) & (points[:, 1] > -0.35)
        for smaller in (1, 2):  # the texture, and its first mip map
            image = torch.from_numpy(mesh.texture).float().permute(2, 0, 1)[None]
            texture = F.avg_pool2d(image, smaller)[0].permute(1, 2, 0).round().to(torch.uint8)
            error = np.abs(lookup(texture, uv).numpy() - two_colors(points))[clear]
            assert error.max() * 255 <= 3


def test_cameras_are_new_ones_and_where_the_training_looked():
    asset = asset_of(ball, two_colors)
    eyes = np.array([camera.c2w[:3, 3] / 1.5 for camera in colours.cameras(asset, 48)])
    lowest = 1 - 2 * pose.ELEVATION_SPAN_DEG / 180
    assert eyes[:, 1].min() > lowest and eyes[:, 1].max() < 1
    angle = np.arccos((eyes @ eyes.T - 2 * np.eye(48)).max(axis=1).clip(-1, 1))
    even = math.sqrt(2 * math.pi * (1 - lowest) / 48)  # edge of a square of each one's share of the sphere
    assert angle.min() > 0.6 * even and angle.max() < 1.6 * even
