"""The contract that every family keeps; and a new family is one new folder and one line of the registry."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import families
from families.family import Family
from my import config
from my.config import walk
from my.errors import UserError
from options.sampling import SamplingConfig
from options.sjc import SJCConfig
from voxnerf.field import FIELDS

ROOT = Path(__file__).resolve().parent.parent
UNUSED = ("tests", "docs", "benchmarks")  # folders that no command reads


# ---------------------------------------------------------------- the families that are there


def own_names(cls):
    """The methods, properties and class variables of the contract."""
    return {name for name in vars(cls) if not name.startswith("_") and name not in cls.model_fields} - {"model_config"}


@pytest.mark.parametrize("name", families.NAMES)
def test_options_keep_the_contract(name):
    options = families.options_of(name)
    known = {option.name for cls in (SJCConfig, SamplingConfig) for option in walk(cls)}
    assert issubclass(options, Family) and options.__doc__
    assert options.field_kind in FIELDS and options.channels in (3, 4)
    assert {*options.reads, *options.reads_in_2d} - {"pose"} <= known  # "pose" is a whole group
    assert all(name.startswith(f"{options.__module__.split('.')[1]}.") or name in known for name in options().read_by())
    for method in own_names(options) & own_names(Family):
        ours, meant = getattr(options, method), getattr(Family, method)
        if callable(ours) and not isinstance(ours, type):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(meant).parameters), method


@pytest.mark.parametrize("name", families.NAMES)
def test_adapters_are_made_in_one_way(name):
    make = families.adapter_module(name).make
    assert list(inspect.signature(make).parameters) == ["run", "found", "device"]


@pytest.mark.parametrize("name", families.NAMES)
def test_guidance_is_read_where_there_is_a_score_to_guide_by(name):
    """By the options it is known, before the model is there, which rules that can follow."""
    module = families.adapter_module(name)
    (adapter,) = (cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__)
    assert adapter.free_guidance == ("sd.scale" in families.options_of(name).reads)


@pytest.mark.parametrize("option, readers", [("low_vram", {"sd"}), ("compile", {"sd", "gddpm", "ddpm"})])
def test_options_of_networks_are_refused_where_nothing_reads_them(option, readers):
    for name in families.NAMES:
        given = [f"--{option}", "True", "--family", name]
        cfg = config.load(SJCConfig, given, prog="run_sjc.py", doc="", config_file=None)
        if name in readers:
            config.refuse_unread(cfg, cfg.read_by())
            continue
        with pytest.raises(UserError, match=f"^--{option}: not read with --family {name}; leave it out, or give"):
            cfg.check_files()


def test_options_import_nothing_heavy():
    code = "import sys, families; [families.options_of(n) for n in families.NAMES]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "transformers", "huggingface_hub", "warp"} & set(done.stdout.split())


# ---------------------------------------------------------------- a new one


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the toy family: its folder, and its name in the registry."""
    copy = tmp_path_factory.mktemp("project")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if Path(name).parts[0] not in UNUSED and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "tests" / "toy_family", copy / "families" / "toy")
    registry = copy / "families" / "__init__.py"
    last = f'"{families.NAMES[-1]}")'
    assert registry.read_text().count(last) == 1
    registry.write_text(registry.read_text().replace(last, f'"{families.NAMES[-1]}", "toy")'))
    return copy


@pytest.fixture
def command(project, tmp_path):
    """Calls a command of that project in an empty folder; returns (exit status, stdout, stderr)."""

    def call(script, *flags):
        done = subprocess.run(
            [sys.executable, str(project / script), *flags],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return call


RUN = ("--family", "toy", "--device", "cpu", "--renderer", "reference", "--vox.grid_size", "4", "--pose.rend_hw", "4")


def test_help_lists_the_options_of_a_new_family(command):
    status, out, _ = command("run_sjc.py", "-h")
    assert status == 0 and "--toy.color" in out and "--toy.spread" in out and "mean colour of the pictures" in out


def test_a_new_family_runs(command, tmp_path):
    status, out, err = command("run_sjc.py", *RUN, "--n_steps", "3", "--toy.color", "1,0,0")
    assert status == 0, err
    assert "done: " in out and (tmp_path / "test_3" / "view_seq" / "view.mp4").is_file()


def test_a_new_family_draws_pictures(command, tmp_path):
    """With the one option of cameras that it reads there, and no other."""
    flags = ("--family", "toy", "--device", "cpu", "--pose.rend_hw", "4", "--num_images", "1", "--num_t", "2")
    status, _, err = command("run_img_sampling.py", *flags, "--pose.R", "2")
    assert status == 2 and "--pose.R: not read with --family toy" in err
    status, _, err = command("run_img_sampling.py", *flags)
    assert status == 0 and (tmp_path / "preview.png").is_file(), err


def test_the_doctor_knows_a_new_family(command):
    status, out, _ = command("doctor.py", *RUN)
    assert status == 0 and "This run can start here" in out and "toy, which needs no checkpoint on disk" in out


@pytest.mark.parametrize(
    "flags",
    [("--gddpm.lsun_cat", "ffhq"), ("--sd.prompt", "a blue duck"), ("--pose.perp_neg", "1"), ("--toy.color", "2,0,0")],
    ids=str,
)
def test_a_new_family_refuses_what_it_cannot_do(command, flags):
    """Options of other families, shared options that it does not read, and values that its own check refuses."""
    status, _, err = command("run_sjc.py", *RUN, *flags)
    assert status == 2 and err.count("\n") == 1 and flags[0] in err
