"""Which files an --sd.lora means, and with which weight: a file, or the folder of an adapter. Imports nothing heavy."""

import math
import os
from pathlib import Path

from my.errors import UserError, some

CONFIG = "adapter_config.json"  # of peft, beside its weights
PEFT_STEM = "adapter_model"
WEIGHTS = tuple((f"{stem}.safetensors", f"{stem}.bin") for stem in (PEFT_STEM, "pytorch_lora_weights"))
PARTS = ("unet", "text_encoder")  # subfolders that hold an adapter each, both of one LoRA
ENDINGS = (".safetensors", ".bin", ".pt", ".ckpt")


def split(text):
    """Return (path, weight) of a PATH or PATH:WEIGHT; the colon of a drive such as C: is the path's own."""
    path, colon, weight = text.rpartition(":")
    try:
        return expanded(path if colon else text), float(weight) if colon else 1.0
    except ValueError:
        return expanded(text), 1.0


def expanded(text):
    """Return the path that a text means, ~ being home; it need not be one that can exist."""
    return Path(os.path.expanduser(text))


def names_file(text):
    """Whether an --sd.lora is more than a weight."""
    return split(text.strip())[0] != Path()


def absolute(text):
    """Return an --sd.lora that holds in any folder, a weight of 1 left out where that reads as the same."""
    if not names_file(text):
        return text
    given, weight = split(text)
    path = os.path.abspath(given)
    return path if split(path) == (Path(path), weight) else f"{path}:{weight:.12g}"


def read(text):
    """Return (path, weight) of an --sd.lora; raises UserError where it is no file, and no folder of one LoRA."""
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
    files_of(path)
    return path, weight


def files_of(path):
    """Return the paths of the files of one LoRA, given as a file or as a folder.

    A folder is an adapter's own (peft's or diffusers' names), holds subfolders `unet` and `text_encoder` that
    are, or has one file of tensors. Raises UserError for a folder that tells no one LoRA.
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


def _adapters(folder):
    """Return the weights of the adapters in a folder, by the names of peft and of diffusers; safe ones come first."""
    found = ([folder / name for name in names if (folder / name).is_file()][:1] for names in WEIGHTS)
    return sum(found, [])


def _only(folder):
    """Return the files of tensors in a folder, .safetensors alone where there are any."""
    files = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file())
    return [file for file in files if file.suffix == ENDINGS[0]] or files
