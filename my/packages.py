"""Whether the packages that the project needs are installed. Imports nothing but the standard library."""

import sys
from importlib.util import find_spec

NEEDED = (
    "pydantic",
    "yaml",
    "numpy",
    "scipy",
    "filelock",
    "psutil",
    "tqdm",
    "torch",
    "safetensors",
    "PIL",
    "OpenEXR",
    "imageio",
    "imageio_ffmpeg",
    "diffusers",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "einops",
    "torchmetrics",
    "submitit",
    "skimage",
    "trimesh",
    "fast_simplification",
    "xatlas",
    "viser",
)


def refuse_missing() -> None:
    """End the process in one line, with status 2, where a package of NEEDED is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"{sys.argv[0]}: {sys.executable} has no package {', '.join(missing)}; use the Python that the "
            "requirements were installed for, such as .venv/bin/python, or install them: "
            "pip install -r requirements.txt",
            file=sys.stderr,
        )
        sys.exit(2)
