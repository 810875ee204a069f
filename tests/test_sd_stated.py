"""What a single file states: markers, metadata, a configuration beside it; each fact is used, refused or noted."""

import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

import crafted
from adapt import scheduler_sigmas
from families.sd import layout, noise, stated
from families.sd.options import Options as SDConfig
from my.errors import UserError

PLAIN = SDConfig(checkpoint="a.safetensors")
V1_YAML = {
    "model": {
        "base_learning_rate": 1e-4,
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.012,
            "num_timesteps_cond": 1,
            "log_every_t": 200,
            "timesteps": 1000,
            "first_stage_key": "jpg",
            "cond_stage_key": "txt",
            "image_size": 64,
            "channels": 4,
            "cond_stage_trainable": False,
            "conditioning_key": "crossattn",
            "monitor": "val/loss_simple_ema",
            "scale_factor": 0.18215,
            "use_ema": False,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": {
                    "image_size": 32,
                    "in_channels": 4,
                    "out_channels": 4,
                    "model_channels": 32,
                    "attention_resolutions": [1],
                    "num_res_blocks": 1,
                    "channel_mult": [1, 2],
                    "num_heads": 8,
                    "use_spatial_transformer": True,
                    "transformer_depth": 1,
                    "context_dim": 64,
                    "use_checkpoint": True,
                    "legacy": False,
                    "use_fp16": True,
                },
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 32,
                        "ch_mult": [1, 2],
                        "num_res_blocks": 1,
                    },
                },
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}  # of the tiny model below


def with_params(**params):
    return {"model": {"params": params}}


@pytest.fixture(scope="module")
def tensors():
    return crafted.single_file(crafted.small_parts())


@pytest.fixture
def facts(tmp_path):
    """A function: {fact: value} that a file with such metadata, tensors and configuration beside it states."""

    def read(tree=None, metadata=None, names=(), sd=PLAIN):
        path = tmp_path / "a.safetensors"
        if tree is not None:
            text = tree if isinstance(tree, str) else yaml.safe_dump(tree, sort_keys=False)
            path.with_suffix(".yaml").write_text(text)
        found = stated.read(path, metadata or {}, dict.fromkeys(names, (0,)), sd)
        return {fact: statement.value for fact, statement in found.items()}

    return read


# ---------------------------------------------------------------- a configuration beside the file


@pytest.mark.parametrize("parameterization, want", [("v", "v_prediction"), ("eps", "epsilon"), ("x0", "sample")])
def test_the_parameterization_of_a_yaml(facts, parameterization, want):
    assert facts(with_params(parameterization=parameterization)) == {"prediction_type": want}


def test_a_published_configuration_states_these_facts(facts, capsys):
    assert facts(V1_YAML) == {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "scaling_factor": 0.18215,
        "version": 1,
        "heads": 8,
        "unet sizes": {
            "in_channels": 4,
            "out_channels": 4,
            "width": 32,
            "multiples": [1, 2],
            "layers_per_block": 1,
            "cross_attention_dim": 64,
        },
        "vae sizes": {"latent_channels": 4, "width": 32, "multiples": [1, 2], "layers_per_block": 1},
    }
    assert capsys.readouterr().err == ""


def test_the_layout_of_generative_models(facts):
    """Its configuration of 2.1, whose denoiser says what is predicted, and whose embedder is OpenCLIP."""
    of_sgm = "sgm.modules.diffusionmodules.denoiser_scaling."
    tree = with_params(
        scale_factor=0.18215,
        disable_first_stage_autocast=True,
        denoiser_config={"params": {"num_idx": 1000, "scaling_config": {"target": f"{of_sgm}VScaling"}}},
        network_config={"params": {"in_channels": 4, "num_head_channels": 64}},
        conditioner_config={
            "params": {
                "emb_models": [
                    {
                        "target": "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
                        "params": {"layer": "penultimate"},
                    }
                ]
            }
        },
    )
    assert facts(tree) == {
        "prediction_type": "v_prediction",
        "scaling_factor": 0.18215,
        "version": 2,
        "head_channels": 64,
        "unet sizes": {"in_channels": 4},
    }
    tree["model"]["params"]["denoiser_config"]["params"]["scaling_config"]["target"] = f"{of_sgm}EDMScaling"
    with pytest.raises(UserError, match="its denoiser scales by sgm.*EDMScaling; known are EpsScaling, VScaling"):
        facts(tree)


def of_denoiser(name="LegacyDDPMDiscretization", target="DiscreteDenoiser", more=None, **params):
    return with_params(
        denoiser_config={
            "target": f"sgm.modules.diffusionmodules.denoiser.{target}",
            "params": {
                "discretization_config": {
                    "target": f"sgm.modules.diffusionmodules.discretizer.{name}",
                    "params": params,
                },
                **(more or {}),
            },
        }
    )


def test_the_noise_levels_of_generative_models(facts, capsys):
    levels = {"beta_start": 0.001, "beta_end": 0.02, "num_train_timesteps": 500, "beta_schedule": "scaled_linear"}
    stated = {"linear_start": 0.001, "linear_end": 0.02, "num_timesteps": 500, "more": {"num_idx": 500}}
    assert facts(of_denoiser(**stated)) == levels
    assert facts(of_denoiser("ZeroSNRDDPMDiscretization", **stated)) == {**levels, "zero_snr": True}
    assert facts(of_denoiser(more={"num_idx": 1000, "weighting_config": {}})) == {"beta_schedule": "scaled_linear"}
    assert capsys.readouterr().err == ""
    facts(of_denoiser(more={"shift": 3}))
    assert "a.yaml states shift, which is not known here and not used" in capsys.readouterr().err


def test_the_largest_level_by_generative_models(tensors, tmp_path):
    """sqrt(beta) from sqrt(0.001) to sqrt(0.02) in 500 steps."""
    tree = of_denoiser(linear_start=0.001, linear_end=0.02, num_timesteps=500)
    abar = (1 - torch.linspace(0.001**0.5, 0.02**0.5, 500, dtype=torch.float64).square()).prod()
    sigmas = scheduler_sigmas(loaded(tensors, tmp_path / "a.safetensors", tree=tree)["scheduler"])
    assert len(sigmas) == 500 and float(sigmas[0]) == pytest.approx(float((1 / abar - 1).sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    "tree, words",
    [
        (
            of_denoiser("EDMDiscretization", sigma_max=80),
            "its noise levels are those of sgm.*EDMDiscretization; known are",
        ),
        (of_denoiser(linear_end=3), "its linear_end is 3, not a number"),
        (of_denoiser(num_timesteps=1), "its num_timesteps are 1, not one whole number from 2"),
        (
            of_denoiser("ZeroSNRDDPMDiscretization", shift_scale=3.0),
            "its ZeroSNRDDPMD.* states shift_scale, which is not",
        ),
        (of_denoiser(target="Denoiser"), "its denoiser is sgm.*Denoiser, and only DiscreteDenoiser has"),
        (of_denoiser(more={"num_idx": 100}), "its num_idx is 100, and its levels are those of 1000 timesteps"),
        (
            with_params(timesteps=500, denoiser_config={"params": {"num_idx": 1000}}),
            "its num_idx is 1000, and its .* 500",
        ),
        (with_params(denoiser_config={"params": {"discretization_config": "x"}}), "its noise levels are those of None"),
        (
            with_params(parameterization="flow"),
            "its parameterization is flow; known are eps, v, x0; correct it, or move",
        ),
        (with_params(parameterization=["v"]), r"its parameterization is \['v'\]; known are"),
        (with_params(linear_end=2), "its linear_end is 2, not a number above 0 and below 1"),
        (with_params(linear_start=True), "its linear_start is True"),
        (with_params(scale_factor=math.nan), "factor is n"),
        (with_params(scale_factor=10**90), "its scale_factor is 10*, not a number above 0 and below 1e+"),
        (with_params(timesteps=10**9), "its timesteps are 1000000000, not one whole number from 2 to 10000"),
        (with_params(beta_schedule="cosine"), "its beta_schedule is cosine; known are linear, sqrt_linear"),
        (with_params(given_betas=[0.1]), "it gives betas of its own, which is not supported; use a diffusers folder"),
        (with_params(conditioning_key="hybrid"), "its conditioning_key is hybrid, and only crossattn"),
        (
            with_params(cond_stage_config={"target": "ldm.modules.encoders.xlmr.BertSeries"}),
            "its text encoder is ldm.*Be",
        ),
        (
            with_params(
                cond_stage_config={"target": "x.FrozenCLIPEmbedder", "params": {"layer": "hidden", "layer_idx": 11}}
            ),
            "it reads the text encoder at layer 11, and only 'last' is supported; take that line out",
        ),
        (with_params(unet_config={"params": {"num_heads": 0}}), "its num_heads is 0, not one whole number above 0"),
        (with_params(unet_config={"params": {"num_classes": "sequential"}}), "its UNet is told classes or sizes"),
        ("model: [", "a.yaml, beside the checkpoint, is damaged: .*; mend it, or move it away"),
        ("- 1", "a.yaml, beside the checkpoint, holds no settings"),
        ("", "a.yaml, beside the checkpoint, holds no settings"),
        ("a: b\n" * 30_000, "a.yaml, beside the checkpoint, has 150000 bytes, and may have 100000"),
    ],
)
def test_configurations_that_are_refused(facts, tree, words):
    with pytest.raises(UserError, match=words) as caught:
        facts(tree)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tree, words",
    [
        (
            {"description": "x"},
            "a.yaml beside the checkpoint has no options of a model (model: params:), and is not used",
        ),
        (
            with_params(offset_noise=0.1, a_b="c"),
            "a.yaml states offset_noise, a_b, which is not known here and not used",
        ),
    ],
)
def test_configurations_that_are_noted(facts, capsys, tree, words):
    assert facts(tree) == {} and words in capsys.readouterr().err


def test_aliases_of_a_configuration_cost_nothing(facts):
    """A billion strings by 30 aliases of aliases: none is ever written out, and a known key among them is read."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
    assert facts(f"{bomb}model: {{params: {{parameterization: v, b: *a29}}}}") == {"prediction_type": "v_prediction"}
    with pytest.raises(UserError, match="its parameterization is") as caught:
        facts(f"{bomb}model: {{params: {{parameterization: *a29}}}}")
    assert len(str(caught.value)) < 500


def test_only_the_file_of_the_same_name_is_read(facts, tmp_path):
    (tmp_path / "b.yaml").write_text("model: [")
    assert facts() == {}


# ---------------------------------------------------------------- markers, metadata, options


@pytest.mark.parametrize(
    "names, want",
    [
        (["v_pred"], {"prediction_type": "v_prediction"}),
        (["ztsnr"], {"zero_snr": True}),
        (["v_pred", "ztsnr"], {"prediction_type": "v_prediction", "zero_snr": True}),
        (["w"], {}),
    ],
)
def test_marker_tensors(facts, names, want):
    assert facts(names=names) == want


@pytest.mark.parametrize(
    "metadata, want",
    [
        ({"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({"modelspec.prediction_type": "Epsilon"}, {"prediction_type": "epsilon"}),
        ({"modelspec.predict_key": "v"}, {"prediction_type": "v_prediction"}),
        ({"modelspec.predict_key": "epsilon"}, {"prediction_type": "epsilon"}),
        (
            {"modelspec.architecture": "stable-diffusion-v1", "modelspec.resolution": "768x768"},
            {"version": 1, "pixels": 768},
        ),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, {"version": 2}),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, {"version": 2, "prediction_type": "v_prediction"}),
        ({"modelspec.encoder_layer": "2"}, {"layer": 2}),
        ({"ss_clip_skip": "None"}, {}),
        ({"ss_clip_skip": "1"}, {"layer": 1}),
        ({"ss_zero_terminal_snr": "True"}, {"zero_snr": True}),
        ({"ss_zero_terminal_snr": "False"}, {}),
        ({"ss_base_model_version": "sd_v2_v"}, {"version": 2, "prediction_type": "v_prediction"}),
        ({"ss_resolution": "(640, 640)"}, {"pixels": 640}),
        ({"modelspec.title": "a", "format": "pt"}, {}),
        ({"modelspec.timestep_range": "0,999"}, {}),
    ],
)
def test_metadata(facts, capsys, metadata, want):
    assert facts(metadata=metadata) == want and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "metadata, words",
    [
        (
            {"modelspec.resolution": "512x768"},
            "the pictures here are square, of a multiple of 64 pixels; the 512x768 in",
        ),
        ({"modelspec.resolution": "\x1b[2Jbig"}, r"the resolution in its metadata, \x1b[2Jbig, is none; 512 pixels"),
        (
            {"modelspec.timestep_range": "200,1000"},
            "was trained at timesteps 200,1000 only, by its metadata: give such",
        ),
    ],
)
def test_metadata_that_are_noted(facts, capsys, metadata, words):
    assert facts(metadata=metadata) == {} and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "metadata, words",
    [
        (
            {"modelspec.prediction_type": "flow"},
            "predicts flow by its metadata, which is not known; known are epsilon and",
        ),
        ({"modelspec.predict_key": "flow"}, "predicts flow by its metadata, which is not known"),
        ({"modelspec.predict_key": "edm_eps"}, "predict_key edm_eps. it has the noise levels of EDM, which are not"),
        (
            {"modelspec.predict_key": "v", "modelspec.prediction_type": "epsilon"},
            "is epsilon by its metadata, and v_pred",
        ),
        ({"modelspec.encoder_layer": "-1"}, "its metadata say -1 for modelspec.encoder_layer"),
        ({"ss_clip_skip": "9"}, "its metadata say 9 for ss_clip_skip, .*, which may be 1 to 4"),
    ],
)
def test_metadata_that_are_refused(facts, metadata, words):
    with pytest.raises(UserError, match=words):
        facts(metadata=metadata)


def test_statements_that_differ_are_refused_unless_an_option_decides(facts):
    v, metadata = with_params(parameterization="v"), {"modelspec.prediction_type": "epsilon"}
    with pytest.raises(
        UserError,
        match="prediction_type is epsilon by its metadata, and v_prediction by a.yaml; say "
        "which with --sd.prediction_type",
    ):
        facts(v, metadata)
    for option in ("epsilon", "v_prediction"):
        sd = SDConfig(checkpoint="a.safetensors", prediction_type=option)
        assert facts(v, metadata, sd=sd) == {"prediction_type": option}
    assert facts(v, {"modelspec.prediction_type": "v"}, ["v_pred"]) == {"prediction_type": "v_prediction"}


def test_options_that_state_a_prediction(facts):
    assert facts(sd=SDConfig(variant="v2", v2_highres=True)) == {"prediction_type": "v_prediction"}
    assert facts(sd=SDConfig(variant="v2")) == facts(sd=SDConfig(variant="v1")) == {"prediction_type": "epsilon"}


# ---------------------------------------------------------------- what becomes of it


def loaded(tensors, path, metadata=None, tree=None, sd=None):
    """The parts, without weights, of a file with a configuration beside it."""
    save_file(tensors, path, metadata=metadata)
    if tree is not None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return crafted.load(sd or SDConfig(checkpoint=str(path)), empty=True)


def test_a_1x_model_with_v_prediction_by_its_yaml(tensors, tmp_path):
    parts = loaded(tensors, tmp_path / "fur.safetensors", tree=with_params(parameterization="v"))
    assert parts["scheduler"].config.prediction_type == "v_prediction"


def test_what_a_yaml_states_is_used(tensors, tmp_path):
    """Levels, scale of the latents, and heads, which no weight tells: two of 16 channels, not eight of 4."""
    tree = with_params(
        linear_start=0.001,
        linear_end=0.02,
        timesteps=500,
        beta_schedule="sqrt_linear",
        scale_factor=0.3,
        unet_config={"params": {"num_head_channels": 16}},
    )
    parts = loaded(tensors, tmp_path / "a.safetensors", tree=tree)
    want = torch.linspace(0.001, 0.02, 500)
    torch.testing.assert_close(parts["scheduler"].betas, want, rtol=1e-6, atol=0)
    assert parts["vae"].config.scaling_factor == 0.3
    assert parts["unet"].down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == 2


def test_a_published_yaml_changes_nothing(tensors, tmp_path):
    plain = loaded(tensors, tmp_path / "a.safetensors")
    beside = loaded(tensors, tmp_path / "b.safetensors", tree=V1_YAML)
    assert torch.equal(plain["scheduler"].betas, beside["scheduler"].betas)
    for part in ("unet", "vae"):
        assert plain[part].config == beside[part].config


@pytest.mark.parametrize(
    "tree, words",
    [
        (
            with_params(unet_config={"params": {"context_dim": 1024}}),
            "a.yaml, beside the checkpoint, is of another model: it states cross_attention_dim 1024, and the weights "
            "have 64",
        ),
        (
            with_params(first_stage_config={"params": {"ddconfig": {"ch_mult": [1, 2, 4]}}}),
            r"multiples \[1, 2, 4\], and",
        ),
        (with_params(unet_config={"params": {"num_heads": 5}}), r"5 heads do not divide \[32, 64\], the channels"),
    ],
)
def test_a_yaml_of_another_model(tensors, tmp_path, tree, words):
    with pytest.raises(UserError, match=words):
        loaded(tensors, tmp_path / "a.safetensors", tree=tree)


@pytest.mark.parametrize(
    "architecture, called",
    [("stable-diffusion-v2-512", "2"), ("stable-diffusion-xl-v1-base", "stable-diffusion-xl-v1-base")],
)
def test_a_version_that_the_weights_do_not_have_is_noted(tensors, tmp_path, capsys, architecture, called):
    loaded(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": architecture})
    assert f"is of version {called} by its metadata, and of 1 by its weights, which" in capsys.readouterr().err


def test_the_resolution_in_the_metadata(tensors, tmp_path):
    """768-pixel pictures, of which this VAE, of two levels, makes latents half as large."""
    parts = loaded(tensors, tmp_path / "a.safetensors", {"modelspec.resolution": "768x768"})
    assert parts["unet"].config.sample_size == 384


@torch.no_grad()
def test_clip_skip_leaves_the_last_layers_out(tensors, tmp_path):
    """Layer 2 from the end, with the final norm: the text encoder without its last layer. LoRAs still find that."""
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.encoder_layer": "2"})
    sd = SDConfig(checkpoint=str(tmp_path / "a.safetensors"), prediction_type="epsilon")
    net = crafted.load(sd)["text_encoder"].eval()
    ids = torch.tensor([[49406, 320, 2368, 49407]])
    whole = crafted.small_parts()["text_encoder"]
    states = whole(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(net(ids).last_hidden_state, whole.final_layer_norm(states[1]), rtol=0, atol=1e-5)
    assert len(net.encoder.layers) == 2


@pytest.mark.parametrize("layer, without", [("1", 0), ("2", 0), ("3", 1)])
def test_clip_skip_of_2x_counts_without_its_last_block_or_with_it(tmp_path, capsys, layer, without):
    """Trainers count on the encoder without its unused block, web UIs with it: 1 and 2 are the ordinary output."""
    for key in ("modelspec.encoder_layer", "ss_clip_skip"):
        loaded(crafted.single_file(crafted.small_parts(True), True), tmp_path / "a.safetensors", {key: layer})
        assert (f"{without} layer at the end of the text encoder is left out" in capsys.readouterr().err) == (
            without > 0
        )


@pytest.mark.parametrize(
    "v2, layer, words", [(False, "3", "of version 1 it may be 1 to 2"), (True, "4", "of version 2 it may be 1 to 3")]
)
def test_a_layer_that_is_not_there(tmp_path, v2, layer, words):
    with pytest.raises(UserError, match=f"ask for layer {layer} of the text encoder.*{words}"):
        loaded(crafted.single_file(crafted.small_parts(v2), v2), tmp_path / "a.safetensors", {"ss_clip_skip": layer})


# ---------------------------------------------------------------- heads


def narrow(tensors):
    """A 1.x UNet, 32 channels wide, with the text encoder of 2.x."""
    v2 = crafted.single_file(crafted.small_parts(True), True)
    return {
        name: t
        for own, file in ((False, tensors), (True, v2))
        for name, t in file.items()
        if name.startswith(layout.TEXT) == own
    }


def test_heads_that_nothing_tells(tensors, tmp_path):
    """2.x has heads of 64 channels, which 32 channels cannot have; a .yaml can tell them."""
    file = narrow(tensors)
    with pytest.raises(UserError, match=r"nothing tells the heads .* 64 channels .* do not divide \[32, 64\].*; state"):
        loaded(file, tmp_path / "a.safetensors")
    for options, heads in (({"num_heads": 4}, 4), ({"num_head_channels": 16}, 2)):
        parts = loaded(file, tmp_path / "a.safetensors", tree=with_params(unet_config={"params": options}))
        assert parts["unet"].down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads == heads


# ---------------------------------------------------------------- the scale of latents


@pytest.mark.parametrize(
    "scale, params, want",
    [
        (torch.tensor(0.25), {}, 0.25),
        (torch.tensor(0.18215), {}, 0.18215),
        (torch.tensor(0.18215).half(), {}, 0.18215),
        (torch.tensor([0.25]), {"scale_by_std": True, "scale_factor": 1.0}, 0.25),
        (torch.tensor(0.25), {"scale_by_std": True}, 0.25),
        (torch.tensor(0.25), {"scale_factor": 0.25}, 0.25),
        (None, {"scale_by_std": True, "scale_factor": 0.25}, 0.25),
        (None, {"scale_by_std": False}, 0.18215),
    ],
)
def test_the_scale_of_latents(tensors, tmp_path, capsys, scale, params, want):
    file = {**tensors, **({} if scale is None else {"scale_factor": scale})}
    parts = loaded(file, tmp_path / "a.safetensors", tree=with_params(log_every_t=1, **params))
    assert parts["vae"].config.scaling_factor == want
    noted = "a.safetensors: the scale of its latents is 0.25 by its tensor scale_factor, not 0.18215; it is used"
    assert (noted in capsys.readouterr().err) == (want == 0.25 and params.get("scale_factor") != 0.25)


@pytest.mark.parametrize(
    "scale, params, words",
    [
        (
            torch.tensor(0.25),
            {"scale_factor": 0.18215},
            "is 0.25 by its tensor scale_factor, and 0.18215 by a.yaml; move",
        ),
        (torch.tensor(math.nan), {}, r"its tensor scale_factor \[\] is not one number above 0"),
        (torch.tensor(math.inf), {}, "is not one number"),
        (torch.tensor(0.0), {}, "is not one number"),
        (torch.ones(3), {}, r"its tensor scale_factor \[3\] is not one"),
        (None, {"scale_by_std": True}, "a.yaml says scale_by_std: True, and the file lacks the tensor scale_factor"),
        (None, {"scale_by_std": True, "scale_factor": 1.0}, "lacks the tensor scale_factor, which"),
    ],
)
def test_scales_of_latents_that_are_refused(tensors, tmp_path, scale, params, words):
    file = {**tensors, **({} if scale is None else {"scale_factor": scale})}
    with pytest.raises(UserError, match=words):
        loaded(file, tmp_path / "a.safetensors", tree=with_params(log_every_t=1, **params))


# ---------------------------------------------------------------- noise


def test_markers_of_a_schedule_with_zero_terminal_snr(tensors, tmp_path):
    """Betas rescaled so that abar of the last step is 0 (arXiv 2305.08891, Algorithm 1), which is left out."""
    empty = torch.zeros(0)
    parts = loaded({**tensors, "v_pred": empty, "ztsnr": empty}, tmp_path / "a.safetensors")
    root = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    sigmas = scheduler_sigmas(parts["scheduler"])
    assert len(sigmas) == 999 and sigmas[0] == pytest.approx(2254.2, abs=0.2)
    torch.testing.assert_close(sigmas.flip(0), (root[:-1] ** -2 - 1).sqrt(), rtol=1e-4, atol=0)
    assert parts["scheduler"].config.prediction_type == "v_prediction"
    plain = scheduler_sigmas(loaded(tensors, tmp_path / "b.safetensors")["scheduler"])
    assert len(plain) == 1000 and plain[0] == pytest.approx(14.61, abs=0.01)


SD_ABAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()).cumprod(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("zero", [False, True])
def test_a_files_own_noise_table(tensors, tmp_path, zero, dtype):
    """Stable Diffusion's own, rounded or not, changes nothing; the one with zero terminal SNR is known."""
    root = SD_ABAR.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1]) if zero else root
    table = {noise.TABLE: root.square().to(dtype)}
    sigmas = scheduler_sigmas(loaded({**tensors, **table}, tmp_path / "a.safetensors")["scheduler"])
    assert sigmas[0] == pytest.approx(2254.2 if zero else 14.61, abs=0.2) and len(sigmas) == 1000 - zero


def test_another_noise_table_is_used(tensors, tmp_path, capsys):
    abar = (1 - torch.linspace(1e-4, 0.02, 500, dtype=torch.float64)).cumprod(0)
    file = {**tensors, noise.TABLE: abar.float()}
    sigmas = scheduler_sigmas(loaded(file, tmp_path / "a.safetensors")["scheduler"])
    torch.testing.assert_close(sigmas.flip(0), (1 / abar - 1).sqrt(), rtol=1e-3, atol=0)
    assert "has noise levels of its own (its tensor alphas_cumprod), which are used" in capsys.readouterr().err
    with pytest.raises(UserError, match="its tensor alphas_cumprod is another noise schedule than its a.yaml states"):
        loaded(file, tmp_path / "a.safetensors", tree=with_params(linear_start=0.00085))


def test_noise_levels_under_other_names(tensors, tmp_path, capsys):
    """abar of 0.9 and 0.72: betas 0.1 and 0.2. Levels come in both orders, with and without zero."""
    abar = torch.tensor([0.9, 0.72], dtype=torch.float64)
    want = (1 / abar - 1).sqrt()
    for name, table in (
        ("betas", [0.1, 0.2]),
        ("sqrt_alphas_cumprod", abar.sqrt()),
        ("denoiser.sigmas", want),
        ("denoiser.sigmas", want.flip(0)),
        ("denoiser.sigmas", [0, *want]),
    ):
        file = {**tensors, name: torch.as_tensor(table).float()}
        sigmas = scheduler_sigmas(loaded(file, tmp_path / "a.safetensors")["scheduler"])
        torch.testing.assert_close(sigmas.flip(0), want, rtol=1e-5, atol=0)
        assert f"(its tensor {name}), which are used" in capsys.readouterr().err
    both = {**tensors, "betas": torch.tensor([0.1, 0.2]), noise.TABLE: SD_ABAR.float()}  # that one counts
    assert len(scheduler_sigmas(loaded(both, tmp_path / "a.safetensors")["scheduler"])) == 1000


@pytest.mark.parametrize("of_zero", [math.inf, None])
def test_levels_of_generative_models_with_zero_terminal_snr(tensors, tmp_path, of_zero):
    root = SD_ABAR.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    sigmas = (root**-2 - 1).sqrt()
    sigmas[-1] = sigmas[-1] if of_zero is None else of_zero
    for name, table in (("denoiser.sigmas", sigmas.flip(0)), ("denoiser.sigmas", sigmas)):
        file = {**tensors, name: table.float()}
        parts = loaded(file, tmp_path / "a.safetensors", tree=of_denoiser("ZeroSNRDDPMDiscretization"))
        found = scheduler_sigmas(loaded(file, tmp_path / "b.safetensors")["scheduler"])
        assert len(found) == 999 and found[0] == pytest.approx(2254.2, abs=0.2)
        assert torch.equal(found, scheduler_sigmas(parts["scheduler"]))


def test_a_table_of_one_number_is_no_schedule(tmp_path):
    file = SimpleNamespace(shapes={"betas": ()}, tensor=lambda name: torch.tensor(0.1))
    with pytest.raises(UserError, match="its tensor betas .* is no noise schedule"):
        noise.of_file(tmp_path / "a.ckpt", file, {})


@pytest.mark.parametrize(
    "table",
    [
        torch.ones(1000),
        torch.linspace(0.1, 0.9, 1000),
        torch.ones(3, 3),
        torch.zeros(5),
        torch.linspace(0.9, -0.9, 1000),
    ],
)
def test_a_table_that_is_no_schedule(tmp_path, table):
    file = SimpleNamespace(shapes={noise.TABLE: tuple(table.shape)}, tensor=lambda name: table)
    with pytest.raises(UserError, match="its tensor alphas_cumprod .* is no noise schedule.*: get the file again"):
        noise.of_file(tmp_path / "a.ckpt", file, {})


FOLDER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}  # of the published folder of 1.5


def test_settings_of_a_folders_scheduler(capsys):
    assert noise.of_folder(FOLDER)["prediction_type"] is None  # stated nowhere: the network is asked
    sigmas = scheduler_sigmas(noise.scheduler(noise.of_folder(FOLDER)))
    torch.testing.assert_close(sigmas.flip(0), (1 / SD_ABAR - 1).sqrt(), rtol=1e-4, atol=0)
    zero = noise.of_folder({**FOLDER, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    assert scheduler_sigmas(noise.scheduler(zero))[0] == pytest.approx(2254.2, abs=0.2)
    own = {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2, "_class_name": "DDPMScheduler"}
    sigmas = scheduler_sigmas(noise.scheduler(noise.of_folder(own)))  # abar 0.9, 0.72
    torch.testing.assert_close(
        sigmas, torch.tensor([(0.28 / 0.72) ** 0.5, (0.1 / 0.9) ** 0.5]).double(), rtol=1e-6, atol=0
    )
    assert capsys.readouterr().err == ""
    noise.of_folder({**FOLDER, "clip_sample": True, "thresholding": True})
    assert "asks for clip_sample and thresholding, which is for samplers: the score is used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_a_scheduler_of_few_steps_is_noted(capsys, name):
    noise.of_folder({**FOLDER, "_class_name": name})
    assert f"its scheduler is {name}, for networks that were distilled" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "its scheduler is a FlowMatchEulerDiscreteScheduler, whose",
        ),
        ({"_class_name": "EDMEulerScheduler"}, "a EDMEuler"),
        ({"_class_name": ["x"]}, r"a \['x'\]"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "has timestep_type continuous"),
        ({"use_flow_sigmas": True}, "has use_flow_sigmas True"),
        ({"trained_betas": [0.1]}, "are not 1000 numbers"),
        ({"trained_betas": "x"}, "are not 1000 numbers"),
        ({"num_train_timesteps": 0}, "is 0, not 1 to 1000000"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'; known are epsilon, v_prediction, sample"),
    ],
)
def test_settings_of_a_scheduler_that_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        noise.of_folder({**FOLDER, **change})
    for key in ("beta_start", "beta_end", "beta_schedule"):  # of which diffusers would guess one
        with pytest.raises(ValueError, match=f"scheduler_config.json has no {key}"):
            noise.of_folder({k: v for k, v in FOLDER.items() if k != key})


def test_stable_diffusions_own_levels_are_the_default(tmp_path):
    file = SimpleNamespace(shapes={})
    assert noise.of_file(tmp_path / "a", file, {}) == {**layout.SCHEDULE, "rescale_betas_zero_snr": False}
