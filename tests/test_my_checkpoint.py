"""Checkpoints: whole or absent, verified, checked leaf by leaf against the model."""

import errno
import json
import os
import re
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch

from my import checkpoint as ckpt
from my import file_system
from my.errors import RunError, UserError


def tensors(step=0):
    grid = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4) + step
    return {"grid": grid.transpose(0, 2), "step": torch.tensor(step), "half": grid.half()[:, 0]}


def test_tensors_and_meta_come_back_exactly(tmp_path):
    meta = {"seed": 3, "lr": 0.1 + 0.2, "names": ["a", None], "ok": True}
    path = ckpt.save(tmp_path / "new" / "ckpt", 5, tensors(), meta)
    assert path.name == "step_0000005" and ckpt.latest(path.parent) == path
    got, got_meta = ckpt.load(path)
    assert got_meta == {**meta, "step": 5}
    assert got.keys() == tensors().keys()
    for name, value in tensors().items():
        assert torch.equal(got[name], value) and got[name].dtype == value.dtype


def test_only_the_newest_are_kept_in_the_order_of_steps(tmp_path):
    assert ckpt.latest(tmp_path) is None and ckpt.latest(tmp_path / "absent") is None
    for step in (8, 9, 10, 12_345_678):
        ckpt.save(tmp_path, step, tensors(step), {}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step_0000009", "step_0000010", "step_12345678"]  # fmt: skip
    assert ckpt.latest(tmp_path).name == "step_12345678"


def test_a_step_saved_again_is_replaced(tmp_path):
    ckpt.save(tmp_path, 1, tensors(1), {"try": 1})
    path = ckpt.save(tmp_path, 1, tensors(2), {"try": 2})
    got, meta = ckpt.load(path)
    assert meta["try"] == 2 and got["step"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001"]


def test_tensors_are_written_from_where_they_are_and_come_back_laid_out_alike(tmp_path, monkeypatch):
    grid = torch.arange(120.0).reshape(1, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d)
    save, written = safetensors.torch.save_file, []
    monkeypatch.setattr(safetensors.torch, "save_file", lambda ts, path: written.append(ts) or save(ts, path))
    path = ckpt.save(tmp_path, 1, {"grid": grid, "scalar": torch.tensor(2.0)}, {})
    assert written[0]["grid"].data_ptr() == grid.data_ptr()
    (got, _) = ckpt.load(path)
    assert torch.equal(got["grid"], grid) and got["grid"].stride() == grid.stride()


def test_every_file_may_be_read_by_those_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        path = ckpt.save(tmp_path, 1, tensors(), {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_what_stops_the_writing_is_told_by_the_systems_number_and_the_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=ckpt.TENSORS) as caught:
            ckpt.save(tmp_path, 1, {"grid": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and ckpt.latest(tmp_path) is None


def test_any_other_failure_to_write_passes_through(tmp_path, monkeypatch):
    def broken(tensors, path):
        raise safetensors.SafetensorError("a bug")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(safetensors.SafetensorError, match="a bug"):
        ckpt.save(tmp_path, 1, tensors(), {})


class Killed(BaseException):
    """Stands for the end of the process at a chosen system call."""


@pytest.fixture
def killed_at(monkeypatch):
    """Has a call of a function be killed at its system call of some number, from 0; whether it was."""

    def killed(call, function):
        calls = iter(range(call + 1))

        def killed_later(function):
            def wrapped(*args, **kw):
                if next(calls, None) == call:
                    raise Killed
                return function(*args, **kw)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(file_system.os, "fsync", killed_later(file_system.os.fsync))
            patch.setattr(file_system.shutil, "rmtree", killed_later(file_system.shutil.rmtree))
            patch.setattr(file_system.os, "replace", killed_later(file_system.os.replace))
            try:
                function()
            except Killed:
                return True
        return False

    return killed


@pytest.mark.parametrize("call", range(8))
def test_a_save_killed_at_any_moment_leaves_the_latest_whole(tmp_path, killed_at, call):
    ckpt.save(tmp_path, 1, tensors(1), {})
    ckpt.save(tmp_path, 2, tensors(2), {}, keep=1)
    # four fsyncs, two renames, one rmtree: 7 places to be killed
    assert killed_at(call, lambda: ckpt.save(tmp_path, 3, tensors(3), {}, keep=1)) == (call < 7)
    got, meta = ckpt.load(ckpt.latest(tmp_path))
    assert meta["step"] in (2, 3) and got["step"] == meta["step"]
    ckpt.save(tmp_path, 4, tensors(4), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000004"]


@pytest.mark.parametrize("call", range(8))
def test_what_is_saved_again_is_deleted_once_the_new_one_is_there(tmp_path, killed_at, call):
    """Two renames follow one another: between them, none has its name, and both are whole."""
    ckpt.save(tmp_path, 2, tensors(2), {}, keep=1)
    assert killed_at(call, lambda: ckpt.save(tmp_path, 2, tensors(2), {"again": True}, keep=1)) == (call < 7)
    names = {path.name for path in tmp_path.iterdir()}
    if call == 4:
        assert names == {".tmp_step_0000002_old", ".tmp_step_0000002_new"}
        for name in names:
            ckpt.load(tmp_path / name)
    else:
        assert ckpt.load(ckpt.latest(tmp_path))[1] == {"step": 2, **({"again": True} if call > 4 else {})}


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flip", "missing"])
@pytest.mark.parametrize("name", [ckpt.TENSORS, ckpt.META])
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, harm, name):
    path = ckpt.save(tmp_path, 1, tensors(), {})
    harm(path / name)
    with pytest.raises(RunError, match=rf"{re.escape(str(path / name))}.*delete .* start again"):
        ckpt.load(path)


def test_a_record_that_lacks_a_part_and_another_format_version_are_refused(tmp_path):
    path = ckpt.save(tmp_path, 1, tensors(), {})
    record = json.loads((path / ckpt.META).read_text())
    for key in record:
        (path / ckpt.META).write_text(json.dumps({name: value for name, value in record.items() if name != key}))
        with pytest.raises(RunError, match=r"meta.json (is damaged|has no format).*; delete"):
            ckpt.load(path)
    (path / ckpt.META).write_text("[" * 10**5)
    with pytest.raises(RunError, match=r"meta.json is damaged: too deep; delete"):
        ckpt.load(path)
    (path / ckpt.META).write_text('{"format": 3,\n"step"')
    with pytest.raises(RunError, match=r"meta.json is damaged: broken JSON at line 2, column 7; delete"):
        ckpt.load(path)
    (path / ckpt.META).write_text(json.dumps({"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        ckpt.load(path)


def test_every_bit_of_the_record_is_protected(tmp_path):
    """A flipped bit is refused, or changes nothing that is read, such as the kind of a space."""
    path = ckpt.save(tmp_path, 4, {"grid": torch.zeros(1, 2)}, {"lr": 0.5, "names": ["a"]})
    whole, expected = (path / ckpt.META).read_bytes(), ckpt.load(path)[1]
    refused = 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (path / ckpt.META).write_bytes(data)
        try:
            assert ckpt.load(path)[1] == expected
        except ckpt.Damaged:
            refused += 1
    assert refused > 0.97 * 8 * len(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1},
        {"step": True},
        {"orders": {}},
        {"orders": {"grid": [0, 0]}},
        {"orders": {"grid": [[]]}},
        {"meta": 1},
    ],
)
def test_values_that_cannot_be_are_refused_in_a_record_without_a_checksum(tmp_path, changes):
    """As those of earlier versions."""
    path = ckpt.save(tmp_path, 4, {"grid": torch.zeros(1, 2)}, {})
    record = json.loads((path / ckpt.META).read_text())
    del record[ckpt.SEAL]
    record["format"] = ckpt.UNSEALED
    (path / ckpt.META).write_text(json.dumps(record))
    assert ckpt.load(path)[1] == {"step": 4}
    (path / ckpt.META).write_text(json.dumps(record | changes))
    with pytest.raises(ckpt.Damaged, match="meta.json is damaged"):
        ckpt.load(path)


def test_the_newest_whole_checkpoint_is_taken(tmp_path, capsys):
    assert ckpt.load_newest(tmp_path) is None
    for step in (1, 2, 3):
        ckpt.save(tmp_path, step, tensors(step), {}, keep=3)
    assert ckpt.load_newest(tmp_path)[1]["step"] == 3 and not capsys.readouterr().err
    flip(tmp_path / "step_0000003" / ckpt.TENSORS)
    (tmp_path / "step_0000002" / ckpt.META).unlink()
    tensors_there, meta = ckpt.load_newest(tmp_path)
    assert meta["step"] == 1 and tensors_there["step"] == 1
    assert re.search(r"note: .*step_0000003.* is damaged .*; .*step_0000001, from before", capsys.readouterr().err)
    ckpt.save(tmp_path, 2, tensors(2), {}, keep=3)
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["step_0000001", "step_0000002"]
    for step in (1, 2):
        flip(tmp_path / f"step_000000{step}" / ckpt.META)
    with pytest.raises(
        RunError, match="step_0000002.* damaged.*; no checkpoint in .* is whole: start in an empty folder$"
    ):
        ckpt.load_newest(tmp_path)


def test_what_a_killed_save_did_not_delete_goes_when_the_run_goes_on(tmp_path):
    for step in (1, 2, 3, 4):
        ckpt.save(tmp_path, step, tensors(step), {}, keep=4)

    def names():
        return [path.name for path in ckpt.checkpoints(tmp_path)]

    assert ckpt.load_newest(tmp_path)[1]["step"] == 4 and len(names()) == 4
    flip(tmp_path / "step_0000004" / ckpt.TENSORS)
    assert ckpt.load_newest(tmp_path, keep=2)[1]["step"] == 3
    assert names() == ["step_0000002", "step_0000003", "step_0000004"]  # the damaged one stays until the next save


@pytest.mark.parametrize("name", [ckpt.TENSORS, ckpt.META])
def test_a_checkpoint_on_a_bad_part_of_the_disk_is_as_one_that_is_damaged(tmp_path, monkeypatch, capsys, name):
    for step in (1, 2):
        ckpt.save(tmp_path, step, tensors(step), {})
    number, bad = errno.EIO, tmp_path / "step_0000002" / name

    def unreadable(read):
        def tried(path, *args):
            if Path(path) == bad:
                raise OSError(number, os.strerror(number))
            return read(path, *args)

        return tried

    monkeypatch.setattr(ckpt, "sha256_of", unreadable(ckpt.sha256_of))
    monkeypatch.setattr(ckpt.plain_files, "read_json", unreadable(ckpt.plain_files.read_json))
    assert ckpt.load_newest(tmp_path)[1]["step"] == 1
    told = (
        f"note: {bad} cannot be read ({os.strerror(errno.EIO)}); {tmp_path / 'step_0000001'}, from before it, is taken"
    )
    assert capsys.readouterr().err == f"{told}\n"
    number = errno.EMFILE  # says nothing of the checkpoint
    with pytest.raises(OSError, match="Too many open files"):
        ckpt.load_newest(tmp_path)


def test_a_folder_of_another_name_has_the_step_of_its_record(tmp_path):
    path = ckpt.save(tmp_path, 7, tensors(), {})
    assert ckpt.recorded_step(path) == 7
    best = path.rename(tmp_path / "best")
    assert ckpt.recorded_step(best) == ckpt.load(best)[1]["step"] == 7
    flip(best / ckpt.META)
    with pytest.raises(ckpt.Damaged, match="best/meta.json is damaged"):
        ckpt.recorded_step(best)


@pytest.mark.parametrize(
    "command, names, meta",
    [
        ("run_sjc.py", ["field/density", "optim/density/step"], {}),
        ("run_nerf.py", ["field/density", "optim/density/step"], {"box": [[-1] * 3, [1] * 3]}),
        ("run_2d_sjc.py", ["sigma_1.5_eq16_copies_1_seed_0"], {}),
    ],
)
def test_a_checkpoint_of_another_command_is_told(command, names, meta):
    there = dict.fromkeys(names, torch.zeros(1))
    ckpt.refuse_other(command, there, meta)
    for other in {"run_sjc.py", "run_nerf.py", "run_2d_sjc.py"} - {command}:
        with pytest.raises(UserError, match=f"^the checkpoint is of {command}, and this run is of {other}; put the"):
            ckpt.refuse_other(other, there, meta)


def test_every_leaf_that_does_not_fit_is_named_with_both_shapes():
    there = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "same": torch.zeros(1)}
    ckpt.check(there, {"a": (2, 3), "b": (4,), "same": [1]})
    with pytest.raises(UserError) as caught:
        ckpt.check(there, {"a": (3, 2), "c": (5,), "same": (1,)})
    message = str(caught.value)
    assert "a is (2, 3) there, (3, 2) here" in message
    assert "b is (4,) there, absent here" in message and "c is absent there, (5,) here" in message
    assert "same" not in message
    with pytest.raises(UserError, match="and 6 more"):
        ckpt.check({}, {str(i): (i,) for i in range(10)})


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adamax, torch.optim.Rprop])
def test_an_optimizer_goes_on_as_if_never_interrupted(tmp_path, kind):
    names = ["w", "field/b", "unused"]

    def start():
        return [torch.nn.Parameter(torch.arange(3.0) + i) for i in range(3)]

    def steps(optimizer, params, n):
        for i in range(n):
            optimizer.zero_grad()
            ((params[0] ** 2).sum() + (params[1] ** 3).sum() * (i + 1)).backward()
            optimizer.step()

    params = start()
    optimizer = kind(params, lr=0.1)
    steps(optimizer, params, 3)
    flat = ckpt.flatten_optimizer(optimizer, names)
    assert "optim/field/b/step" in flat and not any("unused" in name for name in flat)
    path = ckpt.save(tmp_path, 3, dict(zip(names, params, strict=True)) | flat, {})

    saved, _ = ckpt.load(path)
    resumed = [torch.nn.Parameter(saved[name]) for name in names]
    other = kind(resumed, lr=0.1)
    ckpt.restore_optimizer(other, names, saved)
    steps(optimizer, params, 2)
    steps(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_plain_numbers_in_a_state_come_back_as_numbers():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    optimizer.state[param] = {"count": 3, "decay": 0.1 + 0.2}
    flat = ckpt.flatten_optimizer(optimizer, ["w"])
    ckpt.restore_optimizer(optimizer, ["w"], flat)
    assert dict(optimizer.state[param]) == {"count": 3, "decay": 0.1 + 0.2}
    with pytest.raises(UserError, match="has no w; it has v"):
        ckpt.restore_optimizer(optimizer, ["v"], flat)
