"""PSNR on the test views against minutes of training: run_nerf.py with the fused renderer and with the reference.

    python -m benchmarks.nerf --scene ~/data/nerf_synthetic/lego --out FOLDER --minutes 10

Run it in the project's folder. It leaves a run of run_nerf.py in FOLDER/<renderer>/, and the curve in FOLDER/nerf.md.
Started again, it keeps the runs that are finished and continues the others.
"""

from __future__ import annotations

import bisect
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from my import config
from my.errors import RunError, run_main
from my.file_system import expanded
from my.run_dir import read_history, refuse_output, write_atomic

ROOT = Path(__file__).resolve().parent.parent
TABLE = "nerf.md"
TEST_EVERY = {"fused": 400, "reference": 40}  # steps


class CurveConfig(config.Config):
    """All options of benchmarks.nerf."""

    scene: str = Field("lego", description="as in run_nerf.py")
    out: str = Field(description="a folder to fill")
    renderers: list[Literal["fused", "reference"]] = Field(["fused", "reference"], description="columns of the table")
    minutes: float = Field(10.0, gt=0, description="training time of each run")
    rows: int = Field(10, gt=0, description="rows of the table")
    grid_size: int = Field(200, gt=1, description="--model.grid_size of the runs")
    bs: int = Field(8192, gt=0, description="--bs of the runs")
    view_dependent: bool = Field(False, description="--view_dependent of the runs")


def train(cfg: CurveConfig, renderer: str) -> tuple[dict[float, float], dict[str, Any]]:
    """Begin, continue or keep the run of one renderer; return its curve {minutes: test PSNR}, and its final metrics."""
    folder = Path(cfg.out) / renderer
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("test_*/metrics.json")):
        start = (
            ["--resume", "True"]
            if (folder / "ckpt").exists()
            else [
                "--scene",
                cfg.scene,
                "--renderer",
                renderer,
                "--max_minutes",
                str(cfg.minutes),
                "--n_epoch",
                "1000",
                "--model.grid_size",
                str(cfg.grid_size),
                "--bs",
                str(cfg.bs),
                "--view_dependent",
                str(cfg.view_dependent),
                "--test_every",
                str(TEST_EVERY[renderer]),
            ]
        )
        done = subprocess.run([sys.executable, str(ROOT / "run_nerf.py"), *start], cwd=folder)
        if done.returncode:
            raise RunError(f"{folder}: run_nerf.py ended with status {done.returncode}")
    rows = [row for row in read_history(folder / "history.json") if "test_psnr" in row]
    (metrics,) = folder.glob("test_*/metrics.json")
    return {row["minutes"]: row["test_psnr"] for row in rows}, json.loads(metrics.read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    """Train with each renderer, and write the curves."""
    cfg = config.load(CurveConfig, argv, prog="python -m benchmarks.nerf", doc=__doc__, config_file=None)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    refuse_output("--out", out / TABLE)
    scene = expanded(cfg.scene)
    cfg.scene = str(scene.resolve()) if scene.is_dir() else cfg.scene  # the runs start elsewhere
    curves, finals = zip(*(train(cfg, renderer) for renderer in cfg.renderers))
    lines = [
        "| minutes | " + " | ".join(f"{name}, dB" for name in cfg.renderers) + " |",
        "| ---: |" + " ---: |" * len(cfg.renderers),
    ]
    for i in range(1, cfg.rows + 1):
        at = cfg.minutes * i / cfg.rows
        lines.append(f"| {at:g} | " + " | ".join(psnr_at(curve, at) for curve in curves) + " |")
    for name, key, unit in (("final PSNR", "psnr", " dB"), ("final SSIM", "ssim", "")):
        lines.append(f"| {name} | " + " | ".join(f"{m['mean'][key]:.{2 if unit else 4}f}" for m in finals) + " |")
    lines.append("| steps | " + " | ".join(str(m["step"]) for m in finals) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    write_atomic(out / TABLE, text)


def psnr_at(curve: dict[float, float], minutes: float) -> str:
    """Return as text the PSNR of the last test in the first `minutes` of a curve; "" if there is none."""
    times = sorted(curve)
    i = bisect.bisect_right(times, minutes)
    return f"{curve[times[i - 1]]:.2f}" if i else ""


if __name__ == "__main__":
    run_main(main)
