"""The command line of run_sjc.py: real processes, killed and resumed; presets; mistakes in one line, exit 2."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import run_2d_sjc
import run_img_sampling
import run_sjc
from my import checkpoint, config
from my.errors import RunError, UserError, run_main
from my.processes import Lost, Processes
from my.run_dir import History, read_history
from my.signals import Stopped
from options import found
from options.nerf import NeRFConfig
from options.sampling import SamplingConfig
from options.sjc import SJCConfig
from sjc import SJC, optimise
from tiny import Affine, NotANumber
from tiny import config as tiny_config

ROOT = Path(run_sjc.__file__).parent
HEAVY = ("torch", "diffusers", "transformers")
PRESETS = ROOT / "presets"

# prompt, n_steps, lr, emptiness_weight, depth_weight, var_red of every published command
PUBLISHED = {
    "trump": ("Trump figure", 30000, 0.05, 1e4, 0, True),
    "obama": ("Obama figure", 30000, 0.05, 1e4, 0, True),
    "biden": ("Biden figure", 10000, 0.05, 1e4, 0, True),
    "temple": ("A zoomed out high quality photo of Temple of Heaven", 10000, 0.05, 1e4, 0, True),
    "burger": ("A high quality photo of a delicious burger", 10000, 0.05, 1e4, 0, True),
    "icecream": ("A high quality photo of a chocolate icecream cone", 10000, 0.05, 1e4, 10, True),
    "ficus": ("A ficus planted in a pot", 10000, 0.05, 1e4, 100, True),
    "castle": ("A zoomed out photo a small castle", 10000, 0.05, 1e4, 50, True),
    "sydney": ("A zoomed out high quality photo of Sydney Opera House", 10000, 0.05, 1e4, 0, True),
    "rose": ("a DSLR photo of a rose", 10000, 0.05, 1e4, 50, True),
    "schoolbus": ("A high quality photo of a yellow school bus", 30000, 0.05, 1e4, 0, False),
    "rocket": ("A wide angle zoomed out photo of Saturn V rocket from distance", 30000, 0.05, 1e4, 0, False),
    "fries": ("A high quality photo of french fries from McDonald's", 10000, 0.05, 1e4, 10, True),
    "motorcycle": ("A high quality photo of a toy motorcycle", 10000, 0.05, 1e4, 0, True),
    "car": ("A high quality photo of a classic silver muscle car", 10000, 0.05, 1e4, 0, True),
    "tank": ("A product photo of a toy tank", 20000, 0.05, 1e4, 0, True),
    "chair": (
        "A high quality photo of a Victorian style wooden chair with velvet upholstery",
        50000,
        0.01,
        7000,
        0,
        True,
    ),
    "duck": ("a DSLR photo of a yellow duck", 10000, 0.05, 1e4, 10, True),
    "horse": ("A photo of a horse walking", 10000, 0.05, 1e4, 0, True),
    "giraffe": ("A wide angle zoomed out photo of a giraffe", 10000, 0.05, 1e4, 50, True),
    "zebra": ("A photo of a zebra walking", 10000, 0.02, 3e4, 0, False),
    "printer": ("A product photo of a Canon home printer", 10000, 0.05, 1e4, 0, False),
    "link": ("Zelda Link", 10000, 0.05, 1e4, 0, False),
    "pig": ("A pig", 10000, 0.05, 1e4, 0, True),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*argv):
    """The configuration that run_sjc.py makes of a command line, as plain values."""
    return run_sjc.read_config(list(argv)).model_dump()


def command(folder, *argv):
    """Start run_sjc.py as a process in `folder`."""
    return subprocess.Popen(
        [sys.executable, ROOT / "run_sjc.py", *argv],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    """Wait for a process that must end well; return what it printed."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def tiny_flags(tiny_sd):
    return [
        "--sd.checkpoint",
        str(tiny_sd),
        "--sd.prompt",
        "a blue duck",
        "--n_steps",
        "40",
        "--vox.grid_size",
        "8",
        "--pose.rend_hw",
        "8",
        "--device",
        "cpu",
        "--seed",
        "3",
    ]


@pytest.fixture(scope="module")
def straight(tiny_flags, tmp_path_factory):
    """The folder and the output of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, finish(command(folder, *tiny_flags))


@pytest.fixture(scope="module", params=[signal.SIGKILL, signal.SIGTERM])
def resumed(request, tiny_flags, tmp_path_factory):
    """The folder of the same run, ended by a signal after its first checkpoint, and started again."""
    folder = tmp_path_factory.mktemp("resumed")
    process = command(folder, *tiny_flags)
    deadline = time.monotonic() + 200
    while not checkpoint.checkpoints(folder / "ckpt"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, request.param)
    text, _ = process.communicate()
    if request.param == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert text.splitlines()[-1].startswith("run_sjc.py: stopped by SIGTERM: the state after step ")
    else:
        assert process.returncode == -signal.SIGKILL
    assert not json.loads((folder / "heartbeat.json").read_text())["done"] and not (folder / "test_40").exists()
    finish(command(folder, *tiny_flags))
    return folder


def test_a_run_says_what_it_did(straight):
    folder, text = straight
    assert "prompt: a blue duck" in text  # the configuration that it runs
    assert "done: test_40/view has 100 views" in text and "highres_final_vis.py" in text
    assert json.loads((folder / "heartbeat.json").read_text())["done"]
    assert len(list((folder / "img").iterdir())) == 40 and (folder / "test_40/view_seq/view.mp4").exists()


def test_killed_and_resumed_ends_the_same(straight, resumed):
    a, b = (load_file(folder / "ckpt" / "step_0000040" / checkpoint.TENSORS) for folder in (straight[0], resumed))
    assert a.keys() == b.keys() and any(name.startswith("optim/") for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resumed_run_leaves_the_same_files(straight, resumed):
    def pictures(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}

    assert pictures(straight[0]) == pictures(resumed)
    rows = [row for row in read_history(resumed / "history.json") if "stopped" not in row]
    assert read_history(straight[0] / "history.json") == rows
    assert json.loads((resumed / "heartbeat.json").read_text())["done"]


def test_folder_with_a_run_is_refused(straight, tiny_flags, monkeypatch):
    monkeypatch.chdir(straight[0])
    before = (straight[0] / "full_config.yml").read_bytes()
    with pytest.raises(UserError, match="already holds a finished run: start in an empty folder"):
        run_sjc.main(tiny_flags)
    with pytest.raises(UserError, match="already holds a run: continue it with --resume True, or start"):
        run_sjc.main([*tiny_flags, "--resume", "False"])
    assert (straight[0] / "full_config.yml").read_bytes() == before


@pytest.mark.parametrize(
    "argv, was",
    [
        (["--lr", "0.1"], "0.05"),
        (["--vox.grid_size", "9"], "8"),
        (["--sd.prompt", "a red car"], "a blue duck"),
        (["--seed", "4"], "3"),
    ],
)
def test_resume_with_a_changed_option_is_refused(straight, monkeypatch, argv, was):
    monkeypatch.chdir(straight[0])
    changed = f"--resume True: {argv[0]} {argv[1]} .was {was}."
    with pytest.raises(UserError, match=f"{changed}; .* only alpha, ckpt_every, ckpt_keep, ckpt_minutes, comp"):
        read("--resume", "True", *argv)


def test_checkpoints_hold_the_options_that_a_run_may_not_change(straight, monkeypatch):
    monkeypatch.chdir(straight[0])
    kept = Path("full_config.yml")
    right = kept.read_text()
    try:
        kept.write_text(right.replace("prompt: a blue duck", "prompt: a blue dusk"))
        with pytest.raises(UserError, match=r"^full_config.yml: --sd.prompt a blue dusk \(was a blue duck\); ckpt"):
            read("--resume", "True")
    finally:
        kept.write_text(right)


def test_dry_run_of_a_resume_is_not_remembered(straight, monkeypatch, capsys):
    monkeypatch.chdir(straight[0])
    before = (straight[0] / "full_config.yml").read_text()
    run_sjc.main(["--resume", "True", "--dry_run", "True"])
    assert (straight[0] / "full_config.yml").read_text() == before
    assert "dry_run: false" in before and "resume: auto" in before


def test_checkpoint_folder_is_kept_as_an_absolute_path(here):
    (here / "some" / "where").mkdir(parents=True)
    assert read("--sd.checkpoint", "some/where")["sd"]["checkpoint"] == str(here / "some" / "where")
    assert read("--sd.checkpoint", "./else/where")["sd"]["checkpoint"] == str(here / "else" / "where")
    assert read("--sd.checkpoint", "a.ckpt")["sd"]["checkpoint"] == str(here / "a.ckpt")
    assert read("--sd.checkpoint", "org/name")["sd"]["checkpoint"] == "org/name"  # on the hub
    assert read("--sd.lora", "a.safetensors,b.safetensors:0.5")["sd"]["lora"] == [
        f"{here}/a.safetensors",
        f"{here}/b.safetensors:0.5",
    ]


def test_resume_needs_no_options_again(straight, monkeypatch):
    monkeypatch.chdir(straight[0])
    cfg = read("--resume", "True")
    assert cfg["sd"]["prompt"] == "a blue duck" and cfg["n_steps"] == 40
    assert read("--resume", "True", "--device", "auto")["device"] == "auto"


def an_unfinished_run(*flags):
    """Leave a run of one step in the current folder, which stops after it."""
    argv = ["--family", "ideal", "--sd.prompt", "a blue duck", *flags]
    run_sjc.main([*argv, "--dry_run", "True"])
    (Path("ckpt") / "step_0000001").mkdir(parents=True)
    Path("heartbeat.json").write_text('{"done": false, "saved": 1, "step": 1}')
    return argv


def test_the_same_command_continues_its_unfinished_run(here, capsys):
    argv = an_unfinished_run("--lr", "0.1")
    assert read(*argv)["lr"] == 0.1 and "that is not finished: it is continued" in capsys.readouterr().err
    assert read(*argv, "--ckpt_keep", "5")["ckpt_keep"] == 5
    with pytest.raises(UserError, match=r"not finished, and its options are others: --lr 0.05 \(was 0.1\); con"):
        read(*argv[:-2])
    with pytest.raises(UserError, match="already holds a run"):
        read(*argv, "--resume", "False")


@pytest.mark.parametrize("flags", [[], ["--resume", "True"]])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(here, flags):
    argv = an_unfinished_run()
    shutil.rmtree("ckpt")
    for _ in range(2):  # what is no checkpoint is none
        with pytest.raises(UserError, match="was at step 1, and ckpt has nothing of it: put that back, or start in an"):
            read(*argv, *flags)
        Path("ckpt").mkdir(exist_ok=True)
        (Path("ckpt") / "notes.txt").touch()
    (Path("ckpt") / "notes.txt").unlink()
    Path("heartbeat.json").write_text('{"done": false, "saved": null, "step": 1}')
    read(*argv, *flags)  # it had saved nothing


@pytest.mark.parametrize(
    "script, argv, done, leaves",
    [
        (run_2d_sjc, ["--n_steps", "2", "--copies", "1", "--schedules", "1.0"], "grid.png", "ckpt"),
        (run_img_sampling, ["--num_images", "1", "--num_t", "2"], "preview.png", "imgs"),
    ],
)
def test_a_finished_run_whose_work_is_gone_does_not_begin_again(here, script, argv, done, leaves):
    """A command without a heartbeat knows it by the last of its files."""
    argv = ["--family", "ideal", "--sd.prompt", "a blue duck", "--ideal.n_cameras", "4", "--device", "cpu", *argv]
    script.main([*argv, "--dry_run", "True"])
    Path(done).touch()
    said = f"the run in this folder is finished, and {leaves} has nothing of it: put that back, or start in an empty"
    for flags in ([], ["--resume", "True"]):
        with pytest.raises(UserError, match=said):
            script.main([*argv, *flags])
    assert Path(done).read_bytes() == b""


def test_a_history_without_a_heartbeat_is_not_lost(here, capsys):
    """Nobody knows whether its steps were saved. A heartbeat that says they were not is believed."""
    argv = an_unfinished_run()
    shutil.rmtree("ckpt")
    Path("history.json").write_text('{"step": 10, "score": 1}\n{"step": 20, "score": 1}\n')
    for text in (None, "", "{}", '{"step": 20'):
        Path("heartbeat.json").unlink(missing_ok=True)
        if text is not None:
            Path("heartbeat.json").write_text(text)
        with pytest.raises(UserError, match="was at step 20, and ckpt has nothing of it: put that back"):
            read(*argv)
    assert "begins again" not in capsys.readouterr().err
    Path("heartbeat.json").write_text('{"done": false, "saved": null, "step": 23}')
    read(*argv)
    said = "note: the run in this folder had come to step 20, and nothing of it was saved: it begins again\n"
    assert capsys.readouterr().err == said


def test_the_heartbeat_tells_at_once_what_is_saved(here, monkeypatch):
    told = []

    def look(*_):
        told.append(json.loads(Path("heartbeat.json").read_text())["saved"])

    monkeypatch.setattr(run_sjc, "visualise", look)
    run_sjc.train(SJC(tiny_config(n_steps=10, ckpt_every=0.2), Affine()), 0)
    assert told == [None, None, 2, 2, 4, 4, 6, 6, 8, 8]


def test_a_checkpoint_folder_that_cannot_be_read_is_not_taken_for_none(here, monkeypatch):
    argv = an_unfinished_run()
    monkeypatch.setattr(os, "listdir", lambda path: open("/proc/1/mem"))
    with pytest.raises(PermissionError):
        read(*argv)


def test_a_field_that_is_not_finite_is_not_saved(here):
    """Though the statistics of its last step, which describe the field before that, are finite."""

    class Breaking(SJC):
        def step(self, i):
            stats = super().step(i)
            with torch.no_grad():
                self.field.density[..., 0] = math.inf
            return stats

    with pytest.raises(RunError, match="step 1: the field's density is not finite, and is not saved; a checkpoint"):
        run_sjc.train(Breaking(tiny_config(n_steps=1), Affine()), 0)
    assert not Path("ckpt").exists() and not Path("test_1").exists()


def test_resume_without_a_run(here):
    with pytest.raises(UserError, match="--resume True: no full_config.yml here"):
        read("--resume", "True")


@pytest.mark.parametrize("script", [run_sjc, run_2d_sjc, run_img_sampling])
def test_a_model_that_cannot_be_read_leaves_nothing(here, monkeypatch, capsys, tiny_sd, script):
    """Nor does the configuration hide the one line that says why."""
    model = shutil.copytree(tiny_sd, here / "model")
    (model / "unet" / "config.json").write_text("{")
    work = here / "run"
    work.mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(SystemExit):
        run_main(script.main, ["--sd.checkpoint", str(model), "--sd.prompt", "a blue duck", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "cannot be read as Stable Diffusion" in err
    assert not list(work.iterdir())


def test_a_run_that_has_broken_down_keeps_its_last_good_state(here):
    optimisation = SJC(tiny_config(n_steps=100), NotANumber())
    before = optimisation.field.density.detach().clone()
    said = (
        "^step 1: its update is not finite, nor is it with fresh noise and in float32; flight/step_0000001.safetensors "
        "has what led there: python .*replay.py flight/step_0000001.safetensors .*; the state after step 20 is saved; "
        "try a smaller --lr in an empty folder$"
    )
    with pytest.raises(RunError, match=said):
        run_sjc.train(optimisation, 0)
    assert json.loads((here / "heartbeat.json").read_text())["failed"].startswith("RunError: step 1")
    tensors, meta = checkpoint.load(checkpoint.latest("ckpt"))
    assert meta["step"] == 20 and meta["left_out"] == list(range(20))
    assert torch.equal(tensors["field/density"], before)
    first, last = read_history("history.json")
    assert first["step"] == 10 and first["score"] is None and last == {"step": 20, "stopped": "an error"}


def test_a_run_that_broke_down_in_its_last_step_is_not_finished(here, capsys):
    """Started again, it fails again, until the cause is gone."""
    argv = ["--family", "ideal", "--sd.prompt", "a blue duck", "--device", "cpu"]
    run_sjc.main([*argv, "--dry_run", "True"])

    def begin(adapter):
        optimisation = SJC(tiny_config(n_steps=5), adapter)
        newest = checkpoint.load_newest("ckpt")
        run_sjc.train(optimisation, optimisation.restore(*newest) if newest else 0)

    for _ in range(2):
        with pytest.raises(RunError, match="^step 1: its update is not finite"):
            begin(NotANumber())
        assert json.loads((here / "heartbeat.json").read_text())["failed"] and not Path("test_5").exists()
        source = found.find(here)._replace(cfg=tiny_config(n_steps=5))
        assert not source.finished and source.progress == "at step 5 of 5, and 5 of these are to be tried again"
    begin(Affine())
    assert json.loads((here / "heartbeat.json").read_text())["done"] and Path("test_5").exists()
    assert found.find(here)._replace(cfg=tiny_config(n_steps=5)).finished
    failed, done = {"step": 5, "stopped": "an error"}, {"step": 5, "retried": [1, 2, 3, 4, 5]}
    assert read_history("history.json") == [failed, done]


@pytest.mark.parametrize("where, saved", [("denoise", True), ("update", False)])
def test_a_device_whose_memory_is_full_loses_no_whole_step(here, monkeypatch, where, saved):
    """The state is not whole where it ends in the midst of an update."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Filling(SJC):
        def step(self, i):
            if i == 7:
                monkeypatch.setattr(
                    *{"denoise": (self.adapter, "_denoise"), "update": (self.optimizer, "update")}[where], full
                )
            return super().step(i)

    said = (
        "^step 8: out of memory on cpu; the state after step 7 is saved; end other programs on the device and .* with "
        "a smaller --vox.grid_size, --pose.rend_hw, --batch_views$"
    )
    with pytest.raises(RunError if saved else torch.OutOfMemoryError, match=said if saved else "CUDA out of memory"):
        run_sjc.train(Filling(tiny_config(n_steps=100, ckpt_every=1), Affine()), 0)
    assert [path.name for path in checkpoint.checkpoints("ckpt")] == ["step_0000007"] * saved


def test_a_disk_that_fills_up_under_a_picture(here, monkeypatch, capsys):
    """The picture is written in the background; the run ends as if it had been written in the loop."""

    def full(path, _image):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("my.media.write_png", full)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda _: run_sjc.train(SJC(tiny_config(n_steps=400), Affine()), 0), [], go_on=lambda: "go on")
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if "full" in line]
    assert ended.value.code == 1 and len(told) == 1 and "Traceback" not in err
    assert told[0].endswith("img/step_0000004.png: the disk is full; free some space, then go on")
    assert not (here / "ckpt").exists()
    assert json.loads((here / "heartbeat.json").read_text())["failed"].startswith("OSError: ")


def test_a_checkpoint_comes_after_all_that_is_before_it(here, monkeypatch):
    """A run that is killed right after it has lost nothing, however late the worker is."""
    saved, add = [], History.add

    def late(*args, **values):
        time.sleep(0.1)
        add(*args, **values)

    def save(_optimisation, _root, step):
        saved.append((step, read_history("history.json")[-1]["step"], Path(f"img/step_{step:07d}.png").exists()))

    monkeypatch.setattr(History, "add", late)
    monkeypatch.setattr(SJC, "save", save)
    run_sjc.train(SJC(tiny_config(n_steps=20, ckpt_every=0.5), Affine()), 0)
    assert saved == [(10, 10, True), (20, 20, True)]


class SometimesMasked(SJC):
    """Says of every third step that it was left out."""

    def step(self, i):
        stats = super().step(i)
        bad = torch.tensor(i % 3 == 2)
        return {**stats, "score": torch.where(bad, torch.nan, stats["score"]), "masked": bad}


def test_history_names_the_steps_that_were_tried_again(here):
    run_sjc.train(SometimesMasked(tiny_config(n_steps=45, ckpt_every=0.2, pose={"rend_hw": 6}), Affine()), 0)
    rows = read_history("history.json")
    bad = list(range(3, 46, 3))
    blocks = [[step for step in bad if low < step <= low + 10] for low in (0, 10, 20)]
    retried = [None, *blocks, bad[10:]]
    assert [(row["step"], row.get("retried")) for row in rows] == [*zip((10, 20, 30, 40, 45), retried)]
    assert [row["score"] is None for row in rows] == [False] * 2 + [True] + [False] + [True]
    assert not any("masked" in row for row in rows)


def test_of_several_processes_the_first_writes(here, monkeypatch):
    monkeypatch.setattr(Processes, "leave", lambda _: None)
    optimisation = SJC(tiny_config(n_steps=5), Affine())
    before = optimisation.field.density.detach().clone()
    run_sjc.train(optimisation, 0, Processes(1, 2))
    assert not list(here.iterdir()) and not torch.equal(optimisation.field.density, before)


@pytest.mark.parametrize("n_taken, said", [(3, "gone; the state after step 3 is saved; "), (0, "gone; ")])
def test_where_another_process_is_lost_the_last_whole_step_is_saved(here, monkeypatch, n_taken, said):
    class Alone(SJC):
        def step(self, i):
            if i == n_taken:
                raise Lost("gone")
            return super().step(i)

    optimisation = Alone(tiny_config(n_steps=50, ckpt_every=1), Affine())
    with pytest.raises(Lost, match=f"^{said}start it again$"):
        run_sjc.train(optimisation, 0, Processes(0, 2))
    names = [path.name for path in checkpoint.checkpoints("ckpt")]
    assert names == ["step_0000003"] * (n_taken > 0) and len(list(here.glob("img/*"))) == n_taken
    if n_taken:
        whole = SJC(tiny_config(n_steps=50), Affine())
        list(itertools.islice(optimise(whole), n_taken))
        saved = load_file(here / "ckpt" / names[0] / checkpoint.TENSORS)
        assert torch.equal(saved["field/density"], whole.field.density)


@pytest.mark.parametrize("n_taken", [3, 0])
def test_a_signal_to_one_of_several_processes_ends_the_run_as_that_of_one(here, n_taken):
    """It comes while the first waits for the others, in the midst of a step."""

    class Waiting(SJC):
        def step(self, i):
            if i == n_taken:
                raise Stopped(signal.SIGTERM)
            return super().step(i)

    with pytest.raises(Stopped) as ended:
        run_sjc.train(Waiting(tiny_config(n_steps=50, ckpt_every=1), Affine()), 0, Processes(0, 2))
    assert ended.value.status == 128 + signal.SIGTERM
    assert ended.value.saved == ("the state after step 3 is saved" if n_taken else "")
    assert [path.name for path in checkpoint.checkpoints("ckpt")] == ["step_0000003"] * (n_taken > 0)
    beat = json.loads((here / "heartbeat.json").read_text())
    assert beat["stopped"] == "SIGTERM" and "failed" not in beat and beat["saved"] == (n_taken or None)
    assert read_history("history.json") == [{"step": 3, "stopped": "SIGTERM"}] * (n_taken > 0)


def test_run_longer_than_its_hundred_pictures(here):
    run_sjc.train(SJC(tiny_config(n_steps=130, pose={"rend_hw": 6}), Affine()), 0)
    assert len(list((here / "img").iterdir())) == 130 and len(list((here / "test_130" / "view").iterdir())) == 100
    assert checkpoint.latest("ckpt").name == "step_0000130"


# ---------------------------------------------------------------- what starts nothing


@pytest.mark.parametrize("argv, status", [(["-h"], 0), (["--dry_run", "True"], 0), (["--seed", "one"], 2)])
@pytest.mark.parametrize("script", ["run_sjc", "run_img_sampling", "run_2d_sjc"])
def test_light_commands_import_nothing_heavy(here, script, argv, status):
    code = (
        f"import sys; import {script}; from my.errors import run_main\n"
        f"try: run_main({script}.main, sys.argv[1:])\n"
        "except SystemExit as e: status = e.code or 0\n"
        "else: status = 0\n"
        "print('MODULES', status, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    _, got, *modules = done.stdout.splitlines()[-1].split()
    assert int(got) == status and not set(HEAVY) & set(modules)


def test_dry_run_writes_the_configuration_and_stops(here, capsys):
    run_sjc.main(["--preset", "zebra", "--dry_run", "True"])
    assert [p.name for p in here.iterdir()] == ["full_config.yml"]
    kept = yaml.safe_load((here / "full_config.yml").read_text())
    assert kept.pop("made_by")["version"] and yaml.safe_load(capsys.readouterr().out) == kept
    assert config.read(SJCConfig, "full_config.yml").sd.prompt == "A photo of a zebra walking"


@pytest.mark.parametrize("folder", [".", "tests"])
def test_running_inside_the_project_is_refused(monkeypatch, folder):
    monkeypatch.chdir(ROOT / folder)
    with pytest.raises(UserError, match="go to an experiment directory"):
        run_sjc.main(["--dry_run", "True"])
    assert not (ROOT / folder / "full_config.yml").exists()


# ---------------------------------------------------------------- configuration


def test_published_defaults(here):
    cfg = SJCConfig()
    assert cfg.family == "sd" and cfg.sd.variant == "v1" and not cfg.sd.v2_highres
    assert (cfg.sd.prompt, cfg.sd.scale) == ("A high quality photo of a delicious burger", 100)
    assert (cfg.lr, cfg.n_steps, cfg.batch_views) == (0.05, 10000, 1)
    vox = cfg.vox
    assert (vox.model_type, vox.grid_size, vox.density_shift, vox.c) == ("V_SD", 100, -1, 4)
    assert (vox.blend_bg_texture, vox.bg_texture_hw, vox.bbox_len) == (True, 4, 1)
    pose = cfg.pose
    assert (pose.rend_hw, pose.FoV, pose.fov_range, pose.R, pose.view_words) == (64, 60, (40, 70), 1.5, "sjc")
    assert (cfg.emptiness_scale, cfg.emptiness_weight, cfg.emptiness_step) == (10, 1e4, 0.5)
    assert (cfg.emptiness_multiplier, cfg.depth_weight, cfg.var_red) == (20, 0, True)
    assert (cfg.sigma_range, cfg.sigma_anneal, cfg.plain_bg) == ((10, 970), None, False)
    assert read() == cfg.model_dump()


def test_field_follows_the_family(here):
    assert [read("--preset", "ideal")["vox"][k] for k in ("model_type", "c")] == ["V_SJC", 3]
    assert [read("--family", "ideal", "--vox.model_type", "VoxRF")["vox"][k] for k in ("model_type", "c")] == [
        "VoxRF",
        3,
    ]
    assert [read()["vox"][k] for k in ("model_type", "c")] == ["V_SD", 4]  # the defaults were not changed


def test_precedence(here):
    """defaults < preset < config.yml < flags"""
    assert (read()["lr"], read()["n_steps"], read()["var_red"]) == (0.05, 10000, True)
    assert read("--preset", "zebra")["lr"] == 0.02
    (here / "config.yml").write_text("preset: zebra\nlr: 0.03\nsd: {scale: 7}\n")
    cfg = read()
    assert (cfg["lr"], cfg["sd"]["scale"], cfg["emptiness_weight"], cfg["var_red"]) == (0.03, 7, 3e4, False)
    cfg = read("--lr", "0.04", "--preset", "chair")
    assert (cfg["lr"], cfg["sd"]["scale"], cfg["emptiness_weight"], cfg["n_steps"]) == (0.04, 7, 7000, 50000)


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.yml")))
def test_every_preset_loads(here, name):
    assert read("--preset", name)["preset"] == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_preset(here, name):
    prompt, n_steps, lr, emptiness, depth, var_red = PUBLISHED[name]
    cfg = read("--preset", name)
    want = SJCConfig().model_dump()
    want["sd"] |= {"prompt": prompt, "scale": 100}
    want |= {
        "n_steps": n_steps,
        "lr": lr,
        "emptiness_weight": emptiness,
        "emptiness_step": 0.5,
        "emptiness_multiplier": 20,
        "depth_weight": depth,
        "var_red": var_red,
        "preset": name,
    }
    assert cfg == want
    flags = [
        "--sd.prompt",
        prompt,
        "--sd.scale",
        "100",
        "--n_steps",
        str(n_steps),
        "--lr",
        str(lr),
        "--emptiness_weight",
        str(emptiness),
        "--depth_weight",
        str(depth),
        "--var_red",
        str(var_red),
    ]
    if name != "chair":  # whose published command leaves these two out
        flags += ["--emptiness_step", "0.5", "--emptiness_multiplier", "20"]
    assert {**read(*flags), "preset": name} == cfg


PUBLISHED_FLAGS = {  # of each published script, with a value that its documentation or its defaults show
    "run_sjc": {
        "family": "sd",
        "sd.variant": "v1",
        "sd.v2_highres": "False",
        "sd.prompt": "a pig",
        "sd.scale": "100",
        "sd.precision": "full",
        "gddpm.model": "m_lsun_256",
        "gddpm.lsun_cat": "bedroom",
        "gddpm.imgnet_cat": "-1",
        "lr": "0.05",
        "n_steps": "10000",
        "vox.model_type": "V_SD",
        "vox.grid_size": "100",
        "vox.density_shift": "-1.0",
        "vox.c": "4",
        "vox.blend_bg_texture": "True",
        "vox.bg_texture_hw": "4",
        "vox.bbox_len": "1.0",
        "pose.rend_hw": "64",
        "pose.FoV": "60.0",
        "pose.R": "1.5",
        "emptiness_scale": "10",
        "emptiness_weight": "10000",
        "emptiness_step": "0.5",
        "emptiness_multiplier": "20",
        "depth_weight": "0",
        "var_red": "True",
    },
    "run_img_sampling": {
        "family": "gddpm",
        "sd.precision": "full",
        "batch_size": "8",
        "num_images": "16",
        "num_t": "40",
        "\N{GREEK SMALL LETTER SIGMA}_max": "80.0",
        "heun": "True",
        "langevin": "False",
        "cls_scaling": "1.0",
    },
    "run_nerf": {"seed": "0", "scene": "lego", "n_epoch": "2", "bs": "4096", "lr": "0.02"},
}


@pytest.mark.parametrize(
    "script, flag", [(script, flag) for script, flags in PUBLISHED_FLAGS.items() for flag in flags]
)
def test_published_flags_parse(here, script, flag):
    """Each alone: whether two go together is another question."""
    classes = {"run_sjc": SJCConfig, "run_img_sampling": SamplingConfig, "run_nerf": NeRFConfig}
    config.load(classes[script], [f"--{flag}", PUBLISHED_FLAGS[script][flag]], prog=script, doc="")


def test_full_precision_is_fp32(here):
    assert read("--sd.precision", "full")["sd"]["precision"] == "fp32"


def test_all_published_commands_have_a_preset():
    assert len(PUBLISHED) == 24 and set(PUBLISHED) <= {p.stem for p in PRESETS.glob("*.yml")}


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--emptiness_wieght", "1"], ["--emptiness_wieght", "perhaps you meant --emptiness_weight"]),
        (["--prompt", "a duck"], ["perhaps you meant --sd.prompt"]),
        (["--lr", "fast"], ["--lr: expected a finite number, got 'fast'"]),
        (["--n_steps", "1.5"], ["--n_steps: expected an integer"]),
        (["--lr", "-1"], ["--lr", "greater than 0"]),
        (["--lr"], ["--lr needs a value: a finite number"]),
        (["--lr", "--n_steps", "5"], ["--lr needs a value"]),
        (["--var_red", "maybe"], ["--var_red: expected True or False"]),
        (["--family", "idael"], ["--family: expected one of sd, gddpm, ddpm, ideal", "perhaps you meant ideal"]),
        (["--family", "ncsn"], ["--family ncsn: is no longer here; for pictures without a prompt give --family ddpm"]),
        (["--preset", "burgr"], ["no preset 'burgr' of this script; perhaps you meant burger"]),
        (["--sigma_range", "970,10"], ["--sigma_range must go up", "970, 10"]),
        (["--sigma_range", "5,5"], ["--sigma_range must go up"]),
        (["--sigma_range", "[1]"], ["--sigma_range: expected 2 integers with commas between, got"]),
        (["--pose.fov_range", "70,40"], ["--pose.fov_range must go up"]),
        (["--sigma_anneal", "5"], ["--sigma_anneal must lie above"]),
        (["--pose.FoV", "180"], ["--pose.FoV", "less than 180"]),
        (
            ["--preset", "ideal", "--sd.prompt", "a blue duck", "--device", "cpu", "--vox.grid_size", "5000"],
            ["--vox.grid_size 5000: takes 8000 GB of memory and more", "it can be"],
        ),
        (["burger"], ["unexpected word 'burger'"]),
        (["--preset", "ideal", "--device", "warp"], ["--device warp: not available here; use auto, cpu"]),
        (
            ["--preset", "ideal", "--sd.prompt", "a delicious burger", "--device", "cpu"],
            ["--sd.prompt with --family ideal", "colours: red", "objects: duck"],
        ),
        (["--family", "gddpm", "--device", "cpu"], ["--gddpm.lsun_cat bedroom: no file", "lsun_bedroom.pt"]),
        (["--sd.checkpoint", "nosuch", "--device", "cpu"], ["nosuch: looked for", "--preset ideal"]),
        (
            ["--gddpm.model", "m_imgnet_64"],
            ["--gddpm.model: not read with --family sd; leave it out, or give --family gddpm"],
        ),
        (["--preset", "ideal", "--pose.perp_neg", "True"], ["--pose.perp_neg: not read with --family ideal"]),
        (["--preset", "ideal", "--sd.negative_prompt", "ugly"], ["--sd.negative_prompt: not read with --family ideal"]),
        (["--family", "ddpm", "--pose.perp_neg", "True"], ["--pose.perp_neg: not read with --family ddpm"]),
        (["--family", "gddpm", "--cls_scaling", "2"], ["--cls_scaling: not read with --gddpm.model m_lsun_256"]),
        (["--preset", "ideal", "--vox.c", "4", "--ideal.n_cameras", "150"], ["--vox.c 4: this model's space has 3"]),
        (["--preset", "ideal", "--ideal.n_cameras", "2"], ["no picture has the view", "--ideal.n_cameras"]),
    ],
)
def test_mistakes_end_in_one_line(here, capsys, argv, words):
    with pytest.raises(SystemExit) as ended:
        run_main(run_sjc.main, argv)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (here / "ckpt").exists()
