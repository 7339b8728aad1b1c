"""Stages in whole runs: where each ends, what begins afresh in it, and who is quiet there."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from lrpilot import core
from lrpilot.core._changes import NextStage
from lrpilot.core._plan import Plan, Revision
from tests.core.test_requests import PLATEAU, Log, spec

CONSTANT: dict[str, Any] = {"peak": 1.0}
HALF: dict[str, Any] = {"peak": 0.5}


def run(*stages: dict[str, Any], **fields: Any) -> Log:
    """Return an open run of these stages with D = 4 and a total of 100."""
    log = Log(**{"learning_rate": None, "stages": list(stages), "total": 100, **fields})
    log.open()
    return log


def until_plateau(**fields: Any) -> dict[str, Any]:
    when = {"plateau": {"window": 2, "patience": 1}}
    return {"name": "one", "when": when, "latest": 40, "learning_rate": CONSTANT, **fields}


TWO: dict[str, Any] = {"name": "two", "learning_rate": HALF}


def begins(log: Log, name: str) -> int:
    """Return the first progress of a stage."""
    return next(stage.begin for stage in log.state.plan.stages() if stage.name == name)


# The known one.


@pytest.mark.parametrize("name", sorted(core.PRESETS))
def test_the_plan_of_a_preset_is_its_base_schedule(name: str) -> None:
    preset = core.PRESETS[name].spec
    plan, base = Plan([Revision(0, 0, preset)], []), core.base_schedule(preset)
    ends = [stage.until for stage in plan.stages() if stage.until is not None]
    points = {0, 1, preset.total // 7, preset.total // 2, preset.total, preset.total + 1}
    for at in sorted(points | {at + step for at in ends for step in (-1, 0, 1)}):
        rates, decays = plan.values(at)
        assert rates == tuple(lr for lr, _ in base(at))
        assert decays == (tuple(wd for _, wd in base(at)) if preset.has_weight_decay else None)


def test_the_stages_of_deepseek_v3() -> None:
    # 2000 steps of warmup to 2.2e-4, constant up to 10T tokens, cosine over 4.3T to 2.2e-5, then
    # 333B at 2.2e-5 and the rest of the 14.8T at 7.3e-6 (DeepSeek-V3 technical report, 4.2).
    preset = core.PRESETS["deepseek-v3"].spec
    assert preset.unit == "tokens"
    plan = Plan([Revision(0, 0, preset)], [])
    trillion = 10**12
    for at, lr in (
        (5 * trillion, 2.2e-4), (9 * trillion, 2.2e-4), (14_299 * 10**9, 2.2e-5),
        (14_400 * 10**9, 2.2e-5), (14_600 * 10**9, 2.2e-5), (14_700 * 10**9, 7.3e-6),
        (14_800 * 10**9, 7.3e-6),
    ):  # fmt: skip
        assert plan.values(at)[0][0] == pytest.approx(lr, rel=1e-5)
    assert plan.values(12_150 * 10**9)[0][0] == pytest.approx((2.2e-4 + 2.2e-5) / 2)


# What ends a stage.


def test_a_stage_ends_exactly_one_delay_after_the_loss_that_shows_a_plateau() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [1.0] * 5)
    assert begins(log, "two") == 40
    # Reports at 1, 3 and 5: the best one, and two that are not better.
    log.report(5, [1.0])
    assert begins(log, "two") == 9
    assert log.rates(7, 11) == [1.0, 1.0, 0.5, 0.5]
    (left,) = log.state.plan.adjustments
    assert (left.effective, left.decided_at, left.kind) == (9, 5, "stage")
    assert left.source == "stages.0 (when)"
    assert (left.before, left.after) == ((1.0,), (0.5,))
    assert left.reason == (
        "mean of 2 loss values 1: none below 1 * (1 - 0.0001) for 2 reports (patience 1)"
    )


@pytest.mark.parametrize(
    ("earliest", "begin"), [(9, 9), (10, 11), (11, 11), (20, 21), (21, 21), (39, 39), (40, 40)]
)
def test_a_stage_never_ends_before_its_earliest(earliest: int, begin: int) -> None:
    log = run(until_plateau(earliest=earliest), TWO)
    log.report(0, [1.0] * 50)
    assert begins(log, "two") == begin


def test_a_stage_whose_condition_never_holds_ends_at_its_latest() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [0.9**at for at in range(50)])
    assert begins(log, "two") == 40
    assert log.rates(39, 41) == [1.0, 0.5]
    assert not log.state.plan.adjustments


def test_a_condition_that_would_show_after_the_latest_is_not_recorded() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [0.9**at for at in range(34)])
    log.report(34, [1.0] * 6)
    assert begins(log, "two") == 40
    assert not log.state.plan.adjustments


def test_an_improvement_counts_from_the_best_by_a_share() -> None:
    when = {"plateau": {"window": 1, "patience": 1, "threshold": 0.1}}
    log = run(until_plateau(when=when), TWO)
    # 0.89 is better than 1.0 by a tenth of it; neither 0.9 nor 0.81 is than that.
    log.report(0, [1.0, 0.9, 0.89, 0.81])
    assert begins(log, "two") == 40
    log.report(4, [0.81])
    assert begins(log, "two") == 8


@pytest.mark.parametrize(
    ("losses", "decided_at"),
    [
        ([5.0, 5.0, 2.5, 2.0, 1.5], 4),
        ([2.0, 2.0, 2.0], 2),
        ([2.0, 2.0, 2.0 + 1e-9, 2.0, 2.0, 2.0], 5),
        ([-9.0, 9.0, 9.0, -20.0], 3),
        ([1.0, math.nan, 1.0, math.inf, None, 1.0], 5),
        ([1e308, 1e308, 1e308, 1.0, 1.0, 1.0], 5),
        ([-1e308, -1e308, -1e308], 2),
    ],
)
def test_a_stage_ends_once_the_mean_of_the_last_losses_is_low(
    losses: Sequence[float | None], decided_at: int
) -> None:
    log = run(until_plateau(when={"below": {"value": 2.0, "window": 3}}), TWO)
    log.report(0, losses[:-1])
    assert not log.state.plan.adjustments
    log.report(len(losses) - 1, losses[-1:])
    assert [item.decided_at for item in log.state.plan.adjustments] == [decided_at]
    assert begins(log, "two") == decided_at + 4


def test_a_bare_loss_and_a_named_one() -> None:
    when = {"below": 2.0, "metric": "val/C4"}
    log = run(until_plateau(when=when), TWO)
    log.report(0, [1.0] * 4)
    assert not log.state.plan.adjustments
    report = core.Report(4, 1.0, 1.0, 5, validation={"val/C4": 2.0, "val/other": 9.0})
    log.write(core.report_losses(log.state, [report], rank=0, incarnation="one")[0])
    (left,) = log.state.plan.adjustments
    assert (left.effective, left.reason) == (8, "val/C4 2: at most 2")


def test_a_mean_that_is_too_large_for_a_float_is_no_improvement() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [1e308] * 6)
    assert begins(log, "two") == 3 + 4


def test_the_last_stage_may_freeze() -> None:
    linear = {"peak": 1.0, "decay": {"style": "linear", "end": 100}}
    last = until_plateau(latest=90, learning_rate=linear)
    ramp = {"start": 0.0, "end": 1.0, "style": "linear", "over": 100}
    for losses, frozen in (([1.0] * 100, 9), ([0.9**at for at in range(100)], 90)):
        log = run(last, weight_decay=ramp)
        log.report(0, losses)
        plan, base = log.state.plan, Plan([Revision(0, 0, log.spec)], [])
        assert plan.values(frozen - 1) == base.values(frozen - 1)
        assert {plan.values(at) for at in range(frozen, 200)} == {base.values(frozen)}
        # It ends once.
        assert [item.effective for item in plan.adjustments] == ([9] if frozen == 9 else [])


def test_no_anneal_begins_where_nothing_is_left_of_the_stage() -> None:
    decay = {"kind": "decay-on-plateau", "window": 1, "patience": 3}
    below: dict[str, Any] = {**until_plateau(), "when": {"below": 1.0}}
    log = run(below, TWO, policies=[decay])
    log.report(0, [0.9, 2.0, 2.0, 2.0, 2.0, 2.0])
    # The stage ends at 4, where the anneal that the loss at 4 calls for would begin only at 8.
    assert begins(log, "two") == 4
    assert [item.change.action for item in log.state.plan.adjustments] == ["next stage"]
    assert log.rates(0, 10) == [1.0] * 4 + [0.5] * 6


def test_an_operator_may_be_faster() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [1.0] * 4)
    adjust = {"reason": "now", "author": "me", "request_id": "x"}
    log.write(core.adjust_run(log.state, core.EnterNextStage(), **adjust))
    assert begins(log, "two") == 8
    log.report(4, [1.0] * 10)
    assert [item.kind for item in log.state.plan.adjustments] == ["operator"]


# What begins afresh.


def test_a_stage_has_groups_and_policies_of_its_own() -> None:
    log = run(
        {"name": "one", "until": 20, "learning_rate": CONSTANT},
        {
            "name": "two",
            "learning_rate": HALF,
            "groups": [{"name": "b", "peak": 0.125, "weight_decay": 0.75}],
            "policies": [{**PLATEAU, "factor": 0.25}],
        },
        groups=[{"name": "a"}, {"name": "b", "peak": 2.0}],
        weight_decay=0.5,
        policies=[PLATEAU, {"kind": "greedy", "mode": "off"}],
    )
    assert log.state.plan.values(0) == ((1.0, 2.0), (0.5, 0.5))
    assert log.state.plan.values(20) == ((0.5, 0.125), (0.5, 0.75))
    log.report(0, [1.0] * 40)
    sources = {item.source: item for item in log.state.plan.adjustments}
    assert set(sources) == {"policies.0 (plateau)", "stages.1.policies.0 (plateau)"}
    assert [getattr(item.change, "factor", None) for item in sources.values()] == [0.5, 0.25]
    specs = [watch.spec for watch in log.state.observers.watches]
    assert specs[:1] == list(log.spec.policies_in(1))


def test_a_stage_may_have_no_policies_at_all() -> None:
    log = run(
        {"name": "one", "until": 20, "learning_rate": CONSTANT, "policies": []},
        TWO,
        policies=[PLATEAU],
    )
    log.report(0, [1.0] * 40)
    assert min(item.decided_at for item in log.state.plan.adjustments) >= 20 + 4
    assert log.rates(0, 24) == [1.0] * 20 + [0.5] * 4


def test_a_policy_starts_afresh_in_the_next_stage() -> None:
    log = run(
        {"name": "one", "until": 10, "learning_rate": CONSTANT},
        TWO,
        policies=[{**PLATEAU, "patience": 3}],
        feedback={"delay": 1},
    )
    # Three bad ones in the first stage are forgotten, and so is its best loss.
    log.report(0, [9.0] * 7 + [0.1] * 3)
    log.report(10, [5.0] + [4.0] + [4.0] * 3)
    assert [item.decided_at for item in log.state.plan.adjustments] == [4]
    log.report(15, [4.0])
    assert [item.decided_at for item in log.state.plan.adjustments] == [4, 15]


@pytest.mark.parametrize(
    ("warmup", "delay", "heard_from"), [(0, 4, 14), (2, 4, 14), (6, 4, 16), (0, 1, 11), (3, 1, 13)]
)
def test_policies_are_quiet_in_a_later_warmup_and_for_one_delay_at_least(
    warmup: int, delay: int, heard_from: int
) -> None:
    log = run(
        {"name": "one", "until": 10, "learning_rate": CONSTANT},
        {"name": "two", "learning_rate": {**HALF, "warmup": warmup}},
        policies=[{**PLATEAU, "patience": 99}],
        feedback={"delay": delay},
    )
    for at in range(20):
        log.report(at, [100.0 - at])
        state = log.state.observers.watches[0].state
        expected = 100.0 - at if at < 10 or at >= heard_from else math.inf
        if at < 10 or at >= 10 + 1:
            assert state.best == expected, at


def test_a_condition_does_not_listen_to_a_warmup() -> None:
    warm = {"peak": 1.0, "warmup": 10}
    log = run(until_plateau(learning_rate=warm), until_plateau(
        name="two", latest=80, learning_rate=warm), {"name": "three", "learning_rate": HALF},
    )  # fmt: skip
    log.report(0, [1.0] * 80)
    # Heard from 11 on, the first progress after the warmup, and from 30 = 20 + 10 on.
    assert begins(log, "two") == 16 + 4
    assert begins(log, "three") == 35 + 4


# Other attempts and other specs.


def test_an_attempt_that_goes_back_forgets_where_a_stage_ended_and_finds_it_again() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [1.0] * 20)
    before = log.rates(0, 30)
    log.open(4)
    assert begins(log, "two") == 40
    log.report(4, [1.0] * 16)
    assert log.rates(0, 30) == before
    log.open(4)
    log.report(4, [0.9**at for at in range(40)])
    assert begins(log, "two") == 40


def test_what_an_operator_left_early_can_be_left_again_where_it_begins_later() -> None:
    log = run(
        until_plateau(),
        {"name": "two", "until": 60, "learning_rate": HALF},
        {"name": "three", "learning_rate": {"peak": 0.25}},
    )
    adjust = {"reason": "now", "author": "me"}
    log.report(0, [1.0] * 12)
    log.write(core.adjust_run(log.state, core.EnterNextStage(), **adjust, request_id="x"))
    assert (begins(log, "two"), begins(log, "three")) == (9, 16)
    # In another attempt the first stage lasts until 40.
    log.open(0)
    log.report(0, [0.9**at for at in range(45)])
    assert (begins(log, "two"), begins(log, "three")) == (40, 60)
    log.write(core.adjust_run(log.state, core.EnterNextStage(), **adjust, request_id="y"))
    assert (begins(log, "two"), begins(log, "three")) == (40, 49)


def test_a_policy_sees_no_end_of_a_stage_that_is_still_to_come() -> None:
    anneal = {"kind": "decay-on-plateau", "window": 1, "patience": 2, "anneal": 60}
    log = run({"name": "one", "until": 90, "learning_rate": CONSTANT}, TWO, policies=[anneal])
    log.report(0, [1.0] * 10)
    adjust = {"reason": "now", "author": "me", "request_id": "x"}
    log.write(core.adjust_run(log.state, core.EnterNextStage(), **adjust))
    before = log.rates(0, 20)
    assert before[6:9] == [1.0, 1.0, 1.0 - math.sqrt(1 / 60)]
    # What it began at 3 ends 60 later, not with the stage that the operator left at 14.
    log.open(0)
    log.report(0, [1.0] * 10)
    assert log.rates(0, 20) == before


def test_a_revision_keeps_the_stages_that_were_left() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [1.0] * 12)
    assert begins(log, "two") == 9
    stages = [until_plateau(latest=60), {**TWO, "learning_rate": {"peak": 0.25}}]
    fields: dict[str, Any] = {"learning_rate": None, "total": 200}
    log.write(core.revise_run(log.state, spec(stages=stages, **fields), "revise"))
    assert begins(log, "two") == 9
    assert log.rates(14, 18) == [0.5, 0.5, 0.25, 0.25]
    assert core.fold("run", log.rows).snapshot() == log.state.snapshot()


def test_a_condition_goes_on_through_a_revision_that_leaves_its_stage_alone() -> None:
    log = run(until_plateau(), TWO)
    log.report(0, [1.0] * 4)
    stages = [until_plateau(), {**TWO, "learning_rate": {"peak": 0.25}}]
    fields: dict[str, Any] = {"learning_rate": None, "total": 200}
    log.write(core.revise_run(log.state, spec(stages=stages, **fields), "revise"))
    log.report(4, [1.0] * 2)
    assert begins(log, "two") == 9


def test_a_snapshot_in_a_stage_goes_on_as_the_run_does() -> None:
    log = run(until_plateau(), {**TWO, "policies": [PLATEAU]})
    for at in range(30):
        log.report(at, [1.0])
        restored = core.restore_snapshot(log.state.snapshot())
        assert restored.snapshot() == log.state.snapshot()
        assert [restored.values(n) for n in range(60)] == [log.state.values(n) for n in range(60)]
    assert any(isinstance(item.change, NextStage) for item in log.state.plan.adjustments)
