"""The page of a run while it goes on: refreshed after some of its steps, off the critical path, and at its end."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from types import TracebackType

from my import starts
from my.errors import first_line, note
from options.sjc import SJCConfig

PAGE = "report.html"


class Live:
    """Writes the page of the run in the current folder: by `refresh`, and where a block of it ends.

    A page that cannot be written is told once, and the run goes on. Only a full disk raises OSError, as it does
    wherever a run writes; not where the block ends with an exception, which says more.
    """

    def __init__(self, cfg: SJCConfig) -> None:
        self.cfg, self.told = cfg, False

    def refresh(self, step: int) -> None:
        """Write the page of a run that has taken `step` steps, and record what memory that took."""
        starts.use()
        if not self.cfg.report:
            return
        try:
            from pages import run  # what it needs is not light

            run.write(Path(), self.cfg, step)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        """Say that there is no page, once per run."""
        if self.told:
            return
        from tqdm import tqdm

        self.told = True
        with tqdm.external_write_mode(sys.stderr):
            note(f"{PAGE} is not written: {first_line(error)}; the run itself is whole; --report False leaves it out")

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            self.refresh(0)
        except OSError:
            if kind is None:
                raise
