"""The code's own rules, read from its syntax: imports point one way, and nothing executes what it reads."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"run_sjc", "highres_final_vis", "evaluate", "run_nerf", "run_img_sampling", "run_2d_sjc", "doctor"}
METHOD = {"sjc", "sjc_config", "nerf_config", "sampling", "sampling_config", "canvas", "canvas_config"}
DOMAIN = {"karras", "pose", "voxnerf", "toyworld", "sd", "pixel_folder", "gddpm"}  # and adapt*
MY, DOMAIN_RANK, METHOD_RANK, SCRIPT_RANK, TOOL_RANK = range(5)


def sources():
    """{path relative to the root: syntax tree} of every Python file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {Path(p): ast.parse((ROOT / p).read_text(), p) for p in listed if (ROOT / p).exists()}


SOURCES = sources()
PROJECT = {path.parts[0].removesuffix(".py") for path in SOURCES}


def rank(room):
    """Which floor a module or package at the root is on; None for a third-party one."""
    if room not in PROJECT:
        return None
    if room in DOMAIN or room == "adapt" or room.startswith("adapt_"):
        return DOMAIN_RANK
    return {"my": MY, **dict.fromkeys(METHOD, METHOD_RANK), **dict.fromkeys(SCRIPTS, SCRIPT_RANK)}.get(room, TOOL_RANK)


def imports(path):
    """The root modules and packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if node.level == 0 else path.parts[0])
    return found


def calls(path, name):
    """The lines of a file that call `name` or use it as an attribute, such as "eval" or "torch.load"."""
    return [
        node.lineno
        for node in ast.walk(SOURCES[path])
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) == name
    ]


CODE = [path for path in SOURCES if path.parts[0] != "tests"]


def test_the_rooms_are_found():
    rooms = {path.parts[0].removesuffix(".py") for path in CODE}
    assert {
        "run_sjc",
        "highres_final_vis",
        "sjc",
        "sjc_config",
        "adapt",
        "adapt_ideal",
        "adapt_sd",
        "karras",
        "pose",
        "voxnerf",
        "toyworld",
        "training",
        "my",
    } <= rooms


@pytest.mark.parametrize("path", CODE, ids=str)
def test_imports_point_one_way(path):
    room = path.parts[0].removesuffix(".py")
    here = rank(room)
    for other in imports(path) - {room}:
        there = rank(other)
        if there is None:
            continue
        assert there <= here, f"{path} imports {other}"
        assert there < here or here != SCRIPT_RANK, f"the script {path} imports the script {other}"
        assert other != "tests"


def test_my_imports_nothing_of_the_project():
    for path in CODE:
        if path.parts[0] == "my":
            assert imports(path) & PROJECT <= {"my"}, path


def test_karras_knows_no_family():
    assert not imports(Path("karras.py")) & PROJECT
    assert "adapt" not in (ROOT / "karras.py").read_text()


def test_only_make_adapter_knows_the_families():
    """Nothing but a family's own tests imports its module."""
    for path in CODE:
        assert not {m for m in imports(path) if m.startswith("adapt_")} - {path.stem}, path


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_executes_what_it_reads(path):
    writes = path == Path("tests/crafted.py")  # the files that the readers are tried on
    for name in ("exec", "torch.load", "yaml.unsafe_load", "pickle.load", "pickle.Unpickler"):
        assert not calls(path, name), f"{path} uses {name}"
    for name in ("eval", "torch.save", "pickle.loads"):  # pickle.loads and eval are named there, inside an attack
        assert not calls(path, name) or writes or (name == "torch.save" and path.parts[0] == "tests"), f"{path}: {name}"
    assert writes or not imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}


@pytest.mark.parametrize("path", CODE, ids=str)
def test_no_isinstance_on_a_family(path):
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            assert "Adapter" not in ast.unparse(node), f"{path}:{node.lineno}"
