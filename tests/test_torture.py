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
