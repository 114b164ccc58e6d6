"""Headless Chromium for the tests of the page: Debian's chromium and chromium-driver."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

WAIT = 20  # seconds for anything to happen


@contextmanager
def browser(width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[webdriver.Chrome]:
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing: scripts/setup.sh test installs chromium and chromium-driver"
    options = Options()
    # Root has no sandbox, containers have a small /dev/shm, and nothing may be asked of the network.
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    try:
        chrome.set_page_load_timeout(WAIT)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        yield chrome
    finally:
        chrome.quit()
