"""Checkpoints of the published code: what they show, what they state, and what is refused."""

import numpy as np
import pytest
import torch

import asset
import pose
from my import config
from my.errors import UserError
from options import found, trained
from options.trained import TrainedConfig
from published_files import FLAGS, a_field, packed, save, tensors_of
from voxnerf.render import render_image

CAMERA = pose.spiral(5)[3]


def opened(path, *flags):
    return asset.open_asset(trained.read(TrainedConfig, [str(path), *FLAGS, *flags], root="/none", prog="p", doc=""))


def rendered(field):
    with torch.no_grad():
        return render_image(field, CAMERA.K(8, 8), CAMERA.c2w, 8, 8)


def refused(path, words, *flags):
    with pytest.raises(UserError, match=words) as caught:
        opened(path, *flags)
    assert "\n" not in str(caught.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", ["run", "run/ckpt/step_10000.pt", "run/ckpt/step_2000.pt"])
def test_it_shows_its_own_field(here, where):
    field, older = a_field(density_shift=-2.0), a_field(grid=5, density_shift=-2.0)
    save(here / "run" / "ckpt" / "step_2000.pt", tensors_of(older))
    save(here / "run" / "ckpt" / "step_10000.pt", tensors_of(field))
    there = opened(here / where, "--vox.density_shift", "-2", "--pose.R", "1.7")
    wanted = older if "2000" in where else field
    for a, b in zip(rendered(there.field), rendered(wanted)):
        assert torch.equal(a, b)
    assert there.n_steps_taken == (2000 if "2000" in where else 10000)
    assert (there.cfg.vox.grid_size, there.cfg.vox.bg_texture_hw, there.cfg.pose.R) == (
        len(wanted.density[0, 0]),
        4,
        1.7,
    )


def test_a_field_without_texture_in_a_box_of_its_own(here):
    field = a_field(grid=(4, 5, 6), blend_bg_texture=False)
    box = torch.tensor([[-1.0, -0.5, -0.7], [0.9, 0.5, 0.7]])
    there = opened(save(here / "a.pt", {**tensors_of(field), "aabb": box})).field
    assert torch.equal(there.aabb, box) and there.bg is None and torch.equal(there.color, field.color)
    assert there.density.shape == (1, 1, 6, 5, 4)


def test_half_precision_and_the_default_options(here):
    tensors = {name: value.half() for name, value in tensors_of(a_field()).items()}
    there = opened(save(here / "step_7.pt", tensors))
    assert there.field.density.dtype == torch.float32 and there.field.density_shift == -1
    assert torch.equal(there.field.color, tensors["color"].float())


def test_latents_need_their_family(here):
    path = save(here / "a.pt", tensors_of(a_field("V_SD", c=4)))
    refused(path, "a.pt: its colours have 4 channels, and the models of --family ideal have 3; give another --family")


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("vox.grid_size", "7", "^--vox.grid_size 7: .*a.pt has 6; leave it out"),
        ("vox.c", "4", "^--vox.c 4: .*a.pt has 3"),
        ("vox.bg_texture_hw", "8", "^--vox.bg_texture_hw 8: .*a.pt has 4"),
        ("vox.blend_bg_texture", "False", "^--vox.blend_bg_texture False: .*a.pt has True"),
        ("vox.bbox_len", "2", "^--vox.bbox_len 2.0: .*a.pt has 1.1"),
        ("gddpm.model", "m_lsun_256", "^--gddpm.model: not read with --family ideal"),
        ("lr", "1", "^--lr: no such option"),
    ],
)
def test_options_that_do_not_fit(here, flag, value, words):
    box = torch.tensor([[-1.1] * 3, [1.1] * 3])
    refused(save(here / "a.pt", {**tensors_of(a_field()), "aabb": box}), words, f"--{flag}", value)


def test_a_preset_gives_way_to_what_the_file_has(here):
    path = save(here / "a.pt", tensors_of(a_field()))
    there = asset.open_asset(
        trained.read(TrainedConfig, [str(path), "--preset", "ideal"], root="/none", prog="p", doc="")
    )
    assert there.cfg.vox.grid_size == 6 and there.backgrounds is None and there.cfg.pose.R == 1.5


def test_a_folder_states_its_own_options(here):
    save(here / "ckpt" / "step_40.pt", tensors_of(a_field()))
    vox = {"grid_size": 6, "density_shift": -3.0}
    config.write(found.SJCConfig(family="ideal", n_steps=50, vox=vox), here / "full_config.yml")
    for where in (".", "ckpt/step_40.pt"):
        source = found.find(where)
        assert (source.step, source.finished, source.cfg.vox.density_shift) == (40, False, -3)
        with pytest.raises(UserError, match="^--pose.R: not read: .* has a full_config.yml, which states it"):
            found.find(where, {"pose.R": config.Given(2.0, "--pose.R")})
    config.write(found.SJCConfig(family="ideal", vox={"grid_size": 9}), here / "full_config.yml")
    with pytest.raises(UserError, match="^full_config.yml: vox.grid_size 9: ckpt/step_40.pt has 6"):
        found.find(".")


# ---------------------------------------------------------------- masks

MASK = np.zeros((6, 6, 6), bool)
MASK[1:3, 2:5, 0:5] = True
SHAPES = {
    "size": torch.Size(MASK.shape),
    "list": list(MASK.shape),
    "tensor": torch.tensor(MASK.shape),
    "array": np.array(MASK.shape),
    "five": (1, 1, *MASK.shape),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_a_packed_mask(here, shape, how):
    values = {**tensors_of(a_field()), **packed(MASK), "alphaMask.shape": SHAPES[shape]}
    there = opened(save(here / "a.pt", values, **how)).field
    assert np.array_equal(there.alpha_mask[0, 0].numpy(), MASK)
    plain = a_field()
    plain.alpha_mask = torch.from_numpy(MASK)[None, None].float()
    assert torch.equal(rendered(there).opacity, rendered(plain).opacity)
    assert not torch.equal(rendered(there).opacity, rendered(a_field()).opacity)


@pytest.mark.parametrize(
    "parts",
    [
        {"alpha_mask": torch.from_numpy(MASK)[None, None].float()},
        {"alphaMask.alpha_volume": torch.from_numpy(MASK)},
        {"alphaMask.mask": torch.from_numpy(np.packbits(MASK)), "alphaMask.shape": torch.tensor(MASK.shape)},
        {"alphaMask.mask": MASK},
        {"alphaMask.mask": torch.from_numpy(MASK.reshape(-1)), "alpha_mask.shape": MASK.shape},
    ],
    ids=range(5),
)
def test_a_mask_in_other_forms(here, parts):
    there = opened(save(here / "a.pt", {**tensors_of(a_field()), **parts})).field
    assert np.array_equal(there.alpha_mask[0, 0].numpy(), MASK)


def test_a_mask_of_a_box_and_a_grid_of_its_own(here):
    """The field has 6 voxels from -1 to 1. The mask has 2 from 0 to 1 along each axis, one of them visible: x in
    [0.5, 1], y in [0, 0.5], z in [0.5, 1]. It overlaps the voxels 4, 5 of x, 3, 4 of y and 4, 5 of z."""
    mask, wanted = np.zeros((2, 2, 2), bool), np.zeros((6, 6, 6), bool)
    mask[1, 0, 1] = True
    wanted[4:6, 3:5, 4:6] = True
    values = {**tensors_of(a_field()), **packed(mask), "alphaMask.aabb": torch.tensor([[0.0] * 3, [1.0] * 3])}
    assert np.array_equal(opened(save(here / "a.pt", values)).field.alpha_mask[0, 0].numpy(), wanted)


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"alphaMask.mask": np.packbits(MASK)}, "has bits, and no shape with it"),
        ({"alphaMask.shape": MASK.shape}, "and no mask with it"),
        ({**packed(MASK), "alphaMask.shape": (6, 6, 7)}, r"has 27 values, and alphaMask.shape is \[6, 6, 7\]"),
        ({**packed(MASK), "alphaMask.shape": (1, 1, 216)}, None),
        ({**packed(MASK), "alphaMask.shape": (1, 1, 2**40)}, "a bit or a value for each voxel"),
        ({**packed(MASK), "alphaMask.shape": (6, -6, -6)}, "neither a tensor nor an array"),
        ({**packed(MASK), "alphaMask.shape": "6"}, "neither a tensor nor an array"),
        ({**packed(MASK), "alphaMask.aabb": torch.ones(2, 3)}, "alphaMask.aabb is no box"),
        ({**packed(MASK), "alphaMask.level": 3}, "alphaMask.level is no known part of a mask"),
        ({**packed(MASK), "alpha_mask": torch.ones(6, 6, 6)}, "alphaMask.mask is no known part"),
        (
            {**packed(MASK), "alphaMask.mask": np.packbits(MASK).astype(">i4")},
            "neither a tensor nor an array|kind that",
        ),
    ],
)
def test_masks_that_are_none(here, parts, words):
    path = save(here / "a.pt", {**tensors_of(a_field()), **parts})
    if words is None:
        assert opened(path).field.alpha_mask is not None
    else:
        refused(path, words)


# ---------------------------------------------------------------- other files


def test_what_is_small_and_not_known_is_noted(here, capsys):
    values = {**tensors_of(a_field()), "step_size": torch.tensor(0.01), "n_voxels": torch.ones(3), "epoch": 4}
    opened(save(here / "a.pt", values))
    assert "not read: step_size, n_voxels, epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        ({"warp": torch.ones(17)}, r"warp \[17\] is not known here, and may change what the field looks like"),
        ({"density": None}, "has no density: it is no checkpoint of the published code"),
        ({"d_scale": torch.ones(1)}, r"d_scale has the shape \[1\]"),
        ({"color": torch.ones(1, 3, 6, 6, 5)}, r"color has the shape \[1, 3, 6, 6, 5\]"),
        ({"color": torch.ones(3, 6, 6, 6)}, r"color has the shape"),
        ({"bg": torch.ones(1, 3, 4, 5)}, r"bg has the shape"),
        ({"density": torch.ones(1, 1, 6, 6, 6, dtype=torch.int32)}, "density has whole numbers"),
        ({"density": torch.full((1, 1, 6, 6, 6), torch.nan)}, "density has numbers that are not finite"),
        ({"d_scale": torch.tensor(torch.inf)}, "d_scale has numbers that are not finite"),
        ({"density": torch.ones(1, 1, 1, 6, 6), "color": torch.ones(1, 3, 1, 6, 6)}, "density has the shape"),
        ({"aabb": torch.zeros(2, 3)}, "aabb is no box"),
        ({"aabb": torch.zeros(7)}, "aabb is no box"),
    ],
)
def test_files_that_do_not_fit(here, change, words):
    values = {name: value for name, value in {**tensors_of(a_field()), **change}.items() if value is not None}
    refused(save(here / "a.pt", values), words)


def test_files_that_are_none(here):
    (here / "a.pt").write_bytes(b"PK\x03\x04 damaged")
    refused("a.pt", "a.pt: not a whole PyTorch archive")
    refused("b.pt", "b.pt: no such file")
    refused(".", "has no full_config.yml: .*; nor has it a ckpt/step_")
    refused("nowhere", "^nowhere: no such file or folder; give the folder of a run, or a checkpoint")
