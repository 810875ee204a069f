"""Time of the final video of a run, as its command is started: frames, PNG and both videos.

    python -m benchmarks.highres FOLDER

FOLDER is a finished run, such as one of the preset mini. The mark holds for 200 frames of the miniature on 2 cores. The
seconds of all processes on the CPU, those of the encoders included, are said too: other programs add less to them.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pydantic import Field

from benchmarks.step import Mark
from my.config import Config, load
from my.errors import RunError, first_line, run_main
from my.file_system import real

ROOT = Path(__file__).resolve().parent.parent
MARK = 20.0  # seconds for 200 frames


class HighresConfig(Config):
    """All options of benchmarks.highres."""

    run: list[str] = Field(min_length=1, max_length=1, description="folder of a finished run")
    n_frames: int = Field(200, gt=0, description="frames to make")
    device: str = Field("cpu", description="device of the rendering")


def measure(cfg: HighresConfig) -> tuple[float, float]:
    """Return (seconds, seconds on the CPU) of highres_final_vis.py, its start included."""
    command = [str(ROOT / "highres_final_vis.py"), str(real(cfg.run[0])), "--device", cfg.device]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, *command, "--skip", "0", "--n_frames", str(cfg.n_frames)],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RunError(f"highres_final_vis.py failed: {first_line(done.stderr)}")
    on_cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, on_cpu


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the mark."""
    cfg = load(
        HighresConfig, argv, prog="python -m benchmarks.highres", doc=__doc__, positional="run", config_file=None
    )
    seconds, on_cpu = measure(cfg)
    print(f"{cfg.n_frames} frames: {seconds:.1f} s, {on_cpu:.1f} s on the CPU")
    print(Mark(f"{cfg.n_frames} frames of the final video", seconds, MARK, " s"))


if __name__ == "__main__":
    run_main(main)
