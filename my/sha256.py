"""SHA-256, of a file or a text, and what tells the contents of files from others in little time."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

PART = 2**22  # bytes that are read at a time
WHOLE = 2**24  # bytes up to which a fingerprint reads a file whole
N_SAMPLES, SAMPLE = 256, 4096  # parts of a larger file that it reads, and bytes of each
TEXTS = (".json", ".txt")  # endings of texts, whose ends of lines depend on the system


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


def fingerprint(paths: Iterable[str | Path]) -> str:
    """Return what tells the contents of some files, in this order, from other contents; their names do not count.

    "sha256:..." is the SHA-256 of all their bytes, line ends of texts as on Linux. Where a file has more than WHOLE
    bytes, it is "sampled:...", over the size of each such file and N_SAMPLES parts of it, from its first byte to its
    last at even distances: weights that were trained differ in nearly every part. Raises OSError.
    """
    stats = ((os.path.abspath(path), os.stat(path)) for path in paths)
    return _fingerprint(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@functools.lru_cache(maxsize=256)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    """Return the fingerprint of files (path, bytes, time of the last change); a file that changes is read again."""
    digest, kind = hashlib.sha256(), "sha256"
    for path, size, _ in files:
        with open(path, "rb") as file:
            if size <= WHOLE:
                data = file.read()
                digest.update(data.replace(b"\r\n", b"\n") if path.endswith(TEXTS) else data)
                continue
            kind = "sampled"
            digest.update(str(size).encode())
            for k in range(N_SAMPLES):
                file.seek(k * (size - SAMPLE) // (N_SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return f"{kind}:{digest.hexdigest()}"
