"""Every kind of fault once over each store that it can befall; `make torture` is the long form.

The rounds of a store are played in one laboratory, one after the other.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.crash.cluster import StoreKind
from tests.crash.faults import FAULTS, kinds
from tests.crash.laboratory import Laboratory, has_namespaces

SEED = 20_000

TRIES = 3
"""Rounds within which a fault must take hold: one may come when nobody does what it hinders."""


def _kinds(store: StoreKind) -> list[Any]:
    cases = []
    for number, name in enumerate(kinds(store)):
        marks = [pytest.mark.needs_program(*FAULTS[name].programs)] if FAULTS[name].programs else []
        if FAULTS[name].namespaces:
            marks.append(pytest.mark.needs_namespaces)
        cases.append(pytest.param(name, SEED + TRIES * number, marks=marks, id=name))
    return cases


def _laboratory(store: StoreKind) -> Iterator[Laboratory]:
    with Laboratory(store, namespaces=has_namespaces()) as laboratory:
        yield laboratory


@pytest.fixture(scope="module")
def on_sqlite() -> Iterator[Laboratory]:
    """A laboratory with one server on SQLite."""
    yield from _laboratory("sqlite")


@pytest.fixture(scope="module")
def on_postgresql() -> Iterator[Laboratory]:
    """A laboratory with several servers on PostgreSQL."""
    yield from _laboratory("postgresql")


@pytest.mark.parametrize(("fault", "seed"), _kinds("sqlite"))
def test_one_server(on_sqlite: Laboratory, fault: str, seed: int) -> None:
    _play(on_sqlite, fault, seed)


@pytest.mark.needs_program("postgres")
@pytest.mark.parametrize(("fault", "seed"), _kinds("postgresql"))
def test_several_servers(on_postgresql: Laboratory, fault: str, seed: int) -> None:
    _play(on_postgresql, fault, seed)


def _play(laboratory: Laboratory, fault: str, seed: int) -> None:
    """Play rounds until the fault takes hold in one; none may break the promise."""
    for number in range(TRIES):
        result = laboratory.play(seed + number, fault)
        text = "\n".join(result.violations)
        assert not result.violations, f"{text}\nevidence: {result.folder}\nagain: {result.command}"
        assert result.recovered
        if result.hit:
            return
    pytest.fail(f"{fault!r} did not take hold in {TRIES} rounds")
