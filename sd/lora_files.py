"""Which files an --sd.lora means, and with which weight: a file, or the folder of an adapter. Imports nothing heavy."""

import math
import os
import re
from pathlib import Path

from my.errors import UserError, some

CONFIG = "adapter_config.json"  # of peft, beside its weights
PEFT_STEM = "adapter_model"
WEIGHTS = tuple(f"{stem}{ending}" for stem in (PEFT_STEM, "pytorch_lora_weights") for ending in (".safetensors", ".bin"))
PARTS = ("unet", "text_encoder")  # subfolders that hold an adapter each, both of one LoRA
ENDINGS = (".safetensors", ".bin", ".pt", ".ckpt")
TAG = re.compile(r"<(?:lora|lyco):([^:<>]{1,200})(?::([^<>]{0,20}))?[^<>]{0,40}>")  # in a prompt, for a web UI


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
        raise UserError(f"--sd.lora {text}: no such file: {path}; give PATH or PATH:WEIGHT of a .safetensors file or an "
                        "adapter's folder")
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
    own = _adapter(path)
    if own:
        return [own]
    below = {folder.name: file for folder in sorted(path.iterdir()) if folder.is_dir() and (file := _adapter(folder))}
    if below and (set(below) <= set(PARTS) or len(below) == 1):
        return list(below.values())
    files = sorted(file.name for file in path.iterdir() if file.suffix in ENDINGS and file.is_file())
    if not below and len(files) == 1:
        return [path / files[0]]
    label = f"--sd.lora {path}"
    if (path / CONFIG).is_file():
        raise UserError(f"{label}: has {CONFIG}, but no {PEFT_STEM}.safetensors or .bin beside it; get the folder again")
    if below or files:
        raise UserError(f"{label}: a folder of {len(below) + len(files)} LoRAs or files of weights: "
                        f"{some([*below, *files], 2)}; give one of them by its path")
    raise UserError(f"{label}: a folder without a LoRA: it has no {WEIGHTS[0]} and no {WEIGHTS[2]}; give a file, or an "
                    "adapter's folder")


def _adapter(folder):
    """Return the weights of the adapter in a folder, by the names that peft and diffusers give them, or None."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def refuse_tags(prompts):
    """Raise UserError where a prompt of {option: texts} asks for a LoRA as web UIs do, which would be read as words."""
    for option, texts in prompts.items():
        for tag in filter(None, map(TAG.search, texts)):
            raise UserError(f"{option}: {tag[0]!r} would be read as words here; leave it out, and give the LoRA's file: "
                            f"--sd.lora {tag[1]}.safetensors{f':{tag[2]}' if tag[2] else ''}")
