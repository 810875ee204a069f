"""The settings of a LoRA that state its scale: peft's configuration beside the file, or diffusers' metadata in it.

A change is alpha / r B A (arXiv 2106.09685), or alpha / sqrt(r) B A where it is rank-stabilised (arXiv 2312.03732).
peft's settings state r and alpha for all layers. They may also state them for some layers, by patterns, which are
regular expressions. A pattern holds for a layer whose name ends with it, where it begins at the start of the name or
behind a dot. The first pattern that holds counts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from families.sd.lora_files import CONFIG, PARTS, PEFT_STEM
from my import plain_files
from my.errors import UserError, shown, some

if TYPE_CHECKING:
    from my.tensor_file import TensorFile

METADATA = (
    "lora_adapter_metadata"  # key of diffusers' metadata; the value is JSON: peft's settings, the part in each key
)
PEFT_PREFIX = "base_model.model."  # names in files that peft writes begin with this
MERGE = "merge it into a checkpoint with the tool that made it, and give that as --sd.checkpoint"
PLAIN_STARTS = (
    True,
    False,
    None,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # other values change the model's own weights
OTHER_KINDS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
USED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "peft_type",
    "bias",
    "modules_to_save",
    "lora_bias",
)
OF_TRAINING = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "lora_dropout",
    "fan_in_fan_out",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
)
SAFE = re.compile(r"(?:[\w^$|()-]|\\[.d]|\.)(?:[\w^$|()-]|\\[.d]|\.|(?<=[.d])[*+])*")
FREE = re.compile(r"[*+|]")  # parts of a regular expression that can take long
MAX_FREE, MAX_PATTERNS, MAX_PATTERN = 2, 20, 200


class Settings(NamedTuple):
    """What is stated about the layers of a part."""

    alpha: float | None = None  # None where it is not stated; the scale is then 1
    rank: float | None = None
    stabilised: bool = False
    alphas: Mapping[str, float] = {}  # {pattern: alpha}
    ranks: Mapping[str, float] = {}  # {pattern: rank}
    whole: bool = False  # whether the file may also have whole weights and biases
    unknown: tuple[str, ...] = ()  # keys that this version does not know


def read(file: TensorFile) -> dict[str, Settings]:
    """Return {part: Settings} of a file, where the part "" stands for both parts.

    Raises UserError where the settings are damaged or are those of another kind of adapter, and where the settings
    beside peft's file are missing.
    """
    config = file.path.parent / CONFIG
    of_peft = any(name.startswith(PEFT_PREFIX) for name in file.shapes)
    named_so = file.path.stem == PEFT_STEM
    if (of_peft or named_so) and config.is_file():
        try:
            return {"": settings(plain_files.read_json(config, ("r", "lora_alpha")), file.label, True)}
        except ValueError as error:
            raise UserError(f"{file.label}: {CONFIG} beside it {error}; get the folder again") from None
    stated = metadata(file)
    if named_so and not stated:
        raise UserError(
            f"{file.label}: peft's file without its {CONFIG}, which states alpha; put that beside it, or "
            "give the folder"
        )
    return {part: settings(values, file.label, False) for part, values in stated.items()}


def metadata(file: TensorFile) -> dict[str, dict[str, Any]]:
    """Return {part: peft's settings} in the metadata of a file that diffusers wrote, {} where there are none."""
    try:
        values = json.loads(file.metadata.get(METADATA, "{}"))
        parts = {
            part: {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
            for part in PARTS
        }
    except (ValueError, AttributeError, RecursionError):
        raise damaged(file.label) from None
    parts[""] = {key: value for key, value in values.items() if "." not in key}
    return {part: found for part, found in parts.items() if found}


def settings(values: Mapping[str, Any], label: str, whole: bool) -> Settings:
    """Return the Settings that peft's `values` state.

    Raises UserError, which begins with `label`, for an adapter that is no plain LoRA and for damaged values.
    """
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights", True)
    others = [key for key in OTHER_KINDS if values.get(key)]
    if kind != "LORA":
        raise UserError(
            f"{label}: its settings state peft_type {shown(kind)}, which is no plain LoRA and is not supported: {MERGE}"
        )
    if others:
        raise UserError(
            f"{label}: its settings state {some(others)}, which is no plain LoRA and is not supported: {MERGE}"
        )
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        raise UserError(
            f"{label}: its settings state init_lora_weights {shown(start, 20)}: what it adds is meant for "
            "other weights than the model's; save it with peft's path_initial_model_for_weight_conversion, "
            f"or {MERGE}"
        )
    try:
        alphas, ranks = (
            {pattern: number(value) for pattern, value in (values.get(key) or {}).items()}
            for key in ("alpha_pattern", "rank_pattern")
        )
        rank = values.get("r")
        found = Settings(
            number(values["lora_alpha"]),
            None if rank is None else number(rank),
            values.get("use_rslora") or False,
            alphas,
            ranks,
            whole,
            unknown(values),
        )
        if type(found.stabilised) is not bool:
            raise TypeError
    except (TypeError, AttributeError, KeyError, OverflowError):
        raise damaged(label) from None
    refuse_slow([*alphas, *ranks], label)
    return found


def unknown(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of peft's settings that have a value, and that this version does not know."""
    return tuple(key for key, value in values.items() if value and key not in {*USED, *OF_TRAINING, *OTHER_KINDS})


def damaged(label: str) -> UserError:
    """Return the error for an alpha that is not one number."""
    return UserError(
        f"{label}: the alphas in its tensors, metadata or {CONFIG} are not one number each; get "
        "the file again, as .safetensors where it is none"
    )


def number(value: Any) -> float:
    """Return a number, or the only number in nested lists, as a float; raises TypeError for anything else."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


# ---------------------------------------------------------------- patterns


def refuse_slow(patterns: Sequence[str], label: str) -> None:
    """Raise UserError for patterns that could take very long to match.

    At most MAX_PATTERNS may be more than names, and each of these may have at most MAX_FREE parts of free length.
    """
    free = [pattern for pattern in patterns if not is_name(pattern)]
    slow = [
        pattern
        for pattern in free
        if len(pattern) > MAX_PATTERN or not SAFE.fullmatch(pattern) or len(FREE.findall(pattern)) > MAX_FREE
    ]
    if slow or len(free) > MAX_PATTERNS:
        raise UserError(
            f"{label}: its settings have patterns that are more than names of layers: "
            f"{some(slow or free, 1)}; write the layers' names instead"
        )
    for pattern in free:
        try:
            re.compile(pattern)
        except re.error:
            raise UserError(
                f"{label}: {shown(pattern)} in its settings is no pattern of names; write the layers' names instead"
            ) from None


def is_name(pattern: str) -> bool:
    """Return whether a pattern is a plain name."""
    return re.fullmatch(r"\^?[\w.-]*\$?", pattern) is not None


class Patterns:
    """Finds the value of the first pattern that a layer's name ends with, as peft does.

    Plain names are found by a look-up, so that the time does not grow with the number of patterns.
    """

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = list(values.values())
        self.names: dict[str, int] = {}  # {plain name: its place among the patterns}
        self.anchored: dict[str, int] = {}  # the same, of names that must be the whole name of the layer
        self.free: list[tuple[int, re.Pattern[str]]] = []
        for i, pattern in enumerate(values):
            if not is_name(pattern):
                self.free.append((i, re.compile(rf"(.*\.)?({pattern})$")))
            else:
                where = self.anchored if pattern.startswith("^") else self.names
                where.setdefault(pattern.removeprefix("^").removesuffix("$"), i)

    def __call__(self, name: str, default: float | None) -> float | None:
        """Return the value for the layer `name`, or the default where no pattern holds."""
        words = name.split(".")
        ends = (".".join(words[i:]) for i in range(len(words)))
        found = [self.names[end] for end in ends if end in self.names] + [self.anchored.get(name, len(self.values))]
        found += [i for i, pattern in self.free if pattern.match(name)]
        return self.values[min(found)] if min(found) < len(self.values) else default


class Scales:
    """The alpha and rank of every layer of a file, by its {part: Settings}."""

    def __init__(self, stated: Mapping[str, Settings]) -> None:
        self.stated = stated
        self.patterns = {part: (Patterns(found.alphas), Patterns(found.ranks)) for part, found in stated.items()}

    def settings(self, part: str) -> tuple[str, Settings]:
        """Return (key, Settings) of a part; the key is "" where the settings are for both parts."""
        key = part if part in self.stated else ""
        return key, self.stated.get(key, Settings())

    def alpha(self, part: str, name: str) -> tuple[float | None, float | None]:
        """Return (alpha, rank) of a layer, each None where it is not stated."""
        key, found = self.settings(part)
        if found.alpha is None:
            return None, None
        alphas, ranks = self.patterns[key]
        return alphas(name, found.alpha), ranks(name, found.rank)

    def divisor(self, part: str, rank: int) -> float:
        """Return the divisor of alpha: the rank, or its square root where the LoRA is rank-stabilised."""
        return math.sqrt(rank) if self.settings(part)[1].stabilised else rank
