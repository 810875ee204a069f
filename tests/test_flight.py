"""Flight records of steps that failed, and the same steps run again: where the first number is that is not finite."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import replay
import run_sjc
from families.sd.adapter import StableDiffusionAdapter
from my import checkpoint
from my import config as config_of
from my.errors import RunError, UserError, run_main
from my.tensor_file import TensorFile
from rerun import flight
from sjc import SJC
from tiny import Affine, config

MINI = ["--preset", "mini", "--vox.grid_size", "6", "--pose.rend_hw", "8"]
SHORT = ["--n_steps", "3", "--report", "False", "--snapshots", "False", "--device", "cpu"]


class Small(Affine):
    """A denoiser of 8x8 pictures, whose answer may be changed."""

    def __init__(self):
        super().__init__()
        self.data_shape = (3, 8, 8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("sjc", "rerun.flight"):
        monkeypatch.setattr(f"{place}.make_adapter", lambda *_: Small())
    return tmp_path


def failed():
    """The record of a tiny run that fails."""
    cfg = config(n_steps=3, report=False, snapshots=False, pose={"rend_hw": 8})
    config_of.write(cfg, "full_config.yml")
    with pytest.raises(RunError, match="flight/step_0000001.safetensors has what led there: python"):
        run_sjc.train(SJC(cfg, Small()), 0)
    return Path("flight/step_0000001.safetensors")


def replayed(record, capsys, *argv):
    """The lines that replay.py prints."""
    capsys.readouterr()
    replay.main([str(record), *argv])
    return capsys.readouterr().out.splitlines()


def without(whole):
    """A function with a number in its result that is not finite, where the one that it replaces has a whole one."""

    def broken(*args, **kwargs):
        out = whole(*args, **kwargs)
        return out.index_fill(-1, torch.tensor(2), math.nan)

    return broken


def test_a_weight_of_the_unet(tmp_path, monkeypatch, capsys):
    """A whole run of the miniature, and the command that runs its step again."""
    monkeypatch.chdir(tmp_path)
    begin = StableDiffusionAdapter.__init__

    def damaged(self, parts, *args):
        begin(self, parts, *args)
        with torch.no_grad():
            self.unet.down_blocks[0].resnets[0].conv1.weight[3, 0, 0, 0] = math.nan

    monkeypatch.setattr(StableDiffusionAdapter, "__init__", damaged)
    with pytest.raises(RunError, match="^step 1: its update is not finite.*; the state after step 3 is saved; try"):
        run_sjc.main([*MINI, *SHORT])
    (record,) = Path("flight").iterdir()
    head, there, *lines = replayed(record, capsys)
    assert head.startswith("step 1, attempt 1, sigma ") and head.endswith("recorded on cpu")
    assert "score" in there and "field/" not in there and " color" not in there
    assert any(line.startswith("noisy rendering: finite") for line in lines)
    first, last = lines[-2:]
    assert first.startswith("unet.down_blocks.0.resnets.0.conv1: ") and "the first is nan at (0, 3, 1, 1) of (" in first
    assert first.endswith("its input is finite; its weight has 1 that are not finite")
    assert last.startswith("here it begins with unet.down_blocks.0.resnets.0.conv1; then ")
    head, _, again, *_ = replayed(record, capsys, "--attempt", "0")
    assert head.startswith("step 1, attempt 1")  # what was recorded
    assert again == "run again here with the noise of attempt 0"
    assert not any(line.startswith("run again") for line in replayed(record, capsys, "--attempt", "1"))
    monkeypatch.setattr(StableDiffusionAdapter, "__init__", begin)
    assert replayed(record, capsys)[-1].startswith("every number is finite here, on a CPU and in float32: ")


def test_the_score(here, monkeypatch, capsys):
    monkeypatch.setattr(Small, "_denoise", without(Small._denoise))
    record = failed()
    *_, first, last = replayed(record, capsys)
    assert first.startswith("denoised rendering: ") and "the first is nan at (0, 0, 0, 2) of (1, 3, 8, 8)" in first
    assert last.startswith("here it begins with denoised rendering; then ")


def with_gradient(monkeypatch, value):
    """Have every step give such a gradient of some densities."""
    attempt = SJC.attempt

    def broken(self, *args, **kwargs):
        made = attempt(self, *args, **kwargs)
        self.field.density.grad[..., 1] = value
        return made

    monkeypatch.setattr(SJC, "attempt", broken)


def test_the_square_of_a_gradient(here, monkeypatch, capsys):
    with_gradient(monkeypatch, 1e25)
    head, there, *lines = replayed(failed(), capsys)
    assert there == "not finite there: the regulariser, a square or a sum"
    assert "gradient, density: finite, at most 1e+25" in lines
    assert lines[-2].startswith(
        "square of the gradient, density: 16 of 64 numbers are not finite, the first is inf at "
    )
    assert lines[-2].endswith("; the optimizer needs it, and float32 has no such number")
    assert lines[-1] == "here it begins with square of the gradient, density"


def test_the_gradient_alone(here, monkeypatch, capsys):
    with_gradient(monkeypatch, math.inf)
    record = failed()
    head, there, *lines = replayed(record, capsys)
    assert there == "not finite there: gradient/density"
    assert any(line.startswith("score: finite, at most ") for line in lines)
    assert lines[-2].startswith("gradient, density: 16 of 64 numbers are not finite, the first is inf at ")
    assert lines[-1] == "here it begins with gradient, density"


def test_the_condition_of_a_text(here, monkeypatch, capsys):
    monkeypatch.setattr(Small, "embed", lambda self, prompts: Affine.embed(self, prompts) * math.nan)
    record = failed()
    assert replayed(record, capsys)[-1].startswith("here it begins with condition ''; then ")


def test_a_record_is_what_the_step_had(here, monkeypatch):
    """Run again where nothing is broken, the step gives the recorded rendering, bit for bit."""
    monkeypatch.setattr(Small, "_denoise", without(Small._denoise))
    path = failed()
    monkeypatch.setattr(Small, "_denoise", Affine._denoise)
    record = flight.read(path)
    tensors, _ = checkpoint.load(checkpoint.latest("ckpt"))
    assert all(torch.equal(x, tensors[name]) for name, x in record.tensors.items() if name.startswith("field/"))
    found = {finding.what: finding.tensor for finding in flight.replay(record)}
    assert torch.equal(found["rendering, color"], record.tensors["color"])
    assert not any(finding.broken for finding in flight.replay(record))
    noises = [
        {finding.what: finding.tensor for finding in flight.replay(record, draw)}["noisy rendering"]
        for draw in range(3)
    ]
    assert torch.equal(noises[1], found["noisy rendering"])
    assert not torch.equal(noises[0], noises[1]) and not torch.equal(noises[1], noises[2])
    about = record.about
    facts = about["statistics"]["score"]
    assert facts["not finite"] == 24 and facts["least"] <= facts["rms"] and about["attempt"] == 1


def test_statistics_by_hand():
    facts = flight.statistics(torch.tensor([3.0, math.nan, -4.0, math.inf]))
    assert facts == {"not finite": 2, "least": -4.0, "most": 3.0, "rms": math.sqrt(12.5)}
    assert flight.statistics(torch.full((2,), math.nan)) == {"not finite": 2}


def test_what_is_no_record(here, monkeypatch, capsys):
    monkeypatch.setattr(Small, "_denoise", without(Small._denoise))
    record = failed()
    tensors, about = load_file(record), json.loads(TensorFile(record).metadata[flight.ABOUT])
    elsewhere = here / "flight" / "x.safetensors"

    def refused(words, **changes):
        save_file(tensors, elsewhere, flight.sealed(about | changes, tensors))
        with pytest.raises(UserError, match=words):
            flight.read(elsewhere)

    about.pop(flight.SEAL)
    for changes in (
        *({"step": "1"}, {"step": -1}, {"attempt": None}, {"sigma": math.nan}, {"sigma": []}, {"seed": None}),
        *({"device": 0}, {"cameras": [{}]}, {"cameras": ["front"]}, {"cameras": None}, {"statistics": []}),
        *({"statistics": {"x": {}}}, {"statistics": {"x": {"not finite": "1"}}}, {"statistics": {"x": 1}}),
    ):
        refused("is no flight record; give a file of flight/", **changes)
    refused("a flight record of format 1, this code reads 2", format=1)
    refused("of step 4, and the run in .* has 3; give a file of flight/", step=3)
    for name in ("format", "step", "attempt", "sigma", "seed", "device", "cameras", "statistics"):  # what is read
        less = {key: value for key, value in about.items() if key != name}
        save_file(tensors, elsewhere, flight.sealed(less, tensors))
        with pytest.raises(UserError, match="is no flight record; give a file of flight/"):
            flight.read(elsewhere)
    save_file(tensors, elsewhere, {flight.ABOUT: json.dumps(about | {"seed": 1})})
    with pytest.raises(UserError, match=r"is damaged \(its checksum differs\)"):
        flight.read(elsewhere)
    content = bytearray(record.read_bytes())
    content[-1] ^= 1
    elsewhere.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(the checksum of its tensors differs\)"):
        flight.read(elsewhere)
    ckpt = checkpoint.latest("ckpt") / checkpoint.TENSORS
    capsys.readouterr()
    for path, words in ((ckpt, "is no flight record"), (here / "none", "no such file")):
        with pytest.raises(SystemExit) as ended:
            run_main(replay.main, [str(path)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and words in err.lower() and err.count("\n") == 1
    alone = here / "away" / "flight"
    alone.mkdir(parents=True)
    record.rename(alone / record.name)
    with pytest.raises(UserError, match="has no full_config.yml; give a file of flight/"):
        flight.read(alone / record.name)


def test_a_field_of_another_size_is_refused(here, monkeypatch):
    monkeypatch.setattr(Small, "_denoise", without(Small._denoise))
    path = failed()
    record = flight.read(path)
    record.cfg.vox.grid_size = 5
    with pytest.raises(UserError, match="the checkpoint does not fit this model: color is"):
        flight.replay(record)
