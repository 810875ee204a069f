"""Runs whose views torchrun shares out over processes, on one machine by gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from my import checkpoint, starts
from my.run_dir import STOPPED, read_history

ROOT = Path(__file__).resolve().parent.parent
RUN = [
    *("--preset", "ideal", "--sd.prompt", "a blue duck", "--device", "cpu", "--n_steps", "6", "--batch_views", "3"),
    *("--vox.grid_size", "8", "--pose.rend_hw", "8", "--ideal.n_cameras", "40", "--pose.view_words", "sjc"),
]


def command(n, *argv):
    """The words that start run_sjc.py with n processes."""
    launcher = [sys.executable]
    if n > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone"]
    return [*launcher, str(ROOT / "run_sjc.py"), *argv]


def sjc(folder, n, *argv):
    """Run run_sjc.py with n processes in a folder; return what ended."""
    folder.mkdir(exist_ok=True)
    return subprocess.run(command(n, *argv), cwd=folder, capture_output=True, text=True, timeout=300)


def process_of(launcher, rank):
    """The number of the process of a rank, among the children of torchrun."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no process of rank {rank}")


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
        for name in ("score", "regulariser", "opacity"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_a_run_goes_on_with_another_number_of_processes(folders):
    """From the checkpoint after five of six steps, by one process."""
    two = folders / "two"
    want, newest = last(two), checkpoint.latest(two / "ckpt")
    checkpoint.discard(newest)
    done = sjc(two, 1, "--resume", "True")
    assert done.returncode == 0, done.stderr[-2000:]
    for name, value in last(two).items():
        torch.testing.assert_close(value, want[name], rtol=1e-4, atol=1e-5)


def test_two_processes_begin_from_another_field_as_one_does(folders):
    begun = {}
    for name, n in (("from_one", 1), ("from_two", 2)):
        argv = [{"8": "10", "6": "1"}.get(word, word) for word in RUN]  # another grid, one step
        done = sjc(folders / name, n, *argv, "--init", str(folders / "one"))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr.count("the grid is resampled from 8 x 8 x 8 voxels to 10 x 10 x 10") == 1
        begun[name] = last(folders / name), checkpoint.load(folders / name / "ckpt" / "step_0000000")[0]
    for one, two in zip(*begun.values()):
        for name in one:  # a first step of Adam is 0.3 g / (|g| + eps): where |g| is near eps, its rounding shows
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-3)


def test_more_processes_than_views_are_refused(folders):
    done = sjc(folders / "few", 2, *("1" if word == "3" else word for word in RUN))
    assert done.returncode != 0 and "--batch_views 1 with 2 processes: each needs one at least" in done.stderr


def struck(folder, strike):
    """Run two processes for long, call `strike` with torchrun once they train, and return what they said on stderr."""
    argv = ["4000" if word == "6" else word for word in RUN]
    with open(folder / "stderr", "w+") as stderr:
        torchrun = subprocess.Popen(command(2, *argv), cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr)
        deadline = time.monotonic() + 240
        while not (folder / "img" / "step_0000080.png").exists():  # the first checkpoint is after 200
            assert torchrun.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        strike(torchrun)
        assert torchrun.wait(timeout=120) != 0
        stderr.seek(0)
        return stderr.read()


def saved_step(said):
    """The step that the only line of some words says is saved."""
    (line,) = [line for line in said.splitlines() if "is saved" in line]
    return int(re.search(r"the state after step (\d+) is saved; continue with --resume True$", line)[1])


def test_a_signal_to_torchrun_ends_the_run_as_one_to_a_single_process(tmp_path):
    """Wherever it comes, such as at a sum: the heartbeat, the history, and how the command ended say the signal."""
    step = saved_step(struck(tmp_path, lambda torchrun: torchrun.terminate()))
    assert step >= 80 and checkpoint.step_of(checkpoint.latest(tmp_path / "ckpt")) == step
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert beat["stopped"] == "SIGTERM" and beat["saved"] == beat["step"] == step and "failed" not in beat
    assert read_history(tmp_path / "history.json")[-1] == {"step": step, "stopped": "SIGTERM"}
    assert starts.read(tmp_path)[0][-1].ended == "stopped by SIGTERM"


def test_a_lost_process_ends_the_run_and_loses_no_whole_step(tmp_path):
    """SIGKILL of the second: the first saves the last whole step, says so in one line, and one process goes on."""
    step = saved_step(struck(tmp_path, lambda torchrun: os.kill(process_of(torchrun.pid, 1), signal.SIGKILL)))
    assert step >= 80 and checkpoint.step_of(checkpoint.latest(tmp_path / "ckpt")) == step
    assert read_history(tmp_path / "history.json")[-1] == {"step": step, "stopped": "an error"}
    before = last(tmp_path)
    go_on = subprocess.Popen(command(1, "--resume", "True"), cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while read_history(tmp_path / "history.json")[-1]["step"] < step + 20:
        assert go_on.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    go_on.kill()
    go_on.wait()
    steps = [row["step"] for row in read_history(tmp_path / "history.json") if STOPPED not in row]
    assert steps == list(range(10, steps[-1] + 1, 10))  # none twice, none missing
    assert all(value.isfinite().all() for value in before.values())
