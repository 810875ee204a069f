"""All that can be measured on a machine with a GPU, in under ten minutes.

    python -m benchmarks.gpu --out FOLDER

Run it in the project's folder. It runs the self-test of the fused renderer, the benchmarks of the renderer and of a
whole step, and two minutes of training on the pictures of lego if these are there. Each has a time limit. Their output
is in FOLDER, and is printed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from my import config
from my.errors import RunError, UserError, note, run_main
from my.file_system import real
from my.run_dir import write_atomic

ROOT = Path(__file__).resolve().parent.parent


class GPUConfig(config.Config):
    """All options of benchmarks.gpu."""

    out: str = Field(description="a folder to fill")
    device: str = Field("cuda", description="cuda, cuda:1")
    scene: str = Field("lego", description="as in run_nerf.py; left out where it is not there")


def stages(cfg: GPUConfig, folder: Path) -> list[tuple[str, list[str], int]]:
    """Return (name, words after "python", seconds that it may take) of all that is run."""
    device = ["--device", cfg.device]
    render = "-m benchmarks.render --repeats 5 --n_steps 200 --grids 100,200 --images 64,128".split()
    found = [
        ("selftest", ["doctor.py", "--preset", "ideal", "--selftest", "True", *device], 90),
        ("render", [*render, *device], 120),
        ("step", ["-m", "benchmarks.step", "--out", str(folder / "step.json"), *device], 180),
    ]
    if scene_is_there(cfg.scene):
        curve = "-m benchmarks.nerf --renderers fused --minutes 2 --rows 4".split()
        found.append(("nerf", [*curve, "--scene", cfg.scene, "--out", str(folder / "nerf")], 200))
    return found


def scene_is_there(name: str) -> bool:
    """Return whether the pictures of a scene are on this machine; a note says where they are not."""
    from voxnerf.scene import find_scene

    try:
        find_scene(name)
    except UserError as error:
        note(f"no training of a NeRF: {error}")
        return False
    return True


def run(name: str, words: Sequence[str], limit: float, folder: Path) -> str:
    """Run one stage, and keep and print its output; return what went wrong in one line, "" for nothing."""
    start = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=limit, text=True, stdout=subprocess.PIPE)
    except subprocess.TimeoutExpired:
        return f"{name} took more than {limit:g} s"
    write_atomic(folder / f"{name}.txt", done.stdout)
    print(f"## {name}: {time.perf_counter() - start:.0f} s\n\n{done.stdout}", flush=True)
    return f"{name} ended with status {done.returncode}" if done.returncode else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages; raises UserError without a GPU, and RunError where a stage failed."""
    cfg = config.load(GPUConfig, argv, prog="python -m benchmarks.gpu", doc=__doc__, config_file=None)
    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmarks.gpu needs a GPU with CUDA, and PyTorch sees none here; `python doctor.py` says why")
    folder = real(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"# {torch.cuda.get_device_name(torch.device(cfg.device))}, PyTorch {torch.__version__}\n", flush=True)
    wrong = [run(name, words, limit, folder) for name, words, limit in stages(cfg, folder)]
    if any(wrong):
        raise RunError("; ".join(filter(None, wrong)))


if __name__ == "__main__":
    run_main(main)
