"""The plan: what each change does to the values, alone and with others, number by number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot import core
from lrpilot.core._changes import (
    BeginDecay,
    Change,
    Curve,
    Direct,
    Divide,
    EndOwn,
    Hold,
    Multiply,
    NextStage,
    Note,
    ScaleWeightDecay,
    SetRate,
    StretchWarmup,
    Undo,
)
from lrpilot.core._plan import (
    ENDABLE,
    ORDER_OF_OPERATORS,
    Adjustment,
    Plan,
    Revision,
    Values,
    taking_back,
)

GROUPS = [{"name": "a"}, {"name": "b", "peak": 0.5, "min": 0.25}]
LINEAR = {"peak": 1.0, "decay": {"style": "linear"}}
"""1 - n / 1000, and 0.25 + 0.25 * (1 - n / 1000) for the second group."""

RAMP = {"start": 0.1, "end": 0.3, "style": "linear"}

STAGES: list[dict[str, Any]] = [
    {"name": "one", "until": 100, "learning_rate": {"peak": 1.0}},
    {"name": "two", "until": 500, "learning_rate": {"peak": 2.0, "init": "current", "warmup": 8}},
    {"name": "three", "learning_rate": {"peak": 0.5, "decay": {"style": "linear"}}},
]


def spec(**fields: Any) -> core.RunSpec:
    return core.parse_spec({"name": "a", "total": 1000, "learning_rate": {"peak": 1.0}, **fields})


def made(at: int, change: Change, **fields: Any) -> Adjustment:
    """Return an adjustment; unless told otherwise the first policy's, decided one step before."""
    given: dict[str, Any] = {
        "effective": at,
        "decided_at": at - 1,
        "order": 0,
        "part": 0,
        "kind": "plateau",
        "source": "policies.0 (plateau)",
        "mode": "act",
        "change": change,
        "before": (),
        "after": (),
        "decays_before": (),
        "decays_after": (),
        "seq": 1,
    }
    return Adjustment(**{**given, **fields})


def plan(*changes: tuple[int, Change], **fields: Any) -> Plan:
    """Return a plan with changes in this order of events."""
    result = Plan([Revision(0, 0, spec(**fields))], [])
    for seq, (at, change) in enumerate(changes):
        result.adjust(result.stated(made(at, change, seq=seq)))
    return result


def rates(plan: Plan, *points: int, group: int = 0) -> list[float]:
    return [plan.values(at)[0][group] for at in points]


def decays(plan: Plan, *points: int, group: int = 0) -> list[float]:
    return [(plan.values(at)[1] or ())[group] for at in points]


# Each change by itself.


def test_nothing_shows_before_it_takes_effect() -> None:
    changes: list[Change] = [
        Multiply(0.5, ""), Divide(0.5, "", (9.0,)), SetRate(0.3, ""), Hold(None, ""),
        Curve(((0, 0.5), (5, 1.0)), ""), BeginDecay(10, "linear", ""), ScaleWeightDecay(2.0, ""),
    ]  # fmt: skip
    base = plan(learning_rate=LINEAR, weight_decay=RAMP)
    for change in changes:
        changed = plan((100, change), learning_rate=LINEAR, weight_decay=RAMP)
        assert changed.values(99) == base.values(99)
        assert changed.values(104) != base.values(104)


def test_a_cut_and_a_raise_follow_a_moving_base() -> None:
    cut = plan((100, Multiply(0.5, "")), learning_rate=LINEAR, groups=GROUPS)
    assert rates(cut, 100, 600) == [0.9 * 0.5, (1.0 - 0.6) * 0.5]
    assert rates(cut, 100, group=1) == [(0.25 + 0.9 * 0.25) * 0.5]
    up = plan((100, Divide(0.75, "", max_lr=(1.0, 0.5))), learning_rate=LINEAR, groups=GROUPS)
    assert rates(up, 100, 600) == [1.0, (1.0 - 0.6) / 0.75]
    assert rates(up, 900, group=1) == [(0.25 + (1.0 - 0.9) * 0.25) / 0.75]


def test_a_division_is_no_multiplication() -> None:
    divided = plan((1, Divide(0.9, "", (9.0,))), learning_rate={"peak": 0.7})
    multiplied = plan((1, Multiply(1 / 0.9, "")), learning_rate={"peak": 0.7})
    assert rates(divided, 1) == [0.7 / 0.9] != rates(multiplied, 1)


def test_a_change_of_at_most_eps_is_not_made() -> None:
    assert rates(plan((1, Divide(0.5, "", (9.0,), eps=1.0))), 1) == [1.0]
    assert rates(plan((1, Divide(0.5, "", (9.0,), eps=0.99))), 1) == [2.0]
    assert rates(plan((1, Divide(0.5, "", (0.9,)))), 1) == [1.0]  # a raise never lowers


def test_a_set_lr_is_exact_where_it_takes_effect_and_scales_from_there() -> None:
    lr = 0.1234567
    changed = plan((300, SetRate(lr, "")), learning_rate=LINEAR, groups=GROUPS)
    first, second = 1.0 - 0.3, 0.25 + (1.0 - 0.3) * 0.25
    assert changed.values(300)[0] == (lr, lr * (second / first))
    assert rates(changed, 700) == [lr * ((1.0 - 0.7) / first)]
    assert plan((5, SetRate(lr, ""))).values(900)[0] == (lr,)


def test_a_set_lr_is_exact_whatever_was_changed_before() -> None:
    lr = 0.7654321
    changed = plan((10, Multiply(0.3, "")), (20, Multiply(0.7, "")), (20, SetRate(lr, "")))
    assert rates(changed, 19, 20, 900) == [0.3, lr, lr]


def test_a_set_lr_of_a_schedule_at_zero_changes_nothing() -> None:
    changed = plan((0, SetRate(0.5, "")), learning_rate={"peak": 1.0, "warmup": 10})
    assert rates(changed, 0, 5) == [0.0, 0.5]


def test_a_curve_is_linear_between_its_points() -> None:
    changed = plan((100, Curve(((4, 0.5), (10, 0.25), (20, 1.0)), "")), learning_rate=LINEAR)
    base = [1.0 - at / 1000 for at in (100, 104, 107, 110, 115)]
    factors = [0.5, 0.5, 0.5 + (0.25 - 0.5) * (3 / 6), 0.25, 0.25 + (1.0 - 0.25) * (5 / 10)]
    assert rates(changed, 100, 104, 107, 110, 115) == [
        lr * factor for lr, factor in zip(base, factors, strict=True)
    ]


def test_a_curve_that_ends_at_one_leaves_the_base_to_the_bit() -> None:
    curve = Curve(((0, 0.9), (3, 0.9), (7, 1.0)), "")
    changed = plan((10, curve), learning_rate={"peak": 0.1})
    assert rates(changed, 16) != [0.1]
    assert rates(changed, 17, 18, 900) == [0.1] * 3
    assert changed.in_force(16) != ()
    assert changed.in_force(17) == ()


def test_a_curve_that_ends_elsewhere_stays_there() -> None:
    changed = plan((10, Curve(((0, 1.0), (10, 0.5)), "")), learning_rate=LINEAR)
    assert rates(changed, 20, 500) == [0.98 * 0.5, 0.25]
    assert len(changed.in_force(900)) == 1


def test_a_hold_freezes_lr_and_wd() -> None:
    changed = plan((100, Hold(None, "")), learning_rate=LINEAR, weight_decay=RAMP, groups=GROUPS)
    for at in (100, 101, 999, 5000):
        assert changed.values(at) == plan(
            learning_rate=LINEAR, weight_decay=RAMP, groups=GROUPS
        ).values(100)


def test_a_hold_with_a_length_ends_by_itself() -> None:
    changed = plan((100, Hold(50, "")), learning_rate=LINEAR, weight_decay=RAMP)
    base = plan(learning_rate=LINEAR, weight_decay=RAMP)
    assert changed.values(149) == base.values(100)
    assert changed.values(150) == base.values(150)
    assert [len(changed.in_force(at)) for at in (99, 100, 149, 150)] == [0, 1, 1, 0]


def test_what_an_operator_does_under_a_hold_applies_to_what_is_held() -> None:
    by_operator: dict[str, Any] = {"order": ORDER_OF_OPERATORS, "seq": 2}
    held = made(100, Hold(None, ""), **by_operator)
    scaled = made(200, Multiply(0.5, ""), **by_operator)
    changed = Plan([Revision(0, 0, spec(learning_rate=LINEAR))], [held, scaled])
    assert rates(changed, 199, 200, 900) == [0.9, 0.45, 0.45]


def test_an_anneal_never_lifts_the_lr_above_where_the_base_is_by_then() -> None:
    changed = plan((100, BeginDecay(800, "minus_sqrt", "")), learning_rate=LINEAR)
    base = plan(learning_rate=LINEAR)
    for at in range(100, 1000, 50):
        annealed = 0.9 * (1.0 - math.sqrt(min((at - 100) / 800, 1.0)))
        assert rates(changed, at) == [min(annealed, *rates(base, at))]


def test_what_policies_do_under_a_hold_shows_when_it_ends() -> None:
    cuts = [(50, Multiply(0.5, "")), (100, Multiply(0.5, "")), (120, Multiply(0.5, ""))]
    held = made(100, Hold(50, ""), order=ORDER_OF_OPERATORS, seq=2)
    scaled = made(120, ScaleWeightDecay(2.0, ""), order=1)
    before = Plan(
        [Revision(0, 0, spec(weight_decay=0.1))], [*(made(at, cut) for at, cut in cuts), scaled]
    )
    changed = Plan(before.revisions, [*before.adjustments, held])
    # Two policies at the progress where the hold begins come before it.
    assert rates(changed, 99, 100, 120, 149, 150) == [0.5, 0.25, 0.25, 0.25, 0.125]
    assert decays(changed, 120, 149, 150) == [0.1, 0.1, 0.2]


def test_a_release_returns_to_the_schedule_at_the_progress_of_then() -> None:
    held = made(100, Hold(None, ""), order=ORDER_OF_OPERATORS)
    changed = Plan([Revision(0, 0, spec(learning_rate=LINEAR, weight_decay=RAMP))], [held])
    changed.adjust(made(50, Multiply(0.5, "")))
    changed.adjust(made(150, Multiply(0.5, ""), decided_at=149))
    changed.adjust(made(300, taking_back([held], ""), order=ORDER_OF_OPERATORS, seq=9))
    assert rates(changed, 100, 299) == [0.9 * 0.5, 0.9 * 0.5]
    assert rates(changed, 300) == [(1.0 - 0.3) * 0.5 * 0.5]
    base = plan(weight_decay=RAMP)
    assert decays(changed, 299, 300) == decays(base, 100, 300)


@pytest.mark.parametrize(
    ("style", "factor"),
    [
        ("linear", lambda q: 1.0 - q),
        ("cosine", lambda q: 0.5 * (math.cos(math.pi * q) + 1.0)),
        ("exponential", lambda q: (2.0 * math.pow(0.5, q)) - 1.0),
        ("minus_sqrt", lambda q: 1.0 - math.sqrt(q)),
    ],
)
def test_a_decay_goes_from_where_it_begins_down_to_min(style: Any, factor: Any) -> None:
    rate = {"peak": 1.0, "min": 0.2}
    changed = plan((50, Multiply(0.9, "")), (100, BeginDecay(80, style, "")), learning_rate=rate)
    assert rates(changed, 99) == [0.9]
    for at in (100, 101, 137, 179):
        expected = 0.2 + factor((at - 100) / 80) * (0.9 - 0.2)
        assert rates(changed, at) == [min(expected, 0.9)]
    assert rates(changed, 180, 181, 5000) == [0.2] * 3


def test_a_group_at_or_below_its_min_does_not_decay() -> None:
    groups = [{"name": "a", "peak": 0.1, "min": 0.3}, {"name": "b", "peak": 0.3, "min": 0.3},
              {"name": "c", "peak": 0.5, "min": 0.3}]  # fmt: skip
    changed = plan((10, BeginDecay(10, "linear", "")), groups=groups)
    assert changed.values(20)[0] == (0.1, 0.3, 0.3)


def test_a_decay_stops_at_the_bounds_and_never_raises() -> None:
    begin = BeginDecay(10, "linear", "")
    assert rates(plan((10, begin), bounds={"min_lr": 0.25}), 15, 18, 30) == [0.5, 0.25, 0.25]
    low = plan((10, begin), learning_rate={"peak": 0.1}, bounds={"min_lr": 0.25})
    assert rates(low, 10, 15, 30) == [0.1] * 3


def test_the_base_no_longer_moves_what_decays() -> None:
    changed = plan((100, BeginDecay(10, "linear", "")), learning_rate={**LINEAR, "min": 0.1})
    first = 0.1 + (1.0 - 0.1) * 0.9
    assert rates(changed, 105) == [0.1 + 0.5 * (first - 0.1)]
    assert rates(changed, 110, 500) == [0.1, 0.1]


def test_wd_is_multiplied_up_to_a_bound() -> None:
    groups = [{"name": "a"}, {"name": "b", "weight_decay_multiplier": 0.0},
              {"name": "c", "weight_decay_multiplier": 8.0}]  # fmt: skip
    step = ScaleWeightDecay(1.5, "", max_weight_decay=0.4)
    changed = plan(*[(at, step) for at in (10, 20, 30, 40)], weight_decay=0.1, groups=groups)
    steps = [0.1, 0.1 * 1.5, 0.1 * 1.5 * 1.5, 0.1 * 1.5 * 1.5 * 1.5, 0.4]
    assert decays(changed, 9, 10, 20, 30, 40) == steps
    assert decays(changed, 40, group=1) == [0.0]
    # What lies above the bound already stays there.
    assert decays(changed, 40, group=2) == [0.8]
    assert changed.values(40)[0] == (1.0, 1.0, 1.0)


def test_a_wd_may_be_scaled_to_nothing_and_follows_its_ramp() -> None:
    changed = plan((100, ScaleWeightDecay(0.5, "")), weight_decay=RAMP)
    assert decays(changed, 500) == [(0.1 + 0.5 * (0.3 - 0.1)) * 0.5]
    assert decays(plan((1, ScaleWeightDecay(0.0, "")), weight_decay=0.1), 1, 9) == [0.0, 0.0]


def test_a_run_without_wd_has_none_to_scale() -> None:
    assert plan((1, ScaleWeightDecay(0.5, ""))).values(5) == ((1.0,), None)


def test_what_only_says_or_asks_something_changes_no_value() -> None:
    changes: list[Change] = [Note(""), Direct("stop", ""), EndOwn("")]
    changed = plan(*[(10, change) for change in changes], learning_rate=LINEAR)
    assert rates(changed, 10, 500) == [0.99, 0.5]
    assert [item.change for item in changed.directives(10, 10)] == [Direct("stop", "")]
    assert changed.directives(11, 99) == changed.directives(0, 9) == []


# Stages.


def staged(*changes: tuple[int, Change], **fields: Any) -> Plan:
    return plan(*changes, learning_rate=None, stages=STAGES, **fields)


def test_a_stage_that_is_left_early_makes_the_next_one_begin_there() -> None:
    changed = staged((40, NextStage("one", "")))
    assert [changed.stage(at).name for at in (39, 40, 499, 500)] == ["one", "two", "two", "three"]
    # Warmup counts from the stage's start, from the LR in force there.
    assert rates(changed, 39, 40, 44, 48) == [1.0, 1.0, 1.5, 2.0]
    # The ends of later stages are absolute.
    assert rates(changed, 500, 750) == [0.5, 0.5 * 0.5]


def test_a_stage_is_left_where_it_was_left_first() -> None:
    changed = staged((40, NextStage("one", "")), (30, NextStage("one", "")))
    assert changed.stage(30).name == "two"


def test_what_left_a_stage_at_a_progress_that_is_no_longer_in_it_does_not_count() -> None:
    # The attempt went back, and the first stage lasts longer now.
    changed = staged((60, NextStage("two", "")), (200, NextStage("two", "")))
    assert [changed.stage(at).name for at in (60, 100, 199, 200)] == ["one", "two", "two", "three"]


def test_init_current_starts_from_the_adjusted_lr() -> None:
    changed = staged((10, Multiply(0.5, "")), (40, NextStage("one", "")))
    assert rates(changed, 39, 40, 44, 48) == [0.5, 0.5, 0.5 + (2.0 - 0.5) * 4 / 8, 2.0]
    assert changed.base(40) == (1.0,)


def test_entering_a_stage_ends_all_but_a_hold() -> None:
    changes: list[Change] = [
        Multiply(0.5, ""), Divide(0.5, "", (9.0,)), SetRate(0.3, ""), BeginDecay(5, "linear", ""),
        Curve(((0, 0.5), (500, 0.5)), ""), ScaleWeightDecay(2.0, ""),
    ]  # fmt: skip
    base = staged(weight_decay=0.1)
    for change in changes:
        changed = staged((50, change), weight_decay=0.1)
        assert changed.values(99) != base.values(99)
        # From where the warmup from the LR in force is over.
        assert changed.values(108) == base.values(108)
        assert changed.in_force(100) == ()
    held = staged((50, Hold(None, "")), weight_decay=RAMP)
    assert {held.values(at) for at in (50, 99, 100, 300, 999)} == {base_of(held, 50)}


def base_of(plan: Plan, at: int) -> Values:
    return Plan(plan.revisions, []).values(at)


def test_what_takes_effect_where_a_stage_begins_belongs_to_it() -> None:
    changed = staged((100, Multiply(0.5, "")), (500, Multiply(0.25, "")))
    # The LR in force just before the stage is not cut yet.
    assert rates(changed, 99, 100, 108) == [1.0, 0.5, 1.0]
    assert rates(changed, 499, 500) == [1.0, 0.125]


def test_a_long_row_of_stages_that_start_from_the_lr_in_force_does_not_nest() -> None:
    rate = {"peak": 1.0, "init": "current", "warmup": 1}
    stages: list[dict[str, Any]] = [
        {"name": f"{at}", "until": 10 * (at + 1), "learning_rate": rate if at else {"peak": 0.5}}
        for at in range(1500)
    ]
    del stages[-1]["until"]
    changed = plan((3, Multiply(0.5, "")), learning_rate=None, stages=stages, total=15_000)
    assert rates(changed, 14_990, 9, 10, 11, 21) == [1.0, 0.25, 0.25, 1.0, 1.0]
    assert changed.base(10) == (0.5,)


# Longer warmups.

WARM = {"peak": 1.0, "warmup": 100, "decay": {"style": "linear"}}


def test_a_longer_warmup_goes_on_at_a_lower_slope_and_then_decays() -> None:
    changed = plan((50, StretchWarmup(2.0, "")), learning_rate=WARM)
    assert rates(changed, 49, 50, 100, 150) == [0.49, 0.5, 0.75, 1.0]
    assert rates(changed, 575, 1000, 1001) == [0.5, 0.0, 0.0]
    assert changed.phase(150).name == "warmup"
    assert changed.phase(151).name == "decay"
    assert changed.phase(151).warmup_end == 150.0


def test_a_warmup_can_be_stretched_again() -> None:
    changes = [(50, StretchWarmup(2.0, "")), (100, StretchWarmup(2.0, ""))]
    changed = plan(*changes, learning_rate=WARM)
    # 25 of 100 are left at 100, and each takes four times as long.
    assert rates(changed, 100, 150, 200) == [0.75, 0.875, 1.0]
    assert rates(changed, 600) == [0.5]


def test_a_warmup_without_room_or_that_is_over_stays_as_it_is() -> None:
    base = plan(learning_rate=WARM)
    short = {**WARM, "decay": {"style": "linear", "end": 150}}
    for rate, at, factor in ((WARM, 100, 2.0), (WARM, 200, 2.0), (short, 50, 2.0), (WARM, 50, 19)):
        changed = plan((at, StretchWarmup(factor, "")), learning_rate=rate)
        assert rates(changed, 75, 100) == rates(base, 75, 100)
        assert changed.phase(1).warmup_end == 100.0
    # The anneal of wsd begins where it did; the warmup ends before it.
    wsd = {"peak": 1.0, "warmup": 100, "decay": {"style": "wsd", "anneal": 850,
                                                  "anneal_style": "linear"}}  # fmt: skip
    assert plan((50, StretchWarmup(1.9, "")), learning_rate=wsd).phase(1).warmup_end == 145.0
    assert plan((50, StretchWarmup(2.0, "")), learning_rate=wsd).phase(1).warmup_end == 100.0


def test_each_stage_has_the_stretches_of_its_own_warmup() -> None:
    changed = staged((104, StretchWarmup(3.0, "")))
    assert rates(changed, 100, 104, 110, 116, 117) == [1.0, 1.5, 1.75, 2.0, 2.0]
    assert rates(changed, 99, 500) == [1.0, 0.5]


# Taking back.

EACH: list[Change] = [
    Multiply(0.5, ""), Multiply(2.0, ""), Divide(0.5, "", (9.0,)), SetRate(0.3, ""),
    Curve(((0, 0.5), (500, 1.0)), ""), Hold(None, ""), Hold(600, ""),
    BeginDecay(300, "cosine", ""), ScaleWeightDecay(2.0, ""),
]  # fmt: skip


@pytest.mark.parametrize("change", EACH, ids=core.summary_of)
def test_each_change_can_be_taken_back(change: Change) -> None:
    assert isinstance(change, ENDABLE)
    fields: dict[str, Any] = {"learning_rate": LINEAR, "weight_decay": RAMP, "groups": GROUPS}
    around: list[tuple[int, Change]] = [(50, Multiply(0.9, "")), (150, Multiply(0.7, ""))]
    without = plan(*around, **fields)
    changed = plan(around[0], (100, change), around[1], **fields)
    target = next(item for item in changed.adjustments if item.change == change)
    undo = made(200, taking_back([target], ""), order=ORDER_OF_OPERATORS, seq=9)
    undone = Plan(changed.revisions, [*changed.adjustments, undo])
    for at in (60, 100, 180, 199):
        assert undone.values(at) == changed.values(at)
    for at in (200, 300, 999):
        assert undone.values(at) == without.values(at)
        assert target not in undone.in_force(at)
    assert undone.undone(199) == set()
    assert undone.undone(200) == {target.mark}


def test_every_kind_that_can_be_taken_back_is_tried() -> None:
    assert {type(change) for change in EACH} == set(ENDABLE)


def test_what_was_taken_back_before_an_anchor_is_not_in_it() -> None:
    cut = made(10, Multiply(0.5, ""))
    changed = Plan([Revision(0, 0, spec())], [cut])
    changed.adjust(made(20, taking_back([cut], ""), order=ORDER_OF_OPERATORS, seq=2))
    changed.adjust(made(30, Hold(None, ""), order=ORDER_OF_OPERATORS, seq=3))
    assert rates(changed, 19, 20, 30) == [0.5, 1.0, 1.0]


# Several at one progress.


def test_at_one_progress_policies_come_in_their_order_then_operators_as_they_came() -> None:
    items = [
        made(10, SetRate(0.7, ""), order=ORDER_OF_OPERATORS, seq=5),
        made(10, Multiply(0.5, "", min_lr=(0.6,)), order=1, seq=9),
        made(10, Multiply(0.5, ""), order=0, seq=9),
        made(10, Multiply(0.9, ""), order=ORDER_OF_OPERATORS, seq=4),
        made(10, Curve(((0, 2.0),), ""), order=0, part=1, seq=9),
    ]
    for shuffled in (items, items[::-1]):
        changed = Plan([Revision(0, 0, spec())], shuffled)
        assert [(item.order, item.seq, item.part) for item in changed.adjustments] == [
            (0, 9, 0), (0, 9, 1), (1, 9, 0), (3000, 4, 0), (3000, 5, 0),
        ]  # fmt: skip
        assert rates(changed, 10) == [0.7]
        assert rates(Plan(changed.revisions, items[:1] + items[2:]), 10) == [0.7]
        assert rates(Plan(changed.revisions, items[1:]), 10) == [1.0 * 0.5 * 2.0 * 0.6 * 0.9]


def test_before_and_after_are_those_of_the_chain() -> None:
    changed = plan((10, Multiply(0.5, "")), (10, Hold(None, "")), weight_decay=0.1)
    first, second = changed.adjustments
    assert (first.before, first.after) == ((1.0,), (0.5,))
    assert (second.before, second.after) == ((0.5,), (0.5,))
    assert (second.decays_before, second.decays_after) == ((0.1,), (0.1,))


def test_what_an_operator_planned_is_stated_anew_once_a_policy_decides_before_it() -> None:
    changed = Plan([Revision(0, 0, spec())], [])
    operator = made(10, SetRate(0.25, ""), order=ORDER_OF_OPERATORS, seq=3)
    changed.adjust(changed.stated(operator))
    changed.adjust(changed.stated(made(10, Multiply(0.5, ""), seq=4)))
    policy, operator = changed.adjustments
    # Without the policy's and with it, what was set is what the first group gets.
    assert (policy.before, policy.after) == ((0.25,), (0.25,))
    assert (operator.before, operator.after) == ((0.5,), (0.25,))


# Limits.


def test_a_run_without_bounds_stays_finite() -> None:
    huge = plan(
        *[(at, Multiply(1e100, "")) for at in range(1, 9)],
        *[(at, ScaleWeightDecay(1e100, "")) for at in range(1, 9)],
        (9, ScaleWeightDecay(0.0, "")),
        weight_decay=0.1,
    )
    assert huge.values(8) == ((1e100,), (1e100,))
    assert huge.values(9) == ((1e100,), (0.0,))


RATES = st.floats(1e-9, 10.0)
FACTORS = st.one_of(st.floats(1e-3, 0.999), st.floats(1.001, 1e3))
LENGTHS = st.integers(1, 60)
CHANGES: st.SearchStrategy[Change] = st.one_of(
    st.builds(Multiply, FACTORS, st.just(""), st.tuples(RATES), st.none() | st.tuples(RATES),
              st.sampled_from([0.0, 1e-8])),
    st.builds(Divide, st.floats(0.01, 0.99), st.just(""), st.tuples(RATES)),
    st.builds(SetRate, RATES, st.just("")),
    st.builds(Curve, st.tuples(st.tuples(st.just(0), FACTORS), st.tuples(LENGTHS, FACTORS)),
              st.just("")),
    st.builds(Hold, st.none() | LENGTHS, st.just("")),
    st.builds(BeginDecay, LENGTHS, st.sampled_from(["linear", "cosine", "exponential",
                                                    "minus_sqrt"]), st.just("")),
    st.builds(StretchWarmup, st.floats(1.01, 4.0), st.just("")),
    st.builds(NextStage, st.sampled_from(["one", "two", "three"]), st.just("")),
    st.builds(ScaleWeightDecay, st.floats(0.0, 10.0), st.just(""), st.none() | RATES),
)  # fmt: skip
SPECS: list[Mapping[str, Any]] = [
    {"learning_rate": {"peak": 1.0}},
    {"learning_rate": {**WARM, "min": 0.1}, "groups": GROUPS, "weight_decay": RAMP},
    {"learning_rate": None, "stages": STAGES, "weight_decay": 0.1},
]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw a plan of several changes, some of them taken back, with bounds or without."""
    low, high = sorted((draw(RATES), draw(RATES)))
    bounds = draw(st.sampled_from([{}, {"bounds": {"min_lr": low, "max_lr": high}}]))
    result = plan(**{**draw(st.sampled_from(SPECS)), **bounds})
    for seq in range(draw(st.integers(1, 7))):
        at, order = draw(st.integers(0, 250)), draw(st.sampled_from([0, 1, ORDER_OF_OPERATORS]))
        item = made(at, draw(CHANGES), order=order, seq=seq)
        result.adjust(result.stated(item))
        if draw(st.integers(0, 3)) == 0:
            undo = taking_back([item], "")
            result.adjust(made(at + draw(st.integers(0, 80)), undo, order=3000, seq=seq, part=1))
    return result


@settings(max_examples=150, deadline=None)
@given(plans(), st.lists(st.integers(0, 600), min_size=1, max_size=25))
def test_values_do_not_depend_on_what_was_asked_before(plan: Plan, points: Sequence[int]) -> None:
    asked = {at: (plan.values(at), plan.base(at)) for at in points}
    for at in sorted(asked, reverse=True):
        fresh = Plan(plan.revisions, plan.adjustments)
        assert (fresh.values(at), fresh.base(at)) == asked[at]
    in_order = Plan(plan.revisions, plan.adjustments)
    for at in range(300):
        values = in_order.values(at)
        assert values == asked.get(at, (values, ()))[0]


@settings(max_examples=150, deadline=None)
@given(plans())
def test_no_change_leaves_the_bounds_further_than_the_base_did(plan: Plan) -> None:
    bounds = plan.spec.bounds
    low, high = (0.0, 1e100) if bounds is None else (bounds.min_lr, bounds.max_lr or 1e100)
    stages = (NextStage, StretchWarmup)
    bare = Plan(
        plan.revisions, [item for item in plan.adjustments if isinstance(item.change, stages)]
    )
    # What is held or annealed may stem from what the base was before; a warmup from the LR in force
    # goes on from what the one before it left to what the base will be.
    points = (*range(300), *range(300, 1000, 20))
    bases = list(zip(*(bare.values(at)[0] for at in points), strict=True))
    limits = [(min(low, *values), max(high, *values)) for values in bases]
    for at in range(300):
        for (lowest, highest), lr in zip(limits, plan.values(at)[0], strict=True):
            assert lowest <= lr <= highest
        for decay in plan.values(at)[1] or ():
            assert 0.0 <= decay < math.inf


@settings(max_examples=100, deadline=None)
@given(plans())
def test_a_plan_survives_its_plain_form(plan: Plan) -> None:
    items = [Adjustment.from_mapping(item.to_mapping()) for item in plan.adjustments]
    assert tuple(items) == plan.adjustments
    again = Plan([Revision.from_mapping(item.to_mapping()) for item in plan.revisions], items)
    for at in range(0, 300, 7):
        assert again.values(at) == plan.values(at)


@settings(max_examples=100, deadline=None)
@given(plans())
def test_what_is_stated_is_what_the_plan_then_says(plan: Plan) -> None:
    others = list(plan.adjustments)
    item = others.pop()
    stated = Plan(plan.revisions, others).stated(replace(item, before=(), after=()))
    assert stated.after == plan.values(item.effective)[0]
    assert stated.before == Plan(plan.revisions, others).values(item.effective)[0]


def test_an_undo_says_what_it_takes_back() -> None:
    cut = made(10, Multiply(0.5, ""))
    assert taking_back([cut], "why") == Undo((cut.mark,), "why", (cut.id,))
    assert core.summary_of(taking_back([cut], "why")) == f"take back {cut.id}"
