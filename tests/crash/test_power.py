"""A loss of power takes what was not synced, and nothing else."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.power import PowerLoss

pytestmark = pytest.mark.needs_program("strace")

WRITER = """
import os, sys
input()
old = os.open("old", os.O_RDWR)
os.pwrite(old, b"SYNCED", 0)
os.fdatasync(old)
os.pwrite(old, b"lost", 0)
new = os.open("new", os.O_RDWR | os.O_CREAT)
os.pwrite(new, b"abcdef", 0)
os.ftruncate(new, 3)
os.pwrite(new, b"XY", 5)
os.fsync(new)
os.ftruncate(new, 0)
os.open("never", os.O_RDWR | os.O_CREAT)
print("done", flush=True)
input()
"""


@contextmanager
def writer(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    program = [sys.executable, "-c", WRITER]
    with subprocess.Popen(
        program, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


def go_on(process: "subprocess.Popen[str]") -> None:
    """Let a writer write, and wait until it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def test_what_was_not_synced_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "old").write_bytes(b"untouched")
    with writer(folder) as process:
        power = PowerLoss(process.pid, folder)
        go_on(process)
        process.kill()
        process.wait()
        assert power.cut() == 2
        power.close()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "old": b"SYNCEDhed",
        "new": b"abc\0\0XY",
    }


def test_a_process_goes_on_that_is_no_longer_watched(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "old").write_bytes(b"untouched")
    with writer(folder) as process:
        PowerLoss(process.pid, folder).close()
        go_on(process)
    assert (folder / "old").read_bytes() == b"lostEDhed"
