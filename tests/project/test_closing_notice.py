"""What stands at the end of a run of the tests: the time of each suite, and what was not run.

A test whose program is missing is named there, and an error where all are asked for.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """\
import pytest

@pytest.mark.needs_program("no-such-program")
def test_with_the_program():
    raise AssertionError("this needs the program")

def test_without():
    pass
"""


def _run(root: Path, folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    shutil.copy(root / "tests/conftest.py", folder / "conftest.py")
    (folder / "pytest.toml").write_text('[pytest]\nmarkers = ["needs_program(name): x"]\n')
    (folder / "test_it.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env={**os.environ, "LRPILOT_REQUIRE_ALL": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["alone", "workers"])
def test_what_was_not_run_is_said(root: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, output = _run(root, tmp_path, *arguments)
    assert code == 0, output
    assert "1 passed" in output
    assert "NOT RUN" in output
    assert "test_it.py::test_with_the_program needs the program no-such-program" in output


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["alone", "workers"])
def test_where_all_are_asked_for_it_is_an_error(
    root: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    code, output = _run(root, tmp_path, *arguments, LRPILOT_REQUIRE_ALL="1")
    assert code != 0
    assert "1 passed, 1 error" in output
    assert "the program no-such-program is missing" in output


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["alone", "workers"])
def test_the_time_of_each_suite_is_shown(
    root: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "test_slow.py").write_text(
        "import time\n\ndef test_a():\n    time.sleep(0.3)\n\ndef test_b():\n    pass\n"
    )
    _, output = _run(root, tmp_path, *arguments)
    rows = {
        suite: (float(seconds), int(tests))
        for seconds, tests, suite in re.findall(
            r"^ *([0-9.]+) s +(\d+) tests  (.+)$", output, re.MULTILINE
        )
    }
    assert rows["rules"][0] >= 0.3
    assert rows["rules"][1] == 2
    assert rows["."][1] == 1
    assert rows["in all"][1] == 3
