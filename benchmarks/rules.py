"""Compare rules of score distillation on the toy world, where the truth is known: the same model, field and cameras.

    python -m benchmarks.rules --out FOLDER --preset ideal

Each rule is tuned first, on prompts that are not measured: all pairs of a weight of the emptiness loss and a guidance,
then the learning rate. All rules get the same number of tries. Then they are measured on other prompts, at equal calls
of the network and at equal steps, and the best of them on all prompts. The last row is the photometric ceiling: the
same field, fitted to the truth, in as many steps as the longest row. It leaves FOLDER/rules.md, rules.json and
rules.png, and all runs. It can be stopped at any time: the same command keeps what is finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field

from benchmarks.quality import (
    COLUMNS,
    FIT,
    PROMPTS,
    ROOT,
    RUN,
    Plan,
    Seed,
    cell,
    evaluate_all,
    make_runs,
    markdown,
    refuse_unmeasured,
)
from benchmarks.warm import processes
from my import config
from my.errors import RunError, run_main
from my.file_system import real
from my.media import labelled_grid, write_png
from my.run_dir import refuse_inside, refuse_output, write_atomic

if TYPE_CHECKING:
    import numpy as np
    import torch

    from adapt import Question

N_FIELDS = 4  # of VSD
BAD = ["--bad_words", "blurry, foggy"]
RULES: dict[str, list[str]] = {
    "sjc": ["--rule", "sjc"],
    "sjc_eq15": ["--rule", "sjc", "--var_red", "False"],
    "noiseless": ["--rule", "noiseless"],
    "sds": ["--rule", "sds"],
    "csd": ["--rule", "csd"],
    "nfsd": ["--rule", "nfsd", *BAD],
    "bridge": ["--rule", "bridge", *BAD],
    "asd": ["--rule", "asd"],
    "ism": ["--rule", "ism"],
    "sdi": ["--rule", "sdi"],
    "sjc_all_levels": ["--rule", "sjc", "--sigma_anneal", "none"],
    "sds_clip": ["--rule", "sds", "--score_clip", "0.1,0.5"],
    "sds_sqrt": ["--rule", "sds", "--sigma_schedule", "sqrt"],
    "sjc_surface": ["--rule", "sjc", "--noise", "surface"],
    "vsd": ["--n_fields", str(N_FIELDS)],
}
SCHEDULES = {  # of all rows that say nothing else: levels are drawn, under a highest one that falls
    "ideal": {"--lr_end": "0.05", "--sigma_schedule": "random", "--sigma_anneal": "30"},
    "mini": {"--lr_end": "0.1", "--sigma_schedule": "random", "--sigma_anneal": "600"},
}
CEILING = "ceiling"
COMMANDS = {"vsd": "benchmarks.vsd", CEILING: FIT}  # of rows that are no run of run_sjc.py
PLAIN = "sjc"
OVER_PLAIN = "psnr_over_plain"
TUNED_ON = ["a green castle", "a red chair", "a yellow duck", "a blue car"]
MEASURED_ON = ["a purple castle", "a purple chair", "a blue duck", "a green car", "a red burger", "a yellow rocket"]
FACTORS = [1.0, 0.3]  # of the preset's weight of the emptiness loss
SCALES = {"ideal": [1.0, 5.0], "mini": [3.0, 10.0]}  # guidances
RATES = [1.0, 0.4]  # factors of the preset's learning rate
VIEW_DEG = (30.0, 75.0)  # azimuth and elevation draw of the pictures
WHAT = (
    "Means over runs, ± half of their 95% bootstrap interval. The last column is a mean over prompts of the difference "
    "within each, whose interval is much smaller where rules do well on the same prompts."
)
PLAIN_CALLS = 2  # of the network per view: those of a guided rule

Numbers = dict[str, Any]  # {measure: interval} of evaluate.py


class Try(NamedTuple):
    """What is tuned: factors of the preset's weight of the emptiness loss and learning rate, and a guidance."""

    factor: float
    scale: float
    rate: float

    def __str__(self) -> str:
        return f"e{self.factor:g}_s{self.scale:g}_r{self.rate:g}"


class RulesConfig(config.Config):
    """Every option of benchmarks.rules."""

    out: str = Field(description="a folder to fill")
    preset: Literal["ideal", "mini"] = Field("ideal", description="model, field and cameras")
    rules: list[Literal[tuple(RULES)]] = Field(  # type: ignore[valid-type]  # its names are computed
        [], description="rows of the table; default all"
    )
    prompts: list[str] = Field(MEASURED_ON, min_length=1, description="texts to measure on")
    tuned_on: list[str] = Field(TUNED_ON, min_length=1, description="texts to tune on")
    factors: list[Annotated[float, Field(ge=0, le=1000)]] = Field(
        FACTORS, min_length=1, description="factors of the preset's --emptiness_weight that are tried, the first first"
    )
    scales: list[Annotated[float, Field(ge=0, le=1e6)]] = Field(
        [], description=f"guidances, as in --sd.scale, that are tried; default {SCALES}"
    )
    rates: list[Annotated[float, Field(gt=0, le=100)]] = Field(
        RATES, min_length=1, description="factors of the preset's --lr that are tried"
    )
    seeds: list[Seed] = Field(
        [0, 1], min_length=1, description="seeds of each run that is measured; tuning takes the first"
    )
    n_best: int = Field(4, ge=0, description=f"so many rules, and {PLAIN}, are measured on all prompts of quality.py")
    best_seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="seeds of these")
    n_steps: int | None = Field(None, gt=0, description="steps of a run with two calls per view, default the preset's")
    workers: int = Field(2, gt=0, description="runs at the same time, one CPU thread per run")


# ---------------------------------------------------------------- calls of the network


class Free:
    """A model whose answers cost nothing: it is asked how often a rule asks."""

    free_guidance = True

    def askable(self, question: Question) -> Question:
        """Return the question."""
        return question

    def answers(self, questions: Sequence[Question]) -> list[torch.Tensor]:
        """Return x of each question."""
        return [question.x for question in questions]


def calls_of(flags: list[str]) -> float:
    """Return how often a run with these flags asks its network for a view: a mean over its steps."""
    import torch

    import rules
    from options.found import PRESETS
    from options.sjc import SJCConfig
    from sjc import ready

    cfg = config.load(SJCConfig, flags, prog=RUN, doc="", presets_dir=PRESETS, config_file=None)
    optimisation, _ = ready(cfg, "meta")
    x = torch.zeros(1)
    total = 0
    for i in range(cfg.n_steps):
        bad = x if cfg.bad_words else None
        ask = rules.Ask(Free(), x, x, cfg.texts.scale, bad=bad)  # type: ignore[arg-type]  # all that it needs of a model
        optimisation.rule(ask, x, x, optimisation.moment(i, optimisation.draw_sigma(i)))
        total += ask.n_calls
    return total / cfg.n_steps


# ---------------------------------------------------------------- runs


def preset(name: str) -> dict[str, Any]:
    """Return the options of a preset."""
    return yaml.safe_load((ROOT / "presets" / f"{name}.yml").read_text(encoding="utf-8"))


class Lab:
    """A comparison: its options, its folder and the processes that do the work."""

    def __init__(self, cfg: RulesConfig, pool: Executor) -> None:
        self.cfg, self.pool, self.base = cfg, pool, preset(cfg.preset)
        self.out = real(cfg.out)
        self.n_steps = cfg.n_steps or self.base["n_steps"]
        self.scales = cfg.scales or SCALES[cfg.preset]
        self.tried: dict[str, dict[Try, float]] = {}  # {rule: {try: PSNR, dB}}
        self._calls: dict[tuple[str, float], float] = {}

    def flags(self, name: str, choice: Try) -> list[str]:
        """Return the flags of a rule with a choice."""
        flags = ["--preset", self.cfg.preset, "--report", "False", "--snapshots", "False"]
        flags += ["--emptiness_weight", f"{self.base['emptiness_weight'] * choice.factor:g}"]
        flags += ["--lr", f"{self.base['lr'] * choice.rate:g}"]
        schedule = dict(SCHEDULES[self.cfg.preset])
        if name == CEILING:  # it reads no level
            return [*flags, "--lr_end", schedule["--lr_end"]]
        own = {**schedule, **dict(zip(RULES[name][::2], RULES[name][1::2])), "--sd.scale": f"{choice.scale:g}"}
        if own["--sigma_schedule"] != "random":
            del own["--sigma_anneal"]
        return [*flags, *(word for pair in own.items() for word in pair)]

    def calls(self, name: str, choice: Try) -> float:
        """Return the calls of the network per view and step."""
        key = name, choice.scale
        if key not in self._calls:
            if name == CEILING:  # it asks no network, and takes as many steps as a rule that asks once
                self._calls[key] = 1
            else:
                alike, times = ("sds", N_FIELDS) if name == "vsd" else (name, 1)
                self._calls[key] = times * calls_of(self.flags(alike, choice))
        return self._calls[key]

    def steps(self, name: str, choice: Try) -> int:
        """Return the steps that take as many calls as `n_steps` of a guided rule."""
        return max(1, round(self.n_steps * PLAIN_CALLS / self.calls(name, choice)))

    def runs(self, name: str, choice: Try, steps: int, prompts: list[str], seeds: list[int]) -> dict[Path, list[str]]:
        """Return {folder: command} of the runs of a rule with one choice. Equal runs have one folder."""
        command = [COMMANDS.get(name, RUN), *self.flags(name, choice), "--n_steps", str(steps)]
        where = self.out / "runs" / f"{name}_{choice}_{steps}"
        return {
            where / f"{prompt.replace(' ', '_')}_{seed}": [*command, "--sd.prompt", prompt, "--seed", str(seed)]
            for prompt in prompts
            for seed in seeds
        }

    def measured(self, plan: Plan) -> dict[str, Numbers]:
        """Return {name: summary} of the runs of a plan; raises RunError where one failed."""
        failed = make_runs(plan, self.pool)
        reports = evaluate_all(plan, failed, self.pool)
        if failed:
            raise RunError(f"{len(failed)} failed, such as {next(iter(failed))}: {next(iter(failed.values()))}")
        per_prompt = {name: psnr_by_prompt(report) for name, report in reports.items()}
        return {
            name: report["summary"] | over(per_prompt[name], per_prompt.get(PLAIN)) for name, report in reports.items()
        }

    def tune(self, names: list[str]) -> dict[str, Try]:
        """Return {rule: the try with the best PSNR on the prompts to tune on}.

        All pairs of a weight and a guidance are tried, since the best of one depends on the other, then the rates.
        """
        cfg = self.cfg
        pairs = [Try(factor, scale, cfg.rates[0]) for factor in cfg.factors for scale in self.scales]
        own = [
            choice for choice in pairs if choice.scale == self.scales[0]
        ]  # those of the ceiling, which has no guidance
        self.tried = {name: {} for name in names}
        self.try_out({name: own if name == CEILING else pairs for name in names})
        best = self.best()
        self.try_out({name: [best[name]._replace(rate=rate) for rate in cfg.rates[1:]] for name in names})
        return self.best()

    def best(self) -> dict[str, Try]:
        """Return {rule: the best of its tries}."""
        return {name: max(tries, key=tries.__getitem__) for name, tries in self.tried.items()}

    def try_out(self, tries: dict[str, list[Try]]) -> None:
        """Measure tries of rules on the prompts to tune on, with the first seed."""
        cfg = self.cfg
        plan = {
            f"{name} {choice}": self.runs(name, choice, self.steps(name, choice), cfg.tuned_on, cfg.seeds[:1])
            for name, choices in tries.items()
            for choice in choices
        }
        found = self.measured(plan)
        for name, choices in tries.items():
            self.tried[name] |= {choice: found[f"{name} {choice}"]["psnr"]["mean"] for choice in choices}

    def compare(
        self, choices: dict[str, Try], steps: Callable[[str, Try], int], prompts: list[str], seeds: list[int]
    ) -> dict[str, Numbers]:
        """Return {rule: what was measured} of rules with their best choices."""
        return self.measured(
            {name: self.runs(name, choice, steps(name, choice), prompts, seeds) for name, choice in choices.items()}
        )


# ---------------------------------------------------------------- against the plain rule


def psnr_by_prompt(report: dict[str, Any]) -> dict[str, float]:
    """Return {prompt: PSNR, dB, the mean over seeds} of a report of evaluate.py."""
    values: dict[str, list[float]] = {}
    for run in report["runs"]:
        values.setdefault(run["prompt"], []).append(run["psnr"])
    return {prompt: sum(each) / len(each) for prompt, each in values.items()}


def over(own: dict[str, float], plain: dict[str, float] | None) -> Numbers:
    """Return {OVER_PLAIN: interval over prompts} of the PSNR less that of the plain rule in each; {} without that."""
    if plain is None or own.keys() != plain.keys():
        return {}
    from evaluate import bootstrap

    return {OVER_PLAIN: bootstrap([own[prompt] - plain[prompt] for prompt in own])}


# ---------------------------------------------------------------- what it leaves


def table(lab: Lab, choices: dict[str, Try], steps: Callable[[str, Try], int], found: dict[str, Numbers]) -> str:
    """Return a table of rules, the best PSNR first and the ceiling last."""
    heads = ["rule", "guidance", "emptiness weight", "lr", "steps", "calls per view, whole run"]
    order = sorted(found, key=lambda name: (name == CEILING, -found[name]["psnr"]["mean"]))
    rows = [
        [
            name,
            "-" if name == CEILING else f"{choices[name].scale:g}",
            f"{lab.base['emptiness_weight'] * choices[name].factor:g}",
            f"{lab.base['lr'] * choices[name].rate:g}",
            str(steps(name, choices[name])),
            "-" if name == CEILING else f"{lab.calls(name, choices[name]) * steps(name, choices[name]):.0f}",
            *(cell(found[name].get(k), d) for k, (_, d) in COLUMNS.items()),
            "-" if name == PLAIN else cell(found[name].get(OVER_PLAIN), 2),
        ]
        for name in order
    ]
    return markdown([*heads, *(name for name, _ in COLUMNS.values()), f"PSNR less that of {PLAIN}, dB"], rows)


def document(lab: Lab, tables: dict[str, str]) -> str:
    """Return rules.md: tables by their captions, and what was tried for each rule."""
    tried = [[name, *(f"{choice}: {psnr:.2f}" for choice, psnr in tries.items())] for name, tries in lab.tried.items()]
    n_tries = max(map(len, lab.tried.values()))
    parts = [f"# Rules with --preset {lab.cfg.preset}", WHAT]
    for caption, text in tables.items():
        parts += [f"## {caption}", text]
    parts += [
        f"## Tries on {', '.join(lab.cfg.tuned_on)}",
        "PSNR, dB. e is a factor of the preset's emptiness weight, s the guidance, r a factor of its learning rate.",
        markdown(["rule", *["try"] * n_tries], [row + [""] * (1 + n_tries - len(row)) for row in tried]),
    ]
    return "\n\n".join(parts) + "\n"


def picture(lab: Lab, choices: dict[str, Try]) -> np.ndarray:
    """Return an image (H, W, 3) uint8: a row of views per rule, at equal calls, and the truth in the last."""
    rows: list[tuple[str | None, list[tuple[Any, str]]]] = []
    views: list[tuple[np.ndarray, np.ndarray]] = []
    for name, choice in choices.items():
        folders = lab.runs(name, choice, lab.steps(name, choice), lab.cfg.prompts, lab.cfg.seeds[:1])
        views = list(lab.pool.map(view, folders))
        rows.append((name, [(result, prompt) for (result, _), prompt in zip(views, lab.cfg.prompts)]))
    rows.append(("truth", [(truth, prompt) for (_, truth), prompt in zip(views, lab.cfg.prompts)]))
    return labelled_grid(rows)


def view(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures (H, W, 3) in [0, 1] of a run and of the truth, by the same camera."""
    import numpy as np

    import evaluate
    from asset import load
    from options.found import find_finished

    found = find_finished(str(folder), {})
    asset = load(found, "cpu")
    cameras = evaluate.cameras_at(np.deg2rad([VIEW_DEG]), asset.cfg.pose)
    result, truth = evaluate.result_views(asset, cameras), evaluate.true_views(*evaluate.read_prompt(found), cameras)
    return result[0][0], truth[0][0]


class Results(NamedTuple):
    """What was measured, {rule: summary}, and the choices that were measured."""

    choices: dict[str, Try]
    equal_calls: dict[str, Numbers]
    equal_steps: dict[str, Numbers]
    all_prompts: dict[str, Numbers]  # of the best rules at equal calls


def measure(lab: Lab) -> Results:
    """Tune the rules, and measure them."""
    cfg = lab.cfg
    choices = lab.tune([*(cfg.rules or RULES), CEILING])
    equal_calls = lab.compare(choices, lab.steps, cfg.prompts, cfg.seeds)
    equal_steps = lab.compare(choices, lambda *_: lab.n_steps, cfg.prompts, cfg.seeds)
    others = choices.keys() - {CEILING, PLAIN}
    ranked = sorted(others, key=lambda name: (-equal_calls[name]["psnr"]["mean"], name))
    best = dict.fromkeys([*ranked[: cfg.n_best], *({PLAIN} & set(choices)), CEILING]) if cfg.n_best else {}
    all_prompts = lab.compare({name: choices[name] for name in best}, lab.steps, PROMPTS, cfg.best_seeds)
    return Results(choices, equal_calls, equal_steps, all_prompts)


def tables(lab: Lab, found: Results) -> dict[str, str]:
    """Return {caption: table}."""
    cfg, texts = lab.cfg, ", ".join(lab.cfg.prompts)
    made = {
        f"At equal calls of the network: {texts}, seeds {cfg.seeds}": (found.equal_calls, lab.steps),
        "At equal steps: the same prompts and seeds": (found.equal_steps, lambda *_: lab.n_steps),
        f"The best at equal calls: {len(PROMPTS)} prompts, seeds {cfg.best_seeds}": (found.all_prompts, lab.steps),
    }
    return {caption: table(lab, found.choices, steps, rows) for caption, (rows, steps) in made.items() if rows}


def main(argv: list[str] | None = None) -> None:
    """Tune and measure the rules, and write the tables and the picture."""
    cfg = config.load(RulesConfig, argv, prog="python -m benchmarks.rules", doc=__doc__, config_file=None)
    refuse_inside("--out", cfg.out, ROOT)
    for flag, prompts in (("--prompts", cfg.prompts), ("--tuned_on", cfg.tuned_on)):
        refuse_unmeasured(flag, prompts)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("rules.md", "rules.json", "rules.png"):
        refuse_output("--out", out / name)
    with processes(cfg.workers) as pool:
        lab = Lab(cfg, pool)
        found = measure(lab)
        image = picture(lab, found.choices)
    record = found._asdict() | {
        "choices": {name: choice._asdict() for name, choice in found.choices.items()},
        "tried": {name: {str(choice): psnr for choice, psnr in tries.items()} for name, tries in lab.tried.items()},
        "calls": {name: lab.calls(name, choice) for name, choice in found.choices.items()},
    }
    text = document(lab, tables(lab, found))
    write_atomic(out / "rules.md", text)
    write_atomic(out / "rules.json", json.dumps(record, indent=2) + "\n")
    write_png(out / "rules.png", image)
    print(text)


if __name__ == "__main__":
    run_main(main)
