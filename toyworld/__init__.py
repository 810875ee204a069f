"""A little world of solid objects whose truth is known: shapes, pictures, captions.

Its names are imported when they are asked for, so that captions come without PyTorch.
"""

import importlib

HOMES = {
    "captions": ["ALL_PAIRS", "TRAIN_PAIRS", "caption", "parse_prompt"],
    "words": ["COLORS", "UNSEEN_PAIRS"],
    "objects": ["OBJECTS"],
    "render": ["BACKGROUND_RANGE", "compose", "coverage_maps", "distance"],
}
_HOME_OF = {name: module for module, names in HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
