"""Renaming, syncing and locks, also where a system refuses them."""

import ast
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from my import file_system, run_dir
from my.errors import UserError
from my.file_system import Lock, expanded, is_locked, real

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(file_system, "WAITS_S", (0.0,) * 3)


def refusing(function, times, error):
    """`function`, that raises `error` the first few times."""
    left = iter([error] * times)

    def refused(*args, **kw):
        for each in left:
            raise each
        return function(*args, **kw)

    return refused


# ---------------------------------------------------------------- paths that a person gives


def test_paths_that_a_person_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    os.symlink("ring", "ring")
    os.symlink("there", "link")
    assert expanded("~/x") == tmp_path / "home" / "x" and expanded("~nosuchuser/x") == Path("~nosuchuser/x")
    root = Path(os.path.realpath(tmp_path))
    found = {text: real(text) for text in ("~nosuchuser/x", "link/a/..", "ring")}
    assert found == {"~nosuchuser/x": root / "~nosuchuser" / "x", "link/a/..": root / "there", "ring": root / "ring"}


def test_no_path_is_expanded_by_what_raises():
    """`Path.expanduser` does, for the home of a user that nobody knows."""
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] != ".venv":
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Attribute) and node.attr == "expanduser":
                    assert ast.unparse(node.value) == "os.path", f"{path}:{node.lineno}"


# ---------------------------------------------------------------- renaming and syncing


@pytest.mark.parametrize("times", [3, 4])
def test_what_is_refused_is_tried_again_a_few_times(tmp_path, monkeypatch, times):
    """As Windows does while another program reads the file or one in the folder."""
    refused = PermissionError(errno.EACCES, "in use")
    for name in ("file", "folder/file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(os, "replace", refusing(os.replace, times, refused))
    monkeypatch.setattr(file_system.shutil, "rmtree", refusing(file_system.shutil.rmtree, times, refused))
    jobs = [(file_system.move, tmp_path / "file", tmp_path / "new"), (file_system.delete_folder, tmp_path / "folder")]
    for job, *args in jobs:
        if times > len(file_system.WAITS_S):
            with pytest.raises(PermissionError):
                job(*args)
        else:
            job(*args)
    assert (sorted(os.listdir(tmp_path)) == ["new"]) == (times == 3)


def test_another_error_is_not_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system.time, "sleep", lambda _: pytest.fail("it waits"))
    with pytest.raises(FileNotFoundError):
        file_system.move(tmp_path / "no", tmp_path / "new")


def test_a_folder_is_synced_where_that_can_be_done(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    file_system.sync_folder(tmp_path)
    assert len(synced) == 1
    monkeypatch.setattr(os, "fsync", refusing(synced.append, 1, OSError(errno.EINVAL, "Invalid argument")))
    file_system.sync_folder(tmp_path)  # as FUSE has it
    monkeypatch.setattr(os, "open", refusing(os.open, 1, PermissionError(errno.EACCES, "Permission denied")))
    file_system.sync_folder(tmp_path)  # as Windows has it
    assert len(synced) == 1


def test_real_errors_of_a_disk_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("1")
    monkeypatch.setattr(os, "fsync", refusing(os.fsync, 2, OSError(errno.EIO, "Input/output error")))
    for sync, path in [(file_system.sync_folder, tmp_path), (file_system.sync_file, tmp_path / "file")]:
        with pytest.raises(OSError, match="Input/output error"):
            sync(path)


# ---------------------------------------------------------------- locks


def test_a_lock_is_held_by_one_and_leaves_no_file(tmp_path):
    path = tmp_path / ".lock"
    first, second = Lock(path), Lock(path)
    assert is_locked(path) is False and first.acquire(0) is True
    assert is_locked(path) is True and second.acquire(0) is False
    second.release()
    assert is_locked(path) is True  # who has not got it gives nothing back
    first.release()
    assert is_locked(path) is False and os.listdir(tmp_path) == []
    assert second.acquire(0) is True
    second.release()


def test_who_waits_gets_the_lock_of_the_file_that_is_there(tmp_path):
    """The first deletes the file that the second has opened. A third must not get a lock beside the second's."""
    path = tmp_path / ".lock"
    first, second, got = Lock(path), Lock(path), []
    assert first.acquire(0)
    thread = threading.Thread(target=lambda: got.append(second.acquire(30)))
    thread.start()
    time.sleep(0.05)
    first.release()
    thread.join()
    assert got == [True] and path.exists() and Lock(path).acquire(0) is False
    second.release()


def test_a_lock_of_a_deleted_file_is_none(tmp_path, monkeypatch):
    """Between its opening and its locking the file is deleted, and another process makes a new one."""
    path, lock = tmp_path / ".lock", Lock(tmp_path / ".lock")
    locked, other = file_system.locked, []

    def later(handle):
        if not other:
            path.unlink()
            other.append(os.open(path, os.O_RDWR | os.O_CREAT))
            assert locked(other[0])
        return locked(handle)

    monkeypatch.setattr(file_system, "locked", later)
    assert lock.acquire(0) is False and lock.handle is None
    os.close(other[0])
    assert lock.acquire(0) is True
    lock.release()


HOLD = """import sys, time
sys.path.insert(0, {root!r})
from my import run_dir
with run_dir.alone():
    print(1, flush=True)
    time.sleep(60)"""


def test_what_a_killed_process_leaves_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(root=str(ROOT))], stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"1" and run_dir.is_held(".") is True
    with pytest.raises(UserError, match="another process is at work"), run_dir.alone():
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    assert os.listdir() == [run_dir.LOCK] and run_dir.is_held(".") is False
    with run_dir.alone():
        assert run_dir.is_held(".") is True
    assert os.listdir() == []


def test_a_look_makes_nothing_and_stops_no_run(tmp_path, monkeypatch):
    """Another process looks at that moment: it holds the lock, and lets it go before the next try."""
    monkeypatch.chdir(tmp_path)
    assert run_dir.is_held(tmp_path) is False and os.listdir() == []
    looks = []

    def end(seconds):
        if looks and seconds:
            os.close(looks.pop())

    monkeypatch.setattr(file_system.time, "sleep", end)

    def look():
        path = tmp_path / run_dir.LOCK
        path.touch()  # of a killed process
        looks.append(os.open(path, os.O_RDONLY))
        assert file_system.locked(looks[0])

    look()
    with run_dir.alone():
        assert not looks
    look()
    assert run_dir.is_held(".") is False and not looks


@pytest.mark.parametrize("broken", [errno.ENOSYS, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks_lets_a_run_begin(tmp_path, monkeypatch, broken):
    monkeypatch.chdir(tmp_path)

    def refuse(handle, blocking):
        raise OSError(broken, "no locks")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    with run_dir.alone(), run_dir.alone():
        assert run_dir.is_held(".") is None
    assert os.listdir() == []


def test_a_folder_that_nobody_may_write_to_is_looked_at(tmp_path, monkeypatch):
    """Another person's run, and a disk that is mounted to be read."""
    path = tmp_path / ".lock"
    lock = Lock(path)
    assert lock.acquire(0)
    for number in file_system.NOT_TO_WRITE:

        def read_only(name, flags, *mode, number=number, open=os.open):
            if flags & (os.O_RDWR | os.O_CREAT):
                raise OSError(number, os.strerror(number), str(name))
            return open(name, flags, *mode)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", read_only)
            assert is_locked(path) is True and Lock(path).acquire(0) is False
            assert Lock(tmp_path / "none").acquire(0) is None  # nothing can be written: that is told later
    lock.release()
