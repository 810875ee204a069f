"""How a script's run begins: its configuration, its resumption, its device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import Field

from my import checkpoint, run_dir, script, starts
from my.config import by_use, walk
from my.errors import RunError, UserError, explain
from my.processes import Processes
from my.run_dir import write_atomic
from options.canvas import CanvasConfig
from options.nerf import NeRFConfig
from options.sampling import SamplingConfig
from options.sjc import SJCConfig


class Tiny(script.RunOptions):
    lr: float = Field(0.1, description="learning rate")

    command = "run_tiny.py"


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a configuration in an empty folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return lambda *argv: script.read_config(Tiny, list(argv), root=tmp_path / "project", prog="tiny", doc="Tiny.")


def test_begin_keeps_the_configuration_and_runs(read, capsys):
    runs = []
    script.begin(
        read("--lr", "0.5"), lambda cfg, found: lambda: runs.append((cfg.lr, Path(script.FULL_CONFIG).exists()))
    )
    assert runs == [(0.5, True)] and "lr: 0.5" in capsys.readouterr().out
    script.begin(read("--dry_run", "True"), None)
    assert "dry_run: false" in Path(script.FULL_CONFIG).read_text() and "lr: 0.1" in capsys.readouterr().out


def test_each_command_that_begins_is_recorded(read):
    script.begin(read("--seed", "7"), lambda cfg, found: lambda: None, ["--seed", "7"])
    script.begin(read("--dry_run", "True"), None, ["--dry_run", "True"])  # which runs nothing
    script.begin(read("--resume", "True"), lambda cfg, found: lambda: None, ["--resume", "True", "--device", "a b"])
    (first, second), damaged = starts.read(".")
    assert damaged == 0 and first.ended == second.ended == "done"
    assert [first.facts["command"], first.facts["seed"]] == ["run_tiny.py --seed 7", 7]
    assert second.facts["command"] == "run_tiny.py --resume True --device 'a b'"
    assert first.facts["device"].startswith(("cpu: ", "cuda: ")) and first.facts["threads"] >= 1
    assert first.facts["versions"].keys() == {"version", "torch", "warp", "python", "platform"}


def test_a_run_that_goes_on_with_another_torch_says_so(read, monkeypatch, capsys):
    now = script.versions()
    monkeypatch.setattr(script, "versions", lambda: now)
    script.begin(read(), lambda cfg, found: lambda: None)
    Path("ckpt").mkdir()
    capsys.readouterr()
    now = now | {"torch": "9.9"}
    script.begin(read("--resume", "True"), lambda cfg, found: lambda: None)
    told = [line for line in capsys.readouterr().err.splitlines() if "the run began with torch" in line]
    (_, second), _ = starts.read(".")
    assert len(told) == 1 and told[0].endswith(" goes on with torch 9.9: its numbers may change from here on")
    assert second.notes == [told[0].removeprefix("note: ")]


def test_begin_clears_what_killed_processes_left(read, monkeypatch):
    stale = [Path("img") / run_dir.scratch_of("a.png").name, Path("ckpt/.tmp_step_0000001_new/meta.json")]
    for path in stale:
        path.parent.mkdir(parents=True)
        path.touch()
    with monkeypatch.context() as patch:
        patch.setattr(script, "of_torchrun", lambda: Processes(1, 2))
        script.begin(read(), lambda cfg, found: lambda: None)
        assert all(path.exists() for path in stale)  # the first process does it, which holds the folder
    script.begin(read("--dry_run", "True"), None)
    assert not any(path.exists() for path in stale)


def test_how_a_stopped_command_goes_on(read):
    assert script.go_on() == "start it again"
    script.begin(read(), lambda cfg, found: lambda: None)
    assert script.go_on() == "continue with --resume True"


def test_of_several_processes_the_first_writes(read, capsys, monkeypatch):
    runs = []
    monkeypatch.setattr(script, "of_torchrun", lambda: Processes(1, 2))
    with run_dir.alone():  # as the first one holds the folder
        script.begin(read("--lr", "0.5"), lambda cfg, found: lambda: runs.append(cfg.lr))
    assert runs == [0.5] and not list(Path().iterdir()) and capsys.readouterr().out == ""


def refuse(cfg, found=None):
    raise UserError("no")


@pytest.mark.parametrize("dry_run", ["False", "True"])
def test_a_refused_run_prints_and_leaves_nothing(read, capsys, monkeypatch, dry_run):
    if dry_run == "False":
        with pytest.raises(UserError, match="no"):
            script.begin(read(), refuse)
    monkeypatch.setattr(Tiny, "check_files", refuse)
    with pytest.raises(UserError, match="no"):
        script.begin(read("--dry_run", dry_run), None)
    assert capsys.readouterr() == ("", "") and not list(Path().iterdir())


def test_a_file_in_the_way_of_the_runs_folder(read):
    Path("ckpt").write_text("")
    with pytest.raises(UserError, match="ckpt: this run would write a folder of that name"):
        read()


def test_what_another_process_does_before_this_one_holds_the_folder(read):
    """Both had found an empty folder, or an unfinished run. The second would begin again, or go on with its end."""
    first, second = read(), read()
    script.begin(first, lambda cfg, found: lambda: checkpoint_with({}))
    runs, said = [], "another process has been at work in this folder in the meantime"
    with pytest.raises(UserError, match=said):
        script.begin(second, lambda cfg, found: lambda: runs.append(1))
    third, late = read(), read()
    script.begin(third, lambda cfg, found: lambda: Path("heartbeat.json").write_text('{"done": true, "saved": 1}'))
    with pytest.raises(UserError, match=said):
        script.begin(late, lambda cfg, found: lambda: runs.append(1))
    assert not runs


def test_resume_takes_what_was_saved(read):
    script.begin(read("--lr", "0.5"), lambda cfg, found: Path("ckpt/step_0000001").mkdir(parents=True) or dict)
    assert read("--resume", "True", "--device", "cpu").lr == 0.5
    with pytest.raises(UserError, match=r"--lr 0.25 \(was 0.5\).*device, dry_run, resume"):
        read("--resume", "True", "--lr", "0.25")
    with pytest.raises(UserError, match=r"not finished, and its options are others: --lr .* \(was 0.5\)"):
        read()
    with pytest.raises(UserError, match="already holds a run"):
        read("--resume", "False")


def checkpoint_with(meta, step=1):
    checkpoint.save("ckpt", step, {"x": torch.zeros(1)}, meta)


def test_an_option_that_has_changed_on_the_disk_is_told(read):
    """The configuration has no checksum, but the checkpoints have: they hold what a run may not change."""
    script.begin(read("--lr", "0.3"), lambda cfg, found: lambda: checkpoint_with({script.OPTIONS: script.held(cfg)}))
    kept = Path(script.FULL_CONFIG)
    right = kept.read_text()
    for name, was, now in (("lr", 0.3, 0.1), ("seed", 0, 1)):
        assert f"{name}: {was}" in right
        kept.write_text(right.replace(f"{name}: {was}", f"{name}: {now}"))
        said = rf"^full_config.yml: --{name} {now} \(was {was}\); ckpt/step_0000001 has what it was: write that into"
        for argv in (["--resume", "True"], ["--lr", "0.3"]):
            with pytest.raises(UserError, match=said):
                read(*argv)
    kept.write_text(right.replace("device: auto", "device: cpu"))  # which a run may change
    assert read("--resume", "True").device == "cpu"


def test_which_checkpoints_hold_options(read):
    """The newest that is not damaged. Those of earlier versions hold none, or options that there are no more."""
    script.begin(read("--lr", "0.3"), lambda cfg, found: lambda: checkpoint_with({}))
    assert read("--resume", "True").lr == 0.3
    checkpoint_with({script.OPTIONS: {"lr": 0.5, "gone": 1}}, 2)
    with pytest.raises(UserError, match=r"--lr 0.3 \(was 0.5\); ckpt/step_0000002"):
        read("--resume", "True")
    (Path("ckpt") / "step_0000002" / checkpoint.META).write_text("{")
    assert read("--resume", "True").lr == 0.3


@pytest.mark.parametrize("cls", [SJCConfig, SamplingConfig, CanvasConfig, NeRFConfig])
def test_what_is_held_are_plain_values_of_all_that_is_not_free(cls):
    cfg = cls(**({"family": "ideal", "sd": {"prompt": "a blue duck"}} if cls is not NeRFConfig else {}))
    known = script.held(cfg)
    assert known.keys() == {option.name for option in walk(cls)} - script.free_on_resume(cls)
    assert json.loads(json.dumps(known)) == known and "seed" in known


def test_a_run_that_left_nothing_whole_can_be_started_again(read):
    """As after a failure before its first checkpoint, or within it."""
    script.begin(read("--lr", "0.5"), lambda cfg, found: Path("ckpt/.tmp_step_0000001_new").mkdir(parents=True) or dict)
    assert read("--lr", "0.25").lr == 0.25 and read("--resume", "True").lr == 0.5


def test_precision_is_of_the_machine_and_may_change():
    then = {"sd.precision": "fp16", "device": "cuda", "lr": 1}
    free = script.free_on_resume(SJCConfig)
    of_models = {"sd.precision", "sd.offload_text", "gddpm.precision", "low_vram", "compile"}
    of_writing = {"report", "snapshots", "alpha", "ckpt_every", "ckpt_minutes", "ckpt_keep"}
    assert free == of_models | of_writing | {"device", "deterministic", "threads", "resume", "dry_run"}
    script.refuse_changes({"sd.precision": "fp32", "device": "cpu", "lr": 1}, then, free, "given", "do")
    with pytest.raises(UserError, match=r"^given: --lr 2 \(was 1\); do$"):
        script.refuse_changes({"sd.precision": "fp16", "device": "cuda", "lr": 2}, then, free, "given", "do")


def test_a_run_keeps_its_number_of_threads(read, capsys):
    own, used = torch.get_num_threads(), []

    def prepare(cfg, found):
        used.append((torch.get_num_threads(), cfg.threads))
        return lambda: None

    try:
        script.begin(read("--threads", "3"), prepare)
        assert "threads: 3" in Path(script.FULL_CONFIG).read_text()
        torch.set_num_threads(own)  # as another process has it
        Path("ckpt/step_0000001").mkdir(parents=True)
        script.begin(read(), prepare)
        capsys.readouterr()
        script.begin(read("--resume", "True", "--threads", "2"), prepare)
        assert (
            "note: --threads 2: the run began with 3, so the last bits of its numbers change" in capsys.readouterr().err
        )
        assert used == [(3, 3), (3, 3), (2, 2)]
        assert [start.facts["threads"] for start in starts.read(".")[0]] == [3, 3, 2]
        Path("ckpt/step_0000001").rmdir()
        Path("ckpt").rmdir()
        script.begin(read(), prepare)
        assert used[-1] == (2, 2) and "threads: 2" in Path(script.FULL_CONFIG).read_text()  # what there is, recorded
    finally:
        torch.set_num_threads(own)


def test_deterministic_reaches_pytorch_before_the_run_is_prepared(read):
    """In a process of its own: what is set holds for a process."""
    code = """
import os, torch
from my import run_dir, script, starts
script.be_deterministic()
assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


@pytest.mark.parametrize("asked", [True, False])
def test_begin_is_deterministic_where_that_is_asked(read, asked, monkeypatch):
    done = []
    monkeypatch.setattr(script, "be_deterministic", lambda: done.append("deterministic"))
    script.begin(read("--deterministic", str(asked)), lambda cfg, found: done.append("prepared"))
    assert done == ["deterministic"] * asked + ["prepared"]


@pytest.mark.parametrize("name, way", [("folder", lambda p: p.mkdir()), ("file", lambda p: p.write_text(""))])
def test_a_name_that_is_taken_is_told(tmp_path, name, way):
    """Rather than a traceback: what is written atomically is moved to its name, or its folder is made."""
    way(tmp_path / name)
    with pytest.raises(OSError) as caught:
        write_atomic(tmp_path / name, "text") if name == "folder" else (tmp_path / name).mkdir()
    message, status = explain(caught.value, "start it again")
    assert message.startswith(f"{tmp_path / name}: a ") and "move it away, then start it again" in message
    assert status == 1


class Longer(Tiny):
    """A script's options stand behind those that all scripts share; a newer one is not the last."""

    newer: int = Field(3, description="an option that earlier versions did not have")
    n_steps: int = Field(5, description="the last")


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr: 0.5\nseed: 1\ndevice: cpu\n", "was cut off: it does not end with the option n_steps"),
        ("lr: 0.5\nseed: 1\nn_steps: 50", "was cut off: its last line has no end"),
        ("lr: 0.5\nseed: 1\ndevice: cp", "was cut off: its last line has no end"),
        ("", "was cut off: its last line has no end"),
        ("lr: 0.5\nnewer: 1\nn_steps: 7\n", "was cut off: it does not end with the option seed"),  # of some versions
        ("lr: [0.5\nseed: 1\n", "is damaged: broken YAML at line 2"),
    ],
)
def test_a_saved_configuration_that_was_cut_off_is_refused(read, tmp_path, text, words):
    Path(script.FULL_CONFIG).write_text(text)
    with pytest.raises(UserError, match=f"full_config.yml {words}.*; put back what was there, or start in an empty fo"):
        script.read_config(Longer, ["--resume", "True"], root=tmp_path / "project", prog="tiny", doc="Tiny.")


def test_a_run_of_an_earlier_version_is_resumed(read, tmp_path, capsys):
    Path(script.FULL_CONFIG).write_text("lr: 0.5\nseed: 1\ndevice: cpu\nresume: false\ndry_run: false\nn_steps: 7\n")
    cfg = script.read_config(Longer, ["--resume", "True"], root=tmp_path / "project", prog="tiny", doc="Tiny.")
    assert (cfg.lr, cfg.newer, cfg.n_steps) == (0.5, 3, 7)
    assert capsys.readouterr().err == (
        "note: full_config.yml is of an earlier version, without newer: these are at their defaults\n"
    )


def test_the_last_options_stay_the_last():
    """By them a saved configuration is known to be whole: new options are put before them."""
    last = {cls: list(cls.model_fields)[-1] for cls in (SJCConfig, SamplingConfig, CanvasConfig, NeRFConfig)}
    assert last == {
        SJCConfig: "var_red",
        SamplingConfig: "smld_step_size",
        CanvasConfig: "sigma_min",
        NeRFConfig: "test_every",
    }


@pytest.mark.parametrize("cls", [SJCConfig, SamplingConfig, CanvasConfig, NeRFConfig])
def test_help_lists_first_what_is_used_first(cls):
    """It still lists everything, and a saved configuration keeps its own order."""
    names, declared = ([option.name for option in order(cls)] for order in (by_use, walk))
    assert names[: len(cls.first)] == list(cls.first) and cls.first[-len(script.FIRST) :] == script.FIRST
    assert names[len(cls.first) :] == [name for name in declared if name not in cls.first]


def test_resume_of_nothing(read):
    with pytest.raises(UserError, match="no full_config.yml here"):
        read("--resume", "True")


def test_another_scripts_run_is_left_alone(read):
    whole = "lr: 0.5\nschedules: [annealed]\n"
    for more, whose in (("made_by: {command: run_2d_sjc.py}\n", "run_2d_sjc.py"), ("", "another command")):
        Path(script.FULL_CONFIG).write_text(whole + more)
        for argv in ([], ["--dry_run", "True"], ["--resume", "True"]):
            with pytest.raises(UserError, match=f"{whose}: its full_config.yml has the option schedules"):
                read(*argv)


def test_a_run_of_a_command_with_the_same_options_is_not_continued(read):
    """It may do something else with them. Only its result is read."""
    Path(script.FULL_CONFIG).write_text("made_by: {command: benchmarks.other}\n")
    for argv in ([], ["--resume", "True"]):
        with pytest.raises(UserError, match="holds a run of benchmarks.other: its full_config.yml says so; go to"):
            read(*argv)
    script.refuse_other_run(script.RunOptions, alike=True)


def test_project_folder_is_refused(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "project")
    with pytest.raises(UserError, match="experiment directory"):
        read()


def test_devices():
    assert script.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--device tpu9"):
        script.pick_device("tpu9")


def test_not_finite():
    script.check_finite({"loss": 1.0}, "step 3", "rest")
    with pytest.raises(RunError, match="^step 3: loss is not finite; rest$"):
        script.check_finite({"loss": float("nan")}, "step 3", "rest")
