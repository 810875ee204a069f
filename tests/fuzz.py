"""Random command lines, configurations and files: each is taken, or refused in one line; nothing ends in a traceback.

    python tests/fuzz.py --cases 100000

Command lines and YAML are made of what the options of each command expect, of what they nearly expect, and of what no
option does. Files are sound ones with bits flipped, parts cut out, copied or overwritten, and bytes that are nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import yaml  # noqa: E402  # the path to the root comes first
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pydantic import Field  # noqa: E402

from my import config, env  # noqa: E402
from my.errors import LONGEST, RunError, UserError, explain, run_main  # noqa: E402
from options.trained import OF_RUNS  # noqa: E402

SLOWEST_S = 20.0  # that a case may take
EXECUTED = os.path.join(tempfile.gettempdir(), f"executed_{os.getpid()}")  # the file that a text makes which is run
BITE = f"touch {EXECUTED}"
ROUND = 250  # cases of a kind, before those of the next

# ---------------------------------------------------------------- how a case may end


class Fault(AssertionError):
    """A case that ends in another way than taken, or refused in one line."""


@contextlib.contextmanager
def no_hang():
    """Raise Fault where the block takes too many seconds of this process on the CPU, whoever else is on the machine."""

    def stop(*_):
        raise Fault("hangs")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SLOWEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def inside(folder: str):
    """Work in a folder while the block runs."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def outcome(call: Callable[[], object]) -> str:
    """Return how a call ends: "taken", or "refused" with a line; raises whatever else it raises."""
    quiet = io.StringIO()
    with no_hang(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            call()
        except SystemExit as ended:
            if ended.code:
                raise Fault(f"ended with status {ended.code}") from ended
        except Exception as error:
            explained = explain(error, "start it again")
            if explained is None:
                raise
            message, status = explained
            if status not in (1, 2) or not message.isprintable() or not message or len(message) > 2 * LONGEST:
                raise Fault(f"status {status}: {message[:300]!r}") from error
            return "refused"
        finally:
            if os.path.exists(EXECUTED):
                os.remove(EXECUTED)
                raise Fault("what it was given was executed")
    return "taken"


# ---------------------------------------------------------------- command lines

COMMANDS = {  # class: the module, and how it reads a command line
    "SJCConfig": ("run_sjc", "options.sjc"),
    "NeRFConfig": ("run_nerf", "options.nerf"),
    "SamplingConfig": ("run_img_sampling", "options.sampling"),
    "CanvasConfig": ("run_2d_sjc", "options.canvas"),
    "FilmConfig": ("highres_final_vis", "options.film"),
    "MeshConfig": ("export_mesh", "options.mesh"),
    "SweepConfig": ("run_sweep", "options.sweep"),
    "ReportConfig": ("report", "report"),
    "EvaluateConfig": ("evaluate", "evaluate"),
    "ViewConfig": ("view", "view"),
    "DoctorConfig": ("doctor", "doctor"),
    "ReplayConfig": ("replay", "replay"),
    "ReproduceConfig": ("reproduce", "reproduce"),
}
RUNS = ("SJCConfig", "NeRFConfig", "SamplingConfig", "CanvasConfig")  # their commands have read_config
NASTY = [
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "1e999",
        "-1e999",
        "nan",
        "inf",
        "1e4",
        "0x10",
        "1_000",
        "9" * 400,
        "1" + "0" * 5000,
    ),
    *(
        "None",
        "none",
        "null",
        "True",
        "false",
        "yes",
        "[",
        "]",
        "[]",
        "[[1]]",
        "[1,2",
        "1,2,3",
        ",",
        ",,",
        "[" * 300,
        "{}",
        "{a: 1}",
    ),
    *(
        "~",
        "~nobody/x",
        "~nosuchuser/x",
        "/",
        ".",
        "..",
        "/proc/self/mem",
        "a\0b",
        "a" * 5000,
        "x/" * 3000,
        "\udcff",
        "é",
        "\x1b[31m",
        "\u202e",
        "a\nb",
    ),
    *(
        "%s",
        "{0}",
        "$HOME",
        f"`{BITE}`",
        f"$({BITE})",
        f"; {BITE};",
        f"!!python/object/apply:os.system [{BITE}]",
        "*a",
        "&a b",
        "<<",
        "\N{GREEK SMALL LETTER SIGMA}_max",
    ),
    *("auto", "cuda", "cpu", "ideal", "mini", "sd", "gddpm", "a blue duck", "1:2:3", "org/name", "a.ckpt", "x:-1e400"),
]


@functools.cache
def config_class(name: str) -> type[config.Config]:
    """Return the class of a command's options."""
    return getattr(importlib.import_module(COMMANDS[name][1]), name)


def texts() -> st.SearchStrategy[str]:
    """Values, as a person types them or better not."""
    return st.one_of(
        st.sampled_from(NASTY),
        st.integers().map(str),
        st.floats().map(str),
        st.text(max_size=12),
        st.lists(st.one_of(st.integers().map(str), st.sampled_from(NASTY)), max_size=4).map(",".join),
    )


@functools.cache
def names(cls: type[config.Config]) -> st.SearchStrategy[str]:
    """Names of options, now and then with a mistake in them."""
    known = sorted({**config.options_of(cls), **(OF_RUNS.options if hasattr(cls, "run") else {})})
    broken = st.tuples(st.sampled_from(known), st.integers(0, 20), st.text(max_size=2)).map(
        lambda x: x[0][: x[1]] + x[2] + x[0][x[1] + 1 :]
    )
    often = st.sampled_from(known)
    return st.one_of(often, often, often, often, broken, st.sampled_from(NASTY))


@functools.cache
def words(cls: type[config.Config]) -> st.SearchStrategy[list[str]]:
    """Command lines."""
    options = config.options_of(cls)

    def near(name: str) -> st.SearchStrategy[str]:
        default = options[name].default if name in options else None
        spelled = str(default) if isinstance(default, (int, float, str)) else "1"
        return st.one_of(st.just(spelled), texts())

    flag = names(cls).flatmap(lambda name: st.tuples(st.just(f"--{name}"), near(name)))
    pieces = st.one_of(
        flag.map(list),
        flag.map(lambda x: ["=".join(x)]),
        texts().map(lambda x: [x]),
        st.sampled_from([["-h"], ["--version"]]),
    )
    return st.lists(st.one_of(flag.map(list), flag.map(list), flag.map(list), pieces), max_size=5).map(
        lambda parts: [word for part in parts for word in part]
    )


def read(name: str, argv: list[str]) -> None:
    """Read a command line as its command does; what was taken is written, and read back the same."""
    command, _ = COMMANDS[name]
    module, cls = importlib.import_module(command), config_class(name)
    if name in RUNS:
        cfg = module.read_config(argv)
    elif name == "SweepConfig":
        cfg, _ = module.read_config(argv)
    else:
        words = [field for field in ("run", "runs", "record") if field in cls.model_fields]  # outside flags
        more = {"positional": words[0]} if words else {}
        presets = {"presets_dir": ROOT / "presets"} if name == "DoctorConfig" else {}
        apart = {"apart": OF_RUNS} if more and name not in ("ReplayConfig", "ReproduceConfig") else {}
        cfg = config.load(cls, argv, prog=command, doc="", config_file=None, **more, **presets, **apart)
        if name == "FilmConfig":
            config.refuse_unread(cfg, cfg.read_by)
    config.write(cfg, "written.yml")
    there, here = (config.flat(each) for each in (config.read(cls, "written.yml"), cfg))
    other = {key: (value, there.get(key)) for key, value in here.items() if there.get(key) != value}
    if other:
        raise Fault(f"what was written is read as something else: {other!r}")


def command_line(data: st.DataObject) -> str:
    """A command line of any command."""
    name = data.draw(st.sampled_from(list(COMMANDS)))
    return outcome(lambda: read(name, data.draw(words(config_class(name)))))


# ---------------------------------------------------------------- paths

PATHS = [
    *(
        "~nosuchuser",
        "~nosuchuser/x",
        "a\0b",
        "\ud800",
        "\udcff",
        "",
        " ",
        "a\nb",
        "a" * 300,
        "x/" * 3000,
        "/",
        ".",
        "~",
    ),
    *("ring", "ring/x", "empty", "blank", "blank/x", "pipe", "noise.pt", "link.pt", "/proc/self/mem", "/dev/null"),
]
PATH_OPTIONS = [  # a command that leaves a run, and the words before a path
    *(("run_sjc", ["--family", "gddpm", flag]) for flag in ("--gddpm.checkpoint", "--gddpm.classifier")),
    *(("run_sjc", ["--preset", "mini", flag]) for flag in ("--sd.checkpoint", "--sd.vae", "--sd.lora")),
    *(("run_img_sampling", ["--family", "ddpm", "--ddpm.checkpoint"]), ("run_nerf", ["--scene"])),
    ("run_sjc", ["--preset", "ideal", "--init"]),
]
PATH_WORDS = ("replay", "reproduce", "evaluate", "report", "highres_final_vis", "export_mesh", "view", "run_sweep")


def take_path(at: int, path: str) -> None:
    """Do a command that is given a path, up to where it has found its files."""
    if at >= len(PATH_OPTIONS):
        importlib.import_module(PATH_WORDS[at - len(PATH_OPTIONS)]).main([path])
        return
    command, (*words, flag) = PATH_OPTIONS[at]
    importlib.import_module(command).read_config([*words, f"{flag}={path}"]).check_files()


def odd_files() -> None:
    """Make what some of PATHS name, in the current folder."""
    if not os.path.lexists("ring"):
        os.mkdir("empty")
        os.mkfifo("pipe")
        for link, to in (("ring", "ring"), ("link.pt", "noise.pt")):
            os.symlink(to, link)
        for name, content in (("blank", b""), ("noise.pt", bytes(range(256)))):
            Path(name).write_bytes(content)


def path(data: st.DataObject) -> str:
    """A path that a person gives to any command: of a file, a folder, or what is neither."""
    at = data.draw(st.integers(0, len(PATH_OPTIONS) + len(PATH_WORDS) - 1))
    odd_files()
    return outcome(lambda: take_path(at, data.draw(st.one_of(st.sampled_from(PATHS), st.text(max_size=8)))))


# ---------------------------------------------------------------- YAML and JSON

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(NASTY), st.dates()
)


def values(keys: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Any plain values, whose mappings have such keys."""
    return st.recursive(
        SCALARS, lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(keys, x, max_size=3)), max_leaves=8
    )


@functools.cache
def settings_of(cls: type[config.Config]) -> st.SearchStrategy[dict[object, object]]:
    """Configurations as a file has them."""
    nested = values(st.one_of(st.text(max_size=4), st.sampled_from(["seed", "prompt", "R", "c"])))
    return st.dictionaries(names(cls), nested, max_size=5)


def yaml_text(value: object) -> str:
    """Return values as YAML; what it cannot hold is left out by the caller."""
    return yaml.safe_dump(value, allow_unicode=True)


def put(path: str, text: str) -> None:
    """Write a text that may hold what UTF-8 does not have."""
    Path(path).write_bytes(text.encode(errors="surrogateescape" if "\udcff" in text else "replace"))


def configuration(data: st.DataObject) -> str:
    """A config.yml of a command that leaves a run, or a full_config.yml of a run that goes on."""
    name = data.draw(st.sampled_from(RUNS))
    cls = config_class(name)
    text = yaml_text(data.draw(settings_of(cls)))
    if data.draw(st.booleans()):
        text = broken(data, text.encode(errors="replace")).decode(errors="replace")
    if data.draw(st.booleans()):
        put("config.yml", text)
        try:
            return outcome(lambda: read(name, []))
        finally:
            os.remove("config.yml")
    whole = config.show(cls(**({"runs": ["x"]} if "runs" in cls.model_fields else {})))
    cut = data.draw(st.integers(0, len(whole)))
    put("full_config.yml", data.draw(st.sampled_from([text, whole[:cut] + text, text + whole[cut:]])))
    os.makedirs("ckpt/step_0000001", exist_ok=True)
    os.makedirs("imgs/0.png", exist_ok=True)
    try:
        return outcome(lambda: read(name, data.draw(st.sampled_from([[], ["--resume", "True"]]))))
    finally:
        os.remove("full_config.yml")
        for folder in ("ckpt/step_0000001", "ckpt", "imgs/0.png", "imgs"):
            os.rmdir(folder)


def sweep(data: st.DataObject) -> str:
    """The file of a sweep."""
    cls = config_class("SJCConfig")
    part = st.one_of(settings_of(cls), values(st.text(max_size=3)))
    lists = st.dictionaries(names(cls), st.lists(SCALARS, max_size=3), max_size=3)
    plan = {
        key: data.draw(st.one_of(part, lists, st.lists(part, max_size=2)))
        for key in data.draw(st.lists(st.sampled_from(["options", "axes", "runs", "slurm", "more"]), unique=True))
    }
    put("s.yml", yaml_text(plan))
    from sweep import plan as plans

    return outcome(lambda: plans.read_plan("s.yml"))


def environment(data: st.DataObject) -> str:
    """env.json."""
    found = data.draw(st.one_of(st.fixed_dictionaries({"data_root": SCALARS}), values(st.text(max_size=5))))
    text = json.dumps(found, default=str)
    Path("env.json").write_bytes(broken(data, text.encode()) if data.draw(st.booleans()) else text.encode())
    before, env.ENV = env.ENV, Path("env.json").resolve()
    try:
        return outcome(env.data_root)
    finally:
        env.ENV = before


# ---------------------------------------------------------------- files


def broken(data: st.DataObject, content: bytes) -> bytes:
    """Return bytes with a few things done to them."""
    for _ in range(data.draw(st.integers(1, 3))):
        at, n = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 64))
        match data.draw(st.integers(0, 5)):
            case 0:
                content = content[:at]
            case 1 if at < len(content):
                content = content[:at] + bytes([content[at] ^ 1 << n % 8]) + content[at + 1 :]
            case 2:
                content = content[:at] + data.draw(st.binary(max_size=16)) + content[at + n :]
            case 3:
                content = content[:at] + content[at : at + n] * 2 + content[at + n :]
            case 4:
                content = content[:at] + bytes([data.draw(st.sampled_from([0, 255]))]) * n + content[at + n :]
            case 5 if data.draw(st.integers(0, 9)) == 0:
                content = data.draw(st.binary(max_size=200))
    return content


@functools.cache
def sound() -> dict[str, tuple[str, bytes, Callable[[Path], object]]]:
    """Return {kind of a file: (its name, its bytes when it is sound, what reads it)}."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save

    import crafted
    import hostile
    import picture_files
    from my import starts
    from my.tensor_file import TensorFile
    from voxnerf import images

    def tensors(path: Path) -> None:
        file = TensorFile(path)
        for name in file.shapes:
            file.tensor(name)

    def rows(path: Path) -> None:
        from my.run_dir import History, read_history

        read_history(path)
        History(path, 20, every=10).close()
        if len(read_history(path)) > 3:
            raise Fault("more rows than there were")

    bite = hostile.call(hostile.named("os", "system"), hostile.text(BITE))
    biting = b"\x80\x02}(" + hostile.text("x") + bite + hostile.text("w") + hostile.tensor() + b"u."
    parts = crafted.small_parts()
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    low_rank = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(32, 2), "alpha": torch.tensor(1.0)}
    lora = save({f"{layer}.{name}": tensor.half() for name, tensor in low_rank.items()}, {"ss_network_dim": "2"})

    grey = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    picture = Image.fromarray(grey)
    history = b"".join(b'{"step": %d, "sigma": 1.5, "score": 0.25}\n' % i for i in (10, 20, 30))
    begun = b'{"kind": "start", "at": "2026-01-01T00:00:00.000+00:00", "command": "run_sjc.py", "seed": 0}\n'
    ended = b'{"kind": "end", "at": "2026-01-01T00:00:09.000+00:00", "how": "done", "ram": 1}\n'
    return {
        "safetensors": ("a.safetensors", hostile.SOUND["safetensors"](600), tensors),
        "archive": ("a.ckpt", hostile.SOUND["archive"](600), tensors),
        "stream": ("a.ckpt", hostile.SOUND["stream"](600), tensors),
        "lora": ("l.safetensors", lora, lambda path: crafted.fuse(parts, path, 1e-3)),
        "png": ("a.png", picture_files.png_of(grey, picture_files.RGB), images.read_image),
        "jpeg": ("a.jpg", picture_files.with_orientation(picture, "JPEG", 6), images.read_image),
        "tiff": ("a.tif", picture_files.tiff(grey, 2, packed=True), images.read_image),
        "webp": ("a.webp", picture_files.saved(picture, "WEBP", lossless=True), images.read_image),
        "mask": ("m.png", picture_files.saved(picture.convert("L"), "PNG"), images.read_mask),
        "history": ("history.json", history, rows),
        "starts": ("starts.json", begun + ended, lambda path: [start.seconds for start in starts.read(path.parent)[0]]),
        "biting archive": ("a.ckpt", hostile.archive(biting, [("archive/version", b"3\n")]), tensors),
        "biting stream": ("a.ckpt", hostile.stream(biting), tensors),
        "biting yaml": (
            "a.yml",
            f"a: !!python/object/apply:os.system ['{BITE}']\n".encode(),
            lambda path: config.read_yaml(path, str(path)),
        ),
        "yaml": ("a.yml", hostile.SOUND["yaml"](300), lambda path: config.read_yaml(path, str(path))),
    }


def file(data: st.DataObject) -> str:
    """A file of numbers, pictures or lines, with something done to it."""
    kind = data.draw(st.sampled_from(list(sound())))
    name, content, reads = sound()[kind]
    Path(name).write_bytes(broken(data, content))
    try:
        return outcome(lambda: reads(Path(name)))
    finally:
        os.remove(name)


# ---------------------------------------------------------------- folders


@functools.cache
def run_folder() -> dict[str, bytes]:
    """Return {name: bytes} of a run's folder that is whole: its checkpoint, snapshot, history, heartbeat and starts."""
    import run_sjc
    from sjc import SJC
    from tiny import Affine
    from tiny import config as tiny_config

    with tempfile.TemporaryDirectory() as folder, inside(folder):
        run_sjc.N_TEST_VIEWS, n = 2, run_sjc.N_TEST_VIEWS
        cfg = tiny_config(n_steps=10, ckpt_every=0.5)
        from my import starts

        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            config.write(cfg, "full_config.yml")
            starts.add("start", command="run_sjc.py", seed=0)
            run_sjc.train(SJC(cfg, Affine()), 0)
        run_sjc.N_TEST_VIEWS = n
        kept = [p for p in Path().rglob("*") if p.is_file() and p.suffix in (".json", ".yml", ".safetensors", ".png")]
        return {str(p): p.read_bytes() for p in kept if "test_" not in str(p) and "view" not in str(p)}


def gone_on(_: Path) -> None:
    """Read a run's folder as its commands do: to go on with it, for its page, and for a sweep's."""
    from asset import load_field
    from my import checkpoint
    from options.found import find
    from pages import facts
    from pages.run import page
    from sweep import folder
    from tiny import Affine
    from voxnerf import snapshot

    found = find(".")
    folder.step_now(Path())
    folder.attempts(Path())
    page(facts.gather(Path(), found.cfg))
    adapter = Affine()
    field, _ = load_field(found, adapter)
    for path in snapshot.found(".").values():
        snapshot.restore(field, path)
    newest = checkpoint.load_newest("ckpt")
    assert newest


def folder(data: st.DataObject) -> str:
    """The folder of a run, in which something is done to one of its files."""
    content = dict(run_folder())
    name = data.draw(st.sampled_from(sorted(content)))
    if data.draw(st.integers(0, 9)) == 0:
        del content[name]
    elif name.endswith("heartbeat.json") and data.draw(st.booleans()):
        beat = json.loads(content[name])
        beat[data.draw(st.sampled_from(sorted(beat)))] = data.draw(values(st.text(max_size=3)))
        content[name] = json.dumps(beat, default=str).encode()
    else:
        content[name] = broken(data, content[name])
    with tempfile.TemporaryDirectory() as where:
        for path, data_of in content.items():
            Path(where, path).parent.mkdir(parents=True, exist_ok=True)
            Path(where, path).write_bytes(data_of)
        with inside(where):
            return outcome(lambda: gone_on(Path()))


def record(data: st.DataObject) -> str:
    """A flight record that says something else, with the right checksum, or something is done to its bytes."""
    import torch
    from safetensors.torch import save

    from rerun import flight
    from tiny import config as tiny_config

    tensors = {"x": torch.ones(2)}
    about = {"format": flight.FORMAT, "step": 0, "attempt": 0, "sigma": 1.0, "seed": 0, "device": "cpu"}
    about |= {"cameras": [{"view": "front"}], "statistics": {"x": {"not finite": 0}}}
    changed = data.draw(st.booleans())
    if changed:
        about[data.draw(st.sampled_from(sorted(about)))] = data.draw(values(st.text(max_size=3)))
        about = json.loads(json.dumps(about, default=str))
    content = save(tensors, flight.sealed(about, tensors))
    os.makedirs("run/flight", exist_ok=True)
    if not os.path.exists("run/full_config.yml"):
        config.write(tiny_config(), "run/full_config.yml")
    Path("run/flight/a.safetensors").write_bytes(content if changed else broken(data, content))

    def told() -> None:
        found = flight.read("run/flight/a.safetensors")
        list(flight.report(found, []))

    return outcome(told)


def scene(data: st.DataObject) -> str:
    """A transforms.json, of which values are others, or something is done to its bytes."""
    from voxnerf.scene import load_scenes

    content = scene_files()
    text = content["transforms.json"]
    if data.draw(st.booleans()):
        meta = json.loads(text)
        entry = meta if data.draw(st.booleans()) else data.draw(st.sampled_from(meta["frames"]))
        key = data.draw(
            st.sampled_from([*entry, "w", "h", "fl_x", "cx", "k1", "camera_model", "aabb_scale", "applied_transform"])
        )
        entry[key] = data.draw(values(st.text(max_size=3)))
        text = json.dumps(meta, default=str).encode()
    else:
        text = broken(data, text)
    with tempfile.TemporaryDirectory() as where:
        for path, data_of in {**content, "transforms.json": text}.items():
            Path(where, path).parent.mkdir(parents=True, exist_ok=True)
            Path(where, path).write_bytes(data_of)
        return outcome(lambda: load_scenes(Path(where), ("train", "test"), 1, False))


@functools.cache
def scene_files() -> dict[str, bytes]:
    """Return {name: bytes} of a small scene that is whole."""
    import posed

    with tempfile.TemporaryDirectory() as where:
        posed.whole(Path(where), n=3, camera_angle_x=1.5)
        return {str(p.relative_to(where)): p.read_bytes() for p in Path(where).rglob("*") if p.is_file()}


KINDS = {
    each.__name__: each for each in (command_line, path, configuration, sweep, environment, file, folder, record, scene)
}


# ---------------------------------------------------------------- the command


class FuzzConfig(config.Config):
    """Every option."""

    cases: int = Field(100_000, gt=0, description="how many cases to try, over all kinds")
    kinds: list[str] = Field(list(KINDS), min_length=1, description=f"what to try, of {', '.join(KINDS)}")
    minutes: float | None = Field(None, gt=0, description="begin no further round of cases after so many")


def tried(kind: str, n: int) -> tuple[Counter, dict[str, str]]:
    """Return ({how a case ended: how often}, {fault: its traceback}) of n random cases of a kind."""
    ends: Counter = Counter()
    faults: dict[str, str] = {}

    @settings(
        max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def case(data: st.DataObject) -> None:
        try:
            ends[KINDS[kind](data)] += 1
        except Exception as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            ends["fault"] += 1
            faults.setdefault(
                f"{kind}: {type(error).__name__} at {last.filename}:{last.lineno}",
                f"{data}\n" + "".join(traceback.format_exception(error)),
            )

    case()
    return ends, faults


def main(argv: list[str] | None = None) -> None:
    """Try cases, say how they ended, and print each fault once."""
    cfg = config.load(FuzzConfig, argv, prog="tests/fuzz.py", doc=__doc__, config_file=None)
    unknown = set(cfg.kinds) - set(KINDS)
    if unknown:
        raise UserError(f"--kinds {','.join(unknown)}: give some of {', '.join(KINDS)}")
    warnings.simplefilter("error")
    until = time.monotonic() + 60 * (cfg.minutes or 1e6)
    found: dict[str, str] = {}
    ends = {kind: Counter() for kind in cfg.kinds}
    least = cfg.cases // len(cfg.kinds)
    with tempfile.TemporaryDirectory() as where, inside(where):
        while time.monotonic() < until and (left := [kind for kind in cfg.kinds if ends[kind].total() < least]):
            for kind in left:
                more, faults = tried(kind, min(ROUND, least))
                ends[kind] += more
                for name in faults.keys() - found.keys():
                    print(f"{name}\n{faults[name]}", flush=True)
                found |= faults
            print({kind: dict(ends[kind]) for kind in cfg.kinds}, flush=True)
    print(f"{sum(each.total() for each in ends.values())} cases")
    if found:
        raise RunError(f"{len(found)} faults")


if __name__ == "__main__":
    run_main(main)
