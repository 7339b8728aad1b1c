"""The policy that watches the gain per decade: what it fits, when it speaks, what it proposes."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import BeginDecay, Multiply
from lrpilot.core._errors import InvalidState
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import (
    SlowConvergence,
    SlowConvergenceSpec,
    SlowConvergenceState,
)
from tests.core.policies.checks import assert_one_changes_nothing, refusal
from tests.core.policies.stand import FLAT, Stand, StandView

# Where parts 28 to 33 of a decade begin: the first whole number past 10 ** (k / 16).
BORDERS = [57, 65, 75, 87, 100, 116]


def stand(
    delay: int = 1, view: Callable[[int], StandView] = lambda _n: StandView(), **fields: Any
) -> Stand:
    spec = parse_policy({"kind": "slow-convergence", **fields})
    assert isinstance(spec, SlowConvergenceSpec)
    return Stand(SlowConvergence(spec, 1), delay, view)


def decades(gain: float, length: int) -> list[float]:
    """Return a loss that falls by `gain` per decade; step 0 has none to speak of."""
    return [20.0, *(10.0 - gain * math.log10(n) for n in range(1, length))]


def test_it_fires_at_exactly_the_stated_step_with_a_higher_peak() -> None:
    # 86 losses, of the steps 1 to 86, are not enough; 99 are.
    found = stand(after=87, least_gain=0.1).run([3.0] * 200)
    reason = (
        "loss falls by 0 per decade of progress over the last 16/16 of a decade before 100, "
        "less than 0.1 (99 losses); 0% of the run: a higher peak"
    )
    assert found == [(100, Multiply(1.25, reason, max_lr=(1.25e-3,)))]


def test_it_fires_with_a_steeper_decay_from_half_of_the_run_on() -> None:
    found = stand(8, lambda _n: StandView(total=200), after=87).run([3.0] * 200)
    ((n, change),) = found
    assert n == 100
    assert isinstance(change, BeginDecay)
    assert (change.length, change.style) == (92, "minus_sqrt")
    assert change.reason.endswith("(99 losses); 50% of the run: a steeper decay")


@pytest.mark.parametrize(("gain", "fires"), [(0.09, True), (0.11, False), (1.0, False)])
def test_it_fires_below_the_least_gain_and_not_above(gain: float, fires: bool) -> None:
    assert bool(stand(after=50).run(decades(gain, 2000))) is fires


def test_a_run_that_follows_the_published_law_is_not_called_slow() -> None:
    # One step is 4 million tokens; a run of 8e10 of them.
    losses = [1.69 + 406.4 / 1e9**0.34 + 410.7 / (4e6 * (n + 1)) ** 0.28 for n in range(20_000)]
    assert stand().run(losses) == []


def test_only_the_second_half_of_the_decades_is_read() -> None:
    # A steep beginning hides nothing: from 10 on the loss is flat.
    losses = [100.0 / (n + 1) if n < 10 else 3.0 for n in range(120)]
    ((n, change),) = stand(after=87).run(losses)
    assert n == 100
    assert "falls by 0 per decade of progress over the last 16/16" in change.reason


@pytest.mark.parametrize(("after", "n", "width"), [(56, 57, 14), (57, 65, 15), (99, 100, 16)])
def test_the_part_in_the_middle_is_read(after: int, n: int, width: int) -> None:
    ((at, change),) = stand(after=after).run([3.0] * 120)
    assert at == n
    assert f"over the last {width}/16 of a decade before {n}," in change.reason


def test_it_speaks_once_and_then_waits() -> None:
    found = stand(after=50, again=35).run([3.0] * 117)
    # 56 losses seen, then at least 91.
    assert [n for n, _ in found] == [57, 100]
    assert len(stand(after=50).run([3.0] * 5000)) == 1


def test_it_judges_only_where_a_part_ends() -> None:
    found = stand(after=50, again=1).run([3.0] * 117)
    assert [n for n, _ in found] == BORDERS


def test_warmup_counts_nowhere() -> None:
    def view(n: int) -> StandView:
        return StandView(phase=replace(FLAT, name="warmup" if n <= 30 else "stable"))

    policy = stand(view=view, after=50)
    policy.run([3.0] * 31)
    assert policy.state == policy.policy.initial()
    (found, *_) = policy.run([3.0] * 100, begin=31)
    assert found[0] == 87


def test_it_is_silent_past_the_end() -> None:
    ended = StandView(phase=replace(FLAT, name="ended"))
    assert stand(view=lambda _n: ended, after=50).run([3.0] * 200) == []
    assert stand(view=lambda n: StandView(total=n), after=50).run([3.0] * 200) == []


def test_the_peak_is_raised_once_at_most() -> None:
    at_ceiling = StandView(adjusted=(1.25e-3,))
    assert stand(view=lambda _n: at_ceiling, after=50).run([3.0] * 200) == []
    below = StandView(adjusted=(1.2e-3,))
    assert len(stand(view=lambda _n: below, after=50).run([3.0] * 200)) == 1


def test_the_gain_is_that_of_a_fit_by_least_squares() -> None:
    losses = [3.0 * math.sin(n) for n in range(101)]
    ((n, change),) = stand(after=87, least_gain=1e6).run(losses)
    assert n == 100
    parts: dict[int, list[Fraction]] = {}
    for step in range(10, 100):
        part = max(k for k in range(16, 32) if step**16 >= 10**k)
        parts.setdefault(part, []).append(Fraction(losses[step]))
    inner = {k: sorted(seen)[1:-1] if len(seen) > 2 else seen for k, seen in parts.items()}
    points = [(Fraction(k, 16), sum(seen) / len(seen)) for k, seen in inner.items()]
    x = sum(at for at, _ in points) / len(points)
    slope = sum((at - x) * mean for at, mean in points) / sum((at - x) ** 2 for at, _ in points)
    assert f"loss falls by {float(-slope):.3g} per decade" in change.reason


@pytest.mark.parametrize("loss", [1e6, -1e6, 0.0])
@pytest.mark.parametrize("n", [200, 700, 1500])
def test_one_corrupted_batch_moves_nothing(n: int, loss: float) -> None:
    losses = decades(0.3, 2000)
    losses[n] = loss
    assert stand(after=50).run(losses) == []


@pytest.mark.parametrize("loss", [1e308, -1e308])
def test_means_that_overflow_are_left_out(loss: float) -> None:
    policy = stand(after=50)
    policy.run([loss] * 200)
    assert all(math.isfinite(mean) for mean in policy.state.means)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([1.0, 2.0]), st.floats(-5.0, 5.0)), max_size=120),
    st.integers(0, 120),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from([0.0, 0.1, 10.0]),
)
def test_one_loss_that_is_no_number_changes_no_later_decision(
    losses: list[float], where: int, broken: float, least_gain: float
) -> None:
    def fresh() -> Stand:
        return stand(2, least_gain=least_gain, after=5, again=3)

    assert_one_changes_nothing(fresh, losses, where, broken)


def test_the_defaults() -> None:
    spec = parse_policy({"kind": "slow-convergence"})
    assert spec.model_dump() == {
        "kind": "slow-convergence",
        "mode": "advise",
        "least_gain": 0.1,
        "after": 1000,
        "again": 10_000,
        "factor": 1.25,
    }
    assert spec.quiet == {"hold", "dip", "stage change"}
    assert not spec.needs_feedback


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("mode", "shout", "one of act, advise, off"),
        ("least_gain", -0.1, "a finite number from 0 to 1e+100"),
        ("after", 0, "a whole number from 1 to 2**53"),
        ("again", 0, "a whole number from 1 to 2**53"),
        ("factor", 1.0, "a finite number above 1 to 2"),
    ],
)
def test_a_broken_field_is_refused(name: str, value: Any, allowed: str) -> None:
    assert refusal("slow-convergence", **{name: value}) == (name, repr(value), allowed)


GOOD: dict[str, Any] = {
    "first": 0, "parts": [3, 4], "means": [1.0, 2.0], "part": 5, "total": 0.5, "count": 1,
    "seen": 9, "silent_until": 0,
}  # fmt: skip


def test_a_state_survives_its_plain_form() -> None:
    policy = stand().policy
    state = SlowConvergenceState(2, (3, 4), (-0.0, 1e308), 5, -0.0, math.inf, -0.0, 1, 9, 10_009)
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state


@pytest.mark.parametrize(
    "damaged",
    [
        *({name: value for name, value in GOOD.items() if name != lost} for lost in GOOD),
        *({**GOOD, name: None} for name in GOOD),
        {**GOOD, "count": 0},
        {**GOOD, "means": [1.0]},
        {**GOOD, "parts": [3, -4]},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a slow-convergence policy"):
        stand().policy.decode(damaged)
