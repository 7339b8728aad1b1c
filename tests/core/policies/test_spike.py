"""The spike policy by itself."""

import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import Curve, Direct, EndOwn, Note
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._spec import parse_policy, parse_spec
from lrpilot.core.policies import Observation, Spike, SpikeSpec, SpikeState
from tests.core.policies.stand import Stand

CALM = [2.0, 2.2] * 50
"""A hundred losses with mean 2.1 and standard deviation 0.1: outliers begin above 2.7."""


def spike(**fields: Any) -> Spike:
    spec = parse_policy({"kind": "spike", **fields})
    assert isinstance(spec, SpikeSpec)
    return Spike(spec, 1)


def calmed(delay: int = 1, calm: Iterable[float] = CALM, **fields: Any) -> Stand:
    """Return a stand whose policy has seen the calm losses, at 0 to 99."""
    stand = Stand(spike(**fields), delay)
    assert stand.run(calm) == []
    return stand


def healthy(length: int, seed: int, noise: float = 0.05) -> list[float]:
    """Return a noisy decay from 11 to 2."""
    source = random.Random(seed)
    return [2.0 + 9.0 * math.exp(-n / 200) + source.gauss(0.0, noise) for n in range(length)]


def test_it_only_advises_unless_told_otherwise_and_is_quiet_when_a_stage_begins() -> None:
    spec = parse_policy({"kind": "spike"})
    assert spec.mode == "advise"
    assert spec.quiet == {"stage change"}


# ---------------------------------------------------------------------------------------------
# What is an outlier.


def test_the_bar_is_the_mean_and_so_many_deviations_of_the_window() -> None:
    losses = [2.0, 2.5, 1.75, 2.25] * 16
    stand = calmed(calm=losses, window=8, sigma=3.0)
    mean = 2.125
    squares = 0.0
    for x in losses[-8:]:
        squares += (x - mean) * (x - mean)
    bar = mean + 3.0 * math.sqrt(squares / 8)
    stand.run([bar])
    assert stand.state.run == 0
    # That loss is in the window now.
    stand = calmed(calm=losses, window=8, sigma=3.0)
    stand.run([math.nextafter(bar, math.inf)])
    assert stand.state.run == 1
    assert stand.state.bar == bar


def test_nothing_is_an_outlier_before_the_least_number_of_losses() -> None:
    for count, run in ((63, 0), (64, 1)):
        stand = calmed(calm=CALM[:count])
        stand.run([1e9])
        assert stand.state.run == run


def test_a_low_loss_is_no_outlier() -> None:
    stand = calmed()
    assert stand.run([-1e6] * 20) == []
    assert stand.state.best == -1e6


def test_rounding_on_a_constant_loss_is_no_spike() -> None:
    stand = calmed(calm=[2.0] * 100)
    stand.run([2.0 + 5e-6])
    assert stand.state.run == 0
    stand.run([2.0 + 1e-4])
    assert stand.state.run == 1


def test_outliers_stay_out_of_the_statistics_and_the_third_in_a_row_is_let_in() -> None:
    stand = calmed()
    stand.run([3.0, 3.1])
    assert stand.state.losses == tuple(CALM)
    stand.run([3.2], 102)
    assert stand.state.losses == (*CALM, 3.2)
    # Those that follow are measured by the bar that the first one met all the same.
    stand.run([2.8], 103)
    assert (stand.state.run, stand.state.bar) == (4, pytest.approx(2.7))
    stand.run([2.6], 104)
    assert (stand.state.run, stand.state.bar) == (0, None)


def test_the_window_holds_what_the_mean_of_a_hundred_needs() -> None:
    assert len(calmed(calm=CALM * 2, window=16).state.losses) == 100
    assert len(calmed(calm=CALM * 2).state.losses) == 128


# ---------------------------------------------------------------------------------------------
# What changes nothing.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_a_healthy_noisy_decay_proposes_nothing(seed: int, noise: float) -> None:
    assert Stand(spike()).run(healthy(2000, seed, noise)) == []


@pytest.mark.parametrize("outliers", [1, 2, 3, 4])
def test_an_isolated_spike_proposes_nothing_however_often_it_comes(outliers: int) -> None:
    stand = calmed()
    for turn in range(10):
        begin = 100 + turn * 100
        assert stand.run([3.5] * outliers + CALM[outliers:], begin) == []


def test_a_corrupted_batch_is_noted_at_most() -> None:
    losses = healthy(2000, 1)
    losses[1000] = 11.0
    ((n, note),) = Stand(spike()).run(losses)
    assert n == 1000
    assert isinstance(note, Note)


def test_corrupted_batches_far_and_near_cut_nothing() -> None:
    losses = healthy(3000, 2)
    for n in (1000, 1020, 1250, 1300, 1301, 2000, 2230):
        losses[n] = 30.0
    assert {type(change) for _, change in Stand(spike()).run(losses)} == {Note}


def test_a_spike_of_many_losses_that_passes_is_noted_and_no_more() -> None:
    # As the first spike of BLOOM-176B went: up at once, back in thirty steps.
    losses = healthy(2000, 3, 0.02)
    for step in range(30):
        losses[1000 + step] += 3.0 * math.exp(-step / 8)
    proposed = Stand(spike()).run(losses)
    assert [(n, type(change)) for n, change in proposed] == [(1000, Note)]


# ---------------------------------------------------------------------------------------------
# The ladder.


def test_the_fifth_outlier_in_a_row_is_noted() -> None:
    stand = calmed()
    assert stand.run([3.0, 3.1, 3.2, 3.3, 3.4, 3.5], 100) == [
        (104, Note("loss 3.4 above 2.7: 5 outliers in a row since 100"))
    ]


def test_one_outlier_of_twice_the_mean_is_noted() -> None:
    losses = [1.75, 2.25] * 50  # mean 2, exactly
    assert calmed(calm=losses).run([math.nextafter(4.0, 0.0)], 100) == []
    assert calmed(calm=losses).run([4.0], 100) == [
        (100, Note("loss 4 above 3.5: 1 outlier since 100"))
    ]
    # The mean is that of a hundred losses, and says nothing of losses below zero.
    assert calmed(calm=losses[1:]).run([5.0], 100) == []
    assert calmed(calm=[-x for x in losses]).run([9.0], 100) == []


def test_a_spike_that_persists_climbs_the_ladder() -> None:
    stand = calmed(delay=4, recovery=20, limit=2)
    proposed = stand.run([3.0] * 80, 100)
    # A note mutes nothing; after a cut the next loss seen is the first that it acts on.
    assert [(n, type(change)) for n, change in proposed] == [
        (104, Note),
        (124, EndOwn),
        (124, Curve),
        (147, EndOwn),
        (147, Curve),
        (170, Direct),
    ]
    first, second, back = (proposed[index][1] for index in (2, 4, 5))
    reason = "loss 3 above 2.7: 25 outliers in a row since 100; LR * 0.9 over 20, back to 1 at 40"
    assert proposed[1][1] == EndOwn(reason)
    assert first == Curve(((0, 0.9), (20, 0.9), (40, 1.0)), reason)
    assert isinstance(second, Curve)
    # 45 outliers over 47 steps, four of them not seen: 20 losses take a little longer.
    assert second.points == ((0, 2 / 3), (21, 2 / 3), (42, 1.0))
    assert back == Direct(
        "rollback",
        "loss 3 above 2.7: 65 outliers in a row since 100; not back 20 losses after the last cut;"
        " best loss 2 at 0; back to before 100",
        before=100,
        factor=2 / 3,
        limit=2,
        until=104,
    )
    assert stand.state.losses == (3.0,) * 6


def test_after_the_rollback_was_asked_for_everything_but_the_best_begins_anew() -> None:
    stand = calmed(recovery=5)
    stand.run([3.0] * 20, 100)
    assert isinstance(stand.proposed[-1][1], Direct)
    assert stand.state == SpikeState((), None, 0, 0, 0, 0, 0, 0, 0, 2.0, 0)
    # The new level is normal from now on.
    assert stand.run([3.0, 3.1] * 500, 120) == []


def test_given_lengths_of_hold_and_rewarm_are_in_the_unit() -> None:
    stand = calmed(recovery=5, hold=1000, rewarm=3000)
    (*_, (_, curve)) = stand.run([3.0] * 10, 100)
    assert isinstance(curve, Curve)
    assert curve.points == ((0, 0.9), (1000, 0.9), (4000, 1.0))


def test_chosen_lengths_follow_the_distance_of_the_losses() -> None:
    stand = Stand(spike(recovery=10))
    for index, loss in enumerate([*CALM, *[3.0] * 15]):
        stand.see(Observation(index * 512, loss))
    curve = stand.proposed[-1][1]
    assert isinstance(curve, Curve)
    assert curve.points == ((0, 0.9), (5120, 0.9), (10240, 1.0))


def test_no_step_is_taken_within_the_recovery_window_or_for_single_outliers() -> None:
    stand = calmed(recovery=20)
    # Persists (note), is back for less than the window, and single outliers come after it.
    assert len(stand.run([3.0] * 5 + CALM[:10] + [3.0] * 9, 100)) == 1
    assert stand.run((CALM[:4] + [3.0] * 4) * 20, 124) == []


def test_a_spike_that_is_back_before_the_window_ends_climbs_when_it_persists_again() -> None:
    stand = calmed(recovery=20)
    stand.run([3.0] * 5 + CALM[:19], 100)
    proposed = stand.run([3.0] * 5, 124)
    assert [(n, type(change)) for n, change in proposed] == [(128, EndOwn), (128, Curve)]


def test_a_loss_that_is_back_for_the_window_starts_the_ladder_anew() -> None:
    stand = calmed(recovery=20)
    stand.run([3.0] * 5 + CALM[:20], 100)
    assert (stand.state.rung, stand.state.bar) == (0, None)
    assert [type(change) for _, change in stand.run([3.4] * 5, 125)] == [Note]


def test_on_the_ladder_no_outlier_is_let_in() -> None:
    stand = calmed()
    stand.run([3.0] * 5, 100)
    before = stand.state.losses
    stand.run([3.0] * 50, 105)
    assert stand.state.losses == before


# ---------------------------------------------------------------------------------------------
# Determinism, refusals.

LOSSES = st.lists(
    st.one_of(st.sampled_from([2.0, 2.2, 3.0, 9.0, 0.0, -1.0, 1e308, -1e308]), st.floats()),
    max_size=60,
)


@settings(deadline=None)
@given(LOSSES, st.integers(0, 60), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_one_non_finite_loss_changes_no_decision(losses: list[float], at: int, bad: float) -> None:
    policy = spike(least=4, window=8, recovery=3, persistent=2)
    without = Stand(policy)
    with_one = Stand(policy)
    for n, loss in enumerate(losses):
        if n == at:
            assert with_one.see(Observation(2 * n, bad)) == ()
        expected = without.see(Observation(2 * n + 1, loss))
        assert with_one.see(Observation(2 * n + 1, loss)) == expected
    assert with_one.state == without.state


@settings(deadline=None)
@given(LOSSES, st.integers(0, 60))
def test_a_policy_holds_no_state(losses: list[float], cut: int) -> None:
    policy = spike(least=4, window=8, recovery=3, persistent=2)
    whole = Stand(policy)
    whole.run(losses)
    first = Stand(policy)
    first.run(losses[:cut])
    again = Stand(spike(least=4, window=8, recovery=3, persistent=2), state=None)
    again.state = first.state
    again.run(losses[cut:], cut)
    assert again.state == whole.state
    assert first.proposed + again.proposed == whole.proposed


def test_reports_of_other_metrics_alone_are_passed_over() -> None:
    stand = calmed()
    stand.run([3.0, None, 3.0, None, 3.0], 100)
    assert stand.state.run == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 1}, "window: got 1; allowed: a whole number from 2"),
        ({"sigma": 0}, "sigma: got 0; allowed: a finite number above 0"),
        ({"least": 0}, "least: got 0; allowed: a whole number from 2"),
        ({"persistent": 0}, "persistent: got 0; allowed: a whole number from 1"),
        ({"recovery": 0}, "recovery: got 0; allowed: a whole number from 1"),
        ({"first_cut": 1.0}, "first_cut: got 1.0; allowed: a finite number above 0 below 1"),
        ({"second_cut": 0}, "second_cut: got 0; allowed: a finite number above 0 below 1"),
        ({"hold": 0}, "hold: got 0; allowed: a whole number from 1"),
        ({"rewarm": 0.5}, "rewarm: got 0.5; allowed: a whole number from 1"),
        ({"limit": 0}, "limit: got 0; allowed: a whole number from 1"),
        ({"metric": "loss"}, "metric: got 'loss'"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        spike(**fields)
    assert message in str(caught.value)


def test_a_least_number_that_the_window_never_holds_does_not_fit() -> None:
    policy = {"kind": "spike", "window": 32}
    with pytest.raises(InvalidSpec, match=r"0\.least: got 64; allowed: at most the window, 32"):
        parse_spec({"name": "a", "total": 9, "learning_rate": {"peak": 0.1}, "policies": [policy]})
    assert parse_policy({**policy, "least": 32}).misfits(("default",)) == ()


GOOD: dict[str, Any] = {
    "losses": [2.0, 2.1], "bar": None, "run": 0, "began": 0, "rung": 0, "damage": 0, "noted": 0,
    "since": 0, "back": 0, "best": "inf", "best_at": 0,
}  # fmt: skip


def test_a_state_survives_its_plain_form() -> None:
    policy = spike()
    state = SpikeState((2.0, -0.0, 0.1), 2.5, 3, 7, 2, 6, 8, 1, 0, -1.5, 4)
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state
    assert policy.decode(GOOD).best == math.inf


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD if name != "bar"),
        {**GOOD, "run": -1},
        {**GOOD, "losses": 2.0},
        {**GOOD, "bar": "high"},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a spike policy"):
        spike().decode(damaged)
