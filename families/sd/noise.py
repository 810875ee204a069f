"""The noise levels of a checkpoint, and what its network predicts: read where stated, else asked."""

from families.sd import layout
from families.sd.kinds import NotStableDiffusion
from families.sd.yaml_beside import MAX_STEPS, Statement
from my.errors import UserError, note, shown

PROBE_SIZE = 32  # latent pixels
ECHO = 0.5  # correlation of output and input, above which a network predicts the noise
SCHEDULE = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")  # facts that are the scheduler's own
TABLE = "alphas_cumprod"
TABLES = {  # tensors of the noise table that a file was trained with, the first that is there counts -> abar of it
    TABLE: lambda abar: abar,
    "sqrt_alphas_cumprod": lambda root: root.square(),
    "betas": lambda betas: (1 - betas).cumprod(0),
    "denoiser.sigmas": lambda sigmas: abar_of_sigmas(sigmas),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # that `adapt.denoised` knows
MAX_TIMESTEPS = 1_000_000
WITH_BETAS = frozenset(
    f"{name}Scheduler"
    for name in (  # classes of diffusers whose levels are those of betas
        "DDIM DDIMParallel DDIMInverse DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete "
        "HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverMultistepInverse "
        "DPMSolverSinglestep DPMSolverSDE DEISMultistep UniPCMultistep SASolver LCM TCD"
    ).split()
)
FEW_STEPS = ("LCMScheduler", "TCDScheduler")  # of networks that were distilled to draw in a few steps
OF_SAMPLERS = ("clip_sample", "thresholding")  # settings that change the denoised picture of a sampler
TABLE_RTOL, TABLE_ATOL = 5e-3, 1e-6  # by which half precision rounds it


def of_file(path, file, facts):
    """Return the settings of a DDIMScheduler with the noise levels that a file states, by default Stable Diffusion's.

    The file's own table, where it has one, must be that of the settings, unless nothing else is stated: then it is
    used. Zero terminal SNR rescales the levels (arXiv 2305.08891, Algorithm 1). Raises UserError for a contradiction.
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


def table_name(shapes):
    """Return the name of the tensor that holds a file's own noise table, or None."""
    return next((name for name in TABLES if name in shapes), None)


def own_table(path, file):
    """Return the noise table abar (n,) float64 in a file, or None; UserError where it is no schedule."""
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


def abar_of_sigmas(sigmas):
    """Return abar = 1 / (1 + sigma^2) of noise levels in either order, of which one of zero is no step of training."""
    rising = sigmas if sigmas[0] < sigmas[-1] else sigmas.flip(0)
    return 1 / (1 + rising[1 if rising[0] == 0 else 0 :].square())


def is_table(abar, settings):
    """Whether a noise table is that of a scheduler's settings, up to half precision."""
    import torch
    from diffusers import DDIMScheduler

    table = DDIMScheduler(**settings).alphas_cumprod.double()
    return len(table) == len(abar) and torch.allclose(abar, table, rtol=TABLE_RTOL, atol=TABLE_ATOL)


def probe_prediction(parts):
    """Return "epsilon" or "v_prediction" from what the UNet answers to pure noise, at the last step that has a level.

    There x_t is nearly the noise n itself: a network that predicts n gives its input back, while
    v = sqrt(abar) n - sqrt(1 - abar) x0 (arXiv 2202.00512, appendix D) hardly depends on it.
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


def of_folder(stated, sd):
    """Return the settings of a DDIMScheduler that a scheduler_config.json states, "prediction_type" None if not.

    Other settings than these are for samplers. Raises ValueError for noise that is not of this kind.
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
    if predicts is not None and predicts not in PREDICTIONS and sd.prediction_type == "auto":
        raise ValueError(f"its scheduler's prediction_type is {shown(predicts)!r}; known are {', '.join(PREDICTIONS)}")
    used = {key: stated[key] for key in (*SCHEDULE, "trained_betas", "rescale_betas_zero_snr") if key in stated}
    for_samplers = [key for key in OF_SAMPLERS if stated.get(key) is True]
    if for_samplers:
        note(f"its scheduler asks for {' and '.join(for_samplers)}, which is for samplers: the score is used unclipped")
    if name in FEW_STEPS:
        note(
            f"its scheduler is {name}, for networks that were distilled to draw in a few steps, whose score is another: "
            "for 3D use the model that it was made from"
        )
    return {
        **used,
        "clip_sample": False,
        "prediction_type": predicts if sd.prediction_type == "auto" else sd.prediction_type,
    }


def scheduler(settings):
    """Return diffusers' DDIMScheduler of settings, a "prediction_type" of None being epsilon until it is known."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{**settings, "prediction_type": settings.get("prediction_type") or "epsilon"})
