"""The surface of a field: where it is, which way it faces, what is left out, and at which level."""

import numpy as np
import pytest
import torch
import trimesh

from mesh import cast, surface
from my.errors import UserError
from solids import BOX, SURFACE, asset_of, ball, box, solid
from toyworld import sdf

R = 0.6


def as_trimesh(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def degrees(a, b):
    return np.rad2deg(np.arccos(np.clip((a * b).sum(axis=1), -1, 1)))


@pytest.mark.parametrize("n_faces", [10**9, 3000])
def test_a_ball(n_faces):
    field = ball(R)
    mesh = surface.decimated(surface.extract(field, 64, SURFACE), n_faces)
    radii = np.linalg.norm(mesh.vertices, axis=1)
    assert np.abs(radii - R).max() < 0.2 * field.voxel_edge
    assert degrees(mesh.normals, mesh.vertices / radii[:, None]).max() < 3
    solid_mesh = as_trimesh(mesh)
    assert solid_mesh.is_watertight and solid_mesh.is_winding_consistent and solid_mesh.euler_number == 2
    assert solid_mesh.volume == pytest.approx(4 / 3 * np.pi * R**3, rel=0.02)  # positive: it faces outwards
    assert len(mesh.faces) <= n_faces and (len(mesh.faces) > 2900)
    assert [x.dtype for x in mesh[:3]] == [np.float32, np.int32, np.float32]


def test_a_box_that_is_not_in_the_middle_and_has_corners():
    field = box()
    mesh = surface.extract(field, 64, SURFACE)
    distance = sdf.box(torch.from_numpy(mesh.vertices), *BOX).abs()
    assert distance.max() < 0.5 * field.voxel_edge and distance.mean() < 0.05 * field.voxel_edge
    lo, hi = np.array(BOX[0]) - BOX[1], np.array(BOX[0]) + BOX[1]
    assert np.allclose(mesh.vertices.min(axis=0), lo, atol=0.01) and np.allclose(
        mesh.vertices.max(axis=0), hi, atol=0.01
    )


def test_a_ring_has_a_hole_and_specks_and_hollows_are_left_out():
    def distance(p):
        ring = sdf.torus(p, (0, 0, 0), 0.6, 0.2)
        hollow = sdf.torus(p, (0, 0, 0), 0.6, 0.1)
        speck = sdf.sphere(p, (0.8, 0.8, 0.8), 0.1)  # 1/120 of the volume of the ring
        return torch.minimum(torch.maximum(ring, -hollow), speck)

    mesh = as_trimesh(surface.extract(solid(distance, grid=48), 64, SURFACE))
    assert mesh.is_watertight and mesh.euler_number == 0 and mesh.body_count == 1
    assert mesh.volume == pytest.approx(2 * np.pi**2 * 0.6 * 0.2**2, rel=0.03)


def test_a_part_that_is_no_speck_stays():
    def distance(p):
        return torch.minimum(sdf.sphere(p, (-0.4, 0, 0), 0.4), sdf.sphere(p, (0.6, 0, 0), 0.15))

    assert as_trimesh(surface.extract(solid(distance), 64, SURFACE)).body_count == 2


def test_the_walls_of_the_box_cut_flat():
    mesh = surface.extract(ball(0.5, (-1.0, 0.0, 0.0)), 32, SURFACE)
    half = as_trimesh(mesh)
    assert half.is_watertight and half.euler_number == 2
    assert mesh.vertices[:, 0].min() == pytest.approx(-1, abs=1e-6)
    assert half.volume == pytest.approx(2 / 3 * np.pi * 0.5**3, rel=0.04)


def test_what_the_mask_hides_is_not_there():
    field = ball(R)
    field.alpha_mask = torch.zeros_like(field.density)
    field.alpha_mask[..., :16] = 1  # x < 0, and it fades out over a voxel
    mesh = surface.extract(field, 64, SURFACE)
    assert 0 <= mesh.vertices[:, 0].max() < 1.6 * field.voxel_edge and mesh.vertices[:, 0].min() < -0.58


def test_the_same_every_time():
    meshes = [surface.decimated(surface.extract(box(), 48, SURFACE), 2000) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(meshes[0][:3], meshes[1][:3]))


def test_faces_that_enclose_nothing_go():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0], [9, 9, 9]], np.float32)
    tetrahedron = [[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]
    more = [[0, 1, 1], [0, 1, 4], [1, 4, 3], [1, 3, 4]]  # a corner twice, no area, two sides of one triangle
    kept, faces = surface.cleaned(vertices, np.array(tetrahedron + more, np.int32))
    assert faces.tolist() == tetrahedron and kept.tolist() == vertices[:4].tolist()
    assert np.isfinite(
        surface.with_normals(vertices, np.array(tetrahedron)).normals
    ).all()  # of vertices without a face


# ---------------------------------------------------------------- the level


def layers(p):
    """Density inside fog of 0.2 per unit, which a ray of 1.6 units takes 0.27 of, and in a ball of 30 per unit."""
    r = p.norm(dim=1)
    return torch.where(r < 0.5, 30.0, torch.where(r < 0.8, 0.2, 1e-6))


def fog_and_ball():
    field = solid(lambda p: p[:, 0], grid=32)
    with torch.no_grad():
        inner = torch.linspace(-1 + 1 / 32, 1 - 1 / 32, 32)
        z, y, x = torch.meshgrid(inner, inner, inner, indexing="ij")
        sigma = layers(torch.stack([x, y, z], dim=-1).view(-1, 3)).view(field.density.shape)
        field.density.copy_(sigma.expm1().log() + 1)
    return field


def test_the_level_is_that_of_the_silhouettes():
    asset = asset_of(fog_and_ball())
    level = surface.best_level(asset)
    assert 0.2 < level < 30
    mesh = surface.extract(asset.field, 64, level)
    for camera in surface.cameras(asset, 5):
        _, _, opacity = asset.view(camera, 64)
        own = opacity > 0.5
        drawn = cast.Caster(mesh.vertices, mesh.faces).view(camera, 64).hit.view(64, 64).numpy()
        assert (own & drawn).sum() / (own | drawn).sum() > 0.96
    low = surface.extract(asset.field, 64, 0.1)  # another level would have the silhouette of the fog
    assert np.linalg.norm(low.vertices, axis=1).min() > 0.7


def test_a_level_of_a_field_of_two_densities_lies_between_them():
    field = ball(R, grid=16)
    with torch.no_grad():
        field.density.copy_(torch.where(field.density > 0, 20.0, -20.0))
    assert 1e-8 < surface.best_level(asset_of(field)) < 19
    with torch.no_grad():
        field.density.clamp_(max=2.0)  # softplus(1) = 1.31: of rays that meet just that, long ones alone are opaque
    assert surface.best_level(asset_of(field)) < 1.313
    with torch.no_grad():
        field.density.fill_(20)  # the same density everywhere
    assert surface.best_level(asset_of(field)) == pytest.approx(1.9)  # half way to a hundredth of 19


def test_nothing_to_see():
    field = ball(R)
    with pytest.raises(
        UserError, match=r"--level 1e\+06: nothing in this field is as dense: its densest point has 2\d\d"
    ):
        surface.extract(field, 32, 1e6)
    with torch.no_grad():
        field.density.fill_(-20)
    with pytest.raises(UserError, match="this field is empty: no view has a pixel that is more than half opaque"):
        surface.best_level(asset_of(field))


def test_fog_to_the_walls():
    field = ball(R)
    with torch.no_grad():
        field.density.fill_(5)
    with pytest.raises(
        UserError, match="fills its box: 100% of the box's walls are denser than the level 1; it has no"
    ):
        surface.extract(field, 32, 1.0)
