"""Measure meshes of finished toy-world runs against the truth, beside the fields that they were made of.

    python -m benchmarks.mesh_quality FOLDER [FOLDER ...] --out mesh_quality.md

FOLDER is a run, or holds runs at any depth, as the one that `python -m benchmarks.quality` fills. Each mesh is made as
export_mesh.py makes it. Views, truth and measures are those of evaluate.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

import evaluate
from benchmarks.quality import markdown, number
from my import config
from my.errors import UserError, run_main
from my.run_dir import refuse_output, write_atomic
from my.script import FULL_CONFIG, OnDevice
from options.found import find_finished

if TYPE_CHECKING:
    from asset import Asset
    from mesh import Mesh

SUBPIXELS = 4  # rays per pixel edge of the mesh's pictures
COLUMNS = {
    "field_iou": ("field IoU", 3),
    "mesh_iou": ("mesh IoU", 3),
    "field_psnr": ("field PSNR, dB", 2),
    "mesh_psnr": ("mesh PSNR, dB", 2),
    "vertex_psnr": ("colours at vertices, dB", 2),
    "own_psnr": ("colours of the very view, dB", 2),
    "iou": ("IoU with the field", 3),
    "psnr": ("PSNR with the field, dB", 2),
    "level": ("level", 1),
    "seconds": ("CPU seconds", 0),
}  # measure -> heading, decimals


class MeshQualityConfig(OnDevice):
    """Every option of benchmarks.mesh_quality."""

    runs: list[str] = Field(min_length=1, description="folders of finished runs, or folders that hold them")
    n_views: int = Field(24, ge=24, multiple_of=3, description="test views, in three rings")
    texture_size: int = Field(2048, ge=64, le=8192, description="edge of the texture, pixels")
    out: str = Field("mesh_quality.md", description="Markdown file of the tables")
    figure: str | None = Field(None, description="PNG file: each run's truth, field and mesh from a few sides")


def found(where: Sequence[str]) -> list[Path]:
    """Return the folders of all runs in folders; raises UserError for a folder without any."""
    runs = []
    for folder in map(Path, where):
        inside = sorted(path.parent for path in folder.rglob(FULL_CONFIG))
        if not inside:
            raise UserError(f"{folder}: no run of run_sjc.py in it; give the folder of a run, or one that holds runs")
        runs += inside
    return runs


def make_mesh(asset: Asset, size: int) -> tuple[Mesh, Mesh, float]:
    """Return an asset's mesh with a texture, the same with colours at its vertices, and its level."""
    from mesh import colours, make, surface

    level = surface.best_level(asset)
    bare = make.bare(asset, level=level)
    return colours.with_atlas(asset, bare, size), colours.with_vertex_colors(asset, bare), level


def measure(folder: Path, cfg: MeshQualityConfig) -> tuple[dict[str, float], np.ndarray]:
    """Return the measures of a run's mesh, by the keys of COLUMNS, and its strip of pictures (H, W, 3) in [0, 1]."""
    from asset import load
    from mesh import cast, compare
    from voxnerf.likeness import iou, picture_psnr

    source = find_finished(folder)
    color, obj = evaluate.read_prompt(source)
    asset = load(source, cfg.device)
    start = time.process_time()
    mesh, at_vertices, level = make_mesh(asset, cfg.texture_size)
    seconds = time.process_time() - start
    cameras = evaluate.cameras_at(evaluate.test_angles(cfg.n_views), asset.cfg.pose)
    truth, true_shape = evaluate.true_views(color, obj, cameras)
    field, opacity = evaluate.result_views(asset, cameras)
    n = evaluate.SIZE
    casters = {id(m): cast.Caster(m.vertices, m.faces, asset.adapter.device) for m in (mesh, at_vertices)}
    pictures, vertex = (
        np.stack([cast.render(m, camera, n, SUBPIXELS, caster=casters[id(m)]) for camera in cameras])
        for m in (mesh, at_vertices)
    )
    shape = np.stack([cast.silhouette(casters[id(mesh)], camera, n, SUBPIXELS) for camera in cameras])
    own = shape[..., None] * field + 1 - shape[..., None]  # what this view shows, cut out by the mesh
    near_iou, near_psnr = compare.against_field(asset, mesh)
    measures = {
        "field_iou": iou(opacity > 0.5, true_shape > 0.5).mean(),
        "mesh_iou": iou(shape > 0.5, true_shape > 0.5).mean(),
        **{
            f"{name}_psnr": picture_psnr(x, truth).mean()
            for name, x in {"field": field, "mesh": pictures, "vertex": vertex, "own": own}.items()
        },
        "iou": near_iou,
        "psnr": near_psnr,
        "level": level,
        "seconds": seconds,
    }
    return measures, strip(truth, field, pictures)


def strip(*rows: np.ndarray) -> np.ndarray:
    """Return one view in four of pictures (n, H, W, 3), one row for each of the arguments, twice as large."""
    picture = np.concatenate([np.concatenate(list(row[1::4]), axis=1) for row in rows])
    return picture.repeat(2, axis=0).repeat(2, axis=1)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Return the Markdown table of {run: measures}, with their means at its end."""
    rows = {**rows, "mean": {key: float(np.mean([row[key] for row in rows.values()])) for key in COLUMNS}}
    lines = [[name, *(number(row[key], d) for key, (_, d) in COLUMNS.items())] for name, row in rows.items()]
    return markdown(["run", *(head for head, _ in COLUMNS.values())], lines)


def document(tables: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the file: a table of {run: measures} for each folder that holds runs."""
    return "\n\n".join(["# Meshes", *(f"## {name}\n\n{table(rows)}" for name, rows in tables.items())]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure the meshes of all runs and write the tables, one per folder that holds runs."""
    cfg = config.load(
        MeshQualityConfig,
        argv,
        prog="python -m benchmarks.mesh_quality",
        doc=__doc__,
        positional="runs",
        config_file=None,
    )
    for name, path in (("out", cfg.out), ("figure", cfg.figure)):
        if path is not None:
            refuse_output(f"--{name}", path)
    from tqdm import tqdm

    from my.media import to_uint8, write_png

    runs = found(cfg.runs)
    for folder in runs:
        evaluate.read_prompt(find_finished(folder))
    tables: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    strips = []
    for folder in tqdm(runs, desc="meshes", unit="run"):
        tables[folder.resolve().parent.name][folder.name], pictures = measure(folder, cfg)
        strips.append(pictures)
        write_atomic(cfg.out, document(tables))  # after each: a run takes a minute
        if cfg.figure is not None:
            write_png(cfg.figure, to_uint8(np.concatenate(strips)))
    print(document(tables))


if __name__ == "__main__":
    run_main(main)
