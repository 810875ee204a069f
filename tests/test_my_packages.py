"""Without the packages that the project needs, a command ends in one line; an import of the rooms does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from my.packages import NEEDED

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "run_sjc run_sweep run_nerf run_img_sampling run_2d_sjc highres_final_vis export_mesh view report replay reproduce "
    "evaluate doctor"
).split()


def bare(*words, **kw):
    """What a Python that has the standard library alone (-S) makes of some words."""
    return subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True, **kw)


@pytest.mark.parametrize("command", COMMANDS)
def test_python_without_the_requirements_is_told_so(command, tmp_path):
    done = bare(ROOT / f"{command}.py", "-h", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "has no package pydantic" in done.stderr and "pip install -r requirements.txt" in done.stderr


def test_an_import_ends_nothing():
    done = bare("-c", "import my, my.packages; print(my.packages.NEEDED[0])", cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "pydantic\n"), done.stderr


def test_every_requirement_is_looked_for():
    """But for warp-lang: without it the slow renderer is used, with a warning."""
    modules = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}
    lines = (ROOT / "requirements.txt").read_text().split()
    required = {line.partition(">=")[0] for line in lines} - {"warp-lang"}
    assert {modules.get(name, name.replace("-", "_")) for name in required} == set(NEEDED)
