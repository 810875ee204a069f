"""The embedded miniature: its folder is standard and small, it draws what it is asked for, and SJC shapes with it."""

import numpy as np
import pytest
import torch

import evaluate
import pose
from adapt import make_adapter
from benchmarks.mini_samples import SamplesConfig, draw
from families.sd.find import ROOT
from my import config
from my.errors import UserError
from options.sjc import SJCConfig
from sjc import SJC, optimise
from toyworld import COLORS, DEGRADATIONS, OBJECTS, UNSEEN_PAIRS, caption
from toyworld import judge as judges
from voxnerf import likeness

FOLDER = ROOT / "mini_sd"


@pytest.fixture(scope="module")
def adapter():
    return make_adapter(SJCConfig(sd={"variant": "mini", "prompt": "a blue duck"}), "cpu")


def test_is_small_enough_for_git():
    weights = [
        path for part in ("tokenizer", "text_encoder", "unet", "vae", "scheduler") for path in (FOLDER / part).iterdir()
    ]
    assert sum(path.stat().st_size for path in weights) <= 12e6
    assert {path.suffix for path in weights} <= {".json", ".txt", ".safetensors"}


def test_diffusers_loads_the_folder_by_itself(adapter):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    prompts, rng = ["front view of a red car"], torch.Generator().manual_seed(0)
    sigma, x = adapter.sigmas[400].item(), torch.randn(1, 4, 16, 16, generator=rng)
    t = len(adapter.sigmas) - 1 - 400
    pipe.scheduler.set_timesteps(len(adapter.sigmas))
    ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        noisy = pipe.scheduler.scale_model_input(x / (1 + sigma**2) ** 0.5, t)
        eps = pipe.unet.float()(noisy, t, pipe.text_encoder.float()(ids).last_hidden_state).sample
        D = adapter.denoise(x, sigma, adapter.embed(prompts))
    want = pipe.scheduler.step(eps, t, noisy).pred_original_sample
    torch.testing.assert_close(D, want, rtol=1e-4, atol=1e-4)


def test_every_caption_word_is_one_token(adapter):
    known = adapter.tokenizer.init_kwargs["closed_vocabulary"]
    assert set(COLORS) | set(OBJECTS) <= set(known)
    assert all(len(adapter.tokenizer(word).input_ids) == 3 for word in known)
    longest = max((view for words in pose.VIEW_WORDS for view in pose.all_view_prompts(words)), key=len)
    assert len(adapter.tokenizer(f"{longest} a blue duck").input_ids) <= adapter.tokenizer.model_max_length


def test_refuses_words_that_it_does_not_know(adapter):
    with pytest.raises(UserError, match="no word for 'delicious'; it knows: a back .* yellow; .*--sd.checkpoint"):
        adapter.embed(["front view of a delicious burger"])


def test_latents_round_trip(adapter):
    cameras = evaluate.cameras_at(np.deg2rad([[30, 70], [200, 40]]), SJCConfig().pose)
    truth = torch.from_numpy(evaluate.true_views("red", "house", cameras)[0]).permute(0, 3, 1, 2)
    with torch.no_grad():
        x = adapter.encode(truth)
        error = adapter.decode(x) - truth
    assert x.shape == (2, 4, 16, 16) and 0.5 < x.std() < 2
    assert -10 * error.square().mean().log10() > 24  # dB


def test_draws_the_pairs_that_it_was_never_shown(adapter):
    pictures = draw(adapter, [caption(*pair) for pair in UNSEEN_PAIRS], SamplesConfig(n_steps=12), "test")
    verdict = judges.load()[0](pictures)
    colors, objects = (
        [list(table).index(pair[i]) for pair in UNSEEN_PAIRS] for i, table in ((0, COLORS), (1, OBJECTS))
    )
    right = judges.hits(verdict, torch.tensor(colors), torch.tensor(objects), 0)
    assert right["object"].sum() >= 7 and right["pair"].sum() >= 7  # of 8


def test_bad_pictures_are_as_their_words_say(adapter):
    """Blurry ones have weaker edges; of faded and foggy ones the object is paler."""
    texts = [f"front view of a red house{bad}" for bad in ("", *(f", {word}" for word in DEGRADATIONS))]
    sharp, *bad = draw(adapter, texts, SamplesConfig(n_steps=12), "test")
    blurry, faded, foggy = (dict(zip(DEGRADATIONS, bad))[word] for word in ("blurry", "faded", "foggy"))

    def edges(picture):
        return picture.diff(dim=2).square().mean()

    assert edges(blurry) < 0.5 * edges(sharp)
    assert max(faded.std(), foggy.std()) < 0.8 * sharp.std()


def test_sjc_shapes_a_known_object(adapter):
    cfg = config.load(
        SJCConfig,
        ["--preset", "mini", "--n_steps", "200"],
        prog="test",
        doc="",
        presets_dir=ROOT / "presets",
        config_file=None,
    )
    sjc = SJC(cfg, adapter)
    for _ in optimise(sjc):
        pass
    cameras = evaluate.cameras_at(evaluate.test_angles(8), cfg.pose)
    pictures, opacity = evaluate.result_views(sjc, cameras)
    true, inside = evaluate.true_views("blue", "duck", cameras)
    error, blank = (np.square(x - true).mean() for x in (pictures, np.ones_like(true)))
    assert 10 * np.log10(blank / error) > 4  # dB; 6.0 when this was written
    assert likeness.iou(opacity > 0.5, inside > 0.5).mean() > 0.6  # 0.74
