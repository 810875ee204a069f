"""What pictures state about the meaning of their colours, and what becomes of it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from my.errors import shown
from voxnerf.pictures import Unreadable, srgb

LIKE_SRGB = 1 / 2.2  # what gAMA is written for sRGB's curve
LINEAR, HDR = 8, {16: "PQ", 18: "HLG"}  # transfer characteristics of cICP (ITU-T H.273, table 3)
PLAIN = (1, 4, 6, 13, 14, 15)  # those that are sRGB's curve, or near it
MATRIX_RGB, FULL = 0, 1


def colour_remarks(mode: str, info: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    """Return {kind: remark} on the profile, gamma and cICP of a picture; raises `Unreadable` for HDR's curves."""
    if mode == "CMYK":
        return {"cmyk": "is CMYK: it is converted as R = (1 - C)(1 - K), without a profile"}
    if "cicp" in facts:
        return _of_cicp(*facts["cicp"])
    if info.get("icc_profile"):
        name = _profile_name(info["icc_profile"])
        return (
            {}
            if "srgb" in name.lower()
            else {
                "profile": f"states the colour profile {name}: its values are taken for sRGB as they stand; convert it "
                "to sRGB if its exact colours matter"
            }
        )
    gamma = stated_gamma(info, facts)
    return {} if gamma is None else {"gamma": f"states gamma {gamma:g}: it is converted to sRGB"}


def stated_gamma(info: dict[str, Any], facts: dict[str, Any]) -> float | None:
    """Return the exponent, value = light^gamma, of a picture that states one unlike sRGB's, or None.

    cICP goes before a profile, a profile before sRGB, and that before gAMA (PNG specification, third edition, 4.3).
    """
    if "cicp" in facts:
        return 1.0 if facts["cicp"][1] == LINEAR else None
    gamma = info.get("gamma", 0)
    if info.get("icc_profile") or "srgb" in info or gamma <= 0 or abs(gamma - LIKE_SRGB) < 0.01:
        return None
    return gamma


def applied_gamma(rgba: np.ndarray, info: dict[str, Any], facts: dict[str, Any]) -> np.ndarray:
    """Return straight RGBA (H, W, 4) in [0, 1] with sRGB's curve, where the picture may state another gamma."""
    gamma = stated_gamma(info, facts)
    if gamma is None:
        return rgba
    light = rgba[..., :3] ** np.float32(1 / gamma)
    return np.concatenate([srgb(light), rgba[..., 3:]], axis=-1)


def _of_cicp(primaries: int, transfer: int, matrix: int, full: int) -> dict[str, str]:
    if transfer in HDR:
        raise Unreadable(
            f"is an HDR picture with the curve {HDR[transfer]}, which is not read; save it as OpenEXR, or "
            "as PNG with sRGB's"
        )
    if transfer == LINEAR:
        return {"gamma": "states linear light: it is converted to sRGB"}
    if primaries == 1 and transfer in PLAIN and (matrix, full) == (MATRIX_RGB, FULL):
        return {}
    return {
        "profile": f"states the colours cICP {primaries}, {transfer}, {matrix}, {full}: its values are taken for "
        "sRGB as they stand; convert it to sRGB if its exact colours matter"
    }


def _profile_name(profile: bytes) -> str:
    from PIL import ImageCms

    try:
        return shown(ImageCms.getProfileDescription(io.BytesIO(profile)).strip(), 40) or "without a name"
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "that is damaged"
