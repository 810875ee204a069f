"""Train the miniature's autoencoder: 64x64 pictures to 4x16x16 latents.

    python -m mini_sd.train_autoencoder

About 25 minutes on a CPU, the rendering of its pictures included. Stop it at any time: the same
command goes on where it was.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from pydantic import Field

from mini_sd import data
from mini_sd.training import Schedule, train
from my.config import Config, load
from my.errors import run_main
from my.seeds import numpy_rng, torch_rng

HERE = Path(__file__).parent
VAL_STEP = -1  # the random stream of the validation pictures


class AutoencoderConfig(Config):
    """Options of the autoencoder's training."""

    n_steps: int = Field(4500, gt=0, description="optimisation steps")
    batch: int = Field(16, gt=0, description="pictures a step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    kl_weight: float = Field(3e-5, ge=0, description="weight of the KL term, per latent value")
    poses_per_object: int = Field(1200, gt=0, description="rendered poses of each object")
    seed: int = Field(0, ge=0, description="seed of weights and data")
    work: str = Field(str(HERE / "scratch"), description="folder for the rendered world and checkpoints")


def build():
    """Return the untrained autoencoder (f = 4, 4 latent channels)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=data.SIZE,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        norm_num_groups=8,
        mid_block_add_attention=False,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )


def loss_at(step, vae, world, cfg):
    """Return the loss of a step: absolute and squared error of pictures and of their gradients, and KL."""
    x = data.random_pictures(world, cfg.batch, numpy_rng(cfg.seed, step, "pictures"))
    x = x.contiguous(memory_format=torch.channels_last)
    posterior = vae.encode(x).latent_dist
    error = vae.decode(posterior.sample(torch_rng(cfg.seed, step, "posterior"))).sample - x
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return error.abs().mean() + error.square().mean() + edges + cfg.kl_weight * kl


@torch.no_grad()
def finish(vae, world, cfg):
    """Set the latents' scale, report the validation PSNR and save in half precision."""
    x = data.random_pictures(world, 512, numpy_rng(cfg.seed, VAL_STEP, "pictures"))
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    mse = torch.cat([vae.decode(part).sample for part in z.split(64)]).sub(x).div(2).square().mean()
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 6))
    print(
        f"PSNR {-10 * mse.log10().item():.2f} dB, latent std {z.std():.4f}, "
        f"channel means {[round(v, 3) for v in (z.mean((0, 2, 3)) / z.std()).tolist()]} of it"
    )
    vae.half().save_pretrained(HERE / "vae")


def main(argv=None):
    cfg = load(AutoencoderConfig, argv, prog="train_autoencoder", doc=__doc__)
    world = data.poses(Path(cfg.work) / "poses.safetensors", cfg.poses_per_object, cfg.seed)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # diffusers initialises from the global generator
        vae = build().to(memory_format=torch.channels_last)
    schedule = Schedule(cfg.n_steps, cfg.lr)
    train(vae, lambda step: loss_at(step, vae, world, cfg), schedule, Path(cfg.work) / "autoencoder")
    finish(vae, world, cfg)


if __name__ == "__main__":
    run_main(main)
