"""Time and memory of the fused renderer, as ratios to the plain PyTorch reference taken in the same run.

    python -m benchmarks.render --out render.md

Run it in the project's folder. It times forward and backward at SJC's setting (a 100^3 grid, 64x64 rays, 4 channels)
on three fields: the one that a run begins with, one that has learned an object from its pictures, and the same without
the thin fog around the object. Then it times the fused renderer over grids and images, and counts the samples that lie
in occupied space. It takes some minutes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from my import config, script
from my.errors import RunError, run_main
from my.machine import device_name
from my.run_dir import refuse_output, write_atomic

if TYPE_CHECKING:
    import torch

    from voxnerf.field import VoxRF

    Rays = tuple[torch.Tensor, torch.Tensor]  # rays_o, rays_d

ROOT = Path(__file__).resolve().parent.parent
GRID, IMAGE, CHANNELS, EMPTINESS_SCALE = 100, 64, 4, 10.0
N_PICTURES = 60  # pictures from which the trained field learns its object
RENDERERS = ("fused", "reference")


class RenderConfig(script.OnDevice):
    """All options of benchmarks.render."""

    out: str | None = Field(None, description="Markdown file to write")
    repeats: int = Field(9, gt=0, description="times that each renderer is timed, in turns; the median counts")
    threads: int | None = Field(None, gt=0, description="CPU threads, default PyTorch's own")
    n_steps: int = Field(600, gt=0, description="training steps of the trained field")
    grids: list[int] = Field([50, 100, 200, 300], description="grids of the table")
    images: list[int] = Field([32, 64, 128, 256], description="images of the table")
    memory_of: Literal["fused", "reference"] | None = Field(
        None, description="only print the peak memory of one renderer, in MB; needs a process of its own"
    )


# ---------------------------------------------------------------- fields and cameras


def new_field(grid: int, device: torch.device) -> VoxRF:
    """Return the field that a run of Stable Diffusion begins with, at `grid`^3."""
    from my.seeds import torch_rng
    from voxnerf.field import make_field

    return make_field(
        "V_SD",
        [[-1] * 3, [1] * 3],
        grid,
        CHANNELS,
        blend_bg_texture=True,
        bg_texture_hw=4,
        generator=torch_rng(0, 0, "field"),
    ).to(device)


def trained_field(n_steps: int, device: torch.device) -> VoxRF:
    """Return a field that has learned an object of the toy world from its pictures, as run_nerf.py would learn it."""
    import torch
    from tqdm import trange

    import pose
    from my.seeds import numpy_rng, torch_rng
    from toyworld.render import compose, coverage_maps
    from voxnerf.nerf import LR_FACTORS
    from voxnerf.render import render_image

    field = new_field(GRID, device)
    cameras = [pose.train_camera(numpy_rng(0, i, "camera"), 1.5, (40, 70), "sjc") for i in range(N_PICTURES)]
    maps = coverage_maps("duck", cameras, IMAGE)  # (n, 5, IMAGE, IMAGE), the last one its coverage
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": 0.02 * LR_FACTORS.get(name, 1.0)} for name, p in field.named_parameters()]
    )
    for step in trange(n_steps, desc="training"):
        i = step % N_PICTURES
        bg = torch.rand(CHANNELS, generator=torch_rng(0, step, "background"))  # another one each step: no fog hides
        coverage = maps[i, 4:] / 255
        picture = torch.cat([compose(maps[i], "blue", bg[:3]), coverage + (1 - coverage) * bg[3]]).to(device)
        r = render_image(
            field, cameras[i].K(IMAGE, IMAGE), cameras[i].c2w, IMAGE, IMAGE, bg.to(device).expand(IMAGE**2, CHANNELS)
        )
        optimizer.zero_grad(set_to_none=True)
        (r.color - picture).square().mean().backward()
        optimizer.step()
    return field


def emptied(field: VoxRF) -> VoxRF:
    """Return a copy of `field` without density where run_nerf.py's mask would hide it."""
    import copy

    import torch

    from voxnerf.nerf import SPECK

    new = copy.deepcopy(field)
    new.update_alpha_mask(SPECK)
    with torch.no_grad():
        new.density[new.alpha_mask == 0] = -1000.0
    new.alpha_mask = None
    return new


def resized(field: VoxRF, grid: int) -> VoxRF:
    """Return a copy of `field`, resampled to `grid`^3 voxels."""
    import torch

    from voxnerf.field import make_field
    from voxnerf.nerf import resample

    box = field.aabb.double().cpu().numpy()
    new = make_field("V_SD", box, grid, CHANNELS, density_shift=field.density_shift).to(field.aabb.device)
    with torch.no_grad():
        new.d_scale.copy_(field.d_scale)
        for name in ("density", "color"):
            getattr(new, name).copy_(resample(getattr(field, name), box, box, (grid,) * 3))
    return new


def camera_rays(field: VoxRF, image: int) -> Rays:
    """Return the rays (rays_o, rays_d) of a test view of `image` x `image` pixels."""
    import torch

    import pose
    from voxnerf.rays import pixel_rays

    camera = pose.spiral(20, 1.5, 1.5, fov=60)[10]
    return pixel_rays(image, image, camera.K(image, image), camera.c2w, dtype=torch.float64, device=field.aabb.device)


# ---------------------------------------------------------------- measures


def forward_backward(field: VoxRF, rays: Rays, renderer: str) -> None:
    """Render, and take the gradient of a loss on colour, depth and emptiness."""
    from voxnerf.render import render_rays

    field.zero_grad(set_to_none=True)
    r = render_rays(field, *rays, emptiness_scale=EMPTINESS_SCALE, renderer=renderer)
    (r.color.square().mean() + r.depth.mean() + r.emptiness.mean()).backward()


def seconds(field: VoxRF, rays: Rays, renderer: str) -> float:
    """Return the wall-clock time of one forward and backward pass."""
    import torch

    if rays[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    forward_backward(field, rays, renderer)
    if rays[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(field: VoxRF, rays: Rays, renderers: Sequence[str], repeats: int) -> dict[str, float]:
    """Return the median time of each renderer, measured in turns after one pass that does not count."""
    for name in renderers:
        seconds(field, rays, name)
    taken: dict[str, list[float]] = {name: [] for name in renderers}
    for _ in range(repeats):
        for name in renderers:
            taken[name].append(seconds(field, rays, name))
    return {name: sorted(times)[len(times) // 2] for name, times in taken.items()}


def occupied_samples(field: VoxRF, rays: Rays) -> tuple[int, int]:
    """Return how many samples of the rays lie in the box, and how many of these are occupied and in sight."""
    import torch

    from voxnerf.fused.kernels import T_MIN, TAU_MIN
    from voxnerf.rays import through
    from voxnerf.reference import sample_points

    in_box = in_sight = 0
    for o, d in zip(*(x.split(512) for x in rays)):
        through_box = through(field, o, d)
        with torch.no_grad():
            _, points, inside = sample_points(field, through_box)
            tau = torch.zeros(inside.shape, device=points.device)
            tau[inside] = field.sigma(points[inside]) * field.step_size
            T = torch.exp(tau - tau.cumsum(dim=1))
        in_box += int(through_box.n_samples.sum())
        in_sight += int(((tau > TAU_MIN) & (T > T_MIN)).sum())
    return in_box, in_sight


def peak_memory(renderer: str, device: torch.device) -> float:
    """Return the memory, MB, that a forward and backward pass at SJC's setting adds at its peak (Linux, or CUDA)."""
    import torch

    small, field = new_field(8, device), new_field(GRID, device)
    forward_backward(small, camera_rays(small, 8), renderer)  # load code first
    rays = camera_rays(field, IMAGE)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        forward_backward(field, rays, renderer)
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    forward_backward(field, rays, renderer)
    return status("VmHWM") - before


def status(key: str) -> float:
    """Return an entry of /proc/self/status, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RunError(f"/proc/self/status has no {key}; peak memory is measured on Linux only")


# ---------------------------------------------------------------- the report


def compare(field: VoxRF, cfg: RenderConfig) -> list[int | str]:
    """Return a row of the table: samples in the box, occupied samples, reference ms, fused ms, ratio."""
    rays = camera_rays(field, IMAGE)
    times = median_seconds(field, rays, RENDERERS, cfg.repeats)
    in_box, in_sight = occupied_samples(field, rays)
    ms = [1000 * times[name] for name in reversed(RENDERERS)]
    return [in_box, in_sight, f"{ms[0]:.0f}", f"{ms[1]:.1f}", f"{ms[0] / ms[1]:.1f}"]


def table(headings: list[str], rows: Iterable[Sequence[int | str]]) -> str:
    """Return lines of a Markdown table."""
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def memory_table(cfg: RenderConfig) -> str:
    """Return the table of peak memory, each renderer measured in a process of its own."""
    mb = {}
    for name in RENDERERS:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.render",
                "--memory_of",
                name,
                "--device",
                cfg.device,
                *(["--threads", str(cfg.threads)] if cfg.threads else []),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        if done.returncode:
            raise RunError(f"measuring memory: {done.stderr.strip().splitlines()[-1]}")
        mb[name] = float(done.stdout.split()[-1])
    return table(
        ["peak memory, MB", "reference", "fused", "fused / reference"],
        [
            [
                "forward and backward",
                f"{mb['reference']:.0f}",
                f"{mb['fused']:.0f}",
                f"{mb['fused'] / mb['reference']:.2f}",
            ]
        ],
    )


def scaling_table(field: VoxRF, cfg: RenderConfig) -> str:
    """Return the table of the fused renderer's time over grids and images."""
    from tqdm import tqdm

    rows: list[list[int | str]] = []
    for grid in tqdm(cfg.grids, desc="grids"):
        scaled = resized(field, grid)
        for image in cfg.images:
            rays = camera_rays(scaled, image)
            t = median_seconds(scaled, rays, ["fused"], max(1, cfg.repeats // 3))["fused"]
            in_box, in_sight = occupied_samples(scaled, rays)
            rows.append(
                [f"{grid}^3", f"{image}^2", in_box, in_sight, f"{1000 * t:.1f}", f"{1e9 * t / max(in_sight, 1):.0f}"]
            )
    return table(["grid", "rays", "samples in the box", "occupied, in sight", "ms", "ns per occupied sample"], rows)


def hardware(device: torch.device) -> str:
    """Return a line that says what was measured on."""
    import torch

    if device.type == "cuda":
        return f"{device_name(device)}, PyTorch {torch.__version__}"
    return f"{device_name(device)}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the report."""
    cfg = config.load(RenderConfig, argv, prog="python -m benchmarks.render", doc=__doc__, config_file=None)
    if cfg.out is not None:
        refuse_output("--out", cfg.out)
    import torch

    device = script.pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.memory_of:
        print(f"{peak_memory(cfg.memory_of, device):.1f}")
        return
    trained = trained_field(cfg.n_steps, device)
    headings = [
        "forward and backward",
        "samples in the box",
        "occupied, in sight",
        "reference, ms",
        "fused, ms",
        "ratio",
    ]
    fields = {"random start": new_field(GRID, device), "trained": trained, "trained, its fog removed": emptied(trained)}
    rows = [[name, *compare(field, cfg)] for name, field in fields.items()]
    text = (
        "\n\n".join(
            ["# Renderer", hardware(device), table(headings, rows), memory_table(cfg), scaling_table(trained, cfg)]
        )
        + "\n"
    )
    print(text)
    if cfg.out is not None:
        write_atomic(cfg.out, text)


if __name__ == "__main__":
    run_main(main)
