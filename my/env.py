"""What env.json says: where local checkpoints and data are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from my.errors import UserError, shown
from my.file_system import expanded
from my.plain_files import read_json

ENV = Path(__file__).resolve().parent.parent / "env.json"
EXPECTED = 'it must be {"data_root": FOLDER}, such as {"data_root": "~/sjc_data"}'
MAX_PATH = 3000  # characters: systems take up to 4096, and names of files come behind it


def data_root() -> Path:
    """Return the folder of local checkpoints and data; raises UserError where env.json does not name one."""
    try:
        root = read_json(ENV, ["data_root"])["data_root"]
    except (ValueError, OSError) as error:
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise UserError(f"{ENV} {why}; {EXPECTED}") from None
    if not isinstance(root, str) or not 0 < len(root) <= MAX_PATH or "\0" in root or is_too_long(root):
        what = shown(root) or "empty"
        raise UserError(f"{ENV}: data_root is {what}, not the path of a folder; {EXPECTED}")
    return expanded(root)


def is_too_long(path: str) -> bool:
    """Whether the system takes no name as long as one in this path: asking for it would raise OSError later."""
    try:
        os.stat(expanded(path))
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    except ValueError:  # a name of characters that no file can have, which is then not there
        return False
    return False
