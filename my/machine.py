"""What this machine is, and how much of its memory this process has taken. Imports nothing heavy."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_INFO = Path("/proc/cpuinfo")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor, such as "AMD EPYC 7B12"."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine_memory() -> int:
    """Return the bytes of memory that this machine has."""
    import psutil

    return psutil.virtual_memory().total


def peak_memory() -> dict[str, int]:
    """Return the most bytes that this process has held: {"memory": of the host, "gpu_memory": of its CUDA device}.

    What cannot be known here is left out.
    """
    peak = {}
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        if most := getattr(psutil.Process().memory_info(), "peak_wset", None):
            peak["memory"] = most
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
        peak["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        peak["gpu_memory"] = torch.cuda.max_memory_allocated()
    return peak
