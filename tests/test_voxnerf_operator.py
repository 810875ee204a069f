"""The march and the optimizer as registered operators: shapes without running, graphs, and exact sums."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pretend import launches_nothing, pretended_cuda
from benchmarks.step import LAUNCHES
from voxnerf.adamax import Adamax, update_where
from voxnerf.field import FIELDS, make_field
from voxnerf.fused import adamax as fused
from voxnerf.fused import flags, kernels
from voxnerf.fused import march as fused_march
from voxnerf.fused.flags import block_flags
from voxnerf.fused.march import march
from voxnerf.rays import through
from voxnerf.render import render_rays

CUBE = [[-1.0] * 3, [1.0] * 3]


def small_field(kind="V_SD", c=4, grid_size=(9, 6, 7), **options):
    field = make_field(kind, CUBE, grid_size, c, generator=torch.Generator().manual_seed(0), **options)
    with torch.no_grad():
        field.density.normal_(generator=torch.Generator().manual_seed(1)).mul_(3)
    return field


def some_rays(n=40, seed=2):
    g = torch.Generator().manual_seed(seed)
    o = 2.5 * torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=1)
    d = torch.nn.functional.normalize(0.5 * torch.randn(n, 3, generator=g) - o, dim=1)
    return o, d


def inputs_of_march(field, room=40, exact=False):
    """The arguments of torch.ops.sjc.march."""
    rays = through(field, *some_rays())
    blocks = block_flags(field.density.detach(), field.d_scale.detach(), field.density_shift, kernels.x_min(0.1))
    return (
        field.density,
        field.color,
        field.d_scale,
        rays.start.contiguous(),
        rays.slope.float().contiguous(),
        rays.t_min,
        rays.n_samples,
        torch.empty(0, 1),
        blocks.new_empty(0),
        blocks,
        field.step_size,
        field.density_shift,
        1e-4,
        field.activation,
        10.0,
        room,
        exact,
    )


@pytest.mark.filterwarnings("ignore")  # opcheck imports parts of torch that warn
@pytest.mark.parametrize("exact", [False, True])
def test_the_march_is_a_sound_operator(exact):
    """PyTorch's own checks of the schema, the gradient's registration, the shapes without running, and of a graph."""
    field = small_field()
    sound = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.sjc.march, inputs_of_march(field, exact=exact), test_utils=sound)
    detached = [x.detach() if torch.is_tensor(x) else x for x in inputs_of_march(field, exact=exact)]
    out = torch.ops.sjc.march(*detached)
    saved = [detached[k] for k in (0, 1, 2, 3, 4, 5, 7)]
    backward = *[torch.ones_like(x) for x in out[:4]], *saved, *out[4:], *detached[10:]
    opcheck(torch.ops.sjc.march_backward, backward, test_utils=("test_schema", "test_faketensor"))
    args = field.density.detach(), field.d_scale.detach(), -1.0, 0.1
    opcheck(torch.ops.sjc.block_flags, args, test_utils=sound)


@pytest.mark.parametrize("kind", FIELDS)
def test_shapes_and_devices_without_a_gpu(kind, monkeypatch):
    """A march on a pretended CUDA device."""
    field, (o, d) = small_field(kind, blend_bg_texture=True), some_rays()
    real = render_rays(field, o, d, emptiness_scale=10)
    monkeypatch.setattr("voxnerf.render.fused_problem", lambda field: "")  # no self-test can pass there
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, p in list(field.named_parameters()) + list(field.named_buffers()):
            pretended = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="cuda")
            if isinstance(p, torch.nn.Parameter):
                setattr(field, name, torch.nn.Parameter(pretended))
            else:
                field._buffers[name] = pretended
        field.voxels_per_unit = field.voxels_per_unit.to("cuda")
        o, d = (torch.empty(x.shape, device="cuda") for x in (o, d))
        got = render_rays(field, o, d, emptiness_scale=10, renderer="fused")
    for x, want in zip(got, real):
        assert x.device.type == "cuda" and (x.shape, x.dtype) == (want.shape, want.dtype)


# ---------------------------------------------------------------- exact sums


def exact_gradients(field, order):
    """Gradients of a loss by march_backward in exact mode, the rays in some order."""
    args = list(inputs_of_march(field, exact=True))
    for k in (3, 4, 5, 6):
        args[k] = args[k][order]
    g = torch.Generator().manual_seed(4)
    weights = [torch.randn(len(order), *shape, generator=g)[order] for shape in ((4,), (), (), ())]
    out = torch.ops.sjc.march(*args)
    loss = sum((x * w).sum() for x, w in zip(out, weights))
    return torch.autograd.grad(loss, (field.density, field.color, field.d_scale))


def test_exact_gradients_do_not_depend_on_the_order_of_rays():
    """The same bits in any order, and the numbers of the sums of floats."""
    field = small_field(grid_size=(4, 4, 4))  # all rays meet in few voxels
    forwards, shuffled = torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    first, again = exact_gradients(field, forwards), exact_gradients(field, shuffled)
    assert all(torch.equal(*pair) for pair in zip(first, again))
    args = inputs_of_march(field)
    g = torch.Generator().manual_seed(4)
    weights = [torch.randn(40, *shape, generator=g) for shape in ((4,), (), (), ())]
    loss = sum((x * w).sum() for x, w in zip(torch.ops.sjc.march(*args), weights))
    for got, want in zip(first, torch.autograd.grad(loss, (field.density, field.color, field.d_scale))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_ray_that_misses_along_an_axis_takes_no_digits():
    """The distance of its first sample, which it has not, is beyond all bounds."""
    field, gradients = small_field(), []
    args = list(inputs_of_march(field, exact=True))
    for t_min in (args[5], torch.cat([args[5][:-1], torch.tensor([1e15])])):
        args[5:7] = t_min, torch.cat([args[6][:-1], torch.zeros(1, dtype=torch.int32)])
        out = torch.ops.sjc.march(*args)
        gradients.append(torch.autograd.grad(out[1].sum() + out[0].sum(), field.density)[0])
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e20])
def test_exact_gradients_have_a_unit_for_every_magnitude(scale):
    field = small_field()
    args = inputs_of_march(field, exact=True)
    for loss_of in (lambda out: out[0].sum(), lambda out: out[1].sum() + out[3].sum()):
        one, scaled = (
            torch.autograd.grad(factor * loss_of(torch.ops.sjc.march(*args)), (field.density, field.color))
            for factor in (1.0, scale)
        )
        for got, want in zip(scaled, one):
            torch.testing.assert_close(got / scale, want, rtol=1e-4, atol=1e-6 * want.abs().max().item())


def test_gradients_are_exact_where_pytorch_is_asked_for_determinism(monkeypatch):
    """On CUDA; a CPU divides the rays among threads in the same way every time."""
    asked = []
    real = torch.ops.sjc.march
    monkeypatch.setattr(torch.ops.sjc, "march", lambda *args: asked.append(args[-1]) or real(*args[:-1], False))
    field, rays = small_field(), through(small_field(), *some_rays())
    march(field, rays, 1.0)
    torch.use_deterministic_algorithms(True)
    try:
        march(field, rays, 1.0)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        march(field, rays, 1.0)
    finally:
        monkeypatch.undo()
        torch.use_deterministic_algorithms(False)
    assert asked == [False, False, True]


# ---------------------------------------------------------------- the optimizer


def parameters(like):
    return [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in like]


@pytest.mark.parametrize("update", [update_where, fused.update_where])
@pytest.mark.parametrize("threads", [1, 3])
def test_adamax_is_pytorchs(update, threads, monkeypatch):
    """Twelve steps with two learning rates, on grids in both layouts; gradients may be laid out in another way."""
    monkeypatch.setattr("voxnerf.fused.launch.MIN_ITEMS", 1)
    before = torch.get_num_threads()
    field = small_field(blend_bg_texture=True)
    ours, theirs = (parameters(field.parameters()) for _ in range(2))
    groups = [[{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(params)] for params in (ours, theirs)]
    mine, reference = Adamax(groups[0], update), torch.optim.Adamax(groups[1])
    g = torch.Generator().manual_seed(3)
    torch.set_num_threads(threads)
    try:
        for _ in range(12):
            for p, q in zip(ours, theirs):
                q.grad = torch.randn(p.shape, generator=g)
                p.grad = q.grad.clone()
            mine.step_where(torch.tensor(True))
            reference.step()
    finally:
        torch.set_num_threads(before)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for key in ("exp_avg", "exp_inf"):
            torch.testing.assert_close(mine.state[p][key], reference.state[q][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", [update_where, fused.update_where])
def test_adamax_changes_nothing_where_the_flag_is_false(update):
    (p,) = parameters([torch.randn(5)])
    p.grad = torch.full((5,), torch.nan)
    optimizer, before = Adamax([{"params": [p]}], update), p.detach().clone()
    optimizer.step_where(torch.tensor(False))
    assert torch.equal(p, before) and not optimizer.state[p]["exp_avg"].any()
    p.grad = torch.ones(5)
    optimizer.step_where(torch.tensor(True))
    assert not torch.equal(p, before) and p.isfinite().all()


def test_on_cuda_adamax_has_a_thread_per_number(monkeypatch):
    """One launch per parameter over all of its numbers, in their order in memory, into which a gradient is put."""
    launched = []
    monkeypatch.setattr(fused, "array", lambda x: (tuple(x.shape), x.stride()))
    monkeypatch.setattr(fused, "launch", lambda kernel, shares, arguments, device: launched.append((shares, arguments)))
    with pretended_cuda():
        p = torch.zeros(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last)
        row = [torch.zeros_like(p) for _ in range(2)]
        fused.update_where._init_fn(torch.ones((), device="cuda") > 0, [p], [p.contiguous()], *([x] for x in row),
                                    0.1, 0.999, [0.01], 1e-8)  # fmt: skip
    ((shares, arguments),) = launched
    assert shares == [(0, 1, 120)] and arguments[:6] == [120, 1, 0.1, 0.999, 0.01, 1e-8]
    assert arguments[6:] == [((), ())] + [((120,), (1,))] * 4


def test_the_optimizers_operator_is_sound():
    x = [torch.rand(2, 3) for _ in range(4)]
    args = torch.tensor(True), *([t] for t in x), 0.1, 0.999, [0.01], 1e-8
    opcheck(torch.ops.sjc.adamax, args, test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------- graphs


@pytest.mark.filterwarnings("ignore")  # torch.compile imports parts of torch that warn
def test_the_march_is_part_of_a_graph():
    """Flags, march and gradients: PyTorch's compiler takes them into one graph, without any break."""
    field, rays = small_field(), through(small_field(), *some_rays())

    def gather():
        return march(field, rays, 10.0)

    for x, y in zip(gather(), torch.compile(gather, backend="aot_eager", fullgraph=True)()):
        assert torch.equal(x, y)
        for p in field.parameters():
            a, b = (torch.autograd.grad(z.sum(), p, retain_graph=True, allow_unused=True)[0] for z in (x, y))
            assert a is b is None or torch.equal(a, b)


# ---------------------------------------------------------------- what they launch


class Launches(TorchDispatchMode):
    """Counts the calls of PyTorch's operators that launch work."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.n += not launches_nothing(func)
        return out


def test_operators_launch_what_the_benchmark_counts(monkeypatch):
    """Each is run as on CUDA: single samples, visits that lie apart, one thread."""
    for of_device in (kernels.LANES, kernels.STRIDED):
        monkeypatch.setitem(of_device, "cpu", of_device["cuda"])
    monkeypatch.setattr("voxnerf.fused.launch.MAX_THREADS", 1)
    field = small_field(blend_bg_texture=True)
    inputs = [x.detach() if torch.is_tensor(x) else x for x in inputs_of_march(field)]
    out = torch.ops.sjc.march(*inputs)
    grads, saved = [torch.ones_like(x) for x in out[:4]], [inputs[k] for k in (0, 1, 2, 3, 4, 5, 7)]
    p = [x.detach() for x in field.parameters()]
    arguments = {
        "sjc.block_flags": (block_flags, (field.density.detach(), field.d_scale.detach(), -1.0, 0.1)),
        "sjc.march": (fused_march._march, inputs),
        "sjc.march_backward": (fused_march._march_backward, (*grads, *saved, *out[4:], *inputs[10:])),
        "sjc.adamax": (fused.update_where, (torch.tensor(True), p, p, p, p, 0.1, 0.999, [0.01] * len(p), 1e-8)),
    }
    kernels_run, found = [], {}
    for module in (fused_march, flags, fused):
        monkeypatch.setattr(module, "launch", lambda *args, f=module.launch: kernels_run.append(f(*args)))
    for name, (operator, args) in arguments.items():
        kernels_run.clear()
        with Launches() as counted:
            operator._init_fn(*args)
        found[name] = counted.n + len(kernels_run)
    assert found == LAUNCHES
