"""Render a run with sub-pixel sampling: pictures and two videos. It is the run in the current folder, or RUN.

python highres_final_vis.py
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from my.errors import UserError, run_main
from options import trained

if TYPE_CHECKING:
    from asset import Asset

ROOT = Path(__file__).resolve().parent
SUBPIXELS = 4  # rays per pixel edge
DOWNSCALE = 2  # of those are averaged before decoding: twice the training resolution is decoded


class VisConfig(trained.TrainedConfig):
    """Every option of highres_final_vis.py."""

    n_frames: int = Field(200, gt=0, description="frames of the spiral that the camera moves on")
    skip: int = Field(
        60, ge=0, description="frames to leave out at the start of the spiral, where the camera looks from overhead"
    )
    fps: int = Field(30, gt=0, description="frames per second of the videos")

    first: ClassVar[tuple[str, ...]] = ("n_frames", "skip", "fps", "run", "device")


def render_spiral(asset: Asset, cfg: VisConfig, out: Path) -> None:
    """Write img/*.png, img.mp4 and img_depth.mp4 to the folder `out`."""
    from tqdm import tqdm

    import pose
    from my.media import VideoWriter, beside, depth_image, to_uint8, write_png

    p = asset.cfg.pose
    cameras = pose.spiral(cfg.n_frames, p.R, p.R, fov=p.FoV)[cfg.skip :]
    shutil.rmtree(out / "img", ignore_errors=True)  # frames of another --n_frames
    (out / "img").mkdir(parents=True)
    with VideoWriter(out / "img.mp4", cfg.fps) as video, VideoWriter(out / "img_depth.mp4", cfg.fps) as with_depth:
        for i, camera in enumerate(tqdm(cameras, desc="highres", unit="frame"), start=cfg.skip):
            picture, depth, _ = asset.view(camera, subpixels=SUBPIXELS, downscale=DOWNSCALE)
            picture, depth = to_uint8(picture), depth_image(depth, *asset.depth_range)
            write_png(out / "img" / f"{i:03d}.png", picture)
            video.append(picture)
            with_depth.append(beside(picture, depth))


def main(argv: list[str] | None = None) -> None:
    """Render the run that the options choose."""
    cfg = trained.read(VisConfig, argv, root=ROOT, prog="highres_final_vis.py", doc=__doc__)
    if cfg.skip >= cfg.n_frames:
        raise UserError(
            f"--skip {cfg.skip}: must be less than --n_frames {cfg.n_frames}; give --skip 0 to {cfg.n_frames - 1}"
        )
    from asset import open_asset

    asset = open_asset(cfg)
    out = Path(f"highres_{asset.n_steps_taken}")
    render_spiral(asset, cfg, out)
    print(f"done: {out / 'img.mp4'} and {out / 'img_depth.mp4'}, single frames in {out / 'img'}")


if __name__ == "__main__":
    run_main(main)
