"""How a network is called in every step: its operations, with little Python around them.

The modules of diffusers spend milliseconds of Python per call. That is a third of the time of a small UNet on a CPU.
So the operations of a call are recorded once, as one flat function, or compiled.
"""

from __future__ import annotations

import contextlib
import math
import operator
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from my.errors import first_line, is_out_of_memory, note

Call = Callable[..., torch.Tensor]

RECORD_AFTER = 20  # calls with arguments of the same shapes: recording pays for itself only when many more follow
MOST_RECORDINGS = 4  # of one network, one for each set of shapes
CLOSE = 0.01  # a recording must repeat a call up to this share of the largest number; half precision rounds this much


class NotRecordable(Exception):
    """The call does what a recording cannot repeat."""


class NetworkCall:
    """A network as a function of tensors: `call(*tensors)`, which calls `net` and returns one tensor.

    After RECORD_AFTER calls with the same shapes its operations are recorded, and from then on these are done without
    the modules around them. They are the same operations in the same order, so the numbers are the same. With
    `compiled`, torch.compile turns them into fewer kernels instead, which rounds otherwise. Where either fails, a note
    says so, and `call` goes on as it is. Weights may change in place, but `net` must keep its tensors.
    """

    def __init__(self, net: torch.nn.Module, call: Call, compiled: bool = False) -> None:
        self.net, self.call = net, call
        self.compiled = torch.compile(call, mode="reduce-overhead", dynamic=False) if compiled else None
        self.records, self.told = not compiled, False
        self.calls: Counter[tuple[Any, ...]] = Counter()
        self.recordings: dict[tuple[Any, ...], Call] = {}
        self.is_plain = False

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """While the block runs, call `call` as it is: other tensors may be in the place of those of `net`."""
        self.is_plain = True
        try:
            yield
        finally:
            self.is_plain = False

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self.is_plain or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return self.call(*tensors)
        with torch.inference_mode():
            out = self._without_gradient(*tensors)
        return out.clone()  # an ordinary tensor, which the next call does not overwrite

    def _without_gradient(self, *tensors: torch.Tensor) -> torch.Tensor:
        if self.compiled is not None:
            if not self.told:
                self.told = True
                note("--compile True: compiling the network, which takes about a minute")
            try:
                torch.compiler.cudagraph_mark_step_begin()
                return self.compiled(*tensors)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self.compiled, self.records = None, True
                note(f"--compile True: the network could not be compiled ({first_line(error)}); it runs without that")
        if not self.records:
            return self.call(*tensors)
        key = tuple((x.shape, x.dtype, x.device, x.stride()) for x in tensors)
        if key in self.recordings:
            return self.recordings[key](*tensors)
        self.calls[key] += 1
        if self.calls[key] <= RECORD_AFTER or len(self.recordings) == MOST_RECORDINGS:
            return self.call(*tensors)
        return self._record(key, tensors)

    def _record(self, key: tuple[Any, ...], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the result of the call, whose operations are recorded on the way, and compared once."""
        try:
            out, recording = recorded(self.net, self.call, tensors)
            size = out.abs().max().item()
            if not math.isfinite(size):  # nothing to compare with: the next call is recorded
                return out
            again = recording(*tensors)
            if not torch.allclose(again, out, rtol=0, atol=CLOSE * size):
                raise NotRecordable("it does not repeat itself")
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.records = False
            note(
                f"the operations of {type(self.net).__name__} could not be recorded ({first_line(error)}); it is slower"
            )
            return self.call(*tensors)
        self.recordings[key] = recording
        return out


def recorded(net: torch.nn.Module, call: Call, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Call]:
    """Return (call(*tensors), a function that repeats its operations on other tensors of the same shapes).

    Raises NotRecordable where a tensor has another origin than `tensors`, the weights and buffers of `net` and
    operations of torch on these, or where a tensor is changed in place.
    """
    weights = [*net.parameters(), *net.buffers()]
    with Recorder([*tensors, *weights]) as recorder:
        out = call(*tensors)
    graph = recorder.finished(out)
    repeat = torch.fx.GraphModule(torch.nn.Module(), graph).forward
    return out, lambda *args: repeat(*args, *weights)


class Recorder(TorchFunctionMode):
    """Writes every function of torch that is called inside the block into a graph of torch.fx."""

    def __init__(self, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.graph = torch.fx.Graph()
        self.nodes = WeakTensorKeyDictionary()  # weak, so that a tensor is freed as early as without the recording
        for i, x in enumerate(inputs):
            self.nodes[x] = self.graph.placeholder(f"x_{i}")

    def finished(self, out: torch.Tensor) -> torch.fx.Graph:
        """Return the graph, whose result is `out`."""
        self.graph.output(self.node(out))
        self.graph.eliminate_dead_code()
        return self.graph

    def node(self, value: Any) -> Any:
        """Return the node of a tensor, and any other value as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if value not in self.nodes:
            raise NotRecordable("a tensor comes from elsewhere")
        return self.nodes[value]

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        name = getattr(func, "__name__", "")
        if changes_in_place(name, kwargs):
            raise NotRecordable(f"{name} changes a tensor in place")
        if all(x in self.nodes for x in results):
            return out  # a shape, or a tensor that was right as it was
        node = self.written(func, name, tree_map(self.node, args), tree_map(self.node, dict(kwargs)))
        if isinstance(out, torch.Tensor):
            self.nodes[out] = node
        else:
            for i, x in enumerate(out):
                self.nodes[x] = self.graph.call_function(operator.getitem, (node, i))
        return out

    def written(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
        """Return the node of a call, which is at the end of the graph."""
        if name in ("div", "__truediv__") and args[1:] == (1,) and not kwargs:
            return args[0]  # exactly the same numbers: no residual of a plain Stable Diffusion is scaled
        if name == "__get__":  # such as x.T
            return self.graph.call_function(getattr, (args[0], func.__self__.__name__))
        if isinstance(func, types.MethodDescriptorType):
            return self.graph.call_method(name, args, kwargs)
        return self.graph.call_function(func, args, kwargs)


def changes_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch changes its argument, by its name and keywords: add_, __iadd__, out=, inplace=."""
    dunder = name.startswith("__") and name.endswith("__")
    in_place = name in ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "__set__")
    return in_place or (name.endswith("_") and not dunder) or any(kwargs.get(key) for key in ("inplace", "out"))
