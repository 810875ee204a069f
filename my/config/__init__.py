"""Typed configuration: a field's annotation, default and description are the flag and its help.

Precedence, lowest first: defaults, `--preset NAME`, `./config.yml`, flags.

    options.py        what a configuration declares: `Config`, its options
    describe.py       words about options: types, help, suggestions
    command_line.py   the words of a command line as flags
    values.py         values by declared type, and the instance that they make
    layers.py         defaults, presets, files and flags over one another; what a run keeps
"""

from my.config.command_line import ANSWERS
from my.config.describe import describe, near_miss, plain, spelled
from my.config.layers import (
    behind,
    by_option,
    given_apart,
    layer_of,
    load,
    of_layer,
    read,
    read_yaml,
    refuse_cut_off,
    refuse_unread,
    show,
    write,
)
from my.config.options import (
    EVER,
    FILLED_IN,
    FREE,
    MADE_BY,
    Apart,
    Config,
    Given,
    Layer,
    Option,
    by_use,
    flat,
    is_group,
    options_of,
    reset,
    walk,
)
from my.config.values import coerce

__all__ = [
    "ANSWERS",
    "EVER",
    "FILLED_IN",
    "FREE",
    "MADE_BY",
    "Apart",
    "Config",
    "Given",
    "Layer",
    "Option",
    "behind",
    "by_option",
    "by_use",
    "coerce",
    "describe",
    "flat",
    "given_apart",
    "is_group",
    "layer_of",
    "load",
    "near_miss",
    "of_layer",
    "options_of",
    "plain",
    "read",
    "read_yaml",
    "refuse_cut_off",
    "refuse_unread",
    "reset",
    "show",
    "spelled",
    "walk",
    "write",
]
