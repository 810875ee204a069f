"""Typed configuration: a field's annotation, default and description are the flag and its help.

Precedence, lowest first: defaults, `--preset NAME`, `./config.yml`, flags.
"""

import difflib
import enum
import math
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import PydanticUndefined

from my import plain_files
from my.errors import SHOWN, UserError, note, shown, some
from my.run_dir import write_atomic
from my.version import made_by

MADE_BY = "made_by"  # key of what a configuration was written by: not an option, and passed over by who reads it
FREE: dict[str, Any] = {"free_on_resume": True}  # json_schema_extra of an option that a resumed run may change
FIRST = 8  # of a group's options, how many a message names


class Config(BaseModel):
    """Base of every configuration; a field that is itself a Config gives dotted flags."""

    first: ClassVar[tuple[str, ...]] = ()  # options that a person uses first, by their dotted names
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    _asked: dict[str, str] = PrivateAttr({})  # {dotted name: where} of what a person asked for, by `load`

    def where_asked(self, name: str) -> str | None:
        """Return where a person asked for an option, such as "--lr", None where nobody did."""
        return self._asked.get(name)

    def check_files(self) -> Any:
        """Return what the run needs of files, found once: what prepares the run takes it.

        Raises UserError, at once and without heavy imports, for what cannot be: files that are not there, say.
        """


class Option(NamedTuple):
    """One leaf of a configuration, under its dotted name."""

    name: str
    kind: Any  # the declared type
    default: Any  # PydanticUndefined where a value is required
    limits: str  # such as ">= 0, < 1"
    meaning: str
    extra: dict = {}  # its json_schema_extra: "gone", {value that it took once: what to do instead}; "free_on_resume"


class Given(NamedTuple):
    """A value with the place it was given: `--lr`, or `./config.yml: lr`."""

    value: Any
    where: str


# ---------------------------------------------------------------- public


def load(cls, argv, *, prog, doc, presets_dir=None, positional=None, config_file="config.yml"):
    """An instance of `cls` from defaults, preset, `config_file` in the current folder, and flags.

    argv: the words; None is those of the command line.
    presets_dir: folder of NAME.yml; `cls` then has a field `preset`.
    positional: name of a list[str] field that collects the words outside flags.
    config_file: None reads no file.
    Raises UserError, one line. -h or --help prints every option, --version the version; both exit with status 0.
    """
    options = {option.name: option for option in by_use(cls)}
    presets = {p.stem: p for p in sorted(Path(presets_dir).glob("*.yml"))} if presets_dir else {}
    words = split_argv(sys.argv[1:] if argv is None else argv, options, positional)
    for word in words.keys() & ANSWERS.keys():
        print(ANSWERS[word](options, prog, doc, presets, positional))
        raise SystemExit(0)
    flags = {name: Given(coerce(text, options[name], f"--{name}"), f"--{name}") for name, text in words.items()}
    local = {}
    if config_file and Path(config_file).exists():
        local = read_layer(Path(config_file), f"./{config_file}", options)
    preset = read_preset({**local, **flags}, options, presets) if presets_dir else {}
    config = build(cls, options, {**preset, **local, **flags})
    config._asked = asked(options, preset, local, flags)
    return config


def refuse_unread(config, read_by):
    """Raise UserError for an option that was asked for, and that others leave unread.

    read_by: {option or group: {switch: the values of it, as `satisfies` takes them, under which that is
    read}, or None where it never is}; an option's own entry comes before its group's.
    """
    values = flat(config)
    for name, where in config._asked.items():
        group = name.partition(".")[0]
        switches = read_by.get(name, read_by.get(group, {}))
        if switches is None:
            raise UserError(f"{where}: nothing here reads it; leave it out")
        for switch, allowed in switches.items():
            value = plain(values[switch])
            if not satisfies(value, allowed):
                instead = f"give --{switch} {' or '.join(map(str, allowed))}" if allowed else f"leave out --{switch}"
                raise UserError(f"{where}: not read with --{switch} {spelled(value)}; leave it out, or {instead}")


def show(config):
    """The configuration as YAML text that reads back to exactly the same values."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=math.inf)


def satisfies(value, allowed):
    """Whether a switch's value, or any of a list, is among the allowed ones; for () it is to be None or empty."""
    if not allowed:
        return value in (None, [])
    return any(item in allowed for item in (value if isinstance(value, list) else [value]))


def asked(options, preset, local, flags):
    """{dotted name: where} of every flag, and of what the configuration file changes: it may be a whole one."""

    def otherwise(name):
        return preset[name].value if name in preset else options[name].default

    changed = {name: given for name, given in local.items() if given.value != otherwise(name)}
    return {name: given.where for name, given in {**changed, **flags}.items()}


def spelled(value):
    """A value as a person types it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def quoted(value):
    """A value as it may stand in a message: text in quotes, and cut where it is long."""
    return shown(repr(value[: 2 * SHOWN])) if isinstance(value, str) else shown(value)


def flat(config):
    """The options of a configuration as {dotted name: value}."""
    return {option.name: option.default for option in walk(type(config), config)}


def write(config, path):
    """Write `show(config)` to `path`, atomically, and behind it under MADE_BY the versions that it was made by."""
    write_atomic(path, show(config) + yaml.safe_dump({MADE_BY: made_by(getattr(config, "command", None))}))


def read(cls, path):
    """The instance of `cls` that `write` left at `path`; UserError, one line, if it is unfit."""
    options = {option.name: option for option in walk(cls)}
    return build(cls, options, read_layer(Path(path), str(path), options))


def refuse_cut_off(cls, path, besides=()):
    """Raise UserError where the file that `write` left at `path` was cut off: it lacks the last of the options.

    Options named in `besides` do not count. Other options that it lacks are newer than the file: a note says so.
    """
    options = {option.name: option for option in walk(cls)}
    given = read_layer(Path(path), str(path), options)
    lost = [name for name in options if name not in {*given, *besides}]
    last = [name for name in options if name not in besides][-1]
    if last in lost or not Path(path).read_bytes().endswith(b"\n"):
        raise UserError(f"{path} was cut off: it does not end with the option {last}; start in an empty folder")
    if lost:
        note(f"{path} is of an earlier version, without {some(lost)}: these are at their defaults")


# ---------------------------------------------------------------- declared options


def walk(cls, defaults=None, prefix=""):
    """Yield an Option for each leaf of `cls`; `defaults` is an instance that overrides its own."""
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if defaults is not None:
            default = getattr(defaults, name)
        if is_group(field.annotation):
            nested = None if default is PydanticUndefined else default
            yield from walk(field.annotation, nested, f"{prefix}{name}.")
        else:
            limits = describe_limits(field.metadata)
            extra = field.json_schema_extra or {}
            yield Option(prefix + name, field.annotation, default, limits, field.description or "", extra)


def by_use(cls: type[Config]) -> list[Option]:
    """Return the options of `cls` in the order in which help lists them: those of `cls.first` come first."""
    rank = {name: i for i, name in enumerate(cls.first)}
    return sorted(walk(cls), key=lambda option: rank.get(option.name, len(rank)))


def is_group(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def describe_limits(metadata):
    symbols = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}
    return ", ".join(
        f"{symbol} {getattr(item, key)}"
        for item in metadata
        for key, symbol in symbols.items()
        if getattr(item, key, None) is not None
    )


def describe(kind):
    """The declared type in words, for help and errors."""
    plain = {bool: "True or False", int: "an integer", float: "a finite number", str: "text"}
    if kind in plain:
        return plain[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(args[0])
    if origin in (Union, types.UnionType):
        named = [describe(arg) for arg in args if arg is not type(None)]
        return " or ".join(named + ["None"] * (type(None) in args))
    if choices(kind):
        return "one of " + ", ".join(str(choice) for choice in choices(kind))
    if origin is tuple and Ellipsis not in args:
        return f"a list [{', '.join(map(describe, args))}]"
    if origin in (list, tuple):
        return f"a list, each {describe(args[0])}"
    return getattr(kind, "__name__", str(kind))


def choices(kind):
    """The allowed plain values of a Literal or an Enum; empty for any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return tuple(member.value for member in kind)
    return ()


def help_text(options, prog, doc, presets, positional):
    """All that --help prints."""
    words = f" {positional.upper()} ..." if positional else ""
    lines = [f"usage: {prog}{words} [--key value ...]", "", textwrap.dedent(doc).strip(), ""]
    for name, kind, default, limits, meaning, _ in options.values():
        limits = f" ({limits})" if limits else ""
        lines.append(f"  --{name}  {describe(kind)}{limits}")
        state = "required" if default is PydanticUndefined else f"default: {plain(default)}"
        lines.append(textwrap.fill(f"{meaning} [{state}]".strip(), 96, **INDENT))
    if presets:
        lines += ["", textwrap.fill("presets: " + ", ".join(presets), 96, subsequent_indent="  ")]
    return "\n".join(lines)


INDENT = {"initial_indent": " " * 8, "subsequent_indent": " " * 8}


def version_text(_options, prog, *_):
    """All that --version prints."""
    made = made_by()
    return f"{prog} of Score Jacobian Chaining {made['version']}, torch {made['torch']}"


ANSWERS = {"-h": help_text, "--help": help_text, "--version": version_text}


def plain(value):
    return value.value if isinstance(value, enum.Enum) else value


# ---------------------------------------------------------------- the command line


def split_argv(argv, options, positional):
    """{name: text} of the flags in `argv`, or that of ANSWERS alone where one of them is asked for."""
    found, bare, words = {}, [], iter(argv)
    for word in words:
        if word in ANSWERS:
            return {word: ""}
        if not word.startswith("--"):
            if positional is None or word.startswith("-"):
                raise UserError(f"unexpected word {quoted(word)}: options are --key value, "
                                "and a value with spaces needs quotes")  # fmt: skip
            bare.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("σ", "sigma")  # as some published flags are spelled
        if name not in options:
            raise UserError(f"--{name}: {unknown(name, options, '--')}")
        if name in found:
            raise UserError(f"--{name} is given twice; give it once")
        found[name] = text if equals else next(words, "--")
        if not equals and found[name].startswith("--"):
            raise UserError(f"--{name} needs a value: {describe(options[name].kind)}")
    if bare and positional in found:
        raise UserError(f"--{positional} is given twice: as words and as a flag; give it once")
    return {**found, positional: bare} if bare else found


def unknown(name, options, dashes=""):
    """Why `name` is no option, with the nearest that is."""
    inside = [option for option in options if option.startswith(f"{name}.")]
    if inside:
        return f"is a group; it holds {some((dashes + option for option in inside), FIRST)}; see --help for all"
    leaf = name.rpartition(".")[2]
    near = [option for option in options if option.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"perhaps you meant {dashes}{near[0]}" if near else "see --help for the list"
    return f"no such option; {hint}"


def near_miss(text, known):
    """ "; perhaps you meant ..." of the one of `known` that is most like `text`, "" where none is."""
    near = difflib.get_close_matches(str(text), map(str, known), n=1)
    return f"; perhaps you meant {near[0]}" if near else ""


# ---------------------------------------------------------------- YAML layers


def read_yaml(path, label):
    """The mapping in the YAML file at `path`, {} if it is blank; UserError naming `label` if there is none."""
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


def read_layer(path, label, options):
    """{dotted name: Given} of a YAML file whose keys are nested or dotted."""
    found = {}
    values = read_yaml(path, label)
    values.pop(MADE_BY, None)
    for name, value in flatten(values, options):
        where = f"{label}: {shown(name)}"
        if name not in options:
            raise UserError(f"{where}: {unknown(name, options)}")
        if name in found:
            raise UserError(f"{where} is given twice; give it once")
        found[name] = Given(coerce(value, options[name], where), where)
    return found


def flatten(values, options, prefix=""):
    for key, value in values.items():
        name = f"{prefix}{key if isinstance(key, str) else shown(key)}"
        if isinstance(value, dict) and any(option.startswith(f"{name}.") for option in options):
            yield from flatten(value, options, f"{name}.")
        else:
            yield name, value


def read_preset(given, options, presets):
    """The layer of the preset that `given`, or else the default, names."""
    name, where = given.get("preset", Given(options["preset"].default, "--preset"))
    if name is None:
        return {}
    if name not in presets:
        raise UserError(
            f"{where}: no preset {quoted(name)} of this script{near_miss(name, presets)}; its presets are "
            f"{', '.join(presets)}"
        )
    settable = {key: option for key, option in options.items() if key != "preset"}
    return read_layer(presets[name], f"preset {name} ({presets[name].name})", settable)


# ---------------------------------------------------------------- values


def coerce(value, option, where):
    """`value` (text, or plain YAML data) as the declared type of an Option; UserError names `where`."""
    kind = option.kind
    try:
        return convert(value, kind)
    except (ValueError, RecursionError, yaml.YAMLError):
        gone = option.extra.get("gone", {})
        if isinstance(value, str) and value in gone:
            raise UserError(f"{where} {value}: is no longer here; {gone[value]}") from None
        hint = near_miss(value, choices(kind) if isinstance(value, str) else ())
        raise UserError(f"{where}: expected {describe(kind)}, got {quoted(value)}{hint}") from None


def convert(value, kind):
    """`value` as `kind`, or ValueError; a type not named here is left for pydantic to judge."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return convert(value, args[0])
    if origin in (Union, types.UnionType):
        return convert_union(value, args)
    if choices(kind):
        return convert_choice(value, choices(kind))
    if origin in (list, tuple):
        return convert_list(value, origin, args)
    if kind in SCALARS:
        return SCALARS[kind](value)
    return value


def convert_choice(value, allowed):
    for choice in allowed:
        if choice == value and type(choice) is type(value):
            return choice
    for choice in allowed:
        if isinstance(value, str) and str(choice) == value:
            return choice
    raise ValueError(value)


def convert_union(value, args):
    if type(None) in args and (value is None or value in ("None", "none")):
        return None
    for arg in args:
        try:
            if arg is not type(None):
                return convert(value, arg)
        except ValueError:
            continue
    raise ValueError(value)


def convert_list(value, origin, args):
    """Text is a YAML flow list `[1, 2]`, or its items with commas between; blank text is no list, [] is empty."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = yaml.load(value, Loader=yaml.BaseLoader)
    elif isinstance(value, str):
        value = [item.strip() for item in value.split(",")] if value.strip() else None
    if not isinstance(value, (list, tuple)):
        raise ValueError(value)
    kinds = args if origin is tuple and Ellipsis not in args else args[:1] * len(value)
    if len(kinds) != len(value):
        raise ValueError(value)
    return origin(convert(item, kind) for item, kind in zip(value, kinds, strict=True))


def convert_bool(value):
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError(value)


def convert_float(value):
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(value)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(value) from None
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def convert_int(value):
    """Integers, and numbers such as 1e4 that are exactly one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9][0-9_]*", value):
        return int(value)
    number = convert_float(value)
    if not number.is_integer() or abs(number) > 2**53:
        raise ValueError(value)
    return int(number)


def convert_str(value):
    if not isinstance(value, str):
        raise ValueError(value)
    return value


SCALARS = {bool: convert_bool, int: convert_int, float: convert_float, str: convert_str}


# ---------------------------------------------------------------- the instance


def build(cls, options, given):
    """The instance of `cls` with `given` over the defaults; UserError, one line, if unfit."""
    nested = {}
    for name, option in options.items():
        value = given[name].value if name in given else option.default
        *groups, leaf = name.split(".")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        if value is not PydanticUndefined:
            group[leaf] = value
    try:
        return cls.model_validate(nested)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{locate(first['loc'], options, given)}: " if first["loc"] else ""  # else it names its flags itself
        raise UserError(where + reason(first, options)) from None


def locate(loc, options, given):
    """The place of a pydantic error: where its option was given, or the flag or group it is in."""
    path = list(map(str, loc))
    for n in range(len(path), 0, -1):
        name = ".".join(path[:n])
        if name in options:
            return given[name].where if name in given else f"--{name}"
    return f"options of {'.'.join(path)}"


LIMITS = {
    "greater_than": "greater than {gt}",
    "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "less than or equal to {le}",
    "multiple_of": "a multiple of {multiple_of}",
}  # what `convert` leaves to pydantic, by its names of errors


def reason(first, options):
    """One pydantic error in our words, with what was given; `options` tells what is missing."""
    kind, got = first["type"], first["input"]
    if kind == "missing":
        option = options.get(".".join(map(str, first["loc"])))
        return f"is required; give it {option.meaning if option and option.meaning else 'a value'}"
    if kind == "too_short":
        least = first["ctx"]["min_length"]
        return f"needs at least {least} value, several with commas between; got {quoted(spelled(got))}"
    if kind == "string_too_short":
        return f"needs words; got {quoted(got)}"
    if kind in LIMITS:
        return f"must be {LIMITS[kind].format(**first['ctx'])}, got {quoted(got)}"
    return first["msg"].removeprefix("Value error, ")  # of the configuration's own validators
