"""What people and their tools are answered, over a real gRPC connection."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot import core
from lrpilot.server import _run_service
from lrpilot.server._documents import read_spec
from lrpilot.v1 import runs_pb2 as pb
from lrpilot.v1 import trainer_pb2

if TYPE_CHECKING:
    from lrpilot.server._live_run import LiveRun
    from tests.server.conftest import Job, Replica, Until

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""

LIVE = {"FinishRun": {"request_id": "f"}, "DeleteRun": {}}
"""The methods that end a run, with the fields that they need."""


async def create(server: Replica, name: str = "small", **fields: Any) -> Any:
    answer = await server.call(
        "CreateRun", spec_document=server.document(name, **fields), request_id=f"create {name}"
    )
    return answer.run


async def get(server: Replica, name: str = "small") -> Any:
    return (await server.call("GetRun", run=name)).run


async def history(server: Replica, name: str = "small", page_size: int = 0) -> list[Any]:
    """Return every event, page by page."""
    found: list[Any] = []
    token = ""
    while True:
        page = await server.call("ListEvents", run=name, page_size=page_size, page_token=token)
        found += page.events
        token = page.next_page_token
        if not token:
            return found
        assert len(page.events) <= (page_size or 200)


class TestCreateRun:
    async def test_a_new_run(self, server: Replica) -> None:
        before_ns = time.time_ns()
        run = await create(server, **server.feedback(delay=7))
        assert (run.name, run.state, run.unit, run.total) == (
            "small", pb.RUN_STATE_CREATED, "iterations", 1000,
        )  # fmt: skip
        assert (run.attempt, run.begin, run.progress, run.frontier, run.horizon) == (0, 0, 0, 0, 0)
        assert (run.delay, run.seq, run.losses) == (7, 1, 0)
        assert not run.HasField("loss")
        assert not run.HasField("smoothed_loss")
        assert [(item.name, item.learning_rate, item.weight_decay) for item in run.values] == [
            ("", LR, 0.1)
        ]
        spec = read_spec(server.document(**server.feedback(delay=7)))
        assert read_spec(run.spec_document) == spec
        (row,) = server.store.read("small")
        assert run.digest == row.digest
        assert before_ns <= run.created_at.ToNanoseconds() <= time.time_ns()
        assert run.created_at == run.updated_at
        assert await get(server) == run

    async def test_no_decay(self, server: Replica) -> None:
        (values,) = (await create(server, weight_decay=None)).values
        assert not values.HasField("weight_decay")

    async def test_a_repeat_gets_the_first_answer(self, server: Replica) -> None:
        assert await create(server) == await create(server)

    async def test_another_call_for_the_same_name(self, server: Replica) -> None:
        await create(server)
        refusal = await server.refused(
            "CreateRun", spec_document=server.document(), request_id="other"
        )
        assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "RunExists")
        assert refusal.facts == {"run": "small"}

    async def test_one_of_many_at_once_creates_it(self, server: Replica) -> None:
        async def attempt(number: int) -> bool:
            try:
                await server.call(
                    "CreateRun", spec_document=server.document(), request_id=f"r{number}"
                )
            except Exception:
                return False
            return True

        assert sum(await asyncio.gather(*(attempt(number) for number in range(20)))) == 1

    async def test_an_invalid_spec(self, server: Replica) -> None:
        refusal = await server.refused("CreateRun", spec_document="name: A", request_id="a")
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        assert set(refusal.fields) == {"name", "total", "learning_rate"}

    async def test_an_empty_document(self, server: Replica) -> None:
        refusal = await server.refused("CreateRun", request_id="a")
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")

    @pytest.mark.parametrize("method", ["CreateRun", "ReviseRun", "FinishRun"])
    async def test_a_change_without_a_request_id(self, server: Replica, method: str) -> None:
        # Two of them would be taken for one call and its repeat.
        await create(server)
        fields = {"CreateRun": {"spec_document": server.document("other")}}.get(
            method, {"run": "small"}
        )
        if method == "ReviseRun":
            fields["spec_document"] = server.document(total=900)
        refusal = await server.refused(method, **fields)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == ["request_id"]


class TestGetRun:
    async def test_an_unknown_run_names_the_near_ones(self, server: Replica) -> None:
        await create(server, "gpt-a")
        await create(server, "gpt-b")
        refusal = await server.refused("GetRun", run="gpt-c")
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")
        assert set(refusal.facts["near"].split(", ")) == {"gpt-a", "gpt-b"}

    @pytest.mark.parametrize("method", ["GetRun", "ListEvents", "FinishRun", "DeleteRun"])
    async def test_no_run_at_all(self, server: Replica, method: str) -> None:
        fields = LIVE.get(method, {})
        refusal = await server.refused(method, run="nobody", **fields)
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")
        assert refusal.facts == {"run": "nobody", "near": ""}

    async def test_where_it_stands(self, server: Replica) -> None:
        ramp = {"peak": 1e-3, "warmup": 100}
        job = await server.start_job(learning_rate=ramp, **server.feedback(delay=4))
        await job.values(0, in_use=2)
        await job.report((0, 8.0), (1, 7.0), (2, 6.0))
        run = await get(server)
        assert (run.state, run.attempt, run.begin) == (pb.RUN_STATE_RUNNING, 1, 0)
        assert (run.progress, run.frontier, run.horizon) == (3, 3, 7)
        assert run.values[0].learning_rate == (await job.rates(3))[0]
        assert (run.loss, run.losses, run.nonfinite_losses) == (6.0, 3, 0)
        smoothed = weight = 0.0
        for loss in (8.0, 7.0, 6.0):
            smoothed, weight = 0.98 * smoothed + 0.02 * loss, 0.98 * weight + 0.02
        assert run.smoothed_loss == smoothed / weight

    async def test_progress_is_what_ranks_use(self, server: Replica) -> None:
        job = await server.start_job(feedback={"delay": 10})
        await job.values(0, in_use=5)
        run = await get(server)
        assert (run.progress, run.horizon, run.frontier) == (5, 15, 0)

    async def test_a_plateau_that_fires(self, server: Replica) -> None:
        job = await server.start_job(
            groups=[{"name": "a"}, {"name": "b", "peak": 4e-3}],
            **server.feedback(delay=3, patience=1),
        )
        await job.report((0, 2.0), (1, 2.5), (2, 3.0))
        (item,) = (await get(server)).adjustments
        assert (item.decided_at, item.effective) == (2, 5)
        assert (item.source, item.action, item.factor) == ("policies.0 (plateau)", "multiply", 0.5)
        assert (item.mode, item.forgotten) == ("act", False)
        assert (list(item.before), list(item.after)) == ([LR, 4e-3], [LR / 2, 2e-3])
        assert item.reason == "loss 3: none below 2 * (1 - 0.0001) for 2 reports (patience 1)"
        assert item.seq == 3
        assert await job.rates(4) == [LR, 4e-3, LR / 2, 2e-3]

    async def test_advice_is_shown_and_changes_nothing(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(mode="advise"))
        await job.report((0, 1.0), (1, 1.0))
        (item,) = (await get(server)).adjustments
        assert (item.mode, list(item.after)) == ("advise", [LR / 2])
        assert set(await job.rates(0)) == {LR}

    async def test_what_an_attempt_forgot_is_still_shown(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0), (1, 1.0), (2, 0.5))
        later = await server.open(progress=1)
        await later.report((1, 0.9), (2, 0.9))
        items = [(item.decided_at, item.forgotten) for item in (await get(server)).adjustments]
        assert items == [(1, True), (2, False)]
        assert (await get(server)).attempt == 2

    async def test_only_the_newest_adjustments_fit(self, server: Replica) -> None:
        groups = [{"name": f"g{number}"} for number in range(1500)]
        job = await server.start_job(
            groups=groups, **server.feedback(delay=1, eps=0.0), learning_rate={"peak": 1.0}
        )
        await job.report(*((number, 1.0) for number in range(30)))
        run = await get(server)
        assert 1 <= len(run.adjustments) < 29
        assert len(run.adjustments) + run.older_adjustments == 29
        assert run.adjustments[-1].decided_at == 29


class TestListRuns:
    async def names(self, server: Replica, page_size: int) -> list[list[str]]:
        pages, token = [], ""
        while True:
            answer = await server.call("ListRuns", page_size=page_size, page_token=token)
            pages.append([run.name for run in answer.runs])
            token = answer.next_page_token
            if not token:
                return pages

    async def test_none(self, server: Replica) -> None:
        assert await self.names(server, 0) == [[]]

    async def test_pages(self, server: Replica) -> None:
        for name in ("b", "a", "c", "a.1", "a-1"):
            await create(server, name)
        assert await self.names(server, 2) == [["a", "a-1"], ["a.1", "b"], ["c"]]
        assert await self.names(server, 5) == [["a", "a-1", "a.1", "b", "c"]]
        assert await self.names(server, 0) == [["a", "a-1", "a.1", "b", "c"]]

    async def test_one_that_cannot_be_read_hides_no_other(
        self, server: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("a", "b", "c"):
            await create(server, name)
        find = server.ledger.find

        async def broken(name: str) -> LiveRun:
            if name == "b":
                raise ZeroDivisionError
            return await find(name)

        monkeypatch.setattr(server.ledger, "find", broken)
        listed = (await server.call("ListRuns")).runs
        assert [run.name for run in listed] == ["a", "b", "c"]
        unreadable = [run.state == pb.RUN_STATE_UNREADABLE for run in listed]
        assert unreadable == [False, True, False]

    async def test_the_default_page(self, server: Replica) -> None:
        names = [f"run-{number:03}" for number in range(51)]
        for name in names:
            await create(server, name)
        assert await self.names(server, 0) == [names[:50], names[50:]]

    async def test_what_is_left_out(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0), (1, 1.0))
        (listed,) = (await server.call("ListRuns")).runs
        whole = await get(server)
        whole.ClearField("adjustments")
        whole.ClearField("spec_document")
        assert listed == whole

    @pytest.mark.parametrize("page_size", [-1, 501])
    async def test_a_page_size_out_of_range(self, server: Replica, page_size: int) -> None:
        refusal = await server.refused("ListRuns", page_size=page_size)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert refusal.fields == {"page_size": f"got {page_size}; allowed: 1 to 500, or 0 for 50"}

    async def test_a_page_that_would_not_fit_ends_early(self, server: Replica) -> None:
        groups = [{"name": f"{number:0>120}"} for number in range(1000)]
        names = [f"run-{number:02}" for number in range(8)]
        for name in names:
            await create(server, name, groups=groups)
        pages = await self.names(server, 500)
        assert len(pages) > 1
        assert [name for page in pages for name in page] == names

    async def test_after_a_restart(self, server: Replica) -> None:
        await create(server, "a")
        await create(server, "b")
        await server.restart()
        assert await self.names(server, 0) == [["a", "b"]]


class TestReviseRun:
    async def revise(self, server: Replica, request_id: str = "r", **fields: Any) -> Any:
        return await server.call(
            "ReviseRun",
            run="small",
            spec_document=server.document(**fields),
            request_id=request_id,
        )

    async def refused(self, server: Replica, **fields: Any) -> Any:
        return await server.refused(
            "ReviseRun", run="small", spec_document=server.document(**fields), request_id="r"
        )

    async def test_it_holds_from_the_horizon_on(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        await job.report((0, 1.0))
        answer = await self.revise(server, learning_rate={"peak": 5e-3}, **server.feedback(delay=3))
        assert answer.effective == 4
        assert read_spec(answer.run.spec_document).learning_rate is not None
        assert "peak: 0.005" in answer.run.spec_document
        await job.report((1, 0.9), (2, 0.8))
        assert await job.rates(1) == [LR] * 3 + [5e-3] * 2

    async def test_before_the_first_attempt(self, server: Replica) -> None:
        await create(server)
        answer = await self.revise(server, total=50, **server.feedback(delay=9))
        assert (answer.effective, answer.run.total, answer.run.delay) == (0, 50, 9)
        assert (await server.open()).opened.delay == 9

    async def test_a_repeat_gets_the_first_answer(self, server: Replica) -> None:
        feedback = server.feedback(delay=3)
        job = await server.start_job(**feedback)
        first = await self.revise(server, learning_rate={"peak": 5e-3}, **feedback)
        await job.report((0, 1.0))
        again = await self.revise(server, learning_rate={"peak": 5e-3}, **feedback)
        assert (first.effective, again.effective) == (3, 3)
        assert [event.kind for event in await history(server)].count("revised") == 1

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"unit": "tokens"}, "unit"),
            ({"groups": [{"name": "a"}]}, "groups"),
            ({"weight_decay": None}, "weight_decay (set or not)"),
            ({"feedback": {"delay": 3}}, "feedback.delay"),
            ({"policies": []}, "feedback on or off"),
        ],
    )
    async def test_what_only_a_new_attempt_may_change(
        self, server: Replica, change: dict[str, Any], field: str
    ) -> None:
        await server.start_job(**server.feedback(delay=2))
        refusal = await self.refused(server, **server.feedback(delay=2) | change)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RevisionRefused")
        assert refusal.facts == {"run": "small", "fields": field}
        assert 'on_change="revise"' in refusal.text

    async def test_an_end_in_the_past(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0, 100))
        refusal = await self.refused(server, total=101, **server.feedback())
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        assert refusal.fields == {"total": "got 101; allowed: at least the horizon, 102"}

    async def test_another_name(self, server: Replica) -> None:
        await create(server)
        refusal = await server.refused(
            "ReviseRun", run="small", spec_document=server.document("big"), request_id="r"
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        assert refusal.fields == {"name": "got 'big'; allowed: 'small'"}

    async def test_an_invalid_spec(self, server: Replica) -> None:
        await create(server)
        refusal = await self.refused(server, total=0, unit="x")
        assert set(refusal.fields) == {"total", "unit"}

    async def test_an_unknown_run(self, server: Replica) -> None:
        refusal = await self.refused(server)
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")

    async def test_a_finished_run(self, server: Replica) -> None:
        await create(server)
        await server.call("FinishRun", run="small", request_id="f")
        refusal = await self.refused(server, total=9)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")


class TestListEvents:
    async def eventful(self, server: Replica) -> Job:
        """Let one event of every kind happen."""
        feedback = server.feedback(delay=2, timeout="100ms")
        await server.attach(**feedback)
        job = await server.open(key="k", rank=1)
        reporter = await server.open(key="k", rank=0)
        await job.values(0, in_use=1)
        await reporter.report((0, 1.0))
        await reporter.report((1, 1.0), (2, 0.5))
        await job.values(5, blocked=True, wait_ms=30_000)
        await reporter.report((3, math.nan))
        revised = {"run": "small", "spec_document": server.document(total=900, **feedback)}
        await server.call("ReviseRun", **revised, request_id="operator")
        await server.call(
            "AttachRun",
            run="small",
            spec_document=server.document(total=800, **feedback),
            on_change=trainer_pb2.ON_CHANGE_REVISE,
            request_id="trainer",
        )
        await server.open(progress=2)
        await server.call("FinishRun", run="small", force=True, request_id="f")
        return reporter

    async def test_every_kind_says_what_happened(self, server: Replica) -> None:
        await self.eventful(server)
        found = await history(server)
        assert [(event.kind, event.attempt, event.progress, event.summary) for event in found] == [
            ("created", 0, 0, "created by a trainer"),
            ("opened", 1, 0, "attempt 1 opened at progress 0"),
            ("joined", 1, 0, "the reporter joined"),
            ("recorded", 1, 0, "values recorded from progress 0 on, stride 1"),
            ("reported", 1, 0, "reported progress 0, moved to 1"),
            ("reported", 1, 1, "reported 2 steps, progress 1 to 2, moved to 3"),
            ("waived", 1, 5, "missing losses below progress 5 waived"),
            ("recorded", 1, 5, "values recorded from progress 5 on, stride 1"),
            ("reported", 1, 3, "reported progress 3, moved to 4"),
            ("revised", 0, 7, "new spec from progress 7 on"),
            ("revised", 0, 0, "new spec from where the next attempt opens"),
            ("opened", 2, 2, "attempt 2 opened at progress 2"),
            ("finished", 0, 0, "finished"),
        ]
        rows = server.store.read("small")
        assert [(event.seq, event.digest) for event in found] == [
            (row.seq, row.digest) for row in rows
        ]
        for event, row in zip(found, rows, strict=True):
            assert event.recorded_at.ToNanoseconds() == row.recorded_at_ns

    async def test_losses_and_what_they_decided(self, server: Replica) -> None:
        await self.eventful(server)
        found = [event for event in await history(server) if event.kind == "reported"]
        losses = [
            [(item.progress, item.loss, item.weight, item.late) for item in event.losses]
            for event in found
        ]
        assert losses[:2] == [[(0, 1.0, 1.0, False)], [(1, 1.0, 1.0, False), (2, 0.5, 1.0, False)]]
        ((progress, loss, _, late),) = losses[2]
        assert (progress, math.isnan(loss), late) == (3, True, True)
        (adjustment,) = found[1].adjustments
        assert (adjustment.decided_at, adjustment.effective) == (1, 3)
        # The second attempt opened behind its loss.
        assert not adjustment.forgotten
        assert [len(event.adjustments) for event in found] == [0, 1, 0]

    async def test_late_losses_stay_late(self, server: Replica) -> None:
        await self.eventful(server)
        before = await history(server)
        await server.restart()
        assert await history(server) == before

    async def test_a_step_without_a_loss(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, None, 5))
        (loss,) = (await history(server))[-1].losses
        assert (loss.progress, loss.HasField("loss")) == (0, False)

    async def test_a_run_of_people(self, server: Replica) -> None:
        await create(server)
        assert [event.summary for event in await history(server)] == ["created"]

    async def test_a_restored_run(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0), (1, 0.5))
        state = await job.save(2)
        digest = (await get(server)).digest
        await server.call("DeleteRun", run="small", force=True)
        await server.open(state=state)
        first, second = await history(server, page_size=1)
        assert (first.summary, second.progress) == ("created by a trainer", 2)
        assert second.summary == (
            f"attempt 2 opened at progress 2, restored from a state of a lost log (seq 3, digest "
            f"{digest[:12]})"
        )

    @pytest.mark.parametrize("page_size", [1, 2, 5, 12, 13, 1000])
    async def test_pages(self, server: Replica, page_size: int) -> None:
        await self.eventful(server)
        assert await history(server, page_size=page_size) == await history(server)

    async def test_a_page_of_large_events_ends_early(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        for begin in range(0, 4096 * 6, 4096):
            await job.report(*((n, 1 / (n + 1)) for n in range(begin, begin + 4096)))
        page = await server.call("ListEvents", run="small")
        assert 0 < page.ByteSize() <= _run_service.MAX_PAGE_BYTES
        assert page.next_page_token
        found = await history(server)
        assert [event.seq for event in found] == list(range(1, 9))

    @pytest.mark.parametrize("page_size", [-1, 1001])
    async def test_a_page_size_out_of_range(self, server: Replica, page_size: int) -> None:
        await create(server)
        refusal = await server.refused("ListEvents", run="small", page_size=page_size)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == ["page_size"]

    @pytest.mark.parametrize("token", ["x", "-1", "1.5", "٣", "9" * 20, "9" * 10_000, " 1"])
    async def test_a_token_that_no_answer_held(self, server: Replica, token: str) -> None:
        await create(server)
        refusal = await server.refused("ListEvents", run="small", page_token=token)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == ["page_token"]

    async def test_a_token_behind_the_end(self, server: Replica) -> None:
        await create(server)
        page = await server.call("ListEvents", run="small", page_token="9" * 19)
        assert (list(page.events), page.next_page_token) == ([], "")


class TestEndingARun:
    @pytest.mark.parametrize("method", LIVE)
    async def test_a_run_that_never_started(self, server: Replica, method: str) -> None:
        await create(server)
        await server.call(method, run="small", **LIVE[method])

    @pytest.mark.parametrize("method", LIVE)
    async def test_a_live_run_wants_force(self, server: Replica, method: str) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0, 400))
        refusal = await server.refused(method, run="small", **LIVE[method])
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunLive")
        assert refusal.facts == {"run": "small", "attempt": "1", "frontier": "400"}
        assert refusal.text.endswith(f"{method[:6].lower()} it with --force")
        assert "at progress 400 of 1000" in refusal.text
        await server.call(method, run="small", force=True, **LIVE[method])

    @pytest.mark.parametrize("method", LIVE)
    async def test_a_restart_makes_it_no_less_live(self, server: Replica, method: str) -> None:
        await server.start_job()
        await server.restart()
        refusal = await server.refused(method, run="small", **LIVE[method])
        assert refusal.reason == "RunLive"

    @pytest.mark.parametrize("method", LIVE)
    async def test_a_rank_that_waits_is_live(
        self, server: Replica, until: Until, method: str
    ) -> None:
        job = await server.start_job(**server.feedback())
        await server.restart()
        task = asyncio.create_task(job.values(2, blocked=True, wait_ms=30_000))
        await until(lambda: server.ledger.live() and server.live().ranks_waiting)
        # The log has been silent for long, but the rank asked just now.
        server.live().updated_ns -= int(1e9 * 2 * _run_service.LIVE_S)
        refusal = await server.refused(method, run="small", **LIVE[method])
        assert refusal.reason == "RunLive"
        await job.report((0, 1.0))
        await task

    @pytest.mark.parametrize("method", LIVE)
    async def test_ranks_that_are_silent_for_long(
        self, server: Replica, monkeypatch: pytest.MonkeyPatch, method: str
    ) -> None:
        await server.start_job(**server.feedback())
        monkeypatch.setattr(_run_service, "LIVE_S", 0.0)
        await server.call(method, run="small", **LIVE[method])

    @pytest.mark.parametrize("method", LIVE)
    async def test_a_run_that_reached_its_end(self, server: Replica, method: str) -> None:
        job = await server.start_job(total=10, **server.feedback())
        await job.report((0, 1.0, 10))
        await server.call(method, run="small", **LIVE[method])

    async def test_a_finished_run_is_read_only(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        answer = await server.call("FinishRun", run="small", force=True, request_id="f")
        assert answer.run.state == pb.RUN_STATE_FINISHED
        assert (await get(server)).state == pb.RUN_STATE_FINISHED
        refusal = await job.refused_values(0)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")

    async def test_finishing_again_is_harmless(self, server: Replica) -> None:
        await create(server)
        for request_id in ("f", "f", "g"):
            await server.call("FinishRun", run="small", request_id=request_id)
        assert [event.kind for event in await history(server)] == ["created", "finished"]

    async def test_a_finished_run_is_not_live(self, server: Replica) -> None:
        await server.start_job()
        await server.call("FinishRun", run="small", force=True, request_id="f")
        await server.call("DeleteRun", run="small")
        assert server.logs() == {}

    async def test_a_deleted_run_is_gone_and_its_name_is_free(self, server: Replica) -> None:
        first = await create(server)
        await server.call("DeleteRun", run="small")
        refusal = await server.refused("GetRun", run="small")
        assert refusal.reason == "RunNotFound"
        second = await server.call(
            "CreateRun", spec_document=server.document(total=5), request_id="new"
        )
        assert (second.run.total, second.run.seq) == (5, 1)
        assert second.run.digest != first.digest
        assert second.run.created_at.ToNanoseconds() > first.created_at.ToNanoseconds()

    async def test_ranks_of_a_deleted_run_are_refused_by_its_successor(
        self, server: Replica
    ) -> None:
        job = await server.start_job(**server.feedback())
        await job.values(0)
        await server.call("DeleteRun", run="small", force=True)
        refusal = await job.refused_values(0)
        assert refusal.reason == "RunNotFound"
        await server.start_job(**server.feedback())
        for refusal in (
            await job.refused_values(0),
            await job.refused_report((0, 1.0)),
            await server.refused("SaveState", **job.identity, progress=0),
        ):
            assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AttemptSuperseded")

    async def test_deleting_twice(self, server: Replica) -> None:
        await create(server)
        answers = await asyncio.gather(
            *(server.call("DeleteRun", run="small") for _ in range(5)), return_exceptions=True
        )
        assert sum(not isinstance(answer, BaseException) for answer in answers) >= 1
        assert server.logs() == {}


async def test_what_is_shown_is_the_fold_of_the_log(server: Replica) -> None:
    job = await server.start_job(**server.feedback(delay=3))
    await job.report((0, 1.0), (1, 1.0), (2, math.inf), (3, 1.0))
    run = await get(server)
    state = core.fold("small", (row.payload for row in server.store.read("small")))
    assert (run.seq, run.digest, run.horizon) == (state.seq, state.digest, state.horizon)
    assert run.values[0].learning_rate == state.values(state.progress)[0][0]
