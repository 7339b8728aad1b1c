"""Losses on their way: order, repeats, tensors on devices, and what is refused."""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]


class Device:
    """A device whose work ends when a test says so, with tensors on it."""

    type = "slow"

    def __init__(self) -> None:
        self.done = threading.Event()
        self.readers: list[str] = []
        self.broken = False

    def tensor(self, value: float) -> Any:
        return SlowTensor(self, value)


class SlowTensor:
    def __init__(self, device: Device, value: float) -> None:
        self.device, self.value = device, value

    def numel(self) -> int:
        return 1

    def detach(self) -> SlowTensor:
        return self

    def clone(self) -> SlowTensor:
        return SlowTensor(self.device, self.value)

    def item(self) -> float:
        assert self.device.done.is_set()
        if self.device.broken:
            raise RuntimeError("device lost")
        self.device.readers.append(threading.current_thread().name)
        return self.value


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that torch knows as `torch.slow`, as it does `torch.cuda`."""
    made = Device()

    class Event:
        def query(self) -> bool:
            return made.done.is_set()

    stream = SimpleNamespace(record_event=Event)
    slow = SimpleNamespace(current_stream=lambda _: stream, is_available=lambda: True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(slow=slow))
    return made


def sent(trainer: FakeTrainer) -> list[tuple[int, float | None, int]]:
    return [
        (report.progress, report.loss if report.HasField("loss") else None, report.moves_to)
        for request in trainer.calls["ReportLosses"]
        for report in request.reports
    ]


def test_reports_arrive_in_order_and_each_once(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        for at in range(100):
            scheduler.step(loss=float(at))
    assert sent(trainer) == [(at, float(at), at + 1) for at in range(100)]
    incarnations = {request.incarnation for request in trainer.calls["ReportLosses"]}
    assert incarnations == {trainer.calls["OpenAttempt"][0].incarnation}


def test_a_lost_answer_is_asked_for_again_with_the_same_reports(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault]
) -> None:
    with connect() as pilot:
        pilot.values(0)
        trainer.fail("ReportLosses", fault(after=True), times=3)
        pilot.report(0, 2.5)
    assert sent(trainer) == [(0, 2.5, 1)] * 4


def test_reports_of_an_outage_are_batched_and_delivered_later(
    trainer: FakeTrainer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_timing, "MAX_BATCH", 16)
    pilot = connect()
    pilot.values(0)
    trainer.stop()
    for at in range(100):
        pilot.report(at, float(at))
    assert pilot._session.link.undelivered() == 100
    with caplog.at_level(logging.INFO, "lrpilot.client"):
        trainer.start()
        pilot.close()
    assert trainer.losses == {at: float(at) for at in range(100)}
    assert max(len(request.reports) for request in trainer.calls["ReportLosses"]) <= 16
    assert pilot._session.link.undelivered() == 0


def test_reports_that_wait_are_spoken_of(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault], caplog: pytest.LogCaptureFixture
) -> None:
    pilot = connect()
    pilot.values(0)
    trainer.always["ReportLosses"] = fault()
    waited = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: (  # type: ignore[method-assign]
        waited.set() if "reports wait in memory" in record.getMessage() else None
    )
    logger = logging.getLogger("lrpilot.client")
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "lrpilot.client"):
            pilot.report(0, 1.0)
            assert waited.wait(20)
            del trainer.always["ReportLosses"]
            pilot.close()
    finally:
        logger.removeHandler(handler)
    assert "takes reports again" in caplog.text
    assert trainer.losses == {0: 1.0}


def test_every_number_is_data(trainer: FakeTrainer, connect: Connect) -> None:
    losses = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 3, torch.tensor(1.5).half()]
    with connect() as pilot:
        pilot.values(0)
        for at, loss in enumerate(losses):
            pilot.report(at, loss)
        pilot.report(0, -math.nan)
    got = [trainer.losses[at] for at in range(len(losses))]
    assert [repr(loss) for loss in got] == ["nan", "inf", "-inf", "-0.0", "5e-324", "3.0", "1.5"]
    assert len(sent(trainer)) == len(losses)


def test_a_repeat_adds_nothing_and_another_loss_is_refused(
    trainer: FakeTrainer, connect: Connect
) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.0)
        pilot.report(0, 1.0)
        with pytest.raises(lrpilot.LossConflict, match=r"progress 0 .* loss 1\.0 already; got 2"):
            pilot.report(0, 2.0)
        with pytest.raises(lrpilot.LossConflict):
            pilot.report(0, math.nan)
    assert sent(trainer) == [(0, 1.0, 1)]


def test_zeros_of_two_signs_differ(connect: Connect) -> None:
    pilot = connect()
    pilot.values(0)
    pilot.report(0, 0.0)
    with pytest.raises(lrpilot.LossConflict):
        pilot.report(0, -0.0)


def test_a_loss_below_the_resume_point_is_refused(connect: Connect) -> None:
    pilot = connect(resume_at=10)
    pilot.values(10)
    with pytest.raises(lrpilot.BelowResumePoint, match="progress 9 lies below progress 10") as got:
        pilot.report(9, 1.0)
    assert got.value.facts == {"run": "small", "progress": "9", "begin": "10"}


def test_what_is_passed_without_a_loss_is_said_first(
    trainer: FakeTrainer, connect: Connect
) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.0)
        pilot.report(5, 2.0)
        # Late: the server decides what becomes of it.
        pilot.report(3, 9.0)
    assert sent(trainer) == [(0, 1.0, 1), (1, None, 5), (5, 2.0, 6), (3, 9.0, 4)]


def test_a_late_loss_is_spoken_of(
    trainer: FakeTrainer, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.outcome = pb.REPORT_OUTCOME_LATE
    with connect() as pilot:
        pilot.values(0)
        pilot.report(4, 1.0)
    assert "losses came after their step was final without one" in caplog.text


def test_a_scheduler_and_a_hand_may_report_the_same(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    with connect() as pilot:
        scheduler = pilot.scheduler(optimizer)
        pilot.report(0, 1.0)
        scheduler.step(10, loss=1.0)
    assert trainer.losses[0] == 1.0
    assert trainer.frontier == 10


def test_a_refusal_met_in_the_background_reaches_the_training(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    trainer.fail("ReportLosses", refuse("NotReporter", "another process reports"))
    scheduler.step(loss=1.0)
    reporter = pilot._session._reporter
    assert reporter is not None
    reporter._thread.join(20)
    with pytest.raises(lrpilot.NotReporter, match=r"another .*\(1 reports were not delivered\)"):
        scheduler.step(loss=1.0)
    pilot.close()


def test_the_backlog_is_bounded(
    trainer: FakeTrainer, connect: Connect, fault: type[Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "MAX_BACKLOG", 10)
    trainer.always["ReportLosses"] = fault()
    pilot = connect()
    pilot.values(0)
    for at in range(10):
        pilot.report(at, 1.0)
    with pytest.raises(lrpilot.BacklogFull, match="10 reports wait"):
        pilot.report(10, 1.0)


def test_known_losses_are_forgotten_in_time(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "KEPT_LOSSES", 4)
    with connect() as pilot:
        pilot.values(0)
        for at in range(100):
            pilot.report(at, 1.0)
        reporter = pilot._session._reporter
        assert reporter is not None
        assert len(reporter._given) <= 8
        with pytest.raises(lrpilot.LossConflict):
            pilot.report(99, 2.0)


def test_a_loss_on_a_device_never_makes_the_training_wait(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, device: Device
) -> None:
    pilot = connect()
    scheduler = pilot.scheduler(optimizer)
    # Would wait for ever if anything here read the device.
    for at in range(5):
        tensor = device.tensor(float(at))
        scheduler.step(loss=tensor)
        tensor.value = math.nan
    assert trainer.losses == {}
    device.done.set()
    pilot.close()
    assert trainer.losses == {at: float(at) for at in range(5)}
    assert set(device.readers) == {"lrpilot-report"}


def test_known_losses_go_ahead_of_one_on_a_device(
    trainer: FakeTrainer, connect: Connect, device: Device
) -> None:
    pilot = connect()
    pilot.values(0)
    pilot.report(0, 1.0)
    pilot.report(1, device.tensor(2.0))
    pilot.report(2, 3.0)
    trainer.wait(lambda: 0 in trainer.losses)
    assert set(trainer.losses) == {0}
    device.done.set()
    pilot.close()
    assert trainer.losses == {0: 1.0, 1: 2.0, 2: 3.0}


def test_a_repeat_on_a_device_is_compared_once_it_is_known(
    trainer: FakeTrainer, connect: Connect, device: Device
) -> None:
    pilot = connect()
    pilot.values(0)
    pilot.report(0, device.tensor(1.0))
    pilot.report(0, 1.0)
    pilot.report(0, device.tensor(2.0))
    device.done.set()
    with pytest.raises(lrpilot.LossConflict, match=r"loss 1\.0 already; got 2\.0"):
        pilot.close()
    assert trainer.losses == {0: 1.0}


def test_a_device_that_fails_is_named(connect: Connect, device: Device) -> None:
    device.broken = True
    device.done.set()
    pilot = connect()
    pilot.values(0)
    pilot.report(7, device.tensor(1.0))
    with pytest.raises(lrpilot.LossUnreadable, match=r"loss at progress 7 .*device lost"):
        pilot.close()


def test_an_unforeseen_error_of_the_background_is_raised(
    trainer: FakeTrainer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pilot = connect()
    pilot.values(0)
    reporter = pilot._session._reporter
    assert reporter is not None

    def broken(reports: Any) -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(reporter, "_deliver", broken)
    pilot.report(0, 1.0)
    with pytest.raises(lrpilot.ClientFailed, match=r"ZeroDivisionError.*seven"):
        pilot.close()
    assert "reporting losses failed" in caplog.text


def test_norms_and_validation_losses_on_a_device_are_read_as_losses_are(
    trainer: FakeTrainer, connect: Connect, device: Device
) -> None:
    with connect() as pilot:
        pilot.values(0)
        pilot.report(0, 1.0)
        pilot.report(1, 2.0, grad_norm=device.tensor(0.5), val_losses={"val": device.tensor(3.0)})
        # What is known goes out, the rest waits for the device.
        trainer.wait(lambda: len(trainer.reports) == 1)
        device.done.set()
    assert (trainer.reports[1].gradient_norm, trainer.reports[1].loss) == (0.5, 2.0)
    assert dict(trainer.reports[1].validation_losses) == {"val": 3.0}
    assert device.readers == ["lrpilot-report"] * 2


def test_a_negative_norm_on_a_device_is_refused_once_it_is_read(
    trainer: FakeTrainer, connect: Connect, device: Device
) -> None:
    device.done.set()
    pilot = connect()
    pilot.values(0)
    pilot.report(0, 1.0, grad_norm=device.tensor(-0.5))
    with pytest.raises(lrpilot.InvalidArgument, match=r"grad_norm: got -0\.5"):
        pilot.close()
    assert trainer.reports == []
