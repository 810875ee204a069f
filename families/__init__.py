"""The registry of the families of diffusion models, one folder each. No other room imports a family or lists them.

A family NAME has `families/NAME/options.py`, whose class `Options` is a `families.family.Family`, and
`families/NAME/adapter.py`, whose function `make(run, found, device)` returns its `ScoreAdapter`. Neither this
module nor the options of a family import torch. `docs/architecture.md` has the recipe for a new family.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from families.family import Family

NAMES = ("sd", "gddpm", "ddpm", "ideal")  # the first is the default

GONE = dict.fromkeys(
    ("ncsn", "ncsnv2", "vesde"),
    "for pictures without a prompt give --family ddpm --ddpm.checkpoint FOLDER, or for faces --family gddpm "
    "--gddpm.lsun_cat ffhq",
)  # family of the published code that is not here -> what to use instead


def options_of(name: str) -> type[Family]:
    """Return the class of a family's options."""
    return importlib.import_module(f"families.{name}.options").Options


def adapter_module(name: str) -> Any:
    """Return the module that makes a family's adapter; it imports torch."""
    return importlib.import_module(f"families.{name}.adapter")
