"""Text to 3D by Score Jacobian Chaining: optimise a voxel field in the current folder.

python run_sjc.py --preset ideal --sd.prompt "a blue duck"
python run_sjc.py --sd.prompt "A high quality photo of a delicious burger"
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import script
from my.errors import run_main
from my.watch import LOG_EVERY, watched
from options.sjc import SJCConfig

if TYPE_CHECKING:
    from sjc import SJC

ROOT = Path(__file__).resolve().parent
N_VISUALS, N_CHECKPOINTS = 100, 20  # visualise every 1%, checkpoint every 5%
N_TEST_VIEWS = 100
BEFORE = "a checkpoint, if there is one, is from an earlier step"


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


def train(optimisation: SJC, first_step: int) -> None:
    """Optimise the field; write history, heartbeat, visualisations and checkpoints, and at last the test views."""
    from sjc import optimise

    n = optimisation.cfg.n_steps
    visual_every, save_every = (max(1, n // parts) for parts in (N_VISUALS, N_CHECKPOINTS))
    with watched("sjc", n, first_step) as watch:
        for step, stats in watch.over(optimise(optimisation, first_step)):
            log, show, save = (watch.due(step, every) for every in (LOG_EVERY, visual_every, save_every))
            if log or save:
                remedy = optimisation.cfg.remedy(optimisation.adapter.device.type)
                script.check_finite(stats, f"step {step}", f"{BEFORE}; try a smaller --lr; {remedy}")
            if log:
                watch.log(step, stats, {k: f"{float(v):.3g}" for k, v in stats.items()})
            if show:
                visualise(optimisation, step)
            if save:
                optimisation.save("ckpt", step)
        save_test_views(optimisation)


def visualise(optimisation: SJC, step: int) -> None:
    """Write the picture and the depth after `step` steps, and both side by side. The camera moves as the run does."""
    import pose
    from my.media import beside, depth_image, to_uint8, write_png

    p, k = optimisation.cfg.pose, min(N_VISUALS - 1, step * N_VISUALS // optimisation.cfg.n_steps)
    picture, depth = optimisation.view(pose.spiral(N_VISUALS, p.R, p.R, fov=p.FoV)[k])
    picture, depth = to_uint8(picture), depth_image(depth, *optimisation.depth_range)
    for folder, image in (("img", picture), ("depth", depth), ("view", beside(picture, depth))):
        Path(folder).mkdir(exist_ok=True)
        write_png(Path(folder) / f"step_{step:07d}.png", image)


def save_test_views(optimisation: SJC) -> None:
    """Write the pictures and the videos of the spiral of test views to test_<step>/."""
    from tqdm import tqdm

    import pose
    from my.media import VideoWriter, beside, depth_image, to_uint8, write_png

    p = optimisation.cfg.pose
    root = Path(f"test_{optimisation.cfg.n_steps}")
    for name in ("view", "view_seq"):
        (root / name).mkdir(parents=True, exist_ok=True)
    with VideoWriter(root / "view_seq" / "view.mp4") as video:
        for i, camera in enumerate(tqdm(pose.spiral(N_TEST_VIEWS, p.R, p.R, fov=p.FoV), desc="test views")):
            picture, depth = optimisation.view(camera)
            picture, depth = to_uint8(picture), depth_image(depth, *optimisation.depth_range)
            write_png(root / "view" / f"{i:03d}.png", picture)
            video.append(beside(picture, depth))
    print(
        f"done: {root / 'view'} has {N_TEST_VIEWS} views, {root / 'view_seq' / 'view.mp4'} the video; for the "
        f"final rendering: python {ROOT / 'highres_final_vis.py'}"
    )


def prepare(cfg: SJCConfig, found: Any) -> Callable[[], None]:
    """Return the run of the current folder, which goes on from its last checkpoint; UserError if it cannot start.

    `found` is what `cfg.check_files` returned.
    """
    from sjc import ready

    optimisation, first_step = ready(cfg, script.pick_device(cfg.device), found)
    return lambda: train(optimisation, first_step)


def main(argv: list[str] | None = None) -> None:
    """Run text to 3D in the current folder."""
    script.begin(read_config(argv), prepare)


if __name__ == "__main__":
    run_main(main, go_on=script.go_on)
