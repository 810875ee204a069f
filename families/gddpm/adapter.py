"""The guided-DDPM family: OpenAI's pixel-space models of ImageNet, LSUN and faces (arXiv 2105.05233)."""

from contextlib import nullcontext

import torch

from adapt import PixelAdapter, denoised
from families.gddpm.published import N_CLASSES
from families.gddpm.unet import NoisyClassifier, build_unet, convert, published_shapes
from karras import iddpm_sigmas, linear_betas, sigmas_from_betas
from my.errors import UserError, note, shown

N_LEVELS = 1000  # of the published models, and what both schedules and rescaled timesteps are measured by
SCHEDULES = {
    "linear": lambda n: sigmas_from_betas(linear_betas(1e-4 * N_LEVELS / n, 0.02 * N_LEVELS / n, n)),
    "cosine": iddpm_sigmas,
}


class GuidedDDPMAdapter(PixelAdapter):
    """Score of a class-conditional or unconditional UNet, guided by a classifier of noisy pictures where given.

    Conditions (B,) are ImageNet classes, -1 for none: a prompt that is a number is that class, any
    other is class `default`, as words mean nothing to this family. `amp` is the dtype that the UNet
    is evaluated in under autocast, or None. `n_levels` of noise are numbered from 0, for the networks to
    n_levels - 1, or to less than 1000 where `rescaled`; the UNet predicts the noise, or the picture where
    `predicts` is "sample".
    """

    free_guidance = False

    def __init__(
        self,
        unet,
        schedule="linear",
        default=-1,
        classifier=None,
        cls_scaling=0.0,
        device="cpu",
        amp=None,
        n_levels=N_LEVELS,
        rescaled=False,
        predicts="epsilon",
    ):
        self.device = torch.device(device)
        self.unet, self.classifier = (
            net and net.to(self.device).eval().requires_grad_(False) for net in (unet, classifier)
        )
        self.default, self.cls_scaling, self.amp = default, cls_scaling, amp
        self.sigmas = torch.as_tensor(SCHEDULES[schedule](n_levels))
        self.step, self.predicts = N_LEVELS / n_levels if rescaled else 1, predicts
        self.n_classes = unet.config.num_class_embeds or (classifier.n_labels if classifier else N_CLASSES)
        size = unet.config.sample_size
        self.data_shape = (3, size, size)

    def embed(self, prompts):
        """Return the class (B,) of each prompt; raises UserError for a number that is none."""
        classes = [int(p) if p.strip().isdecimal() else self.default for p in prompts]
        for c in classes:
            if c >= self.n_classes:
                raise UserError(f"class {shown(c)}: must be 0 to {self.n_classes - 1}")
        return torch.tensor(classes, device=self.device)

    def told(self, x, sigma):
        """Return the timesteps (B,) that networks are told for x (B, 3, H, W) at sigma."""
        return torch.full((len(x),), self.timestep(sigma) * self.step, device=x.device)

    def _denoise(self, x, sigma, cond):
        """Precondition the UNet, whose last three of six channels are a learned variance; guide by the classifier."""
        t = self.told(x, sigma)
        x_in = (1 + sigma**2) ** -0.5 * x
        with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
            out = self.unet(x_in, t, class_labels=None if self.unet.class_embedding is None else cond).sample.float()
        D = denoised(x, sigma, out[:, :3], self.predicts)
        if self.classifier is None or not self.cls_scaling:
            return D
        return D + sigma**2 * self.cls_scaling * self.classifier_score(x, sigma, cond)

    def classifier_score(self, x, sigma, y):
        """Return grad_x log p(y | x / sqrt(1 + sigma^2)) (B, 3, H, W). Source: arXiv 2105.05233, section 4."""
        t = self.told(x, sigma)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = self.classifier((1 + sigma**2) ** -0.5 * x, t).log_softmax(dim=1)
            return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x)[0]


def load(kind, net):
    """Return a network, `kind` of the options of the Network `net`, with its file's weights; UserError for a misfit."""
    built, there, file = kind(net.options), net.shapes, net.file
    here = {name: tuple(shape) for name, shape in published_shapes(built, net.options).items()}
    wrong = [name for name in sorted(there.keys() | here.keys()) if tuple(there.get(name, ())) != here.get(name)]
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


def make(run, found, device):
    """Return the guided-DDPM adapter of a run's configuration and of the `Found` of its options."""
    g, net = run.chosen, found.unet
    for words in net.notes:
        note(words)
    classifier = load(NoisyClassifier, found.classifier) if found.classifier else None
    amp = torch.float16 if g.precision == "autocast" and torch.device(device).type == "cuda" else None
    o = net.options
    return GuidedDDPMAdapter(
        load(build_unet, net),
        o["noise_schedule"],
        g.imgnet_cat,
        classifier,
        run.cls_scaling,
        device,
        amp,
        o["diffusion_steps"],
        o["rescale_timesteps"],
        "sample" if o["predict_xstart"] else "epsilon",
    )
