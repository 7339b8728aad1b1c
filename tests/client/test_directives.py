"""What the server asks at one step: met once, handled there, acknowledged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]

KINDS: dict[Any, Any] = {
    "rollback": pb.DIRECTIVE_KIND_ROLLBACK,
    "skip": pb.DIRECTIVE_KIND_SKIP,
    "evaluate": pb.DIRECTIVE_KIND_EVALUATE,
    "stop": pb.DIRECTIVE_KIND_STOP,
}


def asked(name: str, kind: str, progress: int, **fields: Any) -> pb.Directive:
    return pb.Directive(
        id=name, kind=KINDS[kind], progress=progress, reason=f"for {name}", **fields
    )


def acknowledged(trainer: FakeTrainer) -> list[tuple[str, str, int, str]]:
    return [
        (
            request.directive,
            pb.DirectiveOutcome.Name(request.outcome).removeprefix("DIRECTIVE_OUTCOME_"),
            request.progress,
            request.detail,
        )
        for request in trainer.calls["AcknowledgeDirective"]
    ]


def test_a_directive_is_met_at_its_step_after_the_values_were_written(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.directives = [asked("d1", "evaluate", 5)]
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    met: list[Any] = []

    @pilot.on_directive("evaluate")
    def evaluate(directive: lrpilot.Directive) -> None:
        met.append((directive, scheduler.progress, optimizer.rates, threading.current_thread()))

    for at in range(1, 12):
        scheduler.step(loss=1.0)
        assert len(met) == (at >= 5)
    scheduler.apply()
    (directive, progress, rates, thread), *others = met
    assert directive == lrpilot.Directive("d1", "evaluate", 5, "for d1")
    assert (progress, rates, thread) == (5, [trainer.rate(5)], threading.main_thread())
    assert others == []
    assert acknowledged(trainer) == [("d1", "DONE", 5, "")]
    (request,) = trainer.calls["AcknowledgeDirective"]
    assert (request.run, request.rank, request.attempt.number) == ("small", 0, 1)


def test_every_field_arrives(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.directives = [asked("d1", "rollback", 2, before=1, until=9, factor=0.5)]
    pilot = connect()
    met: list[lrpilot.Directive] = []
    pilot.on_directive("rollback", met.append)
    pilot.values(2)
    assert met == [lrpilot.Directive("d1", "rollback", 2, "for d1", 1, 9, 0.5)]


def test_one_between_two_used_progresses_is_met_at_the_second(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.unit, trainer.delay = "samples", 512
    trainer.directives = [asked("d1", "stop", 100), asked("d2", "evaluate", 65)]
    pilot = connect()
    met: list[tuple[str, int]] = []
    scheduler = pilot.scheduler(optimizer)

    def note(directive: lrpilot.Directive) -> None:
        met.append((directive.id, scheduler.progress))

    pilot.on_directive("stop", note)
    pilot.on_directive("evaluate", note)
    for _ in range(4):
        scheduler.step(64, loss=1.0)
    # In order of progress.
    assert met == [("d2", 128), ("d1", 128)]


def test_values_by_hand_meet_directives(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.directives = [asked("d1", "skip", 3, until=7)]
    pilot = connect()
    met: list[lrpilot.Directive] = []
    assert pilot.on_directive("skip", met.append) == met.append
    for at in range(3):
        pilot.values(at)
        pilot.report(at, 1.0)
    assert met == []
    assert pilot.values(3) == ((trainer.rate(3), trainer.decay(3)),)
    assert met == [lrpilot.Directive("d1", "skip", 3, "for d1", until=7)]


def test_several_schedulers_meet_a_directive_once_all_have_arrived(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    trainer.directives = [asked("d1", "stop", 2)]
    pilot = connect()
    first, second = (pilot.scheduler(make_optimizer()) for _ in range(2))
    met: list[str] = []
    pilot.on_directive("stop", lambda item: met.append(item.id))
    for _ in range(2):
        first.step(loss=1.0)
        assert met == []
        second.step()
    assert met == ["d1"]


def test_without_a_handler_it_is_spoken_of_and_training_goes_on(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.directives = [asked("d1", "rollback", 3, before=1)]
    scheduler = connect().scheduler(optimizer)
    with caplog.at_level(logging.WARNING, "lrpilot.client"):
        for _ in range(10):
            scheduler.step(loss=1.0)
    assert caplog.messages == [
        "run small: directive d1, due at progress 3, asks for rollback (for d1). No handler is "
        "registered for it: training goes on unchanged"
    ]
    assert scheduler.progress == 10
    assert acknowledged(trainer) == [("d1", "UNHANDLED", 3, "")]


def test_a_kind_of_a_newer_server_stays_an_alert(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.directives = [asked("d1", "stop", 1)]
    trainer.directives[0].kind = 99  # type: ignore[assignment]
    connect().values(1)
    assert acknowledged(trainer) == [("d1", "UNHANDLED", 1, "")]


def test_what_a_handler_raises_reaches_the_loop_after_the_acknowledgement(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.directives = [asked("d1", "stop", 2), asked("d2", "evaluate", 2)]
    pilot = connect()
    met: list[str] = []

    @pilot.on_directive("stop")
    def stop(directive: lrpilot.Directive) -> None:
        raise ZeroDivisionError("over")

    pilot.on_directive("evaluate", lambda item: met.append(item.id))
    scheduler = pilot.scheduler(optimizer)
    scheduler.step(loss=1.0)
    with pytest.raises(ZeroDivisionError, match="over"):
        scheduler.step(loss=1.0)
    assert acknowledged(trainer) == [("d1", "FAILED", 2, "ZeroDivisionError: over")]
    # Who catches it goes on, and what else is due comes at the next step.
    assert (scheduler.progress, met) == (2, [])
    scheduler.step(loss=1.0)
    assert met == ["d2"]


def test_a_handler_may_decline_and_training_goes_on(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.directives = [asked("d1", "skip", 2)]
    pilot = connect()

    @pilot.on_directive("skip")
    def skip(directive: lrpilot.Directive) -> None:
        raise lrpilot.DirectiveDeclined("the data cannot be passed over")

    scheduler = pilot.scheduler(optimizer)
    for _ in range(4):
        scheduler.step(loss=1.0)
    assert scheduler.progress == 4
    assert acknowledged(trainer) == [("d1", "FAILED", 2, "the data cannot be passed over")]
    assert "which was not done: the data cannot be passed over. Training goes on" in caplog.text


def test_other_ranks_handle_it_and_the_first_reporter_acknowledges(
    trainer: FakeTrainer, connect: Connect
) -> None:
    trainer.directives = [asked("d1", "stop", 1)]
    met: list[int] = []

    def met_on(rank: int) -> Callable[[lrpilot.Directive], None]:
        return lambda _: met.append(rank)

    for rank in range(3):
        pilot = connect(rank=rank, world_size=3, key="k", reporter=[2, 1])
        pilot.on_directive("stop", met_on(rank))
        pilot.values(1)
    assert met == [0, 1, 2]
    assert [request.rank for request in trainer.calls["AcknowledgeDirective"]] == [2]


def test_an_acknowledgement_is_repeated_and_then_given_up(
    trainer: FakeTrainer,
    connect: Connect,
    fault: type[Fault],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.directives = [asked("d1", "stop", 1), asked("d2", "stop", 2)]
    trainer.fail("AcknowledgeDirective", fault(), times=3)
    pilot = connect()
    pilot.on_directive("stop", lambda _: None)
    pilot.values(1)
    assert len(trainer.calls["AcknowledgeDirective"]) == 4
    assert "could not be acknowledged" not in caplog.text
    monkeypatch.setattr(_timing, "ACKNOWLEDGE_PATIENCE_S", 0.2)
    trainer.always["AcknowledgeDirective"] = fault()
    pilot.values(2)
    assert "directive d2 could not be acknowledged: run 'small': rank 0 acknowledges" in caplog.text
    pilot.close()


def test_a_refused_acknowledgement_does_not_end_the_training(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.directives = [asked("d1", "stop", 1)]
    trainer.fail(
        "AcknowledgeDirective", refuse("AdjustmentNotFound", "no d1", grpc.StatusCode.NOT_FOUND)
    )
    pilot = connect()
    pilot.values(1)
    pilot.values(2)
    assert "directive d1 could not be acknowledged: no d1" in caplog.text


def test_a_handler_may_use_the_pilot(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.directives = [asked("d1", "evaluate", 2), asked("d2", "stop", 2)]
    pilot = connect()
    met: list[str] = []

    @pilot.on_directive("evaluate")
    def evaluate(directive: lrpilot.Directive) -> None:
        pilot.report_validation("val", 3.0)
        scheduler.apply()
        pilot.values(2)
        met.append(directive.id)

    pilot.on_directive("stop", lambda item: met.append(item.id))
    scheduler = pilot.scheduler(optimizer)
    for _ in range(3):
        scheduler.step(loss=1.0)
    pilot.close()
    assert met == ["d1", "d2"]
    assert dict(trainer.reports[2].validation_losses) == {"val": 3.0}


def test_wrong_handlers_are_refused(connect: Connect) -> None:
    pilot = connect()
    wrong: Any = "restart"
    with pytest.raises(lrpilot.InvalidArgument, match="kind: got 'restart'; allowed: 'rollback'"):
        pilot.on_directive(wrong, print)
    wrong = 3
    with pytest.raises(lrpilot.InvalidArgument, match="handler: got 3; allowed: a function"):
        pilot.on_directive("stop", wrong)
    pilot.on_directive("stop", print)
    with pytest.raises(lrpilot.InvalidArgument, match=r"'stop', which has .*print.* already"):
        pilot.on_directive("stop")(repr)
