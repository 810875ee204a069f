"""Copies on the host: values of the moment, in the layout they had."""

import numpy as np
import pytest
import torch

from my.host_copy import HostCopy


def test_later_changes_do_not_reach_a_copy():
    x, loss = torch.arange(6.0).view(2, 3), torch.tensor(0.5)
    copy = HostCopy(x.T, loss, 7, "text")
    x.zero_()
    loss.zero_()
    picture, value, number, text = copy
    assert np.array_equal(picture, [[0, 3], [1, 4], [2, 5]]) and picture.strides == (4, 12)
    assert (value.shape, value.item(), number, text) == ((), 0.5, 7, "text")
    assert np.array_equal(copy[0], picture)


def test_a_tensor_that_needs_a_gradient():
    assert HostCopy(torch.ones(2, requires_grad=True))[0].tolist() == [1, 1]


class Event:
    """What `torch.cuda.Event` would do, where there is no CUDA."""

    def __init__(self, blocking):
        assert blocking  # the thread sleeps while it waits
        self.log = []

    def record(self, stream):
        self.log.append(("record", stream))

    def synchronize(self):
        self.log.append("wait")


class OnCUDA(torch.Tensor):
    """A tensor that says that it is on CUDA, and takes down how it is copied."""

    asked = []
    is_cuda, device = True, torch.device("cuda:1")

    def detach(self):
        return self

    def to(self, *args, **kwargs):
        self.asked.append((args, kwargs))
        return self.as_subclass(torch.Tensor).clone()


def test_a_copy_from_cuda_waits_when_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    copy = HostCopy(torch.ones(2).as_subclass(OnCUDA), torch.zeros(()).as_subclass(OnCUDA), torch.ones(1))
    assert OnCUDA.asked == [(("cpu",), {"non_blocking": True, "copy": True})] * 2
    (event,) = copy.events
    assert event.log == [("record", "stream of cuda:1")]  # after both copies, on the stream that made them
    assert copy[0].tolist() == [1, 1] and event.log[1:] == ["wait"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory_on_a_gpu():
    x = torch.rand(3, 4, device="cuda")
    copy = HostCopy(x)
    assert copy.values[0].is_pinned() and np.array_equal(copy[0], x.cpu().numpy())
