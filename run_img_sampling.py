"""Pictures out of a diffusion model: 2D samples, in the current folder.

python run_img_sampling.py --preset mini --sd.prompt "a red house"
python run_img_sampling.py --family gddpm --gddpm.model m_imgnet_64 --classes 1,207,281
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from my import run_dir, script
from my.errors import run_main
from my.sha256 import sha256_of
from options.sampling import SamplingConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from adapt import ScoreAdapter

ROOT = Path(__file__).resolve().parent
IMAGES = Path("imgs")
PREVIEW_COLUMNS, MAX_PREVIEW = 8, 64  # pictures in the contact sheet


def read_config(argv: list[str] | None) -> SamplingConfig:
    """Return the configuration of a command line; with --resume, the one saved in the folder."""
    return script.read_config(
        SamplingConfig,
        argv,
        root=ROOT,
        settle=SamplingConfig.absolute,
        leaves=IMAGES,
        finished=Path("preview.png").exists,
        prog="run_img_sampling.py",
        doc=__doc__,
        presets_dir=ROOT / "presets" / "2d",
    )


def batches(cfg: SamplingConfig) -> list[range]:
    """Return the numbers of the pictures of each batch; the last batch may be shorter."""
    return [range(i, min(i + cfg.batch_size, cfg.num_images)) for i in range(0, cfg.num_images, cfg.batch_size)]


def batch_file(images: range) -> Path:
    """Return the path of a batch's pictures; its name has the number of the first."""
    return IMAGES / f"step_{images[0]:07d}.npy"


def picture_file(i: int) -> Path:
    """Return the path of picture number `i`."""
    return IMAGES / f"{i:07d}.png"


def sums_file(images: range) -> Path:
    """Return the path of the checksums of a batch's files, which the program sha256sum reads too."""
    return batch_file(images).with_suffix(".sha256")


def is_drawn(images: range) -> bool:
    """Whether the file of a batch and each of its pictures have the bytes that were written."""
    paths = [batch_file(images), *map(picture_file, images)]
    try:
        return sums_file(images).read_bytes() == sums({path: sha256_of(path) for path in paths})
    except OSError:
        return False


def sums(found: Mapping[Path, str]) -> bytes:
    """Return the content of a batch's file of checksums, for {path of a file: its SHA-256}."""
    return "".join(f"{found[path]}  {path.name}\n" for path in sorted(found)).encode()


def sample(cfg: SamplingConfig, adapter: ScoreAdapter, levels: np.ndarray, subjects: list[str]) -> None:
    """Draw each batch that is not in the folder yet. `subjects` says what each picture shows."""
    from tqdm import tqdm

    from sampling import draw

    remedy = cfg.remedy(adapter.device.type)
    missing = [images for images in batches(cfg) if not is_drawn(images)]
    with tqdm(total=len(missing) * len(levels), desc="sampling", unit="step") as bar:
        for images in missing:
            bar.set_postfix_str(f"pictures {images[0]} to {images[-1]}, of {cfg.num_images}", refresh=False)
            for x in draw(cfg, adapter, levels, [subjects[i] for i in images], images):
                refuse_broken(remedy, images, x, subjects)
                bar.update()
            pictures = decode(adapter, x)
            refuse_broken(remedy, images, pictures, subjects)
            IMAGES.mkdir(exist_ok=True)  # not before, since it marks the folder of a run
            write_batch(images, pictures)


def write_batch(images: range, pictures: np.ndarray) -> None:
    """Write a PNG per picture (B, H, W, 3) in [0, 1], all in one array, and the checksums: then the batch is drawn."""
    import numpy as np

    from my.media import as_png, to_uint8

    contents = {picture_file(i): as_png(picture) for i, picture in zip(images, pictures)}
    contents[batch_file(images)] = as_npy(np.stack([to_uint8(p) for p in pictures]))
    found = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    for path, content in {**contents, sums_file(images): sums(found)}.items():
        run_dir.write_atomic(path, content)


def refuse_broken(remedy: str, images: range, values: torch.Tensor | np.ndarray, subjects: list[str]) -> None:
    """Raise RunError where one of the pictures numbered `images`, `values` (B, ...), is not finite."""
    import torch

    sums = torch.as_tensor(values).flatten(1).sum(dim=1).tolist()
    for i, value in zip(images, sums):
        script.check_finite({"its value": value}, f"picture {title(i, subjects[i])}", remedy)


def decode(adapter: ScoreAdapter, x: torch.Tensor) -> np.ndarray:
    """Return pictures (B, H, W, 3) in [0, 1] of states x (B, C, h, w), one at a time: decoders take much memory."""
    import numpy as np
    import torch

    with torch.no_grad():
        rows = x.to(adapter.device, torch.float32).split(1)
        return np.concatenate([adapter.decode(row).permute(0, 2, 3, 1).cpu().numpy() for row in rows])


def title(i: int, subject: str) -> str:
    """Return the number of a picture, and what it is to show."""
    return f"{i}: {'class ' if subject.isdecimal() else ''}{subject}".rstrip(": ")


def as_npy(array: np.ndarray) -> bytes:
    """Return the bytes of an array in numpy's format."""
    import io

    import numpy as np

    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def preview(cfg: SamplingConfig, subjects: list[str]) -> None:
    """Write the contact sheet of the first pictures, each with its number and what it is to show."""
    import numpy as np

    from my.media import labelled_grid, write_png

    n = min(cfg.num_images, MAX_PREVIEW)
    pictures = np.concatenate([np.load(batch_file(images)) for images in batches(cfg) if images[0] < n])[:n]
    cells = list(zip(pictures, map(title, range(n), subjects)))
    write_png(
        "preview.png", labelled_grid([(None, cells[i : i + PREVIEW_COLUMNS]) for i in range(0, n, PREVIEW_COLUMNS)])
    )


def prepare(cfg: SamplingConfig, found: Any) -> Callable[[], None]:
    """Return the function that draws all missing pictures, and the contact sheet; UserError if it cannot start."""
    from adapt import make_adapter
    from sampling import noise_levels

    adapter, subjects = make_adapter(cfg, script.pick_device(cfg.device), found), cfg.subjects(found)
    levels = noise_levels(cfg, adapter)

    def run() -> None:
        sample(cfg, adapter, levels, subjects)
        preview(cfg, subjects)
        print(
            f"done: {IMAGES} has {cfg.num_images} pictures, preview.png shows "
            f"{'them' if cfg.num_images <= MAX_PREVIEW else f'the first {MAX_PREVIEW}'}"
        )

    return run


def main(argv: list[str] | None = None) -> None:
    """Sample pictures in the current folder."""
    script.begin(read_config(argv), prepare, argv)


if __name__ == "__main__":
    run_main(main, go_on=script.go_on)
