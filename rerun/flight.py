"""Flight records: what a step had and computed that gave numbers which are not finite, and that step run again.

A record is flight/step_<step>.safetensors in the folder of the run. It holds the field, the rendering and the score of
the last attempt at the step, and facts about it: cameras, sigma, seed, the number of the attempt, statistics.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapt import Question, make_adapter
from my import checkpoint, config
from my.errors import RunError, UserError, first_line, shown
from my.plain_files import parse_json
from my.run_dir import write_atomic
from my.script import FULL_CONFIG, free_on_resume, recorded_weights, refuse_other_run
from my.tensor_file import TensorFile
from my.version import made_by
from options import weights
from options.sjc import SJCConfig
from sjc import SJC, NotFinite
from voxnerf import state

FOLDER = "flight"
FORMAT, ABOUT = 2, "flight"  # the name of what a file says of itself
SEAL, SUM = "seal", "sha256"  # in that: the checksum of all else that it says, and that of the tensors
FIELD = "field/"  # before the names of the field's tensors
TOO_LARGE = "the optimizer needs it, and float32 has no such number"
ADVICE = "give a file of flight/ in the folder of a run"


# ---------------------------------------------------------------- the record


def write(root: str | Path, optimisation: SJC, error: NotFinite) -> Path:
    """Write the record of a step that failed in the run of the folder `root`, whole or not at all; return its path."""
    from safetensors.torch import save

    attempt, own = error.attempt, optimisation.field.state_dict()
    tensors = {
        **{FIELD + name: tensor for name, tensor in own.items()},
        **{f"gradient/{name}": p.grad for name, p in optimisation.field.named_parameters() if p.grad is not None},
        **{name: getattr(attempt.rendering, name) for name in ("color", "depth", "opacity", "emptiness")},
        "x": attempt.x,
        "score": attempt.g,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {
        "format": FORMAT,
        "step": attempt.i,
        "attempt": attempt.draw,
        "float32": error.exact,
        "sigma": attempt.sigma,
        "seed": optimisation.cfg.seed,
        "regulariser": repr(float(attempt.loss)),
        "cameras": [{"view": c.view, "fov": float(c.fov), "c2w": c.c2w.tolist()} for c in attempt.cameras],
        "statistics": {name: statistics(tensor) for name, tensor in tensors.items()},
        "device": str(optimisation.adapter.device),
        "made_by": made_by(optimisation.cfg.command),
    }
    path = Path(root) / FOLDER / f"step_{attempt.i + 1:07d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, save(tensors, sealed(about, tensors)))
    return path


def sealed(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return what the file of a record says of itself: facts about it, with checksums of these and of its tensors."""
    about = {**about, SUM: sum_of(tensors)}
    return {ABOUT: json.dumps({**about, SEAL: checkpoint.seal_of(about)})}


def sum_of(tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of tensors: their names, types, shapes and numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def statistics(tensor: torch.Tensor) -> dict[str, Any]:
    """Return {"not finite": how many numbers of a tensor, "least", "most", "rms": of the others}."""
    finite = tensor[torch.isfinite(tensor)].double()
    facts: dict[str, Any] = {"not finite": tensor.numel() - finite.numel()}
    if finite.numel():
        rms = finite.square().mean().sqrt()
        facts |= {"least": finite.min().item(), "most": finite.max().item(), "rms": rms.item()}
    return facts


class Record(NamedTuple):
    """A flight record, and the folder and the configuration of its run."""

    folder: Path
    cfg: SJCConfig
    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def facts_in(file: TensorFile) -> dict[str, Any]:
    """Return what a flight record says of itself; raises UserError where it is none, or is damaged."""
    none = UserError(f"{file.path} is no flight record; {ADVICE}")
    try:
        about = parse_json(file.metadata[ABOUT])
        version, seal = about["format"], about.pop(SEAL, None)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise none from None
    if version != FORMAT:
        raise UserError(f"{file.path}: a flight record of format {shown(version)}, this code reads {FORMAT}")
    if seal != checkpoint.seal_of(about):
        raise UserError(f"{file.path} is damaged (its checksum differs); {ADVICE}")
    if not is_whole(about):
        raise none
    return about


def is_whole(about: dict[str, Any]) -> bool:
    """Whether a record says all that is read of it, in values of the right kinds."""
    try:
        counts = (facts["not finite"] for facts in about["statistics"].values())
        numbers = [about["step"], about["attempt"], about["seed"], *counts]
        texts = [about["device"], about[SUM], *(camera["view"] for camera in about["cameras"])]
        fits = {*map(type, numbers)} == {int} and min(numbers) >= 0 and {*map(type, texts)} == {str}
        return fits and type(about["sigma"]) is float and math.isfinite(about["sigma"])
    except (TypeError, KeyError, AttributeError):
        return False


def read(path: str | Path) -> Record:
    """Return a flight record. Raises UserError for a file that is none, and where the run's folder is not around it."""
    file = TensorFile(path)
    about = facts_in(file)
    tensors = {name: file.tensor(name) for name in file.shapes}
    if about[SUM] != sum_of(tensors):
        raise UserError(f"{path} is damaged (the checksum of its tensors differs); {ADVICE}")
    folder = Path(path).resolve().parent.parent
    if not (folder / FULL_CONFIG).exists():
        raise UserError(f"{path}: {folder} has no {FULL_CONFIG}; {ADVICE}")
    refuse_other_run(SJCConfig, folder)
    cfg = config.read(SJCConfig, folder / FULL_CONFIG)
    config.reset(cfg, free_on_resume(SJCConfig))
    cfg.init = cfg.init_sha256 = None  # the field is in the record
    if about["step"] >= cfg.n_steps:
        raise UserError(f"{path}: of step {about['step'] + 1}, and the run in {folder} has {cfg.n_steps}; {ADVICE}")
    return Record(folder, cfg, about, tensors)


# ---------------------------------------------------------------- the step again


class Finding(NamedTuple):
    """What was found of one thing that a step has or computes."""

    what: str
    tensor: torch.Tensor
    cause: str = ""  # of numbers that are not finite, as far as it is known

    @property
    def broken(self) -> bool:
        """Whether a number of it is not finite."""
        return not bool(torch.isfinite(self.tensor).all())

    def __str__(self) -> str:
        if not self.broken:
            return f"{self.what}: finite, at most {self.tensor.abs().max().item():.3g}" if self.tensor.numel() else ""
        bad = (~torch.isfinite(self.tensor)).nonzero()
        first = tuple(bad[0].tolist())
        where = f" at {first} of {tuple(self.tensor.shape)}" if first else ""
        return (
            f"{self.what}: {len(bad)} of {self.tensor.numel()} numbers are not finite, the first is "
            f"{self.tensor[first].item()}{where}{'; ' * bool(self.cause)}{self.cause}"
        )


def replay(record: Record, attempt: int | None = None) -> list[Finding]:
    """Run the recorded step again on the CPU, in float32; return what it has and computes, in that order.

    attempt: which of the attempts, by the number of its noise; None is the recorded one. All of them start from the
    recorded field. Raises UserError where the model cannot be loaded or is not that of the run, and where the field is
    another one.
    """
    draw = record.about["attempt"] if attempt is None else attempt
    found = record.cfg.check_files()
    weights.refuse_other(f"the run of this record, {record.folder}", record.cfg, found, recorded_weights(record.folder))
    adapter = make_adapter(record.cfg, "cpu", found)
    field = {name.removeprefix(FIELD): x for name, x in record.tensors.items() if name.startswith(FIELD)}
    findings = [Finding(f"field, {name}", x) for name, x in field.items()]
    with traced(adapter, findings):
        optimisation = SJC(record.cfg, adapter)
        state.restore_field(optimisation.field, {FIELD + name: x for name, x in field.items()})
        findings += of_conditions({"": optimisation.uncond, **optimisation.cond})
        answers = adapter.answers

        def watched(questions: Sequence[Question]) -> list[torch.Tensor]:
            findings.extend(Finding("noisy rendering", x) for x in {id(q.x): q.x for q in questions}.values())
            found = answers(questions)
            findings.extend(Finding("denoised rendering", D) for D in found)
            return found

        adapter.answers = watched  # type: ignore[method-assign]
        try:
            computed = optimisation.attempt(record.about["step"], draw)
        except RuntimeError as error:
            raise RunError(f"the step cannot be run again: {first_line(error)}") from None
        finally:
            del adapter.answers
    i = next((k for k, finding in enumerate(findings) if finding.what == "noisy rendering"), len(findings))
    findings[i:i] = [Finding(f"rendering, {name}", x) for name, x in computed.rendering._asdict().items()]
    findings += [Finding("score", computed.g), Finding("regulariser", computed.loss)]
    gradients = [(name, p.grad) for name, p in optimisation.field.named_parameters() if p.grad is not None]
    own = [Finding(f"gradient, {name}", grad) for name, grad in gradients]
    squares = [
        Finding(f"square of the {each.what}", each.tensor.square(), TOO_LARGE) for each in own if not each.broken
    ]
    return findings + own + squares


def of_conditions(conditions: dict[str, torch.Tensor]) -> list[Finding]:
    """Return what was found of the conditions of view prompts: one thing of all, or those that are not finite."""
    findings = [Finding(f"condition {name!r}", x) for name, x in conditions.items() if x.is_floating_point()]
    broken = [finding for finding in findings if finding.broken]
    if broken or not findings:
        return broken
    return [Finding(f"conditions of {len(findings)} prompts", torch.cat([finding.tensor for finding in findings]))]


@contextlib.contextmanager
def traced(adapter: Any, findings: list[Finding]) -> Iterator[None]:
    """While the block runs, add to `findings` each module of an adapter's networks that gives what is not finite."""
    handles = []
    seen: set[int] = set()
    for attribute, net in vars(adapter).items():
        if not isinstance(net, torch.nn.Module):
            continue
        for name, module in net.named_modules():
            if id(module) not in seen:
                seen.add(id(module))
                handles.append(module.register_forward_hook(hook(f"{attribute}.{name}".rstrip("."), findings)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook(name: str, findings: list[Finding]) -> Any:
    """Return a forward hook that adds the output of the module `name` to findings where it is not finite."""
    from torch.utils._pytree import tree_leaves

    def numbers(value: Any) -> list[torch.Tensor]:
        return [x for x in tree_leaves(value) if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def look(module: torch.nn.Module, args: Any, output: Any) -> None:
        values = numbers(output if isinstance(output, (torch.Tensor, tuple, list)) else list(vars(output).values()))
        for value in values:
            if not torch.isfinite(value).all():
                whole = all(bool(torch.isfinite(x).all()) for x in numbers(args))
                bad = [
                    f"its {key} has {n} that are not finite"
                    for key, p in module.named_parameters()
                    if (n := int((~torch.isfinite(p)).sum()))
                ]
                cause = "; ".join([f"its input is {'finite' if whole else 'not finite'}", *bad[:2]])
                findings.append(Finding(name, value.detach().clone(), cause))
                return

    return look


def report(record: Record, findings: list[Finding], attempt: int | None = None) -> Iterator[str]:
    """Yield lines for people: what the record says, what was found here, and where the first such number is.

    attempt: that of `replay`.
    """
    about = record.about
    views = ", ".join(shown(camera["view"]) for camera in about["cameras"])
    yield (
        f"step {about['step'] + 1}, attempt {about['attempt']}, sigma {about['sigma']:.4g}, seed {about['seed']}, "
        f"view {views}; recorded on {shown(about['device'])}"
    )
    recorded = [name for name, facts in about["statistics"].items() if facts["not finite"]]
    yield f"not finite there: {', '.join(map(shown, recorded)) or 'the regulariser, a square or a sum'}"
    if attempt not in (None, about["attempt"]):
        yield f"run again here with the noise of attempt {attempt}"
    broken = [finding for finding in findings if finding.broken]
    first = findings.index(broken[0]) if broken else len(findings)
    yield from filter(None, map(str, findings[: first + 1]))
    if broken:
        others = [finding.what for finding in broken[1:]]
        yield f"here it begins with {broken[0].what}" + (f"; then {len(others)} others follow" if others else "")
    else:
        belongs = "the device or to its number format"
        if about["device"] == "cpu":
            belongs = "a number format, to a version or to the number of threads"
        yield f"every number is finite here, on a CPU and in float32: what failed belongs to {belongs}"
