"""One network of a Stable Diffusion, read from a diffusers folder or from a single file.

Every tensor of the file must have a place in the network, and every parameter of the network must be in the file.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.family import WITHOUT
from families.libraries import reason, refuse_endless
from families.sd import layout
from families.sd.diffusers_folder import PARTS, read_json
from families.sd.layout import Source
from families.sd.wording import several
from my.errors import UserError, shown, some
from my.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

Net = Any  # a network of diffusers or transformers: a torch.nn.Module with a `config`, which its type does not declare
Parts = dict[str, Any]  # {name of a part: the tokenizer, network or scheduler, each of a class of two libraries}

NETWORKS = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}  # part of a folder -> stem of its .safetensors, stem of its .bin
OTHER_FORMATS = {
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".gguf": "GGUF",
}  # ending of a file -> whose weights it holds
UNUSED = re.compile(
    r"position_ids$|_projection\.|^vision_model\.|logit_scale$"
)  # parameters of CLIP's other half, which Stable Diffusion does not use


# ---------------------------------------------------------------- single files


class Published:
    """A TensorFile whose tensors have their published names; `names` is {published name: name in the file}."""

    def __init__(self, file: TensorFile, names: dict[str, str]) -> None:
        self.file, self.names, self.path = file, names, file.path
        self.shapes = {name: file.shapes[there] for name, there in names.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by its published name; it shares memory with the file, and must not be changed."""
        return self.file.tensor(self.names[name])

    def quantised(self, asked: Iterable[str]) -> list[str]:
        """Return the names in the file of those tensors whose elements are whole numbers."""
        return self.file.quantised([self.names[name] for name in asked])


def refuse_mismatches(
    file: Published, nets: Mapping[str, Net], sources: Mapping[str, Mapping[str, Source]], what: str
) -> None:
    """Raise UserError where a file lacks parameters of the networks, has other tensors, or has whole numbers in them.

    `what` says what the file should be.
    """
    expected = {
        sources[part][name]: tuple(there.shape)
        for part, net in nets.items()
        for name, there in net.state_dict().items()
    }
    missing, unexpected = layout.mismatches(file.shapes, expected)
    if missing:
        raise UserError(
            f"{file.file.label}: not a whole {what}: lacks {several(len(missing), 'tensor')}: {some(missing, 1)}; it "
            f"is incomplete or damaged: get the file again, or {WITHOUT}"
        )
    if unexpected:
        raise UserError(
            f"{file.file.label}: no plain {what}: it has no place for {several(len(unexpected), 'tensor')}: "
            f"{some(unexpected, 1)}; it is a model built on top of that: use a plain one, or {WITHOUT}"
        )
    quantised = file.quantised({source.name for source in expected})
    if quantised:
        raise UserError(
            f"{file.file.label}: quantised, which is not supported: {shown(min(quantised))}, ...; use "
            f"plain weights, or {WITHOUT}"
        )


def fill(
    nets: Mapping[str, Net], sources: Mapping[str, Mapping[str, Source]], file: Published, dtype: torch.dtype
) -> None:
    """Read the parameters of the networks from a Published file, one after another, and convert them to `dtype`."""
    from tqdm import tqdm

    with tqdm(total=sum(map(len, sources.values())), desc="loading", unit="tensor", leave=False) as bar:
        for part, net in nets.items():
            tensors = {}
            for name, there in net.state_dict().items():
                source = sources[part][name]
                tensor = file.tensor(source.name)
                tensor = tensor if source.third is None else tensor.chunk(3)[source.third]
                tensors[name] = tensor.reshape(there.shape).to(dtype, copy=True)
                bar.update()
            net.load_state_dict(tensors, assign=True)


# ---------------------------------------------------------------- folders


@contextlib.contextmanager
def named(part: str) -> Iterator[None]:
    """Turn every error inside the block into a ValueError that begins with the name of a part."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (damaged settings make the libraries raise errors of any class)
        raise ValueError(f"{part}: {reason(error)}") from None


def from_folder(part: str, cls: Any, folder: Path, empty: bool, **options: Any) -> Net:
    """Return the network in `folder`, of the class `cls` of diffusers or transformers; `options` are for the class.

    Raises ValueError where the weights lack a parameter, which the library would fill with random numbers, or where
    they have a tensor too many.
    """
    with named(part):
        stem, variant, files = weight_files(part, folder)
        refuse_quantised(files)
        refuse_endless(read_json(folder / "config.json"), files)
        with without_pickles(folder, files, ".".join(filter(None, (stem, variant, "safetensors")))) as safe:
            net, info = cls.from_pretrained(
                safe,
                local_files_only=True,
                output_loading_info=True,
                variant=variant,
                use_safetensors=True,
                device_map="meta" if empty else None,
                **options,
            )
        for name, there, expected in sorted(info["mismatched_keys"]):
            raise ValueError(
                f"{shown(name)} is {shown(tuple(there))} in the weights, and {tuple(expected)} by config.json"
            )
    for what, keys in (("lacks", "missing_keys"), ("has no place for", "unexpected_keys")):
        names = sorted(name for name in info[keys] if not UNUSED.search(name))
        if names:
            raise ValueError(f"{part} {what} {len(names)} of its weights, {shown(names[0])} first")
    return net


def weight_files(part: str, folder: Path) -> tuple[str, str | None, list[TensorFile]]:
    """Return (stem, variant or None, files) of the weights of a folder's network. There may be several files.

    Where the folder has several sets of weights, plain .safetensors are taken before plain .bin, and both before a
    variant such as fp16. Raises ValueError where it has none.
    """
    stems = dict(zip((".safetensors", ".bin"), NETWORKS[part]))
    found: dict[tuple[bool, bool, str | None], list[Path]] = {}  # (is a variant, is a pickle, variant) -> files
    for path in sorted(folder.iterdir()):
        stem = stems.get(path.suffix)
        if stem and (m := re.fullmatch(rf"{stem}(?:\.(\w+?))?(?:-\d+-of-\d+)?", path.stem)):
            found.setdefault((m[1] is not None, path.suffix == ".bin", m[1]), []).append(path)
    if not found:
        raise ValueError(f"no {stems['.safetensors']}.safetensors and no {stems['.bin']}.bin; get the folder again")
    first = min(found, key=lambda key: (key[0], key[1], key[2] or ""))
    return stems[".safetensors"], first[2], [TensorFile(path) for path in found[first]]


def files_of(path: Path, own_vae: Path | None) -> dict[str, list[Path]]:
    """Return {part: its files} of a diffusers folder, or {"model": [path]} of a single file, and of a VAE given apart.

    Raises OSError or ValueError where a folder lacks a part or its weights.
    """
    found = {"model": [path]} if path.is_file() else {}
    parts = {part: path / part for part in PARTS if not found}
    if own_vae is not None:
        found |= {"vae": [own_vae]} if own_vae.is_file() else {}
        parts["vae"] = own_vae
    for part, folder in parts.items():
        if part not in found:
            weights = [file.path for file in weight_files(part, folder)[2]] if part in NETWORKS else []
            found[part] = [*sorted({*folder.glob("*.json"), *folder.glob("*.txt")}), *weights]
    return found


def refuse_other_formats(part: str, folder: Path, label: str | Path) -> None:
    """Raise UserError, which begins with `label`, where a network's folder has weights for other libraries only."""
    endings = {path.suffix: path.name for path in sorted(folder.glob("*"))}
    other = next((ending for ending in OTHER_FORMATS if ending in endings), None)
    if other and not {".safetensors", ".bin"} & set(endings):
        raise UserError(
            f"{label}: its {part} has no other weights: {shown(endings[other])} holds "
            f"{OTHER_FORMATS[other]} weights, which are not read; convert them to .safetensors, or "
            "give a folder that has these"
        )


def refuse_quantised(files: Sequence[TensorFile]) -> None:
    """Raise ValueError for weights that are whole numbers: a plain checkpoint does not say what these stand for."""
    names = [name for file in files for name in file.quantised(file.shapes) if not UNUSED.search(name)]
    if names:
        raise ValueError(f"quantised, which is not supported: {shown(names[0])}, ...: use plain weights")


@contextlib.contextmanager
def without_pickles(folder: Path, files: Sequence[TensorFile], name: str) -> Iterator[Path]:
    """Yield `folder`; if its weights are in .bin files (pickles), yield a temporary copy that has safetensors instead.

    `name` is the name of the safetensors file.
    """
    from safetensors.torch import save_file

    if files[0].path.suffix != ".bin":
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(folder / "config.json", scratch)
        save_file(
            {key: file.tensor(key).contiguous().clone() for file in files for key in file.shapes},
            Path(scratch) / name,
            metadata={"format": "pt"},
        )
        yield Path(scratch)


# ---------------------------------------------------------------- all parts together


def refuse_misfits(path: Path, parts: Parts) -> None:
    """Raise UserError where two parts do not fit, such as a UNet and a text encoder of different widths."""
    tokenizer, text, unet, vae = parts["tokenizer"], parts["text_encoder"].config, parts["unet"].config, parts["vae"]
    channels = vae.config.latent_channels
    if "model_max_length" not in tokenizer.init_kwargs:  # the library then takes it for endless
        tokenizer.model_max_length = text.max_position_embeddings
    for what, here, there in (
        ("the text encoder's width and the UNet's context", text.hidden_size, unet.cross_attention_dim),
        ("the channels that the UNet takes and the VAE's", unet.in_channels, channels),
        ("the channels that the UNet gives and the VAE's", unet.out_channels, channels),
        (
            "the tokens that the tokenizer gives and the text encoder takes",
            min(tokenizer.model_max_length, text.max_position_embeddings),
            tokenizer.model_max_length,
        ),
        ("the words of the tokenizer and of the text encoder", max(len(tokenizer), text.vocab_size), text.vocab_size),
    ):
        if here != there:
            raise UserError(f"{path}: its parts are not of one model: {what} differ, {here} and {there}; {WITHOUT}")
