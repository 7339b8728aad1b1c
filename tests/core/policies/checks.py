"""What the tests of several policies ask."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lrpilot.core._errors import InvalidSpec
from lrpilot.core._spec import parse_policy
from tests.core.policies.stand import Stand


def refusal(kind: str, **fields: Any) -> tuple[str, str, str]:
    """Return (field, what it got, what is allowed) of the one field that is refused."""
    with pytest.raises(InvalidSpec) as refused:
        parse_policy({"kind": kind, **fields})
    (violation,) = refused.value.violations
    return violation.field.removeprefix("policies.0."), violation.got, violation.allowed


def assert_one_changes_nothing(
    stand: Callable[[], Stand], losses: Sequence[float], where: int, broken: float
) -> None:
    """Assert that a loss that is no number leaves what a step without a loss leaves."""

    def run(inserted: float | None) -> tuple[list[Any], Any]:
        fresh = stand()
        return fresh.run([*losses[:where], inserted, *losses[where:]]), fresh.state

    assert run(broken) == run(None)
