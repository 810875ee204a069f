"""Lenses: OpenCV's formulas by hand, their inverses, and where they end."""

import math

import numpy as np
import pytest
import torch

from voxnerf.lens import Lens, Lenses, distort
from voxnerf.rays import pixel_rays

BARREL = Lens(num=(-0.2, 0.03, 0.0, 0.0))
LENSES = [
    Lens(num=(0.3, 0.0, 0.0, 0.0)),
    BARREL,
    Lens(num=(-0.28, 0.09, -0.01, 0.0), p=(0.002, -0.003)),
    Lens(num=(0.1, 0.05, 0.02, 0.01)),
    Lens(num=(1.2, 0.4, 0.02, 0.0), den=(1.4, 0.7, 0.09), p=(-0.001, 0.0005)),
    Lens(fisheye=True),
    Lens(fisheye=True, num=(-0.03, 0.006, -0.003, 0.0005)),
]


def seen_at(lens, x, y):
    """Where a lens shows the direction (x, y, 1), by the formulas of OpenCV's manual, one number at a time."""
    s = x * x + y * y
    if lens.fisheye:
        r, theta = math.sqrt(s), math.atan(math.sqrt(s))
        k1, k2, k3, k4 = lens.num
        bent = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8)
        return (bent / r * x, bent / r * y) if r else (0.0, 0.0)
    k1, k2, k3, k_r8 = lens.num
    k4, k5, k6 = lens.den
    p1, p2 = lens.p
    q = (1 + k1 * s + k2 * s**2 + k3 * s**3 + k_r8 * s**4) / (1 + k4 * s + k5 * s**2 + k6 * s**3)
    return (x * q + 2 * p1 * x * y + p2 * (s + 2 * x * x), y * q + p1 * (s + 2 * y * y) + 2 * p2 * x * y)


def directions(lens, points):
    """Directions (n, 3) and whether they are in reach (n,), of points (n, 2), in OpenCV's frame: y down, 1 ahead."""
    rays, ok = Lenses([lens]).directions(torch.zeros(1, dtype=torch.long), torch.tensor(points).double()[None])
    return rays[0] * torch.tensor([1, -1, -1]), ok[0]


def test_distortion_by_hand():
    """k1 = 0.1 at (0.5, 0): r^2 = 1/4, so 0.5 (1 + 0.025). p1 = 0.01, p2 = 0.02 at (0.5, 0.25): r^2 = 0.3125."""
    none = torch.zeros(4), torch.zeros(3), torch.zeros(2)
    point, _ = distort(torch.tensor([0.5, 0.0]), torch.tensor([0.1, 0, 0, 0]), *none[1:])
    assert point.tolist() == pytest.approx([0.5125, 0])
    point, _ = distort(torch.tensor([0.5, 0.25]), none[0], none[1], torch.tensor([0.01, 0.02]))
    assert point.tolist() == pytest.approx([0.5 + 0.0025 + 0.01625, 0.25 + 0.004375 + 0.005])
    point, _ = distort(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0, 0, 0]), torch.tensor([1.0, 0, 0]), none[2])
    assert point.tolist() == pytest.approx([1.5 / 2, 0])


def test_slopes_are_those_of_the_distortion():
    lens = LENSES[4]
    values = [torch.tensor(each, dtype=torch.float64) for each in (lens.num, lens.den, lens.p)]
    point = torch.tensor([0.4, -0.7], dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda at: distort(at, *values)[0], point)
    _, (a, b, d) = distort(point, *values)
    torch.testing.assert_close(slopes, torch.stack([torch.stack([a, b]), torch.stack([b, d])]))


@pytest.mark.parametrize("lens", LENSES, ids=str)
def test_inverse_leads_back(lens):
    plane = [(x, y) for x in np.linspace(-0.9, 0.9, 13) for y in np.linspace(-0.7, 0.7, 9)]
    rays, ok = directions(lens, [seen_at(lens, *point) for point in plane])
    assert ok.all()
    np.testing.assert_allclose(rays[:, :2] / rays[:, 2:], plane, atol=1e-10)


def test_fisheye_sees_beyond_a_right_angle():
    """Equidistant: 2 radians off the axis are seen at 2, and lie behind; nothing is seen beyond pi."""
    rays, ok = directions(Lens(fisheye=True), [(math.pi / 4, 0), (0, 2.0), (0, 3.2), (0, 0)])
    assert rays[0].tolist() == pytest.approx([math.sqrt(0.5), 0, math.sqrt(0.5)])
    assert rays[1].tolist() == pytest.approx([0, math.sin(2), math.cos(2)])
    assert ok.tolist() == [True, True, False, True] and rays[3].tolist() == [0, 0, 1]


@pytest.mark.parametrize("fisheye", [False, True])
def test_reach_is_where_the_model_folds_back(fisheye):
    """r (1 - r^2 / 3) rises up to r = 1, where it is 2/3: nothing is seen beyond, and rays stay finite."""
    lens = Lens(fisheye=fisheye, num=(-1 / 3, 0, 0, 0))
    assert lens.reach == pytest.approx(1)
    rays, ok = directions(lens, [(0.66, 0), (0.67, 0), (50.0, 50.0)])
    assert ok.tolist() == [True, False, False] and rays.isfinite().all()
    assert math.atan2(rays[1, 0], rays[1, 2]) == pytest.approx(1 if fisheye else math.pi / 4)


def test_reach_of_other_lenses():
    """A pole of q at r = 1/2; a lens that never folds back reaches 85 degrees, a fisheye all round."""
    assert Lens(den=(-4.0, 0, 0)).reach == pytest.approx(0.5)
    assert Lens().reach == pytest.approx(math.tan(math.radians(85))) and Lens(fisheye=True).reach == math.pi
    assert Lens(num=(0.1, 1e-300, 0, 0)).reach == pytest.approx(math.tan(math.radians(85)))


def test_each_ray_has_its_own_lens():
    points = torch.tensor([[0.3, 0.2], [0.3, 0.2], [-0.1, 0.4]], dtype=torch.float64)[:, None]
    which = torch.tensor([1, 6, 0])
    rays, ok = Lenses(LENSES).directions(which, points)
    for i, lens in enumerate(which):
        one, _ = Lenses([LENSES[lens]]).directions(torch.zeros(1, dtype=torch.long), points[i][None])
        torch.testing.assert_close(rays[i], one[0])
    assert ok.all()


def test_rays_of_an_image_pass_through_its_lens():
    """Right of the middle and above it: the ray that a barrel lens bends there came from farther out."""
    K = torch.tensor([[2.0, 0, -2], [0, -2, -2], [0, 0, -1]], dtype=torch.float64)
    _, straight = pixel_rays(5, 5, K, torch.eye(4), dtype=torch.float64)
    _, bent = pixel_rays(5, 5, K, torch.eye(4), dtype=torch.float64, lens=BARREL)
    x, y, z = bent[3]  # row 0, column 3: (0.5, -1) in OpenCV's image coordinates
    assert seen_at(BARREL, x / -z, y / z) == pytest.approx((0.5, -1.0))
    assert -z < -straight[3, 2] and y > 0 and torch.equal(bent[12], straight[12])
    _, flat = pixel_rays(5, 5, K, torch.eye(4), dtype=torch.float64, lens=Lens())
    assert torch.equal(flat, straight)
