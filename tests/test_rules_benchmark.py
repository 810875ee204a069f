"""The comparison of rules: what runs it plans, and that each rule is measured with the weight that was best for it."""

import json

import pytest

from benchmarks import rules as lab
from my.errors import RunError, UserError

BEST = {"sjc": lab.Try(3.0, 1.0), "sds": lab.Try(0.1, 1.0)}


def interval(mean):
    return {"mean": mean, "low": None, "high": None}


@pytest.fixture
def plans(monkeypatch):
    """The plans that were made; a run's PSNR is the higher the nearer its factor and guidance are to BEST."""
    made = []

    def evaluate_all(plan, failed, workers):
        made.append(plan)
        reports = {}
        for name in plan:
            rule, _, choice = name.partition(" ")
            factor, _, scale = choice.partition("_s")
            psnr = 20 - abs(float(factor) - BEST[rule].factor) - abs(float(scale) - BEST[rule].scale) if choice else 30
            reports[name] = {"summary": {key: interval(psnr) for key in lab.COLUMNS}}
        return reports

    monkeypatch.setattr(lab, "make_runs", lambda plan, workers: {})
    monkeypatch.setattr(lab, "evaluate_all", evaluate_all)
    return made


def test_each_rule_is_measured_with_its_best_weight(plans, tmp_path, capsys):
    lab.main(["--out", str(tmp_path), "--rules", "sjc,sds", "--seeds", "0,1"])
    tries, final = plans
    assert set(tries) == {f"{name} {factor:g}_s1" for name in BEST for factor in lab.FACTORS}
    tuned = {prompt for runs in tries.values() for flags in runs.values() for prompt in [flags[-3]]}
    measured = {flags[-3] for runs in final.values() for flags in runs.values()}
    assert tuned == set(lab.TUNED_ON) and measured == set(lab.MEASURED_ON) and not tuned & measured
    for name, runs in final.items():
        assert len(runs) == 2 * len(lab.MEASURED_ON)
        for folder, flags in runs.items():
            assert flags[flags.index("--emptiness_weight") + 1] == f"{lab.weight_of('ideal') * BEST[name].factor:g}"
            assert flags[flags.index("--sd.scale") + 1] == "1"
            assert flags[flags.index("--rule") + 1] == name.partition("_")[0]
            assert folder.parent.name == f"{name}_{BEST[name].factor:g}_s1"
    found = json.loads((tmp_path / "rules.json").read_text(encoding="utf-8"))
    assert found["best"] == {"sjc": {"factor": 3, "scale": 1}, "sds": {"factor": 0.1, "scale": 1}}
    assert "| sds | 1 | 2 | 30.000 | 30.00 |" in capsys.readouterr().out
    assert "| sjc | 1 | 17.10 | 17.30 | 18.00 | 20.00 |" in (tmp_path / "rules.md").read_text(encoding="utf-8")


def test_the_guidance_is_tuned_too(plans, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(BEST, "bridge", lab.Try(1.0, 3.0))
    lab.main(["--out", str(tmp_path), "--rules", "bridge", "--factors", "0.3,1", "--scales", "1,3,9"])
    tries, final = plans
    assert set(tries) == {f"bridge {factor}_s{scale}" for factor in (0.3, 1) for scale in (1, 3, 9)}
    (runs,) = final.values()
    for flags in runs.values():
        assert flags[flags.index("--sd.scale") + 1] == "3" and "blurry, foggy" in flags
    text = capsys.readouterr().out
    assert "| bridge | 3 | 20 | 30.000" in text and "| bridge | 9 | 13.30 | 14.00 |" in text
    assert set(lab.tries_of(lab.RulesConfig(out="", preset="mini"), "csd")) == {(f, 3.0) for f in lab.FACTORS}


def test_default_rules(plans, tmp_path, monkeypatch):
    for name in lab.RULES:
        monkeypatch.setitem(BEST, name, lab.Try(1.0, 1.0))
    lab.main(["--out", str(tmp_path)])
    assert {name.partition(" ")[0] for name in plans[0]} == set(lab.RULES)
    assert {name.partition("_s")[2] for name in plans[0] if name.startswith("sds")} == {"1"}
    assert {name.partition("_s")[2] for name in plans[0] if name.startswith("csd")} == {"5"}
    lab.main(["--out", str(tmp_path), "--preset", "mini"])
    assert {name.partition(" ")[0] for name in plans[2]} == set(lab.RULES)


def test_what_cannot_be_measured(plans, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="lies in the project; give a folder outside it"):
        lab.main(["--out", str(lab.ROOT / "x")])
    monkeypatch.setattr(lab, "make_runs", lambda plan, workers: {tmp_path / "a": "out of memory"})
    with pytest.raises(RunError, match=f"1 failed, such as {tmp_path / 'a'}: out of memory"):
        lab.main(["--out", str(tmp_path), "--rules", "sjc"])
