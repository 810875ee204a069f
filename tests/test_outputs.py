"""Files that an option names are looked at before the work: hours of it are not lost to a folder of that name."""

import importlib
import re
from pathlib import Path

import pytest

from my.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FIELD = re.compile(r'^    (\w+): str\b[^\n]* = Field\(.*\bdescription="([^"]*\bfile\b[^"]*)"\)$', re.MULTILINE)
CHECKED = {  # module: options that name a file it writes
    "evaluate": ["out", "figure"],
    "benchmarks.mesh": ["report"],
    "benchmarks.mesh_quality": ["out", "figure"],
    "benchmarks.render": ["out"],
    "benchmarks.step": ["out"],
    "benchmarks.view": ["out"],
    "training.judge": ["out"],
}
ELSEWHERE = {"evaluate"}  # it first looks whether the runs are there; tests/test_evaluate.py has that


def test_no_such_option_is_missing_here():
    found = {}
    for path in (
        *ROOT.glob("*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("training/*.py"),
        *ROOT.glob("options/*"),
    ):
        if path.suffix == ".py" and (names := [name for name, _ in FIELD.findall(path.read_text())]):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = names
    assert found == CHECKED


@pytest.mark.parametrize(
    "module, option", [(m, o) for m, options in CHECKED.items() for o in options if m not in ELSEWHERE]
)
@pytest.mark.parametrize("path, words", [(".", "that is a folder"), ("absent/a.png", "there is no folder")])
def test_a_file_that_cannot_be_written_is_told_before_the_work(module, option, path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    takes_runs = module in ("benchmarks.mesh", "benchmarks.mesh_quality", "benchmarks.view")
    with pytest.raises(UserError, match=f"^--{option} {path}: {words}"):
        importlib.import_module(module).main([*["run"] * takes_runs, f"--{option}", path])
    assert not list(tmp_path.iterdir())
