"""The options that all commands share which ask a diffusion model for scores. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model

import families
import pose
from families.family import Conditions, Family
from my.config import FREE, Config, refuse_unread
from my.errors import UserError
from my.script import RunOptions
from my.sha256 import fingerprint
from options import weights

FIRST = ("preset", "sd.prompt", "sd.checkpoint", "family")  # the options that help lists first
Degrees = Annotated[float, Field(gt=0, lt=180)]


class PoseConfig(Config):
    """Cameras."""

    rend_hw: int = Field(
        64,
        gt=0,
        description="edge of the picture that is rendered in each step, pixels; for sd these are latent pixels",
    )
    FoV: Degrees = Field(60.0, description="horizontal field of view of test views, degrees")
    fov_range: tuple[Degrees, Degrees] = Field(
        (40.0, 70.0), description="horizontal field of view in training, degrees: drawn uniformly between these two"
    )
    R: float = Field(1.5, ge=1e-3, le=1e4, description="distance of the cameras from the origin, world units")
    view_words: Literal["sjc", "sides", "octants"] = Field(
        "sjc",
        description="how views are named: sjc has front, side, backside and overhead, as published; sides tells left "
        "from right; octants has eight directions at three heights",
    )
    antithetic: bool = Field(
        False,
        description="of two training views, which follow one another, have the second on the other side of the object, "
        "half a turn away",
    )
    view_style: Literal["prefix", "suffix", "none"] = Field(
        "prefix",
        description="where the words of a view stand: before the prompt (prefix, as published), behind it (suffix), or "
        "nowhere (none)",
    )
    view_texts: list[str] = Field(
        [],
        description='your own words for views, each VIEW=TEXT, such as "backside=the tail of"; "front=" means no words '
        "for the front",
    )
    perp_neg: bool = Field(
        False,
        description="use Perp-Neg: the prompts of other views push away, but only perpendicular to the direction of "
        "the prompt itself (family sd)",
    )


OF_VIEWS = ("antithetic", "view_words", "view_style", "view_texts", "perp_neg")  # what only a command with views reads
TEXTS = "sd"  # the group whose options prompt, negative_prompt and scale serve every family that reads text

if TYPE_CHECKING:
    from typing_extensions import Self

    class Texts(Family):
        """The group TEXTS as a type checker sees it."""

        prompt: str = ""
        negative_prompt: str = ""
        scale: float = 0.0

    class Model(Config):
        """The model as a type checker sees it."""

        preset: str | None = None
        family: str = ""
        sd: Texts = Texts()

else:
    Texts = families.options_of(TEXTS)
    Model = create_model(
        "Model",
        __base__=Config,
        preset=(str | None, Field(None, description="named settings; config.yml and flags override them")),
        family=(
            Literal[families.NAMES],
            Field(
                families.NAMES[0],
                description="family of diffusion models that gives the score",
                json_schema_extra={"gone": families.GONE},
            ),
        ),
        **{name: (families.options_of(name), families.options_of(name)()) for name in families.NAMES},
    )  # with a group of options per family


class FamilyConfig(RunOptions, Model):
    """The options of a command that asks a diffusion model for scores."""

    cls_scaling: float = Field(
        1.0,
        ge=0,
        description="strength of a classifier's guidance towards --gddpm.imgnet_cat: the factor of grad log p(y | x); "
        "0 needs no classifier",
    )
    low_vram: bool = Field(
        False,
        json_schema_extra=FREE,
        description="have the VAE on the GPU only while it decodes, in tiles; this takes less memory, and time per "
        "picture (family sd)",
    )
    compile: bool = Field(
        False,
        json_schema_extra=FREE,
        description="compile the UNet with torch.compile, on CUDA with CUDA graphs: it needs a C++ compiler, and a "
        "minute or more at the first step; what it gains on CUDA is not measured (families sd, gddpm, ddpm)",
    )
    pose: PoseConfig = PoseConfig()

    asks_views: ClassVar[bool] = False  # whether the model is asked for views of an object
    conditions: ClassVar[Conditions] = {}  # of the command's own options, and more of shared ones

    @property
    def chosen(self) -> Family:
        """The options of the family that gives the score."""
        return getattr(self, self.family)

    @property
    def texts(self) -> Texts:
        """The options `prompt`, `negative_prompt` and `scale`, which every family that reads text shares."""
        return getattr(self, TEXTS)

    def read_by(self) -> Conditions:
        """Return under which conditions each option is read, as `my.config.refuse_unread` takes them."""
        members = {name: getattr(self, name) for name in families.NAMES}
        table: Conditions = {name: {"family": (name,)} for name in members}
        for option in dict.fromkeys(option for member in members.values() for option in member.reads):
            table[option] = {"family": tuple(name for name, member in members.items() if option in member.reads)}
        if not self.asks_views:
            of_views = [f"pose.{name}" for name in OF_VIEWS]
            cameras = [option for member in members.values() for option in member.reads_in_2d]
            for option in ("pose", *of_views, *cameras):
                readers = tuple(name for name, member in members.items() if option in member.reads_in_2d)
                table[option] = {"family": readers} if readers else None
        further = [(item, {"family": (name,)}) for name, member in members.items() for item in member.read_by().items()]
        further += [(item, {}) for item in self.conditions.items()]
        for (option, where), otherwise in further:
            known = table.get(option, otherwise)
            table[option] = None if known is None or where is None else known | where
        return table

    # What the model is asked for.

    def drawn_prompts(self) -> list[str]:
        """Return the prompts that the run will ask its model for, without view words."""
        return [self.texts.prompt]

    def prompts_flag(self) -> str:
        """Return the flag that `drawn_prompts` come from."""
        return "--sd.prompt"

    def given_classes(self) -> list[int]:
        """Return the classes that the pictures take in turn, [] where the command takes a single class."""
        return []

    @property
    def n_pictures(self) -> int:
        """How many pictures the command draws, each of its own class; 0 for a command with a single result."""
        return 0

    def asked(self, found: Any) -> list[str]:
        """Return what the run will ask its model for, as prompts or numbers of classes, "" for neither."""
        return self.chosen.asked(self, found)

    def told(self) -> dict[str, list[str]]:
        """Return {option: texts} of all texts that go to the model, without the built-in view words."""
        told = {self.prompts_flag(): self.drawn_prompts(), "--sd.negative_prompt": [self.texts.negative_prompt]}
        return told | {f"--pose.view_texts {text!r}": [text.partition("=")[2]] for text in self.pose.view_texts}

    def remedy(self, device_type: str, smaller: str = "") -> str:
        """Return what to do where numbers are not finite on such a device; `smaller` names what else to try."""
        flag, has_files = self.chosen.remedy(device_type), "checkpoint" in type(self.chosen).model_fields
        precision = f"continue with --resume True {flag}, or " if flag else ""
        other = " or ".join(filter(None, [smaller, "another checkpoint" if has_files else ""])) or "other options"
        damaged = ": this checkpoint may be damaged" if has_files else ""
        return f"{precision}try {other} in an empty folder{damaged}"

    # Before the run.

    def absolute(self) -> Self:
        """Return the configuration, its paths made absolute, so that they hold in any folder."""
        for name in families.NAMES:
            getattr(self, name).absolute()
        return self

    def check_files(self) -> Any:
        """Return what the chosen family found of the model that the run needs.

        Raises UserError, before heavy imports, for options that nothing reads, for a model that is not there, and for
        a prompt that it cannot know.
        """
        refuse_unread(self, self.read_by())
        self.refuse_unfit()
        found = self.chosen.check(self)
        if self._began_with is not None:  # it goes on
            weights.refuse_other("this run", self, found, self._began_with, "start in an empty folder")
        return found

    def weights(self, found: Any) -> dict[str, str]:
        """Return {what: fingerprint} of the weights of the model, {} where it is not on this machine, or not whole."""
        if self.chosen.to_download(found):
            found = self.chosen.check(self)  # the run may have downloaded it since
        try:
            return {what: fingerprint(files) for what, files in self.chosen.weights(found).items()}
        except (OSError, ValueError):  # loading it says what is missing
            return {}

    def refuse_unfit(self) -> None:
        """Raise UserError for options that contradict one another, or that no model of the family can follow."""
        p = self.pose
        texts = pose.read_view_texts(p.view_texts, p.view_words)
        if texts and p.view_style == "none":
            raise UserError("--pose.view_texts mean nothing with --pose.view_style none: leave out one of the two")
        if p.perp_neg and p.view_style == "none":
            raise UserError("--pose.perp_neg True needs view prompts: leave out --pose.view_style none")
        if p.perp_neg and p.view_words != "sjc":
            raise UserError(
                "--pose.perp_neg True needs --pose.view_words sjc: it goes between the front, side and back of these "
                "words; leave out one of the two"
            )
