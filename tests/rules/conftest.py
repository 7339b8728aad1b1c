"""What is common to the tests of the rules."""

import logging
from collections.abc import Iterator

import pytest

from lrpilot.core import _state
from lrpilot.server import _changes


@pytest.fixture(autouse=True)
def small_and_quiet() -> Iterator[None]:
    """Keep marks at every third loss, previews short, and waivers out of a failure's report."""
    logger = logging.getLogger("lrpilot")
    logger.setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_state, "MARK_EVERY", 3)
        patch.setattr(_changes, "PREVIEW_POINTS", 3)
        yield
    logger.setLevel(logging.NOTSET)
