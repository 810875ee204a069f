"""What env.json says: where local checkpoints and data are."""

import json
from pathlib import Path

ENV = Path(__file__).resolve().parent.parent / "env.json"


def data_root():
    """Return the folder of local checkpoints and data."""
    return Path(json.loads(ENV.read_text())["data_root"]).expanduser()
