"""The paper's 2D experiments: optimise a plain canvas with the chained score, and compare settings in a figure.

    python run_2d_sjc.py --preset mini
    python run_2d_sjc.py --family gddpm --gddpm.lsun_cat ffhq --schedules 1.5,annealed --copies 1

Rows are the level of noise and the equation, columns the number of noise copies and the seed. Every
cell depends on its own settings and seed only.
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import script
from my.errors import UserError, run_main
from my.host_copy import HostCopy
from my.worker import Worker
from options.canvas import CanvasConfig, Setting

if TYPE_CHECKING:
    import torch

    from adapt import ScoreAdapter

ROOT = Path(__file__).resolve().parent
CHECK_EVERY = 50  # steps
KEPT = 2  # checkpoints


def read_config(argv: list[str] | None) -> CanvasConfig:
    """Return the configuration of a command line; with --resume, the one saved in the folder."""
    return script.read_config(
        CanvasConfig,
        argv,
        root=ROOT,
        settle=CanvasConfig.absolute,
        finished=Path("grid.png").exists,
        prog="run_2d_sjc.py",
        doc=__doc__,
        presets_dir=ROOT / "presets" / "2d",
    )


def cell_name(setting: Setting) -> str:
    """Return the file name, without its ending, of a cell."""
    equation = 16 if setting.var_red else 15
    return f"sigma_{setting.schedule}_eq{equation}_copies_{setting.copies}_seed_{setting.seed}"


def refuse_unfit_levels(cfg: CanvasConfig, adapter: ScoreAdapter) -> None:
    """Raise UserError for noise levels that the model does not have, and for two that are one level of the model."""
    adapter.sigma_range(cfg.sigma_min, cfg.sigma_max)
    rows: dict[float, float] = {}  # {level of the model: what was given}
    for given in cfg.single_levels():
        adapter.refuse_unknown_sigma("--schedules", given)
        level = adapter.round_sigma(given)
        if level in rows:
            raise UserError(
                f"--schedules {rows[level]:g},{given:g}: both are the level {level:.4g} of this model; leave one out"
            )
        rows[level] = given


def compute(cfg: CanvasConfig, adapter: ScoreAdapter, asked: str) -> dict[str, torch.Tensor]:
    """Return {cell name: canvas (C, H, W)} of what is `asked` for; cells of the newest checkpoint are taken from it."""
    from tqdm import tqdm

    from canvas import optimise
    from my import checkpoint

    newest = checkpoint.load_newest("ckpt", KEPT)
    canvases = newest[0] if newest else {}
    if newest:
        checkpoint.refuse_other(cfg.command, *newest)
        cells = {cell_name(s) for row in cfg.rows() for s in row}
        checkpoint.check(canvases, dict.fromkeys(cells & canvases.keys(), adapter.data_shape))
    remedy = cfg.remedy(adapter.device.type)
    missing = [s for row in cfg.rows() for s in row if cell_name(s) not in canvases]
    with tqdm(total=len(missing) * cfg.n_steps, desc="2D", unit="step") as bar, Worker() as worker:
        for setting in missing:
            bar.set_postfix_str(f"{setting.row}, {setting.caption}", refresh=False)
            for step, x in enumerate(optimise(cfg, adapter, setting, asked), 1):
                if step % CHECK_EVERY == 0 or step == cfg.n_steps:
                    worker.put(check_canvas, HostCopy(x.sum()), f"{cell_name(setting)}, step {step}", remedy)
                bar.update()
            worker.join()
            canvases[cell_name(setting)] = x[0].cpu()
            checkpoint.save("ckpt", len(canvases), canvases, {script.OPTIONS: script.held(cfg)}, KEPT)
    return canvases


def check_canvas(total: HostCopy, where: str, remedy: str) -> None:
    """Raise RunError if the sum of a canvas is not finite, once it is there."""
    script.check_finite({"the canvas": total[0]}, where, remedy)


def draw_figure(cfg: CanvasConfig, adapter: ScoreAdapter, canvases: dict[str, torch.Tensor]) -> None:
    """Write each cell's picture to cells/, and all of them to grid.png, labelled."""
    import torch

    from my.media import labelled_grid, write_png

    Path("cells").mkdir(exist_ok=True)
    remedy = cfg.remedy(adapter.device.type)
    pictures = {}
    with Worker() as worker, torch.no_grad():
        for name in (cell_name(setting) for row in cfg.rows() for setting in row):
            decoded = adapter.decode(canvases[name][None].to(adapter.device))[0]
            pictures[name] = HostCopy(decoded.permute(1, 2, 0))
            worker.put(write_cell, name, pictures[name], remedy)
    grid = [(row[0].row, [(pictures[cell_name(s)][0], s.caption) for s in row]) for row in cfg.rows()]
    write_png("grid.png", labelled_grid(grid))


def write_cell(name: str, picture: HostCopy, remedy: str) -> None:
    """Write the picture of a cell, once it is there; raises RunError where it is not finite."""
    from my.media import write_png

    script.check_finite({"the decoded canvas": picture[0].sum()}, name, remedy)
    write_png(Path("cells") / f"{name}.png", picture[0])


def prepare(cfg: CanvasConfig, found: Any) -> Callable[[], None]:
    """Return the function that optimises all missing canvases and draws the figure; UserError if it cannot start."""
    from adapt import make_adapter

    adapter = make_adapter(cfg, script.pick_device(cfg.device), found)
    refuse_unfit_levels(cfg, adapter)

    def run() -> None:
        draw_figure(cfg, adapter, compute(cfg, adapter, cfg.asked(found)[0]))
        print(f"done: grid.png compares {sum(map(len, cfg.rows()))} canvases, cells has each of them")

    return run


def main(argv: list[str] | None = None) -> None:
    """Run the 2D experiments in the current folder."""
    script.begin(read_config(argv), prepare, argv)


if __name__ == "__main__":
    run_main(main, go_on=script.go_on)
