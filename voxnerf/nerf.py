"""Training of a voxel radiance field on posed images (NeRF, arXiv 2003.08934, Eq. 6, on voxels).

    loss = mean over random pixels of |mean over the pixel's rays of render(ray) - pixel|^2

The grid grows from coarse to fine (as in DVGO, arXiv 2111.11215, section 4.2), is cropped to what
is occupied, and skips empty space by a mask (as in TensoRF, arXiv 2203.09517, section 4.5). Colours
begin the same from all sides, so that highlights shape no geometry. Each of these events is due at a
fraction of the run, its `progress` in [0, 1]; the constants at the top give these fractions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from my import checkpoint
from my.errors import UserError, note
from my.left_out import LEFT_OUT, LeftOut, NeverFinite
from my.script import OPTIONS, held
from my.seeds import torch_rng
from voxnerf import reference, state
from voxnerf.adam import Adam
from voxnerf.field import VoxRF, from_all_sides, make_field
from voxnerf.likeness import mse, psnr, ssim
from voxnerf.pixels import PixelCameras, Pixels
from voxnerf.render import CHUNK, averaged, pick_march, render_image, render_rays

if TYPE_CHECKING:
    from voxnerf.lens import Lens
    from voxnerf.scene import Scene

GROWTH = ((0.0, 0.25), (0.05, 0.5), (0.15, 0.75), (0.35, 1.0))  # (progress, share of model.grid_size)
HARMONICS = 0.15  # progress from which on growth makes colours view-dependent, if the configuration says so
MASKS = (0.04, 0.1, 0.2, 0.4, 0.6)  # progress at which the mask of empty space is computed again
WARM_UP = 100  # steps in which nothing is masked or cropped, even if the clock says that it is due
LR_FACTORS = {"density": 50.0, "color": 5.0}  # times the learning rate: a density begins far from where it must go
LR_DECAY = 0.1  # factor of the learning rate at the end of the run, reached exponentially
EMPTINESS_SCALE, EMPTINESS_WEIGHT = 10.0, 1e-4  # of the loss against fog: mean over rays of sum log(1 + scale w)
BETAS = (0.9, 0.99)  # of Adam
SPECK = 0.01  # a detached part with less than this share of all occupied voxels is masked, as a floater
MIN_SHARE = 0.01  # share of the views' rays that must pass through the field
AWAY = -0.5  # cameras whose mean cosine (see `PixelCameras.facing`) is below this look away from the field


class ModelOptions(Protocol):
    """The options of the field; `ModelConfig` of run_nerf.py says what they mean."""

    model_type: Literal["VoxRF"]
    bbox_len: float
    grid_size: int
    step_ratio: float
    density_shift: float
    ray_march_weight_thres: float
    c: Literal[3]


class NeRFOptions(Protocol):
    """The options of a training; `NeRFConfig` of run_nerf.py says what they mean."""

    @property
    def model(self) -> ModelOptions: ...

    view_dependent: bool
    renderer: Literal["auto", "fused", "reference"]
    n_epoch: int
    bs: int
    subpixels: int
    lr: float
    max_minutes: float | None
    test_every: int | None
    ckpt_every: float
    ckpt_minutes: float | None
    ckpt_keep: int
    seed: int


class View(NamedTuple):
    """One view of a scene: its picture, the rendering of it, and how near the two are."""

    name: str
    truth: np.ndarray  # (H, W, 3) uint8, also of the pixels that do not count
    picture: np.ndarray  # (H, W, 3) in [0, 1]
    depth: np.ndarray  # (H, W), world units
    psnr: float  # dB
    ssim: float  # at most 1; NaN for images too small to have one


class NeRF:
    """One training: a field, the images that shape it, its optimizer and its clock.

    `n_steps_taken` counts its steps. `left_out` knows those whose update was left out.

    Args:
        scene: the training views.
        device: where field, images and rays are.
        clock: returns monotonic seconds, for `max_minutes`.
    Raises UserError for a scene whose cameras do not see the field.
    """

    field: VoxRF
    optimizer: Adam

    def __init__(
        self,
        cfg: NeRFOptions,
        scene: Scene,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cfg, self.device, self.clock = cfg, torch.device(device), clock
        self.pixels = Pixels(scene, self.device)
        self.cameras = PixelCameras(scene.K, scene.c2w, self.device, scene.lenses)
        self.n_steps = math.ceil(cfg.n_epoch * len(self.pixels) / cfg.bs)
        self.started, self.minutes_before = clock(), 0.0
        events: list[tuple[float, float | None]] = [*GROWTH[1:], *((due, None) for due in MASKS)]
        self.schedule = sorted(events, key=lambda event: event[0])  # (progress, share of growth, or None for a mask)
        self.n_events = 0  # how many events of the schedule are over
        self.n_steps_taken, self.left_out = 0, LeftOut()
        b = cfg.model.bbox_len
        box = np.array([[-b] * 3, [b] * 3])
        self._refuse_elsewhere(box, scene)
        self._set_field(box, self._new_field(box, grid_shape(box, cfg.model.grid_size * GROWTH[0][1])))

    def _refuse_elsewhere(self, box: np.ndarray, scene: Scene) -> None:
        """Raise UserError if next to no ray of the views passes through `box` (2, 3), or if cameras look away from it.

        The first happens where a scene is in other units, the second where its poses are in other axes. Cameras that
        stand in the box may look outwards, as those of a room do: these get a note only.
        """
        facing, inside = self.cameras.facing(), self.cameras.share_inside(box[1, 0])
        if facing < AWAY and inside < 0.5:
            raise UserError(
                "the cameras look away from the field: are the poses in the axes of OpenCV or COLMAP? "
                "transform_matrix is in OpenGL's, looking along -z: turn the signs of its 2nd and 3rd "
                "columns (y and z); if it is in these axes already, centre the poses on the object"
            )
        if facing < AWAY:
            note(
                "the cameras stand in the field and look away from its middle: that is right for a room seen from "
                "within; else turn the signs of the 2nd and 3rd columns (y and z) of transform_matrix"
            )
        share = self.cameras.share_through(torch.as_tensor(box), scene.sizes, scene.usable)
        if share < MIN_SHARE:
            distance = self.cameras.eyes.norm(dim=-1)
            raise UserError(
                f"{share:.1%} of the training views' rays pass through the field, a cube of half edge "
                f"{self.cfg.model.bbox_len:g} round the origin, and the cameras are {distance.min():.3g} "
                f"to {distance.max():.3g} away from there: centre and scale the poses of the scene, or "
                "give a larger --model.bbox_len"
            )

    def _new_field(self, box: np.ndarray, shape: Sequence[int], view_dependent: bool = False) -> VoxRF:
        """Return a new field in `box` (2, 3), of `shape` (X, Y, Z) voxels."""
        m = self.cfg.model
        return make_field(
            m.model_type,
            box,
            shape,
            m.c,
            m.step_ratio,
            m.density_shift,
            m.ray_march_weight_thres,
            view_dependent=view_dependent,
            generator=torch_rng(self.cfg.seed, 0, "field"),
        ).to(self.device)

    def _set_field(self, box: np.ndarray, field: VoxRF) -> None:
        """Take a field in `box` (2, 3), and a new optimizer for it: both, or nothing where memory runs out."""
        optimizer = new_adam(field, self.cfg.lr, self.cfg.renderer)
        self.box, self.field, self.optimizer = box, field, optimizer  # the box as given: in the field it is rounded

    # ------------------------------------------------------------------ schedule

    @property
    def minutes(self) -> float:
        """Wall-clock minutes that this training has taken, including those before it was resumed."""
        return self.minutes_before + (self.clock() - self.started) / 60

    def progress(self, step: int) -> float:
        """Return how much of the run is over after `step` steps, in [0, 1]: with max_minutes, the clock counts too."""
        by_time = self.minutes / self.cfg.max_minutes if self.cfg.max_minutes else 0.0
        return min(1.0, max(step / self.n_steps, by_time))

    def keep_to_schedule(self, step: int, progress: float) -> None:
        """Do the events that are due by `progress`, and set the learning rates.

        In the first WARM_UP steps, an event also waits for the number of steps that it would take without a clock.
        """
        for due, share in self.schedule[self.n_events :]:
            if progress < due or step < min(due * self.n_steps, WARM_UP):
                break
            find_empty_space(self.field) if share is None else self.grow(share, due >= HARMONICS)
            self.n_events += 1
        for name, group in zip(state.parameter_names(self.field), self.optimizer.param_groups, strict=True):
            group["lr"] = self.cfg.lr * LR_FACTORS.get(name, 1.0) * LR_DECAY**progress

    @torch.no_grad()
    def grow(self, share: float, harmonics: bool = True) -> None:
        """Crop the field to its mask, and resample it to a grid of about (grid_size * share)^3 voxels.

        With `harmonics` it becomes view-dependent, if the configuration says so.
        """
        old, old_box = self.field, self.box
        box = old_box if old.alpha_mask is None else occupied_box(old.alpha_mask, old_box)
        shape = grid_shape(box, self.cfg.model.grid_size * share)
        field = self._new_field(box, shape, self.cfg.view_dependent and harmonics)
        for (name, new), before in zip(field.named_parameters(), old.parameters()):
            given = resample(before, old_box, box, shape) if new.ndim == 5 else before
            new.copy_(from_all_sides(given) if name == "color" and new.shape != given.shape else given)
        if old.alpha_mask is not None:
            find_empty_space(field)
        self._set_field(box, field)

    # ------------------------------------------------------------------ training

    def _rng(self, step: int, stream: str, draw: int) -> torch.Generator:
        """Return the generator of a stream of random numbers in a step; `draw` counts the attempts at the step."""
        return torch_rng(self.cfg.seed, step, stream + f"/{draw}" * (draw > 0))

    def draw_batch(self, step: int, draw: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return this step's rays_o, rays_d (bs * n, 3), and the pixels' colours and backgrounds (bs, 3).

        There are n = subpixels^2 rays per pixel, side by side. If the images have alpha, each pixel gets a random
        background, since white fog cannot be seen before a white one. `draw` counts the attempts at the step.
        """
        pixel = self.pixels.draw(self.cfg.bs, self._rng(step, "pixels", draw))
        view, y, x = self.pixels.locate(pixel)
        dy, dx = self.draw_subpixels(step, draw)
        rays = self.cameras.rays(view, y[:, None] + dy, x[:, None] + dx)
        rays_o, rays_d = (each.flatten(0, 1) for each in rays)
        colors = self.pixels.colors[pixel].float() / 255
        if self.pixels.opaque:
            return rays_o, rays_d, colors, torch.ones_like(colors)
        bg = torch.rand(colors.shape, generator=self._rng(step, "background", draw))
        bg = bg.to(self.device, non_blocking=self.device.type == "cuda")
        return rays_o, rays_d, colors + (bg - 1) * (1 - self.pixels.alpha[pixel, None].float() / 255), bg

    def draw_subpixels(self, step: int, draw: int = 0) -> torch.Tensor:
        """Return where this step's rays pass their pixels: (2, bs, n) or (2, 1, 1), y and x off the centre, in pixels.

        A single ray passes through the centre. n = s^2 rays pass through the s x s squares of a pixel, each at a random
        point of its own square. `draw` counts the attempts at the step.
        """
        s = self.cfg.subpixels
        if s == 1:
            return torch.zeros(2, 1, 1, device=self.device)
        square = torch.arange(s * s)
        corner = torch.stack([square // s, square % s])[:, None]  # (2, 1, n)
        inside = torch.rand(2, self.cfg.bs, s * s, generator=self._rng(step, "subpixels", draw))
        return ((corner + inside) / s - 0.5).to(self.device, non_blocking=self.device.type == "cuda")

    def step(self, step: int, progress: float) -> dict[str, torch.Tensor]:
        """Take one step; return {loss, psnr (dB, of the batch), masked}, tensors on the device.

        Where the loss or the field's gradient is not finite, the field stays as it is, and `masked` is True. Nothing
        waits for the device.
        """
        self.keep_to_schedule(step, progress)
        stats = self.update(step)
        self.n_steps_taken = step + 1
        return stats

    def update(self, step: int, draw: int = 0) -> dict[str, torch.Tensor]:
        """Update the field by the rays of a step; returns what `step` does. `draw` counts the attempts at the step."""
        rays_o, rays_d, colors, bg = self.draw_batch(step, draw)
        n = self.cfg.subpixels**2
        r = render_rays(self.field, rays_o, rays_d, bg.repeat_interleave(n, dim=0), EMPTINESS_SCALE, self.cfg.renderer)
        loss = F.mse_loss(r.color.unflatten(0, (-1, n)).mean(dim=1), colors)
        self.optimizer.zero_grad(set_to_none=True)
        total = loss + EMPTINESS_WEIGHT * r.emptiness.mean()
        total.backward()
        finite = self.optimizer.finite(total.detach())
        self.optimizer.step_where(finite)
        return {"loss": loss.detach(), "psnr": psnr(loss.detach()), "masked": ~finite}

    def retry(self, step: int) -> None:
        """Take a step, which was left out, again: with fresh rays, at the learning rates of the last step.

        Raises NeverFinite where its update is not finite then.
        """
        if self.update(step, draw=1)["masked"]:
            raise NeverFinite(step, "with fresh rays")

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def render(
        self, K: np.ndarray | torch.Tensor, c2w: np.ndarray | torch.Tensor, H: int, W: int, lens: Lens | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the picture (H, W, 3) in [0, 1] that a camera sees, and the depth (H, W), world units.

        K, c2w: (3, 3) intrinsics and (4, 4) camera-to-world pose; without a lens the camera is a pinhole.
        """
        s = self.cfg.subpixels
        r = render_image(self.field, K, c2w, H, W, subpixels=s, chunk=CHUNK, renderer=self.cfg.renderer, lens=lens)
        picture, depth = averaged(r.color.clamp(0, 1), r.depth, n=s)
        return picture.permute(1, 2, 0).cpu().numpy(), depth.cpu().numpy()

    def view(self, scene: Scene, i: int) -> View:
        """Return the `View` of image `i` of a scene, at its size and through its lens."""
        image = scene.images[i]
        usable = None if scene.usable is None else scene.usable[i]
        lens = None if scene.lenses is None else scene.lenses[i]
        H, W = scene.sizes[i]
        picture, depth = self.render(scene.K[i], scene.c2w[i], H, W, lens)
        rendered, truth = torch.from_numpy(picture), image / 255
        return View(
            scene.names[i],
            image.numpy(),
            picture,
            depth,
            psnr(mse(rendered, truth, usable)).item(),
            ssim(rendered, truth, usable),
        )

    def views(self, scene: Scene) -> Iterator[View]:
        """Yield a `View` for each image of a scene."""
        for i in range(len(scene.names)):
            yield self.view(scene, i)

    def evaluate(self, scene: Scene) -> list[dict[str, Any]]:
        """Return [{name, psnr (dB), ssim}] of the views of a scene."""
        return [{"name": view.name, "psnr": view.psnr, "ssim": view.ssim} for view in self.views(scene)]

    def depth_range(self, c2w: np.ndarray | torch.Tensor) -> tuple[float, float]:
        """Return the nearest and the farthest depth that depth images of a camera at c2w (4, 4) tell apart.

        They are those of the ball of radius `model.bbox_len` round the origin, world units.
        """
        distance, reach = float(np.linalg.norm(c2w[:3, 3])), self.cfg.model.bbox_len
        return max(0.0, distance - reach), distance + reach

    # ------------------------------------------------------------------ checkpoints

    def save(self, root: str | Path, step: int) -> None:
        """Write the state after `step` steps below `root`."""
        meta = {
            "box": self.box.tolist(),
            "shape": self.field.density.shape[:1:-1],
            "n_events": self.n_events,
            "masked": self.field.alpha_mask is not None,
            "view_dependent": self.field.view_dependent,
            "minutes": self.minutes,
            LEFT_OUT: self.left_out.all(),
            OPTIONS: held(self.cfg),  # type: ignore[arg-type]  # the protocol names only what a field reads of them
        }
        state.save(root, step, self.field, self.optimizer, meta, self.cfg.ckpt_keep)

    def load(self, path: str | Path) -> int:
        """Restore the state of checkpoint folder `path`; return the number of steps taken.

        Raises what `checkpoint.load` and `state.restore` raise.
        """
        return self.restore(*checkpoint.load(path))

    def restore(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> int:
        """Restore the state of a checkpoint; return the number of steps taken.

        Raises what `state.restore` raises, and UserError for a checkpoint of another command.
        """
        checkpoint.refuse_other("run_nerf.py", tensors, meta)
        box = np.array(meta["box"])
        self._set_field(box, self._new_field(box, meta["shape"], meta["view_dependent"]))
        if meta["masked"]:
            self.field.update_alpha_mask()  # a mask of the right shape, to be overwritten
        state.restore(self.field, self.optimizer, tensors, meta["step"])
        self.n_events, self.minutes_before, self.started = meta["n_events"], meta["minutes"], self.clock()
        self.n_steps_taken, self.left_out = meta["step"], LeftOut(meta.get(LEFT_OUT, ()))
        return self.n_steps_taken


def new_adam(field: VoxRF, lr: float, renderer: str) -> Adam:
    """Return Adam for a field: `OccupiedAdam` where the fused renderer is used."""
    if pick_march(renderer, field) is reference.march:
        return Adam(field, lr, BETAS)
    from voxnerf.fused.adam import OccupiedAdam

    return OccupiedAdam(field, lr, BETAS)


def optimise(nerf: NeRF, first_step: int = 0) -> Iterator[tuple[int, float, dict[str, torch.Tensor]]]:
    """Yield (steps taken, progress, statistics) after each step until progress is 1; a new run takes one at least.

    Steps that were left out are tried again some steps later, and `retried` is added to the statistics, as
    `LeftOut.follow` does. A run that ended while it tried some begins with these: it yields `first_step`, and nothing
    but `retried`.
    Raises NeverFinite where that does not help.
    """
    step, progress = first_step, nerf.progress(first_step)
    if known := nerf.left_out.retried(step, progress >= 1, nerf.retry):
        yield step, progress, known
    while progress < 1 or step == 0:
        stats = nerf.step(step, progress)
        step += 1
        progress = nerf.progress(step)
        yield step, progress, nerf.left_out.follow(step - 1, stats, progress >= 1, nerf.retry)


def find_empty_space(field: VoxRF) -> None:
    """Set the field's mask. A field that is empty everywhere gets none, since a mask would keep it empty."""
    field.update_alpha_mask(SPECK)
    if field.alpha_mask is not None and not field.alpha_mask.any():
        field.alpha_mask = None


# ---------------------------------------------------------------- grids


def grid_shape(box: np.ndarray, n: float) -> list[int]:
    """Return the voxel counts [X, Y, Z] of a box (2, 3), so that it has about n^3 voxels, which are nearly cubes."""
    edges = np.asarray(box[1]) - np.asarray(box[0])
    voxel = np.prod(edges) ** (1 / 3) / n
    return [max(1, round(edge / voxel)) for edge in edges]


def occupied_box(mask: torch.Tensor, box: np.ndarray) -> np.ndarray:
    """Return the smallest box (2, 3) round the voxels that are 1 in `mask` (1, 1, Z, Y, X), a part of `box` (2, 3).

    The mask is also 1 for the neighbours of occupied voxels, which leaves a margin of one voxel.
    """
    part = np.array(box, dtype=np.float64)
    for axis, size in enumerate(mask.shape[:1:-1]):  # X, Y, Z
        others = [d for d in range(5) if d != 4 - axis]
        held = mask.sum(dim=others).nonzero()[:, 0]
        lo, hi = box[:, axis]
        part[:, axis] = [lo + (hi - lo) * i / size for i in (held[0].item(), held[-1].item() + 1)]
    return part


def resample(grid: torch.Tensor, box: np.ndarray, new_box: np.ndarray, new_shape: Sequence[int]) -> torch.Tensor:
    """Return a cell-centred `grid` (1, C, Z, Y, X) in `box`, interpolated at the voxel centres of a new grid.

    The new grid has `new_shape` (X, Y, Z) voxels in `new_box`; both boxes are (2, 3), world units. Beyond
    the outermost centres of the old grid the outermost values go on.
    """
    axes = []
    for (lo, hi), (new_lo, new_hi), n in zip(box.T, new_box.T, new_shape):
        centres = new_lo + (new_hi - new_lo) * (np.arange(n) + 0.5) / n
        axes.append(torch.as_tensor((centres - lo) / (hi - lo) * 2 - 1, dtype=grid.dtype, device=grid.device))
    x, y, z = axes
    at = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)[None]  # (1, Z, Y, X, xyz)
    return F.grid_sample(grid, at, mode="bilinear", padding_mode="border", align_corners=False)
