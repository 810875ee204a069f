"""Compares the weights of a model with those that a run has recorded in its full_config.yml. Imports nothing heavy.

A run that goes on needs all of them, and a field of latents needs the decoder. What is compared are fingerprints, as
`my.sha256.fingerprint` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from my.errors import UserError, note, shown
from my.script import recorded_weights

if TYPE_CHECKING:
    from options.family import FamilyConfig
    from options.found import Source

BRIEF = 15  # characters of a fingerprint in a message
OTHER_VERSION = "take the version of the project that made it: git log -- mini_sd lists those of the miniature"
OTHER_FILES = "put back the files that it was made with"


def refuse_other(where: str, cfg: FamilyConfig, found: Any, recorded: Mapping[str, str], instead: str = "") -> None:
    """Raise UserError, which begins with `where`, unless the weights are those that a run has recorded.

    found: what the `check` of the configuration's family returned.  recorded: what `recorded_weights` returned.
    instead: what else there is to do. Where nothing is recorded, a note says so of the embedded miniature.
    Weights that are not on this machine are not compared.
    """
    unlike = differences(cfg, found, recorded, recorded)
    if unlike:
        raise UserError(f"{where}: {unlike}; {advice(cfg)}{', or ' * bool(instead)}{instead}")
    note_unknown(where, cfg, recorded)


def refuse_other_decoder(where: str, cfg: FamilyConfig, found: Any, recorded: Mapping[str, str]) -> None:
    """Do what `refuse_other` does, but of the decoder alone, by which a field of latents is shown.

    Only another decoder of the embedded miniature is refused. Of other models, whose files may differ though they hold
    the same numbers, a note tells it.
    """
    unlike = differences(cfg, found, recorded, cfg.chosen.decoders(recorded))
    if unlike and cfg.chosen.embedded:
        raise UserError(f"{where}: {unlike}; its latents are those of another decoder; {advice(cfg)}")
    if unlike:
        note(f"{where}: {unlike}; where its colours are wrong, {advice(cfg)}")
    note_unknown(where, cfg, recorded)


def files_of(found: Source) -> Any:
    """Return what the family of a field's run finds of its model, and do what `refuse_other_decoder` does."""
    files = found.cfg.chosen.check(found.cfg)
    refuse_other_decoder(str(found.folder.resolve()), found.cfg, files, recorded_weights(found.folder))
    return files


def differences(cfg: FamilyConfig, found: Any, recorded: Mapping[str, str], names: Iterable[str]) -> str:
    """Return in words which weights of these `names` are not as recorded, "" where none is or none is known."""
    now = cfg.weights(found) if recorded else {}
    unlike = [name for name in names if now and now.get(name) != recorded.get(name)]
    words = (f"{shown(name)} {brief(recorded, name)} then, {brief(now, name)} here" for name in unlike)
    return f"made with other weights of its model ({'; '.join(words)})" if unlike else ""


def brief(weights: Mapping[str, str], name: str) -> str:
    """Return the beginning of a fingerprint, as a message has it."""
    return f"{shown(weights[name])[:BRIEF]}..." if name in weights else "none"


def advice(cfg: FamilyConfig) -> str:
    """Return what to do where the weights are others."""
    return OTHER_VERSION if cfg.chosen.embedded else OTHER_FILES


def note_unknown(where: str, cfg: FamilyConfig, recorded: Mapping[str, str]) -> None:
    """Note where nothing says with which weights of the embedded miniature a run was made."""
    if cfg.chosen.embedded and not recorded:
        note(
            f"{where}: does not say which weights of the embedded miniature made it; where pictures are wrong, these "
            f"were earlier ones: {OTHER_VERSION}"
        )
