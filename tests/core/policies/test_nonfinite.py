"""The nonfinite policy by itself."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrpilot.core._changes import Direct, Hold
from lrpilot.core._errors import InvalidSpec, InvalidState
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import Nonfinite, NonfiniteSpec, NonfiniteState, Observation
from tests.core.policies.stand import Stand

NAN, INF = math.nan, math.inf


def nonfinite(**fields: Any) -> Nonfinite:
    spec = parse_policy({"kind": "nonfinite", **fields})
    assert isinstance(spec, NonfiniteSpec)
    return Nonfinite(spec, 1)


def test_it_only_advises_unless_told_otherwise_and_is_never_quiet() -> None:
    spec = parse_policy({"kind": "nonfinite"})
    assert spec.mode == "advise"
    assert spec.quiet == frozenset()
    assert not spec.needs_feedback


def test_the_third_in_a_row_holds_and_asks_for_a_rollback() -> None:
    stand = Stand(nonfinite(factor=0.3, limit=2), delay=8)
    assert stand.run([1.0, 2.0, NAN, INF, -INF]) == [
        (
            4,
            Hold(
                80,
                "loss -inf at 4: 3 in a row are not finite, the first at 2 (streak 3);"
                " held until 92",
            ),
        ),
        (
            4,
            Direct(
                "rollback",
                "loss -inf at 4: 3 in a row are not finite, the first at 2 (streak 3);"
                " back to before 2",
                before=2,
                factor=0.3,
                limit=2,
                until=4,
            ),
        ),
    ]


@pytest.mark.parametrize(
    "losses", [[1.0, NAN, 1.0, 1.0], [NAN, NAN, 1.0, NAN, NAN, 1.0], [1.0] * 9, [NAN, INF]]
)
def test_fewer_in_a_row_change_nothing(losses: list[float]) -> None:
    assert Stand(nonfinite()).run(losses) == []


def test_a_finite_loss_starts_the_count_afresh() -> None:
    stand = Stand(nonfinite(streak=2))
    stand.run([NAN, 1e300])
    assert stand.state == NonfiniteState(0, 0, 0)
    stand.run([NAN], 2)
    assert (stand.state.seen, stand.state.began) == (1, 2)


def test_reports_of_other_metrics_alone_neither_count_nor_reset() -> None:
    proposed = Stand(nonfinite(streak=2)).run([NAN, None, NAN])
    assert [n for n, _ in proposed] == [2, 2]


def test_skipped_updates_count() -> None:
    policy = nonfinite()
    assert policy.reads_skipped
    stand = Stand(policy)
    stand.run([1.0])
    for _ in range(2):
        assert stand.see(Observation(1, INF, is_skipped=True)) == ()
    assert len(stand.see(Observation(1, INF))) == 2
    assert stand.state.began == 1


def test_nothing_is_proposed_while_the_hold_lasts_and_again_after_it() -> None:
    stand = Stand(nonfinite(hold=10), delay=4)
    assert {n for n, _ in stand.run([NAN] * 40)} == {2, 16, 30}
    rollbacks = [change for _, change in stand.proposed if isinstance(change, Direct)]
    # The damage did not move.
    assert [change.before for change in rollbacks] == [0, 0, 0]


def test_what_ended_within_the_hold_is_not_asked_for_again() -> None:
    stand = Stand(nonfinite(hold=10), delay=4)
    assert {n for n, _ in stand.run([NAN] * 10 + [1.0] * 30)} == {2}


def test_a_hold_that_is_not_given_is_ten_delays_in_every_unit() -> None:
    stand = Stand(nonfinite(streak=1), delay=4096)
    stand.see(Observation(1_000_000, NAN))
    (_, hold), _ = stand.proposed
    assert isinstance(hold, Hold)
    assert hold.length == 40_960
    assert stand.state.held_until == 1_000_000 + 4096 + 40_960


@given(st.lists(st.floats(), max_size=60))
def test_every_proposal_has_a_streak_behind_it(losses: list[float]) -> None:
    for n, change in Stand(nonfinite(streak=2, hold=3)).run(losses):
        before = change.before if isinstance(change, Direct) else n - 1
        assert before is not None
        assert n - before >= 1
        assert not any(math.isfinite(loss) for loss in losses[before : n + 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"streak": 0}, "streak: got 0; allowed: a whole number from 1"),
        ({"hold": 0}, "hold: got 0; allowed: a whole number from 1"),
        ({"hold": "10%"}, "hold: got '10%'; allowed: a whole number from 1"),
        ({"factor": 1.0}, "factor: got 1.0; allowed: a finite number above 0 below 1"),
        ({"limit": 1.5}, "limit: got 1.5; allowed: a whole number from 1"),
        ({"mode": "on"}, "mode: got 'on'; allowed: one of act, advise, off"),
        ({"patience": 3}, "patience: got 3"),
    ],
)
def test_fields_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        nonfinite(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "damage", [{"seen": -1}, {"seen": 1.0}, {"began": None}, {"held_until": "7"}, None]
)
def test_a_damaged_state_is_refused(damage: Mapping[str, Any] | None) -> None:
    policy = nonfinite()
    data = {} if damage is None else {**policy.encode(policy.initial()), **damage}
    with pytest.raises(InvalidState, match="nonfinite"):
        policy.decode(data)
