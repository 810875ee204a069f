"""Many runs of run_sjc.py from one table, by submitit: one per GPU of this machine, or as an array of Slurm.

    python run_sweep.py sweep.yml
    python run_sweep.py sweep.yml --dry_run True

docs/sweeps.md says what the file holds. Each run has a folder below the current one. Ctrl-C ends all of them, and the
same command goes on: finished runs are left alone, others go on from their last checkpoint, failed ones are tried
again. At the end, sweep.html and sweep.csv have the results.
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from my import config, run_dir
from my.errors import RunError, UserError, note, run_main, shown
from options.sweep import SweepConfig
from sweep import executors, folder, report
from sweep.plan import Plan, Run, read_plan
from sweep.work import work

ROOT = Path(__file__).resolve().parent
FIRST = 3  # of the runs that failed, how many the last line quotes


def read_config(argv: list[str] | None) -> tuple[SweepConfig, Plan]:
    """Return the options, with the cluster settled, and the plan; UserError for a mistake in either."""
    cfg = config.load(SweepConfig, argv, prog="run_sweep.py", doc=__doc__, positional="file", config_file=None)
    run_dir.refuse_project_dir(ROOT)
    if len(cfg.file) > 1:
        raise UserError(f"one YAML file of a sweep is needed, got {len(cfg.file)}: {', '.join(map(shown, cfg.file))}")
    plan = read_plan(cfg.file[0])
    if not (cfg.dry_run or hasattr(signal, "pthread_sigmask")):
        raise UserError(
            "sweeps need Linux or macOS, since submitit does not start jobs on Windows; do the runs one by one, as "
            "--dry_run True prints them, or use the Windows Subsystem for Linux"
        )
    executors.check_slurm(plan.slurm, f"{cfg.file[0]}: slurm")
    cfg = cfg.model_copy(update={"cluster": executors.pick_cluster(cfg.cluster)})
    config.refuse_unread(cfg, {"at_once": {"cluster": ("local",)}})
    if plan.slurm and cfg.cluster == "local":
        note(f"{cfg.file[0]}: slurm: not read with --cluster local")
    folder.refuse_others(plan.runs)
    return cfg, plan


def show_commands(runs: Sequence[Run]) -> None:
    """Print the table of the runs, and the command of each."""
    print(report.table(runs))
    for run in runs:
        name = shlex.quote(run.name)
        print(f"\nmkdir -p {name} && (cd {name} && {shlex.join(executors.command_of(run))})")


def do_runs(cfg: SweepConfig, plan: Plan, unfinished: Sequence[Run]) -> None:
    """Do the unfinished runs, and write the page of results after each end."""
    executors.HIDDEN.mkdir(exist_ok=True)
    executor: executors.Executor
    if cfg.cluster == "slurm":
        executor = executors.Slurm(plan.slurm)
        where = f"in Slurm, each for up to {plan.slurm.get('time', executors.SLURM['time'])} minutes at a time"
    else:
        slots = executors.slots_of(unfinished, cfg.at_once)[: len(unfinished)]
        executor = executors.Local(slots)
        gpus = slots[0]["CUDA_VISIBLE_DEVICES"]
        where = f"{len(slots)} at a time, on {'GPUs' if gpus else 'the CPU'}"
    print(f"{len(unfinished)} of {len(plan.runs)} runs to do, {where}", flush=True)
    work(plan.runs, unfinished, executor, lambda running: report.write(plan.runs, running))


def evaluate(runs: Sequence[Run]) -> None:
    """Measure the finished runs whose prompts are of the toy world; their results are in results.json."""
    known = [run.name for run in runs if report.has_truth(run) and folder.state_of(run).status == folder.FINISHED]
    if not known:
        note("--evaluate True: no finished run has a prompt of the toy world")
    if report.evaluated().keys() >= set(known):
        return
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *known, "--out", report.RESULTS])
    if done.returncode:
        raise RunError(f"evaluate.py ended with status {done.returncode}; its message is above")


def finish(cfg: SweepConfig, runs: Sequence[Run]) -> None:
    """Write the page and the table, and print the table; RunError where runs failed."""
    if cfg.evaluate:
        evaluate(runs)
    report.write(runs)
    print(f"{report.table(runs)}\ndone: {report.PAGE} is the page, {report.TABLE} the table", flush=True)
    bad = [(run.name, state) for run in runs if (state := folder.state_of(run)).status != folder.FINISHED]
    if bad:
        named = "; ".join(f"{name}: {shown(state.why or state.status)}" for name, state in bad[:FIRST])
        more = f"; and {len(bad) - FIRST} more" if len(bad) > FIRST else ""
        raise RunError(
            f"{len(bad)} of {len(runs)} runs did not finish: {named}{more}; stderr.txt in their folders says more; the "
            "same command tries them again"
        )


def main(argv: list[str] | None = None) -> None:
    """Do all runs of a sweep in folders below the current one."""
    cfg, plan = read_config(argv)
    if cfg.dry_run:
        show_commands(plan.runs)
        return
    with run_dir.alone():
        run_dir.clear_scratch(folders=["*"])
        unfinished = [run for run in plan.runs if folder.state_of(run).status != folder.FINISHED]
        if unfinished:
            do_runs(cfg, plan, unfinished)
        finish(cfg, plan.runs)


if __name__ == "__main__":
    run_main(main, go_on=lambda: "the same command goes on, from the last checkpoint of each run")
