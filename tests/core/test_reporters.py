"""Reports: of several ranks, of skipped updates, and of more than a loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.core import Outcome, Report
from lrpilot.core._reporters import weighted_mean
from tests.core.test_requests import PLATEAU, Log
from tests.core.test_whole_runs import trim_anywhere

NAN, INFINITY = math.nan, math.inf


class Team(Log):
    """A run with several reporters."""

    def __init__(self, *ranks: int, **fields: Any) -> None:
        super().__init__(**{"policies": [PLATEAU], **fields})
        self.open(reporters=ranks, rank=ranks[0], incarnation=f"process {ranks[0]}")

    def say(self, rank: int, *reports: Report) -> list[Outcome]:
        events, outcomes = core.report_losses(
            self.state, reports, rank=rank, incarnation=f"process {rank}"
        )
        self.write(events)
        return outcomes

    def loss(self, rank: int, at: int, loss: float | None, weight: float = 1.0) -> Outcome:
        (outcome,) = self.say(rank, Report(at, loss, weight, at + 1))
        return outcome


def skip(at: int, loss: float | None, tries: int = 0) -> Report:
    return Report(at, loss, 1.0, at, skipped=True, tries=tries)


# The mean over several reporters.


def test_the_loss_is_the_weighted_mean_summed_in_the_declared_order() -> None:
    parts = {7: (3.0, 0.1), 0: (1.0, 0.2), 4: (2.0, 1e17)}
    for order in ((7, 0, 4), (4, 7, 0), (0, 4, 7)):
        team = Team(*order)
        for rank in (0, 4, 7):
            weight, loss = parts[rank]
            team.loss(rank, 0, loss, weight)
        total = weights = 0.0
        for rank in order:
            weight, loss = parts[rank]
            total, weights = total + weight * loss, weights + weight
        assert team.state.loss == total / weights
    assert weighted_mean([(1.0, 0.1), (1.0, 0.2), (1.0, 0.3)]) == ((0.1 + 0.2 + 0.3) / 3.0, 0)


@pytest.mark.parametrize(
    ("parts", "mean", "left_out"),
    [
        ([(3.0, 0.1)], 0.1, 0),  # taken as it is: 3 * 0.1 / 3 is another number
        ([(3.0, 0.1), (1.0, NAN)], 0.1, 1),
        ([(1.0, NAN), (1.0, 1.0), (3.0, 2.0), (1.0, -INFINITY)], 7.0 / 4.0, 2),
        ([(1.0, INFINITY), (1.0, NAN), (1.0, -INFINITY)], INFINITY, 2),
        ([(1.0, None), (1.0, INFINITY)], INFINITY, 0),
        ([(1.0, None), (2.0, 3.0)], 3.0, 0),
        ([(1.0, None), (2.0, None)], None, 0),
        ([], None, 0),
    ],
)
def test_a_member_that_is_not_finite_is_left_out_and_counted(
    parts: Sequence[tuple[float, float | None]], mean: float | None, left_out: int
) -> None:
    assert weighted_mean(parts) == (mean, left_out)
    if len(parts) < 2:
        return
    team = Team(*range(len(parts)))
    for rank, (weight, loss) in enumerate(parts):
        team.loss(rank, 0, loss, weight)
    assert team.state.loss == mean
    is_broken = mean is not None and not math.isfinite(mean)
    assert team.state.observers.nonfinite == left_out + is_broken
    assert team.state.losses == (mean is not None)


def test_what_all_have_reported_is_final() -> None:
    team = Team(0, 1, 2)
    for at in range(3):
        team.loss(0, at, 1.0)
    for at in range(2):
        team.loss(1, at, 1.0)
    assert (team.state.frontier, team.state.horizon, team.state.losses) == (0, 4, 0)
    team.loss(2, 0, 1.0)
    assert (team.state.frontier, team.state.losses) == (1, 1)
    team.say(2, Report(1, None, 1.0, 9))
    # The others' losses of a step are its loss; this one said that it has none.
    assert (team.state.frontier, team.state.loss_progress) == (2, [0, 1])


def test_a_step_of_which_nobody_has_a_loss_has_none() -> None:
    team = Team(0, 1)
    team.say(0, Report(0, None, 1.0, 5))
    team.say(1, Report(0, None, 1.0, 5))
    assert (team.state.frontier, team.state.loss_progress) == (5, [])


def test_who_may_report() -> None:
    team = Team(3, 1)
    with pytest.raises(core.NotReporter, match=r"rank 0 is not .*: ranks 3, 1 are"):
        team.loss(0, 0, 1.0)
    team.loss(1, 0, 1.0)
    with pytest.raises(core.NotReporter, match="another process reports as rank 1"):
        core.report_losses(team.state, [], rank=1, incarnation="a second one")


@pytest.mark.parametrize(
    ("ranks", "text"), [((0, 0), "reporters: got 0, 0"), ((0, -1), "reporter: got -1")]
)
def test_reporters_that_cannot_be(ranks: tuple[int, ...], text: str) -> None:
    with pytest.raises(core.InvalidRequest, match=text):
        Team(*ranks)


def test_ranks_join_with_the_same_reporters_in_the_same_order() -> None:
    log = Log(policies=[PLATEAU])
    given: dict[str, Any] = {"key": "k", "token": "1", "incarnation": "first"}
    log.open(reporters=(0, 1), **given)
    for reporters in ((1, 0), (0,), (0, 1, 2)):
        with pytest.raises(core.JoinRefused, match="has ranks 0, 1 as its reporter"):
            log.open(reporters=reporters, request_id="x", rank=1, **given)
    log.open(reporters=(0, 1), request_id="y", rank=1, **{**given, "incarnation": "second"})
    assert log.state.reporters.incarnations == {0: "first", 1: "second"}
    with pytest.raises(core.JoinRefused, match="has joined already"):
        log.open(reporters=(0, 1), request_id="z", rank=1, **{**given, "incarnation": "third"})


# Waivers.


def blocked(team: Team, wanted: int) -> None:
    team.write(core.waive(team.state, wanted))


@pytest.mark.parametrize(
    ("quorum", "there", "counts"),
    [(None, 1, False), (None, 2, False), (None, 3, True), (1, 1, True), (4, 3, False),
     (9, 3, False)],
)  # fmt: skip
def test_a_waiver_counts_those_that_are_there_if_they_are_enough(
    quorum: int | None, there: int, counts: bool
) -> None:
    feedback = {"delay": 4, "quorum": quorum}
    team = Team(0, 1, 2, 3, feedback=feedback)
    for rank in range(there):
        team.loss(rank, 0, float(rank))
    blocked(team, 4)
    (event,) = [core.decode(row) for row in team.rows if b'"waived"' in row]
    assert isinstance(event, core.Waived)
    assert event.counted == (((0, tuple(range(there))),) if counts else ())
    assert (team.state.frontier, team.state.horizon) == (4, 8)
    mean = sum(range(there)) / there
    assert team.state.loss == (mean if counts else None)
    # What does not count is kept as late.
    assert team.state.late == {} if counts else {(0, rank): float(rank) for rank in range(there)}


def test_those_who_are_late_change_nothing() -> None:
    team = Team(0, 1, 2)
    team.loss(0, 0, 1.0)
    team.loss(2, 0, 3.0)
    blocked(team, 4)
    before = team.state.observers
    assert team.state.loss == 2.0
    assert team.loss(1, 0, 100.0) is Outcome.LATE
    rows = len(team.rows)
    assert team.loss(1, 0, 100.0) is Outcome.LATE
    assert len(team.rows) == rows
    assert team.state.late == {(0, 1): 100.0}
    assert team.state.observers == before
    with pytest.raises(core.LossConflict, match=r"has loss 100\.0 already; got 99\.0"):
        team.loss(1, 0, 99.0)
    # Those who were counted are recognised still.
    assert team.loss(2, 0, 3.0) is Outcome.REPEATED
    with pytest.raises(core.LossConflict, match=r"has loss 3\.0 already; got 4\.0"):
        team.loss(2, 0, 4.0)
    # They go on from there.
    for rank in range(3):
        team.loss(rank, 4, 5.0)
    assert (team.state.frontier, team.state.loss) == (5, 5.0)


def test_a_retry_is_recognised_for_each_rank_before_and_after_its_step_is_final() -> None:
    team = Team(0, 1)
    assert team.loss(0, 0, 1.0) is Outcome.RECORDED
    rows = len(team.rows)
    assert team.loss(0, 0, 1.0) is Outcome.REPEATED
    with pytest.raises(core.LossConflict):
        team.loss(0, 0, 2.0)
    assert len(team.rows) == rows
    assert team.loss(1, 0, 2.0) is Outcome.RECORDED
    rows = len(team.rows)
    assert team.loss(0, 0, 1.0) is Outcome.REPEATED
    assert team.loss(1, 0, 2.0) is Outcome.REPEATED
    for rank, loss in ((0, 2.0), (1, 1.0)):
        with pytest.raises(core.LossConflict):
            team.loss(rank, 0, loss)
    assert len(team.rows) == rows


# Skipped updates.


def alone(**fields: Any) -> Team:
    return Team(0, **fields)


def test_a_skipped_update_does_not_advance_and_gets_the_same_values_again() -> None:
    log = alone()
    for at in range(3):
        log.loss(0, at, 3.0 - at)
    before = log.take(0, count=7)
    log.say(0, skip(3, INFINITY))
    log.say(0, skip(3, NAN, tries=1))
    assert (log.state.frontier, log.state.horizon) == (3, 7)
    assert log.take(0, count=7) == before
    log.say(0, Report(3, 0.5, 1.0, 4, tries=2))
    assert (log.state.frontier, log.state.loss, log.state.losses) == (4, 0.5, 4)
    assert log.state.loss_progress == [0, 1, 2, 3, 3, 3]
    assert (log.state.observers.skipped, log.state.observers.nonfinite) == (2, 2)
    seen = log.state.observation(3, 2)
    assert seen is not None
    assert (seen.tries, seen.is_skipped, seen.loss) == (2, False, 0.5)


def test_a_skipped_update_is_told_to_those_who_ask_for_it_alone() -> None:
    guard = {"kind": "nonfinite", "mode": "act", "streak": 2, "hold": 3}
    log = alone(policies=[PLATEAU, guard], feedback={"delay": 1})
    log.loss(0, 0, 1.0)
    log.say(0, skip(1, 9.0))
    assert not log.state.plan.adjustments
    log.say(0, skip(1, NAN, tries=1))
    log.say(0, skip(1, NAN, tries=2))
    assert [item.change.action for item in log.state.plan.adjustments] == ["hold", "directive"]
    assert {item.effective for item in log.state.plan.adjustments} == {2}


def test_a_retried_skip_is_recognised_try_by_try() -> None:
    log = alone()
    reports = [skip(0, INFINITY), skip(0, NAN, 1), Report(0, 2.0, 1.0, 1, tries=2)]
    assert log.say(0, *reports) == [Outcome.RECORDED] * 3
    rows = len(log.rows)
    for report in reports:
        assert log.say(0, report) == [Outcome.REPEATED]
    assert log.say(0, *reports) == [Outcome.REPEATED] * 3
    assert len(log.rows) == rows
    with pytest.raises(core.LossConflict, match="has loss inf already; got nan"):
        log.say(0, skip(0, NAN))


def test_the_first_reporter_speaks_for_all_of_a_skipped_update() -> None:
    for order in ((0, 1), (1, 0)):
        team = Team(0, 1)
        told = {0: skip(0, INFINITY), 1: skip(0, NAN)}
        for rank in order:
            assert team.say(rank, told[rank]) == [Outcome.RECORDED]
        assert (team.state.observers.skipped, team.state.frontier) == (1, 0)
        assert len([row for row in team.rows if b'"reported"' in row]) == 1
        for rank in order:
            team.say(rank, Report(0, 1.0 + rank, 1.0, 1, tries=1))
        assert (team.state.loss, team.state.losses) == (1.5, 1)


def test_what_a_reporter_says_again_of_skipped_updates_is_no_conflict() -> None:
    team = Team(0, 1)
    batch = [skip(0, INFINITY), skip(0, NAN, 1), Report(0, 2.0, 1.0, 1, tries=2)]
    for rank in (1, 0):
        team.say(rank, *batch)
        before = team.state.snapshot()
        assert team.say(rank, *batch)[-1] is Outcome.REPEATED
        assert team.state.snapshot() == before
    assert (team.state.late, team.state.loss) == ({}, 2.0)


def test_what_is_said_of_a_skipped_update_once_its_step_is_final_is_dropped() -> None:
    log = alone()
    blocked(log, 4)
    assert log.say(0, skip(2, INFINITY), skip(2, NAN, 1)) == [Outcome.REPEATED] * 2
    assert log.say(0, Report(2, 1.0, 1.0, 3, tries=2)) == [Outcome.LATE]
    assert log.state.late == {(2, 0): 1.0}
    assert log.state.observers.skipped == 0


def test_a_skip_is_seen_after_what_came_before_it() -> None:
    team = Team(0, 1)
    team.say(0, Report(0, 1.0, 1.0, 1), skip(1, 7.0), Report(1, 2.0, 1.0, 2, tries=1))
    assert team.state.loss_progress == []
    team.say(1, Report(0, 1.0, 1.0, 1))
    assert [(at, loss) for at, loss in zip(
        team.state.loss_progress, team.state.loss_values, strict=True
    )] == [(0, 1.0), (1, 7.0)]  # fmt: skip
    team.say(1, Report(1, 2.0, 1.0, 2))
    assert team.state.loss_values == [1.0, 7.0, 2.0]


def test_an_attempt_from_a_skipped_update_forgets_it() -> None:
    log = alone()
    log.loss(0, 0, 1.0)
    log.say(0, skip(1, NAN))
    log.open(1)
    assert (log.state.observers.skipped, log.state.loss_progress) == (0, [0])


# More than a loss.


def full(at: int, loss: float | None = 1.0, **fields: Any) -> Report:
    given: dict[str, Any] = {"validation": {"b": 2.0, "a": 1.0}, "gradient_norm": 3.0, "batch": 64}
    return replace(Report(at, loss, 1.0, at + 1), **{**given, **fields})


def test_what_is_reported_beside_the_loss_is_kept() -> None:
    log = alone()
    log.say(0, full(0), full(1, None, validation={"a": 0.5}, gradient_norm=None, batch=None))
    first, second = log.state.observation(0), log.state.observation(1)
    assert first is not None
    assert second is not None
    assert (first.validation, first.gradient_norm, first.batch) == ({"b": 2.0, "a": 1.0}, 3.0, 64)
    assert (second.loss, second.validation) == (None, {"a": 0.5})
    # The second had no loss, and counts as none.
    assert (log.state.losses, log.state.loss, log.state.frontier) == (1, 1.0, 2)
    assert log.state.observers.validation == (("a", 0.5), ("b", 2.0))


def test_a_validation_loss_acts_as_the_report_does_in_which_it_rides() -> None:
    log = alone(policies=[{**PLATEAU, "metric": "val"}])
    for at, value in ((0, 1.0), (1, None), (2, None), (3, 1.0)):
        validation = {} if value is None else {"val": value}
        log.say(0, Report(at, 0.5, 1.0, at + 1, validation=validation))
    (cut,) = log.state.plan.adjustments
    assert (cut.effective, cut.reason) == (
        7, "val 1: none below 1 * (1 - 0.0001) for 1 report (patience 0)",
    )  # fmt: skip


def test_a_retry_of_a_full_report() -> None:
    log = alone()
    log.say(0, full(0, validation={"a": NAN}, gradient_norm=NAN))
    rows = len(log.rows)
    assert log.say(0, full(0, validation={"a": NAN}, gradient_norm=NAN)) == [Outcome.REPEATED]
    with pytest.raises(core.LossConflict):
        log.say(0, full(0, validation={"a": 1.0}))
    assert len(log.rows) == rows


def test_several_reporters_share_what_they_report_beside_the_loss() -> None:
    team = Team(1, 0)
    team.say(0, full(0, 1.0, validation={"a": 1.0, "b": 5.0}, gradient_norm=7.0, batch=None))
    team.say(1, full(0, 3.0, validation={"a": 2.0, "c": NAN}, gradient_norm=None, weight=3.0))
    seen = team.state.observation(0)
    assert seen is not None
    assert seen.loss == (3.0 * 3.0 + 1.0 * 1.0) / 4.0
    assert seen.validation["a"] == (3.0 * 2.0 + 1.0 * 1.0) / 4.0
    assert (seen.validation["b"], math.isnan(seen.validation["c"])) == (5.0, True)
    assert (seen.gradient_norm, seen.batch) == (7.0, 64)


@pytest.mark.parametrize(
    ("report", "field"),
    [
        (replace(skip(3, 1.0), moves_to=4), "moves_to"),
        (Report(3, 1.0, 1.0, 4, tries=-1), "try"),
        (Report(3, 1.0, 1.0, 4, tries=2**31), "try"),
        (Report(3, 1.0, INFINITY, 4), "weight"),
        (Report(3, 1.0, -1.0, 4), "weight"),
        (full(3, gradient_norm=-1.0), "gradient_norm"),
        (full(3, batch=0), "batch"),
        (full(3, validation={"loss": 1.0}), "validation_losses"),
        (full(3, validation={"": 1.0}), "validation_losses"),
        (full(3, validation={"a b": 1.0}), "validation_losses"),
        (full(3, validation={f"{at}": 1.0 for at in range(65)}), "validation_losses"),
    ],
)
def test_reports_that_cannot_be(report: Report, field: str) -> None:
    log = alone()
    with pytest.raises(core.InvalidRequest) as caught:
        log.say(0, full(0), report)
    assert [item.field for item in caught.value.violations] == [f"reports.1.{field}"]
    assert log.state.frontier == 0


def test_what_may_be_reported() -> None:
    log = alone()
    log.say(0, full(3, gradient_norm=INFINITY, validation={f"{at}": NAN for at in range(64)}))
    log.say(0, full(4, gradient_norm=NAN, batch=2**53, weight=5e-324))


# Any order of arrival.

LOSSES = st.sampled_from([None, 1.0, 1.0, 2.0, 3.0, NAN, INFINITY, -1.0])


@st.composite
def told(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[int, list[Report]]]:
    """Draw what each of some ranks says, step by step; skipped updates are skipped on all."""
    ranks = draw(st.permutations(range(draw(st.integers(1, 3)))))
    reports: dict[int, list[Report]] = {rank: [] for rank in ranks}
    for at in range(draw(st.integers(1, 10))):
        tries = draw(st.sampled_from([0, 0, 0, 1, 2]))
        for rank in ranks:
            for attempt in range(tries):
                reports[rank].append(skip(at, draw(LOSSES), attempt))
            weight = draw(st.sampled_from([1.0, 2.0, 0.1]))
            validation = draw(st.sampled_from([{}, {"val": 1.0}]))
            report = Report(at, draw(LOSSES), weight, at + 1, tries=tries, validation=validation)
            reports[rank].append(report)
    return tuple(ranks), reports


POLICIES: list[dict[str, Any]] = [
    PLATEAU, {**PLATEAU, "metric": "val", "factor": 0.75},
    {"kind": "nonfinite", "mode": "act", "streak": 2}, {"kind": "greedy", "patience": 0},
]  # fmt: skip


def outcome(team: Team) -> list[Any]:
    items = [replace(item, seq=0) for item in (*team.state.plan.adjustments, *team.state.advice)]
    return [
        [team.state.values(at) for at in range(30)], items, team.state.observers.to_mapping(),
        team.state.loss_progress, repr(team.state.loss_values), team.state.frontier,
    ]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(told(), st.data())
def test_neither_order_nor_batches_nor_repeats_change_anything(
    told: tuple[tuple[int, ...], dict[int, list[Report]]], data: st.DataObject
) -> None:
    ranks, reports = told
    one = Team(*ranks, policies=POLICIES)
    for rank in ranks:
        one.say(rank, *reports[rank])
    other = Team(*ranks, policies=POLICIES)
    left = {rank: list(reports[rank]) for rank in ranks}
    while any(left.values()):
        rank = data.draw(st.sampled_from([rank for rank in ranks if left[rank]]), "who")
        count = data.draw(st.integers(1, 4), "how many")
        batch, left[rank] = left[rank][:count], left[rank][count:]
        other.say(rank, *batch)
        if data.draw(st.booleans(), "again"):
            before = other.state.snapshot()
            other.say(rank, *batch)
            assert other.state.snapshot() == before
        if data.draw(st.integers(0, 3), "restored") == 0:
            other.state = core.restore_snapshot(other.state.snapshot())
    assert repr(outcome(one)) == repr(outcome(other))
    assert core.fold("run", other.rows).snapshot() == other.state.snapshot()
    trim_anywhere(other, data)


def test_a_call_with_nothing_new_writes_no_event() -> None:
    team = Team(0, 1)
    calls: list[Callable[[], list[Outcome]]] = [
        lambda: team.say(0), lambda: team.say(1, skip(0, 1.0))
    ]  # fmt: skip
    for call in calls:
        rows = len(team.rows)
        call()
        assert len(team.rows) == rows
