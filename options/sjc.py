"""The typed configuration of a text-to-3D run. Imports nothing heavy: `-h` must answer at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from families.family import Conditions, FieldKind
from my import checkpoint
from my.config import FILLED_IN, FREE, Config
from my.errors import UserError
from my.file_system import expanded
from my.script import FIRST as OF_RUNS
from my.script import Checkpointed
from options import begin
from options.family import FIRST, FamilyConfig
from options.rule import RULES, rules_where

if TYPE_CHECKING:
    from typing_extensions import Self

    from options.found import Source


Bound = Annotated[float, Field(gt=0, le=1e12)]  # of what is chained


class VoxConfig(Config):
    """The voxel radiance field."""

    model_type: FieldKind | None = Field(
        None,
        description="kind of field: V_SD holds latents, V_SJC colours in [-1, 1], VoxRF colours in [0, 1]; default "
        "V_SD for sd, else V_SJC",
    )
    bbox_len: float = Field(1.0, ge=1e-3, le=1e3, description="half the edge of the field's cube, world units")
    grid_size: int = Field(100, gt=1, description="voxels per edge of the cube")
    step_ratio: float = Field(0.5, ge=0.01, le=10, description="distance between samples on a ray, in edges of a voxel")
    density_shift: float = Field(
        -1.0, ge=-1e3, le=1e3, description="number that is added to the density before its softplus"
    )
    ray_march_weight_thres: float = Field(
        1e-4, ge=0, lt=1, description="samples with this weight or less get no colour"
    )
    c: int | None = Field(None, gt=0, description="channels of the colours; default 4 for sd, else 3")
    blend_bg_texture: bool = Field(True, description="learn a texture for the background")
    bg_texture_hw: int = Field(4, gt=0, description="edge of the background texture, pixels")


class SJCConfig(Checkpointed, FamilyConfig):
    """Every option of run_sjc.py."""

    lr: float = Field(0.05, gt=0, le=100, description="learning rate of the field (optimizer: Adamax)")
    lr_end: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the learning rates that is left in the last step; they fall exponentially",
    )
    density_lr: float | None = Field(None, gt=0, le=100, description="learning rate of the density; default --lr")
    bg_lr: float = Field(1e-4, ge=0, le=100, description="learning rate of the background texture")
    n_steps: int = Field(10000, gt=0, description="number of optimisation steps")
    batch_views: int = Field(1, gt=0, le=10_000, description="cameras per step; their gradients are averaged")
    vox: VoxConfig = VoxConfig()
    renderer: Literal["auto", "fused", "reference"] = Field(
        "auto",
        description="fused is fast, reference is plain PyTorch. auto is fused, except on a GPU where a short test of "
        "it fails: there a note says so, and reference is used",
    )
    plain_bg: bool = Field(
        False, description="take a random plain light background in each step, instead of learning a texture"
    )
    sigma_range: tuple[int, int] = Field(
        (10, 970),
        description="entries of the model's noise table that the steps take their levels from, as --sigma_schedule "
        "says: the first, and one more than the last. Entry 0 has the least noise",
    )
    sigma_anneal: int | None = Field(
        None,
        description="move the upper end of sigma_range linearly to this entry until the last step; by default it stays",
    )
    sigma_schedule: Literal["random", "linear", "sqrt"] = Field(
        "random",
        description="how a step gets its level: random draws any of sigma_range, each as likely as the others; linear "
        "and sqrt fall from its upper to its lower end, by the share of the run that is done or its square root",
    )
    emptiness_scale: float = Field(
        10.0, ge=0, le=1e6, description="s of the emptiness loss, the mean of log(1 + s w) over samples of weight w"
    )
    emptiness_weight: float = Field(
        1e4, ge=0, le=1e12, description="weight of the emptiness loss, which removes thin fog"
    )
    emptiness_step: float = Field(
        0.5, ge=0, description="fraction of the run after which emptiness_multiplier applies; 1 and more is never"
    )
    emptiness_multiplier: float = Field(
        20.0, ge=0, le=1e6, description="factor of the emptiness loss after emptiness_step"
    )
    depth_weight: float = Field(
        0.0, ge=0, le=1e12, description="weight of the centre-depth loss, which pulls the centre nearer than the border"
    )
    snapshots: bool = Field(
        True,
        json_schema_extra=FREE,
        description="keep the field of every 5% of the run, as a small file in fields/; view.py shows them",
    )
    report: bool = Field(
        True,
        json_schema_extra=FREE,
        description="write report.html, the page of the run, at its end and after each 5% of its steps",
    )
    init: str | None = Field(
        None,
        description="begin from the field of another run: its folder, a checkpoint in it, or a step_*.pt of the "
        "published code. Its grid, box and background texture are resampled to those of this run",
    )
    init_sha256: str | None = Field(
        None,
        json_schema_extra=FILLED_IN,
        description="SHA-256 of the tensors that --init is to have; the run fills it in, so that full_config.yml says "
        "from what it began",
    )
    alpha: bool = Field(
        False,
        json_schema_extra=FREE,
        description="leave out what is behind the object in the pictures of test_<step>/view: they are PNG with "
        "straight alpha",
    )
    rule: Literal[tuple(RULES)] = Field(  # type: ignore[valid-type]  # its names are computed
        "sjc",
        description="rule of score distillation, by which a step moves a rendering; docs/rules.md has equations, "
        "sources, and calls of the network",
    )
    bad_words: str = Field(
        "",
        description="words of bad pictures, which rules nfsd and bridge need, and csd may have; they need a model that "
        "knows them; the embedded ones know blurry, faded and foggy",
    )
    noise: Literal["fresh", "surface"] = Field(
        "fresh",
        description="noise that is added to renderings: fresh in each step, or fixed to the surface of the object, "
        "where a point has the same in all views and steps",
    )
    score_clip: tuple[Bound, Bound] | None = Field(
        None,
        description="bounds of what is chained, in the first and the last step, linear between: each number of it is "
        "cut to plus or minus the bound; by default nothing is cut",
    )
    bridge_step: float = Field(
        0.8, ge=0, le=1, description="fraction of the run after which rule bridge leaves sds for its own direction"
    )
    var_red: bool = Field(
        True, description="subtract the rendering from the denoised picture (Eq. 16), not the noisy rendering (Eq. 15)"
    )

    command: ClassVar[str] = "run_sjc.py"
    asks_views: ClassVar[bool] = True
    conditions: ClassVar[Conditions] = {
        "var_red": {"rule": ("sjc",)},
        "noise": {"rule": rules_where(lambda rule: rule.noise)},
        "bad_words": {"rule": rules_where(lambda rule: rule.bad_words)},
        "bridge_step": {"rule": ("bridge",)},
        "sigma_anneal": {"sigma_schedule": ("random",)},
    }
    first: ClassVar[tuple[str, ...]] = (*FIRST, "n_steps", "lr", *OF_RUNS)

    _source: Source | None = PrivateAttr(None)  # of --init, set by `check_files`

    def told(self) -> dict[str, list[str]]:
        return super().told() | ({"--bad_words": [self.bad_words]} if self.bad_words else {})

    def absolute(self) -> Self:
        if self.init is not None:
            self.init = os.path.abspath(expanded(self.init))
        return super().absolute()

    def check_files(self) -> Any:
        """Do what every command with a model does, and find the field of --init; its checksum is filled in.

        A run that has a checkpoint has begun: nothing is looked for.
        """
        found = super().check_files()
        if self.init is None and self.init_sha256 is not None:
            raise UserError("--init_sha256: not read without --init; leave it out, or give --init")
        if self.init is not None and not checkpoint.latest("ckpt"):
            self.source(found)
        return found

    def refuse_unfit(self) -> None:
        super().refuse_unfit()
        facts = RULES[self.rule]
        if facts.text and "sd.scale" not in self.chosen.reads:
            raise UserError(
                f"--rule {self.rule}: needs a model that reads text, for its score without one; with --family "
                f"{self.family} give one of: {', '.join(rules_where(lambda rule: not rule.text))}"
            )
        if facts.bad_words == "needed" and not self.bad_words:
            raise UserError(
                f"--rule {self.rule}: needs words of bad pictures, and a model that knows them; give --bad_words, such "
                'as "blurry, foggy" with --preset ideal or mini, or another --rule'
            )
        if self.texts.scale == 0 and (self.rule == "csd" or (self.rule == "bridge" and self.bridge_step < 1)):
            raise UserError(
                f"--sd.scale 0: the directions of --rule {self.rule} are s times a difference; give more than 0"
            )

    def source(self, files: Any = None) -> Source:
        """Return the field of --init, which there must be; raises UserError where it does not fit.

        `files` is what the family found of the run's model; None asks it here.
        """
        if self._source is None:
            self._source = begin.source_of(self, files)
            self.init_sha256 = begin.checksum(self, self._source)
        return self._source

    @model_validator(mode="after")
    def _by_family(self) -> SJCConfig:
        self.vox.model_type = self.vox.model_type or self.chosen.field_kind
        self.vox.c = self.vox.c or self.chosen.channels
        return self

    @model_validator(mode="after")
    def _ordered_ranges(self) -> SJCConfig:
        for name, (low, high) in (("pose.fov_range", self.pose.fov_range), ("sigma_range", self.sigma_range)):
            if low > high or low < 0 or (name == "sigma_range" and low == high):
                raise ValueError(
                    f"--{name} must go up from its first to its second number, none below 0, got {low}, {high}"
                )
        if self.sigma_anneal is not None and self.sigma_anneal <= self.sigma_range[0]:
            raise ValueError(
                f"--sigma_anneal must lie above the first of --sigma_range, "
                f"{self.sigma_range[0]}, got {self.sigma_anneal}"
            )
        return self
