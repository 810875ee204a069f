"""The typed configuration of a voxel NeRF's training. Imports nothing heavy: `-h` must answer at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from my.config import Config
from my.script import FIRST, RunOptions


class ModelConfig(Config):
    """The voxel radiance field."""

    model_type: Literal["VoxRF"] = Field(
        "VoxRF", description="kind of field: VoxRF holds colours in [0, 1], before white"
    )
    bbox_len: float = Field(1.5, gt=0, description="half the edge of the field's cube round the origin, world units")
    grid_size: int = Field(
        128,
        gt=1,
        description="n: the final grid has about n^3 voxels. It is cropped to what is occupied, so its edges differ",
    )
    step_ratio: float = Field(0.5, ge=0.01, le=10, description="distance between samples on a ray, in edges of a voxel")
    density_shift: float = Field(-10.0, description="number that is added to the density before its softplus")
    ray_march_weight_thres: float = Field(
        1e-4, ge=0, lt=1, description="samples with this weight or less get no colour"
    )
    c: Literal[3] = Field(3, description="channels of the colours")


class NeRFConfig(RunOptions):
    """Every option of run_nerf.py."""

    scene: str = Field(
        "lego",
        min_length=1,
        description="folder with transforms*.json; or the name of one in the data_root of env.json, or in its folder "
        "nerf_synthetic",
    )
    view_dependent: bool = Field(
        False,
        description="let colours change with the direction that they are seen from, by spherical harmonics of degree 0 "
        "to 2; colours then take 9 times the memory",
    )
    renderer: Literal["auto", "fused", "reference"] = Field(
        "auto", description="fused is fast, reference is plain PyTorch; auto is fused on a CPU"
    )
    downscale: int = Field(1, gt=0, description="average the pictures over squares of this edge, pixels")
    strict: bool = Field(
        False, description="refuse a scene whose transforms files name missing pictures; False leaves their frames out"
    )
    model: ModelConfig = ModelConfig()
    n_epoch: int = Field(
        2, gt=0, le=10**6, description="length of the training: how many times each pixel is drawn on average"
    )
    bs: int = Field(4096, gt=0, description="pixels per step")
    subpixels: int = Field(
        1,
        gt=0,
        le=32,
        description="rays per pixel edge. A pixel is the mean of its rays. More than one smooths jagged edges, "
        "in training and in all renderings",
    )
    lr: float = Field(
        0.02, gt=0, description="learning rate at the start (optimizer: Adam); at the end it is a tenth of that"
    )
    max_minutes: float | None = Field(
        None,
        ge=0.001,
        description="fit the training into this many minutes of wall clock; such a run cannot be reproduced exactly",
    )
    test_every: int | None = Field(
        None, ge=0, description="steps between measurements on the test views; None or 0 means only at the end"
    )

    command: ClassVar[str] = "run_nerf.py"
    first: ClassVar[tuple[str, ...]] = ("scene", "n_epoch", "max_minutes", *FIRST)
