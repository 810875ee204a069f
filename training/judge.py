"""Train the judge of toy-world pictures on true renders, all 72 pairs, and measure it on others.

    python -m training.judge

This takes about 4 minutes on one CPU thread. It keeps no checkpoint: when it is stopped, it starts again.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import save
from tqdm import tqdm

import pose
from adapt import PLAIN_BACKGROUNDS
from my.config import Config, load
from my.errors import run_main
from my.run_dir import refuse_output, write_atomic
from my.seeds import numpy_rng
from toyworld import BACKGROUND_RANGE, COLORS, OBJECTS, compose, coverage_maps
from toyworld.judge import SIZE, WEIGHTS, Judge, hits, octant
from toyworld.render import gaussian_blur

FOV = (50.0, 60.0)
RENDER_BATCH = 20
GROUP = 16  # pictures that share a degradation
CLEAN_SHARE = 0.25  # of groups that stay as they are
MAX_SHRINK, MAX_BLUR, MAX_NOISE, BRIGHTNESS = 4.0, 1.5, 0.04, (0.85, 1.1)
BLUR_REACH = 4  # pixels
LABELS = {"object": "obj", "color": "color", "octant": "side"}  # head of the judge -> label of `draw`
World = tuple[torch.Tensor, torch.Tensor]  # maps and octants of every object, as `render_world` returns
PALETTE, PLAIN = (torch.tensor(list(rgb)) for rgb in (COLORS.values(), PLAIN_BACKGROUNDS))


class JudgeConfig(Config):
    """Options of the judge's training."""

    poses_per_object: int = Field(300, gt=0, description="rendered poses of each object")
    test_poses_per_object: int = Field(60, gt=0, description="held-out poses of each object, from another seed")
    n_steps: int = Field(2200, gt=0, description="optimisation steps")
    groups: int = Field(4, gt=0, description=f"groups of {GROUP} pictures per step")
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    seed: int = Field(0, ge=0, description="seed of poses, weights and draws")
    out: str = Field(str(WEIGHTS), description="file to write")


def render_world(n: int, seed: int, desc: str) -> World:
    """Return maps (objects, n, 5, SIZE, SIZE) uint8 and octants (objects, n) of random training cameras."""
    all_maps, all_octants = [], []
    with tqdm(total=n * len(OBJECTS), desc=desc, unit="pose") as bar:
        for obj in OBJECTS:
            rng = numpy_rng(seed, 0, f"judge/{obj}")
            cameras = [pose.train_camera(rng, fov=FOV) for _ in range(n)]
            maps = []
            for i in range(0, n, RENDER_BATCH):
                maps.append(coverage_maps(obj, cameras[i : i + RENDER_BATCH], SIZE))
                bar.update(len(maps[-1]))
            all_maps.append(torch.cat(maps))
            all_octants.append(torch.tensor([octant(c) for c in cameras]))
    return torch.stack(all_maps), torch.stack(all_octants)


def draw(world: World, n: int, rng: np.random.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return pictures (n, 3, SIZE, SIZE) in [0, 1] and their labels {color, obj, side: (n,)}."""
    maps, octants = world
    obj, shot, color = (torch.from_numpy(rng.integers(k, size=n)) for k in (*octants.shape, len(COLORS)))
    free = torch.from_numpy(rng.uniform(*BACKGROUND_RANGE, (n, 3))).float()
    plain = PLAIN[rng.integers(len(PLAIN), size=n)]
    background = torch.where(torch.from_numpy(rng.random((n, 1)) < 0.5), free, plain)
    return compose(maps[obj, shot], PALETTE[color], background), {
        "color": color,
        "obj": obj,
        "side": octants[obj, shot],
    }


def degrade(x: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return pictures x (n, 3, SIZE, SIZE) as a small voxel grid may show them.

    They are shrunk and enlarged, blurred, made noisy, and made darker or brighter. In the share CLEAN_SHARE of calls
    they stay as they are.
    """
    if rng.random() < CLEAN_SHARE:
        return x
    small = round(SIZE / rng.uniform(1, MAX_SHRINK))
    x = F.interpolate(x, (small, small), mode="bilinear", antialias=True)
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear")
    x = gaussian_blur(x, max(rng.uniform(0, MAX_BLUR), 0.1), BLUR_REACH)
    noise = torch.from_numpy(rng.standard_normal(x.shape, dtype="float32"))
    return (x * rng.uniform(*BRIGHTNESS) + rng.uniform(0, MAX_NOISE) * noise).clamp(0, 1)


def train(judge: Judge, world: World, cfg: JudgeConfig) -> None:
    """Train `judge` on randomly coloured, randomly degraded pictures of a world."""
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, cfg.n_steps)
    bar = tqdm(range(cfg.n_steps), desc="judge")
    for step in bar:
        rng = numpy_rng(cfg.seed, step, "judge/pictures")
        x, truth = draw(world, cfg.groups * GROUP, rng)
        x = torch.cat([degrade(part, rng) for part in x.split(GROUP)])
        verdict = judge(x.contiguous(memory_format=torch.channels_last))
        by_object, by_color, by_octant = (F.nll_loss(verdict[head], truth[label]) for head, label in LABELS.items())
        loss = by_object + by_color + by_octant
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


@torch.no_grad()
def accuracy(judge: Judge, world: World, seed: int, n: int = 2880) -> dict[str, dict[str, float]]:
    """Return {"clean", "degraded": {"object", "pair", "octant"}} over n pictures of a world."""
    rng = numpy_rng(seed, 0, "judge/test")
    x, truth = draw(world, n, rng)
    sets = {"clean": x, "degraded": torch.cat([degrade(part, rng) for part in x.split(GROUP)])}
    return {
        name: {k: round(hit.float().mean().item(), 4) for k, hit in hits(judge(pictures), **truth).items()}
        for name, pictures in sets.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Train the judge, measure it, and write its weights with the figures in their header."""
    cfg = load(JudgeConfig, argv, prog="python -m training.judge", doc=__doc__, config_file=None)
    refuse_output("--out", cfg.out)
    torch.manual_seed(cfg.seed)
    judge = Judge().to(memory_format=torch.channels_last)
    train(judge, render_world(cfg.poses_per_object, cfg.seed, "renders"), cfg)
    judge = judge.eval().half().float()  # measure what is stored
    figures = accuracy(judge, render_world(cfg.test_poses_per_object, cfg.seed + 1, "held out"), cfg.seed + 1)
    half = {name: value.half().contiguous() for name, value in judge.state_dict().items() if value.is_floating_point()}
    write_atomic(cfg.out, save(half, {"accuracy": json.dumps(figures)}))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run_main(main)
