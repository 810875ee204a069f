"""One entry of a transforms file, and what is told of many."""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from my.errors import UserError, note
from voxnerf.scene import facts


class Remarks:
    """What is to be told of the frames of a scene: each text once, with the number of frames that it is true of."""

    def __init__(self):
        self.counts = Counter()
        self.blind = 0  # pixels that a lens maps nothing to

    def add(self, text: str):
        """Count one more frame of which `text` is true."""
        self.counts[text] += 1

    def tell(self, folder, n: int):
        """Write a note for each text that was counted, of `n` frames."""
        for text, k in self.counts.items():
            note(f"{folder}: {'all' if k == n else k} of {n} frames: {text}")
        if self.blind:
            note(f"{folder}: {self.blind} pixels lie where the lens as it is stated maps nothing, and are left out")


class Frame(NamedTuple):
    """One entry of `frames`, before what its file says for all."""

    own: dict
    common: dict
    where: str  # for messages
    name: str  # its file_path, as it stands there
    picture: Path | None = None
    by_end: bool = False  # whether it was found by its path's end, elsewhere than the path says

    def get(self, key, default=None):
        """Return what the frame, or else its file, states at `key`; null states nothing."""
        value = self.own.get(key)
        value = self.common.get(key) if value is None else value
        return default if value is None else value

    def nearest(self, keys) -> dict:
        """Return what is stated of some keys that mean the same: by the frame, or where it states none, by the file."""
        found = ({key: level[key] for key in keys if level.get(key) is not None} for level in (self.own, self.common))
        return next(found) or next(found)

    def number(self, key, default=None, above=-math.inf) -> float:
        """Return the finite number at `key`; raises UserError where it is none, or not `above`."""
        value = self.get(key, default)
        number = math.nan
        if type(value) in (int, float) and abs(value) < 1e300:  # also False for NaN
            number = float(value)
        if not number > above:
            kind = "a finite number" if above == -math.inf else f"a finite number above {above}"
            raise UserError(f"{self.where}: {key} must be {kind}, got {facts.given(value)}")
        return number

    def switch(self, key) -> bool:
        """Return whether `key` is on, which it is not where nothing is stated; UserError for text and other values."""
        value = self.get(key, False)
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise UserError(f"{self.where}: {key} must be true or false, got {facts.given(value)}")
        return bool(value)
