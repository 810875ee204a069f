"""A mesh as the bytes of a GLB, OBJ or PLY file. One world unit is a metre.

In all of them y is up and the front of the object faces +z, as glTF has it, so that its own left is +x.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mesh import Mesh
from my.errors import one_line

if TYPE_CHECKING:
    import trimesh

TO_FILE = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], np.float32)  # of columns xyz: front -x to +z, left +z to +x
UNLIT = "KHR_materials_unlit"
LINEAR, LINEAR_MIPMAP_LINEAR, CLAMP = 9729, 9987, 33071  # values of a sampler, glTF 2.0
VERTICES, INDICES = 34962, 34963  # what a part of the buffer holds, glTF 2.0
NAME = "asset"  # of the mesh and of its material


def turned(vectors: np.ndarray) -> np.ndarray:
    """Return points or directions (n, 3) of the world in the frame of the files."""
    return np.ascontiguousarray(vectors @ TO_FILE.T)


def linear(srgb: np.ndarray) -> np.ndarray:
    """Return the linear values in [0, 1] of sRGB values in [0, 1] (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def about(facts: Mapping[str, str]) -> list[str]:
    """Return what made a file as lines `key: value` of ASCII, for comments."""
    return [f"{key}: {one_line(value)}".encode("ascii", "backslashreplace").decode() for key, value in facts.items()]


# ---------------------------------------------------------------- GLB


def glb(mesh: Mesh, facts: Mapping[str, str]) -> bytes:
    """Return a mesh with a texture or with colours as a GLB file: one primitive, which no light changes.

    facts: the extras of the asset, such as its prompt.
    Source: glTF 2.0, and its extension KHR_materials_unlit.
    """
    import trimesh

    solid = of_trimesh(mesh)
    if mesh.texture is None:
        solid.visual = trimesh.visual.ColorVisuals()
        solid.vertex_attributes["_color"] = linear_colors(mesh)

    def finish(tree: dict[str, Any]) -> None:
        (primitive,) = tree["meshes"][0]["primitives"]
        if mesh.texture is None:  # the library would write 8 bits, which are too few for dark colours
            primitive["attributes"]["COLOR_0"] = primitive["attributes"].pop("_color")
            tree["accessors"][primitive["attributes"]["COLOR_0"]]["normalized"] = True
        else:
            tree["samplers"] = [
                {"magFilter": LINEAR, "minFilter": LINEAR_MIPMAP_LINEAR, "wrapS": CLAMP, "wrapT": CLAMP}
            ]
            tree["textures"][0]["sampler"] = 0
        for accessor in (*primitive["attributes"].values(), primitive["indices"]):
            view = tree["bufferViews"][tree["accessors"][accessor]["bufferView"]]
            view["target"] = INDICES if accessor == primitive["indices"] else VERTICES
        surface: dict[str, Any] = {"baseColorTexture": {"index": 0}} if mesh.texture is not None else {}
        surface |= {"metallicFactor": 0.0, "roughnessFactor": 0.9}  # for viewers that do not know the extension
        tree["materials"] = [{"name": NAME, "pbrMetallicRoughness": surface, "extensions": {UNLIT: {}}}]
        primitive["material"] = 0
        tree["extensionsUsed"] = [UNLIT]
        tree["asset"]["extras"] = dict(facts)

    scene = trimesh.Scene()
    scene.add_geometry(solid, geom_name=NAME, node_name=NAME)
    return trimesh.exchange.gltf.export_glb(scene, include_normals=True, tree_postprocessor=finish)


def linear_colors(mesh: Mesh) -> np.ndarray:
    """Return the colours of a mesh (V, 4) uint16, linear and opaque, as COLOR_0 has them."""
    assert mesh.colors is not None
    rgb = np.round(linear(mesh.colors / 255) * 65535)
    return np.concatenate([rgb, np.full((len(rgb), 1), 65535)], axis=1).astype(np.uint16)


def of_trimesh(mesh: Mesh, name: str = NAME) -> trimesh.Trimesh:
    """Return a mesh in the frame of the files as trimesh has it, with its colours or its texture of that name."""
    import trimesh
    from PIL import Image
    from trimesh.visual.material import SimpleMaterial

    visual: Any = trimesh.visual.ColorVisuals(vertex_colors=mesh.colors)
    if mesh.texture is not None:
        white, black = [255, 255, 255, 255], [0, 0, 0, 255]
        material = SimpleMaterial(Image.fromarray(mesh.texture), diffuse=white, ambient=white, specular=black)
        material.name = name
        visual = trimesh.visual.TextureVisuals(uv=mesh.uv, material=material)
    return trimesh.Trimesh(
        turned(mesh.vertices), mesh.faces, vertex_normals=turned(mesh.normals), visual=visual, process=False
    )


# ---------------------------------------------------------------- OBJ


def obj(mesh: Mesh, facts: Mapping[str, str], name: str) -> dict[str, bytes]:
    """Return the files of a mesh as {file name: bytes}: NAME.obj, and NAME.mtl and NAME.png where it has a texture.

    name: letters, digits, "-", "_" and "." only: the format has no quotes. Colours without a texture stand behind the
    coordinates of their vertices, which most programs read.
    """
    from trimesh.exchange.obj import export_obj

    solid = of_trimesh(mesh, name)
    text, others = export_obj(
        solid, include_normals=True, return_texture=True, mtl_name=f"{name}.mtl", header="\n# ".join(about(facts))
    )
    return others | {f"{name}.obj": text.encode()}


# ---------------------------------------------------------------- PLY


def ply(mesh: Mesh, facts: Mapping[str, str]) -> bytes:
    """Return a mesh with colours as a PLY file: coordinates, normals and colours of vertices, and triangles."""
    assert mesh.colors is not None
    columns = [*turned(mesh.vertices).T, *turned(mesh.normals).T, *mesh.colors.T]
    names = ("x", "y", "z", "nx", "ny", "nz", "red", "green", "blue")
    return ply_of(dict(zip(names, columns)), facts, mesh.faces)


def ply_of(columns: Mapping[str, np.ndarray], facts: Mapping[str, str], faces: np.ndarray | None = None) -> bytes:
    """Return a binary PLY file of vertices and triangles.

    columns: {property: (V,) float32 or uint8} of the vertices, in their order.
    faces: (F, 3) int32, or none.
    """
    kinds = {name: {"f": ("<f4", "float"), "u": ("u1", "uchar")}[column.dtype.kind] for name, column in columns.items()}
    rows = np.empty(len(next(iter(columns.values()))), [(name, kind) for name, (kind, _) in kinds.items()])
    for name, column in columns.items():
        rows[name] = column
    head = ["ply", "format binary_little_endian 1.0", *(f"comment {line}" for line in about(facts))]
    head += [f"element vertex {len(rows)}", *(f"property {word} {name}" for name, (_, word) in kinds.items())]
    body = rows.tobytes()
    if faces is not None:
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        triangles = np.empty(len(faces), [("n", "u1"), ("of", "<i4", 3)])
        triangles["n"], triangles["of"] = 3, faces
        body += triangles.tobytes()
    return "\n".join([*head, "end_header", ""]).encode("ascii") + body
