"""Stable Diffusion on the Hugging Face hub: which repositories are tried, its cache here, and the download.

No heavy imports: huggingface_hub is imported when a repository is looked for.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from families import hub
from families.family import WITHOUT, Place
from families.sd.diffusers_folder import PARTS, has_vocabulary
from my.errors import note

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
    return yaml.safe_load((Path(__file__).parent / "hub.yml").read_text(encoding="utf-8"))


def cached_place(place: Place) -> Place:
    """Return `place` with the path of its first repository that is complete in the hub's cache on this machine.

    A place that has a path, or that has no repository in the cache, is returned unchanged.
    """
    return place._replace(path=place.path or next(filter(None, map(cached, place.repos)), None))


def fetch(place: Place) -> Path:
    """Return the path of a checkpoint, as `families.hub.fetch` does."""
    return hub.fetch(place, download, f"give a folder or a file with --sd.checkpoint, or {WITHOUT}")


def cached(repo: str) -> Path | None:
    """Return the folder of a repository that is complete in the hub's cache on this machine, or None."""
    folder = hub.in_cache(repo, FILES)
    complete = (
        folder is not None
        and all(list((folder / part).glob("*.json")) for part in PARTS)
        and all(list((folder / part).glob("*.safetensors")) for part in NETWORKS)
        and has_vocabulary(folder / "tokenizer")
    )
    return folder if complete else None


def download(repo: str) -> Path:
    """Return the folder of a repository, downloaded; raises ValueError where it lacks a part."""
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        note(f"{repo} is looked for on the hub, to be downloaded: some 3 to 6 GB")
    folder = Path(snapshot_download(repo, allow_patterns=FILES, etag_timeout=5))
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    return folder
