"""The published models of guided-diffusion: architectures, names of files, and their folder. Imports nothing heavy.

Options have the names of the published training commands (arXiv 2105.05233). Two names are our own, as shapes tell
more: `attends` says of each level of resolution, from the finest on, whether it has attention; `n_classes` is the
number of classes, or None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from families.family import WITHOUT
from my.env import ENV, data_root
from my.errors import UserError

MODELS = "diffusion_ckpts/guided_ddpm/models"  # below the data root of env.json
N_CLASSES = 1000  # of ImageNet
MULTIPLES = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}  # image_size -> channel_mult in the published trainers (32: improved-diffusion, arXiv 2102.09672)

SETTINGS: dict[str, Any] = {
    "num_heads": 4,
    "num_head_channels": None,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
    "predict_xstart": False,
}  # what no shape tells, with the default of the trainers
OPTIONS: dict[str, Any] = {
    "num_channels": 256,
    "num_res_blocks": 2,
    "n_classes": N_CLASSES,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "conv_resample": True,
    **SETTINGS,
    "num_heads": None,
    "num_head_channels": 64,
}


def model(image_size: int, **changes: Any) -> dict[str, Any]:
    """Return the options of a published model. All of them have attention at edges of 32, 16 and 8 pixels."""
    levels = MULTIPLES[image_size]
    return (
        OPTIONS
        | {
            "image_size": image_size,
            "channel_mult": levels,
            "attends": tuple(image_size >> i in (32, 16, 8) for i in range(len(levels))),
        }
        | changes
    )


PUBLISHED = {
    "m_imgnet_64": model(64, num_channels=192, num_res_blocks=3, use_new_attention_order=True, noise_schedule="cosine"),
    "m_imgnet_128": model(128, num_heads=4, num_head_channels=None),
    "m_imgnet_256": model(256),
    "m_imgnet_256_uncond": model(256, n_classes=None),
    "m_imgnet_512": model(512),
    "m_lsun_256": model(256, n_classes=None),
}
FILES = {
    "m_imgnet_64": ("64x64_diffusion.pt", "64x64_classifier.pt"),
    "m_imgnet_128": ("128x128_diffusion.pt", "128x128_classifier.pt"),
    "m_imgnet_256": ("256x256_diffusion.pt", "256x256_classifier.pt"),
    "m_imgnet_256_uncond": ("256x256_diffusion_uncond.pt", "256x256_classifier.pt"),
    "m_imgnet_512": ("512x512_diffusion.pt", "512x512_classifier.pt"),
}  # model -> published names of its UNet and its classifier
LSUN_FILES = {
    "bedroom": "lsun_bedroom.pt",
    "cat": "lsun_cat.pt",
    "horse": "lsun_horse.pt",
    "horse_nodropout": "lsun_horse_nodropout.pt",
    "ffhq": "ffhq.pt",
}  # category -> published name of the UNet; ffhq has faces (arXiv 2112.03126)


def find(name: str, file: str, flags: str, instead: str = "--gddpm.checkpoint FILE takes it from elsewhere; ") -> Path:
    """Return the path of the published file of the model `name`; raises UserError where there is none.

    It is in the folder MODELS, or in a folder of the name of the model in there. `flags` are the options that ask for
    the file, and `instead` tells of others.
    """
    tried = [data_root() / MODELS / file, data_root() / MODELS / name / file]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(
        f"{flags}: no file {tried[0]}, nor {tried[1]}; download {file} of guided-diffusion to there (data "
        f"root: {ENV}); {instead}or {WITHOUT}"
    )


def n_classes(name: str) -> int | None:
    """Return the number of classes of which a published model needs one, None where it takes no class."""
    return PUBLISHED[name]["n_classes"]


def known_checkpoints() -> list[Path]:
    """Return the paths of the published files that are below the data root."""
    names = {name for pair in FILES.values() for name in pair} | set(LSUN_FILES.values())
    return sorted(path for path in (data_root() / MODELS).rglob("*.pt") if path.name in names)
