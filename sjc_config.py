"""The typed configuration of a text-to-3D run, and of its model. Imports nothing heavy: `-h` must answer at once."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

import pixel_folder
import pose
from gddpm import files, published
from my.config import Config, refuse_unread
from my.errors import UserError
from sd import find
from sd import prompts as sd_prompts
from toyworld.captions import read_prompt

GONE = dict.fromkeys(
    ("ncsn", "ncsnv2", "vesde"),
    "for pictures without a prompt give --family ddpm --ddpm.checkpoint FOLDER, or for faces --family gddpm "
    "--gddpm.lsun_cat ffhq",
)  # families of the published code, and what takes their place
Degrees = Annotated[float, Field(gt=0, lt=180)]


class SDConfig(Config):
    """Stable Diffusion, and the prompt of every text family."""

    variant: Literal["v1", "v2", "mini"] = Field(
        "v1", description="which Stable Diffusion, looked for below the data root, then on the hub; mini is embedded"
    )
    v2_highres: bool = Field(False, description="with v2: the 768-pixel, v-prediction model")
    checkpoint: str | None = Field(
        None,
        description="to load instead of the variant: a diffusers folder, a .safetensors or .ckpt file, or a hub "
        "id ORG/NAME",
    )
    vae: str | None = Field(
        None,
        description="a VAE to use instead of the checkpoint's, or where it has none: a .safetensors, .ckpt or .pt "
        "file, or a diffusers folder",
    )
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the UNet predicts; auto finds it from the checkpoint"
    )
    ema: bool = Field(False, description="of a single file that also holds its UNet's running averages, use those")
    lora: list[str] = Field(
        [], description='LoRA files or adapters\' folders, each PATH or PATH:WEIGHT; with a comma: ["a,b.safetensors"]'
    )
    prompt: str = Field("A high quality photo of a delicious burger", description="the text (families sd and ideal)")
    negative_prompt: str = Field("", description="what not to show: its condition takes the unconditional one's place")
    scale: float = Field(100.0, ge=0, description="guidance scale s: D_u + s (D_c - D_u)")
    precision: Literal["autocast", "full", "fp32", "fp16", "bf16"] = Field(
        "autocast",
        description="of the networks; autocast is fp16 on CUDA and fp32 on CPU; full is another word for fp32",
    )
    offload_text: bool | None = Field(
        None, description="free the text encoder's memory once the prompts are read; default True on CUDA"
    )

    @field_validator("precision")
    @classmethod
    def _one_word(cls, precision):
        return "fp32" if precision == "full" else precision  # the published word

    @field_validator("prompt")
    @classmethod
    def _has_words(cls, prompt):
        if not prompt.strip():
            raise ValueError(f'needs words, such as "a blue duck", got {prompt!r}')
        return prompt


class GDDPMConfig(Config):
    """Guided DDPM: OpenAI's models in pixel space."""

    model: Literal[
        "m_imgnet_64", "m_imgnet_128", "m_imgnet_256", "m_imgnet_256_uncond", "m_imgnet_512", "m_lsun_256"
    ] = Field("m_lsun_256", description="published model")
    lsun_cat: Literal["bedroom", "cat", "horse", "horse_nodropout", "ffhq"] = Field(
        "bedroom", description="which m_lsun_256; ffhq draws faces"
    )
    imgnet_cat: int = Field(-1, ge=-1, lt=published.N_CLASSES, description="ImageNet class, -1 for none")
    checkpoint: str | None = Field(
        None,
        description="file to load instead of the model's: a UNet of guided-diffusion "
        "of any size, or of improved-diffusion",
    )
    classifier: str | None = Field(None, description="noisy classifier to load instead of the model's")
    image_size: int | None = Field(
        None,
        gt=0,
        le=4096,
        description="with checkpoint: edge of its pictures; this and "
        "the seven below are of its training and in none of its shapes, by default those "
        "of the model of its shapes",
    )
    num_heads: int | None = Field(None, gt=0, description="heads of each attention; or, instead:")
    num_head_channels: int | None = Field(None, gt=0, description="channels of each head")
    use_new_attention_order: bool | None = Field(None, description="q, k, v before heads in its attentions")
    noise_schedule: Literal["linear", "cosine"] | None = Field(None, description="of its levels of noise")
    diffusion_steps: int | None = Field(None, gt=1, le=100_000, description="number of its levels of noise")
    rescale_timesteps: bool | None = Field(None, description="it is told steps as if they were 1000")
    predict_xstart: bool | None = Field(None, description="it predicts the picture, not the noise")
    precision: Literal["autocast", "fp32"] = Field(
        "autocast", description="of the UNet; autocast is fp16 on CUDA and fp32 on CPU"
    )


class DDPMConfig(Config):
    """An unconditional diffusers pipeline in pixel space."""

    checkpoint: str | None = Field(None, description="its folder or hub id, such as google/ddpm-cifar10-32")


class IdealConfig(Config):
    """The exact score of the toy world's pictures."""

    n_cameras: int = Field(400, gt=0, description="training cameras that its pictures are taken by")


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


class PoseConfig(Config):
    """Cameras."""

    rend_hw: int = Field(64, gt=0, description="edge of the rendered image")
    FoV: Degrees = Field(60.0, description="field of view of test views, degrees")
    fov_range: tuple[Degrees, Degrees] = Field((40.0, 70.0), description="field of view in training, uniform, degrees")
    R: float = Field(1.5, gt=0, description="distance of the cameras from the origin")
    view_words: Literal["sjc", "sides", "octants"] = Field(
        "sjc", description="view prompts: the published four; left and right told apart; eight azimuths with elevation"
    )
    view_style: Literal["prefix", "suffix", "none"] = Field(
        "prefix", description="where they stand: before the prompt (published), behind it, or nowhere"
    )
    view_texts: list[str] = Field(
        [],
        description='texts of your own for views, each VIEW=TEXT, such as "backside=the tail of"; "front=" means '
        "no words for the front",
    )
    perp_neg: bool = Field(
        False, description="Perp-Neg: other sides' prompts push away, perpendicular to the prompt's own (family sd)"
    )


class FamilyConfig(Config):
    """The diffusion model that gives the score, and what every script that asks one needs."""

    preset: str | None = Field(None, description="named settings out of the presets, below config.yml and flags")
    family: Literal["sd", "gddpm", "ddpm", "ideal"] = Field(
        "sd", description="diffusion family that gives the score", json_schema_extra={"gone": GONE}
    )
    sd: SDConfig = SDConfig()
    gddpm: GDDPMConfig = GDDPMConfig()
    ddpm: DDPMConfig = DDPMConfig()
    ideal: IdealConfig = IdealConfig()
    cls_scaling: float = Field(
        1.0,
        ge=0,
        description="classifier guidance of --gddpm.imgnet_cat: factor of grad log p(y | x); 0 needs no classifier",
    )
    pose: PoseConfig = PoseConfig()
    seed: int = Field(0, ge=0, description="seed of every random draw")
    device: str = Field("auto", description="cuda, cuda:1, cpu; auto is cuda where there is one")
    resume: bool = Field(False, description="continue the run in this folder")
    dry_run: bool = Field(False, description="stop after writing full_config.yml")

    READ_BY: ClassVar[dict] = {
        "sd": {"family": ("sd",)},
        "gddpm": {"family": ("gddpm",)},
        "ddpm": {"family": ("ddpm",)},
        "ideal": {"family": ("ideal",)},
        "sd.prompt": {"family": ("sd", "ideal")},
        "sd.scale": {"family": ("sd", "ideal")},
        "cls_scaling": {"family": ("gddpm",), "gddpm.model": tuple(published.FILES)},
        "gddpm.imgnet_cat": {"family": ("gddpm",), "gddpm.model": tuple(published.FILES)},
        "gddpm.lsun_cat": {"family": ("gddpm",), "gddpm.model": ("m_lsun_256",), "gddpm.checkpoint": ()},
        "pose.view_words": {"family": ("sd", "ideal")},
        "pose.view_style": {"family": ("sd", "ideal")},
        "pose.view_texts": {"family": ("sd",)},
        "pose.perp_neg": {"family": ("sd",)},
    }  # as `my.config.refuse_unread` takes it

    def read_by(self):
        """Return READ_BY; with a gddpm checkpoint, whose classes its file tells, whatever gddpm.model is."""
        told = () if self.gddpm.checkpoint is None else ("gddpm.model",)
        return {
            option: where and {switch: values for switch, values in where.items() if switch not in told}
            for option, where in self.READ_BY.items()
        }

    def drawn_prompts(self):
        """Return the prompts that the run will ask its model for, without view words."""
        return [self.sd.prompt]

    def prompts_flag(self):
        """Return the flag that `drawn_prompts` come from."""
        return "--sd.prompt"

    def drawn_classes(self):
        """Return the ImageNet classes that the run will ask its model for, -1 for none."""
        return [self.gddpm.imgnet_cat]

    def asked(self):
        """Return what the run will ask its model for, as prompts or numbers of classes, "" for neither."""
        if self.family == "gddpm":
            return [str(c) if c >= 0 else "" for c in self.drawn_classes()]
        return [""] if self.family == "ddpm" else self.drawn_prompts()

    def remedy(self, device_type):
        """Return what to do where the model, on such a device, gives numbers that are not finite."""
        group = {"sd": self.sd, "gddpm": self.gddpm}.get(self.family)
        exact = group is None or group.precision == "fp32" or (group.precision, device_type) == ("autocast", "cpu")
        precision = "" if exact else f"continue with --resume True --{self.family}.precision fp32, or "
        return f"{precision}try another checkpoint in an empty folder: this one may be damaged"

    def absolute(self):
        """Return the configuration, its paths such that they hold in any folder."""
        find.absolute(self.sd)
        for group, name in ((self.gddpm, "checkpoint"), (self.gddpm, "classifier"), (self.ddpm, "checkpoint")):
            path = getattr(group, name) and Path(getattr(group, name)).expanduser()
            if path and (group is not self.ddpm or path.exists()):  # else it is a hub id
                setattr(group, name, str(path.resolve()))
        return self

    def check_files(self):
        """Raise UserError, before heavy imports, for options that nothing reads, and for a model that is not there or
        cannot know what is asked for."""
        refuse_unread(self, self.read_by())
        self._check_views()
        if self.family == "sd":
            find.check(self.sd, self._told())
            sd_prompts.check(self._told())
        if self.family == "gddpm":
            guided = files.needs_classifier(self.gddpm, self.cls_scaling, self.drawn_classes())
            if self.where_asked("cls_scaling") and self.cls_scaling and not guided:
                why = (
                    "no class is asked for, and only to one does it guide; leave it out, or give --gddpm.imgnet_cat"
                    if max(self.drawn_classes()) < 0
                    else "only a classifier guides, and this model has none; leave it out, or give --gddpm.classifier"
                )
                raise UserError(f"{self.where_asked('cls_scaling')}: {why}")
            files.check(self.gddpm, guided)
        if self.family == "ddpm":
            pixel_folder.find_pipeline(self.ddpm.checkpoint)
        if self.family == "ideal":
            read_prompt(self.sd.prompt, "--sd.prompt with --family ideal")

    def _told(self):
        """Return {option: texts} of all that the model will be told, but for the view words that it comes with."""
        told = {self.prompts_flag(): self.drawn_prompts(), "--sd.negative_prompt": [self.sd.negative_prompt]}
        return told | {f"--pose.view_texts {text!r}": [text.partition("=")[2]] for text in self.pose.view_texts}

    def _check_views(self):
        """Raise UserError for options of prompts that mean nothing, or that the family cannot follow."""
        p = self.pose
        texts = pose.read_view_texts(p.view_texts, p.view_words)
        if texts and p.view_style == "none":
            raise UserError("--pose.view_texts mean nothing with --pose.view_style none: leave out one of the two")
        if self.family == "ideal" and (texts or p.view_style == "suffix"):
            raise UserError(
                "--family ideal knows views by their prefix only: leave out --pose.view_style suffix and "
                "--pose.view_texts"
            )
        if self.family == "sd" and self.sd.variant == "mini" and not self.sd.checkpoint and p.view_style == "suffix":
            raise UserError("--sd.variant mini knows views by their prefix only: leave out --pose.view_style suffix")
        if p.perp_neg and p.view_style == "none":
            raise UserError("--pose.perp_neg True needs view prompts: leave out --pose.view_style none")
        if p.perp_neg and p.view_words != "sjc":
            raise UserError(
                "--pose.perp_neg True needs --pose.view_words sjc: it goes between the front, side and back of "
                "these words; leave out one of the two"
            )


IN_2D = {
    "pose": {"family": ("ideal",)},  # whose pictures are taken by its cameras
    "pose.view_words": {"family": ("ideal",)},
    **dict.fromkeys(("pose.view_style", "pose.view_texts", "pose.perp_neg")),
}  # of READ_BY, where no view is asked


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

    @model_validator(mode="after")
    def _by_family(self):
        latent = self.family == "sd"
        self.vox.model_type = self.vox.model_type or ("V_SD" if latent else "V_SJC")
        self.vox.c = self.vox.c or (4 if latent else 3)
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
