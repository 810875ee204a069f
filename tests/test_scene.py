"""Loading of posed images: both layouts, intrinsics computed by hand, and one line for each thing that can be wrong."""

import math
import re

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import pose
from my.errors import UserError
from posed import POSE, H, K_of, W, blender, edit, frame, picture, whole
from voxnerf.rays import pixel_rays
from voxnerf.scene import find_scene, load_scene, orbit, vertical
from voxnerf.scene.photos import MANY, on_white

# ---------------------------------------------------------------- layouts


def test_blender_layout(tmp_path):
    scene = load_scene(blender(tmp_path), "train")
    assert scene.sizes == [(H, W)] * 2 and all(image.dtype == torch.uint8 for image in scene.images)
    assert scene.images[0].shape == (H, W, 3) and scene.usable is None and scene.lenses is None
    assert scene.images[1].unique().tolist() == [10] and scene.names == ["./train/r_0", "./train/r_1"]
    assert scene.c2w.dtype == torch.float64 and np.array_equal(scene.c2w[1], POSE)
    assert scene.K.shape == (2, 3, 3) and torch.allclose(scene.K[0], K_of(2, 2, 1.5, 0.5))  # f = 2 / tan 45
    assert np.allclose(scene.K[0], pose.intrinsics(H, W, 90))


def test_ray_through_a_known_pixel(tmp_path):
    """The first pixel's centre is (0.5, 0.5) from the corner: (0.5 - 2) / 2 to the right, (1 - 0.5) / 2 up, 1 ahead."""
    folder = edit(blender(tmp_path), transform_matrix=np.eye(4).tolist())
    scene = load_scene(folder, "train")
    rays_o, rays_d = pixel_rays(H, W, scene.K[0], scene.c2w[0], dtype=torch.float64)
    assert torch.allclose(rays_d[0] / -rays_d[0, 2], torch.tensor([-0.75, 0.25, -1.0], dtype=torch.float64))
    assert rays_o.abs().max() == 0


def test_one_file_for_all(tmp_path):
    """Every 8th frame, by file_path, is for test and val."""
    frames = [frame(f"images/{i:02d}.png") for i in (9, 0, 1, 2, 3, 4, 5, 6, 7, 8)]
    folder = whole(tmp_path, frames, fl_x=3, fl_y=4, cx=1, cy=1.5, w=W, h=H)
    train, val, test = (load_scene(folder, split) for split in ("train", "val", "test"))
    assert test.names == val.names == ["images/00.png", "images/08.png"]
    assert train.names == [f"images/{i:02d}.png" for i in (1, 2, 3, 4, 5, 6, 7, 9)]
    assert [int(image[0, 0, 0]) for image in test.images] == [0, 8]
    assert torch.equal(train.K[3], K_of(3, 4, 0.5, 1.0))


def test_intrinsics_of_each_frame_and_their_defaults(tmp_path):
    frames = [frame("images/00.png"), frame("images/01.png", fl_x=5), frame("images/02.png", cx=1.0)]
    scene = load_scene(whole(tmp_path, frames, fl_x=3), "train")
    assert torch.equal(scene.K, torch.stack([K_of(5, 5, 1.5, 0.5), K_of(3, 3, 0.5, 0.5)]))


def test_intrinsics_stated_for_another_size(tmp_path):
    """Twice the size, twice the focal length and the principal point, which is counted from the corner."""
    scene = load_scene(whole(tmp_path, size=(2 * W, 2 * H), fl_x=3, fl_y=4, cx=1, cy=1.5, w=W, h=H), "train")
    assert torch.equal(scene.K[0], K_of(6, 8, 1.5, 2.5))


def test_size_rounded_to_whole_pixels(tmp_path):
    """1297 x 840 pixels reduced to a quarter are 324 x 210."""
    scene = load_scene(whole(tmp_path, size=(324, 210), fl_x=1297, w=1297, h=840), "train")
    assert torch.allclose(scene.K[0], K_of(324, 1297 * 210 / 840, 161.5, 104.5))


def test_downscale_is_an_average_and_scales_the_intrinsics(tmp_path):
    image = picture(4, 4, 0)
    image[:2, :2] = [[[10, 0, 0], [20, 0, 0]], [[30, 0, 0], [40, 0, 0]]]
    folder = blender(tmp_path, image=image)
    scene = load_scene(folder, "train", downscale=2)
    assert scene.sizes == [(2, 2)] * 2
    assert scene.images[0][0, 0].tolist() == [25, 0, 0] and scene.images[0][1:].max() == 0
    assert torch.allclose(scene.K[0], K_of(1, 1, 0.5, 0.5))  # f = 1 / tan 45, its middle between both pixels


def test_camera_without_distortion_may_say_so(tmp_path):
    folder = edit(blender(tmp_path), camera_model="OPENCV", is_fisheye=False, k1=0.0, k2=0, p1=0)
    assert len(load_scene(folder, "train").K) == 2


def test_pose_of_three_rows(tmp_path):
    scene = load_scene(edit(blender(tmp_path), transform_matrix=POSE[:3].tolist()), "train")
    assert np.array_equal(scene.c2w[0], POSE)


def test_pose_rounded_to_three_decimals(tmp_path):
    """From (1, -1, 1): the z axis is 0.577 three times, whose squares sum to 0.9988; y has 0.408, 0.408 and 0.816."""
    c2w = pose.look_at((1, -1, 1), up=(0, 0, 1)).round(3)
    assert np.abs(c2w[:3, :3] @ c2w[:3, :3].T - np.eye(3)).max() == pytest.approx(0.0012, abs=1e-4)
    scene = load_scene(edit(blender(tmp_path), transform_matrix=c2w.tolist()), "train")
    assert np.array_equal(scene.c2w[0], c2w)  # as it stands


@pytest.mark.parametrize("name", ["r.jpg", "r.jpeg", "r.png"])
def test_suffix_may_be_left_out(tmp_path, name):
    folder = edit(blender(tmp_path), file_path="train/r")
    iio.imwrite(folder / "train" / name, picture(value=77))
    assert (load_scene(folder, "train").images[0].int() - 77).abs().max() <= 1


def test_a_longer_split_is_read_in_order(tmp_path, capsys):
    scene = load_scene(whole(tmp_path, n=60, fl_x=3), "train")
    assert [int(image[0, 0, 0]) for image in scene.images] == [i for i in range(60) if i % 8]
    assert "images: 100%" in capsys.readouterr().err


# ---------------------------------------------------------------- alpha


def on_white_of(pixels, downscale=1):
    return on_white(np.array(pixels, np.float32) / 255, downscale).tolist()


def test_alpha_is_composited_onto_white():
    assert on_white_of([[[255, 0, 0, 128], [9, 9, 9, 0], [10, 20, 30, 255]]]) == [
        [[255, 127, 127, 128], [255, 255, 255, 0], [10, 20, 30, 255]]
    ]


def test_scene_keeps_alpha(tmp_path):
    image = np.dstack([picture(), np.full((H, W, 1), 51, np.uint8)])
    scene = load_scene(blender(tmp_path, image=image), "train")
    assert all(alpha.shape == (H, W) and (alpha == 51).all() for alpha in scene.alpha)
    assert all((image == 244).all() for image in scene.images)  # 0.2 * 200 + 0.8 * 255


def test_what_is_transparent_has_no_colour_when_averaged():
    """Black beside transparent green: the average of black and white."""
    assert on_white_of([[[0, 0, 0, 255], [0, 255, 0, 0]]] * 2, 2) == [[[128, 128, 128, 128]]]


# ---------------------------------------------------------------- where scenes are


def test_find_scene(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # the data root of env.json is below it
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "sjc_data"
    with pytest.raises(
        UserError,
        match=f"--scene lego: looked for a folder at {tmp_path}/lego, {root}/nerf_synthetic/"
        f"lego, {root}/lego: none is there; .*env.json",
    ):
        find_scene("lego")
    for folder in (root / "lego", root / "nerf_synthetic" / "lego", tmp_path / "lego"):  # the later win
        folder.mkdir(parents=True)
        assert find_scene("lego") == folder
    with pytest.raises(UserError, match="--scene ~nobody/lego: looked for"):
        find_scene("~nobody/lego")
    (tmp_path / "transforms.json").touch()
    with pytest.raises(UserError, match="--scene transforms.json: is a file; give the folder"):
        find_scene("transforms.json")
    assert find_scene("~/sjc_data/lego") == find_scene(str(root / "lego")) == root / "lego"


# ---------------------------------------------------------------- paths round a scene


def uneven_ring(up, n=7):
    """Poses that look at the origin from above, on one side of it only."""
    a = np.eye(3)[np.argmin(np.abs(up))]
    side = np.cross(up, a) / np.linalg.norm(np.cross(up, a))
    angles = np.linspace(0, 2, n)[:, None]
    ring = np.cos(angles) * side + np.sin(angles) * np.cross(up, side)
    return np.stack([pose.look_at(4 * (0.8 * eye + 0.6 * np.asarray(up)), up=up) for eye in ring])


@pytest.mark.parametrize("up", [(0, 0, 1.0), (0, 1.0, 0), (0.48, 0.6, 0.64)])
def test_orbit_stands_as_the_cameras_do(up):
    c2w = uneven_ring(np.array(up))
    assert np.allclose(vertical(c2w), up, atol=1e-4)
    path = orbit(torch.from_numpy(c2w), 12)
    assert np.allclose(np.linalg.norm(path[:, :3, 3], axis=1), 4)  # their distance
    assert np.allclose(path[:, :3, 3] @ up, 4 * 0.6, atol=1e-3)  # their height
    assert np.allclose(path[:, :3, 2] * 4, path[:, :3, 3])  # looking at the origin
    assert np.allclose(path[:, :3, 0] @ up, 0, atol=1e-3)  # level
    strides = np.linalg.norm(path[:, :3, 3] - np.roll(path[:, :3, 3], 1, axis=0), axis=1)
    assert np.allclose(strides, strides[0])  # once round, evenly


def test_orbit_of_one_camera_overhead_is_finite():
    c2w = pose.look_at((0, 0, 4.0), up=(0, 1.0, 0))[None]
    assert np.isfinite(orbit(c2w, 5)).all() and np.allclose(vertical(c2w), (0, 1, 0))


# ---------------------------------------------------------------- mistakes


def load(folder, **kw):
    return load_scene(folder, "train", **kw)


def refused(folder, words, **kw):
    with pytest.raises(UserError) as error:
        load(folder, **kw)
    message = str(error.value)
    assert message.isprintable() and len(message.replace(str(folder), "")) <= 330, message
    for word in words:
        assert word in message, message


def test_no_folder_and_no_transforms_file(tmp_path):
    refused(tmp_path / "nosuch", [str(tmp_path / "nosuch"), "no such folder"])
    refused(tmp_path, ["no transforms_train.json (Blender layout)", "no transforms.json (instant-ngp, nerfstudio)"])


@pytest.mark.parametrize(
    "files, words",
    [
        (
            ["sparse/0/cameras.bin"],
            [
                "it has sparse/0/cameras.bin, so it may be a model of COLMAP",
                "ns-process-data images --skip-colmap",
                "colmap2nerf.py --text",
            ],
        ),
        (["sparse/0/cameras.txt", "poses_bounds.npy"], ["a model of COLMAP"]),
        (["poses_bounds.npy"], ["a scene of LLFF", "ns-process-data images", "colmap2nerf.py --run_colmap"]),
        (["metadata", "rgbd/0.jpg"], ["a capture of Record3D", "ns-process-data record3d", "record3d2nerf.py"]),
        (["metadata.json"], ["a capture of Record3D"]),
        (["keyframes/images/1.jpg"], ["a capture of Polycam", "ns-process-data polycam"]),
        (["meta_data.json"], ["a scene of SDFStudio", "ns-process-data images"]),
        (["intrinsics.txt", "pose/0.txt"], ["a scene of NSVF", "nsvf2nerf.py"]),
        (["camera/0.json", "dataset.json", "metadata.json"], ["a scene of Nerfies", "ns-process-data images"]),
        (["scan.xml"], ["it has scan.xml, so it may be cameras of Metashape", "ns-process-data metashape"]),
        (["cameras_sphere.npz"], ["a scene of NeuS", "ns-process-data images"]),
        (["bundle.out"], ["a model of Bundler", "ns-process-data images"]),
        (["walk.mp4"], ["it has walk.mp4, so it may be a video", "ns-process-data video", "colmap2nerf.py --video_in"]),
        (["b.MOV", "a.MOV"], ["it has a.MOV, so it may be a video"]),
        (["\x1b[31m" + "x" * 200 + ".mp4"], ["it has \\x1b[31mxxxx", "..., so it may be a video"]),
        (["dataset.json", "intrinsics.txt"], ["give the folder of a scene"]),  # without what is beside them
    ],
)
def test_folders_of_other_tools(tmp_path, files, words):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    refused(tmp_path, ["no transforms.json (instant-ngp, nerfstudio)", *words])


def test_a_video_is_no_scene(tmp_path):
    (tmp_path / "walk.MP4").touch()
    with pytest.raises(UserError, match="walk.MP4: is a video; make a transforms.json of it .*ns-process-data video"):
        find_scene(str(tmp_path / "walk.MP4"))


def test_missing_split(tmp_path):
    folder = blender(tmp_path, splits=("test",))
    with pytest.raises(UserError, match=re.escape("has transforms_test.json, but no transforms_train.json; add it")):
        load_scene(folder, "test")
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'dev'"):
        load_scene(folder, "dev")


def test_single_frame_leaves_none_to_train_with(tmp_path):
    refused(whole(tmp_path, n=1, fl_x=3), ["its only frame is a test view", "at least 2"])


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"frames": [\n  {"file_path": "a",,}]}', ["is damaged: ", "line 2", "get the file again"]),
        ('{"camera_angle_x": 1}', ['expected {"frames": [', "at least one frame"]),
        ('{"frames": []}', ["at least one frame"]),
        ("[1, 2]", ["holds no settings", "put it right"]),
        ('{"frames": {"a": 1}}', ['expected {"frames": [']),
        ("[" * 100_000, ["is damaged: ", "get the file again"]),
        ('{"frames": ' + "9" * 5000 + "}", ["is damaged: ", "get the file again"]),
        ('{"frames": [7]}', ["frames[0] has no file_path and no transform_matrix"]),
        ('{"frames": [{"file_path": 7, "transform_matrix": []}]}', ["frames[0]: file_path must be text, got 7"]),
        (
            '{"frames": [{"file_path": "%s", "transform_matrix": []}]}' % ("x" * 10**6),
            ["file_path must have 1 to 4096 characters, got 1000000"],
        ),
        ("\xff", ["is damaged: "]),
    ],
)
def test_broken_transforms_file(tmp_path, text, words):
    path = blender(tmp_path) / "transforms_train.json"
    path.write_bytes(text.encode("latin-1"))
    refused(tmp_path, [str(path), *words])


FIRST = "transforms_train.json: frames[1] (./train/r_1)"


def turned(**entries):
    """POSE with some entries replaced, given as r<row>c<column>."""
    c2w = POSE.copy()
    for at, value in entries.items():
        c2w[int(at[1]), int(at[3])] = value
    return c2w.tolist()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"transform_matrix": None}, ["frames[1] has no transform_matrix"]),
        ({"file_path": None}, ["frames[1] has no file_path"]),
        ({"transform_matrix": [[1, 2], [3, 4]]}, [FIRST, "4x4 or 3x4", "got shape (2, 2)"]),
        ({"transform_matrix": [[1, 2], [3]]}, [FIRST, "4x4 or 3x4"]),
        ({"transform_matrix": "east"}, [FIRST, "4x4 or 3x4"]),
        ({"transform_matrix": turned(r0c3=math.nan)}, [FIRST, "not finite", "1 of 2 frames", "leave them out"]),
        ({"transform_matrix": [[10**400] * 4] * 4}, [FIRST, "4x4 or 3x4 finite numbers"]),
        ({"transform_matrix": turned(r0c0=1e300)}, [FIRST, "must be a rotation"]),
        ({"transform_matrix": [[None] * 4] * 4}, [FIRST, "not finite"]),
        ({"transform_matrix": (2 * POSE).tolist()}, [FIRST, "without scale or mirror", "determinant is 8"]),
        ({"transform_matrix": (POSE @ np.diag([1, 1, -1, 1])).tolist()}, [FIRST, "determinant is -1"]),
        ({"transform_matrix": turned(r0c0=1.1)}, [FIRST, "must be a rotation"]),
        ({"transform_matrix": turned(r3c0=1.0)}, [FIRST, "a row 0 0 0 1"]),
        ({"camera_angle_x": 40.0}, [FIRST, "camera_angle_x must lie below pi", "in degrees?"]),
        ({"camera_angle_x": "wide"}, [FIRST, "camera_angle_x must be a finite number above 0, got text 'wide'"]),
        ({"fl_x": 0}, [FIRST, "fl_x must be a finite number above 0, got 0"]),
        ({"cx": True}, [FIRST, "cx must be a finite number, got True"]),
        ({"k1": "big"}, [FIRST, "k1 must be a finite number, got text 'big'"]),
        ({"k1": 1e9}, [FIRST, "k1 is 1e+09, which no lens has"]),
        ({"is_fisheye": True, "p1": 0.1}, [FIRST, "a fisheye lens has k1 to k4 only"]),
        ({"camera_model": "EQUIRECTANGULAR"}, [FIRST, "camera_model EQUIRECTANGULAR is not read", "OPENCV_FISHEYE"]),
        ({"camera_model": "ORTHOPHOTO"}, [FIRST, "camera_model ORTHOPHOTO is not read"]),
        ({"camera_model": ["FOV"]}, [FIRST, "camera_model ['FOV'] is not read"]),
        ({"distortion_params": [0.1, 0.2]}, [FIRST, "distortion_params must be the 6 numbers k1, k2, k3, k4, p1, p2"]),
        ({"fl_x": 1e-300}, [FIRST, "its focal length is 1e-300 pixels for 4 pixels", "correct fl_x"]),
        ({"fl_x": 10**400}, [FIRST, "fl_x must be a finite number above 0, got a number of 1329 bits"]),
        ({"cx": 1e200}, [FIRST, "the principal point is at 1e+200"]),
        (
            {"cx": 0, "cy": 0},
            [
                FIRST,
                "the principal point is at 0, 0 of 4x2 pixels",
                "corner of the first pixel",
                "within 10% to 90% of w and h",
                "the middle is 2, 1",
            ],
        ),
        ({"cx": 0.3, "cy": -0.7}, [FIRST, "the principal point is at 0.3, -0.7 of 4x2 pixels", "the middle is 2, 1"]),
        ({"cy": 2}, [FIRST, "the principal point is at 2, 2 of 4x2 pixels"]),
        ({"fl_x": "100"}, [FIRST, "fl_x must be a finite number above 0, got text '100'"]),
        ({"fl_x": 0.39}, [FIRST, "its focal length is 0.39 pixels for 4 pixels", "by 4, and cx, cy by 4, 2"]),
        ({"fl_x": 3, "fl_y": 0.19}, [FIRST, "its focal length is 0.19 pixels for 2 pixels", "or if fl_y is a share"]),
        ({"camera_angle_x": 2.8}, [FIRST, "its focal length is 0.345 pixels for 4 pixels"]),  # 160 degrees
        *[
            ({key: text}, [FIRST, f"{key} must be true or false, got text '{text}'"])
            for key in ("is_fisheye", "white_transparent", "black_transparent")
            for text in ("true", "False", "1", "")
        ],
        ({"is_fisheye": 2}, [FIRST, "is_fisheye must be true or false, got 2"]),
        ({"from_mitsuba": "false"}, ["from_mitsuba must be true or false, got text 'false'"]),
        ({"transform_matrix": (POSE @ np.diag([0.99] * 3 + [1])).tolist()}, [FIRST, "R R^T is 0.02 off 1"]),
        ({"transform_matrix": (POSE @ np.diag([0.5] * 3 + [1])).tolist()}, [FIRST, "determinant is 0.125"]),
        ({"x_fov": 180}, [FIRST, "x_fov must lie below 180 degrees, got 180"]),
        ({"mask_path": "masks/none.png"}, [FIRST, "no mask", "masks/none.png", "take mask_path out"]),
        ({"mask_path": 7}, [FIRST, "mask_path must be text, got 7"]),
        ({"from_mitsuba": True}, ["from_mitsuba is stated: its poses have other axes"]),
        ({"latlong": True}, ["latlong is stated", "panoramas"]),
        ({"skew": 0.5}, ["skew is stated", "right-angled"]),
        ({"w": 400, "h": 400}, [FIRST, "w x h is 400x400", "image is 4x2", "another shape"]),
    ],
)
def test_unfit_frame(tmp_path, values, words):
    refused(edit(blender(tmp_path), entry=1, **values), words)


def test_no_focal_length(tmp_path):
    refused(whole(tmp_path), ["transforms.json: frames[1] (images/01.png)", "no fl_x", "no camera_angle_x"])


def test_unreadable_image(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    path = blender(tmp_path, image=noise) / "train" / "r_1.png"
    for data in (b"", b"not a picture", path.read_bytes()[:100]):
        path.write_bytes(data)
        refused(tmp_path, [str(path), "get it again"])


def test_downscale_that_does_not_divide(tmp_path, capsys):
    folder = blender(tmp_path, image=picture(12, 18), n=MANY)
    refused(folder, ["--downscale 4", "is 12x18", "only these divide: 1, 2, 3, 6"], downscale=4)
    assert capsys.readouterr().err == ""  # no progress bar before the message
