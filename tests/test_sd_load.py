"""Loading Stable Diffusion: one model in every layout denoises the same; prediction types; LoRAs; errors in a line."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import crafted
from adapt_sd import StableDiffusionAdapter
from my.errors import RunError, UserError
from sd import find, layout
from sd.load import load_parts, probe_prediction
from sjc_config import SDConfig

TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
TO_Q = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q, TEXT_OUT = "encoder.layers.1.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"
RANK, ALPHA = 2, 4.0


def load(path, **options):
    sd = SDConfig(checkpoint=str(path), **options)
    return load_parts(find.fetch(find.find_checkpoint(sd)), sd, torch.float32)


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
    save_file(tensors, folder / "a.safetensors", metadata={"modelspec.prediction_type": "epsilon"} if v2 else None)
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
def v1_tensors():
    return crafted.single_file(crafted.small_parts())


@pytest.fixture(scope="module")
def v2_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("v2") / "a.safetensors"
    save_file(crafted.single_file(crafted.small_parts(v2=True), v2=True), path)
    return path


@pytest.mark.parametrize("options, want", [
    ({"prediction_type": "epsilon"}, "epsilon"), ({"prediction_type": "v_prediction"}, "v_prediction"),
    ({"variant": "v2", "v2_highres": True}, "v_prediction"),
    ({}, "v_prediction")])  # the probe: random weights do not echo their input
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


def test_v1_predicts_noise_unless_told(small, tmp_path):
    v2, _, _, folder = small
    if not v2:
        assert load(folder / "a.safetensors")["scheduler"].config.prediction_type == "epsilon"
    flagged = load(folder / "diffusers", prediction_type="v_prediction")
    assert flagged["scheduler"].config.prediction_type == "v_prediction"


class AsV(torch.nn.Module):
    """The v-prediction network that an epsilon-prediction one is: v = sqrt(abar) eps - sqrt(1 - abar) x0."""

    def __init__(self, unet, abar):
        super().__init__()
        self.unet, self.abar, self.config, self.dtype = unet, abar, unet.config, unet.dtype

    def forward(self, x, t, cond):
        out, a = self.unet(x, t, cond), self.abar[t].item()
        out.sample = a**0.5 * out.sample - (1 - a) ** 0.5 * (x - (1 - a) ** 0.5 * out.sample) / a**0.5
        return out


def test_the_probe_tells_a_trained_network_from_its_v_form():
    """The embedded miniature is trained on noise; rewritten as v, it answers with v."""
    parts = load_parts(find.MINI, SDConfig(variant="mini", prompt="a blue duck"), torch.float32)
    assert probe_prediction(parts) == "epsilon"
    assert probe_prediction({**parts, "unet": AsV(parts["unet"], parts["scheduler"].alphas_cumprod)}) == "v_prediction"


# ---------------------------------------------------------------- running averages


def test_averaged_weights_on_request(tmp_path):
    parts = crafted.small_parts()
    tensors = crafted.single_file(parts)
    ema = {layout.ema_name(name): t / 2 for name, t in tensors.items() if name.startswith(layout.UNET)}
    crafted.save_ckpt({**tensors, **ema, "model_ema.decay": torch.tensor(0.9999)}, tmp_path / "a.ckpt")
    torch.testing.assert_close(denoised(load(tmp_path / "a.ckpt")), denoised(parts), rtol=0, atol=1e-5)
    averaged = load(tmp_path / "a.ckpt", ema=True)["unet"].state_dict()
    assert all(torch.equal(averaged[name], t / 2) for name, t in parts["unet"].state_dict().items())
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="--sd.ema True: .* lacks .* averaged weights, model_ema.diffusion_model"):
        load(tmp_path / "b.safetensors", ema=True)


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
    save_file({f"{names[part]}{layer}.lora_{x}.weight": m for (part, layer), pair in matrices(parts).items()
               for x, m in zip("AB", pair)}, path)
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


@pytest.mark.parametrize("write, weights", [(diffusers_lora, [0.0]), (diffusers_lora, [1.0]), (kohya_lora, [0.5]),
                                            (kohya_lora, [1.0, -0.25])])
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


@pytest.mark.parametrize("content, words", [
    ({"a.weight": (3,)}, "no LoRA: its tensors begin with a.weight"),
    ({"unet.nosuch.to_q.lora_A.weight": (2, 9), "unet.nosuch.to_q.lora_B.weight": (9, 2)},
     "does not fit this checkpoint"),
    ({f"unet.{TO_Q}.lora_A.weight": (2, 9), f"unet.{TO_Q}.lora_B.weight": (9, 2)}, "does not fit this checkpoint")])
def test_unfit_loras(small, tmp_path, content, words):
    save_file({name: torch.ones(shape) for name, shape in content.items()}, tmp_path / "l.safetensors")
    with pytest.raises(UserError, match=f"--sd.lora .*l.safetensors: {words}"):
        load(small[3] / "a.safetensors", lora=[str(tmp_path / "l.safetensors")])


@pytest.mark.parametrize("text, want", [("a.safetensors", ("a.safetensors", 1.0)), ("a:0.5", ("a", 0.5)),
                                        ("a:b.safetensors", ("a:b.safetensors", 1.0)), ("d/a.pt:-1", ("d/a.pt", -1.0))])
def test_path_and_weight(text, want):
    path, weight = find.split_lora(text)
    assert (str(path), weight) == want


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(f"{layout.UNET}out.2.bias"), r"lacks 1 tensors: model.diffusion_model.out.2.bias \[4\]"),
    (lambda t: t.update({f"{layout.VAE}quant_conv.bias": torch.ones(3)}), r"quant_conv.bias \[8\] \(is \[3\]\)"),
    (lambda t: t.update({f"{layout.UNET}new": torch.ones(3, 2)}), r"has no place for 1 tensors: .*new \[3, 2\]"),
    (lambda t: t.update({"control_model.x": torch.ones(3)}), "it is a ControlNet"),
    (lambda t: [t.pop(n) for n in list(t) if not n.startswith(layout.VAE)], "it is a VAE alone")])
def test_unfit_files_end_in_one_line(tmp_path, v1_tensors, change, words):
    tensors = dict(v1_tensors)
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "a.safetensors")
    message = str(caught.value)
    assert str(tmp_path / "a.safetensors") in message and "--preset mini" in message and "\n" not in message


@pytest.mark.parametrize("change, words", [
    (lambda t: t.update({f"{layout.UNET}input_blocks.0.0.weight": torch.ones(3)}), "a shape of another architecture"),
    (lambda t: t.update({f"{layout.CLIP}encoder.layers.99999999.x": torch.ones(1)}), "it lacks .*encoder.layers.2"),
    (lambda t: t.update({f"{layout.CLIP}embeddings.position_embedding.weight": torch.ones(32, 64)}),
     "the tokens that the tokenizer gives and the text encoder takes differ, 32 and 77")])
def test_odd_shapes_end_in_one_line(tmp_path, v1_tensors, change, words):
    tensors = dict(v1_tensors)
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("part, file, text, words", [
    ("tokenizer", "tokenizer.json", None, "tokenizer has no tokenizer.json and no vocab.json"),
    ("tokenizer", "tokenizer_config.json", "[]", "tokenizer_config.json holds no settings"),
    ("scheduler", "scheduler_config.json", "null", "scheduler_config.json holds no settings"),
    ("unet", "config.json", "[]", "config.json holds no settings")])
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


def test_the_text_encoder_is_freed_once_the_prompts_are_read(small):
    adapter = StableDiffusionAdapter(dict(small[1]), offload_text=True)
    adapter.embed(["a cat"])
    adapter.text_done()
    with pytest.raises(RunError, match="has been freed; start with --sd.offload_text False"):
        adapter.embed(["a cat"])
    kept = StableDiffusionAdapter(dict(small[1]))
    kept.text_done()
    assert kept.embed(["a cat"]).shape == (1, 77, 64)
