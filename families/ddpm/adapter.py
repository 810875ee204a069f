"""The DDPM family: unconditional pixel-space pipelines of diffusers, such as those of CIFAR-10, LSUN and CelebA-HQ."""

from pathlib import Path

import torch

from adapt import PixelAdapter, denoised, scheduler_sigmas
from families.ddpm import pipeline
from families.family import WITHOUT
from families.libraries import reason
from my.errors import UserError, note


class DDPMAdapter(PixelAdapter):
    """Score of an unconditional UNet and its scheduler's noise levels; every prompt has the same, empty, condition."""

    free_guidance = False

    def __init__(self, unet, scheduler, device="cpu"):
        self.device = torch.device(device)
        self.unet = unet.to(self.device).eval().requires_grad_(False)
        self.sigmas = scheduler_sigmas(scheduler)
        self.prediction_type = scheduler.config.prediction_type
        size = pipeline.edge(unet.config)
        self.data_shape = (unet.config.in_channels, size, size)

    def embed(self, prompts):
        """Return one empty condition (B, 0) per prompt."""
        return torch.empty(len(prompts), 0, device=self.device)

    def _denoise(self, x, sigma, cond):
        out = self.unet((1 + sigma**2) ** -0.5 * x, self.timestep(sigma)).sample[:, : x.shape[1]]
        return denoised(x, sigma, out, self.prediction_type)


def load(place):
    """Return the (unet, scheduler) of a pipeline's Place; raises UserError where that is no such pipeline."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below; old weights without safetensors are fine
    flag, folder = place.flag, place.path or download(place.repos[0], place.flag)
    variant = pipeline.variant(folder)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, variant=variant)
    except Exception as error:  # whatever a damaged folder makes of the library
        raise UserError(
            f"{flag}: cannot be read as a diffusers pipeline: {reason(error)}; get it again, or {WITHOUT}"
        ) from None
    if variant:
        note(f"{flag}: has no weights but those of variant {variant}, which are taken")
    unet, scheduler = pipe.components["unet"], pipe.components["scheduler"]
    if any(p.is_meta for p in unet.parameters()):
        raise UserError(f"{flag}: some of its weights are missing; get it again, or {WITHOUT}")
    if not hasattr(scheduler, "betas"):
        raise UserError(f"{flag}: its scheduler, a {type(scheduler).__name__}, has no table of betas; {pipeline.TAKES}")
    stated = pipeline.settings(Path(folder), "scheduler", "scheduler_config.json")
    scheduler.register_to_config(prediction_type=pipeline.predicts(stated))  # diffusers forgot the first spelling
    return unet.float(), scheduler


def download(repo, flag):
    """Return the local folder of a pipeline of the hub, whose small files are checked; UserError where it fails."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import constants

    try:
        folder = DiffusionPipeline.download(repo)
    except Exception:  # whatever the lack of a network makes of the library
        cause = "HF_HUB_OFFLINE, which is set" if constants.HF_HUB_OFFLINE else "the network"
        raise UserError(
            f"{flag}: cannot be read as a diffusers pipeline: not in the local cache, and not to be had "
            f"from the hub: look at the name, and at {cause}; or {WITHOUT}"
        ) from None
    pipeline.check(folder, flag)
    return folder


def make(run, found, device):
    """Return the DDPM adapter of a run's configuration and of the Place of its pipeline."""
    parts = load(found)
    try:
        return DDPMAdapter(*parts, device)
    except UserError as error:
        raise UserError(f"{found.flag}: {error}") from None
