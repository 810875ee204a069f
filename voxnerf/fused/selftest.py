"""Whether the fused march computes on a device what the reference computes there: tried on a small field, and kept.

The optimizers that go with it are tried too.

`auto` is the fused renderer on CUDA only where this test passes. On a CPU it is not run at the start of a command,
since the tests of the project prove the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import warp as wp

from my import nvidia, plain_files
from my.errors import RunError, first_line, is_out_of_memory, no_stderr, note
from my.run_dir import write_atomic
from voxnerf import adamax, reference
from voxnerf.adam import Adam
from voxnerf.field import VoxRF
from voxnerf.fused import adamax as fused_adamax
from voxnerf.fused import march as fused
from voxnerf.fused.adam import OccupiedAdam
from voxnerf.fused.launch import start
from voxnerf.rays import Rays, through
from voxnerf.reference import MarchFunction

SIZE = (16, 12, 9)  # voxels X, Y, Z of the field
N_RAYS = 200
EMPTINESS_SCALE = 10.0
OUTPUTS = ("color", "depth", "opacity", "emptiness")
GRADIENTS = ("density", "color", "d_scale")
OUTPUT_TOLERANCE = 2e-5  # of the largest value, but at least of 1
GRADIENT_TOLERANCE = 1e-4  # of the largest value
MASKED = " with a mask"  # ends the name of what was found on the field with a mask
SUM_TOLERANCE = 1e-6  # of the sum of the magnitudes of the terms
CACHE = "sjc_selftest.json"  # beside Warp's kernels: {conditions: verdict}
MAX_KEPT = 50  # verdicts in that file
SOURCES = (
    "fused/*.py",
    "reference.py",
    "field.py",
    "sh.py",
    "rays.py",
    "adam.py",
    "adamax.py",
    "finite.py",
)  # below voxnerf/: what a verdict is about


class Kind(NamedTuple):
    """What the kernels of a march depend on. A mask is not part of it: a field may get one at any time."""

    field: type[VoxRF]
    channels: int
    view_dependent: bool
    exact: bool = False  # gradients are sums of whole numbers, see `voxnerf.fused.march.march`

    @classmethod
    def of(cls, field: VoxRF) -> Kind:
        """Return the kind of a march through a field."""
        exact = field.density.is_cuda and torch.are_deterministic_algorithms_enabled()
        return cls(type(field), field.c, field.view_dependent, exact)

    def __str__(self) -> str:
        """Return it in words."""
        more = ", view-dependent" * self.view_dependent + ", deterministic" * self.exact
        return f"{self.field.__name__}, channels {self.channels}{more}"


class Difference(NamedTuple):
    """How far the fused march is from the reference, and how far it may be."""

    largest: float
    allowed: float

    @property
    def fits(self) -> bool:
        """Whether the difference is allowed; one that is NaN or infinite is not."""
        return self.largest <= self.allowed < float("inf")


class Outcome(NamedTuple):
    """What a run of the self-test found."""

    verdict: str  # "" where the fused renderer is right, else one line that says what is wrong
    differences: dict[str, Difference]  # {what: difference}; empty where the march did not come to an end
    seconds: float  # compilation included

    def in_words(self) -> str:
        """Return in one line the verdict or the largest differences, those with a mask among them, and the seconds."""
        took = f"{self.seconds:.1f} s, compilation included"
        if self.verdict:
            return f"{self.verdict}; {took}"
        most: dict[str, float] = {}
        for what, difference in self.differences.items():
            name = what.removesuffix(MASKED)
            most[name] = max(most.get(name, 0.0), difference.largest)
        worst = max(d.largest / d.allowed for d in self.differences.values() if d.allowed)
        words = ", ".join(f"{name} {largest:.1e}" for name, largest in most.items())
        return f"passed, {worst:.0%} of what is allowed; largest differences {words}; {took}"


# ---------------------------------------------------------------- the verdict


@functools.cache
def verdict(device: torch.device, kind: Kind) -> str:
    """Return "" where the fused renderer can be used for a kind of field on a device, else one line that says why not.

    It is found once per process. An earlier process may have found it, under the same `conditions`. Raises RunError
    where the test left the device unusable.
    """
    problem = cuda_problem(device)
    if problem:
        return problem
    kept = read_verdicts().get(conditions(device, kind))
    if kept is not None:
        return kept
    note(f"testing the fused renderer on {device} once; compiling its kernels for that takes some seconds")
    with no_stderr():  # the verdict says in one line what Warp says in many; doctor.py --selftest True shows them
        return run(device, kind).verdict


def run(device: torch.device, kind: Kind) -> Outcome:
    """Run the self-test now, and keep its verdict for `verdict` of later processes; memory that ran out is not kept.

    Raises RunError where the device cannot be used any more: CUDA refuses all work after some failures.
    """
    began, found, lasting = time.perf_counter(), {}, True
    try:
        start()
        found = differences(device, kind)
        words = verdict_on(found)
    except Exception as error:  # noqa: BLE001 (a compiler, a driver or a kernel fails: errors are of many kinds)
        words = f"{type(error).__name__}: {first_line(error)}"
        lasting = not (is_out_of_memory(error) or "Failed to allocate" in str(error))  # the latter are Warp's words
    if lasting:
        keep_verdict(conditions(device, kind), words)
    if not found:
        refuse_broken(device, words)
    return Outcome(words, found, time.perf_counter() - began)


def verdict_on(found: dict[str, Difference]) -> str:
    """Return in one line which differences are not allowed, "" where all are."""
    bad = [f"{what} by {d.largest:.2g} (allowed {d.allowed:.1g})" for what, d in found.items() if not d.fits]
    return f"differs from the reference in {', '.join(bad)}" if bad else ""


def refuse_broken(device: torch.device, words: str) -> None:
    """Raise RunError if nothing can be computed any more on a device, after the self-test ended in `words`."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise RunError(
                f"the self-test of the fused renderer left {device} unusable in this process ({words}); start the "
                "command again with --renderer reference"
            ) from error


def cuda_problem(device: torch.device) -> str:
    """Return in one line why Warp cannot compile for a device or run on it, "" where it can or the device is no GPU.

    Warp's package needs a driver of its CUDA's major version, and a GPU that its compiler knows.
    """
    if device.type != "cuda":
        return ""
    toolkit, driver, needed = wp.get_cuda_toolkit_version(), wp.get_cuda_driver_version(), nvidia.needed_driver
    made = f"warp-lang {wp.config.version}"
    if toolkit is None:
        return f"{made} is built without CUDA"
    if driver is None or driver < (toolkit[0], 0):
        has = "finds no driver" if driver is None else f"the driver is of CUDA {driver[0]}.{driver[1]}"
        return f"{made} is built with CUDA {toolkit[0]}.{toolkit[1]}, which needs {needed(toolkit[0])}; {has}"
    major, minor = torch.cuda.get_device_capability(device)
    least = min(wp.get_cuda_supported_archs(), default=0)
    if 10 * major + minor < least:
        return (
            f"{made} needs a GPU of compute capability {least // 10}.{least % 10} or newer, {device} has "
            f"{major}.{minor}"
        )
    if (device.index or 0) >= wp.get_cuda_device_count():
        return f"{made} does not see {device}"
    return ""


# ---------------------------------------------------------------- verdicts that are kept


def conditions(device: torch.device, kind: Kind) -> str:
    """Return what a verdict depends on, as one text: the device, its driver, the packages, the code, the kind."""
    machine = [device.type]
    if device.type == "cuda":
        properties, api = torch.cuda.get_device_properties(device), wp.get_cuda_driver_version()
        machine = [properties.name, f"{properties.major}.{properties.minor}", f"CUDA {api}", nvidia.ask().driver]
    return " / ".join([*machine, f"torch {torch.__version__}", f"warp {wp.config.version}", code_digest(), str(kind)])


@functools.cache
def code_digest() -> str:
    """Return the first digits of the SHA-256 of all SOURCES."""
    room, digest = Path(reference.__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in room.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_file() -> Path:
    """Return the file of kept verdicts; Warp must have started, which decides where its kernels are."""
    return Path(str(wp.config.kernel_cache_dir)) / CACHE


def read_verdicts() -> dict[str, str]:
    """Return {conditions: verdict} of earlier processes, the latest last; {} where the file cannot be read."""
    try:
        kept = plain_files.read_json(cache_file())
    except (OSError, ValueError):
        return {}
    return {key: words for key, words in kept.items() if isinstance(words, str)}


def keep_verdict(key: str, words: str) -> None:
    """Write a verdict to the file, where that can be written, and drop the oldest of more than MAX_KEPT."""
    kept = read_verdicts()
    kept.pop(key, None)
    kept[key] = words
    with contextlib.suppress(OSError):
        write_atomic(cache_file(), json.dumps(dict(list(kept.items())[-MAX_KEPT:]), indent=1))


# ---------------------------------------------------------------- the test


def differences(device: torch.device, kind: Kind) -> dict[str, Difference]:
    """Return how far the fused march and its optimizers are from the reference, on one device and in float32.

    Both march the same rays through the same field, once without a mask and once with one. The gradients of an exact
    kind are computed twice, and must be the same bit for bit.
    """
    found: dict[str, Difference] = {}
    with torch.inference_mode(False), torch.enable_grad():
        for masked in (False, True):
            field = sample_field(kind, masked).to(device)
            rays = through(field, *(x.to(device) for x in sample_rays()))
            with algorithms(deterministic=False):
                want = gathered(reference.march, field, rays)
            with algorithms(kind.exact):
                got = gathered(fused.march, field, rays)
                again = gathered(fused.march, field, rays) if kind.exact else got
            here = {
                **compared(got, want, field),
                **{f"{what}, repeated": difference(again[what], got[what], 0) for what in got if kind.exact},
                **stepped(field, [got[f"gradient of {name}"] for name in GRADIENTS]),
            }
            found |= {what + MASKED * masked: each for what, each in here.items()}
    return found


def compared(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], field: VoxRF) -> dict[str, Difference]:
    """Return how far the outputs and gradients of a march are from those of the reference.

    Outputs: a sample's position is rounded to 1e-6 voxels. The field changes by about its own size per voxel, and some
    20 samples add up, which makes 2e-5. The gradient of a voxel is such a sum too, of samples that all rays have in its
    eight cells, and its terms cancel: 1e-4 of the largest. That of d_scale is the sum of voxel times gradient over the
    grid: each term is rounded, and 1e-6 of their magnitudes comes on top. On a CPU the differences are a tenth of this
    and less. An error in a kernel shows as one of the order of the largest value.
    """
    terms, found = (field.density * want["gradient of density"]).abs().sum().item(), {}
    for what, values in want.items():
        most = values.abs().max().item()
        if what in OUTPUTS:
            allowed = OUTPUT_TOLERANCE * max(1.0, most)
        else:
            allowed = GRADIENT_TOLERANCE * most + (SUM_TOLERANCE * terms if "d_scale" in what else 0)
        found[what] = difference(got[what], values, allowed)
    return found


def difference(got: torch.Tensor, want: torch.Tensor, allowed: float) -> Difference:
    """Return the largest difference of two tensors, NaN where one is in them, beside what is allowed."""
    return Difference((got - want).abs().max().item(), allowed)


def stepped(field: VoxRF, gradients: list[torch.Tensor]) -> dict[str, Difference]:
    """Return how far colours are from those of the optimizers in PyTorch, after two steps with the same gradients.

    One step more is left out by its flag.
    """
    new, old = (adamax_steps(field, gradients, update) for update in (fused_adamax.update_where, adamax.update_where))
    found = {"color after Adamax": difference(new, old, OUTPUT_TOLERANCE * old.abs().max().item())}
    if field.alpha_mask is not None:  # else `OccupiedAdam` is `Adam`
        new, old = (adam_steps(field, gradients, kind) for kind in (OccupiedAdam, Adam))
        found["color after Adam"] = difference(new, old, OUTPUT_TOLERANCE * old.abs().max().item())
    return found


def adamax_steps(field: VoxRF, gradients: list[torch.Tensor], update: adamax.Update) -> torch.Tensor:
    """Return the colours of a field after two steps of Adamax by `update`, and one that is left out."""
    copy = with_gradients(field, gradients)
    optimizer = adamax.Adamax([{"params": [getattr(copy, name)], "lr": 0.05} for name in GRADIENTS], update)
    for finite in (True, True, False):
        optimizer.step_where(torch.tensor(finite, device=field.density.device))
    return copy.color.detach()


def adam_steps(field: VoxRF, gradients: list[torch.Tensor], kind: type[Adam]) -> torch.Tensor:
    """Return the colours of a field after two steps of one kind of Adam, and one that is left out."""
    copy = with_gradients(field, gradients)
    optimizer = kind(copy, 0.05, (0.9, 0.99))
    for finite in (True, True, False):
        optimizer.step_where(torch.tensor(finite, device=field.density.device))
    return copy.color.detach()


def with_gradients(field: VoxRF, gradients: list[torch.Tensor]) -> VoxRF:
    """Return a copy of a field whose parameters have the given gradients, those of GRADIENTS."""
    copy = deepcopy(field)
    for name, gradient in zip(GRADIENTS, gradients):
        p = getattr(copy, name)
        p.grad = torch.empty_like(p).copy_(gradient)  # stored as the parameter is
    return copy


def gathered(march: MarchFunction, field: VoxRF, rays: Rays) -> dict[str, torch.Tensor]:
    """Return {what: values} of all outputs of a march along rays, and of all gradients of a sum of random shares."""
    outputs = march(field, rays, EMPTINESS_SCALE)
    g = torch.Generator().manual_seed(2)
    shares = [torch.randn(x.shape, generator=g).to(x.device) for x in outputs]
    loss = torch.stack([(x * share).sum() for x, share in zip(outputs, shares)]).sum()
    gradients = torch.autograd.grad(loss, [getattr(field, name) for name in GRADIENTS])
    names = [*OUTPUTS, *(f"gradient of {name}" for name in GRADIENTS)]
    return dict(zip(names, [x.detach() for x in (*outputs, *gradients)]))


def sample_field(kind: Kind, masked: bool) -> VoxRF:
    """Return the field of the test, on the CPU: fog, a solid part that ends rays, and empty blocks behind them."""
    g = torch.Generator().manual_seed(0)
    field = kind.field(
        [[-1, -0.8, -0.6], [1, 0.8, 0.6]],
        SIZE,
        c=kind.channels,
        density_shift=-2.0,
        view_dependent=kind.view_dependent,
        generator=g,
        device="cpu",
    )
    g.manual_seed(1)  # the density is the same for each kind
    with torch.no_grad():
        field.density.copy_(2 * torch.randn(field.density.shape, generator=g))
        field.density[..., 2:6, 2:6, 3:6] += 40
        field.density[..., 11:] -= 300
        field.d_scale.fill_(0.2)
        field.color.copy_(torch.randn(field.color.shape, generator=g))
    if masked:
        field.update_alpha_mask()
        assert field.alpha_mask is not None
        field.alpha_mask[..., 4:, 6:9] = 0  # hides a part of the fog
    return field


def sample_rays() -> tuple[torch.Tensor, torch.Tensor]:
    """Return origins and unit directions (N_RAYS, 3), float64, on the CPU.

    They come from outside and from inside of the box, miss it, point away, and run along the axes.
    """
    g = torch.Generator().manual_seed(3)
    o = 1.2 * torch.randn(N_RAYS, 3, generator=g, dtype=torch.float64)
    d = F.normalize(0.6 * torch.randn(N_RAYS, 3, generator=g, dtype=torch.float64) - o, dim=-1)
    o[::4] *= 0.3
    d[::7] *= -1
    d[:6] = torch.cat([torch.eye(3), -torch.eye(3)])
    return o, d


@contextlib.contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """While the block runs, ask PyTorch for deterministic algorithms or not: the reference needs others on CUDA."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
