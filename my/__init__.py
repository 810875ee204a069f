"""What every script needs: configuration, errors, seeds, checkpoints, files of a run, media.

Importing it ends the process in one line where a package that the project needs is not installed.
"""

import importlib.util
import sys

NEEDED = (
    "pydantic",
    "yaml",
    "numpy",
    "scipy",
    "tqdm",
    "torch",
    "safetensors",
    "imageio",
    "diffusers",
    "transformers",
    "accelerate",
    "huggingface_hub",
    "einops",
    "torchmetrics",
)

_missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    print(
        f"{sys.argv[0]}: {sys.executable} has no package {', '.join(_missing)}; use the Python that the requirements "
        "were installed for, such as .venv/bin/python, or install them: pip install -r requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)
