"""Leader mode over a real gRPC connection: the holder, what it is offered, and what it declares."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import generate_latest

from lrpilot import core
from lrpilot.server._trainer_messages import MAX_CHANGES_BYTES, change_messages
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.server.conftest import Job, Replica

LR = 1e-3
"""The LR of `document` where nothing was adjusted."""

MIB = 1024 * 1024
LATE = pb.REPORT_OUTCOME_LATE


async def lead(server: Replica, **fields: Any) -> Job:
    """Create a run with D = 4 and open an attempt of it in leader mode."""
    await server.attach(**{**server.feedback(delay=4), **fields})
    return await server.open(leader=True)


def held(job: Job) -> dict[str, Any]:
    """Return the fields that a request of the holder carries."""
    return job.identity | {"holder": job.opened.holder}


async def values(job: Job, begin: int, **fields: Any) -> Any:
    return await job.values(begin, **{"holder": job.opened.holder, **fields})


async def offer(job: Job, begin: int, count: int = 40, **fields: Any) -> Any:
    wanted = {"begin": begin, "stride": 1, "count": count, **fields}
    return await job.client.call("OfferValues", **held(job), **wanted)


def block(begin: int, rates: Sequence[float]) -> pb.Block:
    decays = [0.1] * len(rates)
    return pb.Block(begin=begin, stride=1, learning_rates=rates, weight_decays=decays)


async def declare(job: Job, *blocks: pb.Block, **fields: Any) -> Any:
    return await job.client.call("DeclareValues", **held(job), blocks=blocks, **fields)


async def adjust(job: Job, **fields: Any) -> Any:
    request = {"request_id": job.client.fresh("adjust"), "reason": "why", "author": "me", **fields}
    return await job.client.call("AdjustRun", run=job.run, **request)


async def test_the_one_who_opens_is_the_holder(server: Replica) -> None:
    await server.attach(**server.feedback())
    fields = {"run": "small", "request_id": "same", "incarnation": "one", "leader": True}
    first = await server.call("OpenAttempt", **fields)
    assert len(first.holder) == 16
    assert first.holder != first.attempt.token
    # A repeat gets it again, for its answer may be lost.
    assert await server.call("OpenAttempt", **fields) == first
    independent = await server.open(progress=0)
    assert independent.opened.holder == b""
    refusal = await server.refused(
        "OpenAttempt", **{**fields, "request_id": "key", "key": "shared", "progress": 0}
    )
    assert (refusal.code, set(refusal.fields)) == ("INVALID_ARGUMENT", {"key"})


async def test_other_ranks_get_no_values(server: Replica) -> None:
    job = await lead(server)
    for holder in (b"", job.opened.attempt.token):
        refusal = await job.refused_values(0, holder=holder)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NotHolder")
        for method, fields in (
            ("OfferValues", {"begin": 0, "stride": 1, "count": 1}),
            ("DeclareValues", {"blocks": [block(0, [LR])]}),
        ):
            refusal = await server.refused(method, **job.identity, holder=holder, **fields)
            assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NotHolder")
    # Reports and states are everybody's.
    await job.report((0, 1.0))
    await job.save(1)
    independent = await server.open(progress=0)
    refusal = await server.refused(
        "OfferValues", **independent.identity, begin=0, stride=1, count=1
    )
    assert refusal.reason == "NotHolder"
    refusal = await server.refused("OfferValues", **held(job), begin=0, stride=1, count=1)
    assert refusal.reason == "AttemptSuperseded"
    refusal = await server.refused("DeclareValues", **held(job), blocks=[block(0, [LR])])
    assert refusal.reason == "AttemptSuperseded"


async def test_a_job_goes_on_alone_and_says_so(
    server: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lrpilot.server")
    job = await lead(server)
    await values(job, 0)
    offered = await offer(job, 2)
    assert list(offered.block.learning_rates) == [LR] * 40
    assert (offered.permitted, offered.plan) == (42, (await values(job, 0)).plan)
    shown = await job.shown()
    assert (shown.leader, shown.permitted, shown.declared_steps) == (True, 42, 0)
    assert not shown.HasField("declaration")
    await offer(job, 10)
    # These are recorded, and never arrive.
    await job.report(*((at, 1.0) for at in range(6)))
    lost = await values(job, 4)
    assert list(lost.block.learning_rates) == [LR, LR / 2, LR / 2, LR / 2, LR / 2, LR / 4]
    adjusted = await adjust(job, scale_lr=0.5)
    assert (adjusted.effective, adjusted.pending) == (10, True)
    answer = await declare(job, block(4, [LR] * 7), offer=offered.offer)
    assert (answer.frontier, answer.horizon) == (7, 11)
    assert await declare(job, block(4, [LR] * 7), offer=offered.offer) == answer
    # The very block that had been recorded and sent otherwise.
    assert list((await values(job, 4, count=6)).block.learning_rates) == [LR] * 6
    assert (await job.report((6, 1.0))).outcomes == [LATE]
    await job.report((7, 1.0), (8, 1.0))
    assert list((await values(job, 11)).block.learning_rates) == [LR / 2, LR / 4]
    shown = await job.shown()
    assert (shown.declared_steps, shown.waivers, shown.late_losses) == (7, 1, 7)
    last = shown.declaration
    assert (last.begin, last.end, last.steps) == (4, 11, 7)
    texts = [record.getMessage() for record in caplog.records]
    assert [text for text in texts if "may go on alone" in text] == [
        "attempt 1 may go on alone below progress 42, and is offered more as it gets there"
    ]
    assert [item.getMessage() for item in caplog.records if item.levelname == "WARNING"] == [
        "the job went on alone from progress 4 to 10, 7 steps: these values are facts; losses that "
        "would have acted there are final as absent, 6 of them had come, and what operators "
        "changed meanwhile takes effect from 11 on"
    ]
    history = (await server.call("ListEvents", run="small")).events
    told = {item.kind: (item.progress, item.summary) for item in history}
    assert told["opened"][1] == "attempt 1 opened at progress 0, in leader mode"
    assert told["permitted"] == (50, "the job may go on alone from progress 4 up to 49")
    assert told["declared"] == (
        4,
        "the job went on alone from progress 4 to 10, 7 steps: losses that would have acted there "
        "waived, what operators changed moved to 11",
    )
    # On a thread, as a scrape is: it asks this event loop for the runs.
    scrape = (await asyncio.to_thread(generate_latest, server.metrics.registry)).decode()
    assert 'lrpilot_run_declared_steps_total{run="small"} 7.0' in scrape


async def test_what_operators_do_says_that_it_may_show_later(server: Replica) -> None:
    job = await lead(server)
    fields = {"run": "small", "reason": "why", "author": "me", "dry_run": True}
    # Nothing is permitted yet: it shows where it lands.
    assert not (await server.call("AdjustRun", **fields, scale_lr=0.5)).pending
    await offer(job, 0)
    assert (await server.call("AdjustRun", **fields, scale_lr=0.5)).pending
    assert not (await server.call("AdjustRun", **fields, scale_lr=1.0)).pending
    document = server.document(**server.feedback(delay=4), total=2000)
    revised = {"run": "small", "spec_document": document, "request_id": "revise"}
    assert (await server.call("ReviseRun", **revised)).pending
    made = {**fields, "dry_run": False, "request_id": "adjust", "scale_lr": 0.5}
    first = await server.call("AdjustRun", **made)
    assert first.pending
    again = await server.call("AdjustRun", **made)
    assert (again.pending, again.effective) == (True, first.effective)
    await server.open(progress=0)
    assert not (await server.call("AdjustRun", **fields, scale_lr=0.5)).pending


async def test_an_approved_advice_says_so_too(server: Replica) -> None:
    quiet = {"kind": "plateau", "patience": 99}
    advises = {"kind": "plateau", "patience": 0, "mode": "advise"}
    job = await lead(server, policies=[quiet, advises])
    await offer(job, 0)
    await job.report((0, 1.0), (1, 1.0))
    (advice,) = [item for item in (await job.shown()).adjustments if item.mode == "advise"]
    answer = await server.call(
        "ApproveAdvice", run="small", advice=advice.id, author="me", request_id="approve"
    )
    assert (answer.effective, answer.pending) == (6, True)


async def test_refusals_of_a_declaration(server: Replica) -> None:
    job = await lead(server)
    refused = {**held(job), "blocks": [block(0, [LR])]}
    refusal = await server.refused("DeclareValues", **refused)
    assert (refusal.code, refusal.reason) == ("OUT_OF_RANGE", "BeyondPermit")
    assert refusal.facts["permitted"] == "0"
    offered = await offer(job, 0)
    await declare(job, block(0, [LR]), offer=offered.offer)
    refused["blocks"] = [block(0, [LR / 2])]
    refusal = await server.refused("DeclareValues", **refused)
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "ValuesConflict")
    assert refusal.facts["progress"] == "0"
    refused["blocks"] = [pb.Block(begin=1, stride=1, learning_rates=[LR])]
    refusal = await server.refused("DeclareValues", **refused)
    assert (refusal.code, set(refusal.fields)) == ("INVALID_ARGUMENT", {"blocks.0.weight_decays"})


async def test_a_blocked_holder_waits_without_a_waiver(server: Replica) -> None:
    fields = server.feedback(delay=4, timeout="1ms")
    job = await lead(server, **fields)
    answer = await values(job, 4, blocked=True, wait_ms=50)
    assert not answer.HasField("block")
    assert (await job.shown()).waivers == 0
    waiting = asyncio.create_task(values(job, 4, blocked=True, wait_ms=30_000))
    await job.report((0, 1.0))
    assert list((await waiting).block.learning_rates) == [LR]


async def test_an_offer_fits_into_a_message(server: Replica) -> None:
    groups = [{"name": f"group {at}"} for at in range(60)]
    job = await lead(server, groups=groups)
    answer = await offer(job, 0, core.MAX_OFFERED_STEPS)
    steps = len(answer.block.learning_rates) // 60
    assert 500 < steps < core.MAX_OFFERED_STEPS
    assert answer.permitted == steps
    assert answer.ByteSize() < MIB


async def test_nobody_waits_while_an_offer_is_worked_out(
    server: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await lead(server)
    begun, goes_on = threading.Event(), threading.Event()
    work = core.Offer.block

    def slow(self: core.Offer) -> core.Block:
        begun.set()
        assert goes_on.wait(30)
        return work(self)

    monkeypatch.setattr(core.Offer, "block", slow)
    offered = asyncio.create_task(offer(job, 0))
    assert await asyncio.to_thread(begun.wait, 30)
    # Meanwhile the plan changes, and the offer is of the one before.
    await job.report((0, 1.0), (1, 1.0))
    changed = (await values(job, 0)).plan
    goes_on.set()
    answer = await offered
    assert list(answer.block.learning_rates) == [LR] * 40
    assert answer.plan != changed
    assert list((await offer(job, 0)).block.learning_rates) == [LR] * 5 + [LR / 2] * 35


async def test_an_answer_names_the_plan_and_on_request_its_changes(server: Replica) -> None:
    job = await server.start_job(**server.feedback(delay=4))
    await job.report((0, 1.0), (1, 1.0))
    first = await job.values(0, explain=True)
    (change,) = first.changes
    assert (change.progress, change.source, change.summary) == (5, "policies.0 (plateau)",
                                                                "LR x 0.5")  # fmt: skip
    assert change.reason.startswith("loss 1: none below 1")
    assert (list(change.before), list(change.after)) == ([LR], [LR / 2])
    assert (list(change.weight_decay_before), list(change.weight_decay_after)) == ([0.1], [0.1])
    assert list((await job.values(0)).changes) == []
    assert list((await job.values(0, count=5, explain=True)).changes) == []
    # A stride may step over where it takes effect: then it shows at the first step behind.
    assert [
        item.id for item in (await job.values(4, stride=2, count=1, explain=True)).changes
    ] == []
    await job.report((2, 0.5), (3, 0.4), (4, 0.3), (5, 0.2))
    assert [item.id for item in (await job.values(6, stride=2, count=1, explain=True)).changes] == [
        change.id
    ]
    assert [item.id for item in (await job.values(6, count=1, explain=True)).changes] == []
    await adjust(job, directive={"kind": "evaluate"})
    plan = (await job.values(0)).plan
    assert first.plan
    await adjust(job, scale_lr=0.5)
    assert (await job.values(0)).plan not in (plan, first.plan)
    await job.report((6, 0.1))
    named = (await job.values(7, explain=True)).changes
    assert [(item.progress, item.source) for item in named] == [(10, "operator")]


async def test_a_state_comes_with_what_is_in_force(server: Replica) -> None:
    job = await server.start_job(**server.feedback(delay=4))
    await job.report(*((at, 1.0 / (1 + at)) for at in range(3)))
    await adjust(job, scale_lr=0.5)
    await job.report(*((at, 1.0 / (1 + at)) for at in range(3, 9)))

    async def in_force(progress: int) -> list[tuple[int, str]]:
        answer = await server.call("SaveState", **job.identity, progress=progress)
        assert answer.state
        return [(item.progress, item.summary) for item in answer.in_force]

    assert await in_force(6) == []
    assert await in_force(7) == [(7, "LR x 0.5")]
    assert await in_force(7) == [(7, "LR x 0.5")]


def test_of_many_changes_the_newest_are_named() -> None:
    spec = core.parse_spec(
        {
            "name": "small", "total": 10_000, "learning_rate": {"peak": 1.0},
            "policies": [{"kind": "plateau", "patience": 0, "factor": 0.999, "eps": 0.0}],
            "groups": [{"name": str(at)} for at in range(100)], "feedback": {"delay": 1},
        }
    )  # fmt: skip
    state = core.RunState("small")
    for item in core.create_run(state, spec, "create"):
        state.apply(item)
    for item in core.open_attempt(state, core.OpenRequest(request_id="open", token="a")):
        state.apply(item)
    reports = [core.Report(at, 1.0, 1.0, at + 1) for at in range(400)]
    for item in core.report_losses(state, reports, rank=0, incarnation="one")[0]:
        state.apply(item)
    changes = state.plan.changes(0, 400)
    named = change_messages(changes)
    assert 0 < len(named) < len(changes)
    assert [item.id for item in named] == [item.id for item in changes[-len(named) :]]
    assert sum(item.ByteSize() for item in named) <= MAX_CHANGES_BYTES


async def test_the_state_of_a_lost_run_opens_in_leader_mode(server: Replica) -> None:
    job = await lead(server)
    offered = await offer(job, 0)
    await declare(job, block(0, [LR] * 6), offer=offered.offer)
    await job.report(*((at, 1.0) for at in range(6)))
    state = await job.save(5)
    await server.call("DeleteRun", run="small", force=True)
    again = await server.open(state=state, leader=True)
    assert (again.opened.restored, len(again.opened.holder), again.opened.begin) == (True, 16, 5)
    # What was declared at 5, and from 6 on the plan: losses from 2 on count, and 3 is no better.
    assert list((await values(again, 5)).block.learning_rates) == [LR]
    assert list((await values(again, 6)).block.learning_rates) == [LR, LR / 2, LR / 2]
    assert (await again.shown()).permitted == 0
