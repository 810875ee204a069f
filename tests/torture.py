"""Runs that are killed over and over, and gone on with: nothing is lost, and nothing is there by half.

    python tests/torture.py --kills 100 --seed 0
    python tests/torture.py --kills 1000 --warm True
    python tests/torture.py --kills 10 --processes 2

Small runs of each command are killed at random moments, a third of the time inside a checkpoint's write, and each is
started again until it finishes. After each kill every file is whole. In the end a run has the files of one that nobody
disturbed, bit for bit. One signal of five is SIGTERM, on which a command ends in order.

Each start is a process of its own. By default it is `python run_sjc.py ...`. With --warm it is forked off one that has
imported the libraries, and runs the same file: a start then takes a hundredth of the time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import random
import re
import runpy
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402  # the path to the root comes first
from pydantic import Field  # noqa: E402

from my import checkpoint, config, errors, plain_files, starts  # noqa: E402
from my.run_dir import SCRATCH, STOPPED, WRITTEN, read_heartbeat, read_history  # noqa: E402

TERM_SHARE = 0.2  # of all signals that are SIGTERM
MOST_KILLS = 9  # of one run, before it may finish
PATIENCE_S = 600.0  # for a process to end
AIMS = {"checkpoint": 0.5, "file": 0.15, "any": 0.25, "start": 0.1}  # share of the kills that wait for such a moment
ENV = {
    **os.environ,
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"},
}  # a crash in C leaves a word then
LIBRARIES = (  # what the commands import once they have read their options
    *("imageio.v3", "imageio_ffmpeg", "adapt", "canvas", "sampling", "sjc", "families.ideal.adapter"),
    *("families.sd.adapter", "film.frames", "film.files", "voxnerf.nerf", "voxnerf.scene", "voxnerf.snapshot"),
    *("pages.run", "torch._dynamo", "voxnerf.fused.adam", "voxnerf.fused.adamax", "voxnerf.fused.launch"),
    *("voxnerf.fused.march", "voxnerf.fused.selftest", "safetensors.torch", "einops", "PIL.Image"),
)
PER_RUN = ("minutes", "at")  # keys of values that differ from run to run

SMALL = ["--vox.grid_size", "8", "--pose.rend_hw", "8", "--device", "cpu"]
IDEAL = ["--preset", "ideal", "--ideal.n_cameras", "10", "--pose.view_words", "sjc"]


class Job(NamedTuple):
    """A small run: the command, its options, and the folder that it leaves its work in by which it is recognised."""

    command: str
    argv: tuple[str, ...]
    needs: str = ""  # what must be there before it: a "scene", or a finished run, "ideal"


JOBS = {
    "ideal": Job("run_sjc.py", (*IDEAL, *SMALL[2:], "--vox.grid_size", "20", "--n_steps", "40")),
    "several": Job("run_sjc.py", (*IDEAL, *SMALL, "--n_steps", "40", "--batch_views", "2")),
    "mini": Job("run_sjc.py", ("--preset", "mini", *SMALL, "--n_steps", "12", "--ckpt_every", "0.1")),
    "nerf": Job(
        "run_nerf.py",
        (
            *("--scene", "../scene", "--device", "cpu", "--bs", "64", "--n_epoch", "1", "--model.grid_size", "12"),
            *("--model.bbox_len", "1", "--model.step_ratio", "1", "--lr", "0.05", "--test_every", "15"),
        ),
        "scene",
    ),
    "sampling": Job(
        "run_img_sampling.py",
        ("--preset", "mini", "--num_images", "6", "--batch_size", "2", "--num_t", "3", "--device", "cpu"),
    ),
    "canvas": Job(
        "run_2d_sjc.py", (*IDEAL[:4], "--pose.rend_hw", "8", "--copies", "1,2", "--n_steps", "60", "--device", "cpu")
    ),
    "film": Job("highres_final_vis.py", ("--n_frames", "12", "--skip", "2", "--device", "cpu"), "ideal"),
}


SHARED = ("several", "mini")  # runs with views for several processes


# ---------------------------------------------------------------- processes


class Real:
    """Starts commands as a person does. Of several processes, torchrun starts them."""

    def __init__(self, n_processes: int = 1) -> None:
        self.n = n_processes

    def start(self, job: Job, folder: Path, argv: list[str]) -> int:
        """Start a command in a folder, and return the number of its process."""
        launcher = [sys.executable]
        if self.n > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={self.n}", "--standalone"]
        with open(folder.parent / f"{folder.name}.log", "w") as log:
            self.process = subprocess.Popen(
                [*launcher, str(ROOT / job.command), *argv],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=ENV,
                start_new_session=True,
            )
        return self.process.pid

    def ended(self, timeout: float = 0.0) -> int | None:
        """Wait so many seconds for the process; return its status, -n after signal n, or None while it is alive."""
        if not timeout:
            return self.process.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout)
        return None

    def close(self) -> None:
        """Nothing is to be closed."""


class Warm:
    """Starts commands by forking a process that has imported what they need."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "torture.py"), "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENV,
        )
        assert self.server.stdout.readline() == "ready\n"

    def start(self, job: Job, folder: Path, argv: list[str]) -> int:
        """Start a command in a folder, and return the number of its process."""
        asked = {"command": job.command, "argv": argv, "folder": str(folder)}
        print(json.dumps(asked), file=self.server.stdin, flush=True)
        self.pid, self.status = int(self.server.stdout.readline()), None
        return self.pid

    def ended(self, timeout: float = 0.0) -> int | None:
        """Wait so many seconds for the process; return its status, -n after signal n, or None while it is alive."""
        if self.status is None and select.select([self.server.stdout], [], [], timeout)[0]:
            self.status = int(self.server.stdout.readline())
        return self.status

    def close(self) -> None:
        """End the server."""
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def serve() -> None:
    """Fork a process per line on stdin, say its number, and once it has ended its status."""
    import torch

    for name in LIBRARIES:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            become(asked["command"], asked["argv"], Path(asked["folder"]))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def become(command: str, argv: list[str], folder: Path) -> None:
    """Do a command in this process, which ends with it."""
    os.setsid()
    os.chdir(folder)
    log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for handle, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(to, handle)
    sys.stdin, sys.argv = open(os.devnull), [str(ROOT / command), *argv]
    status = 1
    try:
        runpy.run_path(str(ROOT / command), run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:  # noqa: BLE001  # as Python itself does
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# ---------------------------------------------------------------- what must be whole, and equal


def content_of(path: Path) -> object:
    """Return what a file of a run holds, in a form that compares; raises whatever is wrong with it."""
    if path.name == "history.json":
        return [without(row) for row in read_history(path) if STOPPED not in row]
    if path.name == starts.FILE:
        assert starts.read(path.parent)[1] == 0, "a line of starts.json is damaged"
        return None
    if path.name == "heartbeat.json":
        return plain_files.read_json(path, ["done"])["done"]
    if path.suffix == ".json":
        return without(plain_files.read_json(path))
    if path.suffix == ".yml":
        return plain_files.read_yaml(path)
    if path.suffix == ".npy":
        return np.load(path).tobytes()
    if path.suffix == ".png":
        import imageio.v3 as iio

        assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), "its end is missing"  # which the library does not miss
        return iio.imread(path).tobytes()
    if path.suffix == ".mp4":
        from imageio_ffmpeg import count_frames_and_secs

        return count_frames_and_secs(str(path))[0]
    if path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>"), "its end is missing"
        return None
    return path.read_bytes()


def without(values: object) -> object:
    """Return values out of JSON without those that differ from run to run."""
    if isinstance(values, dict):
        return {key: without(value) for key, value in values.items() if key not in PER_RUN}
    return [without(value) for value in values] if isinstance(values, list) else values


def checkpoint_of(folder: Path) -> object:
    """Return what a checkpoint holds, in a form that compares."""
    tensors, meta = checkpoint.load(folder)
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, without(meta)


class Folder:
    """Looks at the files of a run, at each only when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, tuple[object, object]] = {}  # name: (its state on disk, its content)

    def contents(self) -> dict[str, object]:
        """Return {name: content} of all files but scratch files; a checkpoint is one file. Raises AssertionError."""
        now: dict[str, tuple[object, object]] = {}
        for path in self._paths():
            state = path.stat()
            key, name = (state.st_mtime_ns, state.st_ino, state.st_size), str(path.relative_to(self.path))
            known = self.seen.get(name)
            now[name] = known if known and known[0] == key else (key, self._content(path))
        self.seen = now
        return {name: content for name, (_, content) in now.items()}

    def _paths(self) -> list[Path]:
        paths = []
        for root, folders, names in os.walk(self.path):
            if Path(root).name == "ckpt":
                paths += checkpoint.checkpoints(root)
                folders.clear()
                continue
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths += [Path(root, name) for name in names if not name.startswith(".")]
        return paths

    def _content(self, path: Path) -> object:
        try:
            return checkpoint_of(path) if path.is_dir() else content_of(path)
        except Exception as error:
            if path.name == "history.json" and not path.read_bytes():
                return []
            raise AssertionError(f"{path} is not whole: {type(error).__name__}: {error}") from error

    def scratch(self) -> list[str]:
        """Return the names of what is hidden in the folder: what was being written."""
        return [
            str(Path(root, name).relative_to(self.path))
            for root, folders, names in os.walk(self.path)
            for name in (*folders, *names)
            if name.startswith(".")
        ]


def refuse_unknown_folders(path: Path) -> None:
    """Raise AssertionError where a command writes to a folder in which nobody would look for scratch files."""
    known = {
        path,
        *(p for pattern in (*WRITTEN, "ckpt", "ckpt/*", "highres_*", "highres_*/*") for p in path.glob(pattern)),
    }
    unknown = {Path(root) for root, _, names in os.walk(path) if names} - known
    assert not unknown, f"my.run_dir.WRITTEN lacks {unknown}"


# ---------------------------------------------------------------- one run, killed


@dataclass
class Tally:
    """What was done, and what was found."""

    signals: Counter = field(default_factory=Counter)  # (job, SIGKILL or SIGTERM)
    fell: Counter = field(default_factory=Counter)  # where SIGKILLs fell
    starts: Counter = field(default_factory=Counter)  # per job
    finished: Counter = field(default_factory=Counter)
    equal: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return sum(n for (_, name), n in self.signals.items() if name == "SIGKILL")

    def table(self) -> str:
        """Return what was done as text."""
        lines = [f"{'run':10} {'SIGKILL':>8} {'SIGTERM':>8} {'starts':>7} {'finished':>9} {'equal':>6}"]
        for name in sorted(self.starts):
            n = [self.signals[name, "SIGKILL"], self.signals[name, "SIGTERM"], self.starts[name]]
            lines.append(f"{name:10} {n[0]:8} {n[1]:8} {n[2]:7} {self.finished[name]:9} {self.equal[name]:6}")
        fell = ", ".join(f"{n} {where}" for where, n in self.fell.most_common())
        return "\n".join([*lines, f"{self.kills} kills fell: {fell}", *self.wrong, f"{len(self.wrong)} faults"])


class Torture:
    """Kills runs in the folder `root`, where the runs that nobody disturbs are too."""

    def __init__(self, root: Path, starter: Real | Warm, seed: int, tally: Tally) -> None:
        self.root, self.starter, self.tally = root, starter, tally
        self.rng = random.Random(seed)
        self.took: dict[str, tuple[float, float]] = {}  # seconds to the first file, and from there to the end
        self.truth: dict[str, dict[str, object]] = {}

    # ------------------------------------------------------------ undisturbed

    def prepare(self, name: str) -> Path:
        """Return the folder of a run that nobody disturbs, which is finished."""
        folder, job = self.root / name, JOBS[name]
        if name in self.truth:
            return folder
        self._new(folder, job)
        begun = time.monotonic()
        self.starter.start(job, folder, list(job.argv))
        first = None
        while (status := self.starter.ended(0.01)) is None:
            if first is None and self._begun(folder):
                first = time.monotonic()
            assert time.monotonic() - begun < PATIENCE_S, f"{name} does not end"
        assert status == 0, (self.root / f"{name}.log").read_text()[-3000:]
        self.took[name] = ((first or begun) - begun, time.monotonic() - (first or begun))
        look = Folder(folder)
        self.truth[name] = look.contents()
        assert not look.scratch(), look.scratch()
        refuse_unknown_folders(folder)
        return folder

    def _new(self, folder: Path, job: Job) -> None:
        """Make the folder of a run that is to begin."""
        if job.needs == "scene":
            if not (self.root / "scene").exists():
                write_scene(self.root / "scene")
            folder.mkdir()
        elif job.needs:
            shutil.copytree(self.prepare(job.needs), folder)
        else:
            folder.mkdir()

    def _begun(self, folder: Path) -> bool:
        """Whether a command has printed its configuration, or its first words."""
        log = folder.parent / f"{folder.name}.log"
        return log.exists() and log.stat().st_size > 0

    # ------------------------------------------------------------ disturbed

    def run(self, name: str, most: int) -> None:
        """Do a run that is killed up to `most` times, and compare it with the one that nobody disturbed."""
        self.prepare(name)
        folder = self.root / f"{name}_{self.tally.finished[name]}_{len(self.tally.wrong)}"
        self._new(folder, JOBS[name])
        look = Folder(folder)
        try:
            for _ in range(self.rng.randint(min(4, most), most)):
                if self._strike(name, folder, look):
                    break
            else:
                self._finish(name, folder)
            self._compare(name, folder, look)
            shutil.rmtree(folder)
        except AssertionError as error:
            self.tally.wrong.append(f"{folder}: {error}")

    def _start(self, name: str, folder: Path) -> int:
        self.tally.starts[name] += 1
        (self.root / f"{folder.name}.log").unlink(missing_ok=True)
        return self.starter.start(JOBS[name], folder, list(JOBS[name].argv))

    def _strike(self, name: str, folder: Path, look: Folder) -> bool:
        """Start a run and send it a signal at some moment. Return whether it had finished before that."""
        kind = signal.SIGTERM if self.rng.random() < TERM_SHARE else signal.SIGKILL
        pid = self._start(name, folder)
        target = self._pick(pid)
        self._await(name, folder, self.rng.choices([*AIMS], [*AIMS.values()])[0])
        status = self.starter.ended()
        if status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target(), kind)
            status = self.starter.ended(PATIENCE_S)
        elif not self._is_finished(folder, status):
            assert self._is_held(folder), f"status {status}, unasked: {self._said(folder)[-3000:]}"
            time.sleep(2)
            return False
        assert status is not None, "does not end"
        if self._is_finished(folder, status):
            self.tally.finished[name] += 1
            return True
        self.tally.signals[name, kind.name] += 1
        if getattr(self.starter, "n", 1) == 1:  # else another process may go on writing
            look.contents()
        if kind == signal.SIGKILL:
            self.tally.fell[self._where(folder, look)] += 1
        else:
            self._ended_in_order(folder, status, pid)
        return False

    def _is_finished(self, folder: Path, status: int | None) -> bool:
        """Whether a run has finished, now, or before the signal came that ended the process before this one."""
        said = self._said(folder)
        refused = (2,) if getattr(self.starter, "n", 1) == 1 else (1, 2)  # of torchrun
        return status == 0 or (status in refused and "this folder already holds a finished run" in said)

    def _is_held(self, folder: Path) -> bool:
        """Whether a run was refused since processes go on in its folder whose parent, torchrun, was killed."""
        said = self._said(folder)
        return getattr(self.starter, "n", 1) > 1 and "another process is at work in this folder" in said

    def _said(self, folder: Path) -> str:
        """Return what the last command in a folder printed, "" for one that was killed before it could."""
        log = self.root / f"{folder.name}.log"
        return log.read_text() if log.exists() else ""

    def _pick(self, pid: int):
        """Return what gives the number of the process that is killed: of several, one of them or their parent."""
        n = getattr(self.starter, "n", 1)
        rank = self.rng.randint(-1, n - 1) if n > 1 else -1
        return (lambda: pid) if rank < 0 else (lambda: process_of(pid, rank))

    def _await(self, name: str, folder: Path, aim: str) -> None:
        """Wait for a moment of the run in a folder, or for its end."""
        first, rest = self.took[name]
        if aim == "start":
            self.starter.ended(self.rng.uniform(0, first) or 1e-3)
            return
        while not self._begun(folder) and self.starter.ended() is None:
            time.sleep(1e-3)
        if aim == "any":
            self.starter.ended(rest * self.rng.random() ** 2 or 1e-3)  # often early: a run that goes on is shorter
            return
        pattern = r"\.tmp_.*" if aim == "checkpoint" else SCRATCH
        with Made(folder, ("ckpt",) if aim == "checkpoint" else WRITTEN, re.compile(pattern)) as made:
            for _ in range(self.rng.randint(1, 3)):  # not always the first
                while self.starter.ended() is None and not made.there(0.05):
                    pass
        until = time.monotonic() + self.rng.choice((0, 0, 2e-3)) * self.rng.random()
        while time.monotonic() < until:
            pass

    def _where(self, folder: Path, look: Folder) -> str:
        """Return in words where a run was when it was killed."""
        hidden = look.scratch()
        if any(Path(name).name.startswith(".tmp_") for name in hidden):
            return "inside a checkpoint"
        if any(SCRATCH.fullmatch(Path(name).name) for name in hidden):
            return "inside another file"
        if not self._begun(folder):
            return "in the imports"
        return "elsewhere"

    def _ended_in_order(self, folder: Path, status: int, pid: int) -> None:
        """Raise AssertionError unless a command that SIGTERM has ended said so in a line, and saved its state.

        pid: the number of its process.
        """
        said = self._said(folder).strip()
        if getattr(self.starter, "n", 1) > 1:
            assert status != 0
            return
        assert status in (128 + signal.SIGTERM, -signal.SIGTERM), f"status {status}: {said[-2000:]}"
        assert "Traceback" not in said, said[-3000:]
        if status < 0:  # before the command was there to hear it
            assert not self._begun(folder), f"status {status}: {said[-2000:]}"
            return
        last = said.splitlines()[-1]
        assert "stopped by SIGTERM" in last, last
        step = re.search(r"the state after step (\d+) is saved", last)
        newest = checkpoint.latest(folder / "ckpt")
        if step:
            assert newest and checkpoint.step_of(newest) == int(step[1])
            assert read_history(folder / "history.json")[-1][STOPPED]
        lost = trained_by(folder, pid) - (checkpoint.step_of(newest) if newest else 0)
        assert lost <= 0, f"{lost} steps are in history.json, and not saved: {last}"

    def _finish(self, name: str, folder: Path) -> None:
        """Start a run again, and let it finish."""
        while True:
            self._start(name, folder)
            status = self.starter.ended(PATIENCE_S)
            if not self._is_held(folder):
                break
            time.sleep(2)
        assert self._is_finished(folder, status), f"status {status}, unasked: {self._said(folder)[-3000:]}"
        self.tally.finished[name] += 1

    def _compare(self, name: str, folder: Path, look: Folder) -> None:
        """Raise AssertionError unless a finished run has what the one has that nobody disturbed, and nothing more."""
        mine, truth = look.contents(), self.truth[name]
        assert mine.keys() == truth.keys(), f"other files: {sorted(mine.keys() ^ truth.keys())[:9]}"
        other = [each for each in truth if mine[each] != truth[each]]
        assert not other, f"other contents: {other[:9]}"
        assert not look.scratch(), f"left behind: {look.scratch()[:9]}"
        self.tally.equal[name] += 1


def trained_by(folder: Path, pid: int) -> int:
    """Return the last step in the history that a process has opened, whose beats say so; 0 where it has opened none."""
    if read_heartbeat(folder / "heartbeat.json").get("pid") != pid:
        return 0  # its lines are those of an earlier process, which was killed
    return max((row["step"] for row in read_history(folder / "history.json")), default=0)


def process_of(launcher: int, rank: int) -> int:
    """Return the number of the process of a rank, among the children of torchrun; of torchrun where it is not there."""
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
                return int(pid)
    return launcher


class Made:
    """Tells when a name that fits is made in some folders below `root`; a context manager. Linux says so by inotify."""

    CREATED = 0x100  # IN_CREATE

    def __init__(self, root: Path, patterns: Iterable[str], name: re.Pattern[str]) -> None:
        import ctypes

        self.root, self.patterns, self.name = root, patterns, name
        self.libc, self.watched = ctypes.CDLL(None, use_errno=True), set()
        self.handle = self.libc.inotify_init1(os.O_NONBLOCK)

    def there(self, seconds: float) -> bool:
        """Wait so long at most for such a name; whether it was made."""
        for path in {
            self.root,
            *(p for each in self.patterns for p in self.root.glob(each) if p.is_dir()),
        } - self.watched:
            self.libc.inotify_add_watch(self.handle, os.fsencode(path), self.CREATED)
            self.watched.add(path)
        if not select.select([self.handle], [], [], seconds)[0]:
            return False
        events = os.read(self.handle, 1 << 16)
        while events:
            _, _, _, length = struct.unpack_from("iIII", events)
            name, events = events[16 : 16 + length].rstrip(b"\0"), events[16 + length :]
            if self.name.fullmatch(os.fsdecode(name)):
                return True
        return False

    def __enter__(self) -> Made:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)


def write_scene(folder: Path) -> None:
    """Write the scene of a box, as run_nerf.py reads it."""
    import imageio.v3 as iio

    import box_scene

    fx = box_scene.scene_of(box_scene.box_field(), box_scene.poses(1)).K[0, 0, 0].item()
    for split, n, lift in (("train", 12, 0.7), ("test", 3, 0.9)):
        (folder / split).mkdir(parents=True)
        poses = box_scene.poses(n, lift)
        images = box_scene.scene_of(box_scene.box_field(), poses).images.numpy()
        frames = []
        for i, (c2w, image) in enumerate(zip(poses, images)):
            iio.imwrite(folder / split / f"r_{i}.png", image)
            frames.append({"file_path": f"./{split}/r_{i}", "transform_matrix": c2w.tolist()})
        meta = {"camera_angle_x": 2 * math.atan(box_scene.W / 2 / fx), "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))


# ---------------------------------------------------------------- the command


class TortureConfig(config.Config):
    """Every option."""

    kills: int = Field(100, gt=0, description="how many processes to kill")
    seed: int = Field(0, ge=0, description="seed of the moments")
    runs: list[Literal[tuple(JOBS)]] = Field(  # type: ignore[valid-type]  # its names are computed
        [], description=f"what to kill; default all, of several processes {', '.join(SHARED)}"
    )
    warm: bool = Field(False, description="fork the processes off one that has imported the libraries")
    minutes: float | None = Field(None, gt=0, description="begin no further run after so many")
    processes: int = Field(1, ge=1, description="how many processes do a run of run_sjc.py, by torchrun")


def torture(cfg: TortureConfig, root: Path, starter: Real | Warm, tally: Tally) -> None:
    """Kill as many processes as the options say, in a folder; note what is done and found."""
    until = time.monotonic() + 60 * (cfg.minutes or math.inf)
    work = Torture(root, starter, cfg.seed, tally)
    names = itertools.cycle(cfg.runs or (JOBS if cfg.processes == 1 else SHARED))
    while work.tally.kills < cfg.kills and time.monotonic() < until:
        name = next(names)
        work.run(name, min(MOST_KILLS, cfg.kills - work.tally.kills))
        print(f"{name}: {work.tally.kills} kills, {len(work.tally.wrong)} faults", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Kill runs, print the table, and end with status 1 where something was found."""
    cfg = config.load(TortureConfig, argv, prog="tests/torture.py", doc=__doc__, config_file=None)
    if cfg.processes > 1 and (cfg.warm or not {*cfg.runs} <= {*SHARED}):
        raise errors.UserError(f"--processes: torchrun starts {', '.join(SHARED)}, and not --warm; leave out the other")
    starter = Warm() if cfg.warm else Real(cfg.processes)
    root = Path(tempfile.mkdtemp(prefix="torture_"))
    tally = Tally()
    try:
        torture(cfg, root, starter, tally)
    finally:
        print(tally.table(), flush=True)
        starter.close()
    if tally.wrong:
        raise errors.RunError(f"{len(tally.wrong)} faults; the runs are in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        errors.run_main(main)
