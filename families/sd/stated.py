"""What a single file of Stable Diffusion states besides its weights, or what the files beside it state.

Four places are read: marker tensors that fine-tunes carry, the metadata of .safetensors (`modelspec.*` and those of
kohya's trainer, `ss_*`), a configuration of the same name that ends in .yaml (`sd/yaml_beside.py`), and the options.
Two that differ are refused, unless an option decides. Imports nothing heavy. `docs/checkpoints.md` has the table.
"""

import re

from families.sd import names, yaml_beside
from families.sd.yaml_beside import Statement
from my.errors import UserError, note, shown
from my.tensor_file import TensorFile

MARKERS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("zero_snr", True)}  # empty tensors
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # the second is ComfyUI's
VERSIONS = {"stable-diffusion-v1": 1, "stable-diffusion-v2": 2, "sd_v1": 1, "sd_v2": 2, "sd_v2_v": 2}
V_PREDICTION = ("stable-diffusion-v2-768-v", "sd_v2_v")
WHOLE_RANGE = ("0,1000", "0,999", "1,1000")
MIN_PIXELS, MAX_PIXELS, PIXEL_STEP = 64, 8192, 64
MAX_SKIP = 4  # last layers of a text encoder that somebody may want left out


def read(path, metadata, shapes, sd):
    """Return {fact: Statement} of a file with these `metadata` and `shapes`, options before what the file states.

    Raises UserError for statements that differ, or that are no values a model can have.
    """
    facts = {}
    for found in (*_options(sd), *_markers(path, shapes), *_metadata(path, metadata, sd), *yaml_beside.read(path)):
        there = facts.setdefault(found.fact, found)
        decided = there.where.startswith("--")
        if there.value != found.value and not decided:
            to_do = (
                "say which with --sd.prediction_type"
                if found.fact == "prediction_type"
                else "move the .yaml away, or get the file again"
            )
            raise UserError(
                f"{path}: {found.fact} is {shown(there.value)} by {there.where}, and {shown(found.value)} "
                f"by {found.where}; {to_do}"
            )
    return facts


def _options(sd):
    if sd.prediction_type != "auto":
        yield Statement("--sd.prediction_type", "prediction_type", sd.prediction_type)
    elif sd.variant == "v2" and (sd.checkpoint is None or sd.v2_highres):
        yield Statement(
            "--sd.variant v2" + " --sd.v2_highres True" * sd.v2_highres,
            "prediction_type",
            "v_prediction" if sd.v2_highres else "epsilon",
        )
    elif sd.variant == "v1" and sd.checkpoint is None:
        yield Statement("--sd.variant v1", "prediction_type", "epsilon")


def _markers(path, shapes):
    for name, (fact, value) in MARKERS.items():
        if name in shapes:
            yield Statement(f"its tensor {name}", fact, value)


def _metadata(path, metadata, sd):
    """Yield what the metadata of a .safetensors state."""
    architecture = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    if architecture:
        version = next((version for name, version in VERSIONS.items() if architecture.startswith(name)), architecture)
        yield Statement("its metadata", "version", version)
    if architecture in V_PREDICTION or metadata.get("ss_v_parameterization") == "True":
        yield Statement("its metadata", "prediction_type", "v_prediction")
    yield from _prediction(path, metadata, sd)
    if metadata.get("ss_zero_terminal_snr") == "True":
        yield Statement("its metadata", "zero_snr", True)
    yield from _layer(path, metadata)
    yield from _resolution(path, metadata)
    steps = re.sub(r"[\s()]", "", metadata.get("modelspec.timestep_range", ""))
    if steps and steps not in WHOLE_RANGE:
        note(f"{path.name} was trained at timesteps {shown(steps)} only, by its metadata: give such a --sigma_range")


def _prediction(path, metadata, sd):
    """Yield what the network predicts, by either name of that fact."""
    for key in PREDICTION_KEYS:
        predicts = metadata.get(key, "").strip().lower()
        if predicts in PREDICTIONS:
            yield Statement("its metadata", "prediction_type", PREDICTIONS[predicts])
        elif predicts.startswith("edm"):
            raise UserError(
                f"{path}: by its metadata ({key} {shown(predicts)}) it has the noise levels of EDM, which "
                "are not supported; use a checkpoint of Stable Diffusion 1.x or 2.x"
            )
        elif predicts and sd.prediction_type == "auto":
            raise UserError(
                f"{path}: predicts {shown(predicts)} by its metadata, which is not known; known are "
                "epsilon and v; say which with --sd.prediction_type"
            )


def _layer(path, metadata):
    """Yield how many last layers of the text encoder are left out, as "clip skip" says (1 is the last)."""
    for key in ("modelspec.encoder_layer", "ss_clip_skip"):
        text = metadata.get(key, "").strip()
        if text in ("", "None"):
            continue
        if not re.fullmatch(r"[1-9]\d?", text) or int(text) > MAX_SKIP:
            raise UserError(
                f"{path}: its metadata say {shown(text)} for {key}, the text encoder's layer counted from "
                f"the last, which may be 1 to {MAX_SKIP}; get another copy of the file"
            )
        yield Statement("its metadata", "layer", int(text))


def _resolution(path, metadata):
    """Yield the edge in pixels of the pictures that it was trained on."""
    text = metadata.get("modelspec.resolution") or metadata.get("ss_resolution") or ""
    m = re.fullmatch(r"\(?\s*(\d{1,5})\s*(?:[x,]\s*(\d{1,5})\s*)?\)?", text)
    if not m:
        if text not in ("", "None"):
            note(f"{path.name}: the resolution in its metadata, {shown(text)}, is none; 512 pixels are taken")
        return
    width, height = int(m[1]), int(m[2] or m[1])
    if width == height and MIN_PIXELS <= width <= MAX_PIXELS and width % PIXEL_STEP == 0:
        yield Statement("its metadata", "pixels", width)
    else:
        note(
            f"{path.name}: the pictures here are square, of a multiple of {PIXEL_STEP} pixels; the {width}x{height} "
            "in its metadata is not used"
        )


def prediction(path, sd):
    """Return in words what the UNet of a single file predicts, and where that is stated."""
    file = TensorFile(path)
    facts = read(path, file.metadata, names.published(file.shapes), sd)
    words = [] if "prediction_type" in facts else ["stated nowhere: the run asks the UNet, with pure noise"]
    for fact, form in (("prediction_type", "{}"), ("zero_snr", "zero terminal SNR")):
        if fact in facts:
            words.append(f"{form.format(facts[fact].value)}, by {facts[fact].where}")
    return "; ".join(words)
