"""The kinds of value that a spec field can hold, each with the words for what is allowed.

A rule reads a value into its one form or refuses it. Nothing is guessed: a bool is no
number, a string is no number, and NaN and the infinities are refused everywhere.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

LARGEST_PROGRESS = 2**53
"""Up to here every whole number is a float64, which the schedules' expressions rely on."""

LARGEST_RATE = 1e100
"""Keeps every schedule finite: a rate is multiplied by a progress before it is divided."""

_PERCENT = re.compile(r"(?P<number>\d{1,3}(\.\d{0,20})?|\.\d{1,20}) ?%", re.ASCII)
# As many decimals as a float's shortest form can have.
_DURATION = re.compile(
    r"(?P<number>\d{1,15}(\.\d{0,25})?(e[+-]?\d{1,3})?) ?(?P<unit>ms|s|m|h)", re.ASCII
)
_SECONDS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}


class SpecModel(BaseModel):
    """Base of everything in a spec: frozen, and without room for unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Words:
    """What a composite field allows, in words, and a legal value."""

    allowed: str
    example: Any = None


@dataclass(frozen=True, slots=True)
class Rule:
    """How a plain field is read."""

    allowed: str
    """What is allowed, as one phrase."""
    read: Callable[[Any], Any]
    """Returns the value in its one form; raises ValueError."""
    example: Any
    """A legal value; it stands in for a broken one while the other fields are checked."""
    options: tuple[str, ...] = ()
    """The words to choose from, for suggestions."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        del source, handler  # The rule alone decides.
        return core_schema.no_info_plain_validator_function(self.read)


def number(
    *, low: float = 0.0, high: float = LARGEST_RATE, open_low: bool = False, open_high: bool = False
) -> Rule:
    """Return the rule of a finite number between `low` and `high`."""

    def read(value: Any) -> float:
        x = _real(value)
        if x < low or x > high or (open_low and x == low) or (open_high and x == high):
            raise ValueError("out of range")
        return x

    lower = f"{'above' if open_low else 'from'} {low:g}"
    upper = f"{'below' if open_high else 'to'} {high:g}"
    example = (low + min(high, low + 1.0)) / 2 if open_low else low
    return Rule(f"a finite number {lower} {upper}", read, example)


def count(low: int = 0) -> Rule:
    """Return the rule of a whole number from `low`; 1e6 is whole, 1.5 is not."""

    def read(value: Any) -> int:
        return _whole(value, low)

    return Rule(f"a whole number from {low} to 2**53", read, low)


def one_of(*options: str) -> Rule:
    """Return the rule of one word out of `options`."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError("not an option")
        return value

    return Rule(f"one of {', '.join(options)}", read, options[0], options)


def flag() -> Rule:
    """Return the rule of true or false; a number or a word is neither."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("not a bool")  # noqa: TRY004 - pydantic collects ValueError alone.
        return value

    return Rule("true or false", read, False)


def text(pattern: str, allowed: str, example: str) -> Rule:
    """Return the rule of a string that `pattern` matches as a whole."""
    compiled = re.compile(pattern)

    def read(value: Any) -> str:
        if not isinstance(value, str) or compiled.fullmatch(value) is None:
            raise ValueError("no match")
        return value

    return Rule(allowed, read, example)


METRIC = text(
    r"[A-Za-z0-9._/-]{1,64}",
    "loss, or the name of a validation loss: 1 to 64 of a-z A-Z 0-9 . _ / -",
    "loss",
)
"""What a policy reads."""


def is_metric(name: str) -> bool:
    """Return whether `METRIC` reads a name."""
    try:
        METRIC.read(name)
    except ValueError:
        return False
    return True


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("not a number")  # noqa: TRY004 - pydantic collects ValueError alone.
    try:
        x = float(value)
    except OverflowError as error:
        raise ValueError("too large") from error
    if not math.isfinite(x):
        raise ValueError("not finite")
    return x


def _whole(value: Any, low: int) -> int:
    if not _real(value).is_integer() or not low <= int(value) <= LARGEST_PROGRESS:
        raise ValueError("not a whole number in range")
    return int(value)


def _read_length(value: Any) -> int | float | str:
    if isinstance(value, str):
        share(value)
        return value.replace(" ", "")
    x = _real(value)
    # Compared as it stands: the float nearest to 2**53 + 1 is 2**53.
    if not 0 <= value <= LARGEST_PROGRESS:
        raise ValueError("out of range")
    return int(x) if x.is_integer() else x


LENGTH = Rule(
    'a length in the unit from 0 to 2**53, or a share of decay.end from "0%" to "100%"',
    _read_length,
    0,
)
"""A length of warmup or anneal. A share stays as written until the end is known."""


def share(percentage: str) -> float:
    """Return "2%" as the float nearest to 0.02; raises ValueError."""
    match = _PERCENT.fullmatch(percentage)
    if match is None:
        raise ValueError("not a percentage")
    fraction = Fraction(match["number"]) / 100
    if fraction > 1:
        raise ValueError("more than 100%")
    return float(fraction)


def length_of(length: int | float | str, end: int) -> int | float:
    """Return a length in the unit; a share is of `end` and stays a float.

    Megatron-LM multiplies its warmup fraction with the decay length in the same way.
    """
    return share(length) * end if isinstance(length, str) else length


def _read_duration(value: Any) -> float:
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError("not a duration")
        value = Fraction(match["number"]) * _SECONDS[match["unit"]]
        if value > 1e9:
            raise ValueError("out of range")
        value = float(value)
    x = _real(value)
    if not 0 < x <= 1e9:
        raise ValueError("out of range")
    return x


DURATION = Rule(
    'a time above 0, such as "500ms", "30s", "2m" or "1h"; a bare number counts seconds',
    _read_duration,
    1.0,
)
"""A time in seconds."""


def duration_text(seconds: float) -> str:
    """Return a time as `DURATION` reads it back, to the bit."""
    return f"{int(seconds) if seconds.is_integer() else seconds!r}s"
