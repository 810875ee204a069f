"""Files that claim too much: each is refused in a line, or read, with work and memory linear in its bytes."""

import contextlib
import functools
import io
import os
import signal
import sys
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

import crafted
import doctor
import hostile
from my import config, unpickled
from my.errors import UserError, note, run_main, shown
from my.plain_files import read_json, read_yaml
from my.tensor_file import TensorFile

N = 15_000  # bytes that a file has, or is patched out of
MORE_WORK, MORE_MEMORY = 8, 12  # times those of a sound file of equal size
SMALL = 300_000  # bytes of memory, and a hundredth as many calls, that no file is too small for
READERS = {"archive": TensorFile, "stream": TensorFile, "safetensors": TensorFile, "json": read_json, "yaml": read_yaml}


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


# ---------------------------------------------------------------- why each is refused

OVER, SHAPE, HEADER = "over and over", "a shape or stride that is not up to 64 whole numbers", "header cannot be read: "
ARCHIVE, STREAM = "not a whole PyTorch archive", "its storages do not fit its tensors"
WHY = {
    "a shape of one enormous integer": SHAPE,
    "an enormous integer as shape and stride": SHAPE,
    "a list as shape over and over": OVER,
    "a shape of 64 dimensions over and over": OVER,
    "a shape of many dimensions": SHAPE,
    "an array of many dimensions": SHAPE,
    "states of arrays over and over": OVER,
    "no elements of enormous rows": "2.63 elements or more",
    "a tensor that repeats one element": "has more elements than the 4",
    "one storage under many names": OVER,
    "a storage of an enormous number of elements": "a tensor without a storage",
    "pairs made into dicts over and over": OVER,
    "texts as pairs": "not made of pairs",
    "arguments over and over": "what are no arguments",
    "one dict in many places": OVER,
    "a long name before many tensors": OVER,
    "a name of many characters": "15000 characters, more than 1000",
    "a storage with a long name": "a tensor without a storage",
    "a place in the memo that is empty": "more is taken from its memo",
    "a compressed pickle": ARCHIVE,
    "members of one name": ARCHIVE,
    "a compressed storage": "no plain data of storage 0",
    "storages that overlap": "its data overlap",
    "a storage named over and over": STREAM,
    "keys that are no texts": STREAM,
    "pairs over and over in a stream": OVER,
    "a header of lists in lists": HEADER + "too deep",
    "a header longer than the file": "longer than the file",
    "a name that is given twice": HEADER + "w is given twice",
    "one shape of many dimensions": SHAPE,
    "one enormous dimension": SHAPE,
    "dimensions that are no numbers": SHAPE,
    "a shape that is a text": SHAPE,
    "no elements of enormous rows in a header": SHAPE,
    "more elements than can be counted": "offsets that do not fit",
    "tensors that overlap": "overlap",
    "offsets below zero": "offsets that do not fit",
    "offsets that are no numbers": "offsets that do not fit",
    "offsets beyond the file": "ends at byte",
    "metadata that are no texts": "metadata are not texts",
    "yaml of merges that double": "merge keys",
    "yaml of lists in lists": "more than 32 brackets",
    "yaml with a number in base 60": "a number of",
    "yaml with a float in base 60": "a number of",
    "json with a key twice": "0 is given twice",
    "yaml with a key twice": "option0 is given twice",
}


@pytest.mark.parametrize("name", WHY)
def test_it_is_refused_for_what_it_claims(name, tmp_path):
    content, like, *_ = hostile.KINDS[name]
    (tmp_path / "a").write_bytes(content(N))
    with pytest.raises((UserError, ValueError), match=WHY[name]):
        READERS[like](tmp_path / "a")


@pytest.mark.parametrize("read", READERS.values())
def test_what_is_no_file_is_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path, words in (
        (tmp_path / "fifo", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        (tmp_path, "is a directory"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "absent", "no such file"),
        ("a\0b", "null"),
    ):
        with no_hang(5), pytest.raises((UserError, ValueError, OSError)) as caught:
            read(path)
        assert words in str(caught.value).lower()


# ---------------------------------------------------------------- what is sound is read as before


def test_a_training_with_thousands_of_states(tmp_path):
    """Lightning's checkpoint of a whole Stable Diffusion by the number of its tensors, and an optimizer's states."""
    step = torch.zeros(2, 2)
    states = [
        {
            "state": {i: {"step": i, "exp_avg": step[:1], "exp_avg_sq": step[1:]} for i in range(1500)},
            "param_groups": [{"lr": 1e-4, "params": list(range(1500))}],
        }
    ]
    tensors = {f"model.diffusion_model.blocks.{i}.weight": torch.full((2, 1), float(i)) for i in range(1145)}
    torch.save({"state_dict": tensors, "optimizer_states": states, "loops": {"seed": 2**100}}, tmp_path / "a.ckpt")
    file = TensorFile(tmp_path / "a.ckpt")
    assert file.shapes == dict.fromkeys(tensors, (2, 1))
    assert file.tensor("model.diffusion_model.blocks.1144.weight").tolist() == [[1144.0], [1144.0]]


def test_a_dict_of_pairs_as_python_2_wrote_it():
    pairs = b"](" + b"".join(b"](" + hostile.text(f"{i}") + hostile.integer(i) + b"e" for i in range(99)) + b"e"
    made = hostile.call(hostile.ORDERED, pairs) + hostile.put(0)
    assert (
        unpickled.read(io.BytesIO(b"\x80\x02(" + made + hostile.get(0) + b"t."), "it")[0]
        == ({f"{i}": i for i in range(99)},) * 2
    )


@pytest.mark.parametrize("stream", [False, True])
def test_tied_weights_are_one_tensor_under_several_names(tmp_path, stream):
    base = torch.arange(6.0).reshape(2, 3)
    crafted.save_ckpt({f"{i}": base.t() if i % 2 else base for i in range(12)}, tmp_path / "a", stream)
    file = TensorFile(tmp_path / "a")
    assert torch.equal(file.tensor("10"), base) and torch.equal(file.tensor("11"), base.t())


def test_one_dict_under_two_names(tmp_path):
    tensors = {"w": torch.ones(2), "b": torch.zeros(2)}
    torch.save({"model": tensors, "ema": tensors}, tmp_path / "a")
    assert list(TensorFile(tmp_path / "a").shapes) == ["model.w", "model.b", "ema.w", "ema.b"]


def test_an_archive_without_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.serialization.get_crc32_options", lambda: False)
    torch.save({"w": torch.ones(2)}, tmp_path / "a")
    assert {member.CRC for member in hostile.zipfile.ZipFile(tmp_path / "a").infolist()} == {0}
    assert TensorFile(tmp_path / "a").tensor("w").tolist() == [1, 1]


def test_strides_of_what_lies_in_a_row():
    for shape in ((), (4,), (2, 3, 4), (5, 0, 2)):
        assert unpickled.contiguous(shape) == torch.empty(shape).stride() or 0 in shape
    assert unpickled.contiguous((2, 3, 4)) == (12, 4, 1) and unpickled.contiguous(()) == ()


def test_whole_numbers_without_sign_and_types_that_are_not_read(tmp_path):
    save_file({"n": torch.tensor([2**16 - 1], dtype=torch.uint16)}, tmp_path / "a")
    assert TensorFile(tmp_path / "a").quantised(["n"]) == ["n"]
    (tmp_path / "b").write_bytes(hostile.safetensors({"w": hostile.plain(dtype="F4\x1b")}))
    with pytest.raises(UserError, match=r"w has numbers of the type F4.x1b, which is not read; use a file of float32"):
        TensorFile(tmp_path / "b")


def test_a_zip_archive_of_other_things(tmp_path):
    with hostile.zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("model.safetensors", b"x")
    with pytest.raises(UserError, match="a zip archive, but none that PyTorch wrote; unpack it"):
        TensorFile(tmp_path / "a.ckpt")


def test_enormous_integers_are_inert():
    for value, kept in ((2**127 - 1, True), (2**128, False), (1 << 10**6, False)):
        read = unpickled.read(io.BytesIO(b"\x80\x02" + hostile.integer(value) + b"."), "it")[0]
        assert read == (value if kept else unpickled.LARGE)


# ---------------------------------------------------------------- what a person sees


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("flag", ["sd.checkpoint", "sd.lora", "gddpm.checkpoint"])
@pytest.mark.parametrize(
    "name",
    [
        "names with terminal escapes",
        "a header with names of terminal escapes",
        "a name of many characters",
        "the name of a class of many characters",
    ],
)
def test_every_line_is_printable_and_short(name, flag, home, capsys):
    path = home / "a.ckpt"
    path.write_bytes(hostile.KINDS[name].content(10**5))
    family = {"sd.lora": ["--preset", "mini"], "gddpm.checkpoint": ["--family", "gddpm"]}.get(flag, [])
    with pytest.raises(SystemExit) as ended:
        run_main(doctor.main, ["--device", "cpu", *family, f"--{flag}", str(path)])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.count("\n") == 1 and "MISSING" in out
    for line in (out + err).splitlines():
        line = line.replace(str(path), "").replace(str(doctor.ROOT), "").replace(str(home), "")
        assert line.isprintable() and len(line) <= 320, line


def test_a_message_has_an_end(capsys):
    message = str(UserError("a" * 10**7 + "; get another"))
    assert len(message) < 2100 and message.startswith("aaa") and message.endswith("aaa; get another")
    assert len(str(UserError("\x1b" * 10**6))) < 2100
    note("b" * 10**7)
    assert len(capsys.readouterr().err) < 2100


def test_what_is_inside_a_quoted_value_is_cut_too():
    assert shown([1 << 10**6]) == "[a number of 1000001 bits]" and shown({"a": 1}) == "{'a': 1}"
    laughs = "x"
    for _ in range(60):
        laughs = [laughs, laughs]
    assert len(shown(laughs)) <= 100 and len(shown(dict.fromkeys(range(10**5)))) <= 100


class Options(config.Config):
    n: int = 1
    names: list[str] = []


@pytest.mark.parametrize(
    "text, words",
    [
        ("n: &a [x]", "n: expected an integer, got ['x']"),
        ("n: [1", "broken YAML at line 1"),
        ("n: 2001-99-99", "broken YAML: month must be"),
        ("n: 1" + ":1" * 10**5, "a number of 200001 characters"),
        ("0x" + "f" * 90 + ": 1", "no such option"),
        ("? " + "a" * 10**5 + "\n: 1", "no such option"),
        ("names: '" + "[" * 400 + "'", "names: expected a list"),
        ("n: " + "'x" * 10**5 + "'", "is damaged|n: expected"),
        ("<<: {n: 1}", "merge keys (<<) are not read; write the values out"),
        ("n" * 300_000, "more than 250000"),
        ("b: " + "[" * 20 + "]" * 20, "no such option"),
        ("n: \x1b", "is damaged"),
        (
            "\n".join(f"n{i}: &n{i} [*n{i - 1}, *n{i - 1}]" if i else "n0: &n0 x" for i in range(60)) + "\nn: *n59",
            "no such option",
        ),
    ],
)
def test_a_configuration_that_claims_too_much(text, words, tmp_path):
    (tmp_path / "c.yml").write_text(text)
    with no_hang(), pytest.raises(UserError) as caught:
        config.read(Options, tmp_path / "c.yml")
    message = str(caught.value).replace(str(tmp_path / "c.yml"), "")
    assert any(word in message for word in words.split("|")) and message.isprintable() and len(message) <= 300
