"""Time and peak memory of loading a Stable Diffusion checkpoint, and of one guided denoising at its own size.

    python -m benchmarks.sd_denoise --checkpoint ~/models/v1-5-pruned-emaonly.safetensors

Without --checkpoint, a full-size Stable Diffusion 1.5 with random weights in float32 (4.3 GB, under published names) is
written to a temporary folder, measured in a process of its own, and deleted: 5 GB of disk, 9 GB of memory.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from my import config, script
from my.errors import RunError, run_main

ROOT = Path(__file__).resolve().parent.parent

NAMES = ROOT / "tests" / "reference" / "sd_v1_checkpoint_keys.json"
T = TypeVar("T")
PROMPT = "A high quality photo of a delicious burger"


class DenoiseConfig(script.OnDevice):
    """Every option of benchmarks.sd_denoise."""

    checkpoint: str | None = Field(
        None, description="what to load, as --sd.checkpoint takes it; default random weights"
    )
    precision: str = Field("auto", description="as --sd.precision takes it")
    threads: int | None = Field(None, gt=0, description="CPU threads, default PyTorch's own")


def write_random(path: Path) -> None:
    """Write Stable Diffusion 1.5 with random weights, under the published names, to a .safetensors file."""
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in json.loads(NAMES.read_text(encoding="utf-8")).items():
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(shape[1])[None]
        elif len(shape) == 1:
            tensors[name] = torch.full(shape, float(name.endswith("weight")))  # norms and biases
        else:
            tensors[name] = torch.randn(shape, generator=rng) * torch.tensor(shape[1:]).prod() ** -0.5
    save_file(tensors, path)


def write_shapes(path: Path) -> None:
    """Write the names and shapes of Stable Diffusion 1.5 to a .safetensors file whose weights take no disk."""
    header, end = {}, 0
    for name, shape in json.loads(NAMES.read_text(encoding="utf-8")).items():
        dtype, size = ("I64", 8) if name.endswith("position_ids") else ("F32", 4)
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)


def measure(cfg: DenoiseConfig) -> None:
    """Print what loading, and then a guided denoising, encoding and decoding, took."""
    import torch

    from options.sjc import SJCConfig

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    run = SJCConfig(sd={"checkpoint": cfg.checkpoint, "precision": cfg.precision})
    device = script.pick_device(cfg.device)
    seconds: dict[str, float] = {}

    def timed(what: str, f: Callable[[], T]) -> T:
        """Return f(), and note the seconds that it took."""
        start = time.perf_counter()
        result = f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[what] = time.perf_counter() - start
        return result

    from adapt import make_adapter

    with torch.no_grad():
        adapter = timed("load", lambda: make_adapter(run, device))
        cond, uncond = timed("embed", lambda: adapter.embed([f"front view of {PROMPT}", ""])).split(1)
        adapter.text_done()
        x0 = torch.randn(1, *adapter.data_shape, generator=torch.Generator().manual_seed(0)).to(device)
        sigma = adapter.round_sigma(1.0)
        D = timed("denoise", lambda: adapter.denoise(x0 * (1 + sigma), sigma, cond, uncond, 100.0))
        pictures = timed("decode", lambda: adapter.decode(x0))
    if not (D.isfinite().all() and pictures.isfinite().all()):
        raise RunError("the denoised picture is not finite")
    for what, s in seconds.items():
        print(f"{what:10} {s:8.2f} s")
    print(f"latents {list(D.shape)}, picture {list(pictures.shape)}, {torch.get_num_threads()} threads, {device}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if device.type == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main(argv: list[str] | None = None) -> None:
    """Measure a checkpoint, or one with random weights that is made for it."""
    cfg = config.load(DenoiseConfig, argv, prog="python -m benchmarks.sd_denoise", doc=__doc__, config_file=None)
    if cfg.checkpoint:
        measure(cfg)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        write_random(path)
        print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB")
        flags = [f"--{k}={v}" for k, v in cfg.model_dump().items() if k != "checkpoint" and v is not None]
        if subprocess.run(
            [sys.executable, "-m", "benchmarks.sd_denoise", "--checkpoint", str(path), *flags], cwd=ROOT
        ).returncode:
            raise RunError("the measurement failed; its own line says why")


if __name__ == "__main__":
    run_main(main)
