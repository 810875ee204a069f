"""Signals that ask a command to end: it ends where it is, or, inside a training, once the running step is done."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")  # schedulers send the middle four
ASKING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # no system has all
ENDED = 128  # plus the number of a signal: the exit status of a command that it ended, as shells have it


class Stopped(BaseException):
    """Ends a command that a signal asked to end; `saved` says what is saved. No handler of errors takes it for one."""

    def __init__(self, number: int, saved: str = "") -> None:
        super().__init__(name_of(number))
        self.number, self.saved = number, saved

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return ENDED + self.number


class Heed:
    """Which signal has `asked` the block of `gently` to end, None until one does; whether the block `waits` with it."""

    asked: int | None = None
    waits = False


_blocks: list[Heed] = []  # of `gently`, the innermost last


@contextlib.contextmanager
def gently() -> Iterator[Heed]:
    """While the block runs and its Heed `waits`, a signal only sets `asked`. A second one ends the process at once.

    This holds inside `stopping`. It goes on behind a block that ends in an exception: what is to be done then, such as
    to save and to say what happened, is not cut short.
    """
    heed = Heed()
    _blocks.append(heed)
    yield heed
    _blocks.remove(heed)


@contextlib.contextmanager
def stopping(say: Callable[[str], object], go_on: Callable[[], str]) -> Iterator[None]:
    """While the block runs, have a signal of ASKING raise Stopped, or KeyboardInterrupt for Ctrl-C.

    Inside an import it ends the process: a half imported library may do anything with an exception, from nothing at
    all to an abort in C++. `say` then says so, with what `go_on` returns. A signal that whoever started the command
    had other plans with, such as to ignore it, is left alone.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        heed = _blocks[-1] if _blocks and _blocks[-1].waits else None
        if heed and heed.asked is None:
            heed.asked = number
            return
        if heed or is_importing(frame):
            why = f"stopped by a second signal, {name_of(number)}: ended at once" if heed else named(number)
            if heed:  # the bar of a training stands on the line
                print(file=sys.stderr)
            say(f"{why}; {go_on()}")
            os._exit(ENDED + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    _blocks.clear()
    own = (signal.SIG_DFL, signal.default_int_handler)
    taken: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        taken = {number: signal.getsignal(number) for number in ASKING if signal.getsignal(number) in own}
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # one of `own`


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """While the block runs, have a signal end the process as systems do, without a word: nothing is to be saved.

    A library that waits in C returns to no handler of Python for as long as it waits.
    """
    before = {number: signal.getsignal(number) for number in ASKING}
    ours = {number: handler for number, handler in before.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a frame is inside an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def named(number: int) -> str:
    """Return in words that a signal stopped a command."""
    return "stopped" if number == signal.SIGINT else f"stopped by {name_of(number)}"


def name_of(number: int) -> str:
    """Return the name of a signal, as people know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def who_stopped(error: BaseException) -> str:
    """Return the name of the signal that an exception stands for, "" where it stands for none."""
    if isinstance(error, KeyboardInterrupt):
        return name_of(signal.SIGINT)
    return str(error) if isinstance(error, Stopped) else ""
