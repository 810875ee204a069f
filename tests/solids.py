"""Fields that are filled with solids of known shape and colour, and assets of them."""

import torch

from asset import Asset
from tiny import Affine
from tiny import config as tiny_config
from toyworld import sdf
from voxnerf.field import make_field

STEEP = 400.0  # density per unit of distance inside
SURFACE = 0.6931472  # softplus(0), the density where the signed distance is 0
BOX = ((0.1, 0.0, -0.1), (0.5, 0.4, 0.3))  # centre and half edges of the box of two colours
LOW, HIGH = (0.9, 0.5, 0.1), (0.1, 0.4, 0.8)  # its colours below and above y = 0
RED = (0.8, 0.2, 0.1)


def points_of(field):
    """The centres (n, 3) of the voxels of a field, in the order of its grid."""
    lo, hi = field.aabb
    axes = [lo[i] + (torch.arange(n) + 0.5) / n * (hi[i] - lo[i]) for i, n in enumerate(field.density.shape[:1:-1])]
    return torch.stack(torch.meshgrid(*axes[::-1], indexing="ij")[::-1], dim=-1).reshape(-1, 3)


def solid(distance, color=lambda p: p.new_tensor(RED).expand_as(p), grid=32, kind="V_SJC", steep=STEEP):
    """A field of box [-1, 1]^3 whose surface is where `distance` (n, 3) -> (n,) is 0, coloured by `color` in [0, 1]."""
    field = make_field(kind, [[-1.0] * 3, [1.0] * 3], grid, 3, density_shift=-1.0)
    p = points_of(field)
    with torch.no_grad():
        field.density.copy_((1 - steep * distance(p)).view(field.density.shape))
        field.color.copy_(torch.logit(color(p)).T.reshape(field.color.shape))
    return field


def ball(radius=0.6, center=(0.0, 0.0, 0.0), **kw):
    return solid(lambda p: sdf.sphere(p, center, radius), **kw)


def two_colors(p):
    return torch.where((p[:, 1] < 0)[:, None], p.new_tensor(LOW), p.new_tensor(HIGH))


def box(**kw):
    """The box of two colours."""
    return solid(lambda p: sdf.box(p, *BOX), two_colors, **kw)


def asset_of(field, step=7, **options):
    """An asset of a field of pixels."""
    edge = field.density.shape[-1]
    return Asset(tiny_config(vox={"grid_size": edge}, plain_bg=False, **options), Affine(), field, step)
