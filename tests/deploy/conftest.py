"""What tests of deploy/ share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root(request: pytest.FixtureRequest) -> Path:
    """The repository."""
    return request.config.rootpath
