"""What trains the embedded weights: a stopped training ends as one that was not, and a whole model comes out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from my.errors import UserError
from my.seeds import numpy_rng, torch_rng
from toyworld import COLORS, DEGRADATIONS, OBJECTS, UNSEEN_PAIRS, parse_prompt
from training import autoencoder, dataset, diffusion, loop
from training import judge as judge_training


class Stopped(Exception):
    pass


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def trained(model, root, stop=None):
    def loss_at(step):
        if step == stop:
            raise Stopped
        x = torch.randn(16, 3, generator=torch_rng(0, step, "x"))
        return (model(x)[:, 0] - x.square().sum(1)).square().mean()

    loop.train(model, loss_at, loop.Schedule(10, 1e-2, warmup=2), root, save_every=3)
    return [p.detach().clone() for p in model.parameters()]


def test_a_stopped_training_ends_as_one_that_was_not(tmp_path):
    want = trained(net(), tmp_path / "whole")
    model = net()
    with pytest.raises(Stopped):
        trained(model, tmp_path / "parts", stop=7)
    got = trained(net(), tmp_path / "parts")  # from step 6
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    averaged = net()
    loop.load_averaged(averaged, tmp_path / "parts" / "step_0000010")
    assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), want))


def test_learning_rates_by_hand():
    schedule = loop.Schedule(n_steps=400, lr=2.0, warmup=100)
    assert schedule.lr_at(0) == pytest.approx(0.02)  # a hundredth of the way up, at the top of the cosine
    assert schedule.lr_at(200) == pytest.approx(1.0)  # halfway down
    assert schedule.lr_at(400) == 0


# ---------------------------------------------------------------- data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The work folder of a training, whose world is one pose per object."""
    folder = tmp_path_factory.mktemp("work")
    maps, angles = zip(*(dataset._render_object(obj, 1, seed=0) for obj in OBJECTS))
    dataset.cached(folder / "poses.safetensors", lambda: {"maps": torch.stack(maps), "angles": torch.stack(angles)})
    return folder


def test_pictures_show_no_pair_that_is_held_out(world):
    data, seen = load_file(world / "poses.safetensors"), set()

    def noted(maps, color, rng):
        which = [int((data["maps"][:, 0] == m).flatten(1).all(1).nonzero()) for m in maps]
        names = {rgb: name for name, rgb in COLORS.items()}
        seen.update((names[tuple(round(v, 2) for v in c.tolist())], list(OBJECTS)[i]) for c, i in zip(color, which))
        return maps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "paint", noted)
        dataset.random_pictures(data, 2000, numpy_rng(0, 0, "test"))
    assert len(seen) == 64 and not seen & set(UNSEEN_PAIRS)


def test_captions_have_their_shares():
    rng = numpy_rng(0, 0, "test")
    texts = [dataset.random_caption("blue", "pig", [0.1, 1.5], rng) for _ in range(4000)]
    assert np.mean([text == "" for text in texts]) == pytest.approx(0.1, abs=0.02)
    assert np.mean([text == "a blue pig" for text in texts]) == pytest.approx(0.9 * 0.1, abs=0.02)
    assert {parse_prompt(text) for text in texts if text} == {("blue", "pig")}
    assert {word for text in texts for word in text.split()} <= set(dataset.caption_words())


def test_bad_pictures_are_called_what_they_are():
    rng = numpy_rng(0, 0, "test")
    texts = [dataset.random_caption("blue", "pig", [0.1, 1.5], rng, "foggy") for _ in range(2000)]
    assert np.mean([text == "foggy" for text in texts]) == pytest.approx(0.25, abs=0.03)
    assert all(text == "foggy" or text.endswith("a blue pig, foggy") for text in texts)
    assert {*DEGRADATIONS, ","} <= set(dataset.caption_words())


def test_latents_hold_bad_pictures_too(world, tmp_path):
    data = load_file(world / "poses.safetensors")
    data = {"maps": data["maps"].repeat(1, 30, 1, 1, 1), "angles": data["angles"].repeat(1, 30, 1)}
    cache = diffusion.latents(tmp_path / "latents.safetensors", Pictures(), data, seed=0)
    n = torch.bincount(cache["bad"]).tolist()
    assert n == [64 * 30, *[64 * 2] * 3]  # of 30 poses, two are of each bad kind
    foggy = cache["bad"] == 1 + DEGRADATIONS.index("foggy")
    spread = {name: cache["z"][which].float().std((2, 3)).mean() for name, which in (("foggy", foggy), ("all", ~foggy))}
    assert spread["foggy"] < 0.5 * spread["all"]
    texts = diffusion.captions(cache, data, foggy.nonzero()[:, 0], numpy_rng(0, 0, "test"))
    assert all(text.endswith("foggy") for text in texts)


# ---------------------------------------------------------------- the loss


class Pictures:
    """An autoencoder whose latents are the pictures."""

    config = {"scaling_factor": 1.0}

    class Posterior:
        def __init__(self, x):
            self.mean = x

        def sample(self, generator):
            return self.mean

        def kl(self):
            return torch.zeros(len(self.mean))

    def encode(self, x):
        return SimpleNamespace(latent_dist=self.Posterior(x))

    def decode(self, z):
        return SimpleNamespace(sample=z)


def test_latents_that_blend_and_move_as_pictures_cost_nothing(world):
    cfg = autoencoder.AutoencoderConfig(batch=4)
    data = load_file(world / "poses.safetensors")
    assert autoencoder.loss_at(0, Pictures(), data, cfg).item() == pytest.approx(0, abs=1e-5)

    class Squares(Pictures):  # these do not blend
        def encode(self, x):
            return super().encode(x**3)

        def decode(self, z):
            return super().decode(z.abs() ** (1 / 3) * z.sign())

    assert autoencoder.loss_at(0, Squares(), data, cfg).item() > 0.01


def test_latents_move_with_their_pictures():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    still, moved = torch.ones(2), torch.tensor([[0.25, 0.0]]).expand(2, 2)  # an eighth of the edge
    torch.testing.assert_close(autoencoder.moved(x, still, torch.zeros(2, 2)), x)
    torch.testing.assert_close(autoencoder.moved(x, still, moved)[..., :-2], x[..., 2:])
    torch.testing.assert_close(
        autoencoder.moved(x, 2 * still, torch.zeros(2, 2)).mean((2, 3)),
        x[..., 4:12, 4:12].mean((2, 3)),
        atol=0.1,
        rtol=0,
    )


# ---------------------------------------------------------------- the commands


def test_the_whole_model_is_trained_and_continues(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = ["--work", str(world), "--out", str(tmp_path / "model"), "--batch", "2"]
    with pytest.raises(UserError, match="no checkpoint in .*: train first, without --export"):
        autoencoder.main([*folders, "--n_steps", "1"])
        diffusion.main([*folders, "--export", "True"])
    for n_steps in ("1", "2"):
        diffusion.main([*folders, "--n_steps", n_steps])
    assert (world / "diffusion" / "step_0000001").is_dir() and (world / "diffusion" / "step_0000002").is_dir()
    unet = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    published = load_file(loop.MINI / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: (v.shape, v.dtype) for name, v in unet.items()} == {
        name: (v.shape, v.dtype) for name, v in published.items()
    }
    written = {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert all((loop.MINI / path).exists() for path in written)


def test_the_judge_is_written_with_its_accuracy(tmp_path):
    from toyworld import judge

    path = tmp_path / "judge.safetensors"
    judge_training.main(
        ["--n_steps", "2", "--poses_per_object", "1", "--test_poses_per_object", "1", "--out", str(path)]
    )
    net, accuracy = judge.load(path)
    assert not net.training and set(accuracy) == {"clean", "degraded"}
    assert 0 <= accuracy["clean"]["object"] < 0.5  # two steps teach it little
