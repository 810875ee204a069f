"""Files of tensors, .safetensors or PyTorch's own: names and shapes at once, each tensor when it is asked for."""

import io
import json
import math
import mmap
import zipfile
import zlib
from pathlib import Path

from my import unpickled
from my.errors import UserError

AGAIN = "it is incomplete or damaged: get the file again"
NO_FILE = {b"version https://git-lfs": "a Git LFS pointer", b"<": "a web page"}  # beginnings of what comes instead
STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch < 1.6 wrote
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
                      "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
                      "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
ITEMSIZE = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}  # else 1


class TensorFile:
    """`shapes` {name: shape}, `metadata` {str: str} and, by `tensor(name)`, the tensors of a file.

    Takes .safetensors, and what torch.save wrote, as an archive or (torch < 1.6) as a stream, whatever
    the file is called. Tensors under "state_dict" are taken if it is there, else those at the top.
    Nothing in the file is executed. Raises UserError, which tells the `flag` that gave it, for a file that
    cannot be read, is cut off, or has no tensors.
    """

    def __init__(self, path, flag=""):
        self.label = f"{flag} {path}".strip()
        self.path, self.metadata, self.starts = Path(path), {}, {}  # starts: {storage key: first byte}
        self.unchecked = {}  # {storage key: (bytes, CRC-32)} of an archive's data that nobody has read yet
        try:
            with open(self.path, "rb") as file:
                self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written stays ours
                self.tensors = self._index(file)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is empty"
            raise UserError(f"{self.label}: cannot be read: {why}; give another file") from None
        self.shapes = {name: stored.shape for name, stored in self.tensors.items()}
        if not self.shapes:
            raise UserError(f"{self.label}: holds no tensors, and is no checkpoint; give another file")
        for stored in self.tensors.values():
            storage = stored.storage
            end = self.starts[storage.key] + storage.numel * ITEMSIZE.get(storage.dtype, 1)
            if end > len(self.memory):
                raise UserError(f"{self.label}: ends at byte {len(self.memory)}, its tensors reach to {end}; {AGAIN}")
            if math.prod(stored.shape) > storage.numel:  # a few bytes that would fill any memory
                raise UserError(f"{self.label}: a tensor of shape {list(stored.shape)} has more elements than the "
                                f"{storage.numel} that are stored of it; get another file")

    def tensor(self, name):
        """Return a tensor of the file, which shares memory with it: to be copied, not to be changed."""
        import torch

        stored = self.tensors[name]
        storage, dtype = stored.storage, getattr(torch, stored.storage.dtype)
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=dtype)
        self._check(storage.key)
        flat = torch.frombuffer(self.memory, dtype=dtype, count=storage.numel, offset=self.starts[storage.key])
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    def quantised(self, names):
        """Return those of `names` whose elements are whole numbers."""
        return [name for name in names if "float" not in self.tensors[name].storage.dtype]

    def verify(self):
        """Read all data that have a checksum, those of an archive; raises UserError where they are damaged."""
        for key in list(self.unchecked):
            self._check(key)

    def _check(self, key):
        """Raise UserError if the data of a storage, read for the first time, are not those that were written."""
        if key in self.unchecked:
            size, crc = self.unchecked[key]
            with memoryview(self.memory) as memory:
                if zlib.crc32(memory[self.starts[key]:self.starts[key] + size]) != crc:
                    raise UserError(f"{self.label}: the data of storage {key[:20]!r} are damaged (its CRC-32 differs); "
                                    f"{AGAIN}")
            del self.unchecked[key]

    def _index(self, file):
        """Return {name: Stored}, and fill `starts`."""
        if self.memory[8:9] == b"{":  # behind the header's length, which can begin like anything
            return self._index_safetensors()
        if self.memory[:4] == b"PK\x03\x04":
            return self._index_archive(file)
        if self.memory[:1] == b"\x80":
            return self._index_stream(file)
        for first, what in NO_FILE.items():
            if self.memory[:99].lstrip().startswith(first):
                raise UserError(f"{self.label}: {what}, not the file itself; download that")
        raise UserError(f"{self.label}: neither .safetensors nor a PyTorch checkpoint; get the file again")

    def _index_safetensors(self):
        end = 8 + int.from_bytes(self.memory[:8], "little")
        tensors = {}
        try:
            header = json.loads(self.memory[8:min(end, MAX_HEADER)])
            self.metadata = header.pop("__metadata__", {})
            if not all(isinstance(v, str) for v in self.metadata.values()):
                raise ValueError
            for name, entry in header.items():
                shape = tuple(entry["shape"])
                stride = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
                storage = unpickled.Storage(name, SAFETENSORS_DTYPES[entry["dtype"]], math.prod(shape))
                tensors[name] = unpickled.rebuild_tensor(storage, 0, shape, stride)
                first, last = entry["data_offsets"]
                size = storage.numel * ITEMSIZE.get(storage.dtype, 1)
                if type(first) is not int or first < 0 or last - first != size:
                    raise ValueError
                self.starts[name] = end + first
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise UserError(f"{self.label}: its safetensors header cannot be read; {AGAIN}") from None
        return tensors

    def _index_archive(self, file):
        try:
            with zipfile.ZipFile(file) as archive:
                members = {m.filename: m for m in archive.infolist()}
                (pickled,) = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
                if members[pickled].compress_type != zipfile.ZIP_STORED:  # torch never compresses: a bomb
                    raise ValueError
                content = archive.read(pickled)
        except (zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError, EOFError):
            raise UserError(f"{self.label}: not a whole PyTorch archive; {AGAIN}") from None
        tensors = tensors_of(unpickled.read(io.BytesIO(content), self.label)[0])
        for storage in {stored.storage for stored in tensors.values()}:
            member = members.get(f"{pickled.removesuffix('data.pkl')}data/{storage.key}")
            if member is None or member.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"{self.label}: has no plain data of storage {storage.key[:20]!r}; {AGAIN}")
            if member.file_size < storage.numel * ITEMSIZE.get(storage.dtype, 1):
                raise UserError(f"{self.label}: storage {storage.key[:20]!r} is shorter than its tensors; {AGAIN}")
            at = member.header_offset  # a local header: 30 bytes, its last four the lengths of a name and an extra
            name, extra = (int.from_bytes(self.memory[at + i:at + i + 2], "little") for i in (26, 28))
            self.starts[storage.key] = at + 30 + name + extra
            self.unchecked[storage.key] = member.file_size, member.CRC
        return tensors

    def _index_stream(self, file):
        file.seek(0)
        if unpickled.read(file, self.label)[0] != STREAM_MAGIC:
            raise UserError(f"{self.label}: a pickle, but no PyTorch checkpoint; nothing in it was executed; give "
                            "another file")
        _protocol, _system, (value, storages), (keys, _) = [unpickled.read(file, self.label) for _ in range(4)]
        at = file.tell()
        for key in keys if isinstance(keys, list) else []:  # each: its number of elements in 8 bytes, then those
            known = storages.get(key) if isinstance(key, str) else None
            if known is None or int.from_bytes(self.memory[at:at + 8], "little") != known.numel:
                raise UserError(f"{self.label}: its storages do not fit its tensors; {AGAIN}")
            self.starts[key] = at + 8
            at += 8 + storages[key].numel * ITEMSIZE.get(storages[key].dtype, 1)
        if not set(storages) <= set(self.starts):
            raise UserError(f"{self.label}: lacks data of its tensors; {AGAIN}")
        return tensors_of(value)


def tensors_of(value):
    """Return {name: Stored} of a checkpoint's value: those in its "state_dict", else in itself, else a level deeper."""
    value = value if isinstance(value, dict) else {}
    groups = {f"{k}.": v for k, v in value.items() if isinstance(v, dict)}
    inner = groups.get("state_dict.", value)
    return stored_in({"": inner}) or stored_in(groups)


def stored_in(groups):
    """Return {prefix + name: Stored} of {prefix: dict}."""
    return {prefix + k: v for prefix, group in groups.items() for k, v in group.items()
            if isinstance(k, str) and isinstance(v, unpickled.Stored)}
