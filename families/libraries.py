"""Networks that diffusers and transformers read: what these cannot read, in one line, and what would never end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from my.errors import first_line, shown
from my.tensor_file import TensorFile

MISFIT = re.compile(r"(\S+) expected shape torch\.Size\(\[(.*?)\]\), but got torch\.Size\(\[(.*?)\]\)")  # diffusers'
MAX_SETTING = 1_000_000  # a setting of a network may be this large, however few weights the network has


def reason(error: Exception) -> str:
    """Return in one line why a library could not read a network, without its advice to programmers."""
    m = MISFIT.search(str(error))
    if m:
        return f"{shown(m[1])} is ({m[3]}) in the weights, and ({m[2]}) by config.json"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no file {error.filename}"
    return first_line(error).split(". ")[0].rstrip(". :")


def refuse_endless(settings: Mapping[str, Any], files: Sequence[TensorFile]) -> None:
    """Raise ValueError for settings of a network far larger than its weights, which would take forever to build."""
    tensors = sum(len(file.shapes) for file in files)
    most = max(MAX_SETTING, sum(math.prod(shape) for file in files for shape in file.shapes.values()))
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        limit = tensors if "layers" in name else most
        if len(values) > tensors or any(type(n) in (int, float) and not n <= limit for n in values):
            raise ValueError(
                f"{shown(name)}, {shown(value, 40)}, is beyond what weights of {tensors} tensor{'s' * (tensors != 1)} "
                "can be of"
            )
