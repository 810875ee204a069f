"""A NeRF whose numbers break down, or whose device is full: what enters the field, what is saved, and what is said."""

import json
import math
from pathlib import Path

import pytest
import torch

import run_nerf
from box_scene import cfg_of, flags, train, write
from my import checkpoint
from my.errors import RunError, run_main
from my.left_out import NeverFinite
from my.run_dir import read_history
from voxnerf import nerf as nerf_module
from voxnerf.nerf import NeRF, optimise
from voxnerf.state import parameter_names

AT = (0, 0, 4, 4, 4)  # a voxel in the middle, which no mask hides here


class Poisoned(NeRF):
    """The gradient of the density gets a NaN in the steps of `bad`: in so many attempts at each. The loss is finite."""

    bad: dict[int, int] = {}

    def update(self, step, draw=0):
        def spoil(gradient):
            gradient = gradient.clone(memory_format=torch.preserve_format)
            gradient[AT] = math.nan
            return gradient

        hooks = [self.field.density.register_hook(spoil)] if draw < self.bad.get(step, 0) else []
        try:
            return super().update(step, draw)
        finally:
            for hook in hooks:
                hook.remove()


def poisoned(scene, bad, **options):
    """A training of 30 steps, whose field grows after 15 and gets a mask after 6."""
    cfg = cfg_of(bs=269, n_epoch=3, model={"density_shift": -1.0, "grid_size": 10}, **options)
    nerf = Poisoned(cfg, scene)
    nerf.bad = bad
    return nerf


@pytest.fixture
def schedule(monkeypatch):
    monkeypatch.setattr(nerf_module, "GROWTH", ((0.0, 1.0), (0.5, 1.1)))
    monkeypatch.setattr(nerf_module, "MASKS", (0.2,))


def numbers(nerf):
    """{name: tensor} of a field and of the state of its optimizer."""
    kept = checkpoint.flatten_optimizer(nerf.optimizer, parameter_names(nerf.field))
    return {name: x.detach().clone() for name, x in (nerf.field.state_dict() | kept).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def all_finite(tensors):
    return all(x.isfinite().all() for x in tensors.values())


def without_steps(tensors):
    """Without the counts of steps, which grow in every step."""
    return {name: x for name, x in tensors.items() if not name.endswith("/step")}


# ---------------------------------------------------------------- the steps


@pytest.mark.parametrize("options", [{"renderer": "fused"}, {"renderer": "reference"}, {"subpixels": 2}], ids=str)
def test_a_step_that_is_not_finite_is_left_out_and_tried_with_fresh_rays(scene, schedule, monkeypatch, options):
    drawn = {}
    real = NeRF.draw_batch
    monkeypatch.setattr(NeRF, "draw_batch", lambda self, *at: drawn.setdefault(at, real(self, *at)))
    bad = {0: 1, 9: 1, 17: 1, 28: 1}
    nerf, retried, before = poisoned(scene, bad, **options), {}, None
    for step, _, stats in optimise(nerf):
        assert stats["masked"].item() is (step - 1 in bad) and stats["loss"].isfinite()
        if "retried" in stats:
            retried[step] = stats["retried"]
        after = numbers(nerf)
        if step > 2 and step != 16:  # it has grown then
            assert same(without_steps(before), without_steps(after)) is (step - 1 in bad and "retried" not in stats)
        assert all_finite(after)
        before = after
    assert retried == {20: [1, 10], 30: [18, 29]} and nerf.left_out.all() == [] and nerf.n_steps_taken == 30
    assert {step for step, draw in drawn if draw} == set(bad)
    for i, (first, again) in enumerate(zip(drawn[9, 0], drawn[9, 1])):
        assert torch.equal(first, again) is (i == 3)  # backgrounds are white
    assert nerf.field.alpha_mask is not None and nerf.field.density.shape[-1] == 11


@pytest.mark.parametrize("part", ["emptiness", "color"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_left_out_too(scene, monkeypatch, part, value):
    """That of the emptiness has a gradient which is finite: a constant is added."""
    rendered, real = [], nerf_module.render_rays

    def render(*args):
        rendered.append(real(*args))
        spoilt = getattr(rendered[-1], part) + value
        return rendered[-1]._replace(**{part: spoilt}) if len(rendered) == 4 else rendered[-1]

    monkeypatch.setattr(nerf_module, "render_rays", render)
    nerf = NeRF(cfg_of(), scene)
    done = train(nerf)
    assert [step for step, _, stats in done if stats["masked"]] == [4]
    assert done[-1][2]["retried"] == [4] and all_finite(numbers(nerf))
    broken = [step for step, _, stats in done if not stats["loss"].isfinite()]
    assert broken == [4] * (part == "color")


@pytest.mark.parametrize("stop", [1, 4, 8, 10, 15, 19, 20, 29])
def test_a_run_with_such_steps_goes_on_as_if_never_stopped(scene, schedule, tmp_path, stop):
    """Steps 3 and 9 are due after 20 steps, across a mask and a growth, and 28 after the last."""
    bad = {3: 1, 9: 1, 28: 1}
    whole, begun, resumed, unlike = (poisoned(scene, each) for each in (bad, bad, bad, {}))
    train(whole)
    train(begun, last_step=stop)
    begun.save(tmp_path, stop)
    assert resumed.load(checkpoint.latest(tmp_path)) == stop
    assert resumed.left_out.all() == [i for i in bad if i < stop and not (i < 10 and stop >= 20)]
    train(resumed, stop)
    train(unlike)
    assert same(numbers(whole), numbers(resumed)) and not same(numbers(whole), numbers(unlike))


def test_a_checkpoint_of_an_earlier_version_has_no_such_steps(scene, tmp_path):
    nerf = NeRF(cfg_of(), scene)
    nerf.save(tmp_path, 0)
    tensors, meta = checkpoint.load(checkpoint.latest(tmp_path))
    assert meta.pop("left_out") == []
    assert nerf.restore(tensors, meta) == 0 and nerf.left_out.all() == []


def test_a_step_that_stays_so_ends_the_training(scene):
    nerf = poisoned(scene, {3: 2})
    with pytest.raises(NeverFinite, match="^step 4: its update is not finite, nor is it with fresh rays$"):
        train(nerf)
    assert nerf.n_steps_taken == 20 and nerf.left_out.all() == [3]
    assert all_finite(numbers(nerf))


# ---------------------------------------------------------------- run_nerf.py


@pytest.fixture(scope="module")
def folder(scene, test_scene, tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "box", scene, test_scene)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, and few frames of video."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_nerf, "N_FRAMES", 2)
    return tmp_path


def run_with(bad, monkeypatch, *argv):
    """Do a run of 42 steps whose gradients are poisoned."""
    monkeypatch.setattr(nerf_module, "NeRF", type("Bad", (Poisoned,), {"bad": bad}))
    run_nerf.main([*argv])


def test_a_run_with_such_a_step_is_done(here, folder, monkeypatch):
    run_with({12: 1}, monkeypatch, *flags(folder))
    assert json.loads(Path("heartbeat.json").read_text())["done"] and Path("test_42/metrics.json").exists()
    rows = read_history("history.json")
    assert {row["step"]: row["retried"] for row in rows if "retried" in row} == {30: [13]}
    assert not any("masked" in row for row in rows)


@pytest.mark.parametrize("bad, n", [(12, 30), (41, 42)])
def test_a_run_that_cannot_go_on_keeps_its_state_and_is_never_called_done(here, folder, monkeypatch, capsys, bad, n):
    """Step 42 is the last: a run that is resumed tries it again too, and before any other."""
    for saves, argv in ((f"; the state after step {n} is saved", flags(folder)), ("", ["--resume", "True"])):
        with pytest.raises(SystemExit) as ended:
            run_main(lambda _, argv=argv: run_with({bad: 9}, monkeypatch, *argv), [])
        said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
        assert ended.value.code == 1 and len(said) == 1
        assert said[0].endswith(
            f"step {bad + 1}: its update is not finite, nor is it with fresh rays{saves}; "
            "start in an empty folder with a smaller --lr"
        )
        beat = json.loads(Path("heartbeat.json").read_text())
        assert not beat["done"] and beat["failed"].startswith("RunError: step")
        tensors, meta = checkpoint.load(checkpoint.latest("ckpt"))
        assert (meta["step"], meta["left_out"]) == (n, [bad])
        assert all_finite(tensors) and not list(Path().glob("test_*"))
    run_with({}, monkeypatch, "--resume", "True")  # as if the cause were gone
    _, meta = checkpoint.load(checkpoint.latest("ckpt"))
    assert (meta["step"], meta["left_out"]) == (42, [])
    assert json.loads(Path("heartbeat.json").read_text())["done"] and Path("test_42").is_dir()


def test_history_and_bar_take_numbers_that_are_not_finite():
    running = run_nerf.RunningPSNR()
    assert running.judge({"loss": math.nan, "psnr": math.nan})[1] == {}
    assert running.judge({"psnr": 20.0})[1] == {"psnr": "20.00"}
    row = {"psnr": math.inf, "test_psnr": 3.0}
    assert running.judge(row) == (row, {"psnr": "20.00", "test": "3.00"})


# ---------------------------------------------------------------- a device that is full


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


class Filling(NeRF):
    """Memory runs out in step 8, in the part of it that `where` names."""

    def step(self, step, progress):
        if step != 7:
            return super().step(step, progress)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*self.where, full)
            return super().step(step, progress)


PLACES = {
    "the march": (nerf_module, "render_rays"),
    "growth": (nerf_module, "resample"),
    "the mask of what has grown": (nerf_module, "find_empty_space"),
    "the optimizer of what has grown": (nerf_module, "new_adam"),
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("subpixels", [1, 2])
def test_a_device_whose_memory_is_full_loses_no_whole_step(here, folder, monkeypatch, where, subpixels):
    """The field grows in step 8 of 42, which begins at a progress of 1/6. Resumed, the run ends as any other."""
    monkeypatch.setattr(nerf_module, "GROWTH", ((0.0, 0.5), (1 / 6 - 1e-9, 1.0)))
    monkeypatch.setattr(nerf_module, "MASKS", (0.05,))
    argv = [*flags(folder), "--model.density_shift", "-1", "--subpixels", str(subpixels)]
    said = (
        "^step 8: out of memory on cpu; the state after step 7 is saved; end other programs on the device and "
        "continue with --resume True, or start in an empty folder with a smaller --model.grid_size, --bs"
        + ", --subpixels" * (subpixels > 1)
        + "$"
    )
    with monkeypatch.context() as patch:
        patch.setattr(nerf_module, "NeRF", type("Full", (Filling,), {"where": PLACES[where]}))
        with pytest.raises(RunError, match=said):
            run_nerf.main(argv)
    assert checkpoint.latest("ckpt").name == "step_0000007"
    assert json.loads(Path("heartbeat.json").read_text())["failed"].startswith("RunError: step 8")
    run_nerf.main(["--resume", "True"])
    resumed, _ = checkpoint.load(checkpoint.latest("ckpt"))
    other = here / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    run_nerf.main(argv)
    whole, _ = checkpoint.load(checkpoint.latest("ckpt"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert "field/alpha_mask" in whole and whole["field/density"].shape[-1] > 4


def test_a_state_that_is_half_changed_is_not_saved(here, folder, monkeypatch):
    class Half(Filling):
        @property
        def where(self):
            return type(self.optimizer), "update"

    monkeypatch.setattr(nerf_module, "NeRF", Half)
    with pytest.raises(torch.OutOfMemoryError):
        run_nerf.main([*flags(folder), "--ckpt_every", "1"])
    assert not checkpoint.checkpoints("ckpt")
