"""The DDPM family: unconditional pixel-space pipelines of diffusers, such as those of CIFAR-10, LSUN and CelebA-HQ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapt import Level, PixelAdapter, denoised, scheduler_sigmas
from families import hub
from families.calls import NetworkCall
from families.ddpm import pipeline
from families.family import WITHOUT
from families.libraries import reason
from families.placement import image_layout, place
from my.errors import UserError, note

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from families.ddpm.options import Found
    from options.family import FamilyConfig


class DDPMAdapter(PixelAdapter):
    """Score of an unconditional UNet at its scheduler's noise levels; every prompt has the same, empty, condition.

    With `compiled`, torch.compile compiles the UNet.
    """

    free_guidance = False

    def __init__(
        self, unet: UNet2DModel, scheduler: Any, device: torch.device | str = "cpu", compiled: bool = False
    ) -> None:
        self.device = torch.device(device)
        place(unet, self.device)
        self.unet = unet
        self.network = NetworkCall(unet, lambda x, t: unet(x, t).sample, compiled)
        self.sigmas = scheduler_sigmas(scheduler)
        self.prediction_type = scheduler.config.prediction_type
        size = pipeline.edge(unet.config)
        assert size is not None  # `pipeline.check_unet` refused it
        self.data_shape = (unet.config["in_channels"], size, size)

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return one empty condition (B, 0) per prompt."""
        return torch.empty(len(prompts), 0, device=self.device)

    def keep_pictures(self, device: torch.device) -> None:
        super().keep_pictures(device)
        del self.unet, self.network

    def _denoise(self, x: torch.Tensor, sigma: Level, cond: torch.Tensor) -> torch.Tensor:
        x_in = ((1 + sigma**2) ** -0.5 * x).contiguous(memory_format=image_layout(self.device))
        out = self.network(x_in, self.timestep_on_device(sigma))[:, : x.shape[1]]
        return denoised(x, sigma, out, self.prediction_type)


def load(found: pipeline.Pipeline) -> tuple[UNet2DModel, Any]:
    """Return (unet in float32, scheduler) of a pipeline; raises UserError where they cannot be read or used."""
    from diffusers import DiffusionPipeline

    quiet()
    try:
        pipe = DiffusionPipeline.from_pretrained(found.folder, variant=found.variant)
    except Exception as error:  # noqa: BLE001 (a damaged folder can make the library raise anything)
        raise UserError(
            f"{found.flag}: cannot be read as a diffusers pipeline: {reason(error)}; get it again, or {WITHOUT}"
        ) from None
    if found.variant:
        note(f"{found.flag}: has only weights of the variant {found.variant}: these are taken")
    unet, scheduler = pipe.components["unet"], pipe.components["scheduler"]
    if any(p.is_meta for p in unet.parameters()):
        raise UserError(f"{found.flag}: some of its weights are missing; get it again, or {WITHOUT}")
    if not hasattr(scheduler, "betas"):
        kind = type(scheduler).__name__
        raise UserError(f"{found.flag}: its scheduler, a {kind}, has no table of betas; {pipeline.TAKES}")
    scheduler.register_to_config(prediction_type=found.prediction)  # diffusers ignores the older spelling
    return unet.float(), scheduler


def quiet() -> None:
    """Keep diffusers from writing to stderr: what goes wrong is said here, and old weights as .bin are fine."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)


def download(repo: str) -> Path:
    """Return the folder of a pipeline of the hub, downloaded where it is not whole in the cache."""
    from diffusers import DiffusionPipeline

    quiet()
    return Path(DiffusionPipeline.download(repo))


def make(run: FamilyConfig, found: Found, device: torch.device | str) -> DDPMAdapter:
    """Return the DDPM adapter of what `Options.check` found."""
    flag = found.place.flag
    there = found.pipeline or pipeline.read(flag, hub.fetch(found.place, download, f"{pipeline.INSTEAD}, or {WITHOUT}"))
    unet, scheduler = load(there)
    try:
        return DDPMAdapter(unet, scheduler, device, run.compile)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
