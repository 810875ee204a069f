"""Print a table of what a run finds on this machine, what it lacks, and what to do about that.

    python doctor.py
    python doctor.py --sd.checkpoint ~/models/model.safetensors
    python doctor.py --preset ideal

It takes every option of run_sjc.py, in the folder of the run. The exit status is 0 only if that run can start there.
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

import families
from families import hub
from families.family import WITHOUT, Place
from my import config, nvidia, run_dir, script
from my.env import ENV, data_root
from my.errors import Stop, UserError, is_out_of_memory, one_line, run_main
from my.sha256 import sha256_of
from my.tensor_file import TensorFile
from options.sjc import SJCConfig

ROOT = Path(__file__).resolve().parent
TESTED = ROOT / "constraints.txt"  # the versions that CI last passed with, one name==version per line
HUB_TIMEOUT = 3  # seconds
MIN_DISK = 1.0  # the most GB that the pictures and checkpoints of a run take
GB = 1e9
WARP_FOR_CUDA_12 = "https://github.com/NVIDIA/warp/releases"  # wheels for older drivers and GPUs, named +cu12
WEIGHTS = (".safetensors", ".bin")  # endings of the files of weights in a folder
OK, NOTE, BAD = "ok", "note", "MISSING"


class DoctorConfig(SJCConfig):
    """Every option of run_sjc.py, and those of doctor.py."""

    selftest: bool = Field(
        False,
        json_schema_extra=config.FREE,
        description="test the fused renderer on the run's device now, whatever an earlier test found, and say how far "
        "it is from the reference",
    )
    sha256: bool = Field(
        False,
        json_schema_extra=config.FREE,
        description="print the SHA-256 of each checkpoint found; this reads it whole, and compares the checksums in it",
    )


class Finding(NamedTuple):
    """A row of the table. A run whose table has BAD in it cannot start."""

    state: str
    what: str
    found: str
    to_do: str = ""


# ---------------------------------------------------------------- the machine


def check_device(cfg: DoctorConfig) -> list[Finding]:
    """Return findings about the device of the run, its memory, and the number format of the networks."""
    import torch

    family = cfg.chosen

    try:
        device = script.pick_device(cfg.device)
    except UserError as error:
        return [Finding(BAD, "device", str(error), "leave --device out")]
    precision = Finding(OK, "precision", family.evaluated_in(device.type))
    if device.type == "mps":
        untried = "nobody has run the project on it; compare a short run with one that has --device cpu"
        return [Finding(NOTE, "device", "mps, an Apple GPU", untried), precision]
    if device.type != "cuda":
        build = "no CUDA GPU" if torch.version.cuda else "a PyTorch without CUDA"
        build = "a CUDA GPU is there too" if torch.cuda.is_available() else build
        return [
            Finding(
                OK,
                "device",
                f"{device} ({torch.get_num_threads()} threads; {build})",
                "this is enough to try a large model, at half a minute or more per step; use a CUDA GPU for a whole run"
                if family.wants_gpu
                else "",
            ),
            precision,
        ]
    free, total = (n / GB for n in torch.cuda.mem_get_info(device))
    few = family.wants_gpu and free < family.min_gpu_gb
    to_do = "end other programs on it" + (f", or give {family.saves_memory}" if family.saves_memory else "")
    return [
        Finding(OK, "device", f"{device} ({torch.cuda.get_device_name(device)})"),
        precision,
        Finding(NOTE if few else OK, "GPU memory", f"{free:.1f} of {total:.1f} GB free", to_do if few else ""),
    ]


def check_driver(cfg: DoctorConfig) -> list[Finding]:
    """Return the finding about an NVIDIA GPU that the driver knows and PyTorch does not see; none where it sees all.

    None either where such a GPU is asked for: then `check_device` says so.
    """
    why = "" if cfg.device.startswith("cuda") else nvidia.unseen()
    if not why:
        return []
    answer = nvidia.ask()
    return [Finding(NOTE, "GPU", f"{', '.join(answer.names) or nvidia.TOOL}: PyTorch does not see it", why)]


def check_renderer(cfg: DoctorConfig) -> list[Finding]:
    """Return the finding about the fused renderer, where the run may use it on a GPU, or where it is to be tested.

    On a CPU there is none, unless Warp does not start there.
    """
    from voxnerf.field import FIELDS
    from voxnerf.render import start_problem

    try:
        device = script.pick_device(cfg.device)
    except UserError:
        return []  # `check_device` says so
    if not cfg.selftest and cfg.renderer == "reference":
        return []
    problem = start_problem()
    if problem:
        return [not_fused(cfg, problem, "pip install warp-lang")]
    from voxnerf.fused import selftest

    assert cfg.vox.model_type is not None and cfg.vox.c is not None
    exact = cfg.deterministic and device.type == "cuda"
    kind = selftest.Kind(FIELDS[cfg.vox.model_type], cfg.vox.c, False, exact)
    problem = selftest.cuda_problem(device)
    if problem:
        return [not_fused(cfg, problem, f"update the driver, or install a +cu12 wheel from {WARP_FOR_CUDA_12}")]
    try:
        if cfg.selftest:
            outcome = selftest.run(device, kind)
            words = f"self-test of the fused one on {device}, for {kind}: {outcome.in_words()}"
            if outcome.verdict:
                return [not_fused(cfg, words, "report this, with all that is printed here")]
            return [Finding(OK, "renderer", words)]
        problem = selftest.verdict(device, kind) if device.type == "cuda" else ""
    except Stop as error:
        return [Finding(BAD, "renderer", str(error), "give --renderer reference")]
    if problem:
        return [not_fused(cfg, problem, "--selftest True tests it again")]
    return [Finding(OK, "renderer", f"fused; its self-test passed on {device}")] if device.type == "cuda" else []


def not_fused(cfg: DoctorConfig, problem: str, to_do: str) -> Finding:
    """Return the finding that the fused renderer cannot be used; only a run that asks for it cannot start without."""
    if cfg.renderer == "fused":
        return Finding(BAD, "renderer", f"--renderer fused: {problem}", f"{to_do}; or give --renderer reference")
    return Finding(NOTE, "renderer", problem, f"{to_do}; until then the run uses --renderer reference, which is slow")


def check_disk() -> list[Finding]:
    """Return the finding about the free disk in the current folder."""
    free = shutil.disk_usage(".").free / GB
    enough = free > MIN_DISK
    return [
        Finding(
            OK if enough else BAD,
            "disk",
            f"{free:.1f} GB free in {Path.cwd()}",
            "" if enough else f"a run takes up to {MIN_DISK:g} GB: free some space, or start on another disk",
        )
    ]


def check_ffmpeg() -> list[Finding]:
    """Return the finding about the program that writes videos."""
    from my.media import ffmpeg

    try:
        return [Finding(OK, "ffmpeg", ffmpeg())]
    except UserError as error:
        return [Finding(BAD, "ffmpeg", *str(error).split("; ", 1))]


def check_hub() -> list[Finding]:
    """Return the finding about the hub: whether it answers within HUB_TIMEOUT."""
    import urllib.error
    import urllib.request

    from huggingface_hub.constants import ENDPOINT as HUB
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return [Finding(NOTE, "hub", "HF_HUB_OFFLINE is set", "only checkpoints on disk can be used")]
    try:
        urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answered, and that is the question
    except (OSError, ValueError):
        return [Finding(NOTE, "hub", f"{HUB} does not answer", "only checkpoints on disk can be used")]
    return [Finding(OK, "hub", f"{HUB} answers")]


def check_packages() -> list[Finding]:
    """Return the finding about installed packages that are newer than in TESTED; none where that file is missing."""
    if not TESTED.is_file():
        return []
    newer = newer_packages(TESTED.read_text(encoding="utf-8"))
    if not newer:
        return [Finding(OK, "tested", "no package is newer than the version that CI last passed with")]
    to_do = "if something fails with them: pip install -r requirements.txt -c constraints.txt"
    return [Finding(NOTE, "tested", f"{'; '.join(newer)}, which CI last passed with", to_do)]


def newer_packages(tested: str) -> list[str]:
    """Return in words which installed packages are newer than in a text of name==version lines, `#` beginning comments.

    What stands behind a + in a version, such as +cpu, is the same version. Other lines are passed over.
    """
    from importlib import metadata

    from packaging.version import InvalidVersion, Version

    newer = []
    for name, version in re.findall(r"^\s*([\w.-]+)\s*==\s*([^\s;#]+)", tested, re.MULTILINE):
        try:
            here, there = (Version(Version(text).public) for text in (metadata.version(name), version))
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue
        if here > there:
            newer.append(f"{name} {here} is newer than {there}")
    return newer


# ---------------------------------------------------------------- checkpoints


def check_data_root(sha256: bool) -> list[Finding]:
    """Return findings about the data root, and about the published checkpoints below it and in the hub's cache."""
    root, found = data_root(), []
    if not root.is_dir():
        found.append(
            Finding(
                NOTE,
                "data root",
                f"{root}: no such folder",
                f"make it, or name another one in {ENV}; only published checkpoints and scenes are looked for there",
            )
        )
    else:
        found.append(Finding(OK, "data root", str(root)))
    paths = [path for name in families.NAMES for path in families.options_of(name).known_checkpoints()]
    return found + [check_checkpoint(path, sha256) for path in paths]


def check_checkpoint(path: Path, sha256: bool) -> Finding:
    """Return the finding about a checkpoint that is on this machine, whether this run reads it or not."""
    try:
        return Finding(OK, "checkpoint", describe(path, sha256))
    except UserError as error:
        return Finding(NOTE, "checkpoint", str(error))


def describe(path: Path, sha256: bool) -> str:
    """Return in words path, kind and size of a checkpoint; with `sha256`, also the SHA-256 of its files.

    These are then compared with the checksums in them. Raises UserError where one is damaged.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kind = "diffusers folder" if path.is_dir() else path.suffix or "file"
    words = f"{path}: {kind}, {sum(p.stat().st_size for p in files) / GB:.2f} GB"
    for file in files if sha256 else ():
        if file == path or file.suffix in WEIGHTS:
            words += f"; {file.relative_to(path)} SHA-256 " if path.is_dir() else ", SHA-256 "
            words += sha256_of(file, bar=True)
            TensorFile(file).verify()
    return words


def check_run(cfg: DoctorConfig) -> list[Finding]:
    """Return findings about the model of the run. All that run_sjc.py does before its first step is done.

    The networks are on the meta device. Families that can read only names and shapes of the files.
    """
    import warnings

    from sjc import ready

    try:
        found = cfg.check_files()
        missing = cfg.chosen.to_download(found)
        if missing:
            return check_download(missing, cfg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a checkpoint cannot be copied to the meta device
            ready(cfg, "meta", found)
        rows = {what: describe(path, cfg.sha256) for what, path in cfg.chosen.checkpoints(found).items()}
        rows = {"model": f"{cfg.family}, which needs no checkpoint on disk", **rows, **cfg.chosen.facts(found)}
        return [Finding(OK, what, words) for what, words in rows.items()]
    except Stop as error:
        return [Finding(BAD, "model", str(error))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return [
            Finding(
                BAD,
                "model",
                f"too large for this machine's memory, with --vox.grid_size {cfg.vox.grid_size}",
                "use a smaller grid or a smaller model",
            )
        ]


def check_download(place: Place, cfg: DoctorConfig) -> list[Finding]:
    """Return the finding about a checkpoint that only the hub may have."""
    where, reasons = f"{place.flag}: nothing at {place.missed}, nor in the hub's cache", []
    most = cfg.chosen.download_gb
    for repo in place.repos:
        problem = hub.problem(repo, HUB_TIMEOUT)
        if problem:
            reasons.append(f"{repo}: {problem}")
            continue
        cache, free = hub.cache()
        if free < most:
            to_do = f"{repo} has it, but it takes up to {most:g} GB in {cache}: free some space or change HF_HOME"
            return [Finding(BAD, "model", where, to_do)]
        to_do = f"the run downloads {repo} first, up to {most:g} GB, to {cache}; it is checked after that"
        return [Finding(NOTE, "model", where, to_do)]
    to_do = f"give a checkpoint on this machine with --{cfg.family}.checkpoint, try again with a network, or {WITHOUT}"
    return [Finding(BAD, "model", f"{where}; on the hub: {'; '.join(reasons)}", to_do)]


# ---------------------------------------------------------------- the table


def read_config(argv: list[str] | None) -> tuple[DoctorConfig, list[Finding]]:
    """Return (configuration, [finding about the current folder]); with --resume, that of the run in the folder."""
    spec: dict[str, Any] = {"prog": "doctor.py", "doc": __doc__, "presets_dir": ROOT / "presets"}
    cfg = config.load(DoctorConfig, argv, **spec)
    try:
        cfg = script.read_config(DoctorConfig, argv, root=ROOT, settle=DoctorConfig.absolute, **spec)
        with run_dir.alone():
            if not os.access(".", os.W_OK):
                raise UserError(f"{Path.cwd()}: nothing can be written here; go to another folder")
    except UserError as error:
        return cfg.absolute(), [Finding(BAD, "folder", str(error))]
    return cfg, [Finding(OK, "folder", str(Path.cwd()))]


def examine(argv: list[str] | None) -> Iterator[Finding]:
    """Yield all findings, first those about the machine; raises UserError before them for a mistake in the options."""
    cfg, folder = read_config(argv)
    yield Finding(OK, "python", f"{sys.version.split()[0]}, {sys.executable}")
    yield from folder
    yield from check_packages()
    yield from check_device(cfg)
    yield from check_driver(cfg)
    yield from check_renderer(cfg)
    yield from check_disk()
    yield from check_ffmpeg()
    yield from check_hub()
    yield from check_data_root(cfg.sha256)
    if folder[0].state == OK or not (cfg.resume is True or Path(script.FULL_CONFIG).exists()):
        yield from check_run(cfg)  # else these are not the options of the run in the folder


def main(argv: list[str] | None = None) -> None:
    """Print the table; raises UserError where the run cannot start."""
    bad: list[str] = []
    for finding in examine(argv):
        print(f"{finding.state:8}{finding.what:12}{one_line(finding.found)}", flush=True)
        if finding.to_do:
            print(f"{'':20}-> {one_line(finding.to_do)}")
        bad += [finding.what] * (finding.state == BAD)
    if bad:
        raise UserError(f"this run cannot start; the table says what to do about: {', '.join(bad)}")
    print(f"This run can start here: python {ROOT / 'run_sjc.py'} with the same options")


if __name__ == "__main__":
    run_main(main, prints=True)
