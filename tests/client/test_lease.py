"""Values ahead of the training, and waiting for those that are not fixed."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import grpc
import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _call, _lease, _timing
from lrpilot.v1 import trainer_pb2 as pb
from tests.side_by_side import finish, in_thread

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]


ANOTHER_RANK: dict[str, Any] = {"rank": 1, "world_size": 2, "key": "this start"}
"""One that does not report, and can only wait for who does."""


def blocked(trainer: FakeTrainer) -> list[Any]:
    return [request for request in trainer.calls["GetValues"] if request.blocked]


def test_the_training_thread_asks_once_while_the_lease_reaches(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call brings all that is fixed; the background thread brings the rest."""
    trainer.feedback, trainer.delay = False, 32
    pilot = connect()
    pilot.values(0)
    lease = pilot._session._lease
    assert isinstance(lease, _lease.Lease)
    add = lease._add

    def watched(answer: pb.GetValuesResponse) -> int:
        steps = add(answer)
        with trainer.changed:
            trainer.changed.notify_all()
        return steps

    monkeypatch.setattr(lease, "_add", watched)
    for at in range(200):
        if at % 8 == 0:
            # As long steps would, give the other thread the time to renew.
            trainer.wait(lambda: at + 7 in lease._known)  # noqa: B023 (called at once)
        assert pilot.values(at) == ((trainer.rate(at), trainer.decay(at)),)
    assert len(blocked(trainer)) == 1
    assert len(trainer.calls["GetValues"]) < 100


def test_thousands_of_ranks_ask_at_moments_that_are_spread_evenly() -> None:
    """All of them hold the same values and step together, as after a failover."""
    source = random.Random(7)
    delay, ranks = 32, 8000
    asked: Counter[int] = Counter()  # by the quarter of a step in which it happens
    for _ in range(ranks):
        left, pause = _lease.renewal_point(delay - 1, source.random())
        asked[int((delay - 1 - left + pause) * 4)] += 1
    # From the first step after the last answer on, for seven steps: then a quarter of D is used.
    assert set(asked) == set(range(4, 32))
    even = ranks / len(asked)
    assert 0.8 * even < min(asked.values()) <= max(asked.values()) < 1.2 * even


@pytest.mark.parametrize("delay", [2, 3, 4, 5, 8, 9, 31, 32, 128, 512, 4096])
@pytest.mark.parametrize("drawn", [0.0, 0.5, 1.0 - 2**-53])
def test_three_quarters_of_the_delay_are_held_when_values_are_asked_for(
    delay: int, drawn: float
) -> None:
    left, pause = _lease.renewal_point(delay - 1, drawn)
    assert 0.0 <= pause < 1.0
    held = 1 + left - pause  # the step in use is one of them
    if delay >= 5:
        assert held >= 0.75 * delay
    else:
        assert held >= delay - 1.25
    # Nothing new is fixed within the first step.
    assert left <= delay - 2


@pytest.mark.parametrize(("drawn", "at"), [(0.0, 1), (0.2, 2), (0.99, 7)])
def test_a_renewal_comes_at_the_step_that_was_drawn(
    trainer: FakeTrainer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    drawn: float,
    at: int,
) -> None:
    """The first one after opening, too."""
    monkeypatch.setattr(_lease, "_random", SimpleNamespace(random=lambda: drawn))
    monkeypatch.setattr(_timing, "UNKNOWN_STEP_S", 0.0)
    trainer.feedback, trainer.delay = False, 32
    pilot = connect()
    for progress in range(at + 1):
        assert ahead_of(trainer) == [], f"asked before {progress}"
        pilot.values(progress)
        if progress < at:
            # Whoever is awake by then asks within this time; nobody is.
            time.sleep(0.02)
    trainer.wait(lambda: ahead_of(trainer))
    (request,) = ahead_of(trainer)[:1]
    assert (request.begin, request.in_use) == (32, at)


def ahead_of(trainer: FakeTrainer) -> list[Any]:
    return [request for request in trainer.calls["GetValues"] if not request.blocked]


def test_a_pause_before_a_renewal_ends_with_the_step(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a step was taken to be."""
    monkeypatch.setattr(_lease, "_random", SimpleNamespace(random=lambda: 0.1))
    monkeypatch.setattr(_timing, "UNKNOWN_STEP_S", 1e6)
    trainer.feedback, trainer.delay = False, 32
    pilot = connect()
    for progress in range(3):
        pilot.values(progress)
    trainer.wait(lambda: ahead_of(trainer))


def test_the_lease_reaches_through_an_outage(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    """D steps need no server, and afterwards nothing needs a restart."""
    trainer.delay = 16
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    trainer.stop()
    for _ in range(15):
        scheduler.step(loss=1.0)
    assert optimizer.rates == [trainer.rate(15)]
    thread, got = in_thread(lambda: scheduler.step(loss=1.0))
    trainer.start()
    finish(thread)
    assert got == [None]
    assert optimizer.rates == [trainer.rate(16)]
    pilot.close()
    assert set(trainer.losses) == set(range(16))


def test_a_changed_increment_is_asked_for(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.feedback, trainer.unit, trainer.delay = False, "samples", 400
    pilot = connect()
    at = 0
    for increment in [8] * 5 + [13] * 5 + [5] * 5:
        at += increment
        assert pilot.values(at) == ((trainer.rate(at), trainer.decay(at)),)
    strides = {request.stride for request in trainer.calls["GetValues"]}
    assert {8, 13, 5} <= strides


def test_in_samples_the_first_request_asks_for_one_step(
    trainer: FakeTrainer, connect: Connect
) -> None:
    trainer.unit = "samples"
    connect().values(0)
    first = trainer.calls["GetValues"][0]
    assert (first.begin, first.count, first.blocked) == (0, 1, True)


def test_with_a_delay_of_one_every_step_waits_for_its_loss(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.delay = 1
    scheduler = connect().scheduler(optimizer)
    for at in range(1, 30):
        scheduler.step(loss=1.0)
        assert optimizer.rates == [trainer.rate(at)]
        assert trainer.frontier == at
    assert all(request.blocked for request in trainer.calls["GetValues"])


def test_a_wait_says_what_for(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    pilot = connect(world_size=4, rank=2, key="k", reporter=3)
    pilot.values(0)
    thread, got = in_thread(lambda: pilot.values(9))
    trainer.wait(lambda: len(blocked(trainer)) >= 4)
    trainer.move(10)
    finish(thread)
    assert got == [((trainer.rate(9), trainer.decay(9)),)]
    (line, *_) = [text for text in caplog.messages if "has waited" in text]
    assert "run small: rank 2 has waited" in line
    assert "values at progress 9 (frontier 0, horizon 8, server 127.0.0.1:" in line
    assert "no loss is final from progress 0 on, and rank 3 is the one to report" in line


def test_an_outage_says_so_and_ends(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    pilot = connect()
    pilot.values(0)
    pilot._session.link.outage_timeout_s = 0.3
    trainer.stop()
    with pytest.raises(lrpilot.ServerUnavailable) as caught:
        pilot.values(8)
    assert "rank 0 waits for the values at progress 8" in str(caught.value)
    assert trainer.address in str(caught.value)
    assert "gives up after 0 s without contact" in caplog.text
    # It says what to do, now and the next time.
    assert "Start the server again, and this job from its last checkpoint" in str(caught.value)
    assert "connect(mode='leader') goes on without the server" in str(caught.value)
    # Values that are held need no server.
    assert pilot.values(7) == ((trainer.rate(7), trainer.decay(7)),)
    pilot._session.link.outage_timeout_s = 60.0
    trainer.start()
    trainer.move(9)
    assert pilot.values(8) == ((trainer.rate(8), trainer.decay(8)),)


def test_a_server_that_answers_not_yet_is_no_outage(
    trainer: FakeTrainer,
    connect: Connect,
    fault: type[Fault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the waits, an outage is time without contact."""
    ahead_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s[0])
    for module in (_call, _lease):
        monkeypatch.setattr(module, "time", clock)
    pilot = connect(**ANOTHER_RANK)
    thread, got = in_thread(lambda: pilot.values(8))
    trainer.wait(lambda: len(blocked(trainer)) >= 3)
    ahead_s[0] = 10_000.0
    # The second of them began after the clock had moved, hence it was answered after that.
    asked = len(blocked(trainer))
    trainer.wait(lambda: len(blocked(trainer)) >= asked + 3)
    trainer.fail("GetValues", fault(), times=3)
    trainer.wait(lambda: not trainer.faults["GetValues"])
    asked = len(blocked(trainer))
    trainer.wait(lambda: len(blocked(trainer)) > asked)
    assert got == []
    trainer.move(9)
    finish(thread)
    assert got == [((trainer.rate(8), trainer.decay(8)),)]


def test_values_that_are_never_fixed_end_the_wait(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "LONGEST_WAIT_S", 0.2)
    with pytest.raises(lrpilot.ValuesPending, match=r"progress 8 .*not fixed yet"):
        connect(**ANOTHER_RANK).values(8)


def test_a_draining_server_is_not_asked_without_pause(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers "not yet" at once; each repeat then waits for a pause of the back-off."""
    monkeypatch.setattr(_timing, "BLOCKED_WAIT_S", 10.0)
    pilot = connect()
    paused: list[float] = []
    link = pilot._session.link

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 3:
            trainer.move(9)

    monkeypatch.setattr(link, "pause", pause)
    monkeypatch.setattr(link.stub, "GetValues", lambda request, timeout: _at_once(trainer, request))
    assert pilot.values(8) == ((trainer.rate(8), trainer.decay(8)),)
    assert any(paused)


def _at_once(trainer: FakeTrainer, request: pb.GetValuesRequest) -> pb.GetValuesResponse:
    with trainer.changed:
        return trainer.get_values(pb.GetValuesRequest.FromString(_without_wait(request)))


def _without_wait(request: pb.GetValuesRequest) -> bytes:
    copy = pb.GetValuesRequest()
    copy.CopyFrom(request)
    copy.wait_ms = 0
    return copy.SerializeToString()


def test_values_before_the_attempt_are_refused_here(trainer: FakeTrainer, connect: Connect) -> None:
    pilot = connect(resume_at=5)
    pilot.values(5)
    with pytest.raises(lrpilot.BeforeAttempt, match="opened at progress 5; values at 4"):
        pilot.values(4)
    assert all(request.begin >= 5 for request in trainer.calls["GetValues"])


def test_values_used_before_can_be_asked_for_again(trainer: FakeTrainer, connect: Connect) -> None:
    pilot = connect()
    assert pilot.values(3) == pilot.values(3)
    assert pilot.values(0) == ((trainer.rate(0), trainer.decay(0)),)


@pytest.mark.parametrize("reason", ["AttemptSuperseded", "BeyondHorizon", "RunFinished"])
def test_a_refusal_is_raised_on_the_training_thread(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse, reason: str
) -> None:
    pilot = connect()
    pilot.values(0)
    trainer.always["GetValues"] = refuse(reason, "named here", attempt="1")
    for _ in range(2):
        with pytest.raises(getattr(lrpilot, reason), match="named here") as caught:
            pilot.values(50)
        assert caught.value.facts["attempt"] == "1"
    # It is never opened again by itself.
    assert len(trainer.calls["OpenAttempt"]) == 1


def test_what_the_background_met_is_raised_at_every_later_call(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    trainer.feedback = False
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    trainer.always["GetValues"] = refuse("AttemptSuperseded", "a newer start")
    link = pilot._session.link
    scheduler_calls: list[Callable[[], object]] = [
        lambda: pilot.values(0),
        lambda: pilot.report(0, 1.0),
        scheduler.step,
        scheduler.apply,
        scheduler.state_dict,
        pilot.close,
    ]
    wake_renewal(pilot)
    trainer.wait(lambda: trainer.answered["GetValues"] >= 2)
    link_failed(pilot)
    assert link.failure is not None
    for call in scheduler_calls[:-1]:
        with pytest.raises(lrpilot.AttemptSuperseded, match="a newer start"):
            call()
    # It was raised; closing then adds nothing.
    pilot.close()


def test_close_raises_what_nobody_has_heard_of(
    trainer: FakeTrainer, connect: Connect, refuse: Refuse
) -> None:
    trainer.feedback = False
    pilot = connect()
    pilot.values(0)
    trainer.always["GetValues"] = refuse("AttemptSuperseded", "a newer start")
    wake_renewal(pilot)
    link_failed(pilot)
    with pytest.raises(lrpilot.AttemptSuperseded, match="a newer start"):
        pilot.close()
    pilot.close()


def wake_renewal(pilot: lrpilot.Pilot) -> None:
    """Use the last value held, so that the background thread asks for more."""
    pilot.values(7)


def link_failed(pilot: lrpilot.Pilot) -> None:
    """Wait until the background thread of the lease has ended by its error."""
    lease = pilot._session._lease
    assert isinstance(lease, _lease.Lease)
    lease._thread.join(20)
    assert not lease._thread.is_alive()


def test_an_unforeseen_error_of_the_background_is_raised(
    trainer: FakeTrainer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pilot = connect()
    pilot.values(0)
    lease = pilot._session._lease
    assert isinstance(lease, _lease.Lease)

    def broken(known: object, in_use: int, stride: int) -> int:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(_lease, "steps_ahead", broken)
    wake_renewal(pilot)
    lease._wake.set()
    link_failed(pilot)
    with pytest.raises(lrpilot.ClientFailed, match=r"ZeroDivisionError.*seven"):
        pilot.values(1)
    assert "renewing values failed" in caplog.text


def test_two_values_for_one_progress_are_refused(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    pilot = connect()
    pilot.values(0)
    lease = pilot._session._lease
    assert isinstance(lease, _lease.Lease)
    other = pb.GetValuesResponse()
    other.block.begin, other.block.stride = 3, 1
    other.block.learning_rates.append(trainer.rate(3) * (1 + 2**-52))
    other.block.weight_decays.append(trainer.decay(3))
    with pytest.raises(lrpilot.ValuesDiffer, match="for progress 3 of attempt 1"):
        lease._add(other)
    with pytest.raises(lrpilot.ValuesDiffer):
        pilot.values(0)


@pytest.mark.parametrize(
    ("rates", "decays", "stride"),
    [([], [], 1), ([1.0], [], 1), ([1.0] * 3, [1.0] * 3, 1), ([1.0] * 2, [1.0] * 2, 0)],
)
def test_a_block_that_does_not_fit_is_refused(
    trainer: FakeTrainer,
    connect: Connect,
    rates: list[float],
    decays: list[float],
    stride: int,
) -> None:
    trainer.groups = ["a", "b"]
    pilot = connect()
    pilot.values(0)
    lease = pilot._session._lease
    assert isinstance(lease, _lease.Lease)
    block = pb.Block(begin=100, stride=stride, learning_rates=rates, weight_decays=decays)
    with pytest.raises(lrpilot.ServerError, match="2 groups"):
        lease._add(pb.GetValuesResponse(block=block))


def test_old_values_are_forgotten(
    trainer: FakeTrainer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "KEPT_PAST", 8)
    monkeypatch.setattr(_timing, "MAX_AHEAD", 8)
    monkeypatch.setattr(_timing, "MAX_STEPS", 4)
    trainer.feedback = False
    pilot = connect()
    for at in range(200):
        pilot.values(at)
    lease = pilot._session._lease
    assert isinstance(lease, _lease.Lease)
    assert len(lease._known) <= 8 + 8 + 4 + 4
    assert 199 in lease._known


def test_a_deadline_is_on_every_call(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    seen: dict[str, list[float | None]] = {}
    pilot = connect()
    stub = pilot._session.link.stub
    for method in ("OpenAttempt", "GetValues", "ReportLosses", "SaveState"):
        original = getattr(stub, method)

        def called(
            request: Any, timeout: float | None = None, _to: Any = original, _name: str = method
        ) -> Any:
            seen.setdefault(_name, []).append(timeout)
            return _to(request, timeout=timeout)

        setattr(stub, method, called)
    scheduler = pilot.scheduler(optimizer)
    for _ in range(20):
        scheduler.step(loss=1.0)
    scheduler.state_dict()
    pilot.close()
    assert set(seen) == {"OpenAttempt", "GetValues", "ReportLosses", "SaveState"}
    assert all(
        timeout is not None and 0 < timeout <= 30 for item in seen.values() for timeout in item
    )


def test_shed_load_is_asked_for_again(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """gRPC cancels calls above its limit of pending ones."""
    with caplog.at_level(logging.INFO, "lrpilot.client"):
        trainer.fail("GetValues", fault(grpc.StatusCode.CANCELLED), times=5)
        assert connect().values(0) == ((trainer.rate(0), trainer.decay(0)),)
    assert len(trainer.calls["GetValues"]) >= 6


def test_a_delay_of_less_than_a_step_is_said_once(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.feedback, trainer.delay, trainer.unit = False, 32, "samples"
    pilot = connect()
    for progress in (0, 512, 1024, 1034, 2048):
        pilot.values(progress)
    said = [record.getMessage() for record in caplog.records if "feedback.delay" in record.msg]
    assert len(said) == 1
    assert "feedback.delay is 32, less than a step of 512" in said[0]
    assert "32 steps would be 16384" in said[0]


def test_a_slip_is_no_increment(trainer: FakeTrainer, connect: Connect, refuse: Refuse) -> None:
    """Far beyond the horizon the server refuses; an increment of that size would be waited for."""
    pilot = connect()
    pilot.values(0)
    trainer.always["GetValues"] = refuse("BeyondHorizon", "far beyond", horizon="8")
    with pytest.raises(lrpilot.BeyondHorizon):
        pilot.values(50_000)
    assert trainer.calls["GetValues"][-1].stride == 1
    assert trainer.losses == {}
    trainer.always.clear()
    pilot.values(1)
    pilot.values(2)
    assert {request.stride for request in trainer.calls["GetValues"]} == {1}


def test_the_increment_of_a_scheduler_is_no_slip(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.feedback = False
    scheduler = connect().scheduler(optimizer)
    scheduler.step(50_000)
    assert optimizer.param_groups[0]["lr"] == trainer.rate(50_000)
    assert blocked(trainer)[-1].stride == 50_000


def test_a_reporter_that_is_blocked_on_its_own_losses_moves_on(
    trainer: FakeTrainer, connect: Connect
) -> None:
    """By hand, too, sparse reports and increments beyond the delay do not stall."""
    pilot = connect()
    for progress in range(0, 60, 20):
        assert pilot.values(progress)[0][0] == trainer.rate(progress)
        pilot.report(progress, 1.0)
    trainer.wait(lambda: 40 in trainer.losses)
    assert trainer.losses == {0: 1.0, 1: None, 20: 1.0, 21: None, 40: 1.0}
