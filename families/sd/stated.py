"""The facts about a single file of Stable Diffusion that its weights do not tell, such as the type of prediction.

Facts are read from four places: the options; marker tensors in the file; the metadata of a .safetensors (keys
`modelspec.*`, and `ss_*` of kohya's trainer); and a .yaml beside the file, of the same name (`yaml_beside.py`).
Two places that differ are refused, unless an option decides. `docs/checkpoints.md` has the table. No heavy imports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from families.sd import names, yaml_beside
from families.sd.layout import Shapes
from families.sd.yaml_beside import Statement
from my.errors import UserError, note, shown
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    from families.sd.options import Options

MARKERS = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("zero_snr", True),
}  # empty tensors that fine-tunes carry -> (fact, value)
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")  # the second is ComfyUI's
VERSIONS = {"stable-diffusion-v1": 1, "stable-diffusion-v2": 2, "sd_v1": 1, "sd_v2": 2, "sd_v2_v": 2}
V_PREDICTION = ("stable-diffusion-v2-768-v", "sd_v2_v")
WHOLE_RANGE = ("0,1000", "0,999", "1,1000")
MIN_PIXELS, MAX_PIXELS, PIXEL_STEP = 64, 8192, 64
MAX_SKIP = 4  # so many last layers of a text encoder may be left out


def read(path: Path, metadata: Mapping[str, str], shapes: Shapes, options: Options) -> dict[str, Statement]:
    """Return {fact: Statement} of a file with these `metadata` and `shapes`; an option overrides what files state.

    Raises UserError where two statements differ, and for a value that no model has.
    """
    facts: dict[str, Statement] = {}
    for found in (*_options(options), *_markers(shapes), *_metadata(path, metadata, options), *yaml_beside.read(path)):
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


def _options(options: Options) -> Iterator[Statement]:
    """Yield what the options state: the type of prediction, which a published variant has too."""
    if options.prediction_type != "auto":
        yield Statement("--sd.prediction_type", "prediction_type", options.prediction_type)
    elif options.variant == "v2" and (options.checkpoint is None or options.v2_highres):
        yield Statement(
            "--sd.variant v2" + " --sd.v2_highres True" * options.v2_highres,
            "prediction_type",
            "v_prediction" if options.v2_highres else "epsilon",
        )
    elif options.variant == "v1" and options.checkpoint is None:
        yield Statement("--sd.variant v1", "prediction_type", "epsilon")


def _markers(shapes: Shapes) -> Iterator[Statement]:
    """Yield what the marker tensors state."""
    for name, (fact, value) in MARKERS.items():
        if name in shapes:
            yield Statement(f"its tensor {name}", fact, value)


def _metadata(path: Path, metadata: Mapping[str, str], options: Options) -> Iterator[Statement]:
    """Yield what the metadata of a .safetensors state."""
    architecture = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or ""
    if architecture:
        version = next((version for name, version in VERSIONS.items() if architecture.startswith(name)), architecture)
        yield Statement("its metadata", "version", version)
    if architecture in V_PREDICTION or metadata.get("ss_v_parameterization") == "True":
        yield Statement("its metadata", "prediction_type", "v_prediction")
    yield from _prediction(path, metadata, options)
    if metadata.get("ss_zero_terminal_snr") == "True":
        yield Statement("its metadata", "zero_snr", True)
    yield from _layer(path, metadata)
    yield from _resolution(path, metadata)
    steps = re.sub(r"[\s()]", "", metadata.get("modelspec.timestep_range", ""))
    if steps and steps not in WHOLE_RANGE:
        note(f"{path.name} was trained at timesteps {shown(steps)} only, by its metadata: give such a --sigma_range")


def _prediction(path: Path, metadata: Mapping[str, str], options: Options) -> Iterator[Statement]:
    """Yield what the UNet predicts. Two keys of metadata may state it."""
    for key in PREDICTION_KEYS:
        predicts = metadata.get(key, "").strip().lower()
        if predicts in PREDICTIONS:
            yield Statement("its metadata", "prediction_type", PREDICTIONS[predicts])
        elif predicts.startswith("edm"):
            raise UserError(
                f"{path}: by its metadata ({key} {shown(predicts)}) it has the noise levels of EDM, which "
                "are not supported; use a checkpoint of Stable Diffusion 1.x or 2.x"
            )
        elif predicts and options.prediction_type == "auto":
            raise UserError(
                f"{path}: predicts {shown(predicts)} by its metadata, which is not known; known are "
                "epsilon and v; say which with --sd.prediction_type"
            )


def _layer(path: Path, metadata: Mapping[str, str]) -> Iterator[Statement]:
    """Yield the layer of the text encoder that is read, counted from the last, which is 1 ("clip skip")."""
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


def _resolution(path: Path, metadata: Mapping[str, str]) -> Iterator[Statement]:
    """Yield the edge, in pixels, of the square pictures that the model was trained on."""
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


def prediction(path: Path, options: Options) -> str:
    """Return in words what the UNet of a single file predicts, and where that is stated."""
    file = TensorFile(path)
    shapes = {name: file.shapes[there] for name, there in names.published(file.shapes).items()}
    facts = read(path, file.metadata, shapes, options)
    words = [] if "prediction_type" in facts else ["stated nowhere: the run asks the UNet, with pure noise"]
    for fact, form in (("prediction_type", "{}"), ("zero_snr", "zero terminal SNR")):
        if fact in facts:
            words.append(f"{form.format(facts[fact].value)}, by {facts[fact].where}")
    return "; ".join(words)
