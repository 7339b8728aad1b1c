"""The warmup-guard policy by itself."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import StretchWarmup
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import (
    Observation,
    Phase,
    WarmupGuard,
    WarmupGuardSpec,
    WarmupGuardState,
)
from tests.core.policies.stand import FLAT, Stand, StandView

WARMING = StandView(phase=replace(FLAT, name="warmup"))
SMALL: dict[str, Any] = {"window": 4, "patience": 2}
"""Means of four losses; the tests below count in them."""


def guard(**fields: Any) -> WarmupGuard:
    spec = parse_policy({"kind": "warmup-guard", **fields})
    assert isinstance(spec, WarmupGuardSpec)
    return WarmupGuard(spec, 1)


def warming(**fields: Any) -> Stand:
    """Return a stand on which the warmup never ends."""
    return Stand(guard(**fields), view=lambda _n: WARMING)


def means(*values: float, window: int = 4) -> list[float]:
    """Return losses whose means are these, without noise."""
    return [value for value in values for _ in range(window)]


def test_it_acts_unless_told_otherwise_and_is_quiet_while_the_lr_is_not_the_warmups() -> None:
    spec = parse_policy({"kind": "warmup-guard"})
    assert spec.mode == "act"
    assert spec.quiet == {"hold", "dip"}


# ---------------------------------------------------------------------------------------------
# What stretches.


def test_a_rising_loss_stretches_the_warmup() -> None:
    # Gained 4 since the first mean, the best is 6: too high is above 6.6.
    assert warming(**SMALL).run(means(10.0, 6.0, 6.0, 6.5, 7.0, 7.0, 6.0)) == [
        (
            23,
            StretchWarmup(
                2.0, "mean of 4 losses 7: 2 in a row above 6.6 (patience 2), best 6; stretch 1 of 3"
            ),
        )
    ]


def test_an_oscillating_loss_stretches_the_warmup() -> None:
    assert warming(**SMALL, factor=1.5).run(means(6.0, 5.0, 6.0, 5.0, 6.0, 5.5)) == [
        (
            19,
            StretchWarmup(
                1.5,
                "mean of 4 losses 6: 4 swings in a row of more than 0.6 (swings 4), best 6;"
                " stretch 1 of 3",
            ),
        )
    ]


@pytest.mark.parametrize(
    "values",
    [
        # A step that is no swing, and one in the same direction, start the count afresh.
        (6.0, 5.0, 6.0, 5.9, 5.0, 6.0, 5.0, 5.0),
        (6.0, 5.0, 6.0, 5.0, 4.0, 5.0, 4.0, 4.0),
        # Up and down, but by less than a tenth.
        (6.0, *[5.6, 6.0] * 10),
    ],
)
def test_fewer_or_smaller_swings_do_not(values: tuple[float, ...]) -> None:
    assert warming(window=4, patience=100).run(means(*values)) == []


@pytest.mark.parametrize(
    "values",
    [
        # High, but not twice in a row.
        (6.0, *[6.5, 6.7, 6.3] * 9),
        # High by less than a tenth.
        (6.0, *[6.6] * 20),
    ],
)
def test_shorter_or_smaller_rises_do_not(values: tuple[float, ...]) -> None:
    assert warming(**SMALL).run(means(*values)) == []


def test_after_a_stretch_only_a_further_rise_stretches_again_and_at_most_so_often() -> None:
    stand = warming(**SMALL, limit=2)
    stand.run(means(10.0, 6.0, 6.0, 7.0, 7.0))
    assert len(stand.proposed) == 1
    assert stand.run(means(*[7.0] * 20), 20) == []
    assert [n for n, _ in stand.run(means(8.0, 8.0, 8.0), 100)] == [107]
    # That was the second.
    assert stand.run(means(*[9.0, 10.0, 11.0, 12.0] * 5), 112) == []


def test_what_the_noise_so_far_explains_is_neither() -> None:
    noisy = [1.0, 3.0] * 4  # means of 2 whose neighbours are 2 apart
    assert warming(**SMALL).run(noisy + means(*[3.0, 2.0] * 4, 3.0, 3.0, 3.0)) == []
    quiet = means(2.0, 2.0)
    assert warming(**SMALL).run(quiet + means(*[3.0, 2.0] * 4)) != []
    assert warming(**SMALL).run(quiet + means(3.0, 3.0, 3.0)) != []
    # The noise of what is too high does not count.
    assert warming(**SMALL).run(quiet + [2.0, 400.0] * 4) != []


# ---------------------------------------------------------------------------------------------
# What changes nothing.


def test_only_the_warmup_is_watched() -> None:
    rising = means(10.0, 6.0, 6.0, 7.0, 7.0, 7.0)
    for name in ("constant", "stable", "decay", "ended"):
        view = StandView(phase=replace(FLAT, name=name))
        stand = Stand(guard(**SMALL), view=lambda _n, view=view: view)  # type: ignore[misc]
        assert stand.run(rising) == []
        assert stand.state == guard().initial()


def test_where_a_warmup_ends_everything_begins_anew() -> None:
    phases: dict[bool, Phase] = {True: replace(FLAT, name="warmup"), False: FLAT}
    stand = Stand(
        guard(**SMALL, limit=1), view=lambda n: StandView(phase=phases[n < 20 or n >= 44])
    )
    rising = means(10.0, 6.0, 6.0, 7.0, 7.0)
    assert [n for n, _ in stand.run(rising)] == [19]
    assert stand.run([7.0] * 24, 20) == []
    # The next stage's warmup has its own limit, and its own best.
    assert [n for n, _ in stand.run(rising, 44)] == [63]


def healthy(length: int, seed: int, noise: float, first: float) -> list[float]:
    source = random.Random(seed)
    return [2.0 + first * math.exp(-n / 200) + source.gauss(0.0, noise) for n in range(length)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("noise", "first"), [(0.02, 9.0), (0.3, 9.0), (1.0, 9.0), (0.8, 0.1)])
def test_a_healthy_warmup_is_left_alone(seed: int, noise: float, first: float) -> None:
    assert warming().run(healthy(2000, seed, noise, first)) == []


@pytest.mark.parametrize("bad", [30.0, 1e6, 1e300, 0.0, -1e6, -1e300, math.nan, math.inf])
def test_a_corrupted_batch_is_left_alone(bad: float) -> None:
    losses = healthy(2000, 5, 0.05, 9.0)
    losses[300] = bad
    assert warming().run(losses) == []


def test_a_spike_that_passes_is_left_alone() -> None:
    losses = healthy(2000, 6, 0.05, 9.0)
    for step in range(30):
        losses[600 + step] += 3.0 * math.exp(-step / 8)
    assert warming().run(losses) == []


# ---------------------------------------------------------------------------------------------
# Determinism, refusals.

LOSSES = st.lists(
    st.one_of(st.sampled_from([2.0, 2.2, 3.0, 9.0, 0.0, -1.0, 1e308, -1e308]), st.floats()),
    max_size=60,
)
QUICK: dict[str, Any] = {"window": 2, "patience": 1, "swings": 2, "limit": 100}


@settings(deadline=None)
@given(LOSSES, st.integers(0, 60), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_non_finite_loss_changes_no_decision(losses: list[float], at: int, bad: float) -> None:
    without, with_one = warming(**QUICK), warming(**QUICK)
    for n, loss in enumerate(losses):
        if n == at:
            assert with_one.see(Observation(2 * n, bad)) == ()
        expected = without.see(Observation(2 * n + 1, loss))
        assert with_one.see(Observation(2 * n + 1, loss)) == expected
    assert with_one.state == without.state


@settings(deadline=None)
@given(LOSSES, st.integers(0, 60))
def test_a_policy_holds_no_state(losses: list[float], cut: int) -> None:
    whole, first, again = (warming(**QUICK) for _ in range(3))
    whole.run(losses)
    first.run(losses[:cut])
    again.state = first.state
    again.run(losses[cut:], cut)
    assert again.state == whole.state
    assert first.proposed + again.proposed == whole.proposed


def test_reports_of_other_metrics_alone_are_passed_over() -> None:
    stand = warming(**SMALL)
    stand.run([1.0, None, 2.0])
    assert (stand.state.seen, stand.state.total) == (2, 3.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 1}, "window: got 1; allowed: a whole number from 2"),
        ({"rise": 0}, "rise: got 0; allowed: a finite number above 0"),
        ({"patience": 0}, "patience: got 0; allowed: a whole number from 1"),
        ({"swing": "10%"}, "swing: got '10%'; allowed: a finite number above 0"),
        ({"swings": 1}, "swings: got 1; allowed: a whole number from 2"),
        ({"factor": 1.0}, "factor: got 1.0; allowed: a finite number above 1"),
        ({"limit": 0}, "limit: got 0; allowed: a whole number from 1"),
        ({"recovery": 3}, "recovery: got 3"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        guard(**fields)
    assert message in str(caught.value)


GOOD: dict[str, Any] = {
    "seen": 0, "total": 0.0, "travel": 0.0, "last": 0.0, "began": 0, "first": "inf", "best": "inf",
    "previous": 0.0, "noise": 0.0, "high": 0, "turns": 0, "is_up": False, "stretched": 0,
}  # fmt: skip


def test_a_state_survives_its_plain_form() -> None:
    policy = guard()
    state = WarmupGuardState(3, -0.5, 0.25, 0.1, 9, math.inf, -1.5, 7.5, 0.5, 2, 3, True, 1)
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state
    assert policy.decode(GOOD) == policy.initial()


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD),
        {**GOOD, "is_up": 1},
        {**GOOD, "turns": -1},
        {**GOOD, "best": "low"},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a warmup-guard policy"):
        guard().decode(damaged)
