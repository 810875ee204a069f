"""The DDPM family: unconditional pixel-space pipelines of diffusers, such as those of CIFAR-10, LSUN and CelebA-HQ."""

from pathlib import Path

import torch

import pixel_folder
from adapt import PixelAdapter, denoised, scheduler_sigmas
from my.errors import UserError
from sd.find import reason


class DDPMAdapter(PixelAdapter):
    """Score of an unconditional UNet and its scheduler's noise levels; every prompt has the same, empty, condition."""

    free_guidance = False

    def __init__(self, unet, scheduler, device="cpu"):
        self.device = torch.device(device)
        self.unet = unet.to(self.device).eval().requires_grad_(False)
        self.sigmas = scheduler_sigmas(scheduler)
        self.prediction_type = scheduler.config.prediction_type
        size = unet.config.sample_size
        self.data_shape = (unet.config.in_channels, size, size)

    def embed(self, prompts):
        """Return one empty condition (B, 0) a prompt."""
        return torch.empty(len(prompts), 0, device=self.device)

    def _denoise(self, x, sigma, cond):
        out = self.unet((1 + sigma**2) ** -0.5 * x, self.timestep(sigma)).sample[:, :x.shape[1]]
        return denoised(x, sigma, out, self.prediction_type)


def load(checkpoint):
    """Return the (unet, scheduler) of a diffusers folder or hub id; raises UserError where that is no such pipeline."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from huggingface_hub import constants

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below; old weights without safetensors are fine
    where = pixel_folder.find_pipeline(checkpoint)
    try:
        pipe = DiffusionPipeline.from_pretrained(where)
    except Exception as error:  # whatever a damaged folder, or the lack of a network, makes of the library
        why = reason(error)
        if not Path(where).is_dir():
            cause = "HF_HUB_OFFLINE, which is set" if constants.HF_HUB_OFFLINE else "the network"
            why = f"not in the local cache, and not to be had from the hub: look at the name, and at {cause}"
        raise UserError(f"--ddpm.checkpoint {checkpoint}: cannot be read as a diffusers pipeline: {why}; get it again, "
                        f"or {pixel_folder.WITHOUT}") from None
    parts = pipe.components
    if set(parts) != {"unet", "scheduler"} or not hasattr(parts["scheduler"], "betas"):
        raise UserError(f"--ddpm.checkpoint {checkpoint}: a {type(pipe).__name__} of {', '.join(sorted(parts))}; "
                        f"{pixel_folder.TAKES}")
    config = parts["unet"].config
    why = ("it takes a class" if config.get("num_class_embeds") or config.get("class_embed_type")
           else f"it takes {config.in_channels} channels" if config.in_channels != 3
           else f"its sample_size is {config.sample_size!r}, not one number" if type(config.sample_size) is not int
           else "some of its weights are missing" if any(p.is_meta for p in parts["unet"].parameters()) else None)
    if why:
        raise UserError(f"--ddpm.checkpoint {checkpoint}: {why}; {pixel_folder.TAKES}")
    return parts["unet"], parts["scheduler"]


def make(cfg, device):
    """Return the DDPM adapter of a run's configuration."""
    parts = load(cfg.ddpm.checkpoint)
    try:
        return DDPMAdapter(*parts, device)
    except UserError as error:
        raise UserError(f"--ddpm.checkpoint {cfg.ddpm.checkpoint}: {error}") from None
