"""Variational Score Distillation with several fields, whose own score is known exactly.

    python -m benchmarks.vsd --out FOLDER --n_fields 4 --prompt "a blue duck"

ProlificDreamer (arXiv 2305.16213) trains several fields, and a network that learns the score of their renderings. Here
that score is computed: for a camera, the data are the renderings of all fields. So what differs from SDS is the method,
not how well a network has learnt. It leaves FOLDER/0, FOLDER/1, ..., which evaluate.py takes as finished runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

import rules
from adapt import ScoreAdapter, make_adapter
from my import config, script
from my.errors import UserError, run_main
from my.run_dir import refuse_inside
from options.found import PRESETS
from options.sjc import SJCConfig
from sjc import SJC, optimise, resize

if TYPE_CHECKING:
    import pose

ROOT = Path(__file__).resolve().parent.parent


class VsdConfig(config.Config):
    """Every option of benchmarks.vsd."""

    out: str = Field(description="folder to make")
    n_fields: int = Field(4, gt=0, description="fields that are optimised together; with one it is SDS")
    preset: Literal["ideal", "ideal_best", "mini", "mini_best"] = Field("ideal", description="model, field and cameras")
    prompt: str = Field("a blue duck", description="the text")
    scale: float | None = Field(None, ge=0, description="guidance, default the preset's")
    emptiness_weight: float | None = Field(None, ge=0, description="weight of the emptiness loss, default the preset's")
    n_steps: int | None = Field(None, gt=0, description="steps of each field, default the preset's")
    seed: int = Field(0, ge=0, description="seed of the first field; each further one has the next")


class FieldConfig(SJCConfig):
    """The options of one of the fields, as its folder has them."""

    command: ClassVar[str] = "benchmarks.vsd"


class Particle(SJC):
    """The optimisation of one of several fields; `fields` holds all of them, this one too, once they are there."""

    def __init__(self, cfg: SJCConfig, adapter: ScoreAdapter, fields: list[Particle]) -> None:
        super().__init__(cfg, adapter)
        self.fields = fields

    @torch.no_grad()
    def gradient(
        self, x: torch.Tensor, n: torch.Tensor, cameras: list[pose.Camera], sigma: float, i: int
    ) -> torch.Tensor:
        """Return what step `i` chains (b, C, H, W): all fields are seen by the cameras of this one."""
        rays, behind = self.views.of_step(i)[1], self.draw_background(i)
        xs = [
            x if field is self else resize(field.render_views(rays, behind).color, self.adapter.data_shape[1:])
            for field in self.fields
        ]
        x_sigma = rules.perturbed(x, n, sigma)
        D_s = self.ask(cameras).guided(x_sigma, sigma)
        return rules.vsd_direction(D_s, x_sigma, torch.stack(xs), sigma) / self.cfg.batch_views


def particles(cfg: VsdConfig) -> tuple[list[Particle], dict[str, str]]:
    """Return the optimisations of all fields, which share a model, and {what: fingerprint} of its weights."""
    given = {"emptiness_weight": cfg.emptiness_weight, "n_steps": cfg.n_steps, "sd.scale": cfg.scale}
    flags = ["--preset", cfg.preset, "--rule", "sds", "--sd.prompt", cfg.prompt]
    flags += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    if cfg.preset.startswith("mini"):
        flags += ["--sd.offload_text", "False"]  # each field asks the text encoder when it is made
    fields: list[Particle] = []
    adapter: ScoreAdapter | None = None
    weights: dict[str, str] = {}
    for k in range(cfg.n_fields):
        argv = [*flags, "--seed", str(cfg.seed + k)]
        run = config.load(FieldConfig, argv, prog="run_sjc.py", doc="", presets_dir=PRESETS, config_file=None)
        if adapter is None:
            found = run.check_files()
            adapter, weights = make_adapter(run, script.pick_device(run.device), found), run.weights(found)
        fields.append(Particle(run, adapter, fields))
    return fields, weights


def main(argv: list[str] | None = None) -> None:
    """Optimise the fields together, and leave each as a finished run."""
    from tqdm import tqdm

    cfg = config.load(VsdConfig, argv, prog="python -m benchmarks.vsd", doc=__doc__, config_file=None)
    out = Path(cfg.out).resolve()
    refuse_inside("--out", cfg.out, ROOT)
    if out.exists() and os.listdir(out):
        raise UserError(f"--out {cfg.out}: is not empty; give a new folder")
    fields, weights = particles(cfg)
    n_steps = fields[0].cfg.n_steps
    for _ in tqdm(zip(*map(optimise, fields)), total=n_steps, desc="vsd", unit="step"):
        pass
    for k, field in enumerate(fields):
        folder = out / str(k)
        folder.mkdir(parents=True)
        config.write(field.cfg, folder / script.FULL_CONFIG, **({script.WEIGHTS: weights} if weights else {}))
        field.save(folder / "ckpt", n_steps)


if __name__ == "__main__":
    run_main(main)
