"""The divergence policy by itself."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import Direct, Multiply
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import Divergence, DivergenceSpec, DivergenceState, Observation
from tests.core.policies.stand import FLAT, Stand, StandView

SMALL: dict[str, Any] = {"window": 4, "patience": 2, "recovery": 3, "stuck_after": 0}
"""Means of four losses; the tests below count in them."""


def divergence(**fields: Any) -> Divergence:
    spec = parse_policy({"kind": "divergence", **fields})
    assert isinstance(spec, DivergenceSpec)
    return Divergence(spec, 1)


def means(*values: float, window: int = 4) -> list[float]:
    """Return losses whose means are these, without noise."""
    return [value for value in values for _ in range(window)]


def healthy(length: int, seed: int, noise: float, first: float = 9.0) -> list[float]:
    source = random.Random(seed)
    return [2.0 + first * math.exp(-n / 200) + source.gauss(0.0, noise) for n in range(length)]


def test_it_only_advises_unless_told_otherwise_and_watches_under_a_hold() -> None:
    spec = parse_policy({"kind": "divergence"})
    assert spec.mode == "advise"
    assert spec.quiet == {"stage change"}


# ---------------------------------------------------------------------------------------------
# A rise.


def test_a_rise_is_cut_first_and_answered_with_a_rollback_if_it_does_not_come_back() -> None:
    stand = Stand(divergence(**SMALL, limit=2), delay=2)
    # Gained 8 since the first mean: the bar is 2 + 0.2 * 8, a rise begins above 2.8.
    proposed = stand.run(means(10.0, 2.0, 2.0, 2.5, 3.0, 4.0, 4.0) + [5.0] * 20)
    assert proposed == [
        (
            27,
            Multiply(
                0.5,
                "mean of 4 losses 4, bar 3.6, best 2 at 11; rising since 16; above the bar 2 times"
                " in a row (patience 2)",
            ),
        ),
        (
            40,
            Direct(
                "rollback",
                "mean of 4 losses 5, bar 3.6, best 2 at 11; rising since 16; not back 3 means"
                " after the cut; back to before 16",
                before=16,
                factor=0.5,
                limit=2,
            ),
        ),
    ]


def test_a_cut_that_brings_the_loss_back_is_all() -> None:
    stand = Stand(divergence(**SMALL))
    proposed = stand.run(means(10.0, 2.0, 2.0, 5.0, 5.0, 4.0, 3.0, 2.5, 2.0) + [2.0] * 40)
    assert [(n, type(change)) for n, change in proposed] == [(19, Multiply)]
    assert (stand.state.tried, stand.state.onset, stand.state.high) == (None, None, 0)
    # The next rise is tried anew.
    proposed = stand.run(means(5.0, 5.0), 76)
    assert [(n, type(change)) for n, change in proposed] == [(83, Multiply)]


def test_what_comes_back_only_to_between_onset_and_bar_has_not_come_back() -> None:
    proposed = Stand(divergence(**SMALL)).run(means(10.0, 2.0, 2.0, 5.0, 5.0, 3.0, 3.0, 3.0))
    assert [(n, type(change)) for n, change in proposed] == [(19, Multiply), (31, Direct)]


def test_after_the_rollback_was_asked_for_it_begins_anew() -> None:
    stand = Stand(divergence(**SMALL))
    stand.run(means(10.0, 2.0, 2.0, *[5.0] * 5))
    assert isinstance(stand.proposed[-1][1], Direct)
    assert stand.state == divergence().initial()
    assert stand.run([5.0] * 400, 32) == []


@pytest.mark.parametrize(
    ("first", "best", "level", "fires"),
    [
        # A share of the best where little was gained.
        (2.0, 2.0, 2.4, False),
        (2.0, 2.0, 2.5, True),
        # A share of what was gained near 0 ...
        (1.0, 0.0, 0.2, False),
        (1.0, 0.0, 0.25, True),
        # ... and below it.
        (0.0, -5.0, -4.0, False),
        (0.0, -5.0, -3.75, True),
    ],
)
def test_the_bar_is_a_share_of_the_best_or_of_what_was_gained(
    first: float, best: float, level: float, fires: bool
) -> None:
    proposed = Stand(divergence(**SMALL)).run(means(first, best, best, level, level))
    assert (proposed != []) is fires


def test_a_rise_that_the_noise_so_far_explains_is_none() -> None:
    noisy = [1.0, 3.0] * 8  # means of 2 whose neighbours are 2 apart
    assert Stand(divergence(**SMALL)).run(noisy + means(3.0, 3.0)) == []
    assert Stand(divergence(**SMALL)).run(means(2.0, 2.0, 3.0, 3.0)) != []


def test_a_rise_hides_in_no_noise_of_its_own() -> None:
    wild = [2.0, 400.0] * 8
    proposed = Stand(divergence(**SMALL)).run(means(2.0, 2.0) + wild)
    assert [(n, type(change)) for n, change in proposed] == [(15, Multiply)]


def test_the_errors_of_the_means_settle_and_those_of_a_rise_do_not_count() -> None:
    stand = Stand(divergence(**SMALL))
    stand.run([1.0, 3.0, 1.0, 3.0])
    error = 6.0 / 3 / (2.0 / math.sqrt(math.pi)) / math.sqrt(4)
    # The first one is taken as it is, and then once more: exactly as much.
    assert stand.state.noise == error
    stand.run(means(2.0), 4)
    assert stand.state.noise == error + (0.0 - error) * 0.125
    before = stand.state.noise
    stand.run([2.0, 400.0] * 2, 8)
    assert (stand.state.high, stand.state.noise) == (1, before)


def test_fewer_means_than_patience_propose_nothing() -> None:
    assert Stand(divergence(**SMALL)).run(means(10.0, 2.0, 2.0, *[9.0, 2.0] * 9)) == []


# ---------------------------------------------------------------------------------------------
# Stuck.


def test_a_loss_that_stays_where_it_began_is_cut_and_sent_back_once() -> None:
    policy = divergence(window=4, stuck_after=40)
    proposed = Stand(policy).run([2.303] * 400)
    reason = (
        "best mean of 4 losses 2.303 at 3: not below 2.27997 within 40 losses after the warmup,"
        " first 2.303"
    )
    assert proposed == [
        (39, Multiply(0.5, reason)),
        (
            39,
            Direct("rollback", f"{reason}; back to before 3", before=3, factor=0.5, limit=3),
        ),
    ]


def test_a_gain_of_the_share_is_enough() -> None:
    policy = divergence(window=4, stuck_after=40)
    assert Stand(policy).run(means(2.0, 1.98, 1.98) + [2.0] * 100) != []
    assert Stand(policy).run(means(2.0, 1.97, 1.97) + [2.0] * 100) == []


def test_losses_of_the_warmup_do_not_count_as_stuck() -> None:
    warm = replace(FLAT, name="warmup")

    def view(n: int) -> StandView:
        return StandView(phase=warm if n < 100 else FLAT)

    proposed = Stand(divergence(window=4, stuck_after=40), view=view).run([2.0] * 200)
    assert [n for n, _ in proposed] == [139, 139]


def test_later_stages_and_a_count_of_zero_are_not_asked() -> None:
    later = StandView(phase=replace(FLAT, index=1))
    assert Stand(divergence(stuck_after=40), view=lambda _n: later).run([2.0] * 200) == []
    assert Stand(divergence(stuck_after=0)).run([2.0] * 2000) == []


# ---------------------------------------------------------------------------------------------
# What changes nothing.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("noise", "first"), [(0.02, 9.0), (0.3, 9.0), (1.0, 9.0), (0.8, 0.1)])
def test_a_healthy_run_proposes_nothing(seed: int, noise: float, first: float) -> None:
    # The last is a fine-tuning: noise far larger than what there is to gain.
    stand = Stand(divergence(stuck_after=0 if first < 1.0 else 1000))
    assert stand.run(healthy(6000, seed, noise, first)) == []


@pytest.mark.parametrize("bad", [30.0, 1e6, 1e300, 0.0, -1e6, -1e300, math.nan, math.inf])
def test_a_corrupted_batch_proposes_nothing(bad: float) -> None:
    losses = healthy(3000, 7, 0.05)
    losses[1500] = bad
    assert Stand(divergence()).run(losses) == []


def test_a_spike_that_passes_proposes_nothing() -> None:
    losses = healthy(3000, 8, 0.05)
    for step in range(40):
        losses[1500 + step] += 3.0 * math.exp(-step / 8)
    assert Stand(divergence()).run(losses) == []


def test_a_blown_up_run_is_cut_and_sent_back_with_the_defaults() -> None:
    losses = healthy(1000, 9, 0.05) + [7.0 + 0.05 * (-1) ** n for n in range(200)]
    proposed = Stand(divergence()).run(losses)
    assert [(n, type(change)) for n, change in proposed] == [(1039, Multiply), (1103, Direct)]
    back = proposed[1][1]
    assert isinstance(back, Direct)
    assert back.before == 992  # the first loss of the window in which it rose


# ---------------------------------------------------------------------------------------------
# Determinism, refusals.

LOSSES = st.lists(
    st.one_of(st.sampled_from([2.0, 2.2, 3.0, 9.0, 0.0, -1.0, 1e308, -1e308]), st.floats()),
    max_size=60,
)
QUICK: dict[str, Any] = {"window": 2, "patience": 1, "recovery": 1, "stuck_after": 8}


@settings(deadline=None)
@given(LOSSES, st.integers(0, 60), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_non_finite_loss_changes_no_decision(losses: list[float], at: int, bad: float) -> None:
    without, with_one = Stand(divergence(**QUICK)), Stand(divergence(**QUICK))
    for n, loss in enumerate(losses):
        if n == at:
            assert with_one.see(Observation(2 * n, bad)) == ()
        expected = without.see(Observation(2 * n + 1, loss))
        assert with_one.see(Observation(2 * n + 1, loss)) == expected
    assert with_one.state == without.state


@settings(deadline=None)
@given(LOSSES, st.integers(0, 60))
def test_a_policy_holds_no_state(losses: list[float], cut: int) -> None:
    whole, first, again = (Stand(divergence(**QUICK)) for _ in range(3))
    whole.run(losses)
    first.run(losses[:cut])
    again.state = first.state
    again.run(losses[cut:], cut)
    assert again.state == whole.state
    assert first.proposed + again.proposed == whole.proposed


def test_reports_of_other_metrics_alone_are_passed_over() -> None:
    stand = Stand(divergence(**SMALL))
    stand.run([1.0, None, 2.0])
    assert (stand.state.seen, stand.state.total) == (2, 3.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 1}, "window: got 1; allowed: a whole number from 2"),
        ({"rise": 0}, "rise: got 0; allowed: a finite number above 0"),
        ({"patience": 0}, "patience: got 0; allowed: a whole number from 1"),
        ({"recovery": 0}, "recovery: got 0; allowed: a whole number from 1"),
        ({"factor": 1}, "factor: got 1; allowed: a finite number above 0 below 1"),
        ({"limit": 0}, "limit: got 0; allowed: a whole number from 1"),
        ({"stuck_after": -1}, "stuck_after: got -1; allowed: a whole number from 0"),
        ({"stuck_gain": 1.0}, "stuck_gain: got 1.0; allowed: a finite number above 0 below 1"),
        ({"threshold": 0.1}, "threshold: got 0.1"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        divergence(**fields)
    assert message in str(caught.value)


GOOD: dict[str, Any] = {
    "seen": 0, "total": 0.0, "travel": 0.0, "last": 0.0, "began": 0, "first": "inf",
    "first_end": 0, "best": "inf", "best_at": 0, "previous": "inf", "noise": 0.0, "high": 0,
    "onset": None, "tried": None, "settled": 0,
}  # fmt: skip


def test_a_state_survives_its_plain_form() -> None:
    policy = divergence()
    state = DivergenceState(3, -0.5, 0.25, 0.1, 9, math.inf, 7, -1.5, 5, 2.5, 0.5, 2, 3, 0, 16)
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state
    assert policy.decode(GOOD) == policy.initial()


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD if name not in {"onset", "tried"}),
        {**GOOD, "onset": -1},
        {**GOOD, "high": 1.5},
        {**GOOD, "best": "low"},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a divergence policy"):
        divergence().decode(damaged)
