"""Where the pictures of frames are, and which frames share a picture."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from my.errors import UserError, note, shown, some
from voxnerf.scene.frame import Frame, Remarks

SUFFIXES = (".png", ".jpg", ".jpeg", ".JPG", ".JPEG", ".PNG", ".exr", ".webp", ".tif", ".tiff", ".bmp")


def present(folder: Path, by_file: dict[str, list[Frame]], strict: bool) -> dict[str, list[Frame]]:
    """Return {key: frames} with the paths of their pictures; a note counts frames without one, which are left out.

    Raises UserError if no frame of the first key has a picture, and with `strict` if any frame has none.
    """
    remarks, found, missing = Remarks(), {}, []
    for key, frames in by_file.items():
        located = [with_picture(folder, frame, remarks) for frame in frames]
        found[key] = [frame for frame in located if frame.picture]
        missing += [frame for frame in located if not frame.picture]
        if not found[key] and key == next(iter(by_file)):
            raise UserError(
                f"{no_picture(folder, located[0])}, nor with {', '.join(SUFFIXES[:3])} after it, and none "
                f"of all {len(frames)} frames has one; put them there, or correct file_path"
            )
    n = sum(map(len, by_file.values()))
    remarks.tell(folder, n)
    if missing and strict:
        raise UserError(
            f"{no_picture(folder, missing[0])}; {len(missing)} of {n} frames have none; put them there, or "
            "leave out --strict True to go on without"
        )
    if missing:
        note(
            f"{folder}: {len(missing)} of {n} frames are left out, as their pictures are missing: "
            f"{some((frame.name for frame in missing), 2)}; --strict True refuses that"
        )
    return found


def with_picture(folder: Path, frame: Frame, remarks: Remarks) -> Frame:
    """Return a frame with the path of its picture, or with None if it is not found."""
    picture = as_stated(folder, frame.name, SUFFIXES)
    if picture:
        return frame._replace(picture=picture)
    picture = by_its_end(folder, frame.name, SUFFIXES)
    if picture:
        remarks.add("file_path leads elsewhere, and the picture was found in the scene by the path's end")
    return frame._replace(picture=picture, by_end=picture is not None)


def no_picture(folder: Path, frame: Frame) -> str:
    """Return the words of a message that a frame's picture is missing, and where."""
    return f"{frame.where}: no picture {shown(str(folder / plain_path(frame.name)), 300)}"


def find_file(folder: Path, name: str, suffixes: Sequence[str] = ()) -> Path | None:
    """Return the path of the file that a transforms file calls `name`, below `folder`; None where there is none.

    Its suffix may be left out, and it may be written with Windows' backslashes. A path of another machine, or
    one that leads out of the folder, is found by its end.
    """
    return as_stated(folder, name, suffixes) or by_its_end(folder, name, suffixes)


def as_stated(folder: Path, name: str, suffixes: Sequence[str] = ()) -> Path | None:
    """Return the path of the file where `name` says that it is, or None."""
    for each in dict.fromkeys((name, plain_path(name))):
        for suffix in ("", *suffixes):
            if os.path.isfile(os.path.join(folder, each + suffix)):
                return folder / (each + suffix)
    return None


def by_its_end(folder: Path, name: str, suffixes: Sequence[str] = ()) -> Path | None:
    """Return the path of a file below `folder` that ends as `name` does, if `name` leads elsewhere, or None."""
    plain = plain_path(name)
    if not re.match(r"/|[A-Za-z]:|\.\./", plain):
        return None
    parts = plain.split("/")[1:]
    for i in range(max(0, len(parts) - 8), len(parts)):
        end = "/".join(parts[i:])
        for suffix in ("", *suffixes):
            if not end.startswith("..") and os.path.isfile(os.path.join(folder, end + suffix)):
                return folder / (end + suffix)
    return None


def plain_path(name: str) -> str:
    """Return a path with slashes only and without superfluous steps, so that it can be compared with others."""
    return posixpath.normpath(name.replace("\\", "/"))


# ---------------------------------------------------------------- pictures of several frames


def shared_pictures(folder: Path, splits: dict[str, list[Frame]]) -> None:
    """Write a note on frames of {split: frames} that share a picture and have different poses.

    Raises UserError if such a picture was found by the end of a path: then the end does not tell pictures apart.
    """
    by_picture: dict[str, dict[str, tuple[str, Frame]]] = {}
    for split, frames in splits.items():
        for frame in frames:  # one that is in several splits counts once
            by_picture.setdefault(os.path.normpath(frame.found), {})[frame.where] = split, frame
    groups = [list(group.values()) for group in by_picture.values()]
    shared = [group for group in groups if any(pose(frame) != pose(group[0][1]) for _, frame in group)]
    if not shared:
        return
    n = sum(map(len, shared))
    for group in shared:
        frames = sorted((frame for _, frame in group), key=lambda frame: frame.name)
        lost = next((frame for frame in frames if frame.by_end), None)
        if lost:
            other = next(frame for frame in frames if pose(frame) != pose(lost))
            raise UserError(
                f"{lost.where}: its picture was found by the path's end, as "
                f"{shown(str(lost.picture), 300)}, which is that of {shown(other.name)} too, of "
                f"another pose (so it is with {n} frames); put the pictures where "
                "file_path says, or correct it"
            )
    both = sum({"train", "test"} <= {split for split, _ in group} for group in shared)
    leak = f"; {both} of these pictures are both trained on and tested" if both else ""
    note(
        f"{folder}: {n} frames of different poses have {len(shared)} pictures, such as {shown(shared[0][0][1].name)}: "
        f"a picture has one pose; correct file_path, or leave the others out{leak}"
    )


def pose(frame: Frame) -> tuple[Any, Any]:
    """Return what a frame states as its pose, to be compared."""
    return frame.own.get("transform_matrix"), frame.own.get("transform_matrix_start")
