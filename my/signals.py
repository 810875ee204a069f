"""Signals that ask a command to end: it ends where it is, or, inside a training, once the running step is done."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")  # schedulers send the middle four
ASKING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # no system has all
ENDED = 128  # plus the number of a signal: the exit status of a command that it ended, as shells have it
ECHO_S = 1.0  # after the first signal, in which another one that no person typed is its echo
IN_ORDER = "_in_order"  # attribute of an exception that has ended a block of `gently`: whether the block waited


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
_done = threading.Event()  # whether the command in `stopping` is done


@contextlib.contextmanager
def gently() -> Iterator[Heed]:
    """While the block runs and its Heed `waits`, a signal only sets `asked`. This holds inside `stopping`.

    Where the block ends in an exception, what is done about that is not cut short, such as to say what happened: as
    long as this exception is handled, a signal raises no other.
    """
    heed = Heed()
    _blocks.append(heed)
    try:
        yield heed
    except BaseException as error:
        vars(error)[IN_ORDER] = heed.waits
        raise
    finally:
        _blocks.remove(heed)


def is_ending() -> bool:
    """Whether an exception is handled that has ended a block of `gently` which waited."""
    error = sys.exc_info()[1]
    while error is not None:
        if vars(error).get(IN_ORDER):
            return True
        error = error.__context__
    return False


def command_is_done() -> None:
    """Have no signal change anything any more: what the command makes is whole, and it is about to say so."""
    _done.set()


@contextlib.contextmanager
def stopping(
    say: Callable[[str], object], go_on: Callable[[], str], whole: bool = False
) -> Iterator[Callable[[], None]]:
    """While the block runs, have a signal of ASKING raise Stopped, or KeyboardInterrupt for Ctrl-C.

    Inside an import it ends the process: a half imported library may do anything with an exception, from nothing at
    all to an abort in C++. A second signal ends the process too, wherever it is. `say` then says so, with what `go_on`
    returns. But one that comes within ECHO_S, and is no Ctrl-C, is an echo: schedulers send a signal to torchrun and to
    its processes, and torchrun passes it on. A signal that whoever started the command had other plans with, such as to
    ignore it, is left alone.

    Yields what has signals ignored, for when the command is done, and only its end is left. Where the block is the
    `whole` process, they then stay ignored: what Python does at its end would otherwise make another exit status of
    one. Else they are behind the block what they were before it.
    """
    came: list[float] = []  # when, s

    def stop(number: int, frame: FrameType | None) -> None:
        if _done.is_set():
            return
        came.append(time.monotonic())
        second = len(came) > 1
        if second and number != signal.SIGINT and came[-1] - came[0] < ECHO_S:
            return
        if second:
            end_at_once(number, second, say, go_on)
        if _blocks and _blocks[-1].waits:
            _blocks[-1].asked = number
            return
        if is_ending():
            return
        if is_importing(frame):
            end_at_once(number, second, say, go_on)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    def ignore() -> None:
        for number in taken:
            signal.signal(number, signal.SIG_IGN)

    _blocks.clear()
    _done.clear()
    taken = plans_of_nobody()
    for number in taken:
        signal.signal(number, stop)
    done = False
    try:
        yield ignore
        done = True
    except SystemExit:
        done = True
        raise
    finally:
        for number, before in taken.items():
            signal.signal(number, signal.SIG_IGN if whole and done else before)  # type: ignore[arg-type]  # one of `own`


def end_at_once(number: int, second: bool, say: Callable[[str], object], go_on: Callable[[], str]) -> NoReturn:
    """End the process for a signal, the first or a second one, in the line that `say` gets."""
    why = f"stopped by a second signal, {name_of(number)}: ended at once" if second else named(number)
    try:
        if second:  # the bar of a training may stand on the line
            print(file=sys.stderr)
        say(f"{why}; {go_on()}")
    finally:  # whatever the signal has interrupted, such as another line
        os._exit(ENDED + number)


def plans_of_nobody() -> dict[int, object]:
    """Return {signal: its handler} of the signals of ASKING with which Python does what it does by itself.

    There is none for a thread beside the main one, which cannot have handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    own = (signal.SIG_DFL, signal.default_int_handler)
    return {number: signal.getsignal(number) for number in ASKING if signal.getsignal(number) in own}


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
