"""Which files and which weight an --sd.lora means. It names a file, or the folder of an adapter. No heavy imports."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

from my.errors import UserError, some
from my.file_system import expanded

CONFIG = "adapter_config.json"  # peft writes it beside the weights
PEFT_STEM = "adapter_model"
WEIGHTS = tuple((f"{stem}.safetensors", f"{stem}.bin") for stem in (PEFT_STEM, "pytorch_lora_weights"))
PARTS = ("unet", "text_encoder")  # subfolders that hold an adapter each; together they are one LoRA
ENDINGS = (".safetensors", ".bin", ".pt", ".ckpt")


class LoRA(NamedTuple):
    """One LoRA: the file or folder that was given, its weight, and its files of tensors."""

    path: Path
    weight: float
    files: tuple[Path, ...]


def split(text: str) -> tuple[Path, float]:
    """Return (path, weight) of PATH or PATH:WEIGHT. A colon that no number follows, as in C:, belongs to the path."""
    path, colon, weight = text.rpartition(":")
    try:
        return expanded(path if colon else text), float(weight) if colon else 1.0
    except ValueError:
        return expanded(text), 1.0


def names_file(text: str) -> bool:
    """Return whether an --sd.lora has a path, not only a weight."""
    return split(text.strip())[0] != Path()


def absolute(text: str) -> str:
    """Return an --sd.lora with an absolute path. A weight of 1 is left out where the text means the same without it."""
    if not names_file(text):
        return text
    given, weight = split(text)
    path = os.path.abspath(given)
    return path if split(path) == (Path(path), weight) else f"{path}:{weight:.12g}"


def read(text: str) -> LoRA:
    """Return the LoRA that an --sd.lora means; raises UserError where there is no such file or folder of one LoRA."""
    path, weight = split(text)
    if not names_file(text):
        raise UserError(f"--sd.lora: {text!r} names no file; give PATH or PATH:WEIGHT, several with commas between")
    if not os.path.exists(path):
        raise UserError(
            f"--sd.lora {text}: no such file: {path}; give PATH or PATH:WEIGHT of a .safetensors file or "
            "an adapter's folder"
        )
    if not math.isfinite(weight):
        raise UserError(f"--sd.lora {text}: the weight must be a finite number")
    return LoRA(path, weight, tuple(files_of(path)))


def files_of(path: Path) -> list[Path]:
    """Return the files of tensors of one LoRA, which is given as a file or as a folder.

    A folder is one LoRA in three cases: it holds an adapter under the names of peft or of diffusers; its subfolders
    `unet` and `text_encoder` hold one adapter each; or it holds a single file of tensors. Raises UserError for every
    other folder.
    """
    if not path.is_dir():
        return [path]
    here, label = _adapters(path), f"--sd.lora {path}"
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    below = {folder.name: found for folder in folders if (found := _adapters(folder))}
    parts = {name: found for name, found in below.items() if name in PARTS}
    chosen = here + sum(parts.values(), [])
    if not chosen:
        chosen = _only(path) + sum(below.values(), [])
    if len(chosen) == 1 or len(chosen) == len(parts) > 1:
        return chosen
    if chosen:
        names = [str(file.relative_to(path)) for file in chosen]
        raise UserError(
            f"{label}: a folder of {len(chosen)} LoRAs or files of weights: {some(names, 2)}; give one of "
            "them by its path"
        )
    if (path / "model_index.json").is_file():
        raise UserError(f"{label}: no LoRA, but the diffusers folder of a model; give it as --sd.checkpoint")
    if (path / CONFIG).is_file():
        raise UserError(f"{label}: has {CONFIG}, but no {WEIGHTS[0][0]} or .bin beside it; get the folder again")
    raise UserError(
        f"{label}: a folder without a LoRA: it has no {WEIGHTS[0][0]} and no {WEIGHTS[1][0]}; give a file, "
        "or an adapter's folder"
    )


def _adapters(folder: Path) -> list[Path]:
    """Return the weights of the adapters in a folder that have peft's or diffusers' names.

    Of a .safetensors and a .bin under the same name, only the .safetensors is returned.
    """
    found = ([folder / name for name in names if (folder / name).is_file()][:1] for names in WEIGHTS)
    return sum(found, [])


def _only(folder: Path) -> list[Path]:
    """Return the files of tensors in a folder; where some are .safetensors, only these."""
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file())
    return [file for file in files if file.suffix == ENDINGS[0]] or files
