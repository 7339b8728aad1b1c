"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOMS = ("lrpilot.core", "lrpilot.client", "lrpilot.server")


def _modules() -> list[str]:
    """Return the names of the modules with examples; only these are imported.

    Adapters have none, and would bring in their frameworks with all that those do on import.
    """
    names = []
    for room in ROOMS:
        package = importlib.import_module(room)
        found = pkgutil.walk_packages(
            package.__path__, prefix=f"{room}.", onerror=lambda name: None
        )
        names += [room, *(info.name for info in found)]
    return [name for name in names if ">>>" in _source(name)]


def _source(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", _modules())
def test_the_examples_of_the_module_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples() -> None:
    assert _modules()
