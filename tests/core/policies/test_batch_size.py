"""The policy that follows the batch size: one factor at a time, up and down."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpilot.core import _canonical
from lrpilot.core._changes import Change, EndOwn, Multiply
from lrpilot.core._errors import InvalidState
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import BatchSize, BatchSizeSpec, BatchSizeState, Observation
from tests.core.policies.checks import refusal
from tests.core.policies.stand import Stand


def stand(delay: int = 1, **fields: Any) -> Stand:
    spec = parse_policy({"kind": "batch-size", **fields})
    assert isinstance(spec, BatchSizeSpec)
    return Stand(BatchSize(spec, 1), delay)


def feed(
    policy: Stand, batches: Sequence[int | None], loss: float | None = 2.0
) -> list[tuple[int, Change]]:
    """Feed one batch size a step; return what is proposed on which."""
    for n, batch in enumerate(batches):
        policy.see(Observation(n, loss, batch=batch))
    return policy.proposed


def test_it_fires_at_exactly_the_stated_step_and_leaves_one_factor() -> None:
    found = feed(stand(), [256, 256, 512, 512, 1024, 256, 256, 128])
    assert found == [
        (2, EndOwn("global batch 512, before 256")),
        (2, Multiply(math.sqrt(2.0), "global batch 512, before 256: LR times sqrt(512 / 256)")),
        (4, EndOwn("global batch 1024, before 512")),
        (4, Multiply(2.0, "global batch 1024, before 512: LR times sqrt(1024 / 256)")),
        (5, EndOwn("global batch 256, before 1024")),
        (7, EndOwn("global batch 128, before 256")),
        (7, Multiply(math.sqrt(0.5), "global batch 128, before 256: LR times sqrt(128 / 256)")),
    ]


def test_it_does_not_fire_while_the_batch_stays() -> None:
    assert feed(stand(), [256] * 100) == []


def test_linear_takes_the_whole_ratio() -> None:
    ((_, ends), (_, change)) = feed(stand(scale="linear"), [300, 100])
    assert isinstance(ends, EndOwn)
    assert change == Multiply(100 / 300, "global batch 100, before 300: LR times 100 / 300")


def test_a_reference_that_is_set_is_what_the_base_is_meant_for() -> None:
    found = feed(stand(reference=64), [256, 64])
    assert [(n, change.action) for n, change in found] == [
        (0, "end own"), (0, "multiply"), (1, "end own"),
    ]  # fmt: skip
    assert feed(stand(reference=64), [64, 64]) == []


def test_of_the_changes_within_a_delay_only_the_last_counts() -> None:
    found = feed(stand(delay=4), [1, 2, 3, 4, 5, 6, 7, 8])
    assert [(n, change.action) for n, change in found] == [
        (1, "end own"), (1, "multiply"), (5, "end own"), (5, "multiply"),
    ]  # fmt: skip
    last = found[-1][1]
    assert isinstance(last, Multiply)
    assert last.factor == math.sqrt(6.0)


@pytest.mark.parametrize("nothing", [None, 0])
def test_a_step_without_a_batch_changes_nothing(nothing: int | None) -> None:
    policy = stand()
    assert feed(policy, [nothing, 256, nothing, 256]) == []
    assert policy.state == BatchSizeState(256, 256)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([None, 64, 128, 256]), max_size=30), st.floats())
def test_the_loss_has_no_part_in_it(batches: list[int | None], loss: float) -> None:
    assert feed(stand(2), batches, loss) == feed(stand(2), batches, None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=30), st.booleans())
def test_the_factor_in_force_is_that_of_the_last_batch(batches: list[int], linear: bool) -> None:
    factor = 1.0
    for _, change in feed(stand(scale="linear" if linear else "sqrt"), batches):
        if isinstance(change, EndOwn):
            factor = 1.0
        else:
            assert isinstance(change, Multiply)
            assert factor == 1.0
            factor = change.factor
    ratio = batches[-1] / batches[0]
    assert factor == (ratio if linear else math.sqrt(ratio))


def test_the_defaults() -> None:
    spec = parse_policy({"kind": "batch-size"})
    assert spec.model_dump() == {
        "kind": "batch-size", "mode": "act", "scale": "sqrt", "reference": None,
    }  # fmt: skip
    assert spec.quiet == frozenset()
    assert spec.needs_feedback


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("scale", "cubic", "one of sqrt, linear"),
        ("reference", 0, "a whole number from 1 to 2**53"),
        ("reference", 1.5, "a whole number from 1 to 2**53"),
    ],
)
def test_a_broken_field_is_refused(name: str, value: Any, allowed: str) -> None:
    assert refusal("batch-size", **{name: value}) == (name, repr(value), allowed)


@pytest.mark.parametrize("state", [BatchSizeState(None, None), BatchSizeState(256, 2**53)])
def test_a_state_survives_its_plain_form(state: BatchSizeState) -> None:
    policy = stand().policy
    data = _canonical.to_bytes(policy.encode(state))
    assert policy.decode(_canonical.from_bytes(data)) == state


@pytest.mark.parametrize(
    "damaged",
    [
        {"reference": 1},
        {"current": 1},
        {"reference": -1, "current": 1},
        {"reference": 1.0, "current": 1},
        {"reference": 0, "current": 1},
        {"reference": 1, "current": None},
        [],
    ],
    ids=repr,
)
def test_a_damaged_state_is_refused(damaged: Any) -> None:
    with pytest.raises(InvalidState, match="not the state of a batch-size policy"):
        stand().policy.decode(damaged)
