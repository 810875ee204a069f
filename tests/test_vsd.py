"""Several fields whose own score is exact: one alone is SDS, and together they part."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import run_sjc
from benchmarks import vsd
from my.errors import RunError, UserError
from options.found import find_finished
from sjc import SJC, optimise
from tiny import Affine, config

DUCK = ["--preset", "ideal", "--sd.prompt", "a blue duck", "--seed", "3", "--n_steps", "4"]
SMALL = ["--ideal.n_cameras", "40", "--vox.grid_size", "6", "--pose.rend_hw", "8", "--pose.view_words", "sjc"]


def state(optimisation):
    for _ in optimise(optimisation):
        pass
    return [p.detach().clone() for p in optimisation.field.parameters()]


@pytest.fixture
def on_affine(monkeypatch):
    """Fields that share a model whose score is linear."""
    monkeypatch.setattr(vsd, "make_adapter", lambda *_: Affine())
    return lambda n_fields, **given: vsd.particles(config(rule="sds", **given), None, n_fields)


def test_one_field_alone_is_sds(on_affine):
    for got, want in zip(state(on_affine(1)), state(SJC(config(rule="sds"), Affine()))):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_others_change_the_direction(on_affine):
    """Where another field is nearer to the noisy rendering, the own score points to it, and the step flees from it."""
    first = on_affine(2)
    (cameras, rays), sigma = first.views.of_step(0), first.levels[-1]
    x = first.render_views(rays, 0).color.detach()
    n = first.noise_of(0)
    x_sigma = x + sigma * n
    first.fields[1].render_views = lambda *_: SimpleNamespace(color=x_sigma)
    D_s = first.ask(cameras).guided(x_sigma, sigma)
    want = sigma**2 / (1 + sigma**2) * (D_s - x_sigma) / sigma
    torch.testing.assert_close(first.gradient(x, n, cameras, sigma, 0), want, atol=1e-4, rtol=1e-3)


def test_the_direction_is_clipped(on_affine):
    first = on_affine(2, score_clip=(0.01, 0.01))
    (cameras, rays), sigma = first.views.of_step(0), first.levels[-1]
    x = first.render_views(rays, 0).color.detach()
    assert first.gradient(x, first.noise_of(0), cameras, sigma, 0).abs().max() == pytest.approx(0.01)


def test_all_fields_take_the_same_steps(on_affine):
    """Each has its own seed, and sees the others as they are after the steps before."""
    first = on_affine(3)
    seen = []
    for field in first.fields[1:]:
        render = field.render_views
        field.render_views = lambda *given, render=render, field=field: (
            seen.append((field.cfg.seed, field.n_steps_taken)),
            render(*given),
        )[1]
    first.step(0)
    assert seen[:2] == [(1000, 0), (2000, 0)]  # the first field sees the others before their step
    seen.clear()
    first.step(1)
    assert seen[:2] == [(1000, 1), (2000, 1)]
    assert [field.n_steps_taken for field in first.fields] == [2, 2, 2]
    assert first.n_calls == 2  # of one field: with the text and without


def test_each_field_is_left_as_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vsd.main([*DUCK, *SMALL, "--n_fields", "3", "--report", "False"])
    found = [find_finished(folder) for folder in (".", "field_2", "field_3")]
    for source in found:
        facts = yaml.safe_load((source.folder / "full_config.yml").read_text(encoding="utf-8"))["made_by"]
        assert facts["command"] == "benchmarks.vsd" and "weights" not in facts  # family ideal has none
    assert [source.cfg.seed for source in found] == [3, 1003, 2003] and {source.cfg.rule for source in found} == {"sds"}
    stopped_early()
    for words in ([*DUCK, *SMALL], ["--resume", "True"]):
        with pytest.raises(UserError, match="^this folder holds a run: those of benchmarks.vsd are not continued;"):
            vsd.main(words)
        with pytest.raises(UserError, match="^this folder holds a run of benchmarks.vsd: .*; go to another folder$"):
            run_sjc.read_config(words)  # it would chain another score from there on
    with pytest.raises(UserError, match="at step 4 of 9; it is of benchmarks.vsd, .*: start that again in an empty"):
        find_finished(".")


def stopped_early():
    """Let the run of this folder be one of nine steps, of which four were taken."""
    for name, now, then in (("full_config.yml", "n_steps: 4", "n_steps: 9"), ("heartbeat.json", "true", "false")):
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        assert now in text
        path.write_text(text.replace(now, then), encoding="utf-8")


def test_numbers_that_are_not_finite_leave_no_record(tmp_path, monkeypatch):
    """It would be run again with the score of run_sjc.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vsd.rules, "vsd_direction", lambda D_s, *_: D_s * math.nan)
    with pytest.raises(RunError, match="not finite.*; start it again in an empty folder, with other numbers"):
        vsd.main([*DUCK, *SMALL])
    assert not Path("flight").exists()


def test_the_miniature_keeps_its_text_encoder_for_all_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--vox.grid_size", "6", "--pose.rend_hw", "8", "--n_steps", "1", "--report", "False"]
    vsd.main(["--preset", "mini", "--sd.prompt", "a red pig", *small, "--n_fields", "2"])
    for folder in (".", "field_2"):
        facts = yaml.safe_load((Path(folder) / "full_config.yml").read_text(encoding="utf-8"))["made_by"]
        assert len(facts["weights"]) > 0


@pytest.mark.parametrize(
    "flag, value", [("rule", "nfsd"), ("bad_words", "foggy"), ("bridge_step", "0.3"), ("var_red", "False")]
)
def test_options_of_the_rule_are_refused(tmp_path, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^--{flag}: nothing here reads it; leave it out$"):
        vsd.main([*DUCK, *SMALL, f"--{flag}", value])
    assert not Path("full_config.yml").exists()
