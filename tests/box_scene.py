"""A scene that is known: a box of two colours, its pictures, and short trainings on them."""

import json
import math

import imageio.v3 as iio
import numpy as np
import torch

import pose
from options.nerf import NeRFConfig
from voxnerf.field import make_field
from voxnerf.nerf import optimise
from voxnerf.render import render_image
from voxnerf.scene import Scene

H, W = 14, 16
CUBE = np.array([[-1.0] * 3, [1.0] * 3])


def poses(n, lift=0.7):
    """`n` cameras on a ring about z, in two heights, that look at the origin."""
    return np.stack(
        [
            pose.look_at((2.5 * math.cos(a), 2.5 * math.sin(a), lift * (1 + 1.5 * (i % 2))), up=(0, 0, 1))
            for i, a in enumerate(np.arange(n) * 2 * math.pi / n)
        ]
    )


def box_field():
    """A solid box, orange below and blue above, in the middle of empty space."""
    field = make_field("VoxRF", CUBE, 16, c=3, density_shift=-10.0)
    with torch.no_grad():
        field.density.zero_()[..., 5:11, 5:11, 4:12] = 60
        field.color[0] = torch.tensor([3.0, 0.0, -3.0])[:, None, None, None]
        field.color[0, :, 8:] = torch.tensor([-3.0, 0.0, 3.0])[:, None, None, None]
    return field


def scene_of(field, c2w):
    """The `Scene` of a field's own renderings."""
    K = pose.intrinsics(H, W, 50)
    with torch.no_grad():
        images = torch.stack([render_image(field, K, each, H, W).color.permute(1, 2, 0) for each in c2w])
    n = len(c2w)
    images = (images * 255).round().to(torch.uint8)
    return Scene(
        images,
        torch.full(images.shape[:3], 255, dtype=torch.uint8),
        torch.from_numpy(c2w),
        torch.from_numpy(K).repeat(n, 1, 1),
        [f"{i:02d}.png" for i in range(n)],
    )


def cfg_of(**options):
    model = {"bbox_len": 1.0, "grid_size": 16, "step_ratio": 1.0, **options.pop("model", {})}
    return NeRFConfig(**{"bs": 256, "n_epoch": 1, "lr": 0.05, "device": "cpu", "model": model, **options})


def train(nerf, first_step=0, last_step=math.inf):
    """Train to the end, or to `last_step`; return (step, progress, statistics) of each step."""
    done = []
    for item in optimise(nerf, first_step):
        done.append(item)
        if item[0] == last_step:
            break
    return done


def write(folder, scene, test_scene):
    """Write two scenes to a folder in the Blender layout, and return it."""
    folder.mkdir()
    for split, views in (("train", scene), ("test", test_scene)):
        frames = [
            {"file_path": f"./{split}_{name}", "transform_matrix": c2w.tolist()}
            for name, c2w in zip(views.names, views.c2w)
        ]
        for frame, image in zip(frames, views.images):
            iio.imwrite(folder / frame["file_path"], image.numpy())
        (folder / f"transforms_{split}.json").write_text(
            json.dumps({"camera_angle_x": math.radians(50), "frames": frames})
        )
    return folder


def flags(folder, *more, n_epoch=1):
    """The words of run_nerf.py for a run of 42 steps per epoch on such a folder."""
    of_run = f"--device cpu --bs 64 --model.grid_size 8 --model.bbox_len 1 --n_epoch {n_epoch} --scene {folder}"
    return [*of_run.split(), *more]
