"""The Stable Diffusion family: five parts, wherever they were loaded from, the miniature's included."""

import bisect
import re
from contextlib import nullcontext

import torch

from adapt import ScoreAdapter, denoised, scheduler_sigmas
from my.errors import RunError, UserError, note, shown
from sd.find import PARTS, fetch, find_checkpoint, refuse_unknown_words
from sd.load import load_parts


class StableDiffusionAdapter(ScoreAdapter):
    """Score of a latent diffusion model: tokenizer, CLIP text encoder, UNet, VAE and noise schedule.

    `parts` holds the five diffusers components by name. `amp` is the dtype that the UNet is
    evaluated in under autocast, or None. `offload_text` frees the text encoder at `text_done`.
    """

    def __init__(self, parts, device="cpu", amp=None, offload_text=False):
        self.device = torch.device(device)
        self.tokenizer, self.text_encoder, self.unet, self.vae, scheduler = (parts[name] for name in PARTS)
        for net in (self.text_encoder, self.unet, self.vae):
            net.to(self.device).eval().requires_grad_(False)
        self.amp, self.offload_text = amp, offload_text
        self.sigmas = scheduler_sigmas(scheduler)
        self.prediction_type = scheduler.config.prediction_type
        size = self.unet.config.sample_size
        self.data_shape = (self.unet.config.in_channels, size, size)
        self.scaling = self.vae.config.scaling_factor

    @property
    def picture_size(self):
        return self.data_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _denoise(self, x, sigma, cond):
        x_in = (1 + sigma**2) ** -0.5 * x
        with self._autocast():
            out = self.unet(x_in.to(self.unet.dtype), self.timestep(sigma), cond.to(self.unet.dtype)).sample.float()
        return denoised(x, sigma, out, self.prediction_type)

    def _autocast(self):
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    @torch.no_grad()
    def embed(self, prompts):
        """Return the text encoder's last hidden state (B, L, D) of each prompt; RunError after `text_done` freed it."""
        if self.text_encoder is None:
            raise RunError("the text encoder has been freed; start with --sd.offload_text False")
        refuse_unknown_words({f"the prompt {p!r}": [p] for p in prompts}, self.tokenizer.init_kwargs)
        length, longest = self.tokenizer.model_max_length, max(prompts, key=self.n_tokens)
        if self.n_tokens(longest) > length:
            note(f"{shown(longest)} has {self.n_tokens(longest)} tokens, and the text encoder reads the first {length}")
        ids = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.float()

    def n_tokens(self, text):
        """Return how many tokens a text has, those that begin and end it included."""
        return len(self.tokenizer(text, verbose=False).input_ids)

    def fitting(self, prompt, spoken):
        """Return the prompt, cut so that the text encoder reads every text of `spoken(prompt)` whole.

        It is cut between words, where these are not too long. Raises UserError where there is no room for any of it.
        """
        length = self.tokenizer.model_max_length

        def longest(n):
            return max(map(self.n_tokens, spoken(prompt[:n])))

        tokens = longest(len(prompt))
        if tokens <= length:
            return prompt
        for ends in ([m.end() for m in re.finditer(r"\S+", prompt)], range(1, len(prompt))):
            n = bisect.bisect_right(ends, length, key=longest)
            if n:
                break
        else:
            raise UserError(
                f"--pose.view_style suffix: with its view words, the prompt has {tokens} tokens, and the "
                f"text encoder reads {length}: no room is left for the prompt; give shorter words with "
                "--pose.view_texts"
            )
        kept = prompt[: ends[n - 1]].rstrip(" ,;.")
        note(
            f"the prompt has {tokens} tokens with its view words, and the text encoder reads {length}: so that the "
            f"view words stay, its own end is left out: {shown(prompt[len(kept) :].strip(' ,;.'))}"
        )
        return kept

    def text_done(self):
        if self.offload_text:
            self.text_encoder = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def encode(self, pictures):
        x = (2 * pictures - 1).to(self.vae.dtype)
        return (self.vae.encode(x).latent_dist.mean * self.scaling).float()

    def decode(self, x):
        pictures = self.vae.decode((x / self.scaling).to(self.vae.dtype)).sample
        return ((pictures.float() + 1) / 2).clamp(0, 1)


def precision_dtypes(precision, device):
    """Return (weights dtype, autocast dtype or None) of an `sd.precision` on a device type."""
    if precision == "autocast":
        return torch.float32, torch.float16 if device == "cuda" else None
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision], None


def make(cfg, device):
    """Return the Stable Diffusion adapter of a run's configuration; on the device "meta", one without weights."""
    device = torch.device(device)
    dtype, amp = precision_dtypes(cfg.sd.precision, device.type)
    if dtype == torch.float16 and device.type == "cpu":
        note("--sd.precision fp16 is very slow on a CPU; autocast, the default, is float32 there")
    offload = device.type == "cuda" if cfg.sd.offload_text is None else cfg.sd.offload_text
    path = fetch(find_checkpoint(cfg.sd))
    variant = cfg.sd.variant if cfg.sd.checkpoint is not None and cfg.where_asked("sd.variant") else None
    parts = load_parts(path, cfg.sd, dtype, empty=device.type == "meta", variant=variant)
    try:
        return StableDiffusionAdapter(parts, device, amp, offload)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
