"""What the page says of jobs of several ranks, each a process with the real client."""

from __future__ import annotations

import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.e2e.harness import LEADER_TIMING, Rank, ask_to_end, make_spec, wait_until
from tests.e2e.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.web.browser import Browser
    from tests.web.site import Site

RANKS = "[aria-labelledby=panel-ranks]"


@pytest.fixture
def ranks(site: Site, tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Start a job of two ranks."""
    started: list[Rank] = []

    def start(name: str, **options: Any) -> list[Rank]:
        spec = make_spec(name, policies=[{"kind": "plateau", "patience": 10**6}])
        for rank in range(2):
            started.append(
                Rank(
                    tmp_path, site.grpc, spec, rank, key=name, world_size=2, pause_s=0.01, **options
                )
            )
        wait_until(lambda: all(rank.reached(30) for rank in started), "it trains")
        return started

    yield start
    for rank in started:
        rank.dispose()


def blocked_s(browser: Browser) -> int:
    """Return for how many seconds a rank waits, as the page says it; 0: none does."""
    found = re.search(r"1 call waits for values, for (\d+)\S* s", browser.text(RANKS))
    return int(found.group(1)) if found else 0


def test_where_a_rank_is_missing_it_says_which_and_how_long_the_others_wait(
    browser: Browser, site: Site, ranks: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    job = ranks("missing")
    browser.open(site.url("/runs/missing"))
    browser.wait_for(RANKS, "2 ranks asked within the last two minutes")
    # The one that reports stands still: the other one is out of values soon.
    job[0].send(signal.SIGSTOP)
    browser.wait_for(RANKS, "1 call waits for values, for ")
    browser.wait(lambda: blocked_s(browser) >= 3, lambda: browser.text(RANKS))
    missing, waiting = (row.split() for row in browser.texts(f"{RANKS} tbody tr"))
    assert (missing[0], waiting[0]) == ("0", "1")
    assert int(missing[1].replace(",", "")) < int(waiting[1].replace(",", ""))
    job[0].send(signal.SIGCONT)
    browser.wait_for(RANKS, "None waits.")
    ask_to_end(tmp_path, "missing")
    assert [rank.wait() for rank in job] == [0, 0]


def test_it_says_how_far_a_leader_may_go_on_alone_and_how_far_it_went(
    browser: Browser, site: Site, ranks: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    relay = Relay(site.grpc)
    try:
        leader, _ = job = ranks(
            "leader",
            program="leader_program",
            leader_address=relay.address,
            rendezvous=(tmp_path / "rendezvous").as_uri(),
            reporter=0,
            timing=LEADER_TIMING,
        )
        browser.open(site.url("/runs/leader"))
        browser.wait_for(".facts", "Leader mode: the job may go on alone below ")

        relay.cut()
        wait_until(lambda: leader.last("where")[1], "it goes on alone")
        begin = leader.last("where")[0]
        browser.click("[data-role=adjust]")
        browser.fill("dialog textarea", "less")
        browser.press(Keys.ENTER)
        browser.wait_for("dialog .notice", "Leader mode: the job may have gone on alone")
        browser.click("dialog .primary:enabled")
        browser.wait_for(".said", "Done: LR x 0.5", "or later if the job has gone on alone")
        wait_until(lambda: leader.reached(begin + 100), "it goes on")

        relay.restore()
        wait_until(lambda: site.run("leader").declaration.end > begin + 100, "it is declared")

        def is_told() -> bool:
            run = site.run("leader")
            last = run.declaration
            told = f"it did so for {run.declared_steps:,} steps, last from {last.begin:,} to"
            return f"{told} {last.end:,}." in browser.text(".facts")

        browser.wait(is_told, lambda: browser.text(".facts"))
        (change,) = site.adjustments("leader")
        assert change.effective > begin + 100
        browser.wait_for(".adjustments > li", "LR x 0.5", f"from {change.effective:,} on")
        ask_to_end(tmp_path, "leader")
        assert [rank.wait() for rank in job] == [0, 0]
    finally:
        relay.close()
