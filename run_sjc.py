"""Text to 3D by Score Jacobian Chaining: optimise a voxel field in the current folder.

python run_sjc.py --preset ideal --sd.prompt "a blue duck"
python run_sjc.py --sd.prompt "A high quality photo of a delicious burger"
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import ending, script
from my.errors import RunError, run_main
from my.processes import Lost, Processes, of_torchrun
from my.watch import LOG_EVERY, Watch, watched
from my.worker import Worker
from options.sjc import SJCConfig
from pages.live import Live

if TYPE_CHECKING:
    import numpy as np

    from my.host_copy import HostCopy
    from my.media import VideoWriter
    from pose import Camera
    from sjc import SJC

ROOT = Path(__file__).resolve().parent
N_VISUALS, N_PARTS = 100, 20  # visualise every 1%; every 5%, keep the field as it is, and refresh the page
N_TEST_VIEWS = 100


def read_config(argv: list[str] | None) -> SJCConfig:
    """Return the run's configuration; with --resume, the one saved in the folder."""
    return script.read_config(
        SJCConfig,
        argv,
        root=ROOT,
        settle=SJCConfig.absolute,
        prog="run_sjc.py",
        doc=__doc__,
        presets_dir=ROOT / "presets",
    )


def train(optimisation: SJC, first_step: int, processes: Processes | None = None) -> None:
    """Optimise the field; write history, heartbeat, pictures, checkpoints and the page, and at last the test views.

    Of several processes the first writes. Where another one is lost, it saves the state after the last whole step, and
    raises Lost; where a signal comes while it waits for the others, it does as much, and raises Stopped.
    """
    from my.checkpoint import latest
    from sjc import optimise

    processes = processes or Processes()
    if not processes.first:
        for _ in optimise(optimisation, first_step):
            pass
        return processes.leave()
    cfg, save = optimisation.cfg, partial(optimisation.save, "ckpt")
    newest = first_step if latest("ckpt") else None
    with Live(cfg) as report, watched("sjc", cfg.n_steps, first_step, save, cfg.ckpt_minutes, newest) as watch:
        if cfg.init and newest is None:
            watch.checkpoint(0)  # from now on the run does not need the field that it began from
        with ending.saved_whole(watch, optimisation, first_step, as_end, advice):
            processes.heed = watch.heed
            follow(watch, optimisation, optimise(optimisation, first_step), report)
        processes.leave()
        save_test_views(optimisation)


def as_end(error: Exception, optimisation: SJC) -> RunError | None:
    """Return in words what ends a training whose state is whole, such as a lost process; None for any other error.

    The record of a step that is not finite is written.
    """
    from sjc import NotFinite

    if isinstance(error, Lost):
        return error
    if isinstance(error, NotFinite):
        from rerun import flight

        if not optimisation.cfg.continues:  # replay.py would take another score
            return RunError(str(error))
        record = flight.write(".", optimisation, error)
        return RunError(
            f"{error}; {record} has what led there: python {ROOT / 'replay.py'} {record} says where it begins"
        )
    return ending.out_of_memory(error, optimisation, optimisation.adapter.device)


def advice(error: Exception, optimisation: SJC) -> str:
    """Return what to do after an error of `as_end`."""
    cfg = optimisation.cfg
    if not cfg.continues:
        return "start it again in an empty folder, with other numbers, such as a smaller --lr or --vox.grid_size"
    if isinstance(error, Lost):
        return script.go_on()
    if isinstance(error, RunError):
        return cfg.remedy(optimisation.adapter.device.type, "a smaller --lr")
    less = " --low_vram True" * (optimisation.latent and not cfg.low_vram)
    return ending.advice_on_memory(["vox.grid_size", "pose.rend_hw", "batch_views"], less)


def follow(watch: Watch, optimisation: SJC, steps: Iterable[tuple[int, dict[str, Any]]], report: Live) -> None:
    """Write what a run leaves after some of its steps, while they are taken."""
    import pose
    from voxnerf import snapshot

    n, p = optimisation.cfg.n_steps, optimisation.cfg.pose
    path = pose.spiral(N_VISUALS, p.R, p.R, fov=p.FoV)  # the camera moves as the run does
    visual_every, part_every = (max(1, n // parts) for parts in (N_VISUALS, N_PARTS))
    save_every = max(1, math.floor(n * optimisation.cfg.ckpt_every))
    for step, stats in watch.over(steps):
        log, show, part, save = (watch.due(step, every) for every in (LOG_EVERY, visual_every, part_every, save_every))
        save = save or watch.late
        if log or "retried" in stats:
            watch.log(step, stats, as_row)
        if show:
            visualise(optimisation, path[min(N_VISUALS - 1, step * N_VISUALS // n)], step, watch.worker)
        if part and optimisation.cfg.snapshots:  # before the checkpoint: a run that goes on from that has it
            watch.worker.put(snapshot.write, ".", *snapshot.taken(optimisation.field, step))
        if save:
            watch.checkpoint(step)
        if part:
            watch.worker.put(report.refresh, step)


def as_row(stats: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the statistics of a step as a row of history.json, and as the bar shows it."""
    row = {name: value for name, value in stats.items() if name != "masked"}
    return row, {name: f"{float(value):.3g}" for name, value in row.items() if name not in ("calls", "retried")}


def visualise(optimisation: SJC, camera: Camera, step: int, worker: Worker) -> None:
    """Render a view after `step` steps, and let the worker write it."""
    view = optimisation.view(camera)
    worker.put(write_view, f"step_{step:07d}.png", view, optimisation.depth_range)


def write_view(name: str, view: Iterable[np.ndarray], depth_range: tuple[float, float]) -> None:
    """Write the picture and the depth of a view, and both side by side, as `name` in the folders of each."""
    from my.media import beside, write_png

    picture, depth = as_images(view, depth_range)
    for folder, image in (("img", picture), ("depth", depth), ("view", beside(picture, depth))):
        Path(folder).mkdir(exist_ok=True)
        write_png(Path(folder) / name, image)


def as_images(view: Iterable[np.ndarray], depth_range: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the picture and the depth of a view as uint8 images (H, W, 3 or 4), (h, w, 3), once they are there."""
    from my.media import RGB_OR_RGBA, depth_image, to_uint8

    picture, depth, *_ = view
    return to_uint8(picture, RGB_OR_RGBA), depth_image(depth, *depth_range)


def save_test_views(optimisation: SJC) -> None:
    """Write the pictures and the videos of the spiral of test views to test_<step>/."""
    from tqdm import tqdm

    import pose
    from my.media import VideoWriter

    p = optimisation.cfg.pose
    root = Path(f"test_{optimisation.cfg.n_steps}")
    for name in ("view", "view_seq"):
        (root / name).mkdir(parents=True, exist_ok=True)
    with VideoWriter(root / "view_seq" / "view.mp4") as video, Worker() as worker:
        cameras = pose.spiral(N_TEST_VIEWS, p.R, p.R, fov=p.FoV)
        for i, view in enumerate(tqdm(test_views(optimisation, cameras), desc="test views", total=N_TEST_VIEWS)):
            path = root / "view" / f"{i:03d}.png"
            worker.put(write_test_view, path, video, view, optimisation.depth_range)
    print(
        f"done: {root / 'view'} has {N_TEST_VIEWS} views, {root / 'view_seq' / 'view.mp4'} the video; for the "
        f"final rendering: python {ROOT / 'highres_final_vis.py'}"
    )


def test_views(optimisation: SJC, cameras: list[Camera]) -> Iterator[HostCopy]:
    """Yield the test views of cameras, with --alpha True the pictures (H, W, 4) of them."""
    if not optimisation.cfg.alpha:
        yield from map(optimisation.view, cameras)
        return
    from film.frames import Frames

    for some in Frames(optimisation, optimisation.cfg.pose.rend_hw, 1, alpha=True).along(cameras):
        yield from some


def write_test_view(
    path: Path, video: VideoWriter, view: Iterable[np.ndarray], depth_range: tuple[float, float]
) -> None:
    """Write the picture of a view to `path`, and add it to the video, with its depth beside it."""
    from my.media import beside, on_white, write_png

    picture, depth = as_images(view, depth_range)
    write_png(path, picture)
    video.append(beside(on_white(picture), depth))


def prepare(cfg: SJCConfig, found: Any) -> Callable[[], None]:
    """Return the run of the current folder, which goes on from its last checkpoint; UserError if it cannot start.

    `found` is what `cfg.check_files` returned.
    """
    from my.media import ffmpeg
    from sjc import ready

    ffmpeg()  # for the video at the end
    processes = of_torchrun()
    processes.refuse_fewer("--batch_views", cfg.batch_views)
    device = script.pick_device(processes.device(cfg.device))
    processes.join(device)
    optimisation, first_step = ready(cfg, device, found, processes)
    return lambda: train(optimisation, first_step, processes)


def main(argv: list[str] | None = None) -> None:
    """Run text to 3D in the current folder."""
    script.begin(read_config(argv), prepare, argv)


if __name__ == "__main__":
    run_main(main, go_on=script.go_on, several=True)
