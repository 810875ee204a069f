"""Ten runs that are killed at random moments, and gone on with; `python tests/torture.py` kills a hundred and more."""

import sys

import pytest

import torture
from my.run_dir import scratch_of
from torture import Folder, Job, Tally, Torture, TortureConfig, Warm

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells when files are made")


@pytest.fixture(scope="module")
def warm():
    """What starts commands by forking."""
    starter = Warm()
    yield starter
    starter.close()


def test_runs_that_are_killed_end_as_if_they_had_not_been(warm, tmp_path):
    tally = Tally()
    cfg = TortureConfig(kills=10, seed=3, runs=["ideal", "canvas"], warm=True)
    torture.torture(cfg, tmp_path, warm, tally)
    assert not tally.wrong, tally.table()
    assert tally.kills >= 10 and tally.equal == tally.finished, tally.table()


def test_a_signal_that_saves_nothing_of_a_training_is_noticed(tmp_path):
    work = Torture(tmp_path, None, 0, Tally())
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "run.log").write_text("run_sjc.py: stopped by SIGTERM; continue with --resume True\n")
    (folder / "heartbeat.json").write_text('{"pid": 7}')
    (folder / "history.json").write_text('{"step": 10}\n{"step": 20}\n')
    work._ended_in_order(folder, 143, 8)  # another process has left them
    with pytest.raises(AssertionError, match="^20 steps are in history.json, and not saved: run_sjc.py: stopped by"):
        work._ended_in_order(folder, 143, 7)
    (folder / "ckpt" / "step_0000010").mkdir(parents=True)
    with pytest.raises(AssertionError, match="^10 steps"):
        work._ended_in_order(folder, 143, 7)
    (folder / "ckpt" / "step_0000020").mkdir()
    work._ended_in_order(folder, 143, 7)
    with pytest.raises(AssertionError, match="^status -15: run_sjc.py: stopped"):
        work._ended_in_order(folder, -15, 7)


def test_a_loss_is_noticed(warm, tmp_path, monkeypatch):
    """A picture that is cut off, a line that is gone, and a file that a run should have left behind."""
    short = (*torture.JOBS["canvas"].argv, "--lr", "0.2")
    monkeypatch.setitem(torture.JOBS, "tiny", Job("run_2d_sjc.py", short))
    work = Torture(tmp_path, warm, 0, Tally())
    folder = work.prepare("tiny")
    look = Folder(folder)
    work._compare("tiny", folder, look)
    scratch = scratch_of(folder / "cells" / "a.png")
    scratch.touch()
    with pytest.raises(AssertionError, match="left behind"):
        work._compare("tiny", folder, look)
    scratch.unlink()
    cell = next(folder.glob("cells/*.png"))
    cell.write_bytes(cell.read_bytes()[:-20])
    with pytest.raises(AssertionError, match="is not whole"):
        look.contents()
    cell.unlink()
    with pytest.raises(AssertionError, match="other files"):
        work._compare("tiny", folder, look)
