"""What the pages say of the tree is true of it: paths that they name, and names in files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = sorted({path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"} | {"training"})
WORD = re.compile(r"(?<![\w./~*{-])(?:~/sjc/)?((?:\.\./)?[\w.-]+(?:/[\w.-]+)*/?)")
LINKED = re.compile(r"\[`[^`\]]+`\]\(([^)]+\.py)\):[^|;\[]*?`(\w+)`")


def paths_in(text):
    """The paths of the project that a text names: all that begin with a room, and Python files of the root.

    NAME stands for a name, and what ends in ~/sjc/ is the project's folder.
    """
    words = {word.rstrip(".") for word in WORD.findall(text)}
    rooms = {word for word in words if "/" in word and word.split("/")[0] in ROOMS and "NAME" not in word}
    return rooms | {word for word in words if "/" not in word and word.endswith(".py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_pages_name_are_there(page):
    text = re.sub(r"\[[^\]]*\]\([^)]*\)", "", page.read_text())  # another test follows links
    names = {path.name for room in ROOMS for path in (ROOT / room).rglob("*.py")}  # such as options.py of each family
    missing = {path for path in paths_in(text) if not (ROOT / path).exists() and path not in names}
    assert not missing


def test_paths_are_told_from_other_words():
    text = "`my/config/`, python ~/sjc/doctor.py, `families/NAME/x.py`, unet/config.json, and voxnerf/field.py."
    assert paths_in(text) == {"my/config/", "doctor.py", "voxnerf/field.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_pages_find_in_files_are_there(page):
    for link, name in LINKED.findall(page.read_text()):
        text = (page.parent / link).read_text()
        assert re.search(rf"^\s*(def |class )?{name}\b", text, re.MULTILINE), f"{name} in {link}"


def test_the_questions_of_a_newcomer_have_a_place():
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = {name for _, name in LINKED.findall(text)}
    assert {"chained_gradient", "emptiness_loss", "test_emptiness_by_hand", "karras_sigmas", "fuse"} <= found
    assert "tests/toy_family" in text and "families/family.py" in text
