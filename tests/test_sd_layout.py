"""The CompVis layout: every published name, diffusers' own converter as the oracle."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as oracle
from transformers import CLIPTextConfig, CLIPTextModel

import crafted
from families.sd import layout

KEYS = Path(__file__).resolve().parent / "reference" / "sd_v1_checkpoint_keys.json"
# SD 2's text encoder: OpenCLIP ViT-H/14, 24 blocks of width 1024 (arXiv 2212.07143), under its published names
OPEN_CLIP = {
    "positional_embedding": (77, 1024),
    "token_embedding.weight": (49408, 1024),
    "text_projection": (1024, 1024),
    "logit_scale": (),
    "ln_final.weight": (1024,),
    "ln_final.bias": (1024,),
} | {
    f"transformer.resblocks.{i}.{name}": shape
    for i in range(24)
    for name, shape in {
        "ln_1.weight": (1024,),
        "ln_1.bias": (1024,),
        "ln_2.weight": (1024,),
        "ln_2.bias": (1024,),
        "attn.in_proj_weight": (3072, 1024),
        "attn.in_proj_bias": (3072,),
        "attn.out_proj.weight": (1024, 1024),
        "attn.out_proj.bias": (1024,),
        "mlp.c_fc.weight": (4096, 1024),
        "mlp.c_fc.bias": (4096,),
        "mlp.c_proj.weight": (1024, 4096),
        "mlp.c_proj.bias": (1024,),
    }.items()
}


@pytest.fixture(scope="module")
def v1():
    return {name: tuple(shape) for name, shape in json.loads(KEYS.read_text()).items()}


@pytest.fixture(scope="module")
def v2(v1):
    """Shapes of Stable Diffusion 2: its UNet's cross attention is 1024 wide, its projections are linear."""
    shapes = {name: shape for name, shape in v1.items() if not name.startswith("cond_stage_model.")}
    for name, shape in shapes.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            shapes[name] = (shape[0], 1024)
        if name.startswith(layout.UNET) and name.endswith(("proj_in.weight", "proj_out.weight")):
            shapes[name] = shape[:2]
    return shapes | {layout.OPEN_CLIP + name: shape for name, shape in OPEN_CLIP.items()}


def expected(shapes):
    """{Source: shape} of the full-size networks, which have no memory."""
    configs, found = layout.configurations(shapes), {}
    with init_empty_weights(include_buffers=False):
        nets = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "unet": UNet2DConditionModel(**configs["unet"]),
            "vae": AutoencoderKL(**configs["vae"]),
        }
    for part, net in nets.items():
        parameters = net.state_dict()
        for name, source in layout.sources(part, parameters, configs[part], layout.is_open_clip(shapes)).items():
            found[source] = tuple(parameters[name].shape)
    return configs, found


@pytest.fixture(scope="module")
def expected_v1(v1):
    return expected(v1)


def test_every_published_name_of_v1_is_accounted_for(v1, expected_v1):
    configs, found = expected_v1
    assert layout.mismatches(v1, found) == ([], [])
    assert set(v1) - {source.name for source in found} == {layout.CLIP + "embeddings.position_ids"}
    assert len(found) == len({source.name for source in found}) == 1130
    unet = configs["unet"]
    assert unet["block_out_channels"] == [320, 640, 1280, 1280] and unet["layers_per_block"] == 2
    assert (unet["cross_attention_dim"], unet["attention_head_dim"]) == (768, 8)
    assert configs["text_encoder"]["num_hidden_layers"] == configs["text_encoder"]["num_attention_heads"] == 12


def test_every_name_of_v2_is_accounted_for(v2):
    configs, found = expected(v2)
    assert layout.mismatches(v2, found) == ([], [])
    left = set(v2) - {source.name for source in found}
    assert left == {layout.OPEN_CLIP + n for n in OPEN_CLIP if ".23." in n or n in ("text_projection", "logit_scale")}
    unet, text = configs["unet"], configs["text_encoder"]
    assert unet["attention_head_dim"] == [5, 10, 20, 20] and unet["use_linear_projection"]
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["hidden_act"]) == (23, 16, "gelu")


def test_the_last_block_of_v2_that_converters_leave_out(v2):
    """Made from a diffusers folder, a file has the 23 blocks that are used, and no other: none of them is left out."""
    converted = {name: shape for name, shape in v2.items() if ".resblocks.23." not in name}
    configs, found = expected(converted)
    assert configs["text_encoder"]["num_hidden_layers"] == 23 and layout.mismatches(converted, found) == ([], [])


def test_v2_under_transformers_names(v1, v2):
    """A text encoder 1024 wide is OpenCLIP's: its activation is gelu, and its UNet has heads of 64 channels."""
    names = {name: shape for name, shape in v1.items() if name.startswith(layout.CLIP) and "position_ids" not in name}
    shapes = {name: shape for name, shape in v2.items() if not name.startswith(layout.TEXT)} | {
        name.replace("layers.11.", f"layers.{i}."): tuple(4096 if n == 3072 else 1024 if n == 768 else n for n in shape)
        for name, shape in names.items()
        for i in (range(11, 23) if "layers.11." in name else (0,))
    }
    configs, found = expected(shapes)
    text = configs["text_encoder"]
    assert (text["num_hidden_layers"], text["num_attention_heads"], text["hidden_act"]) == (23, 16, "gelu")
    assert configs["unet"]["attention_head_dim"] == [5, 10, 20, 20] and layout.mismatches(shapes, found) == ([], [])


@pytest.mark.parametrize("v2", [False, True])
def test_names_agree_with_diffusers_converter(v2):
    """Written under our names and converted by diffusers, every parameter is back in its place."""
    parts = crafted.small_parts(v2)
    tensors = crafted.single_file(parts, v2)
    unet = oracle.convert_ldm_unet_checkpoint(dict(tensors), dict(parts["unet"].config))
    vae = oracle.convert_ldm_vae_checkpoint(dict(tensors), dict(parts["vae"].config))
    for part, got in (("unet", unet), ("vae", vae)):
        want = parts[part].state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    text = (
        oracle.convert_open_clip_checkpoint(parts["text_encoder"], dict(tensors))
        if v2
        else oracle.convert_ldm_clip_checkpoint(dict(tensors))
    )
    text = {name.removeprefix("text_model."): t for name, t in text.items()}
    for name, want in parts["text_encoder"].state_dict().items():
        assert torch.equal(text[name.removeprefix("text_model.")], want), name


def test_names_of_running_averages():
    assert layout.ema_name("model.diffusion_model.input_blocks.0.0.weight") == (
        "model_ema.diffusion_modelinput_blocks00weight"
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v1: v1.pop(layout.UNET + "input_blocks.0.0.weight"), "it lacks input_blocks.0.0.weight, or that is of"),
        (
            lambda v1: v1.update({layout.UNET + "input_blocks.0.0.weight": (3,)}),
            "some tensor has a shape of another arch",
        ),
    ],
)
def test_shapes_that_do_not_tell(v1, change, words):
    shapes = dict(v1)
    change(shapes)
    with pytest.raises(ValueError, match=words):
        layout.configurations(shapes)


def test_mismatches_are_named_with_their_shapes(v1, expected_v1):
    _, found = expected_v1
    name = layout.UNET + "out.2.bias"
    broken = {k: v for k, v in v1.items() if k != name} | {layout.UNET + "extra": (3, 4)}
    broken[layout.VAE + "quant_conv.bias"] = (7,)
    assert layout.mismatches(broken, found) == (
        [f"{name} [4]", f"{layout.VAE}quant_conv.bias [8] (is [7])"],
        [f"{layout.UNET}extra [3, 4]"],
    )
