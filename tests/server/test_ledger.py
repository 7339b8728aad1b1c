"""Several replicas over one store, and what the store does to them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot import core
from lrpilot.server import _ledger, _live_run
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._history import History
from lrpilot.server._ledger import Ledger
from lrpilot.server._live_run import CorruptLog, LiveRun
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._store import Append, AppendResult, LogRow, StoreUnavailable
from lrpilot.server._trainer_service import TrainerService
from lrpilot.v1 import trainer_pb2

if TYPE_CHECKING:
    from tests.server.conftest import Job, Replica

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""


class FaultyStore(MemoryStore):
    """A store whose appends wait at a gate, and which fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()
        """Set when an append has come to the gate."""
        self.reads = 0
        self.fail_before = 0
        """How many of the next appends fail without being carried out."""
        self.fail_after = 0
        """How many of the next appends are carried out and fail all the same."""
        self.fail_reads = False

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        self.arrived.set()
        assert self.gate.wait(60)
        if self.fail_before:
            self.fail_before -= 1
            raise StoreUnavailable("no space left on device")
        results = super().append(batch)
        if self.fail_after:
            self.fail_after -= 1
            raise StoreUnavailable("the answer was lost")
        return results

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        self.reads += 1
        if self.fail_reads:
            raise StoreUnavailable("input/output error")
        return super().read(run, after_seq, limit)


@pytest.fixture
def store() -> FaultyStore:
    """The store that the servers of a test share."""
    return FaultyStore()


Replicas = Callable[[], Awaitable["Replica"]]


@pytest.fixture
async def replicas(server: Replica, store: FaultyStore) -> AsyncIterator[Replicas]:
    """Start replicas over the store."""
    started: list[Replica] = []

    async def start() -> Replica:
        replica = type(server)(store)
        await replica.start()
        started.append(replica)
        return replica

    yield start
    for replica in started:
        await replica.stop()


def through(job: Job, replica: Replica) -> Job:
    """Return the same rank as it calls another replica."""
    return type(job)(replica, job.run, job.opened, job.rank, job.incarnation)


def kinds(store: MemoryStore) -> list[str]:
    return [core.decode(row.payload).kind for row in store.read("small")]


def verify(store: MemoryStore) -> None:
    """Check that the log is one chain."""
    state = core.RunState("small")
    for row in store.read("small"):
        state.apply(core.decode(row.payload), row.payload)
        assert (state.seq, state.digest) == (row.seq, row.digest)


class TestTwoReplicas:
    async def test_one_that_lags_gives_what_is_recorded(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        other = through(job, b)
        assert await other.rates(0) == await job.rates(0) == [LR, LR]
        await job.report((0, 2.0), (1, 2.0))
        assert await job.rates(2) == [LR, LR / 2]
        # B knows an older horizon: it gives fewer values, never others.
        assert (await b.call("GetRun", run="small")).run.horizon == 2
        assert await other.rates(0) == [LR, LR]
        assert not (await other.values(2)).HasField("block")
        verify(store)

    async def test_a_taken_seq_has_the_whole_request_evaluated_again(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=4))
        other = through(job, b)
        assert await other.rates(0, count=1) == [LR]
        await job.report((0, 2.0), (1, 2.0), (2, 1.0))
        # B would record [1, 4) as it knows it; the log says more by now, and B gives it.
        assert await other.rates(1) == [LR] * 4 + [LR / 2, LR / 2]
        assert await job.rates(1) == await other.rates(1)
        assert kinds(store) == ["created", "opened", "recorded", "reported", "recorded"]
        verify(store)

    async def test_the_effective_progress_is_that_of_the_second_evaluation(
        self, replicas: Replicas
    ) -> None:
        a, b = await replicas(), await replicas()
        feedback = a.feedback(delay=2)
        job = await a.start_job(**feedback)
        await b.call("GetRun", run="small")
        await job.report((0, 1.0), (1, 0.9), (2, 0.8))
        answer = await b.call(
            "ReviseRun",
            run="small",
            spec_document=b.document(learning_rate={"peak": 7e-3}, **feedback),
            request_id="r",
        )
        assert answer.effective == 5
        assert await through(job, b).rates(4) == [LR]
        await job.report((3, 0.7))
        assert await job.rates(5) == [7e-3]

    async def test_reports_to_both_give_one_log(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=3))
        jobs = [job, through(job, b)]
        for n in range(20):
            await jobs[n % 2].report((n, 1.0))
        again = await asyncio.gather(
            *(jobs[n % 2].report((n, 1.0)) for n in range(20)),
        )
        assert {tuple(answer.outcomes) for answer in again} == {(2,)}
        state = core.fold("small", (row.payload for row in store.read("small")))
        assert (state.frontier, state.losses) == (20, 20)
        verify(store)

    async def test_both_at_once_record_one_value(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=4))
        jobs = [job, through(job, b)]
        for begin in range(0, 40, 4):
            got = await asyncio.gather(*(jobs[n % 2].rates(begin) for n in range(20)))
            # One that lags may have none of them yet.
            assert len({tuple(rates) for rates in got if rates}) == 1
            await jobs[begin // 4 % 2].report(*((n, 1.0) for n in range(begin, begin + 4)))
        verify(store)

    async def test_both_create_at_once(self, replicas: Replicas, store: FaultyStore) -> None:
        a, b = await replicas(), await replicas()
        answers = await asyncio.gather(*(replica.attach() for replica in (a, b, a, b)))
        assert sum(answer.created for answer in answers) == 1
        assert kinds(store) == ["created"]

    async def test_an_attempt_that_the_other_opened(self, replicas: Replicas) -> None:
        a, b = await replicas(), await replicas()
        old = await a.start_job(**a.feedback(delay=2))
        assert await through(old, b).rates(0) == [LR, LR]
        job = await a.open()
        # B has not heard of it, and must look before it refuses.
        assert await through(job, b).rates(0) == [LR, LR]
        refusal = await through(old, b).refused_values(0)
        assert refusal.reason == "AttemptSuperseded"

    async def test_a_horizon_that_the_other_moved_far(self, replicas: Replicas) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        await through(job, b).rates(0)
        await job.report(*((n, 1 / (n + 1)) for n in range(500)))
        assert await through(job, b).rates(500) == [LR, LR]

    async def test_a_waiver_looks_at_the_log_first(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a, b = await replicas(), await replicas()
        job = await a.start_job(**a.feedback(delay=2, timeout="200ms"))
        other = through(job, b)
        await other.rates(0)
        await job.report((0, 2.0), (1, 2.0))
        # Nobody reports to B, but somebody does.
        assert await other.rates(2, blocked=True, wait_ms=30_000) == [LR, LR / 2]
        assert "waived" not in kinds(store)


class TestDeletedElsewhere:
    async def deleted(self, a: Replica, b: Replica) -> Job:
        """Let B know a run, and A delete it."""
        job = await a.start_job(**a.feedback(delay=2))
        await job.report((0, 1.0))
        await through(job, b).rates(0)
        await a.call("GetRun", run="small")
        await a.call("DeleteRun", run="small", force=True)
        return job

    async def test_nothing_is_added_to_it(self, replicas: Replicas, store: FaultyStore) -> None:
        a, b = await replicas(), await replicas()
        job = await self.deleted(a, b)
        refusal = await through(job, b).refused_report((1, 1.0))
        assert refusal.reason in {"AttemptSuperseded", "RunNotFound"}
        assert store.runs() == []
        refusal = await through(job, b).refused_values(0)
        assert refusal.reason == "RunNotFound"

    @pytest.mark.parametrize("losses", [0, 1, 2, 3, 9])
    async def test_made_again_by_the_other(
        self, replicas: Replicas, store: FaultyStore, losses: int
    ) -> None:
        a, b = await replicas(), await replicas()
        old = await self.deleted(a, b)
        job = await a.start_job(learning_rate={"peak": 5.0}, **a.feedback(delay=2))
        for n in range(losses):
            await job.report((n, 1.0 / (n + 1)))
        # B holds another log of that name; whatever it is asked, it must not mix the two.
        refusal = await through(old, b).refused_report((1, 1.0))
        assert refusal.reason == "AttemptSuperseded"
        verify(store)
        assert await through(job, b).rates(losses) == [5.0, 5.0]
        refusal = await through(old, b).refused_values(0)
        assert refusal.reason == "AttemptSuperseded"
        shown = (await b.call("GetRun", run="small")).run
        assert (shown.seq, shown.digest) == store.head("small")
        assert shown.created_at.ToNanoseconds() == store.read("small")[0].recorded_at_ns
        verify(store)

    async def test_known_again_after_it_was_gone(self, replicas: Replicas) -> None:
        a, b = await replicas(), await replicas()
        old = await self.deleted(a, b)
        await through(old, b).refused_report((1, 1.0))
        await a.start_job()
        assert (await b.call("GetRun", run="small")).run.attempt == 1


class TestStoreFailures:
    async def test_nothing_is_applied_and_a_retry_works(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a = await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        calls = {
            "GetValues": job.values_fields(0),
            "ReportLosses": job.report_fields((0, 1.0)),
            "FinishRun": {"run": "small", "force": True, "request_id": "f"},
        }
        for method, fields in calls.items():
            before = (await job.shown()).SerializeToString(deterministic=True)
            store.fail_before = 1
            refusal = await a.refused(method, **fields)
            assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "StoreUnavailable")
            assert "no space left on device" in refusal.text
            assert (await job.shown()).SerializeToString(deterministic=True) == before
            await a.call(method, **fields)
        assert kinds(store) == ["created", "opened", "recorded", "reported", "finished"]
        verify(store)

    @pytest.mark.parametrize("method", ["CreateRun", "AttachRun"])
    async def test_a_run_that_could_not_be_made(self, replicas: Replicas, method: str) -> None:
        a = await replicas()
        a.store.fail_before = 1  # type: ignore[attr-defined]
        fields = {"spec_document": a.document(), "request_id": "c"}
        if method == "AttachRun":
            fields["run"] = "small"
        assert (await a.refused(method, **fields)).code == "UNAVAILABLE"
        assert (await a.refused("GetRun", run="small")).reason == "RunNotFound"
        await a.call(method, **fields)
        assert (await a.call("GetRun", run="small")).run.seq == 1

    async def test_what_was_written_although_it_failed(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a = await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        store.fail_after = 1
        refused = await a.call_refused("ReportLosses", **job.report_fields((0, 1.0)))
        assert refused.code == "UNAVAILABLE"
        # The retry meets its own row.
        answer = await job.report((0, 1.0))
        assert (list(answer.outcomes), answer.frontier) == ([2], 1)
        assert kinds(store) == ["created", "opened", "reported"]
        store.fail_after = 1
        refused = await a.call_refused("GetValues", **job.values_fields(0))
        assert await job.rates(0) == [LR] * 3
        assert kinds(store) == ["created", "opened", "reported", "recorded"]

    async def test_an_attempt_whose_answer_was_lost(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a = await replicas()
        await a.attach()
        store.fail_after = 1
        fields = {"run": "small", "request_id": "o", "incarnation": "p"}
        assert (await a.call_refused("OpenAttempt", **fields)).code == "UNAVAILABLE"
        answer = await a.call("OpenAttempt", **fields)
        assert (answer.attempt.number, answer.joined) == (1, False)
        (event,) = [
            event
            for row in store.read("small")
            if isinstance(event := core.decode(row.payload), core.Opened)
        ]
        assert answer.attempt.token.hex() == event.token

    async def test_a_store_that_cannot_be_read(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a = await replicas()
        job = await a.start_job()
        await a.restart()
        store.fail_reads = True
        refusal = await a.call_refused("GetValues", **job.values_fields(0))
        assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "StoreUnavailable")
        store.fail_reads = False
        assert await job.rates(0)


class TestCancelledCallers:
    async def test_what_was_begun_is_carried_out_and_known(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a = await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        store.gate.clear()
        store.arrived.clear()
        task = asyncio.create_task(job.report((0, 1.0)))
        assert await asyncio.to_thread(store.arrived.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.gate.set()
        # Its row is in the log, and the state here goes on from it.
        answer = await job.report((0, 1.0), (1, 0.5))
        assert (list(answer.outcomes), answer.frontier) == ([2, 1], 2)
        assert kinds(store) == ["created", "opened", "reported", "reported"]
        verify(store)

    async def test_what_is_durable_is_known_without_reading(self, store: FaultyStore) -> None:
        async with opened_ledger(store) as ledger:
            run = await create(ledger, "a")
            store.gate.clear()
            store.arrived.clear()
            finishing = asyncio.create_task(
                ledger.transact(run, lambda state: (core.finish_run(state, "f"), None))
            )
            assert await asyncio.to_thread(store.arrived.wait, 60)
            finishing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await finishing
            assert not run.state.finished
            reads = store.reads
            store.gate.set()
            await ledger.settle()
            assert run.state.finished
            assert store.reads == reads

    async def test_a_drain_waits_for_what_was_begun(
        self, replicas: Replicas, store: FaultyStore
    ) -> None:
        a = await replicas()
        job = await a.start_job(**a.feedback(delay=2))
        store.gate.clear()
        store.arrived.clear()
        reporting = asyncio.create_task(job.report((0, 1.0)))
        assert await asyncio.to_thread(store.arrived.wait, 60)
        draining = asyncio.create_task(a.server.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        store.gate.set()
        assert (await reporting).frontier == 1
        await draining
        assert kinds(store) == ["created", "opened", "reported"]


class TestCorruptLogs:
    async def trained(self, a: Replica) -> Job:
        job = await a.start_job(**a.feedback(delay=2))
        await job.rates(0)
        for n in range(4):
            await job.report((n, 1.0))
        return job

    @pytest.mark.parametrize("what", ["digest", "payload", "unknown event", "no event"])
    @pytest.mark.parametrize("index", [0, 3, 6])
    async def test_nobody_is_answered_from_one(
        self, replicas: Replicas, store: FaultyStore, what: str, index: int
    ) -> None:
        a = await replicas()
        job = await self.trained(a)
        good = store.read("small")
        row = good[index]
        bad = {
            "digest": LogRow(row.seq, row.payload, "0" * 64, row.recorded_at_ns),
            "payload": LogRow(row.seq, row.payload + b" ", row.digest, row.recorded_at_ns),
            "unknown event": LogRow(row.seq, b'{"kind":"new"}', row.digest, row.recorded_at_ns),
            "no event": LogRow(row.seq, b"\x00", row.digest, row.recorded_at_ns),
        }[what]
        await a.restart()
        store._logs["small"] = [*good[:index], bad, *good[index + 1 :]]
        for _ in range(2):
            for method, fields in (
                ("GetValues", job.values_fields(0)),
                ("ReportLosses", job.report_fields((4, 1.0))),
                ("GetRun", {"run": "small"}),
                ("CreateRun", {"spec_document": a.document(), "request_id": "c"}),
            ):
                refusal = await a.refused(method, **fields)
                assert (refusal.code, refusal.reason) == ("INTERNAL", "")
                assert refusal.text == "internal error; the server's log has more"
        # Once it is mended, it goes on without a restart.
        store._logs["small"] = good
        assert (await job.report((4, 1.0))).frontier == 5
        verify(store)

    async def test_other_runs_go_on(self, replicas: Replicas, store: FaultyStore) -> None:
        a = await replicas()
        await self.trained(a)
        await a.attach("other")
        await a.restart()
        (*rest, last) = store.read("small")
        store._logs["small"] = [*rest, LogRow(last.seq, last.payload, "0" * 64, 0)]
        assert (await a.refused("GetRun", run="small")).code == "INTERNAL"
        assert (await a.call("GetRun", run="other")).run.seq == 1

    async def test_the_error_says_where(self, store: FaultyStore) -> None:
        run = LiveRun("small")
        (seq, data, _), *_ = core.rows(run.state, core.create_run(run.state, spec(), "c"))
        with pytest.raises(CorruptLog, match=r"event 1 of run 'small'.*digest beef"):
            run.advance([LogRow(seq, data, "beef", 0)])
        assert not run.state.exists


def spec() -> core.RunSpec:
    return core.parse_spec({"name": "small", "total": 10, "learning_rate": {"peak": 1}})


@asynccontextmanager
async def opened_ledger(store: MemoryStore) -> AsyncIterator[Ledger]:
    committer = GroupCommitter(store)
    try:
        yield Ledger(store, committer)
    finally:
        await committer.close()


async def create(ledger: Ledger, name: str) -> LiveRun:
    run = await ledger.find(name)
    await ledger.transact(run, lambda state: (core.create_run(state, spec(), name), None))
    return run


class PromptCommitter(GroupCommitter):
    """A writer that is done at once: a request is applied before the one before it is answered."""

    async def append(
        self, run: str, rows: Sequence[LogRow], create: bool = False, after: str | None = None
    ) -> int:
        for conflict in self._store.append([Append(run, tuple(rows), create, after)]):
            if conflict is not None:
                raise conflict
        return 1


class TestAnswers:
    """Each is of the state that its own request left, whatever came on its heels."""

    @pytest.fixture
    async def ledger(self) -> AsyncIterator[Ledger]:
        store = MemoryStore()
        committer = PromptCommitter(store)
        yield Ledger(store, committer)
        await committer.close()

    def opening(self, name: str) -> trainer_pb2.OpenAttemptRequest:
        return trainer_pb2.OpenAttemptRequest(run="small", request_id=name, incarnation=name)

    async def test_two_jobs_that_open_at_once_are_in_two_attempts(self, ledger: Ledger) -> None:
        await create(ledger, "small")
        service = TrainerService(ledger)
        first, second = await asyncio.gather(
            service.open_attempt(self.opening("a")), service.open_attempt(self.opening("b"))
        )
        assert [one.attempt.number for one in (first, second)] == [1, 2]
        assert first.attempt.token != second.attempt.token
        assert (first.joined, second.joined) == (False, False)
        # What comes again is answered from the log, as far as that attempt is still the one.
        assert await service.open_attempt(self.opening("b")) == second
        with pytest.raises(core.AttemptSuperseded):
            await service.open_attempt(self.opening("a"))

    async def test_reports_at_once(self, ledger: Ledger) -> None:
        await create(ledger, "small")
        service = TrainerService(ledger)
        opened = await service.open_attempt(self.opening("a"))
        answers = await asyncio.gather(
            *(
                service.report_losses(
                    trainer_pb2.ReportLossesRequest(
                        run="small",
                        attempt=opened.attempt,
                        incarnation="a",
                        reports=[trainer_pb2.LossReport(progress=at, loss=1.0, moves_to=at + 1)],
                    )
                )
                for at in range(3)
            )
        )
        assert [answer.frontier for answer in answers] == [1, 2, 3]


class TestFinding:
    async def test_a_run_is_read_once_however_many_ask(self, store: FaultyStore) -> None:
        async with opened_ledger(store) as ledger:
            await create(ledger, "a")
        async with opened_ledger(store) as ledger:
            before = store.reads
            found = await asyncio.gather(*(ledger.run("a") for _ in range(50)))
            assert store.reads == before + 1
            assert len({id(run) for run in found}) == 1
            assert all(run.state.exists for run in found)

    async def test_all_of_many_learn_that_there_is_none(self, store: FaultyStore) -> None:
        async with opened_ledger(store) as ledger:
            await create(ledger, "abc")
            found = await asyncio.gather(
                *(ledger.run("abd") for _ in range(20)), return_exceptions=True
            )
            assert all(isinstance(error, core.RunNotFound) for error in found)
            assert "abd" not in ledger._runs

    async def test_a_reader_who_leaves_takes_nobody_along(self, store: FaultyStore) -> None:
        async with opened_ledger(store) as ledger:
            await create(ledger, "a")
        async with opened_ledger(store) as ledger:
            first = asyncio.create_task(ledger.run("a"))
            second = asyncio.create_task(ledger.run("a"))
            await asyncio.sleep(0)
            first.cancel()
            run = await second
            assert await ledger.run("a") is run

    async def test_a_long_log_is_read_to_its_end_whoever_gives_up(
        self, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Calls have deadlines; were the reading theirs, a long log would never be read."""
        async with opened_ledger(store) as ledger:
            await create(ledger, "a")
        load, gate, begun = History.load, threading.Event(), threading.Event()
        folds = []

        def slow(history: History, name: str) -> LiveRun | None:
            folds.append(name)
            begun.set()
            assert gate.wait(60)
            return load(history, name)

        monkeypatch.setattr(History, "load", slow)
        async with opened_ledger(store) as ledger:
            for _ in range(3):
                caller = asyncio.create_task(ledger.run("a"))
                assert await asyncio.to_thread(begun.wait, 60)
                caller.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await caller
            gate.set()
            assert (await ledger.run("a")).state.exists
            assert folds == ["a"]

    async def test_a_start_reads_the_runs_that_ranks_may_wait_for(
        self, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock: Any = SimpleNamespace(now_ns=10**18, time_ns=lambda: clock.now_ns)
        monkeypatch.setattr(_ledger, "time", clock)
        clock.monotonic = lambda: 0.0
        async with opened_ledger(store) as ledger:
            await create(ledger, "long ago")
            clock.now_ns += _ledger.WARM_NS + 1
            for name in ("broken", "over", "running"):
                await create(ledger, name)
            over = await ledger.run("over")
            await ledger.transact(over, lambda state: (core.finish_run(state, "f"), None))
        (row,) = store.read("broken")
        store.delete("broken")
        damaged = LogRow(1, row.payload, "0" * 64, row.recorded_at_ns)
        store.append([Append("broken", (damaged,), create=True)])
        async with opened_ledger(store) as ledger:
            await ledger.warm_up()
            assert [name for name, run in ledger._runs.items() if run.state.exists] == ["running"]
            # It has no ranks yet.
            assert ledger.live() == []

    async def test_names_come_in_order(self, store: FaultyStore) -> None:
        async with opened_ledger(store) as ledger:
            for name in ("b", "a", "c"):
                await create(ledger, name)
            assert await ledger.names() == ["a", "b", "c"]
            assert await ledger.names("a", 1) == ["b"]

    async def test_the_digest_at_a_seq(self, store: FaultyStore) -> None:
        async with opened_ledger(store) as ledger:
            run = await create(ledger, "a")
            assert await ledger.digest_at("a", 1) == run.state.digest
            assert await ledger.digest_at("a", 2) is None
            assert await ledger.digest_at("b", 1) is None


class TestLiveRuns:
    async def test_only_those_whose_ranks_ask(
        self, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock: Any = SimpleNamespace(now_s=1000.0, monotonic=lambda: clock.now_s, time_ns=lambda: 1)
        monkeypatch.setattr(_ledger, "time", clock)
        async with opened_ledger(store) as ledger:
            runs = [await create(ledger, name) for name in ("a", "b", "c")]
            assert ledger.live() == []
            runs[0].seen_s = runs[1].seen_s = clock.now_s
            assert ledger.live() == runs[:2]
            await ledger.transact(runs[1], lambda state: (core.finish_run(state, "f"), None))
            assert ledger.live() == runs[:1]
            clock.now_s += _ledger.ABANDONED_S
            assert ledger.live() == []


class TestBlockedTime:
    """What counts towards a waiver, on a clock that a test moves."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        clock: Any = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s)
        monkeypatch.setattr(_live_run, "time", clock)
        return clock

    def advance(self, run: LiveRun, *events: core.Event) -> None:
        run.advance(
            [LogRow(seq, data, digest, 1) for seq, data, digest in core.rows(run.state, events)]
        )

    @pytest.fixture
    def run(self, clock: Any) -> LiveRun:
        run = LiveRun("small")
        acting = core.parse_spec(
            {
                "name": "small",
                "total": 1000,
                "learning_rate": {"peak": 1},
                "policies": [{"kind": "plateau"}],
                "feedback": {"delay": 2},
            }
        )
        self.advance(run, *core.create_run(run.state, acting, "c"))
        wanted = core.OpenRequest(request_id="o", incarnation="p", token="t")
        self.advance(run, *core.open_attempt(run.state, wanted))
        return run

    def report(self, run: LiveRun, progress: int, moves_to: int) -> None:
        report = core.Report(progress, 1.0, 1.0, moves_to)
        events, _ = core.report_losses(run.state, [report], rank=0, incarnation="p")
        self.advance(run, *events)

    async def test_only_time_in_which_a_thread_is_blocked(self, run: LiveRun, clock: Any) -> None:
        clock.now_s += 1000
        assert run.blocked_s() == 0
        async with run.blocked():
            clock.now_s += 3
            assert run.blocked_s() == 3
        clock.now_s += 1000
        assert run.blocked_s() == 3
        async with run.blocked():
            clock.now_s += 4
        assert run.blocked_s() == 7

    async def test_two_threads_are_blocked_once(self, run: LiveRun, clock: Any) -> None:
        async with run.blocked():
            clock.now_s += 1
            async with run.blocked():
                assert run.ranks_waiting == 2
                clock.now_s += 1
            clock.now_s += 1
        assert (run.blocked_s(), run.ranks_waiting) == (3, 0)

    async def test_a_horizon_that_moves_starts_it_afresh(self, run: LiveRun, clock: Any) -> None:
        async with run.blocked():
            clock.now_s += 5
            self.report(run, 0, 1)
            assert run.blocked_s() == 0
            clock.now_s += 2
        assert run.blocked_s() == 2
        self.report(run, 1, 2)
        assert run.blocked_s() == 0

    async def test_what_moves_no_horizon_leaves_it(self, run: LiveRun, clock: Any) -> None:
        self.report(run, 0, 5)
        async with run.blocked():
            clock.now_s += 5
            # Late: it says nothing about when the next one comes.
            self.report(run, 3, 4)
            wanted = core.ValuesRequest(begin=5, in_use=5)
            recorded = core.get_values(run.state, wanted)
            assert isinstance(recorded, core.Recorded)
            self.advance(run, recorded)
            assert run.blocked_s() == 5

    async def test_a_new_attempt_starts_it_afresh(self, run: LiveRun, clock: Any) -> None:
        async with run.blocked():
            clock.now_s += 5
            wanted = core.OpenRequest(request_id="n", progress=0, incarnation="q", token="u")
            self.advance(run, *core.open_attempt(run.state, wanted))
            assert run.blocked_s() == 0
