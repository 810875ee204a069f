"""What a run leaves in its folder."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from film.files import replacing
from my import media, run_dir
from my.errors import UserError
from my.file_system import Lock
from my.run_dir import Heartbeat, History, clear_scratch, read_history, scratch_of, write_atomic


def test_write_atomic_replaces_whole_files_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomic(path, "é")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_dir.os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_atomic(path, "three")
    assert caught.value.filename == str(path)  # not the scratch file's
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.txt"]


def test_files_that_belong_together_are_all_written_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir.write_together({"a.png": b"1", "b.obj": "é"})
    assert (tmp_path / "a.png").read_bytes() == b"1" and (tmp_path / "b.obj").read_text("utf-8") == "é"
    with pytest.raises(OSError) as caught:
        run_dir.write_together({"a.png": b"2", "nowhere/b.obj": b"2", "c": b"2"})
    assert caught.value.filename == "nowhere/b.obj"
    assert (tmp_path / "a.png").read_bytes() == b"1" and sorted(os.listdir()) == ["a.png", "b.obj"]


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_cleared_and_nothing_else(tmp_path, monkeypatch, dead):
    monkeypatch.chdir(tmp_path)
    stale, kept = [], []
    for folder in (".", "img", "depth", "view", "pane", "imgs", "cells", "fields", "test_40/view", "test_40"):
        names = [scratch_of("a.png").name, f".a.png.{dead}.tmp", f".view.mp4.{dead}.tmp.mp4", f".film.{dead}.tmp/x/y"]
        stale += [f"{folder}/{name}" for name in names]
        kept += [
            f"{folder}/{name}"
            for name in (f".a.{os.getppid()}.tmp", f"a.{dead}.tmp", ".a.tmp", f".a.{dead}.tmp_", ".a.0.tmp")
        ]
    kept += [f"mine/.a.{dead}.tmp", f"img/mine/.a.{dead}.tmp", f".a.{10**30}.tmp"]
    for name in stale + kept:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clear_scratch()
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        os.path.normpath(k) for k in kept
    }


def test_what_a_run_on_another_machine_writes_stays(tmp_path, monkeypatch, dead):
    """Its process is not alive here; that it holds its folder is known here too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    beats = [Path(where, f".heartbeat.json.{dead}.tmp") for where in (".", "runs/a")]

    def cleared(*args, **kw):
        for beat in beats:
            beat.touch()
        clear_scratch(*args, **kw)
        return [beat for beat in beats if not beat.exists()]

    locks = [Lock(beat.parent.absolute() / run_dir.LOCK) for beat in beats]
    for lock in locks:
        assert lock.acquire(0)
    here, there = beats
    assert cleared(held=False) == [] and cleared(folders=["runs/*"]) == [here]
    here.touch()
    with pytest.raises(ZeroDivisionError), replacing(Path("highres_4")):
        1 / 0  # noqa: B018 (a film that fails)
    assert here.exists()
    locks[1].release()
    assert cleared(folders=["runs/*"]) == [here, there]
    locks[0].release()
    assert cleared(held=False) == [here]
    monkeypatch.setattr(run_dir, "is_locked", lambda path: None)  # a file system without locks
    assert cleared(folders=["runs/*"], held=False) == []


def test_a_writer_that_is_killed_leaves_what_is_cleared(tmp_path, monkeypatch):
    """Each kind of writer, at the moment before its file gets its name."""
    monkeypatch.chdir(tmp_path)
    frame = np.zeros((2, 2, 3), np.uint8)

    def film():
        with replacing(Path("highres_4")) as scratch:
            (scratch / "img").mkdir()
            os._exit(9)

    def video():
        with media.VideoWriter("view.mp4") as writer:
            writer.append(frame)
            os._exit(9)

    for write in (lambda: write_atomic("a", "b"), film, video, lambda: media.write_png("a.png", frame)):
        child = os.fork()
        if not child:
            monkeypatch.setattr(run_dir.os, "replace", lambda *_: os._exit(9))
            write()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        while not os.listdir():  # the encoder of a video makes its file a moment later
            pass
        clear_scratch()
        assert os.listdir() == []


@pytest.mark.parametrize(
    "path, words",
    [
        (".", "that is a folder; give the name of a file"),
        ("", "that is a folder"),
        ("absent/a.json", "there is no folder .*absent; make it first"),
        ("file/a.json", "there is no folder .*file; make it first"),
        ("fifo", "that is no file on disk"),
        ("a\0b", "null"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    os.mkfifo("fifo")
    with pytest.raises(UserError, match=f"^--out .*{words}"):
        run_dir.refuse_output("--out", path)
    assert sorted(os.listdir()) == ["fifo", "file"]


def test_a_file_that_can_be_written_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("old")
    os.symlink("ring", "ring")
    with pytest.raises(UserError, match="there is no folder .*ring; make it first"):
        run_dir.refuse_output("--out", "ring/x")
    run_dir.refuse_output("--out", "ring")  # a file takes its place
    run_dir.refuse_inside("--out", "ring", tmp_path / "project")
    os.unlink("ring")
    for path in ("file", "new.json"):
        run_dir.refuse_output("--out", path)
    assert os.listdir() == ["file"] and Path("file").read_text() == "old"
    for path in ("x" * 250, "/proc/a.json"):  # the name of the scratch file is longer; a folder that takes no file
        with pytest.raises(OSError) as caught:
            run_dir.refuse_output("--out", path)
        assert caught.value.filename == path


def test_the_project_folder_is_refused_and_a_neighbour_is_not(tmp_path, monkeypatch):
    for name in ("project", "project/sub", "project_exp"):
        (tmp_path / name).mkdir()
    for name in ("project", "project/sub"):
        monkeypatch.chdir(tmp_path / name)
        with pytest.raises(UserError, match="go to an experiment directory"):
            run_dir.refuse_project_dir(tmp_path / "project")
    for name in (".", "project_exp"):
        monkeypatch.chdir(tmp_path / name)
        run_dir.refuse_project_dir(tmp_path / "project")


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with run_dir.alone():
        with pytest.raises(UserError, match="at work in this folder; wait"), run_dir.alone():
            pass
        (tmp_path / "heartbeat.json").touch()
        with pytest.raises(UserError, match=r"\(heartbeat.json has its pid\)"), run_dir.alone():
            pass
        (tmp_path / "heartbeat.json").unlink()
    with run_dir.alone():  # free again
        assert os.listdir() == [run_dir.LOCK]
    assert os.listdir() == []


# ---------------------------------------------------------------- history


def test_history_keeps_full_precision_and_is_readable_at_once(tmp_path):
    path = tmp_path / "history.json"
    with History(path) as history:
        history.add(1, loss=0.1 + 0.2, x=torch.tensor(1.5), views=[1, math.inf])
        assert read_history(path) == [{"step": 1, "loss": 0.1 + 0.2, "x": 1.5, "views": [1, None]}]
        history.add(2, loss=math.nan, tiny=5e-324)
    assert path.read_text().splitlines()[1] == '{"step": 2, "loss": null, "tiny": 5e-324}'


def test_a_new_run_starts_empty_and_a_resumed_one_continues_after_its_step(tmp_path):
    path = tmp_path / "history.json"
    with History(path) as history:
        for step in range(5):
            history.add(step)
    with open(path, "a") as file:
        file.write('{"step": 5, "lo')
    assert len(read_history(path)) == 5
    with History(path, resume_step=2) as history:
        history.add(3, again=True)
    assert [row["step"] for row in read_history(path)] == [0, 1, 2, 3]
    assert read_history(path)[3]["again"]
    History(path).close()
    assert read_history(path) == []


def test_resuming_without_a_history_starts_one(tmp_path):
    with History(tmp_path / "h.json", resume_step=4) as history:
        history.add(5)
    assert read_history(tmp_path / "h.json") == [{"step": 5}]


@pytest.mark.parametrize(
    "line",
    [
        *("{half", "[1]", "3", '{"loss": 1}', '{"step": null}', '{"step": Infinity}', "[" * 10**5, "", "\xff"),
        *('{"step": "2"}', '{"step": 2.0}', '{"step": true}', '{"step": -2}', '{"step": 2, "step": 3}'),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "history.json"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match="history.json: line 2"):
        read_history(path)
    with pytest.raises(UserError, match="no such file"):
        read_history(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "step, extra, fits", [(9, "", False), (10, "", False), (10, ', "stopped": "x"', True), (11, "", True)]
)
def test_steps_go_up(tmp_path, step, extra, fits):
    """Only the row that says what stopped the run may be of the step before it."""
    path = tmp_path / "history.json"
    path.write_text(f'{{"step": 10}}\n{{"step": {step}{extra}}}\n')
    if fits:
        assert [row["step"] for row in read_history(path)] == [10, step]
        return
    with pytest.raises(UserError, match=f"line 2 has step {step} behind step 10; delete"):
        History(path, 20)


def test_a_number_that_json_does_not_have_is_none_afterwards(tmp_path):
    path = tmp_path / "history.json"
    path.write_text('{"step": 1, "loss": Infinity}\n')
    History(path, 1).close()
    assert path.read_text() == '{"step": 1, "loss": null}\n'


@pytest.mark.parametrize(
    "steps, last, said",
    [
        ([10, 20, 30, 35, 40], 40, None),
        ([10, 40], 45, "lacks 2 of its 4 lines up to step 45, those of step 20, 30;"),
        ([5, 50], 40, "lacks 4 of its 4 lines up to step 40, those of step 10, 20, 30, ...;"),
        (None, 20, "lacks 2 of its 2 lines up to step 20, those of step 10, 20;"),
        (None, 9, None),
    ],
)
def test_a_resumed_run_tells_of_a_gap(tmp_path, capsys, steps, last, said):
    path = tmp_path / "history.json"
    if steps is not None:
        path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    History(path, last, every=10).close()
    err = capsys.readouterr().err
    assert err.count("\n") == (said is not None) and (said or "") in err
    assert [row["step"] for row in read_history(path)] == [step for step in steps or [] if step <= last]


# ---------------------------------------------------------------- heartbeat


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_heartbeat_tells_progress_and_the_time_left(tmp_path):
    path, clock = tmp_path / "heartbeat.json", Clock()
    with Heartbeat(path, n_steps=100, every_s=5, start_step=20, clock=clock) as heart:
        assert json.loads(path.read_text())["eta_s"] is None
        clock.now += 10
        heart.beat(40)  # 20 steps in 10 s; 60 are left
        state = json.loads(path.read_text())
        assert (state["step"], state["n_steps"], state["progress"]) == (40, 100, 0.4)
        assert (state["elapsed_s"], state["eta_s"]) == (10.0, 30.0)
        assert state["done"] is False and state["pid"] == os.getpid()
        assert state["updated"].endswith("+00:00")
        clock.now += 4
        heart.beat(41)
        assert json.loads(path.read_text())["step"] == 40  # 5 s have not passed
        clock.now += 1
        heart.beat(42)
        assert json.loads(path.read_text())["step"] == 42
        heart.beat(100)
    state = json.loads(path.read_text())
    assert (state["step"], state["done"], state["eta_s"]) == (100, True, 0.0)
    assert "failed" not in state


def test_heartbeat_records_the_failure_and_its_last_step(tmp_path):
    path = tmp_path / "heartbeat.json"
    with pytest.raises(ValueError), Heartbeat(path, 10, clock=Clock()) as heart:
        heart.beat(3)
        raise ValueError("no light")
    state = json.loads(path.read_text())
    assert state["failed"] == "ValueError: no light"
    assert state["done"] is False and state["step"] == 3


def test_a_full_disk_does_not_hide_the_failure(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError), Heartbeat(tmp_path / "h.json", 10):
        monkeypatch.setattr(run_dir, "write_atomic", full)
        raise ValueError
