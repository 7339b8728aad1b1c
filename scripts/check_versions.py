"""Runs the client's tests on the oldest and newest versions of what it stands on.

    python scripts/check_versions.py            every combination: long
    python scripts/check_versions.py --floors   the oldest of everything, with this Python

Training images pin Python, grpcio and protobuf; the client has to run on what they have. Each
Python gets a virtual environment with the client alone, as `pip install lrpilot` brings it, and
then each pair of grpcio and protobuf. Pythons are looked for on PATH, as `python3.10` to
`python3.13`, or given by their paths in the environment variable PYTHONS. Tests that need torch run
with this Python alone, where torch is installed in the version of constraints.txt.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
VENVS = ROOT / ".cache" / "versions"

OLDEST_GRPCIO, OLDEST_PROTOBUF = "1.54.3", "4.21.12"
PROTOBUFS = (OLDEST_PROTOBUF, "5.29.*", "6.31.*", "<8")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
WITH_OLDEST_GRPCIO = ("3.10", "3.11")
"""Pythons that grpcio 1.54.3 has wheels for."""

ADAPTERS = {
    "accelerate": "accelerate",
    "huggingface": "transformers",
    "lightning": "lightning",
    "megatron": "megatron",
    "torch": "torch",
}

TOOLS = (
    "hypothesis>=6.100",
    "matplotlib>=3.8",
    "numpy",
    "pytest>=9",
    "pytest-asyncio>=1.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
)


@dataclass(frozen=True)
class Row:
    """One combination."""

    python: str
    interpreter: str
    grpcio: str
    protobuf: str


def main() -> int:
    """Run the rows and print a table; return 1 where any failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--floors", action="store_true", help="the oldest versions alone")
    chosen = parser.parse_args()
    rows = list(_floors() if chosen.floors else _all())
    lines, failed = [], 0
    for number, row in enumerate(rows, 1):
        print(f"[{number}/{len(rows)}] Python {row.python}, grpcio {row.grpcio}, ", end="")
        print(f"protobuf {row.protobuf} ...", flush=True)
        began_s = time.monotonic()
        versions, passed, summary = _check(row)
        failed += not passed
        lines.append(
            f"| {row.python} | {versions['grpcio']} | {versions['protobuf']} | {summary} |"
        )
        print(f"    {summary} ({time.monotonic() - began_s:.0f} s)", flush=True)
    print("\n| Python | grpcio | protobuf | tests of the client |\n| --- | --- | --- | --- |")
    print("\n".join(lines))
    found = {row.python for row in rows}
    missing = [version for version in PYTHONS if version not in found]
    if missing and not chosen.floors:
        print(f"Not present here, and not run: Python {', '.join(missing)}")
    return 1 if failed or not rows else 0


def _floors() -> Iterator[Row]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    grpcio = OLDEST_GRPCIO if version in WITH_OLDEST_GRPCIO else "<2"
    yield Row(version, sys.executable, grpcio, OLDEST_PROTOBUF)


def _all() -> Iterator[Row]:
    for version, interpreter in _interpreters().items():
        if version in WITH_OLDEST_GRPCIO:
            yield Row(version, interpreter, OLDEST_GRPCIO, OLDEST_PROTOBUF)
            yield Row(version, interpreter, OLDEST_GRPCIO, "<8")
        for protobuf in PROTOBUFS:
            yield Row(version, interpreter, "<2", protobuf)


def _interpreters() -> dict[str, str]:
    """Return version to interpreter of each Python that can make a virtual environment."""
    given = os.environ.get("PYTHONS", "").split()
    candidates = given or [sys.executable, *(f"python{version}" for version in PYTHONS)]
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    found: dict[str, str] = {}
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        said = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if said.returncode == 0 and said.stdout.strip() in PYTHONS:
            found.setdefault(said.stdout.strip(), path)
    return dict(sorted(found.items()))


def _check(row: Row) -> tuple[dict[str, str], bool, str]:
    """Return the versions installed, whether the tests passed, and pytest's last line."""
    python = _environment(row)
    exact = {
        name: version if version.startswith("<") else f"=={version}"
        for name, version in (("grpcio", row.grpcio), ("protobuf", row.protobuf))
    }
    _run(
        [python, "-m", "pip", "install", "--quiet", "--upgrade"]
        + [f"{name}{version}" for name, version in exact.items()]
    )
    listed = _run([python, "-m", "pip", "list", "--format", "json"])
    versions = {item["name"]: item["version"] for item in json.loads(listed)}
    tests, rest = _tests(python)
    if rest:
        print(f"    left out, for what this environment has not: {', '.join(rest)}")
    said = subprocess.run(
        [python, "-m", "pytest", "-q", "-n", "2", *tests],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = said.stdout.strip().splitlines()
    if said.returncode:
        print("\n".join(lines[-40:]), said.stderr, sep="\n")
    return versions, said.returncode == 0, (lines or ["no output"])[-1].strip("= ")


def _environment(row: Row) -> str:
    """Return the interpreter of a virtual environment with the client and what tests it."""
    folder = VENVS / row.python
    python = folder / "bin" / "python"
    if not python.exists():
        _run([row.interpreter, "-m", "venv", "--clear", str(folder)])
    # The wheel, not the working tree: only what it declares is there.
    _run([str(python), "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", "."])
    wanted = [*TOOLS]
    if row.interpreter == sys.executable:
        wanted += ["-c", "constraints.txt", "torch"]
    _run([str(python), "-m", "pip", "install", "--quiet", *wanted])
    return str(python)


def _tests(python: str) -> tuple[list[str], list[str]]:
    """Return the client's test files that this environment has everything for, and the others."""
    needs = {path: _needs(path, set()) for path in sorted((TESTS / "client").glob("test_*.py"))}
    names = sorted(set().union(*needs.values()))
    code = "import importlib.util, sys; print(*filter(importlib.util.find_spec, sys.argv[1:]))"
    found = set(_run([python, "-c", code, *names]).split())
    whole = [str(path) for path, wanted in needs.items() if wanted <= found]
    rest = [
        f"{path.name} ({', '.join(sorted(wanted - found))})"
        for path, wanted in needs.items()
        if not wanted <= found
    ]
    return whole, rest


def _needs(path: Path, seen: set[Path]) -> set[str]:
    """Return the top-level modules that a test file imports, with those of what it brings in."""
    if path in seen:
        return set()
    seen.add(path)
    text = path.read_text()
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    others = [path.with_name(name) for name in re.findall(r"\w+_program\.py", text)]
    others += [ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tests.")]
    # A test says by its name which adapter it drives, and the adapter needs its framework.
    adapter = ADAPTERS.get(path.stem.removeprefix("test_"))
    if adapter is not None:
        names.add(adapter)
    for room, package in (("lrpilot.core", "pydantic"), ("lrpilot.server", "sqlalchemy")):
        if any(name.startswith(room) for name in names):
            names.add(package)
    needed = {name.partition(".")[0] for name in names} - {"tests", "lrpilot"}
    return needed.union(*(_needs(other, seen) for other in others if other.exists()))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
