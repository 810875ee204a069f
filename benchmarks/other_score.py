"""Runs like those of run_sjc.py whose score is another one: what the commands that make them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from my import script
from my.media import ffmpeg
from options.found import PRESETS
from options.sjc import SJCConfig
from run_sjc import ROOT, train
from sjc import SJC

OF_RULE = ("rule", "score_clip", "bad_words", "bridge_step", "var_red")  # options that say what is chained of a score
NEW = dict.fromkeys(("init", "init_sha256"))  # such a run begins with a new field: nothing reads these
Options = TypeVar("Options", bound=SJCConfig)
Made = TypeVar("Made", bound=SJC)


def read_options(cls: type[Options], argv: list[str] | None, doc: str | None) -> Options:
    """Return the options of such a command."""
    return script.read_config(
        cls, argv, root=ROOT, settle=cls.absolute, prog=f"python -m {cls.command}", doc=doc, presets_dir=PRESETS
    )


def go_on() -> str:
    """Return how such a command goes on after it was stopped: it does not."""
    return "start it again in an empty folder"


def run(
    cfg: SJCConfig,
    made: Callable[[SJCConfig, Any], Made],
    argv: list[str] | None,
    then: Callable[[Made], None] = lambda _: None,
) -> None:
    """Do the run whose optimisation `made(configuration, found files)` returns, and `then` the rest of the work."""

    def prepare(cfg: SJCConfig, found: Any) -> script.Run:
        ffmpeg()  # for the video at the end
        optimisation = made(cfg, found)

        def work() -> None:
            train(optimisation, 0)
            then(optimisation)

        return work

    script.begin(cfg, prepare, argv)
