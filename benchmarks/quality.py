"""Make the table of results: run_sjc.py over settings, prompts and seeds, then evaluate.py on each setting.

    python -m benchmarks.quality --out FOLDER --settings ideal,mini --seeds 0,1,2

It leaves FOLDER/quality.md and quality.json, and each run in FOLDER/<setting>/<prompt>_<seed>/. It can be stopped at
any time: the same command keeps what is finished and continues what is not. It starts a run again where the run is
broken, or was made from other options or another preset.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.warm import call, processes
from my import config
from my.errors import RunError, run_main
from my.file_system import real
from my.run_dir import read_heartbeat, refuse_inside, refuse_output, write_atomic
from my.sha256 import fingerprint, sha256_of_text

ROOT = Path(__file__).resolve().parent.parent

Plan = dict[str, dict[Path, list[str]]]  # {setting: {folder of a run: the command that makes it, and its flags}}
Report = dict[str, Any]  # what evaluate.py writes
Seed = Annotated[int, Field(ge=0)]

VARIANTS: dict[str, list[str]] = {
    "": [],
    "_sjc_words": ["--pose.view_words", "sjc"],
    "_sides": ["--pose.view_words", "sides"],
    "_no_var_red": ["--rule", "sjc", "--var_red", "False"],
}
RULES = [  # the files that say what is chained: with others a run is made again
    *(ROOT / name for name in ("rules.py", "benchmarks/ceiling.py", "benchmarks/vsd.py")),
    *sorted((ROOT / "families" / "ideal").glob("*.py")),
]
MINI = "variant: mini"  # in a preset: the embedded miniature
RUN, FIT = "run_sjc.py", "benchmarks.ceiling"  # commands: a script, a module
SETTINGS = {
    **{p + name: [RUN, "--preset", p, *flags] for p in ("ideal", "mini") for name, flags in VARIANTS.items()},
    **{p: [RUN, "--preset", p] for p in ("ideal_best", "mini_best")},
    **{f"{p}_ceiling": [FIT, "--preset", p] for p in ("ideal", "ideal_best", "mini", "mini_best")},
    "ideal_sjc": [RUN, "--preset", "ideal", "--rule", "sjc"],
}
PROMPTS = [
    "a blue duck",
    "a green car",
    "a purple chair",
    "a yellow rocket",
    "a red burger",
    "a cyan icecream",
    "a purple castle",
    "a red house",
    "a green snowman",
    "a red mushroom",
    "a yellow boat",
    "a purple pig",
]
COLUMNS = {
    "iou": ("IoU", 3),
    "psnr": ("PSNR, dB", 2),
    "gain": ("gain over blank, dB", 2),
    "r_object": ("R-prec object", 3),
    "r_pair": ("R-prec object+colour", 3),
    "janus": ("Janus", 3),
    "color_error": ("colour error", 3),
    "saturation": ("saturation", 3),
}  # measure -> heading, decimals


class QualityConfig(config.Config):
    """Every option of benchmarks.quality."""

    out: str = Field(description="a folder to fill")
    settings: list[Literal[tuple(SETTINGS)]] = Field(  # type: ignore[valid-type]  # its names are computed
        ["ideal", "mini"], min_length=1, description="rows of the table"
    )
    prompts: list[str] = Field(PROMPTS, min_length=1, description="texts, with commas between")
    seeds: list[Seed] = Field([0, 1, 2], min_length=1, description="seeds of each setting and prompt")
    n_steps: int | None = Field(None, gt=0, description="steps of every run, default the preset's")
    workers: int = Field(2, gt=0, description="runs at the same time, one CPU thread per run")


# ---------------------------------------------------------------- runs


def recipe(command: list[str]) -> str:
    """Return what decides the result of a run, as text: command, preset, weights of the miniature, and RULES."""
    preset = ROOT / "presets" / f"{command[command.index('--preset') + 1]}.yml"
    text = preset.read_text(encoding="utf-8") if preset.exists() else ""
    weights = fingerprint(sorted((ROOT / "mini_sd").rglob("*.safetensors"))) if MINI in text else ""
    return f"{shlex.join(command)}\n{text}{weights}{fingerprint(RULES)}"


def finished(folder: Path) -> bool:
    """Return whether a run's folder says that the run is done."""
    return read_heartbeat(folder / "heartbeat.json").get("done") is True


def make_run(folder: Path, command: list[str]) -> str | None:
    """Finish the run in `folder`, from its checkpoint where it has one; return None, or the error line if it failed."""
    note = folder / "recipe.txt"
    if note.exists() and note.read_text(encoding="utf-8") == recipe(command):
        if finished(folder):
            return None
        goes_on = command[0] == RUN and any(folder.glob("ckpt/step_*"))
        if goes_on and call([RUN, "--resume", "True"], folder) is None:
            return None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomic(note, recipe(command))
    return call(command, folder)


def jobs(cfg: QualityConfig) -> Plan:
    """Return the plan of all runs."""
    steps = ["--n_steps", str(cfg.n_steps)] if cfg.n_steps else []
    return {
        setting: {
            real(cfg.out) / setting / f"{prompt.replace(' ', '_')}_{seed}": [
                *SETTINGS[setting],
                *steps,
                "--sd.prompt",
                prompt,
                "--seed",
                str(seed),
            ]
            for prompt in cfg.prompts
            for seed in cfg.seeds
        }
        for setting in cfg.settings
    }


def make_runs(plan: Plan, pool: Executor) -> dict[Path, str]:
    """Make all runs of a plan; return {folder: error line} of those that failed."""
    from tqdm import tqdm

    failed = {}
    futures = {
        pool.submit(make_run, folder, command): folder for runs in plan.values() for folder, command in runs.items()
    }
    for future in tqdm(as_completed(futures), total=len(futures), desc="runs", unit="run"):
        folder, error = futures[future], future.result()
        if error:
            failed[folder] = error
            tqdm.write(f"{folder}: {error}", file=sys.stderr)
    return failed


def evaluate_all(plan: Plan, failed: dict[Path, str], pool: Executor) -> dict[str, Report]:
    """Return {setting: report} over the runs that are not in `failed`; where evaluate.py fails, add it to `failed`."""
    from tqdm import tqdm

    whole = {setting: [folder for folder in runs if folder not in failed] for setting, runs in plan.items()}
    whole = {setting: runs for setting, runs in whole.items() if runs}
    reports: dict[str, Report] = {}
    results = pool.map(evaluate, [runs[0].parent for runs in whole.values()], whole.values())
    for (setting, runs), (report, error) in tqdm(
        zip(whole.items(), results), total=len(whole), desc="evaluate", unit="setting"
    ):
        if report is not None:
            reports[setting] = report
        else:
            failed[runs[0].parent / "evaluate.py"] = str(error)
    return reports


def evaluate(folder: Path, runs: list[Path]) -> tuple[Report | None, str | None]:
    """Return (report, None) of evaluate.py on a setting's finished runs, or (None, error line)."""
    out = folder / f"results_{sha256_of_text('|'.join(map(str, runs)))[:8]}.json"  # a folder may have several sets
    if report := measured(out, runs):
        return report, None
    files = ["--out", str(out), "--figure", str(folder / "figure.png")]
    error = call(["evaluate.py", *map(str, runs), *files], folder)
    return (None, error) if error else (json.loads(out.read_text(encoding="utf-8")), None)


def measured(out: Path, runs: list[Path]) -> Report | None:
    """Return the report at `out` if it has exactly these runs and is younger than all of them, else None."""
    try:
        report = json.loads(out.read_text(encoding="utf-8"))
        same = [run["run"] for run in report["runs"]] == [str(folder) for folder in runs]
        same = same and all(COLUMNS.keys() <= run.keys() for run in report["runs"])
        youngest = max((folder / "heartbeat.json").stat().st_mtime for folder in runs)
    except (OSError, ValueError, KeyError):
        return None
    return report if same and out.stat().st_mtime > youngest else None


def refuse_unmeasured(flag: str, prompts: Iterable[str]) -> None:
    """Raise UserError, which begins with `flag`, for a prompt that has no truth to be measured against."""
    from toyworld.captions import read_prompt

    for prompt in prompts:
        read_prompt(prompt, f"{flag} {prompt}")


# ---------------------------------------------------------------- tables


def number(value: float, decimals: int) -> str:
    """Return e.g. "0.950", and "0.000" instead of "-0.000"."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def mean(values: Sequence[float], decimals: int) -> str:
    """Return the mean of values as text, - where there is none."""
    return number(sum(values) / len(values), decimals) if values else "-"


def cell(interval: dict[str, Any] | None, decimals: int) -> str:
    """Return e.g. "0.95 ± 0.01": a mean, and half of its 95% interval where there is one; - where no run has any."""
    if interval is None:
        return "-"
    middle, low, high = (interval[k] for k in ("mean", "low", "high"))
    return number(middle, decimals) + ("" if low is None else f" ± {(high - low) / 2:.{decimals}f}")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(reports: dict[str, Report]) -> str:
    """Return the table of settings: mean over runs, and half of the 95% bootstrap interval."""
    rows = [
        [setting, str(len(report["runs"])), *(cell(report["summary"].get(k), d) for k, (_, d) in COLUMNS.items())]
        for setting, report in reports.items()
    ]
    return markdown(["setting", "runs", *(name for name, _ in COLUMNS.values())], rows)


def prompts_table(report: Report) -> str:
    """Return one setting's table of prompts: means over its seeds."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        by_prompt.setdefault(run["prompt"], []).append(run)
    rows = [
        [prompt, *(mean([run[k] for run in runs if run[k] is not None], d) for k, (_, d) in COLUMNS.items())]
        for prompt, runs in by_prompt.items()
    ]
    return markdown(["prompt", *(name for name, _ in COLUMNS.values())], rows)


def command(cfg: QualityConfig) -> str:
    """Return the command line that makes the same table again."""
    flags = [f"--settings {','.join(cfg.settings)}", f"--seeds {','.join(map(str, cfg.seeds))}"]
    if cfg.prompts != PROMPTS:
        flags.append(f"--prompts {shlex.quote(','.join(cfg.prompts))}")
    if cfg.n_steps:
        flags.append(f"--n_steps {cfg.n_steps}")
    return f"python -m benchmarks.quality --out FOLDER {' '.join(flags)}"


def document(cfg: QualityConfig, reports: dict[str, Report], failed: dict[Path, str]) -> str:
    """Return quality.md: the table of settings, one table of prompts per setting, and what failed."""
    note = (
        f"    {command(cfg)}\n\n"
        "Means over runs ± half of their 95% bootstrap interval; `evaluate.py` defines the measures."
    )
    parts = ["# Quality", note, settings_table(reports)]
    for setting, report in reports.items():
        parts += [f"## {setting}", prompts_table(report)]
    if failed:
        parts += [
            "## Failed",
            "\n".join(f"- {what.parent.name}/{what.name}: {error}" for what, error in failed.items()),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Make the runs, measure them, write the tables; raises RunError at the end if anything failed."""
    cfg = config.load(QualityConfig, argv, prog="python -m benchmarks.quality", doc=__doc__, config_file=None)
    refuse_inside("--out", cfg.out, ROOT)
    refuse_unmeasured("--prompts", cfg.prompts)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("quality.md", "quality.json"):
        refuse_output("--out", out / name)
    plan = jobs(cfg)
    with processes(cfg.workers) as pool:
        failed = make_runs(plan, pool)
        reports = evaluate_all(plan, failed, pool)
    text = document(cfg, reports, failed)
    write_atomic(out / "quality.md", text)
    results = {"settings": reports, "failed": {str(what): error for what, error in failed.items()}}
    write_atomic(out / "quality.json", json.dumps(results, indent=2) + "\n")
    print(text)
    if failed:
        raise RunError(f"{len(failed)} failed; {out / 'quality.md'} lists them")


if __name__ == "__main__":
    run_main(main)
