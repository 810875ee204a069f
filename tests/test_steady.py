"""The memory of a run does not grow with its steps; `python tests/steady.py` looks at three thousand of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import steady

SCRIPT = Path(steady.__file__)


def test_growth_by_hand():
    """The first steps do not count, and of others the most in each part does."""
    assert steady.growth([*[100] * 10, *[10, 20] * 5, *[50] * 160, *[30, 26] * 10]) == 10


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what is resident")
def test_a_run_of_some_hundred_steps_takes_no_more_memory_in_the_end():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--steps", "240"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and "growth " in done.stdout, done.stderr[-2000:]
