"""The typed configuration of a text-to-3D run. Imports nothing heavy: `-h` must answer at once."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from my.config import Config
from options.family import FamilyConfig


class VoxConfig(Config):
    """The voxel radiance field."""

    model_type: Literal["V_SD", "V_SJC", "VoxRF"] | None = Field(
        None, description="field: V_SD latents, V_SJC colours in [-1, 1]; default V_SD for sd, else V_SJC"
    )
    bbox_len: float = Field(1.0, gt=0, description="half edge of the field's cube, world units")
    grid_size: int = Field(100, gt=1, description="voxels per edge")
    step_ratio: float = Field(0.5, ge=0.01, le=10, description="marching step, in voxel edges")
    density_shift: float = Field(-1.0, description="offset of the density before its softplus")
    ray_march_weight_thres: float = Field(1e-4, ge=0, lt=1, description="samples at or below this weight get no colour")
    c: int | None = Field(None, gt=0, description="channels; default 4 for sd, else 3")
    blend_bg_texture: bool = Field(True, description="learn a background texture")
    bg_texture_hw: int = Field(4, gt=0, description="edge of that texture")


class SJCConfig(FamilyConfig):
    """Every option of run_sjc.py."""

    lr: float = Field(0.05, gt=0, description="learning rate of the field (Adamax)")
    bg_lr: float = Field(1e-4, ge=0, description="learning rate of the background texture")
    n_steps: int = Field(10000, gt=0, description="optimisation steps")
    batch_views: int = Field(1, gt=0, description="cameras per step, whose gradients are averaged")
    vox: VoxConfig = VoxConfig()
    renderer: Literal["auto", "fused", "reference"] = Field(
        "auto", description="fused is fast, reference is plain PyTorch; auto is fused on a CPU"
    )
    plain_bg: bool = Field(
        False, description="random plain light backgrounds, a new one each step, instead of vox.blend_bg_texture"
    )
    sigma_range: tuple[int, int] = Field(
        (10, 970), description="entries of the noise table, smallest first, drawn from uniformly: first, last + 1"
    )
    sigma_anneal: int | None = Field(
        None, description="where the upper end of sigma_range moves to, linearly, by the last step; default none"
    )
    emptiness_scale: float = Field(10.0, ge=0, description="s of the emptiness loss, mean log(1 + s w)")
    emptiness_weight: float = Field(1e4, ge=0, description="weight of the emptiness loss")
    emptiness_step: float = Field(0.5, ge=0, description="fraction of the run after which it is multiplied")
    emptiness_multiplier: float = Field(20.0, ge=0, description="factor of the emptiness loss from there on")
    depth_weight: float = Field(0.0, ge=0, description="weight of the centre-depth loss")
    var_red: bool = Field(True, description="subtract the render, not its perturbation (Eq. 16, not 15)")

    command: ClassVar = "run_sjc.py"
    asks_views = True

    @model_validator(mode="after")
    def _by_family(self):
        self.vox.model_type = self.vox.model_type or self.chosen.field_kind
        self.vox.c = self.vox.c or self.chosen.channels
        return self

    @model_validator(mode="after")
    def _ordered_ranges(self):
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
