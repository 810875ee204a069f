"""Train the miniature's autoencoder: 64x64 pictures to 4x16x16 latents.

    python -m training.autoencoder

This takes about 25 minutes on a CPU, the rendering of its pictures included. It can be stopped at any time; the same
command continues from the newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL
from pydantic import Field

from my.config import Config, load
from my.errors import run_main
from my.seeds import numpy_rng, torch_rng
from toyworld import compose
from training import dataset
from training.loop import MINI, SCRATCH, Schedule, train

ZOOM, SHIFT = (0.8, 1.25), 0.125  # of latents and pictures: factors; at most, in shares of half an edge (4 pixels)
VAL_STEP = -1  # the step whose random stream draws the validation pictures


class AutoencoderConfig(Config):
    """Options of the autoencoder's training."""

    n_steps: int = Field(4500, gt=0, description="optimisation steps")
    batch: int = Field(16, gt=0, description="pictures per step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    kl_weight: float = Field(3e-5, ge=0, description="weight of the KL term, per latent value")
    poses_per_object: int = Field(1200, gt=0, description="rendered poses of each object")
    seed: int = Field(0, ge=0, description="seed of weights and data")
    work: str = Field(str(SCRATCH), description="folder for the rendered world and checkpoints")
    out: str = Field(str(MINI), description="folder of the model; its vae/ is written")


def build() -> AutoencoderKL:
    """Return the untrained autoencoder (f = 4, 4 latent channels)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=dataset.SIZE,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        mid_block_add_attention=False,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )


def moved(x: torch.Tensor, zoom: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return images x (n, C, h, w) zoomed by (n,) and shifted by (n, 2), in shares of half an edge; bilinear."""
    theta = torch.cat([torch.diag_embed(1 / zoom[:, None].expand(-1, 2)), shift[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def loss_at(step: int, vae: AutoencoderKL, world: dict[str, torch.Tensor], cfg: AutoencoderConfig) -> torch.Tensor:
    """Return the loss of a step.

    It is the absolute and the squared error of pictures, the absolute error of their differences between neighbouring
    pixels, and the KL divergence (Kingma and Welling, arXiv 1312.6114) per latent value.

    A field of latents blends and moves them as pictures blend and move. So half of the latents z are changed first:
    the background behind the object becomes another, z + (1 - alpha) (z_other - z_background), with the object's
    opacity alpha in a latent's cell; then the whole is zoomed and shifted. They must decode to the picture that was
    changed in the same way. The second idea is that of EQ-VAE, arXiv 2502.09509.
    """
    rng = numpy_rng(cfg.seed, step, "pictures")
    maps, color = dataset.random_scenes(world, cfg.batch, rng)
    n = cfg.batch // 2
    behind, other = dataset.random_backgrounds(cfg.batch, rng), dataset.random_backgrounds(n, rng)
    zoom = torch.from_numpy(rng.uniform(*ZOOM, n).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-SHIFT, SHIFT, (n, 2)).astype(np.float32))

    x = 2 * compose(maps, color, behind) - 1
    plain = 2 * torch.cat([behind[:n], other])[:, :, None, None].expand(-1, -1, *x.shape[2:]) - 1
    both = torch.cat([x, plain]).contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(both).latent_dist
    z, z_behind, z_other = posterior.sample(torch_rng(cfg.seed, step, "posterior")).split([len(x), n, n])

    alpha = F.avg_pool2d(maps[:n, 4:].float() / 255, x.shape[-1] // z.shape[-1])
    z = torch.cat([moved(z[:n] + (1 - alpha) * (z_other - z_behind), zoom, shift), z[n:]])
    x = torch.cat([moved(2 * compose(maps[:n], color[:n], other) - 1, zoom, shift), x[n:]])
    error = vae.decode(z.contiguous(memory_format=torch.channels_last)).sample - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error.abs().mean() + error.square().mean() + edges + cfg.kl_weight * kl


@torch.no_grad()
def finish(vae: AutoencoderKL, world: dict[str, torch.Tensor], cfg: AutoencoderConfig) -> None:
    """Set the scale of latents, print the validation PSNR, and save in half precision."""
    x = dataset.random_pictures(world, 512, numpy_rng(cfg.seed, VAL_STEP, "pictures"))
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    mse = torch.cat([vae.decode(part).sample for part in z.split(64)]).sub(x).div(2).square().mean()
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 6))
    print(
        f"PSNR {-10 * mse.log10().item():.2f} dB, latent std {z.std():.4f}, "
        f"channel means {[round(v, 3) for v in (z.mean((0, 2, 3)) / z.std()).tolist()]} of it"
    )
    vae.half().save_pretrained(Path(cfg.out) / "vae")


def main(argv: list[str] | None = None) -> None:
    """Render the world where that is not done, train, and write the autoencoder."""
    cfg = load(AutoencoderConfig, argv, prog="python -m training.autoencoder", doc=__doc__)
    (Path(cfg.out) / "vae").mkdir(parents=True, exist_ok=True)  # where it cannot be made, that is told before the work
    world = dataset.poses(Path(cfg.work) / "poses.safetensors", cfg.poses_per_object, cfg.seed)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # diffusers initialises from the global generator
        vae = build()
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # a decorator of diffusers loses its signature
    schedule = Schedule(cfg.n_steps, cfg.lr)
    train(vae, lambda step: loss_at(step, vae, world, cfg), schedule, Path(cfg.work) / "autoencoder")
    finish(vae, world, cfg)


if __name__ == "__main__":
    run_main(main)
