"""The command export_mesh.py: what it leaves in a run's folder, and how it refuses."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pygltflib
import pytest
import torch
import trimesh
from PIL import Image

import export_mesh
from mesh import colours, files
from my import checkpoint, config, run_dir
from my.errors import UserError, run_main
from sjc import SJC
from solids import BOX, HIGH, LOW, box
from tiny import Affine
from tiny import config as tiny_config

GRID = 24
CLEAR = 2.25 * 2 / GRID  # two voxels, and some texels: how far from the line between two colours they are true
SMALL = ["--resolution", "48", "--n_faces", "2000", "--device", "cpu"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run of the ideal family whose field is the box of two colours; it is the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["export_mesh.py"])
    cameras = colours.cameras
    monkeypatch.setattr(colours, "cameras", lambda asset, n: cameras(asset, n // 2))  # they take most of the time
    return make_run(tmp_path, box(grid=GRID))


def make_run(folder, field, n_steps=1):
    cfg = tiny_config(vox={"grid_size": GRID, "blend_bg_texture": False}, n_steps=n_steps, plain_bg=True)
    config.write(cfg, folder / "full_config.yml")
    optimisation = SJC(cfg, Affine())
    optimisation.step(0)
    optimisation.field.load_state_dict(field.state_dict())
    optimisation.save(folder / "ckpt", 1)
    return folder


def export(*argv):
    export_mesh.main([*SMALL, *argv])


def refused(capsys, *argv):
    """The one line that a refused export says; no file is left."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        run_main(export_mesh.main, list(argv))
    assert ended.value.code in (1, 2) and sorted(Path().rglob("*")) == before
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("export_mesh.py: ")]
    return line.removeprefix("export_mesh.py: ")


def colour_of(points):
    """The true colours (n, 3) at points (n, 3) of the file's frame, and which are not near the line between two.

    The surface of the field is soft: a slanted ray goes on for a voxel or two below it, and meets the other colour.
    """
    own = points @ files.TO_FILE  # in the world: the matrix turns back, being orthogonal
    return np.where((own[:, 1] > 0)[:, None], HIGH, LOW), np.abs(own[:, 1]) > CLEAR


def test_glb_with_a_texture_shows_the_colours_of_the_field(run, capsys):
    export("--texture_size", "256")
    said = capsys.readouterr().out
    assert said.startswith("done: mesh_1.glb, ") and "mesh against field at held-out views: IoU 0.9" in said
    back = trimesh.load_mesh(run / "mesh_1.glb", process=False)
    faces, points = np.random.default_rng(0).integers(len(back.faces), size=4000), np.random.default_rng(1)
    weights = points.dirichlet((1, 1, 1), 4000)
    at = np.einsum("nk,nkc->nc", weights, back.vertices[back.faces[faces]])
    uv = np.einsum("nk,nkc->nc", weights, back.visual.uv[back.faces[faces]])
    picture = np.asarray(back.visual.material.baseColorTexture)[..., :3]
    x, y = (uv * [256, -256] + [0, 256]).astype(int).T
    expected, clear = colour_of(at)
    assert clear.sum() > 2000
    assert np.abs(picture[y, x] - 255 * expected)[clear].max() <= 2
    extras = pygltflib.GLTF2().load(run / "mesh_1.glb").asset.extras
    assert extras["prompt"] == "a blue duck" and extras["command"] == "export_mesh.py" and extras["version"]


@pytest.mark.parametrize("argv", [["--format", "ply"], ["--format", "obj", "--texture", "vertex"]])
def test_colours_at_the_vertices(run, argv):
    export(*argv, "--out", "box")
    back = trimesh.load_mesh(run / f"box.{argv[1]}", process=False)
    assert back.is_watertight and back.euler_number == 2 and len(back.faces) <= 2000
    (x, y, z), (dx, dy, dz) = BOX  # front -x of the world is +z of the file
    assert np.allclose(back.bounds, [[z - dz, y - dy, -x - dx], [z + dz, y + dy, -x + dx]], atol=0.02)
    expected, clear = colour_of(back.vertices)
    assert np.abs(back.visual.vertex_colors[:, :3] - 255 * expected)[clear].max() <= 2


def test_obj_names_its_files(run):
    export("--format", "obj", "--texture_size", "64", "--out", "my-box.obj")
    made = {path.name for path in run.iterdir() if path.is_file()}
    assert made == {"full_config.yml", "my-box.obj", "my-box.mtl", "my-box.png"}
    with Image.open("my-box.png") as picture:
        assert picture.size == (64, 64)


def test_splats(run, capsys):
    export_mesh.main(["--format", "splat", "--device", "cpu"])
    assert capsys.readouterr().out.startswith("done: splat_1.ply, ")
    head, _, body = (run / "splat_1.ply").read_bytes().partition(b"end_header\n")
    rows = np.frombuffer(body, "<f4").reshape(-1, 17)
    assert f"element vertex {len(rows)}".encode() in head and b"comment prompt: a blue duck" in head
    expected, clear = colour_of(rows[:, :3])
    assert clear.sum() > 500
    assert np.abs(0.5 + 0.28209479 * rows[:, 6:9] - expected)[clear].max() < 2.5 / 255


def test_fog_and_what_floats_apart_are_no_splats(tmp_path, monkeypatch):
    """Each Gaussian has the colour of the surface, so that fog would be a cloud in the colours of the object."""
    monkeypatch.chdir(tmp_path)
    field = box(grid=GRID)
    with torch.no_grad():
        field.density[0, 0, 1:5, 1:5, 1:5] = 1.84  # 1.2 per unit, which hides 9.5 % behind a voxel
        field.density[0, 0, -3, -3, -3] = 60
    make_run(tmp_path, field)
    export_mesh.main(["--format", "splat", "--device", "cpu"])
    rows = np.frombuffer(Path("splat_1.ply").read_bytes().partition(b"end_header\n")[2], "<f4").reshape(-1, 17)
    off = np.abs(rows[:, :3] @ files.TO_FILE - BOX[0]) - BOX[1]
    assert len(rows) > 500 and off.max() < 2 * 2 / GRID  # the box, and its neighbours


def test_the_same_twice_and_from_elsewhere(run, tmp_path_factory, monkeypatch):
    export("--texture_size", "64", "--out", "a")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    export("--texture_size", "64", "--run", str(run), "--out", "b")
    assert (run / "a.glb").read_bytes() == Path("b.glb").read_bytes()


def test_an_unfinished_run_is_taken_with_a_note(run, capsys):
    make_run(run, box(grid=GRID), n_steps=5)
    export("--format", "ply")
    assert "this run is at step 1 of 5; that field is taken" in capsys.readouterr().err and Path("mesh_1.ply").exists()


# ---------------------------------------------------------------- what is refused


def test_options_that_the_format_does_not_read(run, capsys):
    for name in ("resolution", "n_faces", "level", "texture", "texture_size"):
        value = {"texture": "vertex", "level": "3"}.get(name, "200")
        said = refused(capsys, "--format", "splat", f"--{name}", value)
        assert said.startswith(f"--{name}: not read with --format splat; leave it out, or give --format glb or obj")
    said = refused(capsys, "--format", "ply", "--texture", "atlas")
    assert said == "--texture: not read with --format ply; leave it out, or give --format glb or obj"
    said = refused(capsys, "--texture", "vertex", "--texture_size", "64")
    assert said == "--texture_size: not read with --texture vertex; leave it out, or give --texture atlas"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--format", "gltf"], "--format: expected one of glb, obj, ply, splat, got 'gltf'"),
        (["--resolution", "1000"], "--resolution"),
        (["--resolution", "4"], "--resolution"),
        (["--n_faces", "0"], "--n_faces"),
        (["--texture_size", "0"], "--texture_size"),
        (["--level", "0"], "--level"),
        (["--level", "high"], "--level: expected one of auto or a finite number, got 'high'"),
        (
            ["--out", "a/b"],
            "--out a/b: expected a name of letters, digits, - and _, such as duck; it goes to this folder",
        ),
        (["--out", "my duck"], "--out my duck: expected a name"),
        (["--out", ".glb"], "--out .glb: expected a name"),
        (["--level", "1e9"], "--level 1e+09: nothing in this field is as dense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_that_cannot_be(run, capsys, argv, words):
    assert refused(capsys, *argv).startswith(words)


def test_fields_without_a_shape(run, capsys):
    field = box(grid=GRID)
    with torch.no_grad():
        field.density.fill_(-20)
    make_run(run, field)
    said = "this field is empty: no view has a pixel that is more than half opaque; train it longer"
    assert refused(capsys, "--device", "cpu") == refused(capsys, "--format", "splat", "--device", "cpu") == said
    with torch.no_grad():
        field.density.fill_(3)
    make_run(run, field)
    assert refused(capsys, "--device", "cpu").startswith("this field fills its box: 100% of the box's walls are denser")


def test_runs_without_a_field(run, capsys):
    shutil.rmtree("ckpt")
    Path("full_config.yml").unlink()
    assert "has no full_config.yml: it is not the folder of a run" in refused(capsys)
    config.write(tiny_config(), "full_config.yml")
    assert "has no checkpoint: run run_sjc.py there first" in refused(capsys)
    make_run(run, box(grid=GRID))
    tensors = run / "ckpt" / "step_0000001" / checkpoint.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:1000])
    assert "is damaged" in refused(capsys)


def test_a_folder_that_cannot_be_written_is_told_before_the_work(run, capsys, monkeypatch):
    def denied(**_):
        raise PermissionError(13, "Permission denied", ".")

    monkeypatch.setattr(run_dir.tempfile, "TemporaryFile", denied)
    monkeypatch.setattr("asset.open_asset", None)  # it is not reached
    assert refused(capsys).startswith(".: permission denied; give yourself the right to read")


def test_the_project_folder_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="this one belongs to the project"):
        export_mesh.main([])


def test_help_imports_nothing_heavy():
    code = (
        "import sys, export_mesh\n"
        "try: export_mesh.main(['-h'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'skimage', 'trimesh', 'warp'} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr.strip() == "[]" and "--texture_size" in ran.stdout
