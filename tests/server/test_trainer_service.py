"""What ranks are answered, over a real gRPC connection: every method, every refusal."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from lrpilot import core
from lrpilot.server._trainer_service import MAX_REPORTS
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.server.conftest import Job, Replica, Until

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""

WAIT_MS = 30_000
"""The longest wait; no test comes near it, since something always happens first."""

NAN, INF = math.nan, math.inf
RECORDED = pb.REPORT_OUTCOME_RECORDED
REPEATED = pb.REPORT_OUTCOME_REPEATED
LATE = pb.REPORT_OUTCOME_LATE


def bits(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def kinds(server: Replica, name: str = "small") -> list[str]:
    return [core.decode(row.payload).kind for row in server.store.read(name)]


def events(server: Replica, kind: str, name: str = "small") -> list[Any]:
    decoded = (core.decode(row.payload) for row in server.store.read(name))
    return [event for event in decoded if event.kind == kind]


async def waiting(server: Replica, until: Until, count: int = 1) -> None:
    """Wait until so many requests of blocked ranks wait in the server."""
    await until(lambda: sum(run.ranks_waiting for run in server.ledger.live()) == count)


class TestAttachRun:
    async def test_a_spec_makes_a_run_once(self, server: Replica) -> None:
        first = await server.attach()
        assert (first.run, first.created, first.revised, first.has_losses) == (
            "small", True, False, False,
        )  # fmt: skip
        again = await server.attach()
        assert (again.created, again.revised) == (False, False)
        without = await server.call("AttachRun", run="small", request_id="bare")
        assert (without.run, without.created) == ("small", False)
        assert kinds(server) == ["created"]

    async def test_a_repeat_gets_the_first_answer(self, server: Replica) -> None:
        fields = {"run": "small", "spec_document": server.document(), "request_id": "same"}
        answers = [await server.call("AttachRun", **fields) for _ in range(3)]
        assert all(answer == answers[0] for answer in answers)
        assert answers[0].created
        assert kinds(server) == ["created"]

    async def test_json_is_yaml(self, server: Replica) -> None:
        spec = {"name": "small", "total": 10, "learning_rate": {"peak": 1}}
        answer = await server.call(
            "AttachRun", run="small", spec_document=json.dumps(spec), request_id="a"
        )
        assert answer.created

    async def test_losses_are_told(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0))
        assert (await server.attach(**server.feedback())).has_losses

    async def test_every_mistake_of_a_spec_is_a_violation(self, server: Replica) -> None:
        text = server.document(
            total=-1,
            unit="epochs",
            learning_rate={"peak": "high", "decay": {"style": "cosin"}},
            policies=[{"kind": "plateau", "patience": -2, "factr": 0.5}],
        )
        refusal = await server.refused("AttachRun", run="small", spec_document=text, request_id="a")
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        assert set(refusal.fields) == {
            "total",
            "unit",
            "learning_rate.peak",
            "learning_rate.decay.style",
            "policies.0.patience",
            "policies.0.factr",
        }
        assert refusal.fields["unit"] == (
            "got 'epochs'; allowed: one of iterations, samples, tokens"
        )
        for path, description in refusal.fields.items():
            assert f"{path}: {description}" in refusal.text
        assert server.logs() == {}

    @pytest.mark.parametrize("sign", ["x", "層", "%", "\x07", "🧨"])
    async def test_more_mistakes_than_fit_still_arrive(self, server: Replica, sign: str) -> None:
        count = 500
        text = json.dumps(
            {
                "name": "small",
                "total": 10,
                "learning_rate": {"peak": 1},
                **{f"{sign * 20}{n}": 1 for n in range(count)},
            },
            ensure_ascii=False,
        )
        refusal = await server.refused("AttachRun", run="small", spec_document=text, request_id="a")
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        more = refusal.fields.pop("")
        assert more == f"and {count - len(refusal.fields)} more"
        assert len(refusal.fields) >= 2
        assert refusal.text.endswith(" …")

    async def test_a_document_that_is_no_yaml(self, server: Replica) -> None:
        refusal = await server.refused(
            "AttachRun", run="small", spec_document="name: [", request_id="a"
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        (place,) = refusal.fields
        assert place.startswith("line ")

    async def test_the_spec_of_another_run(self, server: Replica) -> None:
        refusal = await server.refused(
            "AttachRun", run="small", spec_document=server.document("other"), request_id="a"
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        assert refusal.fields == {"name": "got 'other'; allowed: the run's name, 'small'"}

    @pytest.mark.parametrize("field", ["run", "request_id"])
    async def test_what_every_call_must_say(self, server: Replica, field: str) -> None:
        fields = {"run": "small", "spec_document": server.document(), "request_id": "a"}
        refusal = await server.refused("AttachRun", **fields | {field: ""})
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert refusal.fields == {field: "got nothing; allowed: a non-empty string"}

    async def test_an_unknown_run_names_the_near_ones(self, server: Replica) -> None:
        for name in ("llama3-8b", "llama3-70b", "other"):
            await server.attach(name)
        refusal = await server.refused("AttachRun", run="lama3-8b", request_id="a")
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")
        assert refusal.facts["run"] == "lama3-8b"
        assert refusal.facts["near"].split(", ") == ["llama3-8b", "llama3-70b"]
        assert "did you mean llama3-8b, llama3-70b?" in refusal.text

    @pytest.mark.parametrize("name", ["層" * 100_000, "a" * 500_000, "%\n" * 1000])
    async def test_an_absurd_name_is_only_unknown(self, server: Replica, name: str) -> None:
        refusal = await server.refused("AttachRun", run=name, request_id="a")
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")

    async def test_a_changed_spec_is_refused_with_its_difference(self, server: Replica) -> None:
        await server.attach()
        changed = server.document(total=2000, learning_rate={"peak": 2e-3})
        refusal = await server.refused(
            "AttachRun", run="small", spec_document=changed, request_id="a"
        )
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "SpecChanged")
        assert set(refusal.facts["fields"].split(", ")) == {
            "total",
            "learning_rate.peak",
            "learning_rate.decay.end",
        }
        assert "learning_rate.peak: 0.001 -> 0.002" in refusal.text
        assert 'on_change="revise"' in refusal.text

    async def test_an_operators_revision_is_no_change_of_the_trainers_spec(
        self, server: Replica
    ) -> None:
        await server.attach()
        await server.call(
            "ReviseRun",
            run="small",
            spec_document=server.document(learning_rate={"peak": 2e-3}),
            request_id="operator",
        )
        assert not (await server.attach()).revised

    async def test_a_trainers_revision_holds_from_the_next_attempt(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        assert await job.rates(0) == [LR, LR]
        changed = server.document(learning_rate={"peak": 4e-3}, **server.feedback(delay=3))
        fields = {
            "run": "small",
            "spec_document": changed,
            "on_change": pb.ON_CHANGE_REVISE,
            "request_id": "change",
        }
        answers = [await server.call("AttachRun", **fields) for _ in range(2)]
        assert [answer.revised for answer in answers] == [True, True]
        assert kinds(server).count("revised") == 1

        await job.report((0, 1.0))
        assert await job.rates(2) == [LR]
        assert (await job.shown()).delay == 2

        later = await server.open(progress=1)
        assert later.opened.delay == 3
        # Nothing that was recorded for the old spec is inherited.
        assert await later.rates(1) == [4e-3] * 3

    async def test_a_finished_run_is_not_revised(self, server: Replica) -> None:
        await server.attach()
        await server.call("FinishRun", run="small", request_id="f")
        refusal = await server.refused(
            "AttachRun",
            run="small",
            spec_document=server.document(total=9),
            on_change=pb.ON_CHANGE_REVISE,
            request_id="a",
        )
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")


class TestOpenAttempt:
    async def test_what_a_rank_learns(self, server: Replica) -> None:
        job = await server.start_job(
            unit="tokens",
            groups=[{"name": "matrices"}, {"name": "no_decay", "weight_decay_multiplier": 0}],
            **server.feedback(delay=5),
        )
        answer = job.opened
        assert (answer.attempt.number, len(answer.attempt.token)) == (1, 16)
        assert (answer.begin, answer.delay, answer.horizon) == (0, 5, 5)
        assert (answer.unit, list(answer.groups)) == ("tokens", ["matrices", "no_decay"])
        assert (answer.has_weight_decay, answer.feedback) == (True, True)
        assert (answer.joined, answer.restored) == (False, False)

    async def test_without_groups_decay_and_feedback(self, server: Replica) -> None:
        answer = (await server.start_job(weight_decay=None)).opened
        assert list(answer.groups) == [""]
        assert (answer.has_weight_decay, answer.feedback, answer.delay) == (False, False, 32)

    async def test_advice_is_no_feedback(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(mode="advise"))
        assert not job.opened.feedback

    async def test_each_attempt_has_a_token_of_its_own(self, server: Replica) -> None:
        await server.attach()
        tokens = [(await server.open()).opened.attempt.token for _ in range(4)]
        assert len(set(tokens)) == 4

    async def test_a_repeat_gets_the_same_attempt(self, server: Replica) -> None:
        await server.attach()
        first = await server.open(request_id="same")
        again = await server.open(request_id="same")
        assert again.opened == first.opened
        assert kinds(server).count("opened") == 1

    async def test_a_repeat_after_a_later_attempt_is_refused(self, server: Replica) -> None:
        await server.attach()
        first = {"run": "small", "request_id": "same", "incarnation": "p"}
        await server.call("OpenAttempt", **first)
        await server.open()
        refusal = await server.refused("OpenAttempt", **first)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AttemptSuperseded")
        assert (refusal.facts["attempt"], refusal.facts["current"]) == ("1", "2")

    @pytest.mark.parametrize("field", ["run", "request_id", "incarnation"])
    async def test_what_every_call_must_say(self, server: Replica, field: str) -> None:
        await server.attach()
        fields = {"run": "small", "request_id": "a", "incarnation": "p"} | {field: ""}
        refusal = await server.refused("OpenAttempt", **fields)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == [field]

    async def test_an_unknown_run(self, server: Replica) -> None:
        await server.attach()
        refusal = await server.refused("OpenAttempt", run="smal", request_id="a", incarnation="p")
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")
        assert refusal.facts["near"] == "small"

    @pytest.mark.parametrize("progress", [-1, 2**53 + 1])
    async def test_an_impossible_progress(self, server: Replica, progress: int) -> None:
        await server.attach()
        refusal = await server.refused(
            "OpenAttempt", run="small", request_id="a", incarnation="p", progress=progress
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == ["progress"]

    async def test_a_run_with_losses_wants_to_know_where(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0))
        refusal = await server.refused("OpenAttempt", run="small", request_id="a", incarnation="p")
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "ResumePointRequired")
        assert refusal.facts == {"run": "small", "frontier": "1"}
        assert "resume_at=0" in refusal.text
        over = await server.open(progress=0)
        assert (over.opened.begin, over.opened.attempt.number) == (0, 2)

    async def test_a_finished_run_opens_no_more(self, server: Replica) -> None:
        await server.attach()
        await server.call("FinishRun", run="small", request_id="f")
        refusal = await server.refused("OpenAttempt", run="small", request_id="a", incarnation="p")
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")

    async def test_an_old_attempt_is_refused_everything(self, server: Replica) -> None:
        old = await server.start_job(**server.feedback())
        await server.open()
        calls = {
            "GetValues": old.values_fields(0),
            "ReportLosses": old.report_fields((0, 1.0)),
            "SaveState": {**old.identity, "progress": 0},
        }
        for method, fields in calls.items():
            refusal = await server.refused(method, **fields)
            assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AttemptSuperseded")
            assert refusal.facts == {"run": "small", "attempt": "1", "current": "2"}

    @pytest.mark.parametrize("token", [b"", b"x", bytes(16)])
    async def test_the_token_must_be_the_attempts(self, server: Replica, token: bytes) -> None:
        job = await server.start_job()
        forged = pb.Attempt(number=1, token=token)
        refusal = await job.refused_values(0, attempt=forged)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AttemptSuperseded")
        assert "token" in refusal.text

    @pytest.mark.parametrize("opened", [False, True])
    async def test_a_request_without_an_attempt(self, server: Replica, opened: bool) -> None:
        await server.attach(**server.feedback())
        if opened:
            await server.open()
        calls: dict[str, dict[str, Any]] = {
            "GetValues": {"begin": 0, "stride": 1, "count": 1, "in_use": 10},
            "ReportLosses": {
                "incarnation": "p",
                "reports": [pb.LossReport(progress=0, loss=1.0, moves_to=1)],
            },
            "SaveState": {},
        }
        for method, fields in calls.items():
            refusal = await server.refused(method, run="small", **fields)
            assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
            assert list(refusal.fields) == ["attempt"]


class TestKeys:
    async def test_ranks_with_one_key_share_an_attempt(self, server: Replica) -> None:
        await server.attach()
        jobs = [await server.open(key="k", rank=rank) for rank in (2, 0, 1, 3)]
        assert [job.opened.joined for job in jobs] == [False, True, True, True]
        assert len({job.opened.attempt.token for job in jobs}) == 1
        assert kinds(server).count("opened") == 1
        # Only the reporter's arrival matters to the log.
        assert [event.incarnation for event in events(server, "joined")] == [jobs[1].incarnation]

    async def test_at_once_too(self, server: Replica) -> None:
        await server.attach()
        jobs = await asyncio.gather(*(server.open(key="k", rank=rank) for rank in range(20)))
        assert len({job.opened.attempt.token for job in jobs}) == 1
        assert sum(not job.opened.joined for job in jobs) == 1
        assert kinds(server).count("opened") == 1

    async def test_without_a_key_nobody_joins(self, server: Replica) -> None:
        await server.attach()
        first, second = await server.open(), await server.open()
        assert (first.opened.attempt.number, second.opened.attempt.number) == (1, 2)

    async def refused_join(self, server: Replica, **fields: Any) -> Any:
        return await server.refused(
            "OpenAttempt", **{"run": "small", "request_id": "j", "incarnation": "x"} | fields
        )

    async def test_another_progress(self, server: Replica) -> None:
        await server.attach()
        await server.open(key="k", progress=7)
        refusal = await self.refused_join(server, key="k", rank=1, progress=8)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "JoinRefused")
        assert (refusal.facts["begin"], refusal.facts["progress"]) == ("7", "8")

    async def test_another_reporter(self, server: Replica) -> None:
        await server.attach()
        await server.open(key="k", reporter=0)
        refusal = await self.refused_join(server, key="k", rank=1, reporter=1)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "JoinRefused")
        assert refusal.facts["reporter"] == "0"

    async def test_a_second_incarnation_of_the_reporter(self, server: Replica) -> None:
        await server.attach()
        await server.open(key="k", rank=0)
        refusal = await self.refused_join(server, key="k", rank=0)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "JoinRefused")
        assert "needs a new key" in refusal.text

    async def test_a_second_incarnation_of_another_rank_may_join(self, server: Replica) -> None:
        await server.attach()
        await server.open(key="k", rank=0)
        for _ in range(2):
            assert (await server.open(key="k", rank=1)).opened.joined

    async def test_the_key_of_an_older_attempt(self, server: Replica) -> None:
        await server.attach()
        await server.open(key="old")
        await server.open(key="new")
        refusal = await self.refused_join(server, key="old", rank=1)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AttemptSuperseded")
        assert (refusal.facts["attempt"], refusal.facts["current"]) == ("1", "2")


class TestGetValues:
    async def test_all_that_is_fixed_comes_at_once(self, server: Replica) -> None:
        job = await server.start_job(
            groups=[{"name": "a"}, {"name": "b", "peak": 5e-3, "weight_decay_multiplier": 0}],
            **server.feedback(delay=3),
        )
        answer = await job.values(0)
        assert (answer.block.begin, answer.block.stride) == (0, 1)
        assert list(answer.block.learning_rates) == [LR, 5e-3] * 3
        assert list(answer.block.weight_decays) == [0.1, 0.0] * 3
        assert (answer.horizon, answer.frontier) == (3, 0)

    async def test_no_decay_without_a_decay(self, server: Replica) -> None:
        job = await server.start_job(weight_decay=None)
        answer = await job.values(0, count=4)
        assert list(answer.block.learning_rates) == [LR] * 4
        assert list(answer.block.weight_decays) == []

    async def test_a_short_count(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=8))
        assert len(await job.rates(1, count=3)) == 3
        assert len(await job.rates(1, count=2)) == 2

    async def test_values_are_in_the_log_before_they_leave(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        answer = await job.values(1, in_use=1)
        (event,) = events(server, "recorded")
        assert (event.begin, event.stride, event.in_use) == (1, 1, 1)
        assert event.learning_rates == tuple(answer.block.learning_rates)
        assert event.weight_decays == tuple(answer.block.weight_decays)

    async def test_a_second_request_reads_the_record(self, server: Replica) -> None:
        ramp = {"peak": 1e-3, "warmup": 500, "decay": {"style": "cosine"}}
        job = await server.start_job(learning_rate=ramp, **server.feedback(delay=40))
        first = await job.rates(0)
        assert len(set(first)) == 40
        log = server.logs()
        for _ in range(3):
            assert bits(await job.rates(0)) == bits(first)
        assert bits(await job.rates(7, count=5)) == bits(first[7:12])
        assert server.logs() == log

    async def test_another_stride_copies_what_is_recorded(self, server: Replica) -> None:
        ramp = {"peak": 1e-3, "warmup": 500, "decay": {"style": "cosine"}}
        job = await server.start_job(learning_rate=ramp, **server.feedback(delay=40))
        first = await job.rates(0)
        log = server.logs()
        for begin, stride in ((0, 2), (3, 7), (39, 5), (1, 64)):
            answer = await job.values(begin, stride=stride)
            assert bits(list(answer.block.learning_rates)) == bits(first[begin::stride])
            assert answer.block.stride == stride
        for stride in (1, 2, 3, 1):
            # As many steps each time: nobody gets the bytes that were meant for another stride.
            got = await job.rates(0, stride=stride, count=5)
            assert bits(got) == bits(first[: 5 * stride : stride])
        assert server.logs() == log

    async def test_half_recorded_on_another_stride(self, server: Replica) -> None:
        ramp = {"peak": 1e-3, "warmup": 500, "decay": {"style": "cosine"}}
        job = await server.start_job(learning_rate=ramp, **server.feedback(delay=40))
        even = await job.rates(0, stride=2, count=20)
        every = await job.rates(0)
        assert bits(every[::2]) == bits(even)

    async def test_neither_restart_nor_revision_changes_what_was_handed_out(
        self, server: Replica
    ) -> None:
        feedback = server.feedback(delay=4)
        job = await server.start_job(**feedback)
        first = await job.rates(0)
        revised = await server.call(
            "ReviseRun",
            run="small",
            spec_document=server.document(learning_rate={"peak": 8e-3}, **feedback),
            request_id="r",
        )
        assert revised.effective == 4
        await server.restart()
        assert bits(await job.rates(0)) == bits(first)
        await job.report((0, 1.0), (1, 0.5))
        assert await job.rates(3) == [LR]
        assert await job.rates(4) == [8e-3] * 2
        assert await job.rates(3, stride=2) == [LR, 8e-3]

    async def test_a_restart_keeps_every_bit(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2))
        await job.report((0, 2.0), (1, 2.0), (2, 3.0))
        first = await job.rates(0)
        shown = await job.shown()
        await server.restart()
        assert bits(await job.rates(0)) == bits(first)
        assert await job.shown() == shown
        assert (await job.report((3, 1.0))).frontier == 4

    async def test_without_feedback_the_horizon_follows_what_is_in_use(
        self, server: Replica
    ) -> None:
        job = await server.start_job(feedback={"delay": 4})
        assert len(await job.rates(0)) == 4
        answer = await job.values(4, in_use=3)
        assert (len(answer.block.learning_rates), answer.horizon) == (3, 7)
        assert (await job.values(7, in_use=3)).block.stride == 0
        assert len(await job.rates(7, in_use=6)) == 3

    async def test_without_feedback_nobody_waits_for_losses(self, server: Replica) -> None:
        job = await server.start_job(feedback={"delay": 1})
        for n in range(20):
            assert await job.rates(n, in_use=n, blocked=True, wait_ms=WAIT_MS) == [LR]
        assert "waived" not in kinds(server)

    async def test_the_wait_ends_where_the_caller_said(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        for blocked in (False, True):
            answer = await job.values(3, blocked=blocked, wait_ms=20)
            assert not answer.HasField("block")
            assert (answer.horizon, answer.frontier) == (3, 0)
        assert kinds(server) == ["created", "opened"]

    @pytest.mark.parametrize("blocked", [False, True])
    async def test_a_report_ends_the_wait(
        self, server: Replica, until: Until, blocked: bool
    ) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        task = asyncio.create_task(job.values(3, blocked=blocked, wait_ms=WAIT_MS))
        if blocked:
            await waiting(server, until)
        await job.report((0, 1.0))
        answer = await task
        assert list(answer.block.learning_rates) == [LR]
        assert (answer.horizon, answer.frontier) == (4, 1)
        assert server.live().ranks_waiting == 0

    async def test_all_who_wait_get_the_same(self, server: Replica, until: Until) -> None:
        job = await server.start_job(**server.feedback(delay=2))
        tasks = [
            asyncio.create_task(job.values(2, blocked=True, wait_ms=WAIT_MS)) for _ in range(50)
        ]
        await waiting(server, until, 50)
        await job.report((0, 2.0), (1, 2.0))
        answers = await asyncio.gather(*tasks)
        assert all(answer == answers[0] for answer in answers)
        assert list(answers[0].block.learning_rates) == [LR, LR / 2]
        assert kinds(server) == ["created", "opened", "reported", "recorded"]

    async def test_a_caller_who_leaves_is_not_counted(self, server: Replica, until: Until) -> None:
        job = await server.start_job(**server.feedback())
        task = asyncio.create_task(job.values(2, blocked=True, wait_ms=WAIT_MS))
        await waiting(server, until)
        task.cancel()
        await waiting(server, until, 0)

    async def test_a_new_attempt_ends_the_wait(self, server: Replica, until: Until) -> None:
        job = await server.start_job(**server.feedback())
        task = asyncio.create_task(
            server.refused("GetValues", **job.values_fields(2, blocked=True, wait_ms=WAIT_MS))
        )
        await waiting(server, until)
        with pytest.raises(AssertionError):
            # The log changes meanwhile, as it should here.
            await asyncio.gather(server.open(), task)
        refusal = await job.refused_values(2)
        assert refusal.reason == "AttemptSuperseded"

    @pytest.mark.parametrize(
        ("method", "fields", "code"),
        [
            ("FinishRun", {"force": True, "request_id": "f"}, "FAILED_PRECONDITION"),
            ("DeleteRun", {"force": True}, "NOT_FOUND"),
        ],
    )
    async def test_the_end_of_the_run_ends_the_wait(
        self, server: Replica, until: Until, method: str, fields: dict[str, Any], code: str
    ) -> None:
        job = await server.start_job(**server.feedback())
        values = asyncio.create_task(job.values(2, blocked=True, wait_ms=WAIT_MS))
        await waiting(server, until)
        run = server.live()
        await server.call(method, run="small", **fields)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await values
        assert caught.value.code().name == code
        assert run.ranks_waiting == 0

    async def test_further_than_a_block_beyond_the_horizon(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        assert not (await job.values(3 + 128 * 2 - 1, stride=2)).HasField("block")
        refusal = await job.refused_values(3 + 128 * 2, stride=2, blocked=True, wait_ms=WAIT_MS)
        assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "BeyondHorizon")
        assert refusal.facts == {
            "run": "small", "progress": "259", "horizon": "3", "frontier": "0",
        }  # fmt: skip

    async def test_before_the_attempt(self, server: Replica) -> None:
        await server.attach()
        job = await server.open(progress=10)
        refusal = await job.refused_values(9)
        assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "BeforeAttempt")
        assert (refusal.facts["progress"], refusal.facts["begin"]) == ("9", "10")

    async def test_every_field_that_is_wrong_is_named(self, server: Replica) -> None:
        job = await server.start_job()
        refusal = await job.refused_values(-1, stride=0, count=129, in_use=-5)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert set(refusal.fields) == {"begin", "stride", "count", "in_use"}
        assert refusal.fields["count"] == "got 129; allowed: 1 to 128"

    async def test_an_unknown_run(self, server: Replica) -> None:
        job = await server.start_job()
        refusal = await server.refused("GetValues", **job.values_fields(0) | {"run": "smal"})
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")

    async def test_a_finished_run_repeats_what_it_gave_and_no_more(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=4))
        first = await job.rates(0, count=2)
        await server.call("FinishRun", run="small", force=True, request_id="f")
        assert await job.rates(0) == first
        refusal = await job.refused_values(2)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")

    async def test_many_groups_fit_into_a_message(self, server: Replica) -> None:
        groups = [{"name": f"g{n}"} for n in range(2000)]
        job = await server.start_job(groups=groups, **server.feedback(delay=128))
        answer = await job.values(0)
        steps = len(answer.block.learning_rates) // 2000
        assert 1 <= steps < 128
        rest = await job.values(steps)
        assert len(rest.block.learning_rates) == steps * 2000


class TestWaivers:
    async def test_a_blocked_rank_gets_on_without_the_reporter(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=4, timeout="200ms"))
        await job.report((0, 1.0))
        answer = await job.values(5, blocked=True, wait_ms=WAIT_MS)
        assert list(answer.block.learning_rates) == [LR] * 4
        assert (answer.frontier, answer.horizon) == (5, 9)
        (event,) = events(server, "waived")
        assert (event.attempt, event.until) == (1, 5)
        assert (await job.shown()).waivers == 1

    async def test_one_waiver_for_all_who_wait(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2, timeout="300ms"))
        await asyncio.gather(
            *(job.values(2, blocked=True, wait_ms=WAIT_MS) for _ in range(20)),
        )
        assert kinds(server).count("waived") == 1

    async def test_the_blocked_time_of_several_polls_adds_up(
        self, server: Replica, until: Until
    ) -> None:
        job = await server.start_job(**server.feedback(delay=2, timeout="200ms"))

        async def answered() -> bool:
            return bool((await job.values(2, blocked=True, wait_ms=50)).HasField("block"))

        await until(answered)
        assert kinds(server).count("waived") == 1

    async def test_a_lease_that_is_renewed_ahead_waives_nothing(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2, timeout="50ms"))
        answer = await job.values(2, blocked=False, wait_ms=400)
        assert not answer.HasField("block")
        assert kinds(server) == ["created", "opened"]

    async def test_a_pause_waives_nothing(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2, timeout="5s"))
        run = server.live()
        for _ in range(30):
            await job.values(2, blocked=True, wait_ms=1)
        # However long the ranks are away, only what they were blocked for counts.
        assert run.blocked_s() < 5
        before = run.blocked_s()
        await asyncio.sleep(0.2)
        assert run.blocked_s() == before

    async def test_a_report_that_comes_in_time_waives_nothing(
        self, server: Replica, until: Until
    ) -> None:
        job = await server.start_job(**server.feedback(delay=1, timeout="10s"))
        for n in range(30):
            task = asyncio.create_task(job.values(n, blocked=True, wait_ms=WAIT_MS))
            if n:
                await waiting(server, until)
                await job.report((n - 1, 1.0 - n / 100))
            assert list((await task).block.learning_rates) == [LR]
        assert "waived" not in kinds(server)

    async def test_a_stride_beyond_the_delay_is_one_waiver(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=4, timeout="100ms"))
        answer = await job.values(100, stride=100, blocked=True, wait_ms=WAIT_MS)
        assert list(answer.block.learning_rates) == [LR]
        (event,) = events(server, "waived")
        assert 100 < event.until + 4 <= 104

    async def test_a_loss_after_the_waiver_is_late(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2, timeout="100ms"))
        await job.report((0, 1.0))
        await job.values(3, blocked=True, wait_ms=WAIT_MS)
        answer = await job.report((1, 9.0), (2, 9.0))
        assert list(answer.outcomes) == [LATE, LATE]
        assert list((await job.report((1, 9.0))).outcomes) == [LATE]
        refusal = await job.refused_report((1, 8.0))
        assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "LossConflict")
        shown = await job.shown()
        assert (shown.losses, shown.late_losses, len(shown.adjustments)) == (1, 2, 0)

    async def test_what_arrives_counts_before_what_is_missing(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2, timeout="150ms"))
        task = asyncio.create_task(job.values(4, blocked=True, wait_ms=WAIT_MS))
        await job.report((0, 1.0), (1, 2.0))
        answer = await task
        # The loss at 1 is no improvement: its cut shows at 3, not sooner.
        assert (await job.rates(2))[:2] == [LR, LR / 2]
        assert answer.block.learning_rates[0] == LR / 2
        assert (await job.shown()).losses == 2


class TestSteps:
    """Reports that are rare, increments above the delay, and lockstep: no stall, no waiver."""

    async def test_sparse_reports(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3, timeout="20s"))
        for n in range(60):
            assert await job.rates(n, blocked=True, wait_ms=WAIT_MS)
            # The reporter says where it is at each step, and a loss at every tenth.
            report = pb.LossReport(progress=n, moves_to=n + 1)
            if n % 10 == 0:
                report.loss = 100.0 - n
            await job.report(reports=[report])
        shown = await job.shown()
        assert (shown.losses, shown.waivers, shown.frontier) == (6, 0, 60)

    @pytest.mark.parametrize("delay", [1, 7])
    async def test_increments_above_the_delay(self, server: Replica, delay: int) -> None:
        job = await server.start_job(unit="samples", **server.feedback(delay=delay, timeout="20s"))
        used = []
        for n in range(0, 640, 32):
            got = await job.rates(n, stride=32, in_use=n, blocked=True, wait_ms=WAIT_MS)
            used.append(got[0])
            await job.report((n, 1.0, n + 32))
        shown = await job.shown()
        assert (shown.waivers, shown.frontier, shown.losses) == (0, 640, 20)
        # The loss at 32 is no improvement; it shows at the next used progress, 64.
        assert used[:3] == [LR, LR, LR / 2]

    async def test_lockstep(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=1, timeout="20s"))
        used = []
        for n in range(5):
            used += await job.rates(n, blocked=True, wait_ms=WAIT_MS)
            await job.report((n, 1.0))
        assert used == [LR, LR, LR / 2, LR / 4, LR / 8]
        assert (await job.shown()).waivers == 0

    @pytest.mark.parametrize("delay", [1, 2, 3, 8])
    async def test_a_loss_acts_at_exactly_n_plus_delay(self, server: Replica, delay: int) -> None:
        job = await server.start_job(**server.feedback(delay=delay))
        await job.report((0, 1.0), (1, 1.0), *((n, 0.5**n) for n in range(2, 20)))
        got = await job.rates(0)
        cut = 1 + delay
        assert got == [LR] * cut + [LR / 2] * (20 + delay - cut)
        (adjustment,) = (await job.shown()).adjustments
        assert (adjustment.decided_at, adjustment.effective) == (1, cut)


class TestReportLosses:
    async def test_outcomes(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=2))
        first = await job.report((0, 1.0), (1, 0.5))
        assert list(first.outcomes) == [RECORDED, RECORDED]
        assert (first.frontier, first.horizon) == (2, 4)
        again = await job.report((1, 0.5), (2, 0.25))
        assert list(again.outcomes) == [REPEATED, RECORDED]
        log = server.logs()
        again = await job.report((0, 1.0), (2, 0.25))
        assert list(again.outcomes) == [REPEATED, REPEATED]
        assert server.logs() == log

    async def test_no_reports(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        answer = await job.report()
        assert (list(answer.outcomes), answer.frontier) == ([], 0)
        assert kinds(server) == ["created", "opened"]

    async def test_what_is_passed_over_has_no_loss(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0, 10))
        assert list((await job.report((4, 2.0))).outcomes) == [LATE]

    async def test_not_a_number_and_infinities_are_data(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 2.0), (1, NAN), (2, INF), (3, -INF), (4, 1.0))
        shown = await job.shown()
        assert (shown.losses, shown.nonfinite_losses, shown.loss) == (5, 3, 1.0)
        kept = (0.98 * (0.02 * 2.0) + 0.02 * 1.0) / (0.98 * 0.02 + 0.02)
        assert shown.smoothed_loss == pytest.approx(kept, rel=1e-12)
        assert list(shown.adjustments) == []
        again = await job.report((1, struct.unpack("<d", b"\x01" * 6 + b"\xf8\xff")[0]), (2, INF))
        assert list(again.outcomes) == [REPEATED, REPEATED]

    async def test_the_last_loss_may_be_no_number(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, NAN))
        shown = await job.shown()
        assert math.isnan(shown.loss)
        assert not shown.HasField("smoothed_loss")

    @pytest.mark.parametrize(
        ("recorded", "other", "named"),
        [(1.0, 2.0, "2.0"), (1.0, NAN, "nan"), (NAN, 1.0, "1.0"), (0.0, -0.0, "-0.0"),
         (1.0, math.nextafter(1.0, 2.0), "1.0000000000000002"), (1.0, None, "none")],
    )  # fmt: skip
    async def test_another_loss_for_a_reported_progress(
        self, server: Replica, recorded: float, other: float | None, named: str
    ) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, recorded))
        refusal = await job.refused_report((0, other))
        assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "LossConflict")
        assert refusal.facts == {
            "run": "small", "progress": "0", "recorded": repr(recorded), "got": named,
        }  # fmt: skip

    async def test_a_loss_after_a_step_that_had_none_is_late(self, server: Replica) -> None:
        """Whatever else was said of the step; and it is no repeat of a skipped update."""
        job = await server.start_job(**server.feedback())
        skip = pb.LossReport(progress=1, loss=1.0, moves_to=1, skipped=True)
        done = pb.LossReport(progress=1, moves_to=2)
        setattr(done, "try", 1)  # A word of Python.
        evaluated = pb.LossReport(progress=0, moves_to=1, validation_losses={"val": 3.0})
        await job.report(reports=[evaluated, skip, done])
        for at, loss in ((0, 2.0), (1, 1.0)):
            for _ in range(2):
                assert list((await job.report((at, loss))).outcomes) == [LATE]
            refusal = await job.refused_report((at, 5.0))
            assert refusal.reason == "LossConflict"
        # Said once more, what came first is what it was.
        assert list((await job.report(reports=[evaluated, skip, done])).outcomes) == [REPEATED] * 3
        shown = await job.shown()
        assert (shown.losses, shown.skipped, shown.late_losses) == (0, 1, 2)

    async def test_another_loss_for_a_step_whose_first_update_was_skipped(
        self, server: Replica
    ) -> None:
        job = await server.start_job(**server.feedback())
        skip = pb.LossReport(progress=0, loss=1.0, moves_to=0, skipped=True)
        done = pb.LossReport(progress=0, loss=2.0, moves_to=1)
        setattr(done, "try", 1)  # A word of Python.
        await job.report(reports=[skip, done])
        assert list((await job.report((0, 2.0))).outcomes) == [REPEATED]
        refusal = await job.refused_report((0, 1.0))
        assert (refusal.reason, refusal.facts["recorded"]) == ("LossConflict", "2.0")

    async def test_a_batch_goes_in_whole_or_not_at_all(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0))
        refusal = await job.refused_report((1, 0.5), (2, 0.5), (0, 3.0))
        assert refusal.reason == "LossConflict"
        assert (await job.shown()).frontier == 1

    async def test_two_losses_for_one_progress_in_a_batch(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        refusal = await job.refused_report((0, 1.0), (0, 2.0))
        assert refusal.reason == "LossConflict"
        assert list((await job.report((0, 1.0), (0, 1.0))).outcomes) == [RECORDED, REPEATED]

    async def test_below_the_resume_point(self, server: Replica) -> None:
        first = await server.start_job(**server.feedback())
        await first.report((0, 1.0), (1, 0.5), (2, 0.4))
        job = await server.open(progress=2)
        refusal = await job.refused_report((1, 0.5))
        assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "BelowResumePoint")
        assert refusal.facts == {"run": "small", "progress": "1", "begin": "2"}
        # What lies from there on was forgotten: it may differ now.
        assert list((await job.report((2, 7.0))).outcomes) == [RECORDED]

    async def test_who_is_not_the_reporter(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        refusal = await job.refused_report((0, 1.0), rank=3)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NotReporter")
        assert (refusal.facts["rank"], refusal.facts["reporter"]) == ("3", "0")
        refusal = await job.refused_report((0, 1.0), incarnation="another")
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NotReporter")
        assert "another process" in refusal.text

    async def test_the_declared_reporter_may_be_any_rank(self, server: Replica) -> None:
        await server.attach(**server.feedback())
        job = await server.open(rank=0, reporter=5)
        assert (await job.report((0, 1.0), rank=5, incarnation="late-comer")).frontier == 1
        refusal = await job.refused_report((1, 1.0), rank=5, incarnation="third")
        assert refusal.reason == "NotReporter"

    async def test_every_field_that_is_wrong_is_named(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        reports = [
            pb.LossReport(progress=-1, loss=1.0, moves_to=1),
            pb.LossReport(progress=5, loss=1.0, moves_to=5),
            pb.LossReport(progress=5, loss=1.0, moves_to=2**53 + 1),
            pb.LossReport(progress=6, loss=1.0, moves_to=7, weight=-1.0),
            pb.LossReport(progress=6, loss=1.0, moves_to=7, weight=NAN),
        ]
        refusal = await job.refused_report(reports=reports)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert set(refusal.fields) == {
            "reports.0.progress", "reports.1.moves_to", "reports.2.moves_to",
            "reports.3.weight", "reports.4.weight",
        }  # fmt: skip

    async def test_without_an_incarnation(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        refusal = await job.refused_report((0, 1.0), incarnation="")
        assert list(refusal.fields) == ["incarnation"]

    async def test_the_largest_batch(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        refusal = await job.refused_report(*((n, 1 / (n + 1)) for n in range(MAX_REPORTS + 1)))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == ["reports"]
        answer = await job.report(*((n, 1 / (n + 1)) for n in range(MAX_REPORTS)))
        assert answer.frontier == MAX_REPORTS

    async def test_a_finished_run_takes_only_repeats(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.report((0, 1.0))
        await server.call("FinishRun", run="small", force=True, request_id="f")
        assert list((await job.report((0, 1.0))).outcomes) == [REPEATED]
        refusal = await job.refused_report((1, 1.0))
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")

    async def test_a_weight_is_kept(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        report = pb.LossReport(progress=0, loss=1.0, moves_to=1, weight=2.5)
        await job.report((1, 1.0), reports=[report])
        await job.report((1, 1.0))
        weights = [item.weight for event in events(server, "reported") for item in event.reports]
        assert weights == [2.5, 1.0]


class TestStates:
    async def trained(self, server: Replica, steps: int = 6, delay: int = 3) -> Job:
        job = await server.start_job(**server.feedback(delay=delay))
        await job.report(*((n, 2.0) for n in range(steps)))
        await job.values(0)
        return job

    async def test_a_state_needs_the_losses_below_it(self, server: Replica) -> None:
        job = await self.trained(server)
        fields = {**job.identity, "progress": 7}
        refusal = await server.refused("SaveState", **fields, wait_ms=20)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "LossesPending")
        assert refusal.facts == {"run": "small", "frontier": "6", "progress": "7"}

    async def test_it_waits_for_them(self, server: Replica) -> None:
        job = await self.trained(server)
        task = asyncio.create_task(job.save(7, wait_ms=WAIT_MS))
        await job.report((6, 2.0))
        assert core.read_state(await task, "small").progress == 7

    async def test_all_who_wait_for_them_are_woken(self, server: Replica) -> None:
        job = await self.trained(server)
        tasks = [asyncio.create_task(job.save(8, wait_ms=WAIT_MS)) for _ in range(20)]
        await job.report((6, 2.0))
        await job.report((7, 2.0))
        assert len(set(await asyncio.gather(*tasks))) == 1

    async def test_before_the_attempt_there_is_none(self, server: Replica) -> None:
        await server.attach(**server.feedback())
        job = await server.open(progress=4)
        refusal = await server.refused("SaveState", **job.identity, progress=3)
        assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "BeforeAttempt")

    async def test_without_feedback_nothing_is_pending(self, server: Replica) -> None:
        job = await server.start_job()
        assert core.read_state(await job.save(50), "small").progress == 50

    async def test_the_log_goes_on_from_a_state(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        handed_out = await job.rates(4)
        await job.report((6, 0.5), (7, 0.4))
        later = await server.open(state=state)
        assert (later.opened.begin, later.opened.attempt.number) == (4, 2)
        assert (later.opened.joined, later.opened.restored) == (False, False)
        assert bits(await later.rates(4)) == bits(handed_out[:3])
        assert (await later.shown()).losses == 4

    async def test_a_lost_run_is_restored(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        handed_out = await job.rates(4)
        old_token = job.opened.attempt.token
        await server.call("DeleteRun", run="small", force=True)

        fields: dict[str, Any] = {"state": state, "request_id": "again", "incarnation": "new"}
        later = await server.open(**fields)
        assert (later.opened.restored, later.opened.begin) == (True, 4)
        assert later.opened.attempt.number == 2
        assert later.opened.attempt.token != old_token
        assert kinds(server) == ["created", "opened"]
        assert bits(await later.rates(4)) == bits(handed_out[:3])
        repeat = await server.open(**fields)
        assert repeat.opened.attempt == later.opened.attempt
        refusal = await job.refused_values(4)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AttemptSuperseded")

    async def test_what_follows_is_as_if_nothing_was_lost(self, server: Replica) -> None:
        traces = []
        for lost in (False, True):
            job = await self.trained(server)
            state = await job.save(4)
            if lost:
                await server.call("DeleteRun", run="small", force=True)
            later = await server.open(state=state)
            await later.report(*((n, 2.0) for n in range(4, 30)))
            traces.append([(await later.rates(n))[0] for n in range(4, 30)])
            await server.call("DeleteRun", run="small", force=True)
        assert bits(traces[0]) == bits(traces[1])
        assert len(set(traces[0])) > 2

    async def test_ranks_share_a_key_over_a_restored_run(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        await server.call("DeleteRun", run="small", force=True)
        jobs = await asyncio.gather(
            *(server.open(state=state, key="k", rank=rank) for rank in range(8))
        )
        assert len({job.opened.attempt.token for job in jobs}) == 1
        assert sum(job.opened.restored for job in jobs) == 1
        assert kinds(server)[:2] == ["created", "opened"]

    async def test_a_restored_run_takes_its_checkpoint_again(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        await server.call("DeleteRun", run="small", force=True)
        await server.open(state=state)
        again = await server.open(state=state)
        assert (again.opened.begin, again.opened.restored) == (4, False)

    async def test_a_state_of_another_log(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        saved = core.read_state(state, "small")
        await server.call("DeleteRun", run="small", force=True)
        await self.trained(server, steps=5)
        refusal = await server.refused(
            "OpenAttempt", run="small", request_id="a", incarnation="p", state=state
        )
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "StateMismatch")
        here = server.store.read("small", saved.seq - 1, 1)[0].digest
        assert refusal.facts["saved_digest"] == saved.digest
        assert refusal.facts["log_digest"] == here
        assert saved.digest in refusal.text
        assert here in refusal.text

    async def test_a_state_from_ahead_of_the_log(
        self, server: Replica, caplog: pytest.LogCaptureFixture
    ) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        saved = core.read_state(state, "small")
        handed_out = await job.rates(4)
        # The server was set back to an older copy of its database.
        copy = server.store.read("small")[: saved.seq - 1]
        server.store._logs["small"] = [*copy]
        await server.restart()
        later = await server.open(state=state)
        assert (later.opened.begin, later.opened.attempt.number) == (4, 2)
        assert (later.opened.joined, later.opened.restored) == (False, True)
        # It is the same log still, and says what it lost.
        assert later.opened.log == job.opened.log
        *kept, row = server.store.read("small")
        assert kept == copy
        event = core.decode(row.payload)
        assert isinstance(event, core.Opened)
        assert event.adopted
        assert (event.lost_seq, event.lost_digest) == (saved.seq, saved.digest)
        assert (
            f"it ends at seq {saved.seq - 1} with digest {copy[-1].digest}, and the state of the "
            f"checkpoint was saved in it at seq {saved.seq} with digest {saved.digest}"
        ) in caplog.text
        # What had left of it by then is given again, and losses go on from there.
        assert bits(await later.rates(4)) == bits(handed_out[:3])
        assert (await later.report((4, 2.0))).frontier == 5
        assert (await job.refused_values(4)).reason == "AttemptSuperseded"

    async def test_a_state_from_ahead_of_another_log(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        saved = core.read_state(state, "small")
        await server.call("DeleteRun", run="small", force=True)
        await server.start_job(**server.feedback(delay=3))
        end = server.store.read("small")[-1]
        assert end.seq < saved.seq
        refusal = await server.refused(
            "OpenAttempt", run="small", request_id="a", incarnation="p", state=state
        )
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "StateMismatch")
        assert refusal.facts == {
            "run": "small",
            "saved_seq": str(saved.seq),
            "saved_digest": saved.digest,
            "log_seq": str(end.seq),
            "log_digest": end.digest,
        }
        assert f"it ends at seq {end.seq}" in refusal.text

    async def test_the_progress_must_be_that_of_the_state(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        fields = {"run": "small", "request_id": "a", "incarnation": "p", "state": state}
        refusal = await server.refused("OpenAttempt", **fields, progress=5)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert refusal.fields == {"progress": "got 5; allowed: 4, or none"}
        assert (await server.call("OpenAttempt", **fields, progress=4)).begin == 4

    async def test_a_state_of_another_run(self, server: Replica) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        await server.attach("other")
        refusal = await server.refused(
            "OpenAttempt", run="other", request_id="a", incarnation="p", state=state
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidState")
        assert refusal.facts == {"run": "other", "state_run": "small"}

    @pytest.mark.parametrize("exists", [True, False])
    async def test_a_damaged_state(self, server: Replica, exists: bool) -> None:
        job = await self.trained(server)
        state = await job.save(4)
        if not exists:
            await server.call("DeleteRun", run="small", force=True)
        middle = len(state) // 2
        damaged = {
            "nothing of ours": b"\x80\x04pickle",
            "half of it": state[:middle],
            "all but its end": state[:-20],
            "a changed byte": state[:middle] + bytes([state[middle] ^ 1]) + state[middle + 1 :],
            "another version": state.replace(b"lrpilot-state 1 ", b"lrpilot-state 7 "),
            "another checksum": state[:20] + b"0" + state[21:],
            "only a newline": b"\n",
            "not base 85": state.split(b"\n")[0] + b"\n" + b"\xff\x00" * 40,
        }
        for what, blob in damaged.items():
            if blob == state:
                continue
            refusal = await server.refused(
                "OpenAttempt", run="small", request_id="a", incarnation="p", state=blob
            )
            got = (what, refusal.code, refusal.reason)
            assert got == (what, "INVALID_ARGUMENT", "InvalidState")


class TestMessages:
    async def test_a_request_above_the_limit(self, server: Replica) -> None:
        refusal = await server.refused(
            "AttachRun", run="small", spec_document="#" * (1024 * 1024), request_id="a"
        )
        assert refusal.code == "RESOURCE_EXHAUSTED"

    async def test_a_document_above_its_own_limit(self, server: Replica) -> None:
        refusal = await server.refused(
            "AttachRun", run="small", spec_document="#" * 300_000, request_id="a"
        )
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")

    async def test_many_calls_for_a_run_that_is_not_in_memory(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback())
        await job.values(0)
        await server.restart()
        answers = await asyncio.gather(*(job.values(0) for _ in range(50)))
        assert all(answer == answers[0] for answer in answers)


class TestDrain:
    @pytest.mark.parametrize("restarted", [False, True])
    async def test_who_waits_is_answered_at_once(
        self, server: Replica, until: Until, restarted: bool
    ) -> None:
        job = await server.start_job(**server.feedback())
        if restarted:
            await server.restart()
        blocked = asyncio.create_task(job.values(2, blocked=True, wait_ms=WAIT_MS))
        ahead = asyncio.create_task(job.values(2, wait_ms=WAIT_MS))
        saving = asyncio.create_task(
            server.call("SaveState", **job.identity, progress=1, wait_ms=WAIT_MS)
        )
        await waiting(server, until)
        # The others came over the same connection, and the server takes them in order.
        await server.call("ListRuns")
        await server.server.drain()
        assert not (await blocked).HasField("block")
        assert not (await ahead).HasField("block")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await saving
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        await server.restart()
        assert list((await job.report((0, 1.0))).outcomes) == [RECORDED]
