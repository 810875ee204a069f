"""Noise that is fixed to surfaces: its distribution, the same from two cameras, and in runs."""

import math

import numpy as np
import pytest
import torch

import pose
from my import checkpoint, seeds
from my.config import load
from my.errors import UserError
from options.sjc import SJCConfig
from rerun import flight
from sjc import SJC
from test_flight import failed, here  # noqa: F401 (a fixture)
from test_sjc import assert_same, run
from tiny import Affine, config
from voxnerf.rays import pixel_rays
from voxnerf.render import BG_DEPTH, Rendering
from voxnerf.surface_noise import LONG, cell_edge, cells_of, facing, shared_out, surface_noise

H, FOV, R = 16, 55.0, 1.5
EDGE = cell_edge(R, FOV, H)
PIXEL = 2 * R * math.tan(math.radians(FOV) / 2) / H  # width at the wall, world units
WALL = torch.tensor([0.0, 0.0, 0.0123], dtype=torch.float64)  # a point of it


def camera(x=0.0, y=0.0, z=R):
    """A camera that looks along -z."""
    c2w = np.eye(4)
    c2w[:3, 3] = x, y, z + WALL[2].item()
    return c2w


def seen(c2ws, hw=H, normal=(0.0, 0.0, 1.0), opacity=1.0):
    """What cameras see of a plane through WALL, in hw x hw pixels: a `Rendering`."""
    K = np.array([pose.intrinsics(hw, hw, FOV)] * len(c2ws))
    rays_o, rays_d = pixel_rays(hw, hw, K, np.array(c2ws), dtype=torch.float64)
    n = torch.tensor(normal, dtype=torch.float64)
    depth = (((WALL - rays_o) @ n) / (rays_d @ n)).view(-1, hw, hw)
    opacity = torch.as_tensor(opacity, dtype=torch.float64).expand_as(depth)
    return Rendering(depth, opacity * depth + (1 - opacity) * BG_DEPTH, opacity, depth, depth)


def noise(r, c2ws, channels=64, seed=0, draw=0):
    """The noise of a rendering, with 7 where it is fresh."""
    K = np.array([pose.intrinsics(H, H, FOV)] * len(c2ws))
    return surface_noise(r, K, np.array(c2ws), EDGE, torch.full((len(c2ws), channels, H, H), 7.0), seed, draw)


def of_wall(*c2ws, hw=H, normal=(0.0, 0.0, 1.0), **options):
    return noise(seen(c2ws, hw, normal), c2ws, **options)


def correlation(a, b):
    """Of numbers whose mean is 0 and whose variance is 1."""
    return (a * b).mean().item()


# ---------------------------------------------------------------- its distribution


@pytest.mark.parametrize("normal", [(0.0, 0.0, 1.0), (0.6, 0.3, 1.0)], ids=["faced", "slanted"])
@pytest.mark.parametrize("z", [R, 0.6 * R])
def test_it_is_normal_and_independent_in_a_view(normal, z):
    """Moments of each pixel over 500 channels, and the correlations of neighbours."""
    (n,) = of_wall(camera(0.003, 0.007, z), normal=normal, channels=500)
    assert not (n == 7).any()
    pixels, moments = n.flatten(1), ((1, 0, 1), (2, 1, 2), (4, 3, 96))
    for power, moment, variance in moments:
        assert abs((pixels**power).mean().item() - moment) < 5 * math.sqrt(variance / pixels.numel())
        assert ((pixels**power).mean(0) - moment).abs().max() < 7 * math.sqrt(variance / len(pixels))
    for a, b in ((n[:, 1:], n[:, :-1]), (n[:, :, 1:], n[:, :, :-1]), (n[:, 1:, 1:], n[:, :-1, :-1]), (n[1:], n[:-1])):
        assert abs(correlation(a, b)) < 5 / math.sqrt(a.numel())


def test_cells_are_shared_out_by_hand():
    """Two views of three pixels with three subpixels; a cell is the first pixel's that sees it."""
    cells = torch.tensor([[[5, 5, 2], [2, 9, 5], [1, 1, 1]], [[0, 0, 0], [0, 0, 0], [4, 5, 6]]])
    assert shared_out(cells).tolist() == [[[1, 3, 1], [0, 1, 0], [1, 3, 5]], [[1, 3, 5], [0, 0, 0], [1, 1, 1]]]


def test_a_pixel_is_the_sum_over_its_cells_by_hand(monkeypatch):
    """Each has two, whose numbers are 1 and 2, with 9 and 27 subpixels: (9 + 2 27) / sqrt(9^2 + 27^2)."""

    def numbers(points, *_):
        y, x = torch.arange(6 * H)[:, None], torch.arange(6 * H)
        return (2 * ((y // 6) * H + x // 6) + (y % 6 * 6 + x % 6 >= 9))[None]

    monkeypatch.setattr("voxnerf.surface_noise.cells_of", numbers)
    monkeypatch.setattr(
        "voxnerf.surface_noise.normal", lambda shape, seed, items, *_: (items[:, None] % 2 + 1.0).expand(-1, *shape)
    )
    want = torch.full((1, 64, H, H), (9 + 2 * 27) / math.sqrt(9**2 + 27**2))
    torch.testing.assert_close(of_wall(camera()), want)


def test_cells_by_hand():
    """Of edge 1/2, and 8 along the axis of a surface. Below zero they go on, and axes have lattices of their own."""
    points = torch.tensor([[0.1, 0.9, 7.9], [0.4, 0.6, 0.0], [0.1, 0.9, -0.1], [0.1, 0.9, 8.1], [-0.1, 0.9, 7.9]])
    cells = cells_of(points, torch.full((5,), 2), 0.5)
    assert cells.min() >= 0 and cells[0] == cells[1] and len(set(cells.tolist())) == 4
    assert cells[0] == (2 << 60) + (0 << 40) + (1 << 20) + 0 and LONG == 16
    assert cells_of(points[:1], torch.tensor([0]), 0.5) == (0 << 60) + (0 << 40) + (1 << 20) + 15


@pytest.mark.parametrize("axis", range(3))
def test_a_surface_faces_its_axis(axis):
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    points = torch.stack([x, y, 0.4 * x - 0.5 * y], -1).roll(axis + 1, -1)  # its height is now the coordinate `axis`
    assert (facing(points[None]) == axis).all()


# ---------------------------------------------------------------- from two cameras


def test_a_point_has_the_same_noise_from_two_cameras():
    """A wall, seen by a camera that moves by three pixels: all pixels move by three, and so does the noise."""
    first, moved = of_wall(camera(0.003, 0.007), camera(0.003 + 3 * PIXEL, 0.007))
    assert correlation(first[..., 3:], moved[..., :-3]) > 0.95
    for other in (first, first[..., [*range(1, H), 0]]):  # the same pixels, which see other points
        assert abs(correlation(other, moved)) < 5 / math.sqrt(first.numel())


def test_a_point_that_seems_to_be_nearer_has_the_same_noise():
    """Cells are long along what the wall faces. Along the wall, points move by up to 0.8 of their edge."""
    wall = seen([camera()])
    nearer = noise(wall._replace(depth=wall.depth * (1 - EDGE)), [camera()])
    assert correlation(of_wall(camera()), nearer) > 0.5


@pytest.mark.parametrize("hw", [H // 2, 2 * H])
def test_the_rendering_may_have_another_size(hw):
    """The depth of a wall that is faced is then a little less exact, along its normal."""
    assert correlation(of_wall(camera(), hw=hw)[..., 3:-3, 3:-3], of_wall(camera())[..., 3:-3, 3:-3]) > 0.9


def test_it_is_fresh_where_nothing_is():
    """Left: opaque. Right: mist of opacity 0.4, whose noise is the fresh one; 0.6 has that of the wall."""
    opacity = torch.ones(H, H)
    opacity[:, H // 2 :] = 0.4
    half = noise(seen([camera()], opacity=opacity), [camera()])
    whole = of_wall(camera())
    assert (half[..., H // 2 :] == 7).all() and torch.equal(half[..., : H // 2 - 1], whole[..., : H // 2 - 1])
    torch.testing.assert_close(noise(seen([camera()], opacity=0.6), [camera()]), whole)


def test_other_seeds_and_draws_have_other_noise():
    plain = of_wall(camera())
    assert torch.equal(plain, of_wall(camera()))
    for other in (of_wall(camera(), seed=1), of_wall(camera(), draw=1)):
        assert abs(correlation(plain, other)) < 5 / math.sqrt(plain.numel())


# ---------------------------------------------------------------- in a run


def new(**options):
    """A run whose field is opaque in the middle, from the beginning."""
    optimisation = SJC(config(**{"noise": "surface", "vox": {"bbox_len": 0.5}, **options}), Affine())
    with torch.no_grad():
        optimisation.field.density[..., 1:3, 1:3, 1:3] = 40
    return optimisation


def noises(optimisation, i, draw=0):
    """(the noise of a step, the fresh one, where the object is) of its views."""
    cameras, rays = optimisation.views.of_step(i)
    r = optimisation.render_views(rays, 0)
    return optimisation.noise_at(cameras, r, i, draw), optimisation.noise_of(i, draw), r.opacity >= 0.5


def test_the_object_has_fixed_noise_and_what_is_round_it_fresh():
    n, fresh, solid = noises(new(batch_views=2), 1)
    changed = (n != fresh).all(1)
    assert torch.equal((n != fresh).any(1), changed) and 0 < changed.sum() < changed.numel()
    assert not (changed & ~solid).any() and changed.sum() > 0.8 * solid.sum()
    assert not n.requires_grad


def test_it_does_not_depend_on_the_step_but_the_attempt():
    optimisation = new()
    cameras, rays = optimisation.views.of_step(0)
    r = optimisation.render_views(rays, 0)
    of_step = [optimisation.noise_at(cameras, r, *at) for at in ((0, 0), (5, 0), (0, 1))]
    solid = (of_step[0] == of_step[1]).all(1)
    assert 0 < solid.sum() < solid.numel()
    assert not (of_step[0] == of_step[2]).any()


def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path):
    straight = run(new(batch_views=2))
    run(new(batch_views=2), last=3).save(tmp_path, 3)
    resumed = new(batch_views=2)
    assert_same(straight, run(resumed, first=resumed.load(checkpoint.latest(tmp_path))))
    assert_same(straight, run(new(batch_views=2, noise="fresh")), same=False)
    assert_same(straight, run(new(batch_views=2, seed=1)), same=False)


def test_fresh_noise_is_what_it_was():
    optimisation = new(noise="fresh")
    n, _, _ = noises(optimisation, 4)
    assert torch.equal(n, seeds.normal((1, 3, 6, 6), 0, torch.tensor([4]), "noise")[0])


@pytest.mark.parametrize("name", ["sjc", "sds", "csd", "nfsd", "bridge", "asd"])
def test_each_rule_that_adds_noise_takes_it(name):
    words = {"bad_words": "foggy"} if name in ("nfsd", "bridge", "csd") else {}
    fixed, fresh = (run(new(rule=name, noise=noise, **words), last=2) for noise in ("surface", "fresh"))
    assert_same(fixed, fresh, same=False)


@pytest.mark.parametrize("name", ["noiseless", "ism", "sdi"])
def test_rules_that_add_none_refuse_it(name):
    argv = ["--rule", name, "--noise", "surface", "--family", "ideal", "--sd.prompt", "a blue duck"]
    cfg = load(SJCConfig, argv, prog="x", doc="")
    with pytest.raises(UserError, match=f"--noise: not read with --rule {name}"):
        cfg.check_files()
    x, optimisation = torch.ones(1, 3, 6, 6), SJC(config(rule=name), Affine())
    answers = [optimisation.gradient(x, n * torch.ones_like(x), optimisation.views.draw(0), 1.7, 0) for n in (0, 3)]
    assert torch.equal(*answers)


def test_a_step_is_replayed(here, monkeypatch):  # noqa: F811
    """Its noise is that which the step had."""
    solid = {"noise": "surface", "vox": {"density_shift": 40}}
    monkeypatch.setattr("test_flight.config", lambda **options: config(**solid, **options))
    told = []
    gradient = SJC.gradient
    monkeypatch.setattr(SJC, "gradient", lambda self, x, n, *rest: told.append(n) or gradient(self, x, n, *rest))
    monkeypatch.setattr("test_flight.Small._denoise", lambda self, x, sigma, cond: x * math.nan)
    record = flight.read(failed())
    *_, recorded = told
    assert record.cfg.noise == "surface"
    flight.replay(record)
    assert torch.equal(told[-1], recorded)
    flight.replay(record, 0)
    assert not torch.equal(told[-1], recorded)
    record.cfg.noise = "fresh"
    flight.replay(record)
    assert (told[-1] != recorded).all(1).float().mean() > 0.2
