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

import pixel_folder
from gddpm import published
from my import config, run_dir, script
from my.env import ENV, data_root
from my.errors import Stop, UserError, is_out_of_memory, one_line, run_main
from my.sha256 import sha256_of
from my.tensor_file import TensorFile
from sd import find
from sjc_config import SJCConfig

ROOT = Path(__file__).resolve().parent
HUB_TIMEOUT = 3  # seconds
MIN_DISK = 1.0  # GB that the files of a run take at most, pictures and checkpoints
DOWNLOAD = 6.0  # GB that a Stable Diffusion from the hub takes at most
MIN_GPU = 6.0  # GB below which Stable Diffusion is not expected to fit; not measured
GB = 1e9
OTHER_FAMILIES = {
    "ideal": "family ideal needs no checkpoint",
    "gddpm": "the files of family gddpm load",
    "ddpm": "the pipeline of family ddpm loads",
}
WEIGHTS = (".safetensors", ".bin")  # endings of a folder's files of tensors
OK, NOTE, BAD = "ok", "note", "MISSING"


class DoctorConfig(SJCConfig):
    """Every option of run_sjc.py, and doctor.py's own."""

    sha256: bool = Field(False, description="of every checkpoint found; reads it whole, and compares its own checksums")


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
    if device.type != "cuda":
        build = "no CUDA GPU" if torch.version.cuda else "a PyTorch without CUDA"
        return [
            Finding(
                OK,
                "device",
                f"{device} ({torch.get_num_threads()} threads; {build})",
                ""
                if cfg.family != "sd" or cfg.sd.variant == "mini"
                else "enough to try real Stable Diffusion, half a minute a step and more: for a run use a CUDA GPU",
            ),
            Finding(OK, "precision", cfg.sd.precision + ": float32" * (cfg.sd.precision == "autocast")),
        ]
    free, total = (n / GB for n in torch.cuda.mem_get_info(device))
    few = cfg.family == "sd" and free < MIN_GPU
    return [
        Finding(OK, "device", f"{device} ({torch.cuda.get_device_name(device)})"),
        Finding(OK, "precision", cfg.sd.precision + ": float16" * (cfg.sd.precision == "autocast")),
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
    paths = [p for base in find.PUBLISHED.values() for p in find.with_endings(root / base) if p.exists()]
    paths += published.files()
    paths += filter(None, map(find.cached, dict.fromkeys(r for repos in find.hub_table().values() for r in repos)))
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
        cfg.check_files()
        found = meant(cfg)
        path = found and (found.path or next(filter(None, map(find.cached, found.repos)), None))
        if found and path is None:
            return check_download(found, cfg.family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a checkpoint cannot be copied to the meta device
            ready(cfg, "meta")
        if cfg.family != "sd":
            return [Finding(OK, "model", OTHER_FAMILIES[cfg.family])]
        return [Finding(OK, "model", describe(path, cfg.sha256)), *check_facts(path, cfg)]
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


def check_facts(path, cfg):
    """Return findings about what a single file of Stable Diffusion states, and about the VAE beside it."""
    from sd import names, stated

    found = []
    if path.is_file():
        file = TensorFile(path)
        facts = stated.read(path, file.metadata, names.published(file.shapes), cfg.sd)
        for fact, words in (("prediction_type", "{}"), ("zero_snr", "zero terminal SNR")):
            if fact in facts:
                found.append(f"{words.format(facts[fact].value)}, by {facts[fact].where}")
        if "prediction_type" not in facts:
            found.insert(0, "stated nowhere: the run asks the UNet, with pure noise")
        found = [Finding(OK, "predicts", "; ".join(found))]
    if cfg.sd.vae is not None:
        found.append(Finding(OK, "VAE", describe(find.vae_place(cfg.sd.vae), cfg.sha256)))
    return found


def meant(cfg):
    """Return the Found of a run's checkpoint, or None where it has none, or its family only looks on this disk."""
    if cfg.family == "sd":
        return find.find_checkpoint(cfg.sd)
    given = pixel_folder.find_pipeline(cfg.ddpm.checkpoint) if cfg.family == "ddpm" else None
    if given is None or Path(given).is_dir() or in_cache(given):
        return None
    return find.Found(f"--ddpm.checkpoint {given}", repos=(given,), missed=str(Path(given).absolute()))


def in_cache(repo):
    """Whether the hub's cache on this machine has a pipeline, as far as its index tells."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, "model_index.json"), str)


def check_download(found, family):
    """Return the finding about a checkpoint that only the hub may have."""
    from huggingface_hub import HfApi, constants

    where, reasons = f"{found.flag}: nothing at {found.missed}, nor in the hub's cache", []
    for repo in found.repos:
        try:
            if getattr(HfApi().model_info(repo, timeout=HUB_TIMEOUT), "gated", False):
                HfApi().auth_check(repo)  # its description is for everybody, its files are not
        except Exception as error:  # as many kinds as there are ways to break a connection
            reasons.append(f"{repo}: {find.hub_reason(error)}")
            continue
        cache = Path(constants.HF_HUB_CACHE)
        there = next(p for p in (cache, *cache.parents) if p.exists())
        if shutil.disk_usage(there).free / GB < DOWNLOAD:
            return [
                Finding(
                    BAD,
                    "model",
                    where,
                    f"{repo} has it, but it takes up to {DOWNLOAD:g} GB in {cache}: free "
                    "some, or set HF_HOME to another disk",
                )
            ]
        return [
            Finding(
                NOTE,
                "model",
                where,
                f"the run downloads {repo} first, up to {DOWNLOAD:g} GB, to {cache}; "
                "whether it fits the options is seen then",
            )
        ]
    return [
        Finding(
            BAD,
            "model",
            f"{where}; on the hub: {'; '.join(reasons)}",
            f"give what is on disk with --{family}.checkpoint, try again with a network, or {find.WITHOUT}",
        )
    ]


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
