"""The options of export_mesh.py. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from options.trained import TrainedConfig


class MeshConfig(TrainedConfig):
    """Every option of export_mesh.py."""

    format: Literal["glb", "obj", "ply", "splat"] = Field(
        "glb",
        description="glb for most programs, obj with its .mtl and .png, ply with a colour per vertex; splat is no mesh "
        "but a .ply of 3D Gaussians, one per occupied voxel",
    )
    resolution: int = Field(256, ge=16, le=512, description="cells along the longest edge of the field's box")
    level: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="density of the surface, per world unit, above 0; auto is the one whose silhouettes are most like "
        "those of the field",
    )
    n_faces: int = Field(50000, ge=100, description="most triangles that the mesh is simplified to")
    texture: Literal["atlas", "vertex"] = Field(
        "atlas", description="where the colours are: in a picture (atlas), or at the vertices (vertex)"
    )
    texture_size: int = Field(2048, ge=64, le=8192, description="edge of that picture, pixels")
    out: str | None = Field(
        None,
        description="name of the files in this folder, without an ending: letters, digits, - and _; by default it is "
        "mesh_ or splat_ with the number of steps taken",
    )

    first: ClassVar[tuple[str, ...]] = ("format", "n_faces", "texture", "texture_size", "resolution", "level", "run")


READ_BY: dict[str, dict[str, tuple[str, ...]]] = {
    "resolution": {"format": ("glb", "obj", "ply")},
    "level": {"format": ("glb", "obj", "ply")},
    "n_faces": {"format": ("glb", "obj", "ply")},
    "texture": {"format": ("glb", "obj")},
    "texture_size": {"format": ("glb", "obj"), "texture": ("atlas",)},
}  # as `my.config.refuse_unread` takes it
