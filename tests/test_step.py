"""The benchmark of a step: how it times, what it counts, which marks it sets. And that of a GPU, without one."""

import itertools
import json
from unittest import mock

import pytest
import torch

from benchmarks import gpu, step
from benchmarks.pretend import DEVICE, pretended_cuda, weightless
from benchmarks.step import Clock, Mark, Report, judge, summary, timed_parts
from my.errors import UserError
from options.sjc import SJCConfig
from sjc import SJC
from tiny import Affine, config


def test_a_mark_says_whether_it_is_met():
    assert str(Mark("a step", 1.5, 1.0, "x")) == "MISS: a step: 1.5x, at most 1x"
    assert str(Mark("a step", 1.0, 1.0, "x")) == "pass: a step: 1x, at most 1x"


def test_summary_by_hand():
    assert summary([5.0, 1.0, 2.0, 4.0, 3.0]) == [3.0, 1.5, 4.5]  # median and quartiles
    assert summary([7.0]) == [7.0] * 3


def test_the_clock_adds_up_spans(monkeypatch):
    moments = iter([0.0, 1.0, 5.0, 8.0])
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(moments))
    clock = Clock(torch.device("cpu"))
    work = clock.over("work", lambda x: x + 1)
    assert work(1) == 2 and work(2) == 3
    assert clock.taken() == {"work": 4.0} and clock.taken() == {}


def test_all_parts_of_a_step_are_timed():
    optimisation = SJC(config(), Affine())
    clock = Clock(optimisation.adapter.device)
    with timed_parts(optimisation, clock):
        clock.over("step", optimisation.step)(0)
    taken = clock.taken()
    assert taken.keys() == {"step", *step.PARTS}
    assert sum(taken[name] for name in step.PARTS) <= taken["step"]


def test_times_by_hand(monkeypatch):
    """Each look at the clock takes 1 s, and 100 s in the turns that do not count."""
    looks = itertools.count(1)
    moments = itertools.accumulate(100.0 if next(looks) <= 2 * step.WARM else 1.0 for _ in itertools.count())
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(moments))
    found = step.timed(SJC(config(), Affine()), 3)
    assert found["step"] == [1000] * 3 and "unet" not in found
    assert found["parts"] == {name: [1000] * 3 for name in step.PARTS} | {"rest": [5000] * 3}


def test_the_unet_alone_is_called_as_a_guided_step_calls_it(tiny_sd):
    optimisation, seen = of_sd(tiny_sd, torch.device("cpu")), []
    optimisation.adapter.unet.register_forward_pre_hook(lambda _net, args: seen.append([x.shape for x in args]))
    step.guided_unet(optimisation)(0)
    optimisation.step(0)
    (alone, in_step) = seen
    assert alone[0] == in_step[0] == (2, 4, 8, 8) and alone[2] == in_step[2]


def of_sd(folder, device):
    """A small run with the tiny Stable Diffusion."""
    return step.built(small_sd(folder), device)


def small_sd(folder):
    sd = {"checkpoint": str(folder), "prompt": "a blue duck", "scale": 3}
    return SJCConfig(family="sd", sd=sd, vox={"grid_size": 8}, pose={"rend_hw": 8})


def test_what_is_counted_of_a_step(tiny_sd):
    """The UNet's share is that of its call alone; of the rest, the optimizer launches a kernel per parameter."""
    found = step.counted(small_sd(tiny_sd))
    with pretended_cuda() as machine, weightless(), mock.patch("voxnerf.render.fused_problem", lambda field: ""):
        call = step.guided_unet(of_sd(tiny_sd, DEVICE))
        alone = machine.reset()
        call(0)
    assert found["flops"]["unet"] == pytest.approx(alone.flops.total(), rel=0.02)
    assert found["launches"]["unet"] == pytest.approx(alone.launches.total(), rel=0.1)
    assert found["launches"].keys() == found["flops"].keys() == {"", "unet", "renderer", "optimizer"}
    assert found["launches"]["optimizer"] == step.LAUNCHES["sjc.adamax"] == 4
    fused = sum(step.LAUNCHES[f"sjc.{name}"] for name in ("block_flags", "march", "march_backward"))
    assert found["launches"]["renderer"] > max(fused, found["launches"][""])  # its backward too
    assert found["launches_outside"] == sum(n for name, n in found["launches"].items() if name != "unet")
    assert found["flops_per_unet"] == sum(found["flops"].values()) / found["flops"]["unet"] and found["waits"] == []
    names = {name for _, name in found["operators_outside"]}
    assert {"sjc.march", "sjc.march_backward", "sjc.adamax"} <= names and "aten.convolution" not in names


def test_a_later_step_is_counted_and_the_memory_of_a_view_apart(monkeypatch):
    """The first step makes ready what the later ones only use."""

    def wait(_self, i):
        for _ in range(3 - i):
            torch.ones(2, device="cuda").sum().item()

    monkeypatch.setattr(SJC, "step", wait)
    monkeypatch.setattr(SJC, "view", lambda self, camera: torch.empty(10**9, dtype=torch.uint8, device="cuda"))
    found = step.counted(config())
    (line,) = found["waits"]
    assert line.startswith("2 x aten._local_scalar_dense.default at tests/test_step.py:")
    assert found["peak_gb"]["step"] < 0.1 and 1 <= found["peak_gb"]["view"] < 1.1 and found["flops_per_unet"] is None


def test_marks_of_times():
    """Those of a CPU, and those of a GPU."""
    timed = {
        "mini": {"ratio": [0.9, 0, 0], "step": [1, 1, 1]},
        "ideal": {"step": [5.0, 0, 0]},
        "full": {"ratio": [1.2, 0, 0], "peak_gb": 3.0},
    }
    marks = {}
    for cuda in (False, True):
        report = Report("a machine", timed=timed if cuda else {k: timed[k] for k in ("mini", "ideal")})
        judge(report, cuda)
        marks[cuda] = [(mark.value, mark.most) for mark in report.marks]
    assert marks == {False: [(0.9, 1.0), (5.0, 4.0)], True: [(1.2, 1.15), (3.0, 4.0)]}


def test_marks_by_hand():
    counts = {
        "waits": [],
        "flops": {"unet": 1000, "renderer": 500, "": 2},
        "launches_outside": 90,
        "peak_gb": {"set-up": 1.0, "step": 2.0, "view": 3.5},
    }
    report = Report("a machine", counted={"full": counts, "full, --low_vram True": counts})
    judge(report, cuda=True)
    assert [mark.value for mark in report.marks] == [0, 0.2, 90, 3.5] * 2
    assert [mark.most for mark in report.marks] == [0, 0.1, 100, 4.0, 0, 0.1, 100, 3.0]


def test_a_step_of_the_exact_score_is_measured(tmp_path, capsys, monkeypatch):
    """The whole command, with few pictures: a table, a file, and one JSON object in it."""
    monkeypatch.setattr(
        step, "run_options", lambda model, *_: config(ideal={"n_cameras": 8}, vox={"grid_size": 8}, sd={"scale": 1})
    )
    step.main(["--models", "ideal", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path / "step.json")])
    report = json.loads((tmp_path / "step.json").read_text())
    assert "| ideal |" in capsys.readouterr().out
    assert report["timed"]["ideal"]["parts"].keys() == {*step.PARTS, "rest"}
    assert report["counted"]["ideal"]["launches_outside"] > 10
    assert [mark["what"] for mark in report["marks"]] == ["step of ideal"]


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--out nosuch/step.json"):
        step.main(["--out", "nosuch/step.json"])


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU with CUDA"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_stages_fit_into_ten_minutes(home, capsys):
    cfg = gpu.GPUConfig(out="out")
    assert [name for name, _, _ in gpu.stages(cfg, home)] == ["selftest", "render", "step"]
    assert "no training of a NeRF" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "scene_is_there", lambda name: True)
        assert sum(limit for _, _, limit in gpu.stages(cfg, home)) < 600


@pytest.mark.parametrize(
    "words, limit, said",
    [(["-c", "print(5)"], 60, ""), (["-c", "exit(3)"], 60, "x ended with status 3"), (["-c", "input()"], 0, "0 s")],
)
def test_a_stage_that_fails_is_said(words, limit, said, tmp_path):
    assert gpu.run("x", words, limit, tmp_path).endswith(said)
    assert said or (tmp_path / "x.txt").read_text() == "5\n"
