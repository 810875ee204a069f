"""The viewer's page in a browser, where there is one: turned, zoomed, its controls moved, by several visitors at once.

Nothing here depends on how long anything takes: each step waits, for at most a minute, until the page shows it.
"""

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from browser import DESKTOP, PHONE, browser, complaints
from my import config
from sjc import SJC
from tiny import Affine
from tiny import config as tiny_config
from voxnerf import snapshot

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds
OF_VISER = "THREE.Clock: This module has been deprecated"  # its own use of a library


@pytest.fixture
def run(tmp_path):
    """The folder of a run at step 30 of 40: a ball that grows, from a snapshot of step 10 to a checkpoint of 30."""
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = tiny_config(n_steps=40, vox={"grid_size": 8, "bbox_len": 0.7})
    config.write(cfg, folder / "full_config.yml")
    for step in (10, 20, 30):
        keep(folder, step)
    SJC(cfg, Affine()).save(folder / "ckpt", 30)
    return folder


def keep(folder, step):
    """Write the snapshot of a step: a ball with a colour on each side."""
    field = SJC(tiny_config(n_steps=40, vox={"grid_size": 8, "bbox_len": 0.7}), Affine()).field
    x = torch.linspace(-1, 1, 8)
    z, y, x = torch.meshgrid(x, x, x, indexing="ij")
    with torch.no_grad():
        field.density[0, 0] = torch.where(x**2 + y**2 + z**2 < step / 40, 20.0, -20.0)
        field.color[0] = 4 * torch.stack([x, y, z])
    snapshot.write(folder, *snapshot.taken(field, step))


@contextlib.contextmanager
def viewing(folder, *words):
    """Run view.py, and yield its address; at the end Ctrl-C must end it with status 0 and one word."""
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "view.py"), str(folder), "--port", "0", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        try:
            line = process.stdout.readline()
            assert line, process.communicate()
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        finally:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (0, "closed\n", "")


def until(happens):
    """Return what `happens()` returns, once that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := happens():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {PATIENCE} s: {happens.__doc__ or happens}")


def seen(driver):
    """A fingerprint of the picture on the page, without the controls."""
    from selenium.webdriver.common.by import By

    return hashlib.sha256(driver.find_element(By.TAG_NAME, "canvas").screenshot_as_png).hexdigest()


def at_rest(driver):
    """A fingerprint of the picture once it has stopped changing."""
    last = [""]

    def rests():
        before, last[0] = last[0], seen(driver)
        time.sleep(0.3)
        return before == last[0] and before

    return until(rests)


def says(driver, words):
    """Wait until the page says some words."""
    from selenium.webdriver.common.by import By

    until(lambda: words in driver.find_element(By.TAG_NAME, "body").text)


def sliders(driver):
    from selenium.webdriver.common.by import By

    return driver.find_elements(By.CSS_SELECTOR, "[role=slider]")


def drag(driver, x, y):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    canvas = driver.find_element(By.TAG_NAME, "canvas")
    at = ActionChains(driver).move_to_element_with_offset(canvas, -60, -20).click_and_hold()
    for _ in range(6):
        at = at.move_by_offset(x // 6, y // 6).pause(0.02)
    at.release().perform()


def zoom(driver):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.by import By

    canvas = ScrollOrigin.from_element(driver.find_element(By.TAG_NAME, "canvas"))
    ActionChains(driver).scroll_from_origin(canvas, 0, -300).perform()


def choose(driver, mode):
    from selenium.webdriver.common.by import By

    driver.find_element(By.XPATH, f"//button[normalize-space()='{mode}']").click()


def own_complaints(driver):
    return [text for text in complaints(driver) if OF_VISER not in text]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_visitor_turns_the_field_and_moves_through_time(run, tmp_path, size):
    from selenium.webdriver.common.keys import Keys

    with viewing(run) as url, browser(tmp_path / "profile", size) as driver:
        driver.get(url)
        says(driver, "step 30 of 40; the run is at 30")
        assert driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
        pictures = [at_rest(driver)]
        for act in (lambda: drag(driver, 90, 30), lambda: zoom(driver)):
            act()
            until(lambda: seen(driver) != pictures[-1])
            pictures.append(at_rest(driver))
        progress = sliders(driver)[0]
        progress.send_keys(Keys.HOME)
        says(driver, "step 10 of 40; the run is at 30")
        pictures.append(at_rest(driver))
        choose(driver, "depth")
        says(driver, "depth, step 10 of 40")
        pictures.append(at_rest(driver))
        assert len(set(pictures)) == len(pictures)
        assert not own_complaints(driver)


def test_visitors_see_what_they_choose_while_the_run_goes_on(run, tmp_path):
    from selenium.webdriver.common.keys import Keys

    with viewing(run) as url, browser(tmp_path / "a") as one, browser(tmp_path / "b", PHONE) as other:
        for driver in (one, other):
            driver.get(url)
            says(driver, "step 30 of 40")
        sliders(other)[0].send_keys(Keys.HOME)
        says(other, "step 10 of 40; the run is at 30")
        says(one, "step 30 of 40; the run is at 30")
        keep(run, 40)
        says(one, "step 40 of 40")  # it was at the end, and follows
        says(other, "step 10 of 40")
        until(lambda: sliders(other)[0].get_attribute("aria-valuemax") == "100")
        snapshot.path_of(run, 20).unlink()
        at_rest(one)
        snapshot.path_of(run, 40).unlink()
        drag(one, 60, 0)  # what is shown stays there to be turned
        at_rest(one)
        says(one, "step 40 of 40")
        assert not own_complaints(one) and not own_complaints(other)
