"""Where the files of a Stable Diffusion are that the options mean. No heavy imports.

Every file is looked for once, by `find`. Its result, `Found`, is handed on to whatever loads the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from families.family import WITHOUT, Place
from families.hub import HUB_ID
from families.sd import diffusers_folder, hub, lora_files, prompts
from families.sd.lora_files import LoRA
from my.env import ENV, data_root
from my.errors import UserError
from my.file_system import expanded

if TYPE_CHECKING:
    from families.sd.options import Options

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "mini_sd"
PUBLISHED = {
    ("v1", False): "diffusion_ckpts/stable_diffusion/sd-v1-5",
    ("v2", False): "diffusion_ckpts/sd2/512-base-ema",
    ("v2", True): "diffusion_ckpts/sd2/768-v-ema",
}  # (sd.variant, sd.v2_highres) -> published file under the data root of env.json, without its ending
ENDINGS = (".ckpt", ".safetensors", "")  # "" is a diffusers folder
URL = re.compile(r"https?://(?:(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?$)?", re.IGNORECASE)


class Found(NamedTuple):
    """The files of a run: the checkpoint, the VAE that replaces the checkpoint's own (or None), and the LoRAs."""

    place: Place
    vae: Path | None = None
    loras: tuple[LoRA, ...] = ()


def check(options: Options, told: Mapping[str, Sequence[str]] | None = None) -> Found:
    """Return the files that the options mean.

    `told` is {option: texts}: all texts that the model will be told. By default these are the two prompts of `options`.
    Raises UserError for a file that is not there, and for a word that the model cannot know.
    """
    found = find(options)
    if found.place.path is not None and found.place.path.is_dir():
        tokenizer = found.place.path / "tokenizer" / "tokenizer_config.json"
        try:
            prompts.refuse_unknown_words(
                prompts_of(options) if told is None else told, diffusers_folder.read_json(tokenizer)
            )
        except (OSError, ValueError, TypeError, RecursionError):
            pass  # the file is damaged: loading it says how
    return found


def find(options: Options) -> Found:
    """Return the files that the options mean; raises UserError for one that is not there."""
    loras = tuple(lora_files.read(text) for text in options.lora)
    vae = None if options.vae is None else vae_place(options.vae)
    return Found(hub.cached_place(find_checkpoint(options)), vae, loras)


def known_checkpoints() -> list[Path]:
    """Return the published checkpoints below the data root and in the hub's cache."""
    root = data_root()
    paths = [p for base in PUBLISHED.values() for p in with_endings(root / base) if p.exists()]
    repos = dict.fromkeys(repo for repos in hub.table().values() for repo in repos)
    return paths + list(filter(None, map(hub.cached, repos)))


def prompts_of(options: Options) -> dict[str, list[str]]:
    """Return {option: texts} of the two prompts among the options."""
    return {"--sd.prompt": [options.prompt], "--sd.negative_prompt": [options.negative_prompt]}


# ---------------------------------------------------------------- the checkpoint


def find_checkpoint(options: Options) -> Place:
    """Return the Place of the checkpoint that the options mean.

    Raises UserError where the checkpoint is not there, where a folder lacks a part, and for an option that has no
    effect on such a checkpoint.
    """
    if options.v2_highres and options.variant != "v2":
        raise UserError(
            "--sd.v2_highres True: only --sd.variant v2 has it; of a --sd.checkpoint, say "
            "--sd.prediction_type v_prediction"
        )
    place = _place(options)
    if place.path is None or place.path.is_dir():
        given = {
            "--sd.ema True": options.ema,
            "--sd.v2_highres True": options.v2_highres and options.checkpoint is not None,
        }
        for flag in (flag for flag, here in given.items() if here):
            raise UserError(
                f"{flag}: {place.flag} is no single file, and this option has an effect on single files only; leave "
                "it out"
            )
    return place


def _place(options: Options) -> Place:
    """Return the Place of an --sd.checkpoint, or else of the variant."""
    parts = [part for part in diffusers_folder.PARTS if part != "vae" or options.vae is None]
    if options.checkpoint is not None:
        return _given(options.checkpoint, parts)
    if options.variant == "mini":
        return Place("--sd.variant mini", diffusers_folder.whole(MINI, "--sd.variant mini", parts))
    highres = options.v2_highres and options.variant == "v2"
    flag = f"--sd.variant {options.variant}" + " --sd.v2_highres True" * highres
    base = data_root() / PUBLISHED[options.variant, highres]
    for path in with_endings(base):
        if path.exists():
            return Place(flag, diffusers_folder.whole(path, flag, parts) if path.is_dir() else path)
    repos = hub.table()["v2_highres" if highres else options.variant]
    return Place(flag, repos=tuple(repos), missed=f"{base}.ckpt (data root: {ENV})")


def with_endings(base: Path) -> list[Path]:
    """Return the three paths at which a published checkpoint may be: two kinds of file, and a folder."""
    return [base.with_name(base.name + ending) for ending in ENDINGS]


def _given(text: str, parts: Sequence[str]) -> Place:
    """Return the Place of an --sd.checkpoint; a file or folder on disk comes before a hub id of the same name."""
    flag, path, url = f"--sd.checkpoint {text}", expanded(text), URL.match(text)
    if not text.strip():
        raise UserError(f"--sd.checkpoint is empty; give a folder, a file or a hub id ORG/NAME, or {WITHOUT}")
    if url:
        instead = f"give the hub id {url[1]}" if url[1] else "download the file, and give its path"
        raise UserError(f"{flag}: a web address; {instead}")
    if os.path.isfile(path):
        return Place(flag, path)
    if os.path.isdir(path):
        return Place(flag, diffusers_folder.whole(path, flag, parts))
    if is_hub_id(text):
        return Place(flag, repos=tuple(hub.table().get(text, [text])), missed=str(path.absolute()))
    raise UserError(
        f"{flag}: looked for a diffusers folder or a file at {path}: no such file or folder; give one, or "
        f"a hub id ORG/NAME, or {WITHOUT}"
    )


def is_hub_id(text: str) -> bool:
    """Return whether an --sd.checkpoint is a hub id: it has the form ORG/NAME, and no file or folder has that name."""
    return (
        bool(HUB_ID.fullmatch(text))
        and not os.path.exists(expanded(text))
        and Path(text).suffix.lower() not in (".ckpt", ".safetensors", ".pt", ".bin")
    )


# ---------------------------------------------------------------- the VAE


def vae_place(text: str) -> Path:
    """Return the path that an --sd.vae means: a file, or the folder that holds the VAE's config.json.

    The option may also name the folder of a whole model, whose VAE is in its subfolder `vae`. Raises UserError where
    there is neither a file nor such a folder.
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


# ---------------------------------------------------------------- paths that hold in any folder


def absolute(options: Options) -> Options:
    """Make the paths among the options absolute, and return the options; a hub id is not changed."""
    given = options.checkpoint
    if given is not None and given.strip() and not URL.match(given) and not is_hub_id(given):
        options.checkpoint = os.path.abspath(expanded(given))
    if options.vae is not None and options.vae.strip():
        options.vae = os.path.abspath(expanded(options.vae))
    options.lora = [lora_files.absolute(text) for text in options.lora]
    return options
