"""A command goes on without a stdout or a stderr that takes no more; where its words were all, its status says so."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from my.errors import note, run_main
from my.streams import Lasting, lasting

ROOT = Path(__file__).resolve().parent.parent
TOY = """
import sys
from pathlib import Path
from tqdm import tqdm
from my.errors import UserError, no_stderr, note, run_main

def main(argv):
    print("begun", flush=True)
    for i in tqdm(range(3), mininterval=0):
        note(f"step {i}")
        print(i, flush=True)
    with no_stderr():
        sys.stdout.writelines(["a", "b"])
    Path("made").write_text("whole")
    if "help" in argv:
        sys.exit(0)
    if "wrong" in argv:
        raise UserError("wrong")
    print("x" * 100_000)

run_main(main, prints="prints" in sys.argv)
"""


def started(folder, *words, out=subprocess.PIPE, err=subprocess.PIPE, closed=()):
    """Run the toy with such streams, and without those of some numbers; return how it ended."""
    (folder / "toy.py").write_text(TOY)
    close = "".join(f" {number}>&-" for number in closed)
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" toy.py "$@"{close}', sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        text=True,
        timeout=100,
    )
    assert (folder / "made").read_text() == "whole"
    return done


def closed_pipe():
    """The end to write to of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def gone_terminal():
    """A terminal whose window was closed."""
    master, slave = pty.openpty()
    os.close(master)
    return slave


def full_disk():
    """A file on a disk that is full."""
    return os.open("/dev/full", os.O_WRONLY)


ENDS = {"pipe": (closed_pipe, ""), "terminal": (gone_terminal, "Input/output error"), "disk": (full_disk, "No space")}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("words", [(), ("help",), ("prints",), ("wrong",)], ids=" ".join)
def test_a_stream_that_ends_before_the_command(end, words, tmp_path):
    """Alone or with the other one. The status is that of the work, unless the words were all that was asked for."""
    opened, why = ENDS[end]
    if end == "disk" and not Path("/dev/full").exists():
        pytest.skip("no disk is full here")
    alone = 2 if "wrong" in words else 0
    lost = 1 if {"help", "prints"} & {*words} else alone
    stream = opened()
    try:
        both = started(tmp_path, *words, out=stream, err=stream)
        without_out = started(tmp_path, *words, out=stream)
        without_err = started(tmp_path, *words, err=stream)
    finally:
        os.close(stream)
    assert both.returncode == without_out.returncode == lost
    assert without_err.returncode == alone and without_err.stdout.startswith("begun\n0\n1\n2\nab")
    assert "Traceback" not in without_out.stderr and "Exception ignored" not in without_out.stderr
    assert [f"note: step {i}" in without_out.stderr for i in range(3)] == [True] * 3
    told = [line for line in without_out.stderr.splitlines() if "takes no more" in line]
    assert len(told) == bool(why) and all(f"stdout takes no more ({why}" in line for line in told)


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_a_stream_that_was_never_there(closed, tmp_path):
    """As behind 2>&-, and in a process without a console."""
    done = started(tmp_path, closed=closed)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert started(tmp_path, "wrong", closed=closed).returncode == 2


def test_the_streams_are_as_before_behind_the_block(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    before = sys.stdout
    with lasting(note) as out:
        assert sys.stdout is out and out.encoding == before.encoding and not out.lost
        print("taken", end="")
        print("dropped", file=sys.stderr)
        note("dropped too")
    assert sys.stdout is before and sys.stderr is None and capsys.readouterr().out == "taken"


def test_what_is_lost_is_told_once():
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = None

        def fileno(self):
            raise OSError("no file")

    told = []
    stream = Lasting(Full(), "stdout", told.append)
    assert stream.write("four") == 4 and stream.lost
    stream.writelines(["a", "b"])
    stream.flush()
    assert told == ["stdout takes no more (No space left on device); the command goes on without it"]


def test_a_broken_pipe_of_something_else_is_no_reader_that_has_seen_enough():
    with pytest.raises(BrokenPipeError):
        run_main(lambda argv: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")), [])
