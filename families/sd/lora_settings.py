"""What states the scale of a LoRA: peft's configuration beside it, diffusers' metadata in it, kohya's tensors.

A change is alpha / r B A (arXiv 2106.09685), or alpha / sqrt(r) B A where it is rank-stabilised (arXiv
2312.03732). peft's settings hold r and alpha of all layers, and of some by patterns of their names: of the
patterns that a layer's name ends with, as a regular expression behind a dot, the first one holds.
"""

import json
import math
import re
from typing import NamedTuple

from families.sd.lora_files import CONFIG, PARTS, PEFT_STEM
from my import plain_files
from my.errors import UserError, shown, some

METADATA = "lora_adapter_metadata"  # under which diffusers keeps peft's settings as JSON, of each part with its prefix
PEFT_PREFIX = "base_model.model."  # of the names in files that peft writes
MERGE = "merge it into a checkpoint with the tool that made it, and give that as --sd.checkpoint"
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # the others change the model's weights
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
FREE = re.compile(r"[*+|]")  # what a regular expression can spend time on
MAX_FREE, MAX_PATTERNS, MAX_PATTERN = 2, 20, 200


class Settings(NamedTuple):
    """What is stated of the layers of a part; `alpha` None is nothing, which means a scale of 1."""

    alpha: float | None = None
    rank: int | None = None
    stabilised: bool = False
    alphas: dict[str, float] = {}
    ranks: dict[str, float] = {}
    whole: bool = False  # whether whole weights and biases stand beside those of low rank
    unknown: tuple[str, ...] = ()  # keys that this version does not know


def read(file):
    """Return {part: Settings} of a TensorFile; part "" is both. Raises UserError for a scale that cannot be known."""
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


def metadata(file):
    """Return {part: peft's settings} in the metadata of a file that diffusers wrote, {} for none."""
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


def settings(values, label, whole):
    """Return the Settings in peft's own `values`; UserError, behind `label`, for a LoRA that is no plain one."""
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


def unknown(values):
    """Return the keys of peft's settings that state something, and that this version does not know."""
    return tuple(key for key, value in values.items() if value and key not in {*USED, *OF_TRAINING, *OTHER_KINDS})


def damaged(label):
    return UserError(
        f"{label}: the alphas in its tensors, metadata or {CONFIG} are not one number each; get "
        "the file again, as .safetensors where it is none"
    )


def number(value):
    """Return a number, or that in a list of one, as a float; TypeError for anything else."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


# ---------------------------------------------------------------- patterns


def refuse_slow(patterns, label):
    """Raise UserError for patterns that could take any time: only a few may have a few parts of free length."""
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


def is_name(pattern):
    return re.fullmatch(r"\^?[\w.-]*\$?", pattern) is not None


class Patterns:
    """Finds the value of the first pattern that a layer's name ends with, as peft does, in the time of its length."""

    def __init__(self, values):
        self.values = list(values.values())
        self.names, self.anchored, self.free = {}, {}, []
        for i, pattern in enumerate(values):
            if not is_name(pattern):
                self.free.append((i, re.compile(rf"(.*\.)?({pattern})$")))
            else:
                where = self.anchored if pattern.startswith("^") else self.names
                where.setdefault(pattern.removeprefix("^").removesuffix("$"), i)

    def __call__(self, name, default):
        """Return the value for the layer `name`, or the default."""
        words = name.split(".")
        ends = (".".join(words[i:]) for i in range(len(words)))
        found = [self.names[end] for end in ends if end in self.names] + [self.anchored.get(name, len(self.values))]
        found += [i for i, pattern in self.free if pattern.match(name)]
        return self.values[min(found)] if min(found) < len(self.values) else default


class Scales:
    """The scale of every layer of a file that {part: Settings} state."""

    def __init__(self, stated):
        self.stated = stated
        self.patterns = {part: (Patterns(found.alphas), Patterns(found.ranks)) for part, found in stated.items()}

    def settings(self, part):
        """Return the key, "" where one holds for both parts, and the Settings of a part."""
        key = part if part in self.stated else ""
        return key, self.stated.get(key, Settings())

    def alpha(self, part, name):
        """Return (alpha, rank) that are stated of a layer, each None where nothing is."""
        key, found = self.settings(part)
        if found.alpha is None:
            return None, None
        alphas, ranks = self.patterns[key]
        return alphas(name, found.alpha), ranks(name, found.rank)

    def divisor(self, part, rank):
        """Return what divides alpha: the rank, or its square root."""
        return math.sqrt(rank) if self.settings(part)[1].stabilised else rank
