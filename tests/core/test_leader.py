"""Leader mode: a holder goes on alone with values that it was offered, and declares them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.core import Outcome, Report
from lrpilot.core._changes import Direct, Hold, Multiply, NextStage
from lrpilot.core._requests import MAX_BLOCK_VALUES
from tests.core.test_operators import act, approve, newest
from tests.core.test_requests import PLATEAU, Log, saved, spec
from tests.core.test_whole_runs import ACTIONS, SPECS, Life, lives, outcome, reports, trim_anywhere

HOLDER = "ab" * 16
LINEAR: dict[str, Any] = {"peak": 1.0, "decay": {"style": "linear"}}
"""Every progress has an LR of its own."""

QUIET = {**PLATEAU, "patience": 99}
"""A policy that makes feedback and decides nothing."""


class Job(Life):
    """A run whose attempts are in leader mode, and what its holder has."""

    def __init__(self, *, ranks: tuple[int, ...] = (0,), **fields: Any) -> None:
        super().__init__(**{"policies": [QUIET], "learning_rate": LINEAR, **fields})
        self.lead(reporters=ranks)

    def lead(self, progress: int | None = None, **fields: Any) -> None:
        """Open an attempt in leader mode."""
        self.open(progress, holder=HOLDER, **fields)

    def offer(self, begin: int, count: int = 100, stride: int = 1) -> core.Offer:
        wanted = core.OfferRequest(begin=begin, stride=stride, count=count)
        self.write(core.offer_values(self.state, wanted, holder=HOLDER))
        return core.offered(self.state, wanted)

    def declare(self, *blocks: core.Block, offer: int = 0) -> list[core.Event]:
        before = self.state.horizon
        events = core.declare_values(self.state, blocks, holder=HOLDER, offer=offer)
        self.write(events)
        assert self.state.horizon >= before
        for block in blocks:
            for at in range(block.begin, block.end, block.stride):
                assert self.state.values(at) == block.at(at)
        return events

    def go_alone(self, begin: int, end: int, offer: core.Offer) -> list[core.Event]:
        """Use values of an offer from `begin` on and below `end`, and declare them."""
        block = offer.block().cut(begin, end)
        assert block is not None
        return self.declare(block, offer=offer.permit.seq)

    def say(self, rank: int, said: Sequence[Report]) -> list[Outcome]:
        incarnation = "one" if rank == self.state.reporters.ranks[0] else f"process {rank}"
        events, outcomes = core.report_losses(self.state, said, rank=rank, incarnation=incarnation)
        self.write(events)
        return outcomes


def values(begin: int, lrs: Sequence[float], stride: int = 1) -> core.Block:
    return core.Block(begin, stride, 1, tuple(lrs), None)


# Who gets the values.


def test_the_holder_alone_gets_values() -> None:
    job = Job()
    assert job.state.holder == HOLDER
    core.check_holder(job.state, HOLDER)
    for other in ("", "cd" * 16):
        with pytest.raises(core.NotHolder, match="is in leader mode"):
            core.check_holder(job.state, other)
        with pytest.raises(core.NotHolder):
            core.offer_values(job.state, core.OfferRequest(begin=0), holder=other)
        with pytest.raises(core.NotHolder):
            core.declare_values(job.state, [values(0, [1.0])], holder=other)
    # Losses and states are no business of the holder's.
    job.report(0, [1.0])
    core.save_state(job.state, 1)


def test_an_independent_attempt_has_no_holder() -> None:
    log = Log()
    log.open()
    core.check_holder(log.state, "")
    core.check_holder(log.state, HOLDER)
    with pytest.raises(core.NotHolder, match="is not in leader mode"):
        core.offer_values(log.state, core.OfferRequest(begin=0), holder=HOLDER)
    with pytest.raises(core.NotHolder, match="is not in leader mode"):
        core.declare_values(log.state, [values(0, [1.0])], holder="")


def test_leader_mode_and_a_shared_key_do_not_go_together() -> None:
    job = Job()
    with pytest.raises(core.InvalidRequest, match="key: got 'k'; allowed: none in leader mode"):
        job.lead(0, key="k")


def test_a_log_from_before_leader_mode_reads_as_independent() -> None:
    log = Log()
    (opened,) = log.open()
    assert b"holder" not in core.encode(opened)
    assert core.decode(core.encode(opened)) == opened
    assert log.state.holder == ""


def test_events_are_read_back_as_they_were_written() -> None:
    job = Job(weight_decay=0.1)
    offer = job.offer(0)
    job.go_alone(0, 3, offer)
    for row in job.rows:
        assert core.encode(core.decode(row)) == row
    declared = core.decode(job.rows[-1])
    assert isinstance(declared, core.Declared)
    assert declared.blocks == (offer.block().cut(0, 3),)


def test_nothing_is_waived() -> None:
    job = Job()
    assert core.waive(job.state, 100) == []


def test_another_attempt_ends_leader_mode_and_forgets_the_permits() -> None:
    job = Job()
    job.go_alone(0, 3, job.offer(0))
    job.open(0)
    assert (job.state.holder, job.state.permits, job.state.declared) == ("", [], [])
    assert job.state.permitted == 0


def test_a_rollback_of_a_leader_attempt_is_one() -> None:
    job = Job(policies=[{"kind": "nonfinite", "mode": "act", "streak": 1, "factor": 0.5}])
    job.report(0, [1.0] * 6 + [float("nan")])
    (asked,) = job.state.plan.directives(10, 10)
    job.lead(4, directive=asked.id, met_in=(1, job.state.token))
    assert job.state.holder == HOLDER
    # The cut belongs to the opening: it is in every offer, and no declaration moves it.
    offer = job.offer(4)
    job.go_alone(4, 8, offer)
    assert [item.effective for item in job.state.plan.adjustments] == [4]


# Offers and permits.


def test_an_offer_holds_what_is_recorded_and_then_what_the_plan_says() -> None:
    job = Job()
    job.take(0)
    assert job.offer(2, 6).block().learning_rates == tuple(job.rates(2, 8))
    assert job.offer(2, 3, stride=5).block() == values(2, [job.rates(at, at + 1)[0] for at in
                                                           (2, 7, 12)], 5)  # fmt: skip
    # Past the end of the run its end value is served.
    assert job.offer(999, 4).block().learning_rates == tuple(job.rates(999, 1003))


def test_an_offer_outlives_what_happens_to_the_run() -> None:
    job = Job(policies=[PLATEAU])
    offer = job.offer(0, 50)
    wanted = job.rates(0, 50)
    job.report(0, [1.0] * 9)
    act(job, core.ScaleLearningRate(0.5))
    assert offer.block().learning_rates == tuple(wanted)
    assert job.rates(0, 50) != wanted


def test_a_permit_is_recorded_when_it_reaches_further_or_the_plan_changed() -> None:
    job = Job()
    first = job.offer(0, 10)
    assert (first.permitted, first.permit[:3]) == (10, (3, 0 + 4, 10))
    seq = job.state.seq
    job.report(0, [1.0])
    assert job.offer(2, 5).permit == first.permit
    assert job.state.seq == seq + 1
    further = job.offer(2, 10)
    assert (further.permitted, further.permit.begin) == (12, 5)
    act(job, core.ScaleLearningRate(0.5))
    changed = job.offer(2, 5)
    assert changed.permit.seq == job.state.seq
    # What was permitted stays permitted.
    assert changed.permitted == changed.permit.end == 12
    assert changed.etag == job.state.etag != further.etag


def test_an_offer_is_bounded() -> None:
    job = Job()
    assert job.offer(0, core.MAX_OFFERED_STEPS).steps == core.MAX_OFFERED_STEPS
    end = core.MAX_PROGRESS
    offer = job.offer(end - 2, 10, stride=2)
    assert (offer.steps, offer.permitted) == (2, end + 1)
    many = Job(groups=[{"name": str(at)} for at in range(100)])
    assert many.offer(0, 4096).steps == MAX_BLOCK_VALUES // 100
    job.lead(5)
    with pytest.raises(core.BeforeAttempt):
        job.offer(4)
    for field in ({"begin": -1}, {"stride": 0}, {"count": 0}, {"count": 4097}):
        wanted = core.OfferRequest(**{"begin": 9, **field})
        with pytest.raises(core.InvalidRequest, match=next(iter(field))):
            core.offer_values(job.state, wanted, holder=HOLDER)
    job.write(core.finish_run(job.state, "end"))
    with pytest.raises(core.RunFinished):
        job.offer(9)


def test_the_etag_tells_that_a_change_was_moved() -> None:
    job = Job()
    job.take(0)
    offer = job.offer(4)
    act(job, core.ScaleLearningRate(0.5))
    before = job.state.etag
    job.go_alone(4, 9, offer)
    assert job.state.etag != before


# Declarations: facts.


def test_what_was_declared_is_a_fact() -> None:
    job = Job()
    job.take(0)
    offer = job.offer(4)
    # A declaration is what happened, even where the plan says otherwise.
    job.declare(values(4, [0.25, 0.125]), values(8, [0.5, 0.75], stride=3))
    assert job.take(4).learning_rates == (0.25, 0.125)
    assert job.take(8, stride=3).learning_rates[:2] == (0.5, 0.75)
    assert job.state.declared == [(4, 12, 4)]
    assert job.state.in_use == 11
    assert offer.permitted > 12


def test_what_was_recorded_behind_it_is_dropped() -> None:
    job = Job(policies=[PLATEAU])
    job.take(0)
    offer = job.offer(4)
    job.report(0, [1.0] * 4)
    # These never arrived: losses 1 and 3 act in them.
    stale = job.take(4)
    assert stale.begin == 4
    job.go_alone(4, 6, offer)
    assert job.state.records.at(6) is None
    job.report(4, [1.0] * 4)
    assert job.take(6).learning_rates != stale.learning_rates[2:]


def test_below_the_horizon_of_its_offer_a_declaration_changes_nothing() -> None:
    job, other = Job(policies=[PLATEAU]), Job(policies=[PLATEAU])
    for log in (job, other):
        log.take(0)
        log.report(0, [1.0] * 4)
        log.offer(2)
    job.go_alone(4, 8, job.offer(2))
    other.take(4)
    assert job.state.late == {}
    assert job.state.waivers == 0
    for log in (job, other):
        log.report(4, [1.0] * 6)
    assert outcome(job.state) == outcome(other.state)


@pytest.mark.parametrize("delay", [1, 4])
def test_losses_that_would_have_acted_on_declared_steps_are_waived(delay: int) -> None:
    job = Job(policies=[PLATEAU], feedback={"delay": delay})
    job.take(0)
    offer = job.offer(delay)
    job.report(0, [1.0] * 8)
    assert job.state.observers.count == 8
    end = 10
    job.go_alone(delay, end, offer)
    until = end - delay
    assert job.state.frontier == max(8, until)
    assert job.state.horizon >= end
    assert sorted(job.state.late) == [(at, 0) for at in range(until)][:8]
    assert job.state.observers.count == max(0, 8 - until)
    assert job.state.waivers == 1
    # A repeat of a loss that was taken is known as such, by its bits.
    (said,) = job.say(0, [Report(0, 1.0, 1.0, 1)])
    assert said is Outcome.LATE
    with pytest.raises(core.LossConflict):
        job.say(0, [Report(0, 2.0, 1.0, 1)])
    # Those from there on decide afresh, at exactly n + D.
    frontier = job.state.frontier
    job.report(frontier, [2.0] * (until + 3 - frontier))
    decided = [(item.decided_at, item.effective) for item in job.state.plan.adjustments]
    assert decided[0][0] >= until
    assert all(effective == at + delay for at, effective in decided)


def test_decisions_from_waived_losses_are_forgotten_and_others_keep_their_names() -> None:
    job = Job(policies=[PLATEAU], feedback={"delay": 4})
    job.take(0)
    offer = job.offer(4)
    job.report(0, [1.0] * 12)
    decided = {item.decided_at: item for item in job.state.plan.adjustments}
    assert list(decided) == [1, 5, 9]
    # Losses from 3 on count: 3 is the best one, and 4 is not better.
    job.go_alone(4, 7, offer)
    assert [item.decided_at for item in job.state.plan.adjustments] == [4, 8]
    assert {item.decided_at for item in job.state.forgotten} == {1, 5, 9}
    # Now 4 to 6 are waived too, and 7 is the first of all.
    job.go_alone(7, 11, offer)
    assert [item.decided_at for item in job.state.plan.adjustments] == [8]
    same = newest(job)
    assert {item.id for item in job.state.forgotten} >= {decided[1].id, decided[5].id}
    assert job.state.find(same.id) == same


def test_a_decision_in_the_values_that_were_offered_stays() -> None:
    """What the loss at 1 decided shows at 5, in values that had not arrived yet but were offered:
    it is neither forgotten nor shown twice."""
    job = Job(policies=[PLATEAU], learning_rate={"peak": 1.0})
    job.take(0)
    job.report(0, [1.0] * 3)
    offer = job.offer(4)
    assert offer.block().learning_rates[:4] == (1.0, 0.5, 0.5, 0.5)
    job.report(3, [1.0] * 6)
    job.go_alone(4, 9, offer)
    # Of the losses that came since, those that act from 9 on decide.
    assert [item.decided_at for item in job.state.plan.adjustments] == [1, 5]
    assert job.rates(4, 10) == [1.0, 0.5, 0.5, 0.5, 0.5, 0.25]


def test_what_acts_between_two_used_steps_counts_as_declared_too() -> None:
    """With a stride of 3 the loss at 3 (n + D = 7) first shows at 9, which was used alone."""
    job = Job(policies=[PLATEAU], learning_rate={"peak": 1.0})
    job.take(0, stride=3)  # 0 and 3
    offer = job.offer(0, stride=3)
    job.report(0, [1.0] * 3)
    assert job.take(6, stride=3).last == 6
    seen = job.state.observers
    job.report(3, [1.0, 1.0])
    job.declare(values(9, [1.0, 1.0], stride=3), offer=offer.permit.seq)
    # Up to 6 the values had arrived; 7 to 12 are the leader's.
    assert sorted(at for at, _ in job.state.late) == [3, 4]
    assert job.state.frontier == 13 - 4
    assert job.state.observers == seen


def test_a_declaration_of_many_steps_is_that_of_its_parts() -> None:
    parts, whole = Job(policies=[PLATEAU]), Job(policies=[PLATEAU])
    for job, cuts in ((parts, [(4, 6), (6, 7), (7, 12)]), (whole, [(4, 12)])):
        job.take(0)
        offer = job.offer(4)
        job.report(0, [1.0] * 10)
        act(job, core.ScaleLearningRate(0.5))
        for begin, end in cuts:
            job.go_alone(begin, end, offer)
        job.report(10, [1.0] * 5)
    assert outcome(parts.state) == outcome(whole.state)
    assert parts.state.late == whole.state.late
    assert parts.state.declared == whole.state.declared == [(4, 12, 8)]


def test_a_second_stretch_is_one_of_its_own() -> None:
    job = Job()
    job.take(0)
    offer = job.offer(4)
    job.go_alone(4, 6, offer)
    job.report(2, [1.0] * 3)
    job.take(6, count=1)
    job.go_alone(7, 9, offer)
    assert job.state.declared == [(4, 6, 2), (7, 9, 2)]


def test_without_feedback_the_progress_in_use_moves() -> None:
    job = Job(policies=[])
    job.take(0)
    offer = job.offer(4)
    act(job, core.ScaleLearningRate(0.5))
    job.go_alone(4, 50, offer)
    assert (job.state.in_use, job.state.horizon) == (49, 53)
    assert (job.state.frontier, job.state.waivers, job.state.late) == (0, 0, {})
    (change,) = job.state.plan.adjustments
    assert change.effective == 50
    # Advice reads losses, whatever the values were.
    job.report(0, [1.0])
    assert job.state.observers.count == 1


# Declarations: what operators did meanwhile.


def test_what_operators_changed_meanwhile_takes_effect_after_it() -> None:
    job = Job(learning_rate={"peak": 1.0})
    job.take(0)
    offer = job.offer(4)
    act(job, core.ScaleLearningRate(0.5), "first")
    job.report(0, [1.0, 1.0])
    act(job, core.HoldValues())
    act(job, core.Ask("evaluate"))
    assert [item.effective for item in job.state.plan.adjustments] == [4, 6, 6]
    names = [item.id for item in job.state.plan.adjustments]
    job.go_alone(4, 10, offer)
    moved = job.state.plan.adjustments
    assert [item.effective for item in moved] == [10, 10, 10]
    assert [item.id for item in moved] == names
    assert (moved[0].before, moved[0].after) == ((1.0,), (0.5,))
    assert job.rates(9, 12) == [1.0, 0.5, 0.5]
    assert [item.id for item in job.state.plan.directives(10, 10)] == [names[2]]
    # A repeat of the call gets the first answer all the same.
    assert act(job, core.ScaleLearningRate(0.5), "first") == []
    assert job.state.answers["first"] == ("adjusted", 4)
    # The next one lands behind it.
    act(job, core.ScaleLearningRate(0.5))
    assert newest(job).effective == job.state.horizon >= 10


def test_what_was_in_force_or_in_the_offer_stays_where_it_was() -> None:
    job = Job(learning_rate={"peak": 1.0})
    act(job, core.ScaleLearningRate(0.5))
    job.report(0, [1.0])
    job.take(0)  # 0 to 4: the first change shows in it.
    act(job, core.ScaleLearningRate(0.5))
    offer = job.offer(5)
    act(job, core.ScaleLearningRate(0.5))
    job.go_alone(5, 9, offer)
    assert [item.effective for item in job.state.plan.adjustments] == [4, 5, 9]
    assert job.rates(4, 10) == [0.5, 0.25, 0.25, 0.25, 0.25, 0.125]


def test_an_anneal_that_was_offered_is_not_begun_again() -> None:
    job = Job(learning_rate={"peak": 1.0})
    job.take(0)
    act(job, core.DecayNow(100, "linear"))
    offer = job.offer(4)
    wanted = job.rates(4, 120)
    job.go_alone(4, 60, offer)
    assert job.rates(4, 120) == wanted


def test_an_operators_change_that_an_earlier_attempt_left_ahead_stays() -> None:
    job = Job(learning_rate={"peak": 1.0})
    job.report(0, [1.0] * 20)
    act(job, core.DecayNow(100, "linear"))
    job.lead(10)
    job.take(10)
    offer = job.offer(14)
    wanted = job.rates(14, 60)
    job.go_alone(14, 40, offer)
    assert job.rates(14, 60) == wanted


def test_an_unknown_offer_is_taken_for_the_oldest_that_reached_the_values() -> None:
    job = Job(learning_rate={"peak": 1.0})
    job.take(0)
    job.offer(4, 2)
    act(job, core.ScaleLearningRate(0.5))
    job.offer(4, 10)
    act(job, core.ScaleLearningRate(0.5))
    # The first offer does not reach 6, the second one does: the first change was known there.
    job.declare(values(6, [0.5, 0.5]))
    assert [item.effective for item in job.state.plan.adjustments] == [4, 8]
    job.lead(0)
    job.take(0)
    job.offer(4, 2)
    act(job, core.ScaleLearningRate(0.5))
    job.offer(4, 10)
    job.declare(values(4, [0.25] * 4))
    assert newest(job).effective == 8


def test_a_revision_holds_from_behind_it_and_so_do_its_policies() -> None:
    job = Job(policies=[PLATEAU], learning_rate={"peak": 1.0})
    job.take(0)
    offer = job.offer(4)
    job.report(0, [1.0])
    new = spec(policies=[{**PLATEAU, "patience": 2}], learning_rate={"peak": 2.0})
    job.write(core.revise_run(job.state, new, "revise"))
    assert job.state.plan.revisions[-1].effective == 5
    job.go_alone(4, 12, offer)
    revision = job.state.plan.revisions[-1]
    assert (revision.effective, revision.observes_from) == (12, 8)
    job.report(8, [1.0] * 5)
    assert job.rates(11, 16) == [1.0, 2.0, 2.0, 2.0, 1.0]
    # The old policy would have halved the LR twice by then.
    assert [item.decided_at for item in job.state.plan.adjustments] == [11]


def test_an_approved_advice_waits_too_and_stays_approved() -> None:
    advised = {**PLATEAU, "mode": "advise"}
    job = Job(policies=[QUIET, advised], learning_rate={"peak": 1.0})
    job.take(0)
    offer = job.offer(4)
    job.report(0, [1.0] * 7)
    # Of the losses that go on counting: 4 is the best one, and 5 is not better.
    known = {item.decided_at: item for item in job.state.advice}
    assert list(known) == [1, 5]
    approve(job, known[5].id)
    job.go_alone(4, 8, offer)
    assert newest(job).effective == 11
    assert [item.id for item in job.state.advice] == [known[5].id]
    with pytest.raises(core.AdviceExpired, match="approved already"):
        approve(job, known[5].id)
    with pytest.raises(core.AdviceExpired, match="has forgotten"):
        approve(job, known[1].id)


def test_a_stage_that_a_waived_loss_ended_goes_on() -> None:
    job = Job(
        learning_rate=None,
        stages=[
            {"name": "one", "when": {"below": {"value": 0.5, "window": 1}}, "latest": 100,
             "learning_rate": {"peak": 1.0}},
            {"name": "two", "learning_rate": {"peak": 0.25}},
        ],
    )  # fmt: skip
    job.take(0)
    offer = job.offer(4)
    job.report(0, [1.0, 0.4, 1.0])
    assert job.rates(4, 8) == [1.0, 0.25, 0.25, 0.25]
    job.go_alone(4, 20, offer)
    assert job.rates(4, 22) == [1.0] * 18
    # A stage that an operator leaves meanwhile ends behind it.
    job.report(16, [1.0])
    offer = job.offer(20)
    act(job, core.EnterNextStage())
    job.go_alone(20, 30, offer)
    left = newest(job)
    assert (left.effective, left.change.action) == (30, NextStage.action)
    assert job.rates(28, 32) == [1.0, 1.0, 0.25, 0.25]


# Retries and refusals.


def test_a_declaration_is_recorded_once() -> None:
    job = Job()
    job.take(0)
    offer = job.offer(4)
    assert len(job.go_alone(4, 8, offer)) == 1
    job.report(4, [1.0] * 3)
    snapshot = job.state.snapshot()
    assert job.go_alone(4, 8, offer) == []
    assert job.go_alone(5, 7, offer) == []
    assert job.state.snapshot() == snapshot
    # Its answer was lost, and meanwhile the holder went on.
    (declared,) = job.go_alone(4, 11, offer)
    assert isinstance(declared, core.Declared)
    assert declared.blocks == (offer.block().cut(8, 11),)


@pytest.mark.parametrize(
    "block",
    [
        values(4, [0.5, 0.25, 0.125]),
        values(4, [0.5, 0.125], stride=2),  # 6 was used with another value
        values(3, [0.5]),  # had arrived
        values(5, [0.25, 0.5, 0.25]),
    ],
)
def test_other_values_for_what_was_declared_are_refused(block: core.Block) -> None:
    job = Job()
    job.take(0)
    job.offer(4)
    job.declare(values(4, [0.5, 0.25, 0.25]))
    with pytest.raises(core.ValuesConflict, match="was declared with"):
        job.declare(block)


def test_what_was_not_permitted_is_refused() -> None:
    job = Job()
    with pytest.raises(core.BeyondPermit, match="permitted below 0"):
        job.declare(values(4, [1.0]))
    offer = job.offer(0, 10)
    job.declare(values(0, [1.0] * 10))
    with pytest.raises(core.BeyondPermit, match="permitted below 10") as caught:
        job.declare(values(10, [1.0]))
    assert caught.value.facts["permitted"] == 10
    # The number of an offer that this log does not know.
    job.offer(4, 20)
    with pytest.raises(core.BeyondPermit):
        job.declare(values(10, [1.0]), offer=99)
    # An attempt that was superseded has no permit any more: it is refused before that.
    job.lead(0)
    with pytest.raises(core.BeyondPermit):
        job.go_alone(4, 6, offer)


@pytest.mark.parametrize(
    ("field", "blocks"),
    [
        ("blocks: got 0 steps", []),
        ("blocks: got 4097 steps", [values(0, [1.0] * 4097)]),
        ("blocks.0.begin", [values(-1, [1.0])]),
        ("blocks.0.stride", [values(0, [1.0], stride=0)]),
        ("blocks.0.end", [values(core.MAX_PROGRESS, [1.0])]),
        ("blocks.1.begin", [values(0, [1.0, 1.0]), values(1, [1.0])]),
        ("blocks.0.learning_rates", [values(0, [])]),
        ("blocks.0: got a number that is not finite", [values(0, [float("nan")])]),
        ("blocks.0: got a number that is not finite", [values(0, [1.0, float("inf")])]),
        ("blocks.0.weight_decays: got 1 numbers", [core.Block(0, 1, 1, (1.0,), (0.1,))]),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(field: str, blocks: list[core.Block]) -> None:
    job = Job()
    job.offer(0, 100)
    with pytest.raises(core.InvalidRequest) as caught:
        core.declare_values(job.state, blocks, holder=HOLDER)
    assert field in str(caught.value)


def test_numbers_of_a_declaration_fit_the_groups_of_the_run() -> None:
    job = Job(groups=[{"name": "a"}, {"name": "b"}], weight_decay=0.1)
    job.offer(0, 100)
    with pytest.raises(core.InvalidRequest, match=r"blocks\.0\.learning_rates: got 3 numbers"):
        job.declare(core.Block(0, 1, 2, (1.0, 1.0, 1.0), None))
    with pytest.raises(core.InvalidRequest, match=r"blocks\.0\.weight_decays: got 0 numbers"):
        job.declare(core.Block(0, 1, 2, (1.0, 1.0), None))


def test_a_declaration_below_the_attempt_or_of_a_finished_run_is_refused() -> None:
    job = Job()
    job.lead(10)
    job.offer(10)
    with pytest.raises(core.BeforeAttempt):
        job.declare(values(9, [1.0]))
    job.declare(values(10, [1.0]))
    job.write(core.finish_run(job.state, "end"))
    assert job.declare(values(10, [1.0])) == []
    with pytest.raises(core.RunFinished):
        job.declare(values(11, [1.0]))


# Several reporters and skipped updates.


@pytest.mark.parametrize("order", ["reports first", "declaration first"])
def test_what_several_reporters_say_of_declared_steps_comes_late(order: str) -> None:
    job = Job(ranks=(0, 3), policies=[PLATEAU])
    job.take(0)
    offer = job.offer(4)

    def say() -> None:
        for rank in (0, 3):
            job.say(rank, [Report(at, 1.0 + rank, 1.0, at + 1) for at in range(5)])
        job.say(3, [Report(5, 4.0, 1.0, 6)])
        job.say(0, [Report(5, 1.0, 1.0, 5, skipped=True)])

    if order == "reports first":
        say()
    job.go_alone(4, 8, offer)
    if order == "declaration first":
        say()
    wanted = {(at, rank): 1.0 + rank for at in range(4) for rank in (0, 3)}
    assert job.state.late == wanted
    assert job.state.frontier == 5
    assert [(item.progress, item.loss) for item in map(job.state.observation, (4,)) if item] == [
        (4, 2.5)
    ]
    assert job.state.observers.skipped == 1
    job.say(0, [Report(5, 1.0, 1.0, 6, tries=1)])
    assert job.state.frontier == 6
    assert job.state.reporters.members == {4: {0: 1.0, 3: 4.0}, 5: {0: 1.0, 3: 4.0}}


def test_skipped_updates_of_declared_steps_count_for_nobody() -> None:
    job = Job()
    job.take(0)
    offer = job.offer(4)
    job.say(0, [Report(0, 1.0, 1.0, 0, skipped=True), Report(0, 1.0, 1.0, 1, tries=1)])
    assert job.state.observers.skipped == 1
    job.go_alone(4, 8, offer)
    assert job.state.observers.skipped == 0
    assert job.state.late == {(0, 0): 1.0}
    assert job.say(0, [Report(0, 1.0, 1.0, 0, skipped=True)]) == [Outcome.REPEATED]


# Attempts and states afterwards.


def test_a_later_attempt_inherits_the_facts_below_its_horizon() -> None:
    job = Job(policies=[PLATEAU])
    job.take(0)
    job.offer(4)
    job.report(0, [1.0] * 4)
    job.declare(values(4, [0.5, 0.25, 0.125, 0.0625]))
    for begin, wanted in ((6, [0.125, 0.0625]), (2, [0.5, 0.25]), (5, [0.25, 0.125, 0.0625])):
        log = Log.__new__(Log)
        log.state, log.rows = core.fold("run", job.rows), list(job.rows)
        log.open(begin)
        got = log.take(max(begin, 4), count=4).learning_rates
        assert list(got[: len(wanted)]) == wanted
        # What it waived below where the attempt opens stays so.
        assert {at for at, _ in log.state.late} == set(range(min(begin, 4)))


def test_a_state_saved_before_the_losses_in_it_were_waived_brings_its_own_past() -> None:
    job = Job(policies=[PLATEAU], learning_rate={"peak": 1.0})
    job.take(0)
    offer = job.offer(4)
    job.report(0, [1.0] * 3)
    wanted = job.rates(3, 7)
    before = saved(job, 3)
    job.go_alone(4, 10, offer)
    assert job.state.history_differs(before.seq, 3)
    # A state that holds none of those losses, or that was saved afterwards, is the log's.
    assert not job.state.history_differs(before.seq, 0)
    after = saved(job, 6)
    assert not job.state.history_differs(after.seq, 6)
    job.lead(saved=before, digest_at_saved=before.digest)
    assert job.rates(3, 7) == wanted
    assert job.state.late == {}


def test_a_state_saved_afterwards_is_that_of_the_log() -> None:
    job = Job(policies=[PLATEAU], learning_rate={"peak": 1.0})
    job.take(0)
    offer = job.offer(4)
    act(job, core.ScaleLearningRate(0.5))
    job.go_alone(4, 10, offer)
    job.report(6, [1.0] * 3)
    state = saved(job, 8)
    rates = job.rates(8, 12)
    job.lead(saved=state, digest_at_saved=state.digest)
    assert job.rates(8, 12) == rates
    # And where the log was lost, it is restored in leader mode.
    found = Job.__new__(Job)
    found.state, found.rows = core.RunState("run"), []
    found.lead(saved=state)
    assert (found.state.holder, found.state.begin) == (HOLDER, 8)
    assert found.rates(8, 12) == rates
    assert found.state.permitted == 0
    found.go_alone(12, 14, found.offer(8))
    assert core.fold("run", found.rows).snapshot() == found.state.snapshot()


# What the answers name.


def test_the_plan_names_what_changes_values_in_a_stretch() -> None:
    job = Job(policies=[PLATEAU], learning_rate={"peak": 1.0})
    job.report(0, [1.0, 1.0])
    act(job, core.Ask("evaluate"))
    act(job, core.HoldValues())
    kinds = [(item.effective, type(item.change)) for item in job.state.plan.changes(5, 6)]
    assert kinds == [(5, Multiply), (6, Hold)]
    assert job.state.plan.changes(6, 6)[0].effective == 6
    assert job.state.plan.changes(7, 99) == []
    assert [type(item.change) for item in job.state.plan.adjustments][1:] == [Direct, Hold]


def test_what_departs_from_the_base_schedule_is_known_by_progress() -> None:
    job = Job(
        learning_rate=None,
        stages=[
            {"name": "one", "until": 50, "learning_rate": {"peak": 1.0}},
            {"name": "two", "until": 90, "learning_rate": {"peak": 0.25}},
            {"name": "three", "learning_rate": {"peak": 0.125}},
        ],
    )
    job.report(0, [1.0] * 4)
    act(job, core.EnterNextStage())

    def departures(progress: int) -> list[str]:
        return [item.change.action for item in job.state.plan.departures(progress)]

    assert [departures(at) for at in (7, 8, 49)] == [[], ["next stage"], ["next stage"]]
    # There the stage would have begun anyway.
    assert departures(50) == []
    act(job, core.ScaleLearningRate(0.5))
    assert departures(8) == ["next stage", "multiply"]
    # And a stage that begins there would have ended the change.
    assert departures(50) == ["next stage", "multiply"]
    assert departures(90) == []


# Whole lives.

SLOW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

FIELDS = {
    **SPECS,
    "no feedback": {
        **SPECS["one stage"],
        "policies": [{"kind": "plateau", "patience": 1, "mode": "advise"}],
    },
}


def revised(log: Log, name: str) -> None:
    """Give the run a spec with another peak, and policies that know nothing yet."""
    data = log.state.spec.to_mapping()
    for part in (data, *data.get("stages", [])):
        for rates in (part.get("learning_rate"), *part.get("groups", [])):
            if rates is not None and "peak" in rates:
                rates["peak"] *= 0.75
    for policy in data["policies"]:
        if policy["kind"] == "plateau":
            policy["patience"] += 1
    log.write(core.revise_run(log.state, core.parse_spec(data), name))


@SLOW
@given(lives(), st.data())
def test_with_the_server_there_the_values_are_those_of_an_independent_attempt(
    life: tuple[str, list[list[Report]], dict[int, core.Action]], data: st.DataObject
) -> None:
    name, said, actions = life
    fields = SPECS[name]
    one, job = Life(**fields), Job(**fields)
    one.open()
    for at, step in enumerate(said):
        if data.draw(st.booleans(), "offer"):
            job.offer(at, data.draw(st.integers(1, 50), "count"))
        for log in (one, job):
            if at in actions:
                log.operator(actions[at], f"act {at}")
            assert log.take(at, count=3, in_use=at).begin == at
            log.said(step)
    # What they name by numbers of their logs is not the same there.
    assert [job.state.values(at) for at in range(130)] == [
        one.state.values(at) for at in range(130)
    ]
    assert outcome(job.state) == outcome(one.state)
    assert list(job.state.records) == list(one.state.records)


class Outage:
    """A job that loses its server for a while: what it used and said, and what others did."""

    def __init__(self, name: str, data: st.DataObject) -> None:
        self.data = data
        draw = data.draw
        self.ranks = draw(st.sampled_from([(0,), (0,), (0, 5)]), "reporters")
        self.delay = draw(st.sampled_from([1, 2, 3, 8]), "delay")
        feedback = {**FIELDS[name]["feedback"], "delay": self.delay}
        self.job = Job(**{**FIELDS[name], "feedback": feedback}, ranks=self.ranks)
        self.stride = draw(st.sampled_from([1, 1, 2, 3]), "stride")
        self.at = 0
        """Progress to be used next."""
        self.arrived = -1
        """Greatest progress whose values arrived."""
        self.said: list[list[Report]] = []
        """What every reporter is to say, in order."""
        self.heard = dict.fromkeys(self.ranks, 0)
        self.offer = self.job.offer(0, 200, self.stride)
        self.count = 0

    def step(self) -> None:
        """Use the values at a progress, and compute a loss there."""
        said = self.data.draw(reports(self.at), "said")
        moved = self.at + self.stride
        self.said.append([
            item if item.skipped else replace(item, moves_to=moved) for item in said
        ])  # fmt: skip
        self.at = moved

    def online(self) -> None:
        """Train while the server is there."""
        draw, job = self.data.draw, self.job
        for _ in range(draw(st.integers(1, 6), "blocks")):
            self.hear(draw(st.integers(0, len(self.said)), "heard"))
            if draw(st.booleans(), "act"):
                self.meddle()
            if draw(st.integers(0, 2), "offer") == 0:
                self.offer = job.offer(self.at, 200, self.stride)
            got = self.ask(draw(st.integers(1, 9), "count"))
            if got is not None:
                self.arrived = got.last
            while self.at <= self.arrived and draw(st.integers(0, 4), "step"):
                self.step()

    def ask(self, count: int) -> core.Block | None:
        begin = self.at if self.at > self.arrived else self.arrived + self.stride
        wanted = core.ValuesRequest(begin=begin, stride=self.stride, count=count, in_use=self.at)
        try:
            found = core.get_values(self.job.state, wanted)
        except core.BeyondHorizon:
            return None
        if isinstance(found, core.Recorded):
            self.job.write([found])
            found = core.get_values(self.job.state, wanted)
        assert found is None or isinstance(found, core.Block)
        return found

    def meddle(self) -> None:
        self.count += 1
        if self.data.draw(st.integers(0, 3), "revise") == 0:
            revised(self.job, f"revise {self.count}")
        else:
            self.job.operator(self.data.draw(ACTIONS, "action"), f"act {self.count}")

    def alone(self) -> list[core.Block]:
        """Go on with offered values; return them in some blocks."""
        draw = self.data.draw
        while self.at <= self.arrived:
            self.step()
        if draw(st.booleans(), "another stride"):
            self.stride = draw(st.sampled_from([1, 2, 3]), "stride")
            self.offer = self.job.offer(self.at, 200, self.stride)
        offered = self.offer.block()
        # The offer begins where it was made; what is used of it begins here.
        if offered.at(self.at) is None:
            self.offer = self.job.offer(self.at, 200, self.stride)
            offered = self.offer.block()
        blocks = []
        for _ in range(draw(st.integers(1, 3), "parts")):
            steps = draw(st.integers(1, 12), "alone")
            part = offered.cut(self.at, self.at + steps * self.stride)
            assert part is not None
            blocks.append(part)
            for _ in range(steps):
                self.step()
        return blocks

    def hear(self, until: int) -> None:
        """Let the server hear what was said of the first `until` steps."""
        for rank in self.ranks:
            said = [report for step in self.said[self.heard[rank] : until] for report in step]
            if said:
                self.job.say(rank, said)
            self.heard[rank] = max(self.heard[rank], until)


def told(state: core.RunState) -> list[Any]:
    """Return what does not depend on when the server was told what.

    Without feedback the advice does: it names the values that were planned then.
    """
    operators = [
        (item.effective, core.summary_of(item.change), item.before, item.after)
        for item in state.plan.adjustments
        if item.order >= 3000
    ]
    return [
        *outcome(state, 300)[: None if state.spec.has_feedback else 1],
        repr(sorted(state.late.items())),
        (state.frontier, state.horizon, state.in_use, state.declared),
        repr((state.loss_progress, state.loss_values, sorted(state.extras.items()))),
        repr(operators),
        [(item.effective, item.observes_from) for item in state.plan.revisions],
    ]


def as_if_known(events: Sequence[core.Event], low: int, first: int, end: int) -> core.RunState:
    """Return the run as if it had been known that the job would go on alone up to `end`.

    Losses from `first` on that would have acted there never came; what operators did after the
    offer, and would have shown from `low` on, they did behind it. Nothing was declared.
    """
    state = core.RunState("run")
    declared = next(item for item in events if isinstance(item, core.Declared))
    for seq, item in enumerate(events, 1):
        known: core.Event = item
        if isinstance(item, (core.Permitted, core.Declared, core.Recorded)):
            # Something else, so that the others keep their sequence numbers.
            known = core.Acknowledged(1, "-", "done", 0, 0)
        elif isinstance(item, core.Reported):
            until = end - state.delay
            said = [
                Report(report.progress, None, 1.0, report.moves_to)
                if first <= report.progress < until
                else report
                for report in item.reports
                if not (report.skipped and first <= report.progress < until)
            ]
            known = replace(item, reports=tuple(said))
        elif isinstance(item, core.Adjusted):
            if seq > declared.offer and low <= item.effective < end:
                known = replace(item, effective=end)
        elif isinstance(item, core.Revised):
            assert item.effective is not None
            if seq > declared.offer and low <= item.effective < end:
                observes_from = end - state.delay if state.spec.has_feedback else item.observes_from
                known = replace(item, effective=end, observes_from=observes_from)
        state.apply(known)
    return state


@SLOW
@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_it_does_not_matter_when_the_server_hears_of_it(name: str, data: st.DataObject) -> None:
    """Nor do policies and operators see more of a declaration than losses that never came."""
    life = Outage(name, data)
    life.online()
    if data.draw(st.booleans(), "an answer is lost"):
        life.ask(data.draw(st.integers(1, 9), "count"))
    heard = data.draw(st.integers(0, len(life.said)), "heard")
    blocks = life.alone()
    if data.draw(st.booleans(), "meanwhile"):
        life.hear(heard)
        life.meddle()
    low, end, offer = life.arrived + 1, blocks[-1].last + 1, life.offer.permit
    before, rows, said = life.job.state.snapshot(), list(life.job.rows), dict(life.heard)
    outcomes = []
    for _ in range(2):
        life.job = job = Job.__new__(Job)
        job.state, job.rows = core.restore_snapshot(before), list(rows)
        life.heard, left = dict(said), list(blocks)
        while left:
            if data.draw(st.booleans(), "hear"):
                life.hear(data.draw(st.integers(0, len(life.said)), "some"))
            count = data.draw(st.integers(1, len(left)), "parts at once")
            job.declare(*left[:count], offer=offer.seq)
            left = left[count:]
        life.hear(len(life.said))
        outcomes.append(told(job.state))
    assert outcomes[0] == outcomes[1]
    for _ in range(data.draw(st.integers(0, 6), "more")):
        life.step()
    life.meddle()
    life.hear(len(life.said))
    state = life.job.state
    has_feedback = state.spec.has_feedback
    first = max(low, offer.begin) - life.delay if has_feedback else end
    known = as_if_known([core.decode(row) for row in life.job.rows], low, max(first, 0), end)
    event(f"waives {max(0, end - life.delay - first) > 0}")
    event(f"moves {[item.id for item in state.plan.adjustments if item.effective == end] != []}")
    assert [state.values(at) for at in range(end, 300)] == [
        known.plan.values(at) for at in range(end, 300)
    ]
    if has_feedback:
        assert repr(state.observers.to_mapping()) == repr(known.observers.to_mapping())
    assert (state.frontier, repr(state.loss)) == (known.frontier, repr(known.loss))
    assert core.fold("run", life.job.rows).snapshot() == state.snapshot()
    assert core.restore_snapshot(state.snapshot()).snapshot() == state.snapshot()
    trim_anywhere(life.job, data)
    names = [item.id for item in (*state.plan.adjustments, *state.advice)]
    assert len(names) == len(set(names))
