"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

ROOMS = ("lrpilot.core", "lrpilot.client", "lrpilot.server")


def _modules() -> list[str]:
    names = []
    for room in ROOMS:
        package = importlib.import_module(room)
        found = pkgutil.walk_packages(package.__path__, prefix=f"{room}.")
        # What runs when it is imported is no place for examples.
        names += [room, *(info.name for info in found if not info.name.endswith("__main__"))]
    return [name for name in names if ".migrations" not in name]


@pytest.mark.parametrize("name", _modules())
def test_the_examples_of_the_module_are_true(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in _modules()]
    examples = sum(len(test.examples) for module in modules for test in finder.find(module))
    assert examples > 0
