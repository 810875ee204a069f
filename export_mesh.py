"""Write the asset of a run as a mesh with true colours, or as splats. It is the run in the current folder, or RUN.

python export_mesh.py --format glb
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import re
from pathlib import Path
from typing import TYPE_CHECKING

from my import config, run_dir
from my.errors import UserError, run_main
from my.version import made_by
from options import trained
from options.mesh import READ_BY, MeshConfig

if TYPE_CHECKING:
    from asset import Asset

ROOT = Path(__file__).resolve().parent
COMMAND = "export_mesh.py"
SPLAT_RESOLUTION = 128  # of the mesh that splats have their colours of


def mesh_files(asset: Asset, cfg: MeshConfig, name: str, facts: dict[str, str]) -> tuple[dict[str, bytes], str]:
    """Return {file name: bytes} of the mesh that the options choose, the main file last, and what to say of it."""
    from mesh import colours, compare, files, make

    mesh = make.bare(asset, cfg.resolution, None if isinstance(cfg.level, str) else cfg.level, cfg.n_faces)
    if cfg.format in ("glb", "obj") and cfg.texture == "atlas":
        mesh = colours.with_atlas(asset, mesh, cfg.texture_size)
    else:
        mesh = colours.with_vertex_colors(asset, mesh)
    iou, psnr = compare.against_field(asset, mesh)
    said = f"{len(mesh.faces)} faces; mesh against field at held-out views: IoU {iou:.3f}, PSNR {psnr:.1f} dB"
    if cfg.format == "obj":
        return files.obj(mesh, facts, name), said
    write = {"glb": files.glb, "ply": files.ply}[cfg.format]
    return {f"{name}.{cfg.format}": write(mesh, facts)}, said


def splat_files(asset: Asset, name: str, facts: dict[str, str]) -> tuple[dict[str, bytes], str]:
    """Return {file name: bytes} of an asset as splats, and what to say of it."""
    from mesh import colours, files, splat, surface

    fine = surface.extract(asset.field, SPLAT_RESOLUTION, surface.best_level(asset))  # it has vertices everywhere
    coloured = colours.with_vertex_colors(asset, fine)
    asset.field.clear_fog()  # it would float about in the colours of the object
    gaussians = splat.gaussians(asset.field, coloured)
    return {f"{name}.ply": files.ply_of(gaussians, facts)}, f"{len(gaussians['x'])} Gaussians"


def named(cfg: MeshConfig, step: int) -> str:
    """Return the name of the files without its ending; raises UserError for one that the formats cannot hold."""
    if cfg.out is None:
        return f"{'splat' if cfg.format == 'splat' else 'mesh'}_{step}"
    ending = ".ply" if cfg.format == "splat" else f".{cfg.format}"
    name = cfg.out.removesuffix(ending)
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise UserError(
            f"--out {cfg.out}: expected a name of letters, digits, - and _, such as duck; it goes to this folder"
        )
    return name


def main(argv: list[str] | None = None) -> None:
    """Export the run that the options choose."""
    cfg = trained.read(MeshConfig, argv, root=ROOT, prog=COMMAND, doc=__doc__)
    config.refuse_unread(cfg, READ_BY)
    named(cfg, 0)
    run_dir.refuse_unwritable()
    run_dir.clear_scratch(folders=[], held=False)
    from asset import open_asset

    asset = open_asset(cfg)
    name = named(cfg, asset.n_steps_taken)
    facts = {"prompt": asset.cfg.texts.prompt, **made_by(COMMAND)}
    if cfg.format == "splat":
        contents, said = splat_files(asset, name, facts)
    else:
        contents, said = mesh_files(asset, cfg, name, facts)
    run_dir.write_together(contents)
    print(f"done: {', '.join(contents)}, {said}")


if __name__ == "__main__":
    run_main(main)
