"""The policy against overfitting: when it raises WD, and when it brings the decay forward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import BeginDecay, Change, ScaleWeightDecay
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._spec import parse_policy, parse_spec
from lrpilot.core.policies import Observation, Overfit, OverfitSpec, OverfitState
from tests.core.policies.checks import refusal
from tests.core.policies.stand import FLAT, Stand, StandView

WEIGHTLESS = StandView(weight_decay=None)
"""A run that leaves WD to the optimizer."""

Steps = Sequence[tuple[float | None, float | None]]


def stand(
    delay: int = 1, view: Callable[[int], StandView] = lambda _n: StandView(), **fields: Any
) -> Stand:
    spec = parse_policy({"kind": "overfit", **fields})
    assert isinstance(spec, OverfitSpec)
    return Stand(Overfit(spec, 1), delay, view)


def feed(policy: Stand, steps: Steps, begin: int = 0) -> list[tuple[int, Change]]:
    """Feed (loss, validation loss) a step; return what is proposed on which."""
    before = len(policy.proposed)
    for n, (loss, value) in enumerate(steps, begin):
        policy.see(Observation(n, loss, {} if value is None else {"val_loss": value}))
    return policy.proposed[before:]


def training(length: int, evaluations: dict[int, float]) -> Steps:
    """Return a training loss that falls by 0.01 a step, with these evaluations."""
    return [(3.0 - n / 100, evaluations.get(n)) for n in range(length)]


RISING = {19: 2.5, 39: 2.0, 59: 2.1, 79: 2.2, 99: 2.3}


def test_it_raises_weight_decay_at_exactly_the_stated_step() -> None:
    found = feed(stand(window=10), training(120, RISING))
    reason = (
        "val_loss 2.3: more than 0.01 above 2 on 3 evaluations in a row (patience 3), while the "
        "mean of 10 losses fell from 2.655 to 2.055"
    )
    assert found == [(99, ScaleWeightDecay(1.5, reason, max_weight_decay=0.4))]


def test_it_does_not_fire_while_the_validation_loss_falls() -> None:
    evaluations = {n: 3.0 - n / 1000 for n in range(0, 1000, 10)}
    assert feed(stand(window=10, patience=1), training(1000, evaluations)) == []


def test_it_does_not_fire_while_the_training_loss_rises_too() -> None:
    steps = [(3.0 + n / 100, RISING.get(n)) for n in range(120)]
    assert feed(stand(window=10, patience=1), steps) == []


def test_a_rise_waits_for_the_training_loss_to_fall() -> None:
    steps = [(2.0 if n < 90 else 1.9, RISING.get(n)) for n in range(120)]
    assert [n for n, _ in feed(stand(window=10, patience=1), steps)] == [99]


def test_the_next_step_waits_for_a_further_fall() -> None:
    steps = [(3.0 if n < 20 else 2.0, 2.0 if n < 20 else 2.5) for n in range(100)]
    policy = stand(window=10, patience=2)
    assert [n for n, _ in feed(policy, steps)] == [29]
    assert [n for n, _ in feed(policy, [(1.9, 2.5)] * 20, begin=100)] == [109]


@pytest.mark.parametrize(
    ("values", "fires"),
    [
        ([2.0, 2.1, 2.1, 2.1], True),
        ([2.0, 2.1, 2.1, 2.02], False),  # not more than 1% above
        ([2.0, 2.1, 1.99, 2.1], False),  # a new best
        ([2.0, 2.1, 2.01, 2.1, 2.1], False),  # not in a row
        ([-2.0, -1.9, -1.9, -1.9], True),
        ([-2.0, -1.99, -1.99, -1.99], False),
    ],
)
def test_what_counts_as_a_rise(values: list[float], fires: bool) -> None:
    steps = [(3.0 - n, value) for n, value in enumerate(values)]
    assert bool(feed(stand(window=1), steps)) is fires


def test_it_steps_up_to_the_bound_and_then_brings_the_decay_forward_once() -> None:
    rates = [0.1, 0.0]

    def view(_n: int) -> StandView:
        return StandView(weight_decay=tuple(rates))

    policy = stand(view=view, window=1, patience=2)
    done: list[tuple[int, str]] = []
    for n in range(200):
        value = 2.0 if n == 0 else 2.5
        for change in policy.see(Observation(n, 3.0 - n / 100, {"val_loss": value})):
            done.append((n, change.action))
            if isinstance(change, ScaleWeightDecay):
                bound = change.max_weight_decay or 0.0
                rates[:] = [min(x * change.factor, max(x, bound)) for x in rates]
            else:
                assert isinstance(change, BeginDecay)
                assert (change.length, change.style) == (1, "minus_sqrt")
    scaled = "scale weight decay"
    assert done == [(2, scaled), (4, scaled), (6, scaled), (8, scaled), (10, "decay")]
    assert rates == [0.4, 0.0]
    assert policy.state.decayed


@pytest.mark.parametrize(
    "weight_decay", [None, (0.0, 0.0), (0.4, 0.5)], ids=["unset", "zero", "above the bound"]
)
def test_it_goes_straight_to_the_decay_where_no_weight_decay_can_rise(
    weight_decay: tuple[float, ...] | None,
) -> None:
    view = StandView(weight_decay=weight_decay)
    ((n, change),) = feed(stand(view=lambda _n: view, window=10), training(120, RISING))
    assert isinstance(change, BeginDecay)
    assert (n, change.length, change.style) == (99, 10, "minus_sqrt")


@pytest.mark.parametrize(("end", "length"), [(104, 4), (101, 1), (100, None)])
def test_the_decay_ends_with_the_stage(end: int, length: int | None) -> None:
    view = replace(WEIGHTLESS, phase=replace(FLAT, end=end))
    found = feed(stand(view=lambda _n: view, window=10), training(120, RISING))
    assert [change.length for _, change in found if isinstance(change, BeginDecay)] == (
        [] if length is None else [length]
    )


def test_the_first_mean_after_the_best_counts_where_there_was_none_at_it() -> None:
    steps = [(3.0 - n / 100, 2.0 if n == 0 else 2.5) for n in range(41)]
    assert [n for n, _ in feed(stand(window=20, patience=2), steps)] == [39]


def test_it_reads_the_metric_that_it_is_told() -> None:
    policy = stand(metric="val/c4", window=1, patience=1)
    for n in range(3):
        policy.see(Observation(n, 3.0 - n, {"val_loss": 2.0 + n, "val/c4": 1.0}))
    assert policy.proposed == []
    (change,) = policy.see(Observation(3, -1.0, {"val/c4": 1.1}))
    assert change.reason.startswith("val/c4 1.1: more than 0.01 above 1 on 1 evaluation in a row")


VALUES = st.one_of(st.sampled_from([1.0, 2.0]), st.floats(-5.0, 5.0))
STEPS = st.lists(st.tuples(VALUES, st.one_of(st.none(), VALUES)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(
    STEPS,
    st.integers(0, 60),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from(["loss", "validation"]),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_one_loss_that_is_no_number_changes_no_later_decision(
    steps: Steps, where: int, broken: float, what: str, window: int, patience: int
) -> None:
    def run(loss: float | None, value: float | None) -> tuple[list[Any], Any]:
        policy = stand(2, window=window, patience=patience)
        found = feed(policy, [*steps[:where], (loss, value), *steps[where:]])
        return found, policy.state

    assert run(*((broken, None) if what == "loss" else (None, broken))) == run(None, None)


def test_the_defaults() -> None:
    spec = parse_policy({"kind": "overfit"})
    assert spec.model_dump() == {
        "kind": "overfit",
        "mode": "act",
        "metric": "val_loss",
        "patience": 3,
        "threshold": 0.01,
        "window": 100,
        "factor": 1.5,
        "max_weight_decay": 0.4,
    }
    assert spec.quiet == {"hold", "dip", "stage change"}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        (
            "metric",
            "val loss",
            "loss, or the name of a validation loss: 1 to 64 of a-z A-Z 0-9 . _ / -",
        ),
        ("patience", 0, "a whole number from 1 to 2**53"),
        ("threshold", -0.1, "a finite number from 0 to 1e+100"),
        ("window", 0, "a whole number from 1 to 2**53"),
        ("factor", 1, "a finite number above 1 to 10"),
        ("max_weight_decay", "4x", "a finite number from 0 to 1e+100"),
    ],
)
def test_a_broken_field_is_refused(name: str, value: Any, allowed: str) -> None:
    assert refusal("overfit", **{name: value}) == (name, repr(value), allowed)


def test_the_training_loss_is_no_validation_loss() -> None:
    document = {
        "name": "a",
        "total": 10,
        "learning_rate": {"peak": 1.0},
        "policies": [{"kind": "overfit", "metric": "loss"}],
    }
    with pytest.raises(
        InvalidSpec, match=r"policies\.0\.metric: got 'loss'; allowed: the name of a validation"
    ):
        parse_spec(document)


GOOD: dict[str, Any] = {
    "best": "inf", "above": 0, "mean": None, "reference": 1.0, "total": 0.5, "seen": 1,
    "decayed": False,
}  # fmt: skip


def test_a_state_survives_its_plain_form() -> None:
    policy = stand().policy
    for state in (
        OverfitState(math.inf, 0, None, None, -0.0, 0, False),
        OverfitState(2.0, 3, 0.1, 1e308, 0.3, 2, True),
    ):
        data = _canonical.to_bytes(policy.encode(state))
        assert policy.decode(_canonical.from_bytes(data)) == state


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD if name not in {"mean", "reference"}),
        {**GOOD, "above": -1},
        {**GOOD, "mean": "x"},
        {**GOOD, "decayed": 0},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a overfit policy"):
        stand().policy.decode(damaged)
