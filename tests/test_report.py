"""report.py: what it refuses; and its page in a browser, on a wide and a narrow screen, light and dark."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from trimesh.visual.material import PBRMaterial

import browser
import report
from my import config, run_dir
from my.errors import UserError, explain
from options.canvas import CanvasConfig
from options.sjc import SJCConfig
from pages import run as pages
from pages.live import PAGE
from test_pages import EVIL, make

FRONT, LEFT, TOP = (200, 40, 30), (40, 160, 60), (30, 60, 200)  # colours of a box: +z, +x and +y of glTF


@pytest.fixture
def folder(tmp_path):
    """The folder of a finished run whose prompt is hostile, with a checkpoint, pictures and a video."""
    make(tmp_path, SJCConfig(family="ideal", sd={"prompt": EVIL, "negative_prompt": EVIL}, n_steps=100))
    (tmp_path / "ckpt" / "step_0000100").mkdir(parents=True)
    return tmp_path


# ---------------------------------------------------------------- the command


def test_the_page_is_in_the_folder_of_the_run(folder, capsys, monkeypatch):
    report.main([str(folder)])
    assert capsys.readouterr().out.startswith(f"done: {folder / PAGE}, ")
    (folder / PAGE).unlink()
    monkeypatch.chdir(folder)
    report.main([])
    assert (folder / PAGE).exists() and not list(folder.glob(".*"))


def test_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="has no full_config.yml: it is not the folder of a run of run_sjc.py"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="nowhere: no such file or folder; give the folder of a run"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="RUN: takes 1 value, got 2: 'a,b'; give 1"):
        report.main(["a", "b"])
    config.write(CanvasConfig(), tmp_path / "full_config.yml")
    with pytest.raises(UserError, match="holds a run of run_2d_sjc.py"):
        report.main([str(tmp_path)])


def test_a_history_that_is_missing_or_damaged(folder):
    (folder / "history.json").write_text('{"step": 1}\nno JSON\n')
    with pytest.raises(UserError, match="history.json: line 2 is damaged; delete that line"):
        report.main([str(folder)])
    (folder / "history.json").unlink()
    with pytest.raises(UserError, match="history.json: no such file"):
        report.main([str(folder)])
    assert not (folder / PAGE).exists()


def test_a_page_that_cannot_be_written(folder, monkeypatch):
    monkeypatch.setattr(run_dir.os, "fsync", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError) as caught:
        report.main([str(folder)])
    message, status = explain(caught.value, "start it again")
    assert status == 1 and message.startswith(f"{folder / PAGE}: permission denied; ") and not list(folder.glob(".*"))


# ---------------------------------------------------------------- in a browser


def box(kind):
    """The bytes of a GLB: a box whose sides have colours, without light; `kind` is texture or vertex."""
    mesh = trimesh.creation.box((1, 1, 1))
    mesh.unmerge_vertices()
    sides = np.repeat(np.argmax(np.abs(mesh.face_normals), axis=1), 3)  # of each corner: 0 x, 1 y, 2 z
    if kind == "texture":
        uv = np.stack([(sides + 0.5) / 4, np.full(len(sides), 0.5)], axis=1)
        picture = Image.fromarray(np.repeat(np.uint8([[LEFT, TOP, FRONT, FRONT]]), 8, axis=0).repeat(8, axis=1))
        mesh.visual = trimesh.visual.TextureVisuals(uv, material=PBRMaterial(baseColorTexture=picture))
    else:
        srgb = np.float64([LEFT, TOP, FRONT])[sides] / 255
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
        mesh.visual.vertex_colors = np.rint(np.c_[linear, np.ones(len(linear))] * 255).astype(np.uint8)

    def unlit(tree):
        tree["extensionsUsed"] = ["KHR_materials_unlit"]
        for material in tree.setdefault("materials", [{}]):
            material["extensions"] = {"KHR_materials_unlit": {}}
        tree["meshes"][0]["primitives"][0]["material"] = 0

    return trimesh.exchange.gltf.export_glb(mesh.scene(), tree_postprocessor=unlit)


def wait(driver, script, seconds=60):
    """Wait until a script returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (value := driver.execute_script(f"return {script}")):
        assert time.monotonic() < end, script
        time.sleep(0.1)
    return value


READY = "document.getElementById('mesh').dataset.ready"
STILL = {"name": "prefers-reduced-motion", "value": "reduce"}


def open_page(driver, folder):
    driver.get((folder / PAGE).as_uri())
    if (folder / "mesh.glb").exists():
        wait(driver, f"{READY} || document.getElementById('mesh-state').textContent.includes('cannot')")


def emulate(driver, *features):
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": list(features)})


def view(driver):
    """What the canvas shows once it is at rest, (H, W, 3)."""
    driver.execute_script("document.getElementById('mesh').scrollIntoView({block: 'center'})")
    canvas, before = driver.find_element("id", "mesh"), None
    for _ in range(100):
        image = np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")).astype(int)
        if before is not None and np.array_equal(image, before):
            return image
        before = image
    raise AssertionError("the 3D view does not come to rest")


def share(image, color):
    """The share of the pixels of an image that are of a colour."""
    return (abs(image - np.array(color)).max(axis=-1) <= 3).mean()


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser.browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(autouse=True)
def as_it_was(request):
    yield
    if "driver" in request.fixturenames:
        driver = request.getfixturevalue("driver")
        emulate(driver)
        browser.resize(driver, browser.DESKTOP)


def test_colours_of_vertices_are_shown(driver, folder):
    (folder / "mesh.glb").write_bytes(box("vertex"))
    report.main([str(folder)])
    open_page(driver, folder)
    assert share(view(driver), FRONT) > 0.1 and browser.complaints(driver) == []


def test_the_mesh_is_turned_and_zoomed(driver, folder):
    from selenium.webdriver import ActionChains, Keys

    (folder / "mesh.glb").write_bytes(box("texture"))
    report.main([str(folder)])
    emulate(driver, STILL)  # what is let go stops at once
    open_page(driver, folder)
    first = view(driver)
    assert share(first, FRONT) > 0.1 and share(first, TOP) > 0.01 and share(first, LEFT) == 0
    canvas = driver.find_element("id", "mesh")
    ActionChains(driver).drag_and_drop_by_offset(canvas, -150, 0).perform()  # to the left: its left side, +x, comes
    turned = view(driver)
    assert share(turned, LEFT) > 0.05 and share(turned, FRONT) < share(first, FRONT)
    canvas.send_keys("0")
    assert np.array_equal(view(driver), first)
    canvas.send_keys(Keys.ARROW_RIGHT * 3)
    assert share(view(driver), LEFT) > 0.05
    canvas.send_keys(Keys.ARROW_UP * 9)
    assert share(view(driver), TOP) > 2 * share(first, TOP)
    for nearer, farther in (("+", "-"), ("in", "out")):
        button(driver, "home").click()
        press(driver, nearer)
        assert share(view(driver), FRONT) > 1.1 * share(first, FRONT)
        press(driver, farther)
        press(driver, farther)
        assert share(view(driver), FRONT) < 0.9 * share(first, FRONT)
    canvas.send_keys("0")
    ActionChains(driver).scroll_from_origin(origin(canvas), 0, -200).perform()
    assert share(view(driver), FRONT) > 1.05 * share(first, FRONT)
    assert browser.complaints(driver) == []


def button(driver, name):
    return driver.find_element("css selector", f"[data-mesh={name}]")


def press(driver, name):
    """Press a key of the 3D view, or one of its buttons."""
    driver.find_element("id", "mesh").send_keys(name) if len(name) == 1 else button(driver, name).click()


def origin(element):
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    return ScrollOrigin.from_element(element)


def test_nothing_is_loaded_and_nothing_hostile_runs(driver, folder):
    (folder / "mesh.glb").write_bytes(box("texture"))
    report.main([str(folder)])
    open_page(driver, folder)
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert not [name for name in loaded if not name.startswith(("data:", "blob:"))]
    assert driver.find_element("tag name", "h1").text.split() == EVIL.split()
    blocked = driver.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective));"
        "fetch('https://example.org/').catch(() => {});"
    )
    assert blocked == "connect-src"
    assert all("example.org" in text for text in browser.complaints(driver))


def test_the_page_fits_its_screen(driver, folder):
    (folder / "mesh.glb").write_bytes(box("texture"))
    report.main([str(folder)])
    for size in (browser.DESKTOP, browser.PHONE):
        browser.resize(driver, size)
        open_page(driver, folder)
        driver.find_element("tag name", "summary").click()
        widths = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == size[0]
        for scheme in ("light", "dark"):
            emulate(driver, {"name": "prefers-color-scheme", "value": scheme})
            driver.execute_script("scrollTo(0, 0)")
            ground = np.asarray(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("L"))[2, 2]
            assert (ground < 50) == (scheme == "dark")
        assert share(view(driver), FRONT) > 0.1
    assert browser.complaints(driver) == []


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_the_video_plays_unless_motion_is_to_be_reduced(driver, folder, motion):
    emulate(driver, {**STILL, "value": motion})
    report.main([str(folder)])
    open_page(driver, folder)
    wait(driver, "document.querySelector('video').readyState >= 2")
    if motion == "reduce":
        assert driver.execute_script("return document.querySelector('video').paused")
    else:
        wait(driver, "document.querySelector('video').played.length")
    assert browser.complaints(driver) == []


def test_a_keyboard_reaches_all_that_can_be_used(driver, folder):
    from selenium.webdriver import ActionChains, Keys

    (folder / "mesh.glb").write_bytes(box("texture"))
    report.main([str(folder)])
    open_page(driver, folder)
    seen = []
    for _ in range(30):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        tag, outline = driver.execute_script(
            "const e = document.activeElement; return [e.tagName, getComputedStyle(e).outlineStyle]"
        )
        if tag == "BODY":
            break
        assert outline != "none" or tag == "VIDEO", tag
        seen.append(tag)
    assert {"A", "VIDEO", "CANVAS", "BUTTON", "OL", "SUMMARY"} <= set(seen)
    levels = driver.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((e) => +e.tagName[1])")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:]))
    bare = (
        "return [...document.querySelectorAll('img:not([alt]), svg:not([aria-label]), section:not([aria-labelledby])')]"
    )
    assert driver.execute_script(f"{bare}.length") == 0


def test_a_mesh_that_is_damaged_is_told(driver, folder):
    (folder / "mesh.glb").write_bytes(box("texture")[:200])
    report.main([str(folder)])
    open_page(driver, folder)
    assert "The mesh cannot be shown" in driver.find_element("id", "mesh-state").text


def test_a_page_reloads_itself_while_its_run_goes_on(driver, folder, monkeypatch):
    monkeypatch.setattr(pages, "RELOAD_S", (1, 1))
    (folder / "heartbeat.json").write_text(json.dumps({"step": 40, "done": False}))
    (folder / "history.json").write_text('{"step": 40, "sigma": 1}\n')
    monkeypatch.chdir(folder)
    with run_dir.alone():
        report.main([])
    open_page(driver, folder)
    assert driver.find_element("id", "state").text == "Running: step 40 of 100, time left not yet known"
    driver.execute_script("scrollTo(0, 900); document.getElementById('all').open = true; window.old = true")
    top = "Math.round(document.getElementById('curves').getBoundingClientRect().top)"
    place = driver.execute_script(f"return {top}")
    (folder / "heartbeat.json").write_text(json.dumps({"step": 100, "done": True}))
    (folder / "history.json").write_text('{"step": 100, "sigma": 1}\n')
    report.main([])
    wait(driver, "!window.old && document.readyState == 'complete' && document.title.startsWith('Finished')")
    wait(driver, f"Math.abs({top} - {place}) < 2 && document.getElementById('all').open")
    assert driver.execute_script("return JSON.parse(document.getElementById('live').textContent).every") is None
    assert browser.complaints(driver) == []


def test_the_reader_can_stop_the_reloading(driver, folder, monkeypatch):
    monkeypatch.setattr(pages, "RELOAD_S", (1, 1))
    (folder / "heartbeat.json").write_text(json.dumps({"step": 40, "done": False}))
    monkeypatch.chdir(folder)
    with run_dir.alone():
        report.main([])
    text = Path(PAGE).read_text()
    Path(PAGE).write_text(text.replace('"written": ', '"written": 1e-9, "then": '))  # long ago
    open_page(driver, folder)
    driver.find_element("id", "reload").click()
    wait(driver, "document.getElementById('news').textContent.includes('the run may have ended')")
    driver.refresh()
    assert not driver.find_element("id", "reload").is_selected()


def test_the_page_of_a_published_checkpoint(tmp_path):
    """It has no history and no options of its own: these are flags."""
    (tmp_path / "ckpt").mkdir()
    n = 4
    state = {"density": torch.zeros(1, 1, n, n, n), "color": torch.zeros(1, 3, n, n, n), "d_scale": torch.zeros(())}
    torch.save({**state, "bg": torch.zeros(1, 3, 4, 4)}, tmp_path / "ckpt" / "step_900.pt")
    report.main([str(tmp_path), "--family", "ideal", "--sd.prompt", "a <blue> duck"])
    text = (tmp_path / "report.html").read_text()
    assert "Finished: step 900 of 900" in text and "No step is logged yet" in text and "<blue>" not in text
