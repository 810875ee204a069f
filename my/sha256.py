"""SHA-256, of a file or a text."""

from __future__ import annotations

import hashlib
from pathlib import Path

PART = 2**22  # bytes that are read at a time


def sha256_of_text(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: str | Path, bar: bool = False) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; with `bar`, a progress bar is on stderr meanwhile."""
    from tqdm import tqdm

    path, digest = Path(path), hashlib.sha256()
    progress = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=not bar)
    with open(path, "rb") as file, progress:
        while part := file.read(PART):
            digest.update(part)
            progress.update(len(part))
    return digest.hexdigest()
