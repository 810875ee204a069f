"""The rules of score distillation, by name, and what each reads. `rules.py` in the project's folder has the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple


class Facts(NamedTuple):
    """What a rule reads."""

    noise: bool = True  # noise that is added to the rendering
    text: bool = True  # a score without text, which only a model that reads text has
    bad_words: Literal["needed", "read"] | None = None


RULES = {
    "sjc": Facts(text=False),
    "noiseless": Facts(text=False, noise=False),
    "sds": Facts(text=False),
    "csd": Facts(bad_words="read"),
    "nfsd": Facts(bad_words="needed"),
    "bridge": Facts(bad_words="needed"),
    "asd": Facts(),
    "ism": Facts(noise=False),
    "sdi": Facts(noise=False),
}


def rules_where(wanted: Callable[[Facts], object]) -> tuple[str, ...]:
    """Return the names of the rules of whose facts `wanted` is true."""
    return tuple(name for name, facts in RULES.items() if wanted(facts))
