"""What operators can do to a run: each action, and each of its refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core._changes import (
    BeginDecay,
    Direct,
    Hold,
    Multiply,
    NextStage,
    ScaleWeightDecay,
    SetRate,
    StretchWarmup,
)
from lrpilot.core._operators import with_total
from tests.core.test_requests import PLATEAU, Log, spec

LINEAR: dict[str, Any] = {"peak": 1.0, "decay": {"style": "linear"}}
STAGES: list[dict[str, Any]] = [
    {"name": "one", "until": 10, "learning_rate": {"peak": 1.0}},
    {"name": "two", "until": 500, "learning_rate": {"peak": 0.5}},
    {"name": "three", "learning_rate": {"peak": 0.25}},
]
ADVISED = {**PLATEAU, "mode": "advise"}


def run(losses: int = 2, **fields: Any) -> Log:
    """Return a run whose horizon is D = 4 past so many losses of 1."""
    log = Log(**{"policies": [{**PLATEAU, "patience": 99}], **fields})
    log.open()
    log.report(0, [1.0] * losses)
    return log


def act(log: Log, action: core.Action, request_id: str = "", **fields: Any) -> list[core.Event]:
    given = {"reason": "because", "author": "me", **fields}
    name = request_id or f"request {log.state.seq}"
    return log.write(core.adjust_run(log.state, action, request_id=name, **given))


def approve(log: Log, advice: str, request_id: str = "", **fields: Any) -> list[core.Event]:
    given = {"reason": "", "author": "me", **fields}
    name = request_id or f"request {log.state.seq}"
    return log.write(core.approve_advice(log.state, advice, request_id=name, **given))


def newest(log: Log) -> core.Adjustment:
    return max(log.state.plan.adjustments, key=lambda item: item.decision)


# Each action.


def test_scaling_multiplies_from_the_horizon_on() -> None:
    log = run(learning_rate=LINEAR)
    act(log, core.ScaleLearningRate(0.5))
    assert log.rates(4, 8) == [0.996, 0.995, 0.994 * 0.5, 0.993 * 0.5]
    item = newest(log)
    assert (item.change, item.effective, item.decided_at) == (Multiply(0.5, "because"), 6, 2)
    assert (item.kind, item.source, item.author, item.order) == ("operator", "operator", "me", 3000)
    assert (item.before, item.after) == ((0.994,), (0.994 * 0.5,))


def test_scaling_by_one_does_nothing() -> None:
    log = run(weight_decay=0.1)
    assert act(log, core.ScaleLearningRate(1.0)) == []
    assert act(log, core.ScaleDecay(1.0)) == []


def test_setting_the_lr_scales_the_other_groups_alike() -> None:
    log = run(groups=[{"name": "a"}, {"name": "b", "peak": 0.5}])
    act(log, core.SetLearningRate(0.3))
    assert log.state.values(5)[0] == (1.0, 0.5)
    assert log.state.values(6)[0] == (0.3, 0.3 * 0.5)
    assert newest(log).change == SetRate(0.3, "because")


def test_setting_the_lr_needs_one_to_scale() -> None:
    log = run(losses=0, learning_rate={"peak": 1.0, "warmup": 10}, feedback={"delay": 1})
    with pytest.raises(core.AdjustmentRefused, match=r"is 0\.0 at progress 0.*wait until warmup"):
        act(Log(learning_rate={"peak": 1.0, "warmup": 10}), core.SetLearningRate(0.5))
    act(log, core.SetLearningRate(0.5))
    assert log.rates(0, 3) == [0.0, 0.5, 1.0]


def test_scaling_the_wd() -> None:
    log = run(weight_decay=0.1)
    act(log, core.ScaleDecay(0.0))
    assert [log.state.values(at)[1] for at in (5, 6)] == [(0.1,), (0.0,)]
    assert newest(log).change == ScaleWeightDecay(0.0, "because")
    assert (newest(log).decays_before, newest(log).decays_after) == ((0.1,), (0.0,))
    with pytest.raises(core.AdjustmentRefused, match="the run sets no weight decay"):
        act(run(), core.ScaleDecay(0.5))


@pytest.mark.parametrize(
    ("length", "expected"), [(10, 10), (10.9, 10), ("50%", 3), ("100%", 6), (2**53, 2**53)]
)
def test_beginning_the_decay(length: Any, expected: int) -> None:
    log = run()
    act(log, core.DecayNow(length, "linear"))
    assert newest(log).change == BeginDecay(expected, "linear", "because")
    assert log.rates(5, 8) == [1.0, 1.0, 1.0 - 1 / expected]


def test_a_decay_begins_once_until_it_is_taken_back() -> None:
    log = run()
    act(log, core.DecayNow(10))
    name = newest(log).id
    with pytest.raises(core.AdjustmentRefused, match=rf"since progress 6: .*undo {name}"):
        act(log, core.DecayNow(20))
    act(log, core.TakeBack(name))
    act(log, core.DecayNow(20))
    assert newest(log).change == BeginDecay(20, "minus_sqrt", "because")


def test_entering_the_next_stage() -> None:
    log = run(stages=STAGES, learning_rate=None)
    act(log, core.EnterNextStage())
    assert newest(log).change == NextStage("one", "because")
    assert log.rates(5, 7) == [1.0, 0.5]
    log.report(2, [1.0] * 3)
    act(log, core.EnterNextStage())
    assert log.rates(5, 10) == [1.0, 0.5, 0.5, 0.5, 0.25]
    with pytest.raises(core.AdjustmentRefused, match="stage 'three' is the last one"):
        act(log, core.EnterNextStage())
    with pytest.raises(core.AdjustmentRefused, match="it has no stages"):
        act(run(), core.EnterNextStage())


def test_a_stage_that_only_begins_at_the_horizon_cannot_be_left_there() -> None:
    log = run(losses=6, stages=STAGES, learning_rate=None)
    with pytest.raises(core.AdjustmentRefused, match="'two' only begins at progress 10"):
        act(log, core.EnterNextStage())
    log.report(6, [1.0])
    act(log, core.EnterNextStage())
    assert log.rates(9, 13) == [1.0, 0.5, 0.25, 0.25]


def test_holding_and_releasing() -> None:
    log = run(learning_rate=LINEAR)
    act(log, core.HoldValues())
    assert newest(log).change == Hold(None, "because")
    assert act(log, core.HoldValues()) == []
    log.report(2, [1.0] * 10)
    act(log, core.ReleaseValues())
    assert log.rates(5, 8) == [0.995, 0.994, 0.994]
    assert log.rates(15, 18) == [0.994, 0.984, 0.983]
    assert act(log, core.ReleaseValues()) == []


def test_a_release_ends_a_policys_hold_and_a_hold_outlasts_it() -> None:
    guard = {"kind": "nonfinite", "mode": "act", "streak": 1, "hold": 5}
    log = run(losses=0, policies=[guard], learning_rate=LINEAR)
    log.report(0, [math.nan, 1.0])
    assert newest(log).change.action == "directive"
    assert log.rates(4, 10) == [0.996] * 5 + [0.991]
    act(log, core.HoldValues())
    assert log.rates(4, 12) == [0.996] * 8
    act(log, core.ReleaseValues())
    assert log.rates(4, 8) == [0.996, 0.996, 0.994, 0.993]


def test_taking_back() -> None:
    log = run(learning_rate=LINEAR)
    act(log, core.ScaleLearningRate(0.5))
    name = newest(log).id
    log.report(2, [1.0] * 3)
    events = act(log, core.TakeBack(name))
    assert [event.kind for event in events] == ["adjusted"]
    assert core.summary_of(newest(log).change) == f"take back {name}"
    assert log.rates(8, 11) == [0.992 * 0.5, 0.991, 0.99]
    assert act(log, core.TakeBack(name)) == []


def test_a_policys_decision_can_be_taken_back_for_every_attempt() -> None:
    log = run(losses=0, policies=[PLATEAU])
    log.report(0, [1.0, 1.0, None, None])
    (cut,) = log.state.plan.adjustments
    act(log, core.TakeBack(cut.id))
    assert log.rates(4, 10) == [1.0, 0.5, 0.5, 0.5, 1.0, 1.0]
    log.open(0)
    log.report(0, [1.0, 1.0, None, None])
    assert log.rates(4, 10) == [1.0, 0.5, 0.5, 0.5, 1.0, 1.0]


def test_what_cannot_be_taken_back() -> None:
    log = run(losses=3, policies=[ADVISED], stages=STAGES, learning_rate=None)
    advice = log.state.advice[0].id
    for name in ("9-9-9", "", advice + "0"):
        with pytest.raises(core.AdjustmentNotFound, match="has no adjustment with the id"):
            act(log, core.TakeBack(name))
    with pytest.raises(core.AdjustmentRefused, match="is an advice: it changed nothing"):
        act(log, core.TakeBack(advice))
    act(log, core.EnterNextStage())
    with pytest.raises(core.AdjustmentRefused, match="of the kind 'next stage'; only these"):
        act(log, core.TakeBack(newest(log).id))
    log = run(losses=0, policies=[PLATEAU])
    log.report(0, [1.0, 1.0])
    (cut,) = log.state.plan.adjustments
    log.open(1)
    with pytest.raises(core.AdjustmentRefused, match="forgotten already"):
        act(log, core.TakeBack(cut.id))


def test_asking_for_something() -> None:
    log = run(losses=10)
    act(log, core.Ask("rollback", before=7, factor=0.25, until=9))
    assert newest(log).change == Direct("rollback", "because", before=7, factor=0.25, until=9)
    act(log, core.Ask("skip", until=15))
    assert newest(log).change == Direct("skip", "because", until=15)
    for kind in ("evaluate", "stop"):
        act(log, core.Ask(kind, before=7, factor=7.0))
        assert newest(log).change == Direct(kind, "because")
    assert {item.effective for item in log.state.plan.directives(0, 99)} == {14}


def test_asking_needs_somebody_to_ask() -> None:
    with pytest.raises(core.AdjustmentRefused, match="no attempt is open"):
        act(Log(), core.Ask("stop"))


# What a request can be refused for.


@pytest.mark.parametrize(
    ("action", "field", "got"),
    [
        (core.ScaleLearningRate(0.0), "scale_lr", "0.0"),
        (core.ScaleLearningRate(-0.5), "scale_lr", "-0.5"),
        (core.ScaleLearningRate(math.nan), "scale_lr", "nan"),
        (core.ScaleLearningRate(math.inf), "scale_lr", "inf"),
        (core.ScaleLearningRate(2e100), "scale_lr", "2e+100"),
        (core.SetLearningRate(0.0), "set_lr", "0.0"),
        (core.SetLearningRate(math.nan), "set_lr", "nan"),
        (core.ScaleDecay(-1.0), "scale_weight_decay", "-1.0"),
        (core.ScaleDecay(math.inf), "scale_weight_decay", "inf"),
        (core.DecayNow(10, "sudden"), "begin_decay.style", "'sudden'"),
        (core.DecayNow(0), "begin_decay.length", "0"),
        (core.DecayNow("1%"), "begin_decay.length", "'1%'"),
        (core.DecayNow("101%"), "begin_decay.length", "'101%'"),
        (core.DecayNow("long"), "begin_decay.length", "'long'"),
        (core.DecayNow(math.nan), "begin_decay.length", "nan"),
        (core.DecayNow(-5), "begin_decay.length", "-5"),
        (core.Ask("dance"), "directive.kind", "'dance'"),
        (core.Ask("rollback", before=0), "directive.before", "0"),
        (core.Ask("rollback", before=3), "directive.before", "3"),
        (core.Ask("rollback", before=1, factor=0.0), "directive.factor", "0.0"),
        (core.Ask("rollback", before=1, factor=1.5), "directive.factor", "1.5"),
        (core.Ask("rollback", before=1, factor=math.nan), "directive.factor", "nan"),
        (core.Ask("skip", until=-1), "directive.until", "-1"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_named(action: core.Action, field: str, got: str) -> None:
    log = run(weight_decay=0.1)
    before = log.state.snapshot()
    with pytest.raises(core.InvalidRequest) as caught:
        act(log, action)
    (violation,) = caught.value.violations
    assert (violation.field, violation.got) == (field, got)
    assert violation.allowed
    assert log.state.snapshot() == before


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"reason": ""}, ["reason"]),
        ({"reason": " \n"}, ["reason"]),
        ({"author": ""}, ["author"]),
        ({"reason": "x" * 1001, "author": "x" * 1001}, ["reason", "author"]),
    ],
)
def test_every_change_is_signed(fields: dict[str, str], named: list[str]) -> None:
    log = run(policies=[ADVISED])
    with pytest.raises(core.InvalidRequest, match="the change is not signed") as caught:
        act(log, core.HoldValues(), **fields)
    assert [violation.field for violation in caught.value.violations] == named
    log.report(2, [1.0])
    approval = {**fields, "reason": fields.get("reason", "") or "fine"}
    if "author" in fields:
        with pytest.raises(core.InvalidRequest):
            approve(log, log.state.advice[0].id, **approval)
    act(log, core.HoldValues(), reason="x" * 1000, author="x" * 1000)


def test_a_run_that_is_not_there_or_is_finished() -> None:
    nowhere = Log.__new__(Log)
    nowhere.state, nowhere.rows = core.RunState("nowhere"), []
    log = run(policies=[ADVISED], losses=3)
    advice = log.state.advice[0].id
    log.write(core.finish_run(log.state, "finish"))
    for each, error in ((nowhere, core.RunNotFound), (log, core.RunFinished)):
        with pytest.raises(error):
            act(each, core.HoldValues())
        with pytest.raises(error):
            approve(each, advice)


def test_a_plan_that_changed_since_it_was_looked_at() -> None:
    log = run(policies=[{**PLATEAU, "patience": 1}])
    seen = log.state.etag
    log.take(0)
    log.report(2, [None])
    assert log.state.etag == seen  # nothing was decided
    act(log, core.HoldValues(), etag=seen)
    calls: list[Callable[[], object]] = [
        lambda: act(log, core.ScaleLearningRate(0.5), etag=seen),
        lambda: act(log, core.SetTotal(2000), etag=seen),
        lambda: approve(log, "any", etag=seen),
        lambda: core.revise_run(log.state, log.spec, "revise", etag=seen),
    ]
    for call in calls:
        with pytest.raises(core.PlanChanged, match=f"is {log.state.etag}, not {seen}"):
            call()
    seen = log.state.etag
    act(log, core.SetTotal(2000))
    assert log.state.etag != seen
    seen = log.state.etag
    log.open(2)
    assert log.state.etag != seen


# Repeats and previews.

ACTIONS: list[core.Action] = [
    core.ScaleLearningRate(0.5), core.SetLearningRate(0.3), core.ScaleDecay(2.0),
    core.DecayNow("50%", "cosine"), core.EnterNextStage(), core.SetTotal(2000), core.HoldValues(),
    core.Ask("evaluate"), core.Ask("rollback", before=1),
]  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_a_repeated_request_gets_what_the_first_one_did(action: core.Action) -> None:
    log = run(stages=STAGES, learning_rate=None, weight_decay=0.1)
    assert len(act(log, action, "same")) == 1
    log.report(2, [1.0] * 5)
    before = log.state.snapshot()
    # Whatever else it says by now.
    assert act(log, action, "same") == []
    assert act(log, core.ScaleLearningRate(math.nan), "same", reason="", etag="old") == []
    assert log.state.snapshot() == before
    assert log.state.answers["same"][1] == 6
    made = log.state.made.get("same")
    assert (made is None) == isinstance(action, core.SetTotal)
    if made is not None:
        assert log.state.find(made) == newest(log)


@pytest.mark.parametrize("action", ACTIONS, ids=str)
def test_a_preview_shows_the_plan_and_leaves_the_state_as_it_is(action: core.Action) -> None:
    log = run(stages=STAGES, learning_rate=None, weight_decay=0.1)
    before, rates = log.state.snapshot(), log.rates(0, 700)
    given = {"reason": "because", "author": "me", "request_id": "x"}
    events = core.adjust_run(log.state, action, **given)
    plan = core.planned(log.state, events)
    assert log.state.snapshot() == before
    assert log.rates(0, 700) == rates
    log.write(events)
    assert plan.adjustments == log.state.plan.adjustments
    assert [plan.values(at) for at in range(700)] == [
        log.state.plan.values(at) for at in range(700)
    ]
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()
    assert core.restore_snapshot(log.state.snapshot()).snapshot() == log.state.snapshot()


def test_operators_are_never_held_back() -> None:
    log = run(feedback={"delay": 4, "interval": 100})
    for factor in (0.5, 0.25):
        act(log, core.ScaleLearningRate(factor))
    assert [item.mode for item in log.state.plan.adjustments] == ["act", "act"]


# Another total.


def test_another_total_moves_what_ended_with_the_old_one_and_nothing_else() -> None:
    log = run(
        learning_rate={"peak": 1.0, "warmup": "2%", "decay": {"style": "linear"}},
        weight_decay={"start": 0.1, "end": 0.2, "style": "linear"},
    )
    act(log, core.SetTotal(2000), reason="more data")
    revised = log.state.spec
    assert revised.total == 2000
    assert revised.to_mapping()["learning_rate"] == {
        "init": 0.0, "peak": 1.0, "min": 0.0, "warmup": 20, "decay": {"style": "linear",
                                                                      "end": 2000},
    }  # fmt: skip
    assert revised.weight_decay is not None
    assert revised.weight_decay.over == 2000
    (event,) = [core.decode(row) for row in log.rows if b'"revised"' in row]
    assert isinstance(event, core.Revised)
    assert (event.author, event.reason, event.effective) == ("me", "more data", 6)
    # The past is as it was.
    assert log.state.plan.values(5)[0] == core.base_values(log.spec, 5)[0][:1]
    assert act(log, core.SetTotal(2000)) == []


def test_what_has_ends_of_its_own_keeps_them() -> None:
    given = spec(
        learning_rate={"peak": 1.0, "warmup": 20, "decay": {"style": "linear", "end": 900}},
        weight_decay={"start": 0.1, "end": 0.2, "style": "linear", "over": 500},
    )
    for total in (2000, 950):
        expected = spec(
            learning_rate=given.learning_rate, weight_decay=given.weight_decay, total=total
        )
        assert with_total(given, total) == expected


@pytest.mark.parametrize("total", [2000, 700])
def test_another_total_of_stages_moves_the_last_one_alone(total: int) -> None:
    decay = {"style": "wsd", "anneal": "10%", "anneal_style": "linear"}
    ramp = {"start": 0.1, "end": 0.2, "style": "cosine"}
    stages: list[dict[str, Any]] = [
        {"name": "one", "until": 400, "learning_rate": {"peak": 1.0, "decay": {"style": "linear"}},
         "weight_decay": ramp},
        {"name": "two", "until": 600, "learning_rate": {"peak": 1.0}},
        {"name": "three", "until": 1000, "learning_rate": {"peak": 0.5, "warmup": "2%",
                                                          "decay": decay}, "weight_decay": ramp},
    ]  # fmt: skip
    given = spec(learning_rate=None, weight_decay=ramp, stages=stages)
    new = with_total(given, total)
    assert [stage.until for stage in new.stages] == [400, 600, total]
    assert [stage.learning_rate.decay.end for stage in new.stages] == [400, 600, total]
    assert [stage.weight_decay.over for stage in new.stages if stage.weight_decay] == [
        400,
        total - 600,
    ]
    assert new.weight_decay is not None
    assert new.weight_decay.over == total
    assert new.stages[2].learning_rate.warmup == 20
    assert new.stages[2].learning_rate.decay.anneal == "10%"
    before, after = core.base_schedule(given), core.base_schedule(new)
    rates = [[lr for lr, _ in values(at)] for values in (before, after) for at in range(0, 600, 9)]
    assert rates[: len(rates) // 2] == rates[len(rates) // 2 :]


def test_a_last_stage_that_ends_with_the_total_at_the_latest_does_so_still() -> None:
    stages = [{"name": "only", "when": {"below": 1.0}, "latest": 1000, "learning_rate": LINEAR}]
    given = spec(learning_rate=None, stages=stages)
    for total in (2000, 700):
        (stage,) = with_total(given, total).stages
        assert (stage.latest, stage.learning_rate.decay.end) == (total, total)
    stages[0]["latest"] = 900
    (stage,) = with_total(spec(learning_rate=None, stages=stages), 2000).stages
    assert (stage.latest, stage.learning_rate.decay.end) == (900, 900)


@pytest.mark.parametrize(
    ("total", "field"), [(5, "total"), (0, "total"), (2**53 + 1, "total"), (21, "total")]
)
def test_a_total_that_cannot_be(total: int, field: str) -> None:
    log = run(losses=20)
    with pytest.raises(core.InvalidSpec) as caught:
        act(log, core.SetTotal(total))
    assert field in [violation.field for violation in caught.value.violations]
    act(log, core.SetTotal(24))


# Advice.


def advised(*policies: dict[str, Any], **fields: Any) -> Log:
    log = Log(policies=[{**item, "mode": "advise"} for item in policies], **fields)
    log.open()
    return log


def test_approving_makes_an_adjustment_of_the_advice_at_the_horizon() -> None:
    log = advised(PLATEAU)
    log.report(0, [1.0, 1.0, 1.0])
    (advice,) = log.state.advice
    assert (advice.effective, advice.expires) == (5, 5 + 50)
    log.take(0)
    approve(log, advice.id, "yes", reason="looks right")
    made = newest(log)
    assert made.id == log.state.approved[advice.id] == log.state.made["yes"]
    # It is the policy's own still, so that its next step can take its place.
    assert (made.kind, made.source, made.author) == ("plateau", "operator", "me")
    assert made.effective == log.state.horizon
    assert isinstance(made.change, Multiply)
    assert made.change.factor == 0.5
    assert made.change.reason == f"{advice.reason}; approved: looks right"
    assert log.rates(3, 6) == [1.0, 0.5, 0.5]
    assert approve(log, advice.id, "yes") == []
    with pytest.raises(core.AdviceExpired, match=rf"approved already, as adjustment {made.id}"):
        approve(log, advice.id, "again")


def test_an_advice_expires_in_progress() -> None:
    log = advised({**PLATEAU, "patience": 0}, feedback={"delay": 4, "advice_expires": 7})
    log.report(0, [1.0, 1.0])
    (advice,) = log.state.advice
    assert advice.expires == 5 + 7
    log.take(0, in_use=7)
    assert log.state.horizon == 11
    log.take(11, in_use=8)
    assert log.state.horizon == 12
    with pytest.raises(core.AdviceExpired, match="up to horizon 11, which is 12 now") as caught:
        approve(log, advice.id)
    assert caught.value.facts["expires"] == 12


def test_an_advice_of_forgotten_losses_cannot_be_approved() -> None:
    log = advised(PLATEAU)
    log.report(0, [1.0, 1.0])
    (advice,) = log.state.advice
    log.open(1)
    with pytest.raises(core.AdviceExpired, match="forgotten the losses that led to it"):
        approve(log, advice.id)


def test_what_is_no_advice_cannot_be_approved() -> None:
    log = run(losses=0, policies=[PLATEAU])
    log.report(0, [1.0, 1.0])
    with pytest.raises(core.AdjustmentRefused, match="is no advice"):
        approve(log, newest(log).id)
    with pytest.raises(core.AdjustmentNotFound, match="no advice with the id '1-2-3'"):
        approve(log, "1-2-3")


def test_a_note_is_nothing_to_approve() -> None:
    log = advised({"kind": "spike", "least": 2, "persistent": 2})
    log.report(0, [1.0, 1.1, 1.0, 1.1] + [9.0] * 3)
    assert [item.change.action for item in log.state.advice] == ["note"]
    with pytest.raises(core.AdjustmentRefused, match="is a note"):
        approve(log, log.state.advice[0].id)


@pytest.mark.parametrize(
    ("policy", "losses", "action"),
    [
        (PLATEAU, [1.0, 1.0], "multiply"),
        ({"kind": "greedy", "patience": 0, "factor": 0.5, "max_lr": 9.0}, [1.0, 1.0], "multiply"),
        ({"kind": "decay-on-plateau", "window": 1, "patience": 0, "anneal": 10}, [1.0, 1.0],
         "decay"),
        ({"kind": "nonfinite", "streak": 1}, [math.nan], "hold"),
        ({"kind": "spike", "least": 2, "persistent": 1, "recovery": 1},
         [1.0, 1.1, 1.0, 1.1] + [9.0] * 12, "curve"),
    ],
    ids=lambda item: item["kind"] if isinstance(item, dict) else "",
)  # fmt: skip
def test_each_kind_of_advice_does_what_it_says(
    policy: dict[str, Any], losses: list[float], action: str
) -> None:
    log = advised(policy)
    log.report(0, losses)
    advice = next(item for item in log.state.advice if item.change.action == action)
    assert advice.mode == "advise"
    approve(log, advice.id, reason="yes")
    made = newest(log)
    assert core.change_to_mapping(made.change) == {
        **core.change_to_mapping(advice.change), "reason": f"{advice.reason}; approved: yes",
    }  # fmt: skip
    assert made.before == (1.0,)
    assert (made.after == (1.0,)) == (action in {"hold", "decay"})
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()


def test_an_advised_stretch_can_be_approved_while_the_warmup_lasts() -> None:
    guard = {"kind": "warmup-guard", "window": 2, "patience": 1, "rise": 0.01}
    losses = [2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 9.0, 9.0]
    for in_use, possible in ((10, True), (30, False)):
        log = advised(guard, learning_rate={"peak": 1.0, "warmup": 20})
        log.report(0, losses)
        (advice,) = log.state.advice
        log.take(0, in_use=in_use)
        if possible:
            approve(log, advice.id)
            assert isinstance(newest(log).change, StretchWarmup)
            assert log.rates(14, 15) == [0.7]
            assert log.state.plan.phase(0).warmup_end == 26.0
        else:
            with pytest.raises(core.AdjustmentRefused, match="the warmup is over at progress 34"):
                approve(log, advice.id)


def test_an_advised_anneal_is_refused_beside_another() -> None:
    log = advised({"kind": "decay-on-plateau", "window": 1, "patience": 0, "anneal": 10})
    log.report(0, [1.0, 1.0])
    (advice,) = log.state.advice
    act(log, core.DecayNow(50))
    with pytest.raises(core.AdjustmentRefused, match="an anneal is in force at progress 4"):
        approve(log, advice.id)


def test_an_advised_rollback_is_asked_for_once_approved() -> None:
    log = advised({"kind": "nonfinite", "streak": 1})
    log.report(0, [1.0, 1.0, math.nan])
    advice = next(item for item in log.state.advice if item.change.action == "directive")
    assert log.state.plan.directives(0, 999) == []
    approve(log, advice.id)
    (directive,) = log.state.plan.directives(0, 999)
    assert isinstance(directive.change, Direct)
    assert (directive.change.directive, directive.change.before) == ("rollback", 2)
    assert directive.effective == log.state.horizon


def test_the_next_step_of_a_policy_takes_the_place_of_the_one_that_was_approved() -> None:
    follows = {"kind": "batch-size", "reference": 256, "mode": "advise"}
    log = Log(policies=[follows, {**PLATEAU, "patience": 1000}], feedback={"delay": 1})
    log.open()
    seen = []
    for at, batch in enumerate([256, 512, 1024, 256]):
        report = core.Report(at, 1.0, 1.0, at + 1, batch=batch)
        events, _ = core.report_losses(log.state, [report], rank=0, incarnation="one")
        log.write(events)
        for advice in [item for item in log.state.advice if item.decided_at == at]:
            approve(log, advice.id, f"at {at} {advice.part}")
        seen.append(log.state.plan.values(log.state.horizon)[0][0])
    # 512 and 1024 were approved one after the other, and then that neither holds any more.
    assert seen == [1.0, 2.0**0.5, 2.0, 1.0]
    assert len(log.state.approved) == 3
