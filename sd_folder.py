"""Where a Stable Diffusion is on disk, and what its files say before it is loaded. Imports nothing heavy."""

import json
from pathlib import Path

from my.errors import UserError

ROOT = Path(__file__).parent
MINI = ROOT / "mini_sd"
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
PUBLISHED = {
    ("v1", False): "diffusion_ckpts/stable_diffusion/sd-v1-5",
    ("v2", False): "diffusion_ckpts/sd2/512-base-ema",
    ("v2", True): "diffusion_ckpts/sd2/768-v-ema",
}  # (sd.variant, sd.v2_highres) -> diffusers folder under the data root of env.json
WITHOUT = "get going without one: --preset mini or --preset ideal"


def check(sd):
    """Raise UserError, at once, where the options `sd` mean no checkpoint, or have words that it cannot know."""
    config = find_checkpoint(sd) / "tokenizer" / "tokenizer_config.json"
    try:
        refuse_unknown_words([sd.prompt], read_json(config))
    except (OSError, ValueError):
        pass  # loading it says what is wrong


def find_checkpoint(sd):
    """Return the diffusers folder that the options `sd` mean; raises UserError saying where it looked."""
    if sd.checkpoint is not None:
        folder, flag = Path(sd.checkpoint).expanduser(), f"--sd.checkpoint {sd.checkpoint}"
    elif sd.variant == "mini":
        folder, flag = MINI, "--sd.variant mini"
    else:
        data_root = Path(json.loads((ROOT / "env.json").read_text())["data_root"]).expanduser()
        folder = data_root / PUBLISHED[sd.variant, sd.v2_highres and sd.variant == "v2"]
        flag = f"--sd.variant {sd.variant}"
    missing = [name for name in PARTS if not (folder / name).is_dir()]
    if missing:
        why = (f"it has no {', '.join(missing)}" if folder.is_dir()
               else "that is a file" if folder.exists() else "no such folder")
        raise UserError(f"{flag}: looked for a diffusers folder at {folder}: {why}; give one with "
                        f"--sd.checkpoint FOLDER (data root: {ROOT / 'env.json'}), or {WITHOUT}")
    return folder


def refuse_unknown_words(prompts, tokenizer_config):
    """Raise UserError for words of `prompts` that a tokenizer with a closed vocabulary does not have."""
    known = tokenizer_config.get("closed_vocabulary")
    unknown = sorted({w for p in prompts for w in p.lower().split() if w not in known}) if known else []
    if unknown:
        raise UserError(f"--sd.prompt: this model has no word for {', '.join(map(repr, unknown))}; it knows: "
                        f"{' '.join(known)}; for any other prompt give a real checkpoint: "
                        "--sd.checkpoint FOLDER or --sd.variant v1")


def read_json(path, *keys):
    """Return the dict in a JSON file; raises ValueError where it does not have `keys`."""
    found = json.loads(path.read_text())
    missing = [key for key in keys if key not in found]
    if missing:
        raise ValueError(f"{path.name} has no {', '.join(missing)}")
    return found
