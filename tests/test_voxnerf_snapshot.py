"""Snapshots show what their field shows, hold what matters, are whole or refused, and do not change a run."""

import math

import pytest
import torch

import pose
import run_sjc
from my import checkpoint
from my.errors import RunError
from sjc import SJC
from tiny import Affine
from tiny import config as tiny_config
from voxnerf import snapshot
from voxnerf.field import make_field
from voxnerf.render import render_image

STEP = 1 / 255  # of 8 bits


def new_field(grid=12, kind="V_SJC", shift=-1.0, seed=0, **kw):
    generator = torch.Generator().manual_seed(seed)
    return make_field(kind, [[-0.7] * 3, [0.7] * 3], grid, 3, 0.5, shift, generator=generator, **kw)


def written(field, folder, step=75):
    return snapshot.write(folder, *snapshot.taken(field, step))


def restored(path, **kw):
    field = new_field(seed=1, **kw)
    return field, snapshot.restore(field, path)


@torch.no_grad()
def pictures(field):
    cameras = pose.spiral(4, 1.5, 1.5, fov=55.0)
    return [render_image(field, c.K(16, 16), c.c2w, 16, 16, renderer="reference") for c in cameras]


def assert_alike(a, b):
    for x, y in zip(pictures(a), pictures(b)):
        assert (x.color - y.color).abs().max() / 2 < STEP  # of colours in [-1, 1]
        assert (x.opacity - y.opacity).abs().max() < STEP


@pytest.mark.parametrize("shift", [-1.0, -4.0])
@pytest.mark.parametrize("texture", [False, True])
def test_a_random_field_looks_the_same(tmp_path, shift, texture):
    kw = {"shift": shift, "blend_bg_texture": texture, "bg_texture_hw": 4}
    field = new_field(**kw)
    with torch.no_grad():
        field.density.normal_(-3, 4, generator=torch.Generator().manual_seed(2))
        field.d_scale.fill_(0.7)
    path = written(field, tmp_path)
    assert path == tmp_path / "fields" / "step_0000075.safetensors" and snapshot.found(tmp_path) == {75: path}
    other, step = restored(path, **kw)
    assert step == 75
    assert other.d_scale == field.d_scale
    assert_alike(field, other)


def block(shift=-1.0):
    """A field of 16^3 voxels, empty but for 4^3 in its middle."""
    field = new_field(16, shift=shift)
    with torch.no_grad():
        field.density.fill_(-30)
        field.density[..., 6:10, 6:10, 6:10] = 5
    return field


def test_only_what_matters_is_kept(tmp_path):
    """The block and the voxels beside it, 6^3; and the border, beside which the density is 0: 16^3 - 14^3."""
    field = block()
    kept = snapshot.matters(field.density, field.d_scale, -1.0, field.box_diagonal)
    assert kept.sum() == 6**3 + 16**3 - 14**3 and kept[5, 5, 5] and not kept[4, 7, 7]
    assert snapshot.matters(6 * field.density, field.d_scale, -20.0, field.box_diagonal).sum() == 6**3  # clear outside
    path = written(field, tmp_path)
    numbers = 2 * (1 + 3) * int(kept.sum())
    assert numbers + 16**3 // 8 < path.stat().st_size < numbers + 16**3 // 8 + 600
    other, _ = restored(path, grid=16)
    assert_alike(field, other)
    assert other.color[0, :, 4, 7, 7].tolist() == [0, 0, 0]


@pytest.mark.parametrize("factor, kept", [(0.9, False), (1.1, True)])
def test_fog_is_left_out_where_no_ray_sees_it(factor, kept):
    """Fog of thickness HIDDEN along the diagonal is the most that is left out."""
    field = new_field(8, shift=-20.0)
    sigma = factor * snapshot.HIDDEN / (1.4 * math.sqrt(3))
    with torch.no_grad():
        field.density.fill_(math.log(math.expm1(sigma)) + 20)
    assert snapshot.matters(field.density, field.d_scale, -20.0, field.box_diagonal).any() == kept
    thickness = sigma * field.box_diagonal
    assert (thickness < snapshot.HIDDEN) != kept and snapshot.HIDDEN < STEP / 2


def test_numbers_that_float16_lacks(tmp_path):
    field = new_field(4)
    with torch.no_grad():
        field.density[..., 0, 0, 0] = 1e6
        field.density[..., 0, 0, 1] = math.nan
    other, _ = restored(written(field, tmp_path), grid=4)
    assert other.density[..., 0, 0, 0] == 65504 and other.density[..., 0, 0, 1].isnan()  # a break-down stays one


def test_damaged_snapshots_are_refused(tmp_path):
    path = written(block(), tmp_path)
    whole = path.read_bytes()
    for bad, words in (
        (whole[:-1], "ends at byte"),
        (whole[:100], "cannot be read"),
        (b"", "it is empty"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "is damaged"),
        (whole.replace(b"format", b"formed"), "no snapshot"),
        (whole.replace(b'format\\": 1', b'format\\": 7'), "a snapshot of format 7"),
    ):
        path.write_bytes(bad)
        with pytest.raises(RunError, match=words) as error:
            restored(path, grid=16)
        assert "\n" not in str(error.value) and snapshot.ADVICE in str(error.value)
    path.unlink()
    with pytest.raises(RunError, match="No such file"):
        restored(path, grid=16)


@pytest.mark.parametrize(
    "other", [{"grid": 15}, {"grid": 16, "view_dependent": True}, {"grid": 16, "blend_bg_texture": 1}]
)
def test_a_snapshot_of_another_field_is_refused(tmp_path, other):
    with pytest.raises(RunError, match="of another field"):
        restored(written(block(), tmp_path), **other)


# ---------------------------------------------------------------- in a run


def run(folder, monkeypatch, first=0, dies_at=None, **options):
    """Do the tiny run of 40 steps, or what is left of it; return its field."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(run_sjc, "save_test_views", lambda _: None)
    optimisation = SJC(tiny_config(n_steps=40, **options), Affine())
    newest = checkpoint.latest("ckpt")
    first = optimisation.load(newest) if newest else 0
    if dies_at:
        take = optimisation.step
        monkeypatch.setattr(optimisation, "step", lambda i: take(i) if i < dies_at else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_sjc.train(optimisation, first)
    else:
        run_sjc.train(optimisation, first)
    return optimisation.field


def test_a_run_leaves_a_snapshot_every_twentieth(tmp_path, monkeypatch):
    field = run(tmp_path / "a", monkeypatch)
    plain = run(tmp_path / "b", monkeypatch, snapshots=False)
    assert all(torch.equal(a, b) for a, b in zip(field.parameters(), plain.parameters()))
    assert list(snapshot.found(tmp_path / "a")) == list(range(2, 41, 2)) and not (tmp_path / "b" / "fields").exists()
    last = SJC(tiny_config(n_steps=40), Affine()).field
    assert snapshot.restore(last, snapshot.path_of(tmp_path / "a", 40)) == 40
    assert_alike(field, last)
    run(tmp_path / "c", monkeypatch, dies_at=13)
    assert list(snapshot.found(tmp_path / "c")) == list(range(2, 13, 2))
    run(tmp_path / "c", monkeypatch)
    a, c = (snapshot.found(tmp_path / name) for name in "ac")
    assert [path.read_bytes() for path in a.values()] == [path.read_bytes() for path in c.values()]
    assert {path.name for path in (tmp_path / "c" / "fields").iterdir()} == {path.name for path in a.values()}
