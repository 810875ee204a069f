"""A few hundred random command lines, configurations and files, always the same; `python tests/fuzz.py` tries more."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
from my.errors import UserError

N = {"folder": 25}  # cases of a kind; of others OTHERS
OTHERS = 60


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_each_is_taken_or_refused_in_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = []

    @settings(
        max_examples=N.get(kind, OTHERS),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def case(data):
        ends.append(fuzz.KINDS[kind](data))

    case()
    assert "refused" in ends and len(ends) >= N.get(kind, OTHERS)


@pytest.mark.parametrize("at", range(len(fuzz.PATH_OPTIONS) + len(fuzz.PATH_WORDS)))
def test_no_command_takes_a_path_of_nobody_for_a_bug(at, tmp_path, monkeypatch):
    """A home of a user that nobody knows, a character that no name has, a ring of links."""
    monkeypatch.chdir(tmp_path)
    fuzz.odd_files()
    ends = [fuzz.outcome(lambda path=path: fuzz.take_path(at, path)) for path in ("~nosuchuser/x", "a\0b", "ring")]
    assert ends[1] == "refused" and (set(ends) == {"refused"} or fuzz.PATH_OPTIONS[at][0] == "run_nerf")


def test_what_would_be_executed_is_noticed(tmp_path):
    """Each payload makes the file where it is executed, and what reads it here does not execute it."""
    ways = {
        "biting archive": lambda path: torch.load(path, weights_only=False),
        "biting stream": lambda path: torch.load(path, weights_only=False),
        "biting yaml": lambda path: yaml.unsafe_load(path.read_text()),
    }
    for kind, execute in ways.items():
        name, content, reads = fuzz.sound()[kind]
        (tmp_path / name).write_bytes(content)
        assert fuzz.outcome(lambda reads=reads, name=name: reads(tmp_path / name)) == (
            "refused" if kind == "biting yaml" else "taken"
        )
        with pytest.raises(fuzz.Fault, match="what it was given was executed"):
            fuzz.outcome(lambda execute=execute, name=name: execute(tmp_path / name))
    texts = [text for text in fuzz.NASTY if fuzz.BITE in text and "python" not in text]
    assert len(texts) == 3
    for text in texts:
        with pytest.raises(fuzz.Fault, match="what it was given was executed"):
            fuzz.outcome(lambda text=text: subprocess.run(f": {text}", shell=True))
    assert not os.path.exists(fuzz.EXECUTED)


def test_what_is_neither_is_noticed():
    """A bug of a command, a message of two lines, and another exit status."""
    with pytest.raises(KeyError):
        fuzz.outcome(lambda: {}["a bug"])
    with pytest.raises(fuzz.Fault, match="status 3"):
        fuzz.outcome(lambda: sys.exit(3))

    class TwoLines(UserError):
        def __str__(self):
            return "one\ntwo"

    def raising():
        raise TwoLines("")

    with pytest.raises(fuzz.Fault, match="status 2"):
        fuzz.outcome(raising)
    assert fuzz.outcome(lambda: sys.exit(0)) == fuzz.outcome(lambda: None) == "taken"
