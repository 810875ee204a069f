"""Training data for the miniature: poses of the toy world, rendered once, then coloured and captioned per step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import pose
from my.file_system import move
from my.seeds import numpy_rng
from toyworld import (
    BACKGROUND_RANGE,
    COLORS,
    DEGRADATIONS,
    OBJECTS,
    TRAIN_PAIRS,
    caption,
    compose,
    coverage_maps,
    degraded,
)

SIZE = 64
FOV = (50.0, 60.0)
RENDER_BATCH = 16
WORD_SETS = {"sjc": 0.2, "sides": 0.25, "octants": 0.45, None: 0.1}  # share of captions by view words
ALONE_SHARE = 0.25  # share of the captions of bad pictures that say only how they are bad
EMPTY_SHARE = 0.1  # share of captions that are dropped, for classifier-free guidance


def _render_object(obj: str, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return maps (n, 5, SIZE, SIZE) of one object, and its cameras' azimuth and elevation draw (n, 2), radians."""
    torch.set_num_threads(1)
    rng = numpy_rng(seed, 0, f"poses/{obj}")
    draws = [
        (2 * np.pi * rng.random(), np.deg2rad(pose.ELEVATION_SPAN_DEG) * rng.random(), rng.uniform(*FOV))
        for _ in range(n)
    ]
    cameras = [pose.camera_at(a, v, fov=fov) for a, v, fov in draws]
    maps = [coverage_maps(obj, cameras[i : i + RENDER_BATCH], SIZE) for i in range(0, n, RENDER_BATCH)]
    return torch.cat(maps), torch.tensor(draws, dtype=torch.float64)[:, :2]


def cached(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the tensors in the file at `path`; where there is no file, `make` them and write it first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        save_file(make(), scratch)
        move(scratch, path)
    return load_file(path)


def poses(path: Path, n_per_object: int, seed: int) -> dict[str, torch.Tensor]:
    """Return {maps (objects, n, 5, SIZE, SIZE) uint8, angles (objects, n, 2)}, cached in `path`."""

    def render() -> dict[str, torch.Tensor]:
        with ProcessPoolExecutor() as pool:
            jobs = pool.map(partial(_render_object, n=n_per_object, seed=seed), OBJECTS)
            maps, angles = zip(*tqdm(jobs, total=len(OBJECTS), desc="rendering the toy world", unit="object"))
        return {"maps": torch.stack(maps), "angles": torch.stack(angles)}

    return cached(path, render)


def paint(maps: torch.Tensor, color: torch.Tensor, rng: np.random.Generator, bad: str = "") -> torch.Tensor:
    """Return pictures (n, 3, H, W) in [-1, 1]: maps (n, 5, H, W) in colours (n, 3) on random light backgrounds.

    They are made bad where `bad` is a word of DEGRADATIONS.
    """
    behind = random_backgrounds(len(maps), rng)
    return 2 * (degraded(maps, color, behind, bad) if bad else compose(maps, color, behind)) - 1


def random_scenes(
    world: dict[str, torch.Tensor], n: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maps (n, 5, SIZE, SIZE) and colours (n, 3) of random poses of random training pairs."""
    pairs = [TRAIN_PAIRS[i] for i in rng.integers(len(TRAIN_PAIRS), size=n)]
    which = torch.tensor([list(OBJECTS).index(obj) for _, obj in pairs])
    shot = torch.from_numpy(rng.integers(world["maps"].shape[1], size=n))
    return world["maps"][which, shot], torch.tensor([COLORS[c] for c, _ in pairs])


def random_backgrounds(n: int, rng: np.random.Generator) -> torch.Tensor:
    """Return n light backgrounds (n, 3), RGB in [0, 1]."""
    return torch.from_numpy(rng.uniform(*BACKGROUND_RANGE, (n, 3)).astype(np.float32))


def random_pictures(world: dict[str, torch.Tensor], n: int, rng: np.random.Generator) -> torch.Tensor:
    """Return n pictures (n, 3, SIZE, SIZE) in [-1, 1] of random poses of random training pairs."""
    return paint(*random_scenes(world, n, rng), rng)


def random_caption(color: str, obj: str, angles: list[float], rng: np.random.Generator, bad: str = "") -> str:
    """Return a caption for one picture; random view words, no view words, or an empty caption.

    `angles` are the camera's azimuth and elevation draw, radians. `bad` is the word of a bad picture: it stands behind
    the caption, or alone, and the caption is never empty.
    """
    if not bad and rng.random() < EMPTY_SHARE:
        return ""
    if bad and rng.random() < ALONE_SHARE:
        return bad
    words = list(WORD_SETS)[rng.choice(len(WORD_SETS), p=list(WORD_SETS.values()))]
    azimuth, v = angles
    text = caption(color, obj, pose.view_prompt(azimuth, v, words) if words else "")
    return f"{text}, {bad}" if bad else text


def caption_words() -> list[str]:
    """Return every word that a caption can hold, sorted."""
    views = [v for words in pose.VIEW_WORDS for v in pose.all_view_prompts(words)]
    return sorted({w for text in (*views, "a", ",", *DEGRADATIONS, *COLORS, *OBJECTS) for w in text.split()})
