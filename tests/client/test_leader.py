"""Leader mode: rank 0 gets the values, goes on alone without the server, and declares it later."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import lrpilot.client as lrpilot
from lrpilot.client import _timing
from lrpilot.client._call import Unanswered
from lrpilot.client._offers import Offers
from lrpilot.client._used import blocks
from lrpilot.v1 import trainer_pb2 as pb
from tests.side_by_side import finish, in_thread, said_by

if TYPE_CHECKING:
    from tests.client.conftest import FakeOptimizer, FakeTrainer, Fault

    Connect = Callable[..., lrpilot.Pilot]
    Refuse = Callable[..., Fault]

PROGRAM = Path(__file__).with_name("leader_program.py")


@pytest.fixture
def leader(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    monkeypatch: pytest.MonkeyPatch,
) -> Leading:
    """One rank in leader mode, whose offers can be told from what is fixed."""
    trainer.offer_factor = 2.0
    return Leading(trainer, connect, optimizer, monkeypatch)


class Leading:
    """A training in leader mode."""

    def __init__(
        self,
        trainer: FakeTrainer,
        connect: Connect,
        optimizer: FakeOptimizer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.trainer = trainer
        self.optimizer = optimizer
        self._monkeypatch = monkeypatch
        self._connect = connect
        self.used: dict[int, float] = {}
        """Learning rate by progress."""

    def open(self, *, offered: int = 1, **options: Any) -> lrpilot.Scheduler:
        """Make the scheduler, and wait until the server has offered values."""
        self.pilot = self._connect(mode="leader", **options)
        self.scheduler = self.pilot.scheduler(self.optimizer)
        self.used[self.scheduler.progress] = self.optimizer.rates[0]
        if self.trainer.unit == "iterations":
            self.wait_offers(offered)
        return self.scheduler

    def wait_offers(self, count: int) -> None:
        """Wait until that many offers have arrived."""
        self.trainer.wait(lambda: self.trainer.answered["OfferValues"] >= count)
        self.until(lambda: self.holder._offers.reach > 0)

    def cut(self) -> None:
        """Take the server away, and spend little patience on it."""
        self._monkeypatch.setattr(_timing, "LEADER_PATIENCE_S", 0.2)
        self.trainer.stop()

    def restore(self) -> None:
        """Bring the server back; a slow answer is no outage."""
        self._monkeypatch.setattr(_timing, "LEADER_PATIENCE_S", 20.0)
        self.trainer.start()

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for what a background thread does."""
        thread, _ = in_thread(lambda: _wait(condition))
        finish(thread)

    def step(self, increment: int = 1) -> None:
        self.scheduler.step(increment, loss=1.0)
        self.used[self.scheduler.progress] = self.optimizer.rates[0]

    def to(self, progress: int) -> None:
        while self.scheduler.progress < progress:
            self.step()

    def is_fixed(self, progress: int) -> bool:
        """Return whether what was used was not an offer."""
        assert self.used[progress] in (self.trainer.rate(progress), 2 * self.trainer.rate(progress))
        return self.used[progress] == self.trainer.rate(progress)

    @property
    def holder(self) -> Any:
        lease: Any = self.pilot._session._lease
        return lease._holder

    def declared(self) -> dict[int, float]:
        return {at: pairs[0][0] for at, pairs in self.trainer.declared.items()}


def _wait(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.001)


# Who may lead.


def test_a_key_does_not_go_with_it(connect: Connect) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match="key: got 'k'; allowed: none in leader mode"):
        connect(mode="leader", key="k", rank=0, world_size=2)


def test_several_ranks_need_a_process_group(connect: Connect) -> None:
    with pytest.raises(lrpilot.ConnectRefused, match="no process group is initialised"):
        connect(mode="leader", rank=0, world_size=2)


def test_another_mode_is_refused(connect: Connect) -> None:
    with pytest.raises(lrpilot.InvalidArgument, match="mode: got 'alone'; allowed: 'independent'"):
        connect(mode="alone")


def test_a_server_that_knows_no_leader_is_refused(trainer: FakeTrainer, connect: Connect) -> None:
    trainer.holder = lambda: b""  # type: ignore[method-assign]
    with pytest.raises(lrpilot.ServerError, match="does not know leader mode"):
        connect(mode="leader").values(0)


def test_one_rank_leads_without_torch(trainer: FakeTrainer) -> None:
    program = f"""
import sys
import lrpilot.client as lrpilot

with lrpilot.connect({trainer.address!r}, run="small", mode="leader") as pilot:
    for at in range(20):
        pilot.values(at)
        pilot.report(at, 1.0)
print("torch" in sys.modules, pilot.attempt)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("False 1\n", 0), done.stderr
    assert trainer.losses == dict.fromkeys(range(20), 1.0)


# With the server.


@pytest.mark.parametrize("delay", [1, 8])
def test_with_the_server_values_are_those_that_it_fixes(leader: Leading, delay: int) -> None:
    leader.trainer.delay = delay
    leader.open()
    leader.to(100)
    leader.pilot.close()
    assert all(leader.is_fixed(at) for at in range(101))
    assert leader.trainer.losses == dict.fromkeys(range(100), 1.0)
    calls = leader.trainer.calls
    assert [request.leader for request in calls["OpenAttempt"]] == [True]
    assert {request.holder for request in calls["GetValues"]} == {b"holder1"}
    assert {request.holder for request in calls["OfferValues"]} == {b"holder1"}
    assert calls["DeclareValues"] == []


def test_without_leader_mode_nothing_of_it_is_sent(trainer: FakeTrainer, connect: Connect) -> None:
    with connect() as pilot:
        for at in range(20):
            pilot.values(at)
            pilot.report(at, 1.0)
    assert {request.holder for request in trainer.calls["GetValues"]} == {b""}
    assert not any(request.explain for request in trainer.calls["GetValues"])
    assert trainer.calls["OfferValues"] == []


def test_offers_are_topped_up_as_they_are_used(
    leader: Leading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "OFFERED_STEPS", 64)
    monkeypatch.setattr(_timing, "MAX_OFFERED", 256)
    leader.open(offered=4)
    calls = leader.trainer.calls["OfferValues"]
    leader.to(200)
    leader.trainer.wait_calls("OfferValues", 6)
    begins = [request.begin for request in calls]
    assert begins[:4] == [1, 65, 129, 193]
    assert begins == sorted(begins)
    assert {request.count for request in calls} == {64}


def test_what_is_handed_back_follows_what_is_used(leader: Leading) -> None:
    """What came and was not used is not handed back; what was declared is."""
    trainer = leader.trainer
    leader.open()
    leader.to(20)
    leader.cut()
    leader.to(60)
    alone = min(at for at in leader.used if not leader.is_fixed(at))
    leader.restore()
    trainer.wait_calls("DeclareValues", 1)
    leader.until(lambda: leader.holder._is_back)
    leader.step()
    declared, offered = trainer.calls["DeclareValues"][0], trainer.calls["OfferValues"]
    held = declared.held
    assert held.begin + held.steps <= alone == declared.blocks[0].begin
    assert 0 < held.offer <= len(offered)
    assert [item.held.offer for item in offered] == sorted(item.held.offer for item in offered)
    link = leader.pilot._session.link
    # Until the next values come, what was declared is the newest that the server has recorded.
    assert link.got.last >= max(at for at in trainer.declared if at in leader.used)


def test_what_was_offered_under_another_plan_is_not_used(leader: Leading) -> None:
    leader.open(offered=4)
    trainer = leader.trainer
    with trainer.changed:
        trainer.plan, trainer.offer_factor = "another", 4.0
    offers = len(trainer.calls["OfferValues"])
    leader.to(40)
    leader.wait_offers(offers + 4)
    leader.until(lambda: leader.holder._offers.get(60).values[0][0] == 4.0 * trainer.rate(60))
    # From the step in use on, not behind what was offered before.
    assert trainer.calls["OfferValues"][offers].begin <= 41
    leader.cut()
    leader.to(80)
    leader.restore()
    assert leader.used[70] == 4.0 * trainer.rate(70)


def test_offers_of_one_plan_make_one_whole() -> None:
    def answer(offer: int, plan: str, begin: int) -> tuple[pb.OfferValuesResponse, dict[int, Any]]:
        values: dict[int, Any] = {at: ((float(offer), None),) for at in range(begin, begin + 10)}
        return pb.OfferValuesResponse(plan=plan, permitted=begin + 10, offer=offer), values

    offers = Offers()
    first = offers.wanted(0, 1)
    assert first is not None
    assert (first.steps.start, first.is_fresh) == (1, True)
    offers.take(first, *answer(1, "one", 1), in_use=0)
    # The next one comes under another plan: nothing is glued together.
    more = offers.wanted(3, 1)
    assert more is not None
    assert (more.steps.start, more.is_fresh) == (11, False)
    offers.take(more, *answer(2, "two", 11), in_use=3)
    assert offers.get(11) is None
    fresh = offers.wanted(3, 1)
    assert fresh is not None
    assert (fresh.steps.start, fresh.is_fresh) == (4, True)
    # The plan changes while the call is under way: once more.
    offers.outdate()
    offers.take(fresh, *answer(3, "two", 4), in_use=3)
    again = offers.wanted(3, 1)
    assert again is not None
    assert again.is_fresh
    offers.take(again, *answer(4, "two", 4), in_use=3)
    found = offers.get(5)
    assert found is not None
    assert found.offer == 4
    # What is no longer permitted is not used.
    assert offers.get(14) is None


# Without it.


@pytest.mark.parametrize("delay", [1, 8])
def test_it_goes_on_alone_and_declares_what_was_used(
    leader: Leading, caplog: pytest.LogCaptureFixture, delay: int
) -> None:
    trainer = leader.trainer
    trainer.delay = delay
    leader.open()
    leader.to(20)
    leader.cut()
    leader.to(100)
    first = min(at for at in leader.used if not leader.is_fixed(at))
    assert 20 < first <= 20 + delay
    assert not any(leader.is_fixed(at) for at in range(first, 101))
    assert f"goes on ALONE from progress {first} on" in caplog.text
    leader.restore()
    leader.trainer.wait_calls("DeclareValues", 1)
    leader.until(lambda: leader.holder._is_back)
    while leader.holder._is_alone:
        leader.step()
    end = leader.scheduler.progress
    leader.to(end + 50)
    leader.pilot.close()
    # From where the server is back on, values are its own again; it knows all the others.
    assert all(leader.is_fixed(at) for at in range(end, end + 51))
    assert leader.declared() == {at: leader.used[at] for at in range(first, end)}
    told = [request.held.declared for request in trainer.calls["GetValues"]]
    assert (told[0], told[-1]) == (0, end)
    assert trainer.losses == dict.fromkeys(range(end + 50), 1.0)
    assert "is back after" in caplog.text
    # What came with one offer is declared with it, and no more is said than is known.
    offers = {request.offer for request in trainer.calls["DeclareValues"]}
    assert 0 not in offers


def test_once_alone_it_waits_no_more(leader: Leading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of values that were offered is at most a delay long; the patience is spent once."""
    leader.trainer.delay = 8
    leader.open()
    leader.cut()
    leader.to(10)
    monkeypatch.setattr(_timing, "LEADER_PATIENCE_S", 1e6)
    lease: Any = leader.pilot._session._lease
    leader.to(200)
    assert len(lease._passed.values) == 8
    assert not leader.is_fixed(200)
    leader.restore()


def test_samples_are_declared_in_the_strides_that_were_used(leader: Leading) -> None:
    trainer = leader.trainer
    trainer.unit, trainer.delay = "samples", 64
    leader.open()
    leader.step(8)
    leader.wait_offers(1)
    leader.step(8)
    leader.cut()
    for increment in [8] * 20 + [16] * 10:
        leader.step(increment)
    first = min(at for at in leader.used if not leader.is_fixed(at))
    leader.restore()
    leader.pilot.close()
    assert leader.declared() == {at: rate for at, rate in leader.used.items() if at >= first}
    strides = [
        block.stride
        for request in trainer.calls["DeclareValues"]
        for block in request.blocks
        if len(block.learning_rates) > 1
    ]
    assert set(strides) == {8, 16}


def test_batches_that_grow_while_it_is_alone_do_not_stop_it(leader: Leading) -> None:
    """Between two offered steps it uses the values of the first, and declares those."""
    trainer = leader.trainer
    trainer.unit, trainer.delay = "samples", 64
    leader.open()
    leader.step(8)
    leader.wait_offers(1)
    leader.step(8)
    leader.cut()
    for increment in [8] * 20 + [12] * 10:
        leader.step(increment)
    alone = {at: rate for at, rate in leader.used.items() if rate != trainer.rate(at)}
    assert any(at % 8 for at in alone)
    assert alone == {at: 2 * trainer.rate(at - at % 8) for at in alone}
    leader.restore()
    leader.pilot.close()
    assert leader.declared() == alone


def test_blocks_hold_exactly_what_was_used() -> None:
    values = ((0.5, 0.1), (0.25, 0.2))
    used = dict.fromkeys([3, 4, 5, 9, 13, 20, 21], values)
    found = [(block.begin, block.stride, len(block.learning_rates) // 2) for block in blocks(used)]
    assert found == [(3, 1, 3), (9, 4, 2), (20, 1, 2)]
    assert list(blocks(used)[0].weight_decays) == [0.1, 0.2] * 3


def test_a_declaration_whose_answer_is_lost_is_repeated_as_it_was(
    leader: Leading, fault: type[Fault]
) -> None:
    trainer = leader.trainer
    leader.open()
    leader.to(20)
    leader.cut()
    leader.to(60)
    trainer.fail("DeclareValues", fault(after=True), times=3)
    leader.restore()
    calls = trainer.wait_calls("DeclareValues", 4)
    while leader.holder._is_alone:
        leader.step()
    assert [list(request.blocks) for request in calls[1:4]] == [list(calls[0].blocks)] * 3
    assert all(leader.used[at] == rate for at, rate in leader.declared().items())


def test_a_bounded_declaration_is_bounded(leader: Leading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint and SIGTERM wait no longer than they say, whatever the patience is."""
    leader.open()
    leader.cut()
    leader.to(40)
    timeouts = []

    def once(method: Any, request: Any, timeout_s: float) -> Any:
        if threading.current_thread() is threading.main_thread():
            timeouts.append(timeout_s)
        raise Unanswered

    monkeypatch.setattr(leader.pilot._session.link, "once", once)
    leader.until(lambda: not leader.holder._used._declaring.locked())
    monkeypatch.setattr(_timing, "LEADER_PATIENCE_S", 1e6)
    assert not leader.holder.settle(0.3)
    assert timeouts
    assert max(timeouts) <= 0.3


def test_values_that_come_too_late_are_not_used(leader: Leading) -> None:
    """The server may fix and send what the job has passed meanwhile: what was used stands."""
    trainer = leader.trainer
    leader.open()
    leader.to(20)
    before = leader.holder._generation
    leader.cut()
    leader.to(40)
    late = pb.GetValuesResponse(horizon=60, frontier=52)
    late.block.CopyFrom(trainer.block(range(30, 60)))
    assert not leader.holder._add(late, before)
    leader.to(60)
    assert not any(leader.is_fixed(at) for at in range(30, 61))
    leader.restore()


def test_missing_losses_do_not_hold_it_for_longer_than_a_patience(
    leader: Leading, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers all along; the reporter's link is cut."""
    trainer = leader.trainer
    leader.open()
    leader.to(20)
    trainer.wait(lambda: trainer.frontier == 20)
    trainer.move(28)
    leader.until(lambda: 26 in leader.holder._known)
    monkeypatch.setattr(_timing, "FEEDBACK_PATIENCE_S", 0.3)
    leader.to(60)
    assert leader.is_fixed(27)
    assert not any(leader.is_fixed(at) for at in range(28, 61))
    assert "goes on ALONE from progress 28 on: losses are missing" in caplog.text
    monkeypatch.setattr(_timing, "LEADER_PATIENCE_S", 20.0)
    with trainer.changed:
        trainer.horizon = None
        trainer.changed.notify_all()
    leader.until(lambda: time.monotonic() > leader.holder._ask_again_s)
    monkeypatch.setattr(_timing, "FEEDBACK_PATIENCE_S", 20.0)
    while leader.holder._is_alone:
        leader.step()
    end = leader.scheduler.progress
    leader.to(end + 20)
    assert leader.is_fixed(end + 20)
    assert set(leader.declared()) == set(range(28, end))


def test_losses_that_stay_missing_are_waited_for_now_and_then(
    leader: Leading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each declaration finds the server there; without the losses it fixes nothing more."""
    trainer = leader.trainer
    leader.open()
    leader.to(20)
    trainer.move(28)
    monkeypatch.setattr(_timing, "FEEDBACK_PATIENCE_S", 0.3)
    leader.to(28)
    leader.until(lambda: leader.holder._is_back)
    monkeypatch.setattr(_timing, "FEEDBACK_PATIENCE_S", 1e6)
    monkeypatch.setattr(_timing, "LEADER_PATIENCE_S", 60.0)
    monkeypatch.setattr(_timing, "HOLDER_WAIT_S", 0.1)
    leader.until(lambda: time.monotonic() > leader.holder._ask_again_s)
    asked = len([request for request in trainer.calls["GetValues"] if request.blocked])
    for end in range(36, 200, 8):
        leader.to(end)
        leader.until(lambda: leader.holder._is_back)
    # Once more, for as long as one call takes.
    again = [request.begin for request in trainer.calls["GetValues"] if request.blocked][asked:]
    assert set(again) == {36}
    assert not any(leader.is_fixed(at) for at in range(28, end + 1))
    leader.pilot.close()
    assert set(leader.declared()) == set(range(28, end + 1))


def test_beyond_the_offers_it_waits_and_then_says_so(
    leader: Leading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "OFFERED_STEPS", 16)
    monkeypatch.setattr(_timing, "MAX_OFFERED", 16)
    leader.open(outage_timeout_s=0.5)
    trainer = leader.trainer
    leader.cut()
    with pytest.raises(lrpilot.ServerUnavailable, match=r"progress 17 .* and none are offered"):
        leader.to(40)
    assert leader.scheduler.progress == 17
    assert leader.used[16] == 2 * trainer.rate(16)
    leader.restore()
    # Nothing needs a restart: what was used is declared, and the training goes on.
    leader.pilot._session.link.outage_timeout_s = 60.0
    leader.scheduler.apply()
    leader.used[17] = leader.optimizer.rates[0]
    leader.to(60)
    assert all(leader.is_fixed(at) for at in range(17, 61))
    assert set(leader.declared()) == set(range(8, 17))


def test_a_value_that_was_used_stays_however_it_is_asked_for(leader: Leading) -> None:
    leader.open()
    leader.to(10)
    leader.cut()
    leader.to(40)
    for at in (3, 35, 20, 40):
        assert leader.pilot.values(at)[0][0] == leader.used[at]
    leader.restore()
    leader.pilot.close()
    assert leader.declared() == {at: leader.used[at] for at in leader.declared()}


def test_a_superseded_holder_raises(leader: Leading, refuse: Refuse) -> None:
    trainer = leader.trainer
    leader.open()
    leader.to(20)
    leader.cut()
    leader.to(60)
    trainer.attempt = 2
    leader.restore()
    leader.until(lambda: leader.pilot._session.link.failure)
    for _ in range(2):
        with pytest.raises(lrpilot.AttemptSuperseded):
            leader.to(200)
    with pytest.raises(lrpilot.AttemptSuperseded):
        leader.scheduler.state_dict()
    assert trainer.declared == {}


@pytest.mark.parametrize("reason", ["BeyondPermit", "LogForgotten", "ValuesConflict", "NotHolder"])
def test_a_refused_declaration_ends_the_training(
    leader: Leading, refuse: Refuse, reason: str
) -> None:
    leader.open()
    leader.cut()
    leader.to(40)
    leader.trainer.fail("DeclareValues", refuse(reason, "no"), times=100)
    leader.restore()
    leader.until(lambda: leader.pilot._session.link.failure)
    with pytest.raises(lrpilot.LrpilotError) as caught:
        leader.to(200)
    assert type(caught.value).__name__ == reason


# Checkpoints, rollbacks, the end.


def test_a_state_is_saved_after_what_was_used_is_declared(leader: Leading) -> None:
    leader.open()
    leader.to(20)
    leader.cut()
    leader.to(60)
    leader.restore()
    state = leader.scheduler.state_dict()
    assert (state["progress"], state["state"] != "") == (60, True)
    assert max(leader.declared()) == 60
    # The rest of what was passed on at once is used, and declared too.
    leader.to(100)
    leader.pilot.close()
    assert leader.declared() == {
        at: rate for at, rate in leader.used.items() if not leader.is_fixed(at)
    }


def test_while_alone_a_state_holds_the_progress(
    leader: Leading, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_timing, "SAVE_PATIENCE_S", 0.3)
    leader.open()
    leader.cut()
    leader.to(40)
    state = leader.scheduler.state_dict()
    assert (state["progress"], state["state"]) == (40, "")
    assert "rank 0 has not declared yet what it used alone" in caplog.text
    with pytest.raises(lrpilot.ServerUnavailable, match="has not declared yet"):
        leader.scheduler.changes_in_force()
    leader.restore()


def test_closing_declares_what_it_can(leader: Leading, caplog: pytest.LogCaptureFixture) -> None:
    leader.open()
    leader.cut()
    leader.to(40)
    leader.restore()
    leader.pilot.close()
    assert set(leader.declared()) == set(range(8, 41))
    assert "NOT declared" not in caplog.text


def test_what_could_not_be_declared_is_said_at_the_end(
    leader: Leading, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_timing, "CLOSE_FLUSH_S", 0.3)
    leader.open()
    leader.cut()
    leader.to(40)
    leader.pilot.close()
    leader.restore()
    assert "33 steps from progress 8 to 40 were used without the server and NOT declared" in (
        caplog.text
    )


def test_a_rollback_opens_another_attempt_in_leader_mode(leader: Leading) -> None:
    trainer = leader.trainer
    trainer.directives.append(
        pb.Directive(id="back", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=30, before=20)
    )
    leader.open()
    leader.pilot.on_directive("rollback", lambda directive: leader.pilot.roll_back(directive, 15))
    leader.to(29)
    leader.step()
    assert (leader.scheduler.progress, leader.pilot.attempt) == (15, 2)
    assert [request.leader for request in trainer.calls["OpenAttempt"]] == [True, True]
    leader.used = {15: leader.optimizer.rates[0]}
    leader.to(60)
    assert all(leader.is_fixed(at) for at in range(15, 61))
    assert trainer.calls["GetValues"][-1].holder == b"holder2"


def test_a_rollback_that_comes_due_without_the_server_does_not_stop_the_training(
    leader: Leading, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = leader.trainer
    leader.open()
    leader.pilot.on_directive("rollback", lambda directive: leader.pilot.roll_back(directive, 5))
    leader.to(10)
    with trainer.changed:
        trainer.directives.append(
            pb.Directive(id="back", kind=pb.DIRECTIVE_KIND_ROLLBACK, progress=17, before=8)
        )
    leader.to(13)
    leader.until(lambda: 19 in leader.holder._known)
    monkeypatch.setattr(_timing, "OPEN_PATIENCE_S", 1.0)
    monkeypatch.setattr(_timing, "ROLL_BACK_FLUSH_S", 1.0)
    leader.cut()
    leader.to(40)
    assert leader.pilot.attempt == 1
    assert "nobody can go back without the server" in caplog.text
    assert [request.directive for request in trainer.calls["OpenAttempt"]] == [""]
    leader.restore()


def test_a_directive_that_was_received_is_met_while_alone(
    leader: Leading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_timing, "ACKNOWLEDGE_PATIENCE_S", 0.1)
    trainer = leader.trainer
    met: list[tuple[int, str]] = []
    leader.open()
    leader.pilot.on_directive(
        "stop", lambda directive: met.append((leader.scheduler.progress, directive.id))
    )
    leader.to(10)
    with trainer.changed:
        trainer.directives.append(pb.Directive(id="halt", kind=pb.DIRECTIVE_KIND_STOP, progress=17))
    leader.to(13)
    leader.until(lambda: 19 in leader.holder._known)
    leader.cut()
    leader.to(16)
    assert met == []
    leader.to(40)
    assert met == [(17, "halt")]
    leader.restore()


def test_a_forked_child_finds_it_closed(leader: Leading) -> None:
    leader.open()
    leader.to(5)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            leader.scheduler.step(loss=1.0)
        except lrpilot.PilotClosed:
            os.write(writing, b"closed")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == b"closed"
    os.close(reading)
    leader.to(40)
    assert leader.is_fixed(40)


# Changes.


def change(progress: int, name: str = "") -> pb.Change:
    return pb.Change(
        id=name or f"change-{progress}",
        progress=progress,
        source="policies.0 (plateau)",
        summary="LR x 0.5",
        reason="no better for 3 reports",
        before=[0.2],
        after=[0.1],
        weight_decay_before=[0.01],
        weight_decay_after=[0.01],
    )


@pytest.mark.parametrize("mode", ["independent", "leader"])
def test_a_change_is_told_once_where_it_shows(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, mode: str
) -> None:
    trainer.changes += [change(5), change(12), change(12, "second")]
    told: list[tuple[int, float, lrpilot.Change]] = []
    with connect(mode=mode) as pilot:

        @pilot.on_change
        def hear(change: lrpilot.Change) -> None:
            told.append((scheduler.progress, optimizer.rates[0], change))

        scheduler = pilot.scheduler(optimizer)
        for _ in range(30):
            scheduler.step(loss=1.0)
    assert [(at, item.id) for at, _, item in told] == [
        (5, "change-5"),
        (12, "change-12"),
        (12, "second"),
    ]
    # LR and WD of the step are in the optimizer already.
    assert [rate for _, rate, _ in told] == [trainer.rate(5), trainer.rate(12), trainer.rate(12)]
    assert told[0][2] == lrpilot.Change(
        id="change-5",
        progress=5,
        source="policies.0 (plateau)",
        summary="LR x 0.5",
        reason="no better for 3 reports",
        before=(0.2,),
        after=(0.1,),
        weight_decay_before=(0.01,),
        weight_decay_after=(0.01,),
    )
    assert all(request.explain for request in trainer.calls["GetValues"])


@pytest.mark.parametrize("mode", ["independent", "leader"])
def test_a_handler_that_comes_late_hears_of_what_is_fetched_from_then_on(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, mode: str
) -> None:
    told: list[str] = []
    trainer.changes.append(change(30))
    pilot = connect(mode=mode)
    scheduler = pilot.scheduler(optimizer)
    pilot.on_change(lambda item: told.append(item.id))
    for _ in range(40):
        scheduler.step(loss=1.0)
    assert told == ["change-30"]


def test_what_a_handler_of_changes_raises_reaches_the_loop(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer
) -> None:
    trainer.changes.append(change(5))
    pilot = connect()

    @pilot.on_change
    def hear(change: lrpilot.Change) -> None:
        raise OSError(change.summary)

    scheduler = pilot.scheduler(optimizer)
    for _ in range(4):
        scheduler.step(loss=1.0)
    with pytest.raises(OSError, match=r"LR x 0\.5"):
        scheduler.step(loss=1.0)
    assert scheduler.progress == 5
    with pytest.raises(lrpilot.InvalidArgument, match="handler: got 3"):
        pilot.on_change(3)  # type: ignore[type-var]


@pytest.mark.parametrize("mode", ["independent", "leader"])
def test_changes_in_force_come_with_the_state(
    trainer: FakeTrainer, connect: Connect, optimizer: FakeOptimizer, mode: str
) -> None:
    pilot = connect(mode=mode)
    deferred = pilot.scheduler(optimizer, defer=True)
    with pytest.raises(lrpilot.AttemptNotOpen):
        deferred.changes_in_force()
    deferred.apply()
    assert deferred.changes_in_force() == []
    trainer.in_force.append(change(5))
    deferred.step(loss=1.0)
    assert [item.id for item in deferred.changes_in_force()] == ["change-5"]
    assert trainer.calls["SaveState"][-1].progress == 1


def test_changes_in_force_that_the_server_cannot_name_are_no_empty_list(
    trainer: FakeTrainer,
    connect: Connect,
    optimizer: FakeOptimizer,
    fault: type[Fault],
    refuse: Refuse,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_timing, "SAVE_PATIENCE_S", 0.2)
    scheduler = connect().scheduler(optimizer)
    trainer.always["SaveState"] = fault()
    with pytest.raises(lrpilot.ServerUnavailable):
        scheduler.changes_in_force()
    trainer.always["SaveState"] = refuse("LossesPending", "not yet")
    with pytest.raises(lrpilot.LossesPending):
        scheduler.changes_in_force()
    assert scheduler.state_dict()["state"] == ""


# Several ranks.


def test_three_ranks(trainer: FakeTrainer, refuse: Refuse, tmp_path: Path) -> None:
    """All get what rank 0 gets, errors included; see leader_program.py for the scenes."""
    rendezvous = (tmp_path / "rendezvous").as_uri()
    trainer.changes.append(change(30))
    trainer.limit = 10_000
    ranks = said_by(
        [[sys.executable, str(PROGRAM), str(n), rendezvous, trainer.address] for n in range(3)]
    )
    for number, rank in enumerate(ranks):
        name, text = rank["modes"]
        assert name == "ConnectRefused"
        assert "'leader' on rank 0, 'independent' on rank 1" in text
        assert rank["patience"] == _timing.LONGEST_WAIT_S
        assert rank["trained"] == [trainer.rate(at).hex() for at in range(41)]
        assert rank["heard"] == (["change-30"] if number == 2 else [])
        # Asked for by hand, and not reported: the reporter says that it has none.
        assert rank["by hand"] == trainer.rate(80).hex()
        name, text = rank["refused"]
        assert (name, text.endswith("(rank 0)")) == ("BeyondHorizon", number != 0)
        assert rank["apart"][0] == ("InvalidArgument" if number == 1 else "")
        assert [item[0] for item in rank["superseded"]] == ["AttemptSuperseded"] * 2
        assert [item[0] for item in rank["failed"]] == ["LossConflict"] * 2
    assert {request.holder for request in trainer.calls["GetValues"]} <= {b"holder1", b"holder2"}
