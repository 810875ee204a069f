"""A headless Chromium for tests of pages: its windows, what its console said, and how to skip where there is none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

DESKTOP, PHONE = (1280, 800), (390, 844)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # its sandbox does not start for root
    "--disable-dev-shm-usage",  # /dev/shm is small in containers
    "--enable-unsafe-swiftshader",  # WebGL without a GPU
    "--use-angle=swiftshader",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)


def missing() -> str:
    """Return in one line what this machine lacks to drive a browser, "" where it lacks nothing."""
    if not program():
        return f"no browser is installed: {', '.join(BROWSERS)}"
    if not shutil.which("chromedriver"):
        return "no chromedriver is installed"
    try:
        import selenium  # noqa: F401 (whether it is there)
    except ImportError:
        return "the package selenium is not installed"
    return ""


def program() -> str | None:
    """Return the path of the browser, None where there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browser(profile: Path, size: tuple[int, int] = DESKTOP, *flags: str) -> Iterator:
    """Start a headless browser whose pages are `size` = (width, height) CSS pixels, and yield its selenium driver.

    profile: a new folder for what it keeps. Skips the test where the machine has no browser.
    """
    if missing():
        pytest.skip(missing())
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program()
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver"), log_output=os.devnull))
    try:
        resize(driver, size)
        yield driver
    finally:
        driver.quit()


def resize(driver, size: tuple[int, int]) -> None:
    """Make the page of a driver `size` = (width, height) CSS pixels, one device pixel each.

    A narrow page is a phone: one whose HTML does not name `width=device-width` as its viewport is laid out wider there.
    """
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def complaints(driver) -> list[str]:
    """Return the errors and warnings of the page's console since the last call.

    A missing favicon is none, and neither is what a driver of graphics says of a GPU that is not there.
    """
    said = [e["message"] for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    return [text for text in said if "favicon.ico" not in text and "GL Driver Message" not in text]


def screenshot(driver, path: Path) -> Path:
    """Write what the page shows as a PNG file, and return its path."""
    path.write_bytes(driver.get_screenshot_as_png())
    return path
