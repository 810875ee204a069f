"""The code's own rules, read from its syntax: imports point one way, and nothing executes what it reads."""

import ast
import subprocess
from pathlib import Path

import pytest

import families

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "run_sjc",
    "highres_final_vis",
    "export_mesh",
    "evaluate",
    "run_nerf",
    "run_img_sampling",
    "run_2d_sjc",
    "doctor",
    "run_sweep",
    "view",
    "report",
    "replay",
    "reproduce",
}
METHOD = {
    "asset",
    "retrieval",
    "rules",
    "film",
    "mesh",
    "sjc",
    "sampling",
    "canvas",
    "sweep",
    "viewer",
    "pages",
    "rerun",
}
DOMAIN = {"karras", "pose", "voxnerf", "toyworld", "families", "adapt"}
MY_RANK, DOMAIN_RANK, OPTIONS_RANK, METHOD_RANK, SCRIPT_RANK, TOOL_RANK = range(6)
FAMILIES = families.NAMES


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
    ranks = {"my": MY_RANK, "options": OPTIONS_RANK, **dict.fromkeys(DOMAIN, DOMAIN_RANK)}
    ranks |= {**dict.fromkeys(METHOD, METHOD_RANK), **dict.fromkeys(SCRIPTS, SCRIPT_RANK)}
    return ranks.get(room, TOOL_RANK)


def modules(path):
    """The dotted names of the modules that a file imports when it runs, anywhere in it."""
    found, nodes = set(), [SOURCES[path]]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, path
            if node.level:  # within its own package
                continue
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        nodes += ast.iter_child_nodes(node)
    return found


def imports(path):
    """The root modules and packages that a file imports when it runs."""
    return {module.partition(".")[0] for module in modules(path)}


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
    assert {*SCRIPTS, *METHOD, *DOMAIN, "options", "my"} <= rooms


def test_the_root_is_a_table_of_contents():
    assert len([path for path in CODE if len(path.parts) == 1]) <= 21


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


def room_of_family(path):
    """The family that a file belongs to, or None."""
    return path.parts[1] if path.parts[0] == "families" and path.parts[1] in FAMILIES else None


@pytest.mark.parametrize("path", CODE, ids=str)
def test_only_the_registry_knows_the_families(path):
    """Nothing else imports a family's room, compares with a family's name, or lists the names."""
    for module in modules(path):
        room, _, rest = module.partition(".")
        if room == "families" and rest.partition(".")[0] in FAMILIES:
            assert rest.partition(".")[0] == room_of_family(path), f"{path} imports {module}"
    if path.parts[0] in ("families", "benchmarks"):  # benchmarks name presets
        return
    kinds = (ast.Compare, ast.Dict, ast.List, ast.Set, ast.Tuple, ast.MatchValue)
    for node in (node for node in ast.walk(SOURCES[path]) if isinstance(node, kinds)):
        named = {n.value for n in ast.iter_child_nodes(node) if isinstance(n, ast.Constant)} & set(FAMILIES)
        assert not named, f"{path}:{node.lineno} names the family {named.pop()}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_nothing_executes_what_it_reads(path):
    writes = path == Path("tests/crafted.py")  # the files that the readers are tried on
    proves = path == Path("tests/test_fuzz.py")  # that its payloads, which are its own, would be noticed
    for name in ("exec", "torch.load", "yaml.unsafe_load", "pickle.load", "pickle.Unpickler"):
        assert not calls(path, name) or proves, f"{path} uses {name}"
    for name in ("eval", "torch.save", "pickle.loads"):  # pickle.loads and eval are named there, inside an attack
        assert not calls(path, name) or writes or (name == "torch.save" and path.parts[0] == "tests"), f"{path}: {name}"
    assert writes or not imports(path) & {"pickle", "dill", "cloudpickle", "joblib"}


@pytest.mark.parametrize("path", CODE, ids=str)
def test_no_isinstance_on_a_family(path):
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            assert "Adapter" not in ast.unparse(node), f"{path}:{node.lineno}"
