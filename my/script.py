"""What the commands that leave a run in the current folder share: how a run begins and resumes, and on which device."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field, PrivateAttr

from my import checkpoint, config, machine, nvidia, plain_files, run_dir, starts
from my.errors import RunError, UserError, note, shown, some
from my.processes import of_torchrun
from my.version import versions

if TYPE_CHECKING:
    import torch

FULL_CONFIG = "full_config.yml"
OPTIONS = "options"  # the key in the meta of a checkpoint of what `held` returned
SAVED = re.compile(checkpoint.NAME)  # begins the names of what commands save, by which a run goes on
WEIGHTS = "weights"  # the key in it, behind the options, of what `RunOptions.weights` returned when the run began


class OnDevice(config.Config):
    """The options of a command that runs on a device."""

    device: str = Field(
        "auto",
        json_schema_extra=config.FREE,
        description="cuda, cuda:1, cpu, or mps, an Apple GPU; auto is cuda where there is one, else cpu",
    )


class RunOptions(OnDevice):
    """The options of a command that leaves a run in the current folder."""

    seed: int = Field(0, ge=0, json_schema_extra=config.EVER, description="seed of all random draws")
    deterministic: bool = Field(
        False,
        json_schema_extra=config.FREE,
        description="on CUDA, give the same bits in every run on the same GPU with the same versions, at a price in "
        "time and memory; a CPU always does, for the same number of threads",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        json_schema_extra=config.FREE,
        description="CPU threads, on which the last bits of the numbers depend; default as many as PyTorch takes when "
        "the run begins, and then always so many",
    )
    resume: Literal["auto", True, False] = Field(
        "auto",
        json_schema_extra=config.FREE,
        description="continue the run in this folder; auto continues one that is not finished and has the same "
        "options, False refuses any",
    )
    dry_run: bool = Field(False, json_schema_extra=config.FREE, description="write full_config.yml and stop")

    command: ClassVar[str]  # the file name of the command, such as "run_sjc.py"
    continues: ClassVar[bool] = True  # whether a run of the command goes on after it was stopped

    _began_with: dict[str, str] | None = PrivateAttr(None)  # of a run that goes on, what `recorded_weights` returned
    _stood: Standing | None = PrivateAttr(None)  # what `_look` returned to `read_config`
    _look: Callable[[], Standing] | None = PrivateAttr(None)

    @property
    def goes_on(self) -> bool:
        """Whether this is the configuration of a run that the current folder holds, and that goes on."""
        return self._began_with is not None

    def weights(self, found: Any) -> dict[str, str]:
        """Return {what: fingerprint} of the weights that the run has of its model; `check_files` returned `found`."""
        return {}


def every(share: float) -> Any:
    """Return the option `ckpt_every`, whose default is a share of the run."""
    return Field(
        share,
        ge=1e-4,
        le=1,
        json_schema_extra=config.FREE,
        description="save a checkpoint after each such part of the run",
    )


class Checkpointed(RunOptions):
    """The options of a command that saves checkpoints of a training."""

    ckpt_every: float = every(0.05)
    ckpt_minutes: float | None = Field(
        None, ge=0.01, json_schema_extra=config.FREE, description="save one, too, when the last is so many minutes old"
    )
    ckpt_keep: int = Field(
        2, ge=1, json_schema_extra=config.FREE, description="how many of the newest checkpoints are kept"
    )


OF_ONE_COMMAND = {"resume": "auto", "dry_run": False}  # options that are not kept with the run
FIRST = (
    "seed",
    "device",
    "deterministic",
    "threads",
    "resume",
    "dry_run",
)  # the order in which help lists these options
Options = TypeVar("Options", bound=RunOptions)
Run = Callable[[], None]


def read_config(
    cls: type[Options],
    argv: list[str] | None,
    *,
    root: Path,
    settle: Callable[[Options], Options] = lambda cfg: cfg,
    leaves: str | Path = "ckpt",
    finished: Callable[[], bool] = run_dir.is_done,
    **spec: Any,
) -> Options:
    """Return the run's configuration, an instance of `cls`; of a run that goes on, the one saved in the folder.

    root: the project's folder.
    settle: makes the paths of a configuration absolute, and returns it.
    leaves: the folder by which a run is recognised.
    finished: whether the run of this folder is finished.
    spec: goes to `config.load`.
    Raises UserError in the project's folder; for a new run in a folder that holds one; for a run that goes on, with
    changes that `refuse_changes` does not allow, and where its checkpoints are gone.
    """
    cfg = settle(config.load(cls, argv, **spec))
    run_dir.refuse_project_dir(root)
    refuse_other_run(cls)
    if Path(leaves).is_file():
        raise UserError(f"{leaves}: this run would write a folder of that name, and a file has it; move it away")
    look = partial(standing, leaves, finished)
    stands = look()
    if not stands.saved:
        refuse_lost(leaves, stands)
    if stands.holds or cfg.resume is True:
        if not cls.continues:
            told = "this folder holds a run" if stands.holds else "--resume True"
            raise UserError(f"{told}: those of {cls.command} are not continued; start it in an empty folder")
        refuse_to_go_on(leaves, stands, cfg.resume)
        cfg = continued(cls, argv, cfg, settle, **spec)
    cfg._stood, cfg._look = stands, look
    return cfg


class Standing(NamedTuple):
    """What a folder has of a run, by which it is decided whether a command begins one, goes on with it, or neither."""

    holds: bool  # there is something in the folder by which a run is recognised
    saved: bool  # and that is what a command saves
    finished: bool
    trained: int  # the last step in the history of a run that has nothing saved


def standing(leaves: str | Path, finished: Callable[[], bool]) -> Standing:
    """Return how the run of the current folder stands; `leaves` and `finished` are as in `read_config`."""
    names = [name for name in run_dir.names_in(leaves) if not name.startswith(".")]  # else it is not whole
    saved = any(map(SAVED.match, names))
    rows = run_dir.read_history("history.json") if not saved and os.path.exists("history.json") else []
    return Standing(bool(names), saved, finished(), rows[-1]["step"] if rows else 0)


def refuse_to_go_on(leaves: str | Path, stands: Standing, resume: str | bool) -> None:
    """Raise UserError where the run of this folder cannot go on, or is not to."""
    if not Path(FULL_CONFIG).exists():
        told = "--resume True" if resume is True else f"this folder already holds a run, in {leaves}"
        raise UserError(f"{told}: no {FULL_CONFIG} here; go to the folder of the run, or start in an empty folder")
    if resume is False or (resume == "auto" and stands.finished):
        how = "a finished run: " if resume == "auto" else "a run: continue it with --resume True, or "
        raise UserError(f"this folder already holds {how}start in an empty folder")


def continued(
    cls: type[Options], argv: list[str] | None, cfg: Options, settle: Callable[[Options], Options], **spec: Any
) -> Options:
    """Return the configuration of the run in this folder, which goes on, for a command's `cfg`."""
    free = free_on_resume(cls)
    config.refuse_cut_off(cls, FULL_CONFIG, free)
    saved = config.read(cls, FULL_CONFIG)
    refuse_altered(saved)
    if cfg.resume == "auto":
        then = config.flat(saved)
        refuse_changes(
            as_filled_in(cls, config.flat(cfg), then),
            then,
            free,
            "this folder holds a run that is not finished, and its options are others",
            "continue it with --resume True alone, or start in an empty folder",
        )
        note("this folder holds a run that is not finished: it is continued")
    cfg = settle(config.load(cls, argv, config_file=FULL_CONFIG, **spec))
    refuse_changes(
        config.flat(cfg),
        config.flat(saved),
        free,
        "--resume True",
        f"a resumed run can change only {', '.join(sorted(free))}; for anything else start in an empty folder",
    )
    if saved.threads is not None and cfg.threads != saved.threads:
        note(f"--threads {cfg.threads}: the run began with {saved.threads}, so the last bits of its numbers change")
    cfg._began_with = recorded_weights(".")
    return cfg


def recorded_weights(folder: str | Path) -> dict[str, str]:
    """Return {what: fingerprint} of the weights that the run of a folder began with, {} where it does not say."""
    weights = made_by(folder).get(WEIGHTS)
    return {str(name): str(value) for name, value in weights.items()} if isinstance(weights, dict) else {}


def made_by(folder: str | Path) -> dict[str, Any]:
    """Return what the configuration of the run of a folder has behind its options, {} where it has nothing."""
    try:
        return config.behind(plain_files.load_yaml(Path(folder) / FULL_CONFIG))
    except (OSError, ValueError):  # there is none, or reading it in earnest says what is wrong
        return {}


def refuse_lost(leaves: str | Path, stands: Standing) -> None:
    """Raise UserError where a run has saved something, of which nothing is left in `leaves`: it would begin again.

    One that has a history begins again only where its heartbeat says that nothing was ever saved; a note says so.
    """
    beat = run_dir.read_heartbeat("heartbeat.json")
    saved = beat.get("saved", stands.trained or None)
    if stands.finished or saved is not None:
        how = "is finished" if stands.finished else f"was at step {shown(beat.get('step', stands.trained))}"
        raise UserError(
            f"the run in this folder {how}, and {leaves} has nothing of it: put that back, or start in an empty folder"
        )
    if stands.trained:
        note(f"the run in this folder had come to step {stands.trained}, and nothing of it was saved: it begins again")


def refuse_meanwhile(cfg: RunOptions) -> None:
    """Raise UserError where the folder stands otherwise than when `read_config` looked, before this process held it."""
    if cfg._look is not None and cfg._look() != cfg._stood:
        raise UserError("another process has been at work in this folder in the meantime; give the command once more")


def held(cfg: config.Config) -> dict[str, Any]:
    """Return the options that a resumed run may not change as {dotted name: plain value}, for its checkpoints."""
    free = free_on_resume(type(cfg))
    return {name: json.loads(json.dumps(value)) for name, value in config.flat(cfg).items() if name not in free}


def refuse_altered(saved: RunOptions) -> None:
    """Raise UserError where options of FULL_CONFIG, `saved`, are not those that the newest checkpoint was made with."""
    for path in reversed(checkpoint.checkpoints("ckpt")):
        with contextlib.suppress(RunError):  # reading it in earnest says what is wrong
            then = checkpoint.record_of(path)["meta"].get(OPTIONS, {})
            refuse_changes(
                {name: now for name, now in held(saved).items() if name in then},  # versions have options of their own
                then,
                set(),
                FULL_CONFIG,
                f"{path} has what it was: write that into {FULL_CONFIG}, or start in an empty folder",
            )
            return


def as_filled_in(cls: type[config.Config], given: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a command gives, with those that it leaves to the run as the run has filled them in."""
    left = [o.name for o in config.walk(cls) if o.extra.get("filled_in") and given[o.name] is None]
    return given | {name: saved[name] for name in left}


def free_on_resume(cls: type[config.Config]) -> set[str]:
    """Return the options that a resumed run may change: they belong to the machine, or to a single command."""
    return {option.name for option in config.walk(cls) if option.extra.get("free_on_resume")}


def refuse_other_run(cls: type[RunOptions], folder: str | Path = ".", alike: bool = False) -> None:
    """Raise UserError in the folder of another command's run.

    alike: whether a run is taken that has no other options than `cls`, though another command has made it.
    """
    path = Path(folder) / FULL_CONFIG
    if path.exists():
        try:
            options = plain_files.load_yaml(path)
        except (OSError, ValueError):
            return  # reading it in earnest says what is wrong
        options = options if isinstance(options, dict) else {}
        others = sorted(map(str, set(options) - {*cls.model_fields, config.MADE_BY}))
        whose = config.behind(options).get("command")
        if others or (not alike and whose not in (None, cls.command)):
            why = f"its {FULL_CONFIG} has the option {shown(others[0])}" if others else f"its {FULL_CONFIG} says so"
            raise UserError(
                f"{'this folder' if str(folder) == '.' else folder} holds a run of "
                f"{shown(whose or 'another command')}: {why}; go to another folder"
            )


def refuse_changes(now: dict[str, Any], then: dict[str, Any], free: set[str], what: str, to_do: str) -> None:
    """Raise UserError for an option whose value differs between the two and is not in `free`; `what` begins it."""
    changed = [
        f"--{name} {now[name]} (was {then[name]})" for name in now if name not in free and now[name] != then[name]
    ]
    if changed:
        raise UserError(f"{what}: {some(changed)}; {to_do}")


def begin(cfg: Options, prepare: Callable[[Options, Any], Run], argv: Sequence[str] | None = None) -> None:
    """Write and print the configuration, then do the run. No other process can run in the folder meanwhile.

    What processes that were killed have left half-written in the folder is deleted first.

    The configuration's `check_files` finds the files that the run needs. `prepare(configuration, found)` takes them,
    loads them, and returns the run. Both raise UserError where the run cannot start: then nothing is written, and no
    configuration is printed. A dry run prepares nothing, and stops once the configuration is written. Of several
    processes that torchrun has started, the first holds the folder, and writes and prints.

    argv: the words of the command, for starts.json, where each run that starts is recorded; None is those of the
    command line.
    """
    kept, first = cfg.model_copy(update=OF_ONE_COMMAND), of_torchrun().first
    with run_dir.alone() if first else contextlib.nullcontext(), starts.heard_warnings():
        if first:
            refuse_meanwhile(cfg)
            run_dir.clear_scratch()
            checkpoint.clear_scratch("ckpt")
        found = kept.check_files()
        if cfg.deterministic:
            be_deterministic()
        if not cfg.dry_run:
            kept.threads = use_threads(cfg.threads)
        run = None if cfg.dry_run else prepare(kept, found)
        if first:
            weights = kept.weights(found) if kept._began_with is None else kept._began_with
            config.write(kept, FULL_CONFIG, **({WEIGHTS: weights} if weights else {}))
            print(config.show(kept), end="", flush=True)
        if run:
            if kept.goes_on:
                starts.tell_other_versions(versions())
            with starts.recorded(**facts_of_start(kept, argv)) if first else contextlib.nullcontext():
                run()


def facts_of_start(cfg: RunOptions, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return what starts.json says of a command that begins; `argv` is as in `begin`."""
    import torch

    processes = of_torchrun()
    device = pick_device(processes.device(cfg.device))
    return {
        "command": spelled([cfg.command, *(sys.argv[1:] if argv is None else argv)]),
        "seed": cfg.seed,
        "device": f"{device}: {machine.device_name(device)}",
        "threads": torch.get_num_threads(),
        "processes": processes.n,
        "versions": versions(),
    }


def use_threads(n: int | None) -> int:
    """Have PyTorch use `n` threads on the CPU, by default as many as it takes itself; return how many that is."""
    import torch

    own = torch.get_num_threads()
    if n not in (None, own):
        torch.set_num_threads(n)
    return n or own


def spelled(words: Sequence[str]) -> str:
    """Return the words of a command as a person types them in a terminal of this system."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def be_deterministic() -> None:
    """Let PyTorch use no operation whose result depends on the timing of threads; it raises where it has no other."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose by timing
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads what it has not written
    torch.backends.cudnn.benchmark = False


def go_on() -> str:
    """Return how to go on after a command was stopped: with its run, where the current folder holds one."""
    return "continue with --resume True" if Path(FULL_CONFIG).exists() else "start it again"


def pick_device(name: str) -> torch.device:
    """Return the torch device of a `--device`; raises UserError for one that this machine does not have."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        why = nvidia.unseen() if name.startswith("cuda") else ""
        there = ["auto", "cpu", *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available()]
        raise UserError(f"--device {name}: not available here{': ' * bool(why)}{why}; use {', '.join(there)}") from None
    return device


def check_finite(stats: dict[str, Any], where: str, remedy: str) -> None:
    """Raise RunError if a statistic is not finite; its message says `where` that was, and the `remedy`."""
    import torch

    bad = [name for name, value in stats.items() if not torch.isfinite(torch.as_tensor(value))]
    if bad:
        raise RunError(f"{where}: {', '.join(bad)} is not finite; {remedy}")
