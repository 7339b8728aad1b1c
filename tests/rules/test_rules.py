"""Each rule holds, and its case notices when it is broken."""

import pytest

from lrpilot import core
from lrpilot.server._live_run import CorruptLog
from tests.rules.cases import CASES
from tests.rules.mutants import MUTANTS
from tests.rules.world import BrokenPromise


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    CASES[name]()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    mutant.apply(monkeypatch)
    with pytest.raises((BrokenPromise, CorruptLog, core.LrpilotError)):
        CASES[mutant.noticed_by]()


def test_each_rule_was_broken() -> None:
    assert {mutant.noticed_by for mutant in MUTANTS.values()} == set(CASES)
