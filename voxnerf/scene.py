"""Posed images of a scene, in the layout of Blender (NeRF-synthetic) or of instant-ngp and nerfstudio.

Cameras as in `pose.py`: looking along -z (OpenGL), pixel centres at integers. Both layouts give a
pose as `transform_matrix`, camera to world, and measure (cx, cy) from the image's corner, where
the first pixel begins: its centre is (0.5, 0.5) there and (0, 0) here.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce

import pose
from my.env import ENV, data_root
from my.errors import UserError, first_line

SPLITS = ("train", "val", "test")
WHOLE = "transforms.json"  # of the layout without splits
HOLD_OUT = 8  # there, every 8th frame is a test view, from the first one on
SUFFIXES = ("", ".png", ".jpg", ".jpeg")  # tried after a file_path, in this order
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
OTHER_LENSES = ("fisheye", "equirectangular", "orthophoto")  # in camera_model
RIGID = 1e-3  # how far a pose's rotation may be from one, as the largest entry of R R^T - 1
MANY = 32  # images from which on a progress bar is worth it
MAX_ELEVATION = np.deg2rad(80)  # of an orbit: at the pole, a camera has no upright


class Scene(NamedTuple):
    """n posed images of one size."""

    images: torch.Tensor  # (n, H, W, 3) uint8, on white
    alpha: torch.Tensor  # (n, H, W) uint8, 255 where an image is opaque
    c2w: torch.Tensor  # (n, 4, 4) float64, camera to world
    K: torch.Tensor  # (n, 3, 3) float64, as in `pose.intrinsics`
    names: list  # n file paths, as in the transforms file

    @property
    def hw(self):
        """Height and width of the images, pixels."""
        return tuple(self.images.shape[1:3])


class Frame(NamedTuple):
    """One entry of `frames`, over what its file says for all."""

    values: dict
    where: str  # for messages

    def number(self, key, default=None, above=-math.inf):
        """Return the finite number at `key`; raises UserError where it is none, or not `above`."""
        value = self.values.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= above:
            kind = "a finite number" if above == -math.inf else f"a finite number above {above}"
            raise UserError(f"{self.where}: {key} must be {kind}, got {value!r}")
        return float(value)


# ---------------------------------------------------------------- public


def find_scene(name):
    """Return the folder that a `--scene` means: a path, or a name below the data root of env.json.

    Raises UserError saying where it looked.
    """
    tried = list(dict.fromkeys([Path(os.path.expanduser(name)).absolute(), data_root() / "nerf_synthetic" / name,
                                data_root() / name]))
    for folder in tried:
        if folder.is_dir():
            return folder
    if tried[0].is_file():
        raise UserError(f"--scene {name}: is a file; give the folder that it is in")
    raise UserError(f"--scene {name}: looked for a folder at {', '.join(map(str, tried))}: none is there; give the "
                    f"path of one with --scene FOLDER (data root: {ENV})")


def load_scene(folder, split, downscale=1):
    """Return the `Scene` of one split, train, val or test, of a folder in either layout.

    Images are averaged over squares of `downscale` pixels. A single transforms.json has no splits:
    of its frames, sorted by file_path, every 8th is for test and val, the others are for train.
    Raises UserError, one line, for a folder, a file or an entry that is missing or cannot be meant.
    """
    folder = Path(folder)
    frames = read_frames(folder, split)
    paths = [find_image(folder, frame) for frame in frames]
    c2w = np.stack([pose_of(frame) for frame in frames])
    images, alpha = read_images(paths, downscale)
    size = images.shape[2] * downscale, images.shape[1] * downscale
    K = np.stack([intrinsics_of(frame, *size, downscale) for frame in frames])
    return Scene(*map(torch.from_numpy, (images, alpha, c2w, K)), [frame.values["file_path"] for frame in frames])


def orbit(c2w, n):
    """Return n poses (n, 4, 4) float64 of a circle round the origin, as the cameras c2w (m, 4, 4) stand round it.

    It has their mean distance and mean elevation, and turns about their `vertical`.
    """
    c2w = np.asarray(c2w)
    up, eyes = vertical(c2w), c2w[:, :3, 3]
    radius = np.linalg.norm(eyes, axis=1)
    elevation = np.arcsin((eyes @ up / radius.clip(1e-9)).clip(-1, 1)).mean().clip(-MAX_ELEVATION, MAX_ELEVATION)
    side = c2w[0, :3, 0] - (c2w[0, :3, 0] @ up) * up
    side /= np.linalg.norm(side)
    angle = 2 * np.pi * np.arange(n)[:, None] / n
    ring = np.cos(angle) * side + np.sin(angle) * np.cross(up, side)  # (n, 3)
    eyes = radius.mean() * (np.cos(elevation) * ring + np.sin(elevation) * up)
    return np.stack([pose.look_at(eye, up=up) for eye in eyes])


def vertical(c2w):
    """Return the unit vector (3,) that cameras c2w (m, 4, 4) take for upwards.

    It is their mean y axis, less what is not at right angles to their x axes, which are level
    unless a camera is rolled: an uneven ring of cameras that look down does not tilt it.
    """
    x, y = c2w[:, :3, 0], c2w[:, :3, 1]
    up = np.linalg.solve(x.T @ x / len(x) + 1e-6 * np.eye(3), y.mean(axis=0))
    return up / np.linalg.norm(up)


# ---------------------------------------------------------------- transforms files


def read_frames(folder, split):
    """Return the `Frame`s of a split, in the order of its images."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a scene")
    own, whole = folder / f"transforms_{split}.json", folder / WHOLE
    if own.exists():
        return frames_of(own)
    if not whole.exists():
        others = [path.name for path in sorted(folder.glob("transforms_*.json"))]
        if others:
            raise UserError(f"{folder}: has {', '.join(others)}, but no {own.name}; add it: at least one view in it")
        raise UserError(f"{folder}: no {own.name} (Blender layout) and no {WHOLE} (instant-ngp, nerfstudio) in it; "
                        "give the folder of a scene")
    frames = sorted(frames_of(whole), key=lambda frame: frame.values["file_path"])
    kept = [frame for i, frame in enumerate(frames) if (i % HOLD_OUT == 0) == (split != "train")]
    if not kept:
        raise UserError(f"{whole}: its only frame is a test view, as every {HOLD_OUT}th is, from the first on; it "
                        "needs at least 2")
    return kept


def frames_of(path):
    """Return the `Frame`s of a transforms file, as they stand there."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}: broken JSON: {error.msg}; put it right, or get the file "
                        "again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    listed = meta.get("frames") if isinstance(meta, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: expected {{\"frames\": [{{\"file_path\": ..., \"transform_matrix\": ...}}, ...]}} "
                        "with at least one frame")
    common = {key: value for key, value in meta.items() if key != "frames"}
    return [frame_of(path, i, common, entry) for i, entry in enumerate(listed)]


def frame_of(path, i, common, entry):
    """Return the `Frame` of entry number `i`; raises UserError if it lacks a path or a pose."""
    missing = [key for key in ("file_path", "transform_matrix") if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise UserError(f"{path}: frames[{i}] has no {' and no '.join(missing)}; every frame needs both file_path and "
                        "transform_matrix")
    if not isinstance(entry["file_path"], str):
        raise UserError(f"{path}: frames[{i}]: file_path must be text, got {entry['file_path']!r}")
    return Frame({**common, **entry}, f"{path}: frames[{i}] ({entry['file_path']})")


def pose_of(frame):
    """Return the pose c2w (4, 4) float64 of a frame; raises UserError unless it turns and shifts only."""
    expected = "transform_matrix must be 4x4 or 3x4 finite numbers"
    try:
        given = np.array(frame.values["transform_matrix"], dtype=np.float64)
    except (ValueError, TypeError):
        raise UserError(f"{frame.where}: {expected}") from None
    if given.shape not in ((3, 4), (4, 4)):
        raise UserError(f"{frame.where}: {expected}, got shape {given.shape}")
    c2w = np.eye(4)
    c2w[:len(given)] = given
    if not np.isfinite(c2w).all():
        raise UserError(f"{frame.where}: {expected}, and has one that is not finite; put it right, or leave the frame "
                        "out")
    R = c2w[:3, :3]
    off, det = np.abs(R @ R.T - np.eye(3)).max(), np.linalg.det(R)
    if off > RIGID or det < 0 or np.abs(c2w[3] - [0, 0, 0, 1]).max() > RIGID:
        raise UserError(f"{frame.where}: transform_matrix must be a rotation and a shift, without scale or mirror "
                        f"(determinant 1), above a row 0 0 0 1; its determinant is {det:.4g}, and R R^T is {off:.2g} "
                        "off 1; take scale and mirror out of it, and out of all other poses alike")
    return c2w


def intrinsics_of(frame, width, height, downscale=1):
    """Return K (3, 3) of a frame's image of width x height pixels, after it was reduced by `downscale`.

    Intrinsics stated for another size, w x h, are scaled with it. Raises UserError where they are
    missing, for any lens but a pinhole, and where w x h has another shape.
    """
    refuse_distortion(frame)
    w, h = frame.number("w", width, above=0), frame.number("h", height, above=0)
    if abs(width * h - w * height) >= max(w, h):  # more than rounding to whole pixels would do
        raise UserError(f"{frame.where}: w x h is {w:g}x{h:g}, and its image is {width}x{height}, of another shape; "
                        "state the size that the intrinsics are for")
    fl_x = focal_length(frame, w)
    fl_y = frame.number("fl_y", fl_x, above=0)
    sx, sy = width / w / downscale, height / h / downscale
    cx, cy = frame.number("cx", w / 2) * sx, frame.number("cy", h / 2) * sy
    return np.array([[fl_x * sx, 0, -(cx - 0.5)], [0, -fl_y * sy, -(cy - 0.5)], [0, 0, -1]])


def refuse_distortion(frame):
    """Raise UserError for a frame that was not taken by a pinhole."""
    bent = [key for key in DISTORTION if frame.values.get(key)]
    if bent:
        raise UserError(f"{frame.where}: {bent[0]} is {frame.values[bent[0]]}: images with lens distortion cannot be "
                        "used; undistort them first, and leave out " + ", ".join(bent))
    model = "fisheye" if frame.values.get("is_fisheye") else str(frame.values.get("camera_model", ""))
    if any(word in model.lower() for word in OTHER_LENSES):
        raise UserError(f"{frame.where}: its camera is {model}, and only pinhole cameras can be used; undistort the "
                        "images first")


def focal_length(frame, w):
    """Return the horizontal focal length of a frame, in pixels of an image `w` wide."""
    if "fl_x" in frame.values:
        return frame.number("fl_x", above=0)
    if "camera_angle_x" not in frame.values:
        raise UserError(f"{frame.where}: no fl_x (focal length, pixels) and no camera_angle_x (horizontal field of "
                        "view, radians); add one of them")
    angle = frame.number("camera_angle_x", above=0)
    if angle >= math.pi:
        raise UserError(f"{frame.where}: camera_angle_x must lie below pi radians, got {angle:g}; is it in degrees?")
    return w / 2 / math.tan(angle / 2)


# ---------------------------------------------------------------- images


def find_image(folder, frame):
    """Return the path of a frame's image, whose suffix may be left out; raises UserError where there is none."""
    name = frame.values["file_path"]
    for suffix in SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise UserError(f"{frame.where}: no image {folder / name}, nor with {', '.join(SUFFIXES[1:])} after it; put it "
                    "there, or leave the frame out")


def read_images(paths, downscale):
    """Return the images (n, H, W, 3) at `paths`, on white, and their alpha (n, H, W), both uint8.

    Raises UserError if they differ in size.
    """
    from tqdm import tqdm

    read_image(paths[0], downscale)  # what is wrong with all of them is told before a bar begins
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda path: read_image(path, downscale), paths)
        images = list(tqdm(images, total=len(paths), desc="images", disable=len(paths) < MANY))
    for path, image in zip(paths, images):
        if image.shape != images[0].shape:
            sizes = (f"{x.shape[1] * downscale}x{x.shape[0] * downscale}" for x in (images[0], image))
            raise UserError(f"images of one split must have one size: {paths[0]} is {next(sizes)}, {path} is "
                            f"{next(sizes)}; resize them, or leave the frames of other sizes out")
    images = np.stack(images)
    return images[..., :3], images[..., 3]


def read_image(path, downscale=1):
    """Return the image (H, W, 4) uint8 at `path`: RGB on white, and alpha, averaged over squares of `downscale` pixels.

    Raises UserError where it cannot be read, and where the squares do not fill it.
    """
    import imageio.v3 as iio

    try:
        rgba = iio.imread(path, plugin="pillow", index=0, mode="RGBA").astype(np.float32)  # (H, W, 4)
    except (OSError, ValueError, SyntaxError) as error:
        why = first_line(error)
        why = "of no kind that is known" if "uri" in why else why  # what imageio says of any such file
        raise UserError(f"{path}: not a readable image: {why}; get it again, or leave its frame out") from None
    height, width = rgba.shape[:2]
    if height % downscale or width % downscale:
        common = math.gcd(height, width)
        fit = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise UserError(f"--downscale {downscale}: {path} is {width}x{height}, which only these divide: {fit}")
    rgb, alpha = rgba[..., :3], rgba[..., 3:] / 255
    on_white = rgb * alpha + 255 * (1 - alpha)  # before averaging: an edge's pixels count by what they cover
    image = np.concatenate([on_white, rgba[..., 3:]], axis=-1)
    return np.rint(reduce(image, "(h a) (w b) c -> h w c", "mean", a=downscale, b=downscale)).astype(np.uint8)
