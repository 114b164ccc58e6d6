"""Headless Chromium for the tests of the page: Debian's chromium and chromium-driver."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WAIT = 60  # seconds for anything to happen: a busy machine takes its time


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
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
        resize(chrome)
        yield chrome
    finally:
        chrome.quit()


def resize(chrome: webdriver.Chrome, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


class Page:
    """The page of a server, and what the tests do with it."""

    def __init__(self, driver: webdriver.Chrome, url: str, ready: bool = True) -> None:
        self.driver = driver
        driver.get_log("browser")  # drops what came before
        driver.get(url)
        if ready:
            self.until(lambda: self.text("#model"))

    def until(self, condition: Callable[[], object]) -> object:
        return WebDriverWait(self.driver, WAIT, 0.05).until(lambda _: condition())

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> object:
        return self.driver.execute_script(f"return {script}", *arguments)

    def each(self, selector: str, what: str) -> list:
        """Of all elements ``e``, the value of the expression ``what``."""
        return self.run(f"[...document.querySelectorAll(arguments[0])].map((e) => {what})", selector)

    def text(self, selector: str) -> str:
        return self.run("document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def send(self, prompt: str, wait: bool = True) -> None:
        self.run("(document.getElementById('status').textContent = '')")
        self.one("#prompt").send_keys(prompt, Keys.ENTER)
        self.until(lambda: self.text("#status"))
        if wait:
            self.until(lambda: self.one("#send").is_enabled())

    def set(self, selector: str, value: object) -> None:
        self.run("(arguments[0].value = arguments[1], arguments[0].oninput?.())", self.one(selector), value)

    def complaints(self) -> list[str]:
        """Warnings and errors of the console, but for answers that are no success: the browser logs them itself."""
        lines = [line for line in self.driver.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]
        return [line["message"] for line in lines if "Failed to load resource" not in line["message"]]
