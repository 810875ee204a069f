"""The benchmark of a step: how it times, what it counts, which marks it sets. And that of a GPU, without one."""

import json

import pytest
import torch

from benchmarks import gpu, step
from benchmarks.step import Clock, Mark, Report, judge, summary, timed_parts
from my.errors import UserError
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
    monkeypatch.setattr(step, "run_options", lambda model, *_: config(ideal={"n_cameras": 8}, vox={"grid_size": 8}))
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
