"""Compare rules of score distillation on the toy world, where the truth is known: the same model, field and cameras.

    python -m benchmarks.rules --out FOLDER --preset ideal

For each rule the weight of the emptiness loss is tuned first, and with --scales the guidance, on prompts that are not
measured. Every rule gets the same number of tries. Then it is measured on other prompts. It leaves FOLDER/rules.md and
rules.json, and all runs. It can be stopped at any time: the same command keeps what is finished.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field

from benchmarks.quality import COLUMNS, ROOT, RUN, Plan, cell, evaluate_all, make_runs, markdown
from my import config
from my.errors import RunError, UserError, run_main
from my.run_dir import refuse_output, write_atomic

RULES: dict[str, list[str]] = {
    "sjc": ["--rule", "sjc"],
    "sjc_eq15": ["--rule", "sjc", "--var_red", "False"],
    "noiseless": ["--rule", "noiseless"],
    "sds": ["--rule", "sds"],
    "csd": ["--rule", "csd"],
    "nfsd": ["--rule", "nfsd", "--bad_words", "blurry, foggy"],
    "bridge": ["--rule", "bridge", "--bad_words", "blurry, foggy"],
    "asd": ["--rule", "asd"],
    "ism": ["--rule", "ism"],
    "sdi": ["--rule", "sdi"],
}
IDEAL_SCALES = {"csd": 5.0, "nfsd": 5.0, "bridge": 5.0, "asd": 5.0}  # the preset's own 1 is no guidance
TUNED_ON = ["a green castle", "a red chair"]
MEASURED_ON = ["a purple castle", "a purple chair", "a blue duck", "a green car"]
FACTORS = [0.1, 0.3, 1.0, 3.0]  # of the preset's weight of the emptiness loss

Numbers = dict[str, Any]  # {measure: interval} of evaluate.py


class Try(NamedTuple):
    """What is tuned: a factor of the preset's weight of the emptiness loss, and a guidance."""

    factor: float
    scale: float

    def __str__(self) -> str:
        return f"{self.factor:g}_s{self.scale:g}"


class RulesConfig(config.Config):
    """Every option of benchmarks.rules."""

    out: str = Field(description="folder to fill")
    preset: Literal["ideal", "mini"] = Field("ideal", description="model, field and cameras")
    rules: list[Literal[tuple(RULES)]] = Field(  # type: ignore[valid-type]  # its names are computed
        [], description="rows of the table; default all"
    )
    prompts: list[str] = Field(MEASURED_ON, min_length=1, description="texts to measure on")
    tuned_on: list[str] = Field(TUNED_ON, min_length=1, description="texts to tune on")
    factors: list[float] = Field(
        FACTORS, min_length=1, description="factors of the preset's --emptiness_weight that are tried"
    )
    scales: list[Annotated[float, Field(ge=0)]] = Field(
        [], description="guidances, as in --sd.scale, that are tried with each factor; default one, fit for the rule"
    )
    seeds: list[int] = Field(
        [0], min_length=1, description="seeds of each run that is measured; tuning takes the first"
    )
    n_steps: int | None = Field(None, gt=0, description="steps of every run, default the preset's")
    workers: int = Field(2, gt=0, description="runs at the same time, one CPU thread per run")


def preset(name: str) -> dict[str, Any]:
    """Return the options of a preset."""
    return yaml.safe_load((ROOT / "presets" / f"{name}.yml").read_text(encoding="utf-8"))


def weight_of(name: str) -> float:
    """Return the weight of the emptiness loss of a preset."""
    return float(preset(name)["emptiness_weight"])


def tries_of(cfg: RulesConfig, name: str) -> list[Try]:
    """Return what is tried for a rule."""
    own = float(preset(cfg.preset)["sd"]["scale"])
    scales = cfg.scales or [IDEAL_SCALES.get(name, own) if cfg.preset == "ideal" else own]
    return [Try(*pair) for pair in product(cfg.factors, scales)]


def runs_of(cfg: RulesConfig, name: str, choice: Try, measure: bool) -> dict[Path, list[str]]:
    """Return {folder: flags} of the runs of a rule with one choice, to measure or to tune."""
    prompts, seeds = (cfg.prompts, cfg.seeds) if measure else (cfg.tuned_on, cfg.seeds[:1])
    weight = weight_of(cfg.preset) * choice.factor
    flags = [RUN, "--preset", cfg.preset, *RULES[name], "--emptiness_weight", f"{weight:g}"]
    flags += ["--sd.scale", f"{choice.scale:g}", "--report", "False"]
    flags += ["--n_steps", str(cfg.n_steps)] if cfg.n_steps else []
    where = Path(cfg.out).resolve() / ("measured" if measure else "tuned") / f"{name}_{choice}"
    return {
        where / f"{prompt.replace(' ', '_')}_{seed}": [*flags, "--sd.prompt", prompt, "--seed", str(seed)]
        for prompt in prompts
        for seed in seeds
    }


def measured(plan: Plan, workers: int) -> dict[str, Numbers]:
    """Return {name: summary} of the runs of a plan; raises RunError where one failed."""
    failed = make_runs(plan, workers)
    reports = evaluate_all(plan, failed, workers)
    if failed:
        raise RunError(f"{len(failed)} failed, such as {next(iter(failed))}: {next(iter(failed.values()))}")
    return {name: report["summary"] for name, report in reports.items()}


def tuned(cfg: RulesConfig) -> tuple[dict[str, Try], dict[str, Numbers]]:
    """Return ({rule: the try with the best PSNR on the prompts to tune on}, all that was measured there)."""
    plan = {
        f"{name} {choice}": runs_of(cfg, name, choice, measure=False)
        for name in cfg.rules
        for choice in tries_of(cfg, name)
    }
    found = measured(plan, cfg.workers)

    def psnr(name: str, choice: Try) -> float:
        return found[f"{name} {choice}"]["psnr"]["mean"]

    return {name: max(tries_of(cfg, name), key=lambda choice: psnr(name, choice)) for name in cfg.rules}, found


def document(cfg: RulesConfig, best: dict[str, Try], tries: dict[str, Numbers], final: dict[str, Numbers]) -> str:
    """Return rules.md: the table of rules, and what was tried for each."""
    heads = ["rule", "guidance", "emptiness weight", *(name for name, _ in COLUMNS.values())]
    weight = weight_of(cfg.preset)
    rows = [
        [
            name,
            f"{best[name].scale:g}",
            f"{weight * best[name].factor:g}",
            *(cell(numbers[k], d) for k, (_, d) in COLUMNS.items()),
        ]
        for name, numbers in final.items()
    ]
    tried = [
        [name, f"{scale:g}", *(f"{tries[f'{name} {Try(f, scale)}']['psnr']['mean']:.2f}" for f in cfg.factors)]
        for name in cfg.rules
        for scale in dict.fromkeys(choice.scale for choice in tries_of(cfg, name))
    ]
    return (
        "\n\n".join(
            [
                f"# Rules with --preset {cfg.preset}",
                f"Prompts: {', '.join(cfg.prompts)}; seeds {', '.join(map(str, cfg.seeds))}. Means over runs, and half "
                "of their 95% bootstrap interval.",
                markdown(heads, rows),
                f"PSNR on {', '.join(cfg.tuned_on)}, by the guidance and the emptiness weight:",
                markdown(["rule", "guidance", *(f"{weight * f:g}" for f in cfg.factors)], tried),
            ]
        )
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    """Tune and measure the rules, and write the tables."""
    cfg = config.load(RulesConfig, argv, prog="python -m benchmarks.rules", doc=__doc__, config_file=None)
    cfg.rules = cfg.rules or list(RULES)
    out = Path(cfg.out)
    if out.resolve().is_relative_to(ROOT):
        raise UserError(f"--out {cfg.out}: lies in the project; give a folder outside it")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rules.md", "rules.json"):
        refuse_output("--out", out / name)
    best, tries = tuned(cfg)
    final = measured({name: runs_of(cfg, name, best[name], measure=True) for name in cfg.rules}, cfg.workers)
    text = document(cfg, best, tries, final)
    record = {"tried": tries, "best": {name: choice._asdict() for name, choice in best.items()}, "measured": final}
    write_atomic(out / "rules.md", text)
    write_atomic(out / "rules.json", json.dumps(record, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    run_main(main)
