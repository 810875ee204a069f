"""What a run records of the weights of its model, and what commands say that open it with other ones."""

import hashlib
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

import adapt
import asset
import doctor
import evaluate
import export_mesh
import highres_final_vis
import replay
import report
import reproduce
import run_2d_sjc
import run_img_sampling
import run_sjc
import sjc
import view
from my import sha256
from my.config import MADE_BY
from my.errors import UserError
from my.script import FULL_CONFIG, WEIGHTS, recorded_weights
from my.sha256 import fingerprint
from options.found import find
from options.sjc import SJCConfig
from rerun import flight, whole
from voxnerf import state

MINI = ["--preset", "mini", "--sd.prompt", "a blue duck", "--n_steps", "8", "--vox.grid_size", "8", "--device", "cpu"]
EARLIER = f"sha256:{'0' * 64}"
PARTS = {"tokenizer", "text_encoder", "unet", "vae", "scheduler"}
SAID = "does not say which weights of the embedded miniature made it"


class Reached(Exception):
    """A command came to where it loads the networks."""


@pytest.fixture(autouse=True)
def stops_at_networks(monkeypatch):
    """No command of this file loads networks or starts another command: it raises Reached there."""

    def reached(*args, **kwargs):
        raise Reached

    for module in (adapt, asset, sjc, flight):
        monkeypatch.setattr(module, "make_adapter", reached)
    monkeypatch.setattr(whole, "attended", reached)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current folder, which is empty."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def make(folder, step, monkeypatch, flags=MINI):
    """Make a run of run_sjc.py that is at `step`, with an untrained field."""
    folder.mkdir()
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        run_sjc.main([*flags, "--dry_run", "True"])
        cfg = run_sjc.read_config([*flags])
        cfg.check_files()
        shape = SimpleNamespace(data_shape=(4, 16, 16), device=torch.device("cpu"))
        field = asset.new_field(cfg, shape)
        optimizer = sjc.new_adamax(field, cfg)
        for p in field.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        state.save("ckpt", step, field, optimizer)
    return folder


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A run of the embedded miniature that is done, with a flight record."""
    from safetensors.torch import save_file

    folder = make(tmp_path / "finished", 8, monkeypatch)
    (folder / "heartbeat.json").write_text('{"done": true}')
    (folder / "history.json").write_text("")
    (folder / "flight").mkdir()
    about = {"format": flight.FORMAT, "step": 0, "attempt": 0, "sigma": 1.0, "seed": 0, "device": "cpu"}
    about |= {"cameras": [], "statistics": {}}
    tensors = {"x": torch.zeros(1)}
    save_file(tensors, folder / "flight" / "a.safetensors", flight.sealed(about, tensors))
    return folder


def change(folder, change_weights):
    """Have a function change what a run has recorded of its weights."""
    path = folder / FULL_CONFIG
    values = yaml.safe_load(path.read_text())
    values[MADE_BY][WEIGHTS] = change_weights(values[MADE_BY][WEIGHTS])
    if not values[MADE_BY][WEIGHTS]:
        del values[MADE_BY][WEIGHTS]
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def earlier(name):
    """Return a function that gives one part the fingerprint of earlier weights."""
    return lambda weights: {**weights, name: EARLIER}


SHOWN = {  # commands that show the field of a run with its decoder
    "highres_final_vis.py": lambda run: highres_final_vis.main([str(run), "--device", "cpu"]),
    "export_mesh.py": lambda run: export_mesh.main([str(run), "--device", "cpu"]),
    "view.py": lambda run: view.main([str(run), "--device", "cpu", "--port", "0"]),
    "evaluate.py": lambda run: evaluate.main([str(run), "--device", "cpu"]),
    "run_sjc.py --init": lambda run: run_sjc.main([*MINI, "--init", str(run)]),
}
GO_ON = {  # commands that need all of its weights
    "replay.py": lambda run: replay.main([str(run / "flight" / "a.safetensors")]),
    "reproduce.py": lambda run: reproduce.main([str(run)]),
}


@pytest.mark.parametrize("name", [*SHOWN, *GO_ON])
def test_a_run_of_these_weights_is_opened_in_silence(finished, elsewhere, capsys, name):
    with pytest.raises(Reached):
        (SHOWN | GO_ON)[name](finished)
    assert "weights" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*SHOWN, *GO_ON])
def test_another_decoder_of_the_miniature_is_refused(finished, elsewhere, name):
    change(finished, earlier("vae"))
    now = recorded_weights(finished) and fingerprints()["vae"][:15]
    words = rf"made with other weights of its model \(vae sha256:00000000\.\.\. then, {now}\.\.\. here\).*git log"
    with pytest.raises(UserError, match=words):
        (SHOWN | GO_ON)[name](finished)


@pytest.mark.parametrize("name", [*SHOWN, *GO_ON])
def test_another_unet_is_refused_where_it_is_asked(finished, elsewhere, capsys, name):
    """A field is shown by the decoder alone."""
    change(finished, earlier("unet"))
    with pytest.raises(UserError if name in GO_ON else Reached) as error:
        (SHOWN | GO_ON)[name](finished)
    assert name in SHOWN or "(unet sha256:00000000... then, " in str(error.value)
    assert "weights" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [*SHOWN, *GO_ON])
def test_a_run_of_the_miniature_that_records_none_is_noted(finished, elsewhere, capsys, name):
    change(finished, lambda weights: {})
    with pytest.raises(Reached):
        (SHOWN | GO_ON)[name](finished)
    assert capsys.readouterr().err.count(SAID) == 1


def test_the_page_of_a_run_needs_no_weights(finished, elsewhere, capsys):
    """Its pictures were drawn while the run went on."""
    change(finished, earlier("vae"))
    report.main([str(finished)])
    assert "weights" not in capsys.readouterr().err


# ---------------------------------------------------------------- a run that goes on


def test_all_parts_are_recorded_exactly(finished):
    whole_unet = b"".join((adapt_root() / "unet" / name).read_bytes() for name in UNET)
    recorded = recorded_weights(finished)
    assert recorded.keys() == PARTS and recorded["unet"] == f"sha256:{hashlib.sha256(whole_unet).hexdigest()}"


UNET = ("config.json", "diffusion_pytorch_model.safetensors")


def adapt_root():
    """Return the folder of the embedded miniature."""
    from families.sd.find import MINI as folder

    return folder


def fingerprints():
    """Return {part: fingerprint} of the embedded miniature."""
    cfg = SJCConfig(sd={"variant": "mini", "prompt": "a blue duck"})
    return cfg.weights(cfg.chosen.check(cfg))


RESUMED = {
    "run_sjc.py": (run_sjc.main, MINI, "ckpt/step_0000003/x"),
    "run_2d_sjc.py": (run_2d_sjc.main, ["--sd.variant", "mini", "--sd.prompt", "a blue duck"], "ckpt/step_0000001/x"),
    "run_img_sampling.py": (
        run_img_sampling.main,
        ["--sd.variant", "mini", "--sd.prompt", "a blue duck"],
        "imgs/step_0000000.npy",
    ),
}


@pytest.fixture(params=RESUMED)
def unfinished(request, elsewhere):
    """(command, its words) of a run that is not finished, in the current folder."""
    main, words, left = RESUMED[request.param]
    main([*words, "--dry_run", "True"])
    (elsewhere / left).parent.mkdir(parents=True)
    (elsewhere / left).touch()
    return main, words


@pytest.mark.parametrize("resumed", [True, False], ids=["resume", "auto"])
@pytest.mark.parametrize("part", sorted(PARTS))
def test_no_run_goes_on_with_other_weights(unfinished, elsewhere, part, resumed):
    main, words = unfinished
    change(elsewhere, earlier(part))
    message = rf"^this run: made with other weights of its model \({part} sha256:0{{8}}\.\.\. then.*an empty folder$"
    with pytest.raises(UserError, match=message):
        main(["--resume", "True"] if resumed else words)


def test_a_run_goes_on_with_its_own_weights(unfinished, elsewhere, capsys):
    with pytest.raises(Reached):
        unfinished[0](["--resume", "True"])
    assert "weights" not in capsys.readouterr().err


def test_a_run_that_recorded_none_goes_on_and_records_none(unfinished, elsewhere, capsys):
    """It may have had others when it began: what is here now may not be said of it."""
    change(elsewhere, lambda weights: {})
    with pytest.raises(Reached):
        unfinished[0](["--resume", "True"])
    assert capsys.readouterr().err.count(SAID) == 1
    unfinished[0](["--resume", "True", "--dry_run", "True"])
    assert recorded_weights(elsewhere) == {}


def test_the_doctor_says_it(elsewhere, monkeypatch, capsys):
    run_sjc.main([*MINI, "--dry_run", "True"])
    (elsewhere / "ckpt" / "step_0000003").mkdir(parents=True)
    change(elsewhere, earlier("unet"))
    for check in ("packages", "device", "driver", "renderer", "disk", "ffmpeg", "hub", "data_root"):
        monkeypatch.setattr(doctor, f"check_{check}", lambda *args: [])
    with pytest.raises(UserError, match="what to do about: model"):
        doctor.main(["--resume", "True"])
    assert "this run: made with other weights of its model (unet sha256:00000000... then" in capsys.readouterr().out


# ---------------------------------------------------------------- other models


@pytest.fixture
def own_model(tiny_sd, tmp_path):
    """A folder of a model that is not embedded."""
    return shutil.copytree(tiny_sd, tmp_path / "model")


def retrain(path):
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_another_decoder_of_a_given_model_is_noted(own_model, elsewhere, tmp_path, monkeypatch, capsys):
    """Its files may differ though they hold the same numbers, such as in another precision."""
    flags = ["--sd.checkpoint", str(own_model), "--sd.prompt", "a blue duck", "--n_steps", "8", *MINI[6:]]
    run = make(tmp_path / "run", 8, monkeypatch, flags)
    with pytest.raises(Reached):
        highres_final_vis.main([str(run), "--device", "cpu"])
    assert "weights" not in capsys.readouterr().err
    retrain(own_model / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(Reached):
        highres_final_vis.main([str(run), "--device", "cpu"])
    assert "(vae sha256:" in (said := capsys.readouterr().err) and "put back the files" in said
    change(run, lambda weights: {})
    with pytest.raises(Reached):
        highres_final_vis.main([str(run), "--device", "cpu"])
    assert "weights" not in capsys.readouterr().err


def test_no_run_of_a_given_model_goes_on_with_other_weights(own_model, tmp_path, monkeypatch):
    flags = ["--sd.checkpoint", str(own_model), "--sd.prompt", "a blue duck", "--n_steps", "8", *MINI[6:]]
    run = make(tmp_path / "run", 3, monkeypatch, flags)
    monkeypatch.chdir(run)
    (own_model / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()  # is not read, and does not count
    with pytest.raises(Reached):
        run_sjc.main(["--resume", "True"])
    retrain(own_model / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"^this run: .*\(unet sha256:.*; put back the files"):
        run_sjc.main(["--resume", "True"])
    shutil.rmtree(own_model / "unet")
    with pytest.raises(UserError, match="it has no unet"):
        run_sjc.main(["--resume", "True"])


def test_weights_that_are_missing_are_left_to_what_loads_them(own_model):
    cfg = SJCConfig(sd={"checkpoint": str(own_model), "prompt": "a blue duck"})
    (own_model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert cfg.weights(cfg.chosen.check(cfg)) == {}


def test_a_single_file_a_vae_and_a_lora_are_told_apart(tmp_path):
    from families.family import Place
    from families.sd.find import Found
    from families.sd.lora_files import LoRA

    for name in ("a.safetensors", "b.pt", "c.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    loras = (LoRA(tmp_path / "c.safetensors", 1.0, (tmp_path / "c.safetensors",)),)
    cfg, alone = SJCConfig(), Found(Place("", tmp_path / "a.safetensors"))
    assert cfg.weights(alone) == {"model": fingerprint([tmp_path / "a.safetensors"])}
    assert cfg.weights(alone._replace(vae=tmp_path / "b.pt", loras=loras)) == {
        "model": fingerprint([tmp_path / "a.safetensors"]),
        "vae": fingerprint([tmp_path / "b.pt"]),
        "LoRA c.safetensors": fingerprint([tmp_path / "c.safetensors"]),
    }
    assert cfg.chosen.decoders(["model"]) == ["model"] and cfg.chosen.decoders(["model", "vae"]) == ["vae"]


def test_a_model_that_is_not_here_yet_has_no_fingerprint(monkeypatch):
    from families.family import Place
    from families.sd.find import Found

    cfg, there = SJCConfig(), Found(Place("", repos=("org/name",)))
    monkeypatch.setattr(type(cfg.sd), "check", lambda *args: there)
    assert cfg.weights(there) == {}


def test_a_family_without_files_records_nothing(elsewhere):
    run_sjc.main(["--preset", "ideal", "--sd.prompt", "a blue duck", "--dry_run", "True"])
    assert WEIGHTS not in yaml.safe_load((elsewhere / FULL_CONFIG).read_text())[MADE_BY]


def test_a_record_that_is_none_counts_as_none(finished):
    for value in ("text", ["a"]):
        change(finished, lambda weights, value=value: value)
        assert recorded_weights(find(finished).folder) == {}


# ---------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_the_sha256_of_what_is_in_the_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"one\r\n")
    (tmp_path / "b.json").write_bytes(b"two\r\n")
    linux = hashlib.sha256(b"one\r\ntwo\n").hexdigest()
    assert fingerprint([tmp_path / "a.bin", tmp_path / "b.json"]) == f"sha256:{linux}"
    (tmp_path / "a.bin").rename(tmp_path / "c.bin")
    assert fingerprint([tmp_path / "c.bin", tmp_path / "b.json"]) == f"sha256:{linux}"


def test_of_a_large_file_parts_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sha256, "WHOLE", 10)
    monkeypatch.setattr(sha256, "N_SAMPLES", 3)
    monkeypatch.setattr(sha256, "SAMPLE", 2)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"ab12cd34ef")
    assert fingerprint([path]).startswith("sha256:")
    path.write_bytes(b"ab123cd456ef")  # parts begin at bytes 0, 5 and 10 of 12
    assert fingerprint([path]) == f"sampled:{hashlib.sha256(b'12abcdef').hexdigest()}"
