"""The frames of a scene's transforms files, and which of them are trained on and which are tested.

Two layouts: one file per split (Blender's NeRF-synthetic, transforms_train.json and its siblings), or one
transforms.json (instant-ngp, nerfstudio). docs/scenes.md lists what a file may state, and what becomes of it.
"""

import math
import os
import posixpath
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from my.errors import UserError, note, shown, some
from my.plain_files import read_json
from voxnerf.scene import facts

SPLITS = ("train", "val", "test")
WHOLE = "transforms.json"  # of the layout without splits
HOLD_OUT = 8  # where nothing is said, every 8th frame is a test view, from the first one on
SUFFIXES = (".png", ".jpg", ".jpeg", ".JPG", ".JPEG", ".PNG", ".exr", ".webp", ".tif", ".tiff", ".bmp")
LONGEST = 4096  # characters of a path, more than any file system takes
FORMAT = '{"frames": [{"file_path": ..., "transform_matrix": ...}, ...]} with at least one frame'


class Remarks:
    """What is to be told of the frames of a scene: each text once, with the number of frames that it is true of."""

    def __init__(self):
        self.counts = Counter()
        self.blind = 0  # pixels that a lens maps nothing to

    def add(self, text: str):
        """Count one more frame of which `text` is true."""
        self.counts[text] += 1

    def tell(self, folder, n: int):
        """Write a note for each text that was counted, of `n` frames."""
        for text, k in self.counts.items():
            note(f"{folder}: {'all' if k == n else k} of {n} frames: {text}")
        if self.blind:
            note(f"{folder}: {self.blind} pixels lie where the lens as it is stated maps nothing, and are left out")


class Frame(NamedTuple):
    """One entry of `frames`, before what its file says for all."""

    own: dict
    common: dict
    where: str  # for messages
    name: str  # its file_path, as it stands there
    picture: Path | None = None

    def get(self, key, default=None):
        """Return what the frame, or else its file, states at `key`; null states nothing."""
        value = self.own.get(key)
        value = self.common.get(key) if value is None else value
        return default if value is None else value

    def nearest(self, keys) -> dict:
        """Return what is stated of some keys that mean the same: by the frame, or where it states none, by the file."""
        found = ({key: level[key] for key in keys if level.get(key) is not None} for level in (self.own, self.common))
        return next(found) or next(found)

    def number(self, key, default=None, above=-math.inf) -> float:
        """Return the finite number at `key`; raises UserError where it is none, or not `above`."""
        value = self.get(key, default)
        number = math.nan
        if type(value) in (int, float) and abs(value) < 1e300:  # also False for NaN
            number = float(value)
        if not number > above:
            kind = "a finite number" if above == -math.inf else f"a finite number above {above}"
            raise UserError(f"{self.where}: {key} must be {kind}, got {facts.given(value)}")
        return number

    def switch(self, key) -> bool:
        """Return whether `key` is on, which it is not where nothing is stated; UserError for text and other values."""
        value = self.get(key, False)
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise UserError(f"{self.where}: {key} must be true or false, got {facts.given(value)}")
        return bool(value)


# ---------------------------------------------------------------- splits


def read_splits(folder, strict=False) -> dict:
    """Return {"train", "val", "test": its `Frame`s, each with its picture} of a folder in either layout.

    Frames whose picture is missing are left out with a note that counts them; `strict` refuses them.
    Raises UserError, one line, for what is missing, damaged or cannot be meant, and where no frame is left to
    train on or to test.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a scene")
    own = {split: folder / f"transforms_{split}.json" for split in SPLITS}
    own = {split: path for split, path in own.items() if path.exists()}
    whole = folder / WHOLE
    if own and "train" not in own and not whole.exists():
        raise UserError(f"{folder}: has {', '.join(path.name for path in own.values())}, but no transforms_train.json; "
                        "add it: at least one view in it")
    if "train" in own:
        return files_of_splits(folder, own, strict)
    if not whole.exists():
        raise UserError(f"{folder}: no transforms_train.json (Blender layout) and no {WHOLE} (instant-ngp, nerfstudio) "
                        "in it; give the folder of a scene")
    meta, frames = frames_of(whole)
    lists = listed_names(whole, meta, frames)
    frames = sorted(present(folder, {whole.name: frames}, strict)[whole.name], key=lambda frame: frame.name)
    if lists:
        return by_lists(whole, lists, frames)
    train, test = hold_out(whole, frames)
    return {"train": train, "val": test, "test": test}


def files_of_splits(folder, paths, strict) -> dict:
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
    note(f"{folder}: has views to train on, and none to test: {len(test)} of {len(train) + len(test)} are held out, "
         f"every {HOLD_OUT}th by file_path; add a transforms_test.json with its pictures to choose them")
    return {"train": train, "val": test, "test": test}


def hold_out(path, frames) -> tuple:
    """Return the frames to train on, and every 8th by file_path, to be tested; UserError where none is to train on."""
    frames = sorted(frames, key=lambda frame: frame.name)
    train = [frame for i, frame in enumerate(frames) if i % HOLD_OUT]
    if not train:
        raise UserError(f"{path}: its only frame is a test view, as every {HOLD_OUT}th is, from the first on; it "
                        "needs at least 2")
    return train, frames[::HOLD_OUT]


def listed_names(path, meta, frames) -> dict:
    """Return {split: set of plain names}, as nerfstudio's lists or each frame's `split` state them; {} for none."""
    lists = {}
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
            note(f"{path}: {len(strange)} of the names in its lists of views are of no frame: "
                 f"{some(sorted(strange), 1)}; they must be spelled as in file_path")
        return lists
    for frame in frames:
        split = frame.own.get("split")
        if split is not None:
            if split not in SPLITS:
                raise UserError(f"{frame.where}: split must be one of {', '.join(SPLITS)}, got {shown(split)}")
            lists.setdefault(split, set()).add(plain_path(frame.name))
    return lists


def by_lists(path, lists, frames) -> dict:
    """Return the `Frame`s of each split by {split: names}, as nerfstudio means them: a frame in none is not used."""
    splits = {split: [frame for frame in frames if plain_path(frame.name) in names] for split, names in lists.items()}
    splits = {split: kept for split, kept in splits.items() if kept}
    used = set().union(*lists.values())
    rest = [frame for frame in frames if plain_path(frame.name) not in used]
    if "train" not in splits and "train" not in lists and rest:
        note(f"{path}: it lists no views to train on: the {len(rest)} that are in no list are trained on")
        splits["train"], rest = rest, []
    if "train" not in splits:
        raise UserError(f"{path}: its lists of views leave none to train on; add views to train_filenames, spelled "
                        "as in file_path")
    if rest:
        note(f"{path}: {len(rest)} of {len(frames)} frames are in none of its lists of views, and not used")
    test = splits.get("test") or splits.get("val")
    if not test:
        splits["train"], test = hold_out(path, splits["train"])
        note(f"{path}: its lists leave no view to test: {len(test)} are held out of those to train on, every "
             f"{HOLD_OUT}th; list some in test_filenames to choose them")
    twice = {frame.name for frame in splits["train"]} & {frame.name for frame in test}
    if twice:
        note(f"{path}: {len(twice)} views are both trained on and tested, such as {some(sorted(twice), 1)}: PSNR and "
             "SSIM of these do not tell how new views look")
    return {"train": splits["train"], "val": splits.get("val") or test, "test": test}


# ---------------------------------------------------------------- files


def frames_of(path) -> tuple:
    """Return what a transforms file states for all, and its `Frame`s, as they stand there."""
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


def frame_of(path, i, common, entry) -> Frame:
    """Return the `Frame` of entry number `i`; raises UserError if it lacks a path or a pose."""
    own = entry if isinstance(entry, dict) else {}
    missing = [] if "file_path" in own else ["file_path"]
    missing += [] if {"transform_matrix", "transform_matrix_start"} & own.keys() else ["transform_matrix"]
    if missing:
        raise UserError(f"{path}: frames[{i}] has no {' and no '.join(missing)}; every frame needs both file_path and "
                        "transform_matrix")
    name = own["file_path"]
    if not isinstance(name, str):
        raise UserError(f"{path}: frames[{i}]: file_path must be text, got {shown(name)}")
    if not 0 < len(name) <= LONGEST:
        raise UserError(f"{path}: frames[{i}]: file_path must have 1 to {LONGEST} characters, got {len(name)}")
    return Frame(own, common, f"{path}: frames[{i}] ({shown(name)})", name)


# ---------------------------------------------------------------- where pictures are


def present(folder, by_file, strict) -> dict:
    """Return {key: its `Frame`s that have a picture, with it} of {key: `Frame`s}; those without are counted in a note.

    Raises UserError where the first key's have none at all, and where `strict` is set and any is missing.
    """
    remarks, found, missing = Remarks(), {}, []
    for key, frames in by_file.items():
        located = [frame._replace(picture=find_file(folder, frame.name, SUFFIXES, remarks)) for frame in frames]
        found[key] = [frame for frame in located if frame.picture]
        missing += [frame for frame in located if not frame.picture]
        if not found[key] and key == next(iter(by_file)):
            raise UserError(f"{no_picture(folder, located[0])}, nor with {', '.join(SUFFIXES[:3])} after it, and none of "
                            f"all {len(frames)} frames has one; put them there, or correct file_path")
    n = sum(map(len, by_file.values()))
    remarks.tell(folder, n)
    if missing and strict:
        raise UserError(f"{no_picture(folder, missing[0])}; {len(missing)} of {n} frames have none; put them there, or "
                        "leave out --strict True to go on without")
    if missing:
        note(f"{folder}: {len(missing)} of {n} frames are left out, as their pictures are missing: "
             f"{some((frame.name for frame in missing), 2)}; --strict True refuses that")
    return found


def no_picture(folder, frame) -> str:
    """Return the words that say where a frame's picture is not."""
    return f"{frame.where}: no picture {shown(str(folder / plain_path(frame.name)), 300)}"


def find_file(folder, name, suffixes=(), remarks=None) -> Path | None:
    """Return the path of the file that a transforms file calls `name`, below `folder`; None where there is none.

    Its suffix may be left out, and it may be written with Windows' backslashes. A path of another machine, or
    one that leads out of the folder, is found by its end.
    """
    plain = plain_path(name)
    for each in dict.fromkeys((name, plain)):
        for suffix in ("", *suffixes):
            if os.path.isfile(os.path.join(folder, each + suffix)):
                return folder / (each + suffix)
    if not re.match(r"/|[A-Za-z]:|\.\./", plain):
        return None
    parts = plain.split("/")[1:]
    for i in range(max(0, len(parts) - 8), len(parts)):
        end = "/".join(parts[i:])
        for suffix in ("", *suffixes):
            if not end.startswith("..") and os.path.isfile(os.path.join(folder, end + suffix)):
                if remarks:
                    remarks.add("file_path leads elsewhere, and the picture was found in the scene by the path's end")
                return folder / (end + suffix)
    return None


def plain_path(name) -> str:
    """Return a path with slashes only, without steps that lead nowhere, to be compared with others."""
    return posixpath.normpath(name.replace("\\", "/"))
