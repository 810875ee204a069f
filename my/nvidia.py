"""What the driver of an NVIDIA GPU says about it, and why PyTorch does not see such a GPU."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import NamedTuple

from my.errors import first_line, shown

TOOL = "nvidia-smi"  # the driver brings it
QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")  # fields that every driver knows
TIMEOUT = 5.0  # seconds
BUILDS = "https://pytorch.org/get-started/locally/"
NEEDED = {11: 450, 12: 525, 13: 580}  # CUDA's major version: the oldest series of drivers that its programs run with


class Answer(NamedTuple):
    """What the driver's tool says. All is empty where there is no such tool."""

    names: tuple[str, ...] = ()  # of the GPUs
    driver: str = ""  # version, such as "580.65.06"
    failure: str = ""  # why it names no GPU, though it is installed


@functools.cache
def ask() -> Answer:
    """Ask the driver's tool for its GPUs, once per process."""
    tool = shutil.which(TOOL)
    if tool is None:
        return Answer()
    try:
        done = subprocess.run([tool, *QUERY], capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return Answer(failure=f"{TOOL} does not answer within {TIMEOUT:g} s")
    except OSError as error:
        return Answer(failure=f"{TOOL} does not start: {error.strerror}")
    said = done.stdout.decode(errors="replace")
    rows = [[shown(word.strip()) for word in line.rpartition(",")[::2]] for line in said.splitlines() if "," in line]
    rows = [row for row in rows if series(row[1]) and row[0]]
    if done.returncode or not rows:
        words = said.strip() or done.stderr.decode(errors="replace").strip()
        return Answer(failure=f"{TOOL} names no GPU: {first_line(words) if words else f'status {done.returncode}'}")
    return Answer(tuple(name for name, _ in rows), rows[0][1])


def series(driver: str) -> int:
    """Return the series of a driver's version, such as 580 of "580.65.06"; 0 where that is no version."""
    first = driver.partition(".")[0]
    return int(first) if first.isascii() and first.isdigit() and len(first) < 6 else 0


def needed_driver(cuda: int) -> str:
    """Return in words which driver the programs of a major version of CUDA need."""
    return f"a driver of series {NEEDED[cuda]} or newer" if cuda in NEEDED else f"a driver of CUDA {cuda} or newer"


def unseen() -> str:
    """Return in one line why PyTorch sees no GPU though the driver's tool knows of one; "" where neither is so."""
    import torch

    if torch.cuda.is_available():
        return ""
    names, driver, failure = ask()
    if not names:
        return failure
    cuda = torch.version.cuda
    if cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA; {BUILDS} has the build for this driver, {driver}"
    major = int(cuda.partition(".")[0])
    if series(driver) < NEEDED.get(major, 0):
        return (
            f"driver {driver} is too old for PyTorch's CUDA {cuda}, which needs {needed_driver(major)}: update it, or "
            f"install an older CUDA's build from {BUILDS}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {shown(visible)!r}"
    return f"PyTorch's CUDA {cuda} does not start with driver {driver}{hidden}"
