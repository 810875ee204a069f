"""Checkpoints as the published code of SJC leaves them: a dict of tensors, written by torch.save."""

import numpy as np
import torch

from voxnerf.field import make_field

FLAGS = ["--family", "ideal", "--sd.prompt", "a blue duck", "--pose.rend_hw", "8", "--device", "cpu"]


def a_field(kind="V_SJC", grid=6, c=3, **options):
    """A field of random numbers with a texture, and a d_scale that is not 0."""
    options = {"blend_bg_texture": True, "bg_texture_hw": 4, **options}
    rng = torch.Generator().manual_seed(3)
    field = make_field(kind, [[-1.0] * 3, [1.0] * 3], grid, c, generator=rng, **options)
    with torch.no_grad():
        field.density.copy_(torch.randn(field.density.shape, generator=rng))
        field.d_scale.fill_(0.4)
    return field


def tensors_of(field):
    """{name: tensor} of a field as the published code names them."""
    tensors = {name: getattr(field, name).detach().clone() for name in ("density", "color", "d_scale")}
    return tensors if field.bg is None else tensors | {"bg": field.bg.detach().clone()}


def packed(mask):
    """The parts of a mask (Z, Y, X) as bits in an array of numpy."""
    return {"alphaMask.mask": np.packbits(mask.reshape(-1)), "alphaMask.shape": mask.shape}


def save(path, values, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(values, path, **how)
    return path
