"""Several fields whose own score is exact: one alone is SDS, and together they part."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import vsd
from my.errors import UserError
from options.found import find_finished
from sjc import SJC, optimise
from tiny import Affine, config

SMALL = ["--n_steps", "3", "--preset", "ideal", "--prompt", "a red burger"]


def states(fields):
    for _ in zip(*map(optimise, fields)):
        pass
    return [[p.detach().clone() for p in field.field.parameters()] for field in fields]


def test_one_field_alone_is_sds():
    fields = []
    fields.append(vsd.Particle(config(rule="sds"), Affine(), fields))
    for got, want in zip(states(fields)[0], states([SJC(config(rule="sds"), Affine())])[0]):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_the_others_change_the_direction():
    """Where another field is nearer to the noisy rendering, the own score points to it, and the step flees from it."""
    fields = []
    fields += [vsd.Particle(config(rule="sds", seed=seed), Affine(), fields) for seed in (0, 1)]
    first = fields[0]
    (cameras, rays), sigma = first.views.of_step(0), first.levels[-1]
    x = first.render_views(rays, 0).color.detach()
    n = first.noise_of(0)
    x_sigma = x + sigma * n
    fields[1].render_views = lambda *_: SimpleNamespace(color=x_sigma)
    D_s = first.ask(cameras).guided(x_sigma, sigma)
    want = sigma**2 / (1 + sigma**2) * (D_s - x_sigma) / sigma
    torch.testing.assert_close(first.gradient(x, n, cameras, sigma, 0), want, atol=1e-4, rtol=1e-3)


def test_each_field_is_left_as_a_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    vsd.main([*SMALL, "--out", "runs", "--n_fields", "2"])
    found = [find_finished(tmp_path / "runs" / str(k)) for k in range(2)]
    for source in found:
        facts = yaml.safe_load((source.folder / "full_config.yml").read_text(encoding="utf-8"))["made_by"]
        assert facts["command"] == "benchmarks.vsd" and "weights" not in facts  # family ideal has none
    assert [source.cfg.seed for source in found] == [0, 1] and {source.cfg.rule for source in found} == {"sds"}
    with pytest.raises(UserError, match="--out runs: is not empty"):
        vsd.main([*SMALL, "--out", "runs"])
