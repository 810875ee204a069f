"""A finished run, done again from its full_config.yml, and both results compared number by number."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import checkpoint, config, plain_files, starts
from my.errors import RunError, UserError, shown
from my.run_dir import is_done, write_atomic
from my.script import FULL_CONFIG, recorded_weights
from my.signals import Stopped

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("run_sjc.py", "run_nerf.py")  # whose result is a field
CKPT = "ckpt"
CONFIG = "config.yml"  # in which a command finds the options of its folder
FACTS = ("device", "threads", "processes")  # of a start, besides the versions, on which bits may depend


def command_of(run: Path) -> str:
    """Return the command that made the finished run of a folder; UserError where there is none that is known."""
    path = run / FULL_CONFIG
    try:
        options = plain_files.load_yaml(path)
    except FileNotFoundError:
        raise UserError(f"{run}: has no {FULL_CONFIG}; give the folder of a finished run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; give the folder of a finished run") from None
    command = config.behind(options).get("command")
    if command not in COMMANDS:
        raise UserError(f"{path}: made by {shown(command)}; only runs of {' and '.join(COMMANDS)} can be compared")
    if not is_done(run):
        raise UserError(f"{run}: this run is not finished; finish it there first with {command} --resume True")
    return command


def refuse_other_weights(run: Path) -> None:
    """Raise UserError for a run of run_sjc.py whose model has other weights here: its field would be another one."""
    from options import weights
    from options.sjc import SJCConfig

    cfg = config.read(SJCConfig, run / FULL_CONFIG)
    weights.refuse_other(str(run), cfg, cfg.chosen.check(cfg), recorded_weights(run))


def do_again(run: Path, command: str, folder: Path) -> None:
    """Start the command of a run in `folder`, with its configuration, and wait for its end. What is there goes on.

    Raises UserError where something else is there, and RunError where the command fails.
    """
    options, given = (run / FULL_CONFIG).read_bytes(), folder / CONFIG
    if folder.is_relative_to(ROOT):
        raise UserError(f"--out {folder}: that is in the project's own folder; give another folder")
    if given.exists() and given.read_bytes() != options or not given.exists() and (folder / FULL_CONFIG).exists():
        raise UserError(f"--out {folder}: holds something else than {run} done again; give an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not given.exists():
        write_atomic(given, options)
    if is_done(folder):
        return
    if command == COMMANDS[0]:
        refuse_other_weights(run)
    status = attended([sys.executable, str(ROOT / command)], folder)
    if status:
        raise RunError(f"{command} ended with status {status} in {folder}; reproduce.py goes on from there")


def attended(words: Sequence[str], folder: Path) -> int:
    """Run a command in a folder, and return its exit status. A signal to this process is passed on, and it saves.

    Windows gives a Ctrl-C to both, and there `terminate` would end a command at once, in the midst of saving.
    """
    with subprocess.Popen(words, cwd=folder, start_new_session=True) as child:  # one signal: a terminal's goes to all
        try:
            return child.wait()
        except (Stopped, KeyboardInterrupt):
            if sys.platform != "win32":
                child.terminate()
            child.wait()
            raise


def last_field(run: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Return (steps, {name: tensor}) of the field in the newest checkpoint of a run that is whole."""
    loaded = checkpoint.load_newest(run / CKPT)
    if loaded is None:
        raise UserError(f"{run}: has no checkpoint; give the folder of a finished run")
    tensors, meta = loaded
    return meta["step"], {name: x for name, x in tensors.items() if not name.startswith("optim/")}


def compare(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> tuple[bool, Iterator[str]]:
    """Return (whether two fields are the same, bit for bit; a line for each tensor that is not)."""
    import torch

    unlike = [
        name
        for name in sorted(first.keys() | second.keys())
        if name not in first or name not in second or not torch.equal(*same_bits(first[name], second[name]))
    ]

    def told(name: str) -> str:
        if name not in first or name not in second:
            return f"{name}: only in one of them"
        a, b = first[name].double(), second[name].double()
        if a.shape != b.shape:
            return f"{name}: {tuple(a.shape)} and {tuple(b.shape)}"
        gap, size = (a - b).abs(), a.square().mean().sqrt().item()
        rms = gap.square().mean().sqrt().item()
        return f"{name}: differs by at most {gap.max().item():.3g}, RMS {rms:.3g} of {size:.3g}"

    return not unlike, map(told, unlike)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors as bytes, so that NaN equals itself and -0 is not 0; as they are where they are not alike."""
    import torch

    if a.shape != b.shape or a.dtype != b.dtype:
        return a.new_zeros(1), a.new_ones(1)
    return a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)


def unlike_facts(first: Path, second: Path) -> Iterator[str]:
    """Yield in words what is not the same in the last starts of two runs: versions, device, threads, processes."""
    a, b = (facts_of(folder) for folder in (first, second))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            yield f"{name}: {shown(a.get(name, 'not known'))} there, {shown(b.get(name, 'not known'))} here"


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what bits may depend on, as the last start of a run says."""
    found, _ = starts.read(folder)
    if not found:
        return {}
    facts = found[-1].facts
    versions = facts.get("versions")
    return {name: facts[name] for name in FACTS if name in facts} | (versions if isinstance(versions, dict) else {})
