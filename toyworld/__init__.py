"""A little world of solid objects whose truth is known: shapes, pictures, captions."""

from .captions import ALL_PAIRS, TRAIN_PAIRS, caption, parse_prompt
from .objects import COLORS, OBJECTS, UNSEEN_PAIRS
from .render import BACKGROUND_RANGE, compose, coverage_maps, distance

__all__ = ["ALL_PAIRS", "BACKGROUND_RANGE", "COLORS", "OBJECTS", "TRAIN_PAIRS", "UNSEEN_PAIRS",
           "caption", "compose", "coverage_maps", "distance", "parse_prompt"]
