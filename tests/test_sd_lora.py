"""LoRAs of every tool: peft's own merge, names of every layout, what a file states, folders, and words for the rest."""

import copy
import json
import warnings

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import crafted
from families.sd import find, layout, lora_files, lora_names, lora_settings
from families.sd.options import Options as SDConfig
from my.errors import UserError

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV, NORM = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.norm1"
TEXT_Q = "encoder.layers.1.self_attn.q_proj"
RNG = torch.Generator().manual_seed(0)


def few_words(parts):
    """The parts with a text encoder of 50 words, which is copied in no time."""
    from transformers import CLIPTextConfig, CLIPTextModel

    options = layout.text_configuration(50, 64, 77, 128, 2, hidden_act=parts["text_encoder"].config.hidden_act)
    return {**parts, "text_encoder": CLIPTextModel(CLIPTextConfig(**options)).eval()}


@pytest.fixture(scope="module")
def v1():
    return few_words(crafted.small_parts())


@pytest.fixture(scope="module")
def v2():
    return few_words(crafted.small_parts(v2=True))


def module(net, name):
    """A module of a text encoder is found with and without the level `text_model`."""
    names = dict(net.named_modules())
    return names.get(name) or names[f"text_model.{name}"]


def weights(net):
    return {name: p.data for name, p in net.named_parameters()}


def fused(parts, path, weight=1.0):
    """Both networks' parameters after a LoRA is fused into them; they are given back as they were."""
    nets = {part: parts[part] for part in ("unet", "text_encoder")}
    before = {part: weights(net) for part, net in nets.items()}
    crafted.fuse(dict(parts), path, weight)
    after = {part: weights(net) for part, net in nets.items()}
    for part, net in nets.items():
        for name, p in net.named_parameters():
            p.data = before[part][name]
    return after


def change(parts, path, weight=1.0):
    """{(part, parameter): what a LoRA added}, of the parameters that it changed."""
    after = fused(parts, path, weight)
    return {
        (part, name): after[part][name] - before
        for part in after
        for name, before in weights(parts[part]).items()
        if not torch.equal(after[part][name], before)
    }


def refused(parts, path, words):
    """A LoRA ends in one line with these words; no part of the model is changed before."""
    with pytest.raises(UserError, match=words) as caught:
        crafted.fuse(dict(parts), path, 1.0)
    text = str(caught.value).replace(str(path), "")
    assert len(text) <= 330 and text.isprintable(), (len(text), text)  # besides paths
    return text


def randn(*shape):
    return torch.randn(*shape, generator=RNG) / 4


def pair(weight, rank=2):
    """Random (A, B) of a weight."""
    return randn(rank, *weight.shape[1:]), randn(len(weight), rank, *[1] * (weight.ndim - 2))


def product(A, B, like):
    return torch.einsum("or,r...->o...", B.flatten(1), A).reshape(like.shape)


def saved(path, tensors, **metadata):
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata or None)
    return path


def only(changes, part, name):
    """The one change there is, which must be of this module's weight."""
    ((key, got),) = changes.items()
    assert key[0] == part and key[1].removeprefix("text_model.") == f"{name}.weight"
    return got


# ---------------------------------------------------------------- the block of OpenCLIP that is not used


@pytest.mark.parametrize(
    "name", ["lora_te_text_model_encoder_layers_{}_mlp_fc1", "cond_stage_model.model.transformer.resblocks.{}.mlp.c_fc"]
)
def test_the_unused_last_block_of_2x(v2, v1, tmp_path, capsys, name):
    """The tiny text encoder has blocks 0 and 1; a trainer of the whole one has 2 also, which no prompt goes through."""
    A, B = randn(2, 64), randn(128, 2)

    def file(*blocks):
        tensors = {
            f"{name.format(i)}.lora_{way}.weight": t.clone() for i in blocks for way, t in (("down", A), ("up", B))
        }
        return saved(tmp_path / "a.safetensors", tensors)

    torch.testing.assert_close(
        only(change(v2, file(1, 2)), "text_encoder", "encoder.layers.1.mlp.fc1"), B @ A, rtol=1e-4, atol=1e-5
    )
    assert "1 layer of it changes the text encoder's last block, which 2.x does not use: it is left out" in (
        capsys.readouterr().err
    )
    refused(v2, file(1, 3), "does not fit this checkpoint: 1 of its 2 layers is not in this model")
    refused(v2, file(2), "does not fit this checkpoint: its only layer is not in this model")
    refused(v1, file(1, 2), "does not fit this checkpoint: [12] of its 2 layers (is|are) not in this model")


# ---------------------------------------------------------------- an alpha that is no tensor


@pytest.mark.parametrize("alpha", [3, 3.0, torch.tensor(3.0)])
def test_an_alpha_that_is_a_plain_number(v1, tmp_path, alpha):
    """Rank 2, alpha 3: the change is 1.5 B A."""
    A, B = pair(v1["unet"].get_submodule(Q).weight)
    layer = f"lora_unet_{Q.replace('.', '_')}"
    torch.save(
        {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B, f"{layer}.alpha": alpha, "step": 4},
        tmp_path / "a.pt",
    )
    torch.testing.assert_close(only(change(v1, tmp_path / "a.pt"), "unet", Q), 1.5 * B @ A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [numpy.float32(3), "3", None, True, [3.0]])
def test_an_alpha_that_cannot_be_read(v1, tmp_path, alpha):
    A, B = pair(v1["unet"].get_submodule(Q).weight)
    layer = f"lora_unet_{Q.replace('.', '_')}"
    torch.save(
        {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B, f"{layer}.alpha": alpha}, tmp_path / "a.pt"
    )
    refused(v1, tmp_path / "a.pt", "the alphas in its tensors, .* are not one number each; get the file again, as")


# ---------------------------------------------------------------- peft

PEFT = {
    "alpha/r": ("unet", {"target_modules": ["to_q", "to_out.0"], "r": 4, "lora_alpha": 16}),
    "alpha/sqrt(r)": ("unet", {"target_modules": ["to_k"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": (
        "unet",
        {
            "target_modules": ["to_q", "conv1", "proj_in"],
            "r": 4,
            "lora_alpha": 2,
            "rank_pattern": {"attn1.to_q": 2, "^conv1": 3},
            "alpha_pattern": {r"^up_blocks\.1\..*to_q": 7, "transformer_blocks.0.attn2.to_q": 3, "proj_in": 1},
        },
    ),
    "biases of its layers": ("unet", {"target_modules": ["to_out.0", "conv1"], "bias": "lora_only"}),
    "all biases": ("text_encoder", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias of B": ("unet", {"target_modules": ["to_out.0", "conv1"], "lora_bias": True, "lora_alpha": 3}),
    "whole modules": ("unet", {"target_modules": ["to_q"], "modules_to_save": ["conv_in", "time_embedding.linear_1"]}),
    "text encoder": ("text_encoder", {"target_modules": ["q_proj", "fc1"], "r": 4, "lora_alpha": 16}),
    "embedding": ("text_encoder", {"target_modules": ["token_embedding"], "r": 2, "lora_alpha": 3}),
    "dropout, orthogonal": (
        "unet",
        {
            "target_modules": ["to_v"],
            "lora_dropout": 0.5,
            "init_lora_weights": "orthogonal",
            "exclude_modules": ["up_blocks.*"],
            "task_type": "FEATURE_EXTRACTION",
        },
    ),
}


def adapter(net, folder, safe=True, **options):
    """Save an adapter of peft with random weights in a folder."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(net), LoraConfig(**options))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += randn(*p.shape)
        model.save_pretrained(folder, safe_serialization=safe)
    return folder


def peft_merge(net, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weights(PeftModel.from_pretrained(copy.deepcopy(net), folder).merge_and_unload())


@pytest.mark.parametrize("name", PEFT)
def test_pefts_own_merge(v1, tmp_path, name):
    """Of a folder and of the file in it, to 1e-6; with a weight of 0.5 the change is half."""
    part, options = PEFT[name]
    want = peft_merge(v1[part], adapter(v1[part], tmp_path / "a", **options))
    before, half = weights(v1[part]), fused(v1, tmp_path / "a", 0.5)[part]
    got = fused(v1, tmp_path / "a" / "adapter_model.safetensors")[part]
    assert sum(not torch.equal(before[key], want[key]) for key in want) >= 1
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(half[key], (before[key] + want[key]) / 2, rtol=0, atol=1e-6)


def test_folders_of_pickles_and_of_both_parts(v1, tmp_path):
    """peft's adapter_model.bin; `unet` and `text_encoder` each an adapter with a scale of its own."""
    adapter(v1["unet"], tmp_path / "a" / "unet", safe=False, target_modules=["to_q"], r=4, lora_alpha=16)
    adapter(v1["text_encoder"], tmp_path / "a" / "text_encoder", target_modules=["q_proj"], r=2, lora_alpha=1)
    got = fused(v1, tmp_path / "a")
    for part in got:
        for key, want in peft_merge(v1[part], tmp_path / "a" / part).items():
            torch.testing.assert_close(got[part][key], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("level", ["", "text_model."])
def test_text_encoders_with_and_without_their_level(v1, tmp_path, level):
    """As older and newer versions of transformers name the same layers."""
    adapter(v1["text_encoder"], tmp_path / "a", target_modules=["q_proj"], r=4, lora_alpha=16)
    want = change(v1, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    start = "base_model.model."
    saved(
        path,
        {
            f"{start}{level}{name.removeprefix(start).removeprefix('text_model.')}": t
            for name, t in load_file(path).items()
        },
        format="pt",
    )
    got = change(v1, path)
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            {"use_dora": True},
            "its settings state use_dora, which is no plain LoRA .*; merge|use_dora.*: merge it into a",
        ),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights pissa: .* path_initial_model_for_weight_conversion, or merge",
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"peft_type": "LOHA"}, "state peft_type LOHA, which is no plain LoRA"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_alpha": None}, "not one number each"),
        ({"use_rslora": "yes"}, "not one number each"),
        ({"alpha_pattern": {"to_q": "x"}}, "not one number each"),
        ({"alpha_pattern": [1]}, "not one number each"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "patterns that are more than names of layers: .*; write the layers' names"),
        ({"alpha_pattern": {".*.*.*x": 1}}, "patterns that are more than names"),
        ({"alpha_pattern": {f"{i}.*": 1 for i in range(21)}}, "patterns that are more than names"),
        ({"rank_pattern": {"((": 1}}, "is no pattern of names"),
        ({"r": 8}, "state rank 8 of .*attn1_to_q, whose tensors have rank 4: they are of another file"),
    ],
)
def test_settings_that_are_of_no_plain_lora(v1, tmp_path, edit, words):
    path = adapter(v1["unet"], tmp_path / "a", target_modules=["attn1.to_q"], r=4) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    refused(v1, path.with_name("adapter_model.safetensors"), words)


def test_a_peft_file_without_its_settings(v1, tmp_path, capsys):
    """Under peft's own name it is refused, since peft writes both; under another, what is taken is told."""
    folder = adapter(v1["unet"], tmp_path / "a", target_modules=["attn1.to_q"], r=4, lora_alpha=16)
    with_settings = change(v1, folder)
    (folder / "adapter_config.json").unlink()
    refused(v1, folder, "peft's file without its adapter_config.json, which states alpha; put that")
    (folder / "adapter_model.safetensors").rename(tmp_path / "l.safetensors")
    got = change(v1, tmp_path / "l.safetensors")
    assert (
        "note: l.safetensors: no alpha is stated: a scale of 1 is taken; put its adapter_config.json"
        in capsys.readouterr().err
    )
    for key in got:
        torch.testing.assert_close(4 * got[key], with_settings[key], rtol=0, atol=1e-5)


def test_damaged_settings(v1, tmp_path):
    folder = adapter(v1["unet"], tmp_path / "a", target_modules=["attn1.to_q"])
    for text, words in (("{", "is damaged"), ("[]", "holds no settings"), ('{"r": 8}', "has no lora_alpha")):
        (folder / "adapter_config.json").write_text(text)
        refused(v1, folder, f"adapter_config.json beside it {words}.*; get the folder again")


def test_settings_of_a_later_version_are_told(v1, tmp_path, capsys):
    path = adapter(v1["unet"], tmp_path / "a", target_modules=["attn1.to_q"]) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_new": True, "new_option": None}))
    fused(v1, tmp_path / "a")
    err = capsys.readouterr().err
    assert "its settings state use_new, which this version does not know" in err and "new_option" not in err


PATTERNS = (
    {"to_q": 1, "attn1.to_q": 2},
    {"attn1.to_q": 2, "to_q": 1},
    {"q": 1},
    {"^to_q": 1, r"blocks\.0\..*": 2},
    {f"^{Q}": 5},
    {f"^unet.{Q}": 5},
    {r"attn\d+\.to_q": 4, "to_q": 1},
    {"(attn1|attn2).to_q": 3},
    {"to_q$": 9},
    {},
)


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_the_pattern_that_holds_is_the_one_that_peft_takes(patterns):
    from peft.utils.other import get_pattern_key

    lora_settings.refuse_slow(patterns, "")
    for name in (Q, OUT, "to_q", "a.to_q", "xto_q", "blocks.0.x", CONV):
        want = patterns.get(get_pattern_key(patterns.keys(), name), 8)
        assert lora_settings.Patterns(patterns)(name, 8) == want, name


# ---------------------------------------------------------------- diffusers


def test_what_diffusers_saves_with_its_settings(v1, tmp_path):
    """`save_lora_weights` with `..._lora_adapter_metadata`: each part's own alpha, kind of scale and patterns."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    nets, layers, stated = {}, {}, {}
    for part, target, options in (
        ("unet", "attn1.to_q", {"use_rslora": True, "alpha_pattern": {"^" + Q: 5}}),
        ("text_encoder", "q_proj", {"lora_alpha": 16}),
    ):
        adapter(v1[part], tmp_path / part, target_modules=[target], r=4, **options)
        tensors = load_file(tmp_path / part / "adapter_model.safetensors")
        layers[part] = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
        stated[part] = dict(LoraConfig(target_modules=[target], r=4, **options).to_dict())
        nets[part] = peft_merge(v1[part], tmp_path / part)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "out",
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=stated["unet"],
        text_encoder_lora_adapter_metadata=stated["text_encoder"],
    )
    got = fused(v1, tmp_path / "out")
    for part, want in nets.items():
        for key in want:
            torch.testing.assert_close(got[part][key], want[key], rtol=0, atol=1e-6)


def test_a_networks_own_adapter(v1, tmp_path):
    """diffusers' `save_lora_adapter`, whose names and settings have no prefix of a part."""
    from peft import LoraConfig

    unet = copy.deepcopy(v1["unet"])
    unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["attn1.to_q"]))
    with torch.no_grad():
        B = unet.get_submodule(Q).lora_B["default"].weight.copy_(randn(32, 4))
        A = unet.get_submodule(Q).lora_A["default"].weight
        want = 4 * B @ A
    unet.save_lora_adapter(tmp_path / "a")
    got = change(v1, tmp_path / "a")
    torch.testing.assert_close(got["unet", f"{Q}.weight"], want, rtol=0, atol=1e-6)


def test_two_alphas_of_one_layer(v1, tmp_path):
    A, B = pair(module(v1["unet"], Q).weight)
    tensors = {f"unet.{Q}.lora_A.weight": A, f"unet.{Q}.lora_B.weight": B, f"unet.{Q}.alpha": torch.tensor(4.0)}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.r": 2})}
    refused(
        v1,
        saved(tmp_path / "l.safetensors", tensors, **metadata),
        "states two alphas of unet_.*to_q, 4 in a tensor and 8 in its settings",
    )


# ---------------------------------------------------------------- names

COMPVIS = {  # of a UNet of two levels with one residual block each, written out by hand
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "out.2": "conv_out",
    "input_blocks.1.0.in_layers.2": CONV,
    "input_blocks.1.0.emb_layers.1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": Q,
    "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.0.ff.net.0.proj": "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.0.0.in_layers.2": "up_blocks.0.resnets.0.conv1",
    "output_blocks.2.1.transformer_blocks.0.attn2.to_out.0": OUT,
    "output_blocks.3.1.proj_out": "up_blocks.1.attentions.1.proj_out",
}


@pytest.mark.parametrize(
    "start, down, up",
    [
        ("lora_unet_", "lora_down", "lora_up"),
        ("diffusion_model.", "lora_A", "lora_B"),
        ("base_model.model.diffusion_model.", "lora_A.default", "lora_B.default"),
        ("model.diffusion_model.", "lora.down", "lora.up"),
    ],
)
def test_names_of_the_compvis_unet(v1, tmp_path, start, down, up):
    """Of kohya's trainer with underscores, of ComfyUI and others with dots; each is diffusers' layer."""
    pairs = {there: pair(module(v1["unet"], here).weight) for there, here in COMPVIS.items()}
    tensors = {}
    for there, (A, B) in pairs.items():
        stem = start + (there.replace(".", "_") if start.endswith("_") else there)
        tensors |= {f"{stem}.{down}.weight": A, f"{stem}.{up}.weight": B}
    got = change(v1, saved(tmp_path / "l.safetensors", tensors))
    assert len(got) == len(COMPVIS) == 16
    for there, here in COMPVIS.items():
        want = product(*pairs[there], module(v1["unet"], here).weight)
        torch.testing.assert_close(got["unet", f"{here}.weight"], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, here",
    [
        (f"lora_unet_{OUT.replace('.', '_')}", OUT),
        (f"lora_unet_{OUT.removesuffix('.0').replace('.', '_')}", OUT),
        (f"lycoris_{Q.replace('.', '_')}", Q),
        (f"unet.{Q}", Q),
        (Q, Q),
        (f"lora_unet_{CONV.replace('.', '_')}", CONV),
        ("lora_te_text_model_" + TEXT_Q.replace(".", "_"), TEXT_Q),
        ("lora_te1_text_model_" + TEXT_Q.replace(".", "_"), TEXT_Q),
        (f"text_encoder.text_model.{TEXT_Q}", TEXT_Q),
        (f"text_encoder.{TEXT_Q}", TEXT_Q),
        (f"text_model.{TEXT_Q}", TEXT_Q),
        (f"text_encoders.clip_l.transformer.text_model.{TEXT_Q}", TEXT_Q),
        ("lycoris_" + TEXT_Q.replace(".", "_"), TEXT_Q),
        (f"cond_stage_model.transformer.text_model.{TEXT_Q}", TEXT_Q),
        (f"clip_l.text_model.{TEXT_Q}", TEXT_Q),
    ],
)
def test_prefixes_of_the_tools(v1, tmp_path, name, here):
    part = "text_encoder" if here == TEXT_Q else "unet"
    weight = module(v1[part], here).weight
    A, B = pair(weight)
    path = saved(
        tmp_path / "l.safetensors",
        {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B, f"{name}.alpha": torch.tensor([3.0])},
    )
    torch.testing.assert_close(only(change(v1, path), part, here), 1.5 * product(A, B, weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["lora_te_transformer.resblocks.", "cond_stage_model.model.transformer.resblocks."])
def test_names_of_openclip(v2, tmp_path, prefix):
    """The text encoder of 2.x, whose queries, keys and values are the rows of one matrix there."""
    A, B = randn(2, 64), randn(192, 2)
    up = {f"{prefix}0.attn.in_proj.lora_down.weight": A, f"{prefix}0.attn.in_proj.lora_up.weight": B}
    got = change(v2, saved(tmp_path / "l.safetensors", up))
    got = {name.removeprefix("text_model."): t for (_, name), t in got.items()}
    for i, which in enumerate("qkv"):
        torch.testing.assert_close(
            got[f"encoder.layers.0.self_attn.{which}_proj.weight"], B[64 * i : 64 * i + 64] @ A, rtol=0, atol=1e-5
        )
    assert len(got) == 3
    A, B = randn(2, 64), randn(128, 2)
    path = saved(
        tmp_path / "m.safetensors", {f"{prefix}1.mlp.c_fc.lora_A.weight": A, f"{prefix}1.mlp.c_fc.lora_B.weight": B}
    )
    torch.testing.assert_close(
        only(change(v2, path), "text_encoder", "encoder.layers.1.mlp.fc1"), B @ A, rtol=0, atol=1e-5
    )


def test_a_name_means_one_layer(v1, v2):
    """But for OpenCLIP's stacked rows; and no name of the one network is one of the other."""
    for parts in (v1, v2):
        several = {name: modules for name, (_, modules) in lora_names.named(parts).items() if len(modules) > 1}
        assert several and all(name.endswith("attn_in_proj") for name in several)
        assert all([name[-6:] for name in modules] == ["q_proj", "k_proj", "v_proj"] for modules in several.values())


@pytest.mark.parametrize(
    "other",
    [
        f"lora_unet_{Q.replace('.', '_')}",
        f"unet.{Q}",
        Q.replace("attn1.", "attn1.processor."),
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ],
)
def test_a_layer_named_twice(v1, tmp_path, other):
    A, B = pair(module(v1["unet"], Q).weight)
    tensors = {f"{name}.lora_{x}.weight": m.clone() for name in (Q, other) for x, m in zip(("down", "up"), (A, B))}
    refused(
        v1,
        saved(tmp_path / "l.safetensors", tensors),
        "changes a layer twice, by .*to_q.*; use a file with one LoRA in it",
    )
    two = {f"{Q}.lora_{x}.{which}.weight": m.clone() for which in ("one", "two") for x, m in zip("AB", (A, B))}
    refused(v1, saved(tmp_path / "l.safetensors", two), "changes a layer twice")


# ---------------------------------------------------------------- what is added


def test_a_convolution_between_the_two(v1, tmp_path):
    """LyCORIS' Tucker form is three convolutions in a row: 1x1 down, 3x3 between, 1x1 up; of different ranks."""
    weight, flat = module(v1["unet"], CONV).weight, f"lora_unet_{CONV.replace('.', '_')}"
    down, mid, up = randn(2, 32, 1, 1), randn(3, 2, 3, 3), randn(32, 3, 1, 1)
    path = saved(
        tmp_path / "l.safetensors",
        {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_mid.weight": mid,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(1.0),
        },
    )
    x, F = randn(1, 32, 5, 5), torch.nn.functional
    want = F.conv2d(F.conv2d(F.conv2d(x, down), mid, padding=1), up)
    got = only(change(v1, path), "unet", CONV)
    assert got.shape == weight.shape
    torch.testing.assert_close(F.conv2d(x, got, padding=1), want / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_whole_changes(v1, tmp_path, weight):
    """`diff` and `diff_b` of a layer, `w_norm` and `b_norm` of a norm, as LyCORIS and extractions write them."""
    flat = {name: f"lora_unet_{name.replace('.', '_')}" for name in (CONV, NORM, OUT)}
    tensors = {
        f"{flat[CONV]}.diff": randn(32, 32, 3, 3),
        f"{flat[CONV]}.diff_b": randn(32),
        f"{flat[NORM]}.w_norm": randn(32),
        f"{flat[NORM]}.b_norm": randn(32),
        f"{flat[OUT]}.diff_b": randn(32),
    }
    got = change(v1, saved(tmp_path / "l.safetensors", tensors), weight)
    names = (f"{CONV}.weight", f"{CONV}.bias", f"{NORM}.weight", f"{NORM}.bias", f"{OUT}.bias")
    assert {name for _, name in got} == set(names)
    for name, tensor in zip(names, tensors.values()):
        torch.testing.assert_close(got["unet", name], weight * tensor, rtol=0, atol=1e-6)


def test_low_rank_and_a_bias_of_one_layer(v1, tmp_path):
    """alpha / rank is for B A alone; peft's bias of B has it too."""
    A, B, flat = *pair(module(v1["unet"], OUT).weight), f"lora_unet_{OUT.replace('.', '_')}"
    low = {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(6.0)}
    b, c = randn(32), randn(32)
    got = change(v1, saved(tmp_path / "l.safetensors", {**low, f"{flat}.diff_b": b, f"{flat}.lora_up.bias": c}))
    torch.testing.assert_close(got["unet", f"{OUT}.weight"], 3 * B @ A, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["unet", f"{OUT}.bias"], b + 3 * c, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_in_float32(v1, tmp_path, dtype):
    """The sum is rounded once."""
    parts = {**v1, "unet": copy.deepcopy(v1["unet"]).to(dtype)}
    weight = module(parts["unet"], Q).weight.detach().clone()
    A, B = pair(weight)
    crafted.fuse(parts, saved(tmp_path / "l.safetensors", {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}), 0.5)
    after = module(parts["unet"], Q).weight
    assert after.dtype == dtype and torch.equal(after, (weight.float() + 0.5 * (B @ A)).to(dtype))


def test_several_add_up(v1, tmp_path):
    A, B = pair(module(v1["unet"], Q).weight)
    path = saved(tmp_path / "l.safetensors", {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B})
    parts = {**v1, "unet": copy.deepcopy(v1["unet"])}
    for weight in (1.0, 0.25):
        crafted.fuse(parts, path, weight)
    torch.testing.assert_close(
        module(parts["unet"], Q).weight, module(v1["unet"], Q).weight + 1.25 * B @ A, rtol=0, atol=1e-5
    )


def test_nothing_is_changed_by_what_does_not_fit(v1, tmp_path):
    """All layers are compared before the first is changed."""
    parts = {**v1, "unet": copy.deepcopy(v1["unet"])}
    A, B = pair(module(v1["unet"], Q).weight)
    tensors = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{OUT}.diff": torch.full((32, 32), torch.nan)}
    with pytest.raises(UserError, match="what it adds to .*to_out_0 is not finite"):
        crafted.fuse(parts, saved(tmp_path / "l.safetensors", tensors), 1.0)
    assert torch.equal(module(parts["unet"], Q).weight, module(v1["unet"], Q).weight)


# ---------------------------------------------------------------- what does not fit, or is something else


def stem(name, **shapes):
    return {f"{name}.{key.replace('__', '.')}": torch.ones(shape) for key, shape in shapes.items()}


def low(name, inner, outer, rank=2):
    return stem(name, lora_down__weight=(rank, inner), lora_up__weight=(outer, rank))


UNET_Q, CONTEXT = f"lora_unet_{Q.replace('.', '_')}", f"lora_unet_{Q.replace('attn1', 'attn2').replace('.', '_')[:-1]}k"


@pytest.mark.parametrize(
    "tensors, words",
    [
        (low(UNET_Q, 32, 32) | stem(UNET_Q, dora_scale=(1, 32)), "it is DoRA, which is not supported: merge it into"),
        (
            stem(UNET_Q, hada_w1_a=(2, 2)),
            "it is LoHa, which is not supported: merge it into a checkpoint with the tool",
        ),
        (stem(UNET_Q, lokr_w1=(2, 2)), "it is LoKr"),
        (stem(UNET_Q, oft_blocks=(2, 2)), "it is OFT"),
        (stem(UNET_Q, on_input=(2,), weight=(2,)), "it is IA3"),
        (stem(UNET_Q, a1__weight=(2, 2)), "it is GLoRA"),
        (
            low(UNET_Q, 32, 32) | {"bundle_emb.x.string_to_param.*": torch.ones(1, 64)},
            "a LoRA with embeddings of words",
        ),
        (low(UNET_Q, 32, 32) | stem(UNET_Q, set_weight=(2, 2)), "a change that sets weights anew"),
        (low(UNET_Q, 32, 32) | stem(UNET_Q, unknown=(2, 2)), "1 of its tensors is of no plain LoRA: .*unknown; that"),
        ({"unet:0:up": torch.ones(2, 2), "unet:0:down": torch.ones(2, 2)}, "an early tool, which numbers its layers"),
        (
            {"emb_params": torch.ones(2, 768)},
            "no LoRA: it is a textual-inversion embedding; embeddings are not read: desc",
        ),
        ({"string_to_param.*": torch.ones(2, 768)}, "no LoRA: it is a textual-inversion embedding"),
        (
            {"control_model.input_hint_block.0.weight": torch.ones(2)},
            "no LoRA: it is a ControlNet; leave it out, or give",
        ),
        (
            {"encoder.conv_in.weight": torch.ones(2), "decoder.conv_in.weight": torch.ones(2)},
            "no LoRA: it is a VAE alone",
        ),
        ({"a": torch.ones(1)}, "no LoRA: its tensors begin with a; leave it out"),
    ],
)
def test_other_kinds_are_named(v1, tmp_path, tensors, words):
    path = saved(tmp_path / "l.safetensors", tensors)
    assert "whole checkpoint" not in refused(v1, path, words)


def test_a_whole_checkpoint_is_none(v1, tmp_path):
    path = saved(tmp_path / "l.safetensors", crafted.single_file(v1))
    refused(v1, path, "l.safetensors: no LoRA, but a whole checkpoint; give it as --sd.checkpoint")


XL = "Stable Diffusion XL"


def like(parts, width):
    """Parts whose UNet says that its text has `width` numbers, by which a version is told."""
    unet = copy.deepcopy(parts["unet"])
    unet.register_to_config(cross_attention_dim=width)
    return {**parts, "unet": unet}


@pytest.mark.parametrize(
    "names, metadata, width, words",
    [
        (
            ["lora_te2_text_model_x"],
            {},
            768,
            f"it is made for {XL}, this checkpoint is Stable Diffusion 1.x; use one made",
        ),
        (["unet.add_embedding.linear_1"], {}, 768, f"made for {XL}"),
        (["lora_unet_label_emb_0_0"], {}, 1024, f"made for {XL}"),
        (["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q"], {}, 768, f"made for {XL}"),
        (
            ["transformer.transformer_blocks.0.attn.to_q"],
            {},
            768,
            "made for Stable Diffusion 3, or a transformer like it",
        ),
        (["diffusion_model.joint_blocks.0.x_block.attn.qkv"], {}, 768, "made for Stable Diffusion 3"),
        (["lora_unet_double_blocks_0_img_attn_qkv"], {}, 768, "made for Flux"),
        (["transformer.single_transformer_blocks.0.proj_out"], {}, 768, "made for Flux"),
        (["diffusion_model.blocks.0.self_attn.q"], {}, 768, "made for a diffusion transformer"),
        (["down_blocks.0.motion_modules.0.proj_in"], {}, 768, "made for AnimateDiff"),
        (["lora_unet_x"], {"ss_base_model_version": "sdxl_base_v1-0"}, 768, f"made for {XL}"),
        (
            ["lora_unet_x"],
            {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
            768,
            "made for Stable Diffusion 2.x",
        ),
        (["lora_unet_x"], {"ss_v2": "True"}, 768, "made for Stable Diffusion 2.x"),
        (
            ["lora_unet_x"],
            {"ss_base_model_version": "sd_v1"},
            768,
            "if it is made for this model, merge it into a check",
        ),
        (["lora_unet_x"], {}, 768, "if it is made for this model, merge it into a checkpoint"),
    ],
)
def test_loras_of_other_versions(v1, tmp_path, names, metadata, width, words):
    """Told by names, by shapes, by metadata; a LoRA of the right version is never sent to look for its version."""
    tensors = {key: t for name in names for key, t in low(name, 9, 9).items()}
    path = saved(tmp_path / "l.safetensors", tensors, **metadata)
    refused(like(v1, width), path, f"does not fit this checkpoint: its only layer is not .*; .*{words}")


@pytest.mark.parametrize(
    "inner, width, words",
    [
        (768, 64, "it is made for Stable Diffusion 1.x; use one made for this model"),
        (
            1024,
            768,
            "it is made for Stable Diffusion 2.x, this checkpoint is Stable Diffusion 1.x; use one made for this",
        ),
        (2048, 768, f"it is made for {XL}"),
        (768, 768, "it is made for a model of other widths: use one made for this checkpoint"),
    ],
)
def test_widths_of_other_versions(v1, tmp_path, inner, width, words):
    path = saved(tmp_path / "l.safetensors", low(CONTEXT, inner, 320))
    refused(
        like(v1, width), path, rf"to_k is \[32, 64\] here, which \[2, {inner}\] and \[320, 2\] do not make; {words}"
    )


NOT_WHOLE = f"lora_unet_{CONV.replace('.', '_')}"


@pytest.mark.parametrize(
    "tensors, words",
    [
        (low(UNET_Q, 32, 32) | stem(UNET_Q, alpha=(2,)), "the alphas .* are not one number each"),
        (
            low(UNET_Q, 32, 32) | stem(f"lora_unet_{OUT.replace('.', '_')}", alpha=()),
            "to_out_0 has an alpha and no other tensor: what",
        ),
        (stem(UNET_Q, lora_mid__weight=(2, 2)), "has one of its two tensors only"),
        (low(NOT_WHOLE, 32, 32) | stem(NOT_WHOLE, lora_mid__weight=(2, 3, 3, 3)), "do not make"),
        (low(NOT_WHOLE, 32, 32, 64) | stem(NOT_WHOLE, lora_mid__weight=(64, 64, 3, 3)), "do not make"),  # too wide
        (stem(UNET_Q, diff=(32, 33)), r"attn1_to_q is \[32, 32\] here, which \[32, 33\] do not make"),
        (stem(UNET_Q, diff_b=(32,)), r"attn1_to_q has no bias here, which \[32\] do not make"),
        (low(UNET_Q, 32, 32, 0), r"which \[0, 32\] and \[32, 0\] do not make"),
        (
            stem(f"lora_unet_{NORM.replace('.', '_')}", lora_down__weight=(2, 32), lora_up__weight=(32, 2)),
            "do not make",
        ),
        (stem(UNET_Q, lora_down__weight=(), lora_up__weight=()), "do not make"),
    ],
)
def test_tensors_that_make_no_change(v1, tmp_path, tensors, words):
    path = saved(tmp_path / "l.safetensors", tensors)
    refused(v1, path, words)


@pytest.mark.parametrize("name", ["\x1b[31mred\x07", "x" * 100_000, "lora_" * 20_000, ".lora_A" * 20_000, "é" * 300])
@pytest.mark.parametrize("ending", ["", ".lora_down.weight", ".alpha", ".diff"])
def test_names_that_claim_too_much(v1, tmp_path, name, ending):
    path = saved(tmp_path / "l.safetensors", low(UNET_Q, 32, 32) | {name + ending: torch.ones(2, 2)})
    refused(v1, path, "l.safetensors: ")


# ---------------------------------------------------------------- what is told


@pytest.mark.parametrize(
    "metadata, alpha, words",
    [
        ({"modelspec.trigger_phrase": "sks\ndog"}, 2.0, "its trigger phrase is 'sks dog': have it in --sd.prompt"),
        (
            {"modelspec.prediction_type": "v"},
            2.0,
            "for v-prediction, and this checkpoint is epsilon: use the checkpoint",
        ),
        ({"ss_v_parameterization": "True"}, 2.0, "trained for v-prediction"),
        ({"modelspec.prediction_type": "epsilon"}, 2.0, ""),
        ({"ss_clip_skip": "2"}, 2.0, "it was trained with clip skip 2"),
        ({"ss_clip_skip": "None"}, 2.0, ""),
        ({"modelspec.title": "my LCM LoRA"}, 2.0, "its name says lcm"),
        ({"ss_output_name": "welcome"}, 2.0, ""),
        ({}, 0.0, "its only layer has alpha 0, and adds nothing"),
        ({}, None, ""),
        ({"ss_network_alpha": "4", "ss_network_dim": "8"}, None, "its metadata state alpha 4 and rank 8, its tensors"),
        ({"ss_network_alpha": "4", "ss_network_dim": "8"}, 2.0, ""),
        ({"ss_tag_frequency": "{}", "ss_epoch": "3"}, 2.0, ""),
    ],
)
def test_what_metadata_state_is_told(v1, tmp_path, capsys, metadata, alpha, words):
    tensors = low(UNET_Q, 32, 32) | ({} if alpha is None else {f"{UNET_Q}.alpha": torch.tensor(alpha)})
    fused(v1, saved(tmp_path / "l.safetensors", tensors, **metadata))
    err = capsys.readouterr().err
    assert err.count("\n") == bool(words) and words in err
    assert err.startswith("note: l.safetensors: ") == bool(words)


def test_layers_without_an_alpha_among_others(v1, tmp_path, capsys):
    tensors = low(UNET_Q, 32, 32) | low(f"lora_unet_{OUT.replace('.', '_')}", 32, 32) | stem(UNET_Q, alpha=())
    fused(v1, saved(tmp_path / "l.safetensors", tensors))
    assert "1 of its 2 layers states no alpha, lora_unet_up_" in capsys.readouterr().err


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "text, want",
    [
        (r"C:\loras\x.safetensors", (r"C:\loras\x.safetensors", 1.0)),
        (r"C:\x.safetensors:0.7", (r"C:\x.safetensors", 0.7)),
        ("C:/loras/x.safetensors:-1", ("C:/loras/x.safetensors", -1.0)),
        ("folder:0.5", ("folder", 0.5)),
        ("folder/", ("folder", 1.0)),
    ],
)
def test_drives_and_folders(text, want):
    path, weight = lora_files.split(text)
    assert (str(path), weight) == want


@pytest.mark.parametrize(
    "files, want",
    [
        (
            ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"],
            ["adapter_model.safetensors"],
        ),
        (
            ["pytorch_lora_weights.safetensors", "checkpoint-5/pytorch_lora_weights.safetensors"],
            ["pytorch_lora_weights.safetensors"],
        ),
        (
            ["unet/adapter_model.safetensors", "text_encoder/adapter_model.bin"],
            ["text_encoder/adapter_model.bin", "unet/adapter_model.safetensors"],
        ),
        (["style.safetensors", "optimizer.bin", "notes.txt"], ["style.safetensors"]),
        (["style.pt"], ["style.pt"]),
        (["default/adapter_model.safetensors"], ["default/adapter_model.safetensors"]),
        (
            ["a.safetensors", "b.safetensors"],
            "a folder of 2 LoRAs or files of weights: a.safetensors, b.safetensors; give",
        ),
        (["a/adapter_model.bin", "b/adapter_model.bin"], "a folder of 2 LoRAs .*: a/adapter_model.bin, b/adapter_m"),
        (["adapter_model.bin", "pytorch_lora_weights.bin"], "a folder of 2 LoRAs"),
        (["adapter_model.bin", "unet/adapter_model.bin"], "a folder of 2 LoRAs"),
        (["adapter_config.json"], "has adapter_config.json, but no adapter_model.safetensors or .bin beside it"),
        (["model_index.json", "unet/config.json"], "no LoRA, but the diffusers folder of a model; give it as --sd.ch"),
        ([], "a folder without a LoRA: it has no adapter_model.safetensors and no pytorch_lora_weights.safetensors;"),
    ],
)
def test_folders(tmp_path, files, want):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    if isinstance(want, list):
        assert lora_files.read(f"{folder}:0.5")[:2] == (folder, 0.5)
        assert [str(path.relative_to(folder)) for path in lora_files.files_of(folder)] == want
        return
    with pytest.raises(UserError, match=f"--sd.lora {folder}: {want}"):
        find.check(SDConfig(lora=[str(folder)]))
