"""Folders of other tools, which hold no transforms file, and what makes one of each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from my.errors import shown

AGAIN = "nerfstudio's `ns-process-data images` or instant-ngp's `colmap2nerf.py --run_colmap`, from its pictures"
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")


class Kind(NamedTuple):
    """What a tool leaves in a folder."""

    name: str
    files: tuple[str, ...]  # patterns below the folder; one that is there tells the kind
    maker: str  # of a transforms.json
    beside: tuple[str, ...] = ()  # one of these has to be there too, where there are any


KINDS = (
    Kind(
        "a model of COLMAP",
        tuple(
            f"{folder}cameras.{end}"
            for folder in ("sparse/0/", "sparse/", "colmap/sparse/0/", "colmap_sparse/0/", "")
            for end in ("bin", "txt")
        ),
        "nerfstudio's `ns-process-data images --skip-colmap`, or, where it is saved as text, instant-ngp's "
        "`colmap2nerf.py --text`",
    ),
    Kind("a scene of LLFF", ("poses_bounds.npy",), AGAIN),
    Kind("a scene of Nerfies", ("dataset.json",), AGAIN, ("camera",)),
    Kind("a scene of SDFStudio", ("meta_data.json",), AGAIN),
    Kind("a scene of NSVF", ("intrinsics.txt",), "instant-ngp's `nsvf2nerf.py`", ("pose",)),
    Kind("a scene of NeuS", ("cameras_sphere.npz", "cameras_large.npz", "cameras.npz"), AGAIN),
    Kind("a capture of Polycam", ("keyframes",), "nerfstudio's `ns-process-data polycam`"),
    Kind(
        "a capture of Record3D",
        ("metadata", "metadata.json"),
        "nerfstudio's `ns-process-data record3d` or instant-ngp's `record3d2nerf.py`",
    ),
    Kind("a model of Bundler", ("bundle.out", "bundle/bundle.out", "bundler.out"), AGAIN),
    Kind("cameras of Metashape", ("*.xml",), "nerfstudio's `ns-process-data metashape`"),
)
VIDEO = Kind(
    "a video",
    tuple(f"*{each}" for end in VIDEOS for each in (end, end.upper())),
    "nerfstudio's `ns-process-data video` or instant-ngp's `colmap2nerf.py --video_in`",
)


def made_by_others(folder: Path) -> str | None:
    """Return in words what another tool has left in a folder, and how to make a transforms.json of it, or None."""
    for kind in (*KINDS, VIDEO):
        found = next((path for pattern in kind.files for path in sorted(folder.glob(pattern))), None)
        if found and (not kind.beside or any((folder / name).exists() for name in kind.beside)):
            return f"it has {shown(str(found.relative_to(folder)), 60)}, so it may be {kind.name}: {advice(kind)}"
    return None


def advice(kind: Kind) -> str:
    """Return in words how to make a scene of a kind of folder or file."""
    return f"make a transforms.json of it with {kind.maker}"
