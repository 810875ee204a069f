"""The options of run_nerf.py. This module imports nothing heavy, since `-h` must answer at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from my.config import Config
from my.script import FIRST, Checkpointed, every


class ModelConfig(Config):
    """The voxel radiance field."""

    model_type: Literal["VoxRF"] = Field("VoxRF", description="kind of field: colours in [0, 1] before white")
    bbox_len: float = Field(
        1.5, ge=1e-3, le=1e3, description="half edge of the field's cube round the origin, world units"
    )
    grid_size: int = Field(
        128,
        gt=1,
        description="the final grid has about as many voxels as a cube with this many voxels per edge. It is cropped "
        "to the object, so that its own edges differ",
    )
    step_ratio: float = Field(0.5, ge=0.01, le=10, description="distance of the samples along a ray, in voxel edges")
    density_shift: float = Field(
        -10.0, ge=-1e3, le=1e3, description="number that is added to the density before its softplus"
    )
    ray_march_weight_thres: float = Field(1e-4, ge=0, lt=1, description="samples up to this weight have no colour")
    c: Literal[3] = Field(3, description="colour channels")


class NeRFConfig(Checkpointed):
    """Every option of run_nerf.py."""

    scene: str = Field(
        "lego",
        min_length=1,
        description="folder with transforms*.json, or the name of a folder that is in the data_root of env.json, "
        "or in nerf_synthetic there",
    )
    view_dependent: bool = Field(
        False,
        description="colours depend on the direction from which they are seen: spherical harmonics of degree 0 to 2, "
        "with 9 times the memory",
    )
    renderer: Literal["auto", "fused", "reference"] = Field(
        "auto",
        description="fused is fast, reference is plain PyTorch. auto is fused, except on a GPU where a short test of "
        "it fails: there a note says so, and reference is used",
    )
    downscale: int = Field(1, gt=0, description="the pictures are averaged over squares with this edge, pixels")
    ckpt_every: float = every(0.1)  # with view_dependent a checkpoint is gigabytes, and takes half a minute
    strict: bool = Field(
        False, description="refuse a scene whose transforms files name missing pictures; else their frames are left out"
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
        description="rays per pixel edge. The colour of a pixel is the mean over its rays. More than one ray smooths "
        "jagged edges, in training and in the results",
    )
    lr: float = Field(
        0.02, gt=0, le=100, description="learning rate at the start (Adam); it falls to a tenth at the end"
    )
    max_minutes: float | None = Field(
        None,
        ge=0.001,
        description="finish the training within this many minutes of wall clock; such a run cannot be reproduced "
        "exactly",
    )
    test_every: int | None = Field(
        None, ge=0, description="steps between tests on the test views; None or 0 tests at the end only"
    )

    command: ClassVar[str] = "run_nerf.py"
    first: ClassVar[tuple[str, ...]] = ("scene", "n_epoch", "max_minutes", *FIRST)
