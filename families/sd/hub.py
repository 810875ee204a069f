"""Stable Diffusion on the Hugging Face hub: which repositories are tried, its cache here, and the download.

No heavy imports: huggingface_hub is imported when a repository is looked for.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from families import hub
from families.family import WITHOUT, Place
from families.sd.diffusers_folder import PARTS, has_vocabulary
from my.errors import STORAGE_HINTS, UserError, note

FILES = [
    "model_index.json",
    "tokenizer/*",
    "scheduler/*.json",
    "*/config.json",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]
NETWORKS = ("unet", "vae", "text_encoder")  # the parts that have weights


def table() -> dict[str, list[str]]:
    """Return {name: its repositories, in the order in which they are tried}, as in hub.yml."""
    return yaml.safe_load((Path(__file__).parent / "hub.yml").read_text())


def cached_place(place: Place) -> Place:
    """Return `place` with the path of its first repository that is complete in the hub's cache on this machine.

    A place that has a path, or that has no repository in the cache, is returned unchanged.
    """
    return place._replace(path=place.path or next(filter(None, map(cached, place.repos)), None))


def fetch(place: Place) -> Path:
    """Return the path of a checkpoint, which is downloaded first where `place` has no path.

    Raises UserError where no repository gives it, and OSError where the disk is full or must not be written.
    """
    if place.path is not None:
        return place.path
    reasons = []
    for repo in place.repos:
        folder, reason = _download(repo)
        if folder:
            return folder
        reasons.append(f"{repo}: {reason}")
    raise UserError(
        f"{place.flag}: nothing at {place.missed}; on the hub: {'; '.join(reasons)}; give a folder or a "
        f"file with --sd.checkpoint, or {WITHOUT}"
    )


def cached(repo: str) -> Path | None:
    """Return the folder of a repository that is complete in the hub's cache on this machine, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None
    complete = (
        all(list((folder / part).glob("*.json")) for part in PARTS)
        and all(list((folder / part).glob("*.safetensors")) for part in NETWORKS)
        and has_vocabulary(folder / "tokenizer")
    )
    return folder if complete else None


def _download(repo: str) -> tuple[Path | None, str]:
    """Return (the folder of a repository, ""), or (None, the reason why there is none)."""
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        note(f"{repo} is looked for on the hub, to be downloaded: some 3 to 6 GB")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=FILES, etag_timeout=5))
    except Exception as error:  # a broken connection raises many classes, and they change with the library's version
        if getattr(error, "errno", None) in STORAGE_HINTS:
            raise  # the command ends with a line about the disk or the permission
        return None, hub.reason(error)
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    return (None, f"it has no {', '.join(missing)}") if missing else (folder, "")
