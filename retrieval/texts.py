"""The texts among which a picture has to find its own. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from my import plain_files
from my.errors import UserError
from options.family import TEXTS

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "sweeps" / "paper.yml"  # names the presets of the paper's prompts
MAX_BYTES = 10_000_000  # of a file of texts


def same_for_clip(text: str) -> str:
    """Return what CLIP's tokenizer makes of the letters of a text: they are lower case, between single spaces."""
    return " ".join(text.lower().split())


def distinct(texts: Iterable[str]) -> dict[str, str]:
    """Return {`same_for_clip` of a text: the text as it came first}, in the order of the texts."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(same_for_clip(text), text.strip())
    return found


def of_the_paper() -> Iterator[str]:
    """Yield the prompts of the paper's list, as the presets have them."""
    for name in plain_files.read_yaml(PAPER)["axes"]["preset"]:
        yield plain_files.read_yaml(ROOT / "presets" / f"{name}.yml")[TEXTS]["prompt"]


def read(path: str, flag: str) -> list[str]:
    """Return the texts in a UTF-8 file, one per line; empty lines are left out.

    Raises UserError, which begins with `flag`, for a file that cannot be read, or that has no text.
    """
    try:
        lines = plain_files.text_of(path, MAX_BYTES).splitlines()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; give a file with one text per line") from None
    except ValueError as error:
        raise UserError(f"{flag} {path} {error}; give a file in UTF-8 with one text per line") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{flag} {path}: has no text; write one per line, or leave it out")
    return texts
