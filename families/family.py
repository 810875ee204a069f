"""What the rest of the project asks of a family of diffusion models before its networks are loaded.

Nothing here imports torch: `-h` must answer at once. The networks' own contract is `adapt.ScoreAdapter`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from my.config import Config

if TYPE_CHECKING:
    from options.family import FamilyConfig

WITHOUT = "get going without one: --preset mini or --preset ideal"
FieldKind = Literal["V_SD", "V_SJC", "VoxRF"]  # published names of fields
Conditions = dict[str, dict[str, tuple] | None]  # as `my.config.refuse_unread` takes them


class Place(NamedTuple):
    """Where a checkpoint is: a path on this machine, or repositories of the hub that are to be tried in order."""

    flag: str  # what the user gave
    path: Path | None = None
    repos: tuple[str, ...] = ()
    missed: str = ""  # where it was looked for before


class Family(Config):
    """The options of one family, and what the rest of the project asks of it.

    `run` is the configuration of the whole run. `found` is what `check` returned for it: it is found once, and
    `adapter.make(run, found, device)` takes it.
    """

    field_kind: ClassVar[FieldKind] = "V_SJC"  # the field that fits the model's space
    channels: ClassVar[int] = 3  # of the model's space
    reads: ClassVar[tuple[str, ...]] = ()  # shared options that this family reads, by their dotted names
    reads_in_2d: ClassVar[tuple[str, ...]] = ()  # options of cameras that it reads where no view is asked for

    def read_by(self) -> Conditions:
        """Return under which further conditions options are read that only this family reads."""
        return {}

    def absolute(self) -> None:
        """Make paths among the options such that they hold in any folder."""

    def check(self, run: FamilyConfig) -> Any:
        """Return what the run needs of this family, found on this machine or named on the hub.

        Raises UserError, before heavy imports, for files that are not there or are something else, and for prompts
        that the model cannot know.
        """

    def asked(self, run: FamilyConfig, found: Any) -> list[str]:
        """Return what the run asks the model for: prompts, numbers of classes, or "" for neither."""
        return run.drawn_prompts()

    def remedy(self, device_type: str) -> str:
        """Return the flag that makes the networks more exact on such a device, "" where there is none."""
        return ""

    # What the doctor tells.

    @property
    def wants_gpu(self) -> bool:
        """Whether a whole run on a CPU takes too long."""
        return False

    def evaluated_in(self, device_type: str) -> str:
        """Return in words the number format that the networks are evaluated in on such a device."""
        return "float32"

    def to_download(self, found: Any) -> Place | None:
        """Return the checkpoint that only the hub may have, None where all that is needed is on this machine."""
        return None

    def checkpoints(self, found: Any) -> dict[str, Path]:
        """Return {what it is: path} of the checkpoints that the run reads."""
        return {}

    def facts(self, found: Any) -> dict[str, str]:
        """Return {what: words} of what the run's files state."""
        return {}

    @classmethod
    def known_checkpoints(cls) -> list[Path]:
        """Return the published checkpoints of this family that are on this machine."""
        return []
