"""The view of one run in a real Chromium: its words, curves and marks, and how it stays true."""

from __future__ import annotations

import json
import math
import re
import signal
import threading
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.e2e.harness import serve
from tests.web.browser import DESKTOP, PHONE
from tests.web.made_up_runs import Trainer, falling, noisy
from tests.web.site import Site

if TYPE_CHECKING:
    from pathlib import Path

    from selenium.webdriver.remote.webelement import WebElement

    from tests.web.browser import Browser

TOTAL = 4000
"""Length of the run to which things happen."""

AT = 2400
"""Where it is."""

SPEC = {
    "name": "eventful",
    "total": TOTAL,
    "groups": [{"name": "matrices"}, {"name": "embedding", "peak": 1e-4}],
    "weight_decay": {"start": 0.05, "end": 0.1, "style": "linear"},
    "learning_rate": {"peak": 3e-4},
    "stages": [
        {
            "name": "pretrain",
            "until": 3000,
            "learning_rate": {"warmup": 200},
            "policies": [
                {"kind": "plateau", "window": 20, "patience": 8, "cooldown": 100},
                {"kind": "plateau", "window": 20, "patience": 4, "factor": 0.7, "mode": "advise"},
            ],
        },
        {
            "name": "anneal",
            "learning_rate": {"peak": 1e-4, "decay": {"style": "linear"}},
            "groups": [{"name": "embedding", "peak": 3e-5}],
        },
    ],
    "feedback": {"delay": 64, "timeout": "60s", "advice_expires": 2000},
}

CHART = "figure.chart"


@pytest.fixture(scope="module")
def site(site: Site) -> Site:
    """A run that went back once, met a NaN, was cut by its policy and waits for an answer."""
    loss = noisy(falling(2.2, 150.0), 0.02)
    with Trainer(site.grpc, SPEC) as job:
        job.open()
        job.train(0, 700, loss)
        job.open(600)
        job.train(
            600,
            AT,
            lambda n: math.nan if n == 1500 else loss(n),
            validation=lambda n: 2.3 if n % 200 == 199 else None,
            norm=lambda n: 1.0 + n % 3,
        )
    return site


@pytest.fixture
def page(browser: Browser, site: Site) -> Browser:
    """The view of that run, drawn."""
    return opened(browser, site, "/runs/eventful")


def opened(browser: Browser, site: Site, path: str) -> Browser:
    browser.open(site.url(path))
    browser.wait_for(f"{CHART} canvas")
    return browser


def asked(site: Site, path: str) -> Any:
    """Return an answer of the server's HTTP interface."""
    with urllib.request.urlopen(site.url(path), timeout=60) as answer:
        return json.load(answer)


def chart(title: str) -> str:
    """Return a selector of the chart of that title."""
    number = ["Loss", "Learning rate", "Weight decay", "Gradient norm"].index(title) + 1
    return f"{CHART}:nth-of-type({number})"


def pixels(browser: Browser, title: str, color: str) -> int:
    """Return how many pixels of a chart have about the colour of the theme with that name."""
    script = """
    const [css, name] = arguments;
    const probe = document.createElement("span");
    probe.style.color = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
    document.body.append(probe);
    const wanted = getComputedStyle(probe).color.match(/[\\d.]+/g).map(Number);
    probe.remove();
    const drawn = document.querySelector(css + " canvas");
    const canvas = new OffscreenCanvas(drawn.width, drawn.height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(drawn, 0, 0);
    const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
    let found = 0;
    for (let at = 0; at < data.length; at += 4) {
      const isNear = [0, 1, 2].every((index) => Math.abs(data[at + index] - wanted[index]) < 24);
      if (isNear && data[at + 3] > 200) found += 1;
    }
    return found;
    """
    found: int = browser.run_script(script, chart(title), color)
    return found


def wait_for_pixels(browser: Browser, title: str, color: str, least: int = 20) -> None:
    browser.wait(
        lambda: pixels(browser, title, color) >= least, f"{title} has {least} pixels of {color}"
    )


def parameters(browser: Browser) -> dict[str, list[str]]:
    return parse_qs(urlsplit(browser.driver.current_url).query)


def asked_curves(browser: Browser) -> list[dict[str, list[str]]]:
    """Return the parameters of each request for curves that the page made."""
    names = browser.run_script(
        "return performance.getEntriesByType('resource').map((item) => item.name)"
    )
    return [parse_qs(urlsplit(name).query) for name in names if "/curves?" in name]


def over(browser: Browser, title: str = "Loss") -> WebElement:
    """Return the plot itself, without its axes."""
    return browser.wait_for(f"{chart(title)} .u-over")


def drag(browser: Browser, begin: float, end: float, *held: str) -> None:
    """Drag over the loss from one share of its width to another, with keys held."""
    place = over(browser)
    width = place.size["width"]
    hand = ActionChains(browser.driver, duration=20)
    hand.move_to_element_with_offset(place, round((begin - 0.5) * width), 0)
    for key in held:
        hand.key_down(key)
    hand.click_and_hold().move_by_offset(round((end - begin) * width / 2), 0)
    hand.move_by_offset(round((end - begin) * width / 2), 0).release()
    for key in held:
        hand.key_up(key)
    hand.perform()


def seen(browser: Browser) -> tuple[int, int]:
    """Return the stretch of progress that the charts show, as the page says it."""
    found = re.fullmatch(r"([\d,]+) to ([\d,]+)", browser.text(".where"))
    if found is None:  # The cursor is on a chart: it says where.
        ActionChains(browser.driver).move_to_element(browser.wait_for("h1")).perform()
        browser.wait(lambda: " to " in browser.text(".where"), "what is seen")
        found = re.fullmatch(r"([\d,]+) to ([\d,]+)", browser.text(".where"))
    assert found, browser.text(".where")
    begin, end = (int(text.replace(",", "")) for text in found.groups())
    return begin, end


def focus(browser: Browser, css: str) -> None:
    browser.run_script("document.querySelector(arguments[0]).focus()", css)


def key_marker(browser: Browser, kind: str) -> WebElement:
    """Return the newest marker of that kind."""
    browser.wait_for(f".marker[data-kind={kind}]:not(.still)")
    return browser.all(f".marker[data-kind={kind}]:not(.still)")[-1]


class TestWords:
    def test_the_top_says_how_it_is_what_was_done_and_what_comes(
        self, page: Browser, site: Site
    ) -> None:
        page.wait_for(".summary .badge", "trains")
        change = [item for item in site.adjustments("eventful") if item.status == "in force"][-1]
        said = page.wait_for(".facts", f"{AT:,} of 4,000 iterations", "(60 %)").text
        assert f"LR x 0.5 at {change.effective:,} by plateau" in said
        assert change.reason in said
        assert "2, opened at 600" in said
        assert "LR goes to 0.0001 at 3,000" in said or "LR goes to 1e-4 at 3,000" in said
        assert "stage anneal at 3,000" in said
        advice = [item for item in site.adjustments("eventful") if item.status == "advice"]
        assert advice
        troubles = page.wait_for(".troubles", advice[-1].reason).text
        count = f"{len(advice)} pieces of advice wait" if len(advice) > 1 else "Advice waits"
        assert f"{count} for an answer" in troubles

    def test_the_newest_trouble_comes_first(self, browser: Browser, site: Site) -> None:
        with Trainer(site.grpc, SPEC | {"name": "in-trouble"}) as job:
            job.open()
            job.train(0, 600, lambda n: 2.0)
            job.adjust(directive={"kind": "evaluate"})
            job.adjust(hold=True)
            job.train(600, 1000, lambda n: math.nan if 955 <= n < 964 else 2.0)
        opened(browser, site, "/runs/in-trouble")
        browser.wait_for(".troubles", "not finite", "Directive", "held")
        found = [item.splitlines()[0] for item in browser.texts(".troubles li")]
        assert re.match(r"The loss was not finite at 963; 9 such in all", found[0])
        assert found[1].startswith("Directive due at 664 has no answer yet: ask for evaluate")
        assert found[-1].startswith("LR and WD are held")
        assert browser.wait_for(".summary .badge").text == "is held"
        browser.click(".troubles button")
        browser.wait_for(".adjustments .selected", "evaluate")

    def test_the_word_for_each_state(self, page: Browser) -> None:
        now_s = 10_000.0
        ranks = {"active": 4, "waiting": 2, "blocked_s": 16.0, "slowest": []}
        changes: dict[str, dict[str, Any]] = {
            "trains": {},
            "is held": {"held": True},
            "is silent": {"held": True, "updated_at": "1970-01-01T02:31:39Z"},
            "at its end": {"updated_at": "1970-01-01T02:31:39Z", "progress": 400, "held": True},
            "ranks wait": {"ranks": ranks, "updated_at": "1970-01-01T02:31:39Z"},
            "log forgot": {"ranks": ranks, "forgotten": "The log has forgotten 3 events."},
            "imported": {"imported_from": "0.2.0 on node-7"},
            "created": {"state": "created"},
            "finished": {"state": "finished", "held": True},
            "unreadable": {"state": "unreadable"},
        }
        run = {
            "state": "running",
            "updated_at": "1970-01-01T02:46:00Z",
            "forgotten": "",
            "progress": 399,
            "total": 400,
        }
        runs = [run | fields for fields in changes.values()]
        # Waits that end soon are no trouble, and the last step was only just taken.
        runs.append(run | {"ranks": ranks | {"blocked_s": 14.0}, "progress": 400})
        said = page.driver.execute_async_script(
            "const [runs, now, done] = arguments;"
            "import('/static/words.js').then((words) =>"
            " done(runs.map((run) => words.stateOf(run, now).word)), done)",
            runs,
            now_s * 1000,
        )
        assert said == [*changes, "trains"]

    def test_charts_are_told_in_words_too(self, page: Browser) -> None:
        page.wait(lambda: page.all(f"{chart('Loss')} [role=img][aria-label]"), "words")
        labels = [str(item.get_attribute("aria-label")) for item in page.all(f"{CHART} [role=img]")]
        assert re.search(r"newest [\d.]+ at 2,399, smoothed [\d.]+\. 1 loss shown", labels[0])
        assert "fixed below 2,464" in labels[1]
        assert re.search(r"matrices: [\de.-]+ at 2,400, 0 planned at 4,000", labels[1])
        assert labels[3].startswith("Gradient norm over progress: newest 3 at 2,399")


class TestCurves:
    def test_they_are_drawn(self, page: Browser) -> None:
        for title, color in (
            ("Loss", "raw"),
            ("Loss", "series-0"),
            ("Loss", "series-2"),  # The validation loss.
            ("Loss", "bad"),  # The NaN.
            ("Loss", "series-3"),  # The second attempt.
            ("Learning rate", "series-0"),
            ("Learning rate", "series-1"),
            ("Weight decay", "series-1"),
            ("Gradient norm", "series-5"),
        ):
            wait_for_pixels(page, title, color, 15)

    def test_what_is_drawn_is_what_the_server_says(self, page: Browser, site: Site) -> None:
        focus(page, f"{chart('Loss')} .frame")
        page.click(f"{chart('Loss')} .tools button:last-child")
        rows = page.run_script(
            "return [...document.querySelectorAll(arguments[0])]"
            ".map((row) => [...row.children].map((cell) => cell.innerText))",
            f"{chart('Loss')} tbody tr",
        )
        assert 100 < len(rows) <= 400
        assert re.search(r", one in \d+ of [\d,]+ points$", page.text(f"{chart('Loss')} caption"))
        points = int(asked_curves(page)[0]["points"][0])
        assert 500 < points <= 2000
        curves = asked(site, f"/api/runs/eventful/curves?points={points}")
        losses: dict[int, Any] = {}
        for item in curves["losses"]:
            for at, value in zip(item["loss"]["progress"], item["loss"]["value"], strict=True):
                if item["forgotten_from"] is None or at < item["forgotten_from"]:
                    losses[at] = value
        for at_text, shown, *_ in rows:
            at = int(at_text.replace(",", ""))
            if shown == "NaN":
                assert losses[at] == "nan"
            elif shown[0].isdigit():
                assert float(shown) == pytest.approx(losses[at], rel=1e-3)
        assert sum(shown[0].isdigit() for _, shown, *_ in rows) > 100

    def test_a_log_axis_moves_the_curve_and_stays_in_the_address(
        self, page: Browser, site: Site
    ) -> None:
        axis = f"{chart('Learning rate')} [aria-label='Learning rate: log axis']"
        page.click(axis)
        page.wait(lambda: parameters(page).get("log") == ["lr"], "the address says it")
        opened(page, site, "/runs/eventful?log=loss,lr")
        for title in ("Loss", "Learning rate"):
            page.wait_for(f"[aria-label='{title}: log axis'][aria-pressed=true]")
        wait_for_pixels(page, "Learning rate", "series-0")

    def test_what_has_no_place_on_a_log_axis_is_told(self, browser: Browser, site: Site) -> None:
        spec = {"name": "below", "total": 200, "feedback": {"delay": 64}}
        rate = {"peak": 1e-3, "decay": {"style": "linear"}}
        with Trainer(site.grpc, spec | {"learning_rate": rate}) as job:
            job.open()
            job.train(0, 100, lambda n: 1.0 - n / 50)
        remarks = {"Loss": "Not drawn: 0 and below", "Learning rate": "Not drawn: 0 and below"}
        opened(browser, site, "/runs/below?log=loss,lr")
        for title, told in remarks.items():
            browser.wait_for(f"{chart(title)} .remarks", told)
        # The losses are above 0 as yet, and the LR has not come down to it.
        opened(browser, site, "/runs/below?log=loss,lr&from=5&to=40")
        browser.wait(lambda: seen(browser) == (5, 40), "a part is seen")
        browser.wait_gone(".remarks")
        browser.click("[aria-label^='Show the whole run']")
        browser.wait_for(f"{chart('Loss')} .remarks", remarks["Loss"])
        for title in remarks:
            browser.click(f"[aria-label='{title}: log axis']")
            browser.wait_gone(f"{chart(title)} .remarks")

    def test_two_hundred_groups_leave_the_charts_in_sight(
        self, browser: Browser, site: Site
    ) -> None:
        spec = {"total": 100, "learning_rate": {"peak": 1e-3}, "feedback": {"delay": 8}}
        groups = [{"name": f"layer-{index}"} for index in range(200)]
        with Trainer(site.grpc, spec | {"name": "two-hundred", "groups": groups}) as job:
            job.open()
        browser.resize(PHONE)
        opened(browser, site, "/runs/two-hundred")
        browser.wait_for(
            "[aria-labelledby=panel-ranks]", "None asked this server within the last two minutes."
        )
        height = browser.run_script("return document.querySelector('.groups').offsetHeight")
        assert 20 < height < PHONE[1] / 4
        # One fewer, and any other can be chosen: the keyboard leads to the last.
        browser.click(".groups button[aria-pressed=true]")
        browser.wait_for(".groups button:last-of-type:enabled", "layer-199")
        browser.run_script("document.querySelector('.groups button:last-of-type').focus()")
        browser.wait(
            lambda: browser.run_script("return document.querySelector('.groups').scrollTop > 0"),
            "it scrolls to what has the focus",
        )

    def test_groups_are_chosen(self, page: Browser) -> None:
        wait_for_pixels(page, "Learning rate", "series-1")
        page.click(".groups button:last-of-type")
        page.wait(lambda: pixels(page, "Learning rate", "series-1") == 0, "one group is gone")
        page.wait(lambda: parameters(page).get("group") == ["matrices"], "the address says it")
        page.click(".groups button:last-of-type")
        wait_for_pixels(page, "Learning rate", "series-1")

    def test_groups_that_are_none_count_as_left_out(self, browser: Browser, site: Site) -> None:
        opened(browser, site, "/runs/eventful?group=matrices&group=gone")
        browser.wait_for(".groups button:last-of-type[aria-pressed=true]", "embedding")
        wait_for_pixels(browser, "Learning rate", "series-1")
        browser.expect_refusal(400)

    def test_both_themes(self, page: Browser) -> None:
        def ground() -> str:
            found: str = page.run_script("return getComputedStyle(document.body).backgroundColor")
            return found

        light = ground()
        page.click("#theme")
        page.click("#theme")
        page.wait(lambda: ground() != light, "it is dark")
        assert page.text("#theme") == "Theme: dark"
        wait_for_pixels(page, "Learning rate", "series-0")
        page.driver.refresh()
        page.wait(lambda: ground() != light, "it stays dark")
        page.click("#theme")
        page.wait(lambda: ground() == light, "it goes by the system")
        page.prefer("dark")
        page.wait(lambda: ground() != light, "the system is dark")
        wait_for_pixels(page, "Learning rate", "series-0")

    def test_a_phone_scrolls_down_alone(self, browser: Browser, site: Site) -> None:
        for size in (PHONE, (360, 640)):
            browser.resize(size)
            opened(browser, site, "/runs/eventful")
            browser.wait_for(".adjustments li")
            width = browser.run_script("return document.documentElement.scrollWidth")
            assert width <= size[0]
        wait_for_pixels(browser, "Learning rate", "series-0")
        browser.resize(DESKTOP)
        browser.wait(
            lambda: browser.run_script(
                "return document.querySelector('.u-over').clientWidth > 1000"
            ),
            "the charts grow with the page",
        )


class TestTheStretch:
    def test_a_drag_zooms_and_finer_points_come_and_the_address_says_it(
        self, page: Browser, site: Site
    ) -> None:
        before = len(asked_curves(page))
        drag(page, 0.25, 0.375)
        page.wait(lambda: "from" in parameters(page), "the address says it")
        begin, end = (int(parameters(page)[name][0]) for name in ("from", "to"))
        assert begin == pytest.approx(1000, abs=40)
        assert end == pytest.approx(1500, abs=40)
        assert seen(page) == (begin, end)
        page.wait(lambda: len(asked_curves(page)) > before, "finer points are asked for")
        finer = asked_curves(page)[-1]
        assert 0 < int(finer["begin"][0]) <= begin
        assert end <= int(finer["end"][0]) < TOTAL

        link = page.driver.current_url
        page.driver.back()
        page.wait(lambda: seen(page) == (0, TOTAL), "back shows all")
        page.driver.forward()
        page.wait(lambda: seen(page) == (begin, end), "forward shows it again")
        page.open("about:blank").open(link)
        page.wait(lambda: page.texts(".where") != [""], "the link is open")
        page.wait_for(f"{CHART} canvas")
        page.wait(lambda: seen(page) == (begin, end), "the link shows the same")

    def test_wheel_and_shift_drag_and_double_click(self, page: Browser) -> None:
        place = over(page)
        focus(page, f"{chart('Loss')} .frame")
        page.run_script(
            "const box = arguments[0].getBoundingClientRect();"
            "arguments[0].dispatchEvent(new WheelEvent('wheel', { deltaY: -200, bubbles: true,"
            " cancelable: true, clientX: box.left + box.width / 2, clientY: box.top + 20 }))",
            place,
        )
        page.wait(lambda: seen(page)[0] > 0, "the wheel zooms")
        begin, end = seen(page)
        assert (begin + end) / 2 == pytest.approx(TOTAL / 2, abs=60)
        drag(page, 0.6, 0.4, Keys.SHIFT)
        page.wait(lambda: seen(page)[0] > begin + 100, "shift and drag moves it")
        moved = seen(page)
        assert moved[1] - moved[0] == pytest.approx(end - begin, abs=2)
        ActionChains(page.driver).double_click(over(page)).perform()
        page.wait(lambda: seen(page) == (0, TOTAL), "a double click shows all")

    def test_fingers(self, page: Browser) -> None:
        place = over(page)
        page.run_script("arguments[0].scrollIntoView({ block: 'center' })", place)
        box = page.run_script("return arguments[0].getBoundingClientRect().toJSON()", place)

        def touch(kind: str, *shares: float) -> None:
            points = [
                {"x": box["x"] + share * box["width"], "y": box["y"] + 50, "id": finger}
                for finger, share in enumerate(shares)
            ]
            page.driver.execute_cdp_cmd(
                "Input.dispatchTouchEvent", {"type": kind, "touchPoints": points}
            )

        touch("touchStart", 0.45, 0.55)
        for way in (0.05, 0.1, 0.15):
            touch("touchMove", 0.45 - way, 0.55 + way)
        touch("touchEnd")
        page.wait(lambda: seen(page)[0] > 500, "two fingers zoom")
        begin, end = seen(page)
        assert (begin + end) / 2 == pytest.approx(TOTAL / 2, abs=60)
        touch("touchStart", 0.7)
        for share in (0.6, 0.5, 0.4):
            touch("touchMove", share)
        touch("touchEnd")
        page.wait(lambda: seen(page)[0] > begin + 100, "one finger moves it")
        assert seen(page)[1] - seen(page)[0] == pytest.approx(end - begin, abs=4)

    def test_keys_and_buttons(self, page: Browser) -> None:
        focus(page, f"{chart('Loss')} .frame")
        page.press("+")
        page.wait(lambda: seen(page)[0] > 0, "plus zooms")
        closer = seen(page)
        page.press(Keys.ARROW_RIGHT)
        page.wait(lambda: seen(page)[0] > closer[0], "an arrow moves")
        page.press("-")
        page.wait(lambda: seen(page)[1] - seen(page)[0] > closer[1] - closer[0], "minus zooms")
        page.press("0")
        page.wait(lambda: seen(page) == (0, TOTAL), "0 shows all")
        page.click("[aria-label='Show less, closer']")
        page.wait(lambda: seen(page) == (1000, 3000), "a button zooms")
        page.click("[aria-label^='Show the whole run']")
        page.wait(lambda: seen(page) == (0, TOTAL), "a button shows all")

    def test_follow_keeps_the_newest_in_view(self, page: Browser) -> None:
        page.click("[aria-label='Follow: keep the newest in view']")
        page.wait(lambda: "follow" in parameters(page), "the address says it")
        begin, end = seen(page)
        assert begin < AT < end < AT + 200


class TestMarks:
    def test_a_change_says_its_numbers_and_reason_and_is_selected(
        self, page: Browser, site: Site
    ) -> None:
        change = [item for item in site.adjustments("eventful") if item.status == "in force"][-1]
        marker = key_marker(page, "change")
        label = str(marker.get_attribute("aria-label"))
        for said in (change.id, "LR x 0.5", f"from {change.effective:,} on", change.reason):
            assert said in label
        assert "3e-4 → 1.5e-4" in label or "1.5e-4 → 7.5e-5" in label
        ActionChains(page.driver).move_to_element(marker).perform()
        page.wait_for(".tip", change.reason, "in force")
        marker.click()
        page.wait_for(".adjustments .selected", change.reason)
        page.wait(lambda: parameters(page).get("adjustment") == [change.id], "it is in the address")
        opened(page, site, f"/runs/eventful?adjustment={change.id}")
        page.wait_for(".adjustments .selected", change.reason)
        assert key_marker(page, "change").get_attribute("aria-pressed") == "true"

    def test_the_keyboard_reaches_them(self, page: Browser) -> None:
        page.wait_for(".marker:not(.still)")
        focus(page, f"{chart('Learning rate')} .frame")
        page.press(Keys.TAB)
        first = page.focused()
        page.wait_for(".tip")
        page.press(Keys.ARROW_RIGHT)
        page.wait(lambda: page.focused() != first, "an arrow goes to the next")
        page.press(Keys.ESCAPE)
        page.wait_gone(".tip")
        page.press(Keys.ENTER)
        page.wait_for(".adjustments .selected")

    def test_what_an_advice_would_do_is_drawn(self, page: Browser, site: Site) -> None:
        advice = [item for item in site.adjustments("eventful") if item.status == "advice"]
        assert key_marker(page, "advice").get_attribute("data-id") == advice[-1].id
        page.wait_for(f"{chart('Learning rate')} .legend", "what if")
        wait_for_pixels(page, "Learning rate", "preview")
        page.click(f".adjustments [data-id='{advice[-1].id}'] [data-role=wonder]")
        page.wait(lambda: pixels(page, "Learning rate", "preview") == 0, "it goes")

    def test_hundreds_of_changes_stay_legible(self, browser: Browser, site: Site) -> None:
        with Trainer(site.grpc, SPEC | {"name": "busy", "policies": [], "stages": []}) as job:
            job.open()
            for at in range(0, 3840, 64):
                job.train(at, at + 64, lambda n: 2.0)
                job.adjust(scale_lr=0.98 if at % 128 else 1.01)
        opened(browser, site, "/runs/busy")
        browser.wait_for(".marker:not(.still)")
        places = browser.run_script(
            "return [...document.querySelectorAll('.marker:not(.still)')].map((item) => {"
            "const box = item.getBoundingClientRect(); return [box.x, box.y]; })"
        )
        assert 10 < len(places) <= 60
        near = [
            (one, other)
            for index, one in enumerate(places)
            for other in places[:index]
            if math.dist(one, other) < 8
        ]
        assert near == []


class TestLive:
    def test_it_follows_a_run_that_trains(self, browser: Browser, site: Site) -> None:
        trainer = site.train(
            "followed",
            [3.0],
            total=100_000,
            policies=[
                {"kind": "plateau", "patience": 0, "cooldown": 10**6},
                # How many losses there are for them to find something in is left to the machine.
                {"kind": "spike", "mode": "off"},
                {"kind": "divergence", "mode": "off"},
            ],
        )
        opened(browser, site, "/runs/followed")
        browser.wait_for("#connection", "live")
        browser.wait_for(".facts", "none: LR and WD follow the base schedule")
        over_ = threading.Event()

        def train() -> None:
            loss = 3.0
            while not over_.is_set():
                loss *= 0.999
                trainer.report([loss])

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        try:
            for least in (30, 60):
                wait_for_progress(browser, least)
            browser.wait(
                lambda: "begin" in asked_curves(browser)[-1],
                "what is known already is not sent again",
            )
        finally:
            over_.set()
            thread.join(60)
        assert not thread.is_alive()

        trainer.report([9.0])
        fired = browser.wait_for(".facts", "LR x 0.5 at").text
        (change,) = site.adjustments("followed")
        assert change.reason in fired
        browser.wait_for(".adjustments li", change.reason)
        assert change.reason in str(key_marker(browser, "change").get_attribute("aria-label"))
        assert f"New: {change.summary}" in browser.text(".summary [role=status]")

    def test_ranks_are_shown(self, browser: Browser, site: Site) -> None:
        site.train("ranked", [3.0, 2.9])
        opened(browser, site, "/runs/ranked")
        browser.wait_for("section", "1 rank asked within the last two minutes", "None waits.")

    def test_times_are_those_of_the_server(self, browser: Browser, site: Site) -> None:
        site.train("on-time", [3.0])
        an_hour_ahead = "const real = Date.now; Date.now = () => real() + 3_600_000;"
        with browser.before_scripts(an_hour_ahead):
            opened(browser, site, "/runs/on-time")
            browser.wait_for(".summary .badge", "trains")
            browser.wait_for(".summary", " s ago")
            assert "Nothing was recorded" not in browser.text(".troubles")
            browser.open(site.url("/?q=on-time"))
            browser.wait_for(".runs tbody tr", "trains", " s ago")

    def test_a_run_that_is_deleted_is_shown_as_it_was_last(
        self, browser: Browser, site: Site
    ) -> None:
        site.train("deleted", [3.0])
        opened(browser, site, "/runs/deleted")
        browser.wait_for(".actions button")
        site.delete("deleted")
        browser.wait_for("[role=alert]", "The run deleted was deleted. What is below is its last")
        browser.wait_for(".summary .badge", "deleted")
        browser.wait_for(".actions", "The run was deleted.")
        assert not browser.all("[data-role=hold]")
        assert newest_drawn(browser) == 0
        browser.wait_for("#connection", "live")
        # One that was made anew is another run.
        site.train("deleted", [2.5])
        browser.click("[role=alert] button")
        browser.wait_for(".facts", "2.5")
        browser.wait_for("[data-role=hold]")

    def test_a_run_may_be_deleted_while_the_page_is_cut_off(
        self, browser: Browser, site: Site
    ) -> None:
        site.train("cut-off", [3.0])
        opened(browser, site, "/runs/cut-off")
        browser.wait_for("#connection", "live")
        # A page that is not seen has no stream.
        hide = "Object.defineProperty(document, 'hidden', { value: arguments[0], writable: true });"
        turn = "document.dispatchEvent(new Event('visibilitychange'))"
        browser.run_script(hide + turn, True)
        site.delete("cut-off")
        browser.run_script(f"document.hidden = false; {turn}")
        browser.wait_for("[role=alert]", "The run cut-off was deleted.")
        browser.wait_for("#connection", "live")
        browser.expect_refusal(404)

    def test_it_comes_back_when_the_server_does(self, browser: Browser, tmp_path: Path) -> None:
        program = serve(tmp_path / "data")
        addresses = (program.grpc, "--http", program.http)
        try:
            with Site(program.grpc, program.http) as site:
                site.train("restarted", [3.0])
                opened(browser, site, "/runs/restarted")
                browser.wait_for("#connection", "live")
                program.end(signal.SIGKILL)
                browser.wait_for("#connection", "reconnecting…")
                assert progress_of(browser) >= 0
            program = serve(tmp_path / "data", *addresses)
            browser.wait_for("#connection", "live")
            with Site(program.grpc, program.http) as site:
                site.train("restarted", [2.9, 2.8, 2.7], resume_at=1)
                browser.wait_for(".facts", "2, opened at 1", "2.7")
                browser.wait(lambda: newest_drawn(browser) >= 3, "the curve goes on")
            # Nothing of the page asks a server that is gone once more.
            browser.open("about:blank")
        finally:
            program.dispose()
        # Chromium itself writes a line for each try while nobody answered.
        assert all("net::ERR_" in item["message"] for item in browser.console())

    def test_nothing_is_asked_of_anyone_else_and_the_policy_is_strict(
        self, page: Browser, site: Site
    ) -> None:
        names = page.run_script(
            "return performance.getEntriesByType('resource').map((item) => item.name)"
        )
        assert len(names) > 10
        assert all(name.startswith(site.url("/")) for name in names)
        with urllib.request.urlopen(site.url("/runs/eventful"), timeout=60) as answer:
            policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy


def progress_of(browser: Browser) -> int:
    found = re.search(r"([\d,]+) of [\d,]+ iterations", browser.text(".facts"))
    assert found
    return int(found.group(1).replace(",", ""))


def wait_for_progress(browser: Browser, least: int) -> None:
    """Wait until words and curve are so far."""
    browser.wait(lambda: progress_of(browser) >= least, f"the page is at {least}")
    browser.wait(lambda: newest_drawn(browser) >= least, f"the curve is at {least}")


def newest_drawn(browser: Browser) -> int:
    """Return the progress of the newest loss on the chart, as its label has it."""
    labels = browser.run_script(
        "return document.querySelector(arguments[0]).getAttribute('aria-label')",
        f"{chart('Loss')} [role=img]",
    )
    found = re.search(r"newest \S+ at ([\d,]+)", labels or "")
    return int(found.group(1).replace(",", "")) if found else -1


class TestOddRuns:
    @pytest.fixture(scope="class")
    @staticmethod
    def odd(site: Site) -> Site:
        """Runs at the edges of what there can be."""
        plain: dict[str, Any] = {"total": 1000, "learning_rate": {"peak": 1e-3}}
        delay = {"feedback": {"delay": 64}}

        def train(name: str, end: int, loss: Any, stride: int = 1, **fields: Any) -> Trainer:
            job = Trainer(site.grpc, plain | delay | {"name": name} | fields)
            job.open()
            job.train(0, end, loss, stride=stride)
            return job

        Trainer(site.grpc, plain | {"name": "created"})
        train("no-loss-yet", 0, None)
        train("one-loss", 1, lambda n: 2.5)
        train("all-nan", 50, lambda n: math.nan)
        train("infinite", 50, lambda n: math.inf if n % 2 else 2.0)
        train("same", 50, lambda n: 2.0)
        train("negative", 50, lambda n: -1.0 - n / 50)
        train("zero-lr", 50, lambda n: 2.0, learning_rate={"peak": 0.0})
        tokens = 10**9
        train(
            "tokens", 60 * tokens, lambda n: 3.0 - n / 1e12, tokens,
            total=10**12, unit="tokens", feedback={"delay": 64 * tokens},
        )  # fmt: skip
        train("finished", 50, lambda n: 2.0).finish()
        train(
            "9.odd_name-x", 5, lambda n: 2.0, groups=[{"name": "ж/<b>&é 'q' \"d\""}, {"name": "x"}]
        )
        wordy = train("wordy", 64, lambda n: 2.0)
        wordy.adjust(scale_lr=0.5, reason="unbroken" * 100 + " <script>alert(1)</script>")
        return site

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("created", "created"),
            ("no-loss-yet", "none yet"),
            ("one-loss", "2.5, smoothed 2.5"),
            ("all-nan", "The loss was not finite at 49; 50 such in all"),
            ("infinite", "25 such in all"),
            ("same", "2, smoothed 2"),
            ("negative", "-1.98"),
            ("zero-lr", "trains"),
            ("tokens", "60,000,000,000 of 1,000,000,000,000 tokens"),
            ("finished", "finished"),
            ("9.odd_name-x", "ж/<b>&é 'q' \"d\""),
            ("wordy", "<script>alert(1)</script>"),
        ],
    )
    def test_each_is_shown(self, browser: Browser, odd: Site, name: str, said: str) -> None:
        for query in ("", "?from=7&to=49&log=loss,lr"):
            opened(browser, odd, f"/runs/{name}{query}")
            browser.wait_for("main", said)
            width = browser.run_script("return document.documentElement.scrollWidth")
            assert width <= DESKTOP[0]
        assert browser.console() == []

    def test_there_is_none_of_that_name(self, browser: Browser, site: Site) -> None:
        browser.open(site.url("/runs/no-such-run"))
        browser.wait_for("[role=alert]", "no-such-run")
        browser.wait_for("#connection", "live")
        browser.expect_refusal(404)


LONG = 30_000


def test_a_long_run_opens_with_few_points(browser: Browser, site: Site) -> None:
    spec = {"name": "long", "total": 1_000_000, "learning_rate": {"peak": 3e-4}}
    with Trainer(site.grpc, spec | {"feedback": {"delay": 4096}}) as job:
        job.open()
        job.report(0, LONG, noisy(falling(), 0.05))
    opened(browser, site, "/runs/long")
    wait_for_pixels(browser, "Learning rate", "series-0")
    sizes = browser.run_script(
        "return performance.getEntriesByType('resource')"
        ".filter((item) => item.name.includes('/curves?')).map((item) => item.decodedBodySize)"
    )
    assert 0 < max(sizes) < 200_000
