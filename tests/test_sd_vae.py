"""--sd.vae: a VAE for a checkpoint sold without one, or in place of its own, in every layout that VAEs come in."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import crafted
from families.sd import find, layout, names
from families.sd.options import Options as SDConfig
from my.errors import UserError

VAE = layout.VAE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder with whole.safetensors, none.safetensors without a VAE, diffusers/; its tensors; another VAE's parts)."""
    folder, parts = tmp_path_factory.mktemp("model"), crafted.small_parts()
    tensors = crafted.single_file(parts)
    save_file(tensors, folder / "whole.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith(VAE)}, folder / "none.safetensors")
    crafted.save_folder(parts, folder / "diffusers")
    return folder, tensors, crafted.small_parts(seed=1)


def load(path, vae, empty=False):
    sd = SDConfig(checkpoint=str(path), vae=str(vae), prediction_type="epsilon")
    return crafted.load(sd, empty=empty)


def old(name):
    """The name of diffusers' VAEs before 2023."""
    for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
    return name


def written(kind, parts, path):
    """Write a VAE in a layout; return what --sd.vae is given."""
    of_diffusers, tensors = parts["vae"].state_dict(), crafted.single_file(parts)
    published = {n: t for n, t in tensors.items() if n.startswith(VAE)}
    bare = {n.removeprefix(VAE): t for n, t in published.items()}
    if kind == "folder":
        parts["vae"].save_pretrained(path)
    elif kind == "folder of a model":
        parts["vae"].save_pretrained(path / "vae")
    elif kind == "training of a VAE, .ckpt":
        crafted.save_ckpt({**bare, "loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}, path)
    elif kind == ".pt":
        torch.save(bare, path)
    else:
        save_file(
            {
                "prefix": published,
                "bare": bare,
                "diffusers": of_diffusers,
                "whole checkpoint": tensors,
                "old diffusers": {old(n): t.clone() for n, t in of_diffusers.items()},
            }[kind],
            path,
        )
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "prefix",
        "bare",
        "diffusers",
        "old diffusers",
        "whole checkpoint",
        ".pt",
        "training of a VAE, .ckpt",
        "folder",
        "folder of a model",
    ],
)
def test_every_layout_of_a_vae_is_read(model, tmp_path, kind):
    folder, _, other = model
    vae = load(folder / "none.safetensors", written(kind, other, tmp_path / "v"))["vae"]
    want = other["vae"].state_dict()
    assert vae.state_dict().keys() == want.keys()
    assert all(torch.equal(vae.state_dict()[name], t) for name, t in want.items())
    assert vae.config.scaling_factor == 0.18215


def test_a_vae_takes_the_place_of_another(model, tmp_path):
    folder, _, other = model
    written("bare", other, tmp_path / "v")
    name = "decoder.conv_out.weight"
    for path in (folder / "whole.safetensors", folder / "diffusers"):
        parts = load(path, tmp_path / "v")
        assert torch.equal(parts["vae"].state_dict()[name], other["vae"].state_dict()[name])
    lacking = shutil.copytree(folder / "diffusers", tmp_path / "m")
    shutil.rmtree(lacking / "vae")
    with pytest.raises(UserError, match="has no vae; give one with --sd.vae FILE_OR_FOLDER"):
        find.find_checkpoint(SDConfig(checkpoint=str(lacking)))
    assert load(lacking, tmp_path / "v", empty=True)["vae"].config.scaling_factor == 0.18215


def test_a_checkpoint_without_a_vae_says_what_to_do(model):
    folder = model[0]
    with pytest.raises(UserError, match="none.safetensors: .* it has no VAE; give one with --sd.vae FILE_OR_FOLDER"):
        crafted.load(SDConfig(checkpoint=str(folder / "none.safetensors")), empty=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("quant_conv.bias"), r"--sd.vae .*v: not a whole VAE .*lacks 1 tensor: first_stage_model.qu"),
        (lambda t: t.update({"decoder.new": torch.ones(2)}), "no plain VAE of .*no place for 1 tensor: .*decoder.new"),
        (
            lambda t: t.update({"quant_conv.bias": torch.ones(3)}),
            r"lacks 1 tensor: .*quant_conv.bias \[8\] \(is \[3\]\)",
        ),
        (
            lambda t: t.update({"quant_conv.bias": torch.ones(8, dtype=torch.int8)}),
            "v: quantised, which is not supported",
        ),
        (
            lambda t: t.update({"decoder.conv_in.weight": torch.ones(64, 16, 3, 3)}),
            "VAE of Stable Diffusion 3 or Flux, wh",
        ),
        (lambda t: t.update({"x.lora_A.weight": torch.ones(2)}), "it is a LoRA"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("encoder")], "the decoder of a VAE alone; give"),
        (lambda t: (t.clear(), t.update({"w": torch.ones(2)})), "it lacks encoder.down"),
    ],
)
def test_what_is_no_whole_vae(model, tmp_path, change, words):
    tensors = {n.removeprefix(VAE): t for n, t in model[1].items() if n.startswith(VAE)}
    change(tensors)
    save_file(tensors, tmp_path / "v")
    with pytest.raises(UserError, match=words) as caught:
        load(model[0] / "none.safetensors", tmp_path / "v", empty=True)
    assert f"--sd.vae {tmp_path / 'v'}" in str(caught.value)


def test_the_latents_of_another_model(model, tmp_path):
    """Those of Stable Diffusion XL have the same shapes, and another scale, which a folder or metadata tell."""
    folder, _, other = model
    path = written("folder", other, tmp_path / "v") / "config.json"
    settings = json.loads(path.read_text())
    for change, words in (
        ({"scaling_factor": 0.13025}, "its scaling_factor is 0.13025, and the checkpoint's is 0.182"),
        ({"_class_name": "AutoencoderTiny"}, "the VAE is an AutoencoderTiny"),
        ({"shift_factor": 0.1}, "the VAE has a shift_factor"),
    ):
        path.write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=words):
            load(folder / "none.safetensors", tmp_path / "v", empty=True)
    path.write_text(json.dumps({k: v for k, v in settings.items() if k != "scaling_factor"}))
    save_file(
        {n: t for n, t in model[1].items() if n.startswith(VAE)},
        tmp_path / "xl",
        metadata={"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"},
    )
    with pytest.raises(UserError, match="--sd.vae .*xl: it is of stable-diffusion-xl-v1-base/vae by its metadata"):
        load(folder / "none.safetensors", tmp_path / "xl", empty=True)


def test_a_folder_with_weights_of_flax_alone(model, tmp_path):
    """Whose configuration and weights have other names, in the VAE of --sd.vae and in a whole folder."""
    folder = shutil.copytree(model[0] / "diffusers", tmp_path / "m")
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").rename(folder / part / "diffusion_flax_model.msgpack")
    words = "diffusion_flax_model.msgpack holds Flax weights, which are not read; convert them to .safetensors"
    with pytest.raises(UserError, match=f"^{folder}: its unet has no other weights: {words}"):
        crafted.load(SDConfig(checkpoint=str(folder)), empty=True)
    with pytest.raises(UserError, match=f"^--sd.vae {folder}/vae: its vae has no other weights: {words}"):
        load(model[0] / "none.safetensors", folder / "vae", empty=True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no such file or folder; give a .safetensors"),
        (" ", "no such file or folder"),
        ("nosuch", "--sd.vae nosuch: no such"),
        ("empty", "--sd.vae empty: has no config.json, nor has a vae in it"),
        ("org/name", "one on the hub is to be downloaded first"),
    ],
)
def test_what_is_no_place_of_a_vae(home, text, words):
    (home / "empty").mkdir()
    with pytest.raises(UserError, match=words):
        find.check(SDConfig(variant="v1", vae=text))


def test_the_option_is_kept_as_a_whole_path(home):
    assert find.absolute(SDConfig(vae="a.pt")).vae == f"{home}/a.pt"
    assert find.absolute(SDConfig(vae="~/a.pt")).vae == f"{home}/a.pt"
    assert find.absolute(SDConfig()).vae is None


def test_names_of_vaes_agree():
    """Two of each layout, by hand."""
    want = {f"{VAE}decoder.up.1.block.0.conv1.weight", f"{VAE}decoder.up.0.block.0.conv1.weight"}
    assert set(names.published_vae(["decoder.up.1.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"])) == want
    found = names.published_vae([f"decoder.up_blocks.{i}.resnets.0.conv1.weight" for i in (0, 1)])
    assert found == {
        f"{VAE}decoder.up.1.block.0.conv1.weight": "decoder.up_blocks.0.resnets.0.conv1.weight",
        f"{VAE}decoder.up.0.block.0.conv1.weight": "decoder.up_blocks.1.resnets.0.conv1.weight",
    }
