"""Train a voxel NeRF on posed images, in the current folder.

python run_nerf.py --scene ~/data/nerf_synthetic/lego
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import ending, run_dir, script
from my.errors import RunError, UserError, run_main, shown, some
from my.left_out import NeverFinite
from my.watch import LOG_EVERY, Watch, watched
from my.worker import Worker
from options.nerf import NeRFConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from voxnerf.nerf import NeRF, View
    from voxnerf.scene import Scene

ROOT = Path(__file__).resolve().parent
N_PANES = 10  # per run
N_FRAMES = 120  # frames of the video, in which the camera goes once round the scene
SMOOTH = 0.9  # share of the running PSNR that stays at each line of history.json


def read_config(argv: list[str] | None) -> NeRFConfig:
    """Return the run's configuration; with --resume, the one that is saved in the current folder."""
    return script.read_config(NeRFConfig, argv, root=ROOT, settle=absolute, prog="run_nerf.py", doc=__doc__)


def absolute(cfg: NeRFConfig) -> NeRFConfig:
    """Make `cfg.scene` absolute if it is the path of a folder, and return `cfg`; the name of a scene stays a name."""
    folder = Path(os.path.expanduser(cfg.scene))
    if folder.is_dir():
        cfg.scene = str(folder.resolve())
    return cfg


def train(nerf: NeRF, test_scene: Scene, first_step: int) -> None:
    """Optimise the field and test it; write history, heartbeat, panes, checkpoints and test views."""
    save = partial(nerf.save, "ckpt")
    with watched("nerf", nerf.n_steps, first_step, save, nerf.cfg.ckpt_minutes) as watch:
        with ending.saved_whole(watch, nerf, first_step, as_end, advice):
            follow(watch, nerf, test_scene, first_step)
        test(nerf, test_scene, nerf.n_steps_taken)


def follow(watch: Watch, nerf: NeRF, test_scene: Scene, first_step: int) -> None:
    """Take the steps of a run from `first_step` on, and write what it leaves after some of them."""
    from voxnerf.nerf import optimise

    before, running = nerf.progress(first_step), RunningPSNR()
    for step, progress, stats in watch.over(optimise(nerf, first_step)):
        parts = (N_PANES, 1 / nerf.cfg.ckpt_every)
        show, due = (progress >= 1 or math.floor(progress * n) > math.floor(before * n) for n in parts)
        before = progress
        row = row_of(nerf, test_scene, step, stats, logged=show or step % LOG_EVERY == 0 or "retried" in stats)
        if row:
            watch.log(step, row, running.judge)
        if show:
            draw_pane(Path("pane") / f"step_{step:07d}.png", nerf, test_scene, watch.worker)
        if due or watch.late:
            watch.checkpoint(step)
        watch.expect(max(step, round(step / progress)))  # under max_minutes, an estimate


def as_end(error: Exception, nerf: NeRF) -> RunError | None:
    """Return in words what ends a training whose state is whole; None for any other error."""
    if isinstance(error, NeverFinite):
        return RunError(error)
    return ending.out_of_memory(error, nerf, nerf.device)


def advice(error: Exception, nerf: NeRF) -> str:
    """Return what to do after an error of `as_end`."""
    if isinstance(error, NeverFinite):
        return "start in an empty folder with a smaller --lr"
    return ending.advice_on_memory(["model.grid_size", "bs", *["subpixels"] * (nerf.cfg.subpixels > 1)])


def row_of(nerf: NeRF, test_scene: Scene, step: int, stats: dict[str, Any], logged: bool) -> dict[str, Any]:
    """Return the values that history.json gets for a step; {} for none."""
    row = {**stats, "minutes": nerf.minutes} if logged else {}
    row.pop("masked", None)
    if nerf.cfg.test_every and step % nerf.cfg.test_every == 0:
        row["test_psnr"] = mean(view["psnr"] for view in nerf.evaluate(test_scene))
    return row


class RunningPSNR:
    """The mean PSNR of recent batches, and the PSNR of the last test, as a progress bar shows them."""

    def __init__(self) -> None:
        self.shown: dict[str, float] = {}

    def judge(self, row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Take in a row of history.json; return it, and {name: number as text}. A PSNR must be finite to count."""
        new = float(row.get("psnr", math.nan))
        if math.isfinite(new):
            self.shown["psnr"] = SMOOTH * self.shown.get("psnr", new) + (1 - SMOOTH) * new
        if "test_psnr" in row:
            self.shown["test"] = row["test_psnr"]
        return row, {k: f"{v:.2f}" for k, v in self.shown.items()}


def mean(values: Iterable[float]) -> float:
    """Return the mean of some numbers."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


# ---------------------------------------------------------------- pictures


def pane_of(
    truth: np.ndarray | None, picture: np.ndarray, depth: np.ndarray, depth_range: tuple[float, float]
) -> np.ndarray:
    """Return truth, rendering and depth side by side, (H, 3 W, 3) uint8; without a truth, the other two."""
    from my.media import depth_image, side_by_side

    shown = [] if truth is None else [truth]
    return side_by_side(*shown, picture, depth_image(depth, *depth_range))


def draw_pane(path: Path, nerf: NeRF, scene: Scene, worker: Worker) -> None:
    """Render the first view of a scene, and let the worker write its pane."""
    worker.put(write_pane, path, nerf.view(scene, 0), nerf.depth_range(scene.c2w[0]))


def write_pane(path: Path, view: View, depth_range: tuple[float, float]) -> None:
    """Write the pane of a view."""
    from my.media import write_png

    path.parent.mkdir(exist_ok=True)
    write_png(path, pane_of(view.truth, view.picture, view.depth, depth_range))


def test(nerf: NeRF, scene: Scene, step: int) -> None:
    """Write test_<step>/: view/*.png, pane/*.png, metrics.json and video.mp4, and print the metrics.

    The video takes longest: the metrics are printed before it.
    """
    from tqdm import tqdm

    from my.media import write_png

    root, minutes = Path(f"test_{step}"), nerf.minutes
    for name in ("view", "pane"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with Worker() as worker:
        for i, view in enumerate(tqdm(nerf.views(scene), total=len(scene.names), desc="test views")):
            worker.put(write_png, root / "view" / f"{i:03d}.png", view.picture)
            worker.put(write_pane, root / "pane" / f"{i:03d}.png", view, nerf.depth_range(scene.c2w[i]))
            rows.append({"name": view.name, "psnr": view.psnr, "ssim": view.ssim})
    means = {key: mean(row[key] for row in rows) for key in ("psnr", "ssim")}
    metrics = run_dir.plain({"step": step, "minutes": minutes, "mean": means, "views": rows})
    run_dir.write_atomic(root / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    print(table([*rows, {"name": "mean", **means}]))
    save_video(root / "video.mp4", nerf, scene)
    print(f"done: {root / 'pane'} has {len(rows)} test views beside their truth, {root / 'video.mp4'} goes round")


def save_video(path: Path, nerf: NeRF, scene: Scene) -> None:
    """Write a video of rendering beside depth, whose camera follows the `orbit` of the scene's cameras."""
    from tqdm import tqdm

    from my.media import VideoWriter
    from voxnerf.scene import orbit

    def add(rendering: Iterable[np.ndarray], depth_range: tuple[float, float]) -> None:
        picture, depth = rendering
        video.append(pane_of(None, picture, depth, depth_range))

    with VideoWriter(path) as video, Worker() as worker:
        for c2w in tqdm(orbit(scene.c2w, N_FRAMES), desc="video", unit="frame"):
            worker.put(add, nerf.render(scene.K[0], c2w, *scene.sizes[0]), nerf.depth_range(c2w))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a text table of the PSNR and the SSIM of each row."""
    names = [shown(row["name"]) for row in rows]
    width = max(map(len, ["view", *names]))
    lines = [f"{'view':{width}}  PSNR, dB   SSIM"]
    return "\n".join(
        lines + [f"{name:{width}}  {row['psnr']:8.2f} {row['ssim']:6.4f}" for name, row in zip(names, rows)]
    )


# ---------------------------------------------------------------- the command


def check_memory(cfg: NeRFConfig, device: torch.device) -> None:
    """Raise UserError where the training cannot fit into the device's memory: its grid, or the rays of a step."""
    from voxnerf.capacity import device_memory, refuse_large_grid

    memory, n = device_memory(device), cfg.model.grid_size
    refuse_large_grid("--model.grid_size", n, cfg.model.c * (9 if cfg.view_dependent else 1), memory)
    pixel = cfg.subpixels**2 * 4 * (100 + 2 * n / cfg.model.step_ratio)  # bytes
    if cfg.bs * pixel > memory:
        raise UserError(
            f"--bs {cfg.bs} at {cfg.subpixels**2} rays per pixel: takes {cfg.bs * pixel / 1e9:.0f} GB of "
            f"memory and more, there are {memory / 1e9:.0f}; it can be {int(memory / pixel)} at the very "
            "most"
        )


def prepare(cfg: NeRFConfig, _found: None) -> Callable[[], None]:
    """Return a function that does the current folder's run, from its last checkpoint or from its beginning.

    Raises UserError if the run cannot start.
    """
    from my.media import ffmpeg

    ffmpeg()  # for the video at the end
    device = script.pick_device(cfg.device)
    check_memory(cfg, device)
    from my import checkpoint
    from voxnerf.nerf import NeRF
    from voxnerf.scene import find_scene, load_scenes

    folder = find_scene(cfg.scene)
    scene, test_scene = load_scenes(folder, ("train", "test"), cfg.downscale, cfg.strict)
    sizes = [f"{W}x{H}" for H, W in sorted(set(scene.sizes))]
    nerf = NeRF(cfg, scene, device)
    newest = checkpoint.load_newest("ckpt", cfg.ckpt_keep)
    first_step = nerf.restore(*newest) if newest else 0

    def run() -> None:
        print(f"{folder}: {len(scene.names)} training views of {some(sizes)}, {len(test_scene.names)} test views")
        train(nerf, test_scene, first_step)

    return run


def main(argv: list[str] | None = None) -> None:
    """Train a voxel NeRF in the current folder."""
    script.begin(read_config(argv), prepare, argv)


if __name__ == "__main__":
    run_main(main, go_on=script.go_on)
