"""Train the miniature's autoencoder: 64x64 pictures to 4x16x16 latents.

    python -m training.autoencoder

This takes about 25 minutes on a CPU, the rendering of its pictures included. It can be stopped at any time; the same
command continues from the newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models import AutoencoderKL
from pydantic import Field

from my.config import Config, load
from my.errors import run_main
from my.seeds import numpy_rng, torch_rng
from training import dataset
from training.loop import MINI, SCRATCH, Schedule, train

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


def loss_at(step: int, vae: AutoencoderKL, world: dict[str, torch.Tensor], cfg: AutoencoderConfig) -> torch.Tensor:
    """Return the loss of a step.

    It is the absolute and the squared error of pictures, the absolute error of their differences between neighbouring
    pixels, and the KL divergence (Kingma and Welling, arXiv 1312.6114) per latent value.
    """
    x = dataset.random_pictures(world, cfg.batch, numpy_rng(cfg.seed, step, "pictures"))
    x = x.contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample(torch_rng(cfg.seed, step, "posterior"))).sample - x
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
