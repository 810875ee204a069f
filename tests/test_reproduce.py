"""A run done again: the same bits; and what is said of a field that is not the same."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reproduce
import run_sjc
from my.checkpoint import latest, save
from my.errors import RunError, UserError
from rerun import whole

TINY = [
    *("--preset", "ideal", "--sd.prompt", "a blue duck", "--vox.grid_size", "5", "--pose.rend_hw", "4"),
    *("--ideal.n_cameras", "40", "--pose.view_words", "sjc", "--n_steps", "2", "--report", "False", "--device", "cpu"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "duck"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_sjc.main([*TINY, "--threads", "1", "--seed", "3"])
    return folder


def in_process(monkeypatch, seed=None):
    """Have the command run here: its start takes seconds."""

    def start(words, cwd):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            assert Path(words[1]).name == "run_sjc.py" and len(words) == 2
            run_sjc.main([] if seed is None else ["--seed", str(seed)])
        return 0

    monkeypatch.setattr(whole, "attended", start)


def test_the_same_command_gives_the_same_bits(run, here, monkeypatch, capsys):
    in_process(monkeypatch)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    reproduce.main([str(run)])
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"done: the field in {here / 'duck_again'} is the same as in {run}, bit for bit: ")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert [line for line in out if "there" in line] == []  # nothing that bits depend on is another
    monkeypatch.setattr(whole, "attended", None)  # it is finished
    reproduce.main([str(run)])


def test_another_seed_gives_another_field(run, here, monkeypatch, capsys):
    in_process(monkeypatch, seed=4)
    with pytest.raises(RunError, match=f"^the field in {here / 'x'} is not that of {run}: what differs is above"):
        reproduce.main([str(run), "--out", "x"])
    out = capsys.readouterr().out
    assert "field/density: differs by at most " in out and "field/color: differs by at most " in out


def test_a_command_that_fails(run, here, monkeypatch):
    monkeypatch.setattr(whole, "attended", lambda *_: 137)
    with pytest.raises(
        RunError, match="run_sjc.py ended with status 137 in .*duck_again; reproduce.py goes on from there"
    ):
        reproduce.main([str(run)])


PARENT = """
import sys
from pathlib import Path
from my.errors import run_main
from rerun.whole import attended

run_main(lambda argv: attended([sys.executable, "child.py"], Path(".")), go_on=lambda: "start it again")
"""
CHILD = """
import os, signal, sys, time
from pathlib import Path

def save(*_):
    time.sleep(0.5)
    Path("ended").write_text(f"whoever started it waits: {os.getppid() == parent}")
    sys.exit(143)

parent = os.getppid()

signal.signal(signal.SIGTERM, save)
print("there", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_run_saves_before_the_command_ends(tmp_path, number):
    for name, text in (("parent.py", PARENT), ("child.py", CHILD)):
        (tmp_path / name).write_text(text)
    env = {**os.environ, "PYTHONPATH": str(whole.ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "parent.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "there\n"
    parent.send_signal(number)
    _, told = parent.communicate(timeout=60)
    assert parent.returncode == 128 + number and told.startswith("parent.py: stopped"), told
    assert (tmp_path / "ended").read_text() == "whoever started it waits: True"


def test_on_windows_nothing_ends_a_run_that_saves(tmp_path, monkeypatch):
    """A Ctrl-C has reached it too: whoever started it waits."""
    done = []

    class Child:
        def __init__(self, *args, **kw):
            self.waits = iter([KeyboardInterrupt, None])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def wait(self):
            done.append("wait")
            if error := next(self.waits):
                raise error

        def terminate(self):
            done.append("terminate")

    monkeypatch.setattr(whole.subprocess, "Popen", Child)
    for system, want in (("win32", ["wait", "wait"]), ("linux", ["wait", "terminate", "wait"])):
        done.clear()
        monkeypatch.setattr(whole.sys, "platform", system)
        with pytest.raises(KeyboardInterrupt):
            whole.attended(["x"], tmp_path)
        assert done == want


def test_fields_of_two_steps_are_not_compared(run, here, monkeypatch, capsys):
    """Where the newest checkpoint of one run is damaged, the one before it would be taken."""
    in_process(monkeypatch)
    shutil.copytree(run, here / "duck")
    newest = latest(here / "duck" / "ckpt")
    (newest / "meta.json").write_text("{}")
    with pytest.raises(RunError, match="duck: its newest whole checkpoint is of step 1, .* run's of step 2: "):
        reproduce.main(["duck"])
    assert f"note: {newest}" in capsys.readouterr().err


def test_what_cannot_be_done_again(run, here, monkeypatch):
    def refused(words, *argv):
        with pytest.raises(UserError, match=words):
            reproduce.main([*argv])

    empty = here / "empty"
    empty.mkdir()
    refused("has no full_config.yml; give the folder of a finished run", str(empty))
    refused("that is the run itself; give another folder", str(run), "--out", str(run))
    (empty / "full_config.yml").write_text("made_by: {command: run_2d_sjc.py}\n")
    refused("made by .*run_2d_sjc.py.*; only runs of run_sjc.py and run_nerf.py can be compared", "empty")
    refused("holds something else than .*duck done again; give an empty folder", str(run), "--out", "empty")
    assert not (empty / "config.yml").exists()
    (empty / "config.yml").write_text("seed: 4\n")
    refused("holds something else than .*duck done again; give an empty folder", str(run), "--out", "empty")
    (empty / "config.yml").unlink()
    refused("that is in the project's own folder", str(run), "--out", str(reproduce.ROOT / "docs" / "again"))
    (empty / "full_config.yml").write_text("[[[")
    refused("full_config.yml: .*; give the folder of a finished run", "empty")
    (empty / "full_config.yml").write_text("made_by: {command: run_sjc.py}\n")
    (empty / "heartbeat.json").write_text(json.dumps({"done": False}))
    refused("this run is not finished; finish it there first with run_sjc.py --resume True", "empty")
    (empty / "heartbeat.json").write_text(json.dumps({"done": True}))
    monkeypatch.setattr(whole, "do_again", lambda *_: None)
    refused("has no checkpoint; give the folder of a finished run", "empty")


def test_comparing_by_hand():
    a = {"x": torch.tensor([1.0, 2.0]), "nan": torch.tensor(math.nan), "z": torch.tensor(0.0), "old": torch.ones(2)}
    b = {"x": torch.tensor([1.0, 2.5]), "nan": torch.tensor(math.nan), "z": torch.tensor(-0.0), "new": torch.ones(2)}
    same, lines = whole.compare(a, b)
    assert not same and list(lines) == [
        "new: only in one of them",
        "old: only in one of them",
        "x: differs by at most 0.5, RMS 0.354 of 1.58",
        "z: differs by at most 0, RMS 0 of 0",
    ]
    assert whole.compare(a, dict(a))[0]
    shaped = whole.compare({"x": torch.ones(2)}, {"x": torch.ones(3)})
    assert not shaped[0] and list(shaped[1]) == ["x: (2,) and (3,)"]


def test_what_bits_depend_on(tmp_path):
    for name, threads, version in (("a", 1, "1"), ("b", 2, "1")):
        (tmp_path / name).mkdir()
        start = {"kind": "start", "at": "", "threads": threads, "device": "cpu: x", "versions": {"torch": version}}
        (tmp_path / name / "starts.json").write_text(json.dumps(start) + "\n")
    assert list(whole.unlike_facts(tmp_path / "a", tmp_path / "b")) == ["threads: 1 there, 2 here"]
    assert not list(whole.unlike_facts(tmp_path / "a", tmp_path / "a"))
    save(tmp_path / "c" / "ckpt", 3, {"field/x": torch.ones(1), "optim/x/step": torch.ones(())}, {})
    step, tensors = whole.last_field(tmp_path / "c")
    assert step == 3 and list(tensors) == ["field/x"]
