"""The comparison of rules: what runs it plans, and that each rule is measured with the choice that was best for it."""

import json

import numpy as np
import pytest

from benchmarks import quality
from benchmarks import rules as lab
from benchmarks.quality import make_run
from benchmarks.warm import call
from my.errors import RunError, UserError

BEST = {"sjc": lab.Try(3.0, 1.0, 0.5), "sds": lab.Try(0.3, 3.0, 2.0)}
CEILING = lab.Try(3.0, 1.0, 2.0)


def interval(mean):
    return {"mean": mean, "low": None, "high": None}


def words(command, flag):
    return command[command.index(flag) + 1]


@pytest.fixture
def plans(monkeypatch):
    """The plans that were made; a run's PSNR is the higher the nearer its numbers are to BEST.

    With another guidance another weight is best: 1 times that of the preset.
    """
    made = []

    def evaluate_all(plan, failed, pool):
        made.append(plan)
        reports = {}
        for name, runs in plan.items():
            rule, command = name.partition(" ")[0], next(iter(runs.values()))
            best = BEST.get(rule, CEILING)
            base = lab.preset(words(command, "--preset"))
            psnr = 20 + (rule == "sds")
            same = rule == lab.CEILING or float(words(command, "--sd.scale")) == best.scale
            factor = float(words(command, "--emptiness_weight")) / base["emptiness_weight"]
            psnr -= abs(factor - best.factor) if same else 0.1 + abs(factor - 1)
            psnr -= abs(float(words(command, "--lr")) / base["lr"] - best.rate)
            rows = [{"prompt": words(each, "--sd.prompt"), "psnr": psnr} for each in runs.values()]
            reports[name] = {"summary": {key: interval(psnr) for key in lab.COLUMNS}, "runs": rows}
        return reports

    monkeypatch.setattr(lab, "make_runs", lambda plan, pool: {})
    monkeypatch.setattr(lab, "evaluate_all", evaluate_all)
    monkeypatch.setattr(lab, "picture", lambda *_: np.zeros((4, 4, 3), np.uint8))
    return made


def folders(plan, rule):
    return [folder for name, runs in plan.items() if name.partition(" ")[0] == rule for folder in runs]


def test_each_rule_is_measured_with_its_best_choice(plans, tmp_path, capsys):
    tried = ["--factors", "1,0.3,3", "--scales", "1,3", "--rates", "0.5,2"]
    lab.main(["--out", str(tmp_path), "--rules", "sjc,sds", "--n_steps", "300", "--n_best", "1", *tried])
    *tuning, equal_calls, equal_steps, best = plans
    tuned = {words(command, "--sd.prompt") for plan in tuning for runs in plan.values() for command in runs.values()}
    assert len(tuning) == 2 and tuned == set(lab.TUNED_ON) and not tuned & {*lab.MEASURED_ON, *lab.PROMPTS}
    for rule in ("sjc", "sds"):  # the same number of tries: 3 weights times 2 guidances, then 1 more rate
        assert [len(folders(plan, rule)) for plan in tuning] == [3 * 2 * 4, 4]
    assert [len(folders(plan, lab.CEILING)) for plan in tuning] == [3 * 4, 4]
    for rule, choice in BEST.items():
        for plan, prompts in ((equal_calls, lab.MEASURED_ON), (equal_steps, lab.MEASURED_ON)):
            for command in plan.get(rule, {}).values():
                assert words(command, "--emptiness_weight") == f"{20 * choice.factor:g}"
                assert words(command, "--lr") == f"{0.3 * choice.rate:g}"
                assert words(command, "--sd.scale") == f"{choice.scale:g}" and words(command, "--sd.prompt") in prompts
    assert len(equal_calls["sjc"]) == 2 * len(lab.MEASURED_ON)
    assert list(best) == ["sds", "sjc", lab.CEILING]  # the best one, the plain one, and what is left to gain
    assert len(best["sjc"]) == 3 * len(lab.PROMPTS)
    assert all(command[0] == lab.FIT and "--rule" not in command for command in best[lab.CEILING].values())
    # without guidance sjc asks once per view, so it takes twice as many steps for the same calls
    assert {words(command, "--n_steps") for command in equal_calls["sjc"].values()} == {"600"}
    assert {words(command, "--n_steps") for command in equal_steps["sjc"].values()} == {"300"}
    assert equal_calls["sds"] == equal_steps["sds"]  # two calls: the same runs, which are made once
    found = json.loads((tmp_path / "rules.json").read_text(encoding="utf-8"))
    assert found["choices"]["sds"] == {"factor": 0.3, "scale": 3, "rate": 2} and found["calls"]["sjc"] == 1
    text = (tmp_path / "rules.md").read_text(encoding="utf-8")
    assert "| sds | 3 | 6 | 0.6 | 300 | 600 | 21.000 | 21.00 |" in text and text in capsys.readouterr().out
    assert "| ceiling | - | 60 | 0.6 | 600 | - | 20.000 |" in text and "e3_s1_r0.5: 20.00" in text
    (row,) = {line for line in text.splitlines() if line.startswith("| sds | 3 |")}
    assert row.endswith("| 21.000 | 1.00 ± 0.00 |")  # 21 dB in each prompt, less 20 of the plain rule
    assert (tmp_path / "rules.png").exists()


def test_a_difference_is_taken_within_each_prompt():
    """The plain rule has 1 and 2 dB for the prompts, so that the other gains 1 and 4; rows of seeds count once."""
    rows = [("a", 2.0), ("b", 5.0), ("b", 7.0)]
    own = lab.psnr_by_prompt({"runs": [{"prompt": prompt, "psnr": psnr} for prompt, psnr in rows]})
    found = lab.over(own, {"a": 1.0, "b": 2.0})[lab.OVER_PLAIN]
    assert own == {"a": 2.0, "b": 6.0} and found == {"mean": 2.5, "low": 1.0, "high": 4.0}
    assert lab.over(own, None) == {} and lab.over(own, {"a": 1.0}) == {}


def test_calls_are_those_that_a_run_makes(tmp_path):
    """The only step of a run says in its history what it asked."""
    flags = ["--preset", "ideal", "--rule", "sdi", "--sd.scale", "3", "--n_steps", "1", "--report", "False"]
    flags += ["--vox.grid_size", "6", "--pose.rend_hw", "8", "--pose.view_words", "sjc", "--ideal.n_cameras", "24"]
    assert call(["run_sjc.py", *flags, "--sd.prompt", "a red pig"], tmp_path) is None
    (row,) = [json.loads(line) for line in (tmp_path / "history.json").read_text(encoding="utf-8").splitlines()]
    assert row["calls"] == lab.calls_of(flags) > 4


def test_what_cannot_be_measured(plans, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="lies in the project; give a folder outside it"):
        lab.main(["--out", str(lab.ROOT / "x")])
    monkeypatch.setattr(lab, "make_runs", lambda plan, pool: {tmp_path / "a": "out of memory"})
    with pytest.raises(RunError, match=f"1 failed, such as {tmp_path / 'a'}: out of memory"):
        lab.main(["--out", str(tmp_path), "--rules", "sjc"])


@pytest.mark.parametrize("preset", ["ideal", "mini"])
def test_every_rule_is_one_of_run_sjc(preset, tmp_path):
    """Its options are those that the rule reads, and the number of its calls is known."""
    cfg = lab.RulesConfig(out=str(tmp_path), preset=preset)
    it = lab.Lab(cfg, None)
    n_calls = {name: it.calls(name, lab.Try(1, 3, 1)) for name in lab.RULES}
    assert {n_calls[name] for name in ("sjc", "sds", "csd", "bridge")} == {2} and n_calls["asd"] == 3
    assert 2 < n_calls["nfsd"] <= 3 and 4 <= n_calls["ism"] <= 8 and 6 <= n_calls["sdi"] <= 22
    assert n_calls["vsd"] == 2 * 4 and it.steps("vsd", lab.Try(1, 3, 1)) == round(it.n_steps / 4)
    once = {name: it.calls(name, lab.Try(1, 1, 1)) for name in lab.RULES}
    assert {once[name] for name in ("sjc", "noiseless", "sds", lab.CEILING) if name in once} == {1}
    assert once["asd"] == 2 and once["csd"] == 2 and 1 < once["bridge"] < 2 and once["vsd"] == 4


@pytest.mark.parametrize("main, flag", [(lab.main, "--prompts"), (lab.main, "--tuned_on"), (quality.main, "--prompts")])
def test_a_prompt_without_a_truth_is_refused_before_the_first_run(tmp_path, main, flag):
    with pytest.raises(UserError, match=f"^{flag} a pink duck: "):
        main(["--out", str(tmp_path / "new"), flag, "a red duck,a pink duck"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag, value", [("rates", "-1"), ("factors", "-1"), ("scales", "-1"), ("seeds", "0,-1")])
def test_numbers_that_no_run_takes_are_refused_by_their_own_name(tmp_path, flag, value):
    with pytest.raises(UserError, match=f"^--{flag}"):
        lab.main(["--out", str(tmp_path / "new"), f"--{flag}={value}"])
    assert not (tmp_path / "new").exists()


def test_a_picture_shows_every_rule(tmp_path):
    cfg = lab.RulesConfig(out=str(tmp_path), prompts=["a red pig", "a blue duck"], n_steps=3, seeds=[0])
    choice = lab.Try(1.0, 1.0, 1.0)

    class Here:
        """Does the work in this process."""

        map = staticmethod(map)

    it = lab.Lab(cfg, Here())
    small = ["--ideal.n_cameras", "40", "--vox.grid_size", "6", "--pose.rend_hw", "8", "--pose.view_words", "sjc"]
    for name in ("sjc", "sds"):
        for folder, command in it.runs(name, choice, it.steps(name, choice), cfg.prompts, [0]).items():
            assert make_run(folder, [*command, *small]) is None
    image = lab.picture(it, {"sjc": choice, "sds": choice})
    assert image.dtype == np.uint8 and image.shape[1] > 2 * 112 and image.shape[0] > 3 * 112
