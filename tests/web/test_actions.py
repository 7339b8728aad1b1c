"""Changing a run from its page, in a real Chromium against a real server."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.e2e.harness import serve
from tests.web.browser import PHONE
from tests.web.site import ADVISING, Site, falling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lrpilot.v1 import runs_pb2 as pb
    from tests.web.browser import Browser
    from tests.web.site import Trainer

CONFIRM = "dialog .primary:enabled"
SAID = ".said"

LOSE = """
const real = window.fetch;
window.sent = [];
window.fetch = async (path, options) => {
  const answer = await real(path, options);
  if (options?.method !== "POST" || JSON.parse(options.body).dry_run) return answer;
  window.sent.push(JSON.parse(options.body));
  if (window.sent.length <= arguments[0]) throw new TypeError("the answer is lost");
  return answer;
};
"""
"""Loses the first answers to changes, which are made all the same; its argument: how many."""


_NUMBERS = itertools.count(1)

ANNEAL = "anneal LR over 50 (minus_sqrt)"


@pytest.fixture
def job(site: Site) -> Trainer:
    """A run of the test's own that has reported three losses: the horizon is 7."""
    return site.train(f"job-{next(_NUMBERS)}", falling(3), **WARMING)


WARMING: dict[str, Any] = {
    "learning_rate": {"peak": 1e-3, "min": 1e-5, "warmup": 100, "decay": {"style": "cosine"}}
}
"""Every value differs from the one before, so that a hold shows."""


def open_run(browser: Browser, site: Site, job: Trainer) -> None:
    browser.open(site.url(f"/runs/{job.name}"))
    browser.wait_for("[data-role=adjust]")


def ask(browser: Browser, what: str, reason: str, **fields: str) -> None:
    """Ask for a change and look at its dry run; `fields` by the names of their controls."""
    button = "adjust" if what not in {"hold", "release", "approve", "undo"} else what
    browser.click(f"[data-role={button}]")
    if button == "adjust":
        browser.choose("dialog [id$=-what]", what)
    for name, value in fields.items():
        browser.fill(f"dialog [name={name}]", value)
    browser.fill("dialog textarea", reason)
    browser.press(Keys.ENTER)


def confirm(browser: Browser, *said: str) -> None:
    browser.click(CONFIRM)
    browser.wait_for(SAID, *said)
    assert browser.all("dialog") == []


def last(site: Site, job: Trainer) -> pb.Adjustment:
    return site.adjustments(job.name)[-1]


class TestChanges:
    def test_a_hold_is_shown_first_and_then_made_at_the_horizon(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "hold", "the loader is being moved")
        browser.wait_for("dialog h3", "Dry run, nothing changed: hold LR and WD from 7 on")
        browser.wait_for("dialog canvas")
        (first, *_, end) = browser.texts("dialog .values tbody tr")
        assert first.split() == ["7", "7e-5", "0.1"]
        assert end.split() == ["1,000", "1e-5", "→", "7e-5", "0.1"]
        # The picture has more than one colour: something is drawn.
        assert browser.run_script(
            "const all = document.querySelector('dialog canvas');"
            "const data = all.getContext('2d').getImageData(0, 0, all.width, all.height).data;"
            "return new Set(new Uint32Array(data.buffer)).size"
        ) > 3  # fmt: skip
        assert site.adjustments(job.name) == []

        confirm(browser, "Done: hold LR and WD from 7 on")
        made = last(site, job)
        assert (made.action, made.effective) == ("hold", 7)
        assert made.reason == "the loader is being moved"
        browser.wait_for(".adjustments > li.selected", "hold LR and WD", made.id)
        assert f"adjustment={made.id}" in browser.driver.current_url
        job.report(falling(20))
        assert site.run(job.name).held
        assert job.rates == [pytest.approx(7e-5)]
        browser.wait_for(".summary .badge", "is held")

        ask(browser, "release", "it is there")
        confirm(browser, "Done: take back")
        job.report(falling(20))
        assert not site.run(job.name).held

    @pytest.mark.parametrize(
        ("what", "fields", "action", "expected"),
        [
            ("scale_lr", {"factor": "0.5"}, "multiply", {"factor": 0.5}),
            ("set_lr", {"lr": "2e-5"}, "set", {"after": [2e-5]}),
            ("scale_weight_decay", {"factor": "0"}, "scale weight decay", {"factor": 0.0}),
            ("begin_decay", {"length": "50"}, "decay", {"summary": ANNEAL}),
        ],
    )  # fmt: skip
    def test_each_adjustment_is_made_as_asked_and_signed(
        self, browser: Browser, site: Site, job: Trainer, what: str, fields: dict[str, str],
        action: str, expected: dict[str, Any],
    ) -> None:  # fmt: skip
        open_run(browser, site, job)
        ask(browser, what, "as agreed", **fields)
        browser.wait_for(CONFIRM)
        browser.fill("dialog [id$=-author]", "shift@node-3")
        confirm(browser, "Done: ", "from 7 on")
        made = last(site, job)
        assert (made.action, made.reason, made.author) == (action, "as agreed", "shift@node-3")
        for name, value in expected.items():
            got = getattr(made, name)
            assert (list(got) if isinstance(value, list) else got) == value
        (event,) = [
            item for item in site.call("ListEvents", run=job.name).events if item.kind == "adjusted"
        ]
        assert (event.reason, event.author) == ("as agreed", "shift@node-3")

        # Who signs is remembered.
        browser.click("[data-role=adjust]")
        author = browser.wait_for("dialog [id$=-author]")
        assert author.get_attribute("value") == "shift@node-3"

    def test_a_new_total_shows_what_it_changes_in_the_spec(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "total", "more data", total="1500")
        browser.wait_for("dialog .changes", "total: 1000 → 1500", "learning_rate.decay.end")
        confirm(browser, "Done: new spec from 7 on")
        assert site.run(job.name).total == 1500
        browser.wait_for(".revision", "total", "more data")

    def test_an_adjustment_is_taken_back(self, browser: Browser, site: Site, job: Trainer) -> None:
        first = site.adjust(job.name, scale_lr=0.5).adjustment.id
        site.adjust(job.name, scale_lr=0.25)
        open_run(browser, site, job)
        browser.click(f".adjustments [data-id='{first}'] [data-role=undo]")
        assert browser.wait_for("dialog [name=id]").get_attribute("value") == first
        browser.fill("dialog textarea", "it was too much")
        browser.press(Keys.ENTER)
        browser.wait_for("dialog h3", f"take back {first}")
        confirm(browser, "Done: take back")
        job.report(falling(10))
        statuses = {item.id: item.status for item in site.adjustments(job.name)}
        assert statuses[first] == "undone"

    def test_an_advice_is_approved(self, browser: Browser, site: Site) -> None:
        site.train("approved", [2.0, 2.0], **ADVISING)
        (advice,) = site.adjustments("approved")
        browser.open(site.url("/runs/approved"))
        browser.click(".adjustments [data-role=approve]")
        # The reason of the advice stands: none is asked for.
        browser.click("dialog [type=submit]")
        browser.wait_for("dialog h3", "Dry run")
        confirm(browser, "Done: LR x 0.5")
        before, made = site.adjustments("approved")
        assert (before.id, before.status) == (advice.id, "approved")
        assert (made.action, made.reason) == ("multiply", advice.reason)
        browser.wait_gone(".adjustments [data-role=approve]")

    def test_in_leader_mode_it_may_show_later(self, browser: Browser, site: Site) -> None:
        job = site.train("led", falling(3), mode="leader")
        open_run(browser, site, job)
        ask(browser, "scale_lr", "less", factor="0.5")
        browser.wait_for("dialog .notice", "Leader mode: the job may have gone on alone")
        confirm(browser, "Done: LR x 0.5", "or later if the job has gone on alone")

    def test_what_is_so_already_is_not_done_again(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "scale_lr", "nothing", factor="1")
        browser.wait_for("dialog h3", "Nothing to do")
        assert not browser.all(CONFIRM)[0].is_displayed()

    def test_what_is_changed_after_a_dry_run_needs_another_one(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "scale_lr", "a try", factor="0.5")
        browser.wait_for(CONFIRM)
        browser.fill("dialog [name=factor]", "0.25")
        browser.wait_gone(CONFIRM)
        assert browser.all("dialog canvas") == []
        browser.press(Keys.ENTER)
        browser.wait_for("dialog h3", "LR x 0.25")
        confirm(browser, "Done: LR x 0.25")


class TestRefusals:
    def test_a_reason_is_required(self, browser: Browser, site: Site, job: Trainer) -> None:
        open_run(browser, site, job)
        ask(browser, "hold", "   ")
        assert browser.run_script(
            "return document.querySelector('dialog textarea').validity.valueMissing"
        )
        assert browser.focused() == "Reason"
        assert browser.texts("dialog h3") == []
        assert not browser.all(CONFIRM)[0].is_displayed()

    def test_one_that_is_not_possible_is_shown_in_words(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "next_stage", "on we go")
        browser.wait_for("dialog .notice[role=alert]", "no stage comes next at progress 7")
        browser.expect_refusal(409)
        browser.choose("dialog [id$=-what]", "begin_decay")
        browser.fill("dialog [name=length]", "soon")
        browser.press(Keys.ENTER)
        browser.wait_for("dialog .notice[role=alert]", "begin_decay.length", "'soon'")
        browser.expect_refusal(400)
        assert not browser.all(CONFIRM)[0].is_displayed()

    def test_a_plan_that_somebody_changed_meanwhile_is_shown_anew(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "scale_lr", "less", factor="0.5")
        browser.wait_for("dialog .values", "7e-5 → 3.5e-5")
        other = site.adjust(job.name, scale_lr=0.1).adjustment.id
        browser.click(CONFIRM)
        browser.wait_for("dialog .notice", "Nothing was done", "the plan has changed")
        browser.wait_for("dialog .values", "7e-6 → 3.5e-6")
        browser.expect_refusal(409)
        assert [item.id for item in site.adjustments(job.name)] == [other]
        confirm(browser, "Done: LR x 0.5")
        assert [item.factor for item in site.adjustments(job.name)] == [0.1, 0.5]

    def test_an_advice_that_somebody_approved_meanwhile_is_refused_in_words(
        self, browser: Browser, site: Site
    ) -> None:
        site.train("twice", [2.0, 2.0], **ADVISING)
        (advice,) = site.adjustments("twice")
        browser.open(site.url("/runs/twice"))
        browser.click(".adjustments [data-role=approve]")
        browser.click("dialog [type=submit]")
        browser.wait_for(CONFIRM)
        site.call("ApproveAdvice", run="twice", advice=advice.id, author="x", request_id="x")
        browser.click(CONFIRM)
        browser.wait_for("dialog .notice", "Nothing was done", "it was approved already")
        assert "Below is what it would do" not in browser.text("dialog .notice")
        assert not browser.all("dialog .primary")[0].is_displayed()
        assert len(site.adjustments("twice")) == 2
        browser.expect_refusal(409)

    def test_a_run_that_is_left_takes_its_dialog_along(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        browser.open(site.url())
        browser.click(f".runs a[href='/runs/{job.name}']")
        browser.click("[data-role=hold]")
        browser.wait_for("dialog[open]")
        browser.driver.back()
        browser.wait_for(".runs")
        browser.wait_gone("dialog")

    def test_a_run_that_was_finished_meanwhile_takes_no_change(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "hold", "wait")
        browser.wait_for(CONFIRM)
        site.finish(job.name)
        browser.click(CONFIRM)
        browser.wait_for("dialog .notice", "is finished")
        browser.expect_refusal(409)
        browser.click("dialog .acts.end .button:not(.primary)")
        browser.wait_for("main", "The run is finished: its plan no longer changes.")
        assert browser.all("[data-role=hold]") == []


class TestOnce:
    def test_a_double_click_makes_one_adjustment(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "scale_lr", "once", factor="0.5")
        browser.wait_for(CONFIRM)
        browser.run_script(
            "const button = document.querySelector('dialog .primary');"
            "for (let press = 0; press < 3; press++) button.click()"
        )
        browser.wait_for(SAID, "Done: LR x 0.5")
        assert len(site.adjustments(job.name)) == 1

    def test_a_request_whose_answer_was_lost_is_sent_again_and_carried_out_once(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "scale_lr", "once", factor="0.5")
        browser.wait_for(CONFIRM)
        browser.run_script(LOSE, 1)
        confirm(browser, "Done: LR x 0.5 from 7 on")
        first, second = browser.run_script("return window.sent")
        assert first == second
        assert first["request_id"]
        assert first["etag"]
        (made,) = site.adjustments(job.name)
        assert made.id in browser.text(SAID)

    def test_while_nobody_knows_whether_it_was_done_nothing_else_can_be_sent(
        self, browser: Browser, site: Site, job: Trainer
    ) -> None:
        open_run(browser, site, job)
        ask(browser, "scale_lr", "once", factor="0.5")
        browser.wait_for(CONFIRM)
        browser.run_script(LOSE, 3)
        browser.click(CONFIRM)
        browser.wait_for("dialog .notice", "may have been made or not")
        assert browser.wait_for(CONFIRM).text == "Send again"
        assert not browser.all("dialog [name=factor]")[0].is_enabled()
        confirm(browser, "Done: LR x 0.5 from 7 on")
        assert len({str(item) for item in browser.run_script("return window.sent")}) == 1
        assert len(site.adjustments(job.name)) == 1


class TestKeyboard:
    def test_a_hold_needs_no_mouse(self, browser: Browser, site: Site, job: Trainer) -> None:
        open_run(browser, site, job)
        for _ in range(40):
            browser.press(Keys.TAB)
            if browser.focused() == "Hold…":
                break
        assert browser.focused() == "Hold…"
        browser.press(Keys.ENTER)
        browser.wait_for("dialog[open]")
        assert browser.focused() == "Reason"
        browser.press(Keys.ESCAPE)
        browser.wait_gone("dialog")
        assert browser.focused() == "Hold…"

        browser.press(Keys.ENTER)
        browser.wait_for("dialog[open]")
        browser.press("no hands", Keys.ENTER)
        browser.wait_for(CONFIRM)
        # A screen reader reads what it would do, and Enter once more does nothing.
        browser.wait(lambda: browser.focused().startswith("Dry run"), browser.focused)
        browser.press(Keys.ENTER)
        assert site.adjustments(job.name) == []
        for _ in range(10):
            browser.press(Keys.TAB)
            if browser.focused().startswith("Confirm"):
                break
        browser.press(Keys.ENTER)
        browser.wait_for(SAID, "Done: hold LR and WD")
        assert last(site, job).reason == "no hands"
        # The focus is back in the panel that it came from, on what there is to do now.
        browser.wait(lambda: browser.focused() in {"Release…", "Adjust…"}, browser.focused)


class TestReadOnly:
    @pytest.fixture
    def site(self, tmp_path: Path) -> Iterator[Site]:
        """A server that listens beyond this machine."""
        program = serve(tmp_path / "data", "127.0.0.1:0", "--http", "0.0.0.0:0", "--insecure")
        port = program.http.rpartition(":")[2]
        with Site(program.grpc, f"127.0.0.1:{port}") as site:
            yield site
        program.dispose()

    def test_there_are_no_buttons_and_the_server_takes_no_change(
        self, site: Site, browser: Browser
    ) -> None:
        site.train("locked", [2.0, 2.0], **ADVISING)
        (advice,) = site.adjustments("locked")
        browser.open(site.url("/runs/locked"))
        browser.wait_for("main", "Read-only: the server listens beyond this machine")
        browser.click(".actions summary")
        browser.wait_for(".actions code", "lrpilot run hold locked --reason …")
        browser.resize(PHONE)
        fits = "return innerWidth === 390 && document.documentElement.scrollWidth <= 390"
        browser.wait(lambda: browser.run_script(fits), "it fits a phone")
        browser.wait_for(".adjustments", f"lrpilot run approve locked {advice.id} --reason …")
        roles = browser.run_script(
            "return [...document.querySelectorAll('[data-role]')].map((item) => item.dataset.role)"
        )
        assert set(roles) == {"pick", "wonder"}
        # What an advice would do can be seen all the same.
        assert browser.run_script(
            "return fetch('/api/runs/locked/adjust', {method: 'POST', headers: {"
            "'Content-Type': 'application/json'}, body: JSON.stringify({hold: true, reason: 'x',"
            "author: 'y', request_id: 'z'})}).then((answer) => answer.status)"
        ) == 403  # fmt: skip
        browser.expect_refusal(403)
        assert [item.id for item in site.adjustments("locked")] == [advice.id]
