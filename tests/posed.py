"""Small scenes for tests: posed pictures of 4 x 2 pixels, in both layouts."""

import json
import math

import imageio.v3 as iio
import numpy as np
import torch

import pose

W, H = 4, 2  # not square
POSE = pose.look_at((0.0, -3.0, 1.0), up=(0, 0, 1))


def picture(w=W, h=H, value=200):
    return np.full((h, w, 3), value, np.uint8)


def frame(path, c2w=POSE, **more):
    return {"file_path": path, "transform_matrix": np.asarray(c2w).tolist(), **more}


def blender(folder, splits=("train", "val", "test"), n=2, angle=math.pi / 2, image=None):
    """Write a scene in the Blender layout, its images of 4 x 2 pixels, and return its folder."""
    for split in splits:
        (folder / split).mkdir()
        for i in range(n):
            iio.imwrite(folder / split / f"r_{i}.png", picture(value=10 * i) if image is None else image)
        frames = [frame(f"./{split}/r_{i}") for i in range(n)]
        (folder / f"transforms_{split}.json").write_text(json.dumps({"camera_angle_x": angle, "frames": frames}))
    return folder


def whole(folder, frames=None, n=2, size=(W, H), **common):
    """Write a scene in the layout of instant-ngp and nerfstudio, and return its folder."""
    frames = [frame(f"images/{i:02d}.png") for i in range(n)] if frames is None else frames
    (folder / "images").mkdir()
    for i in range(len(frames)):
        iio.imwrite(folder / "images" / f"{i:02d}.png", picture(*size, value=i))
    (folder / "transforms.json").write_text(json.dumps({"frames": frames, **common}))
    return folder


def edit(folder, split="train", entry=0, **values):
    """Change a transforms file: keys of one of its frames, None to drop one; return the folder."""
    path = folder / f"transforms_{split}.json"
    meta = json.loads(path.read_text())
    meta["frames"][entry] = {k: v for k, v in (meta["frames"][entry] | values).items() if v is not None}
    path.write_text(json.dumps(meta))
    return folder


def K_of(fx, fy, x, y):
    return torch.tensor([[fx, 0, -x], [0, -fy, -y], [0, 0, -1]], dtype=torch.float64)
