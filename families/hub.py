"""The Hugging Face hub, as every family that downloads a checkpoint asks it. Imports nothing heavy."""

from __future__ import annotations

import shutil
from pathlib import Path

from my.errors import first_line

OFFLINE = "no network, or the hub cannot be reached"
GB = 1e9


def reason(error: Exception) -> str:
    """Return in words why the hub did not give a repository."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    offline = "HF_HUB_OFFLINE is set, and it is not in the hub's cache here" if constants.HF_HUB_OFFLINE else OFFLINE
    for kinds, words in (
        (hub.GatedRepoError, "gated: accept its licence on its page, then run `hf auth login`"),
        (hub.RepositoryNotFoundError, "gone, private, or never there"),
        ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled), offline),
        (hub.HFValidationError, "not a repository's id"),
    ):
        if isinstance(error, kinds):
            return words
    return first_line(error)


def problem(repo: str, timeout: float) -> str | None:
    """Return in words why the hub would not give a repository, None where it would; asks within `timeout` seconds."""
    from huggingface_hub import HfApi

    try:
        if getattr(HfApi().model_info(repo, timeout=timeout), "gated", False):
            HfApi().auth_check(repo)  # its description is for everybody, its files are not
    except Exception as error:  # the library raises as many kinds as there are ways to break a connection
        return reason(error)
    return None


def cache() -> tuple[Path, float]:
    """Return the folder of the hub's cache on this machine, and how many GB are free there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return folder, shutil.disk_usage(there).free / GB
