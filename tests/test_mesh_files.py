"""A mesh as files, read back by libraries that did not write them."""

import io
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pygltflib
import pytest
import trimesh
from PIL import Image

from mesh import Mesh, files, splat
from solids import ball, box

FACTS = {"prompt": 'a "blü" duck\nwith a hat', "version": "1.2.3"}
ROOT = Path(__file__).resolve().parent.parent
COMPONENTS = {pygltflib.FLOAT: "<f4", pygltflib.UNSIGNED_SHORT: "<u2", pygltflib.UNSIGNED_INT: "<u4"}
LENGTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}


def tetrahedron(**more):
    """Corners at the front, back, left and top of the world: a mesh whose turning is told by hand."""
    vertices = np.array([[-1, 0, 0], [1, 0, 0.5], [0, 0, 1], [0, 1, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 3, 1], [1, 3, 2], [2, 3, 0]], np.int32)
    normals = np.array([[-1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]], np.float32)
    return Mesh(vertices, faces, normals, **more)


TURNED = [[0, 0, 1], [0.5, 0, -1], [1, 0, 0], [0, 1, 0]]  # glTF: front +z, left +x, top +y
TURNED_NORMALS = [[0, 0, 1], [0, 0, -1], [1, 0, 0], [0, 1, 0]]
COLORS = np.array([[0, 1, 2], [10, 128, 254], [255, 60, 5], [3, 4, 6]], np.uint8)
UV = np.array([[0, 0], [1, 0], [1, 1], [0.25, 0.75]], np.float32)


def texture():
    return np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)


COLORED, TEXTURED = tetrahedron(colors=COLORS), tetrahedron(uv=UV, texture=texture())


# ---------------------------------------------------------------- GLB


def read_glb(data):
    """Return (document, {attribute or "indices": array}, the texture or None)."""
    gltf = pygltflib.GLTF2.load_from_bytes(data)
    blob = gltf.binary_blob()
    (primitive,) = gltf.meshes[0].primitives

    def accessor(i):
        a = gltf.accessors[i]
        start = gltf.bufferViews[a.bufferView].byteOffset + (a.byteOffset or 0)
        n = a.count * LENGTHS[a.type]
        values = np.frombuffer(blob, COMPONENTS[a.componentType], n, start).reshape(a.count, -1)
        return values / 65535 if a.normalized else values

    named = {k: v for k, v in vars(primitive.attributes).items() if v is not None}
    arrays = {name: accessor(i) for name, i in {**named, "indices": primitive.indices}.items()}
    picture = None
    if gltf.images:
        assert gltf.images[0].mimeType == "image/png"
        view = gltf.bufferViews[gltf.images[0].bufferView]
        picture = np.asarray(Image.open(io.BytesIO(blob[view.byteOffset : view.byteOffset + view.byteLength])))
    return gltf, arrays, picture


def srgb(x):
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mesh", [COLORED, TEXTURED], ids=["colours", "texture"])
def test_glb(mesh):
    gltf, arrays, picture = read_glb(files.glb(mesh, FACTS))
    assert arrays["POSITION"].tolist() == TURNED and arrays["NORMAL"].tolist() == TURNED_NORMALS
    assert arrays["indices"].reshape(-1, 3).tolist() == mesh.faces.tolist()
    assert gltf.asset.extras == FACTS and len(gltf.meshes) == len(gltf.materials) == 1
    assert gltf.extensionsUsed == ["KHR_materials_unlit"]
    material = gltf.materials[0]
    assert material.extensions == {"KHR_materials_unlit": {}} and gltf.meshes[0].primitives[0].material == 0
    assert material.pbrMetallicRoughness.baseColorFactor in (None, [1, 1, 1, 1])
    if mesh is COLORED:
        assert picture is None and set(arrays) == {"POSITION", "NORMAL", "COLOR_0", "indices"}
        assert np.abs(255 * srgb(arrays["COLOR_0"][:, :3]) - COLORS).max() < 0.1  # linear in the file
        assert (arrays["COLOR_0"][:, 3] == 1).all()
    else:
        assert set(arrays) == {"POSITION", "NORMAL", "TEXCOORD_0", "indices"}
        assert np.array_equal(picture, texture())  # row 0 on top, and v down from there
        assert np.allclose(arrays["TEXCOORD_0"], [[0, 1], [1, 1], [1, 0], [0.25, 0.25]])


def test_glb_is_the_same_every_time():
    for mesh in (COLORED, TEXTURED):
        assert files.glb(mesh, FACTS) == files.glb(mesh, FACTS)


def validator():
    """The folder of gltf-validator of npm, or None where it or node is not there."""
    folder = Path(os.environ.get("GLTF_VALIDATOR", ROOT / "node_modules" / "gltf-validator"))
    return folder if folder.is_dir() and shutil.which("node") else None


@pytest.mark.skipif(not validator(), reason="needs node and its package gltf-validator (npm install --no-save)")
@pytest.mark.parametrize("mesh", [COLORED, TEXTURED], ids=["colours", "texture"])
def test_the_validator_of_khronos_finds_nothing(mesh, tmp_path):
    (tmp_path / "a.glb").write_bytes(files.glb(mesh, FACTS))
    script = (
        f"require({json.dumps(str(validator()))}).validateBytes(new Uint8Array(require('fs').readFileSync('a.glb')))"
        ".then(report => console.log(JSON.stringify(report.issues)))"
    )
    ran = subprocess.run(["node", "-e", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    issues = json.loads(ran.stdout)
    assert issues["messages"] == []


# ---------------------------------------------------------------- OBJ


def test_obj_with_a_texture(tmp_path):
    made = files.obj(TEXTURED, FACTS, "my-duck")
    assert list(made) == ["my-duck.png", "my-duck.mtl", "my-duck.obj"]  # what is named comes first
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    text, mtl = (made[name].decode().splitlines() for name in ("my-duck.obj", "my-duck.mtl"))
    assert "mtllib my-duck.mtl" in text and "usemtl my-duck" in text
    assert "newmtl my-duck" in mtl and "map_Kd my-duck.png" in mtl and "Kd 1.00000000 1.00000000 1.00000000" in mtl
    assert text[0] == '# prompt: a "bl\\xfc" duck with a hat' and text[1] == "# version: 1.2.3"
    rows = {kind: [line.split()[1:] for line in text if line.startswith(f"{kind} ")] for kind in ("v", "vn", "vt", "f")}
    assert np.allclose(np.array(rows["v"], float), TURNED) and np.allclose(np.array(rows["vn"], float), TURNED_NORMALS)
    assert np.allclose(np.array(rows["vt"], float), UV)  # v up
    assert rows["f"] == [[f"{i}/{i}/{i}" for i in face + 1] for face in TEXTURED.faces]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "my-duck.png")), texture())


def test_obj_with_colours():
    made = files.obj(COLORED, FACTS, "duck")
    assert list(made) == ["duck.obj"]
    rows = [line.split()[1:] for line in made["duck.obj"].decode().splitlines() if line.startswith("v ")]
    assert np.allclose(np.array(rows, float)[:, :3], TURNED)
    assert np.abs(255 * np.array(rows, float)[:, 3:] - COLORS).max() < 0.1
    assert "mtl" not in made["duck.obj"].decode()


# ---------------------------------------------------------------- PLY


def test_ply():
    data = files.ply(COLORED, FACTS)
    head, _, body = data.partition(b"end_header\n")
    assert head.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        'comment prompt: a "bl\\xfc" duck with a hat',
        "comment version: 1.2.3",
        "element vertex 4",
        *(f"property float {name}" for name in ("x", "y", "z", "nx", "ny", "nz")),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
        "element face 4",
        "property list uchar int vertex_indices",
    ]
    assert len(body) == 4 * (6 * 4 + 3) + 4 * (1 + 3 * 4)
    back = trimesh.load_mesh(io.BytesIO(data), "ply", process=False)
    assert np.array_equal(back.vertices, TURNED) and np.array_equal(back.faces, COLORED.faces)
    assert np.array_equal(back.visual.vertex_colors[:, :3], COLORS)


# ---------------------------------------------------------------- splats


def test_splats():
    """One voxel by hand: that in the middle of the front of a ball of 30 / unit, coloured by the nearest vertex."""
    field = ball(0.5, grid=16, steep=1e4)
    field.d_scale.data.fill_(0)
    field.density.data.clamp_(-30, 31)  # 30 per unit inside
    front, other = [-0.5, 0.0, 0.0], [0.9, 0.9, 0.9]
    coloured = Mesh(np.array([front, other], np.float32), None, None, np.array([[255, 0, 51], [0, 0, 0]], np.uint8))
    columns = splat.gaussians(field, coloured)
    row = np.argmin((columns["z"] - 0.4375) ** 2 + (columns["x"] - 0.0625) ** 2 + (columns["y"] - 0.0625) ** 2)
    tau = 30 * 0.125
    opacity = 1 - np.exp(-tau * 2 / np.pi)
    expected = {
        **{"x": 0.0625, "y": 0.0625, "z": 0.4375, "nx": 0, "ny": 0, "nz": 0},
        **{
            "f_dc_0": 0.5 / 0.28209479177387814,
            "f_dc_1": -0.5 / 0.28209479177387814,
            "f_dc_2": -0.3 / 0.28209479177387814,
        },
        **{"opacity": np.log(opacity / (1 - opacity)), "scale_0": np.log(0.0625), "scale_1": np.log(0.0625)},
        **{"scale_2": np.log(0.0625), "rot_0": 1, "rot_1": 0, "rot_2": 0, "rot_3": 0},
    }
    assert list(columns) == list(expected)
    assert {name: column[row] for name, column in columns.items()} == pytest.approx(expected, rel=1e-4)
    inside = 16**3 * np.pi / 6 * 0.5**3
    assert len(columns["x"]) == pytest.approx(inside, rel=0.05)
    data = files.ply_of(columns, {})
    head, _, body = data.partition(b"end_header\n")
    assert head.decode().splitlines()[2:] == [f"element vertex {len(columns['x'])}"] + [
        f"property float {name}" for name in expected
    ]
    assert struct.unpack("<17f", body[68 * row : 68 * (row + 1)]) == pytest.approx(tuple(expected.values()), rel=1e-4)


def test_a_layer_of_gaussians_is_as_thick_as_its_voxels():
    """The light that passes a wide wall of Gaussians, one per square, is that which passes the wall of voxels."""
    tau, n = 0.3, 200
    opacity = splat.peak_opacity(np.array([tau]))[0]
    x = (np.arange(n) + 0.5) / n  # positions inside one square, in its edges
    tails = np.exp(-0.5 * ((x[:, None] - 0.5 - np.arange(-6, 7)) / splat.SPREAD) ** 2).sum(axis=1)  # of all Gaussians
    assert (-np.log1p(-opacity) * tails[:, None] * tails).mean() == pytest.approx(tau, rel=1e-3)


def test_opaque_voxels_stay_finite():
    field = box()
    field.density.data += 1e6
    mesh = Mesh(np.zeros((1, 3), np.float32), None, None, np.zeros((1, 3), np.uint8))
    assert all(np.isfinite(column).all() for column in splat.gaussians(field, mesh).values())
