"""The options of Stable Diffusion, and what a run needs of its files. No heavy imports."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from families.family import Family, Place
from families.sd import find
from families.sd import prompts as in_prompts
from my.config import FREE
from my.errors import UserError

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Options(Family):
    """Stable Diffusion, and the prompt of every text family."""

    variant: Literal["v1", "v2", "mini"] = Field(
        "v1", description="which Stable Diffusion, looked for below the data root, then on the hub; mini is embedded"
    )
    v2_highres: bool = Field(False, description="with v2: the 768-pixel, v-prediction model")
    checkpoint: str | None = Field(
        None,
        description="to load instead of the variant: a diffusers folder, a .safetensors or .ckpt file, or a hub "
        "id ORG/NAME",
    )
    vae: str | None = Field(
        None,
        description="a VAE to use instead of the checkpoint's, or where it has none: a .safetensors, .ckpt or .pt "
        "file, or a diffusers folder",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the UNet predicts; auto finds it from the checkpoint"
    )
    ema: bool = Field(False, description="of a single file that also holds its UNet's running averages, use those")
    lora: list[str] = Field(
        [], description='LoRA files or adapters\' folders, each PATH or PATH:WEIGHT; with a comma: ["a,b.safetensors"]'
    )
    prompt: str = Field(
        "A high quality photo of a delicious burger", description="what to show, in words (families sd and ideal)"
    )
    negative_prompt: str = Field("", description="what not to show: its condition takes the unconditional one's place")
    scale: float = Field(100.0, ge=0, le=1e6, description="guidance scale s: D_u + s (D_c - D_u)")
    precision: Literal["auto", "autocast", "full", "fp32", "fp16", "bf16"] = Field(
        "auto",
        json_schema_extra=FREE,
        description="number format of the weights of UNet and text encoder, the VAE being fp32; auto is fp16 on CUDA "
        "(bf16 where the UNet's attention needs its range) and fp32 on a CPU; autocast is an older word for auto, and "
        "full is another one for fp32",
    )
    offload_text: bool | None = Field(
        None,
        json_schema_extra=FREE,
        description="free the text encoder once the prompts are read, in the memory of the host too; default True on "
        "CUDA. With False it waits there",
    )

    @field_validator("precision")
    @classmethod
    def _one_word(cls, precision: str) -> str:
        return {"full": "fp32", "autocast": "auto"}.get(precision, precision)  # the published word, and an older one

    @field_validator("prompt")
    @classmethod
    def _has_words(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError(f'needs words, such as "a blue duck", got {prompt!r}')
        return prompt

    field_kind = "V_SD"
    channels = 4
    min_gpu_gb = 4.0  # estimated, not measured: docs/precision.md
    saves_memory = "--low_vram True"
    reads = (
        "low_vram",
        "compile",
        "sd.prompt",
        "sd.scale",
        "prompts",
        "pose.view_words",
        "pose.view_style",
        "pose.view_texts",
        "pose.perp_neg",
    )

    def absolute(self) -> None:
        find.absolute(self)

    def check(self, run: FamilyConfig) -> find.Found:
        if self.variant == "mini" and not self.checkpoint and run.pose.view_style == "suffix":
            raise UserError("--sd.variant mini knows views by their prefix only: leave out --pose.view_style suffix")
        found = find.check(self, run.told())
        in_prompts.check(run.told())
        return found

    def remedy(self, device_type: str) -> str:
        exact = self.precision == "fp32" or (self.precision, device_type) == ("auto", "cpu")
        return "" if exact else "--sd.precision fp32"

    @property
    def wants_gpu(self) -> bool:
        return self.variant != "mini"

    def evaluated_in(self, device_type: str) -> str:
        if self.precision == "auto" and device_type == "cuda":
            return "auto: float16 (bfloat16 where the UNet states upcast_attention), the VAE in float32"
        half = self.precision in ("fp16", "bf16")
        return f"{self.precision}, the VAE in float32" if half else f"{self.precision}: float32"

    def to_download(self, found: find.Found) -> Place | None:
        return None if found.place.path else found.place

    def checkpoints(self, found: find.Found) -> dict[str, Path]:
        files = {"model": found.place.path, "VAE": found.vae}
        return {what: path for what, path in files.items() if path}

    @property
    def embedded(self) -> bool:
        return self.variant == "mini" and not self.checkpoint

    def weights(self, found: find.Found) -> dict[str, list[Path]]:
        from families.sd.networks import files_of

        path = found.place.path
        if path is None:
            return {}
        files = files_of(path, found.vae)
        return files | {f"LoRA {lora.path.name}": list(lora.files) for lora in found.loras}

    def decoders(self, names: Collection[str]) -> list[str]:
        return ["vae"] if "vae" in names else ["model"]

    def facts(self, found: find.Found) -> dict[str, str]:
        path = found.place.path
        if path is None or path.is_dir():
            return {}
        from families.sd import stated

        return {"predicts": stated.prediction(path, self)}

    @classmethod
    def known_checkpoints(cls) -> list[Path]:
        return find.known_checkpoints()
