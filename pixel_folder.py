"""Pixel-space diffusion models on disk, and the published ones' architectures. Imports nothing heavy."""

import json
from pathlib import Path

from my.env import ENV, data_root
from my.errors import UserError

MODELS = "diffusion_ckpts/guided_ddpm/models"  # below the data root of env.json
N_CLASSES = 1000  # of ImageNet
TAKES = ("this family takes pixel-space pipelines of a unet and a discrete scheduler, such as "
         "google/ddpm-cifar10-32")
WITHOUT = "get going without one: --preset mini or --preset ideal"

OPTIONS = {"num_channels": 256, "num_res_blocks": 2, "attention_resolutions": (32, 16, 8), "num_head_channels": 64,
           "num_heads": None, "use_new_attention_order": False, "class_cond": True, "noise_schedule": "linear"}
AT_256 = {"image_size": 256, "channel_mult": (1, 1, 2, 2, 4, 4)}
PUBLISHED = {
    "m_imgnet_64": OPTIONS | {"image_size": 64, "channel_mult": (1, 2, 3, 4), "num_channels": 192, "num_res_blocks": 3,
                              "use_new_attention_order": True, "noise_schedule": "cosine"},
    "m_imgnet_128": OPTIONS | {"image_size": 128, "channel_mult": (1, 1, 2, 3, 4), "num_heads": 4},
    "m_imgnet_256": OPTIONS | AT_256,
    "m_imgnet_256_uncond": OPTIONS | AT_256 | {"class_cond": False},
    "m_imgnet_512": OPTIONS | {"image_size": 512, "channel_mult": (0.5, 1, 1, 2, 2, 4, 4)},
    "m_lsun_256": OPTIONS | AT_256 | {"class_cond": False},
}  # of the published sampling commands (arXiv 2105.05233); all learn sigma, scale and shift, and resample in blocks
FILES = {"m_imgnet_64": ("64x64_diffusion.pt", "64x64_classifier.pt"),
         "m_imgnet_128": ("128x128_diffusion.pt", "128x128_classifier.pt"),
         "m_imgnet_256": ("256x256_diffusion.pt", "256x256_classifier.pt"),
         "m_imgnet_256_uncond": ("256x256_diffusion_uncond.pt", "256x256_classifier.pt"),
         "m_imgnet_512": ("512x512_diffusion.pt", "512x512_classifier.pt")}  # by their published names
LSUN_FILES = {"bedroom": "lsun_bedroom.pt", "cat": "lsun_cat.pt", "horse": "lsun_horse.pt",
              "horse_nodropout": "lsun_horse_nodropout.pt", "ffhq": "ffhq.pt"}  # faces: the same UNet, arXiv 2112.03126


def classifier_options(model):
    """Return the options of the published noisy classifier of a model's resolution."""
    return PUBLISHED[model] | {"num_channels": 128, "num_res_blocks": 4 if model == "m_imgnet_64" else 2,
                               "num_heads": None, "use_new_attention_order": False, "class_cond": False}


def find_unet(gddpm):
    """Return the file of the UNet that the options `gddpm` mean; raises UserError saying where it looked."""
    if gddpm.checkpoint is not None:
        path = Path(gddpm.checkpoint).expanduser()
        if not path.is_file():
            why = "that is a folder" if path.is_dir() else "no such file"
            raise UserError(f"--gddpm.checkpoint {gddpm.checkpoint}: {why}; give a guided-diffusion .pt file, or "
                            f"{WITHOUT}")
        return path
    if gddpm.model in FILES:
        return find_published(gddpm.model, FILES[gddpm.model][0], f"--gddpm.model {gddpm.model}")
    return find_published(gddpm.model, LSUN_FILES[gddpm.lsun_cat],
                          f"--gddpm.model {gddpm.model} --gddpm.lsun_cat {gddpm.lsun_cat}")


def find_classifier(gddpm):
    """Return the file of the model's noisy classifier; raises UserError saying where it looked."""
    return find_published(gddpm.model, FILES[gddpm.model][1], "--cls_scaling above 0",
                          "--cls_scaling 0 draws without a classifier; ")


def find_published(model, name, flags, instead="--gddpm.checkpoint FILE takes it from elsewhere; "):
    """Return the path of a published file, in the models' folder or in its model's own there."""
    tried = [data_root() / MODELS / name, data_root() / MODELS / model / name]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"{flags}: no file {tried[0]}, nor {tried[1]}; download {name} of guided-diffusion to there (data "
                    f"root: {ENV}); {instead}or {WITHOUT}")


def published_files():
    """Return the paths of the published files that are there."""
    folder = data_root() / MODELS
    names = {name for pair in FILES.values() for name in pair} | set(LSUN_FILES.values())
    return sorted(path for path in folder.rglob("*.pt") if path.name in names)


def needs_classifier(gddpm, cls_scaling, classes):
    """Return whether drawing `classes`, -1 for none, takes a classifier; raises UserError for what cannot be drawn."""
    named = [c for c in classes if c >= 0]
    if named and gddpm.model not in FILES:
        raise UserError(f"ImageNet class {named[0]}: --gddpm.model {gddpm.model} knows none; use one of "
                        f"{', '.join(FILES)}")
    if not named and PUBLISHED[gddpm.model]["class_cond"]:
        raise UserError(f"--gddpm.model {gddpm.model} draws one class out of {N_CLASSES}: say which with "
                        f"--gddpm.imgnet_cat 0 to {N_CLASSES - 1}")
    return bool(named) and cls_scaling > 0


def find_pipeline(checkpoint):
    """Return the local folder, or the hub id, of a diffusers pipeline that is meant; raises UserError for neither."""
    if checkpoint is None:
        raise UserError("--family ddpm needs --ddpm.checkpoint: the folder or hub id of an unconditional diffusers "
                        "pipeline, such as google/ddpm-cifar10-32")
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        check_index(folder, f"--ddpm.checkpoint {checkpoint}")
        return str(folder)
    if folder.exists() or folder.is_absolute() or str(checkpoint).startswith((".", "~")) or checkpoint.count("/") != 1:
        why = "that is a file" if folder.exists() else "no such folder"
        raise UserError(f"--ddpm.checkpoint {checkpoint}: {why}; give the folder of a diffusers pipeline or a hub id, "
                        f"such as google/ddpm-cifar10-32, or {WITHOUT}")
    return checkpoint


def check_index(folder, flag):
    """Raise UserError unless the folder's model_index.json lists a UNet and a scheduler, and nothing else."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        parts = sorted(k for k, v in index.items() if isinstance(v, list) and v[0] is not None)
    except (OSError, ValueError, AttributeError, IndexError):
        raise UserError(f"{flag}: that folder has no model_index.json that can be read; give the folder of a diffusers "
                        f"pipeline, or {WITHOUT}") from None
    if parts != ["scheduler", "unet"]:
        raise UserError(f"{flag}: a {index.get('_class_name')} of {', '.join(parts)}; {TAKES}")
    settings = folder / "scheduler" / "scheduler_config.json"
    if settings.is_file() and '"_class_name"' not in settings.read_text(errors="replace"):  # diffusers would guess all
        raise UserError(f"{flag}: {settings} is not what diffusers writes there; get that file again")
