"""evaluate.py and its judge: numbers by hand, a perfect result, fakes that must be caught, mistakes in one line."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import pose
import run_sjc
from benchmarks import quality
from my import checkpoint, config
from my.errors import UserError, run_main
from my.media import as_png
from options.found import Source
from options.sjc import SJCConfig
from toyworld import UNSEEN_PAIRS, parse_prompt
from toyworld import judge as judging
from training import judge as judge_training
from voxnerf import likeness
from voxnerf.likeness import MAX_PSNR

ANGLES = evaluate.test_angles(24)
CAMERAS = evaluate.cameras_at(ANGLES, SJCConfig().pose)


@pytest.fixture(scope="module")
def judge():
    return judging.load()[0]


@pytest.fixture(scope="module")
def duck():
    return evaluate.true_views("blue", "duck", CAMERAS)


# ---------------------------------------------------------------- the judge


def test_judge_reaches_its_stated_accuracy(judge):
    world = judge_training.render_world(6, seed=77, desc="fresh")
    fresh = judge_training.accuracy(judge, world, seed=77, n=576)
    for name, stated in judging.load()[1].items():
        assert stated["object"] > 0.99 and stated["pair"] > 0.95 and stated["octant"] > 0.85
        assert all(fresh[name][k] > stated[k] - 0.06 for k in stated)  # 72 poses: some sides are hard


def test_octant_is_the_view_prompt():
    for azimuth in np.arange(0.1, 2 * np.pi, 0.3):
        camera = pose.camera_at(azimuth, 1.5, words="octants")
        assert camera.view == f"{judging.HEADS['octant'][judging.octant(camera)]} view of"


def test_weights_are_small():
    assert judging.WEIGHTS.stat().st_size <= 400_000


# ---------------------------------------------------------------- metrics


def test_psnr_by_hand():
    a, b = np.zeros((2, 2, 2, 3)), np.zeros((2, 2, 2, 3))
    b[0] += 0.1  # mse 0.01
    assert likeness.picture_psnr(a, b) == pytest.approx([20.0, MAX_PSNR])


def test_iou_by_hand():
    a = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]], dtype=bool)
    b = np.array([[[0, 1], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 0]]], dtype=bool)
    assert likeness.iou(a, b) == pytest.approx([1 / 3, 1, 0])


def test_bootstrap_is_seeded_and_brackets_the_mean():
    once, again = evaluate.bootstrap([0.0, 1.0, 1.0, 1.0]), evaluate.bootstrap([0.0, 1.0, 1.0, 1.0])
    assert once == again and once["low"] < once["mean"] == 0.75 < once["high"] == 1
    assert evaluate.bootstrap([0.5]) == {"mean": 0.5, "low": None, "high": None}


def test_cameras_keep_off_sector_centres_and_back_is_back():
    turn = np.rad2deg(ANGLES[:, 0]) % 45
    assert len(ANGLES) == 24 and np.minimum(turn, 45 - turn) == pytest.approx(np.full(24, 15.0))
    assert sorted(np.rad2deg(ANGLES[evaluate.sees_back(ANGLES), 0])) == pytest.approx([150, 165, 195, 210])


# ---------------------------------------------------------------- results that are known


def test_the_truth_is_perfect(judge, duck):
    m = evaluate.compare(duck, duck, "blue", "duck", ANGLES, judge)
    assert (m["iou"], m["psnr"], m["janus"], m["color_error"], m["saturation"]) == (1, MAX_PSNR, 0, 0, 0)
    assert m["r_pair"] == m["truth_r_pair"] > 0.9 and m["recognised"]


def test_a_front_on_both_sides_is_caught(judge, duck):
    turned = ANGLES + np.where(evaluate.sees_back(ANGLES), np.pi, 0)[:, None] * [1, 0]
    two_faced = evaluate.true_views("blue", "duck", evaluate.cameras_at(turned, SJCConfig().pose))
    m = evaluate.compare(two_faced, duck, "blue", "duck", ANGLES, judge)
    assert m["janus"] > 0.8 and m["r_object"] > 0.9


def test_a_wrong_label_is_caught(judge, duck):
    colour = evaluate.compare(duck, duck, "red", "duck", ANGLES, judge)
    assert colour["r_pair"] < 0.05 < colour["r_object"]
    thing = evaluate.compare(duck, duck, "blue", "pig", ANGLES, judge)
    assert thing["r_object"] < 0.05 and not thing["recognised"] and thing["taken_for"] == "duck"


def test_a_blank_result_gains_nothing(judge, duck):
    blank = np.ones_like(duck[0]), np.zeros_like(duck[1])
    m = evaluate.compare(blank, duck, "blue", "duck", ANGLES, judge)
    assert (m["iou"], m["gain"]) == (0, 0)
    assert math.isnan(m["color_error"]) and math.isnan(m["saturation"])  # it has no colour


def test_colours_are_compared_where_both_silhouettes_are(judge, duck):
    """A result whose red is 0.1 too large, and which knows half of the body; elsewhere it is black."""
    pictures, solid = duck[0].copy(), duck[1].copy()
    solid[:, :, 32:] = 0
    pictures[:, :, 32:] = 0
    pictures[..., 0] += 0.1
    m = evaluate.compare((pictures, solid), duck, "blue", "duck", ANGLES, judge)
    both = (solid > 0.5) & (duck[1] > 0.5)
    chroma = [np.ptp(x, axis=3) for x in (pictures, duck[0])]
    expected = np.mean([(chroma[0] - chroma[1])[k][both[k]].mean() for k in range(24) if both[k].any()])
    assert m["color_error"] == pytest.approx(0.1 / 3) and m["saturation"] == pytest.approx(expected)


def test_a_grey_copy_has_less_saturation(judge, duck):
    grey = duck[0].mean(axis=3, keepdims=True).repeat(3, axis=3)
    m = evaluate.compare((grey, duck[1]), duck, "blue", "duck", ANGLES, judge)
    assert m["saturation"] < -0.3


def test_what_no_run_has_is_a_dash_in_the_table():
    known = {"run": "a", "prompt": "a red pig", "seed": 0}
    rows = [known | dict.fromkeys(evaluate.METRICS, 0.5) | {"saturation": None}]
    summary = evaluate.summarised(rows, evaluate.METRICS)
    assert "saturation" not in summary
    assert [text.split()[-2:] for text in evaluate.table(rows, summary).splitlines()[1:]] == [["0.500", "-"]] * 2


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_sjc.main(
            [
                "--preset",
                "ideal",
                "--n_steps",
                "40",
                "--ideal.n_cameras",
                "40",
                "--pose.view_words",
                "sjc",
                "--pose.rend_hw",
                "16",
                "--vox.grid_size",
                "16",
                "--device",
                "cpu",
            ]
        )
    return folder


def test_a_short_run_is_measured(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out, figure = tmp_path / "results.json", tmp_path / "figure.png"
    again = shutil.copytree(run, tmp_path / "again")
    evaluate.main([str(run), str(again), "--out", str(out), "--figure", str(figure), "--device", "cpu"])
    report = json.loads(out.read_text())
    first, second = report["runs"]
    assert first == second | {"run": str(run)} and second["run"] == str(again)
    for name in evaluate.METRICS:
        assert math.isfinite(report["runs"][0][name])
        assert report["summary"][name]["mean"] == pytest.approx(report["runs"][0][name])
    assert len(report["runs"][0]["views"]["iou"]) == 24
    printed, errors = capsys.readouterr()
    assert "a blue duck" in printed and "judge: 99." in printed and "note:" not in errors
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_rows_tell_runs_apart():
    values = dict.fromkeys(evaluate.METRICS, 0.5)
    rows = [
        {"run": run, "prompt": "a red pig", "seed": seed} | values for run, seed in (("a/x", 1), ("b/x", 1), ("c", 2))
    ]
    summary = {k: {"mean": 0.5, "low": None, "high": None} for k in evaluate.METRICS}
    head, first, second, third, mean = evaluate.table(rows, summary).splitlines()
    assert first.startswith("a red pig (a/x)") and second.startswith("a red pig (b/x)") and "(" not in third
    assert third.split() == ["a", "red", "pig", "2", *["0.500"] * 8] and mean.split() == ["mean", *["0.500"] * 8]
    assert len({line.index("0.500") for line in (first, second, third, mean)}) == 1


def test_only_results_are_replaced(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "results.json"
    for other in ("[]", '{"runs": []}', "no JSON", "", json.dumps({key: [] for key in (*evaluate.REPORT, "more")})):
        out.write_text(other)
        assert "--out results.json: this file is not of evaluate.py; give another name" in one_line(capsys, [str(run)])
        assert out.read_text() == other
    out.write_text(json.dumps({key: [] for key in evaluate.REPORT}))
    evaluate.main([str(run), "--device", "cpu"])
    assert "note: results.json is of an earlier evaluate.py; it will be replaced" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["runs"]) == 1
    evaluate.main([str(run), "--device", "cpu"])  # and its own


def test_only_figures_are_replaced(run, tmp_path, monkeypatch, capsys):
    """A figure says that it is one. Other pictures, also those that other commands wrote, stay."""
    monkeypatch.chdir(tmp_path)
    black = np.zeros((2, 2, 3), np.uint8)
    for other in (b"", b"no picture", as_png(black), as_png(black, "export_mesh.py")):
        (tmp_path / "a.png").write_bytes(other)
        said = one_line(capsys, [str(run), "--figure", "a.png"])
        assert "--figure a.png: this file is not of evaluate.py; give another name, or move it away" in said
        assert (tmp_path / "a.png").read_bytes() == other
    (tmp_path / "a.png").unlink()
    evaluate.main([str(run), "--device", "cpu", "--figure", "a.png"])
    first = (tmp_path / "a.png").read_bytes()
    assert evaluate.is_figure("a.png") and "a.png" not in capsys.readouterr().err
    (tmp_path / "a.png").write_bytes(first[:100])  # one that a full disk cut off is its own too
    evaluate.main([str(run), "--device", "cpu", "--figure", "a.png"])
    assert "note: a.png is of an earlier evaluate.py; it will be replaced" in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes() == first


def test_a_run_counts_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = one_line(capsys, [str(run), f"{run}/."])
    assert said.endswith(f": {run}/.: the run that {run} names too; give it once")


def test_runs_of_one_prompt_are_told_apart_in_the_figure():
    """The table has the names that were given, and the figure their last parts."""

    def job(folder, seed):
        cfg = SJCConfig(family="ideal", sd={"prompt": "a red pig"}, seed=seed)
        return evaluate.Job(folder, Source(cfg, Path(folder), Path(folder), 1), None)

    jobs = [job("/x/sds", 0), job("/x/sdi", 0), job("/x/other", 1)]
    assert evaluate.titles(jobs) == ["a red pig (sds)", "a red pig (sdi)", "a red pig"]


def one_line(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        run_main(evaluate.main, argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    return error


def test_results_need_a_folder(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flag in ("--out", "--figure"):
        said = one_line(capsys, [str(run), flag, "nosuch/a"])
        assert f"{flag} nosuch/a: there is no folder {tmp_path}/nosuch" in said
    monkeypatch.chdir(evaluate.ROOT)
    assert "go to an experiment directory" in one_line(capsys, [str(run)])


def test_a_published_checkpoint_is_measured_as_its_run_is(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors, _ = checkpoint.load(checkpoint.latest(run / "ckpt"))
    field = {name.removeprefix("field/"): value for name, value in tensors.items() if name.startswith("field/")}
    (tmp_path / "ckpt").mkdir()
    torch.save(field, tmp_path / "ckpt" / "step_40.pt")
    cfg = config.flat(config.read(SJCConfig, run / "full_config.yml"))
    stated = [
        "family",
        "sd.prompt",
        "preset",
        "pose.rend_hw",
        "vox.density_shift",
        "vox.bbox_len",
        "pose.R",
        "pose.FoV",
    ]
    flags = [word for name in stated if cfg[name] is not None for word in (f"--{name}", str(cfg[name]))]
    for where, given in ((str(run), []), (str(tmp_path), flags)):
        evaluate.main([where, *given, "--out", f"{len(given)}.json"])
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, len(flags)))
    assert a["summary"] == b["summary"] and b["runs"][0]["prompt"] == cfg["sd.prompt"]


def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "no full_config.yml" in one_line(capsys, [str(tmp_path)])
    config.write(SJCConfig(n_steps=1), tmp_path / "full_config.yml")
    assert "no checkpoint" in one_line(capsys, [str(tmp_path)])
    (tmp_path / "ckpt" / "step_0000001").mkdir(parents=True)
    assert "burger" in one_line(capsys, [str(tmp_path)])
    assert "--runs" in one_line(capsys, [])
    assert "--n_views" in one_line(capsys, [str(tmp_path), "--n_views", "8"])


def test_an_unfinished_run_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = (run / "full_config.yml").read_text()
    try:
        (run / "full_config.yml").write_text(saved.replace("n_steps: 40", "n_steps: 50"))
        assert "at step 40 of 50" in one_line(capsys, [str(run)])
    finally:
        (run / "full_config.yml").write_text(saved)


# ---------------------------------------------------------------- the table of results


def test_quality_covers_the_world():
    pairs = [parse_prompt(prompt) for prompt in quality.PROMPTS]
    assert len({obj for _, obj in pairs}) == 12 and len(set(pairs) & set(UNSEEN_PAIRS)) == 4


def test_quality_reports_what_failed(tmp_path):
    error = quality.make_run(tmp_path / "run", [quality.RUN, "--preset", "nonesuch"])
    assert "no preset 'nonesuch'" in error
    cfg = quality.QualityConfig(out=str(tmp_path), settings=["ideal"], seeds=[0, 1], n_steps=9)
    text = quality.document(cfg, {}, {tmp_path / "ideal" / "a_blue_duck_0": error})
    assert "python -m benchmarks.quality --out FOLDER --settings ideal --seeds 0,1 --n_steps 9\n" in text
    assert "ideal/a_blue_duck_0: --preset: no preset" in text


def test_quality_measures_again_only_what_changed(tmp_path):
    out, runs = tmp_path / "results.json", [tmp_path / "a", tmp_path / "b"]
    for folder in runs:
        folder.mkdir()
        (folder / "heartbeat.json").touch()
    assert quality.measured(out, runs) is None
    rows = [{"run": str(folder)} | dict.fromkeys(quality.COLUMNS, 0) for folder in runs]
    out.write_text(json.dumps({"runs": [{"run": str(folder)} for folder in runs]}))
    os.utime(out, (2e9, 2e9))
    assert quality.measured(out, runs) is None  # of an earlier version, which measured less
    out.write_text(json.dumps({"runs": rows}))
    os.utime(out, (2e9, 2e9))
    assert quality.measured(out, runs) is not None
    assert quality.measured(out, runs[:1]) is None
    os.utime(runs[1] / "heartbeat.json", (2.1e9, 2.1e9))
    assert quality.measured(out, runs) is None


def test_quality_keeps_what_is_finished_and_only_that(tmp_path, monkeypatch):
    calls, begin, folder = [], ["run_sjc.py", "--preset", "ideal", "--seed", "1"], tmp_path / "ideal" / "run"
    monkeypatch.setattr(quality, "call", lambda command, cwd: calls.append(command))
    for done, new_calls in ((False, [begin]), (True, []), (False, [begin])):
        calls.clear()
        if folder.exists():
            (folder / "heartbeat.json").write_text(json.dumps({"done": done}))
        assert quality.make_run(folder, begin) is None and calls == new_calls
    (folder / "ckpt" / "step_0000010").mkdir(parents=True)
    quality.make_run(folder, begin)
    quality.make_run(folder, [*begin, "--n_steps", "7"])  # other options: not the same run
    assert calls[1:] == [["run_sjc.py", "--resume", "True"], [*begin, "--n_steps", "7"]]


def test_the_ceiling_is_fitted_to_the_truth(tmp_path):
    """A small fit leaves a finished run whose silhouette is that of the object."""
    small = ["--n_steps", "60", "--vox.grid_size", "12", "--pose.rend_hw", "16", "--emptiness_weight", "1"]
    command = [quality.FIT, "--preset", "ideal", "--sd.prompt", "a red burger", "--lr", "0.3", "--report", "False"]
    assert quality.make_run(tmp_path / "run", [*command, *small]) is None
    report, error = quality.evaluate(tmp_path, [tmp_path / "run"])
    assert error is None and report["summary"]["iou"]["mean"] > 0.7


def test_quality_table_by_hand():
    summary = {k: {"mean": 0.5, "low": 0.4, "high": 0.7} for k in quality.COLUMNS}
    runs = [{"prompt": "a red pig", **dict.fromkeys(quality.COLUMNS, value)} for value in (0, 1)]
    report = {"summary": summary, "runs": runs}
    head, _, row = quality.settings_table({"ideal": report}).splitlines()
    assert head.startswith("| setting | runs | IoU |") and row.startswith("| ideal | 2 | 0.500 ± 0.150 |")
    assert quality.prompts_table(report).splitlines()[2].startswith("| a red pig | 0.500 | 0.50 |")
    del summary["saturation"]
    for each in runs:
        each["saturation"] = None
    assert quality.prompts_table(report).endswith("0.500 | - |")
    assert quality.settings_table({"ideal": report}).endswith("| - |")


def test_outputs_are_checked_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "read_prompt", lambda found: None)
    monkeypatch.setattr(evaluate, "find_finished", lambda folder, given: None)
    for argv, words in (
        (["--out", str(tmp_path)], "that is a folder; give the name of a file"),
        (["--figure", str(tmp_path / "a.txt")], "give a name that ends in .png"),
        (["--mesh", "True"], "--mesh True: the mesh is shown in the figure"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate.main(["run", *argv])


def test_the_run_of_another_command_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full_config.yml").write_text("scene: lego\nmade_by: {command: run_nerf.py}\n")
    with pytest.raises(UserError, match="holds a run of run_nerf.py"):
        evaluate.main([str(tmp_path)])
