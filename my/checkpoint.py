"""Checkpoints of tensors and plain values: written whole or not at all, verified when read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import plain_files
from my.errors import RunError, UserError, first_line, note, shown, some
from my.file_system import delete_folder, error_of, move, sync_file, sync_folder
from my.run_dir import names_in
from my.sha256 import sha256_of, sha256_of_text

if TYPE_CHECKING:
    import torch

FORMAT = 3
RECORD = {"format", "step", "sha256", "orders", "meta"}  # keys of the record in META, which SEAL is the checksum of
SEAL = "seal"
NAME = r"step_\d{7,}"  # of the folder of a checkpoint
UNSEALED = 2  # the format that had no SEAL
TENSORS, META = "tensors.safetensors", "meta.json"
UNREADABLE = {getattr(errno, name) for name in ("EIO", "EUCLEAN", "EBADMSG") if hasattr(errno, name)}  # of a bad disk
DAMAGED = "delete {folder} and continue from the checkpoint before it, or start again"


# ---------------------------------------------------------------- on disk


def save(
    root: str | Path, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `root/step_<step>/`, and return its path. Of all checkpoints, it and the `keep` - 1 before it are kept.

    tensors: {name: Tensor}, any device.  meta: plain values (JSON).
    A process killed at any moment leaves no folder that `latest` would wrongly return.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    clear_scratch(root)
    final = root / f"step_{step:07d}"
    scratch = root / f".tmp_{final.name}_new"
    try:
        fill(scratch, step, tensors, meta)
    except OSError as error:  # on a full disk there is room again for what says so
        error.filename = error.filename or str(scratch / META)
        clear_scratch(root)
        raise
    before = set_aside(final) if final.exists() else None
    move(scratch, final)
    sync_folder(root)
    if before:
        delete_folder(before)
    later = [path for path in checkpoints(root) if step_of(path) > step]  # damaged, or the run would be further
    discard_all([*later, *too_old(root, step, keep)])
    return final


def too_old(root: str | Path, step: int, keep: int) -> list[Path]:
    """Return the checkpoints below `root` from before the one of `step` and the `keep` - 1 before it."""
    return [path for path in checkpoints(root) if step_of(path) <= step][:-keep]


def discard_all(folders: Iterable[Path]) -> None:
    """Delete checkpoints. One that a program on Windows has open stays, for the next time."""
    for folder in folders:
        with contextlib.suppress(PermissionError):
            discard(folder)


def fill(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint to a new folder, and make them durable."""
    folder.mkdir()
    orders = {name: memory_order(t) for name, t in tensors.items()}
    write_tensors(folder / TENSORS, {name: t.detach().permute(orders[name]) for name, t in tensors.items()})
    record = {"format": FORMAT, "step": step, "sha256": sha256_of(folder / TENSORS), "orders": orders, "meta": meta}
    (folder / META).write_bytes(json.dumps({**record, SEAL: seal_of(record)}, indent=2).encode())
    shutil.copymode(folder / META, folder / TENSORS)  # the library lets nobody but the owner read its file
    for path in (folder / TENSORS, folder / META):
        sync_file(path)
    sync_folder(folder)


def clear_scratch(root: str | Path) -> None:
    """Delete what a killed `save` has left half-written below `root`. What cannot be deleted stays."""
    for stale in Path(root).glob(".tmp_*"):
        with contextlib.suppress(OSError):
            delete_folder(stale)


def memory_order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions from the slowest in memory to the fastest: so permuted, most tensors need no copy."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dim: -strides[dim])


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write {name: Tensor} as safetensors, without a copy where it can be; raises OSError with the system's number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # holds the system's error in words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise error_of(int(number[1]), path) from None


def discard(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that half of it is never taken for a whole one."""
    delete_folder(set_aside(folder))


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint to what is none, and return its new path."""
    aside = folder.with_name(f".tmp_{folder.name}_old")
    move(folder, aside)
    return aside


def checkpoints(root: str | Path) -> list[Path]:
    """Return the complete checkpoint folders under `root`, oldest step first."""
    found = [Path(root, name) for name in names_in(root) if re.fullmatch(NAME, name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the number of steps after which the checkpoint folder `path` was saved."""
    return int(path.name.removeprefix("step_"))


def recorded_step(path: Path) -> int:
    """Return the number of steps of a checkpoint folder that may have another name: then its record says it.

    Raises what `load` raises for a record.
    """
    return step_of(path) if re.fullmatch(NAME, path.name) else int(record_of(path)["step"])


def latest(root: str | Path) -> Path | None:
    """Return the folder of the newest checkpoint under `root`, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


class Damaged(RunError):
    """A checkpoint that lacks a file, or whose files are not as they were written."""

    def __init__(self, path: Path, why: str) -> None:
        folder = path if os.path.isdir(path) else path.parent
        super().__init__(f"{path}{why}; {DAMAGED.format(folder=folder)}")


Loaded = tuple[dict[str, "torch.Tensor"], dict[str, Any]]  # tensors by name on the CPU, and meta with its "step"


def load_newest(root: str | Path, keep: int | None = None) -> Loaded | None:
    """Return the newest checkpoint below `root` that is whole, as `load` does, or None where there is none at all.

    Unless `keep` is None, what is older than it and the `keep` - 1 before it is deleted: a killed `save` may have left
    more. A note tells of newer ones that are damaged. Raises RunError where all are, or where one is of another format.
    """
    first: Damaged | None = None
    for path in reversed(checkpoints(root)):
        try:
            loaded = load(path)
        except Damaged as error:
            first = first or error
            continue
        if first:
            note(f"{first.args[0].partition(';')[0]}; {path}, from before it, is taken")
        if keep is not None:
            discard_all(too_old(root, step_of(path), keep))
        return loaded
    if first:
        raise RunError(f"{first.args[0].partition(';')[0]}; no checkpoint in {root} is whole: start in an empty folder")
    return None


def load(path: str | Path) -> Loaded:
    """Return (tensors on the CPU, meta) of the checkpoint folder `path`; meta also holds its "step".

    The tensors are laid out in memory as the saved ones were. They are copies: no file stays open.
    Raises `Damaged` where a file is missing or damaged, and RunError where it is of another format version.
    """
    from safetensors.torch import load_file

    path = Path(path)
    record = record_of(path)
    with reading(path / TENSORS):
        whole = sha256_of(path / TENSORS) == record["sha256"]
    if not whole:
        raise Damaged(path / TENSORS, " is damaged (its SHA-256 differs)")
    tensors, orders = load_file(path / TENSORS), record["orders"]
    if tensors.keys() != orders.keys() or any(sorted(orders[k]) != list(range(t.ndim)) for k, t in tensors.items()):
        raise Damaged(path / META, " is damaged (its orders are not those of the tensors)")
    return {
        name: tensor.clone().permute([orders[name].index(dim) for dim in range(tensor.ndim)])
        for name, tensor in tensors.items()
    }, {**record["meta"], "step": record["step"]}


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While the block reads the file of a checkpoint, raise `Damaged` where that is gone, or its disk is bad."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(path, ": no such file") from None
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise Damaged(path, f" cannot be read ({error.strerror})") from None


def record_of(path: Path) -> dict[str, Any]:
    """Return the record of a checkpoint folder, whose checksum is right and whose values are of the right kinds.

    Raises what `load` does.
    """
    meta = path / META
    try:
        with reading(meta):
            record = plain_files.read_json(meta, ["format"])
    except ValueError as error:
        raise Damaged(meta, f" {first_line(error)}") from None
    version, seal = record["format"], record.pop(SEAL, None)
    if type(version) is int and version not in (FORMAT, UNSEALED) and seal is None:
        raise RunError(f"{meta}: format {version}, this code reads {FORMAT}; start again")
    if seal != (None if version == UNSEALED else seal_of(record)):
        raise Damaged(meta, " is damaged (its checksum differs)")
    orders = record.get("orders")
    fits = (
        record.keys() == RECORD
        and type(record["step"]) is int
        and isinstance(record["meta"], dict)
        and isinstance(orders, dict)
        and all(isinstance(order, list) and {*map(type, order)} <= {int} for order in orders.values())
    )
    if not fits:
        raise Damaged(meta, " is damaged (it has other entries)")
    if re.fullmatch(NAME, path.name) and record["step"] != step_of(path):
        raise Damaged(meta, f" is damaged (it is of step {shown(record['step'])}, the folder of {step_of(path)})")
    return record


def seal_of(record: Mapping[str, Any]) -> str:
    """Return the checksum of a record: the SHA-256 of its JSON without spaces, keys in order."""
    return sha256_of_text(json.dumps(record, sort_keys=True, separators=(",", ":")))


# ---------------------------------------------------------------- against a model


def refuse_other(command: str, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Raise UserError for the checkpoint of another command than `command`; its names tell whose it is."""
    fields = any(name.startswith("field/") for name in tensors)
    made_by = ("run_nerf.py" if "box" in meta else "run_sjc.py") if fields else "run_2d_sjc.py"
    if made_by != command:
        raise UserError(
            f"the checkpoint is of {made_by}, and this run is of {command}; put the checkpoint of this run back, or "
            "start in an empty folder"
        )


def check(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, Sequence[int]], first: int = 4, most: int = 200
) -> None:
    """Raise UserError unless `tensors` has exactly the leaves and shapes of `expected`.

    tensors: {name: Tensor}.  expected: {name: shape}.  The message names the `first` few
    mismatches, in about `most` characters.
    """
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    here = {name: tuple(shape) for name, shape in expected.items()}
    wrong = [
        f"{shown(name, 40)} is {shown(there.get(name, 'absent'), 24)} there, {shown(here.get(name, 'absent'), 24)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if wrong:
        named = [text for i, text in enumerate(wrong[:first]) if not i or len("; ".join(wrong[: i + 1])) <= most]
        more = f"; and {len(wrong) - len(named)} more" if len(wrong) > len(named) else ""
        raise UserError(
            f"the checkpoint does not fit this model: {'; '.join(named)}{more}; use the configuration it was made with"
        )


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the state of an optimizer as {"optim/<name>/<key>": Tensor}.

    names: of its parameters, in the order in which it was given them.  A state value that is a plain
    number becomes a 0-d int64 or float64 tensor.
    """
    import torch

    flat = {}
    for name, param in zip(names, parameters(optimizer), strict=True):
        for key, value in optimizer.state.get(param, {}).items():
            if not torch.is_tensor(value):
                dtype = torch.int64 if isinstance(value, int) else torch.float64
                value = torch.tensor(value, dtype=dtype)
            flat[f"optim/{name}/{key}"] = value
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Give `optimizer` the state that `flatten_optimizer` took; other keys of `tensors` are ignored.

    Learning rates and other options stay as the optimizer has them.  Raises UserError where the
    state belongs to a parameter that is not in `names`.
    """
    import torch

    index, params = {name: i for i, name in enumerate(names)}, parameters(optimizer)
    state: dict[int, dict[str, Any]] = {}
    for path, value in tensors.items():
        if not path.startswith("optim/"):
            continue
        name, _, key = path[len("optim/") :].rpartition("/")
        if name not in index:
            raise UserError(f"{shown(path)}: the optimizer has no {shown(name)}; it has {some(names)}")
        number = value.ndim == 0 and value.dtype in (torch.int64, torch.float64)
        state.setdefault(index[name], {})[key] = value.item() if number else laid_out(value, params[index[name]])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def laid_out(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a copy of `value`, laid out like a `param` of its shape: fused optimizers pair memory, not indices."""
    import torch

    like = param if param.shape == value.shape else value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters of an optimizer, in its order."""
    return [param for group in optimizer.param_groups for param in group["params"]]
