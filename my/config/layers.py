"""Layers of a configuration over one another: defaults, preset, file, flags. What a run keeps of them, and reads."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from my import plain_files
from my.config.command_line import ANSWERS, split_argv
from my.config.describe import help_text, near_miss, plain, quoted, spelled, unknown, version_text
from my.config.options import MADE_BY, Apart, Config, Given, Layer, Option, by_use, flat, options_of
from my.config.values import build, coerce
from my.errors import UserError, note, shown, some
from my.run_dir import write_atomic
from my.version import made_by

C = TypeVar("C", bound=Config)
Switches = Mapping[str, Sequence[Any]]  # {switch: values of it under which an option is read}


def load(
    cls: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    doc: str | None,
    presets_dir: str | Path | None = None,
    positional: str | None = None,
    config_file: str | None = "config.yml",
    apart: Apart | None = None,
) -> C:
    """Return an instance of `cls` from defaults, preset, `config_file` in the current folder, and flags.

    argv: the words; None is those of the command line.
    prog, doc: name and description of the command, for --help.
    presets_dir: folder of NAME.yml; `cls` then has a field `preset`.
    positional: name of a list[str] field that collects the words outside flags.
    config_file: None reads no file.
    apart: options of another configuration that are taken as flags too; `given_apart` returns them.
    Raises UserError, one line. -h or --help prints every option, --version the version; both exit with status 0.
    """
    options = options_of(cls)
    presets = presets_in(presets_dir)
    known = {**(apart.options if apart else {}), **options}
    words = split_argv(sys.argv[1:] if argv is None else argv, known, positional)
    if words.keys() & set(ANSWERS):
        further = apart.words if apart else ""
        text = (
            version_text(prog)
            if "--version" in words
            else help_text(by_use(cls), prog, doc, presets, positional, further)
        )
        print(text)
        raise SystemExit(0)
    given = {name: read_flag(name, text, known[name]) for name, text in words.items()}
    flags = {name: value for name, value in given.items() if name in options}
    local: Layer = {}
    if config_file and Path(config_file).exists():
        local = read_layer(Path(config_file), f"./{config_file}", options)
    preset = read_preset({**local, **flags}, options, presets) if presets_dir else {}
    config = build(cls, options, {**preset, **local, **flags})
    config._asked = asked(options, preset, local, flags)
    config._apart = {name: value for name, value in given.items() if name not in options}
    return config


def read_flag(name: str, text: str | list[str], option: Option) -> Given:
    """Return what a flag gives an option, or the list of the words outside flags; UserError where it is no value."""
    where = f"--{name}" if isinstance(text, str) else name.upper()
    return Given(coerce(text, option, where), where)


def of_layer(cls: type[C], given: Layer, presets_dir: str | Path, facts: Layer) -> C:
    """Return an instance of `cls` from defaults, a preset that `given` may name, `given`, and `facts` over them all.

    What is in `given` counts as asked for. Raises UserError, one line.
    """
    options = options_of(cls)
    presets = presets_in(presets_dir)
    preset = read_preset(given, options, presets)
    config = build(cls, options, {**preset, **given, **facts})
    config._asked = {name: value.where for name, value in given.items()}
    return config


def given_apart(config: Config) -> Layer:
    """Return the flags of another configuration that `load` took with `apart`."""
    return config._apart


def presets_in(folder: str | Path | None) -> dict[str, Path]:
    """Return {name: file} of the presets in a folder."""
    return {path.stem: path for path in sorted(Path(folder).glob("*.yml"))} if folder else {}


# ---------------------------------------------------------------- what a person asked for


def asked(options: Mapping[str, Option], preset: Layer, local: Layer, flags: Layer) -> dict[str, str]:
    """Return {dotted name: where} of every flag, and of what the configuration file changes.

    That file may be a whole configuration: an option that it leaves as it was is not asked for.
    """

    def otherwise(name: str) -> Any:
        return preset[name].value if name in preset else options[name].default

    changed = {name: given for name, given in local.items() if given.value != otherwise(name)}
    return {name: given.where for name, given in {**changed, **flags}.items()}


def refuse_unread(config: Config, read_by: Mapping[str, Switches | None]) -> None:
    """Raise UserError for an option that a person asked for, and that nothing reads because of other options.

    read_by: {option or group: {switch: the values of the switch, as `satisfies` takes them, under which the option is
    read}}. None in place of the switches means that the option is never read. The entry of an option comes before the
    entry of its group.
    """
    values = flat(config)
    for name, where in config._asked.items():
        switches = read_by.get(name, read_by.get(name.partition(".")[0], {}))
        if switches is None:
            raise UserError(f"{where}: nothing here reads it; leave it out")
        for switch, allowed in switches.items():
            value = plain(values[switch])
            if not satisfies(value, allowed):
                instead = f"give --{switch} {' or '.join(map(str, allowed))}" if allowed else f"leave out --{switch}"
                raise UserError(f"{where}: not read with --{switch} {spelled(value)}; leave it out, or {instead}")


def satisfies(value: Any, allowed: Sequence[Any]) -> bool:
    """Whether the value of a switch, or one of a list, is allowed; where `allowed` is (), it must be None or empty."""
    if not allowed:
        return value in (None, [])
    return any(item in allowed for item in (value if isinstance(value, list) else [value]))


# ---------------------------------------------------------------- what a run keeps


def show(config: Config) -> str:
    """Return the configuration as YAML text that reads back to exactly the same values."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=math.inf)


def write(config: Config, path: str | Path, **facts: Any) -> None:
    """Write `show(config)` to `path`, atomically, and under MADE_BY the versions that made it and `facts`."""
    made = {MADE_BY: made_by(getattr(config, "command", None)) | facts}
    write_atomic(path, show(config) + yaml.safe_dump(made, width=math.inf))


def behind(values: Any) -> dict[str, Any]:
    """Return what `write` has put behind a configuration, whose file has these values; {} where it has nothing."""
    facts = values.get(MADE_BY) if isinstance(values, dict) else None
    return facts if isinstance(facts, dict) else {}


def read(cls: type[C], path: str | Path) -> C:
    """Return the instance of `cls` that `write` left at `path`; UserError, one line, if it is unfit."""
    options = options_of(cls)
    return build(cls, options, read_layer(Path(path), str(path), options))


def refuse_cut_off(cls: type[Config], path: str | Path, besides: Container[str] = ()) -> None:
    """Raise UserError where the file that `write` left at `path` was cut off.

    It then lacks the last of the options, or one that every version had (`EVER`): earlier ones wrote such a one last.
    Options named in `besides` do not count. Other options that it lacks are newer than the file: a note says so.
    """
    options, instead = options_of(cls), "put back what was there, or start in an empty folder"
    with contextlib.suppress(OSError):  # reading it in earnest says what is wrong
        if not Path(path).read_bytes().endswith(b"\n"):
            raise UserError(f"{path} was cut off: its last line has no end; {instead}")
    try:
        given = read_layer(Path(path), str(path), options)
    except UserError as error:
        raise UserError(f"{error}; {instead}") from None
    counted = [name for name in options if name not in besides]
    lost = [name for name in counted if name not in given]
    ends = [name for name in lost if name == counted[-1] or options[name].extra.get("ever")]
    if ends:
        raise UserError(f"{path} was cut off: it does not end with the option {ends[-1]}; {instead}")
    if lost:
        note(f"{path} is of an earlier version, without {some(lost)}: these are at their defaults")


# ---------------------------------------------------------------- YAML layers


def read_yaml(path: Path, label: str) -> dict[Any, Any]:
    """Return the mapping in the YAML file at `path`, {} if it is blank; UserError, naming `label`, if it has none."""
    try:
        values = plain_files.load_yaml(path)
    except OSError as error:
        raise UserError(f"{label}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{label} {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{label}: expected lines of `key: value`")
    return values


def read_layer(path: Path, label: str, options: Mapping[str, Option]) -> Layer:
    """Return the layer in a YAML file, whose keys are nested or dotted; UserError, naming `label`, if it is unfit."""
    values = read_yaml(path, label)
    values.pop(MADE_BY, None)
    return layer_of(values, label, options)


def layer_of(values: Mapping[Any, Any], label: str, options: Mapping[str, Option]) -> Layer:
    """Return the layer of values out of YAML, whose keys are nested or dotted; UserError, naming `label`, if unfit."""
    return {
        name: Given(coerce(value, options[name], where), where)
        for name, (value, where) in by_option(values, label, options).items()
    }


def by_option(values: Mapping[Any, Any], label: str, options: Mapping[str, Option]) -> dict[str, tuple[Any, str]]:
    """Return {dotted name: (value, where)} of values out of YAML; UserError for no option, or one given twice."""
    found: dict[str, tuple[Any, str]] = {}
    for name, value in flatten(values, options):
        where = f"{label}: {shown(name)}"
        if name not in options:
            raise UserError(f"{where}: {unknown(name, options)}")
        if name in found:
            raise UserError(f"{where} is given twice; give it once")
        found[name] = value, where
    return found


def flatten(values: Mapping[Any, Any], options: Iterable[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested mappings; a mapping is opened only where its name is that of a group."""
    for key, value in values.items():
        name = f"{prefix}{key if isinstance(key, str) else shown(key)}"
        if isinstance(value, dict) and any(option.startswith(f"{name}.") for option in options):
            yield from flatten(value, options, f"{name}.")
        else:
            yield name, value


def read_preset(given: Layer, options: Mapping[str, Option], presets: Mapping[str, Path]) -> Layer:
    """Return the layer of the preset that `given` names, or else the default; UserError where there is no such one."""
    preset = given.get("preset", Given(options["preset"].default, "--preset"))
    name, where = preset.value, preset.where
    if name is None:
        return {}
    if name not in presets:
        raise UserError(
            f"{where}: no preset {quoted(name)} of this script{near_miss(name, presets)}; its presets are "
            f"{', '.join(presets)}"
        )
    settable = {key: option for key, option in options.items() if key != "preset"}
    return read_layer(presets[name], f"preset {name} ({presets[name].name})", settable)
