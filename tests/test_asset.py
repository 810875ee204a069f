"""A run's field as an asset: found on the disk, finished or not, and shown without what only training needs."""

import numpy as np
import pytest
import torch

import asset
import pose
from my import checkpoint, config
from my.errors import RunError, UserError
from options.sjc import SJCConfig
from options.trained import TrainedConfig
from sjc import SJC
from tiny import Affine
from tiny import config as tiny_config


@pytest.fixture
def run(tmp_path):
    """The folder of a tiny run of the ideal family, at steps 2 and 4 of 6."""
    cfg = tiny_config(plain_bg=True, compile=True)
    config.write(cfg, tmp_path / "full_config.yml")
    optimisation = SJC(cfg, Affine())
    for step in range(1, 5):
        optimisation.step(step - 1)
        with torch.no_grad():
            optimisation.field.density.fill_(step)
        if step % 2 == 0:
            optimisation.save(tmp_path / "ckpt", step)
    return tmp_path


def test_find_without_a_run(tmp_path):
    with pytest.raises(UserError, match="no full_config.yml"):
        asset.find(tmp_path)
    config.write(SJCConfig(family="ideal"), tmp_path / "full_config.yml")
    with pytest.raises(UserError, match="no checkpoint"):
        asset.find(tmp_path)


def test_the_newest_field_of_an_unfinished_run(run, capsys):
    opened = asset.open_asset(TrainedConfig(run=[str(run)], device="cpu"))
    assert opened.n_steps_taken == 4 and (opened.field.density == 4).all()
    assert "this run is at step 4 of 6; that field is taken" in capsys.readouterr().err
    with pytest.raises(UserError, match="at step 4 of 6; finish it there first"):
        asset.find_finished(run)


def test_one_checkpoint_of_a_run(run, monkeypatch):
    found = asset.find(run / "ckpt" / "step_0000002")
    assert (found.folder, found.step, found.finished) == (run, 2, False)
    assert (asset.load(found, "cpu").field.density == 2).all()
    monkeypatch.chdir(checkpoint.latest(run / "ckpt"))
    assert asset.find(".").step == 4
    (run / "ckpt" / "step_0000002").rename(run / "ckpt" / "best")
    found = asset.find(run / "ckpt" / "best")
    assert (found.folder, found.step) == (run, 2) and (asset.load(found, "cpu").field.density == 2).all()


def test_options_of_the_machine_do_not_bind_whoever_shows_an_asset(run):
    found = asset.find(run)
    assert found.cfg.compile and not asset.load(found, "cpu").cfg.compile and found.cfg.compile


def test_an_asset_shows_what_the_optimisation_shows(run):
    found = asset.find(run)
    opened, optimisation = asset.load(found, "cpu"), SJC(found.cfg, Affine())
    optimisation.load(found.path)
    for a, b in zip(opened.view(pose.spiral(5)[2]), optimisation.view(pose.spiral(5)[2])):
        assert np.array_equal(a, b)


def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_shown(run, capsys):
    (run / "ckpt" / "step_0000004" / checkpoint.TENSORS).write_bytes(b"no tensors")
    opened = asset.load(asset.find(run), "cpu")
    assert opened.n_steps_taken == 2 and (opened.field.density == 2).all()
    assert "is damaged" in capsys.readouterr().err
    (run / "ckpt" / "step_0000002" / checkpoint.META).unlink()
    with pytest.raises(RunError, match="step_0000004.* is damaged"):
        asset.load(asset.find(run), "cpu")


def test_only_what_makes_pictures_is_kept(tmp_path, tiny_sd):
    cfg = SJCConfig(sd={"checkpoint": str(tiny_sd), "prompt": "a blue duck"}, n_steps=1, vox={"grid_size": 4})
    config.write(cfg, tmp_path / "full_config.yml")
    optimisation = SJC(cfg, asset.make_adapter(cfg, "cpu"))
    optimisation.step(0)
    optimisation.save(tmp_path / "ckpt", 1)
    opened = asset.load(asset.find_finished(tmp_path), "cpu")
    assert opened.latent and not hasattr(opened.adapter, "unet") and opened.adapter.text_encoder is None
    for a, b in zip(opened.view(pose.spiral(5)[2], 8), optimisation.view(pose.spiral(5)[2], 8)):
        assert np.array_equal(a, b)
