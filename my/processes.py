"""The processes of one run, which torchrun has started: which one this is, what falls to it, and sums over all."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from my.errors import RunError, UserError, first_line
from my.signals import Heed, Stopped, at_once

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 600.0  # a process that lets the others wait for so long counts as lost
LOOK_S = 1.0  # between two looks at whether torchrun is there, while the processes find one another
STORE_EVERY = 5  # at each so many looks, its store is asked too
LAUNCHER = os.getppid()  # torchrun; a command imports this file before PyTorch, which takes seconds
POLL_S = 1e-4  # between two looks at a sum that is on its way


class Lost(RunError):
    """Ends a process whose run cannot go on, since another process has ended. All end alike."""

    alike = True


class Processes:
    """The processes of a run, seen from one of them.

    rank: its number among all `n` of them, on all machines.  local_rank: its number among the `n_local` of its machine.
    """

    def __init__(self, rank: int = 0, n: int = 1, local_rank: int = 0, n_local: int = 1) -> None:
        self.rank, self.n, self.local_rank, self.n_local = rank, n, local_rank, n_local
        self.heed = Heed()  # whether a signal has asked the run to end

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def part(self, n_items: int) -> range:
        """Return which of `n_items` fall to this process. Parts are as equal as can be, in the order of ranks."""
        return range(n_items * self.rank // self.n, n_items * (self.rank + 1) // self.n)

    def refuse_fewer(self, flag: str, n_items: int) -> None:
        """Raise UserError where there are fewer items than processes."""
        if n_items < self.n:
            raise UserError(
                f"{flag} {n_items} with {self.n} processes: each needs one at least; give {flag} {self.n} or more, or "
                f"start no more than {n_items} with torchrun"
            )

    def device(self, name: str) -> str:
        """Return the `--device` of this process: of several on a machine with CUDA, each takes a GPU of its own.

        Raises UserError for a machine with too few, in all its processes, and for one GPU that all would share.
        """
        import torch

        if self.n == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise UserError(f"--device {name} with {self.n} processes: each takes a GPU of its own; give auto or cpu")
        n_gpus = torch.cuda.device_count()
        if self.n_local > n_gpus:
            raise UserError(
                f"--nproc_per_node {self.n_local}: this machine has {n_gpus} GPUs, and each process needs its own; "
                f"start {n_gpus} or fewer, or give --device cpu"
            )
        return f"cuda:{self.local_rank}"

    @property
    def orphaned(self) -> bool:
        """Whether torchrun has ended, which would end this process where others are lost. Windows does not tell it."""
        return os.getppid() != LAUNCHER

    # ------------------------------------------------------------------ together

    def join(self, device: torch.device) -> None:
        """Wait for the others, which are to sum tensors on their own `device` of this type; RunError without them.

        Where torchrun ends meanwhile, as by a SIGKILL, so does the process, by SIGTERM: the library waits in C.
        """
        if self.n == 1:
            return
        import torch

        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "nccl"
        try:
            with at_once(), self._ended_with_launcher():
                torch.distributed.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the {self.n} processes of this run do not find one another: {first_line(error)}") from None

    @contextlib.contextmanager
    def _ended_with_launcher(self) -> Iterator[None]:
        """While the block runs, end this process by SIGTERM once torchrun has ended."""
        left = threading.Event()

        def look() -> None:
            for i in itertools.count(1):
                if left.wait(LOOK_S):
                    return
                if self.orphaned or (i % STORE_EVERY == 0 and store_is_gone()):
                    signal.raise_signal(signal.SIGTERM)
                    return

        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            left.set()

    def leave(self) -> None:
        """Let the others go: no sum is to come."""
        if self.n > 1:
            import torch

            torch.distributed.destroy_process_group()

    def summed(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sums of tensors over all processes, in one exchange. All get the same bits.

        Each process gives tensors of the same shapes. They are added in the order of ranks. Raises Lost where the
        others do not answer within TIMEOUT_S, and where torchrun has ended. Raises Stopped where a signal that `heed`
        knows of asks the run to end: torchrun sends one, too, where another process has ended.
        """
        if self.n == 1:
            return list(tensors)
        import torch

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        total, *others = self._gathered(flat)
        for other in others:
            total = total + other
        parts = total.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors)]

    def _gathered(self, flat: torch.Tensor) -> torch.Tensor:
        """Return `flat` (m,) of each process, (n, m). A signal is heeded while it waits."""
        from torch import distributed

        every, deadline = flat.new_empty(self.n, len(flat)), time.monotonic() + TIMEOUT_S
        try:
            work = distributed.all_gather_into_tensor(every.view(-1), flat, async_op=True)
            assert work is not None  # with async_op there is one
            while not (work.is_completed() or self.heed.asked):
                if self.orphaned:
                    raise Lost("torchrun, which started the processes of this run, has ended")
                if time.monotonic() > deadline:
                    raise Lost(f"another process of this run has not answered for {TIMEOUT_S:g} s")
                time.sleep(POLL_S)
            if not self.heed.asked:
                work.wait()  # at once; it raises what went wrong
        except RuntimeError:
            if not self.heed.asked:
                raise Lost("another process of this run has ended") from None
        if self.heed.asked:
            raise Stopped(self.heed.asked)
        return every


def store_is_gone(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun's store, where the processes find one another, takes no connection: torchrun has ended.

    It may have ended before this process could see who started it.
    """
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False  # one of the processes holds the store, and may come late
    try:
        socket.create_connection((environ["MASTER_ADDR"], int(environ["MASTER_PORT"])), LOOK_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def of_torchrun(environ: Mapping[str, str] = os.environ) -> Processes:
    """Return the processes that torchrun says there are, in the environment; without it there is one."""
    return Processes(*(int(environ.get(name, default)) for name, default in DEFAULTS.items()))


DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
