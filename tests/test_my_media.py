"""Images and videos that people look at."""

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

import run_nerf
import run_sjc
from my import media
from my.errors import RunError, UserError

RED, BLUE = np.array([200, 30, 30], np.uint8), np.array([30, 30, 200], np.uint8)


def test_to_uint8_rounds_clips_and_survives_nan():
    image = np.array([[[0, 0.5, 1], [-1, 2, np.nan], [0.499 / 255, 0.501 / 255, np.inf]]])
    want = [[[0, 128, 255], [0, 255, 0], [0, 1, 255]]]
    assert media.to_uint8(image).tolist() == want
    assert media.to_uint8(media.to_uint8(image)).tolist() == want
    with pytest.raises(ValueError, match=r"\(H, W, 3\), got \(3, 4\)"):
        media.to_uint8(np.zeros((3, 4)))


def test_a_picture_that_is_not_finite_is_told_once(capsys):
    media.tell_not_finite.cache_clear()
    media.to_uint8(np.ones((2, 2, 3)))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        media.to_uint8(np.full((2, 2, 3), np.nan))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "note: a picture has numbers that are not finite: NaN is black in it" in err


def test_a_png_reads_back_exactly(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    media.write_png(tmp_path / "a.png", image)
    assert np.array_equal(iio.imread(tmp_path / "a.png"), image)
    media.write_png(tmp_path / "a.png", image / 255.0)
    assert np.array_equal(iio.imread(tmp_path / "a.png"), image)
    assert os.listdir(tmp_path) == ["a.png"]


def luma(image):
    return image.astype(float) @ [0.2126, 0.7152, 0.0722]


def test_near_is_white_far_is_black_and_brightness_falls_between():
    depth = np.linspace(1, 3, 64)[None]
    image = media.depth_image(depth, 1, 3)
    assert image[0, 0].tolist() == [255] * 3 and image[0, -1].tolist() == [0] * 3
    assert (np.diff(luma(image[0])) < 0).all()
    assert np.array_equal(image, media.depth_image(depth))
    wider = media.depth_image(depth, 0, 4)
    assert luma(wider).max() < 255 and luma(wider).min() > 0


def test_depth_is_safe_without_a_range_and_where_it_is_not_finite():
    image = media.depth_image(np.array([[np.nan, np.inf], [-np.inf, 1.0]]), 1, 2)
    assert image[:, :, 0].tolist() == [[0, 0], [0, 255]]
    assert media.depth_image(np.full((2, 3), 7.0)).min() == 255
    assert media.depth_image(np.full((2, 3), np.nan)).max() == 0


def test_side_by_side_joins_images_of_one_height():
    joined = media.side_by_side(np.ones((2, 1, 3)), np.zeros((2, 2, 3), np.uint8))
    assert joined.dtype == np.uint8 and joined[:, :, 0].tolist() == [[255, 0, 0]] * 2
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        media.side_by_side(np.zeros((2, 2, 3)), np.zeros((3, 2, 3)))


# ---------------------------------------------------------------- video


@pytest.mark.parametrize(
    "size, want", [((3, 5), (258, 430)), ((64, 64), (256, 256)), ((301, 257), (302, 258)), ((256, 400),) * 2]
)
def test_a_video_reads_back_even_large_enough_and_in_order(tmp_path, size, want):
    path = tmp_path / "v.mp4"
    frames = [np.broadcast_to(colour, (*size, 3)) for colour in (RED, BLUE, RED, RED)]
    media.write_video(path, iter(frames), fps=10)
    got = media.read_video(path)
    assert got.shape == (4, *want, 3)
    for frame, colour in zip(got, (RED, BLUE, RED, RED), strict=True):
        assert np.abs(frame.reshape(-1, 3).mean(0) - colour).max() < 12
    assert os.listdir(tmp_path) == ["v.mp4"]
    said = subprocess.run([get_ffmpeg_exe(), "-i", path], capture_output=True, text=True).stderr
    assert "Video: h264" in said and "yuv420p" in said and " 10 fps" in said


def test_what_is_not_a_video_is_refused(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"words")
    with pytest.raises(RunError, match="v.mp4: not a readable video"):
        media.read_video(tmp_path / "v.mp4")


def test_tiny_frames_are_enlarged_by_repetition():
    frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    large = media.fit_player(frame)
    assert large.shape == (256, 256, 3) and np.array_equal(large[::128, ::128], frame)
    assert (large[:128, :128] == frame[0, 0]).all()


def test_a_failed_video_leaves_the_old_one(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), media.VideoWriter(path) as video:
        video.append(np.zeros((4, 4, 3)))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="at least one frame"):
        media.write_video(path, [])
    with pytest.raises(ValueError, match=r"expected frames \(4, 4, 3\), got \(4, 5, 3\)"):
        media.write_video(path, [np.zeros((4, 4, 3)), np.zeros((4, 5, 3))])
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["v.mp4"]


def test_a_failed_video_that_another_program_has_open_hides_no_error(tmp_path, monkeypatch):
    def refuse(path, **kw):
        raise PermissionError(13, "it is being used by another process", str(path))

    video = media.VideoWriter(tmp_path / "v.mp4")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError), video:
        video.append(np.zeros((2, 2, 3), np.uint8))
        patch.setattr(Path, "unlink", refuse)
        raise ZeroDivisionError


def test_frames_that_did_not_reach_the_disk_are_noticed(tmp_path):
    path = tmp_path / "v.mp4"
    with pytest.raises(RunError, match="not all of 1 frames"), media.VideoWriter(path) as video:
        video.append(np.zeros((4, 4, 3)))
        video.writer.close()
        video.scratch.write_bytes(b"cut")
    assert os.listdir(tmp_path) == []


def test_pictures_with_straight_alpha(tmp_path):
    image = np.zeros((2, 2, 4), np.uint8)
    image[0] = (100, 0, 50, 255), (100, 0, 50, 51)
    media.write_png(tmp_path / "a.png", image)
    assert np.array_equal(iio.imread(tmp_path / "a.png"), image)
    assert media.on_white(image).tolist() == [[[100, 0, 50], [224, 204, 214]], [[255] * 3] * 2]
    assert media.on_white(image[..., :3]) is not None and media.on_white(image[..., :3]).shape == (2, 2, 3)
    with pytest.raises(ValueError, match="expected an image"):
        media.to_uint8(image)
    with pytest.raises(ValueError, match=r"expected an image \(H, W, 3 or 4\)"):
        media.write_png(tmp_path / "b.png", image[..., :2])


def test_labelled_grid():
    """Pictures of 60 x 100, enlarged twice, each over a line of text; titles above rows; short rows end in white."""
    red, blue = (np.full((60, 100, 3), color, np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    grid = media.labelled_grid([("first", [(red, "a"), (blue, "b" * 500)]), (None, [(blue, "c")])])
    cell = 120 + media.LABEL + media.GAP
    assert grid.shape == (media.GAP + media.LABEL + 2 * cell, media.GAP + 2 * (200 + media.GAP), 3)
    top, left, right = media.GAP + media.LABEL, media.GAP, 2 * media.GAP + 200
    assert (grid[top : top + 120, left : left + 200] == (255, 0, 0)).all()
    assert (grid[top : top + 120, right : right + 200] == (0, 0, 255)).all()
    assert (grid[top + cell :, right:] == 255).all()  # no second picture in the second row
    assert (grid[:, right - media.GAP : right] == 255).all()  # nor does a long caption leave its cell
    for words in (grid[media.GAP : top, left:], grid[top + 120 : top + 120 + media.LABEL, left : left + 200]):
        assert words.min() < 128 and words.max() == 255


def test_label_has_each_text_at_its_place():
    strip = media.label(300, (10, "one", "black"), (150, "two", "gray"))
    assert strip.shape == (media.LABEL, 300, 3)
    dark = np.flatnonzero(strip.min(axis=(0, 2)) < 200)
    assert dark.min() >= 10 and not ((dark > 60) & (dark < 150)).any() and dark.max() < 200


@pytest.mark.parametrize("shape, small", [((300, 600), (64, 128)), ((602, 300), (128, 64)), ((300, 400), (96, 128))])
def test_a_smaller_video_has_its_longer_side_as_asked(tmp_path, shape, small):
    media.write_video(tmp_path / "a.mp4", np.full((3, *shape, 3), 90, np.uint8))
    (tmp_path / "b.mp4").write_bytes(media.smaller_video(tmp_path / "a.mp4", 128))
    frames = media.read_video(tmp_path / "b.mp4")
    assert frames.shape == (3, *small, 3) and abs(frames.astype(int) - 90).max() <= 4
    (tmp_path / "c.mp4").write_bytes(media.smaller_video(tmp_path / "a.mp4", 4000))
    assert media.read_video(tmp_path / "c.mp4").shape == (3, *shape, 3)  # it is never enlarged


@pytest.mark.parametrize(
    "free, error, words",
    [(1000, OSError, "No space left on device"), (10**9, RunError, "the video encoder failed: gone")],
)
def test_an_encoder_that_has_ended(tmp_path, monkeypatch, free, error, words):
    """On a full disk it ends by itself, and the pipe to it breaks: that is told as a full disk."""

    class Ended:
        def send(self, frame):
            raise BrokenPipeError("gone")

        def close(self):
            pass

    monkeypatch.setattr(media.VideoWriter, "_open", lambda *_: Ended())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(error, match=words) as ended, media.VideoWriter(tmp_path / "x.mp4") as video:
        video.append(np.zeros((4, 4, 3), np.uint8))
    assert str(tmp_path / "x.mp4") in str(ended.value) and not list(tmp_path.iterdir())


def test_a_system_that_starts_no_encoder(tmp_path, monkeypatch):
    """As with `ulimit -n 8`: it is told as what the system says."""
    monkeypatch.setattr("subprocess.Popen", raises(OSError(24, "Too many open files")))
    with pytest.raises(OSError, match="Too many open files") as ended, media.VideoWriter(tmp_path / "x.mp4") as video:
        video.append(np.zeros((4, 4, 3), np.uint8))
    assert ended.value.errno == 24 and ended.value.filename == str(tmp_path / "x.mp4")


def raises(error):
    def call(*args, **kw):
        raise error

    return call


def test_no_ffmpeg_is_told_before_the_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("imageio_ffmpeg.get_ffmpeg_exe", raises(RuntimeError("No ffmpeg exe")))
        for use in (media.ffmpeg, lambda: media.VideoWriter("x.mp4"), lambda: media.read_video("x.mp4")):
            with pytest.raises(UserError, match="no ffmpeg was found, which videos need; pip install imageio-ffmpeg"):
                use()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    for command, options in ((run_sjc, ["--preset", "ideal"]), (run_nerf, ["--scene", "nowhere"])):
        with pytest.raises(UserError, match="IMAGEIO_FFMPEG_EXE: .*none is no program; pip install"):
            command.main(options)
    assert not list(tmp_path.iterdir())
