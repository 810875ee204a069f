"""A little world of solid objects whose truth is known: shapes, pictures, captions.

Its names are imported when they are first asked for, so that captions need no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .captions import ALL_PAIRS, TRAIN_PAIRS, caption, parse_prompt
    from .objects import OBJECTS
    from .render import BACKGROUND_RANGE, compose, coverage_maps, degraded, distance
    from .words import COLORS, DEGRADATIONS, UNSEEN_PAIRS

_HOME_OF = {
    "ALL_PAIRS": "captions",
    "TRAIN_PAIRS": "captions",
    "caption": "captions",
    "parse_prompt": "captions",
    "COLORS": "words",
    "DEGRADATIONS": "words",
    "UNSEEN_PAIRS": "words",
    "OBJECTS": "objects",
    "BACKGROUND_RANGE": "render",
    "compose": "render",
    "coverage_maps": "render",
    "degraded": "render",
    "distance": "render",
}  # name -> the module that has it
__all__ = [
    "ALL_PAIRS",
    "BACKGROUND_RANGE",
    "COLORS",
    "DEGRADATIONS",
    "OBJECTS",
    "TRAIN_PAIRS",
    "UNSEEN_PAIRS",
    "caption",
    "compose",
    "coverage_maps",
    "degraded",
    "distance",
    "parse_prompt",
]


def __getattr__(name: str) -> Any:
    """Return a name of this package's modules; raises AttributeError for any other."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
