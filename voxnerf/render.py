"""Volume rendering of a voxel field.

Along a ray, samples i = 0, 1, ... lie at t_i = t_min + i step < t_max. With optical thickness
tau_i = sigma_i step,

    alpha_i = 1 - exp(-tau_i),    T_i = prod_{j<i} (1 - alpha_j) = exp(-sum_{j<i} tau_j),
    w_i = T_i alpha_i,            sum_i w_i = 1 - T_end,

colour = sum w_i c_i + T_end bg, and depth = sum w_i t_i + T_end 10 (arXiv 2212.00774, section 5).
Example: two samples of thickness ln 2 and ln 4 have alpha = 1/2 and 3/4, T = 1 and 1/2, hence
w = 1/2 and 3/8 and T_end = 1/8; colours 1 and 2 before background 8 give 1/2 + 3/4 + 1 = 9/4.

A march adds up the samples along the rays. There are two: `voxnerf/fused/` is fast, and `voxnerf/reference.py` is
plain PyTorch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from my.errors import UserError, first_line, note
from voxnerf import reference
from voxnerf.field import VoxRF
from voxnerf.lens import Lens
from voxnerf.rays import Rays, pixel_rays, through
from voxnerf.reference import MarchFunction

BG_DEPTH = 10.0  # depth of the background, world units
EMPTY = 1 / 255  # opacity below which nothing is there
CHUNK = 16384  # rays at a time, for images that need no gradient
RENDERERS = ("auto", "fused", "reference")


class Rendering(NamedTuple):
    """What n rays see: (n, ...) from `render_rays`, images from `render_image`."""

    color: torch.Tensor  # (n, C) or (C, H, W), background included
    depth: torch.Tensor  # (n,) or (H, W), world units along the ray, BG_DEPTH for background
    opacity: torch.Tensor  # (n,) or (H, W), sum of weights
    emptiness: torch.Tensor  # (n,) or (H, W), sum over samples of log(1 + s w)
    n_samples: torch.Tensor  # (n,) or (H, W) int32, samples inside the box


def render_rays(
    field: VoxRF,
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    bg: torch.Tensor | float | None = None,
    emptiness_scale: float = 0.0,
    renderer: str = "auto",
) -> Rendering:
    """Render n rays of world-space origins and unit directions (n, 3); the rest is as in `render_ready`."""
    return render_ready(field, through(field, rays_o, rays_d), bg, emptiness_scale, renderer)


def render_ready(
    field: VoxRF,
    rays: Rays,
    bg: torch.Tensor | float | None = None,
    emptiness_scale: float = 0.0,
    renderer: str = "auto",
) -> Rendering:
    """Render n rays. A ray that misses the field's box shows the background, at opacity 0.

    Args:
        bg: background colour, (n, C) or a constant; None is the field's own.
        emptiness_scale: s of `Rendering.emptiness`.
        renderer: one of RENDERERS, see `pick_march`.
    """
    march = pick_march(renderer, field)
    light, depth, opacity, emptiness = march(field, rays, emptiness_scale)
    if bg is None:
        bg = field.background(rays.d)
    clear = 1 - opacity
    return Rendering(light + clear[:, None] * bg, depth + clear * BG_DEPTH, opacity, emptiness, rays.n_samples)


def pick_march(renderer: str, field: VoxRF) -> MarchFunction:
    """Return the `march` function of a renderer for a field; its kind, dtype and device count, its values do not.

    auto is fused for float32 on a CPU, and on CUDA where `voxnerf.fused.selftest` passes; elsewhere it is the
    reference, and one line says why, except for other dtypes and devices. No CPU is tested when a command starts: the
    project's tests prove the CPU. What is found out is found once per process, since every rendering asks.
    Raises ValueError for a name that is not in RENDERERS and for a dtype that the renderer cannot use, and UserError
    where the fused renderer is asked for and cannot be used.
    """
    if renderer not in RENDERERS:
        raise ValueError(f"renderer must be one of {', '.join(RENDERERS)}, got {renderer!r}")
    single, fits = field.density.dtype == torch.float32, device_type(field) in ("cpu", "cuda")
    if renderer == "reference" or (renderer == "auto" and not (single and fits)):
        refuse_timing(field, "--renderer reference")
        return reference.march
    if not single:
        raise ValueError(f"the fused renderer is for float32 fields, this one is {field.density.dtype}")
    problem = fused_problem(field)
    if problem and renderer == "fused":
        raise UserError(f"--renderer fused: {problem}; use --renderer reference")
    if problem:
        say_slow(problem)
        refuse_timing(field, f"the fused renderer cannot be used ({problem})")
        return reference.march
    from voxnerf.fused.march import march

    return march


def refuse_timing(field: VoxRF, why: str) -> None:
    """Raise UserError where results must not depend on timing, and the reference is used on a GPU: its gradients do."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    if device_type(field) == "cuda":
        raise UserError(f"--deterministic True needs the fused renderer on CUDA, and {why}; leave one of the two out")
    if device_type(field) == "mps":
        raise UserError("--deterministic True: mps has no such results; leave it out, or give --device cpu")


def device_type(field: VoxRF) -> str:
    """Return the type of the device that a field is on, such as "cuda"."""
    return field.density.device.type


def fused_problem(field: VoxRF) -> str:
    """Return in one line why the fused renderer cannot render a float32 field, "" where it can.

    On the device meta, where nothing is rendered, Warp need only start.
    """
    on = device_type(field)
    if on not in ("cpu", "cuda", "meta"):
        return f"it runs on cpu and cuda, not on {on}"
    problem = start_problem()
    if problem or on != "cuda":
        return problem
    from voxnerf.fused import selftest

    words = selftest.verdict(field.density.device, selftest.Kind.of(field))
    return f"it does not work on {field.density.device}: {words}" if words else ""


@functools.cache
def start_problem() -> str:
    """Start Warp, once per process, and return in one line why it does not start, "" where it does."""
    try:
        import voxnerf.fused.march  # noqa: F401 (this import is what may fail)
        from voxnerf.fused.launch import start

        start()
    except Exception as error:  # noqa: BLE001 (a package, a library or a driver is missing: errors are of many kinds)
        return f"the package warp-lang does not start here: {first_line(error)}"
    return ""


@functools.cache
def say_slow(problem: str) -> None:
    """Say on stderr, once per process, that the reference is used in place of the fused renderer, and why."""
    note(f"the slow renderer is used, --renderer reference: for the fused one, {problem}")


def render_image(
    field: VoxRF,
    K: np.ndarray | torch.Tensor,
    c2w: np.ndarray | torch.Tensor,
    H: int,
    W: int,
    bg: torch.Tensor | float | None = None,
    subpixels: int = 1,
    chunk: int | None = None,
    emptiness_scale: float = 0.0,
    renderer: str = "auto",
    lens: Lens | None = None,
) -> Rendering:
    """Render an image of H x W pixels at `subpixels` x `subpixels` rays per pixel.

    Args:
        K, c2w: (3, 3) intrinsics and (4, 4) camera-to-world pose.
        bg: background colour, (H*s*W*s, C) or a constant; None is the field's own.
        chunk: rays rendered at a time, for large images without gradients; None is all.
        emptiness_scale, renderer: as in `render_rays`.
        lens: None is a pinhole.
    Returns:
        a `Rendering` of the fine grid: color (C, H*s, W*s), the others (H*s, W*s).
    """
    rays_o, rays_d = pixel_rays(H, W, K, c2w, subpixels, torch.float64, field.aabb.device, lens)
    n = len(rays_o)
    parts = []
    for i in range(0, n, chunk or n):
        part = slice(i, i + (chunk or n))
        part_bg = bg[part] if isinstance(bg, torch.Tensor) and bg.ndim == 2 else bg
        parts.append(render_rays(field, rays_o[part], rays_d[part], part_bg, emptiness_scale, renderer))
    color, *others = (torch.cat(x) for x in zip(*parts))
    shape = (H * subpixels, W * subpixels)
    return Rendering(color.T.reshape(-1, *shape), *(x.view(shape) for x in others))


def averaged(color: torch.Tensor, *maps: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Return an image's colour (C, H, W) and maps (H, W) averaged over squares of n x n: (C, H/n, W/n), (H/n, W/n)."""
    return [F.avg_pool2d(color[None], n)[0], *(F.avg_pool2d(x[None, None], n)[0, 0] for x in maps)]


def without_background(pictures: torch.Tensor, opacity: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """Return the own colours, in [0, 1], of what pictures P (..., 3, H, W) in [0, 1] show before `behind` (3, H, W).

    With opacities o (..., 1, H, W) in [0, 1] these are (P - (1 - o) behind) / o: where o is 0, nothing sensible.
    """
    own = pictures - (1 - opacity) * behind
    return own.clamp(min=0).minimum(opacity) / opacity.clamp(min=EMPTY)
