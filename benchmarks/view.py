"""How fast the viewer answers: the time from a moved camera to a picture that is ready to be sent.

    python -m benchmarks.view RUN --out view.md

Run it in the project's folder. It takes a run, shows its field at several resolutions in each mode, and times the quick
picture that a drag gets and the refined one, JPEG included. It also writes a snapshot of the run's field, and of a
field of latents of 100^3 voxels that is interpolated from it, and says how large they are.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from pydantic import Field

from my import config
from my.errors import run_main
from my.run_dir import refuse_output, write_atomic
from options.trained import TrainedConfig

if TYPE_CHECKING:
    from asset import Asset
    from viewer.frames import Frames
    from voxnerf.field import VoxRF

GRID = 100  # voxels per edge of the large field


class ViewBenchmark(TrainedConfig):
    """All options of benchmarks.view."""

    out: str | None = Field(None, description="Markdown file to write")
    repeats: int = Field(15, gt=0, description="pictures that are timed; the median counts")
    threads: int | None = Field(None, gt=0, description="CPU threads, default PyTorch's own")
    rows: list[int] = Field([128, 256], description="resolutions of square pictures")


def timed(repeats: int, make: Callable[[int], object]) -> tuple[float, float]:
    """Return the median time of `make(i)` and the median CPU time of the process, ms."""
    walls, cpus = [], []
    for i in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        make(i)
        walls.append(1000 * (time.perf_counter() - wall))
        cpus.append(1000 * (time.process_time() - cpu))
    return median(walls), median(cpus)


def answers(frames: Frames, cfg: ViewBenchmark) -> list[str]:
    """Return a table of the quick and the refined pictures."""
    import imageio.v3 as iio

    import pose
    from viewer.frames import View
    from viewer.server import QUALITY, QUICK_S

    p = frames.asset.cfg.pose
    lines = ["| asked for | drag shows | drag, ms (CPU) | at rest, ms (CPU) |", "|---|---|---|---|"]

    def make(view: View) -> None:
        picture = frames.picture(view)
        assert picture is not None  # nobody drops the work
        iio.imwrite("<bytes>", picture, extension=".jpeg", quality=QUALITY)

    def make_one(views: list[View], i: int) -> None:
        make(views[i])

    for rows in cfg.rows:
        for mode in frames.modes:
            views = [
                View(pose.camera_at(0.1 * i, 1.3, p.R, p.FoV), rows, rows, mode, frames.asset.n_steps_taken)
                for i in range(cfg.repeats)
            ]
            shown: list[View] = []

            def drag(i: int, views: list[View] = views, shown: list[View] = shown) -> None:
                shown.append(frames.quick(views[i], QUICK_S))
                make(shown[-1])

            quick = timed(cfg.repeats, drag)
            fine = timed(cfg.repeats, partial(make_one, views))
            seen = shown[len(shown) // 2]
            lines.append(
                f"| {mode}, {rows}x{rows} | {seen.mode}, {seen.height}x{seen.width} | "
                f"{quick[0]:.0f} ({quick[1]:.0f}) | {fine[0]:.0f} ({fine[1]:.0f}) |"
            )
    return lines


def sizes(asset: Asset) -> list[str]:
    """Return a table of snapshots: bytes, share of the voxels that is kept, and the times to write and to read one."""
    import torch.nn.functional as F

    from asset import new_field
    from voxnerf import snapshot

    large = asset.cfg.model_copy(deep=True)
    large.vox.grid_size = GRID
    field = new_field(large, asset.adapter)
    for name in ("density", "color"):
        grid = F.interpolate(getattr(asset.field, name).detach(), size=(GRID,) * 3, mode="trilinear")
        getattr(field, name).data.copy_(grid)
    field.d_scale.data.copy_(asset.field.d_scale.data)
    lines = ["| field | snapshot, MB | voxels kept | copy, ms | write, ms | read, ms |", "|---|---|---|---|---|---|"]
    for name, one, run in (("of the run", asset.field, asset.cfg), ("interpolated", field, large)):
        lines.append(size(name, one, partial(new_field, run, asset.adapter)))
    return [*lines, "", f"{snapshot.HIDDEN=:.2g}"]


def size(name: str, field: VoxRF, new: Callable[[], VoxRF]) -> str:
    """Return the row of a field's snapshot."""
    from voxnerf import snapshot

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        taken = snapshot.taken(field, 0)
        copied = time.perf_counter()
        path = snapshot.write(folder, *taken)
        written = time.perf_counter()
        snapshot.restore(new(), path)
        read = time.perf_counter()
        megabytes = path.stat().st_size / 1e6
    kept = snapshot.matters(field.density.cpu(), field.d_scale.cpu(), field.density_shift, field.box_diagonal)
    shape = "x".join(map(str, field.density.shape[2:]))
    times = " | ".join(f"{1000 * t:.0f}" for t in (copied - start, written - copied, read - written))
    return f"| {name}, {shape}, {field.c} channels | {megabytes:.2f} | {kept.float().mean():.1%} | {times} |"


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the page."""
    cfg = config.load(ViewBenchmark, argv, prog="benchmarks.view", doc=__doc__, positional="run", config_file=None)
    if cfg.out is not None:
        refuse_output("--out", cfg.out)
    import torch

    from asset import find, load
    from viewer.frames import Frames
    from viewer.moments import Moments

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    source = find(cfg.run[0])
    asset = load(source, cfg.device)
    frames = Frames(asset, Moments(asset, source))
    frames.warm_up()
    busy = os.getloadavg()[0]
    page = [
        f"{platform.machine()}, {torch.get_num_threads()} threads on {os.cpu_count()} cores, {asset.adapter.device}; "
        f"load {busy:.1f} at the start, so a CPU time that is much above or below its wall time tells who else ran",
        "",
        *answers(frames, cfg),
        "",
        *sizes(asset),
    ]
    print("\n".join(page))
    if cfg.out is not None:
        write_atomic(Path(cfg.out), "\n".join(page) + "\n")


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
