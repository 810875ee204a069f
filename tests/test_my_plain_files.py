"""Small files of plain values: what is read, and what each that cannot be is called."""

import pytest

from my.errors import UserError, first_line, note, one_line, shown, some
from my.plain_files import read_json, read_yaml


@pytest.mark.parametrize("read, text", [(read_json, '{"a": [1, 2.5, null]}'), (read_yaml, "a: [1, 2.5, null]")])
def test_a_mapping_is_read(tmp_path, read, text):
    (tmp_path / "x").write_text(text)
    assert read(tmp_path / "x", ["a"]) == {"a": [1, 2.5, None]}
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbf" + text.encode())  # the mark that editors of Windows put first
    assert read(tmp_path / "x") == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    "text, why",
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[1]", "holds no settings"),
        ("[" * 100_000, "damaged"),
        ('{"b": 1}', "has no a"),
        ("\x1b[2J", "damaged"),
    ],
)
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_cannot_be_read_is_said(tmp_path, read, text, why):
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError) as error:
        read(tmp_path / "x", ["a"])
    assert why in str(error.value) or (read is read_yaml and not text and "no settings" in str(error.value))
    assert str(error.value).isprintable() and len(str(error.value)) < 320


def test_messages_are_one_printable_line(capsys):
    assert str(UserError("a\n  b\x1b[2J\u202e")) == "a b\\x1b[2J\\u202e"
    note("c\nd")
    assert capsys.readouterr().err == "note: c d\n"
    assert one_line("\udc80") == "\\udc80" and one_line("grün") == "grün"


def test_what_a_file_says_is_cut():
    assert shown("a" * 10**7) == "a" * 97 + "..." and shown("ab") == "ab"
    assert shown(1 << 10**6) == "a number of 1000001 bits" and len(shown(list(range(10**6)))) <= 100
    assert some("abcd") == "a, b, c, ..." and some("ab") == "a, b"
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
