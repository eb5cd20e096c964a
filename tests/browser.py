"""A real browser without a window, for tests of pages."""

import shutil
import tempfile
from collections.abc import Iterator

import pytest

CALM = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run")
CALM += ("disable-background-networking", "disable-component-update", "disable-sync")


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A selenium driver of Chromium with an empty profile; skips where either is absent."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs Debian's chromium and chromium-driver")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for each in (*CALM, f"user-data-dir={profile}", "window-size=1280,900"):
            options.add_argument(f"--{each}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})  # errors of a page's script
        running = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            yield running
        finally:
            running.quit()
