"""A real Prometheus scrapes the real server, and answers the queries that people ask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.prometheus import Prometheus

if TYPE_CHECKING:
    from tests.server.conftest import Program, Until

pytestmark = pytest.mark.needs_program("prometheus")


@pytest.fixture
def prometheus(tmp_path: Path, shared_program: Program) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the program."""
    started = Prometheus(tmp_path / "prometheus", shared_program.http)
    yield started
    started.end()


async def test_it_answers_what_people_ask(
    shared: Program, prometheus: Prometheus, until: Until
) -> None:
    job = await shared.start_job(
        "watched",
        groups=[{"name": "a"}, {"name": "b", "peak": 4e-3}],
        **shared.feedback(delay=3),
    )
    await job.values(0)
    await job.report((0, 2.0), (1, 3.0), (2, math.nan), (3, 1.5))
    a, b = (("group", "a"), ("run", "watched")), (("group", "b"), ("run", "watched"))
    run = (("run", "watched"),)

    async def scraped() -> bool:
        return (await prometheus.query('lrpilot_run_frontier{run="watched"}')) == {run: 4}

    await until(scraped)
    assert await prometheus.query('up{job="lrpilot"}') == {(): 1}
    smoothed = (await job.shown()).smoothed_loss
    source = (("kind", "plateau"), ("run", "watched"), ("source", "policies.0 (plateau)"))
    expected: dict[str, dict[tuple[tuple[str, str], ...], float]] = {
        "lrpilot_run_learning_rate": {a: 5e-4, b: 2e-3},
        "lrpilot_run_weight_decay": {a: 0.1, b: 0.1},
        "lrpilot_run_loss": {run: 1.5},
        "lrpilot_run_smoothed_loss": {run: smoothed},
        "lrpilot_run_progress": {run: 4},
        "lrpilot_run_horizon": {run: 7},
        "lrpilot_run_horizon - lrpilot_run_frontier": {run: 3},
        "lrpilot_run_nonfinite_losses / lrpilot_run_losses": {run: 0.25},
        'lrpilot_run_adjustments_total{kind="plateau"}': {source: 1},
        "lrpilot_run_learning_rate_multiplier": {a: 0.5, b: 0.5},
        "lrpilot_run_progress / lrpilot_run_length": {run: 0.004},
        'lrpilot_rpc_calls_total{method="ReportLosses", code="OK"}': {
            (("code", "OK"), ("method", "ReportLosses")): 1
        },
    }
    for expression, answer in expected.items():
        assert await prometheus.query(expression) == answer, expression

    async def rates() -> bool:
        # A rate needs two scrapes and a call between them.
        await job.values(0)
        calls = await prometheus.query('rate(lrpilot_rpc_calls_total{method="GetValues"}[1m])')
        quantile = "histogram_quantile(0.99, rate({}_duration_seconds_bucket[1m]))"
        slow = await prometheus.query(quantile.format("lrpilot_rpc"))
        return (
            calls.get((("code", "OK"), ("method", "GetValues")), 0) > 0
            and 0 < slow.get((("method", "GetValues"),), 0) <= 30
        )

    await until(rates)
    commits = await prometheus.query("lrpilot_commit_duration_seconds_count")
    assert commits[()] >= 4

    await job.report((4, math.nan))

    async def no_number() -> bool:
        return math.isnan((await prometheus.query("lrpilot_run_loss")).get(run, 0.0))

    await until(no_number)

    await shared.call("FinishRun", run="watched", force=True, request_id="f")

    async def gone() -> bool:
        return not await prometheus.query('{run="watched"}')

    # Stale at the next scrape, and not only after the five minutes of a target that is lost.
    await until(gone)
    assert await prometheus.query('up{job="lrpilot"}') == {(): 1}
