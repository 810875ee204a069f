"""The pose, the intrinsics and the lens of a frame, as its transforms file states them.

Cameras as in `pose.py`: looking along -z (OpenGL), pixel centres at integers. Transforms files measure
(cx, cy) from the image's corner, where the first pixel begins: its centre is (0.5, 0.5) there and (0, 0) here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from my.errors import UserError, shown
from voxnerf.lens import Lens
from voxnerf.scene.frame import Frame, Remarks

Read = TypeVar("Read")

RIGID = 5e-3  # largest entry of R R^T - 1 of a pose's rotation: that of 3 decimals is up to 1.7e-3 off
SAME = 0.01  # share by which two statements of one focal length may differ, as they are rounded
NARROWEST, WIDEST, WIDEST_FISHEYE = 1e4, 0.1, 1e-3  # focal lengths in widths of the picture
SHIFT, MOST_SHIFT = 0.25, 0.4  # of the principal point from the middle, in widths: a shift lens's, and refused beyond
STRONGEST = 1e6  # coefficient of a lens
PINHOLES = ("", "SIMPLE_PINHOLE", "PINHOLE", "PERSPECTIVE")
RADIAL = ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
FISHEYE = ("OPENCV_FISHEYE", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "FISHEYE")
COEFFICIENTS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
LISTED = ("k1", "k2", "k3", "k4", "p1", "p2")  # the order of nerfstudio's distortion_params


def read_all(frames: Sequence[Frame], read: Callable[[Frame], Read]) -> list[Read]:
    """Return `read(frame)` of each frame. If some raise UserError, raise the first, and say how many do.

    The advice to leave frames out is given only if other frames are sound.
    """
    done, wrong = [], []
    for frame in frames:
        try:
            done.append(read(frame))
        except UserError as error:
            wrong.append(error)
    if not wrong:
        return done
    if len(frames) == 1:
        raise wrong[0]
    if len(wrong) == len(frames):
        raise UserError(f"{wrong[0]} (so it is with all {len(frames)} frames)")
    raise UserError(
        f"{wrong[0]} (so it is with {len(wrong)} of {len(frames)} frames: put it right there, or leave them out)"
    )


# ---------------------------------------------------------------- poses


def pose_of(frame: Frame, remarks: Remarks) -> np.ndarray:
    """Return the pose c2w (4, 4) float64 of a frame; raises UserError unless it is a rotation and a shift."""
    key = "transform_matrix"
    if frame.own.get(key) is None:
        key = "transform_matrix_start"
        remarks.add("the camera moves while the picture is taken: the pose it starts with is used")
    expected = f"{key} must be 4x4 or 3x4 finite numbers"
    try:
        given = np.array(frame.own.get(key), dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{frame.where}: {expected}") from None
    if given.shape not in ((3, 4), (4, 4)):
        raise UserError(f"{frame.where}: {expected}, got shape {shown(given.shape)}")
    c2w = np.eye(4)
    c2w[: len(given)] = given
    if not np.isfinite(c2w).all():
        raise UserError(f"{frame.where}: {expected}, and has one that is not finite")
    R = c2w[:3, :3]
    with np.errstate(all="ignore"):  # huge numbers
        off, det = np.abs(R @ R.T - np.eye(3)).max(), np.linalg.det(R)
    if not off <= RIGID or det < 0 or np.abs(c2w[3] - [0, 0, 0, 1]).max() > RIGID:
        raise UserError(
            f"{frame.where}: {key} must be a rotation and a shift, without scale or mirror "
            f"(determinant 1), above a row 0 0 0 1; its determinant is {det:.4g}, and R R^T is {off:.2g} "
            "off 1; take scale and mirror out of all poses alike"
        )
    return c2w


# ---------------------------------------------------------------- intrinsics


def stated_size(frame: Frame) -> tuple[float, float] | None:
    """Return the (w, h) that a frame states, or None if it lacks one of them."""
    if frame.get("w") is None or frame.get("h") is None:
        return None
    return frame.number("w", above=0), frame.number("h", above=0)


def intrinsics_of(frame: Frame, width: int, height: int, downscale: int, remarks: Remarks) -> np.ndarray:
    """Return K (3, 3) of a frame's image of width x height pixels, after it was reduced by `downscale`.

    Intrinsics stated for another size, w x h, are scaled with it. Raises UserError if they are
    missing or impossible, or if w x h has another shape.
    """
    w = frame.number("w", width if frame.get("h") is None else frame.number("h", above=0) * width / height, above=0)
    h = frame.number("h", w * height / width, above=0)
    if abs(width * h - w * height) >= max(w, h):  # more than rounding to whole pixels would do
        raise UserError(
            f"{frame.where}: w x h is {w:g}x{h:g}, and its image is {width}x{height}, of another shape; "
            "state the size that the intrinsics are for"
        )
    fl_x, fl_y = focal_lengths(frame, w, h, remarks)
    cx, cy = principal_point(frame, w, h, remarks)
    sx, sy = width / w / downscale, height / h / downscale
    cx, cy = cx * sx, cy * sy
    return np.array([[fl_x * sx, 0, -(cx - 0.5)], [0, -fl_y * sy, -(cy - 0.5)], [0, 0, -1]])


def principal_point(frame: Frame, w: float, h: float, remarks: Remarks) -> tuple[float, float]:
    """Return cx, cy in pixels of w x h; raises UserError if they lie far from the middle, as in other units."""
    cx, cy = frame.number("cx", w / 2), frame.number("cy", h / 2)
    shift = max(abs(cx / w - 0.5), abs(cy / h - 0.5))
    if shift > MOST_SHIFT:
        raise UserError(
            f"{frame.where}: the principal point is at {cx:.4g}, {cy:.4g} of {w:g}x{h:g} pixels; cx and cy "
            f"are pixels from the corner of the first pixel, and must lie within 10% to 90% of w and h; "
            f"the middle is {w / 2:g}, {h / 2:g}"
        )
    if shift > SHIFT:
        remarks.add(
            "the principal point cx, cy is more than a quarter of the picture off its middle: it is used; "
            "it is in pixels from the corner of the first pixel"
        )
    return cx, cy


def focal_lengths(frame: Frame, w: float, h: float, remarks: Remarks) -> tuple[float, float]:
    """Return fl_x, fl_y in pixels of w x h; where only one is stated, in whatever way, pixels are square."""
    stated = [focal_length(frame, axis, size, remarks) for axis, size in (("x", w), ("y", h))]
    found = [fl for fl in stated if fl is not None]
    if not found:
        raise UserError(
            f"{frame.where}: no fl_x (focal length, pixels) and no camera_angle_x (horizontal field of "
            "view, radians); add one of them"
        )
    widest = WIDEST_FISHEYE if has_fisheye(frame) else WIDEST
    for axis, size, fl in zip("xy", (w, h), stated):
        if fl is not None and WIDEST_FISHEYE * size <= fl < widest * size:
            raise UserError(
                f"{frame.where}: its focal length is {fl:.4g} pixels for {size:g} pixels of the picture: "
                f"less than a tenth, which only a fisheye has; correct camera_angle_{axis}, or if "
                f"fl_{axis} is a share, multiply it by {size:g}, and cx, cy by {w:g}, {h:g}"
            )
        if fl is not None and not widest * size <= fl <= NARROWEST * size:
            raise UserError(
                f"{frame.where}: its focal length is {fl:.4g} pixels for {size:g} pixels of the picture; "
                f"correct fl_{axis} (pixels) or camera_angle_{axis} (radians)"
            )
    return (found[0] if stated[0] is None else stated[0]), (found[0] if stated[1] is None else stated[1])


def focal_length(frame: Frame, axis: str, size: float, remarks: Remarks) -> float | None:
    """Return the focal length along an axis, x or y, in pixels of an image `size` long, or None where none is stated.

    Of fl_x, x_fov (degrees) and camera_angle_x (radians), the first that is stated counts. A remark names others that
    differ.
    """
    keys = (f"fl_{axis}", f"{axis}_fov", f"camera_angle_{axis}")
    found: dict[str, float] = {}
    for key in frame.nearest(keys):
        value = frame.number(key, above=0)
        if key == keys[0]:
            found[key] = value
            continue
        angle = value if key == keys[2] else math.radians(value)
        if angle >= math.pi:
            limit = "pi radians, got {:g}; is it in degrees?" if key == keys[2] else "180 degrees, got {:g}"
            raise UserError(f"{frame.where}: {key} must lie below {limit.format(value)}")
        found[key] = size / 2 / math.tan(angle / 2)
    if not found:
        return None
    first, *others = found
    for other in others:
        if abs(found[other] - found[first]) > SAME * found[first]:
            remarks.add(f"{first} and {other} state different focal lengths: {first} is used; take the wrong one out")
    return found[first]


# ---------------------------------------------------------------- lenses


def has_fisheye(frame: Frame) -> bool:
    """Whether a frame states a fisheye lens, by its name or by a switch."""
    model = frame.get("camera_model")
    return frame.switch("is_fisheye") or isinstance(model, str) and model.upper() in FISHEYE


def lens_of(frame: Frame, remarks: Remarks) -> Lens:
    """Return the `Lens` of a frame; raises UserError for a camera that `voxnerf.lens` does not have.

    OpenCV's k4, k5, k6 are in the denominator. nerfstudio and Metashape write k4 without k5 and k6, for the factor of
    r^8.
    """
    model = frame.get("camera_model", "")
    model = model.upper() if isinstance(model, str) else model
    if model not in (*PINHOLES, *RADIAL, *FISHEYE):
        raise UserError(
            f"{frame.where}: camera_model {shown(model, 40)} is not read; it can be a "
            "pinhole, SIMPLE_RADIAL, RADIAL, OPENCV, FULL_OPENCV or OPENCV_FISHEYE; project the pictures "
            "into one of these"
        )
    k = coefficients(frame)
    fisheye = has_fisheye(frame)
    if fisheye and any(k[key] for key in ("k5", "k6", "p1", "p2")):
        raise UserError(
            f"{frame.where}: a fisheye lens has k1 to k4 only, and it states k5, k6, p1 or p2 too; take "
            "them out, or is_fisheye"
        )
    if fisheye and model not in ("", *FISHEYE):
        remarks.add(f"is_fisheye and camera_model {model} are two lenses: the fisheye is used")
    if model in PINHOLES[1:] and any(k.values()):
        remarks.add(f"camera_model {model} has no coefficients of distortion, and some are stated: they are used")
    if fisheye:
        return Lens(True, tuple(k[f"k{i}"] for i in (1, 2, 3, 4)))
    if model == "FULL_OPENCV" or k["k5"] or k["k6"]:
        return Lens(False, (k["k1"], k["k2"], k["k3"], 0.0), (k["k4"], k["k5"], k["k6"]), (k["p1"], k["p2"]))
    if k["k4"]:
        remarks.add(
            "k4 is taken for the factor of r^8, as nerfstudio means it; for OpenCV's, state camera_model FULL_OPENCV"
        )
    return Lens(False, (k["k1"], k["k2"], k["k3"], k["k4"]), (0.0,) * 3, (k["p1"], k["p2"]))


def coefficients(frame: Frame) -> dict[str, float]:
    """Return {k1 to k6, p1, p2: number, 0 where not stated} of a frame, one by one or in nerfstudio's list."""
    found = frame.nearest((*COEFFICIENTS, "distortion_params"))
    if "distortion_params" in found:
        listed = found["distortion_params"]
        if not isinstance(listed, list) or len(listed) != len(LISTED):
            raise UserError(
                f"{frame.where}: distortion_params must be the {len(LISTED)} numbers {', '.join(LISTED)}, "
                f"got {shown(listed)}"
            )
        frame = frame._replace(own=dict(zip(LISTED, listed)), common={})
    k = {key: frame.number(key, 0) for key in COEFFICIENTS}
    strong = [key for key in k if abs(k[key]) > STRONGEST]
    if strong:
        raise UserError(f"{frame.where}: {strong[0]} is {k[strong[0]]:.4g}, which no lens has; correct it")
    return k
