"""Files for the readers to be tried on: small Stable Diffusions in every layout, and pickles that bite.

The only file that has pickles written (`hostile.py` puts some together by hand); nothing of the project reads one but
`my/unpickled.py`.
"""

import io
import os
import pickle
import zipfile

import torch

from families.sd import find, hub, layout, lora, lora_files
from families.sd.load import load_parts
from families.sd.tokenizer import END, clip_tokenizer

# ---------------------------------------------------------------- small models


def small_parts(v2=False, prediction="epsilon", seed=0):
    """The five parts of a Stable Diffusion with random weights and CLIP's real vocabulary: two levels of blocks."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    c = 64 if v2 else 32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                **layout.text_configuration(49408, 64, 77, 128, 2, hidden_act="gelu" if v2 else "quick_gelu")
            )
        )
        unet = UNet2DConditionModel(
            sample_size=256,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(c, 2 * c),
            cross_attention_dim=64,
            attention_head_dim=[1, 2] if v2 else 8,
            use_linear_projection=v2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            sample_size=512,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
        )
        for p in (p for net in (text, unet, vae) for p in net.parameters() if p.ndim == 1):
            torch.nn.init.normal_(p, 1 if p.mean() > 0.5 else 0, 0.1)  # no two biases or norms alike
    return {
        "tokenizer": clip_tokenizer("!" if v2 else END),
        "text_encoder": text.eval(),
        "unet": unet.eval(),
        "vae": vae.eval(),
        "scheduler": DDIMScheduler(**layout.SCHEDULE, prediction_type=prediction),
    }


def save_folder(parts, folder):
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder


def load(options, dtype=torch.float32, empty=False):
    """The parts of the Stable Diffusion that the options mean."""
    found = find.find(options)
    return load_parts(hub.fetch(found.place), found, options, dtype, empty)


def fuse(parts, path, weight=1.0):
    """Add a LoRA, given by its path, to parts."""
    lora.fuse(parts, lora_files.LoRA(path, weight, tuple(lora_files.files_of(path))))


def single_file(parts, v2=False):
    """{name: tensor} of a model in the CompVis layout, with what else published files hold of the text encoder."""
    tensors, stacked = {}, {}
    for part in ("unet", "vae", "text_encoder"):
        parameters = parts[part].state_dict()
        for name, source in layout.sources(part, parameters, parts[part].config, v2).items():
            tensor = parameters[name].clone()
            if source.third is not None:
                stacked.setdefault(source.name, {})[source.third] = tensor
            elif part == "vae" and "attn" in source.name and tensor.ndim == 2:
                tensors[source.name] = tensor[:, :, None, None]
            else:
                tensors[source.name] = tensor
    tensors |= {name: torch.cat([thirds[i] for i in range(3)]) for name, thirds in stacked.items()}
    if not v2:
        return tensors | {layout.CLIP + "embeddings.position_ids": torch.arange(77)[None]}
    last = f"{layout.OPEN_CLIP}transformer.resblocks."
    block = {name.replace(last + "1", last + "2"): t + 1 for name, t in tensors.items() if name.startswith(last + "1")}
    return (
        tensors
        | block
        | {layout.OPEN_CLIP + "text_projection": torch.eye(64), layout.OPEN_CLIP + "logit_scale": torch.tensor(4.6)}
    )


class Callback:
    """What a training leaves in its checkpoint besides tensors."""

    def __init__(self):
        self.best = torch.ones(3)


def save_ckpt(tensors, path, stream=False):
    """Write a checkpoint as Lightning does: callbacks, an optimizer's state and counters beside the tensors."""
    value = {
        "state_dict": tensors,
        "epoch": 3,
        "global_step": 470000,
        "callbacks": {Callback: Callback()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2, 2)}}}],
        "hparams": {"lr": 1e-4},
    }
    torch.save(value, path, _use_new_zipfile_serialization=not stream)
    return path


# ---------------------------------------------------------------- pickles that bite


class Reduce:
    """Pickles as the call function(*args), and what else __reduce__ may return."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


class Attacker(pickle.Pickler):
    """Gives every `Persistent` to the reader as a persistent id."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Persistent) else None


class Persistent:
    def __init__(self, pid):
        self.pid = pid


def dumped(value, protocol=2):
    out = io.BytesIO()
    Attacker(out, protocol).dump(value)
    return out.getvalue()


class WithState:
    def __setstate__(self, state):
        raise AssertionError("executed")

    def __getstate__(self):
        return {"x": 1}


def attacks(canary):
    """{name: (pickle that would make the file `canary`, whether Python's own reader falls for it)}."""
    shell = f"touch {canary}"
    bite = Reduce(os.system, (shell,))
    code = f"open({str(canary)!r}, 'w')"
    text = shell.encode()
    return {
        "reduce": (dumped(bite), True),
        "reduce, protocol 0": (dumped(bite, 0), True),
        "stack global": (dumped(bite, 4), True),
        "eval": (dumped(Reduce(eval, (code,))), True),
        "in a state_dict": (dumped({"state_dict": {"w": bite}}), True),
        "as a key": (dumped({"state_dict": Reduce(dict, ([(bite, 1)],))}), True),
        "deep in lists": (dumped([[[[{"a": ({"b": [bite]},)}]]]]), True),
        "state of an object": (dumped(Reduce(Callback, (), {"x": bite})), True),
        "items of a list": (dumped(Reduce(list, (), None, iter([bite]))), True),
        "items of a dict": (dumped(Reduce(dict, (), None, None, iter([("k", bite)]))), True),
        "inst": (b"(S'" + text + b"'\nios\nsystem\n.", True),
        "obj": (b"(cos\nsystem\nS'" + text + b"'\no.", True),
        "build": (b"cmy.config\nConfig\n)\x81}S'x'\ncos\nsystem\n(S'" + text + b"'\ntRsb.", True),
        "newobj": (b"\x80\x02csubprocess\nPopen\n(](S'touch'\nS'" + str(canary).encode() + b"'\nete\x85\x81.", False),
        "newobj_ex": (b"\x80\x04csubprocess\nPopen\n)}S'args'\nS'" + text + b"'\ns\x92.", False),
        "persistent id": (dumped({"state_dict": {"w": Persistent(bite)}}), False),
        "storage class": (
            dumped(
                {
                    "w": Reduce(
                        torch._utils._rebuild_tensor_v2,
                        (Persistent(("storage", bite, "0", "cpu", 1)), 0, (1,), (1,), False, {}),
                    )
                }
            ),
            False,
        ),
        "backward hooks": (dumped({"w": Reduce(torch._utils._rebuild_parameter, (bite, True, bite))}), True),
        "pickle in a pickle": (dumped(Reduce(pickle.loads, (dumped(bite),))), True),
        "torch's own loader": (dumped(Reduce(torch.storage._load_from_bytes, (dumped(bite),))), False),
        "extension": (b"\x80\x02\x82\x01.", False),
    }


def as_archive(pickled, path):
    """Put a pickle where torch.save would."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path
