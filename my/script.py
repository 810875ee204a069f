"""What the commands that leave a run in the current folder share: how a run begins and resumes, and on which device."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from my import config, machine, nvidia, plain_files, run_dir, starts
from my.errors import RunError, UserError, shown, some
from my.processes import of_torchrun
from my.version import made_by

if TYPE_CHECKING:
    import torch

FULL_CONFIG = "full_config.yml"


class OnDevice(config.Config):
    """The options of a command that runs on a device."""

    device: str = Field(
        "auto", json_schema_extra=config.FREE, description="cuda, cuda:1, cpu; auto is cuda where there is one"
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
    resume: bool = Field(False, json_schema_extra=config.FREE, description="continue the run in this folder")
    dry_run: bool = Field(False, json_schema_extra=config.FREE, description="write full_config.yml and stop")

    command: ClassVar[str]  # the file name of the command, such as "run_sjc.py"


OF_ONE_COMMAND = {"resume": False, "dry_run": False}  # options that are not kept with the run
FIRST = ("seed", "device", "deterministic", "resume", "dry_run")  # the order in which help lists these options
Options = TypeVar("Options", bound=RunOptions)
Run = Callable[[], None]


def read_config(
    cls: type[Options],
    argv: list[str] | None,
    *,
    root: Path,
    settle: Callable[[Options], Options] = lambda cfg: cfg,
    leaves: str | Path = "ckpt",
    **spec: Any,
) -> Options:
    """Return the run's configuration, an instance of `cls`; with --resume, the one saved in the folder.

    root: the project's folder.
    settle: makes the paths of a configuration absolute, and returns it.
    leaves: the folder by which a run is recognised.
    spec: goes to `config.load`.
    Raises UserError in the project's folder, for a new run in a folder that holds one, and for a resumed run with
    changes that `refuse_changes` does not allow.
    """
    cfg = settle(config.load(cls, argv, **spec))
    run_dir.refuse_project_dir(root)
    refuse_other_run(cls)
    if not cfg.resume:
        if Path(leaves).is_file():
            raise UserError(f"{leaves}: this run would write a folder of that name, and a file has it; move it away")
        if any(Path(leaves).glob("[!.]*")):  # a name with a dot at its start is a file that was not finished
            raise UserError(
                "this folder already holds a run: continue it with --resume True, or start in an empty folder"
            )
        return cfg
    if not Path(FULL_CONFIG).exists():
        raise UserError(f"--resume True: no {FULL_CONFIG} here; go to the folder of the run")
    saved = config.read(cls, FULL_CONFIG)
    config.refuse_cut_off(cls, FULL_CONFIG, free_on_resume(cls))
    cfg = settle(config.load(cls, argv, config_file=FULL_CONFIG, **spec))
    refuse_changes(config.flat(cfg), config.flat(saved), free_on_resume(cls))
    return cfg


def free_on_resume(cls: type[config.Config]) -> set[str]:
    """Return the options that a resumed run may change: they belong to the machine, or to a single command."""
    return {option.name for option in config.walk(cls) if option.extra.get("free_on_resume")}


def refuse_other_run(cls: type[config.Config], folder: str | Path = ".") -> None:
    """Raise UserError in the folder of another command's run, whose configuration has options that `cls` has not."""
    path = Path(folder) / FULL_CONFIG
    if path.exists():
        try:
            options = plain_files.load_yaml(path)
        except (OSError, ValueError):
            return  # reading it in earnest says what is wrong
        options = options if isinstance(options, dict) else {}
        others = sorted(map(str, set(options) - {*cls.model_fields, config.MADE_BY}))
        if others:
            made_by = options.get(config.MADE_BY)
            whose = made_by.get("command") if isinstance(made_by, dict) else None
            raise UserError(
                f"{'this folder' if str(folder) == '.' else folder} holds a run of "
                f"{shown(whose or 'another command')}: its {FULL_CONFIG} has the option {shown(others[0])}; "
                "go to another folder"
            )


def refuse_changes(now: dict[str, Any], then: dict[str, Any], free: set[str]) -> None:
    """Raise UserError for an option whose value differs between the two and is not in `free`."""
    changed = [
        f"--{name} {now[name]} (was {then[name]})" for name in now if name not in free and now[name] != then[name]
    ]
    if changed:
        raise UserError(
            f"--resume True with {some(changed)}: a resumed run can change only {', '.join(sorted(free & set(now)))}; "
            "for anything else start in an empty folder"
        )


def begin(cfg: Options, prepare: Callable[[Options, Any], Run], argv: Sequence[str] | None = None) -> None:
    """Write and print the configuration, then do the run. No other process can run in the folder meanwhile.

    The configuration's `check_files` finds the files that the run needs. `prepare(configuration, found)` takes them,
    loads them, and returns the run. Both raise UserError where the run cannot start: then nothing is written, and no
    configuration is printed. A dry run prepares nothing, and stops once the configuration is written. Of several
    processes that torchrun has started, the first holds the folder, and writes and prints.

    argv: the words of the command, for starts.json, where each run that starts is recorded; None is those of the
    command line.
    """
    kept, first = cfg.model_copy(update=OF_ONE_COMMAND), of_torchrun().first
    with run_dir.alone() if first else contextlib.nullcontext(), starts.heard_warnings():
        found = kept.check_files()
        if cfg.deterministic:
            be_deterministic()
        run = None if cfg.dry_run else prepare(kept, found)
        if first:
            config.write(kept, FULL_CONFIG)
            print(config.show(kept), end="", flush=True)
        if run:
            with starts.recorded(**facts_of_start(kept, argv)) if first else contextlib.nullcontext():
                run()


def facts_of_start(cfg: RunOptions, argv: Sequence[str] | None) -> dict[str, Any]:
    """Return what starts.json says of a command that begins; `argv` is as in `begin`."""
    import torch

    processes = of_torchrun()
    device = pick_device(processes.device(cfg.device))
    return {
        "command": shlex.join([cfg.command, *(sys.argv[1:] if argv is None else argv)]),
        "seed": cfg.seed,
        "device": f"{device}: {machine.device_name(device)}",
        "threads": torch.get_num_threads(),
        "processes": processes.n,
        "versions": {**made_by(), "python": platform.python_version(), "platform": platform.platform()},
    }


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
        raise UserError(
            f"--device {name}: not available here{': ' * bool(why)}{why}; use auto, "
            f"cpu{', cuda' if torch.cuda.is_available() else ''}"
        ) from None
    return device


def check_finite(stats: dict[str, Any], where: str, remedy: str) -> None:
    """Raise RunError if a statistic is not finite; its message says `where` that was, and the `remedy`."""
    import torch

    bad = [name for name, value in stats.items() if not torch.isfinite(torch.as_tensor(value))]
    if bad:
        raise RunError(f"{where}: {', '.join(bad)} is not finite; {remedy}")
