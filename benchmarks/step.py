"""Time of a whole step of text to 3D beside its network alone, and what a step would do on a GPU.

    python -m benchmarks.step --out step.json

Run it in the project's folder. It times steps of the presets mini and ideal, and on CUDA of a full-size Stable
Diffusion 1.5 with random weights, in turns with the guided call of diffusers' UNet alone. It then counts what a step
would do on a CUDA device that is only pretended. Marks that are missed are said.
"""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from pydantic import Field

from benchmarks.render import hardware, table
from benchmarks.sd_denoise import write_random, write_shapes
from my import config, script
from my.errors import run_main
from my.run_dir import refuse_output, write_atomic
from options.sjc import SJCConfig

if TYPE_CHECKING:
    import torch

    from benchmarks.pretend import Machine
    from sjc import SJC

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = {
    "sjc.block_flags": 2,
    "sjc.march": 1,
    "sjc.march_backward": 6,  # two gradients and the flags are filled, the march goes back, and d_scale is two sums
    "sjc.adamax": 4,  # one per parameter: density, colour, d_scale, background
}  # kernels that the operators of the fused renderer launch on CUDA
PARTS = ("render", "network", "backward", "optimizer")
WARM = 25  # turns that do not count: until then networks may be called in another way, see `families.calls`
BLOCK = 10  # steps in a row per measurement on CUDA, where a single one would begin with an idle device
FULL = "full"
GB = 1e9
N_STEPS = 10_000  # of the published settings


class StepConfig(script.OnDevice):
    """All options of benchmarks.step."""

    out: str | None = Field(None, description="JSON file to write")
    models: list[Literal["mini", "ideal", "full"]] = Field(
        ["mini", "ideal", "full"],
        description="what gives the score; full is Stable Diffusion 1.5 with random weights, which is timed on CUDA "
        "only",
    )
    repeats: int = Field(31, gt=0, description="times that the step and the network are timed, in turns")
    pretended: bool = Field(True, description="count what a step would do on a pretended CUDA device")
    operators: int = Field(0, ge=0, description="operators to list that launch most outside of the UNet")
    threads: int | None = Field(None, gt=0, description="CPU threads, default PyTorch's own")


@dataclass
class Mark:
    """A measured number beside the most that it should be."""

    what: str
    value: float
    most: float
    unit: str = ""

    def __str__(self) -> str:
        verdict = "pass" if self.value <= self.most else "MISS"
        return f"{verdict}: {self.what}: {self.value:.4g}{self.unit}, at most {self.most:g}{self.unit}"


@dataclass
class Report:
    """What is printed and written."""

    on: str
    timed: dict[str, dict[str, Any]] = field(default_factory=dict)
    counted: dict[str, dict[str, Any]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)


# ---------------------------------------------------------------- the runs


def run_options(model: str, folder: Path, write: Callable[[Path], None], **others: Any) -> SJCConfig:
    """Return the configuration of a run: a preset's, or the published one with a checkpoint that `write` writes."""
    if model == FULL:
        path = folder / f"{write.__name__}.safetensors"
        if not path.exists():
            write(path)
        return SJCConfig(sd={"checkpoint": str(path)}, **others)
    return config.load(
        SJCConfig,
        ["--preset", model],
        prog="python -m benchmarks.step",
        doc=__doc__,
        presets_dir=ROOT / "presets",
        config_file=None,
    ).model_copy(update=others)


def built(cfg: SJCConfig, device: torch.device) -> SJC:
    """Return the SJC of a configuration on a device."""
    from adapt import make_adapter
    from sjc import SJC

    return SJC(cfg, make_adapter(cfg, device, cfg.check_files()))


def guided_unet(optimisation: SJC) -> Callable[[int], Any] | None:
    """Return a call of diffusers' UNet on the batch of a guided step, None where the model has no UNet."""
    import torch

    unet, x = getattr(optimisation.adapter, "unet", None), optimisation.adapter.data_shape
    if unet is None:
        return None
    weight = next(unet.parameters())
    noisy = torch.zeros(2, *x, device=weight.device, dtype=weight.dtype)
    t = torch.full((2,), 500, device=weight.device)
    cond = torch.cat([optimisation.uncond, next(iter(optimisation.cond.values()))]).to(weight.dtype)

    def call(_: int) -> Any:
        amp = getattr(optimisation.adapter, "amp", None)
        with torch.no_grad(), torch.autocast(weight.device.type, amp) if amp else contextlib.nullcontext():
            return unet(noisy, t, cond).sample

    return call


# ---------------------------------------------------------------- time


class Clock:
    """Seconds of named spans: by events on CUDA, so that measuring waits for nothing, else by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """Return a moment."""
        if not self.cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def over(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        """Return f, timed as `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = f(*args, **kwargs)
            self.spans.append((name, start, self.now()))
            return result

        return timed

    def taken(self) -> dict[str, float]:
        """Return {name: seconds} of the spans since the last call; it waits for the device."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        total: dict[str, float] = {}
        for name, start, end in self.spans:
            seconds = start.elapsed_time(end) / 1000 if self.cuda else end - start
            total[name] = total.get(name, 0.0) + seconds
        self.spans.clear()
        return total


@contextlib.contextmanager
def timed_parts(optimisation: SJC, clock: Clock) -> Iterator[None]:
    """Time the PARTS of steps."""
    import torch

    with contextlib.ExitStack() as stack:
        for owner, attribute, name in (
            (optimisation, "render_views", "render"),
            (optimisation.adapter, "_denoise", "network"),
            (torch.autograd, "backward", "backward"),
            (optimisation.optimizer, "step_where", "optimizer"),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, clock.over(name, getattr(owner, attribute))))
        yield


def timed(optimisation: SJC, repeats: int) -> dict[str, Any]:
    """Return the times of a step, its parts and its network alone, ms: medians of turns, and half the spread."""
    import torch

    device = optimisation.adapter.device
    clock, unet, block = Clock(device), guided_unet(optimisation), BLOCK if device.type == "cuda" else 1
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    turns = []
    for turn in range(-WARM, repeats):
        first = (turn + WARM) * block
        clock.over("step", repeated)(optimisation.step, range(first, first + block))
        if unet:
            clock.over("unet", repeated)(unet, range(block))
        if turn >= 0:
            turns.append({name: 1000 * s / block for name, s in clock.taken().items()})
        clock.taken()
    with timed_parts(optimisation, clock):
        parts = []
        for i in range(repeats):
            clock.over("step", optimisation.step)(i)
            parts.append({name: 1000 * s for name, s in clock.taken().items()})
    out: dict[str, Any] = {"step": summary([turn["step"] for turn in turns])}
    if unet:
        out["unet"] = summary([turn["unet"] for turn in turns])
        out["ratio"] = summary([turn["step"] / turn["unet"] for turn in turns])
    out["parts"] = {name: summary([part[name] for part in parts]) for name in PARTS}
    out["parts"]["rest"] = summary([part["step"] - sum(part[name] for name in PARTS) for part in parts])
    of_process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return out | {"peak_gb": (torch.cuda.max_memory_allocated() if clock.cuda else of_process) / GB}


def repeated(f: Callable[[int], Any], numbers: Iterable[int]) -> None:
    """Call f with each number."""
    for i in numbers:
        f(i)


def summary(values: Sequence[float]) -> list[float]:
    """Return [median, first quartile, third quartile]."""
    if len(values) < 2:
        return [values[0]] * 3
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


# ---------------------------------------------------------------- what a step would do


@contextlib.contextmanager
def sections(optimisation: SJC, machine: Machine) -> Iterator[None]:
    """Count what the UNet, the renderer and its gradient, the optimizer and the decoder do under their names."""
    import torch

    def within(name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with machine.section(name):
                return f(*args, **kwargs)

        return call

    owners: list[tuple[Any, str, str]] = [
        (optimisation, "render_views", "renderer"),
        (torch.autograd, "backward", "renderer"),
        (optimisation.optimizer, "step_where", "optimizer"),
        (optimisation.adapter, "decode", "decoder"),
    ]
    if hasattr(optimisation.adapter, "unet"):
        owners.append((optimisation.adapter.unet, "forward", "unet"))
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in owners:
            stack.enter_context(mock.patch.object(owner, attribute, within(name, getattr(owner, attribute))))
        yield


def counted(cfg: SJCConfig) -> dict[str, Any]:
    """Return what a step does on the pretended device, and the memory of set-up, step and view, GB."""
    import pose
    from benchmarks.pretend import DEVICE, pretended_cuda, weightless

    fused = mock.patch("voxnerf.render.fused_problem", lambda field: "")  # no self-test can pass there
    with fused, pretended_cuda(LAUNCHES) as machine, weightless():
        optimisation = built(cfg, DEVICE)
        ready = machine.counts
        with sections(optimisation, machine):
            optimisation.step(0)
            step = machine.reset()
            optimisation.step(1)
            view = machine.reset()
            with mock.patch("torch.cuda.Event"), mock.patch("torch.cuda.current_stream"):
                optimisation.view(pose.spiral(4)[1])
    outside = [(n, name) for (section, name), n in step.operators.items() if section != "unet"]
    return {
        "waits": [f"{n} x {wait}" for wait, n in sorted(Counter(map(str, step.waits)).items())],
        "launches": dict(step.launches),
        "launches_outside": sum(n for section, n in step.launches.items() if section != "unet"),
        "bytes_outside": sum(n for section, n in step.bytes_moved.items() if section != "unet"),
        "flops": dict(step.flops),
        "flops_per_unet": step.flops.total() / step.flops["unet"] if step.flops["unet"] else None,
        "operators_outside": sorted(outside, reverse=True),
        "peak_gb": {"set-up": ready.peak / GB, "step": step.peak / GB, "view": view.peak / GB},
    }


# ---------------------------------------------------------------- the report


def judge(report: Report, cuda: bool) -> None:
    """Add the marks of what was measured."""
    mini, ideal, full = (report.timed.get(name) for name in ("mini", "ideal", FULL))
    if mini and not cuda:
        report.marks.append(Mark("step of mini by diffusers' guided UNet", mini["ratio"][0], 1.0, "x"))
    if ideal and not cuda:
        report.marks.append(Mark("step of ideal", ideal["step"][0], 4.0, " ms"))
    if full:
        report.marks.append(Mark("step of full by diffusers' guided UNet", full["ratio"][0], 1.15, "x"))
        report.marks.append(Mark("memory of the GPU, of full", full["peak_gb"], 4.0, " GB"))
    for name, most in ((FULL, 4.0), (f"{FULL}, --low_vram True", 3.0)):
        counts = report.counted.get(name)
        if counts:
            report.marks += [
                Mark(f"lines of {name} that wait for the device", len(counts["waits"]), 0),
                Mark(f"floating-point operations of {name} outside of UNet and renderer", rest_of(counts), 0.1, "%"),
                Mark(f"launches per step of {name} outside of the UNet", counts["launches_outside"], 100),
                Mark(f"estimated peak of {name}, with decoding", max(counts["peak_gb"].values()), most, " GB"),
            ]


def rest_of(counts: dict[str, Any]) -> float:
    """Return the floating-point operations outside of UNet and renderer, percent of those of the UNet."""
    flops = counts["flops"]
    return 100 * sum(n for name, n in flops.items() if name not in ("unet", "renderer")) / flops["unet"]


def text_of(report: Report, operators: int) -> str:
    """Return the report as Markdown."""

    def cell(values: Sequence[float], digits: int = 2) -> str:
        return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} to {values[2]:.{digits}f})"

    blocks = ["# A step", report.on]
    if report.timed:
        names = ["step", "unet", "ratio", *PARTS, "rest"]
        rows = [
            [model, *(cell((t | t["parts"])[name]) if name in t | t["parts"] else "" for name in names)]
            + [f"{t['step'][0] * N_STEPS / 60_000:.1f}", f"{t['peak_gb']:.2f}"]
            for model, t in report.timed.items()
        ]
        heads = ["step, ms", "UNet alone, ms", "step / UNet", *(f"{name}, ms" for name in (*PARTS, "rest"))]
        blocks.append("Median, and first to third quartile:")
        blocks.append(table(["model", *heads, f"minutes of {N_STEPS} steps", "peak, GB"], rows))
    if report.counted:
        rows = [
            [
                model,
                str(len(c["waits"])),
                str(c["launches"].get("unet", 0)),
                str(c["launches_outside"]),
                f"{c['bytes_outside'] / 1e6:.1f}",
                f"{c['flops_per_unet']:.5f}" if c["flops_per_unet"] else "",
                *(f"{c['peak_gb'][name]:.2f}" for name in ("set-up", "step", "view")),
            ]
            for model, c in report.counted.items()
        ]
        heads = ["waits", "launches of the UNet", "launches outside", "MB moved outside", "operations / UNet's"]
        peaks = [f"estimated peak of {name}, GB" for name in ("set-up", "step", "view")]
        blocks += ["On a pretended CUDA device, per step:", table(["model", *heads, *peaks], rows)]
        blocks += ["\n".join(f"- {model} waits: {w}" for model, c in report.counted.items() for w in c["waits"])]
        if operators:
            for model, c in report.counted.items():
                listed = ", ".join(f"{name} {n}" for n, name in c["operators_outside"][:operators])
                blocks.append(f"{model}, launches outside of the UNet: {listed}")
    return "\n\n".join(filter(None, [*blocks, "\n".join(map(str, report.marks))])) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the report."""
    cfg = config.load(StepConfig, argv, prog="python -m benchmarks.step", doc=__doc__, config_file=None)
    if cfg.out is not None:
        refuse_output("--out", cfg.out)
    import torch

    device = script.pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    report = Report(hardware(device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in cfg.models:
            if model != FULL or device.type == "cuda":
                optimisation = built(run_options(model, folder, write_random), device)
                report.timed[model] = timed(optimisation, cfg.repeats)
                del optimisation
        if cfg.pretended:
            for model in cfg.models:
                report.counted[model] = counted(run_options(model, folder, write_shapes))
                if model == FULL:
                    low = run_options(model, folder, write_shapes, low_vram=True)
                    report.counted[f"{model}, --low_vram True"] = counted(low)
    judge(report, device.type == "cuda")
    text = text_of(report, cfg.operators)
    print(text)
    if cfg.out is not None:
        marks = [vars(mark) | {"pass": mark.value <= mark.most} for mark in report.marks]
        write_atomic(cfg.out, json.dumps(vars(report) | {"marks": marks}, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
