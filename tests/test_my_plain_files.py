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


@pytest.mark.parametrize(
    "data, why",
    [
        (b'{"a": 1,\n "b" 2}', "is damaged: broken JSON at line 2, column 6"),
        (b"{} {}", "is damaged: broken JSON at line 1, column 4"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is damaged: a number of more than 4300 digits"),
        (b'{"a": 1, "a": 2}', "is damaged: a is given twice"),
        (b'{"a": "\xff"}', "is damaged: byte 8 is not of a text in UTF-8"),
    ],
)
def test_what_is_wrong_with_json_is_said_in_our_words(tmp_path, data, why):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "x")
    assert str(error.value) == why


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
