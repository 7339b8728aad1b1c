"""The committed stubs are what the .proto files say, by the generators that old images can read."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_STUB_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


@pytest.mark.timeout(600)
def test_the_committed_stubs_are_up_to_date(root: Path, tmp_path: Path) -> None:
    command = ["bash", os.fspath(root / "scripts/generate_stubs.sh"), os.fspath(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    generated = {path.name: path.read_text() for path in (tmp_path / "lrpilot/v1").iterdir()}
    committed = {
        path.name: path.read_text()
        for path in (root / "proto/lrpilot/v1").iterdir()
        if path.name.endswith(_STUB_SUFFIXES)
    }
    assert generated
    assert sorted(generated) == sorted(committed)
    stale = [name for name in generated if generated[name] != committed[name]]
    assert stale == [], "run `make proto`"


def test_the_contract_has_a_comment_on_every_field(root: Path) -> None:
    buf = shutil.which("buf")
    assert buf is not None, "buf comes with the development dependencies"
    done = subprocess.run([buf, "lint"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
