"""Whole steps on a CUDA device that is only pretended: nothing waits for it, and everything is where it should be."""

import functools
import re
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchgen
import yaml
from diffusers import DDPMPipeline, DDPMScheduler

import box_scene
import pose
import sjc
from adapt import make_adapter
from benchmarks.pretend import DEVICE, pretended_cuda, run_backward, weightless
from benchmarks.sd_denoise import write_shapes
from families.gddpm.unet import NoisyClassifier
from my import exact
from my.ahead import MOST_STEPS as AHEAD
from my.host_copy import HostCopy
from my.left_out import BLOCK, LeftOut
from options.sampling import SamplingConfig
from options.sjc import SJCConfig
from run_img_sampling import decode
from sampling import draw
from sjc import SJC
from test_gddpm_own import LABELS, TINY, fill, save
from tiny import Affine, config, pixel_unet
from viewer.frames import LatentColors
from voxnerf.lens import Lens
from voxnerf.nerf import NeRF

STEPS = (0, 1, AHEAD - 1, AHEAD, AHEAD + 1)  # a new block of cameras begins among them
RENDERERS = ("fused", "reference")
FAMILIES = ("sd", "gddpm", "ddpm", "ideal")


# ---------------------------------------------------------------- the device itself


@pytest.fixture
def machine():
    with pretended_cuda() as machine:
        yield machine


WAITS = {
    "an element": (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
    "a condition": (lambda x: bool(x.any()), "aten._local_scalar_dense.default"),
    "to the host": (lambda x: x.cpu(), "a blocking copy to the host"),
    "into memory that is not pinned": (
        lambda x: torch.empty(2).copy_(x, non_blocking=True),
        "a blocking copy to the host",
    ),
    "a list": (lambda x: torch.tensor([1.0], device="cuda"), "a blocking copy to the device"),
    "to the device": (lambda x: torch.ones(2).to("cuda"), "a blocking copy to the device"),
    "over a tensor": (lambda x: x.copy_(torch.ones(2)), "a blocking copy to the device"),
    "read by a mask": (lambda x: x[x > 0], "aten.index.Tensor by a mask"),
    "write by a mask": (lambda x: x.index_put_((x > 0,), x), "aten.index_put_.default by a mask"),
    "indices": (lambda x: x[torch.tensor([0])], "aten.index.Tensor by indices on the host"),
    "select": (lambda x: x.masked_select(x > 0), "aten.masked_select.default"),
    "where": (lambda x: torch.nonzero(x), "aten.nonzero.default"),
    "an inverse": (lambda x: torch.linalg.inv(x.outer(x)), "aten._linalg_check_errors.default"),
    "all": (lambda x: torch.cuda.synchronize(), "torch.cuda.synchronize"),
}


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}  # networks are called in the latter


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_found(machine, what, mode):
    do, named = WAITS[what]
    with MODES[mode]():
        do(torch.ones(2, device="cuda"))
    (wait,) = machine.counts.waits
    assert wait.what == named and wait.where[0].startswith("tests/test_pretended.py:")


NO_WAITS = {
    "arithmetic with a number of the host": lambda x: x * torch.tensor(2.0) + 1,
    "a constant": lambda x: torch.full((2,), 3.0, device="cuda"),
    "from memory": lambda x: torch.ones(2).to("cuda", non_blocking=True),
    "from pinned memory": lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True),
    "to pinned memory": lambda x: torch.empty(2, pin_memory=True).copy_(x, non_blocking=True),
    "to the host in the background": lambda x: x.to("cpu", non_blocking=True),
    "a number where a mask is": lambda x: x.index_put_((x > 0,), torch.tensor(1.0)),
    "indices of the device": lambda x: x[torch.zeros(1, dtype=torch.long, device="cuda")],
    "an inverse without a check": lambda x: torch.linalg.inv_ex(x.outer(x)).inverse,
    "a transform of what is on the host": lambda x: torch.ones(2)[torch.ones(2) > 0].sum().item(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", NO_WAITS)
def test_what_does_not_wait(machine, what, mode):
    with MODES[mode]():
        NO_WAITS[what](torch.ones(2, device="cuda"))
    assert not machine.counts.waits


@pytest.mark.parametrize("do", [lambda x: x + torch.ones(2), lambda x: torch.ones(2)[x.long()]], ids=["sum", "indices"])
def test_two_devices_are_refused(machine, do):
    with pytest.raises(RuntimeError, match="device"):
        do(torch.ones(2, device="cuda"))


def test_counts_by_hand(machine):
    a, b = torch.ones(64, 32, device="cuda"), torch.ones(32, 16, device="cuda")
    counts = machine.reset()
    with machine.section("product"):
        c = (a @ b).T  # 2 x 64 x 32 x 16 operations; the view is nothing
    c += 1
    del a
    d = torch.empty(256, device="cuda")
    assert counts.launches == {"product": 1, "": 1}
    assert counts.flops == {"product": 2 * 64 * 32 * 16, "": 64 * 16}
    assert counts.bytes_moved == {"product": 4 * (64 * 32 + 32 * 16 + 64 * 16), "": 2 * 4 * 64 * 16}
    assert counts.peak == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert machine.live == 4 * (32 * 16 + 64 * 16 + 256) and d.numel() == 256


@pytest.mark.parametrize("mode", MODES)
def test_operations_of_layers_by_hand(machine, mode):
    """Two per product: of a convolution with 3 x 3 x 3 weights for each of 2 x 4 x 6 x 6 outputs, and of a layer."""
    x, w = torch.ones(2, 3, 8, 8, device="cuda"), torch.ones(4, 3, 3, 3, device="cuda")
    rows, weights = torch.ones(7, 8, device="cuda"), torch.ones(5, 8, device="cuda")
    counts = machine.reset()
    with MODES[mode]():
        F.conv2d(x, w)
        F.linear(rows, weights)
    assert counts.launches.total() == 2 and counts.flops.total() == 2 * 27 * 2 * 4 * 36 + 2 * 8 * 7 * 5


def test_gradients_are_those_of_pytorch(monkeypatch):
    """On the CPU, with numbers: of a whole step, and of a gradient that is asked for."""
    both = []
    for engine in (torch.autograd._engine_run_backward, run_backward):
        monkeypatch.setattr(torch.autograd, "_engine_run_backward", engine)
        optimisation = SJC(config(emptiness_weight=1, depth_weight=1, batch_views=2), Affine())
        for i in range(3):
            optimisation.step(i)
        x = torch.ones(3, requires_grad=True)
        y = x.unbind()[1] * x.sum() + x.expand(2, 3).double().sum()
        both.append([*optimisation.field.state_dict().values(), torch.autograd.grad(y, x)[0]])
    for ours, theirs in zip(both[1], both[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- whole steps


@pytest.fixture(scope="module")
def models(tiny_sd, tmp_path_factory):
    """{name: options of a run with a model of that family}, all small but "full"."""
    folder = tmp_path_factory.mktemp("models")
    write_shapes(folder / "full.safetensors")
    DDPMPipeline(pixel_unet(), DDPMScheduler()).save_pretrained(folder / "ddpm")
    own = save(folder / "own.pt", fill(TINY))
    classifier = save(folder / "classifier.pt", fill(TINY | LABELS, NoisyClassifier))
    prompt = {"prompt": "a blue duck", "scale": 3}
    return {
        "sd": {"family": "sd", "sd": {"checkpoint": str(tiny_sd), "precision": "fp16", **prompt}},
        "full": {"family": "sd", "sd": {"checkpoint": str(folder / "full.safetensors")}},
        "gddpm": {
            "family": "gddpm",
            "gddpm": {"checkpoint": own, "classifier": classifier, "image_size": 16, "imgnet_cat": 3},
        },
        "ddpm": {"family": "ddpm", "ddpm": {"checkpoint": str(folder / "ddpm")}},
        "ideal": {"family": "ideal", "ideal": {"n_cameras": 12}, "sd": prompt},
    }


SMALL = {"vox": {"grid_size": 8}, "pose": {"rend_hw": 8}}


@contextmanager
def on_device(options, renderer="fused", float64=True):
    """Yields (the pretended device, the SJC of a run on it). No self-test can pass there: its verdict is given."""
    no_problem = mock.patch("voxnerf.render.fused_problem", lambda field: "")
    cfg = SJCConfig(**options, renderer=renderer)
    for cached in (sjc.resizing, sjc.centre_minus_border):
        cached.cache_clear()  # they may hold tensors of another pretended device
    with pretended_cuda(float64=float64) as machine, weightless(), no_problem:
        yield machine, SJC(cfg, make_adapter(cfg, DEVICE, cfg.check_files()))
    for cached in (sjc.resizing, sjc.centre_minus_border):
        cached.cache_clear()


def waits(machine, do):
    """What a call waits for."""
    counts = machine.reset()
    do()
    return [str(wait) for wait in counts.waits]


KINDS = {
    "texture": {},
    "plain": {"plain_bg": True},
    "views": {"batch_views": 2, "depth_weight": 1.0},
    "surface": {"noise": "surface", "batch_views": 2},
    "perp_neg": {"pose": {"rend_hw": 8, "perp_neg": True}},
}


def combined(*options):
    """Options, later ones over earlier ones, group by group."""
    out = {}
    for one in options:
        for name, value in one.items():
            out[name] = out.get(name, {}) | value if isinstance(value, dict) else value
    return out


@pytest.mark.parametrize(
    "family, kind",
    [
        (family, kind) for family in FAMILIES for kind in KINDS if kind != "perp_neg" or family == "sd"
    ],  # only sd reads it
)
@pytest.mark.parametrize("renderer", RENDERERS)
def test_no_step_waits(models, family, kind, renderer):
    with on_device(combined(SMALL, models[family], KINDS[kind]), renderer) as (machine, optimisation):
        for i in STEPS:
            assert not waits(machine, lambda i=i: optimisation.step(i)), i


@pytest.mark.parametrize("family", FAMILIES)
def test_no_view_waits_for_its_pictures(models, family):
    """Their copies to the host are on their way; whoever reads them waits."""
    with on_device(combined(SMALL, models[family])) as (machine, optimisation):
        optimisation.step(0)
        with mock.patch("torch.cuda.Event"), mock.patch("torch.cuda.current_stream"):
            assert not waits(machine, lambda: optimisation.view(pose.spiral(4)[1]))


def test_no_reading_of_the_statistics_waits(models):
    """Nor of the flags of steps that were left out; whoever reads the copies waits."""
    with on_device(combined(SMALL, models["ideal"])) as (machine, optimisation):
        left_out = LeftOut()

        def read():
            for i in range(BLOCK):
                stats = optimisation.step(i)
                left_out.add(i, stats["masked"])
            with mock.patch("torch.cuda.Event"), mock.patch("torch.cuda.current_stream"):
                HostCopy(*stats.values())
                assert left_out.due(BLOCK, last=False) == []

        assert not waits(machine, read)


def test_no_step_of_the_full_size_waits(models):
    with on_device(models["full"]) as (machine, optimisation):
        for i in STEPS[:2]:
            assert not waits(machine, lambda i=i: optimisation.step(i)), i


# ---------------------------------------------------------------- where things are


def tensors_of(x, name="", seen=None):
    """Yield (name, tensor) of all tensors that an object of the project refers to."""
    seen = set() if seen is None else seen
    if id(x) in seen or isinstance(x, (str, int, float, type(None))):
        return
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        yield name, x
        return
    if isinstance(x, dict):
        items = [(f"{name}[{key if isinstance(key, str) else type(key).__name__}]", value) for key, value in x.items()]
    elif isinstance(x, (list, tuple, set)):
        items = [(f"{name}[]", value) for value in x]
    elif isinstance(x, torch.nn.Module):
        items = [(f"{name}.{key}", value) for key, value in [*x.named_parameters(), *x.named_buffers()]]
    elif isinstance(x, torch.optim.Optimizer):
        items = [(f"{name}.state", dict(x.state))]
    elif type(x).__module__.partition(".")[0] in ("sjc", "adapt", "families", "voxnerf", "my"):
        items = [(f"{name}.{key}", value) for key, value in vars(x).items()]
    else:
        return
    for key, value in items:
        yield from tensors_of(value, key, seen)


ON_HOST = (".adapter.sigmas", ".optimizer.state[Parameter][step]", ".optimizer.state[FakeTensor][step]")


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_on_the_device_but_tables(models, family):
    with on_device(combined(SMALL, models[family], {"plain_bg": True})) as (_, optimisation):
        optimisation.step(0)
        places = {(name, x.device.type) for name, x in tensors_of(optimisation)}
        on_host = {name for name, there in places if there == "cpu"}
        conditions = {
            name
            for name in on_host
            if name.startswith((".cond", ".uncond", ".adapter._painted", ".adapter.all_pairs.maps"))
        }
        assert on_host - conditions <= set(ON_HOST) and bool(conditions) == (family == "ideal")
        there = " ".join(name for name, where in places if where == "cuda")
        assert all(part in there for part in (".field.density", "[exp_avg]", ".backgrounds", ".noise", ".views"))
        assert family == "ideal" or ".adapter.unet" in there
        assert "text_encoder" not in there


# ---------------------------------------------------------------- a device without float64


@contextmanager
def like_mps(options):
    """Yields (a pretended device that refuses float64, the SJC of a run on it)."""
    with mock.patch.object(exact, "NO_FLOAT64", ("cuda",)), on_device(options, "reference", float64=False) as both:
        yield both


OF_CUDA = ("_scaled_dot_product_", "_cudnn_", "cudnn_")  # what stands for attention and more on the pretended device


@functools.cache
def mps_kernels():
    """{operator: whether MPS has it} by PyTorch's own list: it has a kernel there, or is made of other operators."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    has, delegates = {}, {}
    for entry in yaml.load(path.read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        name, keys = entry["func"].partition("(")[0], entry.get("dispatch", {"CompositeImplicitAutograd": ""})
        keys = {key.strip() for each in keys for key in each.split(",")}
        composite = {"CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
        has[name] = bool(keys & {"MPS", *composite})
        delegates[name] = entry.get("structured_delegate")
    return {name: has.get(delegates[name], has[name]) for name in has}


def known_to_mps(name):
    """Whether any form of an operator, such as "aten.add", is known to MPS."""
    name = name.removeprefix("aten.")
    forms = [has for form, has in mps_kernels().items() if form.partition(".")[0] == name]
    return any(forms) or name.startswith(OF_CUDA)


def test_float64_is_refused_there():
    with pretended_cuda(float64=False):
        for do in (
            lambda: torch.ones(2, dtype=torch.float64).to("cuda"),
            lambda: torch.ones(2, device="cuda").double(),
            lambda: torch.arange(3, device="cuda", dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="no float64"):
                do()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_without_float64_takes_steps_and_shows_views(models, family):
    options = combined(SMALL, models[family], KINDS["views"], KINDS["perp_neg"] if family == "sd" else {})
    options = combined(options, KINDS["surface"])
    with like_mps(combined(options, {"pose": {"rend_hw": 12}})) as (machine, optimisation):  # to be resized
        optimisation.step(0)
        assert not [name for _, name in machine.counts.operators if not known_to_mps(name)]
        assert {x.device.type for x in optimisation.views.of_step(0).rays} == {"cuda"}
        assert optimisation.noise.of_step(0).device.type == optimisation.field.density.device.type == "cuda"
        with mock.patch("torch.cuda.Event"), mock.patch("torch.cuda.current_stream"):
            picture, *_ = optimisation.view(pose.spiral(4)[1], 8, subpixels=2, downscale=2)
        assert picture.ndim == 3
        LatentColors(optimisation)


@pytest.mark.parametrize("family", FAMILIES[:3])
@pytest.mark.parametrize("sampler", ["karras", "smld"])
def test_a_device_without_float64_draws_pictures(models, family, sampler):
    """The state of a sampler is float64 on the host, and the network is asked on the device."""
    cfg = SamplingConfig(**models[family], sampler=sampler, langevin=True, S_churn=10.0, smld_steps=1)
    with mock.patch.object(exact, "NO_FLOAT64", ("cuda",)), pretended_cuda(float64=False) as machine, weightless():
        adapter = make_adapter(cfg, DEVICE, cfg.check_files())
        *_, x = draw(cfg, adapter, adapter.sigmas[[100, 500]].numpy(), [cfg.texts.prompt or "3"] * 2, [0, 1])
        assert (x.dtype, x.device.type, len(x)) == (torch.float64, "cpu", 2)
        assert machine.counts.launches.total() > 20 and len(decode(adapter, x)) == 2


@pytest.mark.parametrize("opaque", [True, False])
def test_a_device_without_float64_trains_on_photos(opaque):
    lens = Lens(num=(0.1, 0.0, 0.0, 0.0))
    scene = box_scene.scene_of(box_scene.box_field(), box_scene.poses(4))
    scene = scene._replace(lenses=[lens] * 4, alpha=scene.alpha if opaque else [a // 2 for a in scene.alpha])
    with mock.patch.object(exact, "NO_FLOAT64", ("cuda",)), pretended_cuda(float64=False):
        nerf = NeRF(box_scene.cfg_of(renderer="reference", bs=16, subpixels=2), scene, DEVICE)
        nerf.step(1, 0.0)


# ---------------------------------------------------------------- reproducible steps

NOT_DETERMINISTIC = {
    "torch.nn.AvgPool3d": ("avg_pool3d_backward",),
    "torch.nn.AdaptiveAvgPool2d": ("_adaptive_avg_pool2d_backward",),
    "torch.nn.AdaptiveAvgPool3d": ("_adaptive_avg_pool3d_backward",),
    "torch.nn.AdaptiveMaxPool2d": ("adaptive_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool2d": ("fractional_max_pool2d_backward",),
    "torch.nn.FractionalMaxPool3d": ("fractional_max_pool3d_backward",),
    "torch.nn.MaxUnpool1d": ("max_unpool2d",),
    "torch.nn.MaxUnpool2d": ("max_unpool2d",),
    "torch.nn.MaxUnpool3d": ("max_unpool3d",),
    "torch.nn.functional.interpolate": (
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "_upsample_bilinear2d_aa_backward",
        "upsample_bicubic2d_backward",
        "_upsample_bicubic2d_aa_backward",
        "upsample_trilinear3d_backward",
    ),
    "torch.nn.ReflectionPad1d": ("reflection_pad1d_backward",),
    "torch.nn.ReflectionPad2d": ("reflection_pad2d_backward",),
    "torch.nn.ReflectionPad3d": ("reflection_pad3d_backward",),
    "torch.nn.NLLLoss": ("nll_loss2d_forward",),
    "torch.nn.CTCLoss": ("_ctc_loss_backward",),
    "torch.nn.EmbeddingBag": ("_embedding_bag_backward",),
    "torch.Tensor.put_": ("put_",),
    "torch.histc": ("histc",),
    "torch.bincount": ("bincount",),
    "torch.median": ("median", "nanmedian"),
    "torch.nn.functional.grid_sample": ("grid_sampler_2d_backward", "grid_sampler_3d_backward"),
    "torch.Tensor.scatter_reduce": ("scatter_reduce", "scatter_reduce_"),
    "torch.Tensor.resize_": (),  # of quantised tensors
}  # what PyTorch refuses under `torch.use_deterministic_algorithms`: its documented name, and operators of CUDA


def refused_by_pytorch():
    """The names in the second list of PyTorch's own documentation."""
    words = torch.use_deterministic_algorithms.__doc__.partition("operations will throw a")[2].partition("In addition")[
        0
    ]
    return set(re.findall(r"\* :\w+:`(torch\.[\w.]+)`", words))


def test_the_operators_of_pytorchs_list_are_known():
    assert refused_by_pytorch() == set(NOT_DETERMINISTIC)
    for name in sum(NOT_DETERMINISTIC.values(), ()):
        assert hasattr(torch.ops.aten, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_steps_have_no_operator_that_is_not(models, family):
    options = combined(SMALL, models[family], {"deterministic": True, "pose": {"rend_hw": 12}})  # to be resized
    options = combined(options, KINDS["surface"])
    with on_device(options) as (machine, optimisation):
        counts = machine.reset()
        optimisation.step(0)
        used = {name.removeprefix("aten.") for _, name in counts.operators}
        assert len(used) > 20 and not used & set(sum(NOT_DETERMINISTIC.values(), ()))
