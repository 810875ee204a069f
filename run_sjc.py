"""Text to 3D by Score Jacobian Chaining: optimise a voxel field in the current folder.

python run_sjc.py --preset ideal --sd.prompt "a blue duck"
python run_sjc.py --sd.prompt "A high quality photo of a delicious burger"
"""

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

from pathlib import Path

from my import run_dir, script
from my.errors import run_main
from options.sjc import SJCConfig

ROOT = Path(__file__).resolve().parent
N_VISUALS, N_CHECKPOINTS = 100, 20  # visualise every 1%, checkpoint every 5%
N_TEST_VIEWS = 100
LOG_EVERY = 10  # steps between lines of history.json
BEFORE = "a checkpoint, if there is one, is from before it"


def read_config(argv):
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


def train(sjc, first_step):
    """Optimise the field, leaving history, heartbeat, visualisations and checkpoints."""
    from tqdm import tqdm

    from sjc import optimise

    n = sjc.cfg.n_steps
    visual_every, save_every = (max(1, n // parts) for parts in (N_VISUALS, N_CHECKPOINTS))
    with (
        run_dir.History("history.json", first_step) as history,
        run_dir.Heartbeat("heartbeat.json", n, start_step=first_step) as heartbeat,
        tqdm(total=n, initial=first_step, desc="sjc", unit="step") as bar,
    ):
        for step, stats in optimise(sjc, first_step):
            log, save = (step % every == 0 or step == n for every in (LOG_EVERY, save_every))
            if log or save:
                remedy = sjc.cfg.remedy(sjc.adapter.device.type)
                script.check_finite(stats, f"step {step}", f"{BEFORE}; try a smaller --lr; {remedy}")
            if log:
                history.add(step, **stats)
                bar.set_postfix({k: f"{float(v):.3g}" for k, v in stats.items()}, refresh=False)
            if step % visual_every == 0 or step == n:
                visualise(sjc, step)
            if save:
                sjc.save("ckpt", step)
            heartbeat.beat(step)
            bar.update()
        save_test_views(sjc)


def visualise(sjc, step):
    """Write this step's picture, depth, and both side by side, from a camera that moves round with the run."""
    import pose
    from my.media import beside, depth_image, to_uint8, write_png

    k = min(N_VISUALS - 1, step * N_VISUALS // sjc.cfg.n_steps)
    picture, depth = sjc.view(pose.spiral(N_VISUALS, sjc.cfg.pose.R, sjc.cfg.pose.R, fov=sjc.cfg.pose.FoV)[k])
    picture, depth = to_uint8(picture), depth_image(depth, *sjc.depth_range)
    for folder, image in (("img", picture), ("depth", depth), ("view", beside(picture, depth))):
        Path(folder).mkdir(exist_ok=True)
        write_png(Path(folder) / f"step_{step:07d}.png", image)


def save_test_views(sjc):
    """Write the pictures and the videos of the spiral of test views to test_<step>/."""
    from tqdm import tqdm

    import pose
    from my.media import VideoWriter, beside, depth_image, to_uint8, write_png

    p = sjc.cfg.pose
    root = Path(f"test_{sjc.cfg.n_steps}")
    for name in ("view", "view_seq"):
        (root / name).mkdir(parents=True, exist_ok=True)
    with VideoWriter(root / "view_seq" / "view.mp4") as video:
        for i, camera in enumerate(tqdm(pose.spiral(N_TEST_VIEWS, p.R, p.R, fov=p.FoV), desc="test views")):
            picture, depth = sjc.view(camera)
            picture, depth = to_uint8(picture), depth_image(depth, *sjc.depth_range)
            write_png(root / "view" / f"{i:03d}.png", picture)
            video.append(beside(picture, depth))
    print(
        f"done: {root / 'view'} has {N_TEST_VIEWS} views, {root / 'view_seq' / 'view.mp4'} the video; for the "
        f"final rendering: python {ROOT / 'highres_final_vis.py'}"
    )


def prepare(cfg, found):
    """Return the run of the current folder, from its last checkpoint or its beginning; UserError if it cannot start.

    `found` is what `cfg.check_files` returned.
    """
    from sjc import ready

    sjc, first_step = ready(cfg, script.pick_device(cfg.device), found)
    return lambda: train(sjc, first_step)


def main(argv=None):
    """Run text to 3D in the current folder."""
    script.begin(read_config(argv), prepare)


if __name__ == "__main__":
    run_main(main, go_on=script.go_on)
