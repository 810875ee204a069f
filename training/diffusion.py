"""Train the miniature's text encoder and UNet on cached latents, then write the whole diffusers folder.

    python -m training.diffusion

This needs the autoencoder of `training.autoencoder`, and takes about 70 minutes on one CPU core. It can be stopped at
any time; the same command continues from the newest checkpoint. `--export True` writes the averaged weights of the
newest checkpoint without training further.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from pydantic import Field
from torch.nn.functional import mse_loss
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from my import checkpoint
from my.config import Config, load
from my.errors import UserError, run_main
from my.seeds import numpy_rng, torch_rng
from toyworld import COLORS, DEGRADATIONS, OBJECTS, TRAIN_PAIRS
from training import dataset, tokenizer
from training.loop import MINI, SCRATCH, Schedule, load_averaged, train

WIDTH = 128  # of the text encoder, and of the UNet's cross-attention
ENCODE_BATCH = 64
BAD = ("", *DEGRADATIONS)  # how a picture is bad
BAD_STRIDE = 24  # of the poses, each word of BAD has one in this many
CKPT = "diffusion"
ENTRIES_IN_3D, SHARE_IN_3D = (150, 970), 0.5  # of the noise table, which text to 3D asks for; so many draws are in it


class DiffusionConfig(Config):
    """Options of the text encoder's and UNet's training."""

    n_steps: int = Field(8000, gt=0, description="optimisation steps")
    batch: int = Field(32, gt=0, description="latents per step")
    lr: float = Field(8e-4, gt=0, description="peak learning rate")
    poses_per_object: int = Field(1200, gt=0, description="rendered poses of each object")
    seed: int = Field(0, ge=0, description="seed of weights and data")
    work: str = Field(str(SCRATCH), description="folder for the rendered world and checkpoints")
    out: str = Field(str(MINI), description="folder of the model; its vae/ is read, everything else is written")
    export: bool = Field(False, description="only write the averaged weights of the newest checkpoint")


class TextToLatent(torch.nn.Module):
    """The two networks that are trained together."""

    def __init__(self, vocab_size: int, eos: int) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.MAX_LENGTH,
                projection_dim=WIDTH,
                bos_token_id=eos - 1,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=dataset.SIZE // 4,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(48, 96, 112),
            norm_num_groups=16,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return v of latents x (B, 4, h, w), of x's shape, at timesteps t (B,) and for token ids (B, n)."""
        return self.unet(x, t, self.text_encoder(ids).last_hidden_state).sample


def scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule: scaled-linear betas; v-prediction, as Stable Diffusion 2.1 has it."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
    )


def latents(path: Path, vae: AutoencoderKL, world: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return the latents of every pose in every training colour, and of bad pictures, cached in `path`.

    They are {z (n, 4, h, w) scaled, float16; pose (n, 2), the indices of object and pose; color (n,), its index; bad
    (n,), the index in BAD}. Each word of BAD has every BAD_STRIDE-th pose.
    """

    @torch.no_grad()
    def encode() -> dict[str, torch.Tensor]:
        z, rows = [], []
        colors = list(COLORS)
        for i, obj in enumerate(tqdm(OBJECTS, desc="encoding", unit="object")):
            for name in (c for c, o in TRAIN_PAIRS if o == obj):
                rng = numpy_rng(seed, 0, f"latents/{obj}/{name}")
                for k, bad in enumerate(BAD):
                    poses = range(k, world["maps"].shape[1], BAD_STRIDE if bad else 1)
                    for first in range(0, len(poses), ENCODE_BATCH):
                        some = list(poses[first : first + ENCODE_BATCH])
                        maps = world["maps"][i][some]
                        x = dataset.paint(maps, torch.tensor(COLORS[name]).expand(len(maps), 3), rng, bad)
                        x = x.contiguous(memory_format=torch.channels_last)
                        z.append((vae.encode(x).latent_dist.mean * vae.config["scaling_factor"]).half())
                        rows += [(i, j, colors.index(name), k) for j in some]
        pose, color, bad = torch.tensor(rows).split((2, 1, 1), 1)
        columns = {"z": torch.cat(z), "pose": pose, "color": color[:, 0], "bad": bad[:, 0]}
        return {name: column.contiguous() for name, column in columns.items()}

    return dataset.cached(path, encode)


def captions(
    cache: dict[str, torch.Tensor], world: dict[str, torch.Tensor], index: torch.Tensor, rng: np.random.Generator
) -> list[str]:
    """Return a random caption for each of the cached latents `index` (n,)."""
    objects, colors = list(OBJECTS), list(COLORS)
    rows = zip(*(cache[name][index].tolist() for name in ("pose", "color", "bad")))
    return [
        dataset.random_caption(colors[c], objects[o], world["angles"][o, k].tolist(), rng, BAD[bad])
        for (o, k), c, bad in rows
    ]


def loss_at(
    step: int,
    net: TextToLatent,
    tok: CLIPTokenizer,
    alphas_cumprod: torch.Tensor,
    cache: dict[str, torch.Tensor],
    world: dict[str, torch.Tensor],
    cfg: DiffusionConfig,
) -> torch.Tensor:
    """Return the loss of a step: mean squared error of v = sqrt(abar) noise - sqrt(1 - abar) x0.

    At high noise, which shapes a 3D asset, its errors are those of x0. Source: arXiv 2202.00512, appendix D.
    """
    rng = numpy_rng(cfg.seed, step, "diffusion")
    index = torch.from_numpy(rng.integers(len(cache["z"]), size=cfg.batch))
    x0 = cache["z"][index].float()
    ids = tok(captions(cache, world, index, rng), padding="max_length", return_tensors="pt").input_ids
    entries = rng.integers(len(alphas_cumprod), size=cfg.batch)
    in_3d, those = rng.random(cfg.batch) < SHARE_IN_3D, rng.integers(*ENTRIES_IN_3D, cfg.batch)
    t = torch.from_numpy(np.where(in_3d, those, entries))
    noise = torch.randn(x0.shape, generator=torch_rng(cfg.seed, step, "noise"))
    abar = alphas_cumprod[t][:, None, None, None]
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    return mse_loss(net(x.contiguous(memory_format=torch.channels_last), t, ids), v)


def export(net: TextToLatent, vae: AutoencoderKL, tok: CLIPTokenizer, folder: Path) -> None:
    """Write the model to `folder` as diffusers stores one, in half-precision safetensors."""
    vae.register_to_config(_name_or_path="mini_sd/vae")  # instead of the path from which it was loaded
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=net.text_encoder,
        tokenizer=tok,
        unet=net.unet,
        # diffusers' own hints are narrower than what it takes
        scheduler=scheduler(),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    ).to(torch.float16).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Train on the autoencoder's latents, and write the whole model; with --export only write it."""
    cfg = load(DiffusionConfig, argv, prog="python -m training.diffusion", doc=__doc__)
    work, out = Path(cfg.work), Path(cfg.out)
    tok = tokenizer.build(dataset.caption_words(), out / "tokenizer")
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(cfg.seed)  # the libraries initialise from the global generator
        net = TextToLatent(len(tok), tok.eos_token_id).to(memory_format=torch.channels_last)
    if cfg.export:
        newest = checkpoint.latest(work / CKPT)
        if newest is None:
            raise UserError(f"no checkpoint in {work / CKPT}: train first, without --export")
        load_averaged(net, newest)
        export(net, vae, tok, out)
        return
    world = dataset.poses(work / "poses.safetensors", cfg.poses_per_object, cfg.seed)
    cache = latents(work / "latents.safetensors", vae, world, cfg.seed)
    abar = scheduler().alphas_cumprod
    train(
        net, lambda step: loss_at(step, net, tok, abar, cache, world, cfg), Schedule(cfg.n_steps, cfg.lr), work / CKPT
    )
    export(net, vae, tok, out)


if __name__ == "__main__":
    run_main(main)
