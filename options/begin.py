"""Where a run of run_sjc.py begins that is given --init: the field of another run, which must fit. Not heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from my import checkpoint
from my.config import Given
from my.errors import UserError, note
from my.script import recorded_weights
from my.sha256 import sha256_of
from options import weights

if TYPE_CHECKING:
    from options.found import Source
    from options.sjc import SJCConfig

LATENTS = "V_SD"
OF_MODEL = ("variant", "checkpoint", "vae")  # options of a family that choose the decoder of latents


def source_of(cfg: SJCConfig, files: Any = None) -> Source:
    """Return the field that --init names, and note where its run is not finished.

    `files` is what the run's family found of its model; None asks it here.

    Of a checkpoint of the published code whose folder states no options, those are the defaults, but for its family and
    its kind, which are this run's. Raises UserError where there is none, where its colours are of another space, and
    where its checksum is not the one that the configuration has.
    """
    from options.found import find

    flag, kind = f"--init {cfg.init}", cfg.vox.model_type
    own = {"family": cfg.family, "vox.model_type": kind}
    try:
        found = find(str(cfg.init), otherwise={name: Given(value, f"--{name}") for name, value in own.items()})
    except UserError as error:
        raise UserError(f"--init {error}") from None  # which names what was given
    refuse_other_colors(flag, found, cfg)
    if not found.finished:
        note(f"{flag}: this run is {found.progress}; that field is taken")
    if kind == LATENTS and not found.published:
        if model_of(found.cfg) != model_of(cfg):
            note(
                f"{flag}: its latents are those of another model: they have the same colours only where both have one "
                "VAE"
            )
        else:
            files = cfg.chosen.check(cfg) if files is None else files
            weights.refuse_other_decoder(flag, cfg, files, recorded_weights(found.folder))
    return found


def checksum(cfg: SJCConfig, found: Source) -> str:
    """Return the SHA-256 of the tensors that a run begins from; UserError where the configuration has another one."""
    path = found.path if found.published else found.path / checkpoint.TENSORS
    try:
        digest = sha256_of(path)
    except FileNotFoundError:
        raise UserError(f"--init {cfg.init}: {path} is missing; give another checkpoint") from None
    if cfg.init_sha256 not in (None, digest):
        raise UserError(
            f"--init {cfg.init}: has the SHA-256 {digest[:16]}..., and this run is to begin from "
            f"{cfg.init_sha256[:16]}...; give that checkpoint, or start a new run in an empty folder"
        )
    return digest


def refuse_other_colors(flag: str, found: Source, cfg: SJCConfig) -> None:
    """Raise UserError where the colours of a field cannot be those of this run's."""
    (there, c), (here, own) = ((run.vox.model_type, run.vox.c) for run in (found.cfg, cfg))
    words = f"{flag}: is a field {there} of {c} channels, and this run's is {here} of {own}"
    if c != own or (there != here and LATENTS in (there, here)):
        raise UserError(
            f"{words}: these are colours of another space; give the field of a run whose model has the same"
        )
    if (there, here) == ("V_SJC", "VoxRF"):
        raise UserError(f"{words}, which has no colour below 0; give --vox.model_type {there}")


def model_of(cfg: SJCConfig) -> list[object]:
    """Return what chooses the decoder of a run's latents."""
    return [cfg.family, *(getattr(cfg.chosen, name, None) for name in OF_MODEL)]
