"""What the trainings of the miniature share: their folders, and a seeded, resumable loop with averaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from my import checkpoint

SCRATCH = Path(__file__).resolve().parent / "scratch"  # the rendered world and checkpoints; git ignores it
MINI = SCRATCH.parents[1] / "mini_sd"  # the embedded model


@dataclass
class Schedule:
    """Length and learning rate of a training: linear warm-up, then a cosine down to zero."""

    n_steps: int
    lr: float
    warmup: int = 200  # steps

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        ramp = min(1.0, (step + 1) / self.warmup)
        return self.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / self.n_steps))


def train(
    model: torch.nn.Module,
    loss_at: Callable[[int], torch.Tensor],
    schedule: Schedule,
    ckpt_root: Path,
    save_every: int = 500,
    ema_decay: float = 0.999,
) -> None:
    """Train `model` on loss_at(step), from its newest checkpoint if there is one, and leave averaged weights in it.

    The loss of a step must depend on the step and the weights alone. Then a training that was stopped ends with the
    weights of one that was not. Weights are averaged exponentially, with `ema_decay` per step.
    """
    names = [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, weight_decay=1e-4)
    ema = EMAModel(model.parameters(), decay=ema_decay)
    first = _resume(ckpt_root, model, optimizer, ema, names)
    bar = tqdm(range(first, schedule.n_steps), initial=first, total=schedule.n_steps, desc=ckpt_root.name)
    running = None
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(model.parameters())
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == schedule.n_steps:
            _save(ckpt_root, step + 1, model, optimizer, ema, names, running)
    ema.copy_to(model.parameters())


def _save(
    root: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel,
    names: list[str],
    loss: float,
) -> None:
    """Write the checkpoint after `step` steps: weights, averaged weights, and the optimizer's state."""
    tensors = {f"model/{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"ema/{n}": p for n, p in zip(names, ema.shadow_params)}
    tensors |= checkpoint.flatten_optimizer(optimizer, names)
    checkpoint.save(root, step, tensors, {"loss": loss})


def _resume(
    root: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, names: list[str]
) -> int:
    """Restore the newest checkpoint under `root`, and return its number of steps; 0 where there is none."""
    newest = checkpoint.load_newest(root)
    if newest is None:
        return 0
    tensors, meta = newest
    with torch.no_grad():
        for (name, p), shadow in zip(model.named_parameters(), ema.shadow_params):
            p.copy_(tensors[f"model/{name}"])
            shadow.copy_(tensors[f"ema/{name}"])
    checkpoint.restore_optimizer(optimizer, names, tensors)
    ema.optimization_step = meta["step"]
    return meta["step"]


def load_averaged(model: torch.nn.Module, path: Path) -> None:
    """Copy the averaged weights of the checkpoint at `path` into `model`."""
    tensors, _ = checkpoint.load(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"ema/{name}"])
