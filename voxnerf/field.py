"""Voxel radiance fields: density and colour stored in a box, read by trilinear sampling.

Grids are (1, C, Z, Y, X) and cell-centred: a voxel is a cube with its value at its centre, and
outside the grid the value is 0. Points are world units, xyz. Source: the voxel field of SJC
(arXiv 2212.00774, section 5 and supplement).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from my.exact import exact_device
from voxnerf.sh import N_BASIS, SH_0, sh_basis

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "raw": lambda f: f,
    "sigmoid": torch.sigmoid,
    "signed_sigmoid": lambda f: 2 * torch.sigmoid(f) - 1,
}
SH_SCALE = 0.3  # factor of all harmonics but the constant one: a step of the optimizer moves them this much less
OCCUPIED_ALPHA = 0.08  # a voxel is occupied if it is more opaque than this, unless asked for
FLOATER = 0.05  # share of all occupied voxels below which a detached part is no part of the object
FOG, PART = 0.2, 1 / 32  # fog is what hides less than this share behind this part of the box's edge


class VoxRF(nn.Module):
    """Voxel field with colour sigmoid(f) in [0, 1], before a white background.

    Args:
        aabb: (2, 3) min and max corner of the box, xyz, world units.
        grid_size: voxels along the longest edge (the others in proportion), or (X, Y, Z).
        c: colour channels C.
        step_ratio: marching step in mean voxel edges.
        density_shift: offset of the density before its softplus.
        ray_march_weight_thres: a sample whose weight is not above this has zero colour.
        blend_bg_texture: learn a background `bg` instead of the class's constant one.
        bg_texture_hw: h, edge of that (1, C, h, h) texture.
        view_dependent: a colour channel has 9 features, the factors of the spherical harmonics of degree 0 to 2 of the
            ray's direction; else it has one.
        generator: source of the initial colours and texture, on `device`.
    Raises ValueError for a box or a grid without volume.
    """

    bg_value = 1.0  # colour of a background without texture
    activation = "sigmoid"  # the key of ACTIVATIONS that turns features into colours
    aabb: torch.Tensor  # (2, 3)
    voxels_per_unit: torch.Tensor  # (3,) float64, xyz, on `exact_device`
    alpha_mask: torch.Tensor | None  # (1, 1, Z, Y, X) of 0 and 1; None until `update_alpha_mask`
    sh_scale: torch.Tensor  # (9,)
    bg: nn.Parameter | None  # (1, C, h, h)

    def __init__(
        self,
        aabb: np.ndarray | torch.Tensor | Sequence[Sequence[float]],
        grid_size: int | Sequence[int],
        c: int = 3,
        step_ratio: float = 0.5,
        density_shift: float = -1.0,
        ray_march_weight_thres: float = 1e-4,
        blend_bg_texture: bool = False,
        bg_texture_hw: int = 64,
        view_dependent: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        box = torch.as_tensor(aabb, dtype=torch.float64).cpu()
        size_x, size_y, size_z = _grid_shape(box, grid_size)
        edges = (box[1] - box[0]) / torch.tensor([size_x, size_y, size_z])
        self.voxel_edge = edges.mean().item()  # plain floats: reading them never waits for the device
        self.box_diagonal = (box[1] - box[0]).norm().item()
        self.step_size = step_ratio * self.voxel_edge
        self.density_shift = density_shift
        self.ray_march_weight_thres = ray_march_weight_thres
        self.register_buffer("aabb", box.to(**kw))
        self.voxels_per_unit = (1 / edges).to(exact_device(device))
        self.register_buffer("alpha_mask", None)
        self.d_scale = nn.Parameter(torch.zeros((), **kw))
        self.density = nn.Parameter(torch.zeros(1, 1, size_z, size_y, size_x, **kw))
        color = torch.randn(1, c, size_z, size_y, size_x, generator=generator, **kw)
        if view_dependent:
            color = from_all_sides(color)
        self.color = nn.Parameter(color.contiguous(memory_format=torch.channels_last_3d))
        self.c, self.view_dependent = c, view_dependent
        self.register_buffer("sh_scale", torch.tensor([1.0] + [SH_SCALE] * (N_BASIS - 1), **kw), persistent=False)
        self.bg = None
        if blend_bg_texture:
            h = bg_texture_hw
            self.bg = nn.Parameter(0.5 * torch.randn(1, c, h, h, generator=generator, **kw))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VoxRF:
        """Change all tensors as `to` does; voxels_per_unit follows to the device, and stays float64."""
        super()._apply(fn, recurse)
        self.voxels_per_unit = self.voxels_per_unit.to(exact_device(self.aabb.device))
        return self

    def to_color(self, f: torch.Tensor) -> torch.Tensor:
        """Return the colour of features f (any shape)."""
        return ACTIVATIONS[self.activation](f)

    def interpolate(self, grid: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Return the values (n, C) of `grid` (1, C, Z, Y, X) at `points` (n, 3): trilinear, zeros outside."""
        lo, hi = self.aabb
        uvw = (points - lo) / (hi - lo) * 2 - 1
        return F.grid_sample(grid, uvw[None, None, None], align_corners=False)[0, :, 0, 0].T

    def sigma(self, points: torch.Tensor) -> torch.Tensor:
        """Return the density (n,), per world unit, at `points` (n, 3)."""
        return self._to_sigma(self.interpolate(self.density, points)[:, 0])

    def _to_sigma(self, density: torch.Tensor) -> torch.Tensor:
        return F.softplus(self.d_scale.exp() * density + self.density_shift)

    def features(self, points: torch.Tensor, rays_d: torch.Tensor) -> torch.Tensor:
        """Return the colours (n, C) at `points` (n, 3) as unit directions `rays_d` (n, 3) see them."""
        f = self.interpolate(self.color, points).unflatten(1, (self.c, -1))  # (n, C, n_basis)
        return self.to_color((f * self.basis(rays_d)[:, None]).sum(dim=2))

    def basis(self, rays_d: torch.Tensor) -> torch.Tensor:
        """Return the factors (n, n_basis) that a channel's features have for directions `rays_d` (n, 3)."""
        if not self.view_dependent:
            return self.color.new_ones(len(rays_d), 1)
        return sh_basis(rays_d).to(self.color) * self.sh_scale

    def background(self, rays_d: torch.Tensor) -> torch.Tensor:
        """Return the background (n, C) that unit directions `rays_d` (n, 3) see: bilinear, zeros outside the texture.

        It is a product of matrices, whose gradient, unlike that of `grid_sample`, is the same every time on CUDA.
        """
        if self.bg is None:
            return self.color.new_full((len(rays_d), self.c), self.bg_value)
        h = self.bg.shape[-1]
        at = ((background_uv(rays_d).to(self.bg) + 1) * h - 1) / 2  # (n, 2) texels, x and y
        i = torch.arange(h, dtype=at.dtype, device=at.device)
        x, y = (1 - (at[..., None] - i).abs()).clamp(min=0).unbind(1)  # weights (n, h) of columns and of rows
        rows = y @ self.bg[0].transpose(0, 1).flatten(1)  # (n, C * h)
        return self.to_color((rows.view(-1, self.c, h) * x[:, None]).sum(2))

    def occupied(self, points: torch.Tensor) -> torch.Tensor:
        """Return whether the mask lets rays see samples at `points` (n, 3), (n,) bool; there must be a mask."""
        assert self.alpha_mask is not None
        return self.interpolate(self.alpha_mask, points)[:, 0] > 0

    @torch.no_grad()
    def update_alpha_mask(self, speck: float = 0.0, least: float = OCCUPIED_ALPHA) -> None:
        """Set `alpha_mask` (1, 1, Z, Y, X) to 1 where a voxel or a neighbour is occupied, else to 0.

        A voxel is occupied if its opacity is above `least`. A connected part that has less than the share `speck` of
        all occupied voxels does not count as occupied.
        """
        alpha = -torch.expm1(-self._to_sigma(self.density) * self.voxel_edge)
        occupied = (alpha > least).to(alpha.dtype)
        if speck:
            occupied = without_specks(occupied, speck)
        self.alpha_mask = F.max_pool3d(occupied, kernel_size=3, stride=1, padding=1)

    def clear_fog(self) -> None:
        """Let rays see only what is near an occupied voxel, and what they saw before.

        Thin fog is so left out, and what floats apart from the object. A field without occupied voxels stays as it is.
        """
        before = self.alpha_mask
        part = PART * self.box_diagonal / 3**0.5 / self.voxel_edge  # in voxels
        self.update_alpha_mask(FLOATER, 1 - (1 - FOG) ** (1 / part))
        mask = self.alpha_mask
        assert mask is not None
        mask = mask if before is None else mask * before
        self.alpha_mask = mask if mask.any() else before

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mask = state_dict.get(prefix + "alpha_mask")  # a checkpoint may hold one or not
        self.alpha_mask = None if mask is None else torch.empty_like(self.density)
        super()._load_from_state_dict(state_dict, prefix, *args)


class V_SJC(VoxRF):
    """Voxel field with colour 2 sigmoid(f) - 1 in [-1, 1], the range of pixel diffusion models."""

    bg_value = 0.0
    activation = "signed_sigmoid"


class V_SD(VoxRF):
    """Voxel field whose colour is the feature itself: a Stable Diffusion latent."""

    bg_value = 0.0
    activation = "raw"


FIELDS = {"VoxRF": VoxRF, "V_SJC": V_SJC, "V_SD": V_SD}


def make_field(model_type: str, *args: Any, **kwargs: Any) -> VoxRF:
    """Return a new field of kind `model_type` with the other arguments; raises ValueError for a kind not in FIELDS."""
    if model_type not in FIELDS:
        raise ValueError(f"model_type must be one of {', '.join(FIELDS)}, got {model_type!r}")
    return FIELDS[model_type](*args, **kwargs)


def without_specks(occupied: torch.Tensor, share: float) -> torch.Tensor:
    """Return a grid (1, 1, Z, Y, X) of 0 and 1 without the connected parts that have less than `share` of its ones.

    Voxels that share a corner are connected.
    """
    from scipy.ndimage import label

    parts, _ = label(occupied[0, 0].cpu().numpy(), np.ones((3, 3, 3)))  # 0 is not occupied
    sizes = np.bincount(parts.ravel())
    kept = sizes >= share * sizes[1:].sum()
    kept[0] = False
    return torch.from_numpy(kept[parts])[None, None].to(occupied)


def from_all_sides(color: torch.Tensor) -> torch.Tensor:
    """Return view-dependent features (1, 9 C, Z, Y, X) that show the colour of (1, C, Z, Y, X) in every direction."""
    others = color.new_zeros(1, color.shape[1], N_BASIS - 1, *color.shape[2:])
    return torch.cat([color[:, :, None] / SH_0, others], dim=2).flatten(1, 2)


def background_uv(rays_d: torch.Tensor) -> torch.Tensor:
    """Return the texture coordinates uv (n, 2) in [-1, 1] of unit directions `rays_d` (n, 3).

    u = 2 atan2(sqrt(x^2 + y^2), z) / pi - 1 and v = atan2(y, x) / pi.
    """
    x, y, z = rays_d.unbind(-1)
    return torch.stack([2 / math.pi * torch.atan2(torch.hypot(x, y), z) - 1, torch.atan2(y, x) / math.pi], dim=-1)


def _grid_shape(aabb: torch.Tensor, grid_size: int | Sequence[int]) -> list[int]:
    """Return the voxel counts (X, Y, Z) of a box (2, 3) for an int or an (X, Y, Z) grid size."""
    if aabb.shape != (2, 3) or not (aabb[1] > aabb[0]).all():
        raise ValueError(f"aabb must be [min xyz, max xyz] with min < max, got {aabb.tolist()}")
    if isinstance(grid_size, Sequence):
        shape = [int(n) for n in grid_size]
    else:
        edges = aabb[1] - aabb[0]
        shape = [max(1, round(n)) for n in (int(grid_size) * edges / edges.max()).tolist()] if grid_size > 0 else []
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"grid_size must be a positive int or three (X, Y, Z), got {grid_size}")
    return shape
