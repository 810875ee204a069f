"""What a diffusers folder of Stable Diffusion must contain, and how its small JSON files are read. No heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from families.family import WITHOUT
from my import plain_files
from my.errors import UserError

PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


def whole(folder: Path, flag: str, parts: Sequence[str] = PARTS) -> Path:
    """Return `folder` if it has a subfolder for each of `parts`; raises UserError, which begins with `flag`, if not."""
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing == ["vae"]:
        raise UserError(f"{flag}: {folder} has no vae; give one with --sd.vae FILE_OR_FOLDER")
    if missing:
        raise UserError(
            f"{flag}: {folder} is no diffusers folder of Stable Diffusion: it has no {', '.join(missing)}; "
            f"give such a folder, or a .safetensors or .ckpt file, or {WITHOUT}"
        )
    return folder


def has_vocabulary(tokenizer: Path) -> bool:
    """Return whether a tokenizer's folder has a vocabulary. Some folders have the tokenizer's settings only."""
    return (tokenizer / "tokenizer.json").is_file() or (tokenizer / "vocab.json").is_file()


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Return the dict in a JSON file of a folder.

    Raises ValueError, which names the file, where the file cannot be read as a dict or lacks one of `keys`. Raises
    OSError where there is no such file.
    """
    try:
        return plain_files.read_json(path, keys)
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name} {error}") from None
