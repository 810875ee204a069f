"""View words at azimuths checked by hand: 0 is the front, 90 degrees the object's left, camera at +z."""

import numpy as np
import pytest

import pose
from my.errors import UserError

LOW, HIGH, OVERHEAD = np.deg2rad([80.0, 45.0, 15.0])


def test_cameras_stand_where_their_words_say():
    horizon = np.pi / 2
    for azimuth, eye in ((0, (-1.5, 0, 0)), (90, (0, 0, 1.5)), (180, (1.5, 0, 0)), (270, (0, 0, -1.5))):
        np.testing.assert_allclose(pose.eye_on_sphere(np.deg2rad(azimuth), horizon, 1.5), eye, atol=1e-12)
    assert pose.eye_on_sphere(0, OVERHEAD, 1)[1] == pytest.approx(1 - 2 * 15 / 180)  # y = cos phi = 1 - 2 v / pi


@pytest.mark.parametrize(
    "azimuth, side",
    [
        (0, "front"),
        (44, "front"),
        (46, "left side"),
        (90, "left side"),
        (134, "left side"),
        (136, "backside"),
        (180, "backside"),
        (226, "right side"),
        (270, "right side"),
        (314, "right side"),
        (316, "front"),
        (359, "front"),
    ],
)
def test_sides(azimuth, side):
    a = np.deg2rad(azimuth)
    assert pose.view_prompt(a, LOW, "sides") == f"{side} view of"
    assert pose.view_prompt(a, HIGH, "sides") == f"{side} view of"
    assert pose.view_prompt(a, OVERHEAD, "sides") == "overhead view of"


@pytest.mark.parametrize(
    "azimuth, side",
    [
        (0, "front"),
        (22, "front"),
        (23, "front left"),
        (45, "front left"),
        (90, "left side"),
        (135, "back left"),
        (180, "backside"),
        (225, "back right"),
        (270, "right side"),
        (315, "front right"),
        (338, "front"),
    ],
)
def test_octants(azimuth, side):
    a = np.deg2rad(azimuth)
    assert pose.view_prompt(a, LOW, "octants") == f"{side} view of"
    assert pose.view_prompt(a, HIGH, "octants") == f"high {side} view of"
    assert pose.view_prompt(a, OVERHEAD, "octants") == f"overhead {side} view of"


def test_height_changes_at_30_and_65_degrees():
    for words, below, above in (
        ("sjc", "overhead view of", "front view of"),
        ("octants", "overhead front view of", "high front view of"),
    ):
        assert pose.view_prompt(0, np.deg2rad(29.9), words) == below
        assert pose.view_prompt(0, np.deg2rad(30.1), words) == above
    assert pose.view_prompt(0, np.deg2rad(65.1), "octants") == "front view of"


@pytest.mark.parametrize("words", pose.VIEW_WORDS)
def test_all_view_prompts_are_those_that_cameras_get(words):
    rng = np.random.default_rng(0)
    drawn = {pose.train_camera(rng, words=words).view for _ in range(2000)}
    assert drawn == set(pose.all_view_prompts(words))


def test_where_the_words_stand():
    view = "front view of"
    assert pose.prompt_of_view("a duck", view) == "front view of a duck"
    assert pose.prompt_of_view("a duck", view, "suffix") == "a duck, front view"
    assert pose.prompt_of_view("a duck", view, "none") == "a duck"


def test_texts_of_ones_own():
    texts = pose.read_view_texts(["backside=the tail of", "overhead view of = a map of"], "sjc")
    assert texts == {"backside view of": "the tail of", "overhead view of": "a map of"}
    assert pose.prompt_of_view("a duck", "backside view of", "prefix", texts) == "the tail of a duck"
    assert pose.prompt_of_view("a duck", "front view of", "prefix", texts) == "front view of a duck"
    for bad in ("back=x", "front", "=x", "left side=x"):
        with pytest.raises(
            UserError, match=f"--pose.view_texts {bad!r}: expected VIEW=TEXT, TEXT .* one of .*backside"
        ):
            pose.read_view_texts([bad], "sjc")
    with pytest.raises(UserError, match="'side view of=x': this view has the text 'the flank of' already"):
        pose.read_view_texts(["side=the flank of", "side view of=x"], "sjc")


@pytest.mark.parametrize("style", ["prefix", "suffix"])
def test_an_empty_text_means_no_words_for_that_view(style):
    texts = pose.read_view_texts(["front="], "sjc")
    assert pose.prompt_of_view("a duck", "front view of", style, texts) == "a duck"
    assert "side view" in pose.prompt_of_view("a duck", "side view of", style, texts)


# ---------------------------------------------------------------- Perp-Neg


def perp_neg(azimuth, v=LOW):
    return pose.perp_neg_views(pose.camera_at(np.deg2rad(azimuth), v))


F, S, B = "front view of", "side view of", "backside view of"


@pytest.mark.parametrize(
    "azimuth, positive, negative",
    [
        (0, {F: 1, S: 0}, {F: 0, S: 1.574}),  # 4 exp(-1/2) - 2.426 = 0.0001, 4 - 2.426 = 1.574
        (90, {S: 1, B: 0}, {S: 0, F: 1.5735}),  # exp(-1/2) + 0.967
        (180, {S: 0, B: 1}, {S: 0.394, F: 1.967}),  # 1 - 0.606, 1 + 0.967
        (45, {F: 0.5, S: 0.5}, {F: 0.6892, S: 0.6892}),  # 4 exp(-1/4) - 2.426
        (270, {S: 1, B: 0}, {S: 0, F: 1.5735}),
        (315, {F: 0.5, S: 0.5}, {F: 0.6892, S: 0.6892}),
    ],
)
def test_perp_neg_by_hand(azimuth, positive, negative):
    got, away = perp_neg(azimuth)
    assert got == pytest.approx(positive, abs=1e-9) and away == pytest.approx(negative, abs=1e-3)


def test_perp_neg_is_continuous_and_only_below_overhead():
    for a in (90, 180, 270, 360):
        (p, n), (q, m) = perp_neg(a - 1e-6), perp_neg(a + 1e-6)
        for view in (F, S, B):
            assert p.get(view, 0) == pytest.approx(q.get(view, 0), abs=1e-5)
            assert n.get(view, 0) == pytest.approx(m.get(view, 0), abs=1e-3)
    assert perp_neg(20, OVERHEAD) == ({"overhead view of": 1}, {})
