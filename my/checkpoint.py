"""Checkpoints of tensors and plain values: written whole or not at all, verified when read."""

import json
import os
import re
import shutil
from pathlib import Path

from my.errors import RunError, UserError, shown, some
from my.sha256 import sha256_of

FORMAT = 2
TENSORS, META = "tensors.safetensors", "meta.json"
DAMAGED = "delete {folder} and continue from the checkpoint before it, or start again"


# ---------------------------------------------------------------- on disk


def save(root, step, tensors, meta, keep=2):
    """Write `root/step_<step>/`, then drop all but the newest `keep` checkpoints; its path.

    tensors: {name: Tensor}, any device.  meta: plain values (JSON).
    A process killed at any moment leaves no folder that `latest` would wrongly return.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".tmp_*"):
        shutil.rmtree(stale)
    final = root / f"step_{step:07d}"
    scratch = root / f".tmp_{final.name}_new"
    scratch.mkdir()
    orders = {name: memory_order(t) for name, t in tensors.items()}
    write_tensors(scratch / TENSORS, {name: t.detach().permute(orders[name]) for name, t in tensors.items()})
    record = {"format": FORMAT, "step": step, "sha256": sha256_of(scratch / TENSORS), "orders": orders, "meta": meta}
    (scratch / META).write_text(json.dumps(record, indent=2))
    shutil.copymode(scratch / META, scratch / TENSORS)  # the library's are for their owner only
    for path in (scratch / TENSORS, scratch / META):
        sync(path)
    sync(scratch)
    if final.exists():
        discard(final)
    scratch.rename(final)
    sync(root)
    for old in [path for path in checkpoints(root)[:-keep] if path != final]:
        discard(old)
    return final


def memory_order(tensor):
    """The dimensions of a tensor from the slowest in memory to the fastest: permuted so, most need no copy to write."""
    return sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))


def write_tensors(path, tensors):
    """Write {name: Tensor} as safetensors, from where they are; raises OSError with the system's number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # holds the system's error in words only
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def sync(path):
    """Make the content of a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(folder):
    """Delete a checkpoint; renamed first, so that half of it is never taken for a whole one."""
    doomed = folder.rename(folder.with_name(f".tmp_{folder.name}_old"))
    shutil.rmtree(doomed)


def checkpoints(root):
    """The complete checkpoint folders under `root`, oldest step first."""
    found = [path for path in Path(root).glob("step_*") if re.fullmatch(r"step_\d{7,}", path.name)]
    return sorted(found, key=step_of)


def step_of(path):
    """The number of steps that the checkpoint folder `path` was saved after."""
    return int(path.name.removeprefix("step_"))


def latest(root):
    """The folder of the newest checkpoint under `root`, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def load(path):
    """(tensors on the CPU, meta) of the checkpoint folder `path`; meta also holds its "step".

    The tensors are laid out in memory as those that were saved, and read from the file as they are used.
    Raises UserError where a file is missing, damaged, or of another format version.
    """
    from safetensors.torch import load_file

    path = Path(path)
    advice = DAMAGED.format(folder=path)
    try:
        record = json.loads((path / META).read_bytes())
        version, sha256 = record["format"], record["sha256"]
        orders, meta = record.get("orders"), {**record["meta"], "step": record["step"]}
    except FileNotFoundError:
        raise RunError(f"{path / META}: no such file; {advice}") from None
    except (ValueError, TypeError, KeyError):
        raise RunError(f"{path / META} is damaged; {advice}") from None
    if version != FORMAT:
        raise RunError(f"{path / META}: format {version}, this code reads {FORMAT}; start again")
    try:
        whole = sha256_of(path / TENSORS) == sha256
    except FileNotFoundError:
        raise RunError(f"{path / TENSORS}: no such file; {advice}") from None
    if not whole:
        raise RunError(f"{path / TENSORS} is damaged (its SHA-256 differs); {advice}")
    tensors = load_file(path / TENSORS)
    return {
        name: tensor.permute([orders[name].index(dim) for dim in range(tensor.ndim)])
        for name, tensor in tensors.items()
    }, meta


# ---------------------------------------------------------------- against a model


def check(tensors, expected, first=4, most=200):
    """Raise UserError unless `tensors` has exactly the leaves and shapes of `expected`.

    tensors: {name: Tensor}.  expected: {name: shape}.  The first few mismatches are named,
    in `most` characters.
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


def flatten_optimizer(optimizer, names):
    """The state of a torch optimizer as {"optim/<name>/<key>": Tensor}.

    names: of its parameters, in the order they were given to it.  A state value that is a plain
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


def restore_optimizer(optimizer, names, tensors):
    """Give `optimizer` the state that `flatten_optimizer` took; other keys are ignored.

    Learning rates and other options stay as the optimizer has them.  Raises UserError where the
    state belongs to a parameter that is not in `names`.
    """
    import torch

    index, params = {name: i for i, name in enumerate(names)}, parameters(optimizer)
    state = {}
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


def laid_out(value, param):
    """A copy of `value`, laid out like `param` if it has its shape: fused optimizers pair memory, not indices."""
    import torch

    like = param if param.shape == value.shape else value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def parameters(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]
