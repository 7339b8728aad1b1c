"""What a scrape shows: each series, its labels, and when it ends."""

from __future__ import annotations

import asyncio
import math
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lrpilot.server._commit import GroupCommitter
from lrpilot.server._live_run import LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._metrics import Metrics
from lrpilot.server._recent import RecentMaximum
from lrpilot.server._run_metrics import FAMILIES, RunCollector, full_name
from lrpilot.server._store import LogRow, StoreUnavailable
from lrpilot.v1 import trainer_pb2

if TYPE_CHECKING:
    from tests.server.conftest import Replica, Until

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""

SAMPLE_SUFFIXES = {"gauge": "", "counter": "_total", "info": "_info"}

RUN_SERIES = {full_name(name) + SAMPLE_SUFFIXES[family.kind] for name, family in FAMILIES.items()}
"""Every series that a run can have."""

SERVER_SERIES = {
    "lrpilot_build_info",
    "lrpilot_live_runs",
    "lrpilot_left_out_runs_total",
    "lrpilot_rpc_calls_total",
    "lrpilot_rpc_duration_seconds_bucket",
    "lrpilot_rpc_duration_seconds_count",
    "lrpilot_rpc_duration_seconds_sum",
    "lrpilot_commit_duration_seconds_bucket",
    "lrpilot_commit_duration_seconds_count",
    "lrpilot_commit_duration_seconds_sum",
    "lrpilot_commit_queue_depth",
    "lrpilot_committed_events_total",
    "lrpilot_failed_commits_total",
    "lrpilot_store_size_bytes",
    "lrpilot_compacted_events_total",
    "lrpilot_snapshot_failures_total",
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
    norm = trainer_pb2.LossReport(progress=0, loss=2.0, moves_to=1, gradient_norm=0.5)
    await job.report(reports=[norm])
    await job.report((1, 3.0), (2, math.inf), (3, 1.0))
    return job


async def test_every_series_of_a_run(server: Replica) -> None:
    job = await trained(server)
    seen = await scrape(server)
    assert seen.series_of("small") == RUN_SERIES - {"lrpilot_run_snapshot_timestamp_seconds"}
    shown = await job.shown()
    # The cut on the loss at 1 shows at 4, where the run is now.
    assert seen.value("lrpilot_run_learning_rate", run="small", group="a") == LR / 2
    assert seen.value("lrpilot_run_learning_rate", run="small", group="b") == 2e-3
    assert seen.value("lrpilot_run_weight_decay", run="small", group="a") == 0.1
    assert seen.value("lrpilot_run_weight_decay", run="small", group="b") == 0
    for name, value in {
        "learning_rate_multiplier": 0.5,
        "horizon_learning_rate": LR / 2,
    }.items():
        assert seen.value(f"lrpilot_run_{name}", run="small", group="a") == value
    plateau = {"run": "small", "source": "policies.0 (plateau)"}
    operator = {"run": "small", "source": "operator", "kind": "operator"}
    assert seen.value("lrpilot_run_adjustments_total", **plateau, kind="plateau") == 1
    assert seen.value("lrpilot_run_adjustments_total", **operator) == 0
    assert seen.value("lrpilot_run_policy_bad_reports", **plateau) == 0
    assert seen.value("lrpilot_run_policy_cooldown_reports", **plateau) == 0
    detector = {"run": "small", "source": "detector (divergence)", "kind": "divergence"}
    assert seen.value("lrpilot_run_advice_total", **detector) == 0
    info = {"unit": "iterations", "mode": "independent", "feedback": "on"}
    assert seen.value("lrpilot_run_info", run="small", **info) == 1
    assert seen.value("lrpilot_run_stage_info", run="small", stage="", phase="constant") == 1
    assert (seen.run("gradient_norm"), seen.run("delay"), seen.run("held")) == (0.5, 3, 0)
    assert (seen.run("slowest_rank_lag"), seen.run("blocked_seconds")) == (0, 0)
    assert (seen.run("pending_advice"), seen.run("planned_adjustments")) == (0, 0)
    assert seen.run("superseded_calls_total") == 0
    assert seen.run("last_report_timestamp_seconds") == seen.run("updated_timestamp_seconds")
    assert (seen.run("loss"), seen.run("smoothed_loss")) == (1.0, shown.smoothed_loss)
    assert (seen.run("progress"), seen.run("length")) == (4, 1000)
    assert (seen.run("frontier"), seen.run("horizon"), seen.run("attempt")) == (4, 7, 1)
    assert (seen.run("losses"), seen.run("nonfinite_losses")) == (4, 1)
    assert (seen.run("late_losses"), seen.run("waivers_total")) == (0, 0)
    assert (seen.run("ranks_waiting"), seen.run("forgotten")) == (0, 0)
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
        ("ReportLosses", "OK"): 2,
        ("ReportLosses", "ALREADY_EXISTS"): 1,
        ("GetRun", "NOT_FOUND"): 1,
    }
    for (method, code), count in calls.items():
        assert seen.value("lrpilot_rpc_calls_total", method=method, code=code) == count
    assert seen.value("lrpilot_rpc_duration_seconds_count", method="ReportLosses") == 3
    waited_s = seen.value("lrpilot_rpc_duration_seconds_sum", method="GetValues")
    assert waited_s is not None
    assert waited_s > 0
    # Created, opened, recorded, reported twice.
    assert seen.value("lrpilot_committed_events_total") == 5
    assert seen.value("lrpilot_commit_duration_seconds_count") == 5
    assert seen.value("lrpilot_commit_queue_depth") == 0
    assert seen.value("lrpilot_failed_commits_total") == 0
    assert seen.value("process_resident_memory_bytes")


async def test_how_large_the_store_is(server: Replica, until: Until) -> None:
    size = server.store.size()

    async def measured() -> bool:
        return (await scrape(server)).value("lrpilot_store_size_bytes") == size

    await until(measured)


async def test_nothing_is_labelled_by_rank(server: Replica) -> None:
    await server.attach(**server.feedback())
    for rank in range(4):
        await server.open(key="k", rank=rank)
    seen = await scrape(server)
    labels = {label for _, pairs in seen.samples for label, _ in pairs}
    of_runs = {label for family in FAMILIES.values() for label in family.labels}
    assert labels <= of_runs | {
        "run",
        "method",
        "code",
        "le",
        "version",
        "python",
        "grpc",
        "reason",
    }
    assert not any("rank" in label for label in labels)


async def test_every_family_says_what_it_is(server: Replica) -> None:
    await trained(server)
    seen = await scrape(server)
    ours = [family for family in seen.families if family.name.startswith("lrpilot_")]
    assert {family.name for family in ours} >= {"lrpilot_run_loss", "lrpilot_rpc_calls"}
    for family in ours:
        assert family.documentation.endswith("."), family.name
        assert family.type in {"gauge", "counter", "histogram"}
        if family.type == "gauge" and not family.name.endswith("_created"):
            assert not family.name.endswith("_total"), family.name


@pytest.mark.needs_program("promtool")
async def test_promtool_finds_nothing_in_a_scrape(server: Replica) -> None:
    await trained(server)
    text = await asyncio.to_thread(generate_latest, server.metrics.registry)
    done = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "metrics"], input=text, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


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
    missing = {
        "weight_decay",
        "loss",
        "smoothed_loss",
        "gradient_norm",
        "slowest_rank_lag",
        "last_report_timestamp_seconds",
        "snapshot_timestamp_seconds",
        "policy_cooldown_reports",
    }
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


async def test_a_run_whose_ranks_died_before_a_restart_is_shown_as_silent(server: Replica) -> None:
    job = await server.start_job(**server.feedback())
    await job.report((0, 1.0))
    # Without an attempt there are no ranks that could be dead.
    await server.call(
        "CreateRun", spec_document=server.document("planned"), request_id="create planned"
    )
    before = await scrape(server)
    await server.restart()
    await server.ledger.warm_up()
    after = await scrape(server)
    for name in ("updated_timestamp_seconds", "last_report_timestamp_seconds", "losses"):
        assert after.run(name) == before.run(name) is not None
    assert after.series_of("planned") == set()


async def test_what_an_attempt_forgot_stays_counted(server: Replica) -> None:
    job = await server.start_job(**server.feedback())
    await job.report((0, 1.0), (1, 1.0))
    labels = {"run": "small", "source": "policies.0 (plateau)", "kind": "plateau"}
    assert (await scrape(server)).value("lrpilot_run_adjustments_total", **labels) == 1
    await server.open(progress=0)
    assert (await scrape(server)).value("lrpilot_run_adjustments_total", **labels) == 1


async def test_how_far_the_slowest_rank_is_behind(server: Replica) -> None:
    job = await server.start_job(**server.feedback(delay=8))
    await job.report(*((at, 1.0) for at in range(5)))
    await job.values(5, in_use=5)
    assert (await scrape(server)).run("slowest_rank_lag") == 0
    await job.values(3, in_use=2)
    await job.values(5, in_use=5)
    assert (await scrape(server)).run("slowest_rank_lag") == 3
    # The ranks of a new attempt begin together.
    await server.open(progress=5)
    assert (await scrape(server)).run("slowest_rank_lag") is None


def test_what_was_greatest_lately() -> None:
    lag = RecentMaximum(60)
    assert lag.greatest(1000) is None
    lag.add(7, 1000)
    lag.add(3, 1059)
    assert lag.greatest(1059) == 7
    lag.add(2, 1061)
    assert lag.greatest(1100) == 7
    assert lag.greatest(1121) == 2
    assert lag.greatest(1300) is None
    lag.add(1, 1301)
    assert lag.greatest(1301) == 1


async def test_how_long_ranks_are_blocked(server: Replica, until: Until) -> None:
    job = await server.start_job(**server.feedback(delay=1))
    task = asyncio.create_task(job.values(1, blocked=True, wait_ms=30_000))
    await until(lambda: server.live().ranks_waiting == 1)

    async def blocked() -> bool:
        return ((await scrape(server)).run("blocked_seconds") or 0) > 0.1

    await until(blocked)
    await job.report((0, 1.0))
    await task
    # It stands still now: nobody is blocked.
    assert (await scrape(server)).run("blocked_seconds") == server.live().blocked_s()


async def test_calls_of_an_older_attempt_are_counted(server: Replica) -> None:
    old = await server.start_job(**server.feedback())
    new = await server.open()
    assert (await old.refused_values(0)).reason == "AttemptSuperseded"
    assert (await old.refused_report((0, 1.0))).reason == "AttemptSuperseded"
    await new.report((0, 1.0))
    assert (await scrape(server)).run("superseded_calls_total") == 2


async def test_advice_is_counted_until_it_is_approved(server: Replica) -> None:
    job = await server.start_job(**server.feedback(mode="advise"))
    await job.report((0, 1.0), (1, 1.0))
    seen = await scrape(server)
    policy = {"run": "small", "source": "policies.0 (plateau)", "kind": "plateau"}
    assert seen.value("lrpilot_run_advice_total", **policy) == 1
    assert seen.run("pending_advice") == 1
    [advice] = [item for item in (await job.shown()).adjustments if item.mode == "advise"]
    await server.call(
        "ApproveAdvice",
        run="small",
        advice=advice.id,
        reason="agreed",
        author="someone",
        request_id="approve",
    )
    seen = await scrape(server)
    approved = {"run": "small", "source": "operator", "kind": "plateau"}
    assert seen.value("lrpilot_run_adjustments_total", **approved) == 1
    assert seen.run("pending_advice") == 0


async def test_what_comes_next_is_shown(server: Replica) -> None:
    job = await server.start_job(**server.feedback(delay=3))
    await job.report((0, 2.0), (1, 3.0))
    seen = await scrape(server)
    assert (seen.run("progress"), seen.run("planned_adjustments")) == (2, 1)
    assert seen.value("lrpilot_run_learning_rate", run="small", group="") == LR
    assert seen.value("lrpilot_run_horizon_learning_rate", run="small", group="") == LR / 2


async def test_a_policy_shows_how_near_it_is_to_a_decision(server: Replica) -> None:
    job = await server.start_job(**server.feedback(delay=1, patience=1, cooldown=2))
    source = {"run": "small", "source": "policies.0 (plateau)"}

    async def standing() -> tuple[float | None, float | None]:
        seen = await scrape(server)
        return (
            seen.value("lrpilot_run_policy_bad_reports", **source),
            seen.value("lrpilot_run_policy_cooldown_reports", **source),
        )

    await job.report((0, 1.0), (1, 1.0))
    assert await standing() == (1, 0)
    await job.report((2, 1.0))
    assert await standing() == (0, 2)
    await job.report((3, 1.0))
    assert await standing() == (0, 1)


@pytest.mark.parametrize(("limit", "value"), [("MAX_RUNS", 2), ("MAX_SERIES", 50)])
async def test_the_newest_runs_are_shown_and_the_others_counted(
    server: Replica, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    # One of these runs has about 30 series.
    monkeypatch.setattr(f"lrpilot.server._run_metrics.{limit}", value)
    for name in ("first", "second", "third"):
        await server.start_job(name)
    for scrapes in (1, 2):
        seen = await scrape(server)
        assert seen.series_of("first") == set()
        assert seen.series_of("second")
        assert seen.series_of("third")
        assert seen.value("lrpilot_live_runs") == 3
        assert seen.value("lrpilot_left_out_runs_total") == scrapes


async def test_others_have_their_turn_while_many_runs_are_read(
    server: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrpilot.server._run_metrics.SLICE_S", 0.0)
    for number in range(20):
        await server.attach(f"run-{number}")
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += read.is_set()

    read = asyncio.Event()
    counting = asyncio.create_task(count_turns())
    live = server.ledger.live

    def begin() -> list[LiveRun]:
        read.set()
        return live()

    monkeypatch.setattr(server.ledger, "live", begin)
    collector = RunCollector(server.ledger, asyncio.get_running_loop())
    count, runs = await collector._read()
    counting.cancel()
    assert (count, len(runs)) == (20, 20)
    assert turns >= 19


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
    assert seen.series_of("small") == RUN_SERIES - {"lrpilot_run_snapshot_timestamp_seconds"}
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
