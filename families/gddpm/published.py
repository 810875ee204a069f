"""The published models of guided-diffusion: architectures, names of files, where they lie. Imports nothing heavy.

Options go by the names of the published training commands (arXiv 2105.05233), but for two that shapes tell more of:
`attends`, whether each level of resolution attends, from the finest on, and `n_classes`, None for no class.
"""

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
}  # channel_mult by image_size, of these trainers (32: improved-diffusion, 2102.09672)

SETTINGS = {
    "num_heads": 4,
    "num_head_channels": None,
    "use_new_attention_order": False,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "rescale_timesteps": False,
    "predict_xstart": False,
}  # by default; in no shape
OPTIONS = {
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


def model(image_size, **changes):
    """Return the options of a published model, all of which attend at edges of 32, 16 and 8 pixels."""
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
}  # by their published names
LSUN_FILES = {
    "bedroom": "lsun_bedroom.pt",
    "cat": "lsun_cat.pt",
    "horse": "lsun_horse.pt",
    "horse_nodropout": "lsun_horse_nodropout.pt",
    "ffhq": "ffhq.pt",
}  # faces: the same UNet, arXiv 2112.03126


def find(name, file, flags, instead="--gddpm.checkpoint FILE takes it from elsewhere; "):
    """Return the path of a published file, in the models' folder or in its model's own there, or raise UserError."""
    tried = [data_root() / MODELS / file, data_root() / MODELS / name / file]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(
        f"{flags}: no file {tried[0]}, nor {tried[1]}; download {file} of guided-diffusion to there (data "
        f"root: {ENV}); {instead}or {WITHOUT}"
    )


def n_classes(name):
    """Return how many classes a published model must be told one of, None for none."""
    return PUBLISHED[name]["n_classes"]


def known_checkpoints():
    """Return the paths of the published files that are there."""
    names = {name for pair in FILES.values() for name in pair} | set(LSUN_FILES.values())
    return sorted(path for path in (data_root() / MODELS).rglob("*.pt") if path.name in names)
