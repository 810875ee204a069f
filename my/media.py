"""Images and videos for people to look at: conversion to 8 bits, PNG, H.264, GIF, WebP."""

from __future__ import annotations

import errno
import functools
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from my.errors import RunError, UserError, first_line, note
from my.file_system import move
from my.run_dir import remove, scratch_of, write_atomic

LABEL = 14  # height of a line of text, pixels
MIN_CELL = 112  # least width of a labelled grid's cells, pixels: room for a caption
GAP = 4  # between them
RGB_OR_RGBA = (3, 4)  # channels
PNG_HEAD = 8 + 25 + 4  # bytes of a PNG before what its first chunk says: signature, chunk of sizes, length
FULL = 2**20  # bytes: a disk with less room than this is why an encoder has ended
FFMPEG = "pip install imageio-ffmpeg again, or install ffmpeg, or give its path in the variable IMAGEIO_FFMPEG_EXE"
MIN_VIDEO_SIDE = 256  # pixels; players show smaller videos badly or not at all


def to_uint8(image: Any, channels: tuple[int, ...] = (3,)) -> np.ndarray:
    """Return an image (H, W, 3) in [0, 1] as uint8, clipped and rounded, NaN as black; uint8 passes through.

    channels: how many the image may have.  Raises ValueError for another shape.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] not in channels:
        raise ValueError(f"expected an image (H, W, {' or '.join(map(str, channels))}), got {image.shape}")
    if image.dtype == np.uint8:
        return image
    if not np.isfinite(image).all():
        tell_not_finite()
    image = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8)


@functools.cache
def tell_not_finite() -> None:
    """Say, once per process, that a picture has numbers which are not finite."""
    note(
        "a picture has numbers that are not finite: NaN is black in it; the weights that made it, such as those of a "
        "decoder, may be damaged"
    )


def write_png(path: str | Path, image: Any, command: str | None = None) -> None:
    """Write an image (H, W, 3) or, with straight alpha, (H, W, 4), uint8 or in [0, 1], to `path`, atomically.

    A `command` is named in the file as its software: `is_png_of` then knows it.
    """
    write_atomic(path, as_png(image, command))


def as_png(image: Any, command: str | None = None) -> bytes:
    """Return the bytes of a PNG file of an image, as `write_png` takes the two."""
    import imageio.v3 as iio
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if command is not None:
        info.add_text("Software", command)
    return iio.imwrite("<bytes>", to_uint8(image, RGB_OR_RGBA), extension=".png", pnginfo=info)


def is_png_of(path: str | Path, command: str) -> bool:
    """Return whether `write_png` has written the file at `path` for a command: that is the first that it says."""
    says = f"tEXtSoftware\0{command}".encode()
    with open(path, "rb") as file:
        return file.read(PNG_HEAD + len(says))[PNG_HEAD:] == says


def on_white(image: np.ndarray) -> np.ndarray:
    """Return a uint8 image (H, W, 4) with straight alpha on white, as (H, W, 3); (H, W, 3) passes through."""
    if image.shape[2] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def depth_image(depth: Any, d_min: float | None = None, d_max: float | None = None) -> np.ndarray:
    """Return a depth map (H, W) as (H, W, 3) uint8: bright at `d_min`, dark at `d_max`.

    The limits default to those of the finite depths; a depth that is not finite is black.
    """
    depth = np.asarray(depth, dtype=np.float64)
    finite = np.isfinite(depth)
    seen = depth[finite] if finite.any() else np.zeros(1)
    d_min = seen.min() if d_min is None else d_min
    d_max = seen.max() if d_max is None else d_max
    span = max(d_max - d_min, np.finfo(np.float64).tiny)
    nearness = 1 - (np.where(finite, depth, d_max) - d_min).clip(0, span) / span
    return to_uint8(cubehelix(nearness) * finite[..., None])


def cubehelix(x: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) in [0, 1] whose perceived brightness rises evenly with x (...) in [0, 1].

    Green 2011, "A colour scheme for the display of astronomical intensity images", eq. 2, with
    its start 0.5, rotations -1.5, hue 1 and gamma 1.
    """
    phi = 2 * np.pi * (0.5 / 3 - 1.5 * x)
    amplitude = x * (1 - x) / 2
    turn = np.stack([np.cos(phi), np.sin(phi)], axis=-1)
    basis = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    return (x[..., None] + amplitude[..., None] * (turn @ basis.T)).clip(0, 1)


def side_by_side(*images: Any) -> np.ndarray:
    """Return images (H, W_i, 3) left to right, as uint8 (H, sum W_i, 3); ValueError where their heights differ."""
    heights = [np.shape(image)[0] for image in images]
    if len(set(heights)) != 1:
        raise ValueError(f"expected images of one height, got heights {heights}")
    return np.concatenate([to_uint8(image) for image in images], axis=1)


def beside(picture: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return a picture and its depth image (H, W, 3) side by side; depth is enlarged by a whole factor to match."""
    factor = len(picture) // len(depth)
    return side_by_side(picture, depth.repeat(factor, axis=0).repeat(factor, axis=1))


def label(width: int, *texts: tuple[float, str, str]) -> np.ndarray:
    """Return a white strip (LABEL, width, 3) uint8 with each text (x, words, colour) on it, cut at the strip's end."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, LABEL), "white")
    for x, words, color in texts:
        ImageDraw.Draw(strip).text((x, 1), words, fill=color)
    return np.asarray(strip)


def labelled_grid(rows: Sequence[tuple[str | None, Sequence[tuple[Any, str]]]]) -> np.ndarray:
    """Return images in rows on white, (H, W, 3) uint8: each image over its caption, each row below its title.

    rows: [(title or None, [(image (h, w, 3), caption), ...]), ...]. Images have one size. They are enlarged by a whole
    factor to make room for captions. A caption that is still longer is cut.
    """
    width = max(len(cells) for _, cells in rows)
    grid: list[np.ndarray] = []
    for title, cells in rows:
        shown = []
        for image, caption in cells:
            image = to_uint8(image)
            factor = math.ceil(MIN_CELL / image.shape[1])
            image = image.repeat(factor, axis=0).repeat(factor, axis=1)
            cell = np.concatenate([image, label(image.shape[1], (1, caption, "black"))])
            shown.append(np.pad(cell, [(0, GAP), (0, GAP), (0, 0)], constant_values=255))
        shown += [np.full_like(shown[0], 255)] * (width - len(shown))
        row = np.concatenate(shown, axis=1)
        grid += [row] if title is None else [label(row.shape[1], (1, title, "black")), row]
    return np.pad(np.concatenate(grid), [(GAP, 0), (GAP, 0), (0, 0)], constant_values=255)


def ffmpeg() -> str:
    """Return the path of the program that writes and reads videos; raises UserError where there is none."""
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        path = get_ffmpeg_exe()
    except RuntimeError:
        raise UserError(f"no ffmpeg was found, which videos need; {FFMPEG}") from None
    if shutil.which(path) is None:
        raise UserError(f"IMAGEIO_FFMPEG_EXE: {path} is no program; {FFMPEG}")
    return path


class Encoding(NamedTuple):
    """How ffmpeg makes a kind of file."""

    codec: str
    pixels: str  # its format of pixels
    options: Sequence[str]
    quality: float | None  # of imageio-ffmpeg, 0 to 10
    channels: tuple[int, ...]  # that a frame may have


OWN_PALETTE = (  # each frame of a GIF has its own 256 colours, one of them for what is transparent
    "split[a][b];[a]palettegen=stats_mode=single:reserve_transparent=1[p];[b][p]paletteuse=new=1"
)
ENCODINGS = {
    ".mp4": Encoding("libx264", "yuv420p", ("-preset", "veryfast"), 8, (3,)),  # half the time, and as small
    ".gif": Encoding("gif", "pal8", ("-filter_complex", OWN_PALETTE, "-loop", "0"), None, RGB_OR_RGBA),
    ".webp": Encoding("libwebp_anim", "bgra", ("-lossless", "1", "-loop", "0"), None, RGB_OR_RGBA),
}  # by the ending of a file's name


class VideoWriter:
    """Writes frames, uint8 or in [0, 1], as H.264 (.mp4), GIF or lossless WebP; a context manager.

    A frame is (H, W, 3) or, in a GIF or WebP, (H, W, 4) with straight alpha: a GIF shows what has half of it or more.
    The file appears at `path`, whose ending chooses, when the block ends without an exception, and not at all
    otherwise.
    fps: frames per second. A GIF counts in hundredths of a second.
    Raises UserError where there is no encoder, RunError where it fails, ValueError where the frames differ in shape or
    there are none.
    """

    def __init__(self, path: str | Path, fps: float = 30) -> None:
        ffmpeg()
        self.path, self.fps = Path(path), fps
        self.encoding = ENCODINGS[self.path.suffix]
        self.scratch = scratch_of(self.path, self.path.suffix)
        self.writer: Generator[None, Any, None] | None = None
        self.shape: tuple[int, ...] | None = None
        self.n_frames = 0

    def append(self, frame: Any) -> None:
        """Add a frame to the end of the video."""
        frame = to_uint8(frame, self.encoding.channels)
        self.shape = self.shape or frame.shape
        if frame.shape != self.shape:
            raise ValueError(f"expected frames {self.shape}, got {frame.shape}")
        frame = fit_player(frame)
        try:
            self.writer = self.writer or self._open(*frame.shape)
            self.writer.send(frame)
            self.n_frames += 1
        except OSError as error:  # of the pipe to an encoder that has ended, but where the system refuses to start one
            if error.errno not in (None, errno.EPIPE):
                raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from error
            if shutil.disk_usage(self.path.parent).free < FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path)) from error
            raise RunError(f"{self.path}: the video encoder failed: {first_line(error)}") from error

    def _open(self, height: int, width: int, channels: int) -> Generator[None, Any, None]:
        from imageio_ffmpeg import write_frames

        writer = write_frames(
            self.scratch,
            (width, height),
            pix_fmt_in="rgb24" if channels == 3 else "rgba",
            pix_fmt_out=self.encoding.pixels,
            fps=self.fps,
            quality=self.encoding.quality,
            codec=self.encoding.codec,
            macro_block_size=1,  # `fit_player` has made the sides even
            output_params=list(self.encoding.options),
            ffmpeg_log_level="fatal",  # what else goes wrong is told in a line of ours
        )
        writer.send(None)
        return writer

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
            if kind is None:
                self._verify()
                move(self.scratch, self.path)
        finally:
            remove(self.scratch)  # where another program has it open, it stays, and hides no other error

    def _verify(self) -> None:
        """Look whether all frames arrived: the encoder reports no error where the disk fills up at the end."""
        if self.n_frames == 0:
            raise ValueError(f"{self.path}: a video needs at least one frame")
        if not self._is_whole():
            raise RunError(
                f"{self.path}: not all of {self.n_frames} frames were written; free some space, then start it again"
            )

    def _is_whole(self) -> bool:
        """Whether the file has all frames or, of a format that joins equal ones, its end."""
        from imageio_ffmpeg import count_frames_and_secs

        try:
            if self.path.suffix == ".mp4":
                return count_frames_and_secs(str(self.scratch))[0] == self.n_frames
            content = self.scratch.read_bytes()
        except (OSError, RuntimeError):
            return False
        if self.path.suffix == ".webp":  # a RIFF file: its length is in bytes 4 to 7
            return len(content) == 8 + int.from_bytes(content[4:8], "little") > 8
        return content.endswith(b";")  # the trailer of a GIF


def fit_player(frame: np.ndarray) -> np.ndarray:
    """Return a uint8 frame (H, W, C), enlarged by a whole factor to the size of a player, with even sides.

    The shorter side reaches MIN_VIDEO_SIDE; an odd side repeats its last row or column.
    """
    factor = math.ceil(MIN_VIDEO_SIDE / min(frame.shape[:2]))
    frame = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    height, width = frame.shape[:2]
    odd = (height % 2, width % 2)
    return np.ascontiguousarray(np.pad(frame, [(0, odd[0]), (0, odd[1]), (0, 0)], mode="edge") if any(odd) else frame)


def write_video(path: str | Path, frames: Iterable[Any], fps: float = 30) -> None:
    """Write frames with `VideoWriter`."""
    with VideoWriter(path, fps) as video:
        for frame in frames:
            video.append(frame)


def read_video(path: str | Path) -> np.ndarray:
    """Return the frames of a video, uint8 (N, H, W, 3); raises RunError where it cannot be read, and as `ffmpeg`."""
    decode = [ffmpeg(), "-v", "error", "-i", str(path)]
    as_ppm = ["-fps_mode", "passthrough", "-c:v", "ppm", "-f", "image2pipe", "-"]
    done = subprocess.run(decode + as_ppm, capture_output=True)
    header = re.match(rb"P6\s(\d+)\s(\d+)\s255\s", done.stdout)  # before the pixels of each frame
    if done.returncode or not header:
        raise RunError(f"{path}: not a readable video: {first_line(done.stderr.decode())}")
    width, height = map(int, header.groups())
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, header.end() + height * width * 3)
    return frames[:, header.end() :].reshape(-1, height, width, 3)


def smaller_video(path: str | Path, edge: int) -> bytes:
    """Return a video as H.264 (.mp4) whose longer side is at most `edge` pixels, packed harder than by `VideoWriter`.

    Raises RunError where it cannot be read, and as `ffmpeg` does.
    """
    fit = f"scale=w='min({edge},iw)':h='min({edge},ih)':force_original_aspect_ratio=decrease:force_divisible_by=2"
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "small.mp4"
        encode = ["-an", "-vf", fit, "-c:v", "libx264", "-preset", "veryfast", "-crf", "28", "-pix_fmt", "yuv420p"]
        done = subprocess.run(
            [ffmpeg(), "-v", "error", "-i", str(path), *encode, "-movflags", "+faststart", str(out)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
        if done.returncode:
            raise RunError(f"{path}: not a readable video: {first_line(done.stderr.decode(errors='replace'))}")
        return out.read_bytes()
