"""Time and peak memory of the export of a run's mesh, part by part.

    python -m benchmarks.mesh RUN --report mesh.md

Run it in the project's folder, in a process of its own: the peak is that of the process. Processor time is that of all
threads together. Where it is more than the time on the clock, several worked; where it is less, the part waited for
others on the machine.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from benchmarks.render import hardware, table
from my import config
from my.errors import run_main
from my.run_dir import refuse_output, write_atomic
from options.mesh import MeshConfig


class MeshTimes(MeshConfig):
    """All options of benchmarks.mesh: a GLB with an atlas is made."""

    threads: int | None = Field(None, gt=0, description="CPU threads, default PyTorch's own")
    report: str | None = Field(None, description="Markdown file to write")


def peak_gib() -> float:
    """Return the most memory that this process has held, GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Parts:
    """The parts of some work, each with its times."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float]] = []  # name, s on the clock, s of processors, GiB

    def __call__(self, name: str, part: Callable[..., Any], *args: Any) -> Any:
        """Return what `part(*args)` returns; its times are kept."""
        clock, processors = time.perf_counter(), time.process_time()
        result = part(*args)
        self.rows.append((name, time.perf_counter() - clock, time.process_time() - processors, peak_gib()))
        return result

    def text(self) -> str:
        """Return the parts and their sum as a table."""
        total = ("all", sum(row[1] for row in self.rows), sum(row[2] for row in self.rows), peak_gib())
        cells = [[name, f"{a:.1f}", f"{b:.1f}", f"{c:.2f}"] for name, a, b, c in (*self.rows, total)]
        return table(["part", "s", "processor s", "peak so far, GiB"], cells)


def imports() -> None:
    """Import what the parts below would import."""
    import fast_simplification  # noqa: F401
    import skimage.measure  # noqa: F401
    import trimesh  # noqa: F401
    import xatlas  # noqa: F401

    import asset  # noqa: F401
    from mesh import colours, compare, files, surface  # noqa: F401
    from voxnerf.fused import launch

    launch.start()


def export(cfg: MeshTimes, part: Parts) -> str:
    """Do what export_mesh.py does for a GLB with an atlas; return a line about the result."""
    from asset import open_asset
    from mesh import colours, compare, files, surface

    asset = part("load", open_asset, cfg)
    level = part("level", surface.best_level, asset) if isinstance(cfg.level, str) else cfg.level
    fine = part("surface", surface.extract, asset.field, cfg.resolution, level)
    mesh = part("decimation", surface.decimated, fine, cfg.n_faces)
    mesh = part("colours and atlas", colours.with_atlas, asset, mesh, cfg.texture_size)
    iou, psnr = part("comparison", compare.against_field, asset, mesh)
    data = part("file", files.glb, mesh, {})
    return (
        f"{asset.field.density.shape[-1]}^3 voxels, {cfg.resolution}^3 cells, {len(fine.faces)} faces simplified to "
        f"{len(mesh.faces)}, texture {cfg.texture_size}^2, {len(data) / 2**20:.1f} MiB; mesh against field IoU "
        f"{iou:.3f}, PSNR {psnr:.1f} dB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the report."""
    cfg = config.load(
        MeshTimes, argv, prog="python -m benchmarks.mesh", doc=__doc__, positional="run", config_file=None
    )
    if cfg.report is not None:
        refuse_output("--report", cfg.report)
    part = Parts()
    part("imports", imports)
    import torch

    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    said = export(cfg, part)
    text = "\n\n".join(["# Export of a mesh", hardware(torch.device("cpu")), said, part.text()]) + "\n"
    print(text)
    if cfg.report is not None:
        write_atomic(cfg.report, text)


if __name__ == "__main__":
    run_main(main)
