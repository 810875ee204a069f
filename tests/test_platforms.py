"""Windows and macOS, as far as Linux can stand in for them: what they lack is taken away, and runs go on."""

import ast
import errno
import fcntl
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import filelock
import psutil
import pytest
import torch

import doctor
import run_img_sampling
import run_sjc
import run_sweep
import torture
from my import checkpoint, errors, file_system, machine, run_dir, script, starts
from my.errors import UserError
from sweep import plan
from voxnerf import reference
from voxnerf.field import VoxRF
from voxnerf.render import pick_march

ROOT = Path(__file__).resolve().parent.parent
SJC = ["--preset", "ideal", "--n_steps", "4", "--ideal.n_cameras", "12", "--vox.grid_size", "8", "--device", "cpu"]
SJC += ["--pose.rend_hw", "8", "--pose.view_words", "sides", "--ckpt_every", "0.25"]
FORBIDDEN = re.compile(r"""[<>:"\\|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|(com|lpt)\d)(\.|$)""", re.I)  # names of Windows


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def elsewhere(request, tmp_path, monkeypatch):
    """A folder on a machine without what Linux alone has. What has just been written is read by another program."""
    import torch._dynamo  # noqa: F401 (it wants what is taken away below)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(file_system, "WAITS_S", (0.0,) * 3)
    for module, names in {
        os: ("sysconf", "sched_getaffinity", "fork", "getuid", "geteuid", "uname", "getpgid", "killpg"),
        signal: ("pthread_sigmask", "SIGHUP", "SIGUSR1", "SIGUSR2"),
    }.items():
        for name in names:
            monkeypatch.delattr(module, name)
    monkeypatch.setattr(fcntl, "flock", locked_by_linux)
    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        monkeypatch.setitem(sys.modules, name, None)
    refused = dict.fromkeys(("replace", "rmtree"), 0)

    def opened(path, flags, *args, open=os.open, **kw):
        if os.path.isdir(path) and not kw:  # of a folder's file descriptor, shutil opens what it deletes
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, flags, *args, **kw)

    def at_the_third_try(name, function):
        def tried(*args, **kw):
            refused[name] += 1
            if refused[name] % 3:
                raise PermissionError(errno.EACCES, "it is being used by another process", str(args[0]))
            return function(*args, **kw)

        return tried

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "replace", at_the_third_try("replace", os.replace))
    monkeypatch.setattr(file_system.shutil, "rmtree", at_the_third_try("rmtree", rmtree))
    if getattr(request, "param", "") == "no locks":
        load_anew("filelock", monkeypatch)
        with pytest.raises(OSError, match="fcntl is unavailable"):
            importlib.import_module("filelock").lock_descriptor(0, blocking=False)
    else:
        monkeypatch.setattr(filelock, "lock_descriptor", Locks())
    yield refused
    folders = {root: [*folders, *names] for root, folders, names in os.walk(tmp_path)}
    for folder, names in folders.items():
        assert not [name for name in names if name.startswith(".")], folder
        assert len({plan.alike(name) for name in names}) == len(names), folder
        assert not list(filter(FORBIDDEN.search, names)), folder


def locked_by_linux(*_):
    raise AssertionError("a file was locked by what Linux has")


def load_anew(package, monkeypatch):
    """Have the next import of a package find which modules there are now."""
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    warnings.filterwarnings("ignore", "only soft file lock is available")


class Locks:
    """Locks of files that the system itself does not know: each is held until its handle is closed."""

    def __init__(self):
        self.held = {}

    def __call__(self, handle, *, blocking):
        assert not blocking
        file = self.file(handle)
        holder = self.held.setdefault(file, handle)
        if holder != handle and self.file(holder) != file:
            holder = self.held[file] = handle
        return holder == handle

    @staticmethod
    def file(handle):
        try:
            return os.path.realpath(f"/proc/self/fd/{handle}"), os.fstat(handle).st_ino
        except OSError:
            return None


def rmtree(folder):
    """`shutil.rmtree` without a handle of the folder."""
    for path in Path(folder).iterdir():
        rmtree(path) if path.is_dir() else path.unlink()
    Path(folder).rmdir()


@pytest.mark.parametrize("elsewhere", ["locks", "no locks"], indirect=True)
def test_a_run_ends_there_and_another_goes_on(elsewhere, capsys):
    run_sjc.main(SJC)
    assert json.loads(Path("heartbeat.json").read_text())["done"] and elsewhere["replace"] > 30
    assert sorted(os.listdir("ckpt")) == ["step_0000003", "step_0000004"] and elsewhere["rmtree"] >= 2 * 3
    rmtree("ckpt/step_0000004")
    for gone in ("test_4", "heartbeat.json"):
        Path(gone).unlink() if Path(gone).is_file() else rmtree(gone)
    run_sjc.main(["--resume", "True"])
    assert [row["step"] for row in run_dir.read_history("history.json")][-1] == 4
    assert sorted(os.listdir("ckpt")) == ["step_0000003", "step_0000004"]
    begun, n_damaged = starts.read(".")
    assert [start.ended for start in begun] == [starts.DONE] * 2 and not n_damaged


def test_a_folder_is_held_by_one_there(elsewhere):
    with run_dir.alone():
        assert run_dir.is_held(".")
        with pytest.raises(UserError, match="another process is at work in this folder"), run_dir.alone():
            pass
    assert run_dir.is_held(".") is False and not Path(run_dir.LOCK).exists()
    with run_dir.alone():  # which was given back
        assert run_dir.is_held(".")


@pytest.mark.parametrize("name", ["canvas", "nerf"])
def test_other_commands_end_there(name, elsewhere, tmp_path):
    job = torture.JOBS[name]
    if job.needs == "scene":
        torture.write_scene(tmp_path / "scene")
    (tmp_path / "run").mkdir()
    os.chdir(tmp_path / "run")
    importlib.import_module(Path(job.command).stem).main([*job.argv])
    assert starts.read(".")[0][-1].ended == starts.DONE and elsewhere["replace"] > 6


def test_what_is_made_of_a_run_is_made_there(elsewhere):
    run_sjc.main([*SJC, "--sd.prompt", "a blue duck"])
    for command, options in {
        "highres_final_vis": ["--n_frames", "3", "--skip", "1", "--device", "cpu"],
        "export_mesh": ["--device", "cpu"],
        "evaluate": [".", "--device", "cpu"],
        "report": [],
    }.items():
        importlib.import_module(command).main(options)
    assert elsewhere["replace"] > 40


def test_pictures_are_drawn_there(elsewhere):
    run_img_sampling.main(
        ["--family", "ideal", "--sd.prompt", "a red car", "--ideal.n_cameras", "4", "--pose.rend_hw", "8"]
        + ["--num_images", "1", "--num_t", "2", "--device", "cpu"]
    )
    assert Path("imgs/0000000.png").exists() and elsewhere["replace"] > 6


def test_a_sweep_says_that_it_cannot_be_there(elsewhere):
    Path("s.yml").write_text("options: {preset: ideal}\naxes: {seed: [0, 1]}\n")
    with pytest.raises(UserError, match="sweeps need Linux or macOS, .* --dry_run True prints them"):
        run_sweep.main(["s.yml"])
    run_sweep.main(["s.yml", "--dry_run", "True"])


# ---------------------------------------------------------------- files


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_no_file_of_a_checkpoint_stays_open(tmp_path):
    """Windows deletes no file that is mapped: a run that goes on deletes the checkpoint that it began with."""
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(1, 2, 3, 4, 5)}
    tensors["b"] = tensors["b"].contiguous(memory_format=torch.channels_last_3d)
    path = checkpoint.save(tmp_path, 1, tensors, {})
    loaded, _ = checkpoint.load(path)
    assert checkpoint.TENSORS not in Path("/proc/self/maps").read_text()
    assert not [file for file in psutil.Process().open_files() if str(tmp_path) in file.path]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].stride() == tensor.stride()


def test_a_checkpoint_that_another_program_has_open_is_deleted_later(tmp_path, monkeypatch):
    monkeypatch.setattr(file_system, "WAITS_S", (0.0,))
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"a": torch.ones(1)}, {}, keep=1)
    open_elsewhere = tmp_path / "step_0000002"

    def replace(path, to, replace=os.replace):
        if Path(path) == open_elsewhere:
            raise PermissionError(errno.EACCES, "it is being used by another process")
        replace(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        checkpoint.save(tmp_path, 3, {"a": torch.ones(1)}, {}, keep=1)
        assert checkpoint.latest(tmp_path).name == "step_0000003" and open_elsewhere.exists()
        with pytest.raises(PermissionError):  # this very checkpoint cannot be written
            checkpoint.save(tmp_path, 2, {"a": torch.ones(1)}, {}, keep=1)
    checkpoint.save(tmp_path, 4, {"a": torch.ones(1)}, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000004"]


def test_a_file_that_another_program_has_open_is_told_as_that():
    error = PermissionError(errno.EACCES, "The process cannot access the file", "ckpt/step_0000002")
    assert "permission denied" in errors.explain(error, "go on")[0]
    error.winerror = 32
    assert errors.explain(error, "go on")[0].endswith(
        "step_0000002: another program has it open; close that one, then go on"
    )


# ---------------------------------------------------------------- processes, terminals, devices


def test_whether_a_process_is_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert run_dir.is_alive(child.pid) and run_dir.is_alive(os.getpid())
    child.communicate(b"\n")
    assert child.returncode == 0 and not run_dir.is_alive(child.pid)  # nothing was sent to it


def test_a_terminal_of_few_letters_takes_every_prompt(tmp_path):
    code = "from my.errors import run_main; run_main(lambda argv: print('a \\u732b, caf\\xe9'))"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("a \\u732b, caf\\xe9\n", "")


def test_a_command_is_spelled_as_its_terminal_takes_it(monkeypatch):
    words = ["run_sjc.py", "--sd.prompt", "a blue duck"]
    assert script.spelled(words) == "run_sjc.py --sd.prompt 'a blue duck'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert script.spelled(words) == 'run_sjc.py --sd.prompt "a blue duck"'


def test_mps_is_on_request_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert script.pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match="--device cuda: not available here.*; use auto, cpu, mps$"):
        script.pick_device("cuda")
    monkeypatch.setattr(torch, "empty", lambda *args, device: None)
    assert script.pick_device("mps").type == "mps"


def test_on_mps_the_renderer_is_the_reference(monkeypatch):
    monkeypatch.setattr("voxnerf.render.device_type", lambda field: "mps")
    field = VoxRF([[-1] * 3, [1] * 3], 2)
    assert pick_march("auto", field) is pick_march("reference", field) is reference.march
    with pytest.raises(UserError, match="--renderer fused: it runs on cpu and cuda, not on mps; use --renderer ref"):
        pick_march("fused", field)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for renderer in ("auto", "reference"):
        with pytest.raises(UserError, match="--deterministic True: mps has no such results; leave it out"):
            pick_march(renderer, field)


def test_doctor_says_that_mps_is_untried(monkeypatch):
    monkeypatch.setattr(script, "pick_device", lambda name: torch.device("mps"))
    found, precision = doctor.check_device(doctor.DoctorConfig(family="sd"))
    assert found[:3] == (doctor.NOTE, "device", "mps, an Apple GPU") and "nobody has run" in found[3]
    assert "float32" in precision.found


def test_what_makes_a_field_stays_exact():
    """A change of the type of its numbers, or a move, leaves how many voxels a unit has in float64."""
    field = VoxRF([[-1, -1, -1], [1, 2, 3]], (3, 5, 7))
    voxels = field.voxels_per_unit
    assert torch.equal(field.half().float().voxels_per_unit, voxels) and voxels.dtype == torch.float64
    assert field.to("meta").voxels_per_unit.device.type == "meta"


def test_memory_is_known_without_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "memory" not in machine.peak_memory()
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=5))
    assert machine.peak_memory()["memory"] == 5


# ---------------------------------------------------------------- what the code says


POSIX = {
    "os": {"fork", "forkpty", "getuid", "geteuid", "getgid", "uname", "getpgid", "setsid", "killpg", "kill", "sysconf"},
    "signal": {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "alarm", "pthread_sigmask", "SIG_UNBLOCK"},
}
ON_LINUX = {"sweep/job.py"}  # is not used on Windows: run_sweep.py refuses it
IMPORTS = {"fcntl", "resource", "termios", "pwd", "grp", "syslog"}


@functools.cache
def sources():
    """{path: tree} of the code that commands run."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True)
    paths = [path for path in listed.stdout.decode().split() if not path.startswith(("tests/", "benchmarks/"))]
    assert len(paths) > 100
    return {path: ast.parse((ROOT / path).read_text("utf-8"), path) for path in paths if (ROOT / path).exists()}


def test_the_code_asks_for_nothing_that_one_system_alone_has():
    for path, tree in sources().items():
        tried = {node for each in ast.walk(tree) if isinstance(each, ast.Try) for node in ast.walk(each)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.attr not in POSIX.get(node.value.id, ()) or path in ON_LINUX, (path, node.lineno)
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {name.name for name in node.names} | {getattr(node, "module", None)}
                assert not names & IMPORTS or node in tried, (path, node.lineno)


def test_text_files_are_utf_8_with_the_same_ends_of_lines_everywhere():
    for path, tree in sources().items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {word.arg for word in node.keywords}
            where = (path, node.lineno)
            assert name != "write_text", where  # it ends lines as the system does: write_atomic, write_bytes
            if name == "read_text":
                assert "encoding" in given, where
            if name == "open" and isinstance(node.func, ast.Name):
                mode = next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r")
                text = "encoding" in given and ("newline" in given or "devnull" in ast.unparse(node))
                assert "b" in mode or text, where


def test_files_are_renamed_in_one_place():
    """Where Windows refuses, it is tried again."""
    for path, tree in sources().items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
            renames = node.attr in ("rename", "renames", "rmtree") or ast.unparse(node) == "os.replace"
            assert not renames or path == "my/file_system.py", (path, node.lineno)
