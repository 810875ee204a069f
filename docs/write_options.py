"""Write docs/options.md from the options' own docs: python docs/write_options.py

A test holds the page up to date.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the root's packages, when started as a file

from pydantic_core import PydanticUndefined

from evaluate import EvaluateConfig
from my.config import Config, Option, by_use, describe, plain, spelled
from options.canvas import CanvasConfig
from options.film import FilmConfig
from options.mesh import MeshConfig
from options.nerf import NeRFConfig
from options.sampling import SamplingConfig
from options.sjc import SJCConfig
from options.sweep import SweepConfig
from replay import ReplayConfig
from report import ReportConfig
from reproduce import ReproduceConfig
from view import ViewConfig

PAGES: dict[str, type[Config]] = {
    "run_sjc.py": SJCConfig,
    "run_sweep.py": SweepConfig,
    "run_img_sampling.py": SamplingConfig,
    "run_2d_sjc.py": CanvasConfig,
    "run_nerf.py": NeRFConfig,
    "highres_final_vis.py": FilmConfig,
    "export_mesh.py": MeshConfig,
    "evaluate.py": EvaluateConfig,
    "view.py": ViewConfig,
    "report.py": ReportConfig,
    "reproduce.py": ReproduceConfig,
    "replay.py": ReplayConfig,
}
TABLE = "| option | type | default | meaning |\n|---|---|---|---|\n"
HEAD = """# Options

Every option of every command, as its `-h` says it. This page is written by `docs/write_options.py`. Options are
`--seed 3` or `--seed=3`; later sources win: defaults, `--preset NAME`, `./config.yml`, flags. `doctor.py` takes the
options of `run_sjc.py`, `--selftest` and `--sha256`. `highres_final_vis.py`, `evaluate.py` and the other commands that
take a trained field also take options of `run_sjc.py`, where a checkpoint of the published code needs them:
[coming from SJC](coming-from-sjc.md) says which.
"""


def page() -> str:
    """Return the text of docs/options.md."""
    parts = [HEAD]
    above: dict[str, str] = {}  # {option: its row} of the commands so far
    for script, cls in PAGES.items():
        rows = {option.name: row(option) for option in by_use(cls)}
        same = [f"`--{name}`" for name in rows if above.get(name) == rows[name]]
        parts.append(
            f"## {script}\n\n"
            + (f"As above: {', '.join(same)}.\n\n" if same else "")
            + TABLE
            + "".join(text for name, text in rows.items() if above.get(name) != text)
        )
        above |= rows
    return "\n".join(parts)


def row(option: Option) -> str:
    """Return an Option as a row of a table."""
    kind = describe(option.kind) + (f" ({option.limits})" if option.limits else "")
    default = "required" if option.default is PydanticUndefined else f"`{spelled(plain(option.default))}`"
    meaning = option.meaning.replace("|", "\\|")
    return f"| `--{option.name}` | {kind} | {default if default != '``' else 'empty'} | {meaning} |\n"


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_bytes(page().encode())
