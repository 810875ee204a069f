"""Values by declared type, and the instance that they make. Pydantic converts and checks every value.

Here are only the forms of text that it does not know: None, lists, 1e4 for an integer, and the texts of a choice.
"""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from my import plain_files
from my.config.describe import choices, describe, near_miss, quoted, spelled
from my.config.options import Given, Option
from my.errors import UserError

C = TypeVar("C", bound=BaseModel)
MAX_FLOW = 2000  # characters of a list in brackets that the YAML parser reads, in up to 0.03 s; a longer one is JSON
MAX_EXACT = 2**53  # up to which a float is exactly one integer


# ---------------------------------------------------------------- one value


def coerce(value: Any, option: Option, where: str) -> Any:
    """Return `value`, a text or plain YAML data, as the declared type of an Option; UserError names `where`.

    The limits of the option are not checked: `build` does that, once all layers lie over one another.
    """
    try:
        found = reader(option.kind).validate_python(value)
    except ValidationError:
        gone = option.extra.get("gone", {})
        if isinstance(value, str) and value in gone:
            raise UserError(f"{where} {value}: is no longer here; {gone[value]}") from None
        hint = near_miss(value, choices(option.kind)) if isinstance(value, str) else ""
        expected = option.extra.get("expected") or describe(option.kind)
        raise UserError(f"{where}: expected {expected}, got {quoted(value)}{hint}") from None
    if not all(map(is_sayable, found if isinstance(found, list) else [found])):
        raise UserError(f"{where}: has a character that no name of a file can have, got {quoted(value)}; leave it out")
    return found


def is_sayable(value: Any) -> bool:
    """Whether a text can name a file: it has no NUL, and no half of a character. What is no text is taken."""
    try:
        return not isinstance(value, str) or b"\0" not in value.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return False


@functools.cache
def reader(kind: Any) -> TypeAdapter[Any]:
    """Return what reads values of a declared type."""
    return TypeAdapter(readable(kind), config=ConfigDict(allow_inf_nan=False))


def readable(kind: Any) -> Any:
    """Return a declared type that also takes our forms of text; the limits of its parts are left out."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return readable(args[0])
    if origin in (Union, types.UnionType):
        either = functools.reduce(operator.or_, map(readable, args))
        return Annotated[either, BeforeValidator(read_none)] if type(None) in args else either
    if origin in (list, tuple):
        parts = tuple(arg if arg is Ellipsis else readable(arg) for arg in args)
        return Annotated[origin[parts], BeforeValidator(read_list)]
    if choices(kind):
        return Annotated[kind, BeforeValidator(functools.partial(read_choice, choices(kind)))]
    return SCALARS.get(kind, kind)


def read_none(value: Any) -> Any:
    """Return None for the text None."""
    return None if value in ("None", "none") else value


def read_choice(allowed: Sequence[Any], value: Any) -> Any:
    """Return the allowed value that a text spells, such as 3 for "3"."""
    return {str(choice): choice for choice in allowed}.get(value, value) if isinstance(value, str) else value


def read_list(value: Any) -> Any:
    """Return the items of a text: a list [1, 2] in brackets, or items with commas between.

    Raises ValueError for a blank text, which is no list (the empty list is []), and for what is neither text nor list.
    """
    if not isinstance(value, str):
        if not isinstance(value, (list, tuple)):
            raise ValueError("no list")
        return value
    text = value.strip()
    if not text:
        raise ValueError("a blank text")
    if not text.startswith("["):
        return [item.strip() for item in text.split(",")]
    if len(text) > MAX_FLOW:
        return plain_files.parse_json(text)
    try:
        return yaml.load(text, Loader=FlatLoader)
    except yaml.YAMLError as error:
        raise ValueError("no list") from error


class FlatLoader(yaml.BaseLoader):
    """Reads a YAML list of texts; the parser looks at all open brackets for every word, so one inside is refused."""

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Raise YAMLError for a bracket inside a bracket."""
        if self.flow_level:
            raise yaml.YAMLError("a list inside a list")
        super().fetch_flow_collection_start(token)


def read_number(value: Any) -> Any:
    """Refuse True and False, which pydantic would take for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("no number")
    return value


def read_integer(value: Any) -> Any:
    """Return the integer that a text such as 1e4 exactly is; ValueError for True and False."""
    if isinstance(value, str) and "e" in value.lower():
        number = float(value)
        return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else value
    return read_number(value)


SCALARS: dict[Any, Any] = {
    int: Annotated[int, BeforeValidator(read_integer)],
    float: Annotated[float, BeforeValidator(read_number)],
    str: Annotated[str, Strict()],
}


# ---------------------------------------------------------------- the instance


def build(cls: type[C], options: Mapping[str, Option], given: Mapping[str, Given]) -> C:
    """Return the instance of `cls` with `given`, which `coerce` has read, over the defaults.

    Nothing is converted again: the model checks limits, and runs its own validators. UserError, one line, if unfit.
    """
    nested: dict[str, Any] = {}
    for name, option in options.items():
        value = given[name].value if name in given else option.default
        *groups, leaf = name.split(".")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        if value is not PydanticUndefined:
            group[leaf] = value
    try:
        return cls.model_validate(nested, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{locate(first['loc'], options, given)}: " if first["loc"] else ""  # else its words name flags
        raise UserError(where + reason(first, options)) from None


def locate(loc: Sequence[int | str], options: Mapping[str, Option], given: Mapping[str, Given]) -> str:
    """Return the place of a pydantic error: where its option was given, else the flag of it, or its group."""
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
}  # pydantic's name of an error -> our words


def reason(first: ErrorDetails, options: Mapping[str, Option]) -> str:
    """Return one pydantic error in our words, with what was given; `options` tells what is missing."""
    kind, got = first["type"], first["input"]
    if kind == "missing":
        option = options.get(".".join(map(str, first["loc"])))
        return f"is required; give it {option.meaning if option and option.meaning else 'a value'}"
    if kind == "too_short":
        least = first["ctx"]["min_length"]
        return f"needs at least {least} value, several with commas between; got {quoted(spelled(got))}"
    if kind == "too_long":
        most = first["ctx"]["max_length"]
        return f"takes {most} value{'s' * (most > 1)}, got {len(got)}: {quoted(spelled(got))}; give {most}"
    if kind == "string_too_short":
        return f"needs words; got {quoted(got)}"
    if kind in LIMITS:
        return f"must be {LIMITS[kind].format(**first['ctx'])}, got {quoted(got)}"
    return first["msg"].removeprefix("Value error, ")  # of the configuration's own validators
