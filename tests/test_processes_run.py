"""Runs whose views torchrun shares out over processes, on one machine by gloo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from my import checkpoint
from my.run_dir import read_history

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    *("--preset", "ideal", "--sd.prompt", "a blue duck", "--device", "cpu", "--n_steps", "6", "--batch_views", "3"),
    *("--vox.grid_size", "8", "--pose.rend_hw", "8", "--ideal.n_cameras", "40", "--pose.view_words", "sjc"),
]


def sjc(folder, n, *argv):
    """Run run_sjc.py with n processes in a folder; return what ended."""
    launcher = [sys.executable]
    if n > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port", "0", "--standalone"]
    folder.mkdir(exist_ok=True)
    command = [*launcher, str(ROOT / "run_sjc.py"), *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def last(folder):
    """The tensors of the last checkpoint."""
    return checkpoint.load(checkpoint.latest(folder / "ckpt"))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run by one process, and one by two, with three views per step."""
    root = tmp_path_factory.mktemp("runs")
    for name, n in (("one", 1), ("two", 2)):
        done = sjc(root / name, n, *RUN)
        assert done.returncode == 0, done.stderr[-2000:]
    return root


def test_two_processes_do_what_one_does(folders):
    one, two = (last(folders / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for ours, theirs in zip(*(read_history(folders / name / "history.json") for name in ("one", "two"))):
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(folders):
    """From the checkpoint after five of six steps, by one process."""
    two = folders / "two"
    want, newest = last(two), checkpoint.latest(two / "ckpt")
    checkpoint.discard(newest)
    done = sjc(two, 1, "--resume", "True")
    assert done.returncode == 0, done.stderr[-2000:]
    for name, value in last(two).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)


def test_more_processes_than_views_are_refused(folders):
    done = sjc(folders / "few", 2, *("1" if word == "3" else word for word in RUN))
    assert done.returncode != 0 and "--batch_views 1 with 2 processes: each needs one at least" in done.stderr
