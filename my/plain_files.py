"""Small files of plain values, JSON and YAML, read so that what a file claims cannot hurt.

Time and memory are linear in the bytes of the file. A reader raises ValueError for a file that is too large,
damaged, too deep, or no mapping: its words go behind the name of the file. OSError is for one that cannot be opened.
"""

import json
from pathlib import Path

import yaml

from my.errors import first_line

MAX_BYTES = 100_000_000  # of a file of plain values


def read_json(path, keys=()):
    """Return the dict in the JSON file at `path`; ValueError where it lacks any of `keys`."""
    return _mapping(json.loads, (ValueError, RecursionError), path, keys)


def read_yaml(path, keys=()):
    """Return the dict in the YAML file at `path`; ValueError where it lacks any of `keys`."""
    return _mapping(yaml.safe_load, (ValueError, RecursionError, yaml.YAMLError), path, keys)


def _mapping(parse, errors, path, keys):
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"has {size} bytes, more than {MAX_BYTES}")
    try:
        found = parse(path.read_text(encoding="utf-8-sig"))
    except errors as error:
        raise ValueError(f"is damaged: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError("holds no settings")
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"has no {', '.join(missing)}")
    return found
