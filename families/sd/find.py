"""Where a Stable Diffusion is, on disk or on the hub, and what its files say at once. Imports nothing heavy."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import yaml

from families import hub
from families.family import WITHOUT, Place
from families.sd import lora_files
from families.sd.lora_files import expanded
from my import plain_files
from my.env import ENV, data_root
from my.errors import STORAGE_HINTS, UserError, note, some

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "mini_sd"
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
PUBLISHED = {
    ("v1", False): "diffusion_ckpts/stable_diffusion/sd-v1-5",
    ("v2", False): "diffusion_ckpts/sd2/512-base-ema",
    ("v2", True): "diffusion_ckpts/sd2/768-v-ema",
}  # (sd.variant, sd.v2_highres) -> published file under the data root of env.json, without its ending
ENDINGS = (".ckpt", ".safetensors", "")  # "" is a diffusers folder
URL = re.compile(r"https?://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?$)?", re.IGNORECASE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = [
    "model_index.json",
    "tokenizer/*",
    "scheduler/*.json",
    "*/config.json",
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
]


class Found(NamedTuple):
    """What a run needs of Stable Diffusion: its checkpoint, a VAE to use instead, and LoRAs, each (path, weight)."""

    place: Place
    vae: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()


def check(sd, prompts=None):
    """Return the Found that the options `sd` mean.

    `prompts` are {option: texts} of all that the model will be told, by default those of `sd`. Raises UserError, at
    once, for what is not there, and for words that the model cannot know.
    """
    loras = tuple(lora_files.read(lora) for lora in sd.lora)
    vae = None if sd.vae is None else vae_place(sd.vae)
    prompts = prompts_of(sd) if prompts is None else prompts
    place = find_checkpoint(sd)
    if place.path is not None and place.path.is_dir():
        tokenizer = place.path / "tokenizer" / "tokenizer_config.json"
        try:
            refuse_unknown_words(prompts, read_json(tokenizer))
        except (OSError, ValueError, TypeError, RecursionError):
            pass  # loading it says what is wrong
    return Found(place, vae, loras)


def local(place):
    """Return the path of a checkpoint that is on this machine, in the hub's cache too, or None."""
    return place.path or next(filter(None, map(cached, place.repos)), None)


def known_checkpoints():
    """Return the published checkpoints below the data root and in the hub's cache."""
    root = data_root()
    paths = [p for base in PUBLISHED.values() for p in with_endings(root / base) if p.exists()]
    return paths + list(filter(None, map(cached, dict.fromkeys(r for repos in hub_table().values() for r in repos))))


def prompts_of(sd):
    """Return {option: texts} of the options `sd`."""
    return {"--sd.prompt": [sd.prompt], "--sd.negative_prompt": [sd.negative_prompt]}


def find_checkpoint(sd):
    """Return the Place that the options `sd` mean; raises UserError saying where it looked, or for what it has not."""
    if sd.v2_highres and sd.variant != "v2":
        raise UserError(
            "--sd.v2_highres True: only --sd.variant v2 has it; of a --sd.checkpoint, say "
            "--sd.prediction_type v_prediction"
        )
    found = _find(sd)
    if found.path is None or found.path.is_dir():
        options = {"--sd.ema True": sd.ema, "--sd.v2_highres True": sd.v2_highres and sd.checkpoint is not None}
        for option in (option for option, given in options.items() if given):
            raise UserError(
                f"{option}: {found.flag} is no single file, and only of one does this option say which "
                "weights are meant, or what they predict; leave it out"
            )
    return found


def _find(sd):
    parts = [part for part in PARTS if part != "vae" or sd.vae is None]
    if sd.checkpoint is not None:
        return _given(sd.checkpoint, parts)
    if sd.variant == "mini":
        return Place("--sd.variant mini", _whole_folder(MINI, "--sd.variant mini", parts))
    highres = sd.v2_highres and sd.variant == "v2"
    flag = f"--sd.variant {sd.variant}" + " --sd.v2_highres True" * highres
    base = data_root() / PUBLISHED[sd.variant, highres]
    for path in with_endings(base):
        if path.exists():
            return Place(flag, _whole_folder(path, flag, parts) if path.is_dir() else path)
    repos = hub_table()["v2_highres" if highres else sd.variant]
    return Place(flag, repos=tuple(repos), missed=f"{base}.ckpt (data root: {ENV})")


def with_endings(base):
    """Return the paths at which a published checkpoint may be: its two kinds of file, and a folder."""
    return [base.with_name(base.name + ending) for ending in ENDINGS]


def _given(text, parts):
    """Return the Place of an --sd.checkpoint: what is on disk comes before the hub's id of the same name."""
    flag, path, url = f"--sd.checkpoint {text}", expanded(text), URL.match(text)
    if not text.strip():
        raise UserError(f"--sd.checkpoint is empty; give a folder, a file or a hub id ORG/NAME, or {WITHOUT}")
    if url:
        instead = f"give the hub id {url[1]}" if url[1] else "download the file, and give its path"
        raise UserError(f"{flag}: a web address; {instead}")
    if os.path.isfile(path):
        return Place(flag, path)
    if os.path.isdir(path):
        return Place(flag, _whole_folder(path, flag, parts))
    if is_hub_id(text):
        return Place(flag, repos=tuple(hub_table().get(text, [text])), missed=str(path.absolute()))
    raise UserError(
        f"{flag}: looked for a diffusers folder or a file at {path}: no such file or folder; give one, or "
        f"a hub id ORG/NAME, or {WITHOUT}"
    )


def _whole_folder(folder, flag, parts):
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing == ["vae"]:
        raise UserError(f"{flag}: {folder} has no vae; give one with --sd.vae FILE_OR_FOLDER")
    if missing:
        raise UserError(
            f"{flag}: {folder} is no diffusers folder of Stable Diffusion: it has no {', '.join(missing)}; "
            f"give such a folder, or a .safetensors or .ckpt file, or {WITHOUT}"
        )
    return folder


def vae_place(text):
    """Return the path of an --sd.vae: a file, or the folder that has its config.json; raises UserError for neither.

    A folder may also be that of a whole model, with the VAE in `vae`.
    """
    path = expanded(text)
    if text.strip() and os.path.isfile(path):
        return path
    for folder in (path, path / "vae") if text.strip() else ():
        if os.path.isfile(folder / "config.json"):
            return folder
    there = text.strip() and os.path.isdir(path)
    lacks = "has no config.json, nor has a vae in it" if there else "no such file or folder"
    raise UserError(
        f"--sd.vae {text}: {lacks}; give a .safetensors, .ckpt or .pt file, a diffusers folder of a VAE, "
        "or of a whole model; one on the hub is to be downloaded first"
    )


def is_hub_id(text):
    """Whether an --sd.checkpoint reads as ORG/NAME, and is nothing on disk nor the name of a file."""
    return (
        bool(HUB_ID.fullmatch(text))
        and not os.path.exists(expanded(text))
        and Path(text).suffix.lower() not in (".ckpt", ".safetensors", ".pt", ".bin")
    )


def absolute(sd):
    """Return the options with paths that hold in any folder; a hub id stays one."""
    given = sd.checkpoint or ""
    if given.strip() and not URL.match(given) and not is_hub_id(given):
        sd.checkpoint = os.path.abspath(expanded(sd.checkpoint))
    if sd.vae is not None and sd.vae.strip():
        sd.vae = os.path.abspath(expanded(sd.vae))
    sd.lora = [lora_files.absolute(text) for text in sd.lora]
    return sd


def hub_table():
    """Return {name: repositories in the order they are to be tried}."""
    return yaml.safe_load((Path(__file__).parent / "hub.yml").read_text())


# ---------------------------------------------------------------- the hub


def fetch(place):
    """Return the path of a Place, downloaded first if it is on the hub only; raises UserError if none can be had."""
    if place.path is not None:
        return place.path
    for repo in place.repos:
        folder = cached(repo)
        if folder:
            return folder
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


def cached(repo):
    """Return the folder of a repository that is whole in the hub's cache on this machine, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=HUB_FILES, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None
    whole = all(list((folder / part).glob("*.json")) for part in PARTS) and has_vocabulary(folder / "tokenizer")
    return (
        folder
        if whole and all(list((folder / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder"))
        else None
    )


def has_vocabulary(tokenizer):
    """Whether a tokenizer's folder has its words, not its settings alone."""
    return (tokenizer / "tokenizer.json").is_file() or (tokenizer / "vocab.json").is_file()


def _download(repo):
    """Return (folder, None) or (None, reason)."""
    from huggingface_hub import constants, snapshot_download

    if not constants.HF_HUB_OFFLINE:
        note(f"{repo} is looked for on the hub, to be downloaded: some 3 to 6 GB")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=HUB_FILES, etag_timeout=5))
    except Exception as error:  # a connection that breaks has many names, in libraries that change
        if getattr(error, "errno", None) in STORAGE_HINTS:
            raise  # a full disk, no permission: said as such
        return None, hub.reason(error)
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    return (None, f"it has no {', '.join(missing)}") if missing else (folder, None)


# ---------------------------------------------------------------- small files


def refuse_unknown_words(prompts, tokenizer_config):
    """Raise UserError for words of `prompts` {option: texts} that a tokenizer's closed vocabulary does not have."""
    known = tokenizer_config.get("closed_vocabulary")
    for option, texts in prompts.items() if known else ():
        unknown = sorted({w for text in texts for w in text.lower().split() if w not in known})
        if unknown:
            bare = [w.strip(".,;:!?") for w in unknown]
            if all(w in known for w in bare):
                raise UserError(
                    f"{option}: this model knows words without punctuation only: write {some(bare)} instead "
                    f"of {some(unknown)}"
                )
            raise UserError(
                f"{option}: this model has no word for {', '.join(map(repr, unknown))}; it knows: "
                f"{' '.join(known)}; for other words give --sd.checkpoint PATH or "
                "--sd.variant v1"
            )


def read_json(path, *keys):
    """Return the dict in a JSON file of a folder; raises ValueError, naming it, where it does not have `keys`."""
    try:
        return plain_files.read_json(path, keys)
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name} {error}") from None
