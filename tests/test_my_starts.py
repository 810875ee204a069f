"""What a run records of its commands: whole lines, also after a kill; a damaged line costs itself only."""

import json
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from my import errors, machine, starts
from my.errors import RunError, UserError, note
from my.signals import Stopped
from my.starts import FILE, Start, read, recorded


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty current folder below an empty home; nobody has said anything yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    errors._unheard.clear()
    return tmp_path


def rows():
    return [json.loads(line) for line in Path(FILE).read_text().splitlines()]


def test_a_command_from_its_start_to_its_end(here, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: seen.append(str(message)))
    note("before")
    with starts.heard_warnings(), recorded(command="run_toy.py --lr 1", seed=3):
        note(f"found {here}/models/x.ckpt")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old\noption", stacklevel=1)
        starts.use()
    note("after")
    assert [row["kind"] for row in rows()] == ["start", "note", "note", "note", "use", "end"]
    ((start,), damaged) = read(here)
    assert damaged == 0 and (start.facts["command"], start.facts["seed"]) == ("run_toy.py --lr 1", 3)
    assert start.notes == ["before", "found ~/models/x.ckpt", "UserWarning: old option"]
    assert seen == ["old\noption"]  # it is still shown
    assert start.ended == "done" and start.last["memory"] > 1e6 and 0 <= start.seconds < 60
    assert "note: before" in capsys.readouterr().err and str(here) not in Path(FILE).read_text()


def test_other_versions_than_a_run_began_with_are_told_once(capsys):
    own = {"version": "1", "torch": "2.3", "warp": "1.9", "python": "3.11"}
    starts.tell_other_versions(own)  # nothing is recorded
    for at, torch in enumerate(("2.3", "2.4")):
        starts.add("start", versions={**own, "torch": torch, "warp": "1.9"} if at else {**own, "python": "3.10"})
    starts.tell_other_versions(own)
    assert capsys.readouterr().err == ""
    starts.tell_other_versions({**own, "version": "2", "torch": "2.4"})
    assert capsys.readouterr().err == (
        "note: the run began with this project 1, torch 2.3, and goes on with this project 2, torch 2.4: its numbers "
        "may change from here on\n"
    )
    Path(FILE).write_text('{"kind": "start", "versions": {"torch": "2.3"}}\n')  # of before that had a version
    starts.tell_other_versions(own)
    Path(FILE).write_text('{"kind": "start", "versions": "none"}\n')
    starts.tell_other_versions(own)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error, how",
    [
        (KeyboardInterrupt(), "stopped by Ctrl-C"),
        (Stopped(signal.SIGTERM), "stopped by SIGTERM"),
        (UserError("--lr: too large"), "--lr: too large"),
        (RunError("two\nlines"), "two lines"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_how_a_command_ended(here, error, how):
    with pytest.raises(type(error)), recorded(command="run_toy.py"):
        raise error
    assert read(here)[0][0].ended == how
    note("nobody hears it now")
    assert len(rows()) == 2


def test_a_kill_leaves_the_start_and_a_half_line_stays_alone(here):
    starts.add("start", command="first")
    with open(FILE, "a") as file:
        file.write('{"kind": "note", "te')  # the power went
    with recorded(command="second"):
        pass
    ((first, second), damaged) = read(here)
    assert damaged == 1 and (first.ended, first.seconds, second.ended) == ("", None, "done")
    assert (first.facts["command"], second.facts["command"]) == ("first", "second")


@pytest.mark.parametrize(
    "line",
    [
        b"not JSON",
        b"[1]",
        b"3",
        b"{}",
        b'{"kind": "other"}',
        b'{"kind": ["start"]}',
        b'{"kind": "note"}',
        b"\xff\xfe",
        b'{"kind": "note", "kind": "note", "text": ""}',
        b"[" * 100_000,
    ],
)
def test_damaged_lines_cost_themselves_only(here, line):
    with recorded(command="a"):
        pass
    Path(FILE).write_bytes(Path(FILE).read_bytes().replace(b"\n", b"\n" + line + b"\n", 1))
    ((start,), damaged) = read(here)
    assert damaged == 1 and start.ended == "done"


def test_what_follows_a_damaged_start_belongs_to_none(here):
    Path(FILE).write_text('{"kind": "sta\n{"kind": "note", "text": "whose?"}\n')
    assert read(here) == ([], 2)


def test_no_file_and_no_such_file(here, monkeypatch):
    assert read(here) == ([], 0)
    monkeypatch.setattr("my.plain_files.MAX_JSON", 3)
    Path(FILE).write_text("{}\n\n")
    with pytest.raises(UserError, match="starts.json: has more than 3 bytes; move it away"):
        read(here)


def test_seconds_by_hand():
    start = Start({"at": "2026-01-01T00:00:00.500+00:00"}, [], {"at": "2026-01-01T00:01:02.000+00:00"})
    assert start.seconds == 61.5
    for at in ("yesterday", 3, None, "2026-01-01T00:01:02"):
        assert start._replace(last={"at": at}).seconds is None


def test_notes_have_an_end(here, monkeypatch):
    monkeypatch.setattr(starts, "MOST_NOTES", 3)
    with recorded(command="a"):
        for i in range(5):
            note(i)
    assert read(here)[0][0].notes == ["0", "1", "2"]


def test_a_note_that_cannot_be_recorded_is_printed(here, capsys, monkeypatch):
    with recorded(command="a"), monkeypatch.context() as patch:
        patch.setattr(starts, "add", lambda *args, **facts: (_ for _ in ()).throw(OSError(28, "full")))
        note("still said")
    assert "note: still said" in capsys.readouterr().err and read(here)[0][0].notes == []


def test_paths_below_home_do_not_say_whose_they_are(here):
    assert starts.without_home(f"--sd.lora {here}/a.safetensors:0.5") == "--sd.lora ~/a.safetensors:0.5"
    assert starts.without_home(f"{here}2/a") == f"{here}2/a"


def test_the_machine(tmp_path, monkeypatch):
    cpu = SimpleNamespace(type="cpu")
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "CPU_INFO", info)
    assert machine.device_name(cpu)
    info.write_text("processor\t: 0\nmodel name\t: Toy CPU: 3 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    assert machine.device_name(cpu) == "Toy CPU: 3 GHz"
    assert 1e6 < machine.peak_memory()["memory"] < 1e13
