"""What a pickle would build, without executing it: plain values, records of tensors and arrays; all else stays inert.

`pickletools` only names the opcodes of a pickle. The machine below acts on them itself. It never imports, looks up,
calls or sets anything that a file names: a name in a file only ever becomes an `Inert`, and the functions that a few
names stand for (`REBUILD`) are in this module.

Python's own Unpickler with a `find_class` does not serve, because no `find_class` can bound it: 9 bytes make it fill a
memo of several gigabytes. `torch.load(weights_only=True)` does not serve either: 40 KB that call OrderedDict again and
again make it copy 1 GB, and it refuses a whole file for one class that is not installed, as in many checkpoints.

Time and memory are linear in the bytes of the pickle. An opcode takes at least a byte, and makes one value, or moves
values that are on the stack. What copies values more often is paid for (`Machine.pay`), or bounded (`MAX_...`).
Keys of a dict are texts and numbers of MAX_BITS, so that nothing nested is hashed or compared.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import mmap
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from my.errors import UserError, first_line, shown

DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "storage.UntypedStorage": "bytes",
}  # torch.<name> -> dtype
OF_BYTES = {"float8_e4m3fn": 1, "float8_e5m2": 1, "uint16": 2, "uint32": 4, "uint64": 8}  # dtypes without a storage
NUMPY_DTYPES = {  # letter and bytes of a dtype -> its name
    "b1": "bool",
    "u1": "uint8",
    "i1": "int8",
    "i4": "int32",
    "i8": "int64",
    "f4": "float32",
    "f8": "float64",
}
MAX_DIMS = 64  # of a tensor, torch's own limit
MAX_SIZE = 2**63  # below which sizes, strides and numbers of elements are, as in torch
MAX_BITS = 128  # of an integer; a longer one takes more than a step to hash and compare, and stays inert
MAX_ARGS = 16  # of a call
MAX_TEXT = 200  # characters of the name of a class, and of the key of a storage


@dataclass(frozen=True, slots=True)
class Inert:
    """In place of anything that a file names and we do not know: a class, a function, or what it would return."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A tensor's memory: its key in the file, its dtype's name and its number of elements."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: elements of a storage from `offset`, by shape and stride, all counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(slots=True)
class Encoded:
    """Bytes as pickles of protocol 2 have them: a text of which each character is a byte."""

    text: str


@dataclass(slots=True)
class Kind:
    """The dtype of an array of numpy: its letter and bytes, such as u1, and its order of bytes, once that is known."""

    code: str
    order: str = "|"


@dataclass(slots=True)
class Array:
    """An array of numpy, once its state is known: `bytes_of` gives its elements."""

    kind: Kind | None = None
    shape: tuple[int, ...] = ()
    data: bytes | Encoded = b""

    def set(self, state: Any) -> None:
        """Take the state (version, shape, dtype, Fortran order, bytes); leave the array as it is for any other."""
        if type(state) is not tuple or len(state) != 5 or type(state[1]) is not tuple or state[3] is not False:
            return
        if isinstance(state[2], Kind) and isinstance(state[4], (bytes, Encoded)):
            self.kind, self.shape, self.data = state[2], sizes(state[1]), state[4]


def bytes_of(data: bytes | Encoded) -> bytes:
    """Return the bytes of an array; raises ValueError where a character of its text is none."""
    return data if isinstance(data, bytes) else data.text.encode("latin-1")


OBJECT, NAMELESS, LARGE, SET = map(Inert, ("object", "nameless", "large integer", "set"))


def is_size(n: Any) -> bool:
    """Whether a value is a whole number that can be a size."""
    return type(n) is int and 0 <= n < MAX_SIZE


def sizes(value: Any) -> tuple[int, ...]:
    """Return a list or tuple of sizes or strides as a tuple; raises ValueError for what no tensor can have."""
    if type(value) not in (tuple, list) or len(value) > MAX_DIMS or not all(map(is_size, value)):
        raise ValueError(f"a shape or stride that is not up to {MAX_DIMS} whole numbers below 2^63")
    return tuple(value)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a tensor whose elements lie in a row."""
    return tuple(itertools.accumulate(reversed(shape[1:]), lambda step, n: step * n, initial=1))[::-1][: len(shape)]


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Stored:
    """Return the record of a tensor; raises ValueError where it would reach outside its storage, or be endless."""
    shape, stride = sizes(shape), sizes(stride)
    if not isinstance(storage, Storage) or not is_size(offset) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage, a shape or a stride")
    if math.prod(n or 1 for n in shape) >= MAX_SIZE:  # even one of no elements has strides
        raise ValueError("a tensor of 2^63 elements or more")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if 0 not in shape and last >= storage.numel:
        raise ValueError("a tensor that reaches outside its storage")
    return Stored(storage, offset, shape, stride)


def rebuild_of_bytes(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Stored | Inert:
    """Return the record of a tensor whose storage is bytes, and whose dtype is named beside it."""
    name = dtype.name.removeprefix("torch.") if isinstance(dtype, Inert) else None
    if not isinstance(storage, Storage) or name not in OF_BYTES:
        return Inert("a tensor of an unknown dtype")
    return rebuild_tensor(Storage(storage.key, name, storage.numel // OF_BYTES[name]), offset, shape, stride)


def ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """Return the dict of a list of pairs; raises ValueError for anything else."""
    if type(pairs) not in (tuple, list) or not all(type(pair) in (tuple, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("an OrderedDict that is not made of pairs")
    return {k: v for k, v in pairs if isinstance(k, (str, int))}


def encoded(text: Any, codec: Any = None) -> Encoded | Inert:
    """Return the record of bytes that a pickle has as a text."""
    return Encoded(text) if isinstance(text, str) and codec == "latin1" else Inert("text of another codec")


def kind_of(code: Any, *_: Any) -> Kind | Inert:
    """Return the record of a dtype of numpy: of whole numbers, numbers or truth values."""
    return Kind(code) if isinstance(code, str) and code in NUMPY_DTYPES else Inert("an unknown dtype")


def scalar(kind: Any, data: Any) -> Array:
    """Return the record of a number of numpy: an array of one element."""
    array = Array()
    array.set((1, (), kind, False, data))
    return array


REBUILD: dict[str, Callable[..., Any]] = {  # what these names stand for here; every other name stands for nothing
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": rebuild_of_bytes,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "collections.OrderedDict": ordered_dict,
    "torch.Size": lambda shape=(): sizes(shape),
    "_codecs.encode": encoded,
    **dict.fromkeys(("__builtin__.bytes", "builtins.bytes"), lambda *given: Inert("bytes") if given else Encoded("")),
    "numpy.dtype": kind_of,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": scalar for core in ("core", "_core")},
}


def storage_of(pid: Any) -> Storage | Inert:
    """Return the storage that a persistent id ("storage", class, key, device, numel, ...) means, or an Inert."""
    if (
        isinstance(pid, tuple)
        and 5 <= len(pid) <= 6
        and pid[0] == "storage"
        and isinstance(pid[1], Inert)
        and isinstance(pid[2], str)
        and len(pid[2]) <= MAX_TEXT
        and is_size(pid[4])
        and pid[5:] in ((), (None,))
    ):  # a sixth entry is a view into another storage: torch < 0.4
        dtype = DTYPES.get(pid[1].name.removeprefix("torch.")) if pid[1].name.startswith("torch.") else None
        if dtype:
            return Storage(pid[2], dtype, pid[4])
    return Inert("persistent id")


class Machine:
    """The stack, marks and memo of one pickle. Methods are named after the opcodes that they carry out."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}  # all that the pickle names, by their keys
        self.steps, self.paid = 0, 0  # opcodes so far, and values that were copied besides

    def run(self, file: IO[bytes] | mmap.mmap) -> Any:
        """Return the value of the pickle at the position of the binary `file`, which is left behind its end.

        Raises ValueError, IndexError, KeyError or TypeError for what is no pickle, or a damaged one.
        """
        acts = {name: getattr(self, f"op_{act}") for name, act in ACTS.items()}
        for opcode, arg, _ in pickletools.genops(file):  # type: ignore[arg-type]  # it also reads from a mmap
            if opcode.name == "STOP":
                return self.stack.pop()
            self.steps += 1
            acts[opcode.name](arg)
        raise ValueError("it has no end")

    def pay(self, values: int) -> None:
        """Count values that are copied; raises ValueError beyond the opcodes so far, as each was made by its own."""
        self.paid += values
        if self.paid > self.steps:
            raise ValueError("it asks for the same values over and over")

    def since_mark(self) -> list[Any]:
        """Take from the stack what lies above the last mark, and return it; raises IndexError where there is none."""
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def pop(self, n: int) -> list[Any]:
        """Take n values from the stack, and return them; raises IndexError where it has fewer."""
        if n > len(self.stack):
            raise IndexError("more is taken from its stack than was put there")
        items, self.stack[len(self.stack) - n :] = self.stack[len(self.stack) - n :], []
        return items

    def op_nothing(self, _: Any) -> None:
        pass

    def op_argument(self, arg: Any) -> None:
        self.stack.append(LARGE if type(arg) is int and arg.bit_length() > MAX_BITS else arg)

    def op_none(self, _: Any) -> None:
        self.stack.append(None)

    def op_newtrue(self, _: Any) -> None:
        self.stack.append(True)

    def op_newfalse(self, _: Any) -> None:
        self.stack.append(False)

    def op_empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def op_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def op_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def op_empty_set(self, _: Any) -> None:
        self.stack.append(SET)

    def op_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def op_pop(self, _: Any) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: Any) -> None:
        self.since_mark()

    def op_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def op_put(self, key: int | None) -> None:
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def op_get(self, key: int) -> None:
        if key not in self.memo:
            raise IndexError("more is taken from its memo than was put there")
        self.stack.append(self.memo[key])

    def op_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def op_tuple1(self, _: Any) -> None:
        self.stack[-1] = (self.stack[-1],)

    def op_tuple2(self, _: Any) -> None:
        self.stack.append(tuple(self.pop(2)))

    def op_tuple3(self, _: Any) -> None:
        self.stack.append(tuple(self.pop(3)))

    def op_list(self, _: Any) -> None:
        self.stack.append(self.since_mark())

    def op_dict(self, _: Any) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.put_items(items)

    def put_items(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dict on top; what is no dict swallows them."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update({k: v for k, v in zip(items[::2], items[1::2]) if isinstance(k, (str, int))})

    def op_setitem(self, _: Any) -> None:
        self.put_items(self.pop(2))

    def op_setitems(self, _: Any) -> None:
        self.put_items(self.since_mark())

    def op_append(self, _: Any) -> None:
        (item,) = self.pop(1)
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(item)

    def op_appends(self, _: Any) -> None:
        items = self.since_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def op_swallow_to_mark(self, _: Any) -> None:  # elements of a set
        self.since_mark()

    def op_set_to_mark(self, _: Any) -> None:
        self.since_mark()
        self.stack.append(SET)

    def op_global(self, arg: str) -> None:
        self.stack.append(Inert(arg.replace(" ", ".")) if len(arg) <= MAX_TEXT else NAMELESS)

    def op_stack_global(self, _: Any) -> None:
        module, name = self.pop(2)
        named = isinstance(module, str) and isinstance(name, str)  # the text of anything else may be endless
        short = named and len(module) + len(name) <= MAX_TEXT
        self.stack.append(Inert(f"{module}.{name}") if short else NAMELESS)

    def op_reduce(self, _: Any) -> None:
        function, args = self.pop(2)
        known = REBUILD.get(function.name) if isinstance(function, Inert) else None
        if known is None:
            self.stack.append(OBJECT)
            return
        if type(args) is not tuple or len(args) > MAX_ARGS:
            raise ValueError(f"{function.name} is called with what are no arguments")
        self.pay(sum(len(arg) for arg in args if type(arg) in (tuple, list)))
        self.stack.append(known(*args))

    def op_newobj_ex(self, _: Any) -> None:
        self.pop(3)
        self.stack.append(OBJECT)

    def op_newobj(self, _: Any) -> None:
        cls, _args = self.pop(2)
        self.stack.append({} if cls == Inert("collections.OrderedDict") else OBJECT)

    def op_instance(self, _: Any) -> None:  # INST and OBJ: a class and its arguments, down to the mark
        self.since_mark()
        self.stack.append(OBJECT)

    def op_build(self, _: Any) -> None:
        (state,) = self.pop(1)  # what an object would be given
        built = self.stack[-1]
        if isinstance(built, Array):
            self.pay(len(state[1]) if type(state) is tuple and len(state) == 5 and type(state[1]) is tuple else 0)
            built.set(state)
        elif isinstance(built, Kind) and type(state) is tuple and len(state) > 1 and state[1] in ("|", "<", ">", "="):
            built.order = state[1]

    def op_persid(self, _: Any) -> None:  # in text, and torch's are tuples
        self.stack.append(Inert("persistent id"))

    def op_binpersid(self, _: Any) -> None:
        storage = storage_of(*self.pop(1))
        if isinstance(storage, Storage):
            self.storages[storage.key] = storage
        self.stack.append(storage)

    def op_unknown(self, _: Any) -> None:  # a registered extension, or memory from outside the pickle
        self.stack.append(Inert("extension"))


ARGUMENT = (
    "INT",
    "LONG",
    "LONG1",
    "LONG4",
    "BININT",
    "BININT1",
    "BININT2",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
)  # opcodes that push what they carry
ALIAS = {
    **dict.fromkeys(ARGUMENT, "argument"),
    "BINPUT": "put",
    "LONG_BINPUT": "put",
    "MEMOIZE": "put",
    "BINGET": "get",
    "LONG_BINGET": "get",
    "PROTO": "nothing",
    "FRAME": "nothing",
    "READONLY_BUFFER": "nothing",
    "INST": "instance",
    "OBJ": "instance",
    "ADDITEMS": "swallow_to_mark",
    "FROZENSET": "set_to_mark",
    "EXT1": "unknown",
    "EXT2": "unknown",
    "EXT4": "unknown",
    "NEXT_BUFFER": "unknown",
}
ACTS = {
    opcode.name: ALIAS.get(opcode.name, opcode.name.lower()) for opcode in pickletools.opcodes if opcode.name != "STOP"
}  # opcode -> name of its method, less "op_"


def read(file: IO[bytes] | mmap.mmap, label: str) -> tuple[Any, dict[str, Storage]]:
    """Return (value, {key: Storage}) of the pickle at the position of the binary `file`, which is left behind its end.

    Raises UserError, naming `label`, where it is damaged.
    """
    machine = Machine()
    try:
        with uncollected():
            return machine.run(file), machine.storages
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        UnicodeError,
        MemoryError,
        EOFError,
        RecursionError,
    ) as error:
        raise UserError(
            f"{label}: damaged, or no PyTorch checkpoint: {shown(first_line(error))}; get the file again"
        ) from None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no cycles while the block runs: among millions of values that are in use, that is half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
