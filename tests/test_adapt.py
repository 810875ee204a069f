"""Denoisers: the ideal one by hand and by autograd, Stable Diffusion's against diffusers' own, loading in one line."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import crafted
from adapt import PLAIN_BACKGROUNDS, Question, ScoreAdapter, make_adapter, perp_neg
from families.sd.adapter import StableDiffusionAdapter, network_dtype
from families.sd.options import Options as SDConfig
from my.errors import UserError
from options.sjc import SJCConfig
from pose import all_view_prompts
from tiny import at_several_levels, of_pictures
from toyworld import COLORS, OBJECTS

REFERENCE = Path(__file__).resolve().parent / "reference"
WEIGHTS = "diffusion_pytorch_model.safetensors"


# ---------------------------------------------------------------- the contract


class Constant(ScoreAdapter):
    """D(x, sigma | c) = c, and a record of the batches that were asked for."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.data_shape = (3, 4, 4)
        self.sigmas = torch.tensor([14.0, 5.0, 1.0, 0.25], dtype=torch.float64)
        self.batches = []

    def _denoise(self, x, sigma, cond):
        self.batches.append(len(x))
        return cond[:, :, None, None].expand_as(x)

    def embed(self, prompts):
        return torch.tensor([[float(p)] for p in prompts])

    def encode(self, pictures):
        return 2 * pictures - 1

    def decode(self, x):
        return (x + 1) / 2

    @property
    def picture_size(self):
        return 4


@pytest.mark.parametrize("scale, want, batch", [(0.0, 1.0, 4), (1.0, 3.0, 2), (2.0, 5.0, 4), (100.0, 201.0, 4)])
def test_guidance_by_hand(scale, want, batch):
    """D_u + s (D_c - D_u) with D_c = 3 and D_u = 1, in one batch of both."""
    adapter, x = Constant(), torch.zeros(2, 3, 4, 4)
    D = adapter.denoise(x, 1.0, adapter.embed([3, 3]), adapter.embed([1, 1]), scale)
    assert D.shape == x.shape and (want == D).all() and adapter.batches == [batch]


class Levels(Constant):
    """D(x, sigma | c) = sigma c, and a record of the levels that were asked for."""

    def _denoise(self, x, sigma, cond):
        self.levels = sigma
        return sigma * super()._denoise(x, sigma, cond)


def test_several_questions_are_one_batch():
    """Guided, at another level, and of another number of rows; each gets its own answer."""
    adapter = Levels()
    three, seven, one = adapter.embed([3, 7, 1]).split(1)
    x = torch.zeros(2, 3, 4, 4)
    both, other = adapter.answers(
        [Question(x, 5.0, torch.cat([three, seven]), one.expand(2, 1), 2.0), Question(x[:1], 0.25, seven)]
    )
    assert both[:, 0, 0, 0].tolist() == [5 * 5, 5 * 13] and other[:, 0, 0, 0].tolist() == [7 / 4]
    assert adapter.levels.flatten().tolist() == [5.0] * 4 + [0.25] and adapter.batches == [5]
    assert adapter.timestep_on_device(adapter.levels).tolist() == [2, 2, 2, 2, 0]


def test_guidance_keeps_the_rows_apart():
    adapter = Constant()
    D = adapter.denoise(torch.zeros(2, 3, 4, 4), 1.0, adapter.embed([3, 7]), adapter.embed([1, 2]), 10)
    assert D[:, 0, 0, 0].tolist() == [1 + 10 * 2, 2 + 10 * 5]


def test_no_unconditional_no_guidance():
    adapter = Constant()
    assert (adapter.denoise(torch.zeros(1, 3, 4, 4), 1.0, adapter.embed([3]), scale=100.0) == 3).all()


def test_perp_neg_by_hand():
    """toward = (3, 0), away = (1, 2) and (-2, 1): perpendicular are (0, 2) and (0, 1), w = 0.5 and 2."""
    toward = torch.tensor([[[[3.0, 0.0]]]])
    away = torch.tensor([[[[[1.0, 2.0]]], [[[-2.0, 1.0]]]]])
    got = perp_neg(toward, away, torch.tensor([[0.5, 2.0]]))
    assert got.flatten().tolist() == [3, -(0.5 * 2 + 2 * 1)]
    parallel = perp_neg(toward, -4 * toward[:, None], torch.tensor([[9.0]]))
    assert torch.equal(parallel, toward)  # what is not perpendicular is never taken away
    assert torch.equal(perp_neg(0 * toward, 0 * away, torch.ones(1, 2)), 0 * toward)  # no direction, no division


class Rows(Constant):
    """D(x, sigma | c) = c, a picture of 1 x 2 pixels."""

    data_shape = (1, 1, 2)

    def _denoise(self, x, sigma, cond):
        self.batches.append(len(x))
        return cond.view(-1, 1, 1, 2)


def test_guidance_with_negatives_by_hand():
    """D_u = (1, 1), D_c = (4, 1), D_n = (2, 3): toward (3, 0), away (1, 2); D = D_u + 10 ((3, 0) - 0.5 (0, 2))."""
    adapter, x = Rows(), torch.zeros(2, 1, 1, 2)
    cond, uncond = torch.tensor([[4.0, 1.0]] * 2), torch.tensor([[1.0, 1.0]] * 2)
    negatives = torch.tensor([[[2.0, 3.0]]] * 2), torch.tensor([[0.5], [0.0]])
    D = adapter.denoise(x, 1.0, cond, uncond, 10, negatives)
    assert D.flatten(1).tolist() == [[31, -9], [31, 1]] and adapter.batches == [6]
    one = adapter.denoise(x, 1.0, cond, uncond, 1.0, negatives)
    assert one.flatten(1).tolist() == [[4, 0], [4, 1]]  # at scale 1, negatives still push


def test_levels_are_found_on_the_host():
    """A tensor on a device would have to be waited for. The table itself stays what callers know, on the CPU."""
    adapter = Constant()
    adapter.device = torch.device("meta")
    assert adapter.round_sigma(torch.tensor(4.0)) == 5.0 and type(adapter.round_sigma(4.0)) is float
    assert [adapter.timestep(s) for s in (14.0, 5.0, 1.0, 0.25)] == [3, 2, 1, 0]
    steps = [adapter.timestep_on_device(s) for s in (0.25, 14.0)]
    assert [(t.shape, t.device.type, t.storage_offset()) for t in steps] == [((1,), "meta", 0), ((1,), "meta", 3)]


def test_round_sigma_is_the_nearest_entry():
    assert [Constant().round_sigma(s) for s in (100.0, 9.6, 9.4, 0.6, 0.0)] == [14.0, 14.0, 5.0, 0.25, 0.25]


def test_plain_backgrounds_are_encoded_pictures():
    x = Constant().plain_backgrounds()
    assert x.shape == (len(PLAIN_BACKGROUNDS), 3, 4, 4)
    torch.testing.assert_close(x[1], torch.full((3, 4, 4), 2 * 0.85 - 1))


# ---------------------------------------------------------------- the ideal family


def two_pictures():
    """The pictures (-1, -1) and (1, 1), of one channel and 1 x 2 pixels, one a view."""
    return of_pictures({"front view of": -torch.ones(1, 1, 1, 2), "side view of": torch.ones(1, 1, 1, 2)})


def ideal(adapter, x, sigma, prompt="a blue duck"):
    return adapter.denoise(torch.tensor(x).view(1, 1, 1, 2), sigma, adapter.embed([prompt])).flatten().tolist()


def test_posterior_mean_by_hand():
    # x = (0.5, 0): squared distances 1.5^2 + 1 = 3.25 and 0.5^2 + 1 = 1.25, a difference of 2
    e = np.exp
    for sigma in (0.5, 1.0, 2.0):
        w = e(-3.25 / (2 * sigma**2)), e(-1.25 / (2 * sigma**2))
        want = (w[1] - w[0]) / (w[0] + w[1])
        assert want == pytest.approx(np.tanh(0.5 / sigma**2))
        assert ideal(two_pictures(), [0.5, 0.0], sigma) == pytest.approx([want, want], abs=1e-6)


def test_limits_are_the_nearest_picture_and_the_mean():
    assert ideal(two_pictures(), [0.3, 0.1], 1e-3) == [1, 1]
    assert ideal(two_pictures(), [0.3, -0.4], 1e-3) == [-1, -1]
    assert ideal(two_pictures(), [0.3, 0.1], 1e4) == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("sigma", [0.03, 0.3, 3.0, 30.0])
def test_posterior_mean_is_exact_to_rounding(sigma):
    """Against the sum of the squared differences in float64, as in its definition, for similar pictures too."""
    rng = torch.Generator().manual_seed(0)
    y = torch.rand(1, 3, 16, 16, generator=rng) + 0.01 * torch.rand(40, 3, 16, 16, generator=rng)
    x = y[3] + sigma * torch.randn(3, 16, 16, generator=rng)
    w = (-(y - x).double().square().sum((1, 2, 3)) / (2 * sigma**2)).softmax(0)
    want = (w[:, None, None, None] * y.double()).sum(0)
    adapter = of_pictures({"front view of": y})
    got = adapter.denoise(x[None], sigma, adapter.embed(["a blue duck"]))[0]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_prompt_selects_the_view():
    assert ideal(two_pictures(), [0.5, 0.0], 1.0, "front view of a blue duck") == [-1, -1]
    assert ideal(two_pictures(), [-0.5, 0.0], 1.0, "side view of a blue duck") == [1, 1]
    with pytest.raises(
        UserError,
        match="'backside view of', only front view of, side view of; take more pictures with --ideal.n_cameras",
    ):
        two_pictures().embed(["backside view of a car"])


@pytest.mark.parametrize("sigma", [0.1, 0.7, 3.0, 14.0])
def test_score_is_the_gradient_of_the_log_density(sigma):
    rng = torch.Generator().manual_seed(0)
    y = torch.rand(7, 3, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    adapter = of_pictures({"front view of": y})
    x = (y[2:4] + sigma * torch.randn(2, 3, 4, 4, generator=rng, dtype=torch.float64)).requires_grad_()
    squares = (x[:, None] - y).square().flatten(2).sum(2)  # (2, 7)
    log_p = torch.logsumexp(-squares / (2 * sigma**2), dim=1)  # up to a constant
    (want,) = torch.autograd.grad(log_p.sum(), x)
    with torch.no_grad():
        score = (adapter.denoise(x, sigma, adapter.embed(["a pig"] * 2)) - x) / sigma**2
    torch.testing.assert_close(score, want, rtol=1e-5, atol=1e-8)


def test_ideal_pictures_of_the_toy_world(capfd):
    cfg = SJCConfig(
        family="ideal",
        sd={"prompt": "a red mushroom"},
        ideal={"n_cameras": 12},
        pose={"rend_hw": 16, "fov_range": (50.0, 60.0)},
    )
    adapter = make_adapter(cfg, "cpu")
    assert set(adapter.names) <= set(all_view_prompts("sjc"))
    assert adapter.data_shape == (3, 16, 16) and adapter.picture_size == 16
    assert not adapter._painted
    y = adapter.pictures()
    assert y.shape == (12 * len(PLAIN_BACKGROUNDS), 3, 16, 16)
    assert capfd.readouterr().err == ""  # its bar is for terminals: in a file it would be lines inside another's
    assert y.min() >= -1 and y.max() <= 1
    corners = y[:, :, 0, 0].unique(dim=0)  # nothing but background there
    torch.testing.assert_close((corners + 1) / 2, torch.tensor(PLAIN_BACKGROUNDS).unique(dim=0), atol=0.003, rtol=0)
    assert torch.equal(make_adapter(cfg, "cpu").pictures(), y)


def test_ideal_picture_space():
    adapter = two_pictures()
    assert adapter.decode(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0.5, 1, 1]
    assert adapter.encode(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]


def test_ideal_needs_a_toy_world_prompt():
    with pytest.raises(UserError, match="--sd.prompt with --family ideal.*colours: red.*objects: duck"):
        make_adapter(SJCConfig(family="ideal"), "cpu")  # its prompt is the burger


@pytest.mark.parametrize("adapter", ["ideal", "sd"])
def test_noise_levels_are_stable_diffusions(adapter, request):
    want = np.load(REFERENCE / "sigmas.npz")["sd"]
    # diffusers keeps its betas in float32, and so 1e-6 is what its schedule is good for
    adapter, rtol = (two_pictures(), 1e-12) if adapter == "ideal" else (request.getfixturevalue("sd"), 1e-6)
    assert adapter.sigmas.dtype == torch.float64
    np.testing.assert_allclose(adapter.sigmas.numpy(), want, rtol=rtol)


# ---------------------------------------------------------------- Stable Diffusion


def load(checkpoint, **options):
    """The parts of a checkpoint, in float32."""
    sd = SDConfig(checkpoint=str(checkpoint), prompt="a blue duck", **options)
    return crafted.load(sd)


@pytest.fixture(scope="module")
def parts(tiny_sd):
    return load(tiny_sd)


@pytest.fixture(scope="module")
def sd(parts):
    return StableDiffusionAdapter(parts)


class AsV(nn.Module):
    """The v-prediction model that an epsilon-prediction UNet is: v = sqrt(abar) eps - sqrt(1 - abar) x0."""

    def __init__(self, unet, abar):
        super().__init__()
        self.unet, self.abar = unet, abar
        self.config, self.dtype = unet.config, unet.dtype

    def forward(self, x, t, cond):
        out, a = self.unet(x, t, cond), self.abar[t].item()
        x0 = (x - (1 - a) ** 0.5 * out.sample) / a**0.5
        out.sample = a**0.5 * out.sample - (1 - a) ** 0.5 * x0
        return out


def with_prediction(parts, kind, unet=None):
    scheduler = type(parts["scheduler"]).from_config(parts["scheduler"].config, prediction_type=kind)
    return {**parts, "scheduler": scheduler, "unet": unet or parts["unet"]}


@pytest.fixture(scope="module")
def batch(sd):
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return x0, sd.embed(["front view of a blue duck", "a red car"])


@pytest.mark.parametrize("t", [0, 20, 500, 969, 999])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_denoised_equals_the_schedulers(parts, batch, kind, t):
    parts = with_prediction(parts, kind)
    adapter, scheduler = StableDiffusionAdapter(parts), parts["scheduler"]
    x0, cond = batch
    scheduler.set_timesteps(1000)
    x_t = scheduler.add_noise(x0, torch.flip(x0, (1,)), torch.tensor(t))
    out = parts["unet"](x_t, t, cond).sample
    want = scheduler.step(out, t, x_t).pred_original_sample
    sigma = adapter.sigmas[999 - t].item()
    got = adapter.denoise((1 + sigma**2) ** 0.5 * x_t, sigma, cond)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [0, 300, 969])
@torch.no_grad()
def test_epsilon_and_v_models_agree(parts, sd, batch, t):
    v = StableDiffusionAdapter(
        with_prediction(parts, "v_prediction", AsV(parts["unet"], parts["scheduler"].alphas_cumprod))
    )
    x0, cond = batch
    sigma = sd.sigmas[999 - t].item()
    x = x0 + sigma * x0.flip(0)
    torch.testing.assert_close(v.denoise(x, sigma, cond), sd.denoise(x, sigma, cond), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_several_levels_in_one_call(parts, kind):
    adapter = StableDiffusionAdapter(with_prediction(parts, kind))
    at_once, one_by_one = at_several_levels(adapter, *adapter.embed(["a blue duck", ""]).split(1))
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-4 * one_by_one.abs().max().item())


def test_tiny_shapes(sd):
    assert sd.data_shape == (4, 8, 8) and sd.picture_size == 16
    cond = sd.embed(["a blue duck", ""])
    assert cond.shape == (2, 16, 16) and cond.dtype == torch.float32
    z = sd.encode(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert z.shape == (2, 4, 8, 8) and not z.requires_grad
    pictures = sd.decode(z)
    assert pictures.shape == (2, 3, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1
    assert sd.decode(torch.zeros(1, 4, 10, 10)).shape == (1, 3, 20, 20)  # other sizes decode, too
    assert sd.denoise(torch.zeros(2, 4, 12, 12), 1.0, cond).shape == (2, 4, 12, 12)


def test_encode_applies_the_latents_scale(parts, sd):
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = parts["vae"].encode(2 * pictures - 1).latent_dist.mean
    torch.testing.assert_close(sd.encode(pictures), 0.18215 * mean)


def test_prompts_have_distinct_conditions(sd):
    a, b, again = sd.embed(["a blue duck", "a red duck", "a blue duck"])
    assert torch.equal(a, again) and not torch.allclose(a, b)


def test_unknown_words_are_refused_with_the_vocabulary(sd):
    with pytest.raises(UserError) as caught:
        sd.embed(["front view of a delicious burger on mars"])
    message = str(caught.value)
    assert "no word for 'delicious', 'mars', 'on';" in message and "--sd.checkpoint PATH" in message
    assert set(COLORS) | set(OBJECTS) | {"overhead", "backside"} <= set(message.replace(";", " ").split())


def test_a_text_that_is_too_long_is_said_in_our_words(sd, capfd):
    """Of 16 tokens, two are its beginning and its end; the tokenizer's own words speak of errors that do not come."""
    assert sd.embed(["a " * 30]).shape == (1, 16, 16)
    err = capfd.readouterr().err
    assert err.startswith("note: a a a") and "has 32 tokens, and the text encoder reads the first 16" in err
    assert "indexing errors" not in err


def suffixed(prompt):
    return [f"{prompt}, front view", f"{prompt}, overhead view"]


def test_view_words_behind_a_long_prompt_stay(sd, capsys):
    """16 tokens: begin, end and "overhead view" leave room for 12 words, and the comma has none of its own."""
    prompt = " ".join(["a", "blue", "duck"] * 5)
    n = sd.n_tokens(suffixed(prompt)[1]) - 15  # that are not of the prompt
    kept = sd.fitting(prompt, suffixed)
    assert kept == " ".join(prompt.split()[: 16 - n]) and len(kept.split()) < 15
    assert max(map(sd.n_tokens, suffixed(kept))) == 16
    err = capsys.readouterr().err
    assert f"the prompt has {15 + n} tokens with the words behind it" in err and err.endswith(" blue duck\n")
    assert sd.fitting("a blue duck", suffixed) == "a blue duck" and not capsys.readouterr().err


def test_a_prompt_without_spaces_is_cut_between_characters():
    sd = SimpleNamespace(tokenizer=SimpleNamespace(model_max_length=10), n_tokens=len)
    assert StableDiffusionAdapter.fitting(sd, "x" * 30, lambda p: [p + ", side"]) == "xxxx"
    with pytest.raises(UserError, match="--sd.prompt: .* has 42 tokens, .* reads 10: no room"):
        StableDiffusionAdapter.fitting(sd, "x" * 30, lambda p: [p + ", underneath"])


@pytest.mark.parametrize(
    "precision, device, upcast, bf16, want",
    [
        ("auto", "cpu", False, False, torch.float32),
        ("auto", "cpu", True, False, torch.float32),
        ("auto", "meta", False, False, torch.float32),
        ("auto", "cuda", False, True, torch.float16),
        ("auto", "cuda", True, True, torch.bfloat16),  # attention of 2.1 leaves the range of float16
        ("auto", "cuda", True, False, torch.float32),  # and this GPU has no bfloat16
        ("fp32", "cuda", True, True, torch.float32),
        ("fp16", "cuda", True, True, torch.float16),  # as asked
        ("bf16", "cuda", False, False, torch.bfloat16),
    ],
)
def test_precision(monkeypatch, precision, device, upcast, bf16, want):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert network_dtype(precision, torch.device(device), upcast) == want


def test_words_for_precision():
    words = {word: SDConfig(precision=word).precision for word in ("auto", "autocast", "full", "fp32", "fp16", "bf16")}
    assert words == {"auto": "auto", "autocast": "auto", "full": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}


@pytest.mark.parametrize(
    "precision, device, want",
    [
        ("auto", "cuda", "auto: float16 (bfloat16 where the UNet states upcast_attention), the VAE in float32"),
        ("auto", "cpu", "auto: float32"),
        ("full", "cuda", "fp32: float32"),
        ("bf16", "cpu", "bf16, the VAE in float32"),
    ],
)
def test_the_doctors_words_for_precision(precision, device, want):
    assert SDConfig(precision=precision).evaluated_in(device) == want


def test_half_precision_networks_give_float32(tiny_sd):
    sd = {"checkpoint": str(tiny_sd), "prompt": "a red pig", "precision": "bf16"}
    adapter = make_adapter(SJCConfig(sd=sd), "cpu")
    cond = adapter.embed(["a blue duck"])
    D = adapter.denoise(torch.zeros(1, 4, 8, 8), 1.0, cond)
    assert cond.dtype == D.dtype == adapter.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32
    assert {p.dtype for net in (adapter.unet, adapter.text_encoder) for p in net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in adapter.vae.parameters()} == {torch.float32}


# ---------------------------------------------------------------- loading


def assert_refused(checkpoint, *words):
    """Loading ends in a UserError of one line that holds `words` and says how to do without."""
    with pytest.raises(UserError) as caught:
        load(checkpoint)
    message = str(caught.value)
    for word in (*words, "--preset mini", "--preset ideal"):
        assert word in message
    assert "\n" not in message


@pytest.fixture
def broken(tiny_sd, tmp_path):
    return Path(shutil.copytree(tiny_sd, tmp_path / "broken"))


def test_missing_folder(tmp_path):
    assert_refused(tmp_path / "nosuch", f"--sd.checkpoint {tmp_path / 'nosuch'}", "no such file or folder")


def test_schedule_is_not_guessed(broken):
    (broken / "scheduler" / "scheduler_config.json").write_text("{}")
    assert_refused(broken, str(broken), "scheduler_config.json has no beta_schedule")


def test_folder_without_unet(broken):
    shutil.rmtree(broken / "unet")
    assert_refused(broken, str(broken), "has no unet")


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"])
@pytest.mark.parametrize("content", [b"junk" * 100, None])
def test_damaged_weights(broken, file, content):
    path = broken / file
    path.write_bytes(content or path.read_bytes()[:5000])
    assert_refused(broken, str(broken), "cannot be read as Stable Diffusion")


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
def test_damaged_json(broken, file):
    (broken / file).write_text("{")
    assert_refused(broken, str(broken), "cannot be read as Stable Diffusion")


@pytest.mark.parametrize("file", [f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"])
def test_missing_weights_are_not_made_up(broken, file):
    tensors = load_file(broken / file)
    gone = next(name for name in tensors if "norm" in name)
    del tensors[gone]
    save_file(tensors, broken / file, metadata={"format": "pt"})
    assert_refused(broken, f"{file.split('/')[0]} lacks 1 of its weights", gone.removeprefix("text_model."))
