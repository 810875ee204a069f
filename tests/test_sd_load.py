"""Loading Stable Diffusion: one model in every layout denoises the same; prediction types; LoRAs; errors in a line."""

import collections
import contextlib
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

import crafted
from families.sd import find, hub, layout, lora_files
from families.sd.adapter import StableDiffusionAdapter, make
from families.sd.noise import probe_prediction
from families.sd.options import Options as SDConfig
from my import config
from my.errors import RunError, UserError
from options.sjc import SJCConfig

TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
TO_Q = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q, TEXT_OUT = "encoder.layers.1.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"
RANK, ALPHA = 2, 4.0


def load(path, **options):
    return crafted.load(SDConfig(checkpoint=str(path), **options))


def made(cfg, device):
    """The adapter of a run's configuration."""
    return make(cfg, cfg.chosen.check(cfg), device)


@torch.no_grad()
def denoised(parts, t=300):
    adapter = StableDiffusionAdapter(parts)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    cond = adapter.embed(["front view of a duck", "a cat, sitting; 1920s!"])
    sigma = adapter.sigmas[999 - t].item()
    return adapter.denoise(sigma * x, sigma, cond, adapter.embed(["", "ugly"]), 7.5)


@pytest.fixture(scope="module", params=[False, True], ids=["v1", "v2"])
def small(request, tmp_path_factory):
    """(v2?, the parts, their single file's tensors, a folder with the model in every layout)."""
    folder, v2 = tmp_path_factory.mktemp("small"), request.param
    parts = crafted.small_parts(v2)
    tensors = crafted.single_file(parts, v2)
    crafted.save_folder(parts, folder / "diffusers")
    save_file(tensors, folder / "a.safetensors", metadata={"modelspec.prediction_type": "epsilon"})
    crafted.save_ckpt(tensors, folder / "a.ckpt")
    return v2, parts, tensors, folder


@pytest.mark.parametrize("name", ["diffusers", "a.safetensors", "a.ckpt"])
@torch.no_grad()
def test_every_layout_denoises_the_same(small, name):
    _, parts, _, folder = small
    loaded = load(folder / name, prediction_type="epsilon" if name == "a.ckpt" else "auto")
    torch.testing.assert_close(denoised(loaded), denoised(parts), rtol=0, atol=1e-5)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    a, b = StableDiffusionAdapter(loaded), StableDiffusionAdapter(parts)
    torch.testing.assert_close(a.decode(z), b.decode(z), rtol=0, atol=1e-5)
    torch.testing.assert_close(a.encode(b.decode(z)), b.encode(b.decode(z)), rtol=0, atol=1e-5)
    assert torch.equal(a.sigmas, b.sigmas) and a.data_shape == b.data_shape


def test_the_text_goes_through_clips_tokenizer(small):
    """Known tokens of CLIP's vocabulary; 1.x pads with its end, 2.x with "!"."""
    v2, _, _, folder = small
    tokenizer = load(folder / "a.ckpt", prediction_type="epsilon")["tokenizer"]
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  CAT", padding="max_length").input_ids == [49406, 320, 2368, 49407] + [0 if v2 else 49407] * 73


def test_half_precision_files_are_read_in_float32(small, tmp_path):
    _, parts, tensors, _ = small
    save_file({n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}, tmp_path / "h.safetensors")
    loaded = load(tmp_path / "h.safetensors", prediction_type="epsilon")
    assert loaded["unet"].dtype == loaded["vae"].dtype == torch.float32
    torch.testing.assert_close(denoised(loaded), denoised(parts), rtol=0.1, atol=0.1)


def test_folders_of_pickles_load_without_executing_them(small, tmp_path):
    """Old diffusers folders hold their weights in .bin files."""
    _, parts, _, folder = small
    shutil.copytree(folder / "diffusers", tmp_path / "old")
    for file, old in (("unet/diffusion_pytorch_model", None), ("text_encoder/model", "text_encoder/pytorch_model")):
        path = tmp_path / "old" / f"{file}.safetensors"
        torch.save(load_file(path), tmp_path / "old" / f"{old or file}.bin")
        path.unlink()
    torch.testing.assert_close(denoised(load(tmp_path / "old")), denoised(parts), rtol=0, atol=1e-5)
    bite = crafted.attacks(tmp_path / "canary")["in a state_dict"][0]
    crafted.as_archive(bite, tmp_path / "old" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="diffusion_pytorch_model.bin: holds no tensors"):
        load(tmp_path / "old")
    assert not (tmp_path / "canary").exists()


# ---------------------------------------------------------------- prediction types


@pytest.fixture(scope="module")
def v1_parts():
    return crafted.small_parts()


@pytest.fixture(scope="module")
def v1_tensors(v1_parts):
    return crafted.single_file(v1_parts)


@pytest.fixture(scope="module")
def v2_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("v2") / "a.safetensors"
    save_file(crafted.single_file(crafted.small_parts(v2=True), v2=True), path)
    return path


@pytest.mark.parametrize(
    "options, want",
    [
        ({"prediction_type": "epsilon"}, "epsilon"),
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"variant": "v2", "v2_highres": True}, "v_prediction"),
        ({}, "v_prediction"),
    ],
)  # the probe: random weights do not echo their input
def test_prediction_type_of_a_v2_file(v2_file, capsys, options, want):
    parts = load(v2_file, **options)
    assert parts["scheduler"].config.prediction_type == want
    assert parts["unet"].config.sample_size == (384 if want == "v_prediction" else 256)  # of 768 or 512 pixels
    assert f"is Stable Diffusion 2.x, {want.replace('_', '-')}" in capsys.readouterr().err


@pytest.mark.parametrize("stated, want", [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_metadata_states_the_prediction_type(tmp_path, small, stated, want):
    _, _, tensors, _ = small
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.prediction_type": stated})
    assert load(tmp_path / "a.safetensors")["scheduler"].config.prediction_type == want


def test_marker_of_v_prediction(tmp_path, v1_tensors):
    save_file({**v1_tensors, "v_pred": torch.zeros(0)}, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors")["scheduler"].config.prediction_type == "v_prediction"


def test_an_option_decides_what_a_folder_predicts(small):
    flagged = load(small[3] / "diffusers", prediction_type="v_prediction")
    assert flagged["scheduler"].config.prediction_type == "v_prediction"


def test_a_file_or_folder_that_states_nothing_is_asked(small, tmp_path, capsys):
    """1.x as well as 2.x: random weights do not echo their input, so that they are taken for v-prediction."""
    file = small[3] / "a.ckpt"
    assert load(file)["scheduler"].config.prediction_type == "v_prediction"
    assert "v-prediction (asked with pure noise, as nothing states it)" in capsys.readouterr().err
    folder = edited(small[3] / "diffusers", tmp_path / "m", "scheduler/scheduler_config.json", prediction_type=None)
    assert load(folder)["scheduler"].config.prediction_type == "v_prediction"


class AsNoise(torch.nn.Module):
    """The epsilon-prediction network that a v-prediction one is: eps = sqrt(abar) v + sqrt(1 - abar) x."""

    def __init__(self, unet, abar):
        super().__init__()
        self.unet, self.abar, self.config, self.dtype = unet, abar, unet.config, unet.dtype

    def forward(self, x, t, cond):
        self.asked = t
        out, a = self.unet(x, t, cond), self.abar[t].item()
        out.sample = a**0.5 * out.sample + (1 - a) ** 0.5 * x
        return out


def test_the_probe_tells_a_trained_network_from_its_noise_form():
    """The embedded miniature is trained on v; rewritten as noise, it answers with noise."""
    parts = crafted.load(SDConfig(variant="mini", prompt="a blue duck"))
    assert probe_prediction(parts) == "v_prediction"
    assert probe_prediction({**parts, "unet": AsNoise(parts["unet"], parts["scheduler"].alphas_cumprod)}) == "epsilon"


def test_the_probe_of_a_schedule_that_ends_in_pure_noise():
    """With zero terminal SNR, abar of the last step is 0, where noise and v are one; the step before tells."""
    parts = crafted.load(SDConfig(variant="mini", prompt="a blue duck"))
    zero = DDIMScheduler(**layout.SCHEDULE, rescale_betas_zero_snr=True)
    parts = {**parts, "scheduler": zero}
    assert zero.alphas_cumprod[-1] == 0 and probe_prediction(parts) == "v_prediction"
    unet = AsNoise(parts["unet"], zero.alphas_cumprod)
    assert probe_prediction({**parts, "unet": unet}) == "epsilon" and unet.asked == 998


# ---------------------------------------------------------------- running averages


def test_averaged_weights_on_request(tmp_path):
    parts = crafted.small_parts()
    tensors = crafted.single_file(parts)
    ema = {layout.ema_name(name): t / 2 for name, t in tensors.items() if name.startswith(layout.UNET)}
    crafted.save_ckpt({**tensors, **ema, "model_ema.decay": torch.tensor(0.9999)}, tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt", prediction_type="epsilon")
    torch.testing.assert_close(denoised(loaded), denoised(parts), rtol=0, atol=1e-5)
    averaged = load(tmp_path / "a.ckpt", ema=True)["unet"].state_dict()
    assert all(torch.equal(averaged[name], t / 2) for name, t in parts["unet"].state_dict().items())
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="--sd.ema True: .* lacks .* averaged weights, model_ema.diffusion_model"):
        load(tmp_path / "b.safetensors", ema=True)


# ---------------------------------------------------------------- looked for once


def test_every_file_is_looked_for_once(small, tmp_path, monkeypatch):
    """The options name the files; what `check` found of them is handed on to the loader, and to the doctor."""
    _, parts, _, folder = small
    kohya_lora(parts, tmp_path / "l.safetensors")
    calls = collections.Counter()

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.update([name]) or original(*args))

    for module, name in (
        (find, "find_checkpoint"),
        (find, "vae_place"),
        (lora_files, "split"),
        (lora_files, "files_of"),
        (hub, "cached"),
    ):
        counted(module, name)
    options = {"vae": str(folder / "diffusers"), "lora": [str(tmp_path / "l.safetensors")]}
    for name in ("a.safetensors", "diffusers"):
        calls.clear()
        cfg = SJCConfig(sd={"checkpoint": str(folder / name), **options})
        found = cfg.chosen.check(cfg)
        make(cfg, found, "meta")
        assert cfg.chosen.to_download(found) is None
        assert cfg.chosen.checkpoints(found) == {"model": folder / name, "VAE": folder / "diffusers" / "vae"}
        assert calls == {"find_checkpoint": 1, "vae_place": 1, "split": 2, "files_of": 1}  # split: a name, then a path


# ---------------------------------------------------------------- without weights


@pytest.mark.parametrize("name", ["diffusers", "a.safetensors", "a.ckpt"])
def test_without_weights_all_is_there_but_numbers(small, tmp_path, name):
    """As doctor.py looks at a model: LoRAs are compared, prompts are read, shapes come out."""
    _, parts, _, folder = small
    kohya_lora(parts, tmp_path / "l.safetensors")
    sd = SDConfig(checkpoint=str(folder / name), lora=[str(tmp_path / "l.safetensors")])
    adapter = StableDiffusionAdapter(crafted.load(sd, empty=True), "meta")
    cond = adapter.embed(["a cat"])
    assert (
        cond.is_meta and cond.shape == (1, 77, 64) and torch.equal(adapter.sigmas, StableDiffusionAdapter(parts).sigmas)
    )
    assert all(p.is_meta for net in (adapter.unet, adapter.vae, adapter.text_encoder) for p in net.parameters())
    assert adapter.decode(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 3, 16, 16)


# ---------------------------------------------------------------- LoRA


def matrices(parts, seed=0):
    """{(part, layer): (A, B)}: low-rank changes of two layers of the UNet and two of the text encoder."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for part, layer in (("unet", TO_OUT), ("unet", TO_Q), ("text_encoder", TEXT_Q), ("text_encoder", TEXT_OUT)):
        out, inner = parts[part].get_submodule(layer).weight.shape
        found[part, layer] = tuple(torch.randn(shape, generator=rng) for shape in ((RANK, inner), (out, RANK)))
    return found


def diffusers_lora(parts, path):
    names = {"unet": "unet.", "text_encoder": "text_encoder.text_model."}
    save_file(
        {
            f"{names[part]}{layer}.lora_{x}.weight": m
            for (part, layer), pair in matrices(parts).items()
            for x, m in zip("AB", pair)
        },
        path,
    )
    return 1.0


def kohya_lora(parts, path):
    """The layout of kohya's trainer, whose scale is alpha / rank."""
    names, tensors = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}, {}
    for (part, layer), pair in matrices(parts).items():
        stem = names[part] + layer.replace(".", "_")
        tensors |= {f"{stem}.lora_{x}.weight": m for x, m in zip(("down", "up"), pair)}
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)
    return ALPHA / RANK


@pytest.mark.parametrize(
    "write, weights",
    [(diffusers_lora, [0.0]), (diffusers_lora, [1.0]), (kohya_lora, [0.5]), (kohya_lora, [1.0, -0.25])],
)
def test_lora_equals_the_fused_weights(small, tmp_path, write, weights):
    """A weight of 0 changes nothing; any other adds weight * alpha / rank * B A, and leaves nothing else behind."""
    _, parts, _, folder = small
    scale = write(parts, tmp_path / "l.safetensors") * sum(weights)
    loaded = load(folder / "a.safetensors", lora=[f"{tmp_path / 'l.safetensors'}:{w}" for w in weights])
    base = load(folder / "a.safetensors")
    for (part, layer), (A, B) in matrices(parts).items():
        got, before = (p[part].get_submodule(layer).weight for p in (loaded, base))
        torch.testing.assert_close(got, before + scale * B @ A, rtol=0, atol=1e-5)
        with torch.no_grad():
            before += scale * B @ A
    assert loaded["unet"].state_dict().keys() == base["unet"].state_dict().keys()  # nothing is left of the adapter
    torch.testing.assert_close(denoised(loaded), denoised(base), rtol=1e-4, atol=1e-3)
    if not sum(weights):
        assert torch.equal(denoised(loaded), denoised(load(folder / "a.safetensors")))


@pytest.mark.parametrize("keep", [TEXT_Q, TEXT_OUT, TO_Q])
def test_a_lora_of_one_kind_of_layer_only(small, tmp_path, keep):
    """Of kohya's trainer, whose text part may have q_proj alone."""
    kohya_lora(small[1], tmp_path / "l.safetensors")
    tensors = {name: t for name, t in load_file(tmp_path / "l.safetensors").items() if keep.replace(".", "_") in name}
    assert len(tensors) == 3
    save_file(tensors, tmp_path / "one.safetensors")
    loaded = load(small[3] / "a.safetensors", lora=[str(tmp_path / "one.safetensors")])
    for (part, layer), (A, B) in matrices(small[1]).items():
        change = loaded[part].get_submodule(layer).weight - small[1][part].get_submodule(layer).weight
        want = ALPHA / RANK * B @ A if layer == keep else torch.zeros_like(change)
        torch.testing.assert_close(change, want, rtol=0, atol=1e-5)


CONV = "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize(
    "names, metadata, scale",
    [
        ("lora_unet_{flat}.lora_down.weight lora_unet_{flat}.lora_up.weight", {}, 1),
        (
            "base_model.model.unet.{layer}.lora_A.default.weight base_model.model.unet.{layer}.lora_B.default.weight",
            {},
            1,
        ),
        ("{layer}.lora.down.weight {layer}.lora.up.weight", {}, 1),
        (
            "unet.{layer}.lora_A.weight unet.{layer}.lora_B.weight",
            {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 2}'},
            4,
        ),
    ],
)
def test_a_lora_of_a_convolution(small, tmp_path, names, metadata, scale):
    """B A of convolutions: A has the kernel, B is 1x1; under every spelling, and with alpha in the metadata."""
    weight = small[1]["unet"].get_submodule(CONV).weight
    A, B = torch.randn(RANK, *weight.shape[1:]), torch.randn(len(weight), RANK, 1, 1)
    down, up = names.format(layer=CONV, flat=CONV.replace(".", "_")).split()
    save_file({down: A, up: B}, tmp_path / "l.safetensors", metadata=metadata)
    loaded = load(small[3] / "a.safetensors", lora=[str(tmp_path / "l.safetensors")])
    want = weight + scale * torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    torch.testing.assert_close(loaded["unet"].get_submodule(CONV).weight, want, rtol=0, atol=1e-4)


def test_a_rank_stabilised_scale_in_the_metadata(small, tmp_path):
    """alpha / sqrt(r) of the part that states it: 8 / sqrt(2); of the other part nothing is stated."""
    diffusers_lora(small[1], tmp_path / "l.safetensors")
    save_file(
        load_file(tmp_path / "l.safetensors"),
        tmp_path / "rs.safetensors",
        metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.use_rslora": true}'},
    )
    loaded = load(small[3] / "a.safetensors", lora=[str(tmp_path / "rs.safetensors")])
    for (part, layer), (A, B) in matrices(small[1]).items():
        want = small[1][part].get_submodule(layer).weight + (8 / 2**0.5 if part == "unet" else 1) * B @ A
        torch.testing.assert_close(loaded[part].get_submodule(layer).weight, want, rtol=0, atol=1e-5)


def test_the_attention_processors_of_old_diffusers(small, tmp_path):
    A, B = matrices(small[1])["unet", TO_OUT]
    stem = TO_OUT.replace("attn2.to_out.0", "attn2.processor.to_out_lora")
    save_file({f"{stem}.down.weight": A, f"{stem}.up.weight": B}, tmp_path / "l.safetensors")
    loaded = load(small[3] / "a.safetensors", lora=[f"{tmp_path / 'l.safetensors'}:2"])
    want = small[1]["unet"].get_submodule(TO_OUT).weight + 2 * B @ A
    torch.testing.assert_close(loaded["unet"].get_submodule(TO_OUT).weight, want, rtol=0, atol=1e-5)


FITS = {f"unet.{TO_OUT}.lora_A.weight": (2, 32), f"unet.{TO_OUT}.lora_B.weight": (32, 2)}


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a.weight": (3,)}, "no LoRA: its tensors begin with a.weight"),
        (
            {"unet.nosuch.to_q.lora_A.weight": (2, 9), "unet.nosuch.to_q.lora_B.weight": (9, 2)},
            "does not fit this checkpoint: its only layer is not in this model: unet_nosuch_to_q;",
        ),
        (
            {**FITS, "lora_te2_x.lora_down.weight": (2, 9), "lora_te2_x.lora_up.weight": (9, 2)},
            "does not fit this checkpoint: 1 of its 2 layers is not in this model: lora_te2_x;",
        ),
        ({**FITS, "lora_unet_x.alpha": ()}, "does not fit this checkpoint: 1 of its 2 layers .*: lora_unet_x;"),
        ({**FITS, f"unet.{TO_OUT}.lora_magnitude_vector": (32,)}, "1 of its tensors is of no plain LoRA: unet.*DoRA"),
        ({**FITS, "lora_unet_x.dora_scale": (32,)}, "1 of its tensors is of no plain LoRA: lora_unet_x.dora_scale;"),
        ({"lora_unet_x.hada_w1_a": (2, 9)}, "1 of its tensors is of no plain LoRA"),
        (
            {**FITS, f"unet.{TO_Q}.lora_A.weight": (2, 9)},
            "incomplete or damaged: unet_.*to_q has one of its two tensors only; get the file again",
        ),
        ({f"lora_unet_{TO_OUT.replace('.', '_')}.alpha": ()}, "incomplete or damaged: it has no layers;"),
        ({**FITS, f"lora_unet_{TO_OUT.replace('.', '_')}.alpha": (3,)}, "the alphas .* are not one number each;"),
        (
            {f"unet.{TO_Q}.lora_A.weight": (2, 9), f"unet.{TO_Q}.lora_B.weight": (9, 2)},
            r"does not fit .*to_q is \[\d+, \d+\] here, which \[2, 9\] and \[9, 2\] do not make;",
        ),
    ],
)
def test_unfit_loras(small, tmp_path, content, words):
    save_file({name: torch.ones(shape) for name, shape in content.items()}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=f"--sd.lora .*l.safetensors: {words}"):
        load(small[3] / "a.safetensors", lora=[str(tmp_path / "l.safetensors")])


BAD = {"nan": float("nan"), "inf": float("inf"), "huge": 3e38}


@pytest.mark.parametrize("where, value", [(w, v) for w in ("A", "B", "alpha") for v in BAD] + [("weight", "1e300")])
def test_a_lora_that_adds_what_is_not_finite(v1_parts, tmp_path, where, value):
    """3e38 is finite, but not times 4."""
    path, layer = tmp_path / "l.safetensors", f"lora_unet_{TO_OUT.replace('.', '_')}"
    tensors = {
        f"{layer}.lora_down.weight": torch.full((2, 32), 2.0),
        f"{layer}.lora_up.weight": torch.ones(32, 2),
        f"{layer}.alpha": torch.tensor(4.0),
    }
    if where != "weight":
        tensors[dict(zip(("A", "B", "alpha"), tensors))[where]].view(-1)[0] = BAD[value]
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"--sd.lora {path}: what it adds to {layer} is not finite"):
        crafted.fuse(v1_parts, path, float(value) if where == "weight" else 1.0)


@pytest.mark.parametrize(
    "dtype, fine",
    [
        (torch.int8, False),
        (torch.uint8, False),
        (torch.float64, True),
        (torch.float8_e4m3fn, True),
        (torch.bfloat16, True),
    ],
)
def test_weights_that_are_whole_numbers_are_quantised(v1_parts, tmp_path, v1_tensors, tiny_sd, dtype, fine):
    """Of a LoRA, of a file and of a folder; CLIP's position_ids are none."""
    model, path = shutil.copytree(tiny_sd, tmp_path / "m"), "unet/diffusion_pytorch_model.safetensors"
    last, ids = f"{layout.UNET}out.2.weight", f"{layout.CLIP}embeddings.position_ids"
    save_file({**v1_tensors, last: v1_tensors[last].to(dtype), ids: torch.arange(77)}, tmp_path / "a.safetensors")
    save_file({name: torch.ones(shape).to(dtype) for name, shape in FITS.items()}, tmp_path / "l.safetensors")
    tensors = load_file(model / path)
    save_file(
        {n: t.to(dtype) if n == "conv_out.weight" else t for n, t in tensors.items()},
        model / path,
        metadata={"format": "pt"},
    )
    for read in (
        lambda: load(tmp_path / "a.safetensors"),
        lambda: load(model),
        lambda: crafted.fuse(dict(v1_parts), tmp_path / "l.safetensors", 0.0),
    ):
        if fine:
            read()
            continue
        with pytest.raises(UserError, match="quantised, which is not supported: .*use .*plain"):
            read()


@pytest.mark.parametrize(
    "stated",
    [
        "{",
        "[]",
        "8",
        '{"unet.lora_alpha": "8"}',
        '{"unet.lora_alpha": null}',
        '{"unet.lora_alpha": true}',
        '{"unet.lora_alpha": [1, 2]}',
    ],
)
def test_metadata_of_a_lora_that_tell_no_alpha(v1_parts, tmp_path, stated):
    save_file(
        {name: torch.ones(shape) for name, shape in FITS.items()},
        tmp_path / "l.safetensors",
        metadata={"lora_adapter_metadata": stated},
    )
    with pytest.raises(UserError, match="--sd.lora .*l.safetensors: the alphas in its .* are not one number each"):
        crafted.fuse(v1_parts, tmp_path / "l.safetensors", 1.0)


def test_a_lora_file_without_tensors(v1_parts, tmp_path):
    (tmp_path / "l.safetensors").touch()
    with pytest.raises(UserError, match="^--sd.lora .*l.safetensors: cannot be read: it is empty"):
        crafted.fuse(v1_parts, tmp_path / "l.safetensors", 1.0)


@pytest.mark.parametrize(
    "text, want",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a:0.5", ("a", 0.5)),
        ("a:b.safetensors", ("a:b.safetensors", 1.0)),
        ("d/a.pt:-1", ("d/a.pt", -1.0)),
    ],
)
def test_path_and_weight(text, want):
    path, weight = lora_files.split(text)
    assert (str(path), weight) == want


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(f"{layout.UNET}out.2.bias"), r"lacks 1 tensor: model.diffusion_model.out.2.bias \[4\]"),
        (lambda t: t.update({f"{layout.VAE}quant_conv.bias": torch.ones(3)}), r"quant_conv.bias \[8\] \(is \[3\]\)"),
        (lambda t: t.update({f"{layout.UNET}new": torch.ones(3, 2)}), r"has no place for 1 tensor: .*new \[3, 2\]"),
        (lambda t: t.update({"control_model.x": torch.ones(3)}), "it is a ControlNet"),
        (lambda t: [t.pop(n) for n in list(t) if not n.startswith(layout.VAE)], "it is a VAE alone"),
    ],
)
def test_unfit_files_end_in_one_line(tmp_path, v1_tensors, change, words):
    tensors = dict(v1_tensors)
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "a.safetensors")
    message = str(caught.value)
    assert str(tmp_path / "a.safetensors") in message and "--preset mini" in message and "\n" not in message


def test_a_text_encoder_of_more_tokens(tmp_path, v1_tensors):
    """LongCLIP's, which reads 248: so does the tokenizer, and a prompt that long is told apart at its end."""
    name = f"{layout.CLIP}embeddings.position_embedding.weight"
    rows = torch.randn(248, 64, generator=torch.Generator().manual_seed(0))
    save_file({**v1_tensors, name: rows}, tmp_path / "a.safetensors")
    adapter = StableDiffusionAdapter(load(tmp_path / "a.safetensors", prediction_type="epsilon"))
    long = adapter.embed(["cat " * 200 + "dog", "cat " * 201])
    assert long.shape == (2, 248, 64) and not torch.equal(long[0], long[1])


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t.update({f"{layout.UNET}input_blocks.0.0.weight": torch.ones(3)}),
            "a shape of another architecture",
        ),
        (lambda t: t.update({f"{layout.CLIP}encoder.layers.99999999.x": torch.ones(1)}), "it lacks .*encoder.layers.2"),
        (
            lambda t: t.update({f"{layout.CLIP}embeddings.position_embedding.weight": torch.ones(32, 64)}),
            "the tokens that the tokenizer gives and the text encoder takes differ, 32 and 77",
        ),
    ],
)
def test_odd_shapes_end_in_one_line(tmp_path, v1_tensors, change, words):
    tensors = dict(v1_tensors)
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "part, file, text, words",
    [
        ("tokenizer", "tokenizer.json", None, "tokenizer has no tokenizer.json and no vocab.json"),
        ("tokenizer", "tokenizer_config.json", "[]", "tokenizer_config.json holds no settings"),
        ("scheduler", "scheduler_config.json", "null", "scheduler_config.json holds no settings"),
        ("vae", "config.json", "{", "vae/config.json is damaged"),
        ("tokenizer", "tokenizer.json", "{", ": tokenizer: "),
        ("unet", "config.json", "[]", "unet/config.json holds no settings"),
    ],
)
def test_damaged_folders_end_in_one_line(small, tmp_path, part, file, text, words):
    shutil.copytree(small[3] / "diffusers", tmp_path / "model")
    for path in (tmp_path / "model" / part).glob("vocab.json" if text is None else "nosuch"):
        path.unlink()
    (tmp_path / "model" / part / file).unlink(missing_ok=True)
    if text is not None:
        (tmp_path / "model" / part / file).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def edited(folder, path, file, **settings):
    """A copy of a diffusers folder, with settings in one of its JSON files changed, or left out where None."""
    shutil.copytree(folder, path)
    old = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps({k: v for k, v in {**old, **settings}.items() if v is not None}))
    return path


@pytest.mark.parametrize(
    "file, settings, words",
    [
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow_prediction"},
            "prediction_type is 'flow_prediction'; known are epsilon, v_prediction, sample",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**11}, "scheduler_config.json is 100000000000"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": "x"},
            "in scheduler/scheduler_config.json is x, not 1",
        ),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "scheduler/scheduler_config.json: "),
        ("unet/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "its unet is quantised"),
        (
            "unet/config.json",
            {"cross_attention_dim": 32},
            r"unet: .*to_k.weight is \(\d+, 64\) in the weights, and \(\d+, 32\) by config.json; get the folder again",
        ),
        (
            "text_encoder/config.json",
            {"vocab_size": 10},
            r"text_encoder: .*token_embedding.weight is \(.*, 64\) in the weights, and \(10, 64\) by config.json",
        ),
        ("unet/config.json", {"layers_per_block": 99999}, "unet: layers_per_block, 99999, is beyond what weights of"),
        ("text_encoder/config.json", {"num_hidden_layers": 99999}, "text_encoder: num_hidden_layers, 99999, is beyond"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**11}, "max_position_embeddings, 1.*, is beyond"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "text_encoder has no place for 16 of its weights"),
    ],
)
def test_settings_of_another_model_end_in_one_line(small, tmp_path, file, settings, words):
    with pytest.raises(UserError, match=words) as caught:
        load(edited(small[3] / "diffusers", tmp_path / "m", file, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "file, name, values",
    [
        ("unet/config.json", "sample_size", [[16, 24], 0, -4, "x", 16.5, True, 10**6]),
        ("vae/config.json", "scaling_factor", [0, -1, "a", True, [1]]),
    ],
)
@pytest.mark.parametrize("empty", [False, True], ids=["run", "doctor"])
def test_settings_that_no_picture_can_be_made_with(tiny_sd, tmp_path, file, name, values, empty):
    for i, value in enumerate(values):
        model = edited(tiny_sd, tmp_path / str(i), file, **{name: value})
        with pytest.raises(UserError, match=f"{model}: {name} in {file} is .*, not .*; correct it, or get going"):
            crafted.load(SDConfig(checkpoint=str(model)), empty=empty)


def test_settings_that_are_null_are_stable_diffusions(tiny_sd, tmp_path):
    """Its 512-pixel pictures, of which this VAE, of two levels, makes latents half as large."""
    for file, name in (("unet/config.json", "sample_size"), ("vae/config.json", "scaling_factor")):
        path = (edited(tiny_sd, tmp_path / "m", file) if name == "sample_size" else tmp_path / "m") / file
        path.write_text(json.dumps({**json.loads(path.read_text()), name: None}))
    adapter = StableDiffusionAdapter(load(tmp_path / "m"))
    assert adapter.data_shape == (4, 256, 256) and adapter.picture_size == 512 and adapter.scaling == 0.18215


def test_betas_that_are_no_schedule(tiny_sd, tmp_path):
    model = edited(tiny_sd, tmp_path / "m", "scheduler/scheduler_config.json", beta_end=-2.0, beta_schedule="linear")
    with pytest.raises(UserError, match=f"^{model}: the betas .* get its scheduler/scheduler_config.json again"):
        made(SJCConfig(sd={"checkpoint": str(model), "prompt": "a blue duck"}), "cpu")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sd.variant", "v1"], None),
        ([], None),
        (["--preset", "mini"], None),
        (["--sd.variant", "v2"], "--sd.variant v2: .*a.safetensors, given as --sd.checkpoint, is v1; leave one of"),
        (["--sd.variant", "v2", "--sd.v2_highres", "True"], "--sd.variant v2: .* is v1"),
        (["--sd.variant", "mini"], "--sd.variant mini: .* is v1"),
    ],
)
def test_a_variant_beside_a_checkpoint_of_another(v1_tensors, tmp_path, argv, words):
    save_file(v1_tensors, tmp_path / "a.safetensors")
    cfg = config.load(
        SJCConfig,
        ["--sd.checkpoint", str(tmp_path / "a.safetensors"), *argv],
        prog="",
        doc="",
        presets_dir=find.ROOT / "presets",
        config_file=None,
    )
    if words is None:
        assert made(cfg, "meta").data_shape == (4, 256, 256)
        return
    with pytest.raises(UserError, match=words):
        made(cfg, "meta")


def test_a_variant_beside_a_checkpoint_of_version_2(v2_file):
    for variant, fits in (("v2", True), ("v1", False)):
        cfg = config.load(
            SJCConfig, ["--sd.checkpoint", str(v2_file), "--sd.variant", variant], prog="", doc="", config_file=None
        )
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="--sd.variant v1: .* is v2"):
            made(cfg, "meta")


def test_the_level_of_pure_noise_is_left_out(small, tmp_path):
    """A schedule with zero terminal SNR: sqrt((1 - abar) / abar) of its last step is infinite."""
    model = edited(
        small[3] / "diffusers", tmp_path / "m", "scheduler/scheduler_config.json", rescale_betas_zero_snr=True
    )
    adapter = StableDiffusionAdapter(load(model))
    assert len(adapter.sigmas) == 999 and adapter.sigmas.isfinite().all()
    assert adapter.timestep(adapter.sigmas[0].item()) == 998


def test_a_tokenizer_that_does_not_say_how_much_it_takes(small, tmp_path):
    model = edited(small[3] / "diffusers", tmp_path / "m", "tokenizer/tokenizer_config.json", model_max_length=None)
    assert load(model)["tokenizer"].model_max_length == 77


@pytest.mark.parametrize("ending", [".fp16.safetensors", ".fp16.bin", ".bin"])
def test_folders_of_a_variant_only_and_tensors_of_one_storage(small, tmp_path, ending):
    shutil.copytree(small[3] / "diffusers", tmp_path / "m")
    for path in sorted((tmp_path / "m").rglob("*.safetensors")):
        tensors = load_file(path)
        stem = path.stem.replace("model", "pytorch_model") if path.stem == "model" and "bin" in ending else path.stem
        if "bin" in ending:
            flat = torch.cat([t.flatten() for t in tensors.values()])
            sizes = [t.numel() for t in tensors.values()]
            tensors = {n: piece.view(t.shape) for (n, t), piece in zip(tensors.items(), flat.split(sizes))}
            torch.save(tensors, path.with_name(stem + ending))
        else:
            save_file(tensors, path.with_name(stem + ending))
        path.unlink()
    torch.testing.assert_close(denoised(load(tmp_path / "m")), denoised(small[1]), rtol=0, atol=1e-5)


def test_the_attention_names_of_old_vaes(small, tmp_path):
    """As in the published folder of version 1.5."""
    shutil.copytree(small[3] / "diffusers", tmp_path / "m")
    path, old = (
        tmp_path / "m" / "vae" / "diffusion_pytorch_model.safetensors",
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {n.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): t for n, t in tensors.items()}
    assert sum(".query." in n for n in tensors) == 4
    save_file(tensors, path, metadata={"format": "pt"})
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    want, got = (StableDiffusionAdapter(dict(parts)).decode(z) for parts in (small[1], load(tmp_path / "m")))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    crafted.load(SDConfig(checkpoint=str(tmp_path / "m")), empty=True)


@pytest.mark.parametrize("precision, has_bf16, slow", [("fp16", True, 1), ("bf16", False, 1), ("bf16", True, 0)])
def test_half_precision_on_a_cpu_is_said_to_be_slow(small, capsys, monkeypatch, precision, has_bf16, slow):
    """bf16 is slow only on a processor without instructions for it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    cfg = SJCConfig(sd={"checkpoint": str(small[3] / "diffusers"), "precision": precision})
    made(cfg, "cpu")
    assert capsys.readouterr().err.count(f"--sd.precision {precision} is very slow on this CPU") == slow


def test_the_text_encoder_is_freed_once_the_prompts_are_read(small):
    adapter = StableDiffusionAdapter(dict(small[1]), offload_text=True)
    adapter.embed(["a cat"])
    adapter.text_done()
    with pytest.raises(RunError, match="has been freed; start with --sd.offload_text False"):
        adapter.embed(["a cat"])
    kept = StableDiffusionAdapter(dict(small[1]))
    kept.text_done()
    assert kept.embed(["a cat"]).shape == (1, 77, 64)
