"""Variational Score Distillation with several fields, whose own score is known exactly.

    python -m benchmarks.vsd --preset ideal --sd.prompt "a blue duck" --n_fields 4

ProlificDreamer (arXiv 2305.16213) trains several fields, and a network that learns the score of their renderings. Here
that score is computed: for a camera, the data are the renderings of all fields. So what differs from SDS is the method,
not how well a network has learnt. It takes the options of run_sjc.py but those of the rule. It leaves the first field
as that leaves its own, and the others in field_2/, field_3/, ..., which evaluate.py takes as finished runs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

import rules
from adapt import ScoreAdapter, make_adapter
from benchmarks import other_score
from families.family import Conditions
from my import config, script
from my.errors import run_main
from options.sjc import SJCConfig
from sjc import SJC, Stats, optimise, resize

if TYPE_CHECKING:
    import pose

APART = 1000  # so that runs with seeds 0, 1, 2, ... share no field


class VsdConfig(SJCConfig):
    """The options of run_sjc.py but those of the rule, and the number of fields."""

    n_fields: int = Field(
        4,
        gt=0,
        exclude=True,  # not written, since a folder with one of the fields is as any other run's
        json_schema_extra=config.FREE,
        description="fields that are optimised together; with one it is SDS",
    )

    command: ClassVar[str] = "benchmarks.vsd"
    continues: ClassVar[bool] = False
    conditions: ClassVar[Conditions] = {
        **SJCConfig.conditions,
        **other_score.NEW,
        **dict.fromkeys(other_score.OF_RULE),
        "score_clip": {},
        "noise": {},
    }


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
        x_sigma, ask = rules.perturbed(x, n, sigma), self.ask(cameras)
        D_s = ask.guided(x_sigma, sigma)
        self.n_calls = ask.n_calls
        g = rules.vsd_direction(D_s, x_sigma, torch.stack(xs), sigma)
        return self.clipped(g, i) / self.cfg.batch_views


class Leader(Particle):
    """The first of several fields, which has the others take their steps after its own."""

    def step(self, i: int) -> Stats:
        """Take step `i` of all fields; return the statistics of this one."""
        if i == 0:
            self.following = [optimise(field) for field in self.fields[1:]]
        stats = super().step(i)
        for steps in self.following:
            next(steps)
        return stats


def particles(cfg: SJCConfig, found: Any, n_fields: int) -> Leader:
    """Return the first of `n_fields` fields, which share a model. The seeds of two differ by APART at least."""
    if cfg.family == "sd":  # each field asks the text encoder when it is made
        cfg = cfg.model_copy(update={"sd": cfg.sd.model_copy(update={"offload_text": False})})
    adapter = make_adapter(cfg, script.pick_device(cfg.device), found)
    fields: list[Particle] = []
    leader = Leader(cfg, adapter, fields)
    others = [cfg.model_copy(update={"seed": cfg.seed + k * APART}) for k in range(1, n_fields)]
    fields += [leader, *(Particle(other, adapter, fields) for other in others)]
    return leader


def leave(leader: Leader) -> None:
    """Write the fields but the first, each as a finished run."""
    weights = script.recorded_weights(".")
    for k, field in enumerate(leader.fields[1:], 2):
        folder = Path(f"field_{k}")
        folder.mkdir(exist_ok=True)
        config.write(field.cfg, folder / script.FULL_CONFIG, **({script.WEIGHTS: weights} if weights else {}))
        field.save(folder / "ckpt", field.n_steps_taken)


def main(argv: list[str] | None = None) -> None:
    """Optimise the fields together, and leave each as a finished run."""
    cfg = other_score.read_options(VsdConfig, argv, __doc__)
    cfg.rule = "sds"  # of which it is a variant
    other_score.run(cfg, partial(particles, n_fields=cfg.n_fields), argv, leave)


if __name__ == "__main__":
    run_main(main, go_on=other_score.go_on)
