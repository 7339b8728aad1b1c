"""What a scrape shows: each series, its labels, and when it ends."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lrpilot.server._commit import GroupCommitter
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._metrics import Metrics
from lrpilot.server._store import LogRow, StoreUnavailable

if TYPE_CHECKING:
    import pytest

    from tests.server.conftest import Replica, Until

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""

RUN_SERIES = {
    "lrpilot_run_learning_rate",
    "lrpilot_run_weight_decay",
    "lrpilot_run_loss",
    "lrpilot_run_smoothed_loss",
    "lrpilot_run_progress",
    "lrpilot_run_total",
    "lrpilot_run_frontier",
    "lrpilot_run_horizon",
    "lrpilot_run_attempt",
    "lrpilot_run_losses",
    "lrpilot_run_nonfinite_losses",
    "lrpilot_run_late_losses",
    "lrpilot_run_skipped_updates",
    "lrpilot_run_rollbacks",
    "lrpilot_run_adjustments_total",
    "lrpilot_run_waivers_total",
    "lrpilot_run_declared_steps_total",
    "lrpilot_run_ranks_waiting",
    "lrpilot_run_updated_timestamp_seconds",
}
SERVER_SERIES = {
    "lrpilot_rpc_calls_total",
    "lrpilot_rpc_duration_seconds_bucket",
    "lrpilot_rpc_duration_seconds_count",
    "lrpilot_rpc_duration_seconds_sum",
    "lrpilot_commit_duration_seconds_bucket",
    "lrpilot_commit_duration_seconds_count",
    "lrpilot_commit_duration_seconds_sum",
    "lrpilot_committed_events_total",
    "lrpilot_failed_commits_total",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """One scrape, read back by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples: Samples = {}
        for family in self.families:
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.samples
                self.samples[key] = sample.value

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, frozenset(labels.items())))

    def run(self, name: str, run: str = "small") -> float | None:
        return self.value(f"lrpilot_run_{name}", run=run)

    def series_of(self, run: str) -> set[str]:
        return {name for name, labels in self.samples if ("run", run) in labels}


async def scrape(server: Replica) -> Scrape:
    # On a thread, as a scrape is: it asks this event loop for the runs.
    text = await asyncio.to_thread(generate_latest, server.metrics.registry)
    return Scrape(text.decode())


async def trained(server: Replica) -> Any:
    job = await server.start_job(
        groups=[{"name": "a"}, {"name": "b", "peak": 4e-3, "weight_decay_multiplier": 0}],
        **server.feedback(delay=3),
    )
    await job.values(0, in_use=1)
    await job.report((0, 2.0), (1, 3.0), (2, math.inf), (3, 1.0))
    return job


async def test_every_series_of_a_run(server: Replica) -> None:
    job = await trained(server)
    seen = await scrape(server)
    assert seen.series_of("small") == RUN_SERIES
    shown = await job.shown()
    # The cut on the loss at 1 shows at 4, where the run is now.
    assert seen.value("lrpilot_run_learning_rate", run="small", group="a") == LR / 2
    assert seen.value("lrpilot_run_learning_rate", run="small", group="b") == 2e-3
    assert seen.value("lrpilot_run_weight_decay", run="small", group="a") == 0.1
    assert seen.value("lrpilot_run_weight_decay", run="small", group="b") == 0
    source = "policies.0 (plateau)"
    assert seen.value("lrpilot_run_adjustments_total", run="small", source=source) == 1
    assert (seen.run("loss"), seen.run("smoothed_loss")) == (1.0, shown.smoothed_loss)
    assert (seen.run("progress"), seen.run("total")) == (4, 1000)
    assert (seen.run("frontier"), seen.run("horizon"), seen.run("attempt")) == (4, 7, 1)
    assert (seen.run("losses"), seen.run("nonfinite_losses")) == (4, 1)
    assert (seen.run("late_losses"), seen.run("waivers_total")) == (0, 0)
    assert seen.run("ranks_waiting") == 0
    updated_s = seen.run("updated_timestamp_seconds")
    assert updated_s is not None
    assert abs(updated_s - shown.updated_at.ToNanoseconds() / 1e9) < 1e-3


async def test_every_series_of_the_server(server: Replica) -> None:
    job = await trained(server)
    await server.refused("GetRun", run="nobody")
    await job.refused_report((0, 7.0))
    seen = await scrape(server)
    assert {name for name, _ in seen.samples if not name.endswith("_created")} >= SERVER_SERIES
    calls = {
        ("AttachRun", "OK"): 1,
        ("OpenAttempt", "OK"): 1,
        ("GetValues", "OK"): 1,
        ("ReportLosses", "OK"): 1,
        ("ReportLosses", "ALREADY_EXISTS"): 1,
        ("GetRun", "NOT_FOUND"): 1,
    }
    for (method, code), count in calls.items():
        assert seen.value("lrpilot_rpc_calls_total", method=method, code=code) == count
    assert seen.value("lrpilot_rpc_duration_seconds_count", method="ReportLosses") == 2
    waited_s = seen.value("lrpilot_rpc_duration_seconds_sum", method="GetValues")
    assert waited_s is not None
    assert waited_s > 0
    # Created, opened, recorded, reported.
    assert seen.value("lrpilot_committed_events_total") == 4
    assert seen.value("lrpilot_commit_duration_seconds_count") == 4
    assert seen.value("lrpilot_failed_commits_total") == 0
    assert seen.value("process_resident_memory_bytes")


async def test_nothing_is_labelled_by_rank(server: Replica) -> None:
    await server.attach(**server.feedback())
    for rank in range(4):
        await server.open(key="k", rank=rank)
    seen = await scrape(server)
    labels = {label for _, pairs in seen.samples for label, _ in pairs}
    assert labels <= {"run", "group", "source", "method", "code", "le"}


async def test_every_family_says_what_it_is(server: Replica) -> None:
    await trained(server)
    seen = await scrape(server)
    ours = [family for family in seen.families if family.name.startswith("lrpilot_")]
    assert {family.name for family in ours} >= {"lrpilot_run_loss", "lrpilot_rpc_calls"}
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert family.type in {"gauge", "counter", "histogram"}
        if family.type == "gauge" and not family.name.endswith("_created"):
            assert not family.name.endswith("_total") or family.name == "lrpilot_run_total"


async def test_a_loss_that_is_no_number(server: Replica) -> None:
    job = await server.start_job(**server.feedback())
    for loss in (math.nan, math.inf, -math.inf):
        await job.report(((await job.shown()).frontier, loss))
        shown = (await scrape(server)).run("loss")
        assert shown is not None
        assert shown == loss or (math.isnan(shown) and math.isnan(loss))
    assert (await scrape(server)).run("nonfinite_losses") == 3


async def test_what_is_not_known_has_no_sample(server: Replica) -> None:
    await server.start_job(weight_decay=None)
    seen = await scrape(server)
    missing = {"weight_decay", "loss", "smoothed_loss", "adjustments_total"}
    assert seen.series_of("small") == RUN_SERIES - {f"lrpilot_run_{name}" for name in missing}
    assert seen.value("lrpilot_run_learning_rate", run="small", group="") == LR


async def test_who_waits_and_who_is_late(server: Replica, until: Until) -> None:
    job = await server.start_job(**server.feedback(delay=1, timeout="200ms"))
    tasks = [asyncio.create_task(job.values(1, blocked=True, wait_ms=30_000)) for _ in range(3)]
    await until(lambda: server.live().ranks_waiting == 3)
    assert (await scrape(server)).run("ranks_waiting") == 3
    await asyncio.gather(*tasks)
    await job.report((0, 1.0))
    seen = await scrape(server)
    assert (seen.run("waivers_total"), seen.run("late_losses")) == (1, 1)
    assert (seen.run("ranks_waiting"), seen.run("losses")) == (0, 0)


async def test_a_rank_that_waits_makes_its_run_visible(server: Replica, until: Until) -> None:
    job = await server.start_job(**server.feedback())
    await server.restart()
    assert (await scrape(server)).series_of("small") == set()
    task = asyncio.create_task(job.values(2, blocked=True, wait_ms=30_000))

    async def visible() -> bool:
        return (await scrape(server)).run("ranks_waiting") == 1

    await until(visible)
    await job.report((0, 1.0))
    await task


async def test_what_an_attempt_forgot_stays_counted(server: Replica) -> None:
    job = await server.start_job(**server.feedback())
    await job.report((0, 1.0), (1, 1.0))
    labels = {"run": "small", "source": "policies.0 (plateau)"}
    assert (await scrape(server)).value("lrpilot_run_adjustments_total", **labels) == 1
    await server.open(progress=0)
    assert (await scrape(server)).value("lrpilot_run_adjustments_total", **labels) == 1


async def test_runs_end_with_their_series(server: Replica) -> None:
    await trained(server)
    for name in ("finished", "deleted", "silent"):
        await server.attach(name)
    await server.open("finished")
    await server.open("deleted")
    seen = await scrape(server)
    assert all(seen.series_of(name) for name in ("small", "finished", "deleted", "silent"))
    await server.call("FinishRun", run="finished", force=True, request_id="f")
    await server.call("DeleteRun", run="deleted", force=True)
    seen = await scrape(server)
    assert seen.series_of("small") == RUN_SERIES
    assert seen.series_of("finished") == seen.series_of("deleted") == set()


async def test_looking_at_a_run_does_not_make_it_live(server: Replica) -> None:
    await server.call("CreateRun", spec_document=server.document(), request_id="c")
    await server.call("GetRun", run="small")
    await server.call("ListRuns")
    assert (await scrape(server)).series_of("small") == set()


async def test_names_that_need_quoting(server: Replica) -> None:
    name = 'a "quoted" \\ name'
    await server.start_job(groups=[{"name": name}])
    seen = await scrape(server)
    assert seen.value("lrpilot_run_learning_rate", run="small", group=name) == LR


async def test_a_commit_that_fails_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryStore):
        def append(self, batch: Any) -> Any:
            raise StoreUnavailable("full")

    metrics = Metrics()
    committer = GroupCommitter(Failing(), metrics)
    results = await asyncio.gather(
        committer.append("a", [LogRow(1, b"", "", 0)], create=True), return_exceptions=True
    )
    await committer.close()
    assert isinstance(results[0], StoreUnavailable)
    seen = Scrape(generate_latest(metrics.registry).decode())
    assert seen.value("lrpilot_failed_commits_total") == 1
    assert seen.value("lrpilot_committed_events_total") == 0
