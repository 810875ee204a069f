"""The typed configuration of 2D sampling. Imports nothing heavy: `-h` must answer at once."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from families.family import Conditions
from my.script import FIRST as OF_RUNS
from options.family import FIRST, FamilyConfig, Texts

ImageClass = Annotated[int, Field(ge=0, lt=1000)]  # of ImageNet


class SamplingConfig(FamilyConfig):
    """Every option of run_img_sampling.py."""

    sd: Texts = Texts(scale=7.5)  # the usual one of Stable Diffusion
    prompts: list[str] = Field(
        [],
        description="several prompts instead of --sd.prompt; pictures take them in turn. Put commas between them, or "
        'write ["...", "..."]',
    )
    classes: list[ImageClass] = Field(
        [], description="several ImageNet classes instead of --gddpm.imgnet_cat; pictures take them in turn"
    )
    num_images: int = Field(16, gt=0, description="number of pictures to draw")
    batch_size: int = Field(
        16, gt=0, description="pictures that are drawn together; what they show does not depend on it"
    )
    num_t: int = Field(40, gt=1, description="number of noise levels")
    sampler: Literal["karras", "smld"] = Field(
        "karras", description="karras is the sampler of EDM, smld is annealed Langevin dynamics"
    )
    sigma_max: float | None = Field(
        None, gt=0, description="first noise level; default the model's largest, but at most 80"
    )
    sigma_min: float | None = Field(None, gt=0, description="last noise level; default the model's smallest")
    heun: bool = Field(
        True, description="for karras: Heun's method, with two evaluations per level; False is Euler's, with one"
    )
    langevin: bool = Field(
        False,
        description="for karras: add noise on the way and remove it, as the four S_ options say (EDM, Algorithm 2)",
    )
    # The four are those of EDM's Table 5 for its pretrained ImageNet-64 model, as remembered, not looked up; the ranges
    # that diffusers' KarrasVeScheduler gives for that table, 0 to 100, 0 to 10, 0.2 to 80, 1 to 1.011, hold them.
    S_churn: float = Field(80.0, ge=0, description="for langevin: how much noise is added over all levels")
    S_min: float = Field(0.05, ge=0, description="for langevin: smallest level at which noise is added")
    S_max: float = Field(50.0, ge=0, description="for langevin: largest level at which noise is added")
    S_noise: float = Field(
        1.003, gt=0, description="for langevin: standard deviation of the noise, 1 being that of the level"
    )
    smld_steps: int = Field(5, gt=0, description="for smld: Langevin steps per noise level")
    smld_step_size: float = Field(
        0.2, gt=0, lt=2, description="for smld: variance of the noise of a step, divided by sigma^2"
    )

    command: ClassVar[str] = "run_img_sampling.py"
    first: ClassVar[tuple[str, ...]] = (*FIRST, "prompts", "classes", "num_images", *OF_RUNS)
    conditions: ClassVar[Conditions] = {
        "sd.prompt": {"prompts": ()},
        "gddpm.imgnet_cat": {"classes": ()},
        "heun": {"sampler": ("karras",)},
        "langevin": {"sampler": ("karras",)},
        **dict.fromkeys(("S_churn", "S_min", "S_max", "S_noise"), {"sampler": ("karras",), "langevin": (True,)}),
        **dict.fromkeys(("smld_steps", "smld_step_size"), {"sampler": ("smld",)}),
    }

    @model_validator(mode="after")
    def _fits(self) -> SamplingConfig:
        if "" in (p.strip() for p in self.prompts):
            raise ValueError('--prompts: one of them is empty; each needs words, such as "a blue duck"')
        for name in ("prompts", "classes"):
            n = len(getattr(self, name))
            if n > self.num_images:
                raise ValueError(
                    f"--num_images {self.num_images}: fewer than the {n} --{name}, some of which would never be drawn"
                )
        if self.S_min > self.S_max:
            raise ValueError(f"--S_max {self.S_max:g} must not be below --S_min {self.S_min:g}")
        if self.sigma_min and self.sigma_max and self.sigma_min >= self.sigma_max:
            raise ValueError(f"--sigma_max {self.sigma_max:g} must be above --sigma_min {self.sigma_min:g}")
        return self

    def drawn_prompts(self) -> list[str]:
        return self.prompts or super().drawn_prompts()

    def prompts_flag(self) -> str:
        return "--prompts" if self.prompts else super().prompts_flag()

    def given_classes(self) -> list[int]:
        return self.classes

    @property
    def n_pictures(self) -> int:
        return self.num_images

    def subjects(self, found: Any) -> list[str]:
        """Return what each picture is to show: the pictures take what is `asked` in turn."""
        asked = self.asked(found)
        return [asked[i % len(asked)] for i in range(self.num_images)]
