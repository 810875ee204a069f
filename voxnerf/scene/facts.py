"""The keys of transforms files: what is used, refused, told of in a note, or without meaning here.

docs/scenes.md has the same as a table, for people.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from my.errors import UserError, note, shown

USED = {
    "frames",
    "file_path",
    "transform_matrix",
    "transform_matrix_start",
    "mask_path",
    "split",
    "train_filenames",
    "val_filenames",
    "test_filenames",
    "fl_x",
    "fl_y",
    "cx",
    "cy",
    "w",
    "h",
    "x_fov",
    "y_fov",
    "camera_angle_x",
    "camera_angle_y",
    "camera_model",
    "is_fisheye",
    "k1",
    "k2",
    "k3",
    "k4",
    "k5",
    "k6",
    "p1",
    "p2",
    "distortion_params",
    "fisheye_crop_radius",
    "white_transparent",
    "black_transparent",
}
NO_MEANING = {  # the poses are as they stand, and a frame needs no other name
    "applied_transform",
    "applied_scale",
    "ply_file_path",
    "sharpness",
    "rotation",
    "image_id",
    "camera_id",
    "colmap_im_id",
    "colmap_image_id",
    "colmap_camera_id",
    "timestamp",
}
REFUSED = {
    "from_mitsuba": "its poses have other axes; write them as camera to world in OpenGL's, looking along -z",
    "from_na": "its poses have other axes; write them as camera to world in OpenGL's, looking along -z",
    "latlong": "its pictures are panoramas; project them to pinhole pictures first",
    "equirectangular": "its pictures are panoramas; project them to pinhole pictures first",
    "ftheta_p0": "this lens is not read; undistort the pictures, or state k1 to k4 of an OPENCV_FISHEYE",
    "skew": "pixels must be right-angled; resample the pictures, and state 0",
}
SWITCHES = ("from_mitsuba", "from_na", "latlong", "equirectangular")  # of those that are refused
BOX = "the field is the cube of half edge --model.bbox_len round the origin; set that to hold the object"
DEPTH = "only colours are trained on"
STILL = "each picture is taken for one moment of a camera that stands still"
AXES = "poses are taken for camera to world in OpenGL's axes, looking along -z; turn the y and z columns of OpenCV's"
OTHERS = "the poses and pictures are used as they stand"
UNUSED = {
    "aabb_scale": BOX,
    "scale": BOX,
    "offset": BOX,
    "render_aabb": BOX,
    "render_aabb_to_local": BOX,
    "aabb": BOX,
    "depth_file_path": DEPTH,
    "depth_path": DEPTH,
    "enable_depth_loading": DEPTH,
    "integer_depth_scale": DEPTH,
    "depth_unit_scale_factor": DEPTH,
    "normal_file_path": DEPTH,
    "semantic_path": DEPTH,
    "semantics_path": DEPTH,
    "rolling_shutter": STILL,
    "transform_matrix_end": STILL,
    "exposure_time": STILL,
    "up": OTHERS,
    "orientation_override": OTHERS,
    "n_extra_learnable_dims": OTHERS,
    "fix_premult": OTHERS,
    "wrap_hdr": OTHERS,
    "mask_color": OTHERS,
    "camera_convention": AXES,
    "coordinate_system": AXES,
    "intrinsic_matrix": "state fl_x, fl_y, cx and cy",
}
SHOWN = 5  # unknown keys that a note names
LONG = 40  # characters, above which a key is compared with no other


def tell(path: Path, meta: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write notes on what a transforms file states and nothing uses; raise UserError for what it must not state.

    meta: what it states for all; entries: its frames, each a dict.
    """
    stated = dict.fromkeys(key for level in (meta, *entries) for key, value in level.items() if says(value))
    for key, why in REFUSED.items():
        if key in stated:
            texts = [level[key] for level in (meta, *entries) if isinstance(level.get(key), str) and key in SWITCHES]
            raise UserError(
                f"{path}: {key} must be true or false, got {given(texts[0])}"
                if texts and texts[0]
                else f"{path}: {key} is stated: {why}"
            )
    for why in dict.fromkeys(UNUSED.values()):
        keys = [key for key in stated if UNUSED.get(key) == why]
        if keys:
            note(f"{path}: not used: {', '.join(keys)}: {why}")
    if "time" in stated and any(entry.get("time") != entries[0].get("time") for entry in entries):
        note(
            f"{path}: its frames are of different times, and one still scene is trained on all of them; leave the "
            "frames of other times out, unless nothing moves"
        )
    unknown = [key for key in stated if not (key == "time" or key in USED or key in NO_MEANING or key in UNUSED)]
    if unknown:
        names = ", ".join(map(with_guess, unknown[:SHOWN]))
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        note(f"{path}: not known, and not used: {names}{more}")


def given(value: Any) -> str:
    """Return a wrong value as a message quotes it; a text is called a text."""
    return f"text '{shown(value)}'" if isinstance(value, str) else shown(value)


def says(value: Any) -> bool:
    """Whether a value states anything: not null, not off, not zero, not empty."""
    return bool(value)


def with_guess(key: str) -> str:
    """Return an unknown key, and a known key that it may be meant for."""
    close = difflib.get_close_matches(key, USED, 1, 0.8) if len(key) <= LONG else []
    return shown(key, LONG) + (f" (perhaps you meant {close[0]}?)" if close else "")
