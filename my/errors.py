"""How a command ends: a person's mistake is one line on stderr, a bug is a traceback."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import itertools
import os
import reprlib
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from my.signals import Stopped, named, stopping
from my.streams import Lasting, lasting

STORAGE_HINTS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space",
    errno.EACCES: "permission denied; give yourself the right to read and to write it, or work in another folder",
    errno.EROFS: "this file system is read-only; work in a folder that you may write",
    errno.EEXIST: "a file has the name of a folder that is to be written; move it away",
    errno.ENOTDIR: "a file has the name of a folder that is to be written; move it away",
    errno.ENAMETOOLONG: "this name is longer than the system allows; give a shorter one",
    errno.EFBIG: "this file is larger than the system allows; raise the limit (ulimit -f), or use another disk",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n), or end other programs",
    errno.EISDIR: "a folder has the name of a file that is to be written; move it away",
} | {
    getattr(errno, name): hint
    for name, hint in {  # no system has all
        "EIO": "the disk gave an error; look after it, or use another disk",
        "ESTALE": "this network folder is no longer what it was; mount it again",
        "ENOTCONN": "this network folder is not connected; mount it again",
        "ENODEV": "the disk is no longer there; connect it again",
        "ENXIO": "the disk is no longer there; connect it again",
        "EUCLEAN": "this file system is damaged; have it repaired, or use another disk",
        "ENFILE": "the system has too many files open; end other programs",
        "ELOOP": "links lead in a ring; give the file or folder itself",
        "ENOTEMPTY": "a folder that is not empty has this name; move it away",
        "EPERM": "the system does not permit that; work in a folder that you may read and write",
        "EBUSY": "the system or another program uses it; close that one",
    }.items()
    if hasattr(errno, name)
}
OPEN_ELSEWHERE = (32, 33)  # errors of Windows, which has the errno of denied permission for them


SHOWN = 100  # characters that a message quotes of a text out of a file
LONGEST = 2000  # characters of a whole message, for when all else failed
FIRST = 3  # of several names, how many a message quotes
HEARD_S = 10.0  # for the first of several processes to say what all would: torchrun ends all when one has ended
_unheard: deque[str] = deque(maxlen=100)  # notes that were said while nobody took them down
_hearers: list[Callable[[str], object]] = []  # who takes notes down: the last


class Stop(Exception):
    """Ends a command in one line on stderr, the message, and an exit status. Raise one of its two kinds."""

    status: int
    alike = False  # whether all processes of a run end so: then one of them says it

    def __init__(self, message: object) -> None:
        super().__init__(as_message(message))


class UserError(Stop):
    """A mistake in the options or in a given file, which the person at the keyboard can put right: status 2."""

    status = 2
    alike = True


class RunError(Stop):
    """A failure while the command runs, such as of the disk, of a damaged checkpoint or of the device: status 1."""

    status = 1


def explain(error: BaseException, go_on: str) -> tuple[str, int] | None:
    """Return the (message, exit status) that a person should see, or None where `error` is a bug.

    go_on: how the command goes on after it was stopped, such as "continue with --resume True".
    """
    if isinstance(error, Stop):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        error = Stopped(signal.SIGINT)
    if isinstance(error, Stopped):
        return f"{named(error.number)}{': ' * bool(error.saved)}{error.saved}; {go_on}", error.status
    if is_out_of_memory(error):
        return "out of memory; use a smaller grid, image or batch, or a larger device", 1
    if isinstance(error, OSError) and error.errno in STORAGE_HINTS:
        name = error.filename2 or error.filename  # the second is where it was to be moved to
        where = f"{as_message(name)}: " if name else ""
        shared = getattr(error, "winerror", None) in OPEN_ELSEWHERE
        hint = "another program has it open; close that one" if shared else STORAGE_HINTS[error.errno]
        return f"{where}{hint}, then {go_on}", 1
    if isinstance(error, FileNotFoundError) and not here():
        return "the folder that the command works in was deleted or moved; nothing more can be written to it", 1
    return None


def here() -> bool:
    """Whether the current folder is still there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, where torch says so in words only."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "MPS backend out")
    return (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        or isinstance(error, RuntimeError)
        and any(w in str(error) for w in words)
    )


def run_main(
    main: Callable[[list[str]], object],
    argv: list[str] | None = None,
    go_on: Callable[[], str] = lambda: "start it again",
    several: bool = False,
    prints: bool = False,
) -> None:
    """Call `main(argv)`, and end the process in one line and an exit status where `explain` has words for its error.

    argv: None is the words of the command line.  go_on: returns how the command goes on, as in `explain`.
    several: whether the command can run as several processes, which torchrun starts. What all of them would say, the
    first on each machine says, and the others wait HEARD_S for it before they end.
    prints: whether what it prints is all that it makes. Then the status is 1 where nobody took that, as it is for
    --help. Any other command goes on without a stdout or a stderr that takes no more.
    An exception that is a bug passes through. Where `main` is of the file that Python was started with, the process
    ends with it: from then on signals are ignored, since all is written and said.
    """
    gc.set_threshold(10_000)  # objects; else a fifth of the seconds of the imports goes into looking for garbage
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # else PyTorch's idle threads spin 5 ms on cores that others need
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file on Windows takes few letters, and a prompt may have any
        sys.stdout.reconfigure(errors="backslashreplace")
    whole = getattr(main, "__module__", "") == "__main__"
    with lasting(note) as out, stopping(say, go_on, whole) as ignore_signals:
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_MININTERVAL", "30")  # s; in a file every refresh of a bar is a line
        try:
            with quiet_unless_first():
                if not several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    raise UserError(
                        "torchrun has started several processes, and this command is one; start it with python"
                    )
                main(sys.argv[1:] if argv is None else argv)
            end_unread(out, prints)
            ignore_signals()
        except SystemExit as ended:
            end_unread(out, not ended.code)  # of --help and --version
            raise
        except (Exception, KeyboardInterrupt, Stopped) as error:
            explained = explain(error, go_on())
            if explained is None:
                raise
            if is_first():  # the others wait until they are told to end
                ignore_signals()
            end(error, *explained)


def end_unread(out: Lasting, wanted: bool) -> None:
    """Hand on what was printed; end the process with status 1 where it was `wanted`, and nobody took all of it."""
    out.flush()
    if wanted and out.lost:
        sys.exit(1)


def end(error: BaseException, message: str, status: int) -> NoReturn:
    """End the process with a status; of several that end alike, the first on each machine says the message."""
    if is_first() or not getattr(error, "alike", not isinstance(error, Exception)):
        say(message)
    elif isinstance(error, Stop):
        with contextlib.suppress(KeyboardInterrupt, Stopped):  # torchrun tells the others to end once one has ended
            time.sleep(HEARD_S)
    sys.exit(status)


def is_first() -> bool:
    """Whether this process is the first that torchrun has started on this machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """While the block runs, drop what processes other than the first would print on stdout."""
    if is_first():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def say(message: object) -> None:
    """Print a message as one line on stderr, behind the name of the program."""
    print(f"{Path(sys.argv[0]).name}: {as_message(message)}", file=sys.stderr, flush=True)


def note(message: object) -> None:
    """Print as one line on stderr what a person should know, but need not act on. One of several processes does it."""
    if is_first():
        print(f"note: {as_message(message)}", file=sys.stderr, flush=True)
        hear(as_message(message))


def hear(text: str) -> None:
    """Let whoever takes notes down hear one, now, or once there is somebody."""
    (_hearers[-1] if _hearers else _unheard.append)(text)


@contextlib.contextmanager
def heard_by(hearer: Callable[[str], object]) -> Iterator[None]:
    """While the block runs, call `hearer` with each note; first with those that nobody has heard before."""
    while _unheard:
        hearer(_unheard.popleft())
    _hearers.append(hearer)
    try:
        yield
    finally:
        _hearers.remove(hearer)


# ---------------------------------------------------------------- words for people


def one_line(text: object) -> str:
    """Return a text on one line: white space is single spaces, and what is not printable (escapes) is spelled out."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in " ".join(str(text).split())
    )


def as_message(text: object) -> str:
    """Return a text on one line, of some LONGEST characters: it begins with what was given, and ends in advice."""
    return cut(one_line(cut(str(text))))


def cut(text: str, most: int = LONGEST) -> str:
    """Return a text with its middle left out where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


class Brief(reprlib.Repr):
    """What `repr` gives, in time that does not depend on how much is inside."""

    def repr_int(self, n: int, level: int) -> str:
        """Write a long number as its bits: its digits take more than linear time, and Python refuses to write many."""
        return repr(n) if n.bit_length() <= 4 * SHOWN else f"a number of {n.bit_length()} bits"

    def repr_dict(self, values: dict[Any, Any], level: int) -> str:
        """Write the first few entries: the library would sort all the keys."""
        return super().repr_dict(dict(itertools.islice(values.items(), self.maxdict + 1)), level)


def shown(value: object, most: int = SHOWN) -> str:
    """Return what a file says as it may stand in a message: on one line, cut after `most` characters."""
    text = one_line(value[: 4 * most] if isinstance(value, str) else Brief().repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def some(names: Iterable[object], first: int = FIRST) -> str:
    """Return the `first` few of some names, as they may stand in a message."""
    names = list(names)
    return ", ".join(map(shown, names[:first])) + ", ..." * (len(names) > first)


def first_line(error: object) -> str:
    """Return the first line of what a library says was wrong, as it may stand in a message."""
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__, 3 * SHOWN)


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Drop what native libraries write to stderr while the block runs."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is none, as in a process without a console
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
