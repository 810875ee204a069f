"""What the commands that leave a run in the current folder share: how a run begins and resumes, and on which device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from my import config, plain_files, run_dir
from my.errors import RunError, UserError, shown, some

if TYPE_CHECKING:
    import torch

FULL_CONFIG = "full_config.yml"


class OnDevice(config.Config):
    """The options of a command that runs on a device."""

    device: str = Field(
        "auto", json_schema_extra=config.FREE, description="cuda, cuda:1, cpu; auto is cuda where there is one"
    )


class RunOptions(OnDevice):
    """The options that every command which leaves a run has."""

    seed: int = Field(0, ge=0, description="seed of all random draws")
    resume: bool = Field(
        False, json_schema_extra=config.FREE, description="continue the run in this folder from its last checkpoint"
    )
    dry_run: bool = Field(False, json_schema_extra=config.FREE, description="write full_config.yml and stop")

    command: ClassVar[str]  # the file name of the command, such as "run_sjc.py"


OF_ONE_COMMAND = {"resume": False, "dry_run": False}  # options that are not kept with the run
FIRST = ("seed", "device", "resume", "dry_run")  # the order in which help lists these options
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

    `root` is the project's folder, `settle` makes its paths hold in any folder, `leaves` names what
    a run is known by, `spec` goes to `config.load`. Raises UserError in the project's folder, where a
    new run would meet an old one, and where a resumed run is to change more than it may.
    """
    cfg = settle(config.load(cls, argv, **spec))
    run_dir.refuse_project_dir(root)
    refuse_other_run(cls)
    if not cfg.resume:
        if Path(leaves).is_file():
            raise UserError(f"{leaves}: this run would write a folder of that name, and a file has it; move it away")
        if any(Path(leaves).glob("[!.]*")):  # what begins with a dot was never whole
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
    """Return the options that a resumed run may change: those of the machine, or of one command."""
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


def begin(cfg: Options, prepare: Callable[[Options, Any], Run]) -> None:
    """Keep and print the configuration, then do the run, alone in the folder.

    The configuration's `check_files` finds the files that the run needs. `prepare(configuration, found)` takes them,
    loads them, and returns the run. Both raise UserError where the run cannot start: a refused command prints and
    leaves nothing. A dry run prepares nothing, and stops once the configuration is kept.
    """
    kept = cfg.model_copy(update=OF_ONE_COMMAND)
    with run_dir.alone():
        found = kept.check_files()
        run = None if cfg.dry_run else prepare(kept, found)
        config.write(kept, FULL_CONFIG)
        print(config.show(kept), end="", flush=True)
        if run:
            run()


def go_on() -> str:
    """Return how a command goes on after it was stopped: where the current folder has its run, with that."""
    return "continue with --resume True" if Path(FULL_CONFIG).exists() else "start it again"


def pick_device(name: str) -> torch.device:
    """Return the torch device of a `--device`; raises UserError where it cannot be had."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name}: not available here; use auto, cpu{', cuda' if torch.cuda.is_available() else ''}"
        ) from None
    return device


def check_finite(stats: dict[str, Any], where: str, remedy: str) -> None:
    """Raise RunError, which tells `where` it was and the `remedy`, if a statistic is not finite."""
    import torch

    bad = [name for name, value in stats.items() if not torch.isfinite(torch.as_tensor(value))]
    if bad:
        raise RunError(f"{where}: {', '.join(bad)} is not finite; {remedy}")
