"""The contract of a family's options: what the project asks of a family before its networks are loaded.

Nothing here imports torch: `-h` must answer at once. The contract of the networks is `adapt.ScoreAdapter`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from my.config import Config

if TYPE_CHECKING:
    from options.family import FamilyConfig

WITHOUT = "get going without one: --preset mini or --preset ideal"  # ends a message about a missing checkpoint
FieldKind = Literal["V_SD", "V_SJC", "VoxRF"]  # published names of fields
Conditions = dict[str, dict[str, tuple] | None]  # {option: {option: values}}, as `my.config.refuse_unread` takes them


class Place(NamedTuple):
    """Where a checkpoint is: a path on this machine, or repositories of the hub that are to be tried in order."""

    flag: str  # the option and value that ask for it, such as "--ddpm.checkpoint google/ddpm-cifar10-32"
    path: Path | None = None
    repos: tuple[str, ...] = ()
    missed: str = ""  # the path on this machine where it was looked for first


class Family(Config):
    """The options of one family, and what the project asks of the family.

    A family is a subclass named `Options`. Its fields are its options, and it overrides what differs below. `run` is
    the configuration of the whole run. `found` is what `check` returned: files are found once, and handed on to
    `make(run, found, device)` of the family's adapter.
    """

    field_kind: ClassVar[FieldKind] = (
        "V_SJC"  # the field for the model's space: V_SD for latents, V_SJC for RGB in [-1, 1]
    )
    channels: ClassVar[int] = 3  # of the model's space
    reads: ClassVar[tuple[str, ...]] = ()  # options outside of its own group that this family reads: their dotted names
    reads_in_2d: ClassVar[tuple[str, ...]] = ()  # options of cameras that it reads in commands that ask for no view

    def read_by(self) -> Conditions:
        """Return {option: {other option: values}}: the option is read only where each other one has such a value."""
        return {}

    def absolute(self) -> None:
        """Change the paths among the options so that they hold in any folder."""

    def check(self, run: FamilyConfig) -> Any:
        """Return what the run needs of this family, found on this machine or named on the hub.

        A run calls it before heavy imports. Raises UserError for files that are missing or of another kind, and for
        prompts that the model cannot know.
        """

    def asked(self, run: FamilyConfig, found: Any) -> list[str]:
        """Return what the run asks the model for: prompts, or numbers of classes; "" asks for neither."""
        return run.drawn_prompts()

    def remedy(self, device_type: str) -> str:
        """Return the flag that makes the networks more exact on such a device, "" where there is none."""
        return ""

    # What a run records of its weights.

    @property
    def embedded(self) -> bool:
        """Whether the weights come with the project, so that another version of it may have others."""
        return False

    def weights(self, found: Any) -> dict[str, list[Path]]:
        """Return {what: its files} of all that decides what the networks give, {} where it is not on this machine.

        Raises OSError or ValueError where files are missing: what loads them says which.
        """
        return {what: weights_below(path) for what, path in self.checkpoints(found).items()}

    def decoders(self, names: Collection[str]) -> list[str]:
        """Return which of `names`, the keys of what `weights` returned, decide how the field of a run is shown."""
        return []

    # What doctor.py tells.

    min_gpu_gb: ClassVar[float] = 0.0  # free GPU memory below which the networks may not fit; 0: any is enough
    saves_memory: ClassVar[str] = ""  # the flag with which they need less, "" where there is none
    download_gb: ClassVar[float] = 6.0  # the most that a checkpoint from the hub takes on the disk

    @property
    def wants_gpu(self) -> bool:
        """Whether a whole run takes too long on a CPU."""
        return False

    def evaluated_in(self, device_type: str) -> str:
        """Return in words in which number format the networks are evaluated on such a device."""
        return "float32"

    def to_download(self, found: Any) -> Place | None:
        """Return the checkpoint that has to come from the hub, None where all that is needed is on this machine."""
        return None

    def checkpoints(self, found: Any) -> dict[str, Path]:
        """Return {what it is: path} of the checkpoints that the run reads, such as {"model": path, "VAE": path}."""
        return {}

    def facts(self, found: Any) -> dict[str, str]:
        """Return further rows of the table, {what: words}, on what the files of the run state."""
        return {}

    @classmethod
    def known_checkpoints(cls) -> list[Path]:
        """Return the published checkpoints of this family that are on this machine."""
        return []


def weights_below(path: Path) -> list[Path]:
    """Return a file, or the files of weights of a folder: its .safetensors, and its .bin where it has none of these."""
    if path.is_file():
        return [path]
    return sorted(path.rglob("*.safetensors")) or sorted(path.rglob("*.bin"))
