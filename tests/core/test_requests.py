"""What requests do to a run, where the rules of the design (tests/rules) do not look."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core import _requests, _state
from lrpilot.core._changes import Multiply
from lrpilot.core._plan import Adjustment, Plan, Revision

PLATEAU = {"kind": "plateau", "patience": 0, "factor": 0.5}


class Log:
    """A run, driven by requests one after the other."""

    def __init__(self, **fields: Any) -> None:
        self.spec = spec(**fields)
        self.state = core.RunState("run")
        self.rows: list[bytes] = []
        self.write(core.create_run(self.state, self.spec, "create"))

    def write(self, events: Sequence[core.Event]) -> list[core.Event]:
        for _, data, _ in core.rows(self.state, events):
            self.rows.append(data)
        for event in events:
            self.state.apply(event)
        return list(events)

    def open(self, progress: int | None = None, **fields: Any) -> list[core.Event]:
        number = self.state.attempt + 1
        given = {"request_id": f"open {number}", "token": f"{number:032x}", "incarnation": "one"}
        request = core.OpenRequest(progress=progress, **{**given, **fields})
        return self.write(core.open_attempt(self.state, request))

    def report(self, begin: int, losses: Sequence[float | None], stride: int = 1) -> None:
        reports = [
            core.Report(begin + step * stride, loss, 1.0, begin + (step + 1) * stride)
            for step, loss in enumerate(losses)
        ]
        events, _ = core.report_losses(self.state, reports, rank=0, incarnation="one")
        self.write(events)

    def take(self, begin: int, count: int = 128, stride: int = 1, in_use: int = 0) -> core.Block:
        request = core.ValuesRequest(begin=begin, stride=stride, count=count, in_use=in_use)
        found = core.get_values(self.state, request)
        if isinstance(found, core.Recorded):
            self.write([found])
            found = core.get_values(self.state, request)
        assert isinstance(found, core.Block)
        return found

    def rates(self, begin: int, end: int) -> list[float]:
        return [self.state.values(at)[0][0] for at in range(begin, end)]


def spec(**fields: Any) -> core.RunSpec:
    return core.parse_spec(
        {
            "name": "run",
            "total": 1000,
            "learning_rate": {"peak": 1.0},
            "feedback": {"delay": 4},
            **fields,
        }
    )


# Without feedback.


def test_without_feedback_the_horizon_follows_the_progress_in_use() -> None:
    log = Log()
    log.open()
    assert log.state.horizon == 4
    assert log.take(0).steps == 4
    # A rank that uses 100 gets values up to 100 + D, and everyone is that far then.
    assert log.take(100, in_use=100).steps == 4
    assert (log.state.in_use, log.state.horizon) == (100, 104)


def test_without_feedback_nobody_is_more_than_the_delay_ahead() -> None:
    log = Log()
    log.open()
    request = core.ValuesRequest(begin=50, in_use=10)
    assert core.get_values(log.state, request) is None


def test_without_feedback_nothing_is_waived() -> None:
    log = Log()
    log.open()
    assert core.waive(log.state, 100) == []


def test_a_policy_that_only_advises_does_not_make_feedback() -> None:
    log = Log(policies=[{**PLATEAU, "mode": "advise"}])
    log.open()
    log.report(0, [1.0, 1.0, 1.0])
    assert not log.spec.has_feedback
    assert [item.effective for item in log.state.advice] == [5]
    assert log.state.plan.adjustments == ()
    assert log.rates(0, 9) == [1.0] * 9


# The plan.


def test_policies_apply_in_the_order_of_the_spec() -> None:
    log = Log(policies=[{**PLATEAU, "min_lr": 0.6}, PLATEAU], feedback={"delay": 1})
    log.open()
    log.report(0, [1.0, 1.0])
    # The first cuts 1.0 to its floor, the second halves what the first left.
    assert [item.after for item in log.state.plan.adjustments] == [(0.6,), (0.3,)]
    assert log.rates(1, 3) == [1.0, 0.3]


def test_bounds_hold_for_adjusted_values_alone() -> None:
    log = Log(
        policies=[{**PLATEAU, "factor": 0.1}],
        bounds={"min_lr": 0.3, "max_lr": 0.5},
        feedback={"delay": 1},
        learning_rate={"peak": 1.0, "decay": {"style": "linear"}},
    )
    log.open()
    log.report(0, [1.0, 1.0, 1.0, 1.0])
    # The base lies above max_lr at first and below min_lr at the end; no cut leaves the bounds.
    assert log.rates(0, 1) == [1.0]
    assert log.rates(3, 4) == [0.3]
    base = core.base_values(log.spec, 900)[0][0]
    assert log.rates(900, 901) == [base]


@pytest.mark.parametrize(
    ("lr", "factor", "expected"),
    [
        (1.0, 0.5, 0.5),
        (1.0, 0.1, 0.25),  # its own floor
        (0.25, 0.5, 0.25),  # a cut never raises
        (0.2, 0.5, 0.2),
        (0.25 + 1e-9, 0.5, 0.25 + 1e-9),  # a change of at most eps is not made
        (1.0, 2.0, 2.0),
        (1.0, 8.0, 4.0),  # its own ceiling
        (5.0, 2.0, 5.0),  # a raise never lowers
    ],
)
def test_multiplying_under_clamps(lr: float, factor: float, expected: float) -> None:
    change = Multiply(factor, min_lr=(0.25,), max_lr=(4.0,), eps=1e-8, reason="")
    assert after([lr], change) == (expected,)


def test_a_group_that_a_later_spec_added_has_the_limits_of_the_last() -> None:
    change = Multiply(0.1, min_lr=(0.5, 0.25), max_lr=None, eps=0.0, reason="")
    assert after([1.0, 1.0, 1.0], change) == (0.5, 0.25, 0.25)


def after(rates: Sequence[float], change: Multiply) -> tuple[float, ...]:
    """Return the constant LRs of some groups after one change."""
    groups = [{"name": f"group {index}", "peak": rate} for index, rate in enumerate(rates)]
    spec = core.parse_spec(
        {"name": "a", "total": 10, "learning_rate": {"peak": 9.0}, "groups": groups}
    )
    plan = Plan([Revision(0, 0, spec)], [])
    adjustment = Adjustment(
        effective=1,
        decided_at=0,
        order=0,
        part=0,
        kind="plateau",
        source="policies.0 (plateau)",
        mode="act",
        change=change,
        before=(),
        after=(),
        decays_before=(),
        decays_after=(),
        seq=1,
    )
    plan.adjust(adjustment)
    return plan.values(1)[0]


def test_entering_a_stage_ends_all_scales() -> None:
    rates: dict[str, Any] = {"peak": 1.0}
    log = Log(
        learning_rate=None,
        stages=[
            {"name": "one", "until": 6, "learning_rate": rates},
            {"name": "two", "until": 13, "learning_rate": rates},
            {"name": "three", "learning_rate": {"peak": 1.0, "init": "current", "warmup": 4}},
        ],
        policies=[PLATEAU],
        feedback={"delay": 2},
    )
    log.open()
    log.report(0, [1.0, 1.0])
    assert log.rates(0, 7) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 1.0]
    # For one delay after the change nobody counts, and then afresh: 0.5 is the best here.
    log.report(2, [None] * 4 + [9.0, 9.0, 0.5, 0.5])
    assert [item.effective for item in log.state.plan.adjustments] == [3, 11]
    # A stage that starts from the LR in force starts from the adjusted one.
    assert log.rates(9, 18) == [1.0, 1.0, 0.5, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0]


# Revisions by trainers.


def attach(log: Log, request_id: str = "attach", **fields: Any) -> list[core.Event]:
    given = spec(**fields)
    return log.write(core.attach_run(log.state, given, revise=True, request_id=request_id))


def test_a_trainers_revision_holds_from_the_next_attempt() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0, None, None])
    log.take(0)
    attach(log, learning_rate={"peak": 3.0}, policies=[PLATEAU])
    assert log.rates(0, 9) == [1.0] * 9
    log.open(2)
    # It inherits no records: the trainers asked for other values.
    assert log.rates(2, 9) == [3.0] * 7
    assert log.take(2).learning_rates == (3.0,) * 4


def test_a_trainers_revision_may_change_everything() -> None:
    log = Log(policies=[{**PLATEAU, "min_lr": [0.4]}], groups=[{"name": "all"}])
    log.open()
    log.report(0, [1.0, 1.0, 1.0])
    attach(
        log,
        groups=[{"name": "all"}, {"name": "more", "peak": 2.0}],
        weight_decay=0.1,
        unit="samples",
        feedback={"delay": 9},
        policies=[],
    )
    log.open(3)
    block = log.take(3, count=9, in_use=3)
    assert (block.groups, block.steps, log.state.horizon) == (2, 9, 12)
    # What was decided before still holds where it shows, for the new group too.
    assert block.learning_rates[:2] == (1.0, 2.0)
    assert log.state.values(5)[0] == (0.5, 1.0)


def test_a_trainers_revision_goes_back_with_its_trainers() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [None] * 10)
    attach(log, learning_rate={"peak": 3.0}, policies=[PLATEAU], feedback={"delay": 6})
    log.open(8)
    log.open(5)
    assert log.rates(5, 9) == [3.0] * 4
    assert log.state.horizon == 11


def test_an_unchanged_spec_changes_nothing() -> None:
    log = Log()
    before = log.state.plan.revisions
    log.write(core.attach_run(log.state, spec(), revise=False, request_id="x"))
    assert log.state.plan.revisions == before
    assert core.attach_run(log.state, spec(), revise=False, request_id="y") == []
    assert core.revise_run(log.state, spec(), "z") == []


def test_what_operators_change_is_no_change_by_the_trainers_of_an_operators_run() -> None:
    log = Log(policies=[PLATEAU])
    given = spec(policies=[PLATEAU])
    log.write(core.attach_run(log.state, given, revise=False, request_id="first start"))
    log.open()
    revised = spec(policies=[PLATEAU], learning_rate={"peak": 2.0})
    log.write(core.revise_run(log.state, revised, "operator"))
    assert core.attach_run(log.state, given, revise=False, request_id="second start") == []
    assert log.state.spec == revised


def test_a_changed_spec_is_refused_with_its_difference() -> None:
    log = Log()
    other = spec(learning_rate={"peak": 2.0}, weight_decay=0.1)
    with pytest.raises(core.SpecChanged, match=r"learning_rate\.peak: 1\.0 -> 2\.0") as caught:
        core.attach_run(log.state, other, revise=False, request_id="x")
    assert "weight_decay: absent -> 0.1" in str(caught.value)
    assert 'on_change="revise"' in str(caught.value)


def test_trainers_are_compared_with_what_trainers_gave_last() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    attach(log, policies=[PLATEAU], learning_rate={"peak": 2.0})
    log.open(0)
    log.write(core.revise_run(log.state, spec(policies=[PLATEAU]), "operator"))
    given = spec(policies=[PLATEAU], learning_rate={"peak": 2.0})
    assert core.attach_run(log.state, given, revise=False, request_id="x") == []


def test_the_past_cannot_be_revised() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [None] * 20)
    with pytest.raises(core.InvalidSpec, match="total: got 23; allowed: at least the horizon, 24"):
        core.revise_run(log.state, spec(policies=[PLATEAU], total=23), "x")
    log.write(core.revise_run(log.state, spec(policies=[PLATEAU], total=24), "x"))


# Sizes.


def test_what_many_ranks_had_recorded_piece_by_piece_comes_in_one_block() -> None:
    """Ranks that ask at different moments must not need a call for each of those pieces."""
    log = Log(weight_decay=0.1, feedback={"delay": 16})
    log.open()
    pieces = [log.take(at, count=count, in_use=0) for at, count in ((0, 3), (3, 1), (4, 5))]
    log.take(9, count=2, stride=2)
    whole = log.take(0, count=12)
    assert (whole.begin, whole.stride, whole.steps) == (0, 1, 9)
    rates = [rate for piece in pieces for rate in piece.learning_rates]
    assert list(whole.learning_rates) == rates
    assert whole.weight_decays == (0.1,) * 9
    assert log.take(2, count=4).learning_rates == whole.learning_rates[2:6]
    # Nothing was written again for that.
    before = len(log.rows)
    log.take(0)
    assert len(log.rows) == before


def test_a_block_fits_into_a_message_however_many_groups_there_are() -> None:
    groups = [{"name": f"group {index}"} for index in range(4096)]
    log = Log(groups=groups, feedback={"delay": 100})
    log.open()
    block = log.take(0)
    assert block.steps == _requests.MAX_BLOCK_VALUES // 4096
    assert log.take(block.end).begin == block.end


def test_a_state_holds_as_many_records_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_state, "MAX_SAVED_VALUES", 10)
    log = Log(groups=[{"name": "a"}, {"name": "b"}], feedback={"delay": 9})
    log.open()
    log.take(0, count=3)
    log.take(3, count=6)
    fold = core.read_state(core.save_state(log.state, 1), "run").fold
    assert [(item["begin"], len(item["learning_rates"]) // 2) for item in fold["records"]] == [
        (1, 2),
        (3, 3),
    ]


# Saved states.


def saved(log: Log, progress: int) -> core.SavedState:
    return core.read_state(core.save_state(log.state, progress), "run")


def test_a_state_is_compact() -> None:
    log = Log(policies=[PLATEAU], feedback={"delay": 32})
    log.open()
    log.report(0, [1.0 / (1 + at) for at in range(5000)])
    assert len(core.save_state(log.state, 5000)) < 4096


def test_a_state_below_the_frontier_is_the_one_that_was_there() -> None:
    log = Log(policies=[{**PLATEAU, "patience": 2}])
    log.open()
    folds = {}
    for at in range(40):
        folds[at] = json.dumps(saved(log, at).fold["observers"])
        log.report(at, [1.0 + at % 3])
    for at, observers in folds.items():
        assert json.dumps(saved(log, at).fold["observers"]) == observers


def damaged(data: bytes) -> list[tuple[bytes, str]]:
    head, _, body = data.partition(b"\n")
    middle = len(body) // 2
    flipped = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
    return [
        (b"", "not a saved state"),
        (b"PK\x03\x04 something else", "not a saved state"),
        (head.replace(b" 1 ", b" 2 ") + b"\n" + body, "version 2; this release reads version 1"),
        (head + b"\n" + flipped, "damaged"),
        (head + b"\n" + body[:-40], "damaged"),
        (head + b"\n" + body[:-1], "damaged"),
        (head + b"\n" + body + body, "damaged"),
        (head + b"\n", "damaged"),
        (head, "damaged"),
        (head + b"\n\xff\xff", "damaged"),
    ]


@pytest.mark.parametrize("index", range(10))
def test_a_damaged_state_is_refused(index: int) -> None:
    log = Log()
    log.open()
    data, text = damaged(core.save_state(log.state, 0))[index]
    with pytest.raises(core.InvalidState, match=text):
        core.read_state(data, "run")


def test_a_state_of_another_run_is_refused() -> None:
    log = Log()
    log.open()
    with pytest.raises(core.InvalidState, match="belongs to run 'run', not to run 'other'"):
        core.read_state(core.save_state(log.state, 0), "other")


def test_a_progress_that_is_not_the_states_is_refused() -> None:
    log = Log()
    log.open()
    with pytest.raises(core.InvalidRequest, match="progress: got 3; allowed: 0, or none"):
        log.open(3, saved=saved(log, 0))


def test_advice_does_not_swell_a_state() -> None:
    log = Log(policies=[{**PLATEAU, "mode": "advise"}], feedback={"delay": 1})
    log.open()
    log.report(0, [1.0] * 3000)
    assert len(log.state.advice) > 1000
    assert len(core.save_state(log.state, 3000)) < 8192


def test_a_state_waits_for_the_losses_below_it() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0, 2.0])
    with pytest.raises(core.LossesPending, match="from progress 2 up to 5"):
        core.save_state(log.state, 5)


def lost(log: Log, progress: int, fresh: Log | None = None) -> Log:
    """Return a log that goes on from a state of one that was lost."""
    after = fresh or Log.__new__(Log)
    if fresh is None:
        after.state, after.rows = core.RunState("run"), []
    after.open(saved=saved(log, progress))
    return after


def test_a_lost_run_goes_on_under_the_spec_that_the_trainers_give() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0, 1.0, 1.0])
    log.write(core.revise_run(log.state, spec(policies=[PLATEAU], weight_decay=None), "x"))
    fresh = Log(policies=[PLATEAU])
    after = lost(log, 3, fresh)
    assert after.state.attempt == 2
    assert [(item.effective, item.spec) for item in after.state.plan.revisions] == [(0, log.spec)]
    assert after.rates(3, 20) == log.rates(3, 20)
    assert core.fold("run", after.rows).snapshot() == after.state.snapshot()


def test_a_lost_run_is_made_anew_from_its_state_alone() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0, 1.0, 1.0])
    after = lost(log, 3)
    assert after.state.spec == log.spec
    assert after.rates(3, 20) == log.rates(3, 20)


def test_a_state_with_another_spec_is_refused_unless_the_trainer_revises() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0, 1.0, 1.0])
    other = spec(policies=[PLATEAU], learning_rate={"peak": 3.0})
    for revise in (False, True):
        state = core.RunState("run")
        for event in core.attach_run(state, other, revise=revise, request_id="attach"):
            state.apply(event)
        request = core.OpenRequest(request_id="open", saved=saved(log, 3), token="0")
        if not revise:
            with pytest.raises(core.SpecChanged, match=r"learning_rate\.peak: 1\.0 -> 3\.0"):
                core.open_attempt(state, request)
            # What the error tells to do is possible.
            again = core.attach_run(state, other, revise=True, request_id="again")
            assert len(again) == 1
            state.apply(again[0])
            assert core.open_attempt(state, request)
            assert core.attach_run(state, other, revise=False, request_id="after") != []
            continue
        for event in core.open_attempt(state, request):
            state.apply(event)
        # Its own spec holds from where it starts, with the decisions of before.
        assert [state.values(at)[0] for at in (3, 4, 5)] == [(3.0,), (3.0,), (1.5,)]
        assert state.spec == other


def test_a_revision_that_waited_when_the_log_was_lost_still_holds() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0, None, None])
    attach(log, policies=[PLATEAU], learning_rate={"peak": 3.0})
    after = lost(log, 3)
    assert after.rates(3, 9) == [3.0] * 6


def test_what_was_decided_in_a_lost_log_is_numbered_in_this_one() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    for at in range(40):
        log.report(at, [1.0])
    assert len(log.state.plan.adjustments) > 3
    after = lost(log, 40)
    assert after.state.seq == 2
    assert {item.seq for item in after.state.plan.adjustments} == {2}
    after.report(40, [1.0])
    assert after.state.decided_since(2) == []


def test_a_checkpoint_from_before_a_trainers_revision_brings_no_records() -> None:
    log = Log(policies=[PLATEAU], groups=[{"name": "a"}, {"name": "b"}], weight_decay=0.1)
    log.open()
    log.report(0, [1.0] * 30)
    log.take(20, count=14)
    early, late = saved(log, 10), saved(log, 25)
    attach(log, policies=[PLATEAU], learning_rate={"peak": 3.0})
    log.open(saved=early, digest_at_saved=early.digest)
    log.open(saved=late, digest_at_saved=late.digest)
    assert len(log.state.plan.adjustments) > 0
    block = log.take(25, count=4)
    assert (block.groups, block.weight_decays) == (1, None)
    scale = 0.5 ** sum(item.effective <= 25 for item in log.state.plan.adjustments)
    assert block.learning_rates[0] == 3.0 * scale


def test_a_state_stays_small_with_many_groups_and_adjustments() -> None:
    groups = [{"name": f"group {index}", "peak": 1.0 + index / 7} for index in range(1000)]
    log = Log(policies=[{**PLATEAU, "factor": 0.99}], groups=groups, feedback={"delay": 1})
    log.open()
    log.report(0, [1.0] * 110)
    assert len(log.state.plan.adjustments) > 100
    data = core.save_state(log.state, 110)
    assert len(data) < 512 * 1024
    after = Log.__new__(Log)
    after.state, after.rows = core.RunState("run"), []
    after.open(saved=core.read_state(data, "run"))
    assert after.state.values(110) == log.state.values(110)


def test_what_a_state_shortened_is_whole_again_where_the_log_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_state, "MAX_SHOWN_VALUES", 4)
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0] * 30)
    before = log.state.plan.forget(25).adjustments
    assert len(before) > 2
    state = saved(log, 25)
    assert [len(item["before"]) for item in state.fold["adjustments"]][-3:] == [0, 1, 1]
    log.open(3)
    log.open(saved=state, digest_at_saved=state.digest)
    assert log.state.plan.adjustments == before
    assert not set(log.state.forgotten) & set(before)


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_run_may_start_over_whatever_it_was_taken_over_from(is_lost: bool) -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0] * 20)
    state = saved(log, 20)
    if is_lost:
        log = lost(log, 20)
    else:
        log.open(3)
        log.report(3, [1.0] * 3)
        log.open(saved=state, digest_at_saved=state.digest)
    log.report(20, [1.0] * 5)
    with pytest.raises(core.StateMismatch):
        log.open(5)
    log.open(0)
    assert log.rates(0, 4) == [1.0] * 4
    log.report(0, [1.0, 1.0])
    assert [item.effective for item in log.state.plan.adjustments] == [5]
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()


def test_a_lost_run_takes_its_state_again_and_no_other_of_that_log() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.report(0, [1.0])
    first = saved(log, 1)
    log.report(1, [1.0, 1.0])
    after = lost(log, 3)
    after.report(3, [1.0, 1.0])
    after.open(saved=saved(log, 3))
    assert (after.state.attempt, after.state.begin) == (3, 3)
    with pytest.raises(core.StateMismatch, match="delete the run here"):
        after.open(saved=first)


def test_what_a_lost_log_decided_is_numbered_in_this_one_each_time() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    for at in range(40):
        log.report(at, [1.0])
    state = saved(log, 40)
    after = lost(log, 40)
    after.report(40, [1.0])
    after.open(0)
    for at in range(20):
        # The log decides on its own, in events that have the numbers of those of the lost one.
        after.report(at, [2.0 if at else 1.0])
    after.open(saved=state)
    decided = after.state.plan.adjustments
    assert {item.seq for item in decided} == {after.state.seq}
    assert [item.change for item in decided] == [item.change for item in log.state.plan.adjustments]
    assert after.rates(40, 44) == log.rates(40, 44)
    assert core.fold("run", after.rows).snapshot() == after.state.snapshot()


# Repeats and refusals.


def test_a_repeat_does_nothing() -> None:
    log = Log()
    assert core.create_run(log.state, log.spec, "create") == []
    log.open(request_id="first")
    assert log.open(request_id="first") == []
    log.write(core.finish_run(log.state, "finish"))
    assert core.finish_run(log.state, "finish again") == []


def test_a_repeat_of_a_superseded_opening_is_refused() -> None:
    log = Log()
    log.open(request_id="first")
    log.open(request_id="second")
    with pytest.raises(core.AttemptSuperseded):
        log.open(request_id="first")


def test_a_finished_run_takes_nothing_more_and_keeps_what_it_recorded() -> None:
    log = Log(policies=[PLATEAU])
    log.open()
    log.take(0)
    log.report(0, [1.0])
    log.write(core.finish_run(log.state, "finish"))
    assert log.take(0).steps == 4
    for call in (
        lambda: log.take(4),
        lambda: log.report(1, [1.0]),
        lambda: log.open(0),
        lambda: core.revise_run(log.state, spec(policies=[PLATEAU], total=2000), "x"),
    ):
        with pytest.raises(core.RunFinished):
            call()
    log.report(0, [1.0])


def test_a_run_that_is_not_there_is_refused_by_name() -> None:
    state = core.RunState("lost")
    for call in (
        lambda: core.check_attempt(state, 1, ""),
        lambda: core.revise_run(state, spec(), "x"),
        lambda: core.finish_run(state, "x"),
        lambda: core.attach_run(state, None, revise=False, request_id="x"),
        lambda: core.open_attempt(state, core.OpenRequest(request_id="x")),
    ):
        with pytest.raises(core.RunNotFound, match="'lost'"):
            call()


@pytest.mark.parametrize(
    ("report", "field"),
    [
        (core.Report(-1, 1.0, 1.0, 1), "reports.0.progress"),
        (core.Report(2**53, 1.0, 1.0, 2**53), "reports.0.progress"),
        (core.Report(3, 1.0, 1.0, 3), "reports.0.moves_to"),
        (core.Report(3, 1.0, 1.0, 2**53 + 1), "reports.0.moves_to"),
        (core.Report(3, 1.0, 0.0, 4), "reports.0.weight"),
        (core.Report(3, 1.0, float("nan"), 4), "reports.0.weight"),
    ],
)
def test_reports_out_of_range(report: core.Report, field: str) -> None:
    log = Log()
    log.open()
    with pytest.raises(core.InvalidRequest) as caught:
        core.report_losses(log.state, [report], rank=0, incarnation="one")
    assert field in [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    "fields",
    [
        {"begin": -1},
        {"begin": 2**53 + 1},
        {"stride": 0},
        {"count": 0},
        {"count": 129},
        {"in_use": -1},
    ],
)
def test_requests_for_values_out_of_range(fields: dict[str, int]) -> None:
    log = Log()
    log.open()
    with pytest.raises(core.InvalidRequest) as caught:
        core.get_values(log.state, core.ValuesRequest(**{"begin": 0, **fields}))
    assert [violation.field for violation in caught.value.violations] == list(fields)


# Snapshots.


def test_a_snapshot_holds_every_attribute() -> None:
    log = Log(policies=[PLATEAU, {**PLATEAU, "mode": "advise"}])
    log.write(core.attach_run(log.state, log.spec, revise=True, request_id="attach"))
    log.open(key="k")
    log.report(0, [1.0, float("nan"), 1.0, None, 1.0] + [1.0] * 9)
    log.write(
        core.report_losses(log.state, [core.Report(3, 2.0, 1.0, 4)], rank=0, incarnation="one")[0]
    )
    log.take(0)
    log.write(core.waive(log.state, 40))
    attach(log, "again", policies=[PLATEAU], total=2000)
    state = saved(log, 6)
    log.open(3, key="l")
    log.report(3, [1.0, 1.0])
    log.open(saved=state, digest_at_saved=state.digest)
    restored = vars(core.restore_snapshot(log.state.snapshot()))
    for name, value in vars(log.state).items():
        got = restored.pop(name)
        if name == "plan":
            assert (got.revisions, got.adjustments) == (value.revisions, value.adjustments)
        elif name == "records":
            assert list(got) == list(value)
        elif name not in ("loss_values", "late"):
            assert got == value, name
    assert restored == {}


# Events.


def test_every_event_is_read_back_to_the_bit() -> None:
    log = Log(policies=[PLATEAU])
    attach(log, policies=[PLATEAU], total=2000)
    log.open()
    log.report(0, [float("nan"), float("-inf"), -0.0, None, 5e-324, 0.1])
    log.take(0)
    log.write(core.waive(log.state, 30))
    log.write(core.revise_run(log.state, spec(policies=[PLATEAU], total=3000), "x"))
    log.write(core.finish_run(log.state, "finish"))
    kinds = set()
    for data in log.rows:
        event = core.decode(data)
        kinds.add(event.kind)
        assert core.encode(event) == data
    assert kinds == {
        "created", "revised", "opened", "reported", "recorded", "waived", "finished",
    }  # fmt: skip
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()


def test_an_event_of_a_later_release_is_refused_by_its_name() -> None:
    with pytest.raises(
        ValueError, match="'rolled-back'; this release knows acknowledged, adjusted"
    ):
        core.decode(b'{"kind":"rolled-back"}')
