"""The options of highres_final_vis.py. Imports nothing heavy."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from my.errors import UserError
from options.family import PoseConfig
from options.trained import TrainedConfig

RINGS = ("circle", "ellipse")


class FilmConfig(TrainedConfig):
    """Every option of highres_final_vis.py."""

    n_frames: int = Field(200, gt=0, description="frames of the path that the camera moves on")
    skip: int | None = Field(
        None,
        ge=0,
        description="frames to leave out at the start of the spiral, where the camera looks from overhead; default 3 "
        "of 10",
    )
    fps: int = Field(30, gt=0, description="frames per second of the videos")
    path: Literal["spiral", "circle", "ellipse"] = Field(
        "spiral",
        description="how the camera moves: spiral comes down from overhead in three rounds; circle and ellipse go "
        "round once from the front, at one height, and the ellipse comes nearer at the two sides",
    )
    elevation: float = Field(
        15.0, gt=-90, lt=90, description="height of the circle or the ellipse, degrees above the horizon"
    )
    radius: float | None = Field(
        None, gt=0, description="distance of the camera from the origin, world units; default that of the run"
    )
    factor: int = Field(4, gt=0, description="rays per edge of a pixel of the training resolution")
    latent_hw: int | None = Field(
        None,
        gt=0,
        description="edge of the rendering that is decoded, or shown as it is for a model of pixels; it divides factor "
        "times the training resolution; default twice the training resolution",
    )
    background: tuple[float, float, float] | None = Field(
        None,
        json_schema_extra={"expected": "a colour as three numbers R,G,B, such as 255,0,0 for red"},
        description="colour behind the object, R,G,B from 0 to 1 or, where one of them is above 1, from 0 to 255; "
        "default what the run shows. The frames have exactly this colour wherever the field is empty",
    )
    alpha: bool = Field(
        False,
        description="transparent frames, with straight alpha; so are webp and gif, which knows no half transparency; "
        "mp4 has none, and shows white",
    )
    format: Literal["mp4", "gif", "webp"] = Field("mp4", description="kind of the two videos; webp is without loss")
    frames: Literal["keep", "drop"] = Field("keep", description="keep each frame as PNG too, or leave videos only")

    first: ClassVar[tuple[str, ...]] = (
        *("n_frames", "skip", "fps", "path", "elevation", "radius", "factor", "latent_hw"),
        *("background", "alpha", "format", "frames", "run", "device"),
    )
    read_by: ClassVar[dict[str, dict[str, tuple[object, ...]] | None]] = {
        "skip": {"path": ("spiral",)},
        "elevation": {"path": RINGS},
        "background": {"alpha": (False,)},
    }

    @model_validator(mode="after")
    def _fits(self) -> FilmConfig:
        if self.path == "spiral" and self.n_skipped >= self.n_frames:
            raise ValueError(
                f"--skip {self.skip}: must be less than --n_frames {self.n_frames}; give --skip 0 to "
                f"{self.n_frames - 1}"
            )
        if self.background and not 0 <= min(self.background) <= max(self.background) <= 255:
            raise ValueError(f"--background {','.join(f'{x:g}' for x in self.background)}: give R,G,B from 0 to 255")
        if self.alpha and (self.format, self.frames) == ("mp4", "drop"):
            raise ValueError("--alpha True: mp4 has no alpha; leave out --frames drop, or give --format webp")
        return self

    @property
    def n_skipped(self) -> int:
        """How many frames of the path are left out at its start."""
        if self.path != "spiral":
            return 0
        return 3 * self.n_frames // 10 if self.skip is None else self.skip

    @property
    def color(self) -> tuple[float, ...] | None:
        """The colour of `background`, RGB in [0, 1]."""
        if self.background is None:
            return None
        return tuple(x / (255 if max(self.background) > 1 else 1) for x in self.background)

    def sizes(self, p: PoseConfig) -> tuple[int, int]:
        """Return (edge of the rendering that is decoded, rays per edge of a pixel of it) for the cameras of a run.

        Raises UserError where the rays of `factor` do not divide into `latent_hw` pixels.
        """
        rays, hw = p.rend_hw * self.factor, self.latent_hw or 2 * p.rend_hw
        if rays % hw:
            raise UserError(
                f"--factor {self.factor}: is {rays} rays per edge, {self.factor} for each of the run's {p.rend_hw} "
                f"pixels, and these do not divide into --latent_hw {hw}; give --latent_hw {p.rend_hw}, or a --factor "
                f"that makes a multiple of {hw}"
            )
        return hw, rays // hw
