"""Signals that ask a command to end: outside of a training at once, with a line that says how to go on."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from my import signals
from my.signals import ASKING, Stopped, gently, stopping

ROOT = Path(__file__).parent.parent
TOY = """
import os, signal, sys
from my import signals
from my.errors import RunError, run_main

def main(argv):
    number = int(argv[0])
    signals.ECHO_S = 0.0
    if "broken" in argv:
        try:
            with signals.gently() as heed:
                heed.waits = True
                raise ValueError
        except ValueError:
            pass
    if "ending" in argv:
        try:
            with signals.gently() as heed:
                heed.waits = True
                raise RunError("it is broken")
        finally:
            for _ in range(1 + ("twice" in argv)):
                os.kill(os.getpid(), number)
            print("cleaned up", flush=True)
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
        if "again" in argv:
            os.kill(os.getpid(), signal.SIGINT)
        print("cleaned up", flush=True)
    print("not reached")

run_main(main, go_on=lambda: "start it again")
"""


def run(tmp_path, *words, toy=TOY, **options):
    (tmp_path / "toy.py").write_text(toy)
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


def test_a_second_signal_ends_a_command_wherever_it_is(tmp_path):
    """As in what is done about the first one."""
    done = run(tmp_path, int(signal.SIGTERM), "again", preexec_fn=plans_of_nobody)
    assert done.stderr == "\ntoy.py: stopped by a second signal, Ctrl-C: ended at once; start it again\n"
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")


def test_what_waits_for_a_block_does_not_outlive_it(tmp_path):
    done = run(tmp_path, int(signal.SIGTERM), "broken", preexec_fn=plans_of_nobody)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "cleaned up\n")


def test_a_command_that_ends_for_another_reason_says_that(tmp_path):
    """Though a signal comes on the way. Torchrun sends one where another process has ended, which is the reason."""
    done = run(tmp_path, int(signal.SIGTERM), "ending", preexec_fn=plans_of_nobody)
    assert (done.returncode, done.stdout, done.stderr) == (1, "cleaned up\n", "toy.py: it is broken\n")
    done = run(tmp_path, int(signal.SIGTERM), "ending", "twice", preexec_fn=plans_of_nobody)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "") and "by a second signal" in done.stderr


def test_a_signal_to_what_prints_does_not_keep_a_second_one_from_ending_it(monkeypatch):
    """The library for files raises an exception where a handler prints in the midst of what it has interrupted."""

    def reentrant(_):
        raise RuntimeError("reentrant call")

    def ended(status):
        raise SystemExit(status)

    before = {number: signal.getsignal(number) for number in ASKING}
    plans_of_nobody()
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    monkeypatch.setattr(os, "_exit", ended)
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)), stopping(reentrant, str):
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    "number, later, ends", [(signal.SIGTERM, 0.9, False), (signal.SIGTERM, 1.1, True), (signal.SIGINT, 0.1, True)]
)
def test_an_echo_of_a_signal_does_not_count(monkeypatch, number, later, ends):
    """Schedulers send one to torchrun and to its processes, and torchrun passes it on. A person types Ctrl-C twice."""

    def ended(status):
        raise SystemExit(status)

    before = {each: signal.getsignal(each) for each in ASKING}
    plans_of_nobody()
    now = iter([100.0, 100.0 + later])
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(os, "_exit", ended)
    try:
        with contextlib.suppress(SystemExit), stopping(lambda _: None, str), gently() as heed:
            heed.waits = True
            signal.raise_signal(signal.SIGTERM)
            assert heed.asked == signal.SIGTERM
            signal.raise_signal(number)
            assert not ends and heed.asked == signal.SIGTERM
            ends = True
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ends


def test_inside_an_import_a_training_waits_as_elsewhere(monkeypatch):
    """Only an exception would be wrong there. A training that has ended for a reason of its own says that one."""
    before = {each: signal.getsignal(each) for each in ASKING}
    plans_of_nobody()
    monkeypatch.setattr(signals, "is_importing", lambda frame: True)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail("ended at once"))
    try:
        with stopping(lambda _: None, str):
            try:
                with gently() as heed:
                    heed.waits = True
                    signal.raise_signal(signal.SIGTERM)
                    assert heed.asked == signal.SIGTERM
                    raise ValueError
            except ValueError:
                monkeypatch.setattr(signals, "ECHO_S", 1e9)
                signal.raise_signal(signal.SIGTERM)
        with stopping(lambda _: None, str):
            try:
                with gently() as heed:
                    heed.waits = True
                    raise ValueError
            except ValueError:
                signal.raise_signal(signal.SIGTERM)  # the first: what is done about the exception goes on
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


AT_THE_END = """
import atexit, os, signal, sys
from my.errors import run_main

def main(argv):
    print("done")
    if "refused" in argv:
        sys.exit(2)

atexit.register(lambda: os.write(1, b"at the end"))
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
run_main(main, go_on=lambda: "start it again")
"""


BEFORE_THE_END = """
import os, signal
from my.errors import run_main
from my.run_dir import Heartbeat

def main(argv):
    with Heartbeat("heartbeat.json", 1) as heartbeat:
        heartbeat.beat(1)
    for _ in range(2):
        os.kill(os.getpid(), getattr(signal, argv[0]))
    print("done")

run_main(main, go_on=lambda: "start it again")
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_to_a_training_that_is_done_changes_nothing(tmp_path, number):
    """Its heartbeat says so, and it is about to do so itself."""
    done = run(tmp_path, number, toy=BEFORE_THE_END, preexec_fn=plans_of_nobody)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "done\n")


@pytest.mark.parametrize("argv, status", [((), 0), (("refused",), 2)])
def test_a_signal_to_a_command_that_is_done_changes_nothing(tmp_path, argv, status):
    """What it has printed is on its way by then."""
    done = run(tmp_path, *argv, toy=AT_THE_END, preexec_fn=plans_of_nobody)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout == "done\nat the end"


def test_a_signal_that_is_to_be_ignored_is_ignored(tmp_path):
    """As nohup has it for SIGHUP."""
    done = run(tmp_path, int(signal.SIGHUP), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "cleaned up\nnot reached\n")
