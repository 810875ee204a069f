"""A 3D asset: the field of a run, what shows it, and where it is found. What is made of a run starts here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from adapt import ScoreAdapter, make_adapter
from my import checkpoint, config
from my.errors import note
from my.host_copy import HostCopy
from my.script import free_on_resume, pick_device
from my.seeds import torch_rng
from options.found import CKPT, Source, find, find_finished
from options.sjc import SJCConfig
from options.weights import files_of
from voxnerf import state
from voxnerf.field import VoxRF, make_field
from voxnerf.render import CHUNK, Rendering, averaged, render_image

if TYPE_CHECKING:
    import pose
    from options.trained import TrainedConfig

__all__ = ["Asset", "Source", "find", "find_finished", "load", "load_field", "new_field", "open_asset"]

TEST_BACKGROUND = 0  # index of the plain background behind test views


class Asset:
    """A field in the space of a model, and what shows it: the model's decoder, and the run's plain backgrounds.

    `n_steps_taken` is the number of optimisation steps that the field had when it was loaded.
    """

    def __init__(self, cfg: SJCConfig, adapter: ScoreAdapter, field: VoxRF, step: int = 0) -> None:
        self.cfg, self.adapter, self.field, self.n_steps_taken = cfg, adapter, field, step
        self.backgrounds = adapter.plain_backgrounds() if cfg.plain_bg else None

    @property
    def latent(self) -> bool:
        """Whether the field holds latents, of which a decoder makes larger pictures."""
        return self.adapter.picture_size > self.adapter.data_shape[1]

    @property
    def depth_range(self) -> tuple[float, float]:
        """The nearest and farthest depth of depth images, world units: those of the ball inscribed in the field."""
        R, reach = self.cfg.pose.R, self.cfg.vox.bbox_len
        return max(0.0, R - reach), R + reach

    def background(self, index: int, hw: int, fine: int = 1, width: int | None = None) -> torch.Tensor | None:
        """Return the pixels (hw * fine * width * fine, C) of plain background `index`, None where the run has none.

        It is hw x width pixels of the model's space, each of which is repeated fine x fine times; width is hw unless
        given. An encoder leaves a mark along the border of a plain picture: the border keeps its width here, and the
        middle is stretched.
        """
        return None if self.backgrounds is None else self.stretched(self.backgrounds[index], hw, fine, width)

    def stretched(self, plain: torch.Tensor, hw: int, fine: int = 1, width: int | None = None) -> torch.Tensor:
        """Return a plain picture (C, n, n) of the model's space as pixels (hw * fine * width * fine, C), as above."""
        n, device = plain.shape[-1], self.adapter.device
        rows, columns = (kept_border(n, to, device).repeat_interleave(fine) for to in (hw, width or hw))
        return plain[:, rows][:, :, columns].flatten(1).T

    @torch.no_grad()
    def encoded(self, rgb: torch.Tensor) -> torch.Tensor:
        """Return the plain picture of a colour (3, 1, 1), RGB in [0, 1], in the model's space: (C, n, n)."""
        size = self.adapter.picture_size
        return self.adapter.encode(rgb[None].expand(-1, -1, size, size))[0]

    def render(
        self,
        camera: pose.Camera,
        hw: int | None = None,
        bg_index: int = TEST_BACKGROUND,
        subpixels: int = 1,
        downscale: int = 1,
        chunk: int | None = None,
        plain: torch.Tensor | None = None,
    ) -> Rendering:
        """Render an hw x hw view of the field: a `voxnerf.render.Rendering` in the model's space.

        It has `subpixels` x `subpixels` rays per pixel, `downscale` x `downscale` of which will be averaged. `plain` is
        a plain picture of the model's space that takes the background's place, as `encoded` returns it.
        """
        hw = hw or self.cfg.pose.rend_hw
        size = (hw * subpixels // downscale, downscale)
        bg = self.background(bg_index, *size) if plain is None else self.stretched(plain, *size)
        return render_image(
            self.field,
            camera.K(hw, hw),
            camera.c2w,
            hw,
            hw,
            bg,
            subpixels,
            chunk,
            self.cfg.emptiness_scale,
            self.cfg.renderer,
        )

    @torch.no_grad()
    def view(self, camera: pose.Camera, hw: int | None = None, subpixels: int = 1, downscale: int = 1) -> HostCopy:
        """Return a test view: arrays (picture (H, W, 3) in [0, 1], depth (h, w), opacity (h, w)).

        They are antialiased by `downscale`. They are on their way from the device: whoever unpacks them waits.
        """
        r = self.render(camera, hw, subpixels=subpixels, downscale=downscale, chunk=CHUNK)
        x, depth, opacity = averaged(r.color, r.depth, r.opacity, n=downscale)
        return HostCopy(self.adapter.decode(x[None])[0].permute(1, 2, 0), depth, opacity)


def kept_border(n: int, to: int, device: torch.device) -> torch.Tensor:
    """Return which of n pixels stands at each of `to` places, (to,): the ends as they are, the middle repeated."""
    i = torch.arange(to, device=device)
    return torch.where(2 * i < to, i.clamp(max=(n - 1) // 2), (i + n - to).clamp(min=n // 2))


def new_field(cfg: SJCConfig, adapter: ScoreAdapter) -> VoxRF:
    """Return the field of a run before its first step, on the adapter's device."""
    vox, b = cfg.vox, cfg.vox.bbox_len
    assert vox.model_type  # SJCConfig fills it in
    field = make_field(
        vox.model_type,
        [[-b] * 3, [b] * 3],
        vox.grid_size,
        adapter.data_shape[0],
        vox.step_ratio,
        vox.density_shift,
        vox.ray_march_weight_thres,
        vox.blend_bg_texture and not cfg.plain_bg,
        vox.bg_texture_hw,
        generator=torch_rng(cfg.seed, 0, "field"),
    )
    return field.to(adapter.device)


# ---------------------------------------------------------------- loaded


def load(found: Source, device: str = "auto", files: Any = None) -> Asset:
    """Return the asset of a source. Of the model, only what encodes and decodes pictures is kept, on the device.

    Options that a resumed run may change belong to the machine that it was trained on: they are at their defaults.
    `files` is what `options.weights.files_of` returned; None asks it here, which tells where the decoder is another.
    """
    cfg = found.cfg.model_copy(deep=True)
    config.reset(cfg, free_on_resume(SJCConfig) - {"low_vram"})
    adapter = make_adapter(cfg, "cpu", files_of(found) if files is None else files)
    adapter.keep_pictures(pick_device(device))
    return Asset(cfg, adapter, *load_field(found, adapter))


def load_field(found: Source, adapter: ScoreAdapter) -> tuple[VoxRF, int]:
    """Return the field of a source, on the adapter's device, and its number of steps.

    Where the newest checkpoint of a run is damaged, the one before it is taken, and a note says so.
    """
    cfg, root = found.cfg, found.folder / CKPT
    if found.published:
        assert cfg.vox.model_type  # SJCConfig fills it in
        return found.published.field(cfg.vox.model_type, cfg.vox).to(adapter.device), found.step
    field = new_field(cfg, adapter)
    loaded = checkpoint.load_newest(root) if found.path == checkpoint.latest(root) else None
    tensors, meta = loaded or checkpoint.load(found.path)
    state.restore_field(field, tensors)
    return field, meta["step"]


def open_asset(cfg: TrainedConfig) -> Asset:
    """Return the asset that the options of a command choose; a note says where its run is not finished."""
    found = find(cfg.run[0], config.given_apart(cfg))
    if not found.finished:
        note(f"{found.folder.resolve()}: this run is {found.progress}; that field is taken")
    return load(found, cfg.device)
