"""The pages are true where a machine can tell: links, options, commands, and the two lines that set everything up."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "mini_sd" / "README.md",
]
README = (ROOT / "README.md").read_text()


def text_of(page):
    return page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", text_of(page))
    broken = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert not broken


def test_every_page_is_found_from_the_readme():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        links = {(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+\.md)\)", text_of(page))}
        new |= {link for link in links if link.exists()} - reached
    assert set(PAGES) <= reached


def test_the_readme_is_a_landing_page():
    assert len(README.splitlines()) <= 130


def test_options_are_as_the_code_says():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, 'docs'); import write_options; sys.stdout.write(write_options.page())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert text_of(ROOT / "docs" / "options.md") == done.stdout, "run python docs/write_options.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_that_pages_name_are_there(page):
    known = set(re.findall(r"`--([\w.]+)`", text_of(ROOT / "docs" / "options.md")))
    known |= {
        "sha256",
        "selftest",
        "help",
        "tests",
        "figure",
        "out",
        "settings",
        "seeds",
        "preset",
        "scales",
        "tuned_on",
        "n_best",
        "n_fields",
        "prompt",
    }  # of doctor.py, benchmarks
    known |= {"check", "nproc_per_node", "dist"}  # of ruff, torchrun, pytest-xdist
    named = {flag.rstrip(".") for flag in re.findall(r"(?<![\w-])--([A-Za-z][\w.]*)", text_of(page))}
    groups = {name.partition(".")[0] for name in known}
    assert not {flag for flag in named if flag not in known and flag not in groups and not flag.endswith("_")}


# ---------------------------------------------------------------- the two lines

STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *run_sjc.py*) touch full_config.yml ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
    """Calls quickstart.sh in a folder whose name has a space and an accent; returns (output, [commands of Python])."""
    project, home, stubs = tmp_path / "caf\u00e9 au lait", tmp_path / "home", tmp_path / "bin"
    for folder in (project, home, stubs):
        folder.mkdir()
    shutil.copy(ROOT / "quickstart.sh", project)
    (stubs / "python3").write_text(STUB)
    (stubs / "python3").chmod(0o755)

    def call(*words):
        log = tmp_path / "log"
        log.write_text("")
        env = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(home), "LOG": str(log)}
        done = subprocess.run(
            ["bash", str(project / "quickstart.sh"), *words], env=env, cwd=home, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, log.read_text().splitlines()

    return call


def test_quickstart_makes_an_asset_and_can_be_repeated(quickstart, tmp_path):
    project = tmp_path / "caf\u00e9 au lait"
    for name in ("a_red_pig", "a_red_pig_2", "a_red_pig_3"):
        out, commands = quickstart("a red pig")
        assert commands == [
            "python3 -m venv .venv",
            "python -m pip install -q -r requirements.txt",
            f"python {project}/run_sjc.py --preset ideal --sd.prompt a red pig",
            f"python {project}/highres_final_vis.py",
            f"python {project}/export_mesh.py",
            f"python {project}/report.py",
        ]
        assert out.splitlines()[-1] == f"Look at {tmp_path}/home/sjc_runs/{name}/report.html"


def test_quickstart_runs_the_tests_as_ci_does(quickstart):
    _, commands = quickstart("--tests")
    assert commands == [
        "python3 -m venv .venv",
        "python -m pip install -q -r requirements.txt -r requirements-dev.txt",
        "python -m ruff check",
        "python -m ruff format --check",
        "python -m mypy",
        "python -m pytest -n auto --dist loadfile",
    ]
    assert (
        "bash quickstart.sh --tests\n" in README and "bash quickstart.sh --tests" in (ROOT / ".ci" / "run").read_text()
    )
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [f"python{hook['entry'].removeprefix('.venv/bin/python')}" for hook in local["hooks"]] == commands[2:]


def requirements(name):
    """{package: versions} of a file of requirements."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return dict(re.fullmatch(r"([\w-]+)((?:>=|==)[\d.]+)", line).groups() for line in lines)


def test_constraints_name_a_version_of_every_requirement():
    wanted, exact = (
        requirements("requirements.txt") | requirements("requirements-dev.txt"),
        requirements("constraints.txt"),
    )
    assert wanted.keys() == exact.keys()
    for name, versions in wanted.items():
        least, version = ([int(n) for n in v[2:].split(".")] for v in (versions, exact[name]))
        assert exact[name][:2] == "==" and version >= least and (versions[:2] == ">=" or version == least), name
