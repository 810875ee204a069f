"""Where the CLIP is that an option means, and what its folder states. No heavy imports.

The weights are .safetensors: a pickle is never loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from families import hub
from families.family import Place
from families.libraries import refuse_endless
from my import plain_files
from my.errors import UserError, note, shown
from my.file_system import expanded
from my.tensor_file import TensorFile

FILES = ["*.json", "*.txt", "model*.safetensors"]  # of a repository, what is read
WHOLE = ["config.json", "model*.safetensors", "preprocessor_config.json", "tokenizer_config.json"]  # of what is cached
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
INSTEAD = (
    "give the folder of a CLIP of transformers, or the id of one on the hub, such as openai/clip-vit-large-patch14"
)
NOT_WEIGHTS = "position_ids"  # whole numbers that old CLIPs keep among their weights


class Found(NamedTuple):
    """A CLIP on this machine, whose small files were read."""

    flag: str  # the option and value that ask for it
    folder: Path
    config: dict[str, Any]  # of its networks
    preprocessor: dict[str, Any]  # of its pictures


def find(text: str, flag: str) -> Found:
    """Return the CLIP that the value of the option `flag` means: a folder, or a repository of the hub.

    Raises UserError where there is none, and for a folder that is no whole CLIP.
    """
    label, path = f"{flag} {text}", expanded(text)
    if text.strip() and os.path.isdir(path):
        return check(label, path)
    if not hub.HUB_ID.fullmatch(text) or os.path.exists(path):
        why = "that is a file" if os.path.isfile(path) else "no such folder"
        raise UserError(f"{label}: {why}; {INSTEAD}")
    there = hub.in_cache(text, FILES)
    whole = there and all(any(there.glob(name)) for name in WHOLE)
    place = Place(label, there if whole else None, (text,), missed=str(path.absolute()))
    return check(label, hub.fetch(place, download, INSTEAD))


def download(repo: str) -> Path:
    """Return the folder of a repository of the hub, downloaded where it is not in the cache."""
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        note(f"{repo} is looked for on the hub, to be downloaded: some 0.6 to 2 GB")
    return Path(snapshot_download(repo, allow_patterns=FILES, etag_timeout=5))


def check(label: str, folder: Path) -> Found:
    """Return what a CLIP's folder states; raises UserError, which begins with `label`, for a folder of another kind."""
    try:
        if not (folder / "config.json").is_file():
            raise ValueError("it has no config.json")
        config = settings(folder / "config.json")
        if config.get("model_type") != "clip":
            raise ValueError(f"its config.json states the model_type {shown(config.get('model_type'))}, not clip")
        files = weights(folder)
        for part in (config, *(config.get(f"{half}_config") for half in ("text", "vision"))):
            refuse_endless(part if isinstance(part, Mapping) else {}, files)
        names = {path.name for path in folder.iterdir()}
        if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
            raise ValueError("it has no tokenizer.json, and no vocab.json with merges.txt")
        return Found(label, folder, config, preprocessor(folder))
    except (ValueError, OSError) as error:
        raise UserError(f"{label}: no whole CLIP: {getattr(error, 'strerror', None) or error}; {INSTEAD}") from None


def settings(path: Path) -> dict[str, Any]:
    """Return the dict in a JSON file of a CLIP's folder; raises ValueError, which names the file."""
    try:
        return plain_files.read_json(path)
    except ValueError as error:
        raise ValueError(f"its {path.name} {error}") from None


def preprocessor(folder: Path) -> dict[str, Any]:
    """Return the settings of the preprocessor of pictures, from the file of either name that the library writes."""
    own, of_all = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.is_file():
        return settings(own)
    found = settings(of_all).get("image_processor") if of_all.is_file() else None
    if not isinstance(found, dict):
        raise ValueError("it has no preprocessor_config.json")
    return found


def weights(folder: Path) -> list[TensorFile]:
    """Return the files of weights of a CLIP's folder; raises ValueError where they are of another format."""
    names = sorted(path.name for path in folder.iterdir())
    if not {"model.safetensors", "model.safetensors.index.json"} & set(names):
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise ValueError(
                f"its weights are in a pickle only, {shown(pickles[0])}, which is not loaded; save them as "
                "model.safetensors, with save_pretrained of transformers,"
            )
        raise ValueError("it has no model.safetensors")
    files = [TensorFile(path) for path in sorted(folder.glob("model*.safetensors"))]
    for file in files:
        quantised = [name for name in file.quantised(file.shapes) if not name.endswith(NOT_WEIGHTS)]
        if quantised:
            raise ValueError(f"its weights are quantised, which is not supported: {shown(quantised[0])}, ...")
    return files
