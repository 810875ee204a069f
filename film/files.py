"""The folder of a final video: pictures and two videos, which replace those of an earlier call all at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from my import media
from my.file_system import delete_folder, move
from my.host_copy import HostCopy
from my.run_dir import clear_scratch, remove, scratch_of

PICTURES, VIDEO, WITH_DEPTH = "img", "img", "img_depth"
OURS = (PICTURES, *(f"{name}{ending}" for name in (VIDEO, WITH_DEPTH) for ending in media.ENCODINGS))


class Film:
    """Writes frames to img/*.png, img.<format> and img_depth.<format> in a scratch folder; a context manager.

    first: number of the first frame.  kind: ending of the videos.  depth_range: of the depth images, world units.
    """

    def __init__(
        self, folder: Path, first: int, fps: float, kind: str, keep: bool, depth_range: tuple[float, float]
    ) -> None:
        self.folder, self.i, self.kind, self.depth_range = folder, first, kind, depth_range
        self.pictures = folder / PICTURES if keep else None
        if self.pictures:
            self.pictures.mkdir()
        self.videos = [media.VideoWriter(folder / f"{name}.{kind}", fps) for name in (VIDEO, WITH_DEPTH)]
        self.open = contextlib.ExitStack()

    def add(self, frame: HostCopy) -> None:
        """Write the next frame: its picture (H, W, 3 or 4) uint8 and its depth (h, w)."""
        picture, depth = frame
        if self.pictures:
            (self.pictures / f"{self.i:03d}.png").write_bytes(media.as_png(picture))
        flat = media.on_white(picture)
        self.videos[0].append(picture if self.kind != "mp4" else flat)
        self.videos[1].append(media.beside(flat, media.depth_image(depth, *self.depth_range)))
        self.i += 1

    def __enter__(self) -> Film:
        for video in self.videos:
            self.open.enter_context(video)
        return self

    def __exit__(self, *error: Any) -> None:
        self.open.__exit__(*error)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give the block an empty folder, which takes the place of `folder` when it ends without an exception.

    A process that is killed at any moment leaves the old folder or none. What is in the old folder, and not of this
    command, stays there.
    """
    clear_scratch(folder.parent, [], held=False)
    scratch = scratch_of(folder)
    old = folder.with_name(f".{folder.name}.old")
    give_back(old, folder)
    scratch.mkdir()
    try:
        yield scratch
        if folder.exists():
            move(folder, old)
        move(scratch, folder)
        give_back(old, folder)
    finally:
        remove(scratch)


def give_back(old: Path, folder: Path) -> None:
    """Delete what this command wrote to the folder `old`, and put the rest of it into `folder`."""
    if not old.exists():
        return
    folder.mkdir(exist_ok=True)
    for entry in old.iterdir():
        if entry.name not in OURS and not (folder / entry.name).exists():
            move(entry, folder / entry.name)
    delete_folder(old)
