"""The steps of a run that were left out, since their numbers were not finite: they are counted and told."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from my.errors import RunError, note
from my.script import check_finite

if TYPE_CHECKING:
    import torch

MASKED = "masked"  # the statistic that is 1 for a step that was left out, else 0; where it is missing none was


class LeftOut:
    """Counts the steps that were left out between two readings of the statistics.

    The first reading in which some were, but not all, is told in a note. A reading in which all were stops the run.
    before: what a message says of checkpoints.  remedy: what to do.
    """

    def __init__(self, before: str, remedy: str) -> None:
        self.before, self.remedy = before, remedy
        self.flags: list[torch.Tensor | float] = []
        self.told = False

    def add(self, stats: dict[str, Any]) -> None:
        """Take in the statistics of a step."""
        self.flags.append(stats.get(MASKED, 0.0))

    def reading(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Return the last step's statistics, with the flags (n,) of the n steps since the last reading."""
        import torch

        flags, self.flags = torch.stack([torch.as_tensor(flag) for flag in self.flags]), []
        return {**stats, MASKED: flags}

    def judged(self, step: int, logged: bool, reading: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return a reading at `step` as a row of history.json, and as the bar shows it.

        It has no row where it is not to be `logged`, unless steps were left out: the row then has their number.
        Raises RunError where all steps were, and where none was but a number is not finite.
        """
        row = {name: value for name, value in reading.items() if name != MASKED}
        n, n_left_out = len(reading[MASKED]), int(reading[MASKED].sum())
        if n_left_out in (0, n):
            check_finite(row, f"step {step}", f"{self.before}; {self.remedy}")
        if n_left_out == n:
            raise RunError(f"step {step}: its update is not finite; {self.before}; {self.remedy}")
        shown = {name: f"{float(value):.3g}" for name, value in row.items()}
        if n_left_out:
            self._tell(step, n_left_out, n)
            row[MASKED] = n_left_out
        return (row if logged or n_left_out else {}), shown

    def _tell(self, step: int, n_left_out: int, n: int) -> None:
        """Say that steps were left out, once per run."""
        if self.told:
            return
        from tqdm import tqdm

        self.told = True
        with tqdm.external_write_mode(sys.stderr):
            note(
                f"{n_left_out} of {n} steps up to step {step} gave numbers that are not finite, and were left out; "
                f'history.json counts them as "{MASKED}"; if it goes on, {self.remedy}'
            )
