"""How much memory a long run takes while it goes on: after its first steps it takes no more.

    python tests/steady.py --steps 3000
    python tests/steady.py --steps 300 --preset mini

A run of run_sjc.py is done in this process, with all that it leaves: pictures, history, snapshots, its page. The most
memory that is resident in the last tenth of its steps is compared with the most in the second twentieth, which is up
to step 300 of 3000.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from pydantic import Field  # noqa: E402  # the path to the root comes first

from my import config  # noqa: E402
from my.errors import RunError, run_main  # noqa: E402

WIDTH = 4.0  # MiB that it may be more: three times what a run of 3000 steps that keeps nothing was seen to differ by
EVERY = 4  # steps between two looks
SMALL = [
    *("--vox.grid_size", "8", "--pose.rend_hw", "8", "--pose.view_words", "sjc", "--device", "cpu"),
    *("--ckpt_every", "0.01"),
]
MORE = {"ideal": ["--ideal.n_cameras", "10"], "mini": []}  # by preset


class SteadyConfig(config.Config):
    """Every option."""

    steps: int = Field(3000, ge=100, description="length of the run")
    preset: str = Field("ideal", description="of run_sjc.py: ideal or mini")
    keep_kb: int = Field(0, ge=0, description="let the run keep so many KB per step, to see that this is noticed")


def resident() -> float:
    """Return the memory of this process that is resident, MiB, once the allocator has given back what is free."""
    with contextlib.suppress(AttributeError, OSError):  # it else fills what is free first, which hides tens of MiB
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def taken(cfg: SteadyConfig) -> list[float]:
    """Return the resident memory after some steps of a run in the current folder, MiB."""
    import run_sjc
    from sjc import SJC

    found, kept, step = [], [], SJC.step

    def watched(optimisation: SJC, i: int):
        kept.append(os.urandom(1000 * cfg.keep_kb))
        if i % EVERY == 0:
            found.append(resident())
        return step(optimisation, i)

    SJC.step = watched
    try:
        run_sjc.main(["--preset", cfg.preset, "--n_steps", str(cfg.steps), *SMALL, *MORE[cfg.preset]])
    finally:
        SJC.step = step
    return found


def growth(found: list[float]) -> float:
    """Return by how many MiB the most of the last tenth of a run is above the most of its second twentieth."""
    n = len(found)
    return max(found[-n // 10 :]) - max(found[n // 20 : n // 10])


def main(argv: list[str] | None = None) -> None:
    """Do a run, print the memory of each tenth of it, and end with status 1 where it grew."""
    cfg = config.load(SteadyConfig, argv, prog="tests/steady.py", doc=__doc__, config_file=None)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            found = taken(cfg)
        finally:
            os.chdir(before)
    n = len(found)
    tenths = [max(found[i * n // 10 : (i + 1) * n // 10]) for i in range(10)]
    print("most resident memory of each tenth, MiB:", " ".join(f"{x:.1f}" for x in tenths))
    print(f"growth {growth(found):.2f} MiB, at most {WIDTH}")
    if growth(found) > WIDTH:
        raise RunError(f"the memory of a run grew by {growth(found):.1f} MiB")


if __name__ == "__main__":
    run_main(main)
