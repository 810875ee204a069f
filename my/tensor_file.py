"""Files of tensors, .safetensors or PyTorch's own: names and shapes at once, each tensor when it is asked for.

`torch.load(weights_only=True)` does not serve: it gives no tensor of a file that names a class which is not installed,
and it returns damaged data without a word, although an archive has their checksums. `my/unpickled.py` says more.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from my import plain_files, unpickled
from my.errors import UserError, first_line, shown
from my.unpickled import Array, Stored, is_size

if TYPE_CHECKING:
    import torch

AGAIN = "it is incomplete or damaged: get the file again"
NO_FILE = {b"version https://git-lfs": "a Git LFS pointer", b"<": "a web page"}  # beginnings of what comes instead
PLAIN, UNPACK = "use its .safetensors file, or convert it to that", "unpack it, and give the file that is in it"
GIVE = "give a .safetensors or .ckpt file"
GGUF = b"GGUF"
FORMATS = (  # first byte, beginning there, what the file is, and what to do
    (0, GGUF, "a GGUF file, whose weights are quantised", "use plain weights, in .safetensors"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as of TensorFlow or Keras", PLAIN),
    (0, b"\x89PNG", "a picture", GIVE),
    (0, b"\xff\xd8\xff", "a picture", GIVE),
    (0, b"GIF8", "a picture", GIVE),
    (8, b"WEBP", "a picture", GIVE),
    (0, b"v/1\x01", "a picture", GIVE),
    (4, b"ftyp", "a video or a picture", GIVE),
    (0, b"\x1a\x45\xdf\xa3", "a video", GIVE),
    (0, b"%PDF", "a PDF document", GIVE),
    (0, b"glTF", "a 3D mesh", GIVE),
)
ONNX = re.compile(rb"\x08[\x01-\x20](\x12.[ -~]|\x3a|\x42)", re.DOTALL)  # its version, then its maker's name
MSGPACK = re.compile(rb"([\x81-\x8f]|\xde..)([\xa1-\xbf]|\xd9.)[ -~]", re.DOTALL)  # a dict whose first key is a text
STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch < 1.6 wrote
PICKLE = "data.pkl"  # name of the pickle in an archive
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
MAX_NAME = 1000  # characters of a tensor's name
MAX_SHARING = 16  # times the bytes of the file that its tensors may have in all, as tied weights have several names
SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
ITEMSIZE = {
    "float64": 8,
    "int64": 8,
    "uint64": 8,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "uint16": 2,
}  # else 1


class TensorFile:
    """`shapes` {name: shape}, `metadata` {str: str} and, by `tensor(name)`, the tensors of a file.

    `numbers` {name: float, or None} is what stands among the tensors and is no tensor: None is for no plain number.
    `sizes` {name: shape} are those of them that are several whole numbers, such as a torch.Size. `arrays` {name: shape}
    are arrays of numpy; `array(name)` returns one as a tensor.

    The file is .safetensors, or what torch.save wrote: an archive, or (torch < 1.6) a stream. Its name does not count.
    Tensors under "state_dict" are taken where there are any, else the tensors at the top, else those one level deeper.
    Nothing in the file is executed, and reading it takes time and memory linear in its bytes. Raises UserError for a
    file that cannot be read, is cut off, claims more than is in it, or has no tensors; its words begin with `flag`,
    the option that gave the file.
    """

    def __init__(self, path: str | Path, flag: str = "") -> None:
        self.label = f"{flag} {path}".strip()
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.numbers: dict[str, float | None] = {}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.arrays: dict[str, tuple[int, ...]] = {}
        self._arrays: dict[str, Array] = {}
        self.starts: dict[str, int] = {}  # {storage key: first byte}
        self.unchecked: dict[str, tuple[int, int]] = {}  # {storage key: (bytes, CRC-32)} of data that nobody read yet
        try:
            if not plain_files.size_of(self.path):
                raise UserError(f"{self.label}: cannot be read: it is empty; give another file")
            with open(self.path, "rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written stays ours
                self.tensors = self._index(file)
        except OSError as error:
            raise UserError(
                f"{self.label}: cannot be read: {error.strerror or first_line(error)}; give another file"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.label} {first_line(error)}; give another file") from None
        self.shapes = {name: stored.shape for name, stored in self.tensors.items()}
        self._refuse_claims()

    def _refuse_claims(self) -> None:
        """Raise UserError for tensors that the file does not have, or for names that are none."""
        if not self.shapes:
            raise UserError(f"{self.label}: holds no tensors, and is no checkpoint; give another file")
        claimed = 0
        for name, stored in self.tensors.items():
            storage, elements = stored.storage, math.prod(stored.shape)
            itemsize = ITEMSIZE.get(storage.dtype, 1)
            end = self.starts[storage.key] + storage.numel * itemsize
            if end > len(self.memory):
                raise UserError(f"{self.label}: ends at byte {len(self.memory)}, its tensors reach to {end}; {AGAIN}")
            if elements > storage.numel:  # a few bytes that would fill any memory
                raise UserError(
                    f"{self.label}: a tensor of shape {shown(list(stored.shape))} has more elements than "
                    f"the {storage.numel} that are stored of it; get another file"
                )
            if len(name) > MAX_NAME:
                raise UserError(
                    f"{self.label}: a tensor's name, {shown(name, 40)}, has {len(name)} characters, more "
                    f"than {MAX_NAME}; give another file"
                )
            claimed += elements * itemsize
        if claimed > MAX_SHARING * len(self.memory):
            raise UserError(
                f"{self.label}: its tensors have {claimed} bytes in all, and the file {len(self.memory)}: "
                "they are the same data over and over; give another file"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor of the file, which shares memory with it: to be copied, not to be changed."""
        import torch

        stored = self.tensors[name]
        storage, dtype = stored.storage, getattr(torch, stored.storage.dtype)
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=dtype)
        self._check(storage.key)
        flat = torch.frombuffer(self.memory, dtype=dtype, count=storage.numel, offset=self.starts[storage.key])
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    def array(self, name: str) -> torch.Tensor:
        """Return an array of numpy out of the file as a tensor; raises UserError where it is damaged or of no use."""
        import torch

        array = self._arrays[name]
        kind = array.kind
        if kind is None or kind.order == ">":
            raise UserError(f"{self.label}: the array {shown(name)} has numbers of a kind that is not read; {AGAIN}")
        dtype = unpickled.NUMPY_DTYPES[kind.code]
        try:
            data = bytearray(unpickled.bytes_of(array.data))
        except ValueError:
            data = bytearray()
        if len(data) != math.prod(array.shape) * ITEMSIZE.get(dtype, 1):
            raise UserError(f"{self.label}: the array {shown(name)} has another shape than its bytes; {AGAIN}")
        if not data:
            return torch.empty(array.shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(data, dtype=getattr(torch, dtype)).view(array.shape)

    def quantised(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` whose elements are whole numbers."""
        return [name for name in names if "float" not in self.tensors[name].storage.dtype]

    def verify(self) -> None:
        """Read all data that have a checksum, those of an archive; raises UserError where they are damaged."""
        for key in list(self.unchecked):
            self._check(key)

    def _check(self, key: str) -> None:
        """Raise UserError if the data of a storage, read for the first time, are not those that were written."""
        if key in self.unchecked:
            size, crc = self.unchecked[key]
            with memoryview(self.memory) as memory:
                if zlib.crc32(memory[self.starts[key] : self.starts[key] + size]) != crc:
                    raise UserError(
                        f"{self.label}: the data of storage {key[:20]!r} are damaged (its CRC-32 differs); {AGAIN}"
                    )
            del self.unchecked[key]

    def _index(self, file: IO[bytes]) -> dict[str, Stored]:
        """Return {name: Stored}, and fill `starts`."""
        if self.memory[8:9] == b"{" and self.memory[:4] != GGUF:  # behind the header's length, of nearly any bytes
            return self._index_safetensors()
        if self.memory[:4] == b"PK\x03\x04":
            return self._index_archive(file)
        if self.memory[:1] == b"\x80":
            return self._index_stream()
        for first, what in NO_FILE.items():
            if self.memory[:99].lstrip().startswith(first):
                raise UserError(f"{self.label}: {what}, not the file itself; download that")
        if found := self._format():
            raise UserError(f"{self.label}: {found[0]}, which is not read; {found[1]}")
        raise UserError(
            f"{self.label}: neither .safetensors nor a PyTorch checkpoint, or damaged; {GIVE}, or get the file again"
        )

    def _format(self) -> tuple[str, str] | None:
        """Return (what a file of another format is, what to do), or None."""
        for at, first, what, to_do in FORMATS:
            if self.memory[at : at + len(first)] == first:
                return what, to_do
        if MSGPACK.match(self.memory) or self.path.suffix == ".msgpack":
            return "Flax weights (msgpack)", PLAIN
        if ONNX.match(self.memory) or self.path.suffix == ".onnx":
            return "an ONNX file", PLAIN
        if self.memory[:200].decode("utf-8", "ignore").replace("\n", " ").strip().isprintable():
            return "a text file", GIVE
        return None

    def _index_safetensors(self) -> dict[str, Stored]:
        """Return {name: Stored} of a .safetensors file, and fill `starts` and `metadata`."""
        end = 8 + int.from_bytes(self.memory[:8], "little")
        tensors, parts = {}, []
        try:
            if end > min(len(self.memory), MAX_HEADER):
                raise ValueError("it is longer than the file, or than the format allows")
            header = plain_files.parse_json(self.memory[8:end].decode())
            self.metadata = header.pop("__metadata__", {})
            if not all(isinstance(v, str) for v in self.metadata.values()):
                raise ValueError("its metadata are not texts")
            for name, entry in header.items():
                if entry["dtype"] not in SAFETENSORS_DTYPES:
                    raise UserError(
                        f"{self.label}: {shown(name)} has numbers of the type {shown(entry['dtype'])}, "
                        "which is not read; use a file of float32, float16 or bfloat16"
                    )
                tensors[name], first, last = entry_of(name, entry)
                self.starts[name] = end + first
                parts.append((first, last - first))
            refuse_overlaps(parts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            known = type(error) is ValueError  # else a word of Python's about values that are of no header
            why = first_line(error).removeprefix("is damaged: ") if known else "it has other entries"
            raise UserError(f"{self.label}: its safetensors header cannot be read: {why}; {AGAIN}") from None
        return tensors

    def _index_archive(self, file: IO[bytes]) -> dict[str, Stored]:
        """Return {name: Stored} of an archive, and fill `starts`, `numbers` and `unchecked`."""
        members, folder, content = self._open_archive(file)
        tensors = self._tensors_of(unpickled.read(io.BytesIO(content), self.label)[0], len(content))
        used: dict[str, tuple[int, int]] = {}
        for storage in {stored.storage for stored in tensors.values()}:
            member = members.get(f"{folder}data/{storage.key}")
            try:
                if member is None:
                    raise ValueError
                used[storage.key] = self._data_of(member)
            except ValueError:
                key = shown(storage.key, 20)
                raise UserError(f"{self.label}: has no plain data of storage {key}; {AGAIN}") from None
            if member.file_size < storage.numel * ITEMSIZE.get(storage.dtype, 1):
                raise UserError(f"{self.label}: storage {shown(storage.key, 20)} is shorter than its tensors; {AGAIN}")
            if member.CRC:  # PyTorch can be told to write none: they are then 0
                self.unchecked[storage.key] = member.file_size, member.CRC
        self.starts = {key: at for key, (at, _) in used.items()}
        try:
            refuse_overlaps(used.values())
        except ValueError as error:
            raise UserError(f"{self.label}: not a whole PyTorch archive: {error}; {AGAIN}") from None
        return tensors

    def _open_archive(self, file: IO[bytes]) -> tuple[dict[str, zipfile.ZipInfo], str, bytes]:
        """Return ({name: member} of an archive, the folder in it with a "/" behind, the pickle in that folder)."""
        try:
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
            members = {m.filename: m for m in listed}
            pickles = [name for name in members if name == PICKLE or name.endswith(f"/{PICKLE}")]
            if listed and not pickles:
                raise UserError(
                    f"{self.label}: a zip archive, but none that PyTorch wrote; unpack it, and give the "
                    "file that is in it"
                )
            (pickle,) = pickles
            at, size = self._data_of(members[pickle])
            content = self.memory[at : at + size]
            if len(members) < len(listed) or members[pickle].CRC not in (0, zlib.crc32(content)):
                raise ValueError
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
            raise UserError(f"{self.label}: not a whole PyTorch archive; {AGAIN}") from None
        return members, pickle.removesuffix(PICKLE), content

    def _data_of(self, member: zipfile.ZipInfo) -> tuple[int, int]:
        """Return (first byte, bytes) of a member of an archive; raises ValueError where it is not plainly there.

        PyTorch never compresses: a member that is compressed is a bomb.
        """
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.compress_size != member.file_size
            or member.flag_bits & 1
        ):  # encrypted
            raise ValueError
        at = member.header_offset  # a local header: 30 bytes, its last four the lengths of a name and an extra
        name, extra = (int.from_bytes(self.memory[at + i : at + i + 2], "little") for i in (26, 28))
        at += 30 + name + extra
        if at + member.file_size > len(self.memory):
            raise ValueError
        return at, member.file_size

    def _index_stream(self) -> dict[str, Stored]:
        """Return {name: Stored} of four pickles and the data behind them, and fill `starts` and `numbers`."""
        if unpickled.read(self.memory, self.label)[0] != STREAM_MAGIC:
            raise UserError(
                f"{self.label}: a pickle, but no PyTorch checkpoint; nothing in it was executed; give another file"
            )
        _protocol, _system, (value, storages), (keys, _) = [unpickled.read(self.memory, self.label) for _ in range(4)]
        at = self.memory.tell()
        for key in keys if isinstance(keys, list) else []:  # each: its number of elements in 8 bytes, then those
            known = storages.get(key) if isinstance(key, str) and key not in self.starts else None
            if known is None or int.from_bytes(self.memory[at : at + 8], "little") != known.numel:
                raise UserError(f"{self.label}: its storages do not fit its tensors; {AGAIN}")
            self.starts[key] = at + 8
            at += 8 + known.numel * ITEMSIZE.get(known.dtype, 1)
        if not set(storages) <= set(self.starts):
            raise UserError(f"{self.label}: lacks data of its tensors; {AGAIN}")
        return self._tensors_of(value, len(self.memory))

    def _tensors_of(self, value: Any, most: int) -> dict[str, Stored]:
        """Return {name: Stored} of a checkpoint's value: of its "state_dict", else its own, else a level deeper.

        Fills `numbers` from there, too, and, but for those a level deeper, `sizes` and `arrays`. `most` are the bytes
        of the pickle. Raises UserError where one dict is in so many places, or under names so long, that it has more
        tensors than these bytes can name.
        """
        value = value if isinstance(value, dict) else {}
        inner = value.get("state_dict")
        inner = inner if isinstance(inner, dict) else value
        found = stored_in(inner)
        if found:
            self.numbers, self.sizes = numbers_in(inner), sizes_in(inner)
            self._arrays = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Array)}
            self.arrays = {name: array.shape for name, array in self._arrays.items()}
            return found
        for group, inside in value.items():
            if isinstance(inside, dict):
                most -= len(inside)
                there = stored_in(inside) if most >= 0 else {}
                numbers = numbers_in(inside) if there else {}
                most -= len(str(group)) * (len(there) + len(numbers))
                if most < 0:
                    raise UserError(f"{self.label}: names the same tensors over and over; give another file")
                found |= {f"{group}.{name}": stored for name, stored in there.items()}
                self.numbers |= {f"{group}.{name}": number for name, number in numbers.items()}
        return found


def stored_in(values: dict[Any, Any]) -> dict[str, Stored]:
    """Return {name: Stored} of the tensors in a dict."""
    return {k: v for k, v in values.items() if isinstance(k, str) and isinstance(v, Stored)}


def numbers_in(values: dict[Any, Any]) -> dict[str, float | None]:
    """Return {name: float, or None where it is no plain number} of what is no tensor in a dict."""
    return {
        k: float(v) if type(v) in (int, float) else None
        for k, v in values.items()
        if isinstance(k, str) and not isinstance(v, Stored)
    }


def sizes_in(values: dict[Any, Any]) -> dict[str, tuple[int, ...]]:
    """Return {name: whole numbers} of lists and tuples that can be a shape."""
    return {
        k: tuple(v)
        for k, v in values.items()
        if isinstance(k, str) and type(v) in (tuple, list) and 0 < len(v) <= unpickled.MAX_DIMS and all(map(is_size, v))
    }


def entry_of(name: str, entry: Any) -> tuple[Stored, int, int]:
    """Return (Stored, first byte, last byte) of an entry in a safetensors header; raises ValueError for a false one."""
    shape, (first, last) = unpickled.sizes(entry["shape"]), entry["data_offsets"]
    storage = unpickled.Storage(name, SAFETENSORS_DTYPES[entry["dtype"]], math.prod(shape))
    if not (
        unpickled.is_size(first)
        and unpickled.is_size(last)
        and last - first == storage.numel * ITEMSIZE.get(storage.dtype, 1)
    ):
        raise ValueError(f"{shown(name)} has offsets that do not fit its shape")
    return unpickled.rebuild_tensor(storage, 0, shape, unpickled.contiguous(shape)), first, last


def refuse_overlaps(parts: Iterable[tuple[int, int]]) -> None:
    """Raise ValueError where two (first byte, bytes) have a byte in common."""
    end = 0
    for at, size in sorted(parts):
        if at < end:
            raise ValueError("its data overlap")
        end = at + size
