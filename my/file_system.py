"""What systems do differently with files: to rename what is open, to make names durable, to lock."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

WAITS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # between tries of what a system refuses
NOT_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what fsync says of a folder where there is no such thing
NOT_TO_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)

T = TypeVar("T")


def patiently(act: Callable[..., T], *args: object) -> T:
    """Return `act(*args)`. It is called again after each of WAITS_S while it raises PermissionError.

    Windows refuses to rename or to delete what another program has open, such as a viewer or a scanner of viruses.
    """
    for wait in WAITS_S:
        try:
            return act(*args)
        except PermissionError:
            time.sleep(wait)
    return act(*args)


def move(path: str | Path, to: str | Path) -> None:
    """Rename a file, or a folder, patiently. A file takes the place of a file; there must be no folder `to`."""
    patiently(os.replace, path, to)


def delete_folder(folder: str | Path) -> None:
    """Delete a folder and all in it, patiently."""
    patiently(shutil.rmtree, folder)


def sync_file(path: str | Path) -> None:
    """Make the content of a file durable."""
    with open(path, "rb+") as file:  # Windows does this only for who may write
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable, where the system can do that. Windows cannot open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OF_FOLDERS:
            raise
    finally:
        os.close(handle)


def error_of(number: int, path: str | Path) -> OSError:
    """Return the exception for the number of an error that a library had from the system."""
    if sys.platform == "win32":
        import ctypes

        return OSError(None, ctypes.FormatError(number), str(path), number)
    return OSError(number, os.strerror(number), str(path))


# ---------------------------------------------------------------- paths that a person gives


def expanded(text: str | Path) -> Path:
    """Return the path that a text means, where ~ is a home folder. There need not be such a file.

    The ~ of a user that nobody knows stays: it begins a name, where `Path.expanduser` raises RuntimeError.
    """
    return Path(os.path.expanduser(text))


def real(text: str | Path) -> Path:
    """Return the absolute path of a text, without links. `Path.resolve` raises RuntimeError for a ring of them."""
    return Path(os.path.realpath(expanded(text)))


# ---------------------------------------------------------------- locks


class Lock:
    """The lock of a file, which one process holds at a time. The hold ends with the process, however that ends.

    path: of the file, absolute. Whoever has held the lock deletes the file. One that a killed process has left is taken
    as if it were new.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle: int | None = None

    def acquire(self, wait_s: float) -> bool | None:
        """Take the lock, and return whether that was possible within `wait_s` seconds.

        None: there are no locks here, since the file system has none, or since no file can be made.
        """
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self.handle = opened(self.path, os.O_CREAT)
            except OSError:
                return None
            got = locked(self.handle)
            if got and not self._is_named():  # who held it before has deleted it in the meantime
                self._close()
                continue
            if got or got is None:
                return got
            self._close()
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)

    def release(self) -> None:
        """Give the lock back."""
        if self.handle is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)  # before another process can take it
        self._close()
        if sys.platform == "win32":  # which deletes no file that is open here or elsewhere: nobody else's is lost
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def _is_named(self) -> bool:
        """Whether the open file is the one at the path. On Windows it is, since what is open cannot be deleted."""
        if sys.platform == "win32" or self.handle is None:
            return True
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
        self.handle = None


LOOK_S = 0.01  # between looks at a lock
LOOKS = 5  # a lock that is held at each of these is not held by another who only looks


def is_locked(path: str | Path) -> bool | None:
    """Whether a process holds the lock of a file, this one or another; None where there are no locks.

    Nothing is made or deleted. The lock is held for an instant, which `Lock.acquire` waits for.
    """
    try:
        handle = opened(path)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        for look in range(LOOKS):
            time.sleep(LOOK_S * (look > 0))
            got = locked(handle)
            if got is not False:
                return None if got is None else False
        return True
    finally:
        os.close(handle)  # which ends the hold


def opened(path: str | Path, flags: int = 0) -> int:
    """Return a handle of the file of a lock. Who may not write opens it to read: most file systems lock that too."""
    try:
        return os.open(path, os.O_RDWR | flags)
    except OSError as error:
        if error.errno not in NOT_TO_WRITE:
            raise
        return os.open(path, os.O_RDONLY)


def locked(handle: int) -> bool | None:
    """Lock an open file, and return whether no other has it; None where there are no locks."""
    from filelock import lock_descriptor

    try:
        return lock_descriptor(handle, blocking=False)
    except OSError:
        return None
