"""What env.json says: where local checkpoints and data are."""

import os
from pathlib import Path

from my.errors import UserError, shown
from my.plain_files import read_json

ENV = Path(__file__).resolve().parent.parent / "env.json"
EXPECTED = 'it must be {"data_root": FOLDER}, such as {"data_root": "~/sjc_data"}'
MAX_PATH = 4096  # characters: no system takes longer ones


def data_root():
    """Return the folder of local checkpoints and data; raises UserError where env.json does not name one."""
    try:
        root = read_json(ENV, ["data_root"])["data_root"]
    except (ValueError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{ENV}: {why}; {EXPECTED}") from None
    if not isinstance(root, str) or not 0 < len(root) <= MAX_PATH or "\0" in root:
        raise UserError(f"{ENV}: data_root is {shown(root)}, not the path of a folder; {EXPECTED}")
    return Path(os.path.expanduser(root))
