"""Files that claim too much: each is refused in a line, or read, with work and memory linear in its bytes."""

import contextlib
import functools
import signal
import sys
import tracemalloc

import pytest

import hostile
from my.errors import UserError
from my.plain_files import read_json, read_yaml
from my.tensor_file import TensorFile

N = 30_000  # bytes that a file has, or is patched out of
MORE_WORK, MORE_MEMORY = 8, 12  # times those of a sound file of equal size
SMALL = 300_000  # bytes of memory, and a hundredth as many calls, that no file is too small for
READERS = {"archive": TensorFile, "stream": TensorFile, "safetensors": TensorFile, "json": read_json,
           "yaml": read_yaml}


@contextlib.contextmanager
def no_hang(seconds=60):
    """Fail where the block is still running after a minute."""
    def stop(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read, path):
    """The words of what refuses a file, or None where it is read."""
    try:
        read(path)
    except (UserError, ValueError) as error:
        return str(error)
    return None


def memory_of(read, path):
    """(words, most bytes that are allocated at a time) of reading a file; what is mapped does not count."""
    tracemalloc.start()
    try:
        words = outcome(read, path)
        return words, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def work_of(read, path):
    """The number of calls, of Python's functions and of C's, that reading a file takes."""
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        outcome(read, path)
    finally:
        sys.setprofile(None)
    return calls


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A function that gives (bytes, memory, work) per file of a kind of sound file: that of at least `size` bytes."""
    @functools.cache
    def measured(like):
        path = tmp_path_factory.mktemp("sound") / "a"
        path.write_bytes(hostile.SOUND[like](N))
        words, memory = memory_of(READERS[like], path)
        assert words is None
        return path.stat().st_size, memory, work_of(READERS[like], path)
    return measured


def test_there_are_at_least_forty_kinds():
    assert len(hostile.KINDS) >= 40


@pytest.mark.parametrize("name", hostile.KINDS)
def test_a_file_takes_what_its_bytes_take(name, tmp_path, sound):
    content, like, reads, times = hostile.KINDS[name]
    path = tmp_path / "a.ckpt"
    path.write_bytes(content(times * N))
    with no_hang():
        words, memory = memory_of(READERS[like], path)
        work = work_of(READERS[like], path)
    size, sound_memory, sound_work = sound(like)
    times = path.stat().st_size / size
    assert (words is None) == reads, words
    assert memory <= MORE_MEMORY * times * sound_memory + SMALL
    assert work <= MORE_WORK * times * sound_work + SMALL / 100
    if words:
        words = words.replace(str(path), "")
        assert words.isprintable() and len(words) <= 300
