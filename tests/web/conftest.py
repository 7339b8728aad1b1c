"""A real server and a real Chromium that tests share, and runs to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import serve
from tests.web.browser import DESKTOP, Browser, start_chromium
from tests.web.site import Site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selenium import webdriver


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask for Chromium where a test has a browser."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.needs_program("chromium", "chromedriver"))


@pytest.fixture(scope="session")
def chromium() -> Iterator[webdriver.Chrome]:
    """A Chromium, which takes a second to start."""
    driver = start_chromium()
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome) -> Iterator[Browser]:
    """A page that remembers nothing; at the end nothing may be wrong on its console."""
    browser = Browser(chromium)
    browser.resize(DESKTOP)
    browser.prefer("light")
    yield browser
    try:
        assert browser.console() == []
    finally:
        chromium.execute_cdp_cmd(
            "Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"}
        )
        # The page is left: nothing of it asks a server that is gone.
        chromium.get("about:blank")
        browser.console()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server for tests that take care of their own runs."""
    program = serve(tmp_path_factory.mktemp("web") / "data")
    with Site(program.grpc, program.http) as site:
        yield site
    program.dispose()
