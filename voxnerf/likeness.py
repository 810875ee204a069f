"""How near a picture is to the truth, over the pixels that count."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

MAX_PSNR = 100.0  # dB, that of equal pictures
WINDOW = 11  # pixels, the edge of SSIM's window


def mse(a: torch.Tensor, b: torch.Tensor, usable: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean squared error () of images (H, W, 3), over the pixels of `usable` (H, W) bool if it is given."""
    return F.mse_loss(a, b) if usable is None else F.mse_loss(a[usable], b[usable])


def psnr(mse: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratios, dB, at most MAX_PSNR, of mean squared errors of values in [0, 1]."""
    return -10 * torch.log10(mse.clamp(min=10 ** (-MAX_PSNR / 10)))


def picture_psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the PSNR in dB of each picture a (n, ...) against b (n, ...), in [0, 1]; MAX_PSNR if they are equal."""
    error = np.square(a.astype(np.float64) - b).reshape(len(a), -1).mean(axis=1)
    return psnr(torch.from_numpy(error)).numpy()


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union of each pair of masks a, b (n, H, W) bool; 1 where both are empty."""
    union = (a | b).sum(axis=(1, 2))
    return np.where(union, (a & b).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def colour_errors(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (error, saturation) (n,) of the colours of pictures a against b (n, H, W, 3) in [0, 1].

    error: mean absolute difference of channels.  saturation: mean chroma of a less that of b; above 0, a is more vivid.
    Chroma is a pixel's largest channel less its smallest. Means are over the pixels of `where` (n, H, W) bool; both are
    NaN for a picture without any.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    n = where.sum(axis=(1, 2))
    with np.errstate(invalid="ignore"):
        differences = np.abs(a - b).mean(axis=3), np.ptp(a, axis=3) - np.ptp(b, axis=3)
        error, saturation = ((each * where).sum(axis=(1, 2)) / n for each in differences)
    return error, saturation


def ssim(a: torch.Tensor, b: torch.Tensor, usable: torch.Tensor | None = None) -> float:
    """Return the structural similarity of two images (H, W, 3) in [0, 1] (Wang et al. 2004); NaN below 11 pixels.

    With `usable` (H, W) bool it is the mean over the windows of 11 x 11 pixels that lie in the images and hold
    usable pixels only; NaN where there is none.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(a.shape[:2]) < WINDOW:
        return math.nan
    a, b = (image.permute(2, 0, 1)[None] for image in (a, b))
    mean, similarity = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    if usable is None:
        return mean.item()
    whole = F.max_pool2d((~usable)[None, None].float(), WINDOW, stride=1)[0, 0] == 0  # a window at each inner pixel
    edge = WINDOW // 2
    return similarity[0, :, edge:-edge, edge:-edge][:, whole].mean().item()
