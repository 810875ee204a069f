"""The page of a run: nothing out of a file is taken for HTML, curves by hand, states, what is left out, its end."""

import base64
import hashlib
import io
import json
import os
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run_sjc
from my import config, errors, run_dir, starts
from my.errors import UserError
from my.media import write_png, write_video
from options.sjc import SJCConfig
from pages import curves, facts, markup, shows
from pages import run as pages
from pages.live import PAGE, Live
from sjc import SJC
from tiny import Affine
from tiny import config as tiny_config

EVIL = "</script><img src=x onerror=alert(1)>\"' <!-- &amp; \u2028 {}"


class Page(HTMLParser):
    """The elements and the texts of a page, and what its scripts hold: {id or place: text}."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts = [], [], {}
        self.open = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = dict(attrs).get("id", len(self.scripts)) if tag == "script" else None

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open is None:
            self.words.append(data)
        else:
            self.scripts[self.open] = self.scripts.get(self.open, "") + data

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a run of 100 steps that has finished, with pictures and a video; it is the current one."""
    monkeypatch.chdir(tmp_path)
    errors._unheard.clear()
    make(tmp_path, SJCConfig(family="ideal", sd={"prompt": "a blue duck"}, n_steps=100))
    return tmp_path


def make(folder, cfg):
    config.write(cfg, folder / "full_config.yml")
    with run_dir.Heartbeat(folder / "heartbeat.json", cfg.n_steps) as beat:
        beat.step = cfg.n_steps
    with run_dir.History(folder / "history.json") as history:
        for step in range(10, cfg.n_steps + 1, 10):
            history.add(step, sigma=100 / step, score=0.5, regulariser=step, opacity=0.25)
    (folder / "img").mkdir()
    for step in range(10, cfg.n_steps + 1, 10):
        write_png(folder / "img" / f"step_{step:07d}.png", np.full((8, 8, 3), step, np.uint8))
    (folder / "test_100" / "view_seq").mkdir(parents=True)
    write_video(folder / "test_100" / "view_seq" / "view.mp4", np.zeros((3, 64, 64, 3), np.uint8))


def page_of(folder, step=0):
    pages.write(folder, config.read(SJCConfig, folder / "full_config.yml"), step)
    return Page((folder / PAGE).read_text())


# ---------------------------------------------------------------- the page


def test_a_finished_run(folder):
    with starts.recorded(command="run_sjc.py --sd.prompt 'a blue duck'", seed=0, threads=2, versions={"torch": "2.9"}):
        errors.note("by the way")
    page = page_of(folder)
    assert "Finished: step 100 of 100" in page.text and "run_sjc.py --sd.prompt 'a blue duck'" in page.words
    assert {"by the way", "done", "2.9", "--n_steps", "threads"} <= set(page.words)
    (video,) = [attrs for tag, attrs in page.tags if tag == "video"]
    assert video["aria-label"] == "a blue duck: turntable" and video["src"].startswith("data:video/mp4;base64,")
    pictures = [attrs["alt"] for tag, attrs in page.tags if tag == "img"]
    assert pictures == [f"a blue duck, after step {step}" for step in range(10, 101, 10)]
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 4
    assert "No mesh yet: run export_mesh.py in this folder" in page.text
    assert json.loads(page.scripts["live"])["every"] is None and len(page.scripts) == 3  # no library of the 3D view


def test_nothing_on_the_page_is_taken_for_html(folder):
    texts = {"prompt": EVIL, "negative_prompt": EVIL, "checkpoint": EVIL, "vae": EVIL, "lora": [EVIL]}
    cfg = SJCConfig(sd=texts, pose={"view_texts": [f"front={EVIL}"]}, n_steps=100)
    config.write(cfg, folder / "full_config.yml")
    (folder / "heartbeat.json").write_text(json.dumps({"step": 3, "failed": f"RunError: {EVIL}"}))
    facts_of_start = {"command": EVIL, "device": EVIL, "seed": [EVIL], "versions": {EVIL: EVIL}, "threads": {EVIL: 1}}
    with pytest.raises(RuntimeError), starts.recorded(**facts_of_start):
        errors.note(EVIL)
        raise RuntimeError(EVIL)
    name = EVIL.replace("/", "")
    (folder / f"{name}.glb").write_bytes(shows.GLB)
    with open("history.json", "a") as file:
        file.write(json.dumps({"step": 101, EVIL: EVIL, "score": EVIL}) + "\n")
    page = page_of(folder)
    assert {attrs.get("src", "data:")[:5] for _, attrs in page.tags} == {"data:"}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    known = set("html head meta title style body header nav main section footer script video canvas img".split())
    known |= set("a h1 h2 h3 h4 p div dl dt dd ol ul li figure figcaption b span svg path text".split())
    known |= set("table tr th td details summary pre code button article".split())
    assert {tag for tag, _ in page.tags} <= known
    assert [tag for tag, _ in page.tags].count("script") == 6 == len(page.scripts)
    assert json.loads(page.scripts["facts"])["prompt"] == EVIL
    assert f"Failed: {EVIL}" in page.words and EVIL in page.words  # the title, and texts as they are
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "canvas"]
    assert labels == [f"{EVIL}: 3D view"]


def test_json_in_a_script_element():
    text = markup.json_data({"a": EVIL, EVIL: [1.5, None]})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": EVIL, EVIL: [1.5, None]}


def test_the_policy_lets_the_scripts_of_the_page_run_and_no_others(folder):
    (folder / "mesh.glb").write_bytes(shows.GLB)
    page = page_of(folder)
    (policy,) = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    run = [text for name, text in page.scripts.items() if name not in ("facts", "live", "mesh-data")]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert rules.pop("script-src").split() == [f"'sha256-{digest}'" for digest in digests] and len(run) == 3
    assert rules.pop("default-src") == "'none'"
    assert {word for rule in rules.values() for word in rule.split()} == {"data:", "blob:", "'unsafe-inline'", "'none'"}


def test_no_script_of_the_pages_ends_its_element():
    for path in ("page.js", "mesh.js", "three/three.min.js"):
        assert not re.search(r"</script|<!--", markup.asset_text(path), re.IGNORECASE)


def test_paths_do_not_say_whose_they_are(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/jane_doe")
    cfg = SJCConfig(sd={"checkpoint": "/home/jane_doe/models/x.ckpt"}, n_steps=100)
    config.write(cfg, folder / "full_config.yml")
    page = page_of(folder)
    assert "~/models/x.ckpt" in page.words and "jane_doe" not in (folder / PAGE).read_text()


def test_a_family_without_a_prompt(folder):
    config.write(SJCConfig(family="ddpm", n_steps=100), folder / "full_config.yml")
    assert "Finished: A field of the family ddpm" in page_of(folder).words


# ---------------------------------------------------------------- how far it is


def beat(folder, **values):
    (folder / "heartbeat.json").write_text(json.dumps(values))


def test_a_run_that_goes_on(folder):
    beat(folder, step=40, n_steps=100, eta_s=120, elapsed_s=80, done=False)
    starts.add("start", command="run_sjc.py", at_step=0)
    Path("history.json").write_text('{"step": 50, "sigma": 1}\n{"step": 6')
    with run_dir.alone():
        page = page_of(folder)
        assert "Running: step 50 of 100, about 100 s left" in page.words  # 2 s per step, 50 steps
        assert json.loads(page.scripts["live"])["every"] == 15 and "on its way" in page.words
        assert "Running: step 60 of 100, about 80 s left" in page_of(folder, 60).words
        ((tag, attrs),) = [(tag, attrs) for tag, attrs in page.tags if tag == "progress"]
        assert (attrs["max"], attrs["value"]) == ("100", "50")
        beat(folder, step=0, n_steps=100, eta_s=None, elapsed_s=0)
        Path("history.json").write_text("")
        assert "Running: step 0 of 100, time left not yet known" in page_of(folder).words
    assert "Stopped: step 50 of 100" in page_of(folder, 50).words


@pytest.mark.parametrize(
    "values, state, why",
    [
        ({"step": 100, "done": True}, "finished", ""),
        ({"step": 40, "done": True}, "stopped", "its process was killed"),  # which only a damaged one says
        ({"step": 40}, "stopped", "its process was killed"),
        ({"step": 40, "stopped": "Ctrl-C"}, "stopped", "stopped by Ctrl-C"),
        ({"step": 40, "failed": "RunError: step 40: no"}, "failed", "step 40: no"),
        ({"step": 40, "failed": "MemoryError"}, "failed", "MemoryError"),
        ({"step": "x", "eta_s": "y", "elapsed_s": [1], "failed": 3}, "stopped", "its process was killed"),
        ({"step": 10**400, "eta_s": 10**400, "elapsed_s": 1e999}, "stopped", "its process was killed"),
    ],
)
def test_states(folder, values, state, why):
    beat(folder, **values)
    Path("history.json").write_text('{"step": 40, "sigma": 1}\n')
    cfg = config.read(SJCConfig, "full_config.yml")
    found = facts.gather(folder, cfg)
    assert (found.state, found.why) == (state, why) and f"{state.title()}: step " in page_of(folder).text


def test_without_locks_a_fresh_heartbeat_is_a_sign_of_life(folder, monkeypatch):
    monkeypatch.setattr(run_dir, "is_held", lambda _: None)
    for stamp, state in (("2026-01-01T00:00:00+00:00", "stopped"), (None, "stopped")):
        assert facts.state_of(folder, {"updated": stamp}, False)[0] == state
    with run_dir.Heartbeat("heartbeat.json", 9):
        assert facts.state_of(folder, run_dir.read_heartbeat("heartbeat.json"), False)[0] == "running"


def test_a_killed_command_keeps_what_it_took(folder):
    starts.add("start", command="first")
    starts.add("use", memory=1_500_000_000)
    starts.add("start", command="second")
    page = page_of(folder)
    assert {"1.5 GB", "killed", "first", "second", "Command 2"} <= set(page.words)
    Path("starts.json").write_text("damaged\n")
    assert "Damaged lines of starts.json, which are left out: 1." in page_of(folder).words


# ---------------------------------------------------------------- curves


def test_ticks_by_hand():
    assert curves.ticks(0, 1500, False) == [0, 500, 1000, 1500]
    assert curves.ticks(0, 1, False) == [0, 0.5, 1]
    assert curves.limits(0.13, 0.44, False) == pytest.approx((0.1, 0.5))
    assert curves.limits(3, 3, False) == (1, 5)
    assert curves.ticks(0.05, 20, True) == pytest.approx([0.1, 1, 10])
    assert curves.ticks(0.9, 12, True) == pytest.approx([1, 3, 10])
    low, high = curves.limits(2, 2, True)
    assert low < 2 < high


def test_a_curve_by_hand():
    rows = [{"step": 0, "regulariser": 0.0}, {"step": 50, "regulariser": None}, {"step": 100, "regulariser": 4.0}]
    svg = curves.curves(rows, 100)
    left, right, top, bottom = curves.LEFT, curves.W - curves.RIGHT, curves.TOP, curves.H - curves.BOTTOM
    assert f'<path class="raw" d="M{left:.1f} {bottom:.1f}L{right:.1f} {top:.1f}"/>' in svg
    assert "0 at first, 4 at last, between 0 and 4." in svg and svg.count("<svg") == 1


def test_only_numbers_are_points():
    values = [True, "3", None, [], float("nan"), 1e300, 10**400, -1, 0, 1e-40, 2.5]
    rows = [{"step": i, "sigma": value} for i, value in enumerate(values)] + [
        {"step": 10**400, "sigma": 1},
        {"step": 4},
    ]
    sigma, opacity = (next(c for c in curves.CURVES if c.key == key) for key in ("sigma", "opacity"))
    assert curves.points_of(rows, sigma, 100) == [(10, 2.5)]  # on a logarithmic axis
    rows = [{**row, "opacity": row.get("sigma")} for row in rows]
    assert [value for _, value in curves.points_of(rows, opacity, 100)] == [-1, 0, 1e-40, 2.5]
    assert curves.curves(rows, 100).count("<svg") == 2
    assert curves.curves([], 100) == "<p>No step is logged yet.</p>\n"


def test_many_points_are_averaged_and_smooth_lines_keep_constants():
    rows = [{"step": i, "opacity": 0.25} for i in range(1000)]
    points = curves.points_of(rows, curves.CURVES[3], 1000)
    assert len(points) == 334 and points[0] == (1, 0.25)
    assert {round(value, 9) for _, value in curves.smoothed(points, True)} == {0.25}
    assert curves.smoothed([(i, float(i)) for i in range(100)], False)[50] == (50, 50)


# ---------------------------------------------------------------- what is shown


def test_the_best_video_is_shown(folder):
    for name in ("test_20/view_seq/view.mp4", "highres_90/img.mp4", "highres_100/img.mp4"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(name.encode())
    (folder / "highres_90" / "img.webp").write_bytes(b"")
    (folder / "highres_200").mkdir()
    (folder / "highres_200" / "img.gif").write_bytes(b"")
    found = [path.relative_to(folder).as_posix() for path in shows.videos(folder)]
    assert found.pop(0) == "highres_200/img.gif" and found.pop(2) == "highres_90/img.webp"
    (folder / "highres_200" / "img.gif").unlink()
    tests = ["test_100/view_seq/view.mp4", "test_20/view_seq/view.mp4"]
    assert found == ["highres_100/img.mp4", "highres_90/img.mp4", *tests]
    assert base64.b64encode(b"highres_100/img.mp4").decode() in shows.video(folder, "a duck").html


def test_a_large_video_is_made_smaller_or_left_out(folder, monkeypatch):
    path = folder / "test_100" / "view_seq" / "view.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8))
    size = path.stat().st_size
    monkeypatch.setattr(shows, "VIDEO_EDGE", 64)
    monkeypatch.setattr(shows, "MOST_VIDEO", size - 1)
    html = shows.video(folder, "a duck").html
    assert "<video" in html and "view.mp4 has" in html and len(html) < size
    monkeypatch.setattr(shows, "MOST_VIDEO", 10)
    assert "too much for this page" in shows.video(folder, "a duck").html
    path.write_bytes(b"no video at all")
    assert "cannot be read as a video" in shows.video(folder, "a duck").html


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_an_animation_is_a_turntable_too(folder, ending, monkeypatch):
    path = folder / "highres_100" / f"img.{ending}"
    path.parent.mkdir()
    write_video(path, np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8))
    html = shows.video(folder, 'a "duck"').html
    assert f'src="data:image/{ending};base64,{base64.b64encode(path.read_bytes()).decode()}"' in html
    assert 'alt="a &quot;duck&quot;: turntable"' in html and "<video" not in html
    alts = [attrs["alt"] for tag, attrs in page_of(folder).tags if tag == "img"]
    assert alts[0].endswith(": turntable") and len(set(alts)) == len(alts)  # no picture takes its place
    still = base64.b64decode(html.partition('reduce)" srcset="data:image/png;base64,')[2].partition('"')[0])
    assert Image.open(io.BytesIO(still)).size == (256, 256)  # small ones are enlarged
    monkeypatch.setattr(shows, "MOST_VIDEO", path.stat().st_size - 1)
    html = shows.video(folder, "a duck").html  # that of the test views is smaller
    assert "<video" in html and f"highres_100/img.{ending} has" in html and "too much for this page" in html
    path.write_bytes(b"no picture")
    assert "cannot be read as a video" in shows.video(folder, "a duck").html


def test_which_mesh_is_shown(folder):
    for i, name in enumerate(("b.glb", "a.glb")):
        (folder / name).write_bytes(shows.GLB)
        os.utime(folder / name, (i, i))
    assert shows.mesh_file(folder).name == "a.glb"
    (folder / "mesh.glb").write_bytes(shows.GLB + b"the mesh")
    assert shows.mesh_file(folder).name == "mesh.glb"
    shown = shows.mesh(folder, "a duck")
    assert base64.b64encode(shows.GLB + b"the mesh").decode() in shown.html and len(shown.scripts) == 2


def test_a_mesh_that_cannot_be_shown(folder, monkeypatch):
    (folder / "mesh.glb").write_bytes(b"glTF\x01\x00\x00\x00")
    assert "mesh.glb is no GLB file of version 2" in shows.mesh(folder, "a duck").html
    monkeypatch.setattr(shows, "MOST_MESH", 7)
    assert "mesh.glb has 0.008 kB, more than the 0.007 kB" in shows.mesh(folder, "a duck").html


def test_pictures_are_spread_and_large_ones_are_small(folder):
    assert [step for step, _ in shows.spread([(i, None) for i in range(31)], 4)] == [0, 10, 20, 30]
    assert shows.spread([(1, None)], 4) == [(1, None)]
    path = folder / "img" / "step_0000005.png"
    write_png(path, np.full((512, 512, 3), 200, np.uint8))
    data = shows.thumbnail(path)
    assert data.startswith(b"\xff\xd8") and len(data) < 5000  # a JPEG
    path.write_bytes(path.read_bytes()[:300])
    assert shows.thumbnail(path) is None
    assert shows.strip(folder, "a duck").html.count("<img") == 10


def test_whatever_a_run_holds_the_page_has_an_end(folder, monkeypatch):
    """All that may grow is at its most, and behind it what the page itself takes."""
    assert 4 / 3 * (shows.MOST_VIDEO + shows.MOST_MESH + shows.N_PICTURES * shows.MOST_PICTURE) < 21e6
    (folder / "mesh.glb").write_bytes(shows.GLB)
    long = "&" * 100_000
    for _ in range(40):
        starts.add("start", command=long, device=long, versions={"torch": long})
        starts.add("note", text=long[:5000])
    page_of(folder)
    assert (folder / PAGE).stat().st_size < 4e6


# ---------------------------------------------------------------- while a run goes on


def test_a_run_leaves_its_page_and_refreshes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    cfg = tiny_config(n_steps=40)
    config.write(cfg, "full_config.yml")
    monkeypatch.setattr(
        pages, "write", lambda *args, write=pages.write: (write(*args), seen.append(Path(PAGE).read_text()))
    )
    monkeypatch.setattr(run_sjc, "save_test_views", lambda optimisation: None)
    with run_dir.alone(), starts.recorded(command="run_sjc.py"):
        run_sjc.train(SJC(cfg, Affine()), 0)
    states = [re.search(r'id="state">([^,<]*)', text)[1] for text in seen]
    assert states == [f"Running: step {step} of 40" for step in range(2, 41, 2)] + ["Finished: step 40 of 40"]
    assert [start.ended for start in starts.read(".")[0]] == ["done"]


@pytest.mark.parametrize("error, words", [(KeyboardInterrupt(), "Stopped: step 4 of 6"), (ValueError("no"), "Failed")])
def test_a_run_that_ends_early_says_so(tmp_path, monkeypatch, error, words):
    monkeypatch.chdir(tmp_path)
    cfg = tiny_config(n_steps=6)
    config.write(cfg, "full_config.yml")
    optimisation = SJC(cfg, Affine())
    step = optimisation.step
    monkeypatch.setattr(optimisation, "step", lambda i: step(i) if i < 4 else (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        run_sjc.train(optimisation, 0)
    assert words in Page(Path(PAGE).read_text()).text


def test_a_page_that_cannot_be_written_costs_a_note_only(folder, capsys):
    (folder / PAGE).mkdir()
    cfg = config.read(SJCConfig, "full_config.yml")
    with Live(cfg) as live:
        other = threading.Thread(target=live.refresh, args=(3,))
        other.start()
    other.join()
    err = capsys.readouterr().err
    assert err.count("note: report.html is not written: ") == 1 and "--report False" in err
    Path("history.json").write_text("damaged\n{}\n")
    (folder / PAGE).rmdir()
    Live(cfg).refresh(3)
    assert "history.json: line 1 is damaged" in capsys.readouterr().err and not (folder / PAGE).exists()


def test_a_full_disk_is_said_as_always(folder, monkeypatch):
    monkeypatch.setattr(pages, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space", "report.html")))
    cfg = config.read(SJCConfig, "full_config.yml")
    with pytest.raises(OSError, match="No space"), Live(cfg):
        pass
    with pytest.raises(UserError, match="more important"), Live(cfg):
        raise UserError("more important")


def test_a_run_without_a_page(folder):
    cfg = config.read(SJCConfig, "full_config.yml").model_copy(update={"report": False})
    starts.add("start", command="run_sjc.py")
    with Live(cfg) as live:
        live.refresh(3)
    assert not (folder / PAGE).exists() and starts.read(folder)[0][0].last["memory"] > 0
