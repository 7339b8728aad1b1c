"""A page of the server in a real Chromium, driven as a person does: what it shows, clicks, keys."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from tests.e2e.harness import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from selenium.webdriver.remote.webelement import WebElement

DESKTOP = (1280, 900)
PHONE = (390, 844)

_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    # It asks nobody but the server that is tested.
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--lang=en",
)


def start_chromium() -> webdriver.Chrome:
    """Start a Chromium without a window."""
    options = Options()
    options.binary_location = "/usr/bin/chromium"
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))


class Browser:
    """One page at a time; every wait ends."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> Browser:
        """Load a page."""
        self.driver.get(address)
        return self

    def resize(self, size: tuple[int, int]) -> None:
        """Give the page a width and a height, in pixels."""
        width, height = size
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def prefer(self, theme: str) -> None:
        """Say that the system prefers `light` or `dark`."""
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run_script(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page."""
        return self.driver.execute_script(script, *arguments)

    @contextmanager
    def before_scripts(self, script: str) -> Iterator[None]:
        """Run JavaScript in each page that is loaded within the block, before its own."""
        added = self.driver.execute_cdp_cmd(
            "Page.addScriptToEvaluateOnNewDocument", {"source": script}
        )
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)

    # What it shows.

    def all(self, css: str) -> list[WebElement]:
        """Return the elements that match, seen or not."""
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def texts(self, css: str) -> list[str]:
        """Return the texts of the elements that match, as they are read at one moment."""
        found: list[str] = self.run_script(
            "return [...document.querySelectorAll(arguments[0])].map((item) => item.innerText)", css
        )
        return found

    def text(self, css: str = "body") -> str:
        """Return the text of all elements that match."""
        return "\n".join(self.texts(css))

    def wait_for(self, css: str, *texts: str) -> WebElement:
        """Wait until an element that is seen matches and has all the texts; return it."""
        found: list[WebElement] = []

        def is_there() -> bool:
            element = self.run_script(
                "return [...document.querySelectorAll(arguments[0])].find((item) =>"
                "item.checkVisibility()"
                "&& arguments[1].every((text) => item.innerText.includes(text)))",
                css,
                texts,
            )
            found[:] = [element]
            return element is not None

        what = f"{css} with {texts}, but" if texts else css
        self.wait(is_there, lambda: f"{what}; {self.texts(css)}; console: {self.console()}")
        return found[0]

    def wait_gone(self, css: str) -> None:
        """Wait until nothing that is seen matches."""
        self.wait(
            lambda: self.run_script(
                "return [...document.querySelectorAll(arguments[0])]"
                ".every((item) => !item.checkVisibility())",
                css,
            ),
            f"{css} goes",
        )

    def wait(self, condition: Callable[[], object], what: str | Callable[[], str]) -> None:
        """Wait, bounded, until a condition holds."""
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            if time.monotonic() > end_s:
                raise AssertionError(f"never: {what if isinstance(what, str) else what()}")
            # Each look keeps Chromium busy.
            time.sleep(0.03)

    def console(self) -> list[dict[str, Any]]:
        """Return what was written to the console since the last call, as far as it is trouble."""
        entries = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry for entry in entries if entry["level"] in {"SEVERE", "WARNING"}]

    def expect_refusal(self, status: int) -> None:
        """Take the line that Chromium writes for an answer with this status; it must be there."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found.extend(self.console())
            return bool(found)

        self.wait(is_there, f"an answer with status {status}")
        assert all(
            f"the server responded with a status of {status} " in item["message"] for item in found
        ), found

    # What a person does.

    def click(self, css: str) -> None:
        """Click the one element that is seen and matches, once it is there."""

        def clicked() -> bool:
            try:
                self.wait_for(css).click()
            except (
                StaleElementReferenceException,
                NoSuchElementException,
                ElementClickInterceptedException,
            ):
                # Drawn anew, or on its way to its place.
                return False
            return True

        self.wait(clicked, f"{css} can be clicked")

    def fill(self, css: str, text: str) -> None:
        """Put a text in place of what a field holds."""
        field = self.wait_for(css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text or Keys.DELETE)

    def choose(self, css: str, value: str) -> None:
        """Choose an option of a select by its value."""
        Select(self.wait_for(css)).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Press keys, where the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self) -> str:
        """Return the name of what has the focus, as a screen reader says it, or its text."""
        name: str = self.run_script(
            "const item = document.activeElement;"
            "return item.ariaLabel || item.labels?.[0]?.innerText || item.innerText"
        )
        return name
