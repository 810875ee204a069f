"""One network of a Stable Diffusion, out of a diffusers folder or out of a single file. Every tensor has its place."""

import contextlib
import math
import re
import shutil
import tempfile
from pathlib import Path

from families.family import WITHOUT
from families.libraries import reason
from families.sd import layout
from families.sd.find import read_json
from my.errors import UserError, shown, some
from my.tensor_file import TensorFile

NETWORKS = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
}  # part of a folder -> stems of its .safetensors and its .bin
OTHER_FORMATS = {".msgpack": "Flax", ".onnx": "ONNX", ".h5": "TensorFlow", ".gguf": "GGUF"}  # by their files' endings
UNUSED = re.compile(r"position_ids$|_projection\.|^vision_model\.|logit_scale$")  # of CLIP's other half
MAX_SETTING = 1_000_000  # that a setting of a network may be, however few weights it has


# ---------------------------------------------------------------- single files


class Published:
    """A TensorFile whose tensors are asked for by their published names."""

    def __init__(self, file, found):
        self.file, self.names, self.path = file, found, file.path
        self.shapes = {name: file.shapes[there] for name, there in found.items()}

    def tensor(self, name):
        return self.file.tensor(self.names[name])

    def quantised(self, asked):
        return self.file.quantised([self.names[name] for name in asked])


def refuse_mismatches(file, nets, sources, what):
    """Raise UserError where a file lacks parameters of the networks, has others, or has them as whole numbers."""
    expected = {
        sources[part][name]: tuple(there.shape)
        for part, net in nets.items()
        for name, there in net.state_dict().items()
    }
    missing, unexpected = layout.mismatches(file.shapes, expected)
    if missing:
        raise UserError(
            f"{file.file.label}: not a whole {what}: lacks {len(missing)} tensors: {some(missing, 1)}; it "
            f"is incomplete or damaged: get the file again, or {WITHOUT}"
        )
    if unexpected:
        raise UserError(
            f"{file.file.label}: no plain {what}: it has no place for {len(unexpected)} tensors: "
            f"{some(unexpected, 1)}; it is a model built on top of that: use a plain one, or {WITHOUT}"
        )
    quantised = file.quantised({source.name for source in expected})
    if quantised:
        raise UserError(
            f"{file.file.label}: quantised, which is not supported: {shown(min(quantised))}, ...; use "
            f"plain weights, or {WITHOUT}"
        )


def fill(nets, sources, file, dtype):
    """Give the networks their parameters out of a Published file, one at a time, in `dtype`."""
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
def named(part):
    """Put the name of a part before whatever damaged files and settings make of the libraries."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{part}: {reason(error)}") from None


def from_folder(part, cls, folder, empty, **options):
    """Return the network of a diffusers or transformers class in `folder`.

    Raises ValueError for weights that are missing (they would be random) or over.
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


def weight_files(part, folder):
    """Return (stem, variant or None, TensorFiles) of the weights of a folder's network, several files of one included.

    Plain .safetensors come before plain .bin, and these before a variant such as fp16. Raises ValueError for none.
    """
    stems = dict(zip((".safetensors", ".bin"), NETWORKS[part]))
    found = {}  # (whether it is a variant, whether it is a pickle, variant) -> paths
    for path in sorted(folder.iterdir()):
        stem = stems.get(path.suffix)
        m = stem and re.fullmatch(rf"{stem}(?:\.(\w+?))?(?:-\d+-of-\d+)?", path.stem)
        if m:
            found.setdefault((m[1] is not None, path.suffix == ".bin", m[1]), []).append(path)
    if not found:
        raise ValueError(f"no {stems['.safetensors']}.safetensors and no {stems['.bin']}.bin; get the folder again")
    first = min(found, key=lambda key: (key[0], key[1], key[2] or ""))
    return stems[".safetensors"], first[2], [TensorFile(path) for path in found[first]]


def refuse_other_formats(part, folder, label):
    """Raise UserError, which begins with `label`, where a folder's network has weights for another library alone."""
    endings = {path.suffix: path.name for path in sorted(folder.glob("*"))}
    other = next((ending for ending in OTHER_FORMATS if ending in endings), None)
    if other and not {".safetensors", ".bin"} & set(endings):
        raise UserError(
            f"{label}: its {part} has no other weights: {shown(endings[other])} holds "
            f"{OTHER_FORMATS[other]} weights, which are not read; convert them to .safetensors, or "
            "give a folder that has these"
        )


def refuse_quantised(files):
    """Raise ValueError for weights that are whole numbers: what they stand for is told in no plain checkpoint."""
    names = [name for file in files for name in file.quantised(file.shapes) if not UNUSED.search(name)]
    if names:
        raise ValueError(f"quantised, which is not supported: {shown(names[0])}, ...: use plain weights")


def refuse_endless(settings, files):
    """Raise ValueError for settings of a network beyond what its weights can be of: building it would not end."""
    tensors = sum(len(file.shapes) for file in files)
    most = max(MAX_SETTING, sum(math.prod(shape) for file in files for shape in file.shapes.values()))
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        limit = tensors if "layers" in name else most
        if len(values) > tensors or any(type(n) in (int, float) and not n <= limit for n in values):
            raise ValueError(
                f"{shown(name)}, {shown(value, 40)}, is beyond what weights of {tensors} tensors can be of"
            )


@contextlib.contextmanager
def without_pickles(folder, files, name):
    """Yield `folder`, or, where its weights are in a .bin file (a pickle), a temporary one with them made safe."""
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


# ---------------------------------------------------------------- all of them


def refuse_misfits(path, parts):
    """Raise UserError for parts that are not of one another."""
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
