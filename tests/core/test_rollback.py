"""Attempts that carry out a rollback: their cut, what they forget, and what outlasts them."""

import math
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core._changes import Direct, Multiply
from lrpilot.core.policies import Rollback
from tests.core.test_operators import act, newest
from tests.core.test_requests import PLATEAU, Log, lost, saved

GUARD = {"kind": "nonfinite", "mode": "act", "streak": 1, "hold": 2, "factor": 0.5, "limit": 2}
FIELDS: dict[str, Any] = {"policies": [GUARD], "feedback": {"delay": 4}}


def run(**fields: Any) -> Log:
    log = Log(**{**FIELDS, **fields})
    log.open()
    return log


def damage(log: Log, at: int = 10) -> core.Adjustment:
    """Report losses up to one that is NaN; return the directive that asks to go back."""
    begin = log.state.frontier
    log.report(begin, [1.0] * (at - begin) + [math.nan])
    (asked,) = log.state.plan.directives(at + 4, at + 4)
    return asked


def go_back(log: Log, to: int, asked: core.Adjustment) -> list[core.Event]:
    return opening(log, to, asked.id)


def opening(log: Log, to: int, directive: str, **fields: Any) -> list[core.Event]:
    """Open an attempt for a directive that was met in the one before."""
    met_in = (log.state.attempt, log.state.token)
    return log.open(to, directive=directive, **{"met_in": met_in, **fields})


def cuts(log: Log) -> list[tuple[int, float]]:
    """Return (effective, factor) of the cuts in the plan that rollbacks made."""
    return [
        (item.effective, item.change.factor)
        for item in log.state.plan.adjustments
        if item.kind == "rollback" and isinstance(item.change, Multiply)
    ]


def test_a_rollback_cuts_from_where_it_opens_and_forgets_what_led_to_it() -> None:
    log = run()
    asked = damage(log)
    assert isinstance(asked.change, Direct)
    assert (asked.change.directive, asked.change.before, asked.change.factor) == (
        "rollback", 10, 0.5,
    )  # fmt: skip
    log.take(0, count=14)
    (event,) = go_back(log, 6, asked)
    assert isinstance(event, core.Opened)
    assert (event.directive, event.before, event.asked_at, event.factor) == (asked.id, 10, 10, 0.5)
    assert log.state.plan.rollbacks == (Rollback(6, 10, 10, 0.5),)
    # It inherits no values: those of the attempt before are not cut.
    assert log.take(6).learning_rates == (0.5,) * 4
    assert log.rates(0, 8) == [1.0] * 6 + [0.5] * 2
    (cut,) = log.state.plan.adjustments
    assert (cut.kind, cut.source, cut.effective, cut.decided_at) == ("rollback", "rollback", 6, 6)
    assert cut.reason == (
        f"rolled back to 6: directive {asked.id} asked for it at 10, with the damage beginning at "
        "10"
    )
    assert asked in log.state.forgotten
    assert log.state.find(asked.id) == asked
    assert log.state.outcomes == {asked.id: "done"}
    assert log.state.frontier == 6
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()


def test_the_cut_survives_a_plain_resume_from_anywhere() -> None:
    log = run()
    go_back(log, 6, damage(log))
    for begin in (6, 8, 2):
        log.report(log.state.frontier, [1.0] * 5)
        log.open(begin)
        assert log.rates(0, 12) == [1.0] * 6 + [0.5] * 6
        assert cuts(log) == [(6, 0.5)]


def test_a_second_rollback_to_the_same_place_cuts_deeper() -> None:
    log = run()
    go_back(log, 6, damage(log))
    go_back(log, 6, damage(log))
    assert cuts(log) == [(6, 0.25)]
    assert log.rates(4, 8) == [1.0, 1.0, 0.25, 0.25]
    assert [item.factor for item in log.state.plan.rollbacks] == [0.5, 0.25]


def test_an_earlier_one_takes_the_place_of_the_cut_of_a_later_one() -> None:
    log = run()
    go_back(log, 6, damage(log))
    (first,) = log.state.plan.adjustments
    go_back(log, 4, damage(log))
    assert cuts(log) == [(4, 0.25)]
    assert log.rates(2, 8) == [1.0, 1.0] + [0.25] * 4
    assert first in log.state.forgotten


def test_a_later_one_cuts_on_top_of_an_earlier_one() -> None:
    log = run()
    go_back(log, 6, damage(log))
    go_back(log, 8, damage(log))
    assert cuts(log) == [(6, 0.5), (8, 0.5)]
    assert log.rates(5, 10) == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_a_cut_that_was_taken_back_is_not_made_again() -> None:
    log = run()
    go_back(log, 6, damage(log))
    act(log, core.TakeBack(newest(log).id))
    asked = damage(log)
    assert log.rates(6, 12) == [0.5] * 4 + [1.0] * 2
    go_back(log, 6, asked)
    assert cuts(log) == [(6, 0.5)]
    assert log.rates(6, 12) == [0.5] * 6


def test_more_than_so_many_into_one_region_become_a_stop() -> None:
    log = run()
    for _ in range(2):
        go_back(log, 6, damage(log))
    stop = damage(log)
    assert isinstance(stop.change, Direct)
    assert stop.change.directive == "stop"
    assert stop.reason.endswith("; 2 rollbacks into this region did not save it")
    with pytest.raises(core.InvalidRequest, match="directive: got stop; allowed: a rollback"):
        go_back(log, 6, stop)


def test_a_region_reaches_as_far_behind_its_damage_as_the_rollback_went() -> None:
    log = run(policies=[{**GUARD, "limit": 1}])
    go_back(log, 6, damage(log))
    # From 6 up to 14 = 10 + (10 - 6).
    assert damage(log, 14).change.action == "directive"
    (last,) = log.state.plan.directives(18, 18)
    assert isinstance(last.change, Direct)
    assert last.change.directive == "stop"
    log.open(6)
    further = damage(log, 15)
    assert isinstance(further.change, Direct)
    assert further.change.directive == "rollback"


def test_an_operators_rollback_has_no_limit() -> None:
    log = run()
    log.report(0, [1.0] * 10)
    for count in range(1, 5):
        act(log, core.Ask("rollback", before=8, factor=0.5))
        go_back(log, 6, newest(log))
        assert cuts(log) == [(6, 0.5**count)]
        log.report(6, [1.0] * 4)


def test_a_rollback_without_a_cut() -> None:
    log = run(learning_rate={"peak": 0.1, "decay": {"style": "linear"}})
    log.report(0, [1.0] * 10)
    before = log.rates(0, 30)
    act(log, core.Ask("rollback", before=8, factor=1.0))
    go_back(log, 6, newest(log))
    assert log.rates(0, 30) == before


def test_a_directive_that_is_not_there() -> None:
    log = run()
    log.report(0, [1.0])
    with pytest.raises(core.AdjustmentNotFound, match="has no directive with the id '7-7-7'"):
        opening(log, 0, "7-7-7")
    act(log, core.HoldValues())
    with pytest.raises(core.AdjustmentNotFound):
        opening(log, 0, newest(log).id)
    act(log, core.Ask("skip", until=99))
    with pytest.raises(core.InvalidRequest, match="directive: got skip; allowed: a rollback"):
        opening(log, 0, newest(log).id)


def test_an_advice_is_no_directive_until_it_is_approved() -> None:
    log = run(policies=[{**GUARD, "mode": "advise"}])
    log.report(0, [1.0] * 10 + [math.nan])
    advice = next(item for item in log.state.advice if isinstance(item.change, Direct))
    with pytest.raises(core.InvalidRequest, match="got advise; allowed: one that an operator"):
        opening(log, 6, advice.id)
    given = {"reason": "", "author": "me", "request_id": "yes"}
    log.write(core.approve_advice(log.state, advice.id, **given))
    opening(log, 6, newest(log).id)
    assert cuts(log) == [(6, 0.5)]


def test_a_directive_is_followed_from_the_attempt_in_which_it_was_met() -> None:
    log = run()
    asked = damage(log)
    with pytest.raises(core.InvalidRequest, match="met_in: got nothing"):
        log.open(6, directive=asked.id)
    met_in = (log.state.attempt, log.state.token)
    log.open(8)
    with pytest.raises(core.AttemptSuperseded):
        opening(log, 6, asked.id, met_in=met_in)


def test_a_rollback_that_was_opened_is_answered_again() -> None:
    log = run()
    asked = damage(log)
    assert len(opening(log, 6, asked.id, request_id="same")) == 1
    assert opening(log, 6, asked.id, request_id="same") == []
    assert cuts(log) == [(6, 0.5)]


def test_the_first_acknowledgement_stands() -> None:
    log = run()
    asked = damage(log)
    given: dict[str, Any] = {"rank": 0, "directive": asked.id, "progress": 14, "detail": "x" * 2000}
    (event,) = log.write(core.acknowledge_directive(log.state, outcome="unhandled", **given))
    assert isinstance(event, core.Acknowledged)
    assert (event.outcome, len(event.detail)) == ("unhandled", 1000)
    assert core.acknowledge_directive(log.state, outcome="done", **given) == []
    assert log.state.outcomes == {asked.id: "unhandled"}
    with pytest.raises(core.AdjustmentNotFound):
        core.acknowledge_directive(log.state, outcome="done", **{**given, "directive": "x"})
    with pytest.raises(core.NotReporter):
        core.acknowledge_directive(log.state, outcome="done", **{**given, "rank": 1})
    with pytest.raises(core.InvalidRequest, match="progress"):
        core.acknowledge_directive(log.state, outcome="done", **{**given, "progress": -1})
    # Whoever opens the attempt has done it all the same.
    go_back(log, 6, asked)
    assert log.state.outcomes == {asked.id: "done"}
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()


def test_what_operators_did_outlasts_a_rollback_and_is_cut_with_the_rest() -> None:
    log = run()
    log.report(0, [1.0])
    act(log, core.ScaleLearningRate(0.75))
    go_back(log, 6, damage(log))
    assert log.rates(4, 8) == [1.0, 0.75, 0.75 * 0.5, 0.75 * 0.5]


# Saved states.


def test_a_lost_run_remembers_its_rollbacks() -> None:
    log = run()
    for _ in range(2):
        go_back(log, 6, damage(log))
    log.report(6, [1.0] * 2)
    after = lost(log, 8)
    assert after.state.plan.rollbacks == log.state.plan.rollbacks
    assert (after.rates(0, 20), cuts(after)) == (log.rates(0, 20), [(6, 0.25)])
    stop = damage(after)
    assert isinstance(stop.change, Direct)
    assert stop.change.directive == "stop"


def test_a_state_from_before_a_rollback_brings_back_no_uncut_values() -> None:
    log = run()
    log.report(0, [1.0] * 8)
    early = saved(log, 7)
    go_back(log, 6, damage(log))
    log.open(saved=early, digest_at_saved=early.digest)
    assert log.rates(5, 12) == [1.0] + [0.5] * 6
    assert log.state.plan.rollbacks == (Rollback(6, 10, 10, 0.5),)
    assert log.take(7).learning_rates == (0.5,) * 4


def edited() -> Log:
    """Return a run in which much was changed and taken back, in two attempts."""
    log = run(policies=[PLATEAU], learning_rate={"peak": 1.0, "decay": {"style": "linear"}})
    log.report(0, [1.0] * 12)
    act(log, core.ScaleLearningRate(0.9))
    scaled = newest(log).id
    act(log, core.HoldValues())
    log.open(5)
    log.report(5, [1.0, None])
    act(log, core.ScaleLearningRate(0.8))
    act(log, core.TakeBack(scaled))
    act(log, core.TakeBack(next(i.id for i in log.state.plan.adjustments if i.kind == "plateau")))
    act(log, core.SetLearningRate(0.3))
    log.report(7, [1.0] * 13)
    act(log, core.ReleaseValues())
    log.report(20, [None] * 5)
    return log


def test_a_lost_run_keeps_what_was_taken_back_however_often_it_is_lost() -> None:
    log = edited()
    first = lost(log, 25)
    second = lost(first, 25)
    third = lost(second, 25)
    for after in (first, second, third):
        assert after.rates(0, 60) == log.rates(0, 60)
        names = [item.id for item in after.state.plan.adjustments]
        assert len(set(names)) == len(names)
        assert core.fold("run", after.rows).snapshot() == after.state.snapshot()
        # Nothing is left to release, and what was taken back cannot be so again.
        assert act(after, core.ReleaseValues()) == []
        for item in after.state.plan.adjustments:
            if item.mark in after.state.plan.undone(60):
                assert act(after, core.TakeBack(item.id)) == []


def test_operators_changes_at_one_progress_keep_their_order_when_a_run_is_lost() -> None:
    log = run()
    log.report(0, [1.0] * 10)
    act(log, core.Ask("rollback", before=8, factor=0.5))
    go_back(log, 6, newest(log))
    # At the progress of the cut, in an attempt that went back further.
    log.open(2)
    act(log, core.SetLearningRate(0.3))
    act(log, core.ScaleLearningRate(0.75))
    assert log.rates(5, 8) == [1.0, 0.3 * 0.75, 0.3 * 0.75]
    log.report(2, [1.0] * 6)
    first = lost(log, 8)
    second = lost(first, 8)
    assert first.rates(5, 20) == second.rates(5, 20) == log.rates(5, 20)


def test_losses_from_before_a_rollback_are_seen_without_its_cut_once_more() -> None:
    """With an interval a policy's decision depends on it, in this attempt and in the next."""

    def decided(resumes: bool) -> list[tuple[int, int, str]]:
        policy = {**PLATEAU, "patience": 1}
        log = run(policies=[policy], feedback={"delay": 4, "interval": 4})
        log.report(0, [1.0] * 4)
        act(log, core.Ask("rollback", before=2, factor=0.9))
        opening(log, 3, newest(log).id)
        log.report(3, [1.0] * (2 if resumes else 9))
        if resumes:
            log.open(4)
            log.report(4, [1.0] * 8)
        return [(item.decided_at, item.effective, item.kind) for item in log.state.plan.adjustments]

    assert decided(resumes=True) == decided(resumes=False)
