"""The files of guided-diffusion that a run needs, and their networks: by shapes, by options, or refused.

Imports nothing heavy. The parameter `gddpm` is the family's group of options.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from families.family import WITHOUT
from families.gddpm import layout
from families.gddpm.published import FILES, LSUN_FILES, MULTIPLES, N_CLASSES, PUBLISHED, SETTINGS, find
from families.openai_unet import below
from my.errors import UserError, shown, some
from my.file_system import expanded
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    from families.gddpm.options import Options

TOLD = (
    "num_channels",
    "channel_mult",
    "num_res_blocks",
    "attends",
    "n_classes",
    "learn_sigma",
    "use_scale_shift_norm",
    "resblock_updown",
    "conv_resample",
)  # options that shapes tell
HEADS = ("num_heads", "num_head_channels")
FLAGS = ("image_size", *SETTINGS)  # options that shapes do not tell


class Network(NamedTuple):
    """A network in a file."""

    file: TensorFile
    prefix: str  # with which its names in the file begin
    options: dict[str, Any]  # as `published.OPTIONS` has them
    model: str | None  # the published model that has its shapes
    notes: list[str]  # what a person should know of how the file was read

    @property
    def shapes(self) -> dict[str, layout.Shape]:
        """{published name: shape}."""
        return below(self.file.shapes, self.prefix)


# ---------------------------------------------------------------- where they are


def find_unet(gddpm: Options) -> tuple[Path, str]:
    """Return (file, flag) of the UNet that the options ask for; raises UserError, which says where it looked."""
    if gddpm.checkpoint is not None:
        return given("checkpoint", gddpm.checkpoint), "--gddpm.checkpoint"
    for name in FLAGS:
        if getattr(gddpm, name) is not None:
            raise UserError(
                f"--gddpm.{name}: read with --gddpm.checkpoint only, as it is known for {gddpm.model}; leave it out"
            )
    if gddpm.model in FILES:
        return find(gddpm.model, FILES[gddpm.model][0], f"--gddpm.model {gddpm.model}"), ""
    return find(
        gddpm.model, LSUN_FILES[gddpm.lsun_cat], f"--gddpm.model {gddpm.model} --gddpm.lsun_cat {gddpm.lsun_cat}"
    ), ""


def given(option: str, name: str) -> Path:
    """Return the path of the file `name`, which an option gives; raises UserError for what cannot be such a file."""
    path = expanded(name)
    if not os.path.isfile(path):
        why = "that is a folder" if os.path.isdir(path) else "no such file"
        raise UserError(f"--gddpm.{option} {name}: {why}; give a guided-diffusion .pt file, or {WITHOUT}")
    step = re.fullmatch(r"opt(\d*)\.pt", path.name)
    if step:
        raise UserError(
            f"--gddpm.{option} {name}: the optimizer's state; give the weights that were written with it, "
            f"ema_0.9999_{step[1]}.pt or model{step[1]}.pt"
        )
    if re.match(
        r"(cd|ct|edm)_", path.name
    ):  # so are those of arXiv 2303.01469 called, whose tensors have the same names
        raise UserError(
            f"--gddpm.{option} {name}: by its name, a consistency model or a UNet of EDM, which are told "
            "levels of noise; give a UNet of guided-diffusion; if this is one, rename the file"
        )
    return path


# ---------------------------------------------------------------- what they are


def unet(gddpm: Options) -> Network:
    """Return the UNet of a run; raises UserError for a file that is something else."""
    path, flag = find_unet(gddpm)
    file, start, told = opened(path, flag, layout.unet)
    same = [name for name in (gddpm.model, *PUBLISHED) if {k: PUBLISHED[name][k] for k in TOLD} == told]
    if gddpm.checkpoint is None:
        if gddpm.model not in same:
            other = f"of {same[0]}" if same else "of no published model"
            raise UserError(
                f"{path}: its shapes are {other}, not of {gddpm.model}; put the published file there, or "
                "give this one as --gddpm.checkpoint"
            )
        return Network(file, start, PUBLISHED[gddpm.model], gddpm.model, [])
    model = same[0] if same else None
    options, notes = settle(gddpm, told, model, file.label)
    return Network(file, start, options, model, notes + beside(file, start))


def opened(
    path: Path, flag: str, read: Callable[[layout.Shapes], layout.Options]
) -> tuple[TensorFile, str, layout.Options]:
    """Return (file, prefix of its names, options that `read` finds); raises UserError for another kind of file."""
    file = TensorFile(path, flag)
    try:
        start = layout.prefix(file.shapes)
        return file, start, read(below(file.shapes, start))
    except layout.NotGuidedDiffusion as error:
        raise UserError(f"{file.label}: {error}") from None


def settle(gddpm: Options, told: layout.Options, model: str | None, label: str) -> tuple[dict[str, Any], list[str]]:
    """Return (options, notes) of a UNet: `told` by its shapes, and settings that flags give or that are assumed.

    `model` is the published model that has its shapes, or None. Raises UserError for settings that do not fit.
    """
    asked = {name: getattr(gddpm, name) for name in FLAGS if getattr(gddpm, name) is not None}
    heads = [name for name in HEADS if name in asked]
    if len(heads) == 2:
        raise UserError("--gddpm.num_heads and --gddpm.num_head_channels: both tell the heads of attention; give one")
    base = PUBLISHED[model] if model else SETTINGS | {"image_size": edge(told["channel_mult"])}
    settings = {name: base[name] for name in FLAGS} | dict.fromkeys(HEADS if heads else ()) | asked
    if settings["image_size"] is None:
        raise UserError(f"{label}: its shapes do not tell the edge of its pictures; give --gddpm.image_size, in pixels")
    refuse_unfit(settings, told, label)
    return told | settings, said(settings, told, model, asked, gddpm.model, label)


def edge(channel_mult: tuple[float, ...]) -> int | None:
    """Return the image_size that has this channel_mult by default, None where none has."""
    return next((size for size, levels in MULTIPLES.items() if levels == channel_mult), None)


def refuse_unfit(settings: dict[str, Any], told: layout.Options, label: str) -> None:
    """Raise UserError for settings that a network of such shapes cannot have."""
    halvings = len(told["channel_mult"]) - 1
    if settings["image_size"] % 2**halvings:
        raise UserError(
            f"--gddpm.image_size {settings['image_size']}: {label} halves it {halvings} times; give a "
            f"multiple of {shown(2**halvings)}"
        )
    attending = [*(m for m, here in zip(told["channel_mult"], told["attends"]) if here), told["channel_mult"][-1]]
    widths = {round(m * told["num_channels"]) for m in attending}  # the last is that of the middle
    name = next(name for name in HEADS if settings[name])
    bad = [width for width in sorted(widths) if width % settings[name]]
    if bad:
        raise UserError(
            f"{label}: has attention over {bad[0]} channels, which {name} {settings[name]} does not divide; give the "
            "--gddpm.num_heads or --gddpm.num_head_channels that it was trained with"
        )


def said(
    settings: dict[str, Any], told: layout.Options, model: str | None, asked: dict[str, Any], wanted: str, label: str
) -> list[str]:
    """Return the notes on how a checkpoint was read: what its shapes told, and what was assumed.

    `asked` are the settings that flags give, `wanted` is --gddpm.model.
    """
    if model == wanted:
        return []
    if model:
        return [f"{label}: its shapes are those of {model}, whose settings are taken"]
    multiples = shown(",".join(f"{m:g}" for m in told["channel_mult"]), 30)
    edges = [str(settings["image_size"] >> i) for i, here in enumerate(told["attends"]) if here]
    levels = shown(",".join(edges), 30) or "none"
    kinds = [name for name in ("learn_sigma", "use_scale_shift_norm", "resblock_updown") if told[name]]
    classes = f"{told['n_classes']} classes" if told["n_classes"] else "no classes"
    assumed = [f"{name} {value}" for name, value in settings.items() if value is not None and name not in asked]
    return [
        f"{label}: its shapes tell: num_channels {told['num_channels']}, channel_mult {multiples}, "
        f"num_res_blocks {told['num_res_blocks']}, attention_resolutions {levels}, {classes}"
        + "".join(f", {kind}" for kind in kinds),
        f"shapes do not tell these, and they are assumed: {', '.join(assumed)}; if it was trained otherwise, give "
        "--gddpm.NAME VALUE",
    ]


def beside(file: TensorFile, start: str) -> list[str]:
    """Return notes on what is not read: other tensors in the file of a UNet, and better weights beside it."""
    notes, rest = [], [name for name in file.shapes if not name.startswith(start)]
    if rest:
        notes.append(f"{file.label}: only what is below {shown(start[:-1])} is read, not {some(rest)}")
    step = re.fullmatch(r"model(\d+)\.pt", file.path.name)
    averages = sorted(file.path.parent.glob(f"ema_*_{step[1]}.pt")) if step else []
    if averages:
        notes.append(f"{file.label}: {averages[-1].name} beside it has the running averages, which draw better")
    return notes


# ---------------------------------------------------------------- classes


def classifier(gddpm: Options, net: Network) -> Network:
    """Return the noisy classifier that guides the UNet `net`; raises UserError where there is none that fits."""
    if gddpm.classifier is not None:
        path, flag = given("classifier", gddpm.classifier), "--gddpm.classifier"
    else:
        model, flag = net.model, ""
        assert model is not None  # else `needs_classifier` refused it
        instead = "--cls_scaling 0 draws without a classifier; --gddpm.classifier FILE takes it from elsewhere; "
        path = find(model, FILES[model][1], "--cls_scaling above 0", instead)
    file, start, options = opened(path, flag, layout.classifier)
    size, labels = net.options["image_size"], net.options["n_classes"]
    if options["image_size"] != size:
        raise UserError(
            f"{file.label}: judges pictures of {options['image_size']} pixels, and the UNet draws {size}; "
            "give a classifier of that size, or --cls_scaling 0"
        )
    if labels not in (None, options["n_labels"]):
        raise UserError(
            f"{file.label}: knows {options['n_labels']} classes, and the UNet {labels}; give a classifier "
            "of the same ones, or --cls_scaling 0"
        )
    return Network(file, start, options, None, [])


def needs_classifier(gddpm: Options, model: str | None, n: int | None, cls_scaling: float, classes: list[int]) -> bool:
    """Return whether a classifier is needed to draw `classes`, of which -1 is no class.

    The UNet takes one of `n` classes, None for no class. `model` is the published model that has its shapes, or None.
    Raises UserError for what cannot be drawn.
    """
    named = [c for c in classes if c >= 0]
    whose = f"--gddpm.checkpoint {gddpm.checkpoint}" if gddpm.checkpoint else f"--gddpm.model {gddpm.model}"
    guided = model in FILES or gddpm.classifier is not None
    if named and n is None and not guided:
        raise UserError(
            f"ImageNet class {named[0]}: {whose} knows none; "
            + ("leave it out, or give --gddpm.classifier" if gddpm.checkpoint else f"use one of {', '.join(FILES)}")
        )
    if named and n and max(named) >= n:
        raise UserError(f"class {max(named)}: {whose} knows 0 to {n - 1}")
    if not named and n:
        raise UserError(
            f"{whose} draws one class out of {n}: say which with --gddpm.imgnet_cat 0 to {min(n, N_CLASSES) - 1}"
        )
    if gddpm.classifier is not None and not (named and cls_scaling):
        raise UserError(
            "--gddpm.classifier: guides to a class only; leave it out, or give --gddpm.imgnet_cat and "
            "--cls_scaling above 0"
        )
    return bool(named) and cls_scaling > 0 and guided
