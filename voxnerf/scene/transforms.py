"""The frames of a scene's transforms files, and which of them are trained on and which are tested.

Two layouts: one file per split (Blender's NeRF-synthetic, transforms_train.json and its siblings), or one
transforms.json (instant-ngp, nerfstudio). docs/scenes.md lists what a file may state, and what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from my.errors import UserError, note, shown, some
from my.plain_files import read_json
from voxnerf.scene import facts
from voxnerf.scene.frame import Frame
from voxnerf.scene.other_tools import made_by_others
from voxnerf.scene.places import plain_path, present, shared_pictures

SPLITS = ("train", "val", "test")
WHOLE = "transforms.json"  # of the layout without splits
HOLD_OUT = 8  # where nothing is said, every 8th frame is a test view, from the first one on
LONGEST = 4096  # characters of a path, more than any file system takes
FORMAT = '{"frames": [{"file_path": ..., "transform_matrix": ...}, ...]} with at least one frame'


# ---------------------------------------------------------------- splits


def read_splits(folder: str | Path, strict: bool = False) -> dict[str, list[Frame]]:
    """Return {"train", "val", "test": its `Frame`s, each with its picture} of a folder in either layout.

    Notes and refusals are those of `splits_of` and `shared_pictures`.
    """
    folder = Path(folder)
    splits = splits_of(folder, strict)
    shared_pictures(folder, splits)
    return splits


def splits_of(folder: Path, strict: bool) -> dict[str, list[Frame]]:
    """Return {"train", "val", "test": its `Frame`s, each with its picture} of a folder in either layout.

    Frames whose picture is missing are left out with a note that counts them; `strict` refuses them.
    Raises UserError, one line, for what is missing, damaged or impossible, and if no frame is left to train on or to
    test.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a scene")
    own = {split: folder / f"transforms_{split}.json" for split in SPLITS}
    own = {split: path for split, path in own.items() if path.exists()}
    whole = folder / WHOLE
    if own and "train" not in own and not whole.exists():
        raise UserError(
            f"{folder}: has {', '.join(path.name for path in own.values())}, but no transforms_train.json; "
            "add it: at least one view in it"
        )
    if "train" in own:
        return files_of_splits(folder, own, strict)
    if not whole.exists():
        advice = made_by_others(folder) or "give the folder of a scene"
        raise UserError(
            f"{folder}: no transforms_train.json (Blender layout) and no {WHOLE} (instant-ngp, nerfstudio) "
            f"in it; {advice}"
        )
    meta, frames = frames_of(whole)
    lists = listed_names(whole, meta, frames)
    frames = sorted(present(folder, {whole.name: frames}, strict)[whole.name], key=lambda frame: frame.name)
    if lists:
        return by_lists(whole, lists, frames)
    train, test = hold_out(whole, frames)
    return {"train": train, "val": test, "test": test}


def files_of_splits(folder: Path, paths: dict[str, Path], strict: bool) -> dict[str, list[Frame]]:
    """Return the `Frame`s of {split: transforms file}; where there are no test views, some are held out of train."""
    frames = {}
    for split, path in paths.items():
        meta, frames[split] = frames_of(path)
        if listed_names(path, meta, frames[split]):
            note(f"{path}: its lists of views are not used, as each split has a file of its own")
    if (folder / WHOLE).exists():
        note(f"{folder / WHOLE}: is not read, since transforms_train.json is beside it; a scene is in one or the other")
    frames = present(folder, frames, strict)
    frames = {split: kept for split, kept in frames.items() if kept}
    found = frames.get("test") or frames.get("val")
    if found:
        if not frames.get("test"):
            note(f"{folder}: no view of transforms_test.json is there: the views of transforms_val.json are tested")
        return {"train": frames["train"], "val": frames.get("val") or found, "test": found}
    train, test = hold_out(paths["train"], frames["train"])
    note(
        f"{folder}: has views to train on, and none to test: {len(test)} of {len(train) + len(test)} are held out, "
        f"every {HOLD_OUT}th by file_path; add a transforms_test.json with its pictures to choose them"
    )
    return {"train": train, "val": test, "test": test}


def hold_out(path: Path, frames: Sequence[Frame]) -> tuple[list[Frame], list[Frame]]:
    """Return the frames to train on, and every 8th by file_path to test; UserError if none is left to train on."""
    frames = sorted(frames, key=lambda frame: frame.name)
    train = [frame for i, frame in enumerate(frames) if i % HOLD_OUT]
    if not train:
        raise UserError(
            f"{path}: its only frame is a test view, as every {HOLD_OUT}th is, from the first on; it needs at least 2"
        )
    return train, frames[::HOLD_OUT]


def listed_names(path: Path, meta: dict[str, Any], frames: Sequence[Frame]) -> dict[str, set[str]]:
    """Return {split: set of plain names}, as nerfstudio's lists or each frame's `split` state them; {} for none."""
    lists: dict[str, set[str]] = {}
    for split in SPLITS:
        names = meta.get(f"{split}_filenames")
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: {split}_filenames must be a list of file paths, got {shown(names)}")
        lists[split] = {plain_path(name) for name in names}
    if lists:
        known = {plain_path(frame.name) for frame in frames}
        strange = [name for names in lists.values() for name in names if name not in known]
        if strange:
            note(
                f"{path}: {len(strange)} of the names in its lists of views are of no frame: "
                f"{some(sorted(strange), 1)}; they must be spelled as in file_path"
            )
        return lists
    for frame in frames:
        stated = frame.own.get("split")
        if stated is not None:
            if stated not in SPLITS:
                raise UserError(f"{frame.where}: split must be one of {', '.join(SPLITS)}, got {shown(stated)}")
            lists.setdefault(stated, set()).add(plain_path(frame.name))
    return lists


def by_lists(path: Path, lists: dict[str, set[str]], frames: Sequence[Frame]) -> dict[str, list[Frame]]:
    """Return the `Frame`s of each split by {split: names}, as nerfstudio does: a frame in no list is not used."""
    splits = {split: [frame for frame in frames if plain_path(frame.name) in names] for split, names in lists.items()}
    splits = {split: kept for split, kept in splits.items() if kept}
    used = set().union(*lists.values())
    rest = [frame for frame in frames if plain_path(frame.name) not in used]
    if "train" not in splits and "train" not in lists and rest:
        note(f"{path}: it lists no views to train on: the {len(rest)} that are in no list are trained on")
        splits["train"], rest = rest, []
    if "train" not in splits:
        raise UserError(
            f"{path}: its lists of views leave none to train on; add views to train_filenames, spelled as in file_path"
        )
    if rest:
        note(f"{path}: {len(rest)} of {len(frames)} frames are in none of its lists of views, and not used")
    test = splits.get("test") or splits.get("val")
    if not test:
        splits["train"], test = hold_out(path, splits["train"])
        note(
            f"{path}: its lists leave no view to test: {len(test)} are held out of those to train on, every "
            f"{HOLD_OUT}th; list some in test_filenames to choose them"
        )
    twice = {frame.name for frame in splits["train"]} & {frame.name for frame in test}
    if twice:
        note(
            f"{path}: {len(twice)} views are both trained on and tested, such as {some(sorted(twice), 1)}: PSNR and "
            "SSIM of these do not tell how new views look"
        )
    return {"train": splits["train"], "val": splits.get("val") or test, "test": test}


# ---------------------------------------------------------------- files


def frames_of(path: Path) -> tuple[dict[str, Any], list[Frame]]:
    """Return what a transforms file states for all frames, and its frames, in its order."""
    try:
        meta = read_json(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}; put it right, or get the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    listed = meta.pop("frames", None)
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path}: expected {FORMAT}")
    frames = [frame_of(path, i, meta, entry) for i, entry in enumerate(listed)]
    facts.tell(path, meta, listed)
    return meta, frames


def frame_of(path: Path, i: int, common: dict[str, Any], entry: Any) -> Frame:
    """Return the `Frame` of entry number `i`; raises UserError if it lacks a path or a pose."""
    own = entry if isinstance(entry, dict) else {}
    missing = [] if "file_path" in own else ["file_path"]
    missing += [] if {"transform_matrix", "transform_matrix_start"} & own.keys() else ["transform_matrix"]
    if missing:
        raise UserError(
            f"{path}: frames[{i}] has no {' and no '.join(missing)}; every frame needs both file_path and "
            "transform_matrix"
        )
    name = own["file_path"]
    if not isinstance(name, str):
        raise UserError(f"{path}: frames[{i}]: file_path must be text, got {shown(name)}")
    if not 0 < len(name) <= LONGEST:
        raise UserError(f"{path}: frames[{i}]: file_path must have 1 to {LONGEST} characters, got {len(name)}")
    return Frame(own, common, f"{path}: frames[{i}] ({shown(name)})", name)
