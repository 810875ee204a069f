"""One entry of a transforms file, and remarks on many of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from my.errors import UserError, note
from voxnerf.scene import facts


class Remarks:
    """Remarks on the frames of a scene; each becomes one note, with the number of frames that it is true of."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.blind = 0  # pixels that a lens maps nothing to

    def add(self, text: str) -> None:
        """Count one more frame of which `text` is true."""
        self.counts[text] += 1

    def tell(self, folder: Path, n: int) -> None:
        """Write a note for each text that was counted, of `n` frames."""
        for text, k in self.counts.items():
            note(f"{folder}: {'all' if k == n else k} of {n} frames: {text}")
        if self.blind:
            note(f"{folder}: {self.blind} pixels lie where the lens as it is stated maps nothing, and are left out")


class Frame(NamedTuple):
    """One entry of `frames`. What it does not state, its file may state for all entries."""

    own: dict[str, Any]  # what the entry states
    common: dict[str, Any]  # what the file states for all entries
    where: str  # for messages
    name: str  # its file_path, as it stands there
    picture: Path | None = None
    by_end: bool = False  # whether it was found by its path's end, elsewhere than the path says

    @property
    def found(self) -> Path:
        """The path of the frame's picture; only for frames whose picture was found."""
        assert self.picture is not None
        return self.picture

    def get(self, key: str, default: Any = None) -> Any:
        """Return what the frame, or else its file, states at `key`; null states nothing."""
        value = self.own.get(key)
        value = self.common.get(key) if value is None else value
        return default if value is None else value

    def nearest(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return {key: value} of keys that mean the same: those that the frame states, or else those of the file."""
        found = ({key: level[key] for key in keys if level.get(key) is not None} for level in (self.own, self.common))
        return next(found) or next(found)

    def number(self, key: str, default: float | None = None, above: float = -math.inf) -> float:
        """Return the finite number at `key`; raises UserError if it is no number, or not above `above`."""
        value = self.get(key, default)
        number = math.nan
        if type(value) in (int, float) and abs(value) < 1e300:  # also False for NaN
            number = float(value)
        if not number > above:
            kind = "a finite number" if above == -math.inf else f"a finite number above {above}"
            raise UserError(f"{self.where}: {key} must be {kind}, got {facts.given(value)}")
        return number

    def switch(self, key: str) -> bool:
        """Return whether `key` is on; unstated it is off. Raises UserError for other values than 0 and 1."""
        value = self.get(key, False)
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise UserError(f"{self.where}: {key} must be true or false, got {facts.given(value)}")
        return bool(value)
