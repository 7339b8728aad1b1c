"""What is common to the tests of the rules."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def quiet() -> Iterator[None]:
    """Keep the server's lines about thousands of waivers out of a failure's report."""
    logger = logging.getLogger("lrpilot")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)
