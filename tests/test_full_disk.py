"""A disk that is full, at every size that it may have; a file system that turns read-only; a folder that disappears;
a clock that jumps. The command ends in one line, every file is whole, and the run goes on where there is room."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

import run_2d_sjc
import run_img_sampling
import run_sjc
import sampling
import sjc
from my import script, starts
from my.errors import run_main
from my.run_dir import read_heartbeat
from tiny import Affine
from torture import Folder

SJC = [
    *("--preset", "ideal", "--n_steps", "10", "--vox.grid_size", "4", "--pose.rend_hw", "6", "--device", "cpu"),
    *("--ideal.n_cameras", "40", "--pose.view_words", "sjc", "--ckpt_every", "0.2"),
]
SAMPLING = ["--preset", "ideal", "--num_images", "4", "--batch_size", "1", "--num_t", "3", "--device", "cpu"]
CANVAS = ["--preset", "ideal", "--n_steps", "3", "--copies", "1,2", "--device", "cpu"]
COMMANDS = {
    "sjc": (run_sjc, [*SJC, "--report", "False"]),
    "page": (run_sjc, SJC),
    "sampling": (run_img_sampling, SAMPLING),
    "canvas": (run_2d_sjc, CANVAS),
}
Step = sjc.SJC.step
PAGE = 4096  # bytes by which a disk grows


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The smallest model there is, for every command."""
    for where in ("sjc.make_adapter", "adapt.make_adapter"):
        monkeypatch.setattr(where, lambda *_: Affine())
    monkeypatch.setattr("run_sjc.N_TEST_VIEWS", 6)


def command(name, capsys, *argv):
    """Do a command in the current folder; return its (exit status, what it said on stderr, bars left out)."""
    module, options = COMMANDS[name]
    status = 0
    try:
        run_main(module.main, [*options, *argv], go_on=script.go_on)
    except SystemExit as ended:
        status = ended.code
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    return status, [line for line in lines if line and not re.match(r"\S+.*(\d%\||\[\d\d:\d\d)", line)]


@pytest.fixture(scope="module")
def truth():
    """What a run of each command leaves that nobody disturbs, by its name; it is made when it is first asked for."""
    return {}


def whole(name, truth, tmp_path, monkeypatch, capsys):
    """Return what an undisturbed run leaves, {name of a file: content}."""
    if name not in truth:
        (tmp_path / "undisturbed").mkdir()
        monkeypatch.chdir(tmp_path / "undisturbed")
        assert command(name, capsys) == (0, [])
        truth[name] = Folder(tmp_path / "undisturbed").contents()
    return truth[name]


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, and a function that gives it a size or another option."""
    where = tmp_path / "disk"
    where.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, where], capture_output=True, text=True).returncode == 0

    if not sys.platform.startswith("linux") or not mount("-t", "tmpfs", "-o", f"size={PAGE}", "tmpfs"):
        pytest.skip("no file system can be mounted here")
    yield where, lambda options: mount("-o", f"remount,{options}")
    os.chdir("/")
    subprocess.run(["umount", "-l", where], check=True)


def kind(line):
    """What was to be written where a command says that the disk is full, such as img/*.png."""
    told = re.fullmatch(r"\S+: (.*): (?:the disk is full|not all of .* were written); free some space, then .*", line)
    assert told, line
    path = Path(told[1])
    return re.sub(r"\d+", "N", str(path.parent / f"*{path.suffix}" if path.suffix in (".png", ".npy") else path))


@pytest.mark.parametrize(
    "name, growth, kinds",
    [
        (
            "sjc",
            0.0,
            {"full_config.yml", "img/*.png", "view/*.png", "ckpt/.tmp_step_N_new/tensors.safetensors"}
            | {"fields/step_N.safetensors", "test_N/view/*.png", "test_N/view_seq/view.mpN"},
        ),
        ("page", 0.5, {"full_config.yml", "report.html"}),
        ("sampling", 0.0, {"full_config.yml", "imgs/*.png", "imgs/*.npy", "*.png"}),
        ("canvas", 0.0, {"full_config.yml", "ckpt/.tmp_step_N_new/tensors.safetensors", "cells/*.png", "*.png"}),
    ],
)
def test_a_disk_of_every_size(name, growth, kinds, truth, tmp_path, disk, monkeypatch, capsys):
    """It grows by a page, or by a share, at each start until the run fits: each kind of write meets its end."""
    want = whole(name, truth, tmp_path, monkeypatch, capsys)
    where, remount = disk
    monkeypatch.chdir(where)
    met, look, advice = set(), Folder(where), []
    (where / "filler").write_bytes(bytes(PAGE))  # nothing fits at first
    size = 1
    while True:
        assert remount(f"size={size * PAGE}")
        status, said = command(name, capsys, *advice)
        said = [line for line in said if advice or not line.startswith("note: this folder holds a run that is not fin")]
        have = look.contents()
        assert not look.scratch()
        if status == 0:
            break
        (where / "filler").unlink(missing_ok=True)
        assert status == 1 and len(said) == 1, said
        met.add(kind(said[0]))
        size += max(1, int(size * growth))
        advice = ["--resume", "True"] if said[0].endswith("continue with --resume True") else []
    assert said == [] and have == want
    assert kinds <= met, f"{kinds - met} never met a full disk; {met} did"


# ---------------------------------------------------------------- other things that happen to a folder


def at_step(monkeypatch, step, do):
    """Have `do` called before a run takes a step."""

    def take(optimisation, i):
        if i == step:
            do()
        return Step(optimisation, i)

    monkeypatch.setattr("sjc.SJC.step", take)


def test_a_file_system_that_turns_read_only(truth, tmp_path, disk, monkeypatch, capsys):
    """Between two pictures; a kernel does so on an error of the disk. Then it can be written again."""
    want = whole("sampling", truth, tmp_path, monkeypatch, capsys)
    where, remount = disk
    assert remount("size=4M")
    monkeypatch.chdir(where)
    monkeypatch.setattr("my.run_dir.Lock.acquire", lambda *_: None)  # nothing is remounted with its file open
    n_drawn, draw = [], sampling.draw

    def turned(*args):
        n_drawn.append(len(n_drawn))
        if len(n_drawn) == 3:
            assert remount("ro")
        return draw(*args)

    monkeypatch.setattr("sampling.draw", turned)
    for advice in ([], ["--resume", "True"]):  # also a start in such a folder
        status, said = command("sampling", capsys, *advice)
        assert status == 1 and len(said) == 1
        assert "this file system is read-only; work in a folder that you may write, then continue with" in said[0]
    look = Folder(where)
    assert {"imgs/0000001.png", "full_config.yml"} <= look.contents().keys() < want.keys() and not look.scratch()
    assert remount("rw") and command("sampling", capsys, "--resume", "True") == (0, [])
    assert look.contents() == want and len(n_drawn) == 5


def test_a_folder_that_disappears(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")

    def disappear():
        (tmp_path / "run").rename(tmp_path / "gone")  # at once, while the worker may write to it
        while (tmp_path / "gone").exists():
            shutil.rmtree(tmp_path / "gone", ignore_errors=True)

    at_step(monkeypatch, 5, disappear)
    status, said = command("sjc", capsys)
    monkeypatch.chdir(tmp_path)
    assert (
        status == 1
        and len(said) == 1
        and said[0].endswith(
            "the folder that the command works in was deleted or moved; nothing more can be written to it"
        )
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_goes_on_where_nobody_reads_what_it_says(name, truth, tmp_path, monkeypatch, capsys):
    """As behind `2>&1 | tee`, which a Ctrl-C ends first."""
    want = whole(name, truth, tmp_path, monkeypatch, capsys)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with contextlib.ExitStack() as opened:
        for stream in ("stdout", "stderr"):
            reads, writes = os.pipe()
            os.close(reads)
            monkeypatch.setattr(sys, stream, opened.enter_context(os.fdopen(writes, "w")))
        assert command(name, capsys) == (0, [])
    assert Folder(tmp_path / "run").contents() == want


def test_a_folder_that_is_moved(truth, tmp_path, monkeypatch, capsys):
    """The run goes on in it."""
    want = whole("sjc", truth, tmp_path, monkeypatch, capsys)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    at_step(monkeypatch, 5, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    assert command("sjc", capsys) == (0, [])
    assert Folder(tmp_path / "moved").contents() == want and not (tmp_path / "run").exists()


@pytest.mark.parametrize("by_s", [-1e8, 1e8])
def test_a_clock_that_jumps(by_s, truth, tmp_path, monkeypatch, capsys):
    """By three years, as where a machine learns the time late."""
    want = whole("page", truth, tmp_path, monkeypatch, capsys)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=by_s)

    def jump(now=time.time):
        monkeypatch.setattr(time, "time", lambda: now() + by_s)
        for where in ("my.run_dir", "my.starts"):
            monkeypatch.setattr(f"{where}.datetime", Later)

    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    at_step(monkeypatch, 5, jump)
    assert command("page", capsys, "--ckpt_minutes", "1000") == (0, [])
    have = Folder(tmp_path / "run").contents()
    have["full_config.yml"]["ckpt_minutes"] = None
    assert have == want
    (start,), _ = starts.read(".")
    least, most = (0.0, 0.0) if by_s < 0 else (by_s, by_s + 1e4)  # a time before the start counts as none
    assert start.ended == starts.DONE and least <= start.seconds <= most
    assert read_heartbeat("heartbeat.json")["elapsed_s"] < 1e4
