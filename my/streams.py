"""Standard streams that may end before the command: the pipe is closed, the terminal is gone, the disk is full."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, cast


class Lasting:
    """A text stream that a command can always print to. What the system does not take is dropped from then on.

    stream: the stream itself; what is not said here is as it has it.  name: for people.
    tell: is called once with what a person should know, where the stream ends for another reason than a closed pipe.
    """

    def __init__(self, stream: TextIO, name: str, tell: Callable[[str], object]) -> None:
        self.stream, self.name, self.tell = stream, name, tell
        self.lost = False  # whether something was dropped

    def write(self, text: str) -> int:
        """Print a text, or drop it; return its length."""
        self._do(self.stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Print texts, or drop them."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what was printed."""
        self._do(self.stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _do(self, act: Callable[..., object], *args: object) -> None:
        if self.lost:
            return
        try:
            act(*args)
        except OSError as error:
            self.lost = True
            lead_nowhere(self.stream)
            if not isinstance(error, BrokenPipeError):  # whoever read the output, such as head, has seen enough
                self.tell(f"{self.name} takes no more ({error.strerror}); the command goes on without it")


def lead_nowhere(stream: TextIO) -> None:
    """Have what is written to the file of a stream disappear, as does what the stream still keeps."""
    with contextlib.suppress(OSError):  # a stream of memory has no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)


@contextlib.contextmanager
def lasting(tell: Callable[[str], object]) -> Iterator[Lasting]:
    """While the block runs, stdout and stderr are `Lasting`, also where there are none; yield stdout.

    tell: says what a person should know, on stderr. The end of stderr is told to nobody.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        whole = [  # a process without a console, or whose stream was closed, has None
            opened.enter_context(open(os.devnull, "w", encoding="utf-8")) if stream is None else stream
            for stream in before
        ]
        out, err = Lasting(whole[0], "stdout", tell), Lasting(whole[1], "stderr", lambda _: None)
        sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
        try:
            yield out
        finally:
            out.flush()
            err.flush()
            sys.stdout, sys.stderr = before
