"""Rays onto a mesh: against another library and the formulas, and pictures whose pixels are known."""

import numpy as np
import pytest
import torch
import trimesh

import pose
from mesh import Mesh
from mesh.cast import Caster, lookup, render, silhouette
from voxnerf.rays import pixel_rays

CAMERA = pose.camera_at(0.4, 1.1)
FRONT = pose.Camera(pose.look_at((-1.5, 0, 0)), 60.0)  # looks along +x: right is +z, up is +y


def mesh_of(made, **kwargs):
    return Mesh(
        np.asarray(made.vertices, np.float32),
        np.asarray(made.faces, np.int32),
        np.array(made.vertex_normals, np.float32),
        **kwargs,
    )


def wall(y, z, **kwargs):
    """A rectangle in the plane x = 0 between (lo, hi) of y and of z, which faces -x."""
    vertices = np.array([[0, y[i], z[k]] for i, k in ((0, 0), (0, 1), (1, 1), (1, 0))], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    return Mesh(vertices, faces, np.tile(np.float32([-1, 0, 0]), (4, 1)), **kwargs)


def test_like_another_library():
    made = trimesh.creation.box((0.8, 0.5, 0.6)).subdivide().subdivide()
    made = trimesh.util.concatenate([made, trimesh.creation.icosphere(3, 0.3).apply_translation((-0.7, 0.2, 0.1))])
    rays_o, rays_d = pixel_rays(40, 40, CAMERA.K(40, 40), CAMERA.c2w)
    hits = Caster(made.vertices, made.faces).cast(rays_o, rays_d)
    where, ray, _ = made.ray.intersects_location(rays_o.numpy(), rays_d.numpy(), multiple_hits=False)
    distance = np.full(len(rays_o), np.inf)
    distance[ray] = np.linalg.norm(where - rays_o.numpy()[ray], axis=1)
    assert 200 < len(ray) < 1400
    np.testing.assert_array_equal(hits.hit, np.isfinite(distance))
    np.testing.assert_allclose(hits.distance, distance, atol=1e-5)


def test_distance_to_a_sphere_and_where_on_its_faces():
    made = trimesh.creation.icosphere(5, 0.5)
    rays_o, rays_d = pixel_rays(32, 32, CAMERA.K(32, 32), CAMERA.c2w)
    caster = Caster(made.vertices, made.faces)
    hits = caster.cast(rays_o, rays_d)
    o, d = (x[hits.hit].double() for x in (rays_o, rays_d))
    along = -(o * d).sum(1)
    exact = along - (0.25 - (o + along[:, None] * d).pow(2).sum(1)).clamp(min=0).sqrt()
    central = exact < 1.2  # elsewhere rays graze: there, small facets move the point far
    assert (hits.distance[hits.hit] - exact)[central].abs().max() < 1e-3
    points = caster.interpolate(caster.vertices, hits)
    assert (points - (o + hits.distance[hits.hit, None] * d)).abs().max() < 1e-5
    assert (hits.weights[hits.hit].sum(1) - 1).abs().max() < 1e-6 and (hits.face[~hits.hit] == -1).all()


def test_both_sides_are_hit_and_nothing_behind():
    square = wall((-1, 1), (-1, 1))
    caster = Caster(square.vertices, square.faces)
    rays_o, rays_d = torch.tensor([[-2.0, 0, 0.1], [3.0, 0, 0.1], [3.0, 0, 0.1]]), torch.zeros(3, 3)
    rays_d[:, 0] = torch.tensor([1.0, -1.0, 1.0])
    assert caster.cast(rays_o, rays_d).distance.tolist() == [2, 3, torch.inf]
    assert len(caster.cast(rays_o[:0], rays_d[:0]).face) == 0


def test_a_pixel_is_covered_in_part():
    edge = 1.5 * np.tan(np.deg2rad(30))  # of the picture at the origin
    square = wall((-2, 2), (-2, -edge / 4))  # of 8 columns, the first three: 0.375 of the width
    caster = Caster(square.vertices, square.faces)
    assert silhouette(caster, FRONT, 8).tolist() == [[1] * 3 + [0] * 5] * 8
    assert silhouette(caster, FRONT, 4, 4).tolist() == [[1, 0.5, 0, 0]] * 4


@pytest.mark.parametrize("background", [(0.0, 1.0, 0.5), np.full((4, 4, 3), (0.0, 1.0, 0.5))])
def test_a_picture_by_hand(background):
    edge = 1.5 * np.tan(np.deg2rad(30))
    red = wall((-2, 2), (-2, -edge / 4), colors=np.tile(np.uint8([255, 0, 51]), (4, 1)))
    picture = render(red, FRONT, 4, 2, background)
    np.testing.assert_allclose(picture[1], [(1, 0, 0.2), (0.5, 0.5, 0.35), (0, 1, 0.5), (0, 1, 0.5)], atol=1e-6)


def test_a_texture_stands_upright():
    texture = np.zeros((2, 2, 3), np.uint8)
    texture[0, 0] = 255, 0, 0  # top left
    texture[0, 1] = 0, 255, 0  # top right
    edge = 1.5 * np.tan(np.deg2rad(30))
    uv = np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])  # of the corners: z grows to the right, y up
    picture = render(wall((-edge, edge), (-edge, edge), uv=uv, texture=texture), FRONT, 8)
    np.testing.assert_allclose(picture[0, 0], (1, 0, 0), atol=1e-5)
    np.testing.assert_allclose(picture[0, 7], (0, 1, 0), atol=1e-5)
    np.testing.assert_allclose(picture[7, 7], (0, 0, 0), atol=1e-5)


def test_lookup_is_bilinear_and_stops_at_the_border():
    texture = torch.zeros(2, 4, 1, dtype=torch.uint8)
    texture[0, :, 0] = torch.tensor([0, 51, 102, 255])
    at = torch.tensor([[0.375, 0.75], [0.5, 0.75], [0.5, 0.5], [1.0, 1.0], [0.0, 0.0]])
    assert lookup(texture, at)[:, 0].tolist() == pytest.approx([0.2, 0.3, 0.15, 1.0, 0.0])


def test_without_colours_it_is_grey():
    square = wall((-2, 2), (-2, 2))
    np.testing.assert_allclose(render(square, FRONT, 2), 0.7, atol=1e-6)
