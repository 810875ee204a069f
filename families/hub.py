"""The Hugging Face hub, as every family that downloads a checkpoint asks it. Imports nothing heavy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from families.family import Place
from my.errors import STORAGE_HINTS, UserError, first_line

OFFLINE = "no network, or the hub cannot be reached"
GB = 1e9
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def fetch(place: Place, download: Callable[[str], Path], instead: str) -> Path:
    """Return the path of a checkpoint, which is downloaded first where `place` has no path.

    `download(repo)` returns the folder of a repository; what it raises counts as a reason why there is none.
    `instead` says what a person can do instead. Raises UserError where no repository can be had, and OSError for a
    full disk and for missing permissions.
    """
    if place.path is not None:
        return place.path
    reasons = []
    for repo in place.repos:
        try:
            return download(repo)
        except Exception as error:  # a connection that breaks has many names, in libraries that change
            if getattr(error, "errno", None) in STORAGE_HINTS:
                raise
            reasons.append(f"{repo}: {reason(error)}")
    raise UserError(f"{place.flag}: nothing at {place.missed}; on the hub: {'; '.join(reasons)}; {instead}")


def in_cache(repo: str, patterns: Sequence[str]) -> Path | None:
    """Return the folder of a repository in the hub's cache on this machine, or None; it may lack some files.

    `patterns` are of the names of the files that are needed.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def reason(error: BaseException) -> str:
    """Return in words why the hub did not give a repository; what caused the error is looked at too."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    offline = "HF_HUB_OFFLINE is set, and it is not in the hub's cache here" if constants.HF_HUB_OFFLINE else OFFLINE
    for kinds, words in (
        (hub.GatedRepoError, "gated: accept its licence on its page, then run `hf auth login`"),
        (hub.RepositoryNotFoundError, "gone, private, or never there"),
        ((hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled), offline),
        (hub.HFValidationError, "not a repository's id"),
    ):
        if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
            return words
    return first_line(error)


def problem(repo: str, timeout: float) -> str | None:
    """Return in words why the hub would not give a repository, None where it would; asks within `timeout` seconds."""
    from huggingface_hub import HfApi

    try:
        if getattr(HfApi().model_info(repo, timeout=timeout), "gated", False):
            HfApi().auth_check(repo)  # everybody may read its description, but not its files
    except Exception as error:  # noqa: BLE001 (the library raises as many kinds as there are ways to break a connection)
        return reason(error)
    return None


def cache() -> tuple[Path, float]:
    """Return the folder of the hub's cache on this machine, and how many GB are free there."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return folder, shutil.disk_usage(there).free / GB
