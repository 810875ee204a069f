"""What the page of a run shows: its video, its mesh, its pictures over time. All of them together have an end."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from my.errors import RunError, one_line
from my.media import smaller_video
from pages.markup import WIDTH, asset_text, data_uri, escape, image, spell_bytes

MOST_VIDEO, MOST_MESH, MOST_PICTURE = 5_000_000, 10_000_000, 40_000  # bytes, as files
N_PICTURES, PICTURE_EDGE = 16, 192  # of the strip; pixels
VIDEO_EDGE = 768  # pixels: the longer side of a video that is made smaller
VIDEOS = ("highres_*/img.mp4", "highres_*/img.webp", "highres_*/img.gif", "test_*/view_seq/view.mp4")  # the best first
STEPS = re.compile(r"(?:highres|test)_(\d{1,18})")
GLB = b"glTF\x02\x00\x00\x00"  # how the file of a mesh begins, with its version
MESH_POLICY = "connect-src blob: data:"  # the library reads textures by addresses of what is inside the page
HINT = "Drag to turn, scroll or pinch to zoom. With the keyboard: arrow keys turn, + and - zoom, 0 goes back."


class Shown(NamedTuple):
    """A part of the page."""

    html: str
    scripts: tuple[str, ...] = ()
    policy: str = ""


# ---------------------------------------------------------------- video


def videos(folder: Path) -> list[Path]:
    """Return the turntables of a run, the best first: of highres_final_vis.py, then of the run, latest steps first."""
    found = [path for name in VIDEOS for path in folder.glob(name)]
    return sorted(found, key=lambda path: (path.match(VIDEOS[-1]), -by_step(path)))


def by_step(path: Path) -> int:
    """Return the number of steps in the name of a folder above a file."""
    return max((int(match[1]) for part in path.parts if (match := STEPS.fullmatch(part))), default=-1)


def video(folder: Path, words: str) -> Shown:
    """Return the turntable, made smaller where it takes too much; `words` say what is on it.

    An animation, WebP or GIF, is not made smaller: where it takes too much, a note says so, and the next one is taken.
    """
    notes = []
    for path in videos(folder):
        name, size = escape(path.relative_to(folder).as_posix()), path.stat().st_size
        try:
            data = within(path)
            shown = turntable(data, path.suffix, words) if data else ""
        except (RunError, OSError, ValueError, SyntaxError):  # the last three are Pillow's words for what is damaged
            notes.append(f'<p class="none">{name} cannot be read as a video.</p>\n')
            break
        if shown:
            if size > MOST_VIDEO:
                notes.append(f"<p>{name} has {spell_bytes(size)}: here it is smaller.</p>\n")
            return Shown(shown + "".join(notes))
        notes.append(f'<p class="none">{name} has {spell_bytes(size)}, too much for this page.</p>\n')
    return Shown("".join(notes) or '<p class="none">No video yet: a run leaves one at its end.</p>\n')


def within(path: Path) -> bytes:
    """Return a turntable as a file that the page takes, b"" where it is too large; raises RunError where damaged."""
    if path.stat().st_size <= MOST_VIDEO:
        return path.read_bytes()
    smaller = smaller_video(path, VIDEO_EDGE) if path.suffix == ".mp4" else b""
    return smaller if len(smaller) <= MOST_VIDEO else b""


def turntable(data: bytes, ending: str, words: str) -> str:
    """Return a video that its reader can start and stop, or an animation; raises as Pillow does for a damaged one.

    The first picture of an animation stands for it where motion is to be reduced.
    """
    from PIL import Image

    label = f"{escape(words)}: turntable"
    if ending == ".mp4":
        return (
            f'<video controls loop muted playsinline preload="auto" aria-label="{label}" '
            f'src="{data_uri("video/mp4", data)}"></video>\n'
        )
    kind, still = ending.removeprefix("."), io.BytesIO()
    with Image.open(io.BytesIO(data), formats=[kind.upper()]) as picture:
        picture.convert("RGBA").save(still, "PNG")
    return (
        '<picture class="turntable"><source media="(prefers-reduced-motion: reduce)" '
        f'srcset="{data_uri("image/png", still.getvalue())}">'
        f'<img alt="{label}" src="{data_uri(f"image/{kind}", data)}"></picture>\n'
    )


# ---------------------------------------------------------------- mesh


def mesh_file(folder: Path) -> Path | None:
    """Return the mesh of a run: mesh.glb, else the newest .glb file in its folder; None where there is none."""
    if (folder / "mesh.glb").is_file():
        return folder / "mesh.glb"
    return max((path for path in folder.glob("*.glb") if path.is_file()), key=lambda p: p.stat().st_mtime, default=None)


def mesh(folder: Path, words: str) -> Shown:
    """Return a 3D view of the run's mesh with the library that it needs, or a line that says why there is none."""
    path = mesh_file(folder)
    if path is None:
        return Shown(
            '<p class="none">No mesh yet: run export_mesh.py in this folder, and then report.py once more.</p>\n'
        )
    size = path.stat().st_size
    name = escape(one_line(path.name))
    if size > MOST_MESH:
        most = spell_bytes(MOST_MESH)
        return Shown(
            f'<p class="none">{name} has {spell_bytes(size)}, more than the {most} that this page takes: export it '
            "with fewer faces or a smaller texture.</p>\n"
        )
    data = path.read_bytes()
    if not data.startswith(GLB):
        return Shown(f'<p class="none">{name} is no GLB file of version 2.</p>\n')
    view = (
        f'<div class="mesh"><canvas id="mesh" tabindex="0" role="application" aria-label="{escape(words)}: 3D view" '
        f'aria-describedby="mesh-hint"></canvas>\n<p id="mesh-state" role="status">Loading {name} ...</p></div>\n'
        f'<p id="mesh-hint">{HINT}</p>\n'
        '<p class="buttons"><button type="button" data-mesh="in">Zoom in</button> '
        '<button type="button" data-mesh="out">Zoom out</button> '
        '<button type="button" data-mesh="home">Front</button></p>\n'
        f'<script type="text/plain" id="mesh-data">{base64.b64encode(data).decode()}</script>\n'
    )
    return Shown(view, (asset_text("three/three.min.js"), asset_text("mesh.js")), MESH_POLICY)


# ---------------------------------------------------------------- pictures


def pictures(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the pictures that a run has left while it went on, in their order."""
    found = [(re.fullmatch(r"step_(\d{1,18})\.png", path.name), path) for path in folder.glob("img/step_*.png")]
    return sorted((int(match[1]), path) for match, path in found if match)


def spread(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """Return at most so many items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def strip(folder: Path, words: str) -> Shown:
    """Return the pictures of a run over time, as a row that scrolls by itself."""
    cells = []
    for step, path in spread(pictures(folder), N_PICTURES):
        data = thumbnail(path)
        if data:
            cells.append(
                f"<li><figure>{image(data, f'{words}, after step {step}')}"
                f"<figcaption>step {step}</figcaption></figure></li>\n"
            )
    if not cells:
        return Shown("<p>No picture yet.</p>\n")
    return Shown(f'<ol class="strip" tabindex="0" aria-label="Pictures of the run">\n{"".join(cells)}</ol>\n')


def thumbnail(path: Path) -> bytes | None:
    """Return a picture, a PNG as it is where it is small, else as a smaller JPEG; None where it cannot be read."""
    from PIL import Image

    try:
        data = path.read_bytes()
        if int.from_bytes(data[WIDTH], "big") <= PICTURE_EDGE and len(data) <= MOST_PICTURE:
            return data
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            picture.thumbnail((PICTURE_EDGE, PICTURE_EDGE), Image.Resampling.BOX, reducing_gap=None)
            small = io.BytesIO()
            picture.convert("RGB").save(small, "JPEG", quality=88)
    except (OSError, ValueError, SyntaxError):  # Pillow's words for what is damaged
        return None
    return small.getvalue()
