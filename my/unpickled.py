"""What a pickle would build, without executing it: plain values and tensor records; all else stays inert.

`pickletools` only names a pickle's opcodes. The machine below acts on them itself: it never imports,
looks up, calls or sets anything that a file names, since a name in a file only ever becomes an
`Inert`, and the functions that it does stand for (`REBUILD`) are the few in this module.
"""

import pickletools
from dataclasses import dataclass

from my.errors import UserError, first_line

DTYPES = {"FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
          "DoubleStorage": "float64", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
          "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}  # torch.<name> -> dtype


@dataclass(frozen=True)
class Inert:
    """In place of anything that a file names and we do not know: a class, a function, or what it would return."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A tensor's memory: its key in the file, its dtype's name and its number of elements."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: elements of a storage from `offset`, by shape and stride, all counted in elements."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


def rebuild_tensor(storage, offset, shape, stride, *_):
    """Return the record of a tensor; raises ValueError where it would reach outside its storage."""
    shape, stride = tuple(shape), tuple(stride)
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) and len(shape) == len(stride)
    if not whole or not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage, a shape or a stride")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    if 0 not in shape and last >= storage.numel:
        raise ValueError(f"a tensor of shape {shape} reaches outside its storage")
    return Stored(storage, offset, shape, stride)


def ordered_dict(pairs=()):
    return {k: v for k, v in pairs if isinstance(k, (str, int))}


REBUILD = {  # what these names stand for here; every other name stands for nothing
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "collections.OrderedDict": ordered_dict,
}


def storage_of(pid):
    """Return the storage that a persistent id ("storage", class, key, device, numel, ...) means, or an Inert."""
    if (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Inert)
            and isinstance(pid[2], str) and type(pid[4]) is int and pid[4] >= 0
            and pid[5:] in ((), (None,))):  # a sixth entry is a view into another storage: torch < 0.4
        dtype = DTYPES.get(pid[1].name.removeprefix("torch.")) if pid[1].name.startswith("torch.") else None
        if dtype:
            return Storage(pid[2], dtype, pid[4])
    return Inert("persistent id")


class Machine:
    """The stack, marks and memo of one pickle. Methods are named after the opcodes that they carry out."""

    def __init__(self):
        self.stack, self.marks, self.memo = [], [], {}
        self.storages = {}  # all that it names, {key: Storage}

    def run(self, file):
        """Return the value of the pickle at the position of the binary `file`, which is left behind its end.

        Raises ValueError, IndexError, KeyError or TypeError for what is no pickle, or a damaged one.
        """
        for opcode, arg, _ in pickletools.genops(file):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in ARGUMENT:
                self.stack.append(arg)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in MAKERS:
                self.stack.append(MAKERS[name]())
            else:
                getattr(self, "op_" + ALIAS.get(name, name).lower())(arg)  # `name` is out of pickletools' own table
        raise ValueError("it has no end")

    def since_mark(self):
        start = self.marks.pop()
        items, self.stack[start:] = self.stack[start:], []
        return items

    def pop(self, n):
        if n > len(self.stack):
            raise IndexError("more is taken from its stack than was put there")
        items, self.stack[len(self.stack) - n:] = self.stack[len(self.stack) - n:], []
        return items

    def op_nothing(self, _):
        pass

    def op_mark(self, _):
        self.marks.append(len(self.stack))

    def op_pop(self, _):
        self.pop(1)

    def op_pop_mark(self, _):
        self.since_mark()

    def op_dup(self, _):
        self.stack.append(self.stack[-1])

    def op_put(self, key):
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def op_get(self, key):
        self.stack.append(self.memo[key])

    def op_tuple(self, _):
        self.stack.append(tuple(self.since_mark()))

    def op_tuple1(self, _):
        self.stack.append(tuple(self.pop(1)))

    def op_tuple2(self, _):
        self.stack.append(tuple(self.pop(2)))

    def op_tuple3(self, _):
        self.stack.append(tuple(self.pop(3)))

    def op_list(self, _):
        self.stack.append(self.since_mark())

    def op_dict(self, _):
        items = self.since_mark()
        self.stack.append({})
        self.put_items(items)

    def put_items(self, items):
        """Put keys and values, in turn, into the dict on top; what is no dict swallows them."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update({k: v for k, v in zip(items[::2], items[1::2]) if isinstance(k, (str, int))})

    def op_setitem(self, _):
        self.put_items(self.pop(2))

    def op_setitems(self, _):
        self.put_items(self.since_mark())

    def op_append(self, _):
        (item,) = self.pop(1)
        if isinstance(self.stack[-1], list):
            self.stack[-1].append(item)

    def op_appends(self, _):
        items = self.since_mark()
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def op_swallow_to_mark(self, _):  # elements of a set
        self.since_mark()

    def op_set_to_mark(self, _):
        self.since_mark()
        self.stack.append(Inert("set"))

    def op_global(self, arg):
        self.stack.append(Inert(arg.replace(" ", ".")))

    def op_stack_global(self, _):
        module, name = self.pop(2)
        named = isinstance(module, str) and isinstance(name, str)  # the text of anything else may be endless
        self.stack.append(Inert(f"{module}.{name}" if named else "nameless"))

    def op_reduce(self, _):
        function, args = self.pop(2)
        known = REBUILD.get(function.name) if isinstance(function, Inert) else None
        self.stack.append(known(*args) if known else Inert(f"{getattr(function, 'name', '')}()"))

    def op_newobj_ex(self, _):
        self.pop(3)
        self.stack.append(Inert("object"))

    def op_newobj(self, _):
        cls, _args = self.pop(2)
        self.stack.append({} if cls == Inert("collections.OrderedDict") else Inert("object"))

    def op_instance(self, _):  # INST and OBJ: a class and its arguments, down to the mark
        self.since_mark()
        self.stack.append(Inert("object"))

    def op_build(self, _):
        self.pop(1)  # the state that an object would be given

    def op_persid(self, _):  # in text, and torch's are tuples
        self.stack.append(Inert("persistent id"))

    def op_binpersid(self, _):
        storage = storage_of(*self.pop(1))
        if isinstance(storage, Storage):
            self.storages[storage.key] = storage
        self.stack.append(storage)

    def op_unknown(self, _):  # a registered extension, or memory from outside the pickle
        self.stack.append(Inert("extension"))


ARGUMENT = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
            "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
            "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}  # opcodes that push what they carry
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
MAKERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: Inert("set")}
ALIAS = {"BINPUT": "put", "LONG_BINPUT": "put", "MEMOIZE": "put", "BINGET": "get", "LONG_BINGET": "get",
         "PROTO": "nothing", "FRAME": "nothing", "READONLY_BUFFER": "nothing", "INST": "instance", "OBJ": "instance",
         "ADDITEMS": "swallow_to_mark", "FROZENSET": "set_to_mark", "EXT1": "unknown", "EXT2": "unknown",
         "EXT4": "unknown", "NEXT_BUFFER": "unknown"}


def read(file, label):
    """Return (value, {key: Storage}) of the pickle at the position of the binary `file`, which is left behind its end.

    Raises UserError, naming `label`, where it is damaged.
    """
    machine = Machine()
    try:
        return machine.run(file), machine.storages
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeError, MemoryError, EOFError,
            RecursionError) as error:
        raise UserError(f"{label}: damaged, or no PyTorch checkpoint: {first_line(error)}; get the file again") from None
