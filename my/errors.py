"""How a command ends: a person's mistake is one line on stderr, a bug is a traceback."""

import errno
import sys
from pathlib import Path

STORAGE_HINTS = {
    errno.ENOSPC: "the disk is full; free some space, then continue with --resume True",
    errno.EDQUOT: "your disk quota is used up; free some space, then continue with --resume True",
    errno.EACCES: "permission denied; work in a folder that you may read and write",
    errno.EROFS: "this file system is read-only; work in a folder that you may write",
}


class UserError(Exception):
    """A mistake the person at the keyboard can put right; the message says how."""

    status = 2


class RunError(UserError):
    """A failure at run time (disk, damaged file, device) rather than of the command line."""

    status = 1


def explain(error):
    """The (message, exit status) that a person should see, or None where `error` is a bug."""
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "stopped; continue with --resume True", 130
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return "out of memory; use a smaller grid, image or batch, or a larger device", 1
    if isinstance(error, OSError) and error.errno in STORAGE_HINTS:
        where = f"{error.filename}: " if error.filename else ""
        return where + STORAGE_HINTS[error.errno], 1
    return None


def run_main(main, argv=None):
    """Call `main(argv)` and end the process in one line and an exit status if a person must act.

    `argv` defaults to the words after the program's name; exceptions that are bugs pass through.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error)
        if explained is None:
            raise
        message, status = explained
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(status)
