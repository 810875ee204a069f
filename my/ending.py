"""How a training ends in which a step fails though its state is whole: that is saved, and one line says what to do."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from my import script
from my.errors import RunError, is_out_of_memory
from my.signals import Stopped

if TYPE_CHECKING:
    import torch

    from my.watch import Watch


class Training(Protocol):
    """A training that is taken step by step."""

    n_steps_taken: int  # those that are whole
    optimizer: Any  # `whole` is False once a step of it has ended half-way


Kind = TypeVar("Kind", bound=Training)


@contextlib.contextmanager
def saved_whole(
    watch: Watch,
    training: Kind,
    first_step: int,
    as_end: Callable[[Exception, Kind], RunError | None],
    advice: Callable[[Exception, Kind], str],
) -> Iterator[None]:
    """While the block takes steps, let an exception end them in one line for which `as_end` has words.

    The state after the last whole step is saved, unless the run began with it. Raises what `as_end` returned, with that
    and the `advice` behind its words. Where `as_end` returns None, the exception is left as it is. Where a signal stops
    the block while it waits for other processes, the state is saved as well.
    """
    try:
        yield
    except Stopped as stopped:
        if not stopped.saved and training.n_steps_taken > first_step:
            watch.stop(training.n_steps_taken, stopped.number)
        raise
    except Exception as error:
        ended = as_end(error, training)
        if ended is None:
            raise
        free_memory(error)
        step, saved = training.n_steps_taken, ""
        if step > first_step:
            watch.rescue(step)
            saved = f"; the state after step {step} is saved"
        raise type(ended)(f"{ended}{saved}; {advice(error, training)}") from None


def out_of_memory(error: Exception, training: Training, device: torch.device) -> RunError | None:
    """Return in words that a device has no memory for the next step of a training whose state is whole; None if not."""
    if is_out_of_memory(error) and training.optimizer.whole:
        return RunError(f"step {training.n_steps_taken + 1}: out of memory on {device}")
    return None


def advice_on_memory(smaller: list[str], less: str = "") -> str:
    """Return what to do where memory ran out; `less` and a `smaller` value of these options need less of it."""
    options = ", ".join(f"--{name}" for name in smaller)
    return (
        f"end other programs on the device and {script.go_on()}{less}, or start in an empty folder with a smaller "
        f"{options}"
    )


def free_memory(error: Exception) -> None:
    """Let go what the functions hold that an error has ended: a GPU whose memory is full has none for a checkpoint."""
    import torch

    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
