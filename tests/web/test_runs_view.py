"""The list of all runs in a real Chromium: what it shows, in which order, and how it stays true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import serve
from tests.web.browser import PHONE
from tests.web.site import ADVISING, Site, falling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.web.browser import Browser

NAMES = ".runs tbody .col-name a"

UNKNOWN = ["e-finished", "f-created", "g-nan"]
"""Runs whose last loss is no number, or not there."""

WATCH = """
window.touched = new Set();
const note = (records) => {
  for (const record of records) {
    const place = record.target.nodeType === 1 ? record.target : record.target.parentElement;
    // How long ago something was goes on in every line.
    if (place?.closest("time")) continue;
    for (const node of [...record.addedNodes, ...record.removedNodes, place]) {
      const line = node?.nodeType === 1 ? node.closest("tr") : null;
      if (line?.closest("tbody")) window.touched.add(line.querySelector("a").innerText);
    }
  }
};
new MutationObserver(note).observe(document.querySelector(".runs tbody"), {
  subtree: true, childList: true, characterData: true, attributes: true,
});
"""
"""Notes the runs whose lines are touched in any way."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with runs in every state that a test can bring about."""
    program = serve(tmp_path_factory.mktemp("runs") / "data")
    with Site(program.grpc, program.http) as site:
        add_runs(site)
        yield site
    program.dispose()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server without runs."""
    program = serve(tmp_path_factory.mktemp("empty") / "data")
    with Site(program.grpc, program.http) as site:
        yield site
    program.dispose()


def add_runs(site: Site) -> None:
    site.train("b-trains", falling(20))
    site.train("a-trains", falling(40), total=2000)
    site.train("d-advised", [2.0, 2.0], **ADVISING)
    held = site.train("c-held", falling(20))
    site.adjust("c-held", hold=True)
    held.report(falling(10))
    site.train("e-finished", [1.0, float("nan")])
    site.finish("e-finished")
    site.create("f-created")
    site.train("g-nan", [1.0, float("nan")])


def line(browser: Browser, name: str) -> str:
    """Return the text of a run's line once it is there."""
    return browser.wait_for(".runs tbody tr", name).text


def wait_for_names(browser: Browser, *names: str) -> None:
    browser.wait(lambda: browser.texts(NAMES) == list(names), lambda: str(browser.texts(NAMES)))


class TestTheList:
    def test_every_run_is_there_and_who_needs_somebody_comes_first(
        self, browser: Browser, site: Site
    ) -> None:
        browser.open(site.url())
        wait_for_names(
            browser,
            *("g-nan", "d-advised", "c-held", "a-trains", "b-trains", "f-created", "e-finished"),
        )
        assert browser.texts(".runs td.col-state") == [
            "trains", "trains", "is held", "trains", "trains", "created", "finished",
        ]  # fmt: skip
        assert browser.texts(".runs td.col-advice") == ["", "1 to answer", *[""] * 5]
        assert "7 runs, 1 with advice to answer" in browser.text(".shown")
        said = line(browser, "a-trains")
        assert "40 of 2,000 iterations" in said
        assert "2.0 %" in said
        assert "0.001" in said  # LR
        assert "2.961" in said  # loss
        assert "NaN" in line(browser, "e-finished")
        (bar,) = browser.all(".runs progress[aria-label='progress of a-trains']")
        assert float(bar.get_attribute("value") or "") == pytest.approx(0.02)

    def test_a_sparkline_has_the_losses_and_marks_what_is_not_finite(
        self, browser: Browser, site: Site
    ) -> None:
        browser.open(site.url("/?q=a-trains"))
        wait_for_names(browser, "a-trains")
        path = browser.wait_for(".sparkline .line").get_attribute("d") or ""
        heights = [float(point.split(" ")[1]) for point in path.lstrip("M").split("L")]
        assert len(heights) >= 20
        # The losses fall, and down is down.
        assert heights == sorted(heights)
        browser.open(site.url("/?q=e-finished"))
        wait_for_names(browser, "e-finished")
        browser.wait_for(".sparkline")
        assert len(browser.all(".sparkline .not-finite")) == 1

    def test_a_line_leads_to_its_run(self, browser: Browser, site: Site) -> None:
        browser.open(site.url())
        line(browser, "c-held")
        browser.click(f"{NAMES}[href='/runs/c-held']")
        browser.wait_for("h1", "c-held")
        assert browser.driver.current_url == site.url("/runs/c-held")

    def test_on_a_phone_each_run_is_a_card(self, browser: Browser, site: Site) -> None:
        browser.resize(PHONE)
        browser.open(site.url())
        assert "0.001 2.961" in line(browser, "a-trains")
        assert not browser.all(".runs thead")[0].is_displayed()
        assert browser.run_script("return document.documentElement.scrollWidth <= innerWidth")
        browser.choose("#runs-order", "-progress")
        browser.wait(lambda: browser.texts(NAMES)[0] == "c-held", "the order is another")

    @pytest.mark.parametrize("width", [360, 800, 961])
    def test_each_width_has_room_for_all_of_a_line(
        self, browser: Browser, site: Site, width: int
    ) -> None:
        browser.resize((width, 800))
        browser.open(site.url())
        line(browser, "a-trains")
        assert browser.run_script("return document.documentElement.scrollWidth <= innerWidth")
        heights = browser.run_script(
            "return [...document.querySelectorAll('.runs .share')]"
            ".map((item) => item.getClientRects().length)"
        )
        assert set(heights) <= {0, 1}, "a share and its sign are on one line"

    def test_it_has_a_title(self, browser: Browser, site: Site) -> None:
        browser.open(site.url())
        browser.wait_for("h1", "Runs")


class TestFilterAndOrder:
    def test_they_stand_in_the_address_and_come_from_it(self, browser: Browser, site: Site) -> None:
        browser.open(site.url())
        line(browser, "f-created")
        browser.fill("#runs-text", "trains")
        wait_for_names(browser, "a-trains", "b-trains")
        browser.click(".runs th.col-progress button")
        wait_for_names(browser, "a-trains", "b-trains")
        browser.click(".runs th.col-name button")
        browser.click(".runs th.col-name button")
        wait_for_names(browser, "b-trains", "a-trains")
        (head,) = browser.all(".runs th.col-name[scope=col]")
        assert head.get_attribute("aria-sort") == "descending"
        assert "2 of 7 runs" in browser.text(".shown")
        assert browser.driver.current_url == site.url("/?q=trains&sort=-name")

        browser.open(browser.driver.current_url)
        wait_for_names(browser, "b-trains", "a-trains")
        assert browser.all("#runs-text")[0].get_attribute("value") == "trains"

    @pytest.mark.parametrize(
        ("query", "names"),
        [
            ("state=is+held", ["c-held"]),
            ("state=advice", ["d-advised"]),
            ("state=trains&sort=-name", ["g-nan", "d-advised", "b-trains", "a-trains"]),
            ("q=F-CRE", ["f-created"]),
            # What has no loss is last either way, and an order that is not there is the usual one.
            ("sort=loss", ["d-advised", "a-trains", "b-trains", "c-held", *UNKNOWN]),
            ("sort=-loss", ["c-held", "b-trains", "a-trains", "d-advised", *UNKNOWN]),
            ("sort=nonsense&q=trains", ["a-trains", "b-trains"]),
        ],
    )
    def test_an_address_can_be_passed_on(
        self, browser: Browser, site: Site, query: str, names: list[str]
    ) -> None:
        browser.open(site.url(f"/?{query}"))
        wait_for_names(browser, *names)

    def test_where_nothing_matches_a_button_shows_all(self, browser: Browser, site: Site) -> None:
        browser.open(site.url("/?q=nobody"))
        browser.wait_for(".empty", "No run matches.")
        browser.click(".empty button")
        line(browser, "a-trains")
        assert browser.driver.current_url == site.url("/")
        assert browser.focused() == "Filter"


class TestLive:
    def test_an_empty_list_says_how_to_begin_and_fills_by_itself(
        self, empty: Site, browser: Browser
    ) -> None:
        browser.open(empty.url())
        browser.wait_for(".empty", "No runs yet.", "lrpilot run create spec.yaml")
        job = empty.train("first", falling(5))
        browser.wait_for(".runs tbody tr", "first", "5 of 1,000")
        assert not browser.all(".empty")[0].is_displayed()
        job.report(falling(5))
        browser.wait_for(".runs tbody tr", "first", "10 of 1,000")
        empty.adjust("first", hold=True)
        job.report(falling(10))
        browser.wait_for(".runs tbody tr", "is held")
        empty.delete("first")
        browser.wait_for(".empty", "No runs yet.")

    def test_of_hundreds_of_runs_only_the_changed_line_is_touched(
        self, empty: Site, browser: Browser
    ) -> None:
        for number in range(300):
            empty.create(f"many-{number:03}")
        job = empty.train("many-150", falling(3))
        browser.open(empty.url("/?sort=name"))
        browser.wait(lambda: len(browser.texts(NAMES)) == 300, "all pages are there")
        assert browser.texts(NAMES) == [f"many-{number:03}" for number in range(300)]
        browser.wait_for(".runs tbody tr", "many-150", "3 of 1,000")
        browser.run_script(WATCH)
        job.report(falling(3))
        browser.wait_for(".runs tbody tr", "many-150", "6 of 1,000")
        assert browser.run_script("return [...window.touched]") == ["many-150"]
        empty.delete("many-299")
        browser.wait(lambda: len(browser.texts(NAMES)) == 299, "the deleted one goes")
        assert browser.texts(NAMES)[-1] == "many-298"
