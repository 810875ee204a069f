"""Tensor files: what torch.save and safetensors wrote comes back; nothing is executed; damage is one line."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch
from safetensors.torch import save_file

import crafted
from my import unpickled
from my.errors import UserError
from my.tensor_file import TensorFile

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture(scope="module")
def tensors():
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=rng)
    return {
        **{str(d): (base * 9).to(d) for d in DTYPES},
        "transposed": base.t(),
        "slice": base[1:4, 2:],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@pytest.mark.parametrize("stream", [False, True], ids=["archive", "stream"])
def test_what_torch_wrote_comes_back(tensors, tmp_path, stream):
    file = TensorFile(crafted.save_ckpt(tensors, tmp_path / "a.ckpt", stream))
    assert file.shapes == {name: tuple(t.shape) for name, t in tensors.items()}  # and nothing of optimizer or callbacks
    for name, t in tensors.items():
        assert torch.equal(file.tensor(name), t) and file.tensor(name).dtype == t.dtype
    whole = ["torch.int64", "torch.int32", "torch.int16", "torch.int8", "torch.uint8", "torch.bool"]
    assert file.quantised(tensors) == whole
    file.verify()


def test_tensors_at_the_top(tmp_path):
    torch.save({"a": torch.arange(3), "step": 4}, tmp_path / "a.pt")
    assert TensorFile(tmp_path / "a.pt").tensor("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize("how", [{}, {"pickle_protocol": 3}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_arrays_of_numpy_beside_tensors(tmp_path, how):
    arrays = {
        "bits": numpy.packbits(numpy.arange(20) % 3 == 0),
        "high": numpy.arange(256, dtype=numpy.uint8).reshape(16, 16),
        "floats": numpy.array([1.5, -2.0], numpy.float32),
        "counts": numpy.array([[2**40, -1]]),
        "truth": numpy.array([True, False]),
        "number": numpy.int64(7),
        "none": numpy.zeros((0, 3)),
    }
    more = {"w": torch.ones(2), "size": torch.Size([3, 4]), "text": "x", "names": numpy.array(["a"])}
    torch.save(
        {**arrays, **more, "turned": arrays["high"].T, "big": numpy.arange(3, dtype=">i4")}, tmp_path / "a", **how
    )
    file = TensorFile(tmp_path / "a")
    assert file.sizes == {"size": (3, 4)} and list(file.shapes) == ["w"]
    for name, array in arrays.items():
        there = file.array(name).numpy()
        assert file.arrays[name] == array.shape and there.dtype == array.dtype and numpy.array_equal(there, array)
    for name in ("turned", "names", "big"):  # not in rows, of texts, of the other order of bytes
        with pytest.raises(UserError, match=f"the array {name} has numbers of a kind that is not read"):
            file.array(name)


def test_numbers_beside_tensors(tmp_path):
    """Of the same dict as the tensors; None for what is no plain number."""
    for wrap, prefix in ((lambda d: d, ""), (lambda d: {"state_dict": d, "epoch": 3}, ""), (lambda d: {"a": d}, "a.")):
        torch.save(
            wrap({"w": torch.ones(2), "x.alpha": 2, "y.alpha": 0.5, "z.alpha": numpy.float64(3), "t": True, 1: 4}),
            tmp_path / "a.pt",
        )
        file = TensorFile(tmp_path / "a.pt")
        assert file.shapes == {f"{prefix}w": (2,)}
        assert file.numbers == {
            f"{prefix}x.alpha": 2.0,
            f"{prefix}y.alpha": 0.5,
            f"{prefix}z.alpha": None,
            f"{prefix}t": None,
        }
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    assert TensorFile(tmp_path / "a.safetensors").numbers == {}


def test_tensors_a_level_deeper_where_there_are_no_others(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(1, 3)}, "name": "x"}, tmp_path / "a.pt")
    assert TensorFile(tmp_path / "a.pt").shapes == {"string_to_param.*": (1, 3)}


def test_safetensors_and_a_wrong_ending(tensors, tmp_path):
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, tmp_path / "a.ckpt", metadata={"k": "v"})
    file = TensorFile(tmp_path / "a.ckpt")
    assert file.metadata == {"k": "v"}
    assert all(torch.equal(file.tensor(n), t) for n, t in tensors.items())


def test_a_safetensors_header_as_long_as_a_pickle_begins(tmp_path):
    for pad in range(8):  # header lengths are multiples of 8: one of these is 0x80
        save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"k": "v" * (40 + 8 * pad)})
        assert TensorFile(tmp_path / "a.safetensors").shapes == {"a": (2,)}
        if (tmp_path / "a.safetensors").read_bytes()[0] == 0x80:
            return
    raise AssertionError("no header of that length")


def test_a_tensor_is_ours_to_write(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    TensorFile(tmp_path / "a.pt").tensor("a").fill_(7)
    assert TensorFile(tmp_path / "a.pt").tensor("a").tolist() == [0, 0, 0]  # the file is as it was


# ---------------------------------------------------------------- nothing is executed

NAMES = list(crafted.attacks("x"))


@pytest.mark.parametrize("wrapped", [True, False], ids=["archive", "bare"])
@pytest.mark.parametrize("name", NAMES)
def test_crafted_pickles_do_nothing(tmp_path, name, wrapped):
    pickled, _ = crafted.attacks(tmp_path / "canary")[name]
    path = tmp_path / "a.ckpt"
    crafted.as_archive(pickled, path) if wrapped else path.write_bytes(pickled)
    with pytest.raises(UserError) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_those_pickles_do_bite(tmp_path):
    """Python's own reader, in a process of its own, runs them: the test above can fail."""
    fatal = {}
    for i, (name, (_, bites)) in enumerate(crafted.attacks("x").items()):
        if bites:
            fatal[name] = tmp_path / f"canary{i}"
            (tmp_path / f"{i}.pkl").write_bytes(crafted.attacks(fatal[name])[name][0])
    code = (
        "import pathlib, pickle, sys; sys.path[:0] = sys.argv[2:]\n"
        "for p in pathlib.Path(sys.argv[1]).glob('*.pkl'):\n"
        "    try: pickle.loads(p.read_bytes())\n"
        "    except Exception: pass\n"
    )
    root = str(crafted.__file__).rpartition("/tests/")[0]
    subprocess.run([sys.executable, "-c", code, str(tmp_path), root, root + "/tests"], check=True, capture_output=True)
    assert len(fatal) >= 10 and {name for name, canary in fatal.items() if not canary.exists()} == set()


def test_tensors_beside_an_attack_still_load(tmp_path):
    bite = crafted.Reduce(__import__("os").system, (f"touch {tmp_path / 'canary'}",))
    torch.save({"state_dict": {"w": torch.arange(4)}, "callbacks": bite}, tmp_path / "a.ckpt")
    assert TensorFile(tmp_path / "a.ckpt").tensor("w").tolist() == [0, 1, 2, 3]
    assert not (tmp_path / "canary").exists()


def test_a_machine_makes_plain_values_only():
    value = {"a": [1, 2.5, None, True, ("x", b"y")], "s": {1, 2}, "o": crafted.WithState(), 3: "three"}
    assert unpickled.read(io.BytesIO(crafted.dumped(value, 4)), "it")[0] == {
        "a": [1, 2.5, None, True, ("x", b"y")],
        "s": unpickled.Inert("set"),
        "o": unpickled.Inert("object"),
        3: "three",
    }


def test_names_without_end(tmp_path):
    """A tuple that doubles sixty times, as the name of a class: its text would not fit into any memory."""
    doubled = b"\x80\x04" + b"(t" + b"2\x86" * 60 + b"2\x93."  # DUP TUPLE2, then STACK_GLOBAL
    assert unpickled.read(io.BytesIO(doubled), "it")[0] == unpickled.Inert("nameless")


def test_a_list_that_holds_itself(tmp_path):
    loop = []
    loop.append(loop)
    torch.save({"w": torch.ones(1), "loop": loop}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert TensorFile(tmp_path / "a.pt").shapes == {"w": (1,)}


def test_a_compressed_pickle_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 10**6 + b"}.")
    with pytest.raises(UserError, match="not a whole PyTorch archive"):
        TensorFile(tmp_path / "a.ckpt")


def test_a_string_longer_than_the_memory(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.")
    with pytest.raises(UserError, match="damaged"):
        TensorFile(tmp_path / "a.ckpt")


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["archive", "stream", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.002, 0.3, 0.6, 0.99])
def test_cut_off_files(tmp_path, kind, keep):
    path, tensors = tmp_path / "a.ckpt", {f"layer.{i}": torch.randn(50, 40) for i in range(8)}
    save_file(tensors, path) if kind == "safetensors" else crafted.save_ckpt(tensors, path, stream=kind == "stream")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(UserError) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_damage_in_the_middle_of_an_archive(tmp_path):
    """One bit of one tensor: that one is refused, each time; the others are as they were."""
    tensors = {f"layer.{i}": torch.randn(50, 40, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    path = crafted.save_ckpt(tensors, tmp_path / "a.ckpt")
    whole = bytearray(path.read_bytes())
    whole[whole.index(tensors["layer.1"].numpy().tobytes()) + 77] ^= 4
    path.write_bytes(whole)
    file = TensorFile(path)
    for _ in range(2):
        with pytest.raises(UserError, match=r"a.ckpt: the data of storage '1' are damaged .*get the file again"):
            file.tensor("layer.1")
        with pytest.raises(UserError, match="the data of storage '1' are damaged"):
            TensorFile(path).verify()
        assert all(torch.equal(file.tensor(name), tensors[name]) for name in ("layer.0", "layer.2"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"\x01\x02junk" * 99, "neither .safetensors nor a PyTorch checkpoint"),
        (b"", "it is empty"),
        (b'\x10\0\0\0\0\0\0\0{"a": {}}       ', "safetensors header"),
        (b"PK\x03\x04" + b"\0" * 99, "not a whole PyTorch archive"),
        (b"\x80\x02" + b"\xff" * 9, "damaged"),
        (b"\n <!DOCTYPE html>" * 9, "a.ckpt: a web page, not the file itself"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
            "a Git LFS pointer, not the file itself",
        ),
        (b'\x28\0\0\0\0\0\0\0{"__metadata__": {"a": {}}, "b": null}  ', "safetensors header"),
    ],
)
def test_other_files(tmp_path, content, words):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        TensorFile(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"GGUF\3\0\0\0\x7b\0\0\0", "a GGUF file, whose weights are quantised, which is not read; use plain weights"),
        (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive, which is not read; unpack it, and give the file that is in it"),
        (b"Rar!\x1a\x07\x01\0", "a RAR archive, .*; unpack it"),
        (gzip.compress(b"a", mtime=0), "a gzip archive, .*; unpack it"),
        (bz2.compress(b"a"), "a bzip2 archive"),
        (lzma.compress(b"a"), "an xz archive"),
        (b"\x28\xb5\x2f\xfd\0", "a Zstandard archive"),
        (b"a.ckpt".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
        (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file, .*; use its .safetensors file, or convert it to that"),
        (b"\x08\x07\x12\x07pytorch\x1a\x061.13.1", "an ONNX file, which is not read; use its .safetensors"),
        (b"\x82\xa6params\x81\xa1w\xc7", r"Flax weights \(msgpack\), which is not read; use its .safetensors"),
        (b"\xde\0\x10\xadsome/long/key\x81", "Flax weights"),
    ],
)
def test_other_formats(tmp_path, content, words):
    (tmp_path / "a.ckpt").write_bytes(content + b"\0" * 600)
    with pytest.raises(UserError, match=words) as caught:
        TensorFile(tmp_path / "a.ckpt")
    assert "again" not in str(caught.value)


def test_other_formats_by_their_ending(tmp_path):
    for ending, words in ((".msgpack", "Flax weights"), (".onnx", "an ONNX file")):
        (tmp_path / f"a{ending}").write_bytes(b"junk" * 9)
        with pytest.raises(UserError, match=words):
            TensorFile(tmp_path / f"a{ending}")


def test_the_flag_that_gave_a_file_is_told(tmp_path):
    torch.save({"step": 4}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="^--sd.lora .*a.pt: holds no tensors"):
        TensorFile(tmp_path / "a.pt", "--sd.lora")


def test_a_tensor_of_a_few_bytes_that_would_fill_any_memory(tmp_path):
    """An expanded one: all of its elements are the same."""
    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"shape \[1000000, 1000000\] has more elements than the 1 that are stored"):
        TensorFile(tmp_path / "a.ckpt")


def rebuilt(offset, shape, stride, numel=4):
    return unpickled.rebuild_tensor(unpickled.Storage("0", "float32", numel), offset, shape, stride)


def test_tensors_stay_in_their_storage():
    assert rebuilt(0, (2, 2), (2, 1)).shape == (2, 2) and rebuilt(4, (0, 9), (1, 1)).shape == (0, 9)
    for offset, shape, stride in (
        (1, (2, 2), (2, 1)),
        (0, (5,), (1,)),
        (-1, (1,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, ("2",), (1,)),
    ):
        with pytest.raises(ValueError):
            rebuilt(offset, shape, stride)


@pytest.mark.parametrize("stream", [False, True])
def test_types_without_a_storage_of_their_own(tmp_path, stream):
    """PyTorch stores 8-bit floats as bytes, and names the type beside them."""
    a = torch.arange(12.0).reshape(3, 4)
    torch.save(
        {"a": a.to(torch.float8_e4m3fn), "b": a.to(torch.float8_e5m2)[1:], "c": a},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=not stream,
    )
    file = TensorFile(tmp_path / "x.pt")
    assert file.shapes == {"a": (3, 4), "b": (2, 4), "c": (3, 4)} and not file.quantised(file.shapes)
    assert torch.equal(file.tensor("a").float(), a) and torch.equal(file.tensor("c"), a)
    assert torch.equal(file.tensor("b").float(), a.to(torch.float8_e5m2)[1:].float())


@pytest.mark.parametrize(
    "content, what",
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "a picture"),
        (b"\0\0\0\x20ftypisom" + bytes(50), "a video or a picture"),
        (b"%PDF-1.7\n" + bytes(50), "a PDF document"),
        (b"prompt: a duck\nsteps: 20\n", "a text file"),
        (b'{"a": 1}\n', "a text file"),
        ("Grüße".encode(), "a text file"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content, what):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=f"{what}, which is not read; give a .safetensors or .ckpt file"):
        TensorFile(tmp_path / "x.ckpt")
