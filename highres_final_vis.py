"""Render a run with sub-pixel sampling: pictures and two videos. It is the run in the current folder, or RUN.

python highres_final_vis.py
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from pathlib import Path
from typing import TYPE_CHECKING

from my import config
from my.errors import run_main
from options import trained
from options.film import FilmConfig

if TYPE_CHECKING:
    from asset import Asset

ROOT = Path(__file__).resolve().parent


def render(asset: Asset, cfg: FilmConfig, out: Path) -> None:
    """Write the pictures and the two videos of the path that the options choose to the folder `out`."""
    from tqdm import tqdm

    from film import frames
    from film.files import Film, replacing
    from my.worker import Worker

    p = asset.cfg.pose
    made = frames.Frames(asset, *cfg.sizes(p), cfg.color, cfg.alpha)
    cameras, first = frames.cameras(cfg, p.FoV, p.R), cfg.n_skipped
    with (
        replacing(out) as scratch,
        Film(scratch, first, cfg.fps, cfg.format, cfg.frames == "keep", asset.depth_range) as film,
        Worker() as worker,
        tqdm(total=len(cameras), desc="highres", unit="frame") as bar,
    ):
        for some in made.along(cameras):
            for frame in some:
                worker.put(film.add, frame)
            bar.update(len(some))


def main(argv: list[str] | None = None) -> None:
    """Render the run that the options choose."""
    cfg = trained.read(FilmConfig, argv, root=ROOT, prog="highres_final_vis.py", doc=__doc__)
    config.refuse_unread(cfg, cfg.read_by)
    from asset import open_asset

    asset = open_asset(cfg)
    out = Path(f"highres_{asset.n_steps_taken}")
    render(asset, cfg, out)
    pictures = f", single frames in {out / 'img'}" if cfg.frames == "keep" else ""
    print(f"done: {out / f'img.{cfg.format}'} and {out / f'img_depth.{cfg.format}'}{pictures}")


if __name__ == "__main__":
    run_main(main)
