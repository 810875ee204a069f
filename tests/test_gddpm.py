"""Guided DDPM: reference numbers, every published checkpoint's names and shapes, guidance, loading in one line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from einops import rearrange

import doctor
import run_sjc
from adapt import make_adapter
from families.gddpm import layout, published
from families.gddpm.adapter import GuidedDDPMAdapter
from families.gddpm.options import Found
from families.gddpm.options import Options as GDDPMConfig
from families.gddpm.unet import NoisyClassifier, build_unet, convert, published_shapes
from my.errors import UserError
from options.sampling import SamplingConfig
from options.sjc import SJCConfig
from tiny import at_several_levels

REFERENCE = Path(__file__).resolve().parent / "reference"
KEYS = json.loads((REFERENCE / "gddpm_checkpoint_keys.json").read_text())
SMALL = published.OPTIONS | {"image_size": 64, "num_res_blocks": 1, "n_classes": None, "n_labels": 1000}
SMALL_UNET = SMALL | {
    "num_channels": 32,
    "channel_mult": (1, 1, 2),
    "num_head_channels": 16,
    "attends": (False, True, True),
}
SMALL_CLASSIFIER = SMALL | {"num_channels": 64, "channel_mult": (1, 2, 3, 4), "attends": (False, True, True, False)}
TINY = SMALL | {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": (1, 2),
    "attends": (False, True),
    "num_head_channels": 32,
}


def fill(shapes, seed=0):
    """Return random float16 weights of these shapes, as the published files hold."""
    rng = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=rng) * 0.1).half() for name, shape in shapes.items()}


def loaded(net, weights, options):
    net.load_state_dict(convert(weights, net, options), assign=True)
    return net.requires_grad_(False)


def tiny(options=TINY, kind=build_unet, seed=0):
    net = kind(options)
    return loaded(net, fill(published_shapes(net, options), seed), options)


# ---------------------------------------------------------------- reference numbers


def reference(name, shapes, seed):
    """Return (arrays, weights by published names, x) of a reference file.

    Weights and x are torch's random numbers, which the file need not hold: weights one parameter after another in the
    file's order, 0.1 times normal where they are vectors, else 0.3 / sqrt(fan-in) times, in float16.
    """
    arrays = dict(np.load(REFERENCE / name))
    rng, weights = torch.Generator().manual_seed(seed), {}
    for key in str(arrays["names"]).split("\n"):
        values = torch.randn(shapes[key], generator=rng)
        weights[key] = (values * (0.1 if values.ndim == 1 else 0.3 / values[0].numel() ** 0.5)).half()
    last = [values.flatten()[-1].item() for values in weights.values()]
    np.testing.assert_allclose(last, arrays["last"], rtol=2e-3, err_msg="torch draws other numbers than it did")
    return arrays, weights, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def thinned(pictures):
    """Return every third row and column, as the files hold of pictures (n, c, h, w)."""
    return pictures[..., ::3, ::3]


@torch.no_grad()
def test_unet_against_the_published_code():
    unet = build_unet(SMALL_UNET)
    ref, weights, x = reference("gddpm_unet_a.npz", published_shapes(unet, SMALL_UNET), seed=0)
    out = loaded(unet, weights, SMALL_UNET)(x, torch.from_numpy(ref["timesteps"])).sample.numpy()
    np.testing.assert_allclose(thinned(out), ref["output"], rtol=0, atol=1e-5)  # the largest is 0.2


def test_classifier_and_its_gradient_against_the_published_code():
    classifier = NoisyClassifier(SMALL_CLASSIFIER).eval()
    ref, weights, x = reference("gddpm_classifier_a.npz", published_shapes(classifier, SMALL_CLASSIFIER), seed=2)
    x, y = x.requires_grad_(), torch.from_numpy(ref["y"])
    logits = loaded(classifier, weights, SMALL_CLASSIFIER)(x, torch.from_numpy(ref["timesteps"]))
    np.testing.assert_allclose(logits.detach(), ref["logits"], rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(logits.log_softmax(1).gather(1, y[:, None]).sum(), x)
    np.testing.assert_allclose(thinned(grad), ref["grad_log_prob"], rtol=0, atol=1e-4 * abs(ref["grad_log_prob"]).max())


@pytest.mark.parametrize("model", KEYS)
def test_every_published_parameter_is_accounted_for(model):
    """Full size, on the meta device: the same names and shapes, no more and no less."""
    for part, want in KEYS[model].items():
        read, kind = {"unet": (layout.unet, build_unet), "classifier": (layout.classifier, NoisyClassifier)}[part]
        told = read(want)
        known = published.PUBLISHED[model] | told  # and, of a UNet, those in no shape
        assert known == published.PUBLISHED[model] or part == "classifier"
        assert {k: list(v) for k, v in published_shapes(kind(known), known).items()} == want


def test_the_models_are_those_that_are_offered():
    assert set(KEYS) == set(published.PUBLISHED)
    for model in KEYS:
        assert GDDPMConfig(model=model).model == model
    with pytest.raises(ValueError, match="m_imgnet_64"):
        GDDPMConfig(model="m_imgnet_32")


# ---------------------------------------------------------------- attention: three ways of ordering its rows


def attention_by_hand(w, b, x, heads, new_order):
    """Return softmax(q k / sqrt(c)) v (B, C, n) of x (B, C, n), q, k and v out of rows in either published order."""
    qkv = torch.einsum("oc,bcn->bon", w, x) + b[:, None]
    order = "b (three h c) n -> three b h c n" if new_order else "b (h three c) n -> three b h c n"
    q, k, v = rearrange(qkv, order, three=3, h=heads)
    weight = (torch.einsum("bhcs,bhct->bhst", q, k) / math.sqrt(q.shape[2])).softmax(-1)
    return torch.einsum("bhst,bhct->bhcs", weight, v).flatten(1, 2)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [{"num_heads": None}, {"num_heads": 2}, {"num_heads": 4}])
def test_rows_of_attention(new_order, heads):
    """num_head_channels 32 of 64 channels are 2 heads; --num_heads counts them instead, as the 128-pixel model does."""
    options = TINY | heads | {"use_new_attention_order": new_order}
    unet = build_unet(options)
    weights = fill(published_shapes(unet, options))
    weights["middle_block.1.proj_out.weight"] = torch.eye(64).half()[..., None]
    weights["middle_block.1.proj_out.bias"] = torch.zeros(64).half()
    loaded(unet, weights, options)
    x = torch.randn(2, 64, 3, 5, generator=torch.Generator().manual_seed(1))
    norm = unet.mid_block.attentions[0].group_norm(x).flatten(2)
    w, b = (weights[f"middle_block.1.qkv.{leaf}"].float() for leaf in ("weight", "bias"))
    want = x.flatten(2) + attention_by_hand(w[..., 0], b, norm, heads["num_heads"] or 2, new_order)
    torch.testing.assert_close(unet.mid_block.attentions[0](x).flatten(2), want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- the adapter


@pytest.mark.parametrize("schedule, name", [("linear", "ddpm_linear"), ("cosine", "ddpm_cosine")])
def test_noise_levels(schedule, name):
    want = np.load(REFERENCE / "sigmas.npz")[name]
    np.testing.assert_allclose(GuidedDDPMAdapter(tiny(), schedule).sigmas, want, rtol=1e-12)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_denoised_by_the_unet(t):
    """D = x - sigma eps, eps the first three of six channels at x / sqrt(1 + sigma^2), told the timestep."""
    unet = tiny()
    adapter = GuidedDDPMAdapter(unet)
    sigma = adapter.sigmas[999 - t].item()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * sigma
    eps = unet(x / math.sqrt(1 + sigma**2), t).sample[:, :3]
    D = adapter.denoise(x, sigma, adapter.embed(["", ""]), adapter.embed(["", ""]), 100.0)
    torch.testing.assert_close(D, x - sigma * eps, rtol=1e-4, atol=1e-4 * sigma)


@pytest.mark.parametrize("options", [{}, {"n_levels": 4000, "rescaled": True}, {"predicts": "sample"}])
@torch.no_grad()
def test_several_levels_in_one_call(options):
    """Of the UNet and of the classifier."""
    adapter = GuidedDDPMAdapter(
        tiny(), default=3, classifier=tiny(kind=NoisyClassifier, seed=1), cls_scaling=2.5, **options
    )
    at_once, one_by_one = at_several_levels(adapter, *adapter.embed(["", ""]).split(1))
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=1e-5 * one_by_one.abs().max().item())


def test_class_reaches_the_unet():
    adapter = GuidedDDPMAdapter(tiny(TINY | {"n_classes": 1000}), default=5)
    x = torch.zeros(3, 3, 16, 16)
    D = adapter.denoise(x, 1.0, adapter.embed(["7", "a view of something", "5"]))
    assert not torch.allclose(D[0], D[1]) and torch.allclose(D[1], D[2], atol=1e-6)
    with pytest.raises(UserError, match="class 1000: must be 0 to 999"):
        adapter.embed(["1000"])


def guided(scale):
    return GuidedDDPMAdapter(tiny(), default=3, classifier=tiny(kind=NoisyClassifier, seed=1), cls_scaling=scale)


def test_classifier_score_is_a_derivative():
    """grad_x log p(y | x / sqrt(1 + sigma^2)), against a central difference along a random direction."""
    adapter, sigma = guided(1.0), guided(1.0).sigmas[500].item()
    adapter.classifier.double()
    rng = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 2, 3, 16, 16, generator=rng, dtype=torch.float64)
    y = torch.tensor([3, 700])

    def log_p(x):
        t = torch.full((2,), adapter.timestep(sigma))
        return adapter.classifier(x / math.sqrt(1 + sigma**2), t).log_softmax(1).gather(1, y[:, None]).sum()

    got = (adapter.classifier_score(x, sigma, y) * v).sum()
    want = (log_p(x + 1e-4 * v) - log_p(x - 1e-4 * v)) / 2e-4
    assert abs(want) > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_classifier_guidance_adds_to_the_score():
    """Score + s grad log p(y | .), so D + s sigma^2 grad log p(y | .); with no gradient left behind."""
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, adapter = guided(0.0), guided(2.5)
    sigma, y = adapter.round_sigma(0.7), adapter.embed(["a view"])
    assert y.tolist() == [3]
    D = adapter.denoise(x, sigma, y)
    want = plain.denoise(x, sigma, y) + 2.5 * sigma**2 * adapter.classifier_score(x, sigma, y)
    torch.testing.assert_close(D, want)
    assert not torch.equal(D, plain.denoise(x, sigma, y)) and not D.requires_grad


# ---------------------------------------------------------------- files


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A data root whose published models are tiny, with the files of two of them; returns the models' folder."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the data root of env.json is below it
    folder = tmp_path / "sjc_data" / published.MODELS
    (folder / "m_imgnet_64").mkdir(parents=True)
    classy = TINY | {"n_classes": 1000, "noise_schedule": "cosine"}
    monkeypatch.setitem(published.PUBLISHED, "m_lsun_256", TINY)
    monkeypatch.setitem(published.PUBLISHED, "m_imgnet_64", classy)
    torch.save(fill(published_shapes(build_unet(TINY), TINY)), folder / "ffhq.pt")
    torch.save(fill(published_shapes(build_unet(classy), classy)), folder / "m_imgnet_64" / "64x64_diffusion.pt")
    torch.save(fill(published_shapes(NoisyClassifier(TINY), TINY)), folder / "64x64_classifier.pt")
    return folder


def config(**gddpm):
    return SJCConfig(family="gddpm", gddpm=gddpm)


def test_published_files_are_found_and_loaded(models):
    faces = make_adapter(config(lsun_cat="ffhq"), "cpu")
    assert faces.data_shape == (3, 16, 16) and faces.classifier is None and faces.unet.dtype == torch.float32
    imagenet = make_adapter(config(model="m_imgnet_64", imgnet_cat=4), "cpu")
    assert imagenet.classifier is not None and imagenet.embed(["front view of it"]).tolist() == [4]
    assert imagenet.sigmas[0] > 1000 > faces.sigmas[0]  # cosine, linear
    assert (
        make_adapter(
            SJCConfig(family="gddpm", gddpm={"model": "m_imgnet_64", "imgnet_cat": 4}, cls_scaling=0), "cpu"
        ).classifier
        is None
    )


def refused(options, *words):
    with pytest.raises(UserError) as caught:
        SJCConfig(**options).check_files()
        make_adapter(SJCConfig(**options), "cpu")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(caught.value)


def test_mistakes_name_what_to_do(models):
    gddpm = {"family": "gddpm"}
    refused(gddpm, "--gddpm.lsun_cat bedroom", "lsun_bedroom.pt", "env.json", "--preset mini")
    refused(gddpm | {"gddpm": {"lsun_cat": "ffhq", "imgnet_cat": 3}}, "class 3", "m_lsun_256 knows none")
    refused(gddpm | {"gddpm": {"model": "m_imgnet_64"}}, "--gddpm.imgnet_cat 0 to 999")
    refused(gddpm | {"gddpm": {"checkpoint": "nosuch.pt"}}, "--gddpm.checkpoint nosuch.pt: no such file")
    refused(gddpm | {"gddpm": {"checkpoint": "."}}, "that is a folder")
    (models / "64x64_classifier.pt").unlink()
    refused(gddpm | {"gddpm": {"model": "m_imgnet_64", "imgnet_cat": 3}}, "64x64_classifier.pt", "--cls_scaling 0")


def test_unfit_files_are_told_apart(models):
    def given(path):
        return {"family": "gddpm", "gddpm": {"checkpoint": str(path)}}

    refused(given(models / "64x64_classifier.pt"), "it is a noisy classifier", "--gddpm.classifier")
    whole = (models / "ffhq.pt").read_bytes()
    (models / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refused(given(models / "cut.pt"), "cut.pt: not a whole PyTorch archive")
    torch.save([torch.zeros(1)], models / "list.pt")
    refused(given(models / "list.pt"), "list.pt: holds no tensors")


def test_a_file_that_would_run_code_is_refused(models):
    torch.save({"a": Path("/")}, models / "evil.pt")
    refused({"family": "gddpm", "gddpm": {"checkpoint": str(models / "evil.pt")}}, "evil.pt: holds no tensors")


# ---------------------------------------------------------------- what a picture is asked to show


def subjects(cfg):
    """What each picture is asked to show, without the files that drawing it takes."""
    n = published.n_classes(cfg.gddpm.model)
    return cfg.subjects(Found(None, None, cfg.gddpm.classes_of(cfg, n), cfg.gddpm))


def test_classes_are_taken_in_turn():
    cfg = SamplingConfig(family="gddpm", gddpm={"model": "m_imgnet_64"}, classes=[1, 207], num_images=5)
    assert subjects(cfg) == ["1", "207", "1", "207", "1"]
    assert subjects(SamplingConfig(family="gddpm", num_images=2)) == ["", ""]  # bedrooms have no class
    drawn, fewer = (
        subjects(SamplingConfig(family="gddpm", gddpm={"model": "m_imgnet_64"}, num_images=n)) for n in (30, 9)
    )
    assert len(set(drawn)) > 20 and drawn[:9] == fewer


# ---------------------------------------------------------------- 3D


@pytest.mark.parametrize(
    "options", [["--gddpm.lsun_cat", "ffhq"], ["--gddpm.model", "m_imgnet_64", "--gddpm.imgnet_cat", "4"]]
)
def test_a_whole_run(models, tmp_path, monkeypatch, options):
    """run_sjc.py with an unconditional model, and with a class and its classifier, rendered smaller than the model."""
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    flags = [
        "--family",
        "gddpm",
        *options,
        "--n_steps",
        "2",
        "--vox.grid_size",
        "6",
        "--pose.rend_hw",
        "8",
        "--sigma_anneal",
        "200",
        "--device",
        "cpu",
    ]
    doctor.main(flags)  # knows that it can
    run_sjc.main(flags)
    assert len(list(Path("test_2/view").iterdir())) == 100
    saved = yaml.safe_load(Path("full_config.yml").read_text())
    assert (saved["vox"]["model_type"], saved["vox"]["c"]) == ("V_SJC", 3)


def test_words_for_precision():
    """Runs of earlier versions have the word autocast in their configuration."""
    assert GDDPMConfig(precision="autocast") == GDDPMConfig() and GDDPMConfig().precision == "auto"
    words = [GDDPMConfig(precision=p).evaluated_in(device) for p in ("auto", "fp32") for device in ("cuda", "cpu")]
    assert words == ["auto: weights in float16, ends of the UNet in float32", "auto: float32", *["fp32: float32"] * 2]
