"""Where each network is, in which number format, and that no denoiser waits for its device.

The CUDA device is pretended: its tensors have shapes and dtypes, and no values.
"""

import copy
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import crafted
import evaluate
from adapt import make_adapter
from benchmarks.pretend import pretended_cuda
from families.calls import RECORD_AFTER
from families.ddpm.adapter import DDPMAdapter
from families.gddpm.adapter import GuidedDDPMAdapter
from families.ideal.adapter import IdealAdapter
from families.placement import half_precision, place, visiting
from families.sd import layout, noise
from families.sd.adapter import StableDiffusionAdapter
from families.sd.options import Options as SDConfig
from families.sd.tokenizer import END, clip_tokenizer
from options.sjc import SJCConfig
from test_gddpm import TINY, tiny
from tiny import pixel_unet

KEYS = Path(__file__).resolve().parent / "reference" / "sd_v1_checkpoint_keys.json"
META, CUDA = torch.device("meta"), torch.device("cuda")


# ---------------------------------------------------------------- the pretended device


@pytest.fixture
def machine():
    with pretended_cuda() as machine, torch.no_grad():
        yield machine


def waits(machine, do):
    """What a call waits for."""
    counts = machine.reset()
    do()
    return [str(wait) for wait in counts.waits]


def devices(net):
    return {p.device.type for p in net.parameters()}


def dtypes(net):
    return {p.dtype for p in net.parameters()}


# ---------------------------------------------------------------- visits


def test_a_visit_leaves_what_was_there():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    before = dict(net.state_dict(keep_vars=True))
    with visiting(META, net, nn.Identity()):
        assert {x.device for x in net.state_dict().values()} == {META}
        assert net(torch.zeros(4, 2, device=META)).device == META
    after = net.state_dict(keep_vars=True)
    assert all(after[name] is x for name, x in before.items())  # not a copy: nothing came back
    with pytest.raises(ValueError), visiting(META, net):
        raise ValueError
    assert devices(net) == {"cpu"}


def test_who_is_at_home_does_not_move():
    net = nn.Linear(2, 3)
    weight = net.weight
    with visiting(torch.device("cpu"), net):
        assert net.weight is weight


def test_place(machine):
    net = nn.Conv2d(3, 8, 3)
    place(net, CUDA, torch.float16, away=True)
    layout = {"memory_format": torch.channels_last}
    assert devices(net) == {"cpu"} and dtypes(net) == {torch.float16} and net.weight.is_contiguous(**layout)
    assert not net.training and not net.weight.requires_grad
    here = nn.Conv2d(3, 8, 3)
    place(here, CUDA, torch.float16)
    assert devices(here) == {"cuda"} and here.weight.is_contiguous(**layout)


def test_half_precision_of_a_cpu_is_none():
    assert half_precision(torch.device("cpu")) == half_precision(META, wide=True) == torch.float32


# ---------------------------------------------------------------- Stable Diffusion


@pytest.fixture
def parts(tiny_sd):
    return crafted.load(SDConfig(checkpoint=str(tiny_sd)))


@pytest.mark.parametrize("low_vram", [False, True])
def test_only_what_a_step_needs_is_on_the_gpu(parts, machine, low_vram):
    adapter = StableDiffusionAdapter(parts, CUDA, torch.float16, low_vram=low_vram)
    seen = {}
    for what, net in (("text", adapter.text_encoder), ("encoder", adapter.encoder[0]), ("decoder", adapter.decoder[0])):
        net.register_forward_pre_hook(lambda net, _args, what=what: seen.update({what: devices(net)}))

    def places():
        return [devices(net) for net in (adapter.unet, adapter.text_encoder, adapter.encoder, adapter.decoder)]

    kept = [{"cuda"}, {"cpu"}, {"cpu"}, {"cpu"} if low_vram else {"cuda"}]
    assert places() == kept
    cond, x = adapter.embed(["a blue duck"]), adapter.encode(torch.zeros(2, 3, 16, 16, device=CUDA))
    assert adapter.decode(x).shape == (2, 3, 16, 16) and places() == kept
    assert seen == {"text": {"cuda"}, "encoder": {"cuda"}, "decoder": {"cuda"}}
    assert cond.device.type == x.device.type == "cuda" and cond.dtype == x.dtype == torch.float32
    assert dtypes(adapter.unet) == dtypes(adapter.text_encoder) == {torch.float16}
    assert dtypes(adapter.vae) == {torch.float32}  # in float16, pictures of some are black
    convolutions = [p for net in (adapter.unet, adapter.vae) for p in net.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)


@pytest.mark.parametrize("low_vram", [False, True])
def test_decoding_does_not_wait(parts, machine, low_vram):
    adapter = StableDiffusionAdapter(parts, CUDA, torch.float16, low_vram=low_vram)
    x = torch.zeros(1, 4, 8, 8, device=CUDA)
    assert not waits(machine, lambda: adapter.decode(x))


def test_low_vram_decodes_in_tiles():
    """The pictures of the miniature are nearly the same, and what it encodes is exactly the same."""
    sd = {"variant": "mini", "prompt": "a blue duck"}
    whole, tiled = (make_adapter(SJCConfig(sd=sd, low_vram=low), "cpu") for low in (False, True))
    tiles = []
    tiled.vae.decoder.register_forward_pre_hook(lambda _net, args: tiles.append(max(args[0].shape[2:])))
    cameras = evaluate.cameras_at(np.deg2rad([[30, 70]]), SJCConfig().pose)
    picture = torch.from_numpy(evaluate.true_views("blue", "duck", cameras)[0]).permute(0, 3, 1, 2)
    with torch.no_grad():
        x = whole.encode(picture)
        assert torch.equal(tiled.encode(picture), x)
        a, b, again = whole.decode(x), tiled.decode(x), tiled.encode(picture)
    assert a.shape == b.shape and max(tiles) == 8 and len(tiles) >= 4 and torch.equal(again, x)
    db = -10 * (a - b).square().mean().log10()
    assert db > 25  # 29 when this was written


@pytest.fixture
def full_size():
    """The parts of Stable Diffusion 1.5 at full size, without weights."""
    shapes = {name: tuple(shape) for name, shape in json.loads(KEYS.read_text()).items()}
    configs = layout.configurations(shapes)
    with META:
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        unet, vae = UNet2DConditionModel(**configs["unet"] | {"sample_size": 64}), AutoencoderKL(**configs["vae"])
    scheduler = noise.scheduler(layout.SCHEDULE)
    return {"tokenizer": clip_tokenizer(END), "text_encoder": text, "unet": unet, "vae": vae, "scheduler": scheduler}


@pytest.mark.parametrize(
    "low_vram, most", [(False, (1.95, 2.2, 2.8, 2.1, 2.75)), (True, (1.75, 2.0, 2.6, 1.9, 2.15))], ids=["all", "low"]
)
def test_gpu_memory_of_the_full_size(full_size, machine, low_vram, most):
    """GB, as docs/precision.md has them: between steps, prompts, plain backgrounds, the UNet's call, decoding."""
    adapter = StableDiffusionAdapter(full_size, CUDA, torch.float16, low_vram=low_vram)
    peaks = [machine.live]

    def measured(do):
        counts = machine.reset()
        out = do()
        peaks.append(counts.peak)
        return out

    cond, uncond = measured(lambda: adapter.embed(["front view of a red duck", ""])).split(1)
    measured(adapter.plain_backgrounds)
    x = torch.zeros(1, *adapter.data_shape, device=CUDA)
    measured(lambda: adapter.denoise(x, adapter.round_sigma(1.0), cond, uncond, 100.0))
    measured(lambda: adapter.decode(x))
    assert all(0.9 * limit < peak / 1e9 < limit for peak, limit in zip(peaks, most, strict=True)), peaks


# ---------------------------------------------------------------- no denoiser waits


def sd(parts, device=CUDA):
    return StableDiffusionAdapter(parts, device, torch.float16 if device == CUDA else torch.float32)


def gddpm(_parts, device=CUDA):
    unet, dtype = tiny(TINY | {"n_classes": 10}), torch.float16 if device == CUDA else torch.bfloat16
    return GuidedDDPMAdapter(unet, default=3, device=device, dtype=dtype, rescaled=True, n_levels=500)


def ddpm(_parts, device=CUDA):
    return DDPMAdapter(pixel_unet(), DDIMScheduler(), device)


def ideal(_parts, device=CUDA):
    views = {"front view of": torch.zeros(5, 3, 8, 8)}
    world = torch.zeros(2, 5, 16, 16, dtype=torch.uint8), torch.ones(2)
    return IdealAdapter(views, 8, lambda word: views, lambda: world, device)


@pytest.mark.parametrize("family", [sd, gddpm, ddpm, ideal])
def test_no_denoiser_waits_for_its_device(parts, machine, family):
    adapter = family(parts)
    cond, uncond = adapter.embed(["front view of a red duck"]), adapter.embed([""])
    x = torch.zeros(1, *adapter.data_shape, device=CUDA)
    results, laid_out = [], []
    if family is not ideal:
        in_layout = partial(torch.Tensor.is_contiguous, memory_format=torch.channels_last)
        adapter.unet.register_forward_pre_hook(lambda _net, args: laid_out.append(in_layout(args[0])))

    def denoise():
        results.extend(adapter.denoise(x, adapter.round_sigma(sigma), cond, uncond, 10.0) for sigma in (0.4, 7.0))

    assert not waits(machine, denoise)
    assert all((D.shape, D.device.type, D.dtype) == (x.shape, "cuda", torch.float32) for D in results)
    assert laid_out == [True] * (0 if family is ideal else 2)  # as its convolutions take it


@pytest.mark.parametrize("family", [sd, gddpm, ddpm])
def test_a_recorded_denoiser_gives_the_same(parts, family):
    """Bit for bit, on the CPU: at the levels that it was recorded at, and at others."""
    adapter, rng = family(parts, torch.device("cpu")), torch.Generator().manual_seed(0)
    cond, uncond = adapter.embed(["front view of a red duck"]), adapter.embed([""])
    x, levels = torch.randn(1, *adapter.data_shape, generator=rng), [adapter.round_sigma(s) for s in (0.4, 7.0)]
    with torch.no_grad():
        first = [adapter.denoise(x, sigma, cond, uncond, 10.0) for sigma in levels]
        for _ in range(RECORD_AFTER):
            adapter.denoise(-x, levels[1], cond, uncond, 10.0)
        assert len(adapter.network.recordings) == 1
        again = [adapter.denoise(x, sigma, cond, uncond, 10.0) for sigma in levels]
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("family", [sd, gddpm, ddpm, ideal])
def test_a_denoiser_in_float32_for_a_while(parts, family):
    """Its weights are those of the half precision then, computed with in float32; afterwards it is as it was."""
    if family is sd:
        adapter = StableDiffusionAdapter(copy.deepcopy(parts), "cpu", torch.bfloat16)
    else:
        adapter = family(parts, torch.device("cpu"))
    half = family in (sd, gddpm)
    assert adapter.is_exact is not half
    x, sigma = torch.randn(1, *adapter.data_shape, generator=torch.Generator().manual_seed(0)), adapter.round_sigma(1.0)
    cond = adapter.embed(["front view of a red duck"])
    own = [] if family is ideal else list(adapter.unet.parameters())
    kinds = [p.dtype for p in own]
    with torch.no_grad():
        before = adapter.denoise(x, sigma, cond)
        with adapter.in_float32():
            wide = adapter.denoise(x, sigma, cond)
        after = adapter.denoise(x, sigma, cond)
        assert torch.equal(before, after) and torch.equal(before, wide) is not half
        if half:
            assert all(p is q and p.dtype is kind for p, q, kind in zip(adapter.unet.parameters(), own, kinds))
            adapter.unet.float()
            adapter.dtype = torch.float32
            assert torch.equal(wide, adapter.denoise(x, sigma, cond))


def test_the_halves_of_a_guided_ddpm(machine):
    """As in the published code: the blocks are in half precision, and what is around them is in float32."""
    adapter = gddpm(None)
    halved = {name.split(".")[0] for name, p in adapter.unet.named_parameters() if p.dtype == torch.float16}
    exact = {name.split(".")[0] for name, p in adapter.unet.named_parameters() if p.dtype == torch.float32}
    assert halved == {"down_blocks", "mid_block", "up_blocks"} and not halved & exact
    assert {"time_embedding", "class_embedding", "conv_in", "conv_norm_out", "conv_out"} == exact


def test_half_a_guided_ddpm_gives_nearly_the_same():
    x, sigma = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 1.0
    D = []
    for dtype in (torch.float32, torch.bfloat16):
        adapter = GuidedDDPMAdapter(tiny(TINY | {"n_classes": 10}), default=3, dtype=dtype)
        with torch.no_grad():
            D.append(adapter.denoise(x, adapter.round_sigma(sigma), adapter.embed(["", "7"])))
    assert D[1].dtype == torch.float32 and not torch.equal(*D)
    torch.testing.assert_close(D[1], D[0], rtol=0, atol=0.05 * D[0].abs().max().item())


def test_conditions_of_the_ideal_model_stay_on_the_host():
    """Its denoiser chooses pictures by them in Python."""
    adapter = ideal(None)
    assert adapter.embed(["front view of a red duck", ""]).device.type == "cpu"
