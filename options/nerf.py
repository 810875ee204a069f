"""The typed configuration of a voxel NeRF's training. Imports nothing heavy: `-h` must answer at once."""

from typing import ClassVar, Literal

from pydantic import Field

from my.config import Config
from my.script import RunOptions


class ModelConfig(Config):
    """The voxel radiance field."""

    model_type: Literal["VoxRF"] = Field("VoxRF", description="field: colours in [0, 1] before white")
    bbox_len: float = Field(1.5, gt=0, description="half edge of the field's cube round the origin, world units")
    grid_size: int = Field(
        128,
        gt=1,
        description="n: the final grid has about n^3 voxels. It is cropped to what is occupied, so its edges differ",
    )
    step_ratio: float = Field(0.5, ge=0.01, le=10, description="marching step, in voxel edges")
    density_shift: float = Field(-10.0, description="offset of the density before its softplus")
    ray_march_weight_thres: float = Field(1e-4, ge=0, lt=1, description="samples at or below this weight get no colour")
    c: Literal[3] = Field(3, description="colour channels")


class NeRFConfig(RunOptions):
    """Every option of run_nerf.py."""

    scene: str = Field(
        "lego",
        min_length=1,
        description="folder with transforms*.json, or a name below the data_root "
        "of env.json, there or in nerf_synthetic",
    )
    view_dependent: bool = Field(
        False,
        description="colours change with the direction they are seen from: spherical "
        "harmonics of degree 0 to 2, 9 times the memory",
    )
    renderer: Literal["auto", "fused", "reference"] = Field(
        "auto", description="fused is fast, reference is plain PyTorch; auto is fused on a CPU"
    )
    downscale: int = Field(1, gt=0, description="images are averaged over squares of this edge, pixels")
    strict: bool = Field(
        False,
        description="refuse a scene whose transforms files name pictures that are missing, "
        "rather than leave their frames out",
    )
    model: ModelConfig = ModelConfig()
    n_epoch: int = Field(
        2, gt=0, le=10**6, description="length of the training: each pixel is drawn this many times on average"
    )
    bs: int = Field(4096, gt=0, description="pixels per step")
    subpixels: int = Field(
        1,
        gt=0,
        le=32,
        description="rays per pixel edge. A pixel is the mean of its rays: more "
        "than one smooths jagged edges, in training and in what is "
        "rendered",
    )
    lr: float = Field(0.02, gt=0, description="learning rate at the start (Adam); a tenth of it at the end")
    max_minutes: float | None = Field(
        None,
        ge=0.001,
        description="squeeze the training into this many minutes of wall "
        "clock; such a run cannot be reproduced exactly",
    )
    test_every: int | None = Field(
        None, ge=0, description="steps between tests on the test views; None or 0: only at the end"
    )

    command: ClassVar = "run_nerf.py"
