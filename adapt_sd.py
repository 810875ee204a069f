"""The Stable Diffusion family: any diffusers folder of that architecture, the miniature included."""

import sys
from contextlib import nullcontext

import torch

from adapt import ScoreAdapter
from my.errors import UserError
from sd_folder import MINI, PARTS, WITHOUT, find_checkpoint, read_json, refuse_unknown_words


class StableDiffusionAdapter(ScoreAdapter):
    """Score of a latent diffusion model: tokenizer, CLIP text encoder, UNet, VAE and noise schedule.

    `parts` holds the five diffusers components by name. `amp` is the dtype that the UNet is
    evaluated in under autocast, or None.
    """

    def __init__(self, parts, device="cpu", amp=None):
        self.device = torch.device(device)
        self.tokenizer, self.text_encoder, self.unet, self.vae, scheduler = (parts[name] for name in PARTS)
        for net in (self.text_encoder, self.unet, self.vae):
            net.to(self.device).eval().requires_grad_(False)
        self.amp = amp
        abar = (1 - scheduler.betas.double()).cumprod(0)  # its own float32 product is 1e-5 off at small sigmas
        self.sigmas = ((1 - abar) / abar).sqrt().flip(0)
        self.prediction_type = scheduler.config.prediction_type
        size = self.unet.config.sample_size
        self.data_shape = (self.unet.config.in_channels, size, size)
        self.scaling = self.vae.config.scaling_factor

    @property
    def picture_size(self):
        return self.data_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _denoise(self, x, sigma, cond):
        """Precondition the UNet (EDM, arXiv 2206.00364, Table 1: VP; v as arXiv 2202.00512, appendix D)."""
        t = len(self.sigmas) - 1 - int((self.sigmas - sigma).abs().argmin())
        c_in = (1 + sigma**2) ** -0.5
        with self._autocast():
            out = self.unet((c_in * x).to(self.unet.dtype), t, cond.to(self.unet.dtype)).sample.float()
        if self.prediction_type == "v_prediction":
            return c_in**2 * x - sigma * c_in * out
        return x - sigma * out

    def _autocast(self):
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    @torch.no_grad()
    def embed(self, prompts):
        """Return the text encoder's last hidden state (B, L, D) of each prompt."""
        refuse_unknown_words(prompts, self.tokenizer.init_kwargs)
        length = self.tokenizer.model_max_length
        longest = max(len(self.tokenizer(p).input_ids) for p in prompts)
        if longest > length:
            print(f"note: the prompt has {longest} tokens with its view words; the text encoder reads the "
                  f"first {length}", file=sys.stderr)
        ids = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length,
                             return_tensors="pt").input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state.float()

    def encode(self, pictures):
        x = (2 * pictures - 1).to(self.vae.dtype)
        return (self.vae.encode(x).latent_dist.mean * self.scaling).float()

    def decode(self, x):
        pictures = self.vae.decode((x / self.scaling).to(self.vae.dtype)).sample
        return ((pictures.float() + 1) / 2).clamp(0, 1)


def load_parts(folder, dtype, prompt=""):
    """Return the five components of a diffusers folder, networks in `dtype`, without any network access.

    Raises UserError for a folder that cannot be read, and for words of `prompt` that the model cannot know.
    """
    from safetensors import SafetensorError

    try:
        read_json(folder / "scheduler" / "scheduler_config.json", "beta_schedule")  # diffusers would guess one
        refuse_unknown_words([prompt], read_json(folder / "tokenizer" / "tokenizer_config.json"))
        return _read_parts(folder, dtype)  # takes seconds
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        hint = "get it again with git checkout mini_sd" if folder == MINI else WITHOUT
        raise UserError(f"{folder}: cannot be read as Stable Diffusion: {why}; {hint}") from None


def _read_parts(folder, dtype):
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        "text_encoder": _load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        "unet": _load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        "vae": _load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
        "scheduler": DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True),
    }


def _load_network(cls, folder, **dtype):
    """Return the network in `folder`; raises ValueError where weights are missing (they would be random)."""
    net, info = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True, **dtype)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder.name} lacks {len(missing)} of its weights, {missing[0]} first")
    return net


def precision_dtypes(precision, device):
    """Return (weights dtype, autocast dtype or None) of an `sd.precision` on a device type."""
    if precision == "autocast":
        return torch.float32, torch.float16 if device == "cuda" else None
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision], None


def make(cfg, device):
    """Return the Stable Diffusion adapter of a run's configuration."""
    dtype, amp = precision_dtypes(cfg.sd.precision, torch.device(device).type)
    return StableDiffusionAdapter(load_parts(find_checkpoint(cfg.sd), dtype, cfg.sd.prompt), device, amp)
