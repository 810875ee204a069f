"""The page of the viewer: a server of viser, and what each visitor sees.

Each visitor has a camera and sliders of their own. One thread answers each change at once with a quick picture. Another
refines the picture of whoever has come to rest, and drops that work when they move on. A third looks for new fields.
"""

from __future__ import annotations

import contextlib
import errno
import io
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import pose
from my.errors import RunError, Stop, UserError, first_line
from viewer.camera import camera_of, fov_down
from viewer.frames import Frames, View

if TYPE_CHECKING:
    import numpy as np
    import viser

QUICK_S = 0.07  # time for a picture while the camera moves
REST_S = 0.2  # without a change after which a picture is refined
POLL_S = 2.0  # between two looks at the run's folder
SIZES = (64, 1024, 64)  # rows of a refined picture: least, most, step
QUALITY = 90  # of JPEG
ELEVATION = 1.3  # of the first camera, the `v` of `pose.eye_on_sphere`: a little above the horizon


class Visitor:
    """A browser: its handle, its controls, and how far its picture is.

    `version` grows with each change of the camera or the controls. `quick` and `fine` are the versions that the last
    quick and the last refined picture show.
    """

    def __init__(
        self, client: viser.ClientHandle, frames: Frames, size: int, touched: Callable[[Visitor], None]
    ) -> None:
        self.client, self.frames, self.touched = client, frames, touched
        self.version, self.quick, self.fine, self.moved = 0, -1, -1, 0.0
        self.steps = frames.moments.steps()
        first, last = self.percents()
        gui = client.gui
        self.text = gui.add_markdown("")
        self.time = gui.add_slider("progress, %", first, last, 1, last, hint="at its end it follows the run")
        self.mode = gui.add_button_group("show", frames.modes)  # a list that opens leaves the screen of a phone
        self.size = gui.add_slider("resolution", *SIZES, size, hint="rows of pixels once the camera rests")
        self.shown, self.seen, self.problem = self.steps[-1], self.mode.value, ""
        for tell in (self.time.on_update, self.mode.on_click, self.size.on_update, client.camera.on_update):
            tell(lambda _: touched(self))

    def percents(self) -> tuple[int, int]:
        """Return how far the run was at its first and at its last step that can be shown, percent; they differ."""
        first, last = (round(100 * step / self.frames.asset.cfg.n_steps) for step in (self.steps[0], self.steps[-1]))
        return min(first, last - 1), last

    @property
    def step(self) -> int:
        """The step nearest to where the slider of the run's progress is; at its end, the newest."""
        if self.time.value >= self.time.max:
            return self.steps[-1]
        wanted = self.time.value * self.frames.asset.cfg.n_steps / 100
        return min(self.steps, key=lambda step: abs(step - wanted))

    def show_steps(self, steps: list[int]) -> None:
        """Let the slider reach other steps. It stays where it is, or goes on with the run where it is at its end."""
        if steps == self.steps:
            return
        at_end, self.steps = self.time.value >= self.time.max, steps
        self.time.min, self.time.max = self.percents()
        if at_end:
            self.time.value = self.time.max  # type: ignore[misc]  # its setter is in a part that types do not see
        self.touched(self)  # the nearest step may be another

    def view(self) -> View:
        """Return what the visitor wants to see, at full resolution."""
        camera, height = self.client.camera, int(self.size.value)
        width = max(1, round(height * camera.image_width / max(1, camera.image_height)))
        at = camera_of([*camera.wxyz], [*camera.position], camera.fov, height, width)
        return View(at, height, width, self.mode.value, self.step)

    def show(self, image: np.ndarray, view: View) -> None:
        """Put a picture on the page, and say what it is."""
        self.client.scene.set_background_image(image, format="jpeg", jpeg_quality=QUALITY)
        self.client.flush()
        self.shown, self.seen, self.problem = view.step, view.mode, ""
        self.say()

    def say(self) -> None:
        """Say which step is shown, how far the run is, and what is wrong, if something is."""
        cfg = self.frames.asset.cfg
        words = f"{self.seen}, step {self.shown} of {cfg.n_steps}"
        if self.steps[-1] < cfg.n_steps:
            words += f"; the run is at {self.steps[-1]}"
        if self.problem:
            words += f"\n\n**{self.problem}**"
        if self.text.content != words:
            self.text.content = words


class Viewer:
    """A running server, until `stop`. Raises UserError where it cannot have its port."""

    def __init__(self, frames: Frames, host: str, port: int) -> None:
        self.frames, self.visitors = frames, dict[int, Visitor]()
        self.changed, self.closing = threading.Condition(), threading.Event()
        self.broken: BaseException | None = None
        self.size = first_size(frames)
        self.server = open_server(host, port, label=frames.asset.cfg.texts.prompt or "field")
        self._set_scene()
        self.threads = [
            threading.Thread(target=self._guarded, args=(work,), daemon=True)
            for work in (self._answer, self._refine, self._follow)
        ]
        for thread in self.threads:
            thread.start()
        self.server.on_client_connect(self._welcome)
        self.server.on_client_disconnect(self._forget)

    @property
    def port(self) -> int:
        """The port that it listens at."""
        return self.server.get_port()

    def wait(self) -> None:
        """Return when the server is stopped; raises what one of its threads has raised."""
        while not self.closing.wait(0.5):  # a wait without an end would not notice Ctrl-C on Windows
            pass
        if self.broken:
            raise self.broken

    def stop(self) -> None:
        """End the server and its threads."""
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(timeout=10)
        with quiet_viser():
            self.server.stop()

    def _set_scene(self) -> None:
        """Point the first camera at the object's front, from where the run's cameras are."""
        server, p = self.server, self.frames.asset.cfg.pose
        server.scene.set_up_direction("+y")
        server.initial_camera.position = tuple(pose.eye_on_sphere(0.0, ELEVATION, p.R))
        server.initial_camera.look_at = (0.0, 0.0, 0.0)
        server.initial_camera.fov = fov_down(p.FoV, 1, 1)
        server.gui.configure_theme(show_logo=False, show_share_button=False)

    # ------------------------------------------------------------------ visitors

    def _welcome(self, client: viser.ClientHandle) -> None:
        """Give a new visitor their controls, and a lens that shows the whole field on a narrow page too."""
        camera, p = client.camera, self.frames.asset.cfg.pose
        camera.fov = fov_down(p.FoV, camera.image_height, camera.image_width)
        visitor = Visitor(client, self.frames, self.size, self._touched)
        self.visitors[client.client_id] = visitor
        self._touched(visitor)

    def _forget(self, client: viser.ClientHandle) -> None:
        self.visitors.pop(client.client_id, None)

    def _touched(self, visitor: Visitor) -> None:
        """Take down that a visitor's camera or controls have changed."""
        with self.changed:
            visitor.version, visitor.moved = visitor.version + 1, time.monotonic()
            self.changed.notify_all()

    # ------------------------------------------------------------------ threads

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do the work of a thread. An exception ends the server, and `wait` raises it."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (it is raised in the main thread)
            self.broken = error
            self.closing.set()

    def _answer(self) -> None:
        """Answer changes at once, whoever has waited longest first."""
        while not self.closing.is_set():
            with self.changed:
                waiting = [v for v in self.visitors.copy().values() if v.quick < v.version]
                if not waiting:
                    self.changed.wait(0.5)
                    continue
            visitor = min(waiting, key=lambda v: v.moved)
            version, view = visitor.version, visitor.view()
            quick = self.frames.quick(view, QUICK_S)
            self._make(visitor, quick, lambda: False)
            visitor.quick = version
            if (quick.height, quick.mode) == (view.height, view.mode):
                visitor.fine = version

    def _refine(self) -> None:
        """Refine the picture of a visitor who has come to rest, unless they move on meanwhile."""
        while not self.closing.is_set():
            now = time.monotonic()
            resting = [
                v for v in self.visitors.copy().values() if v.fine < v.version == v.quick and now - v.moved >= REST_S
            ]
            if not resting:
                self.closing.wait(REST_S / 4)
                continue
            for visitor in resting:
                version = visitor.version
                self._make(visitor, visitor.view(), partial(self._moved_on, visitor, version))
                visitor.fine = version

    def _moved_on(self, visitor: Visitor, version: int) -> bool:
        """Whether nobody waits for the picture of a visitor's `version` any more."""
        return visitor.version != version or self.closing.is_set()

    def _make(self, visitor: Visitor, view: View, stop: Callable[[], bool]) -> None:
        """Make a picture for a visitor, and show it or what is wrong; nothing is shown when stopped."""
        try:
            image = self.frames.picture(view, stop)
        except (Stop, OSError) as error:
            visitor.problem = first_line(error)
            visitor.say()
            return
        if image is not None and not stop() and visitor.client.client_id in self.visitors:
            visitor.show(image, view)

    def _follow(self) -> None:
        """Look for new fields of the run."""
        while not self.closing.wait(POLL_S):
            steps = self.frames.moments.steps()
            for visitor in self.visitors.copy().values():
                visitor.show_steps(steps)


def first_size(frames: Frames) -> int:
    """Return the rows of a refined picture at first: twice those that the run renders, as the final rendering has."""
    least, most, step = SIZES
    wanted = 2 * frames.asset.cfg.pose.rend_hw * frames.factor
    return min(max(round(wanted / step) * step, 4 * least if frames.factor == 1 else 2 * least), most // 2)


# ---------------------------------------------------------------- viser


def open_server(host: str, port: int, label: str) -> viser.ViserServer:
    """Return a new server; raises UserError where the port is not free, instead of taking the next."""
    import viser

    refuse_port(host, port)
    warnings.filterwarnings("ignore", "Queued a .* on a closed connection")  # a visitor may leave at any time
    with quiet_viser():
        server = viser.ViserServer(host, port, label=label, verbose=False)
    if port not in (0, server.get_port()):  # somebody was faster
        with quiet_viser():
            server.stop()
        raise in_use(host, port)
    server.request_share_url = refuse_sharing  # type: ignore[method-assign]  # a page could ask for it
    return server


def refuse_sharing(*_: Any, **__: Any) -> NoReturn:
    """Raise RunError: viser can show a server to everybody through a computer of its makers."""
    raise RunError("this page is not shared through other computers")


def refuse_port(host: str, port: int) -> None:
    """Raise UserError where no server can listen at a port of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended holds nothing
            sock.bind(address)
            sock.listen()
    except socket.gaierror:
        raise UserError(f"--host {host}: no such address; give one of this machine, such as 127.0.0.1") from None
    except PermissionError:
        raise UserError(f"--port {port}: not allowed here; give one above 1023, such as 8080") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise in_use(host, port) from None
        raise UserError(f"--host {host}: {first_line(error.strerror)}; give an address of this machine") from None


def in_use(host: str, port: int) -> UserError:
    """Return what is said of a port that another program has."""
    other = port + 1 if port < 65535 else port - 1
    return UserError(f"--port {port}: another program listens there, at {host}; give another, such as --port {other}")


@contextlib.contextmanager
def quiet_viser() -> Iterator[None]:
    """Drop what viser prints while the block runs."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
