"""Directed rounds on the real servers: values worked out by hand, and no violation."""

from typing import Any

import pytest

from tests.crash.directed import ROUNDS, play

STORES = {"sqlite": (), "postgresql": ("postgres",)}
"""Programs that a store needs."""

PROGRAMS = {"power lost after an answer": ("strace",)}


def param(name: str, *values: str) -> Any:
    """Return a case for a round, which needs the programs of its servers."""
    programs = (*PROGRAMS.get(name, ()), *STORES[ROUNDS[name].store])
    marks = [pytest.mark.needs_program(*programs)] if programs else []
    return pytest.param(name, *values, marks=marks)


@pytest.mark.parametrize("name", [param(name) for name in ROUNDS])
def test_directed_round(name: str) -> None:
    violations, failure = play(name)
    assert (violations, failure) == ([], "")
