"""What operators change, and what they are shown before and after, over a real connection."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot import core
from lrpilot.server._changes import shown_change
from lrpilot.server._live_run import LiveRun
from lrpilot.v1 import trainer_pb2
from tests.core.test_requests import PLATEAU, Log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.server.conftest import Job, Refusal, Replica

LR, WD = 1e-3, 0.1
"""What `document` sets where nothing was adjusted."""

SIGNED = {"reason": "the loss oscillates", "author": "oncall@node-7"}

STAGES = [
    {"name": "first", "until": 600, "learning_rate": {"peak": 1e-3}, "weight_decay": 0.1},
    {"name": "second", "learning_rate": {"peak": 4e-4}, "weight_decay": 0.1},
]

GROUPS = [{"name": "a"}, {"name": "b", "peak": 4e-3, "weight_decay_multiplier": 0.0}]


async def adjust(server: Replica, **fields: Any) -> Any:
    wanted = {"run": "small", **SIGNED, "request_id": server.fresh("adjust")} | fields
    return await server.call("AdjustRun", **wanted)


async def adjust_refused(server: Replica, **fields: Any) -> Refusal:
    """Adjust what must be refused; the log is checked to be the same as before."""
    wanted = {"run": "small", **SIGNED, "request_id": server.fresh("adjust")} | fields
    return await server.refused("AdjustRun", **wanted)


async def approve(server: Replica, advice: str, **fields: Any) -> Any:
    wanted = {"author": "oncall@node-7", "request_id": server.fresh("approve")} | fields
    return await server.call("ApproveAdvice", run="small", advice=advice, **wanted)


async def approve_refused(server: Replica, advice: str, **fields: Any) -> Refusal:
    wanted = {"author": "oncall@node-7", "request_id": server.fresh("approve")} | fields
    return await server.refused("ApproveAdvice", run="small", advice=advice, **wanted)


async def shown(server: Replica) -> Any:
    return (await server.call("GetRun", run="small")).run


async def started(server: Replica, **fields: Any) -> Job:
    """Start a job with D = 3 that has reported the loss at 0: the horizon is 4."""
    job = await server.start_job(**server.feedback(delay=3), **fields)
    await job.report((0, 2.0))
    return job


async def advised(server: Replica, **fields: Any) -> tuple[Job, Any]:
    """Start a job whose policy has advised to halve the LR from 10 on."""
    feedback = {"delay": 9, "advice_expires": 20}
    policies = server.feedback(mode="advise")["policies"]
    job = await server.start_job(policies=policies, feedback=feedback, **fields)
    await job.report((0, 2.0), (1, 2.0))
    (advice,) = (await shown(server)).adjustments
    return job, advice


class TestAdjustRun:
    @pytest.mark.parametrize(
        ("action", "rates", "decay", "what", "summary"),
        [
            ({"scale_lr": 0.25}, [LR * 0.25] * 3, WD, "multiply", "LR x 0.25"),
            ({"scale_lr": 3.0}, [LR * 3.0] * 3, WD, "multiply", "LR x 3"),
            ({"set_lr": 7e-4}, [7e-4] * 3, WD, "set", "LR to 0.0007"),
            ({"scale_weight_decay": 0.5}, [LR] * 3, WD * 0.5, "scale weight decay", "WD x 0.5"),
            ({"scale_weight_decay": 0.0}, [LR] * 3, 0.0, "scale weight decay", "WD x 0"),
            (
                {"begin_decay": {"length": "2", "style": "linear"}},
                [LR, LR * 0.5, 0.0],
                WD,
                "decay",
                "anneal LR over 2 (linear)",
            ),
            ({"hold": True}, [LR] * 3, WD, "hold", "hold LR and WD"),
        ],
    )
    async def test_it_shows_from_the_horizon_on_and_says_so_before(
        self,
        server: Replica,
        action: dict[str, Any],
        rates: list[float],
        decay: float,
        what: str,
        summary: str,
    ) -> None:
        job = await started(server)
        answer = await adjust(server, **action)
        made = answer.adjustment
        assert (answer.effective, made.effective, answer.unchanged) == (4, 4, False)
        assert (made.action, made.summary, made.source, made.mode) == (
            what, summary, "operator", "act",
        )  # fmt: skip
        assert (made.author, made.reason) == (SIGNED["author"], SIGNED["reason"])
        assert (made.status, made.decided_at, made.seq) == ("planned", 1, 4)
        assert (list(made.before), list(made.after)) == ([LR], [rates[0]])
        assert (list(made.weight_decay_before), list(made.weight_decay_after)) == ([WD], [decay])
        assert made == (await shown(server)).adjustments[-1] == answer.run.adjustments[-1]

        await job.report((1, 1.9), (2, 1.8), (3, 1.7))
        block = (await job.values(1)).block
        assert list(block.learning_rates) == [LR] * 3 + rates
        assert list(block.weight_decays) == [WD] * 3 + [decay] * 3

    async def test_setting_the_lr_moves_the_other_groups_alike(self, server: Replica) -> None:
        job = await started(server, groups=GROUPS)
        made = (await adjust(server, set_lr=5e-4)).adjustment
        assert list(made.before) == [1e-3, 4e-3]
        assert list(made.after) == [5e-4, 5e-4 * (4e-3 / 1e-3)]
        assert list(made.weight_decay_after) == [WD, 0.0]
        await job.report((1, 1.9))
        assert await job.rates(4) == list(made.after)

    async def test_a_share_of_the_progress_so_far(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        await job.report((0, 2.0, 97))
        answer = await adjust(server, begin_decay={"length": "10%"})
        assert answer.adjustment.summary == "anneal LR over 10 (minus_sqrt)"

    async def test_the_next_stage_begins_at_the_horizon(self, server: Replica) -> None:
        fields = {"stages": STAGES, "learning_rate": None, "weight_decay": None}
        job = await started(server, **fields)
        answer = await adjust(server, next_stage=True)
        assert (answer.adjustment.summary, answer.effective) == ("leave stage first", 4)
        assert (list(answer.adjustment.before), list(answer.adjustment.after)) == ([LR], [4e-4])
        await job.report((1, 1.9))
        assert await job.rates(3) == [LR, 4e-4]
        assert (await shown(server)).stage == "first"
        await job.report((2, 1.8), (3, 1.7))
        assert (await shown(server)).stage == "second"

    async def test_another_total_is_a_new_spec(self, server: Replica) -> None:
        rates = {"peak": 1e-3, "decay": {"style": "linear"}}
        await started(server, learning_rate=rates)
        answer = await adjust(server, total=2000)
        assert (answer.effective, answer.run.total) == (4, 2000)
        assert not answer.HasField("adjustment")
        assert [(item.field, item.before, item.after) for item in answer.changes] == [
            ("total", "1000", "2000"),
            ("learning_rate.decay.end", "1000", "2000"),
        ]
        event = (await server.call("ListEvents", run="small")).events[-1]
        assert (event.kind, event.author, event.reason) == (
            "revised", SIGNED["author"], SIGNED["reason"],
        )  # fmt: skip

    async def test_release_ends_a_hold_and_undo_takes_a_change_back(self, server: Replica) -> None:
        job = await started(server)
        cut = (await adjust(server, scale_lr=0.5)).adjustment
        await adjust(server, hold=True)
        await job.report((1, 1.9))
        released = (await adjust(server, release=True)).adjustment
        undone = (await adjust(server, undo=cut.id)).adjustment
        assert (released.effective, undone.effective) == (5, 5)
        assert undone.summary == f"take back {cut.id}"
        assert (list(undone.before), list(undone.after)) == ([LR * 0.5], [LR])
        await job.report((2, 1.8), (3, 1.7), (4, 1.6))
        assert await job.rates(3) == [LR, LR * 0.5, LR, LR, LR]
        status = {item.action: item.status for item in (await shown(server)).adjustments}
        assert status == {
            "multiply": "undone", "hold": "undone", "undo": "in force",
        }  # fmt: skip

    async def test_held_while_it_holds(self, server: Replica) -> None:
        job = await started(server, learning_rate={"peak": 1e-3, "decay": {"style": "linear"}})
        await adjust(server, hold=True)
        assert not (await shown(server)).held
        await job.report((1, 1.9), (2, 1.8), (3, 1.7), (4, 1.6))
        assert (await shown(server)).held
        rates = await job.rates(3)
        assert rates[0] != rates[1]
        assert len(set(rates[1:])) == 1

    async def test_a_directive_rides_in_the_block_and_its_answer_is_shown(
        self, server: Replica
    ) -> None:
        job = await started(server)
        asked = {"kind": "rollback", "before": 1, "factor": 0.25, "until": 3}
        made = (await adjust(server, directive=asked)).adjustment
        assert made.summary == "ask for rollback to before 1 with LR x 0.25 past data up to 3"
        assert (made.action, made.factor, list(made.before)) == ("directive", 0.25, [LR])
        assert list(made.after) == [LR]
        await job.report((1, 1.9), (2, 1.8))
        (directive,) = (await job.values(4)).directives
        assert (directive.id, directive.progress) == (made.id, 4)
        assert (directive.before, directive.until, directive.factor) == (1, 3, 0.25)
        await server.call(
            "AcknowledgeDirective",
            **job.identity,
            rank=0,
            directive=made.id,
            outcome=trainer_pb2.DIRECTIVE_OUTCOME_FAILED,
            progress=4,
            detail="no snapshot",
        )
        assert [item.status for item in (await shown(server)).adjustments] == ["failed"]
        event = (await server.call("ListEvents", run="small")).events[-1]
        assert (event.kind, event.progress, event.reason) == ("acknowledged", 4, "no snapshot")
        assert event.summary == f"directive {made.id} failed"

    async def test_a_rollback_halves_unless_told_otherwise(self, server: Replica) -> None:
        await started(server)
        made = (await adjust(server, directive={"kind": "rollback", "before": 1})).adjustment
        assert made.factor == 0.5

    async def test_before_the_first_attempt(self, server: Replica) -> None:
        await server.attach()
        answer = await adjust(server, scale_lr=0.5)
        assert answer.effective == 0
        assert [point.progress for point in answer.preview][:2] == [0, 4]
        job = await server.open()
        assert set(await job.rates(0)) == {LR * 0.5}

    @pytest.mark.parametrize("action", [{"scale_lr": 1.0}, {"release": True}])
    async def test_nothing_to_do_appends_nothing(
        self, server: Replica, action: dict[str, Any]
    ) -> None:
        await started(server)
        before = server.logs()
        answer = await adjust(server, **action)
        assert (answer.unchanged, answer.effective) == (True, 4)
        assert not answer.HasField("adjustment")
        assert server.logs() == before

    async def test_what_is_done_already_is_unchanged(self, server: Replica) -> None:
        await started(server)
        held = (await adjust(server, hold=True)).adjustment
        before = server.logs()
        assert (await adjust(server, hold=True)).unchanged
        assert server.logs() == before
        assert not (await adjust(server, undo=held.id)).unchanged
        assert (await adjust(server, undo=held.id)).unchanged

    async def test_the_event_names_author_and_reason(self, server: Replica) -> None:
        await started(server)
        made = (await adjust(server, scale_lr=0.5)).adjustment
        event = (await server.call("ListEvents", run="small")).events[-1]
        assert (event.kind, event.progress, event.summary) == (
            "adjusted", 4, "LR x 0.5 from progress 4 on",
        )  # fmt: skip
        assert (event.author, event.reason) == (SIGNED["author"], SIGNED["reason"])
        assert list(event.adjustments) == [made]

    async def test_it_survives_a_restart_and_a_new_attempt(self, server: Replica) -> None:
        await started(server)
        made = (await adjust(server, scale_lr=0.5)).adjustment
        await server.restart()
        later = await server.open(progress=0)
        assert (await shown(server)).adjustments == [made]
        await later.report((0, 2.0), (1, 1.9))
        assert await later.rates(3) == [LR, LR * 0.5]


class TestRepeats:
    async def test_a_repeated_adjustment_gets_the_first_answer(self, server: Replica) -> None:
        job = await started(server)
        first = await adjust(server, scale_lr=0.5, request_id="once")
        await job.report((1, 1.9), (2, 1.8))
        before = server.logs()
        again = await adjust(server, scale_lr=0.5, request_id="once")
        assert (again.effective, again.unchanged) == (first.effective, False)
        assert again.adjustment == first.adjustment
        assert server.logs() == before

    async def test_also_once_the_plan_has_another_etag(self, server: Replica) -> None:
        await started(server)
        etag = (await shown(server)).etag
        first = await adjust(server, scale_lr=0.5, request_id="once", etag=etag)
        again = await adjust(server, scale_lr=0.5, request_id="once", etag=etag)
        assert again.adjustment == first.adjustment

    async def test_also_by_the_next_server(self, server: Replica) -> None:
        await started(server)
        first = await adjust(server, scale_lr=0.5, request_id="once")
        await server.restart()
        again = await adjust(server, scale_lr=0.5, request_id="once")
        assert (again.effective, again.adjustment) == (first.effective, first.adjustment)

    async def test_a_repeated_total(self, server: Replica) -> None:
        job = await started(server)
        first = await adjust(server, total=2000, request_id="once")
        await job.report((1, 1.9))
        before = server.logs()
        again = await adjust(server, total=2000, request_id="once")
        assert (again.effective, again.unchanged) == (first.effective, False)
        assert server.logs() == before

    async def test_a_repeated_approval(self, server: Replica) -> None:
        job, advice = await advised(server)
        first = await approve(server, advice.id, request_id="once")
        await job.report((2, 1.9), (3, 1.8))
        before = server.logs()
        again = await approve(server, advice.id, request_id="once")
        assert (again.effective, again.adjustment) == (first.effective, first.adjustment)
        assert server.logs() == before

    async def test_one_of_many_at_once_is_carried_out_once(self, server: Replica) -> None:
        await started(server)
        answers = await asyncio.gather(
            *(adjust(server, scale_lr=0.5, request_id="once") for _ in range(10))
        )
        assert len({answer.adjustment.id for answer in answers}) == 1
        assert len((await shown(server)).adjustments) == 1

    async def test_one_of_many_with_the_same_etag_wins(self, server: Replica) -> None:
        await started(server)
        etag = (await shown(server)).etag

        async def attempt() -> str:
            try:
                await adjust(server, scale_lr=0.5, etag=etag)
            except Exception as error:
                return str(error)
            return ""

        refusals = await asyncio.gather(*(attempt() for _ in range(10)))
        assert refusals.count("") == 1
        assert len((await shown(server)).adjustments) == 1


class TestDryRuns:
    @pytest.mark.parametrize(
        "action",
        [
            {"scale_lr": 0.5},
            {"set_lr": 1e-4},
            {"scale_weight_decay": 2.0},
            {"begin_decay": {"length": "100"}},
            {"total": 2000},
            {"hold": True},
            {"directive": {"kind": "stop"}},
        ],
    )
    async def test_it_shows_what_would_be_done_and_does_nothing(
        self, server: Replica, action: dict[str, Any]
    ) -> None:
        await started(server)
        before = server.logs()
        run = await shown(server)
        shown_first = await adjust(server, dry_run=True, request_id="", **action)
        assert server.logs() == before
        assert shown_first.run == run == await shown(server)
        done = await adjust(server, etag=run.etag, **action)
        assert done.effective == shown_first.effective
        assert done.adjustment == shown_first.adjustment
        assert done.preview == shown_first.preview
        assert done.changes == shown_first.changes

    async def test_an_approval(self, server: Replica) -> None:
        _, advice = await advised(server)
        before = server.logs()
        shown_first = await approve(server, advice.id, dry_run=True, request_id="")
        assert server.logs() == before
        done = await approve(server, advice.id)
        assert (done.adjustment, done.preview) == (shown_first.adjustment, shown_first.preview)

    async def test_a_revision(self, server: Replica) -> None:
        await started(server)
        before = server.logs()
        fields = server.feedback(delay=3) | {"learning_rate": {"peak": 5e-3}}
        revised = {"run": "small", "spec_document": server.document(**fields)}
        answer = await server.call("ReviseRun", **revised, dry_run=True)
        assert server.logs() == before
        assert (answer.effective, answer.unchanged) == (4, False)
        assert [(item.field, item.before, item.after) for item in answer.changes] == [
            ("learning_rate.peak", "0.001", "0.005")
        ]
        assert "peak: 0.001" in answer.run.spec_document
        assert {tuple(point.after) for point in answer.preview} == {(LR,), (5e-3,)}
        done = await server.call("ReviseRun", **revised, request_id="r", **SIGNED)
        assert (done.preview, done.changes) == (answer.preview, answer.changes)

    async def test_a_refusal(self, server: Replica) -> None:
        await started(server)
        refusal = await adjust_refused(server, dry_run=True, undo="nothing")
        assert refusal.reason == "AdjustmentNotFound"


class TestPreviews:
    async def test_it_goes_from_the_attempt_to_the_end_with_the_step_between(
        self, server: Replica
    ) -> None:
        rates = {"peak": 1e-3, "decay": {"style": "linear"}}
        job = await server.start_job(learning_rate=rates, **server.feedback(delay=3))
        await job.report((0, 2.0, 100))
        preview = (await adjust(server, scale_lr=0.5, dry_run=True)).preview
        progress = [point.progress for point in preview]
        assert progress == sorted(set(progress))
        assert (progress[0], progress[-1]) == (0, 1000)
        assert {102, 103} <= set(progress)
        # Every point is a value of the schedule, at the bit.
        schedule = core.base_schedule(
            core.parse_spec({"name": "small", "total": 1000, "learning_rate": rates})
        )
        for point in preview:
            ((lr, _),) = schedule(point.progress)
            assert list(point.before) == [lr]
            assert list(point.after) == [lr * 0.5 if point.progress >= 103 else lr]
            assert list(point.weight_decay_before) == list(point.weight_decay_after) == [WD]

    async def test_a_later_attempt(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        await job.report((0, 2.0, 500))
        await server.open(progress=400)
        preview = (await adjust(server, scale_lr=0.5, dry_run=True)).preview
        assert (preview[0].progress, preview[-1].progress) == (400, 1000)
        assert {402, 403} <= {point.progress for point in preview}

    async def test_a_longer_run(self, server: Replica) -> None:
        await started(server)
        preview = (await adjust(server, total=5000, dry_run=True)).preview
        assert preview[-1].progress == 5000

    async def test_what_was_handed_out_is_no_longer_planned_otherwise(
        self, server: Replica
    ) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        await job.report((0, 1.0), (1, 1.0))
        # The cut shows from 4 on. The next attempt forgets it, but not what it inherits.
        handed_out = await job.rates(0)
        assert handed_out == [LR] * 4 + [LR / 2]
        later = await server.open(progress=2)
        answer = await adjust(server, scale_lr=0.5, dry_run=True)
        by_progress = {point.progress: point for point in answer.preview}
        assert list(by_progress[4].before) == list(by_progress[4].after) == [LR / 2]
        assert answer.effective == 5
        assert (await later.rates(2))[2] == LR / 2

    async def test_no_weight_decay(self, server: Replica) -> None:
        await started(server, weight_decay=None)
        answer = await adjust(server, scale_lr=0.5, dry_run=True)
        assert not any(point.weight_decay_before for point in answer.preview)
        assert not answer.adjustment.weight_decay_before

    async def test_many_adjustments_leave_fewer_points(self, server: Replica) -> None:
        groups = [{"name": f"g{number}"} for number in range(20)]
        job = await server.start_job(groups=groups, **server.feedback(delay=1, eps=0.0))
        await job.report(*((n, 1.0) for n in range(300)))
        answer = await adjust(server, scale_lr=0.5, dry_run=True)
        # Every loss but the first one has cut.
        acting = [item for item in answer.run.adjustments if item.mode == "act"]
        assert len(acting) == 299
        progress = [point.progress for point in answer.preview]
        assert len(progress) == 400_000 // (2 * 20 * 301) + 2
        assert (progress[0], progress[-1]) == (0, 1000)
        assert {300, 301} <= set(progress)

    async def test_many_groups_still_fit_into_a_message(self, server: Replica) -> None:
        await server.attach()
        groups = [{"name": f"g{number}"} for number in range(2000)]
        revised = server.document(groups=groups)
        answer = await server.call("ReviseRun", run="small", spec_document=revised, dry_run=True)
        assert answer.ByteSize() < 1024 * 1024
        assert [len(point.after) for point in answer.preview] == [2000] * len(answer.preview)
        assert [len(point.before) for point in answer.preview] == [1] * len(answer.preview)


class TestRefusals:
    @pytest.mark.parametrize(
        ("action", "field"),
        [
            ({}, "action"),
            ({"hold": False}, "action"),
            ({"scale_lr": 0.0}, "scale_lr"),
            ({"scale_lr": -0.5}, "scale_lr"),
            ({"scale_lr": math.nan}, "scale_lr"),
            ({"scale_lr": math.inf}, "scale_lr"),
            ({"set_lr": 0.0}, "set_lr"),
            ({"scale_weight_decay": -1.0}, "scale_weight_decay"),
            ({"begin_decay": {"length": ""}}, "begin_decay.length"),
            ({"begin_decay": {"length": "0"}}, "begin_decay.length"),
            ({"begin_decay": {"length": "-3"}}, "begin_decay.length"),
            ({"begin_decay": {"length": "0%"}}, "begin_decay.length"),
            ({"begin_decay": {"length": "120%"}}, "begin_decay.length"),
            ({"begin_decay": {"length": "soon"}}, "begin_decay.length"),
            ({"begin_decay": {"length": "٣"}}, "begin_decay.length"),
            ({"begin_decay": {"length": "9" * 5000}}, "begin_decay.length"),
            ({"begin_decay": {"length": "9", "style": "steep"}}, "begin_decay.style"),
            ({"directive": {"kind": "sleep"}}, "directive.kind"),
            ({"directive": {"kind": "rollback"}}, "directive.before"),
            ({"directive": {"kind": "rollback", "before": 2}}, "directive.before"),
            ({"directive": {"kind": "rollback", "before": 1, "factor": 2}}, "directive.factor"),
            ({"directive": {"kind": "skip", "until": -1}}, "directive.until"),
        ],
    )
    async def test_an_action_that_is_none(
        self, server: Replica, action: dict[str, Any], field: str
    ) -> None:
        await started(server)
        refusal = await adjust_refused(server, **action)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == [field]

    @pytest.mark.parametrize(
        ("fields", "field"),
        [
            ({"reason": ""}, "reason"),
            ({"reason": " \n"}, "reason"),
            ({"reason": "x" * 1001}, "reason"),
            ({"author": ""}, "author"),
            ({"request_id": ""}, "request_id"),
            ({"run": ""}, "run"),
        ],
    )
    async def test_an_adjustment_that_is_not_signed(
        self, server: Replica, fields: dict[str, Any], field: str
    ) -> None:
        await started(server)
        refusal = await adjust_refused(server, scale_lr=0.5, **fields)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidRequest")
        assert list(refusal.fields) == [field]

    async def test_a_plan_that_changed_since_it_was_seen(self, server: Replica) -> None:
        job = await started(server)
        etag = (await shown(server)).etag
        await job.report((1, 1.9))
        assert (await shown(server)).etag == etag
        await job.report((2, 1.9))
        seen = (await shown(server)).etag
        assert seen != etag
        revised = server.document(total=2000, **server.feedback(delay=3))
        for refusal in (
            await adjust_refused(server, scale_lr=0.5, etag=etag),
            await adjust_refused(server, total=2000, etag=etag),
            await server.refused(
                "ReviseRun", run="small", spec_document=revised, request_id="r", etag=etag
            ),
        ):
            assert (refusal.code, refusal.reason) == ("ABORTED", "PlanChanged")
            assert refusal.facts == {"run": "small", "etag": seen, "given": etag}
        await adjust(server, scale_lr=0.5, etag=seen)

    @pytest.mark.parametrize(
        ("action", "fields", "text"),
        [
            ({"scale_weight_decay": 0.5}, {"weight_decay": None}, "sets no weight decay"),
            ({"next_stage": True}, {}, "it has no stages"),
            (
                {"set_lr": 1e-4},
                {"learning_rate": {"peak": 0.0}},
                "the LR of the first group is 0.0 at progress 4",
            ),
        ],
    )
    async def test_what_the_run_cannot_do(
        self, server: Replica, action: dict[str, Any], fields: dict[str, Any], text: str
    ) -> None:
        await started(server, **fields)
        refusal = await adjust_refused(server, **action)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AdjustmentRefused")
        assert text in refusal.text
        assert refusal.facts == {"run": "small", "horizon": "4"}

    async def test_a_second_anneal_says_how_to_take_the_first_back(self, server: Replica) -> None:
        await started(server)
        first = (await adjust(server, begin_decay={"length": "100"})).adjustment
        refusal = await adjust_refused(server, begin_decay={"length": "50"})
        assert refusal.reason == "AdjustmentRefused"
        assert refusal.text.endswith(f"take it back first (undo {first.id})")

    async def test_the_last_stage(self, server: Replica) -> None:
        fields = {"stages": STAGES, "learning_rate": None, "weight_decay": None}
        await started(server, **fields)
        await adjust(server, next_stage=True)
        refusal = await adjust_refused(server, next_stage=True)
        assert refusal.reason == "AdjustmentRefused"
        assert "stage 'second' is the last one" in refusal.text

    async def test_what_cannot_be_taken_back(self, server: Replica) -> None:
        await started(server)
        asked = (await adjust(server, directive={"kind": "evaluate"})).adjustment
        refusal = await adjust_refused(server, undo=asked.id)
        assert refusal.reason == "AdjustmentRefused"
        assert "is of the kind 'directive'" in refusal.text

    async def test_a_directive_without_an_attempt(self, server: Replica) -> None:
        await server.attach()
        refusal = await adjust_refused(server, directive={"kind": "stop"})
        assert refusal.reason == "AdjustmentRefused"
        assert "nobody to ask" in refusal.text

    @pytest.mark.parametrize("name", ["", "9-9-3000"])
    async def test_an_adjustment_that_is_not_there(self, server: Replica, name: str) -> None:
        await started(server)
        refusal = await adjust_refused(server, undo=name)
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "AdjustmentNotFound")
        assert refusal.facts == {"run": "small", "id": name}

    async def test_a_total_in_the_past(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        await job.report((0, 2.0, 500))
        refusal = await adjust_refused(server, total=502)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "InvalidSpec")
        assert refusal.fields == {"total": "got 502; allowed: at least the horizon, 503"}

    async def test_an_unknown_run(self, server: Replica) -> None:
        for refusal in (
            await adjust_refused(server, scale_lr=0.5),
            await approve_refused(server, "1-1-0"),
        ):
            assert (refusal.code, refusal.reason) == ("NOT_FOUND", "RunNotFound")

    async def test_a_finished_run(self, server: Replica) -> None:
        _, advice = await advised(server)
        await server.call("FinishRun", run="small", force=True, request_id="f")
        for refusal in (
            await adjust_refused(server, scale_lr=0.5),
            await adjust_refused(server, scale_lr=0.5, dry_run=True),
            await adjust_refused(server, total=2000),
            await approve_refused(server, advice.id),
        ):
            assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "RunFinished")


class TestApproveAdvice:
    async def test_it_becomes_an_adjustment_at_the_horizon(self, server: Replica) -> None:
        job, advice = await advised(server)
        assert (advice.status, advice.effective, advice.expires) == ("advice", 10, 30)
        answer = await approve(server, advice.id, reason="seen it too")
        made = answer.adjustment
        assert (answer.effective, made.effective, made.summary) == (9, 9, "LR x 0.5")
        assert (made.source, made.author) == ("operator", "oncall@node-7")
        assert made.reason == f"{advice.reason}; approved: seen it too"
        assert (list(made.before), list(made.after)) == ([LR], [LR * 0.5])
        await job.values(0, in_use=3)
        assert await job.rates(8) == [LR] + [LR * 0.5] * 3
        by_id = {item.id: item.status for item in (await shown(server)).adjustments}
        assert by_id == {advice.id: "approved", made.id: "planned"}
        event = (await server.call("ListEvents", run="small")).events
        adjusted = next(item for item in event if item.kind == "adjusted")
        assert adjusted.summary == (f"LR x 0.5 from progress 9 on (approves advice {advice.id})")

    async def test_without_a_reason_that_of_the_advice_stands(self, server: Replica) -> None:
        _, advice = await advised(server)
        assert (await approve(server, advice.id)).adjustment.reason == advice.reason

    async def test_only_once(self, server: Replica) -> None:
        _, advice = await advised(server)
        made = (await approve(server, advice.id)).adjustment
        refusal = await approve_refused(server, advice.id)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AdviceExpired")
        assert refusal.text.endswith(f"it was approved already, as adjustment {made.id}")

    async def test_up_to_where_it_expires(self, server: Replica) -> None:
        job, advice = await advised(server)
        await job.values(0, in_use=20)
        assert (await shown(server)).horizon == 29
        assert (await approve(server, advice.id, dry_run=True)).effective == 29
        await job.values(29, in_use=21)
        refusal = await approve_refused(server, advice.id)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AdviceExpired")
        assert refusal.facts == {
            "run": "small", "id": advice.id, "horizon": "30", "expires": "30",
        }  # fmt: skip
        assert [item.status for item in (await shown(server)).adjustments] == ["expired"]

    async def test_what_was_forgotten(self, server: Replica) -> None:
        _, advice = await advised(server)
        await server.open(progress=1)
        refusal = await approve_refused(server, advice.id)
        assert refusal.reason == "AdviceExpired"
        assert "forgotten" in refusal.text

    async def test_what_is_no_advice(self, server: Replica) -> None:
        await advised(server)
        made = (await adjust(server, scale_lr=0.5)).adjustment
        refusal = await approve_refused(server, made.id)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "AdjustmentRefused")

    @pytest.mark.parametrize(
        ("fields", "reason", "field"),
        [
            ({"author": ""}, "InvalidRequest", "author"),
            ({"request_id": ""}, "InvalidRequest", "request_id"),
        ],
    )
    async def test_an_approval_that_is_not_signed(
        self, server: Replica, fields: dict[str, Any], reason: str, field: str
    ) -> None:
        _, advice = await advised(server)
        refusal = await approve_refused(server, advice.id, **fields)
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
        assert list(refusal.fields) == [field]

    async def test_an_advice_that_is_not_there(self, server: Replica) -> None:
        await advised(server)
        refusal = await approve_refused(server, "9-9-9")
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "AdjustmentNotFound")
        refusal = await approve_refused(server, "")
        assert list(refusal.fields) == ["advice"]

    async def test_a_plan_that_changed_since_it_was_seen(self, server: Replica) -> None:
        _, advice = await advised(server)
        etag = (await shown(server)).etag
        await adjust(server, scale_lr=0.5)
        refusal = await approve_refused(server, advice.id, etag=etag)
        assert (refusal.code, refusal.reason) == ("ABORTED", "PlanChanged")


class TestReplicas:
    @pytest.fixture
    async def other(self, server: Replica) -> AsyncIterator[Replica]:
        """A second server over the same store."""
        replica = type(server)(server.store)
        await replica.start()
        yield replica
        await replica.stop()

    async def test_one_that_lags_shows_and_does_what_holds_now(
        self, server: Replica, other: Replica
    ) -> None:
        job = await started(server)
        assert (await shown(other)).horizon == 4
        first = (await adjust(server, scale_lr=0.5)).adjustment
        await job.report((1, 1.9))
        preview = await adjust(other, scale_lr=0.5, dry_run=True)
        assert (preview.effective, list(preview.adjustment.before)) == (5, [LR * 0.5])
        assert preview.run.etag == (await shown(server)).etag
        await job.report((2, 1.8))
        done = await adjust(other, scale_lr=0.5)
        assert (done.effective, list(done.adjustment.after)) == (6, [LR * 0.5 * 0.5])
        assert [item.id for item in done.run.adjustments] == [first.id, done.adjustment.id]

    async def test_one_that_lags_answers_a_repeat(self, server: Replica, other: Replica) -> None:
        await started(server)
        await shown(other)
        first = await adjust(server, scale_lr=0.5, request_id="once")
        again = await adjust(other, scale_lr=0.5, request_id="once")
        assert (again.effective, again.adjustment) == (first.effective, first.adjustment)
        assert len(server.store.read("small")) == 4

    async def test_one_that_lags_refuses_a_plan_that_changed(
        self, server: Replica, other: Replica
    ) -> None:
        await started(server)
        etag = (await shown(other)).etag
        await adjust(server, scale_lr=0.5)
        refusal = await adjust_refused(other, scale_lr=0.5, etag=etag)
        assert (refusal.code, refusal.reason) == ("ABORTED", "PlanChanged")


class TestTheLogShownToPeople:
    async def test_several_reporters_are_told_apart(self, server: Replica) -> None:
        await server.attach(**server.feedback(delay=3))
        declared: dict[str, Any] = {"key": "k", "reporters": [0, 4]}
        first = await server.open(rank=0, **declared)
        second = await server.open(rank=4, **declared)
        await first.report((0, 2.0))
        await second.report((0, 4.0))
        assert (await shown(server)).loss == 3.0
        events = (await server.call("ListEvents", run="small")).events
        assert [event.summary for event in events][-3:] == [
            "rank 4 joined as a reporter",
            "rank 0 reported progress 0, moved to 1",
            "rank 4 reported progress 0, moved to 1",
        ]

    async def test_skipped_updates_and_validation_losses(self, server: Replica) -> None:
        job = await server.start_job(**server.feedback(delay=3))
        second_try: dict[str, Any] = {"try": 1, "validation_losses": {"held_out": 2.5}}
        reports = [
            trainer_pb2.LossReport(progress=0, loss=math.nan, moves_to=0, skipped=True),
            trainer_pb2.LossReport(progress=0, loss=2.0, moves_to=1, **second_try),
        ]
        await server.call("ReportLosses", **job.report_fields() | {"reports": reports})
        run = await shown(server)
        assert (run.skipped, dict(run.validation_losses), run.loss) == (1, {"held_out": 2.5}, 2.0)
        losses = (await server.call("ListEvents", run="small")).events[-1].losses
        assert [item.skipped for item in losses] == [True, False]
        assert [dict(item.validation_losses) for item in losses] == [{}, {"held_out": 2.5}]


def test_what_takes_the_place_of_an_earlier_change_is_shown_without_it() -> None:
    follows = {"kind": "batch-size", "reference": 256, "mode": "advise"}
    log = Log(policies=[follows, {**PLATEAU, "patience": 1000}], feedback={"delay": 1})
    log.open()
    shown = []
    for at, batch in enumerate([512, 1024]):
        report = core.Report(at, 1.0, 1.0, at + 1, batch=batch)
        events, _ = core.report_losses(log.state, [report], rank=0, incarnation="one")
        log.write(events)
        signed = {"reason": "yes", "author": "oncall@node-7", "request_id": f"at {at}"}
        events = core.approve_advice(log.state, log.state.advice[-1].id, **signed)
        change = shown_change(LiveRun("run"), log.state, events)
        assert change.adjustment is not None
        shown.append((list(change.adjustment.before), list(change.adjustment.after)))
        log.write(events)
        made = log.state.plan.find(change.adjustment.id)
        assert made is not None
        assert (list(made.before), list(made.after)) == shown[-1]
    # The factor of 512 ends where that of 1024 begins.
    assert shown == [([1.0], [2.0**0.5]), ([1.0], [2.0])]
