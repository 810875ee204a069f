"""What both training scripts share: a seeded, resumable loop with averaged weights."""

import math
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from my import checkpoint


@dataclass
class Schedule:
    """Length and learning rate of a training: linear warm-up, then a cosine down to zero."""

    n_steps: int
    lr: float
    warmup: int = 200

    def lr_at(self, step):
        """Return the learning rate of a step."""
        ramp = min(1.0, (step + 1) / self.warmup)
        return self.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / self.n_steps))


def train(model, loss_at, schedule, ckpt_root, save_every=500, ema_decay=0.999):
    """Train `model` on loss_at(step), from its newest checkpoint if there is one; return averaged weights in it.

    Each step's data are a function of the step alone, so that a killed training continues as if
    it had never stopped.
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
    return model


def _save(root, step, model, optimizer, ema, names, loss):
    tensors = {f"model/{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"ema/{n}": p for n, p in zip(names, ema.shadow_params)}
    tensors |= checkpoint.flatten_optimizer(optimizer, names)
    checkpoint.save(root, step, tensors, {"loss": loss})


def _resume(root, model, optimizer, ema, names):
    path = checkpoint.latest(root)
    if path is None:
        return 0
    tensors, meta = checkpoint.load(path)
    with torch.no_grad():
        for (name, p), shadow in zip(model.named_parameters(), ema.shadow_params):
            p.copy_(tensors[f"model/{name}"])
            shadow.copy_(tensors[f"ema/{name}"])
    checkpoint.restore_optimizer(optimizer, names, tensors)
    ema.optimization_step = meta["step"]
    return meta["step"]


def load_averaged(model, path):
    """Copy the averaged weights of the checkpoint at `path` into `model` and return it."""
    tensors, _ = checkpoint.load(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"ema/{name}"])
    return model
