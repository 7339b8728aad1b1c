"""A limit of the LR in a policy's fields: one number for all groups, or one for each."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from lrpilot.core._fields import Rule, number
from lrpilot.core.policies._interface import Misfit

Rates: TypeAlias = float | tuple[float, ...]

_RATE = number()


def _read(value: Any) -> Rates:
    if isinstance(value, (list, tuple)):
        return tuple(_RATE.read(item) for item in value)
    rate: float = _RATE.read(value)
    return rate


RATES = Rule(f"{_RATE.allowed}, or a list with one for each group", _read, 0.0)


def spread(rates: Rates, groups: int) -> tuple[float, ...]:
    """Return the limit of each group."""
    return rates if isinstance(rates, tuple) else (rates,) * groups


def misfits(field: str, rates: Rates | None, group_names: Sequence[str]) -> tuple[Misfit, ...]:
    """Refuse a list of another length than the groups."""
    if isinstance(rates, tuple) and len(rates) != len(group_names):
        wanted = f"one number, or a list of {len(group_names)}: one for each group"
        return (Misfit(field, list(rates), wanted),)
    return ()
