"""A headless Chromium, driven by selenium; tests that need it skip and say what is missing."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BINARIES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")  # fmt: skip


def missing() -> str:
    """What a browser test lacks here; empty where it can run."""
    if importlib.util.find_spec("selenium") is None:
        return "the library selenium (the extra 'test')"
    if _binary() is None:
        return "a Chromium (Debian: chromium)"
    if shutil.which("chromedriver") is None:
        return "chromedriver (Debian: chromium-driver)"
    return ""


def _binary() -> str | None:
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


@contextmanager
def chromium(width: int = 1280, height: int = 860) -> Iterator[Any]:
    """A fresh browser with a profile of its own."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.binary_location = str(_binary())
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


class Page:
    """The arena's page in a browser, as a person uses it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, user: str) -> None:
        """Load the page and type a name, as on a first visit."""
        # Not from the page itself: a script that still runs there could write again what is cleared.
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": self.url.rstrip("/"), "storageTypes": "local_storage"}
        )
        self.driver.get(self.url)
        self.wait(lambda: self.shown("welcome"))
        self.element("name").send_keys(user + "\n")
        self.wait(lambda: self.shown("stage"))

    def element(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def shown(self, name: str) -> bool:
        return bool(self.element(name).is_displayed())

    def text(self, name: str) -> str:
        return str(self.element(name).text)

    def mark(self, name: str) -> str | None:
        """`pair` (ticket on show) or `confirmed` (ticket of the last vote that the server confirmed)."""
        found: str | None = self.driver.execute_script("return document.body.dataset[arguments[0]] || null", name)
        return found

    def wait(self, condition: Any, seconds: float = 30) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, seconds, poll_frequency=0.02).until(lambda _: condition())

    def press(self, key: str) -> str:
        """Press a key for the pair on show and wait until that vote is confirmed; returns its ticket."""
        self.wait(lambda: self.mark("pair") is not None and self.mark("pair") != self.mark("confirmed"))
        ticket = str(self.mark("pair"))
        self.driver.find_element("tag name", "body").send_keys(key)
        self.wait(lambda: self.mark("confirmed") == ticket)
        return ticket

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        where = [{"x": x, "y": y} for x, y in points]
        self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})
