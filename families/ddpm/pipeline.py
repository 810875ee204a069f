"""Unconditional pixel-space pipelines of diffusers: where one is, and what its small files state.

Imports nothing heavy. `docs/pixel_models.md` lists the facts that these files state, and what becomes of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from families.family import WITHOUT, Place
from my.errors import UserError, shown, some
from my.file_system import expanded
from my.plain_files import read_json

TAKES = "this family takes pixel-space pipelines of a unet and a discrete scheduler, such as google/ddpm-cifar10-32"
OTHER_NOISE = {  # a part of the name of a scheduler's class -> what sets its noise apart
    "ScoreSdeVe": "adds noise without end, as NCSN++ does",
    "ScoreSdeVp": "has continuous time",
    "KarrasVe": "is told levels of noise, not steps",
    "CMStochastic": "draws with a consistency model",
    "EDM": "is told levels of noise, not steps",
    "Flow": "is of a flow",
    "IPNDM": "has no table of betas",
    "UnCLIP": "is for pictures out of CLIP's embeddings",
    "VQDiffusion": "is of codes, not of pictures",
    "Cosine": "is told levels of noise, not steps",
    "CogVideoX": "is for films",
}
INSTEAD = "give the folder of a diffusers pipeline or a hub id, such as google/ddpm-cifar10-32"
PREDICTS = ("epsilon", "v_prediction", "sample")
WEIGHTS = re.compile(r"diffusion_pytorch_model\.((?P<variant>[\w-]+)\.)?(safetensors|bin)(\.index\.json)?")
SHARD = re.compile(r"\d{5}-of-\d{5}")


# ---------------------------------------------------------------- where it lies


class Pipeline(NamedTuple):
    """A pipeline on this machine, whose small files were read."""

    flag: str  # the option and value that ask for it
    folder: Path
    prediction: str  # what its UNet predicts, one of PREDICTS
    variant: str | None  # of its weights, such as fp16; None where it has weights without a variant


def find(checkpoint: str | None) -> Place:
    """Return where a --ddpm.checkpoint is: a folder, or a repository of the hub; raises UserError for neither."""
    if checkpoint is None:
        raise UserError(
            "--family ddpm needs --ddpm.checkpoint: the folder or hub id of an unconditional diffusers pipeline, such "
            "as google/ddpm-cifar10-32"
        )
    flag, folder = f"--ddpm.checkpoint {checkpoint}", expanded(checkpoint)
    if folder.is_dir():
        return Place(flag, folder)
    if folder.exists() or folder.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
        why = "that is a file" if folder.exists() else "no such folder"
        raise UserError(f"{flag}: {why}; {INSTEAD}, or {WITHOUT}")
    return Place(flag, repos=(checkpoint,), missed=str(folder.absolute()))


def cached(repo: str) -> Path | None:
    """Return the folder of a pipeline in the hub's cache on this machine, as far as its index tells, else None."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None


# ---------------------------------------------------------------- what it states


def read(flag: str, folder: Path) -> Pipeline:
    """Return the pipeline in a folder; raises UserError unless its small files state one that can give a score."""
    if not (folder / "model_index.json").is_file():
        alone = (folder / "config.json").is_file()
        to_do = (
            "it is one part of a pipeline: give the folder above it"
            if alone
            else f"give the folder of a diffusers pipeline, or {WITHOUT}"
        )
        raise UserError(f"{flag}: that folder has no model_index.json; {to_do}")
    try:
        check_index(settings(folder, "", "model_index.json"))
        prediction = check_scheduler(settings(folder, "scheduler", "scheduler_config.json"))
        check_unet(settings(folder, "unet", "config.json"))
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    return Pipeline(flag, folder, prediction, variant(folder))


def settings(folder: Path, part: str, name: str) -> dict[str, Any]:
    """Return what a JSON file of a pipeline holds. It is in the folder of its part, or in the pipeline's (2022).

    Raises ValueError where it cannot be read, or names no class: diffusers would guess all the rest.
    """
    path = next((path for path in (folder / part / name, folder / name) if path.is_file()), None)
    if path is None:
        raise ValueError(f"it has no {Path(part, name)}; get the whole folder")
    try:
        found = read_json(path)
    except (ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} {why}; get that file again") from None
    if not isinstance(found.get("_class_name"), str):
        raise ValueError(f"{path} is not what diffusers writes there: it names no _class_name; get that file again")
    return found


def check_index(index: dict[str, Any]) -> None:
    """Raise ValueError unless a model_index.json lists a UNet and a scheduler of diffusers, and nothing else."""
    parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None}
    if sorted(parts) != ["scheduler", "unet"]:
        raise ValueError(f"a {shown(index['_class_name'])} of {some(sorted(parts))}; {TAKES}")
    own = [
        f"{part} is {shown(str(v[1]))} of {shown(str(v[0]))}"
        for part, v in sorted(parts.items())
        if v[0] != "diffusers"
    ]
    if own:
        raise ValueError(f"its {own[0]}, and code that comes with a pipeline is not run; {TAKES}")
    other = other_noise(parts["scheduler"][1])
    if other:
        raise ValueError(f"a {shown(index['_class_name'])} of scheduler, unet: {other}; {TAKES}")


def other_noise(name: Any) -> str | None:
    """Return in words why a class of schedulers has no table of discrete noise, None where it may have one."""
    return next((f"{shown(name)} {what}" for part, what in OTHER_NOISE.items() if part in str(name)), None)


def check_scheduler(s: dict[str, Any]) -> str:
    """Return what a scheduler of settings `s` says that the UNet predicts, one of PREDICTS.

    Raises ValueError for a scheduler whose noise or prediction this family does not know.
    """
    other = other_noise(s["_class_name"])
    if other:
        raise ValueError(f"its scheduler {other}; {TAKES}")
    kind = s.get("prediction_type", "sample" if s.get("predict_epsilon") is False else "epsilon")  # the older spelling
    if kind not in PREDICTS:
        raise ValueError(f"its scheduler's prediction_type is {shown(kind)}, not {', '.join(PREDICTS)}; {TAKES}")
    if s.get("timestep_type") == "continuous":
        raise ValueError(f"its scheduler's timestep_type is continuous: the unet is told levels of noise; {TAKES}")
    if s.get("use_flow_sigmas"):
        raise ValueError(f"its scheduler's use_flow_sigmas is true: it is a flow; {TAKES}")
    trained = s.get("trained_betas")
    if trained is not None and not (isinstance(trained, list) and trained and all(map(is_number, trained))):
        raise ValueError("its scheduler's trained_betas are no list of numbers; get its scheduler_config.json again")
    steps = s.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 < steps <= 100_000:
        raise ValueError(
            f"its scheduler's num_train_timesteps is {shown(steps)}, not 2 to 100000; get its "
            "scheduler_config.json again"
        )
    return kind


def is_number(value: Any) -> bool:
    """Whether a value out of JSON is a number; true and false are none."""
    return type(value) in (int, float)


def check_unet(s: dict[str, Any]) -> None:
    """Raise ValueError unless a UNet of settings `s` is unconditional and draws square pictures in RGB."""
    channels, out, blocks = s.get("in_channels", 3), s.get("out_channels", 3), s.get("down_block_types", ())
    size = edge(s)
    halvings = len(blocks) - 1 if isinstance(blocks, list) else 0
    why = (
        f"its unet is a {shown(s['_class_name'])}"
        if s["_class_name"] != "UNet2DModel"
        else "it takes a class"
        if s.get("num_class_embeds") or s.get("class_embed_type")
        else "it draws grey pictures (1 channel), and this family reads RGB only"
        if channels == 1
        else f"it takes {shown(channels)} channels, not 3"
        if channels != 3
        else f"it gives {shown(out)} channels, not 3, or 6 with a variance"
        if out not in (3, 6)
        else "it is told levels of noise, not steps (time_embedding_type fourier)"
        if s.get("time_embedding_type") == "fourier"
        else f"its sample_size is {shown(s.get('sample_size'))}, not one number"
        if size is None
        else f"its sample_size {shown(size)} cannot be halved {halvings} times"
        if size % 2 ** min(halvings, 32)
        else None
    )
    if why:
        raise ValueError(f"{why}; {TAKES}")


def edge(s: Mapping[str, Any]) -> int | None:
    """Return the edge in pixels of the square pictures that a UNet of settings `s` draws, None for other pictures."""
    size = s.get("sample_size")
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if type(size) is int and 0 < size <= 4096 else None


def variant(folder: Path) -> str | None:
    """Return the variant to load, such as fp16, where a folder has only weights of variants, else None."""
    found: set[str | None] = set()
    for path in [*folder.glob("unet/*"), *folder.glob("*")]:
        m = WEIGHTS.fullmatch(path.name)
        if m and not SHARD.search(m["variant"] or ""):
            found.add(m["variant"])
    return (
        None
        if None in found
        else min((name for name in found if name), key=lambda name: (name != "fp16", name), default=None)
    )
