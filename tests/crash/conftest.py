"""What holds for the tests of the crash laboratory."""

import pytest

# Its rounds state what they expect in modules that are no tests themselves.
pytest.register_assert_rewrite("tests.crash.directed")
