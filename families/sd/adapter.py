"""The adapter of Stable Diffusion: the denoiser that the five parts make, the embedded miniature's included."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from adapt import ScoreAdapter, denoised, scheduler_sigmas
from families.sd.diffusers_folder import PARTS
from families.sd.hub import fetch
from families.sd.load import load_parts
from families.sd.networks import Parts
from families.sd.prompts import refuse_unknown_words
from my.errors import RunError, UserError, note, shown

if TYPE_CHECKING:
    from families.sd.find import Found
    from options.family import FamilyConfig


class StableDiffusionAdapter(ScoreAdapter):
    """Score of a latent diffusion model: tokenizer, CLIP text encoder, UNet, VAE and noise schedule.

    `parts` holds the five components of diffusers and transformers by name. `amp` is the dtype that autocast gives the
    UNet, None for no autocast. With `offload_text`, `text_done` frees the text encoder.
    """

    def __init__(
        self,
        parts: Parts,
        device: str | torch.device = "cpu",
        amp: torch.dtype | None = None,
        offload_text: bool = False,
    ) -> None:
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
    def picture_size(self) -> int:
        return self.data_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _denoise(self, x: torch.Tensor, sigma: float, cond: torch.Tensor) -> torch.Tensor:
        x_in = (1 + sigma**2) ** -0.5 * x
        with self._autocast():
            out = self.unet(x_in.to(self.unet.dtype), self.timestep(sigma), cond.to(self.unet.dtype)).sample.float()
        return denoised(x, sigma, out, self.prediction_type)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the text encoder's last hidden state (B, L, D) of the prompts.

        Raises RunError after `text_done` has freed the text encoder, and UserError for a word that a closed vocabulary
        lacks.
        """
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

    def n_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, the tokens for its start and its end included."""
        return len(self.tokenizer(text, verbose=False).input_ids)

    def fitting(self, prompt: str, spoken: Callable[[str], Sequence[str]]) -> str:
        """Return the prompt, its end cut so that the text encoder reads every text of `spoken(prompt)` to its end.

        The cut is between two words, or inside the first word where that word alone is too long. Raises UserError
        where no character of the prompt fits.
        """
        length = self.tokenizer.model_max_length

        def longest(n: int) -> int:
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

    def text_done(self) -> None:
        if self.offload_text:
            self.text_encoder = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        x = (2 * pictures - 1).to(self.vae.dtype)
        return (self.vae.encode(x).latent_dist.mean * self.scaling).float()

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        pictures = self.vae.decode((x / self.scaling).to(self.vae.dtype)).sample
        return ((pictures.float() + 1) / 2).clamp(0, 1)


def precision_dtypes(precision: str, device: str) -> tuple[torch.dtype, torch.dtype | None]:
    """Return (dtype of the weights, dtype of autocast or None) for an --sd.precision on a type of device."""
    if precision == "autocast":
        return torch.float32, torch.float16 if device == "cuda" else None
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision], None


def make(run: FamilyConfig, found: Found, device: str | torch.device) -> StableDiffusionAdapter:
    """Return the adapter of a run whose files are `found`; on the device "meta" its networks have no weights."""
    options: Any = run.chosen  # this family's own options
    device = torch.device(device)
    dtype, amp = precision_dtypes(options.precision, device.type)
    if dtype == torch.float16 and device.type == "cpu":
        note("--sd.precision fp16 is very slow on a CPU; autocast, the default, is float32 there")
    offload = device.type == "cuda" if options.offload_text is None else options.offload_text
    path = fetch(found.place)
    variant = options.variant if options.checkpoint is not None and run.where_asked("sd.variant") else None
    parts = load_parts(path, found, options, dtype, empty=device.type == "meta", variant=variant)
    try:
        return StableDiffusionAdapter(parts, device, amp, offload)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
