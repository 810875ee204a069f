"""A CUDA device that is not there: it finds what would make the host wait, and counts what the device would do.

Inside `pretended_cuda()`, tensors on "cuda" have a shape, a dtype and a device, and no values. They are PyTorch's fake
tensors, which also refuse an operation on two devices. Tensors on the CPU are real. On top of that, `Machine` notes
each wait of the host for the device, and counts launches, bytes, floating-point operations and memory. No GPU is
needed, and no driver. What a real device would take in time is not known here.
"""

from __future__ import annotations

import contextlib
import heapq
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import families

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0)
MEMORY = 24 * 2**30  # bytes that the pretended device says it has
GRAIN = 512  # bytes: PyTorch's allocator rounds the size of each block up to a multiple of it
ANSWER = 1  # what a read of a pretended value gives
MAX_FLASH_DIM = 256  # features per head that flash attention takes

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
NO_KERNEL = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.resize_,
    aten.set_,
    aten.record_stream,
    aten._linalg_check_errors,
}  # operators that launch nothing, besides views
READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True)
class Wait:
    """One wait of the host for the device: what it waits for, and where, the innermost line first."""

    what: str
    where: tuple[str, ...]  # "file:line function", of files outside of PyTorch; a node of backward has its class first

    def __str__(self) -> str:
        return f"{self.what} at {' < '.join(self.where[:4])}"

    def within(self, *places: str) -> bool:
        """Return whether one of its lines begins with one of `places`, such as "voxnerf/reference.py"."""
        return any(line.startswith(places) for line in self.where)


@dataclass
class Counts:
    """What happened since the last `Machine.reset`. The keys of counters are sections, "" outside of any."""

    waits: list[Wait] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    bytes_moved: Counter[str] = field(
        default_factory=Counter
    )  # at most: inputs and outputs of what launches, each as a whole
    flops: Counter[str] = field(default_factory=Counter)  # a multiplication and an addition are two
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)  # launches by (section, operator)
    peak: int = 0  # most bytes of tensors at any time, parameters included


class Machine(TorchDispatchMode):
    """The pretended device, and its host.

    `launches` {operator: number} says how many kernels an operator launches, where that is not one. Without `float64`
    the device refuses such numbers, as Apple's mps does.
    """

    def __init__(self, launches: Mapping[str, int] | None = None, float64: bool = True) -> None:
        super().__init__()
        self.float64 = float64
        self.fake = _Fake(allow_non_fake_inputs=False)
        self.launches_of = dict(launches or {})
        self.counts, self.live, self.sections = Counts(), 0, [""]
        self._storages: set[int] = set()
        self._pinned: weakref.WeakSet[Any] = weakref.WeakSet()

    def reset(self) -> Counts:
        """Forget what was counted; return the counts that begin now, with the memory now in use as their peak."""
        self.counts = Counts(peak=self.live)
        return self.counts

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count what happens inside under `name`; of nested sections, the outermost counts."""
        self.sections.append(self.sections[-1] or name)
        try:
            yield
        finally:
            self.sections.pop()

    # ------------------------------------------------------------------ dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func is not torch.ops.prim.device.default:
            with self:  # there operators come as they are called, and not as those that they are made of
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        if func is torch.ops.prim.device.default:
            return args[0].device
        if func is aten.is_pinned.default:
            return args[0].untyped_storage() in self._pinned
        if not fakes and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return self._on_host(func, args, kwargs)
        if func in COPIES:
            return self._copy(func, args, kwargs)
        if func in INDEXED:
            args = (args[0], self._indices(func, *args), *args[2:])
        elif func is aten._linalg_check_errors.default or any(tag in func.tags for tag in READS):
            return self._read(func, args, kwargs)
        return self._run(func, args, kwargs)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation that no tensor on the device takes part in."""
        pins = func is aten._pin_memory.default or kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            out = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if pins:
            self._pinned.add(out.untyped_storage())
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation on the device, and count it."""
        args, kwargs = tree_map(self._to_fake, (args, kwargs))
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _to_fake(self, x: Any) -> Any:
        return self.fake.from_tensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do a copy, between host and device or on the device."""
        if func is aten.copy_.default:
            to, source = args[0], args[1]
            blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            to, source, blocks = None, args[0], not kwargs.get("non_blocking", False)
        target = to.device if to is not None else torch.device(kwargs.get("device") or source.device)
        if source.device.type == target.type:
            return self._run(func, args, kwargs)
        if target.type == "cuda":
            if source.is_meta:  # what has no values takes the place of what a file holds
                return self._run(aten.empty_like.default, (source,), _without(kwargs, "non_blocking"))
            if blocks and source.numel():
                self._wait("a blocking copy to the device")
            return self._run(func, args, kwargs)
        if to is not None and to.untyped_storage() not in self._pinned:
            blocks = True  # memory that may be swapped out is written while the host waits
        if blocks and source.numel():
            self._wait("a blocking copy to the host")
        self._count(func, (source,), {}, source)
        with unset_fake_temporarily():
            if to is not None:
                return to.fill_(ANSWER)
            out = torch.full(source.shape, ANSWER, dtype=kwargs.get("dtype") or source.dtype)
        if not blocks:
            self._pinned.add(out.untyped_storage())
        return out

    def _indices(self, func: Any, x: torch.Tensor, indices: Sequence[Any], *values: Any) -> list[Any]:
        """Return indices into x without masks: each is taken to select everything."""
        if x.device.type != "cuda":
            raise RuntimeError(f"{func}: a tensor on the host takes no indices on the device")
        out: list[Any] = []
        fills = len(values) > 0 and values[0].numel() == 1 and len(indices) == 1  # which is a masked_fill
        for i in indices:
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                if not fills:
                    self._wait(f"{func} by a mask")
                out += [torch.empty(i.numel(), dtype=torch.long, device=DEVICE) for _ in range(i.ndim)]
                continue
            if i is not None and i.device.type != "cuda":
                self._wait(f"{func} by indices on the host")
                i = torch.empty(i.shape, dtype=i.dtype, device=DEVICE)
            out.append(i)
        return out

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do an operation whose result the host must know."""
        x = args[0]
        if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
            return self._run(func, args, kwargs)
        self._wait(str(func))
        self._count(func, args, kwargs, x)
        if func is aten._linalg_check_errors.default:
            return None
        if func is aten._local_scalar_dense.default:
            with unset_fake_temporarily():
                return torch.full((), ANSWER, dtype=x.dtype).item()
        if func is aten.nonzero.default:
            return torch.empty(x.numel(), x.ndim, dtype=torch.long, device=DEVICE)
        if func is aten.masked_select.default:
            return torch.empty(x.numel(), dtype=x.dtype, device=DEVICE)
        return self._run(func, args, kwargs)

    # ------------------------------------------------------------------ counts

    def _wait(self, what: str) -> None:
        self.counts.waits.append(Wait(what, tuple(_lines())))

    def waits_for(self, what: str) -> Callable[..., None]:
        """Return a function that waits for the device, such as `torch.cuda.synchronize`."""
        return lambda *args, **kwargs: self._wait(what)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor) and x.device.type == "cuda"]
        if not self.float64 and any(x.dtype == torch.float64 for x in made):
            raise TypeError(f"{func}: the device has no float64")
        self._remember(made)
        name, section, counts = str(func._overloadpacket), self.sections[-1], self.counts
        if name not in self.launches_of and (launches_nothing(func) or not any(x.numel() for x in made)):
            return
        n = self.launches_of.get(name, 1)
        counts.launches[section] += n
        counts.operators[section, name] += n
        given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)}
        counts.bytes_moved[section] += sum(x.numel() * x.element_size() for x in [*given.values(), *made])
        known = flop_registry.get(func._overloadpacket)
        counts.flops[section] += (
            known(*args, **kwargs, out_val=out) if known else sum(x.numel() for x in made if x.is_floating_point())
        )

    def _remember(self, made: Sequence[FakeTensor]) -> None:
        """Count the memory of new tensors, until nothing refers to it any more."""
        for x in made:
            storage = x.untyped_storage()
            if id(storage) in self._storages:
                continue
            size = -(-storage.nbytes() // GRAIN) * GRAIN
            self._storages.add(id(storage))
            self.live += size
            weakref.finalize(storage, self._forget, id(storage), size).atexit = False
        self.counts.peak = max(self.counts.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


class _Fake(FakeTensorMode):
    avoid_device_init = True  # it never asks for a driver, also where `torch.cuda.is_available` is made to say yes


def launches_nothing(func: Any) -> bool:
    """Return whether an operator makes only a view, or memory without values."""
    returns = func._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return view or func._overloadpacket in NO_KERNEL or func.namespace == "prim"


def _without(kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != name}


def _lines() -> Iterator[str]:
    """Yield the lines that run now outside of PyTorch and of this file, the innermost first."""
    packages = Path(torch.__file__).parent
    yield from _nodes[-1:]
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if path == Path(__file__) or path.is_relative_to(packages) or path.name == "contextlib.py":
            continue
        if path.is_relative_to(ROOT):
            path = path.relative_to(ROOT)
        elif "site-packages" in path.parts:
            path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
        yield f"{path.as_posix()}:{line} {frame.f_code.co_name}"


# ---------------------------------------------------------------- the device


@contextlib.contextmanager
def pretended_cuda(launches: Mapping[str, int] | None = None, float64: bool = True) -> Iterator[Machine]:
    """Yield a `Machine`: inside, PyTorch has one CUDA device. `launches` and `float64` are as in `Machine`."""
    machine = Machine(launches, float64)
    properties = SimpleNamespace(
        name="pretended", total_memory=MEMORY, major=8, minor=0, multi_processor_count=108, warp_size=32
    )
    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *args: properties,
        "get_device_name": lambda *args: properties.name,
        "get_device_capability": lambda *args: (properties.major, properties.minor),
        "mem_get_info": lambda *args: (MEMORY - machine.live, MEMORY),
        "empty_cache": lambda: None,
        "synchronize": machine.waits_for("torch.cuda.synchronize"),
    }
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run_backward))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(machine.fake)
        stack.enter_context(machine)
        yield machine


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Make the networks of Stable Diffusion without reading a weight: their tensors have shapes only."""
    adapter = families.adapter_module("sd")
    load: Any = adapter.load_parts

    def load_shapes(path: Any, found: Any, options: Any, dtype: torch.dtype, **others: Any) -> Any:
        parts = load(path, found, options, dtype, **others | {"empty": True})
        return {name: x.to(dtype) if isinstance(x, torch.nn.Module) else x for name, x in parts.items()}

    with mock.patch.object(adapter, "load_parts", load_shapes):
        yield


_attention = F.scaled_dot_product_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> torch.Tensor:
    """Return attention by the kernel that PyTorch takes on CUDA, where it is a fused one; see its own docstring."""
    if query.device.type != "cuda" or attn_mask is not None or others:
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others)
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
    if query.element_size() == 2 and query.shape[-1] <= MAX_FLASH_DIM:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, None, grad, dropout_p, is_causal, scale=scale
    )[0]


# ---------------------------------------------------------------- back-propagation


@torch.no_grad()
def run_backward(
    roots: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    keep_graph: bool = False,
    create_graph: bool = False,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = True,
) -> tuple[torch.Tensor | None, ...] | None:
    """Back-propagate as PyTorch's engine does, which asks for a driver as soon as it is built for CUDA.

    The arguments are those of `torch.autograd.graph._engine_run_backward`. Nodes run in the engine's order: of those
    that are ready, the one that was made last. What a node has saved lives until the graph goes.
    """
    assert not create_graph
    edges = [_edge(x) for x in roots]
    wanted = [_edge(x) for x in inputs]
    waiting = _dependencies([node for node, _ in edges])
    arrived: dict[Any, dict[int, torch.Tensor]] = {}
    for (node, k), grad, root in zip(edges, grads, roots):
        _arrive(arrived, node, k, torch.ones_like(root) if grad is None else grad)
    order = [(-node._sequence_nr(), i, node) for i, (node, _) in enumerate(edges) if not waiting[node]]
    order = list({id(item[2]): item for item in order}.values())
    heapq.heapify(order)
    found: dict[tuple[Any, int], torch.Tensor] = {}
    count = len(order)
    while order:
        _, _, node = heapq.heappop(order)
        mine = arrived.pop(node, {})
        found.update({(node, k): grad for k, grad in mine.items()})
        if mine and not (wanted and not node.next_functions):
            for (after, k), grad in zip(node.next_functions, _apply(node, mine)):
                if after is not None and grad is not None:
                    _arrive(arrived, after, k, _fit(grad, after._input_metadata[k]))
        for after, _ in node.next_functions:
            if after is not None:
                waiting[after] -= 1
                if not waiting[after]:
                    count += 1
                    heapq.heappush(order, (-after._sequence_nr(), count, after))
    if accumulate_grad:
        assert not wanted
        return None
    return tuple(found.get(edge) for edge in wanted)


def _edge(x: Any) -> tuple[Any, int]:
    if isinstance(x, torch.Tensor):
        edge = torch.autograd.graph.get_gradient_edge(x)
        return edge.node, edge.output_nr
    return x.node, x.output_nr


def _dependencies(roots: Sequence[Any]) -> Counter[Any]:
    """Return {node: number of edges to it} of the graph behind `roots`."""
    counts: Counter[Any] = Counter(dict.fromkeys(roots, 0))
    todo, seen = list(dict.fromkeys(roots)), set(roots)
    while todo:
        for after, _ in todo.pop().next_functions:
            if after is not None:
                counts[after] += 1
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
    return counts


def _arrive(arrived: dict[Any, dict[int, torch.Tensor]], node: Any, k: int, grad: torch.Tensor) -> None:
    mine = arrived.setdefault(node, {})
    mine[k] = mine[k] + grad if k in mine else grad


_nodes: list[str] = []  # the classes of the nodes that run now, such as "MulBackward0"


def _apply(node: Any, grads: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    """Return what a node makes of the gradients {number: gradient} of its outputs."""
    metadata = node._input_metadata
    given = [grads.get(k) for k in range(len(metadata))]
    _nodes.append(type(node).__name__)
    try:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            given = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
                for grad, m in zip(given, metadata)
            ]
            out = node.apply(*given)
        else:
            out = node(*given)
    finally:
        _nodes.pop()
    return out if isinstance(out, tuple) else (out,)


def _fit(grad: torch.Tensor, metadata: Any) -> torch.Tensor:
    """Return a gradient in the shape and dtype of what it belongs to."""
    grad = grad if grad.shape == metadata.shape else grad.sum_to_size(metadata.shape)
    return grad if grad.dtype == metadata.dtype else grad.to(metadata.dtype)
