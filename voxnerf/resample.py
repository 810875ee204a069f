"""A field as the beginning of another one: of another grid, box, density shift, kind of colour or background."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from voxnerf.field import VoxRF

CLEAR = 0.01  # opacity of the whole box, from corner to corner, where nothing is known to be in it


@torch.no_grad()
def begin_from(field: VoxRF, old: VoxRF) -> list[str]:
    """Give `field` what `old` has, and return notes on what differs, for a person.

    Grids are resampled trilinearly in world units. The scale of the old density, `d_scale`, and the difference of the
    density shifts are folded into the new density, so that `field` has the old sigma, and d_scale 0. A voxel outside
    the old box, or hidden by the old mask, is as good as empty. A background texture is resampled bilinearly.
    Both have colours of one space, and `old` has none below 0 where `field` cannot: `options.begin` refuses others.
    """
    points = voxel_centres(field)
    lo, hi = old.aabb
    inside = ((points >= lo) & (points <= hi)).all(1)
    if old.alpha_mask is not None:
        inside &= old.occupied(points)
    shape = field.density.shape[2:]
    raw = old.d_scale.exp() * sampled(old, old.density, points)[:, 0] + old.density_shift
    density = torch.where(inside, raw, clear_density(field)) - field.density_shift
    field.density.copy_(density.view(1, 1, *shape))
    field.d_scale.zero_()
    features = sampled(old, old.color, points)
    color = convert(features, old, field).T.reshape(1, -1, *shape)
    field.color.copy_(torch.where(inside.view(1, 1, *shape), color, field.color))
    return [*notes_on_box(field, old), *begin_background(field, old)]


def convert(features: torch.Tensor, old: VoxRF, field: VoxRF) -> torch.Tensor:
    """Return the features of `field` whose colour is that of the features of `old`, of any shape.

    From s = sigmoid(f) in [0, 1] to 2 sigmoid(g) - 1 = s it is g = log(1 + s) - log(1 - s).
    """
    if old.activation == field.activation:
        return features
    return torch.sigmoid(features).log1p() - F.logsigmoid(-features)


def clear_density(field: VoxRF) -> float:
    """Return what the softplus of a density takes where a ray through the whole box is to be as clear as CLEAR."""
    sigma = -math.log1p(-CLEAR) / field.box_diagonal
    return math.log(math.expm1(sigma))


def voxel_centres(field: VoxRF) -> torch.Tensor:
    """Return the centres (Z * Y * X, 3) of a field's voxels, xyz, world units; x is the fastest."""
    shape = field.density.shape[2:]
    lo, hi = field.aabb
    axes = [lo[a] + (torch.arange(n, device=lo.device) + 0.5) * (hi[a] - lo[a]) / n for a, n in enumerate(shape[::-1])]
    z, y, x = torch.meshgrid(axes[2], axes[1], axes[0], indexing="ij")
    return torch.stack([x, y, z], dim=-1).view(-1, 3)


def sampled(old: VoxRF, grid: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return the values (n, C) of a grid of `old` at `points` (n, 3): trilinear, at the border those of the border."""
    lo, hi = old.aabb
    uvw = (points - lo) / (hi - lo) * 2 - 1
    return F.grid_sample(grid, uvw[None, None, None], padding_mode="border", align_corners=False)[0, :, 0, 0].T


def notes_on_box(field: VoxRF, old: VoxRF) -> list[str]:
    """Return what to say where the boxes or the grids differ."""
    notes = []
    if not torch.allclose(field.aabb, old.aabb):
        fits = bool((field.aabb[0] <= old.aabb[0]).all() and (field.aabb[1] >= old.aabb[1]).all())
        outside = "what is outside the old box begins empty" if fits else "what is outside the new box is cut off"
        notes.append(f"the box is {spelled(old.aabb)} there, {spelled(field.aabb)} here: {outside}")
    if field.density.shape != old.density.shape:
        there, here = (" x ".join(map(str, reversed(f.density.shape[2:]))) for f in (old, field))
        notes.append(f"the grid is resampled from {there} voxels to {here}")
    if old.alpha_mask is not None:
        notes.append("what its mask hides begins empty")
    return notes


def spelled(box: torch.Tensor) -> str:
    """Return the corners of a box (2, 3) in words, shortly where it is a cube round the origin."""
    half = box[1].tolist()
    if len(set(half)) == 1 and box[0].tolist() == [-x for x in half]:
        return f"of half edge {half[0]:g}"
    return f"from {[round(x, 4) for x in box[0].tolist()]} to {[round(x, 4) for x in half]}"


def begin_background(field: VoxRF, old: VoxRF) -> list[str]:
    """Give `field` the background texture of `old`, and return what to say where one of both has none."""
    if field.bg is None:
        return [] if old.bg is None else ["its background texture is left out: this run learns none"]
    if old.bg is None:
        return ["it has no background texture: this one begins as in any run"]
    texture = convert(old.bg, old, field)
    if texture.shape != field.bg.shape:
        texture = F.interpolate(texture, field.bg.shape[2:], mode="bilinear", align_corners=False)
    field.bg.copy_(texture)
    return []
