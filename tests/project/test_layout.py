"""The rooms are source roots of one PEP 420 namespace; one file too many breaks every import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = {
    "proto": "v1",
    "sched_core": "core",
    "client": "client",
    "server": "server",
}


@pytest.mark.parametrize("room", ROOMS)
def test_the_namespace_has_no_init_file(root: Path, room: str) -> None:
    # mypy still says Success with such a file, so that nothing else would tell.
    assert not (root / room / "__init__.py").exists()
    assert not (root / room / "lrpilot" / "__init__.py").exists()


@pytest.mark.parametrize(("room", "package"), ROOMS.items())
def test_each_room_holds_its_one_typed_package(root: Path, room: str, package: str) -> None:
    namespace = root / room / "lrpilot"
    held = sorted(path.name for path in namespace.iterdir() if path.name != "__pycache__")
    assert held == [package]
    assert (namespace / package / "__init__.py").is_file()
    assert (namespace / package / "py.typed").is_file()


def test_tests_have_no_init_files(root: Path) -> None:
    assert [str(path) for path in (root / "tests").rglob("__init__.py")] == []


@pytest.mark.parametrize("package", ROOMS.values())
def test_each_room_imports_alone(package: str) -> None:
    code = f"import lrpilot.{package}, sys; print(lrpilot.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"  # a namespace has no file of its own


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("client", ["lrpilot.core", "lrpilot.server", "pydantic", "sqlalchemy", "yaml", "torch"]),
        ("core", ["lrpilot.v1", "lrpilot.client", "lrpilot.server", "grpc", "torch", "sqlalchemy"]),
        ("server", ["lrpilot.client", "torch"]),
    ],
)
def test_importing_a_room_loads_no_more_than_it_may(package: str, absent: list[str]) -> None:
    code = (
        f"import sys, lrpilot.{package}\n"
        f"print(*[name for name in {absent!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
