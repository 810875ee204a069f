"""Errors of diffusers and transformers that cannot read a network, in one line for people."""

from __future__ import annotations

import re

from my.errors import first_line, shown

MISFIT = re.compile(r"(\S+) expected shape torch\.Size\(\[(.*?)\]\), but got torch\.Size\(\[(.*?)\]\)")  # diffusers'


def reason(error: Exception) -> str:
    """Return in one line why a library could not read a network, without its advice to programmers."""
    m = MISFIT.search(str(error))
    if m:
        return f"{shown(m[1])} is ({m[3]}) in the weights, and ({m[2]}) by config.json"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no file {error.filename}"
    return first_line(error).split(". ")[0].rstrip(". :")
