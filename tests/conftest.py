"""Keeps every test off the network, and makes a tiny checkpoint and small scenes for tests that ask for them."""

import os
import signal

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
n_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if n_workers > 1:  # else the threads of each worker fight for the cores of the others
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_workers)))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background; the commands of tests heed Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home and current folder, with the data root of env.json and the hub's cache in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A diffusers folder of Stable Diffusion's architecture with random weights: 16-pixel pictures, 4x8x8 latents."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from training import tokenizer
    from training.dataset import caption_words

    folder = tmp_path_factory.mktemp("tiny_sd")
    eos = len(tokenizer.build(caption_words(), folder / "tokenizer")) - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=eos + 1,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.MAX_LENGTH,
                projection_dim=16,
                bos_token_id=eos - 1,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        ).save_pretrained(folder / "text_encoder")
        UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).save_pretrained(folder / "unet")
        AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
        ).save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def scene():
    """Training views of the box."""
    import box_scene

    return box_scene.scene_of(box_scene.box_field(), box_scene.poses(12))


@pytest.fixture(scope="module")
def test_scene():
    """Views of it that no training has seen."""
    import box_scene

    return box_scene.scene_of(box_scene.box_field(), box_scene.poses(3, lift=0.9))
