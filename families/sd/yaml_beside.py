"""The configuration beside a single file: NAME.yaml next to NAME.safetensors, as web UIs and the published code use it.

The .yaml names classes of the published code, and their options. Only the keys below are read. Options that matter in
training only are skipped. Unknown keys are noted in one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from my import plain_files
from my.errors import UserError, note, shown, some

MAX_BYTES = 100_000  # a published one has about 2,000
STEPS, MAX_STEPS = 1000, 10_000  # steps of training: by default, and at most
MAX_SCALING = 1e6  # upper bound of the scale of latents
PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCALINGS = {
    "EpsScaling": "epsilon",
    "VScaling": "v_prediction",
}  # last word of generative-models' class -> what the UNet predicts
DENOISER = "DiscreteDenoiser"  # generative-models' class whose noise levels follow from betas, by its last word
DISCRETIZATIONS = {
    "LegacyDDPMDiscretization": False,
    "ZeroSNRDDPMDiscretization": True,
}  # last word of the class -> whether it has zero terminal SNR
OF_DISCRETIZATION = {"linear_start": "beta_start", "linear_end": "beta_end"}
OF_DENOISER = frozenset(
    [
        "num_idx",
        "scaling_config",
        "discretization_config",
        "weighting_config",
        "do_append_zero",
        "quantize_c_noise",
        "flip",
    ]
)
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # the published code's word -> diffusers'
TEXT_ENCODERS = {"FrozenCLIPEmbedder": 1, "FrozenOpenCLIPEmbedder": 2}  # last word of the class -> version
LAYERS = {1: ("last", None), 2: ("penultimate", None)}  # version -> the layer of the text encoder that is its condition
OF_TRAINING = frozenset(
    [
        "channels",
        "log_every_t",
        "num_timesteps_cond",
        "first_stage_key",
        "cond_stage_key",
        "image_size",
        "cond_stage_trainable",
        "monitor",
        "use_ema",
        "scheduler_config",
        "loss_type",
        "l_simple_weight",
        "original_elbo_weight",
        "v_posterior",
        "learn_logvar",
        "logvar_init",
        "clip_denoised",
        "ckpt_path",
        "ignore_keys",
        "unet_trainable",
        "finetune_keys",
        "load_only_unet",
        "make_it_fit",
        "ucg_training",
        "embedding_reg_weight",
        "personalization_config",
        "use_positional_encodings",
        "reset_ema",
        "reset_num_ema_updates",
        "cosine_s",
        "concat_mode",
        "force_null_conditioning",
        "first_stage_config",
        "cond_stage_config",
        "unet_config",
        "given_betas",
        "input_key",
        "disable_first_stage_autocast",
        "denoiser_config",
        "network_config",
        "conditioner_config",
        "sampler_config",
        "loss_fn_config",
        "network_wrapper",
        "compile_model",
        "no_cond_log",
        "en_and_decode_n_samples_a_time",
        "log_keys",
        "optimizer_config",
    ]
)
USED = frozenset(
    [
        "parameterization",
        "linear_start",
        "linear_end",
        "timesteps",
        "beta_schedule",
        "scale_factor",
        "conditioning_key",
        "scale_by_std",
        "zero_snr",
        "zero_terminal_snr",
        "ztsnr",
        "rescale_betas_zero_snr",
    ]
)


class Statement(NamedTuple):
    """One fact about a model."""

    where: str  # in words
    fact: str  # its name
    value: Any


def read(path: Path) -> list[Statement]:
    """Return the statements of the .yaml beside the file `path`, [] where there is none or where it is of no model.

    Raises UserError where the .yaml is damaged, or states what is not supported.
    """
    beside = path.with_suffix(".yaml")
    if beside == path or not beside.is_file():
        return []
    try:
        if beside.stat().st_size > MAX_BYTES:
            raise ValueError(f"has {beside.stat().st_size} bytes, and may have {MAX_BYTES}")
        tree = plain_files.read_yaml(beside)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{beside}, beside the checkpoint, {shown(str(error), 150)}; mend it, or move it away"
        ) from None
    params = _below(tree, "model", "params")
    if not params:
        note(f"{beside.name} beside the checkpoint has no options of a model (model: params:), and is not used")
        return []
    reader = Reader(beside)
    reader.read(params)
    return reader.found


class Reader:
    """Reads one .yaml; its statements are in `found`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[Statement] = []

    def state(self, fact: str, value: Any) -> None:
        """Add a statement."""
        self.found.append(Statement(self.path.name, fact, value))

    def refuse(self, what: str, to_do: str = "correct it, or move the file away") -> NoReturn:
        """Raise UserError, which names the .yaml."""
        raise UserError(f"{self.path}, beside the checkpoint: {what}; {to_do}")

    def read(self, params: Mapping[str, Any]) -> None:
        """Read the options below `model: params:`."""
        self._prediction(params)
        self._schedule(params)
        self._denoiser(_below(params, "denoiser_config"))
        self._number(params, "scale_factor", "scaling_factor", 0, MAX_SCALING)
        if params.get("scale_by_std") is True:
            self.state("scale_by_std", True)
        key = params.get("conditioning_key", "crossattn")
        if key not in ("crossattn", None):
            self.refuse(
                f"its conditioning_key is {shown(key)}, and only crossattn, a prompt alone, is supported",
                "use a text-to-image checkpoint, or correct the file",
            )
        self._text_encoder(_below(params, "cond_stage_config"))
        self._text_encoder(_embedder(params))
        self._network(_below(params, "unet_config", "params") or _below(params, "network_config", "params"))
        vae = _below(params, "first_stage_config", "params")
        self._sizes(
            _below(vae, "ddconfig"),
            {
                "z_channels": "latent_channels",
                "ch": "width",
                "ch_mult": "multiples",
                "num_res_blocks": "layers_per_block",
            },
            "vae",
        )
        self._note_unknown([key for key in params if key not in USED and key not in OF_TRAINING])

    def _note_unknown(self, unknown: Sequence[str]) -> None:
        if unknown:
            note(
                f"{self.path.name} states {some(unknown)}, which is not known here and not used; if the results are "
                "wrong, look there"
            )

    def _prediction(self, params: Mapping[str, Any]) -> None:
        """Read what the UNet predicts, in either layout."""
        stated = params.get("parameterization")
        if stated is not None:
            if not isinstance(stated, str) or stated not in PARAMETERIZATIONS:
                self.refuse(f"its parameterization is {shown(stated)}; known are {', '.join(PARAMETERIZATIONS)}")
            self.state("prediction_type", PARAMETERIZATIONS[stated])
        scaling = _below(params, "denoiser_config", "params", "scaling_config").get("target")
        if scaling is not None:
            name = _end(scaling)
            if name not in SCALINGS:
                self.refuse(f"its denoiser scales by {shown(scaling)}; known are {', '.join(SCALINGS)}")
            self.state("prediction_type", SCALINGS[name])

    def _schedule(self, params: Mapping[str, Any]) -> None:
        """Read the noise levels of the published code's layout."""
        self._number(params, "linear_start", "beta_start", 0, 1)
        self._number(params, "linear_end", "beta_end", 0, 1)
        self._steps(params, "timesteps")
        schedule = params.get("beta_schedule")
        if schedule is not None:
            if not isinstance(schedule, str) or schedule not in SCHEDULES:
                self.refuse(f"its beta_schedule is {shown(schedule)}; known are {', '.join(SCHEDULES)}")
            self.state("beta_schedule", SCHEDULES[schedule])
        if params.get("given_betas") is not None:
            self.refuse(
                "it gives betas of its own, which is not supported", "use a diffusers folder with trained_betas"
            )
        if any(params.get(key) is True for key in ("zero_snr", "zero_terminal_snr", "ztsnr", "rescale_betas_zero_snr")):
            self.state("zero_snr", True)

    def _steps(self, params: Mapping[str, Any], key: str) -> None:
        """Read the number of steps of training."""
        steps = params.get(key)
        if steps is not None:
            if type(steps) is not int or not 1 < steps <= MAX_STEPS:
                self.refuse(f"its {key} are {shown(steps)}, not one whole number from 2 to {MAX_STEPS}")
            self.state("num_train_timesteps", steps)

    def _denoiser(self, config: Mapping[str, Any]) -> None:
        """Read the noise levels of generative-models' layout."""
        inside, target = _below(config, "params"), config.get("target")
        if target is not None and _end(target) != DENOISER:
            self.refuse(
                f"its denoiser is {shown(target)}, and only {DENOISER} has the noise levels of Stable Diffusion"
            )
        if "discretization_config" in inside:
            self._discretization(_below(inside, "discretization_config"))
        steps = next((found.value for found in self.found if found.fact == "num_train_timesteps"), STEPS)
        if inside.get("num_idx", steps) != steps:
            self.refuse(
                f"its num_idx is {shown(inside['num_idx'])}, and its levels are those of {steps} timesteps; "
                "only as many are supported"
            )
        self._note_unknown([key for key in inside if key not in OF_DENOISER])

    def _discretization(self, config: Mapping[str, Any]) -> None:
        """Read the betas of generative-models' layout."""
        target, params = config.get("target"), _below(config, "params")
        if _end(target) not in DISCRETIZATIONS:
            self.refuse(f"its noise levels are those of {shown(target)}; known are {', '.join(DISCRETIZATIONS)}")
        unknown = [key for key in params if key not in (*OF_DISCRETIZATION, "num_timesteps")]
        if unknown:
            self.refuse(
                f"its {_end(target)} states {some(unknown)}, which is not known here, and may change the noise levels",
                "take that out to go without",
            )
        for key, fact in OF_DISCRETIZATION.items():
            self._number(params, key, fact, 0, 1)
        self._steps(params, "num_timesteps")
        self.state("beta_schedule", "scaled_linear")
        if DISCRETIZATIONS[_end(target)]:
            self.state("zero_snr", True)

    def _text_encoder(self, config: Mapping[str, Any]) -> None:
        """Read the version of the text encoder, and refuse a layer that its version is not read at."""
        target = config.get("target")
        if target is None:
            return
        name = _end(target)
        if name not in TEXT_ENCODERS:
            self.refuse(
                f"its text encoder is {shown(target)}; known are {', '.join(TEXT_ENCODERS)}",
                "use a checkpoint of Stable Diffusion 1.x or 2.x",
            )
        version, params = TEXT_ENCODERS[name], _below(config, "params")
        self.state("version", version)
        layer, at = params.get("layer"), params.get("layer_idx")
        if layer not in LAYERS[version] or at is not None:
            self.refuse(
                f"it reads the text encoder at layer {shown(layer if at is None else at)}, and only "
                f"{LAYERS[version][0]!r} is supported",
                "take that line out to have it so",
            )

    def _network(self, params: Mapping[str, Any]) -> None:
        """Read the options of the UNet: its sizes, which the weights tell too, and its heads, which no weights tell."""
        self._sizes(
            params,
            {
                "in_channels": "in_channels",
                "out_channels": "out_channels",
                "model_channels": "width",
                "channel_mult": "multiples",
                "num_res_blocks": "layers_per_block",
                "context_dim": "cross_attention_dim",
            },
            "unet",
        )
        for key, fact in (("num_heads", "heads"), ("num_head_channels", "head_channels")):
            value = params.get(key)
            if value in (-1, None):
                continue
            if type(value) is not int or not 0 < value <= MAX_STEPS:
                self.refuse(f"its {key} is {shown(value)}, not one whole number above 0")
            self.state(fact, value)
        if params.get("num_classes") is not None or params.get("adm_in_channels") is not None:
            self.refuse(
                "its UNet is told classes or sizes besides the prompt, which is not supported",
                "use a text-to-image checkpoint of Stable Diffusion 1.x or 2.x",
            )

    def _sizes(self, params: Mapping[str, Any], names: Mapping[str, str], part: str) -> None:
        """Read the sizes of a part; `names` is {key of the file: name of the size here}."""
        sizes = {mine: params[theirs] for theirs, mine in names.items() if params.get(theirs) is not None}
        if sizes:
            self.state(f"{part} sizes", sizes)

    def _number(self, params: Mapping[str, Any], key: str, fact: str, low: float, high: float) -> None:
        """Read a number that must lie between `low` and `high`, both excluded."""
        value = params.get(key)
        if value is None:
            return
        if type(value) not in (int, float) or not low < value < high:
            self.refuse(f"its {key} is {shown(value)}, not a number above {low} and below {high:g}")
        self.state(fact, float(value))


def _below(tree: Any, *keys: str) -> dict[str, Any]:
    """Return the mapping that the keys lead to, one after another; {} where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _end(target: Any) -> str:
    """Return the last word of a class's dotted name, "" for a value that is no text."""
    return target.rpartition(".")[2] if isinstance(target, str) else ""


def _embedder(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the first text encoder in generative-models' layout, {} where there is none."""
    embedders = _below(params, "conditioner_config", "params").get("emb_models")
    first = embedders[0] if isinstance(embedders, list) and embedders else {}
    return first if isinstance(first, dict) else {}


def refuse_other_sizes(where: str, sizes: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise UserError where `sizes`, which the file `where` states, differ from `config`, which the weights tell."""
    channels = list(config["block_out_channels"])
    told = {**config, "width": channels[0], "multiples": [c // channels[0] for c in channels]}
    for name, value in sizes.items():
        if value != told[name]:
            raise UserError(
                f"{where}, beside the checkpoint, is of another model: it states {name} {shown(value)}, "
                f"and the weights have {shown(told[name])}; move it away, or give the "
                "checkpoint that it is of"
            )
