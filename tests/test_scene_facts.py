"""What transforms files state, one fact after another: used with its right value, or refused, or told in one line."""

import json
import math
import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import pose
from my.errors import UserError
from posed import POSE, H, K_of, W, blender, edit, frame, picture, whole
from voxnerf.lens import Lens
from voxnerf.scene import load_scene, load_scenes
from voxnerf.scene.facts import NO_MEANING, REFUSED, UNUSED, USED

ROOT = Path(__file__).resolve().parent.parent
ANGLE, FL = 0.6911112070083618, 88.88888249550146  # of 64 pixels
PINHOLE = {"fl_x": FL, "fl_y": FL, "cx": 32.0, "cy": 32.0, "w": 64, "h": 64}


def reported(folder, entries, name="transforms.json", missing=(), **common):
    """Write a scene in a spelling that users have reported, and return its folder.

    Its pictures are noise. Where a frame has a mask, a red bar covers what the mask hides.
    """
    rng = np.random.default_rng(0)
    for i, entry in enumerate(entries):
        w, h = ((entry | common).get(k, 64) for k in "wh")
        image, mask = rng.integers(0, 200, (h, w, 3), dtype=np.uint8), np.full((h, w), 255, np.uint8)
        if "mask_path" in entry:
            mask[:, 3 * i : 3 * i + 16] = 0
            image[mask == 0] = (255, 0, 0)
            (folder / entry["mask_path"]).parent.mkdir(exist_ok=True)
            iio.imwrite(folder / entry["mask_path"], mask)
        path = folder / entry["file_path"].replace("\\", "/")
        path.parent.mkdir(exist_ok=True)
        if i not in missing:
            iio.imwrite(path, image)
    frames = [entry | {"transform_matrix": POSE.tolist()} for entry in entries]
    (folder / name).write_text(json.dumps({"frames": frames, **common}))
    return folder


def images(n=16, slash="/", **more):
    """The entries of n frames that lie in images/, without their poses."""
    return [{"file_path": f"images{slash}{i:04d}.png", **more} for i in range(n)]


def notes(capsys):
    """The notes so far, each a line that a person can read."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert all(line.isprintable() and len(re.sub(r"\S*/\S*", "", line)) <= 300 for line in lines), lines
    return lines


def K_whole(folder, n=9, split="train", **common):
    """The first K of a scene of one file."""
    return load_scene(whole(folder, n=n, **common), split).K[0]


# ---------------------------------------------------------------- scenes that users have reported


def test_camera_angle_y(tmp_path):
    """0.691 radians over 64 and over 32 pixels: 32 / tan 0.3456 and 16 / tan 0.3456."""
    common = {"w": 64, "h": 32, "camera_angle_x": ANGLE, "camera_angle_y": ANGLE, "aabb_scale": 4}
    scene = load_scene(reported(tmp_path, images(), **common), "train")
    assert scene.sizes == [(32, 64)] * 14
    torch.testing.assert_close(scene.K[0], K_of(88.8889, 44.4444, 31.5, 15.5), atol=1e-3, rtol=0)


def test_masks_of_frames(tmp_path, capsys):
    masked = [entry | {"mask_path": entry["file_path"].replace("images", "masks")} for entry in images()]
    folder = reported(tmp_path, masked, **PINHOLE)
    train, test = load_scenes(folder)
    assert len(train.names) == 14 and test.names == ["images/0000.png", "images/0008.png"] and not notes(capsys)
    for scene in (train, test):
        for name, image, usable in zip(scene.names, scene.images, scene.usable):
            mask = iio.imread(folder / name.replace("images", "masks"))
            assert np.array_equal(usable, mask.reshape(*mask.shape[:2], -1)[..., 0] > 0) and 0 < usable.sum() < 64 * 64
            red = (image[..., 0] > 200) & (image[..., 1:].amax(dim=-1) < 30)
            assert red[~usable].all()  # the bars


def test_missing_pictures_are_left_out(tmp_path, capsys):
    folder = reported(tmp_path, images(), missing=(3, 7, 8), **PINHOLE)
    train, test = load_scenes(folder)
    assert test.names == ["images/0000.png", "images/0011.png"]  # the 1st and the 9th of those that are there
    assert len(train.names) == 11 and not {"images/0003.png", "images/0007.png", "images/0008.png"} & set(train.names)
    (line,) = notes(capsys)
    assert "3 of 16 frames are left out" in line and "images/0003.png, images/0007.png, ...;" in line
    with pytest.raises(
        UserError,
        match=r"frames\[3\] \(images/0003.png\): no picture .*; 3 of 16 frames have none; "
        "put them there, or leave out --strict True",
    ):
        load_scenes(folder, strict=True)


def test_two_cameras(tmp_path, capsys):
    common = {"k1": 0.0, "camera_model": "OPENCV"}
    small = common | {"fl_x": 0.75 * FL, "fl_y": 0.75 * FL, "cx": 24.0, "cy": 24.0, "w": 48, "h": 48}
    cameras = [small, common | PINHOLE]
    entries = [entry | cameras[i % 2] for i, entry in enumerate(images())]
    scene = load_scene(reported(tmp_path, entries), "train")
    assert scene.sizes[:3] == [(64, 64), (48, 48), (64, 64)] and scene.lenses is None and not notes(capsys)
    torch.testing.assert_close(scene.K[0], K_of(88.8889, 88.8889, 31.5, 31.5), atol=1e-3, rtol=0)
    torch.testing.assert_close(scene.K[1], K_of(66.6667, 66.6667, 23.5, 23.5), atol=1e-3, rtol=0)


def test_train_split_only(tmp_path, capsys):
    entries = [{"file_path": f"train/{i:04d}.png"} for i in range(1, 13)]
    folder = reported(tmp_path, entries, "transforms_train.json", camera_angle_x=ANGLE, w=64, h=64)
    train, test = load_scenes(folder)
    assert test.names == ["train/0001.png", "train/0009.png"] and len(train.names) == 10
    assert not set(test.names) & set(train.names)
    (line,) = notes(capsys)
    assert "2 of 12 are held out, every 8th" in line and "add a transforms_test.json" in line


def test_windows_paths(tmp_path, capsys):
    scene = load_scene(reported(tmp_path, images(slash="\\"), **PINHOLE), "train")
    assert len(scene.names) == 14 and scene.names[0] == "images\\0001.png" and not notes(capsys)
    assert np.array_equal(scene.images[0], iio.imread(tmp_path / "images" / "0001.png"))


# ---------------------------------------------------------------- focal lengths


@pytest.mark.parametrize(
    "common, fl_x, fl_y",
    [
        ({"x_fov": 90, "y_fov": 90}, 2, 1),  # instant-ngp, degrees
        ({"camera_angle_y": math.pi / 2}, 1, 1),  # one alone: square pixels
        ({"fl_y": 3}, 3, 3),
        ({"fl_x": 3, "camera_angle_y": math.pi / 2}, 3, 1),
        ({"fl_x": 3, "fl_y": 4, "camera_angle_y": 2 * math.atan(1 / 4)}, 3, 4),
        ({"fl_x": 6, "w": 2 * W}, 3, 3),  # stated for twice the size, whose height follows
        ({"fl_x": 6, "camera_angle_y": math.pi / 2, "h": 2 * H}, 3, 1),
    ],
)
def test_focal_lengths(tmp_path, capsys, common, fl_x, fl_y):
    torch.testing.assert_close(K_whole(tmp_path, **common), K_of(fl_x, fl_y, 1.5, 0.5))
    assert not notes(capsys)


@pytest.mark.parametrize("stated", [{"is_fisheye": 1}, {"camera_model": "opencv_fisheye"}])
def test_a_fisheye_may_be_wider_than_a_pinhole(tmp_path, stated):
    assert K_whole(tmp_path, fl_x=0.39, **stated)[0, 0] == 0.39


def test_focal_lengths_of_frames_go_before_those_of_the_file(tmp_path, capsys):
    frames = [frame("images/00.png"), frame("images/01.png", camera_angle_x=math.pi / 2)]
    torch.testing.assert_close(load_scene(whole(tmp_path, frames, fl_x=9), "train").K[0], K_of(2, 2, 1.5, 0.5))
    assert not notes(capsys)


def test_focal_lengths_that_contradict_each_other(tmp_path, capsys):
    assert K_whole(tmp_path, fl_x=3, camera_angle_x=math.pi / 2)[0, 0] == 3
    (line,) = notes(capsys)
    assert "all of 7 frames: fl_x and camera_angle_x state different focal lengths: fl_x is used" in line


@pytest.mark.parametrize("cx, told", [(1, False), (3, False), (0.9, True), (3.1, True), (0.4, True)])
def test_principal_point_far_from_the_middle(tmp_path, capsys, cx, told):
    """Of 4 pixels, a quarter off the middle is 1 to 3, as shift lenses reach; up to 0.4 off is told of."""
    assert K_whole(tmp_path, fl_x=3, cx=cx)[0, 2].item() == pytest.approx(-(cx - 0.5))
    lines = notes(capsys)
    assert len(lines) == told and all("more than a quarter of the picture off its middle" in line for line in lines)


# ---------------------------------------------------------------- lenses


@pytest.mark.parametrize(
    "stated, lens",
    [
        ({"k1": 0.1, "k2": 0.2, "k3": 0.3, "p1": 0.01, "p2": 0.02}, Lens(num=(0.1, 0.2, 0.3, 0), p=(0.01, 0.02))),
        ({"camera_model": "SIMPLE_RADIAL", "k1": 0.1}, Lens(num=(0.1, 0, 0, 0))),
        ({"camera_model": "FULL_OPENCV", "k1": 0.1, "k4": 0.2}, Lens(num=(0.1, 0, 0, 0), den=(0.2, 0, 0))),
        ({"k4": 0.2, "k6": 0.1}, Lens(den=(0.2, 0, 0.1))),
        ({"distortion_params": [0.1, 0.2, 0.3, 0, 0.01, 0.02]}, Lens(num=(0.1, 0.2, 0.3, 0), p=(0.01, 0.02))),
        ({"camera_model": "OPENCV_FISHEYE", "k1": 0.1, "k4": 0.2}, Lens(True, (0.1, 0, 0, 0.2))),
        ({"camera_model": "opencv_fisheye"}, Lens(True)),
        ({"is_fisheye": True, "k2": 0.1}, Lens(True, (0, 0.1, 0, 0))),
    ],
)
def test_lenses(tmp_path, capsys, stated, lens):
    scene = load_scene(whole(tmp_path, fl_x=3, **stated), "train")
    assert scene.lenses == [lens] and not notes(capsys)
    train, _ = load_scenes(edit(blender_in(tmp_path), k1=0.5))  # of one frame alone
    assert train.lenses == [Lens(num=(0.5, 0, 0, 0)), Lens()]


def blender_in(folder):
    """A scene in a folder of its own below another."""
    (folder / "blender").mkdir()
    return blender(folder / "blender")


@pytest.mark.parametrize(
    "stated, lens, words",
    [
        ({"k4": 0.2}, Lens(num=(0, 0, 0, 0.2)), "k4 is taken for the factor of r^8"),
        ({"camera_model": "PINHOLE", "k1": 0.1}, Lens(num=(0.1, 0, 0, 0)), "camera_model PINHOLE has no coefficients"),
        ({"camera_model": "OPENCV", "is_fisheye": True}, Lens(True), "are two lenses: the fisheye is used"),
    ],
)
def test_lenses_that_are_told_of(tmp_path, capsys, stated, lens, words):
    assert load_scene(whole(tmp_path, fl_x=3, **stated), "train").lenses == [lens]
    (line,) = notes(capsys)
    assert words in line


def test_pixels_beyond_the_reach_of_a_lens_are_left_out(tmp_path, capsys):
    """k1 = -1/3 shows nothing beyond 2/3: of pixels at 0.25 to 0.75 of the focal length, the corners."""
    scene = load_scene(whole(tmp_path, fl_x=2, k1=-1 / 3), "train")
    assert scene.usable[0].tolist() == [[False, True, True, False]] * H
    assert any("4 pixels lie where the lens as it is stated maps nothing, and are left out" in x for x in notes(capsys))


def test_fisheye_crop_radius(tmp_path):
    """Pixels of w x h from the picture's middle: 3 there are 1.5 here."""
    scene = load_scene(whole(tmp_path, fl_x=9, w=2 * W, h=2 * H, fisheye_crop_radius=3, is_fisheye=True), "train")
    assert scene.usable[0].tolist() == [[False, True, True, False]] * H


# ---------------------------------------------------------------- masks


def masked(folder, mask, name="m.png"):
    """A scene of two frames, the one to train on with a mask."""
    frames = [frame("images/00.png"), frame("images/01.png", mask_path=name)]
    whole(folder, frames, fl_x=3)
    iio.imwrite(folder / name, np.array(mask, np.uint8))
    return folder


def test_mask_is_whole_in_a_reduced_pixel(tmp_path):
    scene = load_scene(masked(tmp_path, [[0, 255, 255, 255], [255, 255, 255, 1]]), "train", downscale=2)
    assert scene.usable[0].tolist() == [[False, True]]


def test_one_mask_among_views_without(tmp_path):
    folder = masked(tmp_path, [[0, 255, 255, 255]] * 2)
    assert load_scene(folder, "test").usable is None and load_scene(folder, "train").usable[0].sum() == 6


def test_mask_that_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="its mask leaves no pixel, nor do those of all 1 views.*a mask is 0"):
        load_scene(masked(tmp_path, [[0] * 4] * 2), "train")


def test_view_whose_mask_leaves_nothing_is_left_out(tmp_path, capsys):
    frames = [frame("images/00.png"), frame("images/01.png", mask_path="m.png"), frame("images/02.png")]
    iio.imwrite(tmp_path / "m.png", np.zeros((H, W), np.uint8))
    assert load_scene(whole(tmp_path, frames, fl_x=3), "train").names == ["images/02.png"]
    assert "1 views are left out, as masks leave no pixel of them" in notes(capsys)[0]


def test_mask_of_another_size(tmp_path):
    with pytest.raises(UserError, match="m.png is 2x1, and its picture is 4x2; give it that size"):
        load_scene(masked(tmp_path, [[255, 255]]), "train")


def test_dynamic_masks_of_instant_ngp(tmp_path):
    """Beside the picture; what is not black is left out."""
    whole(tmp_path, fl_x=3)
    mask = np.zeros((H, W, 3), np.uint8)
    mask[0, 1] = 0, 0, 9
    iio.imwrite(tmp_path / "images" / "dynamic_mask_01.png", mask)
    assert load_scene(tmp_path, "train").usable[0].tolist() == [[True, False, True, True], [True] * 4]


@pytest.mark.parametrize("key, value", [("white_transparent", 255), ("black_transparent", 0)])
def test_a_colour_that_is_transparent(tmp_path, key, value):
    image = np.full((H, W, 3), 100, np.uint8)
    image[1, 2] = value
    scene = load_scene(edit(blender(tmp_path, image=image), **{key: True}), "train")
    assert (scene.alpha[0] == 0).nonzero().tolist() == [[1, 2]] and scene.images[0][1, 2].tolist() == [255] * 3
    assert (scene.alpha[1] == 255).all()


# ---------------------------------------------------------------- splits


def names_of(*numbers):
    return [f"images/{i:02d}.png" for i in numbers]


@pytest.mark.parametrize(
    "lists, train, test, words",
    [
        ({"train": (0, 1, 4), "val": (2,), "test": (3,)}, (0, 1, 4), (3,), []),
        ({"train": (0, 1), "val": (2,), "test": ()}, (0, 1), (2,), ["2 of 5 frames are in none of its lists"]),
        ({"train": (0, 1), "test": (2, 3)}, (0, 1), (2, 3), ["1 of 5 frames are in none"]),
        ({"test": (0, 4)}, (1, 2, 3), (0, 4), ["the 3 that are in no list are trained on"]),
        ({"train": (1, 2, 3, 4, 0)}, (1, 2, 3, 4), (0,), ["1 are held out of those to train on"]),
        ({"train": (0, 1, 2, 3, 4), "test": (4,)}, (0, 1, 2, 3, 4), (4,), ["1 views are both trained on and tested"]),
        (
            {"train": (0, 1, 2, 3, 99), "test": (4,)},
            (0, 1, 2, 3),
            (4,),
            ["1 of the names in its lists of views are of no"],
        ),
    ],
)
def test_lists_of_views(tmp_path, capsys, lists, train, test, words):
    lists = {f"{split}_filenames": names_of(*numbers) for split, numbers in lists.items()}
    scenes = load_scenes(whole(tmp_path, n=5, fl_x=3, **lists))
    assert [scene.names for scene in scenes] == [names_of(*train), names_of(*test)]
    lines = notes(capsys)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines))


def test_lists_are_spelled_in_any_way_that_means_the_same(tmp_path):
    frames = [frame("./images/00.png"), frame("images\\01.png")]
    folder = whole(tmp_path, frames, fl_x=3, train_filenames=["images/00.png"], test_filenames=["./images/01.png"])
    assert [scene.names for scene in load_scenes(folder)] == [["./images/00.png"], ["images\\01.png"]]


def test_split_of_each_frame(tmp_path):
    frames = [frame(name, split="test" if i == 1 else "train") for i, name in enumerate(names_of(0, 1, 2))]
    assert [scene.names for scene in load_scenes(whole(tmp_path, frames, fl_x=3))] == [names_of(0, 2), names_of(1)]


@pytest.mark.parametrize(
    "lists, words",
    [
        ({"train_filenames": "all"}, "train_filenames must be a list of file paths, got all"),
        ({"train_filenames": [1, 2]}, r"train_filenames must be a list of file paths, got \[1, 2\]"),
        (
            {"train_filenames": ["a\x1b[31m"], "test_filenames": []},
            "leave none to train on; add views to train_filenames",
        ),
    ],
)
def test_lists_that_cannot_be_meant(tmp_path, capsys, lists, words):
    with pytest.raises(UserError, match=words):
        load_scenes(whole(tmp_path, n=3, fl_x=3, **lists))
    notes(capsys)


def test_splits_of_which_some_are_missing(tmp_path, capsys):
    folder = blender(tmp_path, splits=("train", "val"))
    assert load_scene(folder, "test").names == ["./val/r_0", "./val/r_1"]
    assert "the views of transforms_val.json are tested" in notes(capsys)[0]


def test_test_poses_without_pictures(tmp_path, capsys):
    """BlenderNeRF writes the poses of the test camera, and may leave its pictures out."""
    folder = blender(tmp_path, splits=("train", "test"))
    for path in (folder / "test").iterdir():
        path.unlink()
    train, test = load_scenes(folder)
    assert train.names == ["./train/r_1"] and test.names == ["./train/r_0"]
    first, second = notes(capsys)
    assert "2 of 4 frames are left out" in first and "1 of 2 are held out" in second


def test_a_whole_file_beside_the_splits(tmp_path, capsys):
    blender(tmp_path)
    (tmp_path / "transforms.json").write_text("{}")
    assert load_scene(tmp_path, "train").names == ["./train/r_0", "./train/r_1"]
    assert "transforms.json: is not read, since transforms_train.json is beside it" in notes(capsys)[0]


def test_lists_beside_a_file_for_each_split(tmp_path, capsys):
    folder = blender(tmp_path)
    path = folder / "transforms_train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_filenames": ["./train/r_0"]}))
    assert load_scene(folder, "train").names == ["./train/r_0", "./train/r_1"]
    assert "its lists of views are not used, as each split has a file of its own" in notes(capsys)[0]


def test_split_of_a_frame_that_is_none(tmp_path):
    frames = [frame(name, split="holdout\x1b") for name in names_of(0, 1)]
    with pytest.raises(UserError, match=r"frames\[0\].*: split must be one of train, val, test, got holdout\\x1b"):
        load_scenes(whole(tmp_path, frames, fl_x=3))


# ---------------------------------------------------------------- where pictures are


@pytest.mark.parametrize("prefix", ["/home/ann/capture/", "C:\\Users\\Ann\\capture\\", "../../capture/"])
def test_paths_of_another_machine_are_found_by_their_end(tmp_path, capsys, prefix):
    slash = "\\" if "\\" in prefix else "/"
    frames = [frame(f"{prefix}images{slash}{i:02d}.png") for i in range(3)]
    scene = load_scene(whole(tmp_path, frames, fl_x=3), "train")
    assert [int(image[0, 0, 0]) for image in scene.images] == [1, 2]
    assert "all of 3 frames: file_path leads elsewhere, and the picture was found in the scene" in notes(capsys)[0]


OTHER = pose.look_at((3.0, 0, 1), up=(0, 0, 1))  # another pose than POSE


def test_paths_whose_ends_are_the_same(tmp_path):
    """Two cameras, whose folders are not there: one picture for both."""
    frames = [frame("images/00.png"), *(frame(f"/cap/{cam}/01.png", c2w) for cam, c2w in (("a", POSE), ("b", OTHER)))]
    folder = whole(tmp_path, frames, fl_x=3)
    iio.imwrite(folder / "01.png", picture())
    with pytest.raises(
        UserError,
        match=r"\(/cap/a/01.png\): its picture was found by the path's end, as \S*/01.png, "
        r"which is that of /cap/b/01.png too, of another pose \(so it is with 2 ",
    ):
        load_scene(folder, "train")
    frames[2]["transform_matrix"] = POSE.tolist()  # one pose: the frame is there twice, and nothing is wrong
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 3, "frames": frames}))
    assert len(load_scene(folder, "train").names) == 2


@pytest.mark.parametrize(
    "paths, words",
    [
        (("00", "01", "./images/01"), ["2 frames of different poses have 1 pictures, such as"]),
        (
            ("00", "01", "./images/00"),
            [
                "2 frames of different poses have 1 pictures, such as",
                "1 of these pictures are both trained on and tested",
            ],
        ),
        (("00", "01", "02"), []),
    ],
)
def test_frames_that_share_a_picture(tmp_path, capsys, paths, words):
    """The first by file_path is for testing; ./images/NN and images/NN are one file, and . is before i."""
    names = [path if "/" in path else f"images/{path}.png" for path in paths]
    frames = [frame(name, OTHER if i == 2 else POSE) for i, name in enumerate(names)]
    split = {"test_filenames": names[:1], "train_filenames": names[1:]}
    load_scenes(whole(tmp_path, frames, fl_x=3, **split))
    lines = notes(capsys)
    assert len(lines) == bool(words) and all(word in lines[0] for word in words)
    assert ("both trained" in "".join(lines)) == (len(words) == 2)


def test_no_picture_at_all(tmp_path):
    """No frame can be left out then."""
    folder = whole(tmp_path, fl_x=3)
    for path in (folder / "images").iterdir():
        path.unlink()
    with pytest.raises(
        UserError,
        match=r"\(images/00.png\): no picture .*images/00.png, nor with .png, .jpg, .jpeg "
        "after it, and none of all 2 frames has one; put them there, or correct file_path$",
    ):
        load_scene(folder, "train")


def test_a_folder_is_no_picture(tmp_path, capsys):
    assert load_scene(edit(blender(tmp_path), file_path="../train"), "train").names == ["./train/r_1"]
    assert "1 of 6 frames are left out" in notes(capsys)[0]


@pytest.mark.parametrize("name", ["a\x1b[31mb\x00c", "x" * 4000, "e/" * 2000, "\ud800"])
def test_strange_names_are_told_in_a_line(tmp_path, capsys, name):
    assert load_scene(edit(blender(tmp_path), file_path=name), "train").names == ["./train/r_1"]
    (line,) = notes(capsys)
    assert "1 of 6 frames are left out" in line and len(line) < 500


def test_advice_where_all_frames_are_unfit(tmp_path):
    bad = np.where(np.eye(4) > 0, math.nan, POSE)
    with pytest.raises(UserError, match=r"not finite \(so it is with all 2 frames\)$"):
        load_scene(whole(tmp_path, [frame(name, bad) for name in names_of(0, 1, 2)], fl_x=3), "train")


# ---------------------------------------------------------------- poses


def test_pose_of_a_moving_camera(tmp_path, capsys):
    folder = edit(
        blender(tmp_path),
        transform_matrix=None,
        transform_matrix_start=POSE.tolist(),
        transform_matrix_end=np.eye(4).tolist(),
    )
    assert np.array_equal(load_scene(folder, "train").c2w[0], POSE)
    first, second = notes(capsys)
    assert "not used: transform_matrix_end: each picture is taken for one moment" in first
    assert "1 of 2 frames: the camera moves while the picture is taken: the pose it starts with is used" in second


# ---------------------------------------------------------------- all other keys


@pytest.mark.parametrize(
    "stated, words",
    [
        ({"aabb_scale": 4, "scale": 0.5, "offset": [0.5] * 3}, "not used: aabb_scale, scale, offset: the field is the"),
        ({"depth_file_path": "d.png"}, "not used: depth_file_path: only colours are trained on"),
        ({"rolling_shutter": [0, 0, 1, 0]}, "not used: rolling_shutter: each picture is taken for one moment"),
        (
            {"orientation_override": "none"},
            "not used: orientation_override: the poses and pictures are used as they stand",
        ),
        (
            {"camera_convention": "opencv", "coordinate_system": "opencv"},
            "not used: camera_convention, coordinate_system: poses are taken for camera to world in OpenGL's axes",
        ),
        (
            {"mask_paths": "m.png", "camera_angel_y": 1},
            "mask_paths (perhaps you meant mask_path?), camera_angel_y (perhaps you meant camera_angle_y?)",
        ),
        ({"fov": 50, "\x1b[31m": 1}, "not known, and not used: fov, \\x1b[31m"),
        ({f"key{i}": 1 for i in range(1000)}, "not known, and not used: key0, key1, key2, key3, key4 and 995 more"),
        ({"k" * 10**6: 1}, "not used: kkkkk"),
    ],
)
@pytest.mark.parametrize("of_frame", [False, True])
def test_what_is_not_used_is_told_in_a_line(tmp_path, capsys, stated, words, of_frame):
    if of_frame:
        load_scene(edit(blender(tmp_path), **stated), "train")
    else:
        K_whole(tmp_path, fl_x=3, **stated)
    (line,) = notes(capsys)
    assert words in line


def test_what_has_no_meaning_here_is_not_told(tmp_path, capsys):
    K_whole(tmp_path, fl_x=3, scale=None, depth_file_path="", rolling_shutter=0, **dict.fromkeys(NO_MEANING, 1))
    assert not notes(capsys)


def test_frames_of_different_times(tmp_path, capsys):
    frames = [frame(name, time=0.0) for name in names_of(0, 1, 2)]
    load_scene(whole(tmp_path, frames, fl_x=3), "train")
    assert not notes(capsys)
    frames[2]["time"] = 0.5
    (tmp_path / "transforms.json").write_text(json.dumps({"fl_x": 3, "frames": frames}))
    load_scene(tmp_path, "train")
    assert "its frames are of different times, and one still scene is trained" in notes(capsys)[0]


def test_the_documents_list_every_key():
    """docs/scenes.md says of each key what becomes of it."""
    text = (ROOT / "docs" / "scenes.md").read_text()
    missing = [key for key in sorted({*USED, *NO_MEANING, *REFUSED, *UNUSED}) if f"`{key}`" not in text]
    assert not missing


# ---------------------------------------------------------------- files that claim too much


def test_pictures_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    """One file named a thousand times is a thousand pictures; that is known before one is read."""
    monkeypatch.setattr("voxnerf.scene.photos.machine_memory", lambda: 20_000)
    folder = whole(tmp_path, fl_x=3)
    frames = [frame("images/00.png")] * 1000
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 3, "frames": frames}))
    monkeypatch.setattr("voxnerf.scene.photos.read_image", None)
    with pytest.raises(UserError, match="875 pictures, .* the first: take 0 GB of memory, there are 0; reduce them"):
        load_scene(folder, "train")


def test_work_is_linear_in_the_file(tmp_path, capsys):
    """Many frames under many facts: what a frame costs does not grow with what the file says for all."""
    common = {f"key{i}": i for i in range(20_000)}
    frames = [frame(f"nosuch/{i}") for i in range(2000)]
    folder = whole(tmp_path, fl_x=3)
    frames += [frame(name) for name in names_of(0, 1)]
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 3, "frames": frames, **common}))
    assert load_scene(folder, "train").names == names_of(1)
    assert any("2000 of 2002 frames are left out" in line for line in notes(capsys))
