"""How near a mesh is to the field that it was made of, in views that gave it no colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

import pose
from mesh import Mesh
from mesh.cast import Caster, render, silhouette
from voxnerf.likeness import iou, picture_psnr
from voxnerf.rays import pixel_rays
from voxnerf.render import CHUNK

if TYPE_CHECKING:
    from asset import Asset

HEIGHTS_DEG = (25.0, 50.0, 75.0, 95.0)  # elevation draws of the views: what the training's cameras see
N_AROUND, TURN = 3, 0.4  # views at each height; a turn, in their spacings, away from the views that give colours
SILHOUETTE_HW = 128  # edge of the silhouettes, pixels
OPAQUE = 0.5  # the field's silhouette is where it is more opaque
SMALLEST = 64  # edge in pixels of the pictures of a field of pixels, at least
SUBPIXELS = 3  # rays per pixel edge of the mesh's pictures


def held_out(asset: Asset) -> list[pose.Camera]:
    """Return the cameras of the comparison: rings, each turned against the one below it by a part of its spacing."""
    p, spacing = asset.cfg.pose, 2 * np.pi / N_AROUND
    return [
        pose.camera_at((k + TURN + ring / len(HEIGHTS_DEG)) * spacing, np.deg2rad(v), p.R, p.FoV)
        for ring, v in enumerate(HEIGHTS_DEG)
        for k in range(N_AROUND)
    ]


@torch.no_grad()
def empty_picture(asset: Asset, camera: pose.Camera, hw: int | None = None) -> np.ndarray:
    """Return the picture (H, W, 3) in [0, 1] of the background alone: what `asset.view` shows where nothing is."""
    from asset import TEST_BACKGROUND

    hw = hw or asset.cfg.pose.rend_hw
    x = asset.background(TEST_BACKGROUND, hw)
    if x is None:
        x = asset.field.background(pixel_rays(hw, hw, camera.K(hw, hw), camera.c2w, device=asset.field.aabb.device)[1])
    return asset.adapter.decode(x.T.reshape(1, -1, hw, hw))[0].permute(1, 2, 0).cpu().numpy()


@torch.no_grad()
def against_field(asset: Asset, mesh: Mesh) -> tuple[float, float]:
    """Return how near a mesh is to its field: the IoU of the silhouettes, and the PSNR in dB of the pictures.

    They are means over the views of `held_out`. The mesh stands before the picture of the background alone. A latent
    field is decoded at the size that the training rendered.
    """
    caster = Caster(mesh.vertices, mesh.faces, asset.adapter.device)
    hw = None if asset.latent else max(SMALLEST, asset.cfg.pose.rend_hw)
    pictures, silhouettes = [], []
    for camera in held_out(asset):
        picture, *_ = asset.view(camera, hw)
        own = render(mesh, camera, picture.shape[0], SUBPIXELS, empty_picture(asset, camera, hw), caster)
        pictures.append((own, picture))
        opacity = asset.render(camera, SILHOUETTE_HW, chunk=CHUNK).opacity.cpu().numpy()
        silhouettes.append((silhouette(caster, camera, SILHOUETTE_HW) > OPAQUE, opacity > OPAQUE))
    overlap = iou(*(np.stack(x) for x in zip(*silhouettes)))
    likeness = picture_psnr(*(np.stack(x) for x in zip(*pictures)))
    return float(overlap.mean()), float(likeness.mean())
