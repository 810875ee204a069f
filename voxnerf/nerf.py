"""Training of a voxel radiance field on posed images (NeRF, arXiv 2003.08934, Eq. 6, on voxels).

    loss = mean over random pixels of |mean over the pixel's rays of render(ray) - pixel|^2

The grid grows from coarse to fine (as in DVGO, arXiv 2111.11215, section 4.2), is cropped to what
is occupied, and skips empty space by a mask (as in TensoRF, arXiv 2203.09517, section 4.5). Colours
begin the same from all sides, so that highlights shape no geometry. All of it happens at fractions
of the run, given at the top: its `progress` in [0, 1].
"""

import math
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from my import checkpoint
from my.errors import UserError, note
from my.seeds import torch_rng
from voxnerf import reference
from voxnerf.field import from_all_sides, make_field
from voxnerf.likeness import mse, psnr, ssim
from voxnerf.pixels import PixelCameras, Pixels
from voxnerf.render import pick_march, render_image, render_rays

GROWTH = ((0.0, 0.25), (0.05, 0.5), (0.15, 0.75), (0.35, 1.0))  # (progress, share of model.grid_size)
HARMONICS = 0.15  # progress at which growth makes colours depend on the direction, if they are to
MASKS = (0.04, 0.1, 0.2, 0.4, 0.6)  # progress at which the empty space is found anew
WARM_UP = 100  # steps before which nothing is masked or cropped, however slow they are
LR_FACTORS = {"density": 50.0, "color": 5.0}  # of the learning rate; a density far below its softplus has far to go
LR_DECAY = 0.1  # factor of the learning rate by the end, reached exponentially
EMPTINESS_SCALE, EMPTINESS_WEIGHT = 10.0, 1e-4  # of mean over rays of sum log(1 + scale w), against fog
BETAS = (0.9, 0.99)  # of Adam
SPECK = 0.01  # share of what is occupied, below which a detached part is taken for a floater and masked
MIN_SHARE = 0.01  # of the views' rays, that the field must be in the way of
AWAY = -0.5  # mean cosine between where cameras look and where the field's middle is, below which they look away
CHUNK = 16384  # rays at a time where no gradient is needed


class View(NamedTuple):
    """One view of a scene as it is, as it is rendered, and how near the two are."""

    name: str
    truth: np.ndarray  # (H, W, 3) uint8, with the pixels that do not count
    picture: np.ndarray  # (H, W, 3) in [0, 1]
    depth: np.ndarray  # (H, W), world units
    psnr: float  # dB
    ssim: float  # at most 1; NaN for images too small to have one


class NeRF:
    """One training: a field, the images that shape it, its optimizer and its clock.

    Args:
        cfg: a `NeRFConfig`.
        scene: the `Scene` of training views.
        device: torch device of field, images and rays.
        clock: returns monotonic seconds, for `max_minutes`.
    Raises UserError for a scene that is not where the field is.
    """

    def __init__(self, cfg, scene, device="cpu", clock=time.monotonic):
        self.cfg, self.device, self.clock = cfg, torch.device(device), clock
        self.pixels = Pixels(scene, self.device)
        self.cameras = PixelCameras(scene.K, scene.c2w, self.device, scene.lenses)
        self.n_steps = math.ceil(cfg.n_epoch * len(self.pixels) / cfg.bs)
        self.started, self.minutes_before = clock(), 0.0
        self.schedule = sorted([*GROWTH[1:], *((due, None) for due in MASKS)], key=lambda event: event[0])
        self.n_events = 0  # of the schedule's, that are over
        b = cfg.model.bbox_len
        box = np.array([[-b] * 3, [b] * 3])
        self._refuse_elsewhere(box, scene)
        self._set_field(box, grid_shape(box, cfg.model.grid_size * GROWTH[0][1]))

    def _refuse_elsewhere(self, box, scene):
        """Raise UserError if next to no ray of the views passes through `box` (2, 3), or if cameras look away from it.

        The first is a scene in other units, the second one of other axes. Cameras that stand in the box may look
        outwards, as those of a room do: these are told of only.
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
        share = self.cameras.share_through(torch.as_tensor(box).to(self.device), scene.sizes, scene.usable)
        if share < MIN_SHARE:
            distance = self.cameras.eyes.norm(dim=-1)
            raise UserError(
                f"{share:.1%} of the training views' rays pass through the field, a cube of half edge "
                f"{self.cfg.model.bbox_len:g} round the origin, and the cameras are {distance.min():.3g} "
                f"to {distance.max():.3g} away from there: centre and scale the poses of the scene, or "
                "give a larger --model.bbox_len"
            )

    def _set_field(self, box, shape, view_dependent=False):
        """Make a new field in `box` (2, 3), of `shape` (X, Y, Z) voxels, and the optimizer that goes with it."""
        m = self.cfg.model
        self.box = box  # as given: in the field it is rounded
        self.field = make_field(
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
        self.names = [name for name, _ in self.field.named_parameters()]
        self.optimizer = new_adam(self.field, self.cfg.lr, self.cfg.renderer)

    # ------------------------------------------------------------------ schedule

    @property
    def minutes(self):
        """Wall-clock minutes that this training has taken, those before it was resumed included."""
        return self.minutes_before + (self.clock() - self.started) / 60

    def progress(self, step):
        """Return how much of the run is over after `step` steps, in [0, 1]; under max_minutes, by the clock too."""
        by_time = self.minutes / self.cfg.max_minutes if self.cfg.max_minutes else 0.0
        return min(1.0, max(step / self.n_steps, by_time))

    def keep_to_schedule(self, step, progress):
        """Do what is due by `progress`, and set the learning rates; the clock alone makes nothing due at first."""
        for due, share in self.schedule[self.n_events :]:
            if progress < due or step < min(due * self.n_steps, WARM_UP):
                break
            self.find_empty_space() if share is None else self.grow(share, due >= HARMONICS)
            self.n_events += 1
        for name, group in zip(self.names, self.optimizer.param_groups, strict=True):
            group["lr"] = self.cfg.lr * LR_FACTORS.get(name, 1.0) * LR_DECAY**progress

    @torch.no_grad()
    def grow(self, share, harmonics=True):
        """Replace the field by itself, cropped to its mask, on a grid of (grid_size * share)^3 voxels.

        With `harmonics` it becomes view-dependent, if the configuration says so.
        """
        old, old_box = self.field, self.box
        box = old_box if old.alpha_mask is None else occupied_box(old.alpha_mask, old_box)
        shape = grid_shape(box, self.cfg.model.grid_size * share)
        self._set_field(box, shape, self.cfg.view_dependent and harmonics)
        for (name, new), given in zip(self.field.named_parameters(), old.parameters()):
            if new.ndim == 5:
                given = resample(given, old_box, box, shape)
            new.copy_(from_all_sides(given) if name == "color" and new.shape != given.shape else given)
        if old.alpha_mask is not None:
            self.find_empty_space()

    def find_empty_space(self):
        """Set the field's mask; a field that is empty everywhere gets none, since it could never fill."""
        self.field.update_alpha_mask(SPECK)
        if not self.field.alpha_mask.any():
            self.field.alpha_mask = None

    # ------------------------------------------------------------------ training

    def draw_batch(self, step):
        """Return this step's rays_o, rays_d (bs * n, 3), n a pixel, and the pixels' colours and backgrounds (bs, 3).

        The rays of a pixel are side by side. Images with alpha stand before another random colour at every pixel: fog
        that hides before white does not there.
        """
        pixel = self.pixels.draw(self.cfg.bs, torch_rng(self.cfg.seed, step, "pixels"))
        view, y, x = self.pixels.locate(pixel)
        dy, dx = self.draw_subpixels(step)
        rays = self.cameras.rays(view, y[:, None] + dy, x[:, None] + dx)
        rays_o, rays_d = (each.flatten(0, 1) for each in rays)
        colors = self.pixels.colors[pixel].float() / 255
        if self.pixels.opaque:
            return rays_o, rays_d, colors, torch.ones_like(colors)
        bg = torch.rand(colors.shape, generator=torch_rng(self.cfg.seed, step, "background"))
        bg = bg.to(self.device, non_blocking=True)
        return rays_o, rays_d, colors + (bg - 1) * (1 - self.pixels.alpha[pixel, None].float() / 255), bg

    def draw_subpixels(self, step):
        """Return where this step's rays pass their pixels: dy, dx (bs, n) or (1, 1), pixels off the centre.

        A single one passes the centre; n = s^2 pass a pixel's s x s squares, each somewhere in its own.
        """
        s = self.cfg.subpixels
        if s == 1:
            return torch.zeros(2, 1, 1, device=self.device)
        square = torch.arange(s * s)
        corner = torch.stack([square // s, square % s])[:, None]  # (2, 1, n)
        inside = torch.rand(2, self.cfg.bs, s * s, generator=torch_rng(self.cfg.seed, step, "subpixels"))
        return ((corner + inside) / s - 0.5).to(self.device, non_blocking=True)

    def step(self, step, progress):
        """Take one step; return {loss, psnr (dB, of the batch)}, tensors on the device."""
        self.keep_to_schedule(step, progress)
        rays_o, rays_d, colors, bg = self.draw_batch(step)
        n = self.cfg.subpixels**2
        r = render_rays(self.field, rays_o, rays_d, bg.repeat_interleave(n, dim=0), EMPTINESS_SCALE, self.cfg.renderer)
        loss = F.mse_loss(r.color.unflatten(0, (-1, n)).mean(dim=1), colors)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + EMPTINESS_WEIGHT * r.emptiness.mean()).backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "psnr": psnr(loss.detach())}

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def render(self, K, c2w, H, W, lens=None):
        """Return the picture (H, W, 3) in [0, 1] and the depth (H, W) of a camera, world units, as arrays."""
        s = self.cfg.subpixels
        r = render_image(self.field, K, c2w, H, W, subpixels=s, chunk=CHUNK, renderer=self.cfg.renderer, lens=lens)
        picture, depth = (F.avg_pool2d(x[None], s)[0] for x in (r.color.clamp(0, 1), r.depth[None]))
        return picture.permute(1, 2, 0).cpu().numpy(), depth[0].cpu().numpy()

    def view(self, scene, i):
        """Return the `View` of image `i` of a `Scene`, at its size and through its lens."""
        image, usable, lens = (None if each is None else each[i] for each in (scene.images, scene.usable, scene.lenses))
        picture, depth = self.render(scene.K[i], scene.c2w[i], *scene.sizes[i], lens)
        rendered, truth = torch.from_numpy(picture), image / 255
        return View(
            scene.names[i],
            image.numpy(),
            picture,
            depth,
            psnr(mse(rendered, truth, usable)).item(),
            ssim(rendered, truth, usable),
        )

    def views(self, scene):
        """Yield a `View` for each image of a `Scene`."""
        for i in range(len(scene.names)):
            yield self.view(scene, i)

    def evaluate(self, scene):
        """Return [{name, psnr (dB), ssim}] of the views of a `Scene`."""
        return [{"name": view.name, "psnr": view.psnr, "ssim": view.ssim} for view in self.views(scene)]

    def depth_range(self, c2w):
        """Return the nearest and farthest depth that depth images tell apart: the first box's inscribed ball."""
        distance, reach = float(np.linalg.norm(c2w[:3, 3])), self.cfg.model.bbox_len
        return max(0.0, distance - reach), distance + reach

    # ------------------------------------------------------------------ checkpoints

    def save(self, root, step):
        """Write the state after `step` steps below `root`."""
        tensors = {f"field/{k}": v for k, v in self.field.state_dict().items()}
        meta = {
            "box": self.box.tolist(),
            "shape": self.field.density.shape[:1:-1],
            "n_events": self.n_events,
            "masked": self.field.alpha_mask is not None,
            "view_dependent": self.field.view_dependent,
            "minutes": self.minutes,
        }
        checkpoint.save(root, step, tensors | checkpoint.flatten_optimizer(self.optimizer, self.names), meta)

    def load(self, path):
        """Restore the state of checkpoint folder `path`; return the number of steps taken."""
        tensors, meta = checkpoint.load(path)
        self._set_field(np.array(meta["box"]), meta["shape"], meta["view_dependent"])
        if meta["masked"]:
            self.field.update_alpha_mask()  # a mask of the right shape, to be overwritten
        field = {k.removeprefix("field/"): v for k, v in tensors.items() if k.startswith("field/")}
        checkpoint.check(field, {k: v.shape for k, v in self.field.state_dict().items()})
        self.field.load_state_dict(field)
        checkpoint.restore_optimizer(self.optimizer, self.names, tensors)
        self.n_events, self.minutes_before, self.started = meta["n_events"], meta["minutes"], self.clock()
        return meta["step"]


def new_adam(field, lr, renderer):
    """Return Adam for a field, each parameter a group of its own: the fused renderer's, where that is used."""
    if pick_march(renderer, field.density) is reference.march:
        return torch.optim.Adam([{"params": [p]} for p in field.parameters()], lr, BETAS)
    from voxnerf.adam import OccupiedAdam

    return OccupiedAdam(field, lr, BETAS)


def optimise(nerf, first_step=0):
    """Yield (steps taken, progress, statistics) after each step, at least one in all, until progress is 1."""
    step, progress = first_step, nerf.progress(first_step)
    while progress < 1 or step == 0:
        stats = nerf.step(step, progress)
        step += 1
        progress = nerf.progress(step)
        yield step, progress, stats


# ---------------------------------------------------------------- grids


def grid_shape(box, n):
    """Return the voxel counts [X, Y, Z] of a box (2, 3): cubes, about n^3 of them."""
    edges = np.asarray(box[1]) - np.asarray(box[0])
    voxel = np.prod(edges) ** (1 / 3) / n
    return [max(1, round(edge / voxel)) for edge in edges]


def occupied_box(mask, box):
    """Return the box (2, 3) of the voxels that `mask` (1, 1, Z, Y, X) holds, a part of its `box` (2, 3).

    The mask holds the neighbours of what is occupied too, which leaves a margin of one voxel.
    """
    part = np.array(box, dtype=np.float64)
    for axis, size in enumerate(mask.shape[:1:-1]):  # X, Y, Z
        others = [d for d in range(5) if d != 4 - axis]
        held = mask.sum(dim=others).nonzero()[:, 0]
        lo, hi = box[:, axis]
        part[:, axis] = [lo + (hi - lo) * i / size for i in (held[0].item(), held[-1].item() + 1)]
    return part


def resample(grid, box, new_box, new_shape):
    """Return a cell-centred `grid` (1, C, Z, Y, X) in `box`, interpolated at the voxels of another.

    The other has `new_shape` (X, Y, Z) voxels in `new_box`; both boxes are (2, 3), world units. Beyond
    the outermost centres the outermost values go on.
    """
    axes = []
    for (lo, hi), (new_lo, new_hi), n in zip(box.T, new_box.T, new_shape):
        centres = new_lo + (new_hi - new_lo) * (np.arange(n) + 0.5) / n
        axes.append(torch.as_tensor((centres - lo) / (hi - lo) * 2 - 1, dtype=grid.dtype, device=grid.device))
    x, y, z = axes
    at = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], dim=-1)[None]  # (1, Z, Y, X, xyz)
    return F.grid_sample(grid, at, mode="bilinear", padding_mode="border", align_corners=False)
