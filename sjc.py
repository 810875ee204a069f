"""Score Jacobian Chaining (Wang et al., arXiv 2212.00774): the method.

    grad_theta log p(theta) = E_pi [ grad_x log p(x_pi) . J_pi ],     x_pi = render(theta, pi)

The score of a 2D diffusion model at a rendering x_pi is chained through the Jacobian J_pi of the
renderer, and so moves the parameters theta of a voxel field. `SJC.attempt` is where it happens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import pose
import rules
from adapt import ScoreAdapter, make_adapter
from asset import Asset, Source, load_field, new_field
from my import checkpoint
from my.ahead import Ahead, to_device
from my.errors import UserError, note
from my.exact import exact_device
from my.left_out import LEFT_OUT, LeftOut, NeverFinite
from my.processes import Processes
from my.script import OPTIONS, held
from my.seeds import normal, numpy_rng
from options.rule import RULES
from options.sjc import SJCConfig
from voxnerf import reference, state
from voxnerf.adamax import Adamax, Update, update_where
from voxnerf.capacity import device_memory, refuse_large_grid
from voxnerf.field import VoxRF
from voxnerf.finite import all_finite
from voxnerf.rays import Rays
from voxnerf.render import Rendering, pick_march, render_ready
from voxnerf.resample import begin_from
from voxnerf.surface_noise import cell_edge, surface_noise
from voxnerf.train_rays import TrainRays

MIN_CENTRE = 3  # smallest edge of an image with a centre and a border
BORDER = 7 / 64  # width of the border in the centre-depth loss, as a share of the image's edge
NEAR = 0.1  # world units: where the centre is nearer than the border by at least this, that loss is the published one

Stats = dict[str, Any]  # numbers that describe one step


def emptiness_loss(emptiness: torch.Tensor, n_samples: torch.Tensor) -> torch.Tensor:
    """Return mean log(1 + s w) (...) of the compositing weights w of n rays (arXiv 2212.00774, section 5).

    The mean is over the rays that meet the field's box, each counted with the samples of the longest.

    emptiness: (..., n) sum over the samples of a ray of log(1 + s w).
    n_samples: (..., n) samples of a ray in the box.
    """
    return emptiness.sum(-1) / (n_samples.amax(-1) * (n_samples > 0).sum(-1)).clamp(min=1)


def centre_depth_loss(depth: torch.Tensor) -> torch.Tensor:
    """Return the centre-depth loss (...) of images' depths (..., H, W), world units.

    It falls as the centre comes nearer.

    With d = mean centre depth - mean border depth, and a = NEAR,

        L(d) = -log(-d) for d <= -a,    -log(a) + (d + a) / a for d > -a.

    Its gradient is that of the published loss -log(d), whose value is not a number for d < 0: dL/dd = 1 / |d| where
    the centre is nearer than the border by at least NEAR. Elsewhere the published gradient grows without bound, and
    for d > 0 it pushes the centre away. Here the gradient is 1 / NEAR there, which pulls the centre to the camera. L is
    finite for every depth. The image needs MIN_CENTRE pixels per edge, to have a centre. Source: the centre-depth
    regulariser of arXiv 2212.00774.
    """
    d = (depth * centre_minus_border(*depth.shape[-2:], depth.device, depth.dtype)).sum((-2, -1))
    return torch.where(d <= -NEAR, -torch.log((-d).clamp(min=NEAR)), (d + NEAR) / NEAR - math.log(NEAR))


@functools.lru_cache(maxsize=8)
def centre_minus_border(H: int, W: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights (H, W) of pixels in the mean of an image's centre less the mean of its border."""
    h, w = (max(1, round(n * BORDER)) for n in (H, W))
    n = (H - 2 * h) * (W - 2 * w)
    weights = np.full((H, W), -1 / (H * W - n))
    weights[h : H - h, w : W - w] = 1 / n
    return to_device(weights, device, dtype)


def resize(x: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """Return images x (B, C, H, W) resized bilinearly to hw = (h, w), antialiased; x itself if it fits.

    They are products of matrices, whose gradient, unlike that of `interpolate`, is the same every time on CUDA.
    """
    if x.shape[2:] == hw:
        return x
    rows, columns = (resizing(*n, x.device, x.dtype) for n in zip(x.shape[2:], hw))
    return rows @ x @ columns.T


@functools.lru_cache(maxsize=8)
def resizing(n: int, to: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix (to, n) that resizes n pixels in a column."""
    columns = torch.eye(n, dtype=torch.float64)[None, None]
    matrix = F.interpolate(columns, (to, n), mode="bilinear", antialias=True)[0, 0]
    return to_device(matrix.numpy(), device, dtype)


class Attempt(NamedTuple):
    """What a step computes before it changes anything, for b own views. The field has its gradient besides."""

    i: int  # the step
    draw: int  # of its noise: counts the attempts
    cameras: list[pose.Camera]
    sigma: float
    rendering: Rendering  # detached
    x: torch.Tensor  # (b, C, H, W) rendering in the model's size, detached
    g: torch.Tensor  # (b, C, H, W) what is chained at x
    loss: torch.Tensor  # () the regulariser


class NotFinite(NeverFinite):
    """Has the last attempt at the step.

    attempt: that one.  exact: whether its networks computed in float32.  again: how it was tried again.
    """

    def __init__(self, attempt: Attempt, exact: bool, again: str) -> None:
        super().__init__(attempt.i, again + " and in float32" * exact)
        self.attempt, self.exact = attempt, exact


class SJC(Asset):
    """One optimisation: an asset, the score that shapes its field, its cameras and its optimizer.

    `n_steps_taken` counts its steps. `left_out` knows those whose update was left out. `n_calls` is how often the last
    direction asked the network for a view.
    """

    def __init__(self, cfg: SJCConfig, adapter: ScoreAdapter, processes: Processes | None = None) -> None:
        self.processes = processes or Processes()
        self.own = self.processes.part(cfg.batch_views)  # which of the B views of a step this process renders
        refuse_unfit_options(cfg, adapter)
        super().__init__(cfg, adapter, new_field(cfg, adapter))
        self.optimizer = new_adamax(self.field, cfg)
        self.rule, self.n_calls = rules.make(cfg, adapter), 0
        self.uncond, self.cond, self.bad = self._embed_prompts()
        self.levels = adapter.sigmas.tolist()
        self.views = TrainRays(cfg, self.field, self.own)
        self.noise: Ahead[torch.Tensor] = Ahead(
            self._make_noise, cfg.batch_views * math.prod(adapter.data_shape), adapter.device
        )
        self.left_out = LeftOut()
        self._train_backgrounds: list[torch.Tensor] = []

    @torch.no_grad()
    def _embed_prompts(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the conditions of a run's texts: once per run, not per step.

        They are that of the negative prompt (1, ...), and {view prompt: (1, ...)} of the prompt and of bad pictures;
        the last is empty without --bad_words.
        """
        p, prompt = self.cfg.pose, self.cfg.texts.prompt
        views, texts = pose.all_view_prompts(p.view_words), pose.read_view_texts(p.view_texts, p.view_words)
        uncond = self.adapter.embed([self.cfg.texts.negative_prompt])

        def spoken(prompt: str) -> list[str]:
            return [pose.prompt_of_view(prompt, view, p.view_style, texts) for view in views]

        def spoken_of_bad(prompt: str) -> list[str]:
            if self.cfg.rule != "bridge":
                return [self.cfg.bad_words] * len(views)
            return spoken(f"{prompt}, {self.cfg.bad_words}")  # its bad pictures are of the same object and view

        texts_of_bad = spoken_of_bad if self.cfg.bad_words else lambda _: []
        if p.view_style == "suffix" or self.cfg.rule == "bridge":
            # a text that is too long loses its end, which would be words of the view or of bad pictures
            prompt = self.adapter.fitting(prompt, lambda prompt: spoken(prompt) + texts_of_bad(prompt))
        cond = dict(zip(views, self.adapter.embed(spoken(prompt)).split(1)))
        bad = dict(zip(views, self.adapter.embed(texts_of_bad(prompt)).split(1))) if self.cfg.bad_words else {}
        self.adapter.text_done()
        return uncond, cond, bad

    # ------------------------------------------------------------------ optimisation

    def draw_sigma(self, i: int) -> float:
        """Return the noise level of step `i`, an entry of the table in `sigma_range`.

        By default it is drawn, all entries being equally likely, and the upper end of the range may fall. `sqrt` is the
        schedule of HiFA, arXiv 2305.18766: t falls by the square root of the share of the run.
        """
        cfg, table = self.cfg, self.levels
        low, high = cfg.sigma_range
        progress = i / max(1, cfg.n_steps - 1)
        if cfg.sigma_schedule != "random":
            fallen = math.sqrt(progress) if cfg.sigma_schedule == "sqrt" else progress
            t = round(high - 1 + (low - high + 1) * fallen)
        else:
            if cfg.sigma_anneal is not None:
                high = round(high + (cfg.sigma_anneal - high) * progress)
            t = int(numpy_rng(cfg.seed, i, "sigma").integers(low, max(high, low + 1)))
        return table[len(table) - 1 - t]

    def draw_background(self, i: int) -> int:
        """Return the index of the plain background of step `i`."""
        n = 1 if self.backgrounds is None else len(self.backgrounds)
        return int(numpy_rng(self.cfg.seed, i, "background").integers(n))

    def train_background(self, index: int) -> torch.Tensor | None:
        """Return the pixels (b * hw * hw, C) of plain background `index` behind the b own views, None without."""
        if self.backgrounds is None:
            return None
        if not self._train_backgrounds:
            pixels = [self.background(k, self.cfg.pose.rend_hw) for k in range(len(self.backgrounds))]
            self._train_backgrounds = [x.repeat(len(self.own), 1) for x in pixels if x is not None]
        return self._train_backgrounds[index]

    def _make_noise(self, first: int, n: int, draw: int = 0) -> torch.Tensor:
        """Return the noise (n, b, C, H, W) of n steps for the b own views; `draw` counts the attempts at a step."""
        steps = torch.arange(first, first + n, device=exact_device(self.adapter.device))
        noise = normal((self.cfg.batch_views, *self.adapter.data_shape), self.cfg.seed, steps, "noise", draw)
        return noise[:, self.own.start : self.own.stop].to(self.adapter.device)

    def conditions(self, cameras: list[pose.Camera]) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return the conditions (b, ...) of b cameras, and the negatives that `denoise` takes.

        These are for Perp-Neg. They are None without it, and where no camera has any.
        """
        if not self.cfg.pose.perp_neg:
            own = [self.cond[camera.view] for camera in cameras]
            return own[0] if len(own) == 1 else torch.cat(own), None
        cond, away, weights = [], [], []
        for positive, negative in map(pose.perp_neg_views, cameras):
            cond.append(reduce(add, (share * self.cond[view] for view, share in positive.items())))
            padded = [*negative.items(), *[(next(iter(positive)), 0.0)] * (2 - len(negative))]  # one batch for all
            away.append(torch.cat([self.cond[view] for view, _ in padded]))
            weights.append([weight for _, weight in padded])
        if not np.any(weights):
            return torch.cat(cond), None
        return torch.cat(cond), (torch.stack(away), to_device(np.array(weights, np.float32), self.adapter.device))

    def ask(self, cameras: list[pose.Camera]) -> rules.Ask:
        """Return the denoiser for the texts of b cameras."""
        cond, negatives = self.conditions(cameras)
        bad = torch.cat([self.bad[camera.view] for camera in cameras]) if self.bad else None
        return rules.Ask(self.adapter, cond, self.uncond, self.cfg.texts.scale, negatives, bad)

    def moment(self, i: int, sigma: float) -> rules.Moment:
        """Return what the rule is told of step `i` and its level of noise."""
        chance = numpy_rng(self.cfg.seed, i, "rule").uniform() if self.cfg.rule == "asd" else 0.0
        return rules.Moment(sigma, i / self.cfg.n_steps, chance)

    def noise_of(self, i: int, draw: int = 0) -> torch.Tensor:
        """Return the fresh noise (b, C, H, W) of step `i`; `draw` counts the attempts at the step."""
        return self._make_noise(i, 1, draw)[0] if draw else self.noise.of_step(i)

    def noise_at(self, cameras: list[pose.Camera], r: Rendering, i: int, draw: int = 0) -> torch.Tensor:
        """Return the noise (b, C, H, W) that step `i` adds to what b own cameras see, fresh or fixed to surfaces.

        `draw` counts the attempts at the step.
        """
        n, cfg = self.noise_of(i, draw), self.cfg
        if cfg.noise == "fresh":
            return n
        H, W = n.shape[2:]
        K, c2w = (np.array(x) for x in zip(*((camera.K(H, W), camera.c2w) for camera in cameras)))
        edge = cell_edge(cfg.pose.R, cfg.pose.fov_range[0], W)
        return surface_noise(r, K, c2w, edge, n, cfg.seed, draw)

    @torch.no_grad()
    def gradient(
        self, x: torch.Tensor, n: torch.Tensor, cameras: list[pose.Camera], sigma: float, i: int
    ) -> torch.Tensor:
        """Return the direction that step `i` chains (b, C, H, W) at b own renderings x, for the mean over all B views.

        n: (b, C, H, W) their noise.
        """
        ask = self.ask(cameras)
        g = self.clipped(self.rule(ask, x, n, self.moment(i, sigma)), i)
        self.n_calls = ask.n_calls
        return g if self.cfg.batch_views == 1 else g / self.cfg.batch_views

    def clipped(self, g: torch.Tensor, i: int) -> torch.Tensor:
        """Return the direction `g` of step `i`, cut as --score_clip says."""
        bounds = self.cfg.score_clip
        return g if bounds is None else rules.clipped(g, bounds, i / self.cfg.n_steps)

    def render_views(self, rays: Rays, bg_index: int) -> Rendering:
        """Render the own views of a step: a `Rendering` whose images (b, ...) have the edge that is trained on."""
        cfg = self.cfg
        bg = self.train_background(bg_index)
        r = render_ready(self.field, rays, bg, cfg.emptiness_scale, cfg.renderer)
        shape = (len(self.own), cfg.pose.rend_hw, cfg.pose.rend_hw)
        color = r.color.view(*shape, -1).permute(0, 3, 1, 2)
        return Rendering(color, *(x.view(shape) for x in r[1:]))

    def regulariser(self, r: Rendering, i: int) -> torch.Tensor:
        """Return the weighted emptiness and centre-depth losses of step `i`: the own views' part of a mean over B."""
        cfg = self.cfg
        late = i >= cfg.emptiness_step * cfg.n_steps
        weight = cfg.emptiness_weight * (cfg.emptiness_multiplier if late else 1)
        loss = weight * emptiness_loss(r.emptiness.flatten(1), r.n_samples.flatten(1)).sum()
        if cfg.depth_weight:
            loss = loss + cfg.depth_weight * centre_depth_loss(r.depth).sum()
        return loss / cfg.batch_views

    def step(self, i: int) -> Stats:
        """Take step `i`; return {sigma, score (RMS of the chained gradient), regulariser, opacity, calls, masked}.

        `calls` counts evaluations of the network per view. Where the score, the regulariser or the field's gradient is
        not finite, nothing changes, and `masked` is True.
        Nothing waits for the device, unless several processes share out the views: these wait for one another.
        """
        stats = self.apply(self.attempt(i))
        self.n_steps_taken = i + 1
        return stats

    def attempt(self, i: int, draw: int = 0) -> Attempt:
        """Compute the update of step `i`: the field gets its gradient. `draw` counts the attempts at the step."""
        (cameras, rays), sigma = self.views.of_step(i), self.draw_sigma(i)
        r = self.render_views(rays, self.draw_background(i))
        x = resize(r.color, self.adapter.data_shape[1:])
        g = self.gradient(x.detach(), self.noise_at(cameras, r, i, draw), cameras, sigma, i)
        loss = self.regulariser(r, i)
        self.field.zero_grad(set_to_none=True)
        # Here is the Jacobian: back-propagating g (by Eq. 16, or another rule) from the rendering x(theta) gives g . J,
        # J = dx / dtheta, without ever forming J. Minus, since the optimizer descends.
        torch.autograd.backward([x, loss], [-g, None])
        r = Rendering(*(each.detach() for each in r))
        return Attempt(i, draw, cameras, sigma, r, x.detach(), g, loss.detach())

    def apply(self, attempt: Attempt) -> Stats:
        """Update the field by an attempt, of which it has the gradient, where all of it is finite; as in `step`."""
        g, opacity = attempt.g, attempt.rendering.opacity
        square, loss, opaque = self._over_processes([g.square().sum(), attempt.loss, opacity.sum()])
        n_views = self.cfg.batch_views
        score = (square / (n_views * math.prod(g.shape[1:]))).sqrt()
        finite = all_finite([score, loss], [p.grad for p in self.field.parameters() if p.grad is not None])
        self._set_rates(attempt.i)
        self.optimizer.step_where(finite)
        return {
            "sigma": attempt.sigma,
            "score": score,
            "regulariser": loss,
            "opacity": opaque / (n_views * math.prod(opacity.shape[1:])),
            "calls": self.n_calls,
            "masked": ~finite,
        }

    def _set_rates(self, i: int) -> None:
        """Give the optimizer the learning rates of step `i`."""
        left = self.cfg.lr_end ** (i / max(1, self.cfg.n_steps - 1))
        for group, lr in zip(self.optimizer.param_groups, learning_rates(self.field, self.cfg)):
            group["lr"] = lr * left

    def retry(self, i: int) -> None:
        """Take step `i`, which was left out, again: with fresh noise, and then in float32 where that is more exact.

        A rule that adds no noise sees the field of some steps later. Raises NotFinite where its update is not finite.
        """
        again = "with fresh noise" if RULES[self.cfg.rule].noise else "some steps later"
        attempt, exact = self.attempt(i, draw=1), self.adapter.is_exact
        left_out = self.apply(attempt)["masked"]
        if left_out and not exact:
            note(f"step {i + 1}: its update is not finite {again} either; it is tried in float32")
            with self.adapter.in_float32():
                attempt, exact = self.attempt(i, draw=2), True
            left_out = self.apply(attempt)["masked"]
        if left_out:
            raise NotFinite(attempt, exact, again)

    def _over_processes(self, statistics: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sum the gradients of the field over all processes, and return such sums of statistics."""
        if self.processes.n == 1:
            return statistics
        parameters = [p for p in self.field.parameters() if p.grad is not None]
        sums = self.processes.summed([*(p.grad for p in parameters if p.grad is not None), *statistics])
        for p, total in zip(parameters, sums):
            p.grad = total
        return sums[len(parameters) :]

    # ------------------------------------------------------------------ checkpoints

    def save(self, root: str | Path, step: int) -> None:
        """Write the state after `step` steps below `root`."""
        meta = {LEFT_OUT: self.left_out.all(), OPTIONS: held(self.cfg)}
        state.save(root, step, self.field, self.optimizer, meta, self.cfg.ckpt_keep)

    def begin(self, found: Source) -> None:
        """Take the field of another run as the beginning of this one; notes say what differs."""
        if self.adapter.device.type == "meta":  # nothing is loaded there
            return
        for text in begin_from(self.field, load_field(found, self.adapter)[0]):
            note(f"--init {self.cfg.init}: {text}")

    def load(self, path: str | Path) -> int:
        """Restore the state of checkpoint folder `path`; return the number of steps taken."""
        return self.restore(*checkpoint.load(path))

    def restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> int:
        """Restore the state of a checkpoint; return the number of steps taken."""
        state.restore(self.field, self.optimizer, tensors, meta["step"])
        self.left_out, self.n_steps_taken = LeftOut(meta.get(LEFT_OUT, ())), meta["step"]
        return self.n_steps_taken


def refuse_unfit_options(cfg: SJCConfig, adapter: ScoreAdapter) -> None:
    """Raise UserError for options that do not fit the model or one another."""
    channels, levels = adapter.data_shape[0], len(adapter.sigmas)
    if cfg.vox.c != channels:
        raise UserError(f"--vox.c {cfg.vox.c}: this model's space has {channels} channels")
    refuse_large_grid("--vox.grid_size", cfg.vox.grid_size, channels, device_memory(adapter.device))
    for name, end in (("sigma_range", cfg.sigma_range[1]), ("sigma_anneal", cfg.sigma_anneal or 0)):
        if end > levels:
            raise UserError(f"--{name} ends at {end}: this model's table has {levels} entries")
    if cfg.depth_weight and cfg.pose.rend_hw < MIN_CENTRE:
        raise UserError(
            f"--pose.rend_hw {cfg.pose.rend_hw}: --depth_weight needs at least {MIN_CENTRE}, to have a centre"
        )


def new_adamax(field: VoxRF, cfg: SJCConfig) -> Adamax:
    """Return the optimizer of a field. It computes a step in one pass where the fused renderer is used."""
    update: Update = update_where
    if pick_march(cfg.renderer, field) is not reference.march:
        from voxnerf.fused.adamax import update_where as fused_update

        update = fused_update
    rates = learning_rates(field, cfg)
    return Adamax([{"params": [p], "lr": lr} for p, lr in zip(field.parameters(), rates)], update)


def learning_rates(field: VoxRF, cfg: SJCConfig) -> list[float]:
    """Return the learning rate of each parameter of a field in the first step."""
    own = {"bg": cfg.bg_lr, "density": cfg.density_lr or cfg.lr}
    return [own.get(name, cfg.lr) for name, _ in field.named_parameters()]


def ready(
    cfg: SJCConfig, device: torch.device | str, found: Any = None, processes: Processes | None = None
) -> tuple[SJC, int]:
    """Return (SJC, steps taken) of the current folder's run, its last checkpoint loaded.

    `found` is what `cfg.check_files` returned; None finds it here. Whatever can refuse the run has refused it by then.
    On the device "meta" no weights are loaded.
    """
    optimisation = SJC(cfg, make_adapter(cfg, device, found), processes)
    newest = checkpoint.load_newest("ckpt", cfg.ckpt_keep if optimisation.processes.first else None)
    if newest:
        return optimisation, optimisation.restore(*newest)
    if cfg.init is not None:
        optimisation.begin(cfg.source())
    return optimisation, 0


def optimise(optimisation: SJC, first_step: int = 0) -> Iterator[tuple[int, Stats]]:
    """Yield (steps taken, statistics) after each step up to the run's last.

    Steps that were left out are tried again some steps later. The statistics then say which, as `retried`; the first
    step is 1. A run that ended while it tried some begins with these: it yields `first_step`, and nothing but
    `retried`.
    Raises NotFinite where that does not help.
    """
    left_out, n = optimisation.left_out, optimisation.cfg.n_steps
    if known := left_out.retried(first_step, first_step == n, optimisation.retry):
        yield first_step, known
    for i in range(first_step, n):
        yield i + 1, left_out.follow(i, optimisation.step(i), i + 1 == n, optimisation.retry)
