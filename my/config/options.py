"""What a configuration declares: its base class, and its options under their dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import reduce
from typing import Any, ClassVar, NamedTuple, TypeGuard

from pydantic import BaseModel, ConfigDict, PrivateAttr
from pydantic_core import PydanticUndefined

FREE: dict[str, Any] = {"free_on_resume": True}  # json_schema_extra of an option that a resumed run may change
FILLED_IN: dict[str, Any] = {"filled_in": True}  # of one that a run fills in where it is not given
EVER: dict[str, Any] = {"ever": True}  # json_schema_extra of an option that every version had
MADE_BY = "made_by"  # key of a written configuration under which versions stand: it is no option, and readers skip it
SYMBOLS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}  # of pydantic's limits


class Given(NamedTuple):
    """A value with the place where it was given: `--lr`, or `./config.yml: lr`."""

    value: Any
    where: str


Layer = dict[str, Given]  # by dotted names


class Config(BaseModel):
    """Base of every configuration; a field that is itself a Config gives dotted flags."""

    first: ClassVar[tuple[str, ...]] = ()  # options that a person uses first, by their dotted names
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    _asked: dict[str, str] = PrivateAttr({})  # {dotted name: where} of what a person asked for, set by `load`
    _apart: Layer = PrivateAttr({})  # what was given of another configuration, set by `load`

    def where_asked(self, name: str) -> str | None:
        """Return where a person asked for the option of a dotted name, such as `--lr`; None where nobody did."""
        return self._asked.get(name)

    def check_files(self) -> Any:
        """Raise UserError, at once and without heavy imports, for what cannot be, such as files that are not there.

        Return what was found. What prepares the run takes it, so that nothing is looked for twice. Here it is None.
        """
        return None


class Option(NamedTuple):
    """One leaf of a configuration."""

    name: str  # dotted
    kind: Any  # the declared type
    default: Any  # PydanticUndefined where a value is required
    limits: str  # such as ">= 0, < 1"
    meaning: str
    # The field's json_schema_extra. "gone" is {value that it took once: what to do instead}, and "expected" is what a
    # message calls its values, where the words for its type do not say enough.
    extra: dict[str, Any]


class Apart(NamedTuple):
    """Options of another configuration that a command takes as flags too, and keeps apart from its own."""

    options: dict[str, Option]
    words: str  # a paragraph of help, in place of all of them


def walk(cls: type[BaseModel], defaults: BaseModel | None = None, prefix: str = "") -> Iterator[Option]:
    """Yield an Option for each leaf of `cls`; values of the instance `defaults` take the place of its own defaults."""
    for name, field in cls.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if defaults is not None:
            default = getattr(defaults, name)
        if is_group(field.annotation):
            nested = None if default is PydanticUndefined else default
            yield from walk(field.annotation, nested, f"{prefix}{name}.")
        else:
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            limits = describe_limits(field.metadata)
            yield Option(prefix + name, field.annotation, default, limits, field.description or "", extra)


def options_of(cls: type[BaseModel]) -> dict[str, Option]:
    """Return {dotted name: Option} of a configuration."""
    return {option.name: option for option in walk(cls)}


def flat(config: BaseModel) -> dict[str, Any]:
    """Return the options of a configuration as {dotted name: value}."""
    return {option.name: option.default for option in walk(type(config), config)}


def reset(config: BaseModel, names: Iterable[str]) -> None:
    """Set the options of these dotted names to their defaults, in the configuration itself."""
    defaults = options_of(type(config))
    for name in names:
        *groups, leaf = name.split(".")
        setattr(reduce(getattr, groups, config), leaf, defaults[name].default)


def by_use(cls: type[Config]) -> list[Option]:
    """Return the options of `cls` in the order in which help lists them: those of `cls.first` come first."""
    rank = {name: i for i, name in enumerate(cls.first)}
    return sorted(walk(cls), key=lambda option: rank.get(option.name, len(rank)))


def is_group(kind: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a declared type is a configuration of its own."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def describe_limits(metadata: list[Any]) -> str:
    """Return the limits of a field in symbols, such as ">= 0, < 1"."""
    return ", ".join(
        f"{symbol} {getattr(item, key)}"
        for item in metadata
        for key, symbol in SYMBOLS.items()
        if getattr(item, key, None) is not None
    )
