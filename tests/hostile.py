"""Files that claim too much, each of about `n` bytes, and sound files of as many bytes to compare them with.

Pickles are put together here from opcodes, as Python's own writer makes none of these. Nothing here reads one.
"""

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors.torch import save


class Kind(NamedTuple):
    """A kind of hostile file: what writes it, the sound file it is like, and whether it is read, not refused.

    `times` as many bytes as others have are what it takes to show.
    """

    content: Callable  # n -> bytes
    like: str  # a key of SOUND
    reads: bool = False
    times: int = 1


KINDS = {}  # name -> Kind


def kind(like, reads=False, times=1):
    """Enter a function n -> bytes, or for a pickle n -> opcodes, under its name in words."""

    def enter(make):
        content = make if like not in WRAPPED else lambda n: WRAPPED[like](make(n))
        KINDS[make.__name__.replace("_", " ")] = Kind(content, like, reads, times)
        return make

    return enter


def whole(like, reads=False):
    """Enter a function n -> bytes of a whole file."""

    def enter(make):
        KINDS[make.__name__.replace("_", " ")] = Kind(make, like, reads)
        return make

    return enter


# ---------------------------------------------------------------- sound files


def sound_tensors(n, each):
    """{name: tensor} of about `n` bytes in a file, at `each` bytes of index for a tensor; all are of one storage."""
    base = torch.arange(max(n // each, 1), dtype=torch.float32)
    return {f"blocks.{i}.weight": base[i : i + 1] for i in range(len(base))}


def sound_pickle(n, archive):
    out = io.BytesIO()
    torch.save({"state_dict": sound_tensors(n, 110), "epoch": 3}, out, _use_new_zipfile_serialization=archive)
    return out.getvalue()


SOUND = {  # n -> bytes
    "archive": lambda n: sound_pickle(n, archive=True),
    "stream": lambda n: sound_pickle(n, archive=False),
    "safetensors": lambda n: save(sound_tensors(n, 85)),
    "json": lambda n: json.dumps(
        {
            "frames": [
                {"file_path": f"images/{i}.png", "transform_matrix": [[1.0] * 4] * 4} for i in range(max(n // 160, 1))
            ]
        }
    ).encode(),
    "yaml": lambda n: "\n".join(f"option{i}: {i}" for i in range(max(n // 18, 1))).encode(),
}


# ---------------------------------------------------------------- opcodes


def text(s):
    s = s.encode() if isinstance(s, str) else s
    return b"X" + struct.pack("<I", len(s)) + s


def integer(value):
    """An integer, by the shortest opcode that takes any."""
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(raw)) + raw


def many(items):
    """A tuple of anything that is already opcodes."""
    return b"(" + b"".join(items) + b"t"


def put(i):
    return b"r" + struct.pack("<I", i)


def get(i):
    return b"j" + struct.pack("<I", i)


def named(module, name):
    return f"c{module}\n{name}\n".encode()


ORDERED = named("collections", "OrderedDict")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
PARAMETER = named("torch._utils", "_rebuild_parameter")


def storage(numel=4, key="0"):
    return many([text("storage"), named("torch", "FloatStorage"), text(key), text("cpu"), integer(numel)]) + b"Q"


def call(function, *args):
    return function + many(args) + b"R"


def tensor(shape=None, stride=None, offset=None, of=None):
    """The opcodes of a tensor of 4 elements, of which any part may be others."""
    shape, stride = shape or many([integer(4)]), stride or many([integer(1)])
    return call(REBUILD, of or storage(), offset or integer(0), shape, stride, b"\x89", b"}")


def state(*pairs):
    """A whole pickle: the dict of pairs of opcodes (name, value), with a sound tensor `w` before them."""
    return b"\x80\x02}(" + text("w") + tensor() + b"".join(k + v for k, v in pairs) + b"u."


def beside(opcodes):
    """A whole pickle: a sound tensor, and beside it whatever the opcodes leave."""
    return state((text("x"), opcodes))


def over_and_over(first, again, n):
    """Leave a list of what `again` makes, as often as `n` bytes allow, out of what `first` puts into the memo."""
    return first + b"0](" + again * (n // len(again)) + b"e"


# ---------------------------------------------------------------- wrappings


def archive(pickled, members=(), data=b"\0" * 16, **options):
    """An archive as torch.save writes it, and other members {name: bytes} in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", data)
        for name, content in members:
            file.writestr(name, content)
    return out.getvalue()


MAGIC = b"\x80\x02" + integer(0x1950A86A20F9469CFC6C) + b"."


ONE_KEY = b"\x80\x02](" + text("0") + b"e."


def stream(pickled, keys=ONE_KEY, sizes=(4,), data=b"\0" * 16):
    """A file as torch < 1.6 wrote it."""
    parts = b"".join(struct.pack("<q", size) + data for size in sizes)
    return MAGIC + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + pickled + keys + parts


def safetensors(header, data=b"\0" * 16, length=None):
    """A .safetensors with a header that is JSON, or values."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


WRAPPED = {"archive": archive}  # what makes a file of a kind's opcodes; other kinds are whole files


def plain(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# ---------------------------------------------------------------- pickles: shapes and integers


@kind("archive")
def a_shape_of_one_enormous_integer(n):
    return state((text("t"), tensor(shape=many([integer(1 << (8 * n))]), stride=many([integer(0)]))))


@kind("archive", times=260)
def an_enormous_integer_as_shape_and_stride(n):
    size = many([integer((1 << (4 * n)) + 1)])
    return state((text("t"), tensor(shape=size, stride=size)))


@kind("archive", reads=True)
def an_enormous_integer_as_a_key_over_and_over(n):
    return beside(integer(1 << (4 * n)) + put(0) + b"0}(" + (get(0) + b"N") * (n // 12) + b"u")


@kind("archive")
def a_list_as_shape_over_and_over(n):
    numbers = b"](" + integer(1) * (n // 10) + b"e" + put(0)
    call_it = REBUILD + put(1) + b"0" + storage() + put(2) + b"0"
    args = get(1) + b"(" + get(2) + integer(0) + get(0) + get(0) + b"\x89}tR"
    return beside(over_and_over(numbers + b"0" + call_it + b"N", args, n // 2))


@kind("archive")
def a_shape_of_64_dimensions_over_and_over(n):
    made = (
        REBUILD
        + put(1)
        + b"0"
        + many([storage(), integer(0), b"](" + integer(1) * 64 + b"e", b"](" + integer(1) * 64 + b"e"])
        + put(2)
    )
    return beside(over_and_over(made, get(1) + get(2) + b"R", n))


@kind("archive")
def a_shape_of_many_dimensions(n):
    ones = many([b"K\x01"] * (n // 4))
    return state((text("t"), tensor(shape=ones, stride=ones)))


@kind("archive")
def no_elements_of_enormous_rows(n):
    return state(
        (text("t"), tensor(shape=many([integer(0), integer(2**62), integer(2**62)]), stride=many([integer(1)] * 3)))
    )


@kind("archive")
def a_tensor_that_repeats_one_element(n):
    million = many([integer(10**6), integer(10**6)])
    return state((text("t"), tensor(shape=million, stride=many([integer(0), integer(0)]))))


@whole("archive")
def one_storage_under_many_names(n):
    """Each of the tensors is sound; together they are as many times the file as there are of them."""
    each = [(text(f"{i}"), get(0)) for i in range(n // 15)]
    pickled = state((text("t"), tensor(shape=many([integer(n // 4)]), of=storage(n // 4)) + put(0)), *each)
    return archive(pickled, data=b"\0" * n)


@kind("archive")
def a_negative_stride(n):
    return state((text("t"), tensor(stride=many([integer(-1)]))))


@kind("archive")
def a_shape_of_other_values(n):
    return state((text("t"), tensor(shape=many([b"G" + struct.pack(">d", 4.0)]))))


@kind("archive")
def a_storage_of_2_to_the_60_elements(n):
    return state((text("t"), tensor(of=storage(2**60))))


@kind("archive")
def a_storage_of_an_enormous_number_of_elements(n):
    return state((text("t"), tensor(of=storage(1 << (8 * n)))))


@kind("archive")
def a_number_of_many_digits(n):
    return beside(b"L" + b"9" * n + b"L\n")


@kind("archive", reads=True)
def a_float_of_many_digits(n):
    return beside(b"F" + b"9" * n + b"e-9\n")


# ---------------------------------------------------------------- pickles: the same values over and over


@kind("archive")
def pairs_made_into_dicts_over_and_over(n):
    """OrderedDict, called again and again with the same list of pairs."""
    pairs = b"](" + b"".join(many([integer(i), b"N"]) for i in range(n // 16)) + b"e"
    made = ORDERED + put(1) + b"0" + many([pairs]) + put(2)
    return beside(over_and_over(made, get(1) + get(2) + b"R", n // 2))


@kind("archive")
def texts_as_pairs(n):
    made = ORDERED + put(1) + b"0" + many([text("ab" * (n // 4))]) + put(2)
    return beside(over_and_over(made, get(1) + get(2) + b"R", n // 2))


ARRAY = call(named("numpy.core.multiarray", "_reconstruct"))
BYTE = b"C\x01x"
U1 = call(named("numpy", "dtype"), text("u1"))


def array(shape, data):
    """An array of numpy of bytes, given its shape and its data as opcodes."""
    return ARRAY + many([integer(1), shape, U1, b"\x89", data]) + b"b"


@kind("archive", reads=True)
def an_array_that_claims_more_than_it_has(n):
    return beside(over_and_over(b"N", array(many([integer(2**62)]), BYTE), n))


@kind("archive")
def an_array_of_many_dimensions(n):
    return beside(array(many([integer(1)] * (n // 6)), BYTE))


@kind("archive")
def states_of_arrays_over_and_over(n):
    shape = many([integer(1)] * 60) + put(1) + b"0"
    state = many([integer(1), get(1), U1, b"\x89", BYTE]) + put(2) + b"0"
    made = shape + state + ARRAY + put(3)
    return beside(over_and_over(made, get(3) + get(2) + b"b", n))


@kind("archive", reads=True)
def bytes_of_a_long_text_over_and_over(n):
    made = named("_codecs", "encode") + put(1) + b"0" + many([text("b" * (n // 2)), text("latin1")]) + put(2)
    return beside(over_and_over(made, get(1) + get(2) + b"R", n // 2))


@kind("archive")
def arguments_over_and_over(n):
    made = PARAMETER + put(1) + b"0" + many([b"N"] * (n // 2)) + put(2)
    return beside(over_and_over(made, get(1) + get(2) + b"R", n // 2))


@kind("archive", reads=True)
def a_persistent_id_over_and_over(n):
    return beside(over_and_over(many([b"N"] * (n // 2)) + put(0), get(0) + b"Q", n // 2))


@kind("archive", reads=True)
def a_long_key_of_many_storages(n):
    made = text("storage") + put(0) + named("torch", "FloatStorage") + put(1) + text("9" * (n // 2)) + put(2)
    again = b"".join(many([get(0), get(1), get(2), get(0), integer(i)]) + b"Q0" for i in range(n // 60))
    return beside(made + b"00" + again)


@kind("archive", reads=True)
def a_class_of_two_long_texts_over_and_over(n):
    return beside(over_and_over(text("a" * (n // 2)) + put(0), get(0) + get(0) + b"\x93", n // 2))


@kind("archive", reads=True)
def calls_of_a_long_name_over_and_over(n):
    return beside(over_and_over(named("a", "b" * (n // 2)) + put(0), get(0) + b")R", n // 2))


@kind("archive", reads=True)
def calls_of_what_calls_return(n):
    return beside(named("a", "b") + b")R" * (n // 2))


@kind("archive")
def one_dict_in_many_places(n):
    """Without tensors at the top, those a level deeper are looked for."""
    inside = b"}(" + b"".join(text(f"{i}") + get(0) for i in range(n // 28)) + b"u" + put(1)
    places = b"".join(integer(i) + get(1) for i in range(n // 22))
    return b"\x80\x02" + tensor() + put(0) + b"0" + inside + b"0}(" + places + b"u."


@kind("archive")
def a_long_name_before_many_tensors(n):
    inside = b"}(" + b"".join(text(f"{i}") + get(0) for i in range(n // 28)) + b"u"
    return b"\x80\x02" + tensor() + put(0) + b"0}(" + text("a" * (n // 2)) + inside + b"u."


@kind("archive", reads=True)
def tuples_that_double_as_a_key(n):
    return beside(b"}(" + b"N" + b"2\x86" * (n // 2) + b"Nu")


@kind("archive", reads=True)
def tuples_that_double_as_the_name_of_a_class(n):
    return beside(b"N" + b"2\x86" * (n // 2) + b"2\x93")


@kind("archive")
def tuples_that_double_as_a_shape(n):
    return state((text("t"), tensor(shape=b"N" + b"2\x86" * (n // 2))))


@kind("archive", reads=True)
def tuples_in_tuples(n):
    return beside(b")" + b"\x85" * n)


@kind("archive", reads=True)
def lists_in_lists(n):
    return beside(b"]" * (n // 2) + b"a" * (n // 2 - 1))


@kind("archive", reads=True)
def dicts_in_dicts(n):
    return beside(b"}" + (text("a") + b"}") * (n // 8) + b"s" * (n // 8))


@kind("archive", reads=True)
def a_list_that_holds_itself_over_and_over(n):
    return beside(b"]" + put(0) + (get(0) + b"a") * (n // 6))


@kind("archive", reads=True)
def nothing_but_empty_lists(n):
    return beside(b"](" + b"]" * n + b"e")


@kind("archive", reads=True)
def copies_of_the_top(n):
    return beside(b"N" + b"2" * n + b"0" * n)


@kind("archive")
def marks_without_end(n):
    return beside(b"(" * n)


# ---------------------------------------------------------------- pickles: names, lengths, places


@kind("archive", reads=True)
def names_with_terminal_escapes(n):
    return state(*((text(f"\x1b[2J\x1b[31m\u202e\r{i}"), tensor()) for i in range(max(n // 150, 1))))


@kind("archive")
def a_name_of_many_characters(n):
    return state((text("a" * n), tensor()))


@kind("archive")
def a_storage_with_a_long_name(n):
    return state((text("t"), tensor(of=storage(key="a" * n))))


@kind("archive", reads=True)
def the_name_of_a_class_of_many_characters(n):
    return beside(named("a" * n, "b\x1b[2J"))


@kind("archive")
def a_text_longer_than_the_file(n):
    return beside(b"\x8d" + struct.pack("<Q", 2**62) + b"a" * n)


@kind("archive")
def bytes_longer_than_any_file(n):
    return beside(b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"a" * n)


@kind("archive", reads=True)
def a_frame_longer_than_any_file(n):
    return b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + state()[2:]


@kind("archive", reads=True)
def a_place_in_the_memo_far_away(n):
    return beside(b"".join(b"N" + put(2**32 - 1 - i) + b"0" for i in range(n // 7)) + b"N")


@kind("archive")
def a_place_in_the_memo_of_many_digits(n):
    return beside(b"Np" + b"9" * n + b"\n")


@kind("archive")
def a_place_in_the_memo_that_is_empty(n):
    return beside(get(7))


@kind("archive")
def a_text_that_is_no_unicode(n):
    return beside(text(b"\xff" * n))


@kind("archive")
def more_from_the_stack_than_is_there(n):
    return b"\x80\x02N" + b"\x87" * n + b"."


@kind("archive")
def a_pickle_without_an_end(n):
    return state()[:-1] + b"0N" * (n // 2)


@kind("archive", reads=True)
def a_persistent_id_in_text(n):
    return beside(b"P" + b"a" * n + b"\n")


@kind("archive", reads=True)
def memory_from_outside(n):
    return beside(b"](" + b"\x97\x98" * (n // 2) + b"e")


# ---------------------------------------------------------------- archives


@whole("archive")
def a_compressed_pickle(n):
    return archive(beside(b"](" + b"]" * (900 * n) + b"e"), compression=zipfile.ZIP_DEFLATED)


@whole("archive")
def a_compressed_storage(n):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", state((text("t"), tensor(of=storage(100 * n)))))
        file.writestr("archive/data/0", b"\0" * (400 * n), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def patched(content, what, at, value):
    """An archive with bytes of its first record of a kind overwritten: b"PK\\1\\2" is a line of its directory."""
    i = content.index(what) + at
    return content[:i] + value + content[i + len(value) :]


@whole("archive")
def a_pickle_that_claims_2_gigabytes(n):
    return patched(archive(state()), b"PK\x01\x02", 20, struct.pack("<II", 2**31 - 1, 2**31 - 1))


@whole("archive")
def a_pickle_that_claims_more_unpacked(n):
    return patched(archive(state()), b"PK\x01\x02", 24, struct.pack("<I", 2**31 - 1))


@whole("archive")
def a_member_far_outside(n):
    return patched(archive(state()), b"PK\x01\x02", 42, struct.pack("<I", 2**32 - 2))


@whole("archive")
def an_extra_field_that_points_outside(n):
    return patched(archive(state(), data=b"\0" * 16), b"PK\x03\x04", 28, b"\xff\xff")


@whole("archive")
def an_encrypted_pickle(n):
    return patched(archive(state()), b"PK\x01\x02", 8, b"\x01\x00")


@whole("archive")
def a_directory_longer_than_the_file(n):
    return patched(archive(state()), b"PK\x05\x06", 12, struct.pack("<I", 2**31))


@whole("archive")
def a_zip64_directory_that_claims_everything(n):
    content = archive(state())
    end = content.index(b"PK\x05\x06")
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**60, 2**60, 2**62, 2**62)
    return content[:end] + record + b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1) + content[end:]


@whole("archive", reads=True)
def a_directory_of_many_members(n):
    return archive(state(), [(f"{i}", b"") for i in range(n // 100)])


@whole("archive")
def members_of_one_name(n):
    return archive(state(), [("archive/data/0", b"\0" * 16)] * (n // 130))


@whole("archive")
def two_pickles(n):
    return archive(state(), [("other/data.pkl", state())])


@whole("archive")
def storages_that_overlap(n):
    """Each line of the directory gives the same bytes another name."""
    count = max(n // 350, 2)
    storages = [(text(f"{i}"), tensor(of=storage(key=f"{i}"))) for i in range(10, 10 + count)]
    content = archive(
        b"\x80\x02}(" + b"".join(k + v for k, v in storages) + b"u.",
        [(f"archive/data/{i}", b"\0" * 16) for i in range(10, 10 + count)],
    )
    first = content.index(b"archive/data/10") - 30
    parts = content.split(b"PK\x01\x02")
    lines = [
        line if b"archive/data/" not in line else line[:38] + struct.pack("<I", first) + line[42:] for line in parts[1:]
    ]
    return parts[0] + b"".join(b"PK\x01\x02" + line for line in lines)


# ---------------------------------------------------------------- files of torch < 1.6


@whole("stream")
def a_storage_named_over_and_over(n):
    keys = b"\x80\x02](" + text("0") * (n // 15) + b"e."
    return stream(state(), keys, sizes=(4,) * (n // 24))


@whole("stream")
def a_storage_of_another_size(n):
    return stream(state(), sizes=(2**60,))


@whole("stream")
def a_storage_of_2_to_the_60_elements_in_a_stream(n):
    return stream(state((text("t"), tensor(of=storage(2**60)))), sizes=(2**60,))


@whole("stream")
def a_storage_that_is_not_there(n):
    return stream(state(), b"\x80\x02].")


@whole("stream")
def keys_that_are_no_texts(n):
    return stream(state(), b"\x80\x02](" + b"]" * n + b"e.")


@whole("stream")
def a_text_longer_than_the_stream(n):
    return stream(beside(b"\x8d" + struct.pack("<Q", 2**62) + b"a" * n))


@whole("stream")
def pairs_over_and_over_in_a_stream(n):
    return stream(pairs_made_into_dicts_over_and_over(n))


# ---------------------------------------------------------------- .safetensors


@whole("safetensors")
def a_header_longer_than_any_file(n):
    return safetensors({"w": plain()}, length=2**64 - 1)


@whole("safetensors")
def a_header_longer_than_the_file(n):
    return safetensors({"w": plain()}, length=10**7)


@whole("safetensors")
def a_header_of_lists_in_lists(n):
    return safetensors(b'{"w": ' + b"[" * n)


@whole("safetensors")
def a_header_of_dicts_in_dicts(n):
    return safetensors(b'{"w": ' * (n // 6) + b"1" + b"}" * (n // 6))


@whole("safetensors")
def a_name_that_is_given_twice(n):
    return safetensors(b'{"w": %s, "w": %s}' % ((json.dumps(plain()).encode(),) * 2))


@whole("safetensors")
def one_shape_of_many_dimensions(n):
    return safetensors({"w": plain([1] * (n // 3), (0, 4))})


@whole("safetensors")
def one_enormous_dimension(n):
    return safetensors({"w": plain([10**4000])})


@whole("safetensors")
def a_dimension_of_many_digits(n):
    return safetensors(b'{"w": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 16]}}' % (b"9" * n))


@whole("safetensors")
def dimensions_that_are_no_numbers(n):
    return safetensors({"w": plain([True, 2.0, "2", None, [4]])})


@whole("safetensors")
def a_shape_that_is_a_text(n):
    return safetensors({"w": {"dtype": "F32", "shape": "4" * n, "data_offsets": [0, 16]}})


@whole("safetensors")
def a_shape_of_many_lists(n):
    return safetensors({"w": plain([[]] * (n // 4))})


@whole("safetensors")
def no_elements_of_enormous_rows_in_a_header(n):
    return safetensors({"w": plain([0, 2**62, 2**62], (0, 0))})


@whole("safetensors")
def more_elements_than_can_be_counted(n):
    return safetensors({"w": plain([2**40, 2**40], (0, 2**82))})


@whole("safetensors")
def tensors_that_overlap(n):
    return safetensors({f"{i}": plain([n // 4], (0, n)) for i in range(n // 60)}, b"\0" * n)


@whole("safetensors")
def offsets_below_zero(n):
    return safetensors({"w": plain(offsets=(-16, 0))})


@whole("safetensors")
def offsets_beyond_the_file(n):
    return safetensors({"w": plain(offsets=(2**60, 2**60 + 16))})


@whole("safetensors")
def offsets_that_are_no_numbers(n):
    return safetensors({"w": plain((1,), (False, 4.0))})


@whole("safetensors")
def a_dtype_that_is_a_list(n):
    return safetensors({"w": plain(dtype=["F32"])})


@whole("safetensors")
def metadata_that_are_no_texts(n):
    return safetensors({"__metadata__": {"a": [1] * (n // 3)}, "w": plain()})


@whole("safetensors", reads=True)
def metadata_of_many_characters(n):
    return safetensors({"__metadata__": {"a": "[" * n}, "w": plain()})


@whole("safetensors", reads=True)
def settings_of_a_lora_without_end(n):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q."
    return safetensors(
        {
            "__metadata__": {"lora_adapter_metadata": "[" * n},
            layer + "lora_down.weight": plain([1, 4]),
            layer + "lora_up.weight": plain([4, 1], (16, 32)),
        },
        b"\0" * 32,
    )


@whole("safetensors")
def a_header_with_a_name_of_many_characters(n):
    return safetensors({"a" * n: plain()})


@whole("safetensors", reads=True)
def a_header_with_names_of_terminal_escapes(n):
    return safetensors(
        {f"\x1b[2J\x9b31m\u202e\n{i}": plain((4,), (16 * i, 16 * i + 16)) for i in range(9)}, b"\0" * 144
    )


@whole("safetensors", reads=True)
def many_tensors_of_no_elements(n):
    return safetensors({f"{i}": plain([0], (0, 0)) for i in range(n // 60)})


# ---------------------------------------------------------------- small files of plain values


def lines(*text_lines):
    return "\n".join(text_lines).encode()


@whole("json")
def json_of_lists_in_lists(n):
    return b'{"a": ' + b"[" * n + b"]" * n + b"}"


@whole("json")
def json_with_a_key_twice(n):
    return b"{" + b", ".join(b'"%d": 1' % (i // 2) for i in range(n // 9)) + b"}"


@whole("json")
def json_with_a_number_of_many_digits(n):
    return b'{"a": ' + b"9" * n + b"}"


@whole("json", reads=True)
def json_of_many_lists(n):
    return b'{"a": [' + b"[]," * (n // 3) + b"1]}"


@whole("json")
def json_of_an_escape_that_is_none(n):
    return b'{"a": "\\ud800\\x1b' + b"\x1b[2J" * (n // 4) + b'"}'


@whole("yaml", reads=True)
def yaml_of_aliases_that_double(n):
    """A billion laughs: the twentieth list has 10^20 elements in it, if it is written out."""
    doubled = [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(20)]
    return lines("a0: &a0 [x]", *doubled)


@whole("yaml")
def yaml_of_merges_that_double(n):
    doubled = [f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}" for i in range(20)]
    return lines("a0: &a0 {x: 1}", *doubled)


@whole("yaml")
def yaml_of_lists_in_lists(n):
    return b"a: " + b"[" * n


@whole("yaml", reads=True)
def yaml_of_brackets_32_deep(n):
    return b"a: [" + (b"[" * 31 + b"]" * 31 + b",\n") * (n // 256) + b" 1]"


@whole("yaml")
def yaml_of_dashes(n):
    return b"a:\n" + b"- " * (n // 2)


@whole("yaml")
def yaml_with_a_key_twice(n):
    return lines(*(f"option{i}: 1" for i in range(n // 12)), "option0: 2")


@whole("yaml")
def yaml_with_a_number_in_base_60(n):
    return b"a: 1" + b":1" * (n // 2)


@whole("yaml")
def yaml_with_a_float_in_base_60(n):
    return b"a: 1" + b":1" * (n // 2) + b".0"


@whole("yaml")
def yaml_with_a_date_that_is_none(n):
    return b"a: 2001-99-99"


@whole("yaml")
def yaml_with_a_list_as_a_key(n):
    return lines("b: &b [1]", "? [*b, *b]", ": 1")


@whole("yaml")
def yaml_that_names_a_function(n):
    return b"a: !!python/object/apply:os.getcwd []"


@whole("yaml", reads=True)
def yaml_of_many_anchors(n):
    return lines("a:", *(f"- &b{i} 1" for i in range(n // 12)))
