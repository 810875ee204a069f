"""Signals that ask a command to end: outside of a training at once, with a line that says how to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from my.signals import ASKING

ROOT = Path(__file__).parent.parent
TOY = """
import os, signal, sys
from my import signals
from my.errors import run_main

def main(argv):
    number = int(argv[0])
    if "twice" in argv:
        with signals.gently() as heed:
            heed.waits = True
            os.kill(os.getpid(), number)
            print("went on", flush=True)
            print("half of a bar", end="", flush=True, file=sys.stderr)
            assert heed.asked == number
            os.kill(os.getpid(), number)
    try:
        os.kill(os.getpid(), number)
    except Exception:
        print("swallowed")
    finally:
        print("cleaned up", flush=True)
    print("not reached")

run_main(main, go_on=lambda: "start it again")
"""


def run(tmp_path, *words, **options):
    (tmp_path / "toy.py").write_text(TOY)
    return subprocess.run(
        [sys.executable, tmp_path / "toy.py", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        restore_signals=True,
        **options,
    )


def plans_of_nobody():
    for number in ASKING:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)


@pytest.mark.parametrize("number", ASKING)
def test_outside_of_a_training_a_command_ends_at_once_in_one_line(tmp_path, number):
    done = run(tmp_path, int(number), preexec_fn=plans_of_nobody)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert done.stderr == f"toy.py: stopped{by}; start it again\n"
    assert (done.returncode, done.stdout) == (128 + number, "cleaned up\n")


def test_a_second_signal_ends_a_training_at_once(tmp_path):
    done = run(tmp_path, int(signal.SIGTERM), "twice", preexec_fn=plans_of_nobody)
    told = done.stderr.splitlines()
    assert told == ["half of a bar", "toy.py: stopped by a second signal, SIGTERM: ended at once; start it again"]
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "went on\n")


def test_a_signal_that_is_to_be_ignored_is_ignored(tmp_path):
    """As nohup has it for SIGHUP."""
    done = run(tmp_path, int(signal.SIGHUP), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "cleaned up\nnot reached\n")
