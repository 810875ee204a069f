"""What the scripts that leave a run in the current folder share: how it begins, resumes, and on which device."""

from pathlib import Path

from my import config, plain_files, run_dir
from my.errors import RunError, UserError, some

FULL_CONFIG = "full_config.yml"
OF_ONE_COMMAND = {"resume": False, "dry_run": False}  # options that are not kept with the run
KNOWN_BY = {
    "schedules": "run_2d_sjc.py",
    "num_images": "run_img_sampling.py",
    "scene": "run_nerf.py",
    "emptiness_weight": "run_sjc.py",
}  # option that no other script has -> script
FREE_ON_RESUME = {
    *OF_ONE_COMMAND,
    "device",
    "sd.precision",
    "gddpm.precision",
    "sd.offload_text",
    "sha256",
}  # options that a resumed run may change: they are of the machine, or of one command


def read_config(cls, argv, *, root, settle=lambda cfg: cfg, leaves="ckpt", **spec):
    """Return the run's configuration, an instance of `cls`; with --resume, the one saved in the folder.

    `root` is the project's folder, `settle` makes its paths hold in any folder, `leaves` names what
    a run is known by, `spec` goes to `config.load`. Raises UserError in the project's folder, where a
    new run would meet an old one, and where a resumed run is to change more than FREE_ON_RESUME.
    """
    cfg = settle(config.load(cls, argv, **spec))
    run_dir.refuse_project_dir(root)
    refuse_other_run(cls)
    if not cfg.resume:
        if Path(leaves).is_file():
            raise UserError(f"{leaves}: this run would write a folder of that name, and a file has it; move it away")
        if any(Path(leaves).glob("[!.]*")):  # what begins with a dot was never whole
            raise UserError(
                "this folder already holds a run: continue it with --resume True, or start in an empty folder"
            )
        return cfg
    if not Path(FULL_CONFIG).exists():
        raise UserError(f"--resume True: no {FULL_CONFIG} here; go to the folder of the run")
    saved = config.read(cls, FULL_CONFIG)
    config.refuse_cut_off(cls, FULL_CONFIG, FREE_ON_RESUME)
    cfg = settle(config.load(cls, argv, config_file=FULL_CONFIG, **spec))
    refuse_changes(config.flat(cfg), config.flat(saved))
    return cfg


def refuse_other_run(cls, folder="."):
    """Raise UserError in the folder of another script's run, whose configuration has options that `cls` has not."""
    path = Path(folder) / FULL_CONFIG
    if path.exists():
        try:
            options = plain_files.load_yaml(path)
        except (OSError, ValueError):
            return  # reading it in earnest says what is wrong
        names = set(options if isinstance(options, dict) else ())
        others = sorted(map(str, names - {*cls.model_fields, config.MADE_BY}))
        if others:
            whose = next((script for option, script in KNOWN_BY.items() if option in others), "another script")
            raise UserError(
                f"{'this folder' if str(folder) == '.' else folder} holds a run of {whose}: its "
                f"{FULL_CONFIG} has the option {others[0]}; go to another folder"
            )


def refuse_changes(now, then):
    """Raise UserError for an option whose value differs between the two and is not in FREE_ON_RESUME."""
    changed = [
        f"--{name} {now[name]} (was {then[name]})"
        for name in now
        if name not in FREE_ON_RESUME and now[name] != then[name]
    ]
    if changed:
        raise UserError(
            f"--resume True with {some(changed)}: a resumed run can change only "
            f"{', '.join(sorted(FREE_ON_RESUME & set(now)))}; for anything else start in an empty folder"
        )


def begin(cfg, prepare):
    """Keep and print the configuration, then call what `prepare` returned for it, alone in the folder.

    The configuration's own `check_files` and `prepare`, which loads what the run needs, raise UserError where it
    cannot start: a refused command prints and leaves nothing. A dry run prepares nothing, and stops once the
    configuration is kept.
    """
    kept = cfg.model_copy(update=OF_ONE_COMMAND)
    with run_dir.alone():
        kept.check_files()
        run = None if cfg.dry_run else prepare(kept)
        config.write(kept, FULL_CONFIG)
        print(config.show(kept), end="", flush=True)
        if run:
            run()


def go_on():
    """Return how a command goes on after it was stopped: where the current folder has its run, with that."""
    return "continue with --resume True" if Path(FULL_CONFIG).exists() else "start it again"


def pick_device(name):
    """Return the torch device of a `--device`; raises UserError where it cannot be had."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {name}: not available here; use auto, cpu{', cuda' if torch.cuda.is_available() else ''}"
        ) from None
    return device


def check_finite(stats, where, remedy):
    """Raise RunError, which tells `where` it was and the `remedy`, if a statistic is not finite."""
    import torch

    bad = [name for name, value in stats.items() if not torch.isfinite(torch.as_tensor(value))]
    if bad:
        raise RunError(f"{where}: {', '.join(bad)} is not finite; {remedy}")
