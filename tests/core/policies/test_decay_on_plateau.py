"""The policy that begins the anneal: when, how long, and once."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import BeginDecay
from lrpilot.core._errors import InvalidState
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import (
    DecayOnPlateau,
    DecayOnPlateauSpec,
    DecayOnPlateauState,
    Phase,
)
from tests.core.policies.checks import assert_one_changes_nothing, refusal
from tests.core.policies.stand import Stand, StandView


def wsd(n: int) -> StandView:
    """A run of 1000 with a warmup of 10 and an anneal from 800 on."""
    name: Any = "warmup" if n <= 10 else "stable" if n <= 800 else "decay"
    return StandView(phase=Phase("", 0, name, 0, 10.0, 800.0, 1000), total=1000)


def stand(delay: int = 1, **fields: Any) -> Stand:
    spec = parse_policy({"kind": "decay-on-plateau", **fields})
    assert isinstance(spec, DecayOnPlateauSpec)
    return Stand(DecayOnPlateau(spec, 1), delay, wsd)


def test_it_begins_the_anneal_at_exactly_the_stated_step_and_once() -> None:
    # The stable phase begins at 11, and reports end at 15, 20, 25 and so on. They improve up to the
    # one that ends at 30; the three after it do not.
    losses = [10.0 - n / 10 if n <= 30 else 7.5 for n in range(800)]
    found = stand(delay=8, window=5, patience=2).run(losses)
    reason = (
        "mean of 5 losses 7.5: none below 7.2 * (1 - 0.0001) for 3 reports (patience 2); "
        "anneal over 10% of 45"
    )
    assert found == [(45, BeginDecay(4, "minus_sqrt", reason))]


def test_it_does_not_fire_while_the_loss_falls() -> None:
    losses = [10.0 * 0.999**n for n in range(1000)]
    assert stand(window=5, patience=0).run(losses) == []


@pytest.mark.parametrize(("losses", "fires"), [([2.0, 1.8], True), ([2.0, 1.799], False)])
def test_better_is_strictly_below_the_share(losses: list[float], fires: bool) -> None:
    found = stand(window=1, patience=0, threshold=0.1).run(losses, begin=20)
    assert bool(found) is fires


def test_warmup_and_decay_are_not_looked_at() -> None:
    policy = stand(window=1, patience=0)
    assert policy.run([1.0] * 11) == []
    assert policy.run([1.0] * 50, begin=801) == []
    assert policy.state == policy.policy.initial()


def test_a_constant_rate_is_stable_too() -> None:
    spec = parse_policy({"kind": "decay-on-plateau", "window": 1, "patience": 0, "anneal": 7})
    assert isinstance(spec, DecayOnPlateauSpec)
    ((n, change),) = Stand(DecayOnPlateau(spec, 3)).run([1.0, 1.0])
    assert isinstance(change, BeginDecay)
    assert (n, change.length) == (1, 7)
    assert change.reason.endswith("(patience 0); anneal over 7")


@pytest.mark.parametrize(("delay", "fires"), [(9, True), (10, False)])
def test_it_does_not_anneal_what_comes_down_by_itself(delay: int, fires: bool) -> None:
    found = stand(delay, window=1, patience=0).run([1.0, 1.0], begin=789)
    assert bool(found) is fires


@pytest.mark.parametrize(
    ("anneal", "n", "length"),
    [("10%", 500, 50), ("10%", 504, 50), ("10%", 506, 51), ("0%", 500, 1), (0, 500, 1),
     (12.5, 500, 12), ("100%", 500, 499)],
)  # fmt: skip
def test_the_length_is_a_count_or_a_share_of_what_was_run_up_to_the_end(
    anneal: Any, n: int, length: int
) -> None:
    policy = stand(window=1, patience=0, anneal=anneal, anneal_style="linear")
    ((at, change),) = policy.run([1.0, 1.0], begin=n - 1)
    assert isinstance(change, BeginDecay)
    assert (at, change.length, change.style) == (n, length, "linear")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([1.0, 2.0]), st.floats(-5.0, 5.0)), max_size=60),
    st.integers(0, 60),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_one_loss_that_is_no_number_changes_no_later_decision(
    losses: list[float], where: int, broken: float, window: int, patience: int
) -> None:
    def fresh() -> Stand:
        return stand(2, window=window, patience=patience)

    assert_one_changes_nothing(fresh, losses, where, broken)


def test_the_defaults() -> None:
    spec = parse_policy({"kind": "decay-on-plateau"})
    assert spec.model_dump() == {
        "kind": "decay-on-plateau",
        "mode": "act",
        "window": 200,
        "patience": 10,
        "threshold": 1e-4,
        "anneal": "10%",
        "anneal_style": "minus_sqrt",
    }
    assert spec.quiet == {"hold", "dip", "stage change"}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("window", 0, "a whole number from 1 to 2**53"),
        ("patience", -1, "a whole number from 0 to 2**53"),
        ("threshold", math.inf, "a finite number from 0 to 1e+100"),
        (
            "anneal",
            "110%",
            'a length in the unit from 0 to 2**53, or a share of what was run from "0%" to "100%"',
        ),
        ("anneal_style", "steep", "one of exponential, linear, cosine, minus_sqrt"),
    ],
)
def test_a_broken_field_is_refused(name: str, value: Any, allowed: str) -> None:
    assert refusal("decay-on-plateau", **{name: value}) == (name, repr(value), allowed)


GOOD: dict[str, Any] = {"best": "inf", "bad": 0, "total": 0.5, "seen": 1, "begun": False}


def test_a_state_survives_its_plain_form() -> None:
    policy = stand().policy
    state = DecayOnPlateauState(math.inf, 3, -0.0, 2, True)
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD),
        {**GOOD, "bad": -1},
        {**GOOD, "begun": 1},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a decay-on-plateau policy"):
        stand().policy.decode(damaged)
