"""Small files of plain values, JSON and YAML, read so that what a file claims cannot hurt.

Time and memory are linear in the bytes of the file. A reader raises ValueError for a file that is too large,
damaged, too deep, or no mapping: its words go behind the name of the file. OSError is for one that cannot be opened.
"""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml

from my.errors import first_line, shown

MAX_JSON = 32_000_000  # bytes of a file
MAX_YAML = 250_000  # bytes of a file, of which the parser reads some 100,000 per second
MAX_DEPTH = 32  # of brackets in YAML: the parser looks at all of them for every word inside
MAX_NUMBER = 100  # characters of a number or a date in YAML: longer ones take time that is not linear


def read_json(path: str | Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """Return the dict in the JSON file at `path`; ValueError where it lacks any of `keys`."""
    return _mapping(parse_json(text_of(path, MAX_JSON)), keys)


def read_yaml(path: str | Path, keys: Collection[str] = ()) -> dict[Any, Any]:
    """Return the dict in the YAML file at `path`; ValueError where it lacks any of `keys`."""
    return _mapping(load_yaml(path), keys)


def load_yaml(path: str | Path) -> Any:
    """Return the values in the YAML file at `path`, None if it is blank."""
    return parse_yaml(text_of(path, MAX_YAML))


def parse_json(text: str) -> Any:
    """Return the values in a JSON text; ValueError where it is damaged, too deep, or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("is damaged: too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is damaged: broken JSON at line {error.lineno}, column {error.colno}") from None
    except _Twice as error:
        raise ValueError(f"is damaged: {error}") from None
    except ValueError:  # Python's limit of the digits of an integer
        raise ValueError(f"is damaged: a number of more than {sys.get_int_max_str_digits()} digits") from None


def parse_yaml(text: str) -> Any:
    """Return the values in a YAML text; ValueError where it is damaged, too deep, gives a key twice, or merges any."""
    try:
        return yaml.load(text, Loader=PlainLoader)
    except RecursionError:
        raise ValueError("is damaged: too deep") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"is damaged: broken YAML{at}: {shown(error.problem or '')}") from None
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        raise ValueError(f"is damaged: broken YAML: {first_line(error)}") from None


def size_of(path: str | Path) -> int:
    """Return the bytes of a file; ValueError for a pipe or a device, which may never end; OSError for no file."""
    state = Path(path).stat()
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):  # opening a folder says so itself
        raise ValueError("is a pipe or a device, not a file on disk")
    return state.st_size


class PlainLoader(yaml.SafeLoader):
    """Safe YAML whose reading is linear: an alias is one object again, and nothing copies it.

    Merge keys (`<<`) would copy, and are refused. So is a key that is given twice, instead of a silent choice.
    """

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Refuse more than MAX_DEPTH brackets inside one another."""
        if self.flow_level >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_DEPTH} brackets inside one another", problem_mark=self.get_mark()
            )
        super().fetch_flow_collection_start(token)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse what this method of the library is for: it copies the entries of other mappings."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem="merge keys (<<) are not read; write the values out", problem_mark=key.start_mark
                )

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice."""
        twice = first_repeated(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f"{shown(twice)} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Refuse numbers and dates of more than MAX_NUMBER characters."""
        words = node.tag.rpartition(":")[2]
        if words in ("int", "float", "timestamp") and len(node.value) > MAX_NUMBER:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value)} characters", problem_mark=node.start_mark
            )
        return super().construct_object(node, deep)


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first of some names that was there before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def text_of(path: str | Path, most: int) -> str:
    """Return the text in the UTF-8 file at `path`; ValueError where it has more than `most` bytes, or is no UTF-8."""
    size = size_of(path)
    if size > most:
        raise ValueError(f"has {size} bytes, more than {most}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is damaged: byte {error.start + 1} is not of a text in UTF-8") from None


class _Twice(ValueError):
    """A key that is given twice, in our words."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(f"{shown(first_repeated(key for key, _ in pairs))} is given twice")
    return found


def _mapping(found: Any, keys: Collection[str]) -> dict[Any, Any]:
    if not isinstance(found, dict):
        raise ValueError("holds no settings")
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    return found
