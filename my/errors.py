"""How a command ends: a person's mistake is one line on stderr, a bug is a traceback."""

import contextlib
import errno
import itertools
import os
import reprlib
import signal
import sys
import threading
from pathlib import Path

STORAGE_HINTS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "your disk quota is used up; free some space",
    errno.EACCES: "permission denied; work in a folder that you may read and write",
    errno.EROFS: "this file system is read-only; work in a folder that you may write",
    errno.EEXIST: "a file has the name of a folder that is to be written; move it away",
    errno.ENOTDIR: "a file has the name of a folder that is to be written; move it away",
    errno.EISDIR: "a folder has the name of a file that is to be written; move it away",
}


SHOWN = 100  # characters that a message quotes of a text out of a file
LONGEST = 2000  # characters of a whole message, for when all else failed
FIRST = 3  # of several names, how many a message quotes


class Stop(Exception):
    """Ends a command in one line on stderr, the message, and an exit status. Raise one of its two kinds."""

    status: int

    def __init__(self, message: object) -> None:
        super().__init__(as_message(message))


class UserError(Stop):
    """A mistake in the options or in a given file, which the person at the keyboard can put right: status 2."""

    status = 2


class RunError(Stop):
    """A failure while the command runs, such as of the disk, of a damaged checkpoint or of the device: status 1."""

    status = 1


def explain(error, go_on):
    """The (message, exit status) that a person should see, or None where `error` is a bug.

    go_on: how the command goes on after it was stopped, such as "continue with --resume True".
    """
    if isinstance(error, Stop):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return f"stopped; {go_on}", 130
    if is_out_of_memory(error):
        return "out of memory; use a smaller grid, image or batch, or a larger device", 1
    if isinstance(error, OSError) and error.errno in STORAGE_HINTS:
        name = error.filename2 or error.filename  # the second is where it was to be moved to
        where = f"{name}: " if name else ""
        return f"{where}{STORAGE_HINTS[error.errno]}, then {go_on}", 1
    return None


def is_out_of_memory(error):
    """Whether memory ran out, on a GPU or on the CPU, where torch says so in words only."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    return (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        or isinstance(error, RuntimeError)
        and any(w in str(error) for w in words)
    )


def run_main(main, argv=None, go_on=lambda: "start it again"):
    """Call `main(argv)` and end the process in one line and an exit status if a person must act.

    `argv` defaults to the words after the program's name, `go_on()` is as in `explain`; exceptions
    that are bugs pass through.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # else PyTorch's idle threads spin 5 ms on cores that others need
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")  # s; in a file every refresh of a bar is a line
    try:
        with stopping_imports(go_on):
            main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error, go_on())
        if explained is None:
            raise
        message, status = explained
        say(message)
        sys.exit(status)


def say(message):
    """Print a message as one line on stderr, behind the name of the program."""
    print(f"{Path(sys.argv[0]).name}: {as_message(message)}", file=sys.stderr, flush=True)


def note(message):
    """Print as one line on stderr what a person should know, and need not act on."""
    print(f"note: {as_message(message)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- words for people


def one_line(text):
    """Return a text on one line: white space is single spaces, and what is not printable (escapes) is spelled out."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in " ".join(str(text).split())
    )


def as_message(text):
    """Return a text on one line, of some LONGEST characters: it begins with what was given, and ends in advice."""
    return cut(one_line(cut(str(text))))


def cut(text, most=LONGEST):
    """Return a text with its middle left out where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[len(text) - most // 2 :]}"


class Brief(reprlib.Repr):
    """What `repr` gives, in time that does not depend on how much is inside."""

    def repr_int(self, n, level):
        """A number's digits take more than linear time, and Python refuses to write many."""
        return repr(n) if n.bit_length() <= 4 * SHOWN else f"a number of {n.bit_length()} bits"

    def repr_dict(self, values, level):
        """The library would sort all the keys."""
        return super().repr_dict(dict(itertools.islice(values.items(), self.maxdict + 1)), level)


def shown(value, most=SHOWN):
    """Return what a file says as it may stand in a message: on one line, cut after `most` characters."""
    text = one_line(value[: 4 * most] if isinstance(value, str) else Brief().repr(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def some(names, first=FIRST):
    """Return the first few of some names, as they may stand in a message."""
    names = list(names)
    return ", ".join(map(shown, names[:first])) + ", ..." * (len(names) > first)


def first_line(error):
    """Return the first line of what a library says was wrong, as it may stand in a message."""
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__, 3 * SHOWN)


@contextlib.contextmanager
def stopping_imports(go_on):
    """While the block runs, let Ctrl-C inside an import end the process there: what is half imported makes anything
    of a KeyboardInterrupt, from nothing at all to an abort in C++."""

    def stop(number, frame):
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                message, status = explain(KeyboardInterrupt(), go_on())
                say(message)
                os._exit(status)
            frame = frame.f_back
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # not one that is to be ignored
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def no_stderr():
    """Drop what native libraries write to stderr while the block runs."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
