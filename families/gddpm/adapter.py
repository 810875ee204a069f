"""The guided-DDPM family: OpenAI's pixel-space models of ImageNet, LSUN and faces (arXiv 2105.05233)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from adapt import Level, PixelAdapter, denoised
from families.calls import NetworkCall
from families.gddpm.published import N_CLASSES
from families.gddpm.unet import NoisyClassifier, build_unet, convert, halve, published_shapes
from families.placement import half_precision, image_layout, place, widened
from karras import iddpm_sigmas, linear_betas, sigmas_from_betas
from my.errors import UserError, note, shown

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

    from families.gddpm.files import Network
    from families.gddpm.options import Found
    from options.family import FamilyConfig

Net = TypeVar("Net", bound=torch.nn.Module)

N_LEVELS = 1000  # noise levels of the published models, for which schedules and rescaled timesteps are defined
SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": lambda n: sigmas_from_betas(linear_betas(1e-4 * N_LEVELS / n, 0.02 * N_LEVELS / n, n)),
    "cosine": iddpm_sigmas,
}


class GuidedDDPMAdapter(PixelAdapter):
    """Score of a UNet with or without classes, guided by a classifier of noisy pictures where there is one.

    Conditions (B,) are classes, -1 for none. A prompt that is a number is that class. Any other prompt is the class
    `default`, as this family reads no words. `dtype` is the number format inside the UNet, and `compiled` has
    torch.compile compile it. The networks are told the number of a noise level, from 0 to `n_levels` - 1. Where
    `rescaled`, they are told that number times 1000 / `n_levels`. The UNet predicts the noise, or the picture where
    `predicts` is "sample".
    """

    free_guidance = False

    def __init__(
        self,
        unet: UNet2DModel,
        schedule: str = "linear",
        default: int = -1,
        classifier: NoisyClassifier | None = None,
        cls_scaling: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        n_levels: int = N_LEVELS,
        rescaled: bool = False,
        predicts: str = "epsilon",
        compiled: bool = False,
    ) -> None:
        self.device, self.unet, self.classifier, self.dtype = torch.device(device), unet, classifier, dtype
        if dtype != torch.float32:
            halve(unet, dtype)
        for net in filter(None, (unet, classifier)):
            place(net, self.device)
        self.network = NetworkCall(unet, self._call, compiled)
        self.default, self.cls_scaling = default, cls_scaling
        self.sigmas = torch.as_tensor(SCHEDULES[schedule](n_levels))
        self.step, self.predicts = N_LEVELS / n_levels if rescaled else 1, predicts
        self.n_classes = unet.config["num_class_embeds"] or (classifier.n_labels if classifier else N_CLASSES)
        size = unet.config["sample_size"]
        self.data_shape = (3, size, size)

    @property
    def is_exact(self) -> bool:
        return self.dtype == torch.float32

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        with self.network.plain(), widened(self.unet):
            yield

    def embed(self, prompts: list[str]) -> torch.Tensor:
        """Return the class (B,) of each prompt; raises UserError for a number that is no class of the model."""
        classes = [int(p) if p.strip().isdecimal() else self.default for p in prompts]
        for c in classes:
            if c >= self.n_classes:
                raise UserError(f"class {shown(c)}: must be 0 to {self.n_classes - 1}")
        return torch.tensor(classes, device=self.device)

    def keep_pictures(self, device: torch.device) -> None:
        super().keep_pictures(device)
        del self.unet, self.classifier, self.network

    def told(self, x: torch.Tensor, sigma: Level) -> torch.Tensor:
        """Return the timesteps (B,) that the networks are told for x (B, 3, H, W) at sigma."""
        if isinstance(sigma, torch.Tensor):
            return self.timestep_on_device(sigma) * self.step
        return torch.full((len(x),), self.timestep(sigma) * self.step, device=x.device)

    def _denoise(self, x: torch.Tensor, sigma: Level, cond: torch.Tensor) -> torch.Tensor:
        """Return D by the UNet and the classifier. The last three of six channels, a learned variance, are not read."""
        t = self.told(x, sigma)
        x_in = ((1 + sigma**2) ** -0.5 * x).contiguous(memory_format=image_layout(self.device))
        D = denoised(x, sigma, self.network(x_in, t, cond)[:, :3], self.predicts)
        if self.classifier is None or not self.cls_scaling:
            return D
        return D + sigma**2 * self.cls_scaling * self.classifier_score(x, sigma, cond)

    def _call(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Return what the UNet gives (B, 3 or 6, H, W)."""
        classes = None if self.unet.class_embedding is None else cond
        return self.unet(x, t, class_labels=classes).sample

    def classifier_score(self, x: torch.Tensor, sigma: Level, y: torch.Tensor) -> torch.Tensor:
        """Return grad_x log p(y | x / sqrt(1 + sigma^2)) (B, 3, H, W). Source: arXiv 2105.05233, section 4."""
        assert self.classifier is not None  # else `_denoise` does not ask
        t = self.told(x, sigma)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = self.classifier((1 + sigma**2) ** -0.5 * x, t).log_softmax(dim=1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]


def load(kind: Callable[[dict[str, Any]], Net], net: Network) -> Net:
    """Return the network `kind(options)` with the weights of its file; raises UserError where these do not fit it."""
    built, there, file = kind(net.options), net.shapes, net.file
    here = published_shapes(built, net.options)
    wrong = [name for name in sorted(there.keys() | here.keys()) if there.get(name, ()) != here.get(name)]
    if wrong:
        what = f"{list(here[wrong[0]])} is meant" if wrong[0] in here else "nothing of that name is meant"
        found = shown(list(there[wrong[0]])) if wrong[0] in there else "absent"
        raise UserError(
            f"{file.label}: no guided-diffusion model of one architecture: {shown(wrong[0])} is {found}, "
            f"where {what} ({len(wrong)} such); give another file"
        )
    whole = file.quantised(net.prefix + name for name in there)
    if whole:
        raise UserError(f"{file.label}: {shown(whole[0])} is of whole numbers; give the file before it was quantised")
    state = {name: file.tensor(net.prefix + name) for name in there}
    built.load_state_dict(convert(state, built, net.options), assign=True)
    return built


def make(run: FamilyConfig, found: Found, device: torch.device | str) -> GuidedDDPMAdapter:
    """Return the guided-DDPM adapter of a run's configuration and of what `Options.check` found."""
    given, net = found.options, found.unet
    for words in net.notes:
        note(words)
    classifier = load(NoisyClassifier, found.classifier) if found.classifier else None
    dtype = half_precision(torch.device(device)) if given.precision == "auto" else torch.float32
    o = net.options
    return GuidedDDPMAdapter(
        load(build_unet, net),
        o["noise_schedule"],
        given.imgnet_cat,
        classifier,
        run.cls_scaling,
        device,
        dtype,
        o["diffusion_steps"],
        o["rescale_timesteps"],
        "sample" if o["predict_xstart"] else "epsilon",
        run.compile,
    )
