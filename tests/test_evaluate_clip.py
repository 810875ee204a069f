"""evaluate.py --clip: numbers by hand, a tiny CLIP that was trained on the toy world, mistakes in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import pose
import run_sjc
from my.errors import UserError, run_main
from my.seeds import numpy_rng
from options.found import Source
from options.sjc import SJCConfig
from retrieval import clip, files, measures, pictures, texts
from sweep import report as sweep_report
from toyworld import COLORS, caption, compose, coverage_maps
from training import tokenizer
from training.dataset import caption_words

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ("burger", "duck", "car", "house")
PROMPTS = [caption(color, obj) for obj in OBJECTS for color in COLORS]  # 24
ANGLES = evaluate.test_angles(24)
CAMERAS = evaluate.cameras_at(ANGLES, SJCConfig().pose)
N_SHOTS, N_STEPS, EDGE = 40, 400, 32  # of the training: renders per object, steps, and pixels
PREPROCESSOR = {"size": {"shortest_edge": EDGE}, "crop_size": EDGE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
ANY_PROMPT = "A photo of a zebra walking"


def untrained(words):
    """A CLIP of two small transformers that reads pictures of EDGE pixels."""
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = {**shape, **special, "vocab_size": len(words), "max_position_embeddings": tokenizer.MAX_LENGTH}
    vision = {**shape, "image_size": EDGE, "patch_size": 8}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))


def train(model, words):
    """Train a CLIP on renders of every prompt by its contrastive loss (arXiv 2103.00020, Fig. 3): 24 pairs per step."""
    maps = []
    for obj in OBJECTS:
        rng = numpy_rng(0, 0, obj)
        maps.append(coverage_maps(obj, [pose.train_camera(rng, fov=(50, 60)) for _ in range(N_SHOTS)], EDGE))
    maps, n = torch.stack(maps), len(PROMPTS)
    kind, color = torch.arange(n) // len(COLORS), torch.tensor(list(COLORS.values())).repeat(len(OBJECTS), 1)
    ids = torch.tensor(words(PROMPTS, padding=True).input_ids)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, N_STEPS)
    for step in range(N_STEPS):
        rng = numpy_rng(0, step, "clip")
        light = torch.from_numpy(rng.uniform(0.75, 1, (n, 3))).float()
        light[::2] = 1
        x = compose(maps[kind, torch.from_numpy(rng.integers(N_SHOTS, size=n))], color, light)
        loss = model(input_ids=ids, pixel_values=2 * x - 1, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of a tiny CLIP that was trained on four objects in six colours."""
    folder = tmp_path_factory.mktemp("tiny_clip")
    with torch.random.fork_rng(devices=[]):
        words = tokenizer.build(caption_words(), folder)
        model = untrained(words)
        train(model, words)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def loaded(tiny_clip):
    return clip.load(files.find(str(tiny_clip), "--clip"), torch.device("cpu"))


@pytest.fixture(scope="session")
def retrieval(loaded):
    return clip.Retrieval(loaded, PROMPTS)


@pytest.fixture(scope="session")
def red_burger():
    return evaluate.true_views("red", "burger", CAMERAS)[0]


# ---------------------------------------------------------------- numbers by hand


def test_measures_by_hand():
    similarity = np.array(
        [[0.5, 0.1, 0.0], [0.3, 0.4, 0.0], [0.7, 0.1, 0.2], [0.2, 0.2, 0.1], [0.3, 0.0, 0.9], [0.4, 0.0, 0.0]]
    )
    m = measures.measures(similarity, 0, np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]))
    # the second and the fifth view find another text, and the fourth is a tie; the means are 0.4, 0.133 and 0.2
    assert m["clip_r"] == pytest.approx(4 / 6) and m["clip_r_object"] == 1
    assert m["clip_similarity"] == pytest.approx(0.4)
    assert (m["clip_lowest"], m["clip_highest"]) == (0.2, 0.7)
    # variances of 0.5 0.3 0.7 and of 0.2 0.3 0.4: 0.08 / 3 and 0.02 / 3, and their mean is 0.05 / 3
    assert m["clip_spread"] == pytest.approx((0.05 / 3) ** 0.5)
    other = measures.measures(similarity, 2, np.zeros(6))
    assert (other["clip_r"], other["clip_r_object"]) == (pytest.approx(1 / 6), 0)


def test_what_differs_between_heights_alone_is_no_spread():
    similarity = np.array([[0.9], [0.9], [0.1], [0.1]])
    m = measures.measures(similarity, 0, np.array([1.0, 1.0, 2.0, 2.0]))
    assert m["clip_spread"] == 0 and m["clip_highest"] - m["clip_lowest"] == pytest.approx(0.8)


def test_each_text_counts_once():
    assert list(texts.distinct(["A red pig", " a  RED pig ", "a car", "a red pig"]).values()) == ["A red pig", "a car"]


def test_the_papers_prompts_are_those_of_its_presets():
    prompts = list(texts.of_the_paper())
    assert len(prompts) == len(texts.distinct(prompts)) == 24
    assert {"A high quality photo of a delicious burger", "Zelda Link", ANY_PROMPT} <= set(prompts)


def test_a_file_of_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("\ufeffun canard bleu\r\n\r\n  été \n".encode())
    assert texts.read(str(path), "--distractors") == ["un canard bleu", "été"]


# ---------------------------------------------------------------- pictures and texts as the library has them


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 21, "crop_size": 16},
        {"size": {"shortest_edge": 50}, "crop_size": {"height": 41, "width": 30}, "resample": 2},
        {"size": {"height": 12, "width": 15}, "do_center_crop": False},
        {"size": 16, "do_center_crop": False, "do_normalize": False, "rescale_factor": 0.5},
        {"size": 16, "do_center_crop": False, "do_rescale": False},
    ],
)
def test_pictures_are_those_of_the_librarys_preprocessor(settings):
    library = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    settings = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], **settings}
    picture = np.random.default_rng(0).integers(0, 256, (33, 33, 3), dtype=np.uint8)
    want = library.CLIPImageProcessorPil(**settings)(picture, return_tensors="np").pixel_values[0]
    got = pictures.read(settings)(picture)
    assert got.dtype == np.float32 and got == pytest.approx(want, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"size": {"longest_edge": 32}}, "its size is .*longest_edge.*, not edges of 1 to 4096"),
        ({"size": 0}, "its size is 0, not edges"),
        ({"size": True}, "its size is True, not edges"),
        ({"crop_size": None}, "its crop_size is None, not edges"),
        ({"crop_size": 33}, r"its crop_size, \(33, 33\), is larger than its size"),
        ({"resample": 9}, "its resample is 9, not a number of a resampling"),
        ({"rescale_factor": 0}, "its rescale_factor is 0, not a number above 0"),
        ({"image_mean": [0.5, 0.5]}, "its image_mean is .*, not three numbers"),
        ({"image_std": [0.5, 0, 0.5]}, "its image_std is .*, not three numbers above 0"),
        ({"do_resize": False}, "its do_resize is false"),
    ],
)
def test_a_preprocessor_that_is_not_read(change, words):
    with pytest.raises(ValueError, match=words):
        pictures.read(PREPROCESSOR | change)


def test_points_are_those_of_the_librarys_network(loaded, red_burger):
    x = torch.from_numpy(np.stack([loaded.preprocessor(view) for view in red_burger]))
    ids = torch.tensor(loaded.tokenizer(PROMPTS, padding=True).input_ids)
    with torch.no_grad():
        want = loaded.model(input_ids=ids, pixel_values=x)
    assert loaded.of_pictures(red_burger) == pytest.approx(want.image_embeds.numpy(), abs=1e-5)
    assert loaded.of_texts(PROMPTS) == pytest.approx(want.text_embeds.numpy(), abs=1e-5)


def test_a_text_that_is_too_long_is_cut_with_a_note(loaded, capsys):
    long = "a red pig " * 9  # 27 words, of which 14 fit between the two special tokens
    assert loaded.of_texts([long]) == pytest.approx(loaded.of_texts(["a red pig " * 4 + "a red"]))
    assert loaded.of_texts(PROMPTS).shape == (24, 32)
    noted = capsys.readouterr().err
    assert noted.count("note:") == 1 and "reads 16 tokens of a text: the end of 'a red pig" in noted
    loaded.of_texts([long, "a duck", long])
    assert "', and 1 more is cut" in capsys.readouterr().err


def test_weights_in_half_precision_are_computed_with_in_float32(tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_clip, tmp_path)
    weights = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    changed(folder / "config.json", dtype="float16")
    model = clip.load(files.find(str(folder), "--clip"), torch.device("cpu")).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- results that are known


def test_true_views_find_their_prompt(retrieval, red_burger):
    m = retrieval.measure("a red burger", red_burger, ANGLES[:, 1])
    assert m["clip_r"] >= 0.8 and m["clip_r_object"] == 1 and m["clip_taken_for"] == "a red burger"
    assert m["clip_lowest"] <= m["clip_similarity"] <= m["clip_highest"] <= 1
    assert len(m["views"]["clip_similarity"]) == 24
    assert m["views"]["clip_taken_for"].count("a red burger") == round(24 * m["clip_r"])


@pytest.mark.parametrize("prompt", ["a blue burger", "a red duck", "a green house"])
def test_the_wrong_colour_or_object_is_caught(retrieval, red_burger, prompt):
    true, wrong = (retrieval.measure(p, red_burger, ANGLES[:, 1]) for p in ("a red burger", prompt))
    assert wrong["clip_r"] <= 0.1 and wrong["clip_r_object"] == 0 and wrong["clip_taken_for"] == "a red burger"
    assert wrong["clip_similarity"] < true["clip_similarity"] - 0.2


def test_a_blank_result_is_like_no_text(retrieval, red_burger):
    """It is less similar to the prompt than the object, and no side of it stands out."""
    blank = np.ones((24, EDGE, EDGE, 3))
    empty, true = (retrieval.measure("a red burger", views, ANGLES[:, 1]) for views in (blank, red_burger))
    assert empty["clip_similarity"] < true["clip_similarity"] - 0.2
    assert empty["clip_spread"] == pytest.approx(0, abs=1e-6) and true["clip_spread"] > 1e-3


def test_one_side_that_shows_something_else_raises_the_spread(retrieval, red_burger):
    house = evaluate.true_views("blue", "house", CAMERAS)[0]
    back = evaluate.sees_back(ANGLES)
    mixed = np.where(back[:, None, None, None], house, red_burger)
    whole, half = (retrieval.measure("a red burger", views, ANGLES[:, 1]) for views in (red_burger, mixed))
    assert half["clip_spread"] > whole["clip_spread"] + 0.1 and half["clip_lowest"] < whole["clip_lowest"] - 0.2
    assert back[np.argmin(half["views"]["clip_similarity"])]


# ---------------------------------------------------------------- whole runs


def made(folder, *flags):
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_sjc.main([*flags, "--vox.grid_size", "8", "--device", "cpu", "--snapshots", "False", "--report", "False"])
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    flags = ["--preset", "ideal", "--n_steps", "4", "--ideal.n_cameras", "8", "--pose.rend_hw", "16"]
    return made(tmp_path_factory.mktemp("toy") / "run", *flags, "--pose.view_words", "sjc")


@pytest.fixture(scope="module")
def other_run(tmp_path_factory, tiny_sd):
    """A run whose prompt is not of the toy world, of a Stable Diffusion that takes any words."""
    folder = tmp_path_factory.mktemp("other")
    model = shutil.copytree(tiny_sd, folder / "model")
    stated = model / "tokenizer" / "tokenizer_config.json"
    words = json.loads(stated.read_text())
    del words["closed_vocabulary"]
    stated.write_text(json.dumps(words))
    flags = ["--sd.checkpoint", str(model), "--sd.prompt", ANY_PROMPT, "--pose.rend_hw", "8", "--n_steps", "2"]
    return made(folder / "run", *flags)


def test_runs_with_and_without_a_truth_are_measured(toy_run, other_run, tiny_clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("more.txt").write_text("a zebra\n\na BLUE duck\n")
    given = [str(toy_run), str(other_run), "--device", "cpu", "--clip", str(tiny_clip), "--distractors", "more.txt"]
    evaluate.main([*given, "--figure", "figure.png"])
    report = json.loads(Path("results.json").read_text())
    assert set(report) == {*evaluate.REPORT, "clip"} and evaluate.is_report("results.json")
    assert report["clip"]["model"] == str(tiny_clip)
    assert report["clip"]["texts"][:2] == ["a blue duck", ANY_PROMPT] and report["clip"]["texts"][-1] == "a zebra"
    assert len(report["clip"]["texts"]) == 26  # the paper's 24, of which one is a run's, a toy one and a distractor
    toy, other = report["runs"]
    assert {*evaluate.METRICS, "recognised"} <= toy.keys() and not {*evaluate.METRICS, "recognised"} & other.keys()
    assert set(toy["views"]) - set(other["views"]) == {"iou", "psnr"}
    for row in report["runs"]:
        rings = np.reshape(row["views"]["clip_similarity"], (3, 8))  # as the cameras stand in three rings
        assert row["clip_spread"] == pytest.approx(rings.var(axis=1).mean() ** 0.5)
    for name in evaluate.OF_CLIP:
        mean = (toy[name] + other[name]) / 2
        assert report["summary"][name]["mean"] == pytest.approx(mean)
        assert report["summary"][name]["low"] <= mean <= report["summary"][name]["high"]
    assert report["summary"]["iou"] == {"mean": pytest.approx(toy["iou"]), "low": None, "high": None}
    printed = capsys.readouterr().out
    of_truth, judged, of_clip, _ = printed.strip().split("\n\n")
    assert "a blue duck" in of_truth and ANY_PROMPT not in of_truth and judged.startswith("judge: ")
    assert "a blue duck" in of_clip and ANY_PROMPT in of_clip and "26 texts, among which chance" in printed
    evaluate.main([str(other_run), "--device", "cpu", "--clip", str(tiny_clip)])  # it replaces its own results
    report = json.loads(Path("results.json").read_text())
    assert report["judge"] is None and set(report["summary"]) == set(evaluate.OF_CLIP)
    assert "judge" not in capsys.readouterr().out


def test_the_toy_measures_are_the_same_with_a_clip(toy_run, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out, flags in (("a.json", []), ("b.json", ["--clip", str(tiny_clip)])):
        evaluate.main([str(toy_run), "--device", "cpu", "--out", out, *flags])
    without, with_clip = (json.loads(Path(out).read_text()) for out in ("a.json", "b.json"))
    assert set(without) == set(evaluate.REPORT) and without["judge"] == with_clip["judge"]
    assert without["summary"].items() <= with_clip["summary"].items()
    (row,), (more,) = without["runs"], with_clip["runs"]
    assert row.pop("views").items() <= more.pop("views").items() and row.items() <= more.items()


def test_views_of_latents_are_decoded_once(other_run, monkeypatch):
    from asset import find_finished, load

    asset = load(find_finished(other_run), "cpu")
    own = evaluate.views_of(asset, CAMERAS[:2])
    assert [view.shape for view in own] == [(16, 16, 3)] * 2
    want = evaluate.result_views(asset, CAMERAS[:2])
    monkeypatch.setattr(asset, "view", None)
    got = evaluate.result_views(asset, CAMERAS[:2], own)
    assert all(np.array_equal(a, b) for a, b in zip(got, want))


def test_rows_of_a_figure_may_differ_in_length():
    short, long = np.zeros((1, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)
    figure = evaluate.stacked([short, long])
    assert figure.shape == (3, 3, 3) and figure[0, :, 0].tolist() == [0, 0, 255] and not figure[1:].any()


def test_a_sweep_shows_what_each_run_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [{"run": "a", "iou": 0.5, "clip_r": 0.25}, {"run": "b", "clip_r": 1.0}]
    for row in runs:
        Path(row["run"]).mkdir()
        Path(row["run"], "heartbeat.json").touch()
    Path("results.json").write_text(json.dumps({"summary": {"iou": {}, "clip_r": {}}, "runs": runs}))
    assert sweep_report.evaluated() == {"a": {"iou": "0.5", "clip_r": "0.25"}, "b": {"clip_r": "1"}}


def test_no_clip_needs_no_library_for_it(toy_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in ("transformers", "retrieval.clip", "retrieval.files"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it now fails
    evaluate.main([str(toy_run), "--device", "cpu"])
    assert evaluate.is_report("results.json")


def test_files_are_looked_at_before_heavy_imports():
    code = "import sys, evaluate, retrieval.files, retrieval.texts; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- mistakes


def one_line(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        run_main(evaluate.main, argv)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    return error


def copied(folder, to):
    return shutil.copytree(folder, to / "clip")


def refusal(folder):
    """What is said of a folder that is no whole CLIP, as far as that shows before and while its networks are read."""
    with pytest.raises(UserError) as refused:
        clip.load(files.find(str(folder), "--clip"), torch.device("cpu"))
    assert str(refused.value).startswith(f"--clip {folder}") and "give the folder of a CLIP" in str(refused.value)
    return str(refused.value)


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_prompt_needs_a_clip(other_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = one_line(capsys, [str(other_run)])
    assert "only runs of toy-world prompts have a truth" in said and said.endswith("measured with --clip")


def test_clips_that_are_not_there(toy_run, home, capsys):
    Path("file").touch()
    for given, words in (
        ("nosuch", "--clip nosuch: no such folder; give the folder of a CLIP"),
        ("", "--clip : no such folder"),
        ("file", "--clip file: that is a file"),
        ("a/b/c", "--clip a/b/c: no such folder"),
        ("org/name", f"--clip org/name: nothing at {home}/org/name; on the hub: org/name: HF_HUB_OFFLINE is set"),
    ):
        assert words in one_line(capsys, [str(toy_run), "--clip", given])


def test_a_clip_in_the_hubs_cache_needs_no_network(home, tiny_clip):
    root = home / "hub" / "models--org--name"
    shutil.copytree(tiny_clip, root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert files.find("org/name", "--clip").folder == root / "snapshots" / "abc"


def test_folders_that_are_no_clip(tiny_clip, tiny_sd, tmp_path):
    assert "no whole CLIP: it has no config.json" in refusal(tiny_sd)
    assert "states the model_type clip_text_model, not clip" in refusal(tiny_sd / "text_encoder")
    for name, words in (
        ("model.safetensors", "it has no model.safetensors"),
        ("preprocessor_config.json", "it has no preprocessor_config.json"),
    ):
        folder = copied(tiny_clip, tmp_path / name)
        (folder / name).unlink()
        assert words in refusal(folder)
    folder = copied(tiny_clip, tmp_path / "words")
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").unlink(missing_ok=True)
    assert "it has no tokenizer.json, and no vocab.json with merges.txt" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "its config.json is damaged" in refusal(folder)


def test_a_pickle_is_not_loaded(tiny_clip, tmp_path):
    folder = copied(tiny_clip, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    said = refusal(folder)
    assert "its weights are in a pickle only, pytorch_model.bin, which is not loaded; save them as model.saf" in said


def test_the_preprocessor_may_stand_in_the_newer_file(tiny_clip, tmp_path):
    folder = copied(tiny_clip, tmp_path)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    assert files.find(str(folder), "--clip").preprocessor == PREPROCESSOR
    (folder / "processor_config.json").write_text("{}")
    assert "it has no preprocessor_config.json" in refusal(folder)


def test_parts_that_do_not_fit(tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(tiny_clip, tmp_path)
    stated = {name: json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")}
    weights = load_file(folder / "model.safetensors")

    def text(**values):
        return {"text_config": stated["config.json"]["text_config"] | values}

    def saved(tensors):
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    for name, values, words in (
        ("config.json", text(eos_token_id=3), "and its text encoder waits for 3"),
        ("config.json", text(num_hidden_layers=10**9), "is beyond what weights of"),
        ("config.json", text(num_hidden_layers=1), "have no place for 16 of the weights, text_model.encoder"),
        ("config.json", text(num_hidden_layers=3), "lack 16 of the weights, text_model.encoder"),
        ("config.json", text(hidden_size=32), "is (16, 64) in the weights, and (16, 32) by config.json"),
        ("preprocessor_config.json", {"crop_size": 16}, "of (16, 16) pixels, and its network reads (32, 32)"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "cannot be read as a CLIP: its image_std is"),
    ):
        changed(folder / name, **values)
        assert words in refusal(folder)
        (folder / name).write_text(json.dumps(stated[name]))
    table = "text_model.embeddings.token_embedding.weight"
    changed(folder / "config.json", **text(vocab_size=9))
    saved(weights | {table: weights[table][:9].clone()})
    assert "words, and its text encoder 9" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(stated["config.json"]))
    saved(weights | {"logit_scale": torch.ones((), dtype=torch.int8)})
    assert "its weights are quantised, which is not supported: logit_scale" in refusal(folder)
    saved(weights | {"text_projection.weight": torch.full_like(weights["text_projection.weight"], torch.nan)})
    broken = clip.load(files.find(str(folder), "--clip"), torch.device("cpu"))
    with pytest.raises(UserError, match="gives numbers that are not finite; its weights may be damaged"):
        broken.of_texts(["a duck"])


def test_files_of_distractors_that_are_of_no_use(toy_run, tiny_clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("été".encode("latin-1"))
    with_clip = [str(toy_run), "--clip", str(tiny_clip), "--distractors"]
    for name, words in (
        ("nosuch.txt", "--distractors nosuch.txt: No such file or directory; give a file with one text per line"),
        (str(tmp_path), f"--distractors {tmp_path}: Is a directory"),
        ("empty.txt", "--distractors empty.txt: has no text; write one per line"),
        ("latin.txt", "--distractors latin.txt is damaged: byte "),
    ):
        assert words in one_line(capsys, [*with_clip, name])
    said = one_line(capsys, [str(toy_run), "--distractors", "empty.txt"])
    assert "--distractors empty.txt: only --clip reads it; give --clip MODEL" in said


def test_a_run_without_a_prompt_is_not_measured_with_a_clip(tmp_path):
    unstated = Source(SJCConfig(), tmp_path, tmp_path / "step_9.pt", 9)
    with pytest.raises(UserError, match="nothing states the prompt of this checkpoint; give it with --sd.prompt"):
        evaluate.read_any_prompt(unstated)
    with pytest.raises(UserError, match="models of --family gddpm read no prompt"):
        evaluate.read_any_prompt(unstated._replace(cfg=SJCConfig(family="gddpm")))


@pytest.mark.parametrize(
    "prompt, truth", [("a blue duck", ("blue", "duck")), ("a DSLR photo of a yellow duck", None), (ANY_PROMPT, None)]
)
def test_only_toy_prompts_have_a_truth_beside_a_clip(tmp_path, prompt, truth):
    (tmp_path / "full_config.yml").touch()
    cfg = SJCConfig(sd={"prompt": prompt})
    assert evaluate.read_any_prompt(Source(cfg, tmp_path, tmp_path, 9)) == truth
