"""The noise levels of a checkpoint, and what its UNet predicts. Where no file states the latter, the UNet is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.sd import layout
from families.sd.kinds import NotStableDiffusion
from families.sd.layout import Config, Shapes
from families.sd.yaml_beside import MAX_STEPS, Statement
from my.errors import UserError, note, shown

if TYPE_CHECKING:
    import torch

    from families.sd.networks import Parts, Published

PROBE_SIZE = 32  # latent pixels
ECHO = 0.5  # if output and input correlate by more than this, the network predicts the noise
SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")  # settings of a scheduler
TABLE = "alphas_cumprod"
TABLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # tensor with a noise table -> abar of it, in this order
    TABLE: lambda abar: abar,
    "sqrt_alphas_cumprod": lambda root: root.square(),
    "betas": lambda betas: (1 - betas).cumprod(0),
    "denoiser.sigmas": lambda sigmas: abar_of_sigmas(sigmas),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # `adapt.denoised` knows these
MAX_TIMESTEPS = 1_000_000
WITH_BETAS = frozenset(
    f"{name}Scheduler"
    for name in (  # classes of diffusers whose noise levels follow from betas
        "DDIM DDIMParallel DDIMInverse DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete "
        "HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverMultistepInverse "
        "DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver LCM TCD"
    ).split()
)
FEW_STEPS = ("LCMScheduler", "TCDScheduler")  # schedulers of networks that were distilled to draw in a few steps
OF_SAMPLERS = ("clip_sample", "thresholding")  # settings by which a sampler changes the denoised picture
TABLE_RTOL, TABLE_ATOL = 5e-3, 1e-6  # half precision rounds a table by this much


def of_file(path: Path, file: Published, facts: dict[str, Statement]) -> Config:
    """Return the settings of a DDIMScheduler that has the noise levels of a single file.

    The levels come from `facts`, else from the file's own noise table, else they are Stable Diffusion's. Raises
    UserError where facts and table contradict one another. Zero terminal SNR rescales the levels (arXiv 2305.08891,
    Algorithm 1); where only the table tells of it, it is added to `facts`.
    """
    said = {name: facts[name].value for name in SCHEDULE if name in facts}
    settings = {**layout.SCHEDULE, **said, "rescale_betas_zero_snr": "zero_snr" in facts}
    table, abar = table_name(file.shapes), own_table(path, file)
    if abar is None or is_table(abar, {**settings, "rescale_betas_zero_snr": False}):
        return settings
    if is_table(abar, {**settings, "rescale_betas_zero_snr": True}):
        facts["zero_snr"] = Statement(f"its tensor {table}", "zero_snr", True)
        return {**settings, "rescale_betas_zero_snr": True}
    if said:
        raise UserError(
            f"{path}: its tensor {table} is another noise schedule than its "
            f"{facts[next(iter(said))].where} states; move that file away to use the tensor"
        )
    note(f"{path.name} has noise levels of its own (its tensor {table}), which are used")
    before = abar.roll(1)
    before[0] = 1
    return {**settings, "num_train_timesteps": len(abar), "trained_betas": (1 - abar / before).tolist()}


def table_name(shapes: Shapes) -> str | None:
    """Return the name of the tensor that holds a file's own noise table, or None."""
    return next((name for name in TABLES if name in shapes), None)


def own_table(path: Path, file: Published) -> torch.Tensor | None:
    """Return the noise table abar (n,) float64 of a file, or None; raises UserError where it is no schedule."""
    name = table_name(file.shapes)
    if name is None:
        return None
    shape = tuple(file.shapes[name])
    if len(shape) == 1 and 1 < shape[0] <= MAX_STEPS:
        abar = TABLES[name](file.tensor(name).double())
        if len(abar) > 1 and abar[0] < 1 and (abar.diff() <= 0).all() and abar[-1] >= 0 and abar[-2] > 0:
            return abar.clone()
    raise UserError(
        f"{path}: its tensor {name} {shown(list(shape))} is no noise schedule, which falls from 1 toward "
        "0; it is damaged: get the file again"
    )


def abar_of_sigmas(sigmas: torch.Tensor) -> torch.Tensor:
    """Return abar = 1 / (1 + sigma^2), falling, of noise levels in either order. A level of zero is left out."""
    rising = sigmas if sigmas[0] < sigmas[-1] else sigmas.flip(0)
    return 1 / (1 + rising[1 if rising[0] == 0 else 0 :].square())


def is_table(abar: torch.Tensor, settings: Config) -> bool:
    """Return whether a noise table is, up to half precision, that of a scheduler with these settings."""
    import torch

    table = scheduler(settings).alphas_cumprod.double()
    return len(table) == len(abar) and torch.allclose(abar, table, rtol=TABLE_RTOL, atol=TABLE_ATOL)


def probe_prediction(parts: Parts) -> str:
    """Return "epsilon" or "v_prediction", by the UNet's output for pure noise at the last step with abar above 0.

    At that step x_t is nearly the noise n. So a network that predicts n returns its input, while
    v = sqrt(abar) n - sqrt(1 - abar) x0 (arXiv 2202.00512, appendix D) hardly depends on n.
    """
    import torch

    tokenizer, text_encoder, unet = (parts[name] for name in ("tokenizer", "text_encoder", "unet"))
    n = torch.randn(1, unet.config.in_channels, PROBE_SIZE, PROBE_SIZE, generator=torch.Generator().manual_seed(0))
    last = int((parts["scheduler"].alphas_cumprod > 0).sum()) - 1
    with torch.no_grad():
        length = tokenizer.model_max_length
        ids = tokenizer([""], padding="max_length", max_length=length, return_tensors="pt").input_ids
        cond = text_encoder(ids).last_hidden_state
        out = unet(n.to(unet.dtype), last, cond.to(unet.dtype)).sample.float()
    echo = torch.corrcoef(torch.stack([n.flatten(), out.flatten()]))[0, 1]
    return "epsilon" if echo > ECHO else "v_prediction"


# ---------------------------------------------------------------- diffusers folders


def of_folder(stated: Mapping[str, Any], asked: str = "auto") -> Config:
    """Return the settings of a DDIMScheduler that has the noise levels of a scheduler_config.json.

    `stated` is the content of that file, of which the settings for samplers are left out. `asked` is the
    --sd.prediction_type; with auto, "prediction_type" is None where the file states none. Raises NotStableDiffusion for
    noise levels that are not those of betas, and ValueError for damaged values.
    """
    name = stated.get("_class_name", "DDIMScheduler")
    if not isinstance(name, str) or name.removeprefix("Flax") not in WITH_BETAS:
        raise NotStableDiffusion(f"its scheduler is a {shown(name)}, whose noise levels are of another kind")
    for key, value in (("use_flow_sigmas", True), ("timestep_type", "continuous")):
        if stated.get(key) == value:
            raise NotStableDiffusion(f"its scheduler has {key} {value}: its noise levels are of another kind")
    steps, betas = stated.get("num_train_timesteps", 1000), stated.get("trained_betas")
    if type(steps) is not int or not 0 < steps <= MAX_TIMESTEPS:
        raise ValueError(
            f"num_train_timesteps in scheduler/scheduler_config.json is {shown(steps)}, not 1 to {MAX_TIMESTEPS}"
        )
    if betas is not None and not (
        isinstance(betas, list) and len(betas) == steps and all(type(b) in (int, float) for b in betas)
    ):
        raise ValueError(
            f"trained_betas in scheduler/scheduler_config.json are not {steps} numbers, as many as its "
            "num_train_timesteps"
        )
    missing = [key for key in ("beta_schedule", "beta_start", "beta_end") if key not in stated] if betas is None else []
    if missing:  # diffusers would guess
        raise ValueError(f"scheduler/scheduler_config.json has no {', '.join(missing)}")
    predicts = stated.get("prediction_type")
    if predicts is not None and predicts not in PREDICTIONS and asked == "auto":
        raise ValueError(f"its scheduler's prediction_type is {shown(predicts)!r}; known are {', '.join(PREDICTIONS)}")
    used = {key: stated[key] for key in (*SCHEDULE, "trained_betas", "rescale_betas_zero_snr") if key in stated}
    for_samplers = [key for key in OF_SAMPLERS if stated.get(key) is True]
    if for_samplers:
        note(f"its scheduler asks for {' and '.join(for_samplers)}, which is for samplers: the score is used unclipped")
    if name in FEW_STEPS:
        note(
            f"its scheduler is {name}, for networks that were distilled to draw in few steps, whose score is another: "
            "for 3D use the model that it was made from"
        )
    return {**used, "clip_sample": False, "prediction_type": predicts if asked == "auto" else asked}


def scheduler(settings: Config) -> Any:
    """Return diffusers' DDIMScheduler of these settings. A "prediction_type" of None stands for epsilon for now."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{**settings, "prediction_type": settings.get("prediction_type") or "epsilon"})
