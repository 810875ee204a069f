"""The guided-DDPM family: OpenAI's pixel-space models of ImageNet, LSUN and faces (arXiv 2105.05233)."""

from contextlib import nullcontext

import torch

import pixel_folder
from adapt import PixelAdapter, denoised
from gddpm_unet import NoisyClassifier, build_unet, convert, published_shapes
from karras import iddpm_sigmas, linear_betas, sigmas_from_betas
from my import checkpoint
from my.errors import UserError
from my.tensor_file import TensorFile

N_LEVELS = 1000
SCHEDULES = {"linear": lambda: sigmas_from_betas(linear_betas(1e-4, 0.02, N_LEVELS)),
             "cosine": lambda: iddpm_sigmas(N_LEVELS)}


class GuidedDDPMAdapter(PixelAdapter):
    """Score of a class-conditional or unconditional UNet, guided by a classifier of noisy pictures where given.

    Conditions (B,) are ImageNet classes, -1 for none: a prompt that is a number is that class, any
    other is class `default`, as words mean nothing to this family. `amp` is the dtype that the UNet
    is evaluated in under autocast, or None.
    """

    free_guidance = False

    def __init__(self, unet, schedule="linear", default=-1, classifier=None, cls_scaling=0.0, device="cpu", amp=None):
        self.device = torch.device(device)
        self.unet, self.classifier = (net and net.to(self.device).eval().requires_grad_(False)
                                      for net in (unet, classifier))
        self.default, self.cls_scaling, self.amp = default, cls_scaling, amp
        self.sigmas = torch.as_tensor(SCHEDULES[schedule]())
        size = unet.config.sample_size
        self.data_shape = (3, size, size)

    def embed(self, prompts):
        """Return the class (B,) of each prompt; raises UserError for a number that is none."""
        classes = [int(p) if p.strip().isdecimal() else self.default for p in prompts]
        for c in classes:
            if c >= pixel_folder.N_CLASSES:
                raise UserError(f"class {c}: must be 0 to {pixel_folder.N_CLASSES - 1}")
        return torch.tensor(classes, device=self.device)

    def _denoise(self, x, sigma, cond):
        """Precondition the UNet, whose last three channels are its learned variance; guide by the classifier."""
        t = torch.full((len(x),), self.timestep(sigma), device=x.device)
        x_in = (1 + sigma**2) ** -0.5 * x
        with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
            out = self.unet(x_in, t, class_labels=None if self.unet.class_embedding is None else cond).sample.float()
        D = denoised(x, sigma, out[:, :3])
        if self.classifier is None or not self.cls_scaling:
            return D
        return D + sigma**2 * self.cls_scaling * self.classifier_score(x, sigma, cond)

    def classifier_score(self, x, sigma, y):
        """Return grad_x log p(y | x / sqrt(1 + sigma^2)) (B, 3, H, W). Source: arXiv 2105.05233, section 4."""
        t = torch.full((len(x),), self.timestep(sigma), device=x.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = self.classifier((1 + sigma**2) ** -0.5 * x, t).log_softmax(dim=1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]


def load(net, path, options):
    """Return a network of `options` with the weights of a published file; raises UserError where they do not fit."""
    file = TensorFile(path)
    state = {name: file.tensor(name) for name in file.shapes}
    try:
        checkpoint.check(state, published_shapes(net, options))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    net.load_state_dict(convert(state, net, options), assign=True)
    return net


def make(cfg, device):
    """Return the guided-DDPM adapter of a run's configuration."""
    g = cfg.gddpm
    options, classifier = pixel_folder.PUBLISHED[g.model], None
    if pixel_folder.needs_classifier(g, cfg.cls_scaling, cfg.drawn_classes()):
        theirs = pixel_folder.classifier_options(g.model)
        classifier = load(NoisyClassifier(theirs), pixel_folder.find_classifier(g), theirs)
    amp = torch.float16 if g.precision == "autocast" and torch.device(device).type == "cuda" else None
    unet = load(build_unet(options), pixel_folder.find_unet(g), options)
    return GuidedDDPMAdapter(unet, options["noise_schedule"], g.imgnet_cat, classifier, cfg.cls_scaling, device, amp)
