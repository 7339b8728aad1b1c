"""Checks of what users pass."""

import json
import math
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, Union

from lrpilot.client import _timing
from lrpilot.client._errors import invalid_argument

Spec: TypeAlias = Union[str, "os.PathLike[str]", Mapping[str, Any], None]
"""A path, a text (YAML of several lines, or JSON), a mapping with the same fields, or none."""


def integer(name: str, got: Any, least: int, most: int, hint: str = "") -> int:
    """Return an integer of any type as an int. Raises InvalidArgument."""
    if type(got) is int and least <= got <= most:
        return got
    try:
        number = operator.index(got)
    except TypeError:
        number = None
    if isinstance(got, bool) or number is None or not least <= number <= most:
        raise invalid_argument(name, got, f"an integer from {least} to {most}{hint}")
    return number


def increment_argument(got: Any) -> int:
    """Return the increment that an adapter was given, in the run's unit. Raises InvalidArgument."""
    return integer("increment", got, 1, _timing.MAX_PROGRESS)


def positive(name: str, got: Any) -> float:
    """Return a finite number above 0 as a float. Raises InvalidArgument."""
    try:
        number = math.nan if isinstance(got, (str, bytes, bool)) else float(got)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.0 < number < math.inf:
        raise invalid_argument(name, got, "a finite number above 0")
    return number


def text(name: str, got: Any) -> str:
    """Return a string that is not empty. Raises InvalidArgument."""
    if not isinstance(got, str) or not got.strip():
        raise invalid_argument(name, got, "a string that is not empty")
    return got


def spec_reader(spec: Spec) -> Callable[[], str]:
    """Return a function that returns the spec as one YAML document; empty: there is none.

    The function raises InvalidArgument where a file cannot be read: rank 0 alone calls it.
    """
    if spec is None:
        return str
    if isinstance(spec, Mapping):
        # JSON is YAML, and needs no package here.
        document = _json(spec)
        return lambda: document
    if isinstance(spec, str) and ("\n" in spec or spec.lstrip().startswith("{")):
        return lambda: spec
    if isinstance(spec, (str, os.PathLike)) and os.fspath(spec):
        return lambda: _read(os.fspath(spec))
    raise invalid_argument("spec", spec, "a path, a text of YAML or JSON, or a mapping")


def _json(spec: Mapping[str, Any]) -> str:
    try:
        return json.dumps(spec, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise invalid_argument("spec", spec, f"what JSON can hold ({error})") from None


def _plain(item: object) -> object:
    if isinstance(item, Mapping):
        return dict(item)
    # Numbers of other packages, such as NumPy's.
    if hasattr(item, "__index__"):
        return operator.index(item)
    if hasattr(item, "__float__"):
        return float(item)
    raise TypeError(f"{item!r} is a {type(item).__name__}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise invalid_argument("spec", path, f"a file that can be read ({error})") from None
