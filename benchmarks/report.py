"""Time and size of the page of a run: as it is refreshed while the run goes on, and with all that a finished one has.

    python -m benchmarks.report RUN

Run it in the project's folder. RUN is the folder of a run, which is copied and stays as it is. Marks that are missed
are said.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from pydantic import Field

from benchmarks.step import Mark
from my import config
from my.config import Config
from my.errors import UserError, run_main
from my.script import FULL_CONFIG
from options.sjc import SJCConfig
from pages.markup import MB
from pages.run import write

SHORT_RUN_S, REFRESHES = 25 * 60, 20  # a run, seconds; refreshes in it
MOST_SHARE, MOST_END_S, MOST_MB = 0.01, 3.0, 25.0  # of a run, for all refreshes; the marks for the end and the size


class ReportConfig(Config):
    """All options of benchmarks.report."""

    run: list[str] = Field(min_length=1, description="the run: its folder")
    repeats: int = Field(5, gt=0, description="times that each page is written; the median counts")


def measured(folder: Path, cfg: SJCConfig, repeats: int) -> tuple[float, float, int]:
    """Return (seconds, seconds of a processor, bytes) of the page of a run, without a first one that imports much."""
    size = write(folder, cfg)
    times, start = [], processor_s()
    for _ in range(repeats):
        begun = time.perf_counter()
        write(folder, cfg)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), (processor_s() - start) / repeats, size


def processor_s() -> float:
    """Return the seconds that processors have worked for this process and for those that it has started."""
    return sum(os.times()[:4])


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the marks."""
    options = config.load(
        ReportConfig, argv, prog="python -m benchmarks.report", doc=__doc__, positional="run", config_file=None
    )
    run = Path(options.run[0])
    if not (run / FULL_CONFIG).exists():
        raise UserError(f"{run}: no {FULL_CONFIG}; give the folder of a run of run_sjc.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("ckpt", "fields", "depth"))
        cfg = config.read(SJCConfig, folder / FULL_CONFIG)
        end, end_cpu, size = measured(folder, cfg, options.repeats)
        for path in [*folder.glob("test_*"), *folder.glob("highres_*")]:  # which a run leaves at its end
            shutil.rmtree(path)
        for mesh in folder.glob("*.glb"):
            mesh.unlink()
        refresh, refresh_cpu, small = measured(folder, cfg, options.repeats)
    print(f"a refresh: {refresh:.3f} s, of a processor {refresh_cpu:.3f} s, {small / MB:.2f} MB")
    print(f"the whole page: {end:.3f} s, of processors {end_cpu:.3f} s, {size / MB:.2f} MB")
    print(Mark(f"{REFRESHES} refreshes, share of 25 minutes", refresh * REFRESHES / SHORT_RUN_S, MOST_SHARE))
    print(Mark("the whole page", end, MOST_END_S, " s"))
    print(Mark("its size", size / MB, MOST_MB, " MB"))


if __name__ == "__main__":
    run_main(main)
