"""Where the runs of a sweep are started, by submitit: on this machine, a few at a time, or as an array of Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import submitit
from submitit.core.utils import FailedJobError

from my import plain_files
from my.config import near_miss
from my.errors import RunError, UserError, first_line, shown, some
from my.machine import machine_memory
from my.run_dir import write_atomic
from sweep.job import Job, blocked
from sweep.plan import Run

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = Path(".sweep")  # folder of what submitit needs, in the folder of the sweep
JOBS, STOP = HIDDEN / "jobs.json", HIDDEN / "stop"
A_YEAR = 365 * 24 * 60  # minutes: a run on this machine has no end of time
THREADS = 2  # cores that a run on a CPU should have
GB_PER_RUN = 2.0  # of memory on a CPU beside the networks; a run of the toy world takes 1.1 GB
SLURM = {
    "job_name": "sjc",
    "time": 24 * 60,
    "gpus_per_node": 1,
    "array_parallelism": 256,
}  # minutes; ours, not submitit's
ONE_TASK = ("nodes", "ntasks_per_node", "num_gpus", "use_srun")  # parameters that a run of one process has no use for
TIMEOUTS = 20  # times that a job which is out of time is queued again


class Executor(Protocol):
    """Starts runs, each as a job of submitit."""

    jobs: dict[str, submitit.Job[int]]  # {name: job} of the runs that it has started; whoever sees an end deletes it

    def start(self, waiting: list[Run]) -> None:
        """Start as many runs as there is room for, and take them out of `waiting`."""

    def stop(self) -> None:
        """End all jobs. A checkpoint of a run that is ended is whole."""


def pick_cluster(asked: Literal["auto", "local", "slurm"]) -> Literal["local", "slurm"]:
    """Return where the runs are; raises UserError where a cluster is asked for and there is none."""
    missing = [name for name in ("sbatch", "srun", "sacct", "scancel") if shutil.which(name) is None]
    if asked == "slurm" and missing:
        raise UserError(
            f"--cluster slurm: no {missing[0]} on this machine; start it on a login node of the cluster, or give "
            "--cluster local"
        )
    return "local" if asked == "local" or "sbatch" in missing else "slurm"


def command_of(run: Run) -> list[str]:
    """Return the words of the command of a run."""
    return [sys.executable, str(ROOT / "run_sjc.py"), *run.flags]


# ---------------------------------------------------------------- this machine


class Local:
    """Starts a run per slot, and the next one when a slot is free.

    slots: the environment of each, such as {"CUDA_VISIBLE_DEVICES": "1"}.
    """

    def __init__(self, slots: Sequence[dict[str, str]]) -> None:
        self.jobs: dict[str, submitit.Job[int]] = {}
        self.slots = dict(enumerate(slots))
        self.users: dict[int, submitit.Job[int]] = {}  # {slot: its job}
        STOP.unlink(missing_ok=True)
        python = shlex.join(["env", f"PYTHONPATH={ROOT}", sys.executable])  # its job is a class of ours
        self.executor = submitit.LocalExecutor(HIDDEN / "logs", python=python)
        self.executor.update_parameters(timeout_min=A_YEAR)

    def start(self, waiting: list[Run]) -> None:
        """Start a run in each free slot, and take it out of `waiting`."""
        for slot, env in self.slots.items():
            if waiting and (slot not in self.users or self.users[slot].done()):
                run = waiting[0]
                work = Job(str(Path(run.name).resolve()), command_of(run), env, os.getpid(), str(STOP.resolve()))
                with blocked(signal.SIGINT):
                    self.jobs[run.name] = self.users[slot] = self.executor.submit(work)
                    del waiting[0]

    def stop(self) -> None:
        """Tell all jobs to end, and wait until they have."""
        STOP.touch()
        for job in self.users.values():
            job._process.wait()  # type: ignore[attr-defined] # submitit's own wait would read a pickle


def slots_of(runs: Sequence[Run], at_once: int | None) -> list[dict[str, str]]:
    """Return the environment of each run at a time: a GPU where there are any, and a share of the cores."""
    gpus = visible_gpus()
    n = at_once or len(gpus) or fits(runs)
    slots = [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)] if gpus else ""} for i in range(n)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // n)))
    return [{**slot, "OMP_NUM_THREADS": threads} for slot in slots]


def visible_gpus() -> list[str]:
    """Return the names of the GPUs of this machine, as CUDA_VISIBLE_DEVICES has them."""
    import torch

    n = torch.cuda.device_count()
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in stated.split(",")][:n] if stated else [str(i) for i in range(n)]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fits(runs: Sequence[Run]) -> int:
    """Return how many of the runs a CPU takes at once: THREADS cores each, and memory for float32 networks."""
    gb = machine_memory() / 1e9
    each = GB_PER_RUN + max(2 * run.cfg.chosen.min_gpu_gb for run in runs)  # a GPU's networks are half as large
    return max(1, min(cores() // THREADS, int(gb / each)))


# ---------------------------------------------------------------- a cluster


class Slurm:
    """Gives all runs to Slurm as one array, and finds those that an earlier call gave it."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.jobs: dict[str, submitit.Job[int]] = {}
        self.executor = submitit.SlurmExecutor(HIDDEN / "logs", max_num_timeout=TIMEOUTS)
        setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}", *parameters.get("setup", [])]
        self.executor.update_parameters(**{**SLURM, **parameters, "setup": setup})

    def start(self, waiting: list[Run]) -> None:
        """Give all runs in `waiting` to Slurm, but for those that it has; `waiting` is empty then."""
        if not waiting:
            return
        ids = known_jobs()
        self.jobs = {run.name: job for run in waiting if (job := in_queue(ids.get(run.name)))}
        fresh = [run for run in waiting if run.name not in self.jobs]
        waiting.clear()
        with blocked(signal.SIGINT):
            if fresh:
                self.jobs |= self._submit(fresh)
            ids |= {name: job.job_id for name, job in self.jobs.items()}
            write_atomic(JOBS, json.dumps(ids, indent=2) + "\n")

    def _submit(self, runs: Sequence[Run]) -> dict[str, submitit.Job[int]]:
        work = [Job(str(Path(run.name).resolve()), command_of(run), {}) for run in runs]
        try:
            return dict(zip((run.name for run in runs), self.executor.submit_array(work)))
        except (OSError, FailedJobError) as error:  # it holds what sbatch wrote
            lines = [line for line in str(error).splitlines() if "error" in line.lower()]
            raise RunError(f"Slurm took no jobs: {first_line(lines[0] if lines else error)}") from None

    def stop(self) -> None:
        """Cancel all jobs."""
        for job in self.jobs.values():
            job.cancel(check=False)


def known_jobs() -> dict[str, str]:
    """Return {run: id of its job} of what earlier calls gave to Slurm."""
    try:
        return {str(name): str(job) for name, job in plain_files.read_json(JOBS).items()}
    except (OSError, ValueError):
        return {}


def in_queue(job_id: str | None) -> submitit.Job[int] | None:
    """Return the job of an id, None where it has ended or the cluster knows nothing of it."""
    if job_id is None:
        return None
    job: submitit.Job[int] = submitit.SlurmJob(HIDDEN.resolve() / "logs", job_id)
    known = job.get_info().get("State")
    return job if known and not job.done() else None


def check_slurm(parameters: Mapping[Any, Any], label: str) -> None:
    """Raise UserError, naming `label`, for a parameter of jobs that submitit does not have, or of another type."""
    known = sorted(submitit.SlurmExecutor._valid_parameters() - set(ONE_TASK))
    for name, value in parameters.items():
        if name not in known:
            why = "a run is one process" if name in ONE_TASK else f"no such parameter{near_miss(name, known)}"
            raise UserError(f"{label}: {shown(name)}: {why}; submitit has {some(known, len(known))}")
        if name in ("time", "array_parallelism", "signal_delay_s", "gpus_per_node", "cpus_per_task") and (
            type(value) is not int or value < (name == "array_parallelism" or name == "time")
        ):
            unit = ", in minutes" if name == "time" else ""
            raise UserError(f"{label}: {name}: expected a whole number{unit}, got {shown(value)}")
        if name in ("setup", "teardown", "srun_args") and not (
            isinstance(value, list) and all(isinstance(line, str) for line in value)
        ):
            raise UserError(f"{label}: {name}: expected a list of texts, got {shown(value)}")
