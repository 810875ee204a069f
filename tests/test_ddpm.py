"""The DDPM family: its denoiser against diffusers' own, pipelines that it takes and that it refuses in one line."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, ScoreSdeVePipeline, ScoreSdeVeScheduler

import run_sjc
from adapt import make_adapter
from families.ddpm import pipeline
from families.ddpm.adapter import DDPMAdapter, load
from families.ddpm.pipeline import read
from my.errors import UserError
from options.sjc import SJCConfig
from sjc import SJC
from tiny import at_several_levels, pixel_unet


@pytest.fixture(scope="module")
def unet():
    return pixel_unet()


@pytest.fixture(scope="module")
def folder(unet, tmp_path_factory):
    """A tiny unconditional pipeline, as diffusers saves one."""
    path = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path)
    return path


@pytest.mark.parametrize("t", [0, 300, 999])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_denoised_equals_the_schedulers(unet, kind, t):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    adapter, rng = DDPMAdapter(unet, scheduler), torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 3, 8, 8, generator=rng)
    want = scheduler.step(unet(x_t, t).sample, t, x_t).pred_original_sample
    sigma = adapter.sigmas[999 - t].item()
    cond = adapter.embed(["front view of a duck", ""])
    got = adapter.denoise((1 + sigma**2) ** 0.5 * x_t, sigma, cond, cond, 100.0)  # nothing to guide by
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@torch.no_grad()
def test_several_levels_in_one_call(unet):
    adapter = DDPMAdapter(unet, DDPMScheduler())
    torch.testing.assert_close(*at_several_levels(adapter, *adapter.embed(["", ""]).split(1)), rtol=1e-4, atol=1e-3)


def test_folder_is_loaded(folder):
    cfg = SJCConfig(family="ddpm", ddpm={"checkpoint": str(folder)})
    cfg.check_files()
    adapter = make_adapter(cfg, "cpu")
    assert adapter.data_shape == (3, 8, 8) and adapter.embed(["", "a duck"]).shape == (2, 0)
    assert adapter.sigmas[0].item() == pytest.approx(157.4, abs=0.1)  # betas 1e-4 to 0.02


def test_small_files_are_read_once(folder, monkeypatch):
    """Of a whole run's preparation: what `check` found is handed on."""
    read_json, names = pipeline.read_json, []
    monkeypatch.setattr(pipeline, "read_json", lambda path: names.append(path.name) or read_json(path))
    cfg = SJCConfig(family="ddpm", ddpm={"checkpoint": str(folder)})
    make_adapter(cfg, "cpu", cfg.check_files())
    assert sorted(names) == ["config.json", "model_index.json", "scheduler_config.json"]


def test_a_pipeline_of_the_hub_is_downloaded_and_checked(folder, tmp_path, monkeypatch):
    """In place of the hub, a library that gives a folder: a sound one, and one of another kind."""
    cfg = SJCConfig(family="ddpm", ddpm={"checkpoint": "org/name"})
    found = cfg.check_files()
    assert found.pipeline is None and cfg.ddpm.to_download(found).repos == ("org/name",)
    for path, words in ((folder, ""), (edited(folder, tmp_path / "bad", UNET, in_channels=4), "takes 4 channels")):
        monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda repo, path=path: str(path))
        if words:
            with pytest.raises(UserError, match=f"--ddpm.checkpoint org/name: it {words}"):
                make_adapter(cfg, "cpu", found)
        else:
            assert make_adapter(cfg, "cpu", found).data_shape == (3, 8, 8)


def test_layout_of_the_first_pipelines(unet, tmp_path, capfd):
    """As the ones of 2022 are on the hub: all in one folder, weights in .bin, read as tensors only."""
    unet.save_pretrained(tmp_path, safe_serialization=False)
    DDPMScheduler(beta_end=0.01).save_pretrained(tmp_path)
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": "0.1.1",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    capfd.readouterr()
    loaded, scheduler = load(read("", tmp_path))
    assert capfd.readouterr() == ("", "") and scheduler.config.beta_end == 0.01
    assert torch.equal(loaded.conv_in.weight, unet.conv_in.weight)


def test_a_last_level_of_pure_noise_is_left_out(unet):
    """Zero terminal SNR: abar 0 has no sigma; every other level still tells the network its own step."""
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    adapter = DDPMAdapter(unet, scheduler)
    assert len(adapter.sigmas) == 999 and adapter.sigmas.isfinite().all()
    for t in (0, 500, 998):
        sigma = adapter.sigmas[998 - t].item()
        assert adapter.timestep(sigma) == t
        assert sigma == pytest.approx((1 / scheduler.alphas_cumprod[t].item() - 1) ** 0.5, rel=1e-3)
    assert adapter.sigma_range()[1] == 80


@pytest.mark.parametrize(
    "betas", [[0.1, 1.0, 0.1], [0.1, 1.2], [0.1, -0.1], [0.1, float("nan")], [0.0, 0.1], [1.0]], ids=str
)
def test_betas_that_are_no_schedule_are_refused(folder, tmp_path, betas):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    settings = broken / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"trained_betas": betas}))
    with pytest.raises(UserError, match="--ddpm.checkpoint .*broken: the betas of its scheduler are no noise schedule"):
        make_adapter(SJCConfig(family="ddpm", ddpm={"checkpoint": str(broken)}), "cpu")


def edited(folder, to, file, **changes):
    """Return a copy of a pipeline, some settings of one of its files changed."""
    copy = Path(shutil.copytree(folder, to))
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return copy


UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"


@pytest.mark.parametrize(
    "file, changes, words",
    [
        (SCHEDULER, {"prediction_type": "flow_prediction"}, ["prediction_type is flow_prediction", "epsilon"]),
        (SCHEDULER, {"timestep_type": "continuous"}, ["timestep_type is continuous"]),
        (SCHEDULER, {"use_flow_sigmas": True}, ["use_flow_sigmas"]),
        (SCHEDULER, {"_class_name": "CMStochasticIterativeScheduler"}, ["consistency model"]),
        (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, ["told levels of noise"]),
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, ["is of a flow"]),
        (SCHEDULER, {"_class_name": "IPNDMScheduler"}, ["no table of betas"]),
        (SCHEDULER, {"trained_betas": ["a"]}, ["trained_betas are no list of numbers"]),
        (SCHEDULER, {"num_train_timesteps": 10**12}, ["num_train_timesteps is 1000000000000"]),
        (SCHEDULER, {"num_train_timesteps": "\x1b[31m" * 500}, ["num_train_timesteps is \\x1b"]),
        (SCHEDULER, {"beta_schedule": "odd"}, ["cannot be read", "odd"]),
        (INDEX, {"scheduler": ["diffusers", "KarrasVeScheduler"]}, ["told levels of noise, not steps"]),
        (INDEX, {"unet": ["my_unet", "MyUNet"]}, ["unet is MyUNet of my_unet", "not run"]),
        (INDEX, {"vqvae": ["diffusers", "VQModel"], "_class_name": "LDMPipeline"}, ["a LDMPipeline of", "vqvae"]),
        (INDEX, {"_class_name": None}, ["not what diffusers writes"]),
        (UNET, {"_class_name": "UNet2DConditionModel"}, ["its unet is a UNet2DConditionModel"]),
        (
            UNET,
            {"in_channels": 1, "out_channels": 1},
            ["grey pictures (1 channel)", "RGB only", "google/ddpm-cifar10-32"],
        ),
        (UNET, {"in_channels": 4}, ["takes 4 channels, not 3"]),
        (UNET, {"out_channels": 4}, ["gives 4 channels, not 3"]),
        (UNET, {"num_class_embeds": 10}, ["takes a class"]),
        (UNET, {"class_embed_type": "timestep"}, ["takes a class"]),
        (UNET, {"time_embedding_type": "fourier"}, ["told levels of noise", "fourier"]),
        (UNET, {"sample_size": [8, 16]}, ["sample_size is [8, 16], not one number"]),
        (UNET, {"sample_size": None}, ["sample_size is None"]),
        (UNET, {"sample_size": 9}, ["sample_size 9 cannot be halved 1 times"]),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_files_state_and_cannot_be_used(folder, tmp_path, file, changes, words):
    """One line, of at most 300 characters besides paths, none of them a control character."""
    bad = edited(folder, tmp_path / "bad", file, **changes)
    message = refused(bad, *words)
    assert message.isprintable() and len(message.replace(str(bad), "")) <= 300, message


@pytest.mark.parametrize("name", [INDEX, UNET, SCHEDULER])
@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "{}", "7" * 10_000], ids=lambda text: text[:3])
def test_damaged_files_are_named(folder, tmp_path, name, text):
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    (bad / name).write_text(text)
    refused(bad, str(bad / name), "get that file again")


def test_a_square_of_two_numbers_is_taken(folder, tmp_path):
    unet, scheduler = load(read("", edited(folder, tmp_path / "square", UNET, sample_size=[8, 8])))
    assert DDPMAdapter(unet, scheduler).data_shape == (3, 8, 8)


def test_the_first_schedulers_said_what_is_predicted_otherwise(folder, tmp_path):
    old = edited(folder, tmp_path / "old", SCHEDULER, predict_epsilon=False)
    settings = json.loads((old / SCHEDULER).read_text())
    del settings["prediction_type"]
    (old / SCHEDULER).write_text(json.dumps(settings))
    cfg = SJCConfig(family="ddpm", ddpm={"checkpoint": str(old)})
    assert make_adapter(cfg, "cpu").prediction_type == "sample"


@pytest.mark.parametrize(
    "changes",
    [
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_end": 0.01},
        {"beta_schedule": "sigmoid", "num_train_timesteps": 50},
    ],
    ids=str,
)
def test_schedules_that_files_state_are_used(folder, tmp_path, changes):
    """Against the product of 1 - beta over diffusers' own betas, and by hand where they are given."""
    path = str(edited(folder, tmp_path / "x", SCHEDULER, **changes))
    sigmas = make_adapter(SJCConfig(family="ddpm", ddpm={"checkpoint": path}), "cpu").sigmas
    abar = (1 - DDPMScheduler(**changes).betas.double()).cumprod(0)
    torch.testing.assert_close(sigmas, (1 / abar - 1).sqrt().flip(0))
    if "trained_betas" in changes:  # abar = 0.9, 0.72, 0.504
        assert sigmas.tolist() == pytest.approx([(1 / 0.504 - 1) ** 0.5, (1 / 0.72 - 1) ** 0.5, (1 / 9) ** 0.5])


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_sample": True, "clip_sample_range": 0.1},
        {"thresholding": True},
        {"variance_type": "learned_range"},
        {"timestep_spacing": "trailing"},
    ],
    ids=str,
)
def test_what_only_a_sampler_reads_changes_no_score(folder, tmp_path, changes):
    x, D = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for path in (folder, edited(folder, tmp_path / "x", SCHEDULER, **changes)):
        adapter = make_adapter(SJCConfig(family="ddpm", ddpm={"checkpoint": str(path)}), "cpu")
        D.append(adapter.denoise(x, adapter.round_sigma(1.0), adapter.embed([""])))
    assert torch.equal(*D)


def test_weights_of_a_variant_alone(folder, unet, tmp_path, capsys):
    """Saved in half precision and no other: taken, in float32, and said."""
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    whole = half / "unet" / "diffusion_pytorch_model.safetensors"
    whole.unlink()
    copy.deepcopy(unet).half().save_pretrained(half / "unet", variant="fp16")
    loaded, _ = load(read("", half))
    assert loaded.dtype == torch.float32 and torch.allclose(loaded.conv_in.weight, unet.conv_in.weight, atol=1e-3)
    assert "only weights of the variant fp16: these are taken" in capsys.readouterr().err


def test_a_part_of_a_pipeline_says_where_the_whole_is(folder):
    refused(folder / "unet", "one part of a pipeline: give the folder above it")


def refused(checkpoint, *words):
    with pytest.raises(UserError) as caught:
        cfg = SJCConfig(family="ddpm", ddpm={"checkpoint": checkpoint and str(checkpoint)})
        make_adapter(cfg, "cpu", cfg.check_files())
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def test_what_is_no_such_pipeline_is_refused(folder, unet, tmp_path):
    refused(None, "--family ddpm needs --ddpm.checkpoint")
    refused(tmp_path / "nosuch", "no such folder", "hub id")
    refused(tmp_path, "has no model_index.json")
    refused(Path(run_sjc.__file__).parent / "mini_sd", "a StableDiffusionPipeline of", "pixel-space")
    no_betas = tmp_path / "no_betas"
    ScoreSdeVePipeline(unet, ScoreSdeVeScheduler()).save_pretrained(no_betas)
    refused(
        no_betas,
        "a ScoreSdeVePipeline of scheduler, unet",
        "ScoreSdeVeScheduler adds noise without end",
        "discrete scheduler",
    )
    guessed = Path(shutil.copytree(folder, tmp_path / "guessed"))
    (guessed / "scheduler" / "scheduler_config.json").write_text("{}")
    refused(guessed, "guessed/scheduler/scheduler_config.json is not what diffusers writes", "get that file again")
    refused(
        "nobody/no-such-model",
        f"--ddpm.checkpoint nobody/no-such-model: nothing at {Path('nobody/no-such-model').absolute()}; on the hub: ",
        "nobody/no-such-model: HF_HUB_OFFLINE is set",
        "give the folder of a diffusers pipeline or a hub id",
    )
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    refused(broken, "cannot be read as a diffusers pipeline")


@pytest.mark.parametrize("rend_hw", [8, 12])
def test_text_to_3d_without_text(folder, rend_hw):
    """Colours in [-1, 1], 3 channels, rendered at the model's resolution or resized to it."""
    cfg = SJCConfig(
        family="ddpm", ddpm={"checkpoint": str(folder)}, vox={"grid_size": 6}, pose={"rend_hw": rend_hw}, n_steps=10
    )
    assert (cfg.vox.model_type, cfg.vox.c) == ("V_SJC", 3)
    sjc = SJC(cfg, make_adapter(cfg, "cpu"))
    before = sjc.field.color.detach().clone()
    stats = sjc.step(0)
    assert all(torch.isfinite(torch.as_tensor(v)) for v in stats.values())
    assert not torch.equal(sjc.field.color, before)


def test_a_whole_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_sjc.main(
        [
            "--family",
            "ddpm",
            "--ddpm.checkpoint",
            str(folder),
            "--n_steps",
            "2",
            "--vox.grid_size",
            "6",
            "--pose.rend_hw",
            "8",
            "--device",
            "cpu",
        ]
    )
    assert len(list((tmp_path / "test_2" / "view").iterdir())) == 100
