"""Measure finished runs: of the toy world against the truth, and of any prompt with a CLIP.

    python evaluate.py RUN [RUN ...]
    python evaluate.py RUN [RUN ...] --clip MODEL

Of runs whose prompts are of the toy world, the truth is known:

IoU         overlap of the silhouettes: opacity above 1/2, in the result and in the truth
PSNR        of the pictures against the true ones, dB, a mean over views; gain is over a blank picture
R-prec      share of views that a judge takes for the right object, and for the right object and colour
            out of all 72 pairs; the judge has seen true renders only; from overhead, some bodies hide
            below a roof
Janus       how much more the back looks like a front to that judge than the true back does: 0 is perfect
colour      mean absolute difference of the channels in [0, 1], over the pixels where both silhouettes are (error),
            and how much larger the chroma is than the true one: largest less smallest channel (saturation)

With --clip, of runs with any prompt:

CLIP R-prec share of views whose most similar text is the prompt, among the prompts of the paper, of all runs given
            and of --distractors; of the object, by the mean over its views
similarity  of the views with the prompt, a cosine: its mean, its standard deviation over the azimuth (spread), and
            that of the lowest and the highest view

Views are 64x64 pixels, and for CLIP as large as the run's own. They are from cameras that no training and no
video of a run uses. The truth stands before plain white, as test views of runs with plain backgrounds do. A
learned background is measured against that same white. Nothing is aligned: a turned result counts as wrong.
"""

from __future__ import annotations

from my.packages import refuse_missing

refuse_missing()  # in one line, before the imports below would fail in a traceback

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import Field

import pose
from my import config, plain_files, run_dir, script
from my.errors import UserError, note, run_main
from my.seeds import numpy_rng
from options.family import PoseConfig
from options.found import Source, find_finished
from options.trained import OF_RUNS
from options.weights import files_of
from retrieval.measures import METRICS as OF_CLIP

if TYPE_CHECKING:
    from asset import Asset
    from retrieval.clip import Retrieval
    from toyworld.judge import Judge

Summary = dict[str, dict[str, float | None]]  # {measure: what `bootstrap` returns}
Scores = dict[str, np.ndarray]  # {question: the judge's log-probabilities (n, ...)}
Pictures = tuple[np.ndarray, np.ndarray]  # (n, SIZE, SIZE, 3) in [0, 1], and silhouettes (n, SIZE, SIZE)

ROOT = Path(__file__).resolve().parent
COMMAND = "evaluate.py"
SIZE = 64  # edge of the views, pixels
RING_V_DEG = (20.0, 48.0, 82.0)  # elevation draws of the three rings of test cameras: overhead, high, level
BACK_DEG = 45.0  # views this near to the back count for the Janus score
N_BOOTSTRAP, CONFIDENCE = 10000, 0.95
FIGURE_VIEWS = {"front": (0, 82), "left side": (90, 82), "back": (180, 82), "overhead": (0, 20)}  # azimuth, v
ZOOM = 2  # magnification of the figure
MESH_SUBPIXELS = 4  # rays per pixel edge of the mesh's pictures
REPORT = ("n_views", "judge", "summary", "runs")  # keys of a results file; the judge is null where no run has a truth
CLIP = "clip"  # another, with --clip
METRICS = {
    "iou": "IoU",
    "psnr": "PSNR",
    "gain": "gain over blank",
    "r_object": "R-prec object",
    "r_pair": "R-prec object+colour",
    "janus": "Janus",
    "color_error": "colour error",
    "saturation": "saturation",
}


class EvaluateConfig(script.OnDevice):
    """Every option of evaluate.py."""

    runs: list[str] = Field(
        min_length=1,
        description="folders of finished runs of run_sjc.py, or checkpoints of the published code: step_*.pt",
    )
    n_views: int = Field(24, ge=24, multiple_of=3, description="test views, in three rings")
    out: str = Field("results.json", description="JSON file of everything that was measured")
    figure: str | None = Field(None, description="PNG file of every run's views, each beside the truth")
    clip: str | None = Field(
        None,
        description="measure with this CLIP, which takes runs of any prompt: its folder, or its id ORG/NAME on the hub",
    )
    distractors: str | None = Field(
        None,
        description="with --clip: text file of further texts, one per line, among which a view has to find its own",
    )
    mesh: bool = Field(
        False, description="show in the figure also the mesh that export_mesh.py makes; this takes up to a minute a run"
    )


# ---------------------------------------------------------------- metrics


def first_rank(scores: np.ndarray, index: int | tuple[int, ...]) -> float:
    """Return the share of views whose best score (n, ...) is the one at `index`."""
    return float(np.mean([view[index] >= view.max() for view in scores]))


def front_probability(octant_log_p: np.ndarray) -> np.ndarray:
    """Return the probability (n,) of the three front sectors, from log-probabilities (n, 8) of all."""
    front = [name.startswith("front") for name in pose.SIDES["octants"]]
    return np.exp(octant_log_p[:, front]).sum(axis=1)


def bootstrap(per_run: Sequence[float]) -> dict[str, float | None]:
    """Return {"mean", "low", "high"}: the mean over runs and its confidence interval, whose ends are None for one run.

    Source: Efron, 1979; the percentile bootstrap over runs, from a fixed seed.
    """
    values = np.asarray(per_run, dtype=np.float64)
    if len(values) < 2:
        return {"mean": values.mean(), "low": None, "high": None}
    draws = numpy_rng(0, 0, "bootstrap").integers(len(values), size=(N_BOOTSTRAP, len(values)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values[draws].mean(axis=1), (tail, 100 - tail))
    return {"mean": values.mean(), "low": low, "high": high}


# ---------------------------------------------------------------- views


def test_angles(n_views: int) -> np.ndarray:
    """Return azimuth and elevation draw (n_views, 2), radians, of the test cameras, ring by ring.

    Each ring is turned by a third of its spacing, by turns to one side and the other, off the centres of the sectors.
    """
    n = n_views // len(RING_V_DEG)
    spacing = 2 * np.pi / n
    return np.array(
        [
            (k * spacing + (-1) ** ring * spacing / 3, np.deg2rad(v))
            for ring, v in enumerate(RING_V_DEG)
            for k in range(n)
        ]
    )


def sees_back(angles: np.ndarray) -> np.ndarray:
    """Return which cameras (n,) look at the back, and not from overhead."""
    from_back = np.abs((angles[:, 0] + 2 * np.pi) % (2 * np.pi) - np.pi)
    return (from_back <= np.deg2rad(BACK_DEG)) & (angles[:, 1] >= np.deg2rad(pose.OVERHEAD_DEG))


def cameras_at(angles: np.ndarray, p: PoseConfig) -> list[pose.Camera]:
    """Return the test cameras at angles (n, 2) for a run's `PoseConfig`."""
    return [pose.camera_at(azimuth, v, p.R, p.FoV) for azimuth, v in angles]


def true_views(color: str, obj: str, cameras: Sequence[pose.Camera]) -> Pictures:
    """Return the truth before plain white: its pictures and its coverage."""
    from adapt import PLAIN_BACKGROUNDS
    from asset import TEST_BACKGROUND
    from toyworld import compose, coverage_maps

    maps = coverage_maps(obj, cameras, SIZE)
    pictures = compose(maps, color, PLAIN_BACKGROUNDS[TEST_BACKGROUND])
    return pictures.permute(0, 2, 3, 1).numpy(), maps[:, 4].numpy() / 255


def views_of(asset: Asset, cameras: Sequence[pose.Camera], hw: int | None = None) -> list[np.ndarray]:
    """Return the pictures (H, W, 3) of a run's test views, of the size that its training rendered unless given."""
    shots = []
    for camera in cameras:
        picture, *_ = asset.view(camera, hw)
        shots.append(picture)
    return shots


def result_views(asset: Asset, cameras: Sequence[pose.Camera], own: Sequence[np.ndarray] | None = None) -> Pictures:
    """Return the pictures of a run and its opacities; `own` are its `views_of`, where these are there already."""
    import torch

    from sjc import resize
    from voxnerf.render import CHUNK

    if not asset.latent:
        own = views_of(asset, cameras, SIZE)
    elif own is None:  # a decoder gets the size that the training rendered
        own = views_of(asset, cameras)
    pictures, opacities = [], []
    with torch.no_grad():
        for camera, picture in zip(cameras, own):
            x = torch.from_numpy(picture).permute(2, 0, 1)[None]
            pictures.append(resize(x, (SIZE, SIZE))[0].permute(1, 2, 0).numpy())
            opacities.append(asset.render(camera, SIZE, chunk=CHUNK).opacity.cpu().numpy())
    return np.stack(pictures), np.stack(opacities)


def judge_views(judge: Judge, pictures: np.ndarray) -> Scores:
    """Return the judge's log-probabilities of pictures (n, SIZE, SIZE, 3): object, color, octant, pair."""
    import torch

    from toyworld.judge import pair_scores

    verdict = judge(torch.from_numpy(pictures).permute(0, 3, 1, 2).float())
    return {name: log_p.numpy() for name, log_p in (*verdict.items(), ("pair", pair_scores(verdict)))}


# ---------------------------------------------------------------- one run


class Job(NamedTuple):
    """A run that is to be measured."""

    name: str  # as it was given
    found: Source
    truth: tuple[str, str] | None  # colour and object of its prompt, None where that is not of the toy world
    files: Any = None  # of its model, as `options.weights.files_of` returned them
    title: str = ""  # in the figure


def read_prompt(found: Source) -> tuple[str, str]:
    """Return the (color, object) of a run's prompt; raises UserError where that is not of the toy world."""
    from toyworld import parse_prompt

    try:
        return parse_prompt(found.cfg.texts.prompt)
    except ValueError as error:
        raise UserError(
            f"{found.folder}: only runs of toy-world prompts have a truth: {error}; any prompt is measured with --clip"
        ) from None


def read_any_prompt(found: Source) -> tuple[str, str] | None:
    """Return what `read_prompt` does, None for a prompt with any word that is not of the toy world.

    Raises UserError for a run that states no prompt.
    """
    from options.family import TEXTS
    from toyworld import captions

    prompt, cfg = f"{TEXTS}.prompt", found.cfg
    if prompt not in cfg.chosen.reads:
        raise UserError(
            f"{found.folder}: models of --family {cfg.family} read no prompt, and --clip measures how far a result is "
            "what its prompt says; leave this run out"
        )
    stated = (found.folder / script.FULL_CONFIG).exists() or any(map(cfg.where_asked, (prompt, "preset")))
    if not stated:
        raise UserError(f"{found.folder}: nothing states the prompt of this checkpoint; give it with --{prompt}")
    try:
        return captions.read_prompt(cfg.texts.prompt, f"--{prompt}")
    except UserError:
        return None


def open_retrieval(cfg: EvaluateConfig, jobs: Sequence[Job]) -> Retrieval | None:
    """Return the CLIP of the options with the texts that views are compared with, None where none is asked for.

    Files are checked before heavy imports. Raises UserError for those that are missing or of another kind.
    """
    if cfg.clip is None:
        return None
    from retrieval import files, texts

    others = [] if cfg.distractors is None else texts.read(cfg.distractors, "--distractors")
    found = files.find(cfg.clip, "--clip")
    from retrieval.clip import Retrieval, load

    prompts = [job.found.cfg.texts.prompt for job in jobs]
    return Retrieval(load(found, script.pick_device(cfg.device)), [*prompts, *texts.of_the_paper(), *others])


def places(angles: np.ndarray) -> dict[str, list[float]]:
    """Return where the cameras at angles (n, 2) are, in degrees, for a results file."""
    return {"azimuth_deg": np.rad2deg(angles[:, 0]).tolist(), "v_deg": np.rad2deg(angles[:, 1]).tolist()}


def compare(
    result: Pictures, truth: Pictures, color: str, obj: str, angles: np.ndarray, judge: Judge
) -> dict[str, Any]:
    """Return the measures of a result against the truth, both seen from `angles` (n, 2)."""
    from toyworld.judge import HEADS
    from voxnerf.likeness import colour_errors, iou, picture_psnr

    views, best = (judge_views(judge, pictures) for pictures, _ in (result, truth))
    c, o = HEADS["color"].index(color), HEADS["object"].index(obj)
    back = sees_back(angles)
    front, true_front = (front_probability(v["octant"][back]).mean() for v in (views, best))
    solid, true_solid = result[1] > 0.5, truth[1] > 0.5
    blank, overlap = picture_psnr(np.ones_like(truth[0]), truth[0]), iou(solid, true_solid)
    color_error, saturation = colour_errors(result[0], truth[0], solid & true_solid)
    close = picture_psnr(result[0], truth[0])
    taken_for = HEADS["object"][views["object"].mean(axis=0).argmax()]
    return {
        "iou": overlap.mean(),
        "psnr": close.mean(),
        "gain": close.mean() - blank.mean(),
        "r_object": first_rank(views["object"], o),
        "r_pair": first_rank(views["pair"], (c, o)),
        "janus": front - true_front,
        "color_error": mean_of_numbers(color_error),
        "saturation": mean_of_numbers(saturation),
        "recognised": taken_for == obj,
        "taken_for": taken_for,
        "blank_psnr": blank.mean(),
        "back_as_front": front,
        "true_back_as_front": true_front,
        "truth_r_object": first_rank(best["object"], o),
        "truth_r_pair": first_rank(best["pair"], (c, o)),
        "views": places(angles) | {"iou": overlap.tolist(), "psnr": close.tolist()},
    }


def mean_of_numbers(values: np.ndarray) -> float:
    """Return the mean of the values (n,) that are numbers, NaN where none is."""
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if len(numbers) else math.nan


def measure(
    job: Job, cfg: EvaluateConfig, judge: Judge | None, retrieval: Retrieval | None
) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return (everything measured of a run, its row of the figure or None).

    The judge is there where the run has a truth, and `retrieval` is there with --clip.
    """
    from asset import load

    asset = load(job.found, cfg.device, job.files)
    angles = test_angles(cfg.n_views)
    cameras = cameras_at(angles, asset.cfg.pose)
    own = views_of(asset, cameras) if retrieval else None
    measures: dict[str, Any] = {"views": places(angles)}
    if job.truth:
        assert judge is not None
        views = result_views(asset, cameras, own)
        measures = compare(views, true_views(*job.truth, cameras), *job.truth, angles, judge)
    if retrieval and own:
        of_clip = retrieval.measure(asset.cfg.texts.prompt, own, angles[:, 1])
        measures = {**measures, **of_clip, "views": measures["views"] | of_clip["views"]}
    run = {
        "run": job.name,
        "prompt": asset.cfg.texts.prompt,
        "seed": asset.cfg.seed,
        "family": asset.cfg.family,
        "view_words": asset.cfg.pose.view_words,
        "n_steps": asset.cfg.n_steps,
    }
    return run_dir.plain(run | measures), strip(asset, job, cfg.mesh) if cfg.figure else None


# ---------------------------------------------------------------- what people read


def strip(asset: Asset, job: Job, with_mesh: bool) -> np.ndarray:
    """Return one row of the figure (H, W, 3) uint8: every view of FIGURE_VIEWS, each result beside its truth.

    The mesh stands between both, where it is asked for.
    """
    from my.media import label, side_by_side, to_uint8

    cameras = cameras_at(np.deg2rad(list(FIGURE_VIEWS.values())), asset.cfg.pose)
    shown = {"": result_views(asset, cameras)[0]}
    if with_mesh:
        shown["mesh"] = mesh_views(asset, cameras)
    if job.truth:
        shown["truth"] = true_views(*job.truth, cameras)[0]
    row = side_by_side(*(to_uint8(picture) for same_view in zip(*shown.values()) for picture in same_view))
    row = row.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    cfg = asset.cfg
    texts = [f"{cfg.preset or cfg.family}: {job.title}, seed {cfg.seed}", *list(FIGURE_VIEWS)[1:]]
    edge, n = ZOOM * SIZE, len(shown)
    names = [(n * i * edge + 4, text, "black") for i, text in enumerate(texts)]
    kinds = [((n * i + k) * edge + 90, kind, "gray") for i in range(len(texts)) for k, kind in enumerate(shown)]
    return np.concatenate([label(row.shape[1], *names, *kinds), row])


def stacked(strips: Sequence[np.ndarray]) -> np.ndarray:
    """Return rows of a figure (H, W, 3) uint8 below one another, shorter ones with white behind them."""
    width = max(row.shape[1] for row in strips)
    return np.concatenate(
        [np.pad(row, [(0, 0), (0, width - row.shape[1]), (0, 0)], constant_values=255) for row in strips]
    )


def mesh_views(asset: Asset, cameras: Sequence[pose.Camera]) -> np.ndarray:
    """Return pictures (n, SIZE, SIZE, 3) in [0, 1] of an asset's mesh before white."""
    from mesh import cast, make

    mesh = make.textured(asset)
    caster = cast.Caster(mesh.vertices, mesh.faces, asset.adapter.device)
    return np.stack([cast.render(mesh, camera, SIZE, MESH_SUBPIXELS, caster=caster) for camera in cameras])


def judge_lines(accuracy: dict[str, dict[str, float]], rows: Sequence[dict[str, Any]]) -> str:
    """Return the lines on how far the judge can be trusted: on held-out renders, and on the truth of these runs."""
    clean, degraded = ({k: f"{v:.1%}" for k, v in accuracy[name].items()} for name in ("clean", "degraded"))
    true_object, true_pair = (np.mean([row[k] for row in rows]) for k in ("truth_r_object", "truth_r_pair"))
    return (
        f"judge: {clean['object']} object, {clean['pair']} object and colour, {clean['octant']} octant on held-out "
        f"true renders ({degraded['object']}, {degraded['pair']}, {degraded['octant']} where these are blurred)\n"
        f"truth: R-prec {true_object:.3f} object, {true_pair:.3f} object and colour, in these same views"
    )


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a name per row of the table: the prompt, and the run too where another row has this prompt and seed."""
    times = Counter((row["prompt"], row["seed"]) for row in rows)
    return [
        row["prompt"] if times[row["prompt"], row["seed"]] == 1 else f"{row['prompt']} ({row['run']})" for row in rows
    ]


def titles(jobs: Sequence[Job]) -> list[str]:
    """Return a name per row of the figure, as `labels` does, with the last part of the folder's name for the run."""
    stated = ((job.found.cfg, job.found.folder.resolve().name) for job in jobs)
    return labels([{"prompt": cfg.texts.prompt, "seed": cfg.seed, "run": name} for cfg, name in stated])


def line(name: str, width: int, seed: int | str, values: Mapping[str, float | None], heads: Mapping[str, str]) -> str:
    """Return one line of the table below `heads`, its name padded to `width`; 0.000, never -0.000, and - for None."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"

    numbers = (f"{number(values.get(k)):>{len(head)}}" for k, head in heads.items())
    return f"{name:{width}} {seed:>4}  {'  '.join(numbers)}"


def table(rows: Sequence[dict[str, Any]], summary: Summary, heads: Mapping[str, str] = METRICS) -> str:
    """Return the results as aligned text: one line per run, then the mean and its confidence interval.

    `heads` is {measure: its heading}.
    """
    names = labels(rows)
    width = max(24, *map(len, names))
    lines = [f"{'prompt':{width}} seed  " + "  ".join(heads.values())]
    lines += [line(name, width, row["seed"], row, heads) for name, row in zip(names, rows)]
    for end, name in (("mean", "mean"), ("low", "95% interval, from"), ("high", "to")):
        values = {k: summary[k][end] for k in heads if k in summary}
        if any(value is not None for value in values.values()):
            lines.append(line(name, width, "", values, heads))
    return "\n".join(lines)


def summarised(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> Summary:
    """Return {measure: its mean over the runs that have it, and the interval}, without measures that no run has."""
    having = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    return run_dir.plain({name: bootstrap(values) for name, values in having.items() if values})


# ---------------------------------------------------------------- files


def refuse_twice(jobs: Sequence[Job]) -> None:
    """Raise UserError where two names are of one checkpoint: it would count twice in the means."""
    first: dict[Path, str] = {}
    for job in jobs:
        path = job.found.path.resolve()
        if path in first:
            raise UserError(f"{job.name}: the run that {first[path]} names too; give it once")
        first[path] = job.name


def check_outputs(cfg: EvaluateConfig) -> None:
    """Raise UserError for a file that cannot be written, or that holds something else; note what will be replaced."""
    for name, path in (("out", cfg.out), ("figure", cfg.figure)):
        if path is not None:
            run_dir.refuse_output(f"--{name}", path)
    if cfg.distractors is not None and cfg.clip is None:
        raise UserError(f"--distractors {cfg.distractors}: only --clip reads it; give --clip MODEL, or leave it out")
    if cfg.mesh and not cfg.figure:
        raise UserError("--mesh True: the mesh is shown in the figure; give --figure FILE.png too")
    if cfg.figure and Path(cfg.figure).suffix.lower() != ".png":
        raise UserError(f"--figure {cfg.figure}: a PNG is written; give a name that ends in .png")
    for name, path, is_ours in (("out", cfg.out, is_report), ("figure", cfg.figure, is_figure)):
        if path is not None and Path(path).exists():
            if not is_ours(path):
                raise UserError(f"--{name} {path}: this file is not of evaluate.py; give another name, or move it away")
            note(f"{path} is of an earlier evaluate.py; it will be replaced")


def is_report(path: str) -> bool:
    """Return whether an earlier evaluate.py wrote the file at `path`: it is JSON with the keys of REPORT, and CLIP."""
    try:
        return set(plain_files.read_json(path)) - {CLIP} == set(REPORT)
    except (OSError, ValueError):
        return False


def is_figure(path: str) -> bool:
    """Return whether an earlier evaluate.py wrote the figure at `path`."""
    from my.media import is_png_of

    return is_png_of(path, COMMAND)


def tell(rows: Sequence[dict[str, Any]], summary: Summary, accuracy: Any, retrieval: Retrieval | None) -> None:
    """Print the tables; `accuracy` is the judge's."""
    known = [row for row in rows if "iou" in row]
    parts = [table(known, summary), judge_lines(accuracy, known)] if known else []
    if retrieval:
        parts += [table(rows, summary, OF_CLIP), retrieval.lines(rows)]
    print(*parts, sep="\n\n")


def main(argv: list[str] | None = None) -> None:
    """Measure runs; print tables, write JSON and on request a figure."""
    cfg = config.load(
        EvaluateConfig, argv, prog=COMMAND, doc=__doc__, positional="runs", config_file=None, apart=OF_RUNS
    )
    run_dir.refuse_project_dir(ROOT)
    from tqdm import tqdm

    from my.media import write_png
    from toyworld.judge import load

    found = {name: find_finished(name, config.given_apart(cfg)) for name in cfg.runs}
    read = read_prompt if cfg.clip is None else read_any_prompt
    jobs = [Job(name, found[name], read(found[name])) for name in cfg.runs]  # all, before the first is measured
    check_outputs(cfg)
    refuse_twice(jobs)
    jobs = [job._replace(files=files_of(job.found), title=title) for job, title in zip(jobs, titles(jobs))]
    retrieval = open_retrieval(cfg, jobs)
    judge, accuracy = load() if any(job.truth for job in jobs) else (None, None)
    with tqdm(jobs, desc="evaluate", unit="run") as bar:
        rows, strips = zip(*(measure(job, cfg, judge, retrieval) for job in bar))
    summary = summarised(rows, (*METRICS, "recognised", *OF_CLIP))
    tell(rows, summary, accuracy, retrieval)
    report: dict[str, Any] = dict(zip(REPORT, (cfg.n_views, accuracy, summary, list(rows))))
    if retrieval:
        report[CLIP] = {"model": cfg.clip, "texts": retrieval.texts}
    run_dir.write_atomic(cfg.out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    if cfg.figure:
        write_png(cfg.figure, stacked(strips), COMMAND)


if __name__ == "__main__":
    run_main(main)
