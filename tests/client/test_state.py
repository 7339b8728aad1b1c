"""Saving the scheduler into a checkpoint and resuming from it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]


def test_a_state_goes_round(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    trainer.state = bytes(range(256))
    scheduler = connect().scheduler(make_optimizer())
    for _ in range(3):
        scheduler.step(loss=1.0)
    state = scheduler.state_dict()
    assert state["progress"] == 3
    assert trainer.calls["SaveState"][0].progress == 3
    assert json.loads(json.dumps(state)) == pickle.loads(pickle.dumps(state)) == state
    optimizer = make_optimizer()
    resumed = connect().scheduler(optimizer, json.loads(json.dumps(state)))
    request = trainer.calls["OpenAttempt"][-1]
    assert (request.progress, request.state) == (3, bytes(range(256)))
    assert resumed.progress == 3
    assert optimizer.rates == [trainer.rate(3)]


def test_the_reports_go_before_the_state(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, fault: type[Fault]
) -> None:
    scheduler = connect().scheduler(optimizer)
    trainer.fail("ReportLosses", fault(), times=5)
    frontiers: list[int] = []
    save = trainer.save_state

    def note(request: Any) -> Any:
        frontiers.append(trainer.frontier)
        return save(request)

    trainer.save_state = note  # type: ignore[method-assign]
    trainer.stop()
    trainer.start()
    for _ in range(5):
        scheduler.step(loss=1.0)
    scheduler.state_dict()
    assert frontiers == [5]


def test_a_rank_that_does_not_report_waits_for_the_losses(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    scheduler = connect(world_size=2, rank=1, key="k").scheduler(optimizer)
    trainer.fail("SaveState", refuse("LossesPending"), times=4)
    assert scheduler.state_dict()["state"] != ""
    assert len(trainer.calls["SaveState"]) == 5


@pytest.mark.parametrize("cause", ["away", "pending"])
def test_a_checkpoint_does_not_fail_because_of_the_server(
    trainer: FakeTrainer,
    connect: Connect,
    make_optimizer: Callable[..., FakeOptimizer],
    *,
    fault: type[Fault],
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cause: str,
) -> None:
    monkeypatch.setattr(_timing, "SAVE_PATIENCE_S", 0.2)
    scheduler = connect().scheduler(make_optimizer())
    scheduler.step(loss=1.0)
    trainer.always["SaveState"] = fault() if cause == "away" else refuse("LossesPending")
    state = scheduler.state_dict()
    assert state == {"version": 1, "run": "small", "progress": 1, "state": ""}
    (line,) = [text for text in caplog.messages if "WITHOUT the server's part" in text]
    assert line.startswith("run small: the state at progress 1 was saved")
    assert connect().scheduler(make_optimizer(), state).progress == 1
    assert trainer.calls["OpenAttempt"][-1].state == b""


def test_a_checkpoint_of_a_superseded_attempt_is_refused(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    scheduler = connect().scheduler(optimizer)
    trainer.fail("SaveState", refuse("AttemptSuperseded"))
    with pytest.raises(lrpilot.AttemptSuperseded):
        scheduler.state_dict()


def test_before_a_deferred_attempt_opens_there_is_a_state_too(
    trainer: FakeTrainer, connect: Connect, make_optimizer: Callable[..., FakeOptimizer]
) -> None:
    """Frameworks ask for one to learn its form."""
    scheduler = connect().scheduler(make_optimizer(), defer=True)
    state = scheduler.state_dict()
    assert state == {"version": 1, "run": "small", "progress": None, "state": ""}
    assert trainer.calls["OpenAttempt"] == trainer.calls["SaveState"] == []
    scheduler.load_state_dict(state)
    assert not trainer.calls["OpenAttempt"][0].HasField("progress")
    # Then the attempt is open, and such a state changes nothing.
    scheduler.load_state_dict(state)
    assert scheduler.progress == 0


def test_an_open_attempt_takes_its_own_state_alone(
    connect: Connect, optimizer: FakeOptimizer
) -> None:
    scheduler = connect().scheduler(optimizer)
    scheduler.step(loss=1.0)
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    assert scheduler.progress == 1
    scheduler.step(loss=1.0)
    with pytest.raises(lrpilot.AttemptOpen, match=r"stands at progress 2; a state of progress 1"):
        scheduler.load_state_dict(state)
    assert scheduler.progress == 2


GOOD = {"version": 1, "run": "small", "progress": 3, "state": "Zm9sZA=="}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ([], "got list"),
        ({}, "version, run, progress, state missing"),
        ({"version": 1, "run": "small"}, "progress, state missing"),
        ({**GOOD, "version": 2}, "version 2; this release reads version 1"),
        ({**GOOD, "run": "other"}, "belongs to run 'other', not to run 'small'"),
        ({**GOOD, "progress": -1}, "progress is -1"),
        ({**GOOD, "progress": 3.0}, r"progress is 3\.0"),
        ({**GOOD, "progress": True}, "progress is True"),
        ({**GOOD, "progress": 2**53 + 1}, "progress is"),
        ({**GOOD, "state": "Zm9sZA="}, "damaged"),
        ({**GOOD, "state": "Zm9s*ZA=="}, "damaged"),
        ({**GOOD, "state": "é"}, "damaged"),
        ({**GOOD, "state": None}, "damaged"),
        ({**GOOD, "state": 7}, "damaged"),
    ],
)
@pytest.mark.parametrize("way", ["state", "load"])
def test_a_damaged_state_is_refused_before_anything_opens(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    state: Any,
    text: str,
    *,
    way: str,
) -> None:
    pilot = connect()
    give = partial(pilot.scheduler, optimizer)
    if way == "load":
        give = give(defer=True).load_state_dict  # type: ignore[assignment]
    with pytest.raises(lrpilot.InvalidState, match=text):
        give(state)
    assert trainer.calls["OpenAttempt"] == []
    assert optimizer.rates == [1.0]
    # The good one is still taken.
    assert pilot.scheduler(optimizer, GOOD).progress == 3


def test_a_run_that_is_over_is_still_saved(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, refuse: Refuse
) -> None:
    """As after `finish --force`, when the training writes its last checkpoint."""
    scheduler = connect().scheduler(optimizer)
    trainer.always["ReportLosses"] = refuse("RunFinished")
    scheduler.step(loss=1.0)
    assert scheduler._session._reporter is not None
    scheduler._session._reporter.flush(20.0)
    with pytest.raises(lrpilot.RunFinished):
        scheduler.step(loss=1.0)
    assert scheduler.state_dict()["state"] != ""
