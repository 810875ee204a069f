"""View words at azimuths checked by hand: 0 is the front, 90 degrees the object's left, camera at +z."""

import numpy as np
import pytest

import pose

LOW, HIGH, OVERHEAD = np.deg2rad([80.0, 45.0, 15.0])


def test_cameras_stand_where_their_words_say():
    horizon = np.pi / 2
    for azimuth, eye in ((0, (-1.5, 0, 0)), (90, (0, 0, 1.5)), (180, (1.5, 0, 0)), (270, (0, 0, -1.5))):
        np.testing.assert_allclose(pose.eye_on_sphere(np.deg2rad(azimuth), horizon, 1.5), eye, atol=1e-12)
    assert pose.eye_on_sphere(0, OVERHEAD, 1)[1] == pytest.approx(1 - 2 * 15 / 180)  # y = cos phi = 1 - 2 v / pi


@pytest.mark.parametrize("azimuth, side", [
    (0, "front"), (44, "front"), (46, "left side"), (90, "left side"), (134, "left side"), (136, "backside"),
    (180, "backside"), (226, "right side"), (270, "right side"), (314, "right side"), (316, "front"), (359, "front")])
def test_sides(azimuth, side):
    a = np.deg2rad(azimuth)
    assert pose.view_prompt(a, LOW, "sides") == f"{side} view of"
    assert pose.view_prompt(a, HIGH, "sides") == f"{side} view of"
    assert pose.view_prompt(a, OVERHEAD, "sides") == "overhead view of"


@pytest.mark.parametrize("azimuth, side", [
    (0, "front"), (22, "front"), (23, "front left"), (45, "front left"), (90, "left side"), (135, "back left"),
    (180, "backside"), (225, "back right"), (270, "right side"), (315, "front right"), (338, "front")])
def test_octants(azimuth, side):
    a = np.deg2rad(azimuth)
    assert pose.view_prompt(a, LOW, "octants") == f"{side} view of"
    assert pose.view_prompt(a, HIGH, "octants") == f"high {side} view of"
    assert pose.view_prompt(a, OVERHEAD, "octants") == f"overhead {side} view of"


def test_height_changes_at_30_and_65_degrees():
    for words, below, above in (("sjc", "overhead view of", "front view of"),
                                ("octants", "overhead front view of", "high front view of")):
        assert pose.view_prompt(0, np.deg2rad(29.9), words) == below
        assert pose.view_prompt(0, np.deg2rad(30.1), words) == above
    assert pose.view_prompt(0, np.deg2rad(65.1), "octants") == "front view of"


@pytest.mark.parametrize("words", pose.VIEW_WORDS)
def test_all_view_prompts_are_those_that_cameras_get(words):
    rng = np.random.default_rng(0)
    drawn = {pose.train_camera(rng, words=words).view for _ in range(2000)}
    assert drawn == set(pose.all_view_prompts(words))
