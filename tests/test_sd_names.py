"""Other spellings of the CompVis layout: each loads as the published one does, number for number."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import crafted
from families.sd import layout, names
from families.sd.options import Options as SDConfig

CLIP, OPEN_CLIP, UNET = layout.CLIP, layout.OPEN_CLIP, layout.UNET
SGM = "conditioner.embedders.0."


def novelai(name):
    return name.replace("transformer.text_model.", "transformer.")


def sgm(name):
    return name.replace("cond_stage_model.", SGM)


SPELLINGS = {
    "NovelAI's of 2022: no level text_model.": (False, novelai),
    "sgm, 1.x": (False, sgm),
    "sgm, 2.x": (True, sgm),
    "sgm without text_model.": (False, lambda n: sgm(novelai(n))),
    "wrapped for training": (False, "module.{}".format),
    "wrapped twice": (True, "module.model.{}".format),
    "below params": (False, "params.{}".format),
    "compiled": (False, lambda n: n.replace(UNET, f"{UNET}_orig_mod.")),
}


@pytest.fixture(scope="module")
def of_version():
    return {v2: crafted.single_file(crafted.small_parts(v2), v2) for v2 in (False, True)}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_are_the_published_one(of_version, tmp_path, spelling):
    v2, spelled = SPELLINGS[spelling]
    published = of_version[v2]
    there = {spelled(name): name for name in published}
    assert set(there) != set(published)
    assert {new: there[name] for new, name in names.published(there).items()} == {name: name for name in published}
    save_file({spelled(name): t for name, t in published.items()}, tmp_path / "a.safetensors")
    options = SDConfig(prediction_type="epsilon", checkpoint=str(tmp_path / "a.safetensors"))
    parts, want = crafted.load(options), crafted.small_parts(v2)
    for part in ("text_encoder", "unet", "vae"):
        got = parts[part].state_dict()
        assert all(torch.equal(got[name], t) for name, t in want[part].state_dict().items())
    assert parts["text_encoder"].config.hidden_act == ("gelu" if v2 else "quick_gelu")


def test_published_names_stay():
    of_file = [
        f"{UNET}out.2.bias",
        f"{CLIP}embeddings.position_ids",
        f"{OPEN_CLIP}ln_final.bias",
        "model_ema.decay",
        "cond_stage_model.transformer.vision_model.x",
        "cond_stage_model.logit_scale",
        "v_pred",
    ]
    assert names.published(of_file) == {name: name for name in of_file}


@pytest.mark.parametrize("level", [True, False], ids=["with text_model.", "without"])
def test_text_encoders_of_folders_with_and_without_the_level(tmp_path, level):
    """Exports of transformers before and after version 5."""
    parts = crafted.small_parts()
    path = crafted.save_folder(parts, tmp_path / "m") / "text_encoder" / "model.safetensors"
    bare = {name.removeprefix("text_model."): t for name, t in load_file(path).items()}
    save_file({"text_model." * level + name: t for name, t in bare.items()}, path, metadata={"format": "pt"})
    loaded = crafted.load(SDConfig(checkpoint=str(tmp_path / "m")))["text_encoder"].state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in parts["text_encoder"].state_dict().items())
