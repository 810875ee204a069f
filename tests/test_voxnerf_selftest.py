"""The self-test of the fused renderer: it passes here, names what is broken, and its verdict is kept and used."""

import json
import math
import re
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warp as wp

from my import nvidia
from my.errors import RunError, UserError
from voxnerf import adamax, reference, render
from voxnerf.field import V_SD, V_SJC, VoxRF
from voxnerf.fused import kernels, selftest
from voxnerf.fused.launch import start
from voxnerf.rays import through
from voxnerf.reference import sample_points, sample_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LATENTS = selftest.Kind(V_SD, 4, False)


@pytest.fixture(autouse=True)
def nothing_found(tmp_path, monkeypatch):
    """No verdict from before, neither in this process nor on the disk."""
    start()
    monkeypatch.setattr(selftest, "cache_file", lambda: tmp_path / "selftest.json")  # not where the kernels are
    caches = selftest.verdict, render.say_slow
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def runs(monkeypatch):
    """The list of the (device, kind) that the self-test is run for; the march itself is not."""
    done = []

    def differences(device, kind):
        done.append((device, kind))
        return {"color": selftest.Difference(0.0, 1.0)}

    monkeypatch.setattr(selftest, "differences", differences)
    return done


# ---------------------------------------------------------------- the test itself


@pytest.fixture
def exact(monkeypatch):
    """On the CPU too, gradients are sums of whole numbers where deterministic algorithms are asked for."""
    operator, asked = torch.ops.sjc.march, []

    def march(*args):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return operator(*args[:-1], asked[-1])

    monkeypatch.setattr(torch.ops.sjc, "march", march)
    return asked


@pytest.mark.parametrize("layout", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "kind",
    [
        LATENTS,
        LATENTS._replace(exact=True),
        selftest.Kind(V_SJC, 3, False),
        selftest.Kind(VoxRF, 3, False),
        selftest.Kind(VoxRF, 3, True),
        selftest.Kind(VoxRF, 3, True, exact=True),
    ],
    ids=str,
)
def test_it_passes_for_every_kind_of_field(kind, layout, exact, monkeypatch):
    """Also with what CUDA gets; every output and gradient is compared, and is well within what is allowed."""
    for of_device in (kernels.LANES, kernels.STRIDED):
        monkeypatch.setitem(of_device, "cpu", of_device[layout])
    found = selftest.differences(CPU, kind)
    names = [*selftest.OUTPUTS, *(f"gradient of {name}" for name in selftest.GRADIENTS)]
    repeated = [f"{name}, repeated" for name in names if kind.exact]
    masked = [f"{name} with a mask" for name in [*names, *repeated, "color after Adamax", "color after Adam"]]
    assert list(found) == [*names, *repeated, "color after Adamax", *masked]
    for what, difference in found.items():
        assert difference.largest <= difference.allowed / 5 < 0.1, what
        assert bool(difference.allowed) == ("repeated" not in what)
    assert selftest.verdict_on(found) == "" and set(exact) == {kind.exact}


def sampled(masked):
    """The test's field, its rays, and (points (n, k, 3), which of them count (n, k)) of all samples."""
    field = selftest.sample_field(LATENTS, masked)
    rays = through(field, *selftest.sample_rays())
    _, points, inside = sample_points(field, rays)
    return field, rays, points, inside


def test_the_rays_are_of_all_sorts():
    """Some miss, some start inside, some run along an axis; the field has fog, a solid part and empty blocks."""
    field, rays, points, inside = sampled(False)
    o, d = rays.o, rays.d
    lo, hi = field.aabb
    starts_inside = ((o > lo) & (o < hi)).all(dim=1)
    misses = ~inside.any(dim=1)
    assert len(o) == 200 and starts_inside.sum() > 20 and misses.sum() > 20
    assert ((d.abs() == 1).any(dim=1) & inside.any(dim=1)).sum() > 2
    points_away = misses & (through(field, o, -d).n_samples > 0)
    assert points_away.sum() > 10
    w = sample_weights(field, points, inside)
    opacity = w.sum(dim=1)
    assert (opacity > 1 - 1e-6).sum() > 5 and ((opacity > 0.2) & (opacity < 0.9)).sum() > 5
    assert field.density[..., 3 * kernels.BLOCK - 1 :].max() < -100  # blocks that are jumped over


def test_the_mask_hides_a_part_of_what_is_seen():
    seen = []
    for masked in (False, True):
        field, rays, _, _ = sampled(masked)
        seen.append(render.render_ready(field, rays, renderer="reference").opacity)
    assert 0.05 < ((seen[0] - seen[1]).abs() > 0.1).float().mean() < 0.9


def test_rounding_cannot_cross_a_jump():
    """Colours jump at a threshold of the weight, and a mask at the faces of voxels: no sample is near either."""
    for masked in (False, True):
        field, _, points, counted = sampled(masked)
        w = sample_weights(field, points, counted)[counted]
        assert ((w / field.ray_march_weight_thres - 1).abs() > 1e-3).all()
    _, _, points, inside = sampled(False)
    points = points[inside]
    seen = field.occupied(points)
    assert 0.1 < seen.float().mean() < 0.95
    for nudge in 1e-5 * field.voxel_edge * torch.cat([torch.eye(3), -torch.eye(3)]):
        assert torch.equal(field.occupied(points + nudge), seen), nudge


def broken(change):
    """A march that computes what the reference does, but for what `change(name, values)` does to outputs."""

    def march(field, *args):
        return tuple(map(change, selftest.OUTPUTS, reference.march(field, *args)))

    return march


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is wrong by a factor of two."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda name, x: x + 1e-3 * (name == "depth"), ["depth", "depth with a mask"]),
        (lambda name, x: x * float("nan") if name == "opacity" else x, ["opacity", "gradient of density"]),
        (
            lambda name, x: Doubled.apply(x) if name == "color" else x,
            ["gradient of density", "gradient of color", "gradient of d_scale"],
        ),
        (lambda name, x: Doubled.apply(x) if name == "emptiness" else x, ["gradient of density"]),
        (lambda name, x: x + 3e-4 * (x - x.detach()) if name == "color" else x, ["gradient of color"]),
    ],
)
def test_what_is_broken_is_named(change, named, monkeypatch):
    monkeypatch.setattr(selftest.fused, "march", broken(change))
    outcome = selftest.run(CPU, LATENTS)
    assert outcome.verdict.startswith("differs from the reference in ") and "\n" not in outcome.verdict
    wrong = [what for what, difference in outcome.differences.items() if not difference.fits]
    assert set(named) <= set(wrong) and all(f"{what} by " in outcome.verdict for what in wrong)
    assert not {"emptiness", "color", "color with a mask"} & set(wrong)


def test_what_is_not_finite_never_fits():
    """Not where the reference is broken either, so that anything would be allowed."""
    for largest, allowed in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (1.5, 1.0)):
        assert not selftest.Difference(largest, allowed).fits
    assert selftest.Difference(1.0, 1.0).fits and selftest.Difference(0.0, 0.0).fits


def test_it_is_told_by_the_worst_of_all_differences():
    found = {"depth": (1e-6, 2e-5), "color": (1e-6, 1e-5), "color with a mask": (4e-6, 1e-5), "color, repeated": (0, 0)}
    outcome = selftest.Outcome("", {what: selftest.Difference(*each) for what, each in found.items()}, 2.0)
    assert outcome.in_words() == (
        "passed, 40% of what is allowed; largest differences depth 1.0e-06, color 4.0e-06, color, repeated 0.0e+00; "
        "2.0 s, compilation included"
    )


def test_sums_that_depend_on_their_order_are_named(monkeypatch):
    """Only a deterministic run needs the same bits twice: 1e-7 between two marches is allowed elsewhere."""
    marches = []

    def march(field, *args):
        marches.append(1)
        outputs = reference.march(field, *args)
        return outputs[0] + 1e-7 * len(marches), *outputs[1:]

    monkeypatch.setattr(selftest.fused, "march", march)
    assert selftest.run(CPU, LATENTS).verdict == ""
    verdict = selftest.run(CPU, LATENTS._replace(exact=True)).verdict
    assert re.fullmatch(
        r"differs .* in color, repeated by \S+ \(allowed 0\), color, repeated with a mask by .*", verdict
    )


@pytest.mark.parametrize(
    "part, named", [("fused_adamax.update_where", "Adamax"), ("OccupiedAdam.update", "Adam with a mask")]
)
def test_an_optimizer_that_does_nothing_is_named(part, named, monkeypatch):
    monkeypatch.setattr(f"voxnerf.fused.selftest.{part}", lambda *args: None)
    assert f"color after {named} by " in selftest.run(CPU, LATENTS).verdict


def test_a_step_that_is_not_left_out_is_named(monkeypatch):
    def update(finite, *args):
        adamax.update_where(torch.ones_like(finite), *args)

    monkeypatch.setattr(selftest.fused_adamax, "update_where", update)
    assert "color after Adamax by 0.05" in selftest.run(CPU, LATENTS).verdict


def test_a_step_of_adam_that_is_not_left_out_is_named(monkeypatch):
    update = selftest.OccupiedAdam.update
    monkeypatch.setattr(
        selftest.OccupiedAdam, "update", lambda self, finite, *args: update(self, torch.ones_like(finite), *args)
    )
    assert "color after Adam with a mask by 0.0" in selftest.run(CPU, LATENTS).verdict


def test_an_exception_is_a_verdict(monkeypatch):
    def march(*args):
        raise RuntimeError("CUDA error 700: an illegal memory access\nStack: ...")

    monkeypatch.setattr(selftest.fused, "march", march)
    outcome = selftest.run(CPU, LATENTS)
    assert outcome.verdict == "RuntimeError: CUDA error 700: an illegal memory access"
    assert outcome.differences == {} and list(selftest.read_verdicts().values()) == [outcome.verdict]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Failed to allocate 8 bytes on device 'cuda'")]
)
def test_memory_that_ran_out_is_not_kept(error, monkeypatch):
    def march(*args):
        raise error

    monkeypatch.setattr(selftest.fused, "march", march)
    assert selftest.run(CPU, LATENTS).verdict and not selftest.cache_file().exists()


def test_a_device_that_is_left_unusable_ends_the_command(monkeypatch):
    """CUDA refuses all work after some failures, that of the reference too."""

    def march(*args, **kwargs):
        monkeypatch.setattr(torch, "ones", march)
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(selftest.fused, "march", march)
    with pytest.raises(RunError, match="left cpu unusable .*illegal memory access.*--renderer reference"):
        selftest.run(CPU, LATENTS)
    assert list(selftest.read_verdicts().values()) == ["RuntimeError: CUDA error: an illegal memory access"]


def test_it_changes_nothing_around_it(monkeypatch):
    """Random numbers, settings and the mode of gradients are as before; it works inside of any of them.

    The reference has no deterministic gradient on CUDA, so that deterministic algorithms are not asked for meanwhile.
    """
    state, asked = torch.get_rng_state(), []

    def watched(march, *args):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return march(*args)

    for room in (selftest.fused, selftest.reference):
        monkeypatch.setattr(room, "march", partial(watched, room.march))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.inference_mode():
            assert selftest.verdict_on(selftest.differences(CPU, LATENTS)) == ""
            assert torch.is_inference_mode_enabled()
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state) and asked == [False] * 4  # each march, without and with a mask


# ---------------------------------------------------------------- verdicts are kept


def test_a_verdict_is_found_once(runs, capsys):
    """Within the process nothing is read again; a later process reads the file; each kind has its own verdict."""
    assert selftest.verdict(CPU, LATENTS) == "" and len(runs) == 1
    assert capsys.readouterr().err.startswith("note: testing the fused renderer on cpu once")
    selftest.cache_file().unlink()
    assert selftest.verdict(CPU, LATENTS) == "" and len(runs) == 1 and not selftest.cache_file().exists()
    selftest.keep_verdict(selftest.conditions(CPU, LATENTS), "differs a lot")
    selftest.verdict.cache_clear()
    assert selftest.verdict(CPU, LATENTS) == "differs a lot" and len(runs) == 1 and not capsys.readouterr().err
    for other in ({"channels": 3}, {"field": VoxRF}, {"view_dependent": True}, {"exact": True}):
        kind = LATENTS._replace(**other)
        assert selftest.verdict(CPU, kind) == "" and runs[-1] == (CPU, kind)
    assert len(runs) == 5


@pytest.mark.parametrize(
    "device, deterministic, exact", [("cpu", True, False), ("cuda", False, False), ("cuda", True, True)]
)
def test_the_kind_of_a_march(device, deterministic, exact):
    field = VoxRF([[-1] * 3, [1] * 3], 4, c=5, view_dependent=True)
    with selftest.algorithms(deterministic):
        there = SimpleNamespace(density=SimpleNamespace(is_cuda=device == "cuda"), c=5, view_dependent=True)
        assert selftest.Kind.of(there)[1:] == (5, True, exact)
    assert selftest.Kind.of(field) == (VoxRF, 5, True, False)


def test_verdicts_lie_beside_the_kernels(monkeypatch, tmp_path):
    monkeypatch.undo()
    assert selftest.cache_file().parent == Path(wp.config.kernel_cache_dir)


def test_a_new_run_replaces_the_verdict(runs):
    selftest.keep_verdict(selftest.conditions(CPU, LATENTS), "differs a lot")
    assert selftest.run(CPU, LATENTS).verdict == "" == selftest.verdict(CPU, LATENTS)


def pretend_gpu(monkeypatch, driver="580.65", cuda=(13, 0), capability=(9, 0), name="H100", n=1):
    """Let the libraries say that there is such a GPU."""
    properties = SimpleNamespace(name=name, major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(wp, "get_cuda_driver_version", lambda: cuda)
    monkeypatch.setattr(wp, "get_cuda_toolkit_version", lambda: (13, 4))
    monkeypatch.setattr(wp, "get_cuda_supported_archs", lambda: [75, 80, 90])
    monkeypatch.setattr(wp, "get_cuda_device_count", lambda: n)
    monkeypatch.setattr(nvidia, "ask", lambda: nvidia.Answer((name,), driver))


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: pretend_gpu(patch, driver="581.10"),
        lambda patch: pretend_gpu(patch, cuda=(13, 1)),
        lambda patch: pretend_gpu(patch, capability=(8, 0)),
        lambda patch: pretend_gpu(patch, name="A100"),
        lambda patch: patch.setattr(torch, "__version__", "9.9"),
        lambda patch: patch.setattr(wp.config, "version", "9.9"),
        lambda patch: patch.setattr(selftest, "code_digest", lambda: "other"),
    ],
)
def test_other_conditions_are_tested_again(runs, monkeypatch, change):
    pretend_gpu(monkeypatch)
    for n in (1, 1):
        assert selftest.verdict(CUDA, LATENTS) == "" and len(runs) == n
        selftest.verdict.cache_clear()
    change(monkeypatch)
    assert selftest.verdict(CUDA, LATENTS) == "" and len(runs) == 2
    assert len(json.loads(selftest.cache_file().read_text())) == 2


def test_the_digest_is_of_the_kernels_and_of_the_reference(tmp_path, monkeypatch):
    """It changes with any of these files, and with no other."""
    (tmp_path / "fused").mkdir()
    monkeypatch.setattr(reference, "__file__", str(tmp_path / "reference.py"))
    digests = set()
    kernels, others = (
        ("fused/march.py", "fused/kernels.py"),
        ("reference", "field", "sh", "rays", "adam", "adamax", "finite"),
    )
    read = (*kernels, *(f"{name}.py" for name in others))
    for n, name in enumerate((*read, "nerf.py")):
        (tmp_path / name).write_text("x = 1")
        digests.add(selftest.code_digest.__wrapped__())
        assert len(digests) == min(n + 1, len(read)), name
    (tmp_path / "fused/march.py").write_text("x = 2")
    assert selftest.code_digest.__wrapped__() not in digests


@pytest.mark.parametrize("text", [b"", b"[1]", b'{"a": ', b"\xff\xfe", b'{"a": 1}'])
def test_a_damaged_file_is_as_none(text, runs):
    selftest.cache_file().write_bytes(text)
    assert selftest.verdict(CPU, LATENTS) == "" and len(runs) == 1
    assert list(json.loads(selftest.cache_file().read_text()).values()) == [""]


def test_a_folder_that_cannot_be_written_is_no_obstacle(runs, tmp_path, monkeypatch):
    """Root may write anywhere: a folder that is none stands for one that is read-only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(selftest, "cache_file", lambda: tmp_path / "file" / "selftest.json")
    for n in (1, 2):
        assert selftest.verdict(CPU, LATENTS) == "" and len(runs) == n
        selftest.verdict.cache_clear()


def test_the_file_stays_small(monkeypatch):
    monkeypatch.setattr(selftest, "MAX_KEPT", 2)
    for key in ("a", "b", "a", "c"):
        selftest.keep_verdict(key, "")
    assert list(selftest.read_verdicts()) == ["a", "c"]
    assert stat.S_ISREG(selftest.cache_file().stat().st_mode)


# ---------------------------------------------------------------- what Warp needs of a GPU


@pytest.mark.parametrize(
    "gpu, words",
    [
        ({}, ""),
        ({"cuda": (14, 0)}, ""),
        ({"capability": (12, 1)}, ""),
        ({"cuda": (12, 8)}, "with CUDA 13.4, which needs a driver of series 580 or newer; the driver is of CUDA 12.8"),
        ({"cuda": None}, "which needs a driver of series 580 or newer; finds no driver"),
        ({"capability": (7, 0)}, "needs a GPU of compute capability 7.5 or newer, cuda:0 has 7.0"),
        ({"n": 0}, "does not see cuda:0"),
    ],
)  # fmt: skip
def test_what_warp_needs(gpu, words, runs, monkeypatch):
    """Where that is missing, nothing is run or kept: a new driver counts at once."""
    pretend_gpu(monkeypatch, **gpu)
    problem = selftest.cuda_problem(CUDA)
    assert words in problem and bool(words) == bool(problem)
    assert selftest.verdict(CUDA, LATENTS) == problem and len(runs) == (0 if words else 1)
    assert selftest.cuda_problem(CPU) == ""


def test_a_warp_without_cuda(monkeypatch):
    monkeypatch.setattr(wp, "get_cuda_toolkit_version", lambda: None)
    assert selftest.cuda_problem(CUDA).endswith("is built without CUDA")


# ---------------------------------------------------------------- auto


@pytest.fixture
def on_cuda(monkeypatch):
    """A field on the CPU that passes for one on CUDA."""
    monkeypatch.setattr(render, "device_type", lambda field: "cuda")
    return V_SD([[-1] * 3, [1] * 3], 4, c=4)


def test_auto_is_fused_on_cuda_where_the_test_passes(on_cuda, runs, monkeypatch):
    from voxnerf.fused.march import march

    read = []
    monkeypatch.setattr(selftest, "read_verdicts", lambda: read.append(1) or {})
    for _ in range(5):
        assert render.pick_march("auto", on_cuda) is render.pick_march("fused", on_cuda) is march
    assert runs == [(CPU, LATENTS)] and len(read) == 2  # once before the test, once to write: not in every step


def test_auto_is_the_reference_on_cuda_where_it_fails(on_cuda, monkeypatch, capsys):
    def march(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(selftest.fused, "march", march)
    for _ in range(5):
        assert render.pick_march("auto", on_cuda) is reference.march
    tested, said = capsys.readouterr().err.splitlines()
    assert tested.startswith("note: testing ") and said.startswith("note: the slow renderer is used")
    assert "does not work on cpu: RuntimeError: no kernel image" in said
    with pytest.raises(UserError, match="--renderer fused: .*RuntimeError: no kernel image; use --renderer reference"):
        render.pick_march("fused", on_cuda)
    assert render.pick_march("reference", on_cuda) is reference.march


def test_a_cpu_is_not_tested(runs):
    from voxnerf.fused.march import march

    assert render.pick_march("auto", V_SD([[-1] * 3, [1] * 3], 4, c=4)) is march and not runs


@pytest.mark.parametrize("on", ["meta", "mps"])
def test_other_devices_have_the_reference(on, monkeypatch, runs, capsys):
    """In silence; the fused renderer is refused on a device that it cannot run on, and not where nothing is run."""
    monkeypatch.setattr(render, "device_type", lambda field: on)
    field = V_SD([[-1] * 3, [1] * 3], 4, c=4)
    assert render.pick_march("auto", field) is reference.march and not capsys.readouterr().err
    if on == "mps":
        with pytest.raises(UserError, match="--renderer fused: it runs on cpu and cuda, not on mps; use"):
            render.pick_march("fused", field)
    else:
        render.pick_march("fused", field)
    assert not runs


def test_a_test_on_cuda_goes_to_the_device(monkeypatch):
    """The field and all rays are moved to the device asked for, before either march."""
    moved, rays = [], selftest.sample_rays()

    class Ray(torch.Tensor):
        def to(self, device):
            moved.append(("ray", device))
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(VoxRF, "to", lambda self, device: moved.append(("field", device)) or self)
    monkeypatch.setattr(selftest, "sample_rays", lambda: [x.as_subclass(Ray) for x in rays])
    selftest.differences(CPU, LATENTS)
    assert moved == [("field", CPU), ("ray", CPU), ("ray", CPU)] * 2
