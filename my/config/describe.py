"""Words about options: types, values, help, and what an unknown name may have meant."""

from __future__ import annotations

import difflib
import enum
import textwrap
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from my.config.options import Option
from my.errors import SHOWN, shown, some
from my.version import made_by

FIRST = 8  # of a group's options, how many a message names
WIDTH, INDENT = 96, " " * 8  # of the help, characters
PLAIN = {bool: "True or False", int: "an integer", float: "a finite number", str: "text"}
SEVERAL = {"an integer": "integers", "a finite number": "finite numbers", "text": "texts"}


# ---------------------------------------------------------------- types and values


def describe(kind: Any) -> str:
    """Return the declared type in words, for help and errors."""
    if kind in PLAIN:
        return PLAIN[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return describe(args[0])
    if origin in (Union, types.UnionType):
        named = [describe(arg) for arg in args if arg is not type(None)]
        return " or ".join(named + ["None"] * (type(None) in args))
    if choices(kind):
        return "one of " + ", ".join(str(choice) for choice in choices(kind))
    if origin is tuple and Ellipsis not in args:  # all of one kind
        return f"{len(args)} {SEVERAL[describe(args[0])]} with commas between"
    if origin in (list, tuple):
        return f"a list, each {describe(args[0])}"
    return getattr(kind, "__name__", str(kind))


def choices(kind: Any) -> tuple[Any, ...]:
    """Return the allowed plain values of a Literal or an Enum; they are empty for any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return tuple(member.value for member in kind)
    return ()


def plain(value: Any) -> Any:
    """Return the value of a member of an Enum; any other value is returned as it is."""
    return value.value if isinstance(value, enum.Enum) else value


def spelled(value: Any) -> str:
    """Return a value as a person types it."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def quoted(value: Any) -> str:
    """Return a value as it may stand in a message: a text is in quotes, and what is long is cut."""
    return shown(repr(value[: 2 * SHOWN])) if isinstance(value, str) else shown(value)


# ---------------------------------------------------------------- suggestions


def unknown(name: str, options: Mapping[str, Option], dashes: str = "") -> str:
    """Return why `name` is no option, with the option that is most like it."""
    inside = [option for option in options if option.startswith(f"{name}.")]
    if inside:
        return f"is a group; it holds {some((dashes + option for option in inside), FIRST)}; see --help for all"
    leaf = name.rpartition(".")[2]
    near = [option for option in options if option.rpartition(".")[2] == leaf]
    near = near or difflib.get_close_matches(name[:SHOWN], options, n=1, cutoff=0.5)
    hint = f"perhaps you meant {dashes}{near[0]}" if near else "see --help for the list"
    return f"no such option; {hint}"


def near_miss(text: object, known: Iterable[object]) -> str:
    """Return "; perhaps you meant ..." with the one of `known` that is most like `text`; "" where none is."""
    near = difflib.get_close_matches(str(text)[:SHOWN], map(str, known), n=1)
    return f"; perhaps you meant {near[0]}" if near else ""


# ---------------------------------------------------------------- help


def help_text(
    options: Iterable[Option],
    prog: str,
    doc: str | None,
    presets: Iterable[str],
    positional: str | None,
    further: str = "",
) -> str:
    """Return all that --help prints; `further` is a paragraph about options that are not listed."""
    words = f" {positional.upper()} ..." if positional else ""
    lines = [f"usage: {prog}{words} [--key value ...]", "", textwrap.dedent(doc or "").strip(), ""]
    for option in options:
        limits = f" ({option.limits})" if option.limits else ""
        lines.append(f"  --{option.name}  {describe(option.kind)}{limits}")
        required = option.default is PydanticUndefined
        state = "required" if required else f"default: {spelled(plain(option.default)) or 'empty'}"
        text = f"{option.meaning} [{state}]".strip()
        lines.append(textwrap.fill(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT))
    if names := ", ".join(presets):
        lines += ["", textwrap.fill(f"presets: {names}", WIDTH, subsequent_indent="  ")]
    if further:
        lines += ["", textwrap.fill(further, WIDTH)]
    return "\n".join(lines)


def version_text(prog: str) -> str:
    """Return all that --version prints."""
    made = made_by()
    return f"{prog} of Score Jacobian Chaining {made['version']}, torch {made['torch']}"
