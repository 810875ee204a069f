"""A mesh of an asset, from its field to its colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh import Mesh, colours, surface
from options.mesh import MeshConfig

if TYPE_CHECKING:
    from asset import Asset

DEFAULTS = {name: field.default for name, field in MeshConfig.model_fields.items()}


def bare(
    asset: Asset,
    resolution: int = DEFAULTS["resolution"],
    level: float | None = None,
    n_faces: int = DEFAULTS["n_faces"],
) -> Mesh:
    """Return the surface of an asset's field without colours; None as the level finds the best.

    Raises UserError for a field without a surface.
    """
    level = surface.best_level(asset) if level is None else level
    return surface.decimated(surface.extract(asset.field, resolution, level), n_faces)


def textured(asset: Asset, texture_size: int = DEFAULTS["texture_size"]) -> Mesh:
    """Return the mesh of an asset with a texture, as export_mesh.py makes it by default; raises what `bare` does."""
    return colours.with_atlas(asset, bare(asset), texture_size)
