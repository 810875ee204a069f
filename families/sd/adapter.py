"""The adapter of Stable Diffusion: the denoiser that the five parts make, the embedded miniature's included."""

from __future__ import annotations

import bisect
import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adapt import Level, ScoreAdapter, denoised, scheduler_sigmas
from families.calls import NetworkCall
from families.placement import half_precision, image_layout, place, visiting, widened
from families.sd.diffusers_folder import PARTS
from families.sd.hub import fetch
from families.sd.load import load_parts
from families.sd.networks import Parts
from families.sd.prompts import refuse_unknown_words
from my.errors import RunError, UserError, note, shown

if TYPE_CHECKING:
    from families.sd.find import Found
    from options.family import FamilyConfig


TILES = 2  # per edge of a picture, with --low_vram
SMALLEST_TILE = 4  # latent pixels: a quarter of a tile overlaps with the next one


class StableDiffusionAdapter(ScoreAdapter):
    """Score of a latent diffusion model: tokenizer, CLIP text encoder, UNet, VAE and noise schedule.

    `parts` holds the five components of diffusers and transformers by name. `dtype` is the number format of the weights
    of UNet and text encoder. The VAE is in float32: in float16, some leave its range, and their pictures are black.

    Only the UNet and the VAE's decoder stay on the device. The text encoder and the VAE's encoder are there while they
    are used. With `low_vram` this holds for the decoder too, which then decodes in tiles. With `offload_text`,
    `text_done` frees the text encoder. With `compiled`, torch.compile compiles the UNet.
    """

    def __init__(
        self,
        parts: Parts,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        offload_text: bool = False,
        low_vram: bool = False,
        compiled: bool = False,
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.offload_text, self.low_vram = offload_text, low_vram
        self.tokenizer, self.text_encoder, self.unet, self.vae, scheduler = (parts[name] for name in PARTS)
        size = self.unet.config.sample_size
        self.data_shape = (self.unet.config.in_channels, size, size)
        self.encoder, self.decoder = (
            torch.nn.ModuleList(filter(None, halves))
            for halves in ((self.vae.encoder, self.vae.quant_conv), (self.vae.decoder, self.vae.post_quant_conv))
        )
        place(self.unet, self.device, dtype)
        place(self.text_encoder, self.device, dtype, away=self._saves)
        self._place_vae()
        self.network = NetworkCall(self.unet, lambda x, t, c: self.unet(x, t, c).sample, compiled)
        self.sigmas = scheduler_sigmas(scheduler)
        self.prediction_type = scheduler.config.prediction_type
        self.scaling = self.vae.config.scaling_factor

    @property
    def is_exact(self) -> bool:
        return self.dtype == torch.float32

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        narrow, self.dtype = self.dtype, torch.float32
        try:
            with self.network.plain(), widened(self.unet):
                yield
        finally:
            self.dtype = narrow

    @property
    def _saves(self) -> bool:
        """Whether what is not always needed on the device waits in the memory of the host."""
        return self.device.type == "cuda"

    def _place_vae(self) -> None:
        """Give the two halves of the VAE their number format and their places."""
        place(self.encoder, self.device, torch.float32, away=self._saves)
        place(self.decoder, self.device, torch.float32, away=self._saves and self.low_vram)
        if self._saves:
            self.vae.enable_slicing()  # one picture after another
        if self.low_vram:
            self.vae.tile_latent_min_size = max(SMALLEST_TILE, self.data_shape[1] // TILES)
            self.vae.tile_sample_min_size = self.vae.tile_latent_min_size * self._shrinks

    def keep_pictures(self, device: torch.device) -> None:
        super().keep_pictures(device)
        self.text_encoder = None
        del self.unet, self.network
        self._place_vae()

    @property
    def _shrinks(self) -> int:
        """The edge of a picture over the edge of its latents."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def picture_size(self) -> int:
        return self.data_shape[1] * self._shrinks

    def _denoise(self, x: torch.Tensor, sigma: Level, cond: torch.Tensor) -> torch.Tensor:
        x_in = ((1 + sigma**2) ** -0.5 * x).to(self.dtype, memory_format=image_layout(self.device))
        out = self.network(x_in, self.timestep_on_device(sigma), cond.to(self.dtype)).float()
        return denoised(x, sigma, out, self.prediction_type)

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
        with visiting(self.device, self.text_encoder):
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
                f"--sd.prompt: with the words behind it, it has {tokens} tokens, and the text encoder reads {length}: "
                "no room is left for itself; give shorter words with --pose.view_texts, or --bad_words"
            )
        kept = prompt[: ends[n - 1]].rstrip(" ,;.")
        note(
            f"the prompt has {tokens} tokens with the words behind it, and the text encoder reads {length}: so that "
            f"these stay, its own end is left out: {shown(prompt[len(kept) :].strip(' ,;.'))}"
        )
        return kept

    def text_done(self) -> None:
        if self.offload_text:
            self.text_encoder = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        self.vae.disable_tiling()  # tiles would leave a mark along their edges
        x = (2 * pictures - 1).to(torch.float32, memory_format=image_layout(self.device))
        with visiting(self.device, self.encoder):
            return self.vae.encode(x).latent_dist.mean * self.scaling

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        x = (x / self.scaling).to(torch.float32, memory_format=image_layout(self.device))
        if not self.low_vram:
            return ((self.vae.decode(x).sample + 1) / 2).clamp(0, 1)
        self.vae.enable_tiling()
        with visiting(self.device, self.decoder):
            return ((self.vae.decode(x).sample + 1) / 2).clamp(0, 1)


def network_dtype(precision: str, device: torch.device, upcast_attention: bool = False) -> torch.dtype:
    """Return the number format of UNet and text encoder for an --sd.precision on a device.

    `upcast_attention` is a setting of UNets whose attention leaves the range of float16, such as that of 2.1.
    """
    if precision == "auto":
        return half_precision(device, wide=upcast_attention)
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def note_slow_precision(precision: str) -> None:
    """Note in one line that a half precision is slow on this CPU, where it is: few have instructions for it."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every version of PyTorch
    has_bf16 = any(getattr(torch.cpu, check, bool)() for check in checks)
    if precision == "fp16" or (precision == "bf16" and not has_bf16):
        note(f"--sd.precision {precision} is very slow on this CPU; auto, the default, is float32 here")


def make(run: FamilyConfig, found: Found, device: str | torch.device) -> StableDiffusionAdapter:
    """Return the adapter of a run whose files are `found`; on the device "meta" its networks have no weights."""
    options: Any = run.chosen  # this family's own options
    device = torch.device(device)
    if device.type == "cpu":
        note_slow_precision(options.precision)
    offload = device.type == "cuda" if options.offload_text is None else options.offload_text
    path = fetch(found.place)
    variant = options.variant if options.checkpoint is not None and run.where_asked("sd.variant") else None
    parts = load_parts(path, found, options, torch.float32, empty=device.type == "meta", variant=variant)
    dtype = network_dtype(options.precision, device, bool(parts["unet"].config.upcast_attention))
    try:
        return StableDiffusionAdapter(parts, device, dtype, offload, run.low_vram, run.compile)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
