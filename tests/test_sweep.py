"""Sweeps: a table as runs, each in its folder; killed, failed and stopped runs; Slurm's commands."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import run_sweep
from my import checkpoint, config, run_dir
from my.config import Given
from my.errors import RunError, UserError
from my.run_dir import read_history
from options.sjc import SJCConfig
from options.sweep import SweepConfig
from sweep import executors, folder, report, work
from sweep.job import Job
from sweep.plan import Run, flags_of, names_of, read_plan

ROOT = Path(run_sweep.__file__).parent
PRESETS = ROOT / "presets"
TINY = {
    "preset": "ideal",
    "vox.grid_size": 8,
    "pose": {"rend_hw": 8, "view_words": "sjc"},
    "ideal.n_cameras": 30,
    "n_steps": 20,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.setattr(executors.shutil, "which", lambda _name: None)


def plan(**parts):
    """The plan of a file with these parts."""
    Path("s.yml").write_text(yaml.safe_dump(parts, sort_keys=False))
    return read_plan("s.yml")


def process(where, *argv):
    """Start run_sweep.py in a folder."""
    return subprocess.Popen(
        [sys.executable, ROOT / "run_sweep.py", *argv],
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )


def until(found, what, child=None):
    """Wait until `found()` is true, and return it."""
    deadline = time.monotonic() + 200
    while not (value := found()):
        assert time.monotonic() < deadline and (child is None or child.poll() is None), what
        time.sleep(0.01)
    return value


# ---------------------------------------------------------------- the table


def test_axes_are_multiplied_and_lists_of_runs_too(here):
    """3 runs x 2 seeds; a run takes the place of an option, an axis cannot."""
    runs = plan(
        options={**TINY, "lr": 0.1},
        axes={"seed": [0, 1]},
        runs=[{"sd.prompt": "a blue duck"}, {"sd": {"prompt": "a red pig"}, "lr": 0.2}],
    ).runs
    assert [run.name for run in runs] == [
        "a_blue_duck-seed0",
        "a_blue_duck-seed1",
        "a_red_pig-lr0.2-seed0",
        "a_red_pig-lr0.2-seed1",
    ]
    assert [(r.cfg.sd.prompt, r.cfg.lr, r.cfg.seed) for r in runs] == [
        ("a blue duck", 0.1, 0),
        ("a blue duck", 0.1, 1),
        ("a red pig", 0.2, 0),
        ("a red pig", 0.2, 1),
    ]
    assert runs[0].cfg.vox.grid_size == 8 and runs[0].cfg.family == "ideal"  # of options, and of the preset
    assert runs[2].varied == {"sd.prompt": "a red pig", "lr": "0.2", "seed": "0"}


def test_flags_make_the_same_configuration(here):
    """Texts with commas, quotes and dashes, lists, pairs, None."""
    values = {
        "family": "ddpm",
        "sd.prompt": '--a "b", c',
        "pose.view_texts": ["front=a, b", "backside=é"],
        "pose.fov_range": (40.0, 70.5),
        "sigma_anneal": None,
        "plain_bg": True,
        "lr": 1e-05,
    }
    words = list(flags_of(values))
    cfg = config.load(SJCConfig, words, prog="", doc="", presets_dir=PRESETS, config_file=None)
    assert {name: config.flat(cfg)[name] for name in values} == values
    assert '--sd.prompt=--a "b", c' in words


def test_names_do_not_change_with_a_longer_axis_and_tell_long_values_apart(here):
    short = plan(options=TINY, axes={"sd.prompt": ["a blue duck"], "seed": [3]}).runs
    longer = plan(options=TINY, axes={"sd.prompt": ["a blue duck", "a red pig"], "seed": [3, 4]}).runs
    assert short[0].name == longer[0].name == "a_blue_duck-seed3"
    long = "a blue duck" + ", a photo, the photo" * 3
    prompts = [long, f"{long}.", "a blue duck", "a blue duck."]
    names = [run.name for run in plan(axes={"sd.prompt": prompts}).runs]
    assert len(set(names)) == 4 and all(len(name) < 60 for name in names)
    assert plan(axes={"sd.prompt": [long]}).runs[0].name == names[0]  # a second long value does not change the first
    assert not any(set("/\\ ,") & set(name) for name in names)


def test_names_are_fit_for_every_file_system(here):
    """Two that differ in their case only are told apart, and none is too long."""
    names = [run.name for run in plan(options=TINY, axes={"sd.prompt": ["a blue duck", "A blue duck"]}).runs]
    assert names[0].startswith("a_blue_duck_") and len({name.casefold() for name in names}) == 2
    assert plan(options=TINY, axes={"sd.prompt": ["A blue duck"]}).runs[0].name == "A_blue_duck"
    spelled = ["caf\u00e9", "cafe\u0301", "CAFE\u0301"]  # one name to macOS: a letter, or a letter and an accent
    assert len({name[-6:] for name in names_of([{"sd.prompt": Given(word, "")} for word in spelled])}) == 3
    windows = [{"sd.prompt": Given(word, "")} for word in ("con", "Com1", "nul.b", "COM\u00b2", "cone", "aux b")]
    assert names_of(windows) == ["con_", "Com1_", "nul_.b", "COM\u00b2_", "cone", "aux_b"]
    long = [{f"g{k}.option": Given("é" * 30 + end, "s.yml") for k in range(9)} for end in "ab"]
    names = names_of(long)
    assert len(set(names)) == 2 and all(len(name.encode()) <= 200 for name in names)
    assert names_of([{"sd.checkpoint": Given("a", ""), "ddpm.checkpoint": Given("b", ""), "lr": Given(1, "")}]) == [
        "sd.checkpointa-ddpm.checkpointb-lr1"
    ]


def test_a_config_file_in_the_folder_of_the_sweep_is_not_that_of_its_runs(here):
    Path("config.yml").write_text("lr: 0.9\n")
    (run,) = plan(options=TINY, axes={"seed": [0]}).runs
    assert run.cfg.lr == 0.3  # of the preset


def test_values_with_signs_are_kept_in_names(here):
    runs = plan(options=TINY, axes={"vox.density_shift": [-4, 4.0], "pose.fov_range": [[40, 70]]}).runs
    assert [run.name for run in runs] == ["density_shift-4.0-fov_range40.0_70.0", "density_shift4.0-fov_range40.0_70.0"]


def test_paths_hold_in_the_folder_of_a_run(here, monkeypatch):
    monkeypatch.setattr(SJCConfig, "check_files", lambda _self: None)
    (run,) = plan(options={"sd.checkpoint": "model.safetensors"}, axes={"seed": [0]}).runs
    assert run.flags[run.flags.index("--sd.checkpoint") + 1] == str(here / "model.safetensors")


MISTAKES = [
    (
        {"axes": {"seed": list(range(1000)), "n_steps": list(range(1, 1001))}},
        "axes and runs make 1000000 runs, and a sweep has at most 10000; give fewer values",
    ),
    ({}, "s.yml: holds no runs; give it `axes` or `runs`"),
    ({"slurm": {"time": 5}}, "s.yml: holds no runs"),
    (
        {"axis": {"seed": [1]}},
        "s.yml: axis: no such key; a sweep has options, axes, runs, slurm; perhaps you meant axes",
    ),
    ({"axes": [1]}, "s.yml: axes: expected lines of `key: value`"),
    ({"axes": {"seed": 1}}, "s.yml: axes: seed: expected a list of values, such as .1, 2., got 1"),
    ({"axes": {"seed": []}}, "s.yml: axes: seed: expected a list of values"),
    ({"axes": {"sed": [1]}}, "s.yml: axes: sed: no such option; perhaps you meant seed"),
    ({"axes": {"seed": [1, "x"]}}, "s.yml: axes: seed: expected an integer, got 'x'"),
    ({"options": {"lr": "fast"}, "axes": {"seed": [1]}}, "s.yml: options: lr: expected a finite number, got 'fast'"),
    ({"options": TINY, "axes": {"lr": [1, -1]}}, "s.yml: run lr-1.0: --lr: must be greater than 0.0, got -1.0"),
    ({"axes": {"seed": [1, 1]}, "options": TINY}, "s.yml: two runs with seed 1 have the same options; leave one"),
    (
        {"runs": [{"sd.prompt": "a duck", "lr": 0.1}] * 2},
        "s.yml: two runs with sd.prompt a duck, lr 0.1 have the same options",
    ),
    (
        {"axes": {"seed": [0]}, "runs": [{"lr": 0.3}, {}], "options": TINY},
        "s.yml: the runs lr0.3-seed0 and seed0 have the same options; leave one of them out",
    ),
    ({"runs": [{}, {}], "options": TINY}, "s.yml: two runs with no options of their own have the same options"),
    ({"axes": {"seed": [1]}, "options": {"seed": 2}}, "s.yml: seed stands in axes and in options"),
    ({"axes": {"seed": [1]}, "runs": [{"seed": 2}]}, "s.yml: seed stands in axes and in runs: 1"),
    ({"runs": {"seed": 2}}, "s.yml: runs: expected a list, each entry with options of one run"),
    ({"runs": [3]}, "s.yml: runs: 1: expected lines of `key: value`, got 3"),
    ({"runs": [{"preset": "burgr"}]}, "s.yml: run burgr: --preset: no preset 'burgr' .* perhaps you meant burger"),
    ({"options": {"resume": True}, "axes": {"seed": [1]}}, "options: resume: not for a sweep: a run with a checkpoint"),
    ({"options": {"dry_run": True}, "axes": {"seed": [1]}}, "options: dry_run: .* give --dry_run True to run_sweep.py"),
    ({"axes": {"device": ["cpu"]}}, "axes: device: not for a sweep: the sweep gives each run its GPU"),
    (
        {"options": {"sd.checkpoint": "nosuch"}, "axes": {"seed": [0]}},
        "run seed0: --sd.checkpoint .*/nosuch: no such file",
    ),
    ({"options": TINY, "axes": {"sd.prompt": ["a cube"]}}, "run a_cube: --sd.prompt .*: the toy world knows prompts"),
    (
        {"options": TINY, "axes": {"gddpm.imgnet_cat": [3]}},
        "run imgnet_cat3: --gddpm.imgnet_cat: not read with --family",
    ),
]


@pytest.mark.parametrize("parts, words", MISTAKES, ids=[words[:40] for _, words in MISTAKES])
def test_mistakes_name_the_run_and_the_option(here, parts, words):
    with pytest.raises(UserError, match=words):
        plan(**parts)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: [", "s.yml is damaged: broken YAML"),
        ("- 1", "s.yml: expected lines of `key: value`"),
        ("", "holds no runs"),
    ],
)
def test_what_is_no_table_is_refused(here, text, words):
    Path("s.yml").write_text(text)
    with pytest.raises(UserError, match=words):
        run_sweep.main(["s.yml"])
    with pytest.raises(UserError, match="other.yml: cannot be read: No such file"):
        run_sweep.main(["other.yml"])
    with pytest.raises(UserError, match="one YAML file of a sweep is needed, got 2"):
        run_sweep.main(["s.yml", "other.yml"])
    assert os.listdir(here) == ["s.yml"]


def test_the_papers_list_is_every_published_command(here):
    published = {path.stem for path in PRESETS.glob("*.yml") if "published command for" in path.read_text()}
    runs = read_plan(str(ROOT / "sweeps" / "paper.yml")).runs
    assert len(runs) == 24 and {run.name for run in runs} == published
    assert {run.cfg.preset for run in runs} == published and [run.flags for run in runs][0] == ["--preset", "trump"]


def test_dry_run_prints_and_leaves_nothing(here, no_cluster, capsys):
    plan(options=TINY, axes={"sd.prompt": ["a blue duck"], "seed": [0, 1]})
    run_sweep.main(["s.yml", "--dry_run", "True"])
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["run", "sd.prompt", "seed", "status", "step", "n_steps", "seconds"]
    assert (
        "\nmkdir -p a_blue_duck-seed1 && (cd a_blue_duck-seed1 && " in out
        and "run_sjc.py --preset ideal --vox.grid_size 8" in out
    )
    assert "--sd.prompt 'a blue duck' --seed 1)" in out and os.listdir(here) == ["s.yml"]


def test_the_projects_folder_and_a_second_sweep_are_refused(here, no_cluster, monkeypatch):
    plan(options=TINY, axes={"seed": [0]})
    with run_dir.alone(), pytest.raises(UserError, match="another process is at work in this folder"):
        run_sweep.main(["s.yml"])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="belongs to the project"):
        run_sweep.main([str(here / "s.yml")])


def test_a_folder_of_other_options_is_refused(here, no_cluster):
    (run,) = plan(options=TINY, axes={"seed": [0]}).runs
    Path("seed0/ckpt/step_0000010").mkdir(parents=True)
    config.write(run.cfg.model_copy(update={"lr": 0.9}), "seed0/full_config.yml")
    with pytest.raises(UserError, match="seed0: holds a run with --lr 0.9, and this sweep has 0.3; move that folder"):
        run_sweep.main(["s.yml"])
    config.write(run.cfg.model_copy(update={"device": "cpu"}), "seed0/full_config.yml")  # of the machine
    folder.refuse_others([run])
    config.write(run.cfg.model_copy(update={"lr": 0.9}), "seed0/full_config.yml")
    Path("seed0/ckpt/step_0000010").rmdir()  # nothing is lost
    folder.refuse_others([run])


# ---------------------------------------------------------------- what a folder says


@pytest.mark.parametrize(
    "step, done, ends, status",
    [
        (0, False, [], folder.WAITING),
        (5, False, [], folder.STOPPED),
        (10, False, [], folder.STOPPED),  # its test views are still to be made
        (10, True, [], folder.FINISHED),
        (10, True, [1, 0], folder.FINISHED),
        (5, False, [1, 130], folder.STOPPED),
        (5, False, [-signal.SIGINT], folder.STOPPED),
        (10, False, [0, -signal.SIGKILL], folder.FAILED),
        (0, False, [2], folder.FAILED),
    ],
)
def test_the_state_of_a_run(here, step, done, ends, status):
    run = Run("a", {}, SJCConfig(n_steps=10), [])
    if step:
        Path(f"a/ckpt/step_{step:07d}").mkdir(parents=True)
    Path("a").mkdir(exist_ok=True)
    Path("a/heartbeat.json").write_text(json.dumps({"step": step, "done": done}))
    Path("a/stderr.txt").write_bytes(b"bar 10%\nbar 20%\r\x1b[2Jno such prompt\n\n")
    for end in ends:
        folder.record(Path("a"), "2026-01-01", 1.5, end)
    state = folder.state_of(run)
    assert (state.status, state.step) == (status, step) and state.seconds == (1.5 * len(ends) or None)
    whys = {-signal.SIGKILL: "ended by signal 9", 2: "\\x1b[2Jno such prompt"}
    assert state.why == (whys[ends[-1]] if status == folder.FAILED else "")


# ---------------------------------------------------------------- whole sweeps


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of four runs: one was killed with SIGKILL, then the sweep was called again. And an undisturbed run."""
    where = tmp_path_factory.mktemp("sweep")
    parts = {
        "options": {**TINY, "sd.prompt": "a blue duck"},
        "runs": [{"seed": 0, "n_steps": 200}, {"seed": 1}, {"seed": 2}, {"seed": 3, "lr": 0.1}],
    }
    (where / "s.yml").write_text(yaml.safe_dump(parts, sort_keys=False))
    first = process(where, "s.yml", "--at_once", "2")
    victim = where / "seed0-n_steps200"
    until(lambda: checkpoint.checkpoints(victim / "ckpt"), "no checkpoint", first)
    os.kill(json.loads((victim / "heartbeat.json").read_text())["pid"], signal.SIGKILL)
    out, err = first.communicate(timeout=200)
    killed = {**json.loads((victim / "heartbeat.json").read_text()), "out": out, "err": err, "status": first.returncode}
    kept = {
        path.name: (path / "attempts.json").read_text() for path in where.iterdir() if (path / "attempts.json").exists()
    }
    second = process(where, "s.yml")
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, err
    return where, victim, killed, kept, out


@pytest.fixture(scope="module")
def straight(swept, tmp_path_factory):
    """The folder of the run that was killed in the sweep, undisturbed."""
    where = tmp_path_factory.mktemp("straight")
    (run,) = [run for run in read_plan(str(swept[0] / "s.yml")).runs if run.name == swept[1].name]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, ROOT / "run_sjc.py", *run.flags], cwd=where, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    return where


def test_a_killed_run_fails_alone_and_is_named(swept):
    _, victim, killed, kept, _ = swept
    assert killed["status"] == 1 and not killed["done"]
    last = killed["err"].splitlines()[-1]
    assert last.startswith(f"run_sweep.py: 1 of 4 runs did not finish: {victim.name}: ended by signal 9;")
    assert "the same command tries them again" in last and f"{victim.name}: failed, " in killed["out"]
    assert sum('"status": 0' in text for text in kept.values()) == 3


def test_calling_again_resumes_it_and_leaves_the_others(swept):
    where, victim, _, kept, out = swept
    assert out.startswith("1 of 4 runs to do, 1 at a time, on the CPU\n")
    for name, text in kept.items():
        assert ((where / name / "attempts.json").read_text() == text) == (name != victim.name)
    statuses = [attempt["status"] for attempt in folder.attempts(victim)]
    assert statuses == [-signal.SIGKILL, 0]


def test_the_resumed_run_ends_as_an_undisturbed_one(swept, straight):
    victim = swept[1]
    a, b = (load_file(path / "ckpt" / "step_0000200" / checkpoint.TENSORS) for path in (straight, victim))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert read_history(straight / "history.json") == read_history(victim / "history.json")
    pictures = [{p.name: p.read_bytes() for p in path.glob("test_200/view/*.png")} for path in (straight, victim)]
    assert len(pictures[0]) == 100 and pictures[0] == pictures[1]


def test_the_table_and_the_page_have_all_runs(swept):
    where, victim, _, _, out = swept
    with open(where / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished"] * 4 and rows[0]["run"] == victim.name
    last = read_history(victim / "history.json")[-1]
    assert (rows[0]["step"], rows[0]["n_steps"], rows[0]["score"]) == ("200", "200", f"{last['score']:.4g}")
    text = (where / "sweep.html").read_text()
    assert text.count('src="data:image/png;base64,') == 4 and "4 of 4 runs finished" in text
    assert "done: sweep.html is the page" in out and all(row["run"] in out for row in rows)


def test_ctrl_c_ends_all_runs_and_says_how_to_go_on(here):
    plan(options={**TINY, "n_steps": 100000}, axes={"seed": [0, 1]})
    sweep = process(here, "s.yml", "--at_once", "1")
    until(Path("seed0/heartbeat.json").exists, "no heartbeat", sweep)
    pid = json.loads(Path("seed0/heartbeat.json").read_text())["pid"]
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: its jobs get it too
    _, err = sweep.communicate(timeout=100)
    assert sweep.returncode == 130 and err.splitlines()[-1] == (
        "run_sweep.py: stopped; the same command goes on, from the last checkpoint of each run"
    )
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    states = [folder.state_of(run).status for run in read_plan("s.yml").runs]
    assert states == [folder.STOPPED, folder.WAITING] and not Path("seed1/attempts.json").exists()


# ---------------------------------------------------------------- parts of a sweep


class Scripted:
    """An executor whose jobs end one after another: the first when it is asked, each other one question later."""

    def __init__(self, error=None):
        self.jobs, self.error, self.stopped = {}, error, False

    def start(self, waiting):
        for k, run in enumerate(waiting):
            self.jobs[run.name] = SimpleNamespace(done=partial(self.done, run.name, iter(range(k, -1, -1))))
        waiting.clear()
        if self.error:
            raise self.error

    def done(self, name, left):
        if next(left):
            return False
        Path(name, "heartbeat.json").write_text('{"step": 20, "done": true}')
        Path(name, "ckpt/step_0000020").mkdir(parents=True, exist_ok=True)
        return True

    def stop(self):
        self.stopped = True


def test_each_end_is_told_and_an_exception_ends_all(here, monkeypatch, capsys):
    monkeypatch.setattr(work, "POLL_S", 0)
    runs, ends = plan(options=TINY, axes={"seed": [0, 1, 2]}).runs, []
    executor = Scripted()
    work.work(runs, runs, executor, lambda running: ends.append(sorted(running)))
    assert ends == [["seed1", "seed2"], ["seed2"], []] and not executor.stopped
    assert "seed0: finished\n" in capsys.readouterr().out
    executor = Scripted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        work.work(runs, runs[1:], executor, ends.append)
    assert executor.stopped and executor.jobs.keys() == {"seed1", "seed2"}


def test_the_bar_is_at_the_steps_of_all_runs(here):
    runs = plan(options=TINY, axes={"seed": [0, 1, 2]}).runs
    Path("seed0/ckpt/step_0000020").mkdir(parents=True)  # finished, and seed1 goes on
    Path("seed1/ckpt/step_0000010").mkdir(parents=True)
    Path("seed0/heartbeat.json").write_text('{"step": 20, "done": true}')
    with work.Bar(runs, runs[1:]) as bar:
        assert (bar.bar.n, bar.bar.initial, bar.bar.total) == (30, 30, 60)
        Path("seed1/heartbeat.json").write_text('{"step": 14}')
        bar.move(2)
        assert bar.bar.n == 34 and bar.bar.postfix == "2 running, 1 finished"
        bar.end(runs[1])  # it was stopped: its checkpoint counts
        bar.move(1)
        assert bar.bar.n == 30 and bar.bar.postfix == "1 running, 1 finished, 1 stopped"


def test_the_end_of_a_sweep(here, monkeypatch, capsys):
    """The page is written when all is measured; of many failures the first are named."""
    runs, done = plan(options=TINY, axes={"seed": [0, 1, 2, 3, 4]}).runs, []
    monkeypatch.setattr(run_sweep, "evaluate", lambda _runs: done.append("evaluate"))
    monkeypatch.setattr(report, "write", lambda _runs: done.append("write"))
    with pytest.raises(
        RunError, match="^5 of 5 runs did not finish: seed0: waiting; .* seed2: waiting; and 2 more; std"
    ):
        run_sweep.finish(SweepConfig(file=["s.yml"], evaluate=True), runs)
    assert done == ["evaluate", "write"]
    assert capsys.readouterr().out.endswith("\ndone: sweep.html is the page, sweep.csv the table\n")


# ---------------------------------------------------------------- machines


def test_a_free_slot_takes_the_next_run(here, monkeypatch):
    """With the slot's environment; Ctrl-C cannot end a job before it has made provision for that."""
    waiting = list(plan(options=TINY, axes={"seed": [0, 1, 2]}).runs)
    executors.HIDDEN.mkdir()
    executors.STOP.touch()  # of an earlier call: it would end the runs at once
    local, submitted, ended = executors.Local([{"GPU": "0"}, {"GPU": "1"}]), [], set()
    assert not executors.STOP.exists()

    def submit(job):
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        name = Path(job.path).name
        submitted.append((name, job.env, job.keeper, job.stop))
        return SimpleNamespace(done=lambda: name in ended)

    monkeypatch.setattr(local.executor, "submit", submit)
    here_and_now = os.getpid(), str(executors.STOP.resolve())
    for _ in range(2):
        local.start(waiting)
        assert [run.name for run in waiting] == ["seed2"] and local.jobs.keys() == {"seed0", "seed1"}
    ended.add("seed1")
    local.start(waiting)
    assert submitted == [(f"seed{k}", {"GPU": "011"[k]}, *here_and_now) for k in range(3)]


def test_a_job_gives_its_run_an_environment_and_ends_it_with_its_keeper(here):
    keeper = subprocess.Popen(["true"])
    keeper.wait()
    Path("a").mkdir()
    before = signal.getsignal(signal.SIGINT)
    try:
        assert Job(str(here / "a"), ["sh", "-c", "echo $GPU"], {"GPU": "3"}, os.getpid(), "nosuch")() == 0
        assert Path("a/stdout.txt").read_text() == "3\n"
        assert Job(str(here / "a"), ["sleep", "300"], {}, keeper.pid, "nosuch")() == -signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)
    assert [attempt["status"] for attempt in folder.attempts(Path("a"))] == [0, -signal.SIGINT]


def test_runs_get_a_gpu_each_and_a_share_of_the_cores(here, monkeypatch):
    runs = plan(options=TINY, axes={"seed": [0, 1, 2, 3]}).runs
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(executors, "cores", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    two = [{"CUDA_VISIBLE_DEVICES": n, "OMP_NUM_THREADS": "4"} for n in "01"]
    assert executors.slots_of(runs, None) == two
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in executors.slots_of(runs, 3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-12ab")  # as a person or a cluster hands them out
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in executors.slots_of(runs, None)] == ["5", "GPU-12ab"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(executors, "machine_memory", lambda: 5 * 10**9)
    assert executors.slots_of(runs, None) == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr(executors, "machine_memory", lambda: 10**11)
    assert executors.slots_of(runs, None) == [{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}] * 4
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # what a person says stays
    assert executors.slots_of(runs, 1)[0]["OMP_NUM_THREADS"] == "7"


# ---------------------------------------------------------------- a cluster, without one

SBATCH = """#!/usr/bin/env bash
# Takes an array, keeps its script, and starts each of its jobs, as Slurm would.
cp "$1" "$FAKE/script.sh"
n=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
for i in $(seq 0 "$n"); do "$FAKE/start" "$i" & done
echo "Submitted batch job 77"
"""
START = """#!/usr/bin/env bash
export SLURM_ARRAY_JOB_ID=77 SLURM_ARRAY_TASK_ID=$1 SLURM_JOB_ID=$((78 + $1)) SLURM_NTASKS=1 SLURM_PROCID=0
exec bash "$FAKE/script.sh" > /dev/null 2>&1
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] || shift; shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >> "$FAKE/requeued"
"$FAKE/start" "${2#77_}" &
"""
SACCT = """#!/usr/bin/env bash
echo "JobID|State|NodeList"
echo "77_0|RUNNING|n1"
echo "77_1|RUNNING|n1"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$1" >> "$FAKE/cancelled"
"""
RUN = """
import os, pathlib, signal, sys, time
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, []) >= {signal.SIGUSR2, signal.SIGTERM}
print(os.getpid(), blocked, file=open("pids", "a"), flush=True)
print(os.getppid(), file=open("job", "w"))
if "--resume" in sys.argv or pathlib.Path.cwd().name == "seed1":
    pathlib.Path("ending").write_text(str(sys.argv[1:]))
    os.replace("ending", "ended")
else:
    pathlib.Path("ckpt/step_0000010").mkdir(parents=True)
    time.sleep(300)
"""


@pytest.fixture
def cluster(here, monkeypatch):
    """A folder of Slurm's commands, as submitit calls them, and of what they note; a run is a bit of Python."""
    fake = here / "fake"
    fake.mkdir()
    programs = {"sbatch": SBATCH, "start": START, "srun": SRUN}
    programs |= {"scontrol": SCONTROL, "sacct": SACCT, "scancel": SCANCEL}
    for name, text in programs.items():
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(fake))
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    monkeypatch.setattr(executors, "command_of", lambda _run: [sys.executable, "-c", RUN])
    executors.HIDDEN.mkdir()
    yield fake
    executors.submitit.SlurmJob.watcher.clear()


def test_slurm_gets_one_array_and_a_job_out_of_time_goes_on(cluster):
    """The signal at the end of a job's time ends the run, and Slurm is asked to queue the job again: it resumes."""
    runs = plan(options=TINY, axes={"seed": [0, 1]}).runs
    for run in runs:
        Path(run.name).mkdir()
    parameters = {"partition": "gpu", "time": 90, "array_parallelism": 1, "setup": ["module load cuda"]}
    slurm, waiting = executors.Slurm(parameters), list(runs)
    slurm.start(waiting)
    assert not waiting and {name: job.job_id for name, job in slurm.jobs.items()} == {"seed0": "77_0", "seed1": "77_1"}
    script = (cluster / "script.sh").read_text().splitlines()
    assert {"#SBATCH --array=0-1%1", "#SBATCH --gpus-per-node=1", "#SBATCH --time=90"} <= set(script)
    assert {"#SBATCH --partition=gpu", "#SBATCH --signal=USR2@90", "#SBATCH --job-name=sjc"} <= set(script)
    assert script.index(f"export PYTHONPATH={ROOT}") < script.index("module load cuda")
    until(Path("seed1/ended").exists, "seed1 did not end")
    assert Path("seed1/ended").read_text() == "[]"

    until(lambda: Path("seed0/ckpt").exists() and Path("seed0/job").read_text().strip(), "seed0 did not start")
    again = executors.Slurm(parameters)  # another call finds the job that is there, and gives Slurm nothing new
    (cluster / "script.sh").rename(cluster / "kept.sh")
    again.start([runs[0]])
    assert again.jobs["seed0"].job_id == "77_0" and not (cluster / "script.sh").exists()
    assert executors.known_jobs() == {"seed0": "77_0", "seed1": "77_1"}  # of those too that it did not ask for
    (cluster / "kept.sh").rename(cluster / "script.sh")

    os.kill(int(Path("seed0/job").read_text()), signal.SIGUSR2)
    until(Path("seed0/ended").exists, "seed0 did not go on")
    assert (cluster / "requeued").read_text() == "requeue 77_0\n"
    assert Path("seed0/ended").read_text() == "['--resume', 'True']"
    (first, first_blocked), (_, second_blocked) = map(str.split, Path("seed0/pids").read_text().splitlines())
    assert first_blocked == second_blocked == "True"  # Slurm's signals are for the job, which ends its run
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    until(lambda: all(job.done() for job in slurm.jobs.values()), "no result")
    assert executors.in_queue("77_1") is None  # though the cluster has not noticed its end
    slurm.stop()
    assert (cluster / "cancelled").read_text() == "77_0\n77_1\n"


def test_parameters_of_a_cluster_are_checked(here, no_cluster):
    for parameters, words in (
        ({"partion": "gpu"}, "s.yml: slurm: partion: no such parameter; perhaps you meant partition; submitit has"),
        ({"nodes": 2}, "s.yml: slurm: nodes: a run is one process"),
        ({"time": "1-00:00"}, "s.yml: slurm: time: expected a whole number, in minutes, got 1-00:00"),
        ({"time": 0}, "s.yml: slurm: time: expected a whole number"),
        ({"setup": "module load cuda"}, "s.yml: slurm: setup: expected a list of texts"),
    ):
        plan(options=TINY, axes={"seed": [0]}, slurm=parameters)
        with pytest.raises(UserError, match=words):
            run_sweep.main(["s.yml", "--dry_run", "True"])


def test_a_cluster_is_asked_for_where_there_is_none_and_found_where_there_is(here, no_cluster, monkeypatch, capsys):
    plan(options=TINY, axes={"seed": [0]}, slurm={"partition": "gpu"})
    with pytest.raises(UserError, match="--cluster slurm: no sbatch on this machine; .* or give --cluster local"):
        run_sweep.main(["s.yml", "--cluster", "slurm"])
    run_sweep.main(["s.yml", "--dry_run", "True"])
    assert capsys.readouterr().err == "note: s.yml: slurm: not read with --cluster local\n"
    monkeypatch.setattr(executors.shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(UserError, match="--at_once: not read with --cluster slurm; leave it out"):
        run_sweep.main(["s.yml", "--at_once", "2"])


def test_a_refusal_of_slurm_is_one_line(cluster):
    (cluster / "sbatch").write_text(
        "#!/usr/bin/env bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n"
    )
    (run,) = plan(options=TINY, axes={"seed": [0]}).runs
    with pytest.raises(RunError, match="^Slurm took no jobs: .*invalid partition specified: gpu"):
        executors.Slurm({"partition": "gpu"}).start([run])


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_nothing_on_the_page_is_taken_for_html_or_fetched(here):
    evil = """<script>alert("1")</script>' onerror=x &amp;"""
    cfg = SJCConfig(sd={"prompt": evil}, n_steps=10)
    Path("a/img").mkdir(parents=True)
    Path("a/img/step_0000005.png").write_bytes(b"\x89PNG" + bytes(12) + (64).to_bytes(4, "big"))
    Path("a/history.json").write_text('{"step": 5, "score": 0.12345, "opacity": null}\n')
    folder.record(Path("a"), "2026-01-01", 7300, 1)
    Path("a/stderr.txt").write_text(f"bar 10%\rbar 20%\n{evil}\n")
    report.write([Run("a", {"sd.prompt": evil}, cfg, [])])
    page = Page(Path("sweep.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "a", "iframe", "object"}
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    assert image.keys() == {"class", "alt", "src"} and image["src"].startswith("data:image/png;base64,")
    assert image["alt"] == f"{evil}: img/step_0000005.png"
    assert "Sweep: 0 of 1 runs finished" in page.words
    assert f"failed: {evil}" in page.words and page.words.count(evil) == 2  # its card, and the table
    assert {"0.1235", "-", "2.0 h", "0 of 10"} <= set(page.words)
    policy = {attrs.get("http-equiv"): attrs.get("content") for tag, attrs in page.tags if tag == "meta"}
    assert policy["Content-Security-Policy"].startswith("default-src 'none'")
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_the_page_while_runs_are_at_work(here):
    """A run that has no end yet is neither failed nor stopped; the last of its test views is its picture."""
    run = Run("a", {}, SJCConfig(sd={"prompt": "a pig"}, n_steps=10), [])
    for name, edge in (("img/step_0000009", 64), ("test_10/view/000", 512), ("test_10/view/001", 512)):
        Path("a", name).parent.mkdir(parents=True, exist_ok=True)
        Path("a", f"{name}.png").write_bytes(b"\x89PNG" + bytes(12) + edge.to_bytes(4, "big"))
    folder.record(Path("a"), "2026-01-01", 5, 1)
    for running, status in ((["a"], folder.RUNNING), ([], folder.FAILED)):
        report.write([run], running)
        page = Page(Path("sweep.html").read_text())
        (shown,) = [attrs["class"] for tag, attrs in page.tags if tag == "p"]
        (row,) = csv.DictReader(Path("sweep.csv").read_text().splitlines())
        assert shown == row["status"] == status
        (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
        assert image["alt"] == "a pig: test_10/view/001.png" and "class" not in image  # large enough to be smooth


def test_the_name_of_a_run_leads_to_its_page(here):
    run = Run("javascript:a b", {}, SJCConfig(sd={"prompt": "a blue duck"}, n_steps=10), [])
    Path(run.name).mkdir()
    Path(run.name, "report.html").write_text("")
    report.write([run])
    page = Page(Path("sweep.html").read_text())
    assert [attrs for tag, attrs in page.tags if tag == "a"] == [{"href": "javascript%3Aa%20b/report.html"}]
    assert run.name in page.words


def test_results_of_evaluate_stand_beside_the_run_that_they_are_of(here):
    run = Run("a", {}, SJCConfig(sd={"prompt": "a blue duck"}, n_steps=10), [])
    Path("a").mkdir()
    Path("a/heartbeat.json").write_text("{}")
    report_of = {"n_views": 24, "judge": {}, "summary": {"iou": {}, "recognised": {}}}
    report_of["runs"] = [{"run": "a/", "iou": 0.94321, "recognised": True, "taken_for": "duck"}]
    Path("results.json").write_text(json.dumps(report_of))
    assert report.rows_of([run])[0].statistics == {"iou": "0.9432", "recognised": "yes"}
    written = Path("results.json").stat().st_mtime
    os.utime("a/heartbeat.json", (written + 60, written + 60))  # the run was made again after it was measured
    assert report.rows_of([run])[0].statistics == {}


def test_evaluate_takes_finished_runs_of_the_toy_world(here, monkeypatch, capsys):
    runs = plan(options=TINY, axes={"sd.prompt": ["a blue duck", "a red pig"]}).runs
    runs.append(Run("b", {}, SJCConfig(sd={"prompt": "a burger"}, n_steps=20), []))
    for name in ("a_blue_duck", "b"):
        Path(name, "ckpt", "step_0000020").mkdir(parents=True)
        Path(name, "heartbeat.json").write_text('{"done": true}')
    called = []
    monkeypatch.setattr(
        run_sweep.subprocess, "run", lambda words: called.append(words) or subprocess.CompletedProcess([], 0)
    )
    run_sweep.evaluate(runs)
    assert called == [[sys.executable, str(ROOT / "evaluate.py"), "a_blue_duck", "--out", "results.json"]]
    measured = {"n_views": 24, "judge": {}, "summary": {}, "runs": [{"run": "a_blue_duck"}]}
    Path("results.json").write_text(json.dumps(measured))
    run_sweep.evaluate(runs)  # it is measured already
    run_sweep.evaluate(runs[1:])
    assert len(called) == 1 and "no finished run has a prompt of the toy world" in capsys.readouterr().err
    Path("results.json").unlink()
    monkeypatch.setattr(run_sweep.subprocess, "run", lambda words: subprocess.CompletedProcess(words, 2))
    with pytest.raises(RunError, match="evaluate.py ended with status 2"):
        run_sweep.evaluate(runs)
