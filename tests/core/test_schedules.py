"""Base schedules beyond Megatron-LM's: arguments, stages, groups, and what lies past the total."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core._fields import length_of
from lrpilot.core._schedules import (
    ANNEAL_STYLES,
    DECAY_STYLES,
    WEIGHT_DECAY_STYLES,
    base_schedule,
    base_values,
    learning_rate_schedule,
    stage_at,
    stage_schedules,
    weight_decay_schedule,
)
from lrpilot.core._spec import RunSpec, StageSpec, parse_spec

# ---------------------------------------------------------------------------------------------
# Arguments of the plain functions.

LR: dict[str, Any] = {
    "init": 0.0, "peak": 1.0, "min": 0.1, "warmup": 10, "style": "wsd", "end": 100, "anneal": 20,
    "anneal_style": "linear",
}  # fmt: skip
WD: dict[str, Any] = {"start": 0.1, "end": 0.2, "style": "linear", "over": 100}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": -1.0}, "init must be a finite number from 0 on, got -1.0"),
        ({"peak": math.nan}, "peak must be a finite number from 0 on, got nan"),
        ({"min": math.inf}, "min must be a finite number from 0 on, got inf"),
        ({"end": 0}, "end must be at least 1, got 0"),
        ({"warmup": -1}, r"warmup must be from 0 to below end \(100\), got -1"),
        ({"warmup": 100}, r"warmup must be from 0 to below end \(100\), got 100"),
        ({"warmup": math.nan}, r"warmup must be from 0 to below end \(100\), got nan"),
        ({"style": "WSD"}, f"style must be one of {', '.join(DECAY_STYLES)}, got 'WSD'"),
        ({"anneal": None}, "anneal must be a length from 0 on for style wsd, got None"),
        ({"anneal": -1}, "anneal must be a length from 0 on for style wsd, got -1"),
        ({"anneal": math.inf}, "anneal must be a length from 0 on for style wsd, got inf"),
        ({"anneal_style": None},
         f"anneal_style must be one of {', '.join(ANNEAL_STYLES)}, got None"),
    ],
)  # fmt: skip
def test_learning_rate_arguments(change: dict[str, Any], words: str) -> None:
    learning_rate_schedule(**LR)
    with pytest.raises(ValueError, match=words):
        learning_rate_schedule(**{**LR, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"start": -1.0}, "start must be a finite number from 0 on, got -1.0"),
        ({"end": math.inf}, "end must be a finite number from 0 on, got inf"),
        ({"style": "exp"}, f"style must be one of {', '.join(WEIGHT_DECAY_STYLES)}, got 'exp'"),
        ({"style": "constant"}, r"end must equal start \(0.1\) for style constant, got 0.2"),
        ({"over": 0}, "over must be at least 1 for style linear, got 0"),
    ],
)
def test_weight_decay_arguments(change: dict[str, Any], words: str) -> None:
    weight_decay_schedule(**WD)
    with pytest.raises(ValueError, match=words):
        weight_decay_schedule(**{**WD, **change})


def test_a_group_may_ramp_its_weight_decay_down() -> None:
    ramp = weight_decay_schedule(start=1.0, end=0.0, style="linear", over=4)
    assert [ramp(n) for n in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


# ---------------------------------------------------------------------------------------------
# Runs.


def run(**fields: Any) -> RunSpec:
    return parse_spec({"name": "a", "total": 1000, **fields})


def lrs(spec: RunSpec, *points: int, group: int = 0) -> list[float]:
    base = base_schedule(spec)
    return [base(n)[group][0] for n in points]


def wds(spec: RunSpec, *points: int, group: int = 0) -> list[float | None]:
    base = base_schedule(spec)
    return [base(n)[group][1] for n in points]


LINEAR = {"peak": 1.0, "decay": {"style": "linear"}}


def test_a_run_without_stages_is_one_nameless_stage() -> None:
    (stage,) = stage_schedules(run(learning_rate=LINEAR))
    assert (stage.name, stage.begin, stage.until, stage.init_current) == ("", 0, None, False)
    assert base_values(run(learning_rate=LINEAR), 250) == ((0.75, None),)


def test_a_run_without_curve_has_no_schedule() -> None:
    spec = run(learning_rate=LINEAR).model_copy(update={"learning_rate": None})
    with pytest.raises(ValueError, match="learning_rate must be given"):
        stage_schedules(spec)


def test_each_group_has_its_own_values() -> None:
    groups = [
        {"name": "plain"},
        {"name": "no_decay", "weight_decay_multiplier": 0.0},
        {"name": "head", "peak": 0.5, "min": 0.25},
        {"name": "down", "weight_decay": {"start": 0.4, "end": 0.2}},
        {"name": "same", "weight_decay": 0.3, "weight_decay_multiplier": 2.0},
    ]
    weight_decay = {"start": 0.0, "end": 0.2, "style": "linear"}
    spec = run(learning_rate=LINEAR, groups=groups, weight_decay=weight_decay)
    (plain, none, head, down, same) = base_values(spec, 500)
    assert plain == (0.5, 0.1)
    assert none == (0.5, 0.0)
    assert head == (0.375, 0.1)
    assert down == pytest.approx((0.5, 0.3), rel=1e-15)
    assert same == (0.5, 0.6)


def test_without_weight_decay_none_is_set() -> None:
    assert wds(run(learning_rate=LINEAR), 0, 500, 2000) == [None, None, None]


def test_progress_is_never_negative() -> None:
    with pytest.raises(ValueError, match="progress must be from 0 on, got -1"):
        base_values(run(learning_rate=LINEAR), -1)


# ---------------------------------------------------------------------------------------------
# Past the total.


def test_what_ends_by_the_total_goes_on_as_in_megatron() -> None:
    rates = {"peak": 1.0, "min": 0.1, "decay": {"style": "inverse-square-root", "end": 1000}}
    # The jump to min at end + 1 is the value of the end: it is not held back.
    assert lrs(run(learning_rate=rates), 1000, 1001, 10**9) == [pytest.approx(0.1), 0.1, 0.1]
    early = {"peak": 1.0, "min": 0.1, "decay": {"style": "linear", "end": 500}}
    assert lrs(run(learning_rate=early), 501, 1000, 1001) == [0.1, 0.1, 0.1]


def test_what_ends_later_is_frozen_at_the_total() -> None:
    rates = {"peak": 1.0, "decay": {"style": "linear", "end": 2000}}
    ramp = {"start": 0.0, "end": 0.2, "style": "linear", "over": 2000}
    spec = run(learning_rate=rates, weight_decay=ramp)
    assert lrs(spec, 999, 1000, 1001, 2001, 10**9) == [1 - 999 / 2000, 0.5, 0.5, 0.5, 0.5]
    assert wds(spec, 1000, 1001, 2001) == [0.1, 0.1, 0.1]


def test_rate_and_decay_freeze_each_for_itself() -> None:
    rates = {"peak": 1.0, "decay": {"style": "linear", "end": 2000}}
    spec = run(learning_rate=rates, weight_decay={"start": 0.0, "end": 0.2, "style": "linear"})
    assert lrs(spec, 1001) == [0.5]
    assert wds(spec, 1000, 1001) == [0.2, 0.2]


def test_a_warmup_longer_than_the_run_is_frozen_part_way_up() -> None:
    rates = {"peak": 1.0, "warmup": 2000, "decay": {"end": 4000}}
    assert lrs(run(learning_rate=rates), 1000, 1001, 5000) == [0.5, 0.5, 0.5]


def test_the_last_stage_is_frozen_at_the_total_too() -> None:
    last = {"peak": 1.0, "decay": {"style": "linear", "end": 1500}}
    stages = [
        {"name": "a", "until": 500, "learning_rate": {"peak": 1.0}},
        {"name": "b", "learning_rate": last},
    ]
    assert lrs(run(stages=stages), 999, 1000, 1001, 1501) == [1 - 499 / 1000, 0.5, 0.5, 0.5]


# ---------------------------------------------------------------------------------------------
# Stages.

STAGES: list[dict[str, Any]] = [
    {
        "name": "first",
        "until": 400,
        "learning_rate": {
            "init": 0.2,
            "peak": 1.0,
            "warmup": 100,
            "decay": {"style": "linear", "end": 500},
        },
    },
    {
        "name": "second",
        "until": 800,
        "learning_rate": {"peak": 0.8, "warmup": 100, "decay": {"style": "linear", "end": 900}},
    },
    {"name": "third", "learning_rate": {"init": "current", "peak": 2.0, "warmup": 50}},
]


def test_a_stage_begins_where_the_one_before_it_ends() -> None:
    stages = stage_schedules(run(stages=STAGES))
    assert [(stage.name, stage.begin, stage.until) for stage in stages] == [
        ("first", 0, 400),
        ("second", 400, 800),
        ("third", 800, None),
    ]
    points = (0, 399, 400, 799, 800, 10**6)
    assert [stage_at(stages, n) for n in points] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="the last stage must have no end"):
        stage_at(stages[:2], 800)


def test_warmup_counts_from_the_start_of_the_stage_and_ends_are_absolute() -> None:
    spec = run(stages=STAGES)
    assert lrs(spec, 0, 50, 100, 300) == [0.2, pytest.approx(0.6), 1.0, 0.5]
    assert lrs(spec, 399) == [pytest.approx(101 / 400)]  # on its way to 500
    # The second warms up from 400 to 500 and would reach its min at 900.
    assert lrs(spec, 400, 450, 500) == [0.0, 0.4, 0.8]
    assert lrs(spec, 700, 799) == [0.4, pytest.approx(0.8 * 101 / 400)]


def test_init_current_starts_from_the_rate_in_force() -> None:
    spec = run(stages=STAGES)
    (at_the_end,) = lrs(spec.model_copy(update={"stages": spec.stages[:2]}), 800)
    assert at_the_end == pytest.approx(0.2)
    assert lrs(spec, 800, 850, 851) == [at_the_end, 2.0, 2.0]
    assert lrs(spec, 825) == [at_the_end + (2.0 - at_the_end) * 25.0 / 50.0]


def test_init_current_is_each_groups_own() -> None:
    groups = [{"name": "a"}, {"name": "b", "peak": 0.1}]
    stages = [
        {"name": "one", "until": 500, "learning_rate": {"peak": 1.0}},
        {"name": "two", "learning_rate": {"init": "current", "peak": 2.0, "warmup": 100}},
    ]
    spec = run(stages=stages, groups=groups)
    assert [lrs(spec, 499, 500, group=group) for group in (0, 1)] == [[1.0, 1.0], [0.1, 0.1]]


def test_init_current_passes_through_a_stage() -> None:
    middle = {"init": "current", "peak": 4.0, "warmup": 200, "decay": {"end": 900}}
    last = {"init": "current", "peak": 4.0, "warmup": 100}
    stages = [
        {"name": "one", "until": 400, "learning_rate": {"peak": 1.0}},
        {"name": "two", "until": 500, "learning_rate": middle},
        {"name": "three", "learning_rate": last},
    ]
    assert lrs(run(stages=stages), 400, 500, 600) == [1.0, 2.5, 4.0]


def test_init_current_without_warmup_starts_at_the_peak() -> None:
    stages = [STAGES[0], {"name": "b", "learning_rate": {"init": "current", "peak": 3.0}}]
    assert lrs(run(stages=stages), 399, 400, 401) == [pytest.approx(101 / 400), 3.0, 3.0]


def test_a_stage_wants_the_rate_that_it_starts_from() -> None:
    stage = stage_schedules(run(stages=STAGES))[2]
    assert stage.init_current
    assert stage.learning_rate(0, 825, init=1.0) == 1.5
    with pytest.raises(ValueError, match="init must be the LR in force at 800, got None"):
        stage.learning_rate(0, 825)
    assert stage.learning_rate(0, 851) == 2.0  # past warmup it plays no part
    with pytest.raises(ValueError, match="progress must be from 800 on, got 799"):
        stage.learning_rate(0, 799, init=1.0)


def test_a_given_init_takes_the_place_of_the_specs() -> None:
    (stage,) = stage_schedules(run(learning_rate={"init": 0.5, "peak": 1.0, "warmup": 10}))
    assert stage.learning_rate(0, 0) == 0.5
    assert stage.learning_rate(0, 0, init=0.25) == 0.25


def test_a_given_init_holds_to_the_very_end_of_warmup() -> None:
    (stage,) = stage_schedules(run(learning_rate={"peak": 2e-4, "warmup": 10}))
    alone = learning_rate_schedule(
        init=1e-7, peak=2e-4, min=0.0, warmup=10, style="constant", end=1000
    )
    # At exactly the end the line lies one bit beside the peak.
    assert alone(10) != 2e-4
    assert [stage.learning_rate(0, n, init=1e-7) for n in range(13)] == [
        alone(n) for n in range(13)
    ]


def test_a_share_in_a_stage_is_of_its_absolute_end() -> None:
    decay = {"style": "wsd", "end": 1000, "anneal": "10%", "anneal_style": "linear"}
    last = {"name": "b", "learning_rate": {"peak": 1.0, "warmup": "5%", "decay": decay}}
    spec = run(stages=[STAGES[0], last])
    assert lrs(spec, 400, 425, 450, 900, 950, 1000) == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]


def test_a_ramp_of_the_run_goes_through_all_stages() -> None:
    ramp = {"start": 0.0, "end": 1.0, "style": "linear"}
    own = {**STAGES[1], "weight_decay": {"start": 0.5, "end": 0.7, "style": "linear"}}
    spec = run(stages=[STAGES[0], own, STAGES[2]], weight_decay=ramp)
    assert wds(spec, 0, 399) == [0.0, 0.399]
    assert wds(spec, 400, 600) == [0.5, 0.6]  # from the stage's start, over its length
    assert wds(spec, 800, 900) == [0.8, 0.9]


def test_a_stages_ramp_shorter_than_the_stage_stays_at_its_end() -> None:
    own = {**STAGES[1], "weight_decay": {"start": 0.5, "end": 0.7, "style": "linear", "over": 100}}
    spec = run(stages=[STAGES[0], own, STAGES[2]], weight_decay=0.1)
    assert wds(spec, 399, 400, 450, 501, 799, 800) == [0.1, 0.5, 0.6, 0.7, 0.7, 0.1]


def test_a_stages_ramp_that_ends_past_the_total_is_frozen_there() -> None:
    own = {**STAGES[2], "weight_decay": {"start": 0.0, "end": 0.4, "style": "linear", "over": 400}}
    spec = run(stages=[*STAGES[:2], own], weight_decay=0.1)
    assert wds(spec, 800, 900, 1000, 1001, 1201) == [0.0, 0.1, 0.2, 0.2, 0.2]


def test_a_groups_fields_hold_in_every_stage() -> None:
    spec = run(stages=STAGES, groups=[{"name": "a", "peak": 0.5}], weight_decay=0.1)
    assert lrs(spec, 100, 500, 850) == [0.5, 0.5, 0.5]


def test_the_schedule_of_one_stage_is_that_of_a_run_of_its_own() -> None:
    rates = {"peak": 0.8, "min": 0.1, "warmup": 33, "decay": {"style": "cosine", "end": 900}}
    alone = {**rates, "decay": {"style": "cosine", "end": 500}}
    staged = run(stages=[STAGES[0], {"name": "b", "learning_rate": rates}])
    short = parse_spec({"name": "a", "total": 600, "learning_rate": alone})
    points = range(400, 1000, 7)
    assert lrs(staged, *points) == lrs(short, *(n - 400 for n in points))


# ---------------------------------------------------------------------------------------------
# Properties.

RATES = st.floats(0.0, 1e100)


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    """Draw a run with up to four stages that no rule refuses."""
    ends = sorted(draw(st.sets(st.integers(1, 10_000), min_size=1, max_size=4)))
    some_decay = draw(st.booleans())
    stages, begin = [], 0
    for index, end in enumerate(ends):
        style = draw(st.sampled_from(DECAY_STYLES))
        last = draw(st.integers(begin + 1, 2 * end))
        init, floor, peak = sorted(draw(st.tuples(RATES, RATES, RATES)))
        decay: dict[str, Any] = {"style": style, "end": last}
        if style == "wsd":
            decay |= {
                "anneal": draw(st.one_of(st.integers(0, 20_000), st.floats(0.0, 20_000.0))),
                "anneal_style": draw(st.sampled_from(ANNEAL_STYLES)),
            }
        current = index > 0 and draw(st.booleans())
        rates = {
            "init": "current" if current else init,
            "peak": peak,
            "min": floor,
            "warmup": draw(st.integers(0, last - begin - 1)),
            "decay": decay,
        }
        low, high = sorted(draw(st.tuples(RATES, RATES)))
        ramp = {"start": low, "end": high, "style": draw(st.sampled_from(["linear", "cosine"]))}
        stage = {"name": str(index), "until": end, "learning_rate": rates}
        stages.append({**stage, "weight_decay": ramp} if some_decay else stage)
        begin = end
    groups = draw(
        st.lists(st.fixed_dictionaries({}, optional={"peak": RATES, "min": RATES}), max_size=3)
    )
    return parse_spec(
        {
            "name": "a",
            "total": ends[-1],
            "stages": stages,
            "groups": [{"name": str(index), **group} for index, group in enumerate(groups)],
        }
    )


@settings(max_examples=200, deadline=None)
@given(specs(), st.lists(st.integers(0, 30_000), min_size=1, max_size=10))
def test_values_are_finite_and_depend_on_spec_and_progress_alone(
    spec: RunSpec, points: list[int]
) -> None:
    values = base_schedule(spec)
    again = base_schedule(parse_spec(spec.to_mapping()))
    first = [values(n) for n in points]
    assert [again(n) for n in reversed(points)] == first[::-1]
    assert [base_values(spec, n) for n in points] == first
    for per_group in first:
        assert len(per_group) == len(spec.group_names)
        for lr, wd in per_group:
            assert math.isfinite(lr)
            assert (wd is not None and math.isfinite(wd)) is spec.has_weight_decay


@settings(max_examples=200, deadline=None)
@given(specs(), st.integers(0, 30_000))
def test_past_the_total_nothing_moves_but_to_where_it_ends(spec: RunSpec, past: int) -> None:
    values = base_schedule(spec)
    after = values(spec.total + 1)
    assert values(spec.total + 1 + past) == after
    last: StageSpec = spec.stages[-1]
    end = last.learning_rate.decay.end
    assert end is not None
    if end > spec.total:
        assert [lr for lr, _ in after] == [lr for lr, _ in values(spec.total)]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["linear", "cosine", "wsd", "inverse-square-root"]),
    st.sampled_from(ANNEAL_STYLES),
    st.integers(1, 500),
    st.data(),
)
def test_an_lr_stays_between_its_bounds(
    style: str, anneal_style: str, end: int, data: st.DataObject
) -> None:
    floor, peak = sorted(data.draw(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), "rates"))
    init = data.draw(st.floats(0.0, peak), "init")
    warmup = data.draw(st.integers(0, end - 1), "warmup")
    # A longer anneal may begin below 0 and one that starts inside warmup jumps; both stay inside.
    shares = st.integers(1, 999).map(lambda tenths: length_of(f"{tenths / 10}%", end))
    anneal = data.draw(st.one_of(st.integers(0, 2 * end), shares), "anneal")
    schedule = learning_rate_schedule(
        init=init, peak=peak, min=floor, warmup=warmup, style=style, end=end, anneal=anneal,
        anneal_style=anneal_style,
    )  # fmt: skip
    for n in range(end + 2):
        low = min(init, floor) if n <= warmup else floor
        assert low - 1e-15 * peak <= schedule(n) <= peak * (1 + 1e-15)
        assert schedule(n) >= 0.0
    assert schedule(end + 1) == floor


@pytest.mark.parametrize("anneal_style", ANNEAL_STYLES)
def test_an_annealed_lr_never_falls_below_zero(anneal_style: str) -> None:
    # The phase begins at 1 - 0.01, which is rounded: 1 - that is more than 0.01.
    decay = {"style": "wsd", "end": 1, "anneal": "1%", "anneal_style": anneal_style}
    assert lrs(run(learning_rate={"peak": 1e-3, "decay": decay}), 0, 1, 2) == [1e-3, 0.0, 0.0]
