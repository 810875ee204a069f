"""The options of guided DDPM, and what a run needs of its files. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, field_validator

from families.family import Conditions, Family
from families.gddpm import files, published
from my.config import FREE
from my.errors import UserError
from my.file_system import real
from my.seeds import numpy_rng

if TYPE_CHECKING:
    from options.family import FamilyConfig


class Found(NamedTuple):
    """What a run needs of this family."""

    unet: files.Network
    classifier: files.Network | None
    classes: list[int]  # drawn in turn; -1 is no class
    options: Options


class Options(Family):
    """Guided DDPM: OpenAI's models in pixel space."""

    model: Literal[
        "m_imgnet_64", "m_imgnet_128", "m_imgnet_256", "m_imgnet_256_uncond", "m_imgnet_512", "m_lsun_256"
    ] = Field("m_lsun_256", description="published model to load")
    lsun_cat: Literal["bedroom", "cat", "horse", "horse_nodropout", "ffhq"] = Field(
        "bedroom", description="which of the m_lsun_256 models to load; ffhq draws faces"
    )
    imgnet_cat: int = Field(
        -1, ge=-1, lt=published.N_CLASSES, description="number of the ImageNet class to draw; -1 for no class"
    )
    checkpoint: str | None = Field(
        None,
        description="file of your own to load instead of the published model: a UNet of guided-diffusion or "
        "improved-diffusion, of any size",
    )
    classifier: str | None = Field(None, description="file of a noisy classifier to load instead of the published one")
    image_size: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="for --gddpm.checkpoint: edge of the pictures that it was trained on, pixels. This and the seven "
        "options below cannot be read from the file. Where its shapes are those of a published model, the default is "
        "that model's value, else the trainer's",
    )
    num_heads: int | None = Field(
        None, gt=0, description="for --gddpm.checkpoint: number of heads per attention; give this or num_head_channels"
    )
    num_head_channels: int | None = Field(
        None, gt=0, description="for --gddpm.checkpoint: channels per head; give this or num_heads"
    )
    use_new_attention_order: bool | None = Field(
        None,
        description="for --gddpm.checkpoint: rows of attention weights are ordered by q, k, v first, then by heads",
    )
    noise_schedule: Literal["linear", "cosine"] | None = Field(
        None, description="for --gddpm.checkpoint: schedule of its noise levels"
    )
    diffusion_steps: int | None = Field(
        None, gt=1, le=100_000, description="for --gddpm.checkpoint: number of its noise levels"
    )
    rescale_timesteps: bool | None = Field(
        None, description="for --gddpm.checkpoint: the UNet is told its steps rescaled to 0 to 1000"
    )
    predict_xstart: bool | None = Field(
        None, description="for --gddpm.checkpoint: it predicts the picture instead of the noise"
    )
    precision: Literal["auto", "autocast", "fp32"] = Field(
        "auto",
        json_schema_extra=FREE,
        description="number format of the UNet's weights: auto is fp16 on CUDA and fp32 on a CPU; autocast is an older "
        "word for auto",
    )

    @field_validator("precision")
    @classmethod
    def _one_word(cls, precision: str) -> str:
        return "auto" if precision == "autocast" else precision

    reads = ("cls_scaling", "classes", "compile")

    def read_by(self) -> Conditions:
        told: dict[str, tuple] = (
            {} if self.checkpoint else {"gddpm.model": tuple(published.FILES)}
        )  # of a checkpoint, the file tells
        lsun = {} if self.checkpoint else {"gddpm.model": ("m_lsun_256",)}
        return {
            **dict.fromkeys(("cls_scaling", "gddpm.imgnet_cat", "classes"), told),
            "gddpm.lsun_cat": {**lsun, "gddpm.checkpoint": ()},
        }

    def absolute(self) -> None:
        for name in ("checkpoint", "classifier"):
            path = getattr(self, name)
            if path:
                setattr(self, name, str(real(path)))

    def check(self, run: FamilyConfig) -> Found:
        net = files.unet(self) if self.checkpoint else None  # for a published model, all is known without its file
        model, n = (net.model, net.options["n_classes"]) if net else (self.model, published.n_classes(self.model))
        classes = self.classes_of(run, n)
        guided = files.needs_classifier(self, model, n, run.cls_scaling, classes)
        where = run.where_asked("cls_scaling")
        if where and run.cls_scaling and not guided:
            why = (
                "it guides to a class, and no class is asked for; leave it out, or give --gddpm.imgnet_cat"
                if max(classes) < 0
                else "only a classifier guides, and this model has none; leave it out, or give --gddpm.classifier"
            )
            raise UserError(f"{where}: {why}")
        net = net or files.unet(self)
        return Found(net, files.classifier(self, net) if guided else None, classes, self)

    def classes_of(self, run: FamilyConfig, n: int | None) -> list[int]:
        """Return the classes that the run draws in turn, -1 for none; random ones where one of `n` is needed."""
        given = run.given_classes() or [self.imgnet_cat]
        if n is None or max(given) >= 0 or not run.n_pictures:
            return given
        return [int(numpy_rng(run.seed, i, "class").integers(n)) for i in range(run.n_pictures)]

    def asked(self, run: FamilyConfig, found: Found) -> list[str]:
        return [str(c) if c >= 0 else "" for c in found.classes]

    def remedy(self, device_type: str) -> str:
        exact = self.precision == "fp32" or device_type == "cpu"
        return "" if exact else "--gddpm.precision fp32"

    def evaluated_in(self, device_type: str) -> str:
        half = self.precision == "auto" and device_type == "cuda"
        return f"{self.precision}: " + ("weights in float16, ends of the UNet in float32" if half else "float32")

    def checkpoints(self, found: Found) -> dict[str, Path]:
        nets = {"model": found.unet, "classifier": found.classifier}
        return {what: net.file.path for what, net in nets.items() if net}

    @classmethod
    def known_checkpoints(cls) -> list[Path]:
        return published.known_checkpoints()
