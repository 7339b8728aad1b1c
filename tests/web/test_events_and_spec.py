"""What a run's page says beside the curves: adjustments, the event log, the spec, its history."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selenium.webdriver.common.keys import Keys

from tests.web.site import ACTING, ADVISING, falling

if TYPE_CHECKING:
    from tests.web.browser import Browser
    from tests.web.site import Site

EVENTS = ".events > li"
ITEMS = ".adjustments > li"

MARKUP = "<img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"


def seqs(browser: Browser) -> list[int]:
    """Return the sequence numbers of the events shown."""
    found: list[int] = browser.run_script(
        "return [...document.querySelectorAll('.events > li')]"
        ".map((item) => Number(item.dataset.seq))"
    )
    return found


class TestAdjustments:
    def test_each_says_what_when_why_and_who(self, browser: Browser, site: Site) -> None:
        job = site.train("said", [2.0, 1.0, 1.5, 1.4, 1.3], **ACTING)
        site.adjust("said", scale_lr=0.5)
        job.report(falling(1, 0.5))
        browser.open(site.url("/runs/said"))
        browser.wait_for(ITEMS, "in force")
        newest, oldest = browser.texts(ITEMS)
        assert "planned" in newest
        assert "LR x 0.5" in newest
        assert "from 9 on" in newest
        assert "to see it" in newest
        assert "oncall@node-7" in newest
        assert "in force" in oldest
        assert "LR 0.001 → 5e-4" in oldest
        assert "loss 1.5" in oldest
        assert "plateau" in oldest

    def test_groups_beyond_the_first_show_on_demand(self, browser: Browser, site: Site) -> None:
        groups = [{"name": "matrices"}, {"name": "embedding", "peak": 4e-3}]
        site.train("groups", falling(3), groups=groups)
        site.adjust("groups", scale_lr=0.5)
        browser.open(site.url("/runs/groups"))
        browser.wait_for(ITEMS, "LR 0.001 → 5e-4 (+1 group)")
        assert "embedding" not in browser.text(ITEMS)
        browser.click(f"{ITEMS} summary")
        browser.wait_for(ITEMS, "matrices", "embedding", "0.004 → 0.002")

    def test_one_can_be_selected_and_linked_to(self, browser: Browser, site: Site) -> None:
        site.train("linked", falling(3))
        first = site.adjust("linked", scale_lr=0.5).adjustment.id
        site.adjust("linked", scale_lr=0.25)
        browser.open(site.url("/runs/linked"))
        browser.wait_for(ITEMS, "LR x 0.25")
        browser.click(f"{ITEMS}[data-id='{first}'] .pick")
        browser.wait_for(f"{ITEMS}.selected", "LR x 0.5")
        address = site.url(f"/runs/linked?adjustment={first}")
        assert browser.driver.current_url == address

        browser.open("about:blank").open(address)
        browser.wait_for(f"{ITEMS}.selected", "LR x 0.5")
        (picked,) = browser.all(f"{ITEMS} .pick[aria-pressed=true]")
        picked.click()
        browser.wait_gone(f"{ITEMS}.selected")
        assert browser.driver.current_url == site.url("/runs/linked")

    def test_what_a_later_attempt_forgot_is_dimmed(self, browser: Browser, site: Site) -> None:
        site.train("again", [2.0, 1.0, 1.5, 1.4, 1.3], **ACTING)
        site.train("again", [], resume_at=1, **ACTING)
        browser.open(site.url("/runs/again"))
        browser.wait_for(f"{ITEMS}.dimmed", "forgotten", "LR x 0.5")

    def test_it_says_that_older_ones_are_in_the_event_log(
        self, browser: Browser, site: Site
    ) -> None:
        # The values of so many groups take the room that the server has for adjustments.
        groups = [{"name": f"layer-{index}"} for index in range(200)]
        job = site.train("older", falling(3), groups=groups)
        for number in range(60):
            site.adjust("older", scale_lr=1.0 + 0.001 * (number + 1))
        run = site.run("older")
        shown = len(run.adjustments)
        assert run.older_adjustments == 60 - shown > 0
        browser.open(site.url("/runs/older"))
        told = f"The event log has {60 - shown} older ones, not shown here."
        browser.wait_for("section", "Show ", told)
        markers = f"newest {shown} adjustments; {60 - shown} older ones stand in the event log"
        browser.wait_for(".remarks", markers)
        site.adjust("older", scale_lr=2.0)
        job.report(falling(1))
        browser.wait_for("section", f"The event log has {61 - shown} older ones")
        browser.wait_for(".remarks", f"; {61 - shown} older ones")

    def test_a_pending_advice_says_until_when_it_can_be_approved(
        self, browser: Browser, site: Site
    ) -> None:
        job = site.train("asked", [2.0, 2.0], **ADVISING)
        (advice,) = site.adjustments("asked")
        browser.open(site.url("/runs/asked"))
        said = browser.wait_for(ITEMS, "advice", f"below {advice.expires}").text
        assert f"for {advice.expires - site.run('asked').horizon} more iterations" in said
        job.report(falling(3, 1.0))
        left = advice.expires - site.run("asked").horizon
        browser.wait_for(ITEMS, f"for {left} more iterations")
        (wonder,) = browser.all(f"{ITEMS} [data-role=wonder]")
        # The newest one is drawn unasked.
        assert wonder.get_attribute("aria-pressed") == "true"
        wonder.click()
        browser.wait_for(f"{ITEMS} [data-role=wonder][aria-pressed=false]")


class TestEventLog:
    def test_it_has_what_is_notable_and_all_on_demand(self, browser: Browser, site: Site) -> None:
        site.train("log", falling(6))
        site.adjust("log", scale_lr=0.5)
        browser.open(site.url("/runs/log"))
        browser.wait_for(EVENTS, "adjusted")
        kinds = browser.texts(".events .kind")
        assert kinds == ["adjusted", "opened", "created"]
        newest = browser.texts(EVENTS)[0]
        assert "LR x 0.5 from progress 10 on" in newest
        assert "by oncall@node-7" in newest
        assert "to see it" in newest
        (made,) = site.adjustments("log")
        assert made.id in newest
        assert "LR 0.001 → 5e-4" in newest

        browser.click("#events-all")
        browser.wait_for(EVENTS, "reported")
        assert seqs(browser) == list(range(site.run("log").seq, 0, -1))
        assert browser.driver.current_url.endswith("?events=all")
        browser.open("about:blank").open(site.url("/runs/log?events=all"))
        browser.wait_for(EVENTS, "reported")
        assert browser.all("#events-all")[0].is_selected()

    def test_what_a_policy_decided_stands_under_its_loss(
        self, browser: Browser, site: Site
    ) -> None:
        site.train("decided", [2.0, 1.0, 1.5], **ACTING)
        (made,) = site.adjustments("decided")
        browser.open(site.url("/runs/decided"))
        browser.wait_for(EVENTS, "reported", made.id, made.reason, "plateau")
        browser.click(".decided .pick")
        browser.wait_for(f"{ITEMS}.selected", "LR x 0.5")

    def test_older_events_come_on_demand_and_newer_ones_by_themselves(
        self, browser: Browser, site: Site
    ) -> None:
        job = site.train("much", falling(2))
        for number in range(70):
            site.adjust("much", scale_lr=1.0 + 0.001 * (number + 1), reason=f"number {number}")
        browser.open(site.url("/runs/much"))
        browser.wait_for(EVENTS, "number 69")
        assert len(browser.texts(EVENTS)) == 50
        site.adjust("much", hold=True, reason="the newest")
        job.report(falling(2))
        browser.wait_for(EVENTS, "the newest")
        assert "the newest" in browser.texts(EVENTS)[0]
        browser.click(".events ~ .button")
        browser.wait_for(EVENTS, "created by a trainer")
        shown = seqs(browser)
        assert shown == sorted(set(shown), reverse=True)
        assert [text for text in browser.texts(".events q") if "number" in text] == [
            f"number {number}" for number in range(69, -1, -1)
        ]
        browser.wait_gone(".events ~ .button")

    def test_with_all_events_on_a_training_run_none_is_missing(
        self, browser: Browser, site: Site
    ) -> None:
        job = site.train("fast", falling(3))
        browser.open(site.url("/runs/fast?events=all"))
        browser.wait_for(EVENTS, "reported")
        for _ in range(5):
            job.report(falling(4))
        newest = site.run("fast").seq
        browser.wait(lambda: seqs(browser)[0] == newest, "the newest event is there")
        assert seqs(browser) == list(range(newest, 0, -1))

    def test_markup_in_a_reason_is_text(self, browser: Browser, site: Site) -> None:
        site.train("markup", falling(2))
        site.adjust("markup", scale_lr=0.5, reason=MARKUP, author=MARKUP)
        site.revise("markup", total=2000)
        browser.open(site.url("/runs/markup"))
        browser.wait_for(EVENTS, MARKUP)
        browser.wait_for(ITEMS, MARKUP)
        assert browser.all("main img, .events b, .adjustments b") == []
        assert browser.driver.title == "markup · lrpilot"


class TestSpec:
    def test_it_shows_the_spec_in_force_and_what_a_revision_changed(
        self, browser: Browser, site: Site
    ) -> None:
        site.train("spec", falling(3))
        browser.open(site.url("/runs/spec"))
        browser.wait_for(".yaml", "peak: 0.001")
        assert browser.all(".revision") == []

        site.revise("spec", learning_rate={"peak": 2e-3}, total=1500)
        revision = browser.wait_for(".revision", "learning_rate.peak", "from 7 on")
        assert "by oncall@node-7" in revision.text
        assert "to see it" in revision.text
        assert "total: 1000 → 1500" in browser.text(".revision .changes")
        assert [text.strip() for text in browser.texts(".diff del")] == [
            "- total: 1000", "-   peak: 0.001", "-     end: 1000",
        ]  # fmt: skip
        assert [text.strip() for text in browser.texts(".diff ins")] == [
            "+ total: 1500", "+   peak: 0.002", "+     end: 1500",
        ]  # fmt: skip
        assert browser.all(".yaml")[0].text.strip() == site.run("spec").spec_document.strip()

    def test_a_spec_that_waits_is_shown_apart(self, browser: Browser, site: Site) -> None:
        site.train("waiting", falling(3))
        site.attach("waiting", total=1500)
        browser.open(site.url("/runs/waiting"))
        browser.wait_for("main", "Begins with the next attempt", "total: 1000 → 1500")
        assert "total: 1000" in browser.text(".yaml")

    def test_it_can_be_copied(self, browser: Browser, site: Site) -> None:
        site.create("copied")
        browser.open(site.url("/runs/copied"))
        browser.wait_for(".yaml", "peak")
        browser.click(".spec-head .button")
        browser.wait_for(".spec-head .button", "Copied")
        browser.run_script("main.append(document.createElement('textarea'))")
        field = browser.wait_for("main > textarea")
        field.send_keys(Keys.CONTROL, "v")
        assert field.get_attribute("value") == site.run("copied").spec_document
