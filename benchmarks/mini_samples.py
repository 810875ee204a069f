"""Draw 2D samples from the miniature, judge what they show, and write the sheet of the model card.

    python -m benchmarks.mini_samples

It draws eight samples of every pair of colour and object without view words, by the Karras sampler with guidance. It
prints the share of samples that show the right object, and the right object in the right colour, for the pairs of the
training data and for the pairs that are not in it. The sheet, `mini_sd/samples.png`, has one row per object
and one column per octant.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

import pose
from adapt import ScoreAdapter, make_adapter
from karras import karras_sampler, karras_sigmas
from my.config import Config, load
from my.errors import run_main
from my.media import side_by_side, write_png
from my.seeds import torch_rng
from options.sjc import SJCConfig
from toyworld import ALL_PAIRS, COLORS, OBJECTS, UNSEEN_PAIRS, caption
from toyworld import judge as judges

ROOT = Path(__file__).resolve().parent.parent

SHEET = ROOT / "mini_sd" / "samples.png"
SHEET_V_DEG = 75.0  # a little above level


class SamplesConfig(Config):
    """Options of the miniature's 2D samples."""

    n: int = Field(8, gt=0, description="samples of each pair")
    scale: float = Field(3.0, ge=0, description="guidance scale")
    n_steps: int = Field(20, gt=1, description="noise levels of the sampler, which is Heun's")
    seed: int = Field(0, ge=0, description="seed of the noise")


@torch.no_grad()
def draw(adapter: ScoreAdapter, prompts: list[str], cfg: SamplesConfig, stream: str) -> torch.Tensor:
    """Return pictures (n, 3, H, W), RGB in [0, 1], one per prompt; `stream` names their noise."""
    sigma_min, sigma_max = adapter.sigmas[-1].item(), adapter.sigmas[0].item()
    levels = karras_sigmas(cfg.n_steps, sigma_min, sigma_max, round_sigma=adapter.round_sigma)
    x = levels[0] * torch.randn((len(prompts), *adapter.data_shape), generator=torch_rng(cfg.seed, 0, stream))
    *_, x0 = karras_sampler(adapter.denoiser(prompts, cfg.scale), x, levels)
    return adapter.decode(x0.float())


def naming(
    adapter: ScoreAdapter, judge: judges.Judge, cfg: SamplesConfig
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return {pair: (share of samples of the right object, and of the right object in the right colour)}."""
    shares = {}
    for color, obj in tqdm(ALL_PAIRS, desc="sampling", unit="pair"):
        verdict = judge(draw(adapter, [caption(color, obj)] * cfg.n, cfg, f"samples/{color} {obj}"))
        right = judges.hits(verdict, list(COLORS).index(color), list(OBJECTS).index(obj), 0)
        shares[color, obj] = right["object"].float().mean().item(), right["pair"].float().mean().item()
    return shares


def sheet(adapter: ScoreAdapter, cfg: SamplesConfig) -> np.ndarray:
    """Return a picture (H, W, 3): one row per object, in each colour by turns, seen from each octant."""
    views = [pose.view_prompt(np.deg2rad(azimuth), np.deg2rad(SHEET_V_DEG), "octants") for azimuth in range(0, 360, 45)]
    rows = []
    for i, obj in enumerate(tqdm(OBJECTS, desc="sheet", unit="object")):
        color = list(COLORS)[i % len(COLORS)]
        pictures = draw(adapter, [caption(color, obj, view) for view in views], cfg, f"sheet/{obj}")
        rows.append(side_by_side(*pictures.permute(0, 2, 3, 1).numpy()))
    return np.concatenate(rows)


def main(argv: list[str] | None = None) -> None:
    """Write the sheet, and print the shares of samples that show what they should."""
    cfg = load(SamplesConfig, argv, prog="python -m benchmarks.mini_samples", doc=__doc__, config_file=None)
    sd = {"variant": "mini", "precision": "fp32", "prompt": caption(*ALL_PAIRS[0])}
    adapter = make_adapter(SJCConfig(sd=sd), torch.device("cpu"))
    write_png(SHEET, sheet(adapter, cfg))
    shares = naming(adapter, judges.load()[0], cfg)
    for name, unseen in (("seen", False), ("unseen", True)):
        chosen = np.array([s for pair, s in shares.items() if (pair in UNSEEN_PAIRS) == unseen])
        print(
            f"{name} pairs ({len(chosen)}): {chosen[:, 0].mean():.1%} right object, "
            f"{chosen[:, 1].mean():.1%} right object and colour"
        )
    print(f"sheet: {SHEET}")


if __name__ == "__main__":
    run_main(main)
