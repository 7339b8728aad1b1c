"""Each rule holds, and each case notices when its rule is broken."""

import pytest

from tests.rules.cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    CASES[name]()
