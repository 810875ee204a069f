"""Copies of a device's tensors on the host, for which the loop that asks for them does not wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class HostCopy:
    """Values as they are now, their tensors as arrays on the host: whoever reads one waits for the device.

    A copy from CUDA is queued behind the work that computes its tensor. PyTorch makes it in pinned memory, as it does
    with all `non_blocking` ones: a copy to other memory would wait. A tensor on the CPU is copied too, since a later
    step may change it in place. What is not a tensor stays as it is.
    """

    def __init__(self, *values: Any) -> None:
        import torch

        tensors = [value for value in values if torch.is_tensor(value)]
        self.values = [
            value.detach().to("cpu", non_blocking=value.is_cuda, copy=True) if torch.is_tensor(value) else value
            for value in values
        ]
        self.events = []
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            self.events.append(torch.cuda.Event(blocking=True))  # who waits for it sleeps
            self.events[-1].record(torch.cuda.current_stream(device))

    def __getitem__(self, index: int) -> Any:
        """Return a value, once it is there."""
        for event in self.events:
            event.synchronize()
        value = self.values[index]
        return value.numpy() if hasattr(value, "numpy") else value

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self.values)))
