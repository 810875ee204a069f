"""env.json: the folder that it names, and one line for each thing that it can be instead."""

import json

import pytest

from my import env
from my.errors import UserError


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setattr(env, "ENV", tmp_path / "env.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    return (tmp_path / "env.json").write_text


def test_the_data_root(written, tmp_path):
    written(json.dumps({"data_root": "~/data", "other": 1}))
    assert env.data_root() == tmp_path / "data"
    written(json.dumps({"data_root": "~nosuchuser/x"}))
    assert str(env.data_root()) == "~nosuchuser/x"  # a folder of that name, which is then not there
    written('{"data_root": "a\\ud800b"}')
    assert not env.data_root().exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        '{"data_root": null}',
        '{"data_root": 3}',
        '{"data_root": ""}',
        json.dumps({"data_root": "x" * 5000}),
        json.dumps({"data_root": "x" * 300}),  # one name, longer than any file's
        json.dumps({"data_root": "/x" * 2000}),
        "x" * 5000,
        "null",
        '{"data_root": "a\\u0000b"}',
        "[" * 10**5,
        '{"data_root": ["a"]}',
    ],
)
def test_what_names_no_folder_is_refused(written, text):
    written(text)
    with pytest.raises(UserError, match='env.json:? .*it must be {"data_root": FOLDER}') as error:
        env.data_root()
    assert len(str(error.value)) < 700


def test_a_missing_file(written):
    with pytest.raises(UserError, match="env.json cannot be read: No such file or directory; it must be"):
        env.data_root()
