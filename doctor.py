"""Tell in a table what a run has on this machine, what it lacks, and what to do about that.

    python doctor.py
    python doctor.py --sd.checkpoint ~/models/model.safetensors
    python doctor.py --preset ideal

Takes every option of run_sjc.py, in the folder of the run. The exit status is 0 only if that run could start there.
"""

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

import families
from families import hub
from families.family import WITHOUT
from my import config, run_dir, script
from my.env import ENV, data_root
from my.errors import Stop, UserError, is_out_of_memory, one_line, run_main
from my.sha256 import sha256_of
from my.tensor_file import TensorFile
from options.sjc import SJCConfig

ROOT = Path(__file__).resolve().parent
HUB_TIMEOUT = 3  # seconds
MIN_DISK = 1.0  # GB that the files of a run take at most, pictures and checkpoints
DOWNLOAD = 6.0  # GB that a Stable Diffusion from the hub takes at most
MIN_GPU = 6.0  # GB below which Stable Diffusion is not expected to fit; not measured
GB = 1e9
WEIGHTS = (".safetensors", ".bin")  # endings of a folder's files of tensors
OK, NOTE, BAD = "ok", "note", "MISSING"


class DoctorConfig(SJCConfig):
    """Every option of run_sjc.py, and doctor.py's own."""

    sha256: bool = Field(
        False,
        json_schema_extra=config.FREE,
        description="of every checkpoint found; reads it whole, and compares its own checksums",
    )


class Finding(NamedTuple):
    """A row of the table; BAD is what keeps the run from starting."""

    state: str
    what: str
    found: str
    to_do: str = ""


# ---------------------------------------------------------------- the machine


def check_device(cfg):
    """Return findings about the device and the precision of the run."""
    import torch

    try:
        device = script.pick_device(cfg.device)
    except UserError as error:
        return [Finding(BAD, "device", str(error), "leave --device out")]
    precision = Finding(OK, "precision", cfg.chosen.evaluated_in(device.type))
    if device.type != "cuda":
        build = "no CUDA GPU" if torch.version.cuda else "a PyTorch without CUDA"
        return [
            Finding(
                OK,
                "device",
                f"{device} ({torch.get_num_threads()} threads; {build})",
                "enough to try a large model, at half a minute per step and more: for a run use a CUDA GPU"
                if cfg.chosen.wants_gpu
                else "",
            ),
            precision,
        ]
    free, total = (n / GB for n in torch.cuda.mem_get_info(device))
    few = cfg.chosen.wants_gpu and free < MIN_GPU
    return [
        Finding(OK, "device", f"{device} ({torch.cuda.get_device_name(device)})"),
        precision,
        Finding(
            NOTE if few else OK,
            "GPU memory",
            f"{free:.1f} of {total:.1f} GB free",
            "end other programs on it, or --sd.precision fp16" if few else "",
        ),
    ]


def check_disk():
    free = shutil.disk_usage(".").free / GB
    enough = free > MIN_DISK
    return [
        Finding(
            OK if enough else BAD,
            "disk",
            f"{free:.1f} GB free in {Path.cwd()}",
            "" if enough else f"a run takes up to {MIN_DISK:g} GB: free some, or start elsewhere",
        )
    ]


def check_ffmpeg():
    import imageio_ffmpeg

    try:
        return [Finding(OK, "ffmpeg", imageio_ffmpeg.get_ffmpeg_exe())]
    except RuntimeError:
        return [Finding(BAD, "ffmpeg", "none", "pip install imageio-ffmpeg, or install ffmpeg: videos need it")]


def check_hub():
    """Return whether the hub answers at all, within HUB_TIMEOUT."""
    import urllib.error
    import urllib.request

    from huggingface_hub.constants import ENDPOINT as HUB
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return [Finding(NOTE, "hub", "HF_HUB_OFFLINE is set", "only checkpoints on disk can be used")]
    try:
        urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # an answer, if not a kind one
    except (OSError, ValueError):
        return [Finding(NOTE, "hub", f"{HUB} does not answer", "only checkpoints on disk can be used")]
    return [Finding(OK, "hub", f"{HUB} answers")]


# ---------------------------------------------------------------- checkpoints


def check_data_root(sha256):
    """Return findings about the data root, and about every published checkpoint below it and in the hub's cache."""
    root, found = data_root(), []
    if not root.is_dir():
        found.append(
            Finding(
                NOTE,
                "data root",
                f"{root}: no such folder",
                f"make it, or name another in {ENV}; not needed with --sd.checkpoint",
            )
        )
    else:
        found.append(Finding(OK, "data root", str(root)))
    paths = [path for name in families.NAMES for path in families.options_of(name).known_checkpoints()]
    return found + [check_checkpoint(path, sha256) for path in paths]


def check_checkpoint(path, sha256):
    """Return the finding about a checkpoint, which this run need not be one of."""
    try:
        return Finding(OK, "checkpoint", describe(path, sha256))
    except UserError as error:
        return Finding(NOTE, "checkpoint", str(error))


def describe(path, sha256):
    """Return path, kind, size and, on request, SHA-256 of a checkpoint in words.

    Then what PyTorch wrote is compared with its own checksums: raises UserError where it is damaged.
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


def check_run(cfg):
    """Return findings about the model of the asked-for run, out of all that run_sjc.py itself does before step 1.

    Of the files, only names and shapes are read where their family can: the model is on the meta device.
    """
    import warnings

    from sjc import ready

    try:
        found = cfg.check_files()
        missing = cfg.chosen.to_download(found)
        if missing:
            return check_download(missing, cfg.family)
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
                "use a smaller grid, or a smaller model",
            )
        ]


def check_download(found, family):
    """Return the finding about a checkpoint that only the hub may have."""
    where, reasons = f"{found.flag}: nothing at {found.missed}, nor in the hub's cache", []
    for repo in found.repos:
        problem = hub.problem(repo, HUB_TIMEOUT)
        if problem:
            reasons.append(f"{repo}: {problem}")
            continue
        cache, free = hub.cache()
        if free < DOWNLOAD:
            to_do = f"{repo} has it, but it takes up to {DOWNLOAD:g} GB in {cache}: free some, or set HF_HOME to another disk"
            return [Finding(BAD, "model", where, to_do)]
        to_do = f"the run downloads {repo} first, up to {DOWNLOAD:g} GB, to {cache}; whether it fits the options is seen then"
        return [Finding(NOTE, "model", where, to_do)]
    to_do = f"give what is on disk with --{family}.checkpoint, try again with a network, or {WITHOUT}"
    return [Finding(BAD, "model", f"{where}; on the hub: {'; '.join(reasons)}", to_do)]


# ---------------------------------------------------------------- the table


def read_config(argv):
    """Return (configuration, [finding about the current folder]); with --resume, of the run that it holds."""
    spec = {"prog": "doctor.py", "doc": __doc__, "presets_dir": ROOT / "presets"}
    cfg = config.load(DoctorConfig, argv, **spec)
    try:
        cfg = script.read_config(DoctorConfig, argv, root=ROOT, settle=DoctorConfig.absolute, **spec)
        with run_dir.alone():
            if not os.access(".", os.W_OK):
                raise UserError(f"{Path.cwd()}: nothing can be written here; go to another folder")
    except UserError as error:
        return cfg.absolute(), [Finding(BAD, "folder", str(error))]
    return cfg, [Finding(OK, "folder", str(Path.cwd()))]


def examine(argv):
    """Yield every finding, the machine's first; a mistake in the options raises UserError before any."""
    cfg, folder = read_config(argv)
    yield Finding(OK, "python", f"{sys.version.split()[0]}, {sys.executable}")
    yield from folder
    for check in (lambda: check_device(cfg), check_disk, check_ffmpeg, check_hub, lambda: check_data_root(cfg.sha256)):
        yield from check()
    if folder[0].state == OK or not (cfg.resume or Path(script.FULL_CONFIG).exists()):
        yield from check_run(cfg)  # else the options are not those of the folder's run, whose model is another


def main(argv=None):
    """Print the table; raise UserError if the run cannot start."""
    bad = []
    for finding in examine(argv):
        print(f"{finding.state:8}{finding.what:12}{one_line(finding.found)}", flush=True)
        if finding.to_do:
            print(f"{'':20}-> {one_line(finding.to_do)}")
        bad += [finding.what] * (finding.state == BAD)
    if bad:
        raise UserError(f"this run cannot start; the table says what to do about: {', '.join(bad)}")
    print(f"This run can start here: python {ROOT / 'run_sjc.py'} with the same options")


if __name__ == "__main__":
    run_main(main)
