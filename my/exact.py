"""Where float64 is computed for a device: on that device, or, for one that has no float64, on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NO_FLOAT64 = ("mps",)  # types of devices: Apple's GPUs


def exact_device(device: torch.device | str | None) -> torch.device:
    """Return where what is meant for a device is computed in float64; None is the CPU."""
    import torch

    device = torch.device(device or "cpu")
    return torch.device("cpu") if device.type in NO_FLOAT64 else device
