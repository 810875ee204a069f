"""The toy world: distances by hand, objects inside their ball, pictures whose light and sides are right."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pose
from my.errors import UserError
from toyworld import (
    ALL_PAIRS,
    COLORS,
    OBJECTS,
    TRAIN_PAIRS,
    UNSEEN_PAIRS,
    caption,
    compose,
    coverage_maps,
    distance,
    parse_prompt,
    render,
    sdf,
)
from toyworld.captions import read_prompt
from voxnerf.rays import pixel_rays

LEVEL = np.deg2rad(85)  # elevation draw of a camera a little above the horizon
BODY, ACCENT_R, ACCENT_B, ALPHA = 0, 1, 3, 4  # channels of coverage maps


def maps_from(obj, *azimuths, size=48, v=LEVEL):
    return coverage_maps(obj, [pose.camera_at(np.deg2rad(a), v, fov=55) for a in azimuths], size).float() / 255


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize(
    "solid, args, points",
    [
        (sdf.sphere, ((1, 0, 0), 0.5), {(1, 0, 0): -0.5, (1.25, 0, 0): -0.25, (2, 0, 0): 0.5, (1, 3, 4): 4.5}),
        (
            sdf.ellipsoid,
            ((0, 0, 0), (2, 1, 1)),
            {(1, 0, 0): -1, (2, 0, 0): 0, (0, 1, 0): 0, (4, 0, 0): 2, (0, 0, 3): 2},
        ),
        (sdf.ellipsoid, ((0, 0, 0), (2, 2, 2)), {(0, 3, 4): 3, (1, 0, 0): -1}),  # a ball: the estimate is exact
        (sdf.box, ((0, 0, 0), (1, 2, 3)), {(0, 0, 0): -1, (0.5, 0, 0): -0.5, (2, 0, 0): 1, (4, 6, 0): 5, (3, 4, 4): 3}),
        (sdf.box, ((0, 0, 0), (1, 2, 3), 0.5), {(1, 0, 0): 0, (1, 2, 3): 3**0.5 / 2 - 0.5, (0, 0, 0): -1}),
        (
            sdf.cylinder,
            ((0, 0, 0), 1, 2),
            {(0, 0, 0): -1, (0, 1.75, 0): -0.25, (3, 0, 0): 2, (0, -5, 0): 3, (4, 6, 0): 5},
        ),
        (sdf.cylinder, ((0, 0, 0), 1, 2, "x"), {(5, 0, 0): 3, (0, 1.5, 0): 0.5, (0, 0, 0.75): -0.25}),
        (
            sdf.cone,
            ((0, 0, 0), 3, 0, 2),  # its side goes from (rho, y) = (3, -2) to (0, 2), with normal (0.8, 0.6)
            {(0, 0, 0): -1.2, (1.5 + 1.6, 1.2, 0): 2, (0, -5, 0): 3, (0, 5, 0): 3, (6, -6, 0): 5, (0, -1.9, 0): -0.1},
        ),
        (sdf.torus, ((0, 0, 0), 2, 0.5), {(2, 0, 0): -0.5, (2, 1.5, 0): 1, (0, 0, 0): 1.5, (0, 3, 6): 4.5}),
        (sdf.torus, ((0, 0, 0), 2, 0.5, "x"), {(0, 2, 0): -0.5, (3, 0, 6): 4.5}),
        (
            sdf.capsule,
            ((0, 0, 0), (0, 4, 0), 1),
            {(0, 2, 0): -1, (3, 2, 0): 2, (0, 7, 0): 2, (3, 8, 0): 4, (0, -2, 0): 1},
        ),
        (sdf.half_space, ((0, 1, 0), (0, 1.0, 0)), {(5, 3, 0): 2, (0, 0, 9): -1}),
    ],
)
def test_primitive_by_hand(solid, args, points):
    got = solid(torch.tensor(list(points), dtype=torch.float32), *args)
    torch.testing.assert_close(got, torch.tensor(list(points.values()), dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_intersection_is_the_largest_distance():
    a, b = torch.tensor([-2.0, 1.0]), torch.tensor([-1.0, -3.0])
    assert sdf.intersect(a, b).tolist() == [-1.0, 1.0]


def sphere_points(n):
    """n points (n, 3) spread evenly over the unit sphere (Fibonacci)."""
    k = np.arange(n) + 0.5
    y, phi = 1 - 2 * k / n, np.pi * (1 + 5**0.5) * k
    r = np.sqrt(1 - y**2)
    return torch.tensor(np.stack([r * np.cos(phi), y, r * np.sin(phi)], axis=1), dtype=torch.float32)


@pytest.mark.parametrize("obj", OBJECTS)
def test_object_lies_inside_its_ball(obj):
    for radius in (render.BOUND, 0.7, 0.8, 1.0, 1.5):
        assert distance(obj, radius * sphere_points(4000)).min() > 0
    assert distance(obj, 0.45 * sphere_points(4000)).min() < 0  # and fills a good part of it


@pytest.mark.parametrize("obj", OBJECTS)
def test_traced_hits_lie_on_the_surface(obj):
    camera = pose.camera_at(0.7, 1.0, fov=50)
    rays_o, rays_d = pixel_rays(40, 40, camera.K(40, 40), camera.c2w)
    t = render._trace(obj, rays_o, rays_d)
    hit = torch.isfinite(t)
    assert 0.05 < hit.float().mean() < 0.7
    assert distance(obj, rays_o[hit] + t[hit, None] * rays_d[hit]).abs().max() <= render.HIT
    for t_miss in torch.linspace(0.8, 2.2, 141):  # a ray that misses stays outside all along
        assert distance(obj, rays_o[~hit] + t_miss * rays_d[~hit]).min() > -1e-3


# ---------------------------------------------------------------- pictures


def test_compose_by_hand():
    maps = torch.tensor([51, 0, 51, 102, 204], dtype=torch.uint8)[:, None, None]  # 0.2, (0, 0.2, 0.4), 0.8
    picture = compose(maps, (1.0, 0.5, 0.0), (1.0, 1.0, 0.5))
    want = torch.tensor([0.2 * 1 + 0 + 0.2 * 1, 0.2 * 0.5 + 0.2 + 0.2 * 1, 0.2 * 0 + 0.4 + 0.2 * 0.5])
    torch.testing.assert_close(picture[:, 0, 0], want)
    batch = compose(maps.expand(2, 5, 3, 3), "red", torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
    assert batch.shape == (2, 3, 3, 3)
    assert batch[0, 0, 0, 0] - batch[1, 0, 0, 0] == pytest.approx(0.2)


def test_maps_are_shaded_coverage():
    maps = maps_from("castle", 30)[0]
    assert maps.shape == (5, 48, 48)
    assert (maps[:4].amax(0) <= maps[ALPHA] + 1 / 255).all()  # shading never exceeds coverage
    assert maps[ALPHA, 0].max() == 0 and maps[ALPHA].max() == 1


def test_left_is_the_mirror_of_right():
    left, right = maps_from("duck", 90, 270)
    assert (left[ALPHA] - right[ALPHA].flip(1)).abs().mean() < 2e-3
    assert (left[ALPHA] - right[ALPHA]).abs().mean() > 0.05  # the head is on one side: not its own mirror


def test_duck_faces_left_in_its_left_view():
    left = maps_from("duck", 90)[0]
    head = left[ALPHA, :20].sum(0)  # columns of the upper rows
    assert head[:24].sum() > 2 * head[24:].sum()  # it looks along -x, which a camera at +z sees to the left


def test_front_is_not_the_back():
    front, back = maps_from("duck", 0, 180)
    for seen in (back, back.flip(2)):
        assert (front - seen)[:4].abs().mean() > 0.01


def test_orange_beak_shows_from_the_front_only():
    front, back = maps_from("duck", 0, 180)
    orange = [((m[ACCENT_R] - m[ACCENT_B]) > 0.4).sum().item() for m in (front, back)]
    assert orange[0] > 15 and orange[1] == 0


def centre_brightness(eye, target):
    camera = pose.Camera(pose.look_at(eye, target), 40.0)
    return coverage_maps("icecream", [camera], size=33, subpixels=1)[0, BODY, 16, 16].item()


def test_light_is_fixed_in_the_world():
    # The scoop is a ball of radius 0.29 at (0, 0.2, 0). With l the unit light, |(-0.45, 0.8, 0.4)| = 1.00125,
    # its front has normal (-1, 0, 0), n.l = 0.4494, and brightness 0.35 + 0.65 (0.5 + 0.5 n.l) = 0.8211.
    front = (-0.29, 0.2, 0)
    for eye in ((-1.5, 0.2, 0), (-1.2, 0.5, 0.9), (-1.2, 0.0, -0.9)):  # one point, from everywhere
        assert centre_brightness(eye, front) == pytest.approx(0.8211 * 255, abs=1)
    assert centre_brightness((1.5, 0.2, 0), (0.29, 0.2, 0)) == pytest.approx(0.5289 * 255, abs=1)


def test_round_object_is_brighter_on_the_lit_side():
    left, right = maps_from("icecream", 90, 270)
    assert (left[ALPHA] - right[ALPHA]).abs().max() <= 1 / 4 and left[BODY].sum() > 1.1 * right[BODY].sum()


# ---------------------------------------------------------------- names


def test_the_world_is_big_enough():
    assert len(OBJECTS) >= 10 and len(COLORS) >= 6
    assert len(UNSEEN_PAIRS) >= 8 and len(set(UNSEEN_PAIRS)) == len(UNSEEN_PAIRS)
    assert set(UNSEEN_PAIRS) <= set(ALL_PAIRS) and not set(UNSEEN_PAIRS) & set(TRAIN_PAIRS)
    assert len(TRAIN_PAIRS) + len(UNSEEN_PAIRS) == len(ALL_PAIRS) == len(OBJECTS) * len(COLORS)
    assert {c for c, _ in TRAIN_PAIRS} == set(COLORS) and {o for _, o in TRAIN_PAIRS} == set(OBJECTS)


def test_colours_are_well_separated():
    gaps = [np.linalg.norm(np.subtract(a, b)) for a, b in itertools.combinations(COLORS.values(), 2)]
    assert min(gaps) > 0.5  # RGB in [0, 1]; blue and purple are nearest


def test_captions_read_back():
    assert caption("blue", "duck", "left side view of") == "left side view of a blue duck"
    assert caption("blue", "duck") == "a blue duck"
    views = {view for words in pose.VIEW_WORDS for view in pose.all_view_prompts(words)}
    for (color, obj), view in itertools.product(ALL_PAIRS, ["", *views]):
        assert parse_prompt(caption(color, obj, view)) == (color, obj)
    assert parse_prompt("A Blue, duck") == ("blue", "duck")


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a duck",
        "a blue",
        "a blue red duck",
        "a blue duck car",
        "a blue dog",
        "a mauve duck",
        "A high quality photo of a delicious burger",
    ],
)
def test_prompt_outside_the_world(prompt):
    with pytest.raises(ValueError, match="colours: red .*objects: duck"):
        parse_prompt(prompt)


def test_prompts_are_read_without_pytorch():
    """Whoever mistypes a prompt is not to wait for it."""
    code = "import sys, options.sjc, toyworld.captions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


@pytest.mark.parametrize("prompt", ["a blue duck with a hat", "a blue duck, running"])
def test_words_that_would_not_be_drawn_are_refused(prompt):
    with pytest.raises(
        UserError, match="--sd.prompt: the toy world has no .*, and would draw 'a blue duck': ask for that"
    ):
        read_prompt(prompt, "--sd.prompt")


@pytest.mark.parametrize("prompt", ["a blue duck", "A Blue Duck.", "the duck, blue", "left side view of a blue duck"])
def test_words_of_captions_are_read(prompt):
    assert read_prompt(prompt, "--sd.prompt") == ("blue", "duck")
