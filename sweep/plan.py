"""The table of a sweep: a YAML file as runs of run_sjc.py, each with a name, a checked configuration and its flags."""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from my import config
from my.config import Given, Layer, near_miss
from my.errors import UserError, shown
from options.sjc import SJCConfig

PRESETS = Path(__file__).resolve().parent.parent / "presets"
KEYS = ("options", "axes", "runs", "slurm")  # of the file
MACHINES = "the sweep gives each run its GPU or cores; hide the GPUs with CUDA_VISIBLE_DEVICES= to use none"
NOT_HERE = {
    "resume": "a run with a checkpoint is resumed anyway",
    "dry_run": "give --dry_run True to run_sweep.py",
    "device": MACHINES,
}  # options that a sweep cannot set -> why
MOST_RUNS = 10_000  # each is checked before the first begins
SHORT = ("preset", "prompt")  # options whose value says in a name what it is
DEVICES = r"(?i)^(con|prn|aux|nul|(?:com|lpt)[\d¹²³])(?=\.|$)"  # Windows takes no file of these names
LONGEST_VALUE, LONGEST_NAME = 40, 200  # characters of a value in a name; bytes of a name


class Run(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    varied: dict[str, str]  # {option: value as a person types it} of what `axes` and `runs` give
    cfg: SJCConfig
    flags: list[str]  # of run_sjc.py


class Plan(NamedTuple):
    """What the file of a sweep says."""

    runs: list[Run]
    slurm: dict[str, Any]  # parameters of jobs on a cluster


def read_plan(path: str) -> Plan:
    """Return the plan in a YAML file; UserError, one line, for a mistake in it or in any of its runs."""
    values = config.read_yaml(Path(path), path)
    for key in values:
        if key not in KEYS:
            raise UserError(f"{path}: {shown(key)}: no such key; a sweep has {', '.join(KEYS)}{near_miss(key, KEYS)}")
    if not any(values.get(key) for key in KEYS[:3]):
        raise UserError(f"{path}: holds no runs; give it `axes` or `runs`, as docs/sweeps.md shows")
    options = {name: option for name, option in config.options_of(SJCConfig).items() if name not in NOT_HERE}
    common = layer(values.get("options"), f"{path}: options", options)
    axes, rows = read_axes(values.get("axes"), f"{path}: axes", options), read_rows(values, path, options)
    for name in axes:
        for where, other in [("options", common), *((f"runs: {i}", row) for i, row in enumerate(rows, 1))]:
            if name in other:
                raise UserError(f"{path}: {name} stands in axes and in {where}; leave one of the two out")
    n_runs = len(rows) * math.prod(map(len, axes.values()))
    if n_runs > MOST_RUNS:
        raise UserError(
            f"{path}: axes and runs make {n_runs} runs, and a sweep has at most {MOST_RUNS}; give fewer values"
        )
    varied = [row | dict(zip(axes, point)) for row in rows for point in product(*axes.values())]
    return Plan(named_runs(path, common, varied), mapping(values.get("slurm"), f"{path}: slurm"))


# ---------------------------------------------------------------- parts of the file


def mapping(values: Any, label: str) -> dict[Any, Any]:
    """Return a mapping out of YAML, {} for nothing; UserError, naming `label`, for anything else."""
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{label}: expected lines of `key: value`, got {shown(values)}")
    return values or {}


def layer(values: Any, label: str, options: Mapping[str, config.Option]) -> Layer:
    """Return a mapping out of YAML as options of a run; UserError, naming `label`, where it is none."""
    values = mapping(values, label)
    refuse_not_here(values, label)
    return config.layer_of(values, label, options)


def refuse_not_here(values: Mapping[Any, Any], label: str) -> None:
    """Raise UserError for an option that a sweep cannot set."""
    for name, why in NOT_HERE.items():
        if name in values:
            raise UserError(f"{label}: {name}: not for a sweep: {why}; leave it out")


def read_axes(values: Any, label: str, options: Mapping[str, config.Option]) -> dict[str, list[Given]]:
    """Return {option: its values} of the axes; UserError, naming `label`, for anything but lists of values."""
    values = mapping(values, label)
    refuse_not_here(values, label)
    axes = {}
    for name, (items, where) in config.by_option(values, label, options).items():
        if not isinstance(items, list) or not items:
            raise UserError(f"{where}: expected a list of values, such as [1, 2], got {shown(items)}")
        axes[name] = [Given(config.coerce(item, options[name], where), where) for item in items]
    return axes


def read_rows(values: Mapping[Any, Any], path: str, options: Mapping[str, config.Option]) -> list[Layer]:
    """Return the options of each entry of `runs`, one empty entry where there is no such list."""
    rows = values.get("runs")
    if rows is None:
        return [{}]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: runs: expected a list, each entry with options of one run, got {shown(rows)}")
    return [layer(row, f"{path}: runs: {i}", options) for i, row in enumerate(rows, 1)]


# ---------------------------------------------------------------- runs


def named_runs(path: str, common: Layer, varied: list[Layer]) -> list[Run]:
    """Return the runs, whose names are unique; UserError for an unfit run, or two that are the same."""
    runs: list[Run] = []
    seen: dict[str, str] = {}
    for name, own in zip(names_of(varied), varied):
        cfg, flags = checked(f"{path}: run {name}", {**common, **own})
        words = {option: config.spelled(given.value) for option, given in own.items()}
        same = seen.setdefault(config.show(cfg), name)
        if same != name or name in (run.name for run in runs):
            alike = ", ".join(f"{option} {shown(word)}" for option, word in words.items()) or "no options of their own"
            two = f"the runs {same} and {name}" if same != name else f"two runs with {alike}"
            raise UserError(f"{path}: {two} have the same options; leave one of them out")
        runs.append(Run(name, words, cfg, flags))
    return runs


def checked(where: str, given: Layer) -> tuple[SJCConfig, list[str]]:
    """Return (configuration, flags) of a run, once it has been found that it can start; UserError names `where`."""
    try:
        cfg = config.load(
            SJCConfig,
            list(flags_of({name: value.value for name, value in given.items()})),
            prog="run_sjc.py",
            doc=None,
            presets_dir=PRESETS,
            config_file=None,
        ).absolute()
        cfg.check_files()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    values = config.flat(cfg)  # whose paths are absolute, since the run is in another folder
    return cfg, list(flags_of({name: values[name] for name in given}))


def flags_of(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the words of a command line that give options their values."""
    for name, value in values.items():
        value = config.plain(value)
        text = json.dumps(list(value), ensure_ascii=False) if isinstance(value, (list, tuple)) else str(value)
        yield from [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]


# ---------------------------------------------------------------- names


def names_of(varied: list[Layer]) -> list[str]:
    """Return the names of runs: what `axes` and `runs` give them, so that a longer axis leaves names as they are."""
    leaves = Counter(name.rpartition(".")[2] for name in {name for own in varied for name in own})
    names = []
    for own in varied:
        parts = []
        for name, given in own.items():
            leaf = name.rpartition(".")[2]
            word = "" if leaf in SHORT else leaf if leaves[leaf] == 1 else name
            parts.append(word + slug(config.spelled(config.plain(given.value)), bool(word)))
        names.append(re.sub(DEVICES, r"\1_", fit("-".join(parts) or "run")))
    times = Counter(map(alike, names))
    return [
        name if times[alike(name)] == 1 else f"{name}_{digest(repr(sorted((k, v.value) for k, v in own.items())))}"
        for name, own in zip(names, varied)
    ]


def alike(name: str) -> str:
    """Return what names have in common that are one to a file system: letters in either case, or spelled in parts."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def slug(text: str, inside: bool) -> str:
    """Return a value as part of the name of a folder; what is long is cut, and told apart by a digest.

    inside: whether a word stands before it; otherwise it cannot begin with a sign.
    """
    found = re.sub(r"[^\w.+-]+", "_", text).strip("_." if inside else "_.+-") or "empty"
    return found if len(found) <= LONGEST_VALUE else f"{found[: LONGEST_VALUE - 7]}_{digest(text)}"


def fit(name: str) -> str:
    """Return a name that a file system takes."""
    data = name.encode()
    return name if len(data) <= LONGEST_NAME else f"{data[: LONGEST_NAME - 7].decode(errors='ignore')}_{digest(name)}"


def digest(text: str) -> str:
    """Return six characters that differ between texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]
