"""Look at the field of a run in a browser, and turn it. It is the run in the current folder, or RUN, finished or not.

python view.py ~/sjc_runs/burger
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback


from pathlib import Path
from typing import ClassVar

from pydantic import Field

from my import config
from my.errors import run_main
from options import trained

ROOT = Path(__file__).resolve().parent


class ViewConfig(trained.TrainedConfig):
    """Every option of view.py."""

    port: int = Field(8080, ge=0, le=65535, description="port of the page; 0 takes any that is free")
    host: str = Field(
        "127.0.0.1",
        description="address to listen at: 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it",
    )

    first: ClassVar[tuple[str, ...]] = ("run", "port", "host", "device")


def main(argv: list[str] | None = None) -> None:
    """Show the run that the options choose until Ctrl-C."""
    cfg = config.load(ViewConfig, argv, prog="view.py", doc=__doc__, positional="run", config_file=None)
    import asset
    from viewer.frames import Frames
    from viewer.moments import Moments
    from viewer.server import Viewer, refuse_port

    refuse_port(cfg.host, cfg.port)  # before the model is loaded, which takes longer
    found = asset.find(cfg.run[0])
    opened = asset.load(found, cfg.device)
    frames = Frames(opened, Moments(opened, found))
    frames.warm_up()  # else the first visitor waits
    viewer = Viewer(frames, cfg.host, cfg.port)
    try:
        print(f"look at http://{cfg.host}:{viewer.port} ; Ctrl-C ends this", flush=True)
        viewer.wait()
    except KeyboardInterrupt:
        print("closed")
    finally:
        viewer.stop()


if __name__ == "__main__":
    run_main(main)
