"""The built wheel does in a clean environment what the project says of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement

if TYPE_CHECKING:
    from tests.project.conftest import Environment

    NewEnvironment = Callable[[str], Environment]
    Serving = Callable[[list[str]], AbstractContextManager[tuple[str, str]]]

pytestmark = pytest.mark.timeout(600)

SPEC = """\
name: wheel
unit: iterations
total: 100
learning_rate: {init: 0.0, peak: 1.0e-3, min: 0.0, warmup: 10, decay: {style: cosine}}
weight_decay: 0.1
policies: [{kind: plateau, patience: 3, mode: act}]
feedback: {delay: 1, timeout: 30s}
"""

# Pairs that training images have; the first are the declared floors, the last the newest.
THIN_PAIRS = [
    ("grpcio==1.54.3", "protobuf==4.21.12"),
    ("grpcio==1.62.3", "protobuf==5.26.1"),
    ("grpcio==1.71.0", "protobuf==6.30.2"),
    ("grpcio<2", "protobuf>=7,<8"),
]

TRAIN = """\
import sys
import lrpilot.client as lrpilot
with lrpilot.connect(sys.argv[1], run="wheel", spec=sys.argv[2]) as pilot:
    used = []
    for n in range(20):
        used.append(pilot.values(n))
        pilot.report(n, 1.0)
print(*[value.hex() for ((value, _),) in used])
"""


def _requirements(extra: str | None) -> list[Requirement]:
    """Return what the package declares without extras, or for one extra."""
    declared = [Requirement(text) for text in importlib.metadata.requires("lrpilot") or []]
    if extra is None:
        return [each for each in declared if each.marker is None]
    return [each for each in declared if each.marker and each.marker.evaluate({"extra": extra})]


def _floor(requirement: Requirement) -> str:
    (lower,) = [spec.version for spec in requirement.specifier if spec.operator == ">="]
    return f"{requirement.name}=={lower}"


def _train(environment: Environment, address: str, folder: Path) -> list[float]:
    """Take twenty steps with the client of that environment; return the LR of each."""
    script, spec = folder / "train.py", folder / "spec.yaml"
    script.write_text(TRAIN)
    spec.write_text(SPEC)
    done = environment.run("python", os.fspath(script), address, os.fspath(spec))
    assert done.returncode == 0, done.stdout + done.stderr
    return [float.fromhex(word) for word in done.stdout.split()]


def test_the_floors_of_the_client_are_the_first_pair() -> None:
    assert sorted(_floor(each) for each in _requirements(None)) == sorted(THIN_PAIRS[0])


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.split("/")[1] for name in names if name.startswith("lrpilot/")}
    assert packages == {"v1", "core", "client", "server"}
    assert all(f"lrpilot/{package}/py.typed" in names for package in packages)
    # The page, which no import would miss.
    page = "lrpilot/server/web/static"
    assert {f"{page}/index.html", f"{page}/vendor/uplot/LICENSE"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lrpilot", f"lrpilot-{importlib.metadata.version('lrpilot')}.dist-info"}


@pytest.mark.parametrize("pair", THIN_PAIRS, ids=" ".join)
def test_the_thin_client_trains_with_grpcio_and_protobuf_alone(
    wheel: Path,
    pair: tuple[str, str],
    new_environment: NewEnvironment,
    serving: Serving,
    tmp_path: Path,
) -> None:
    thin = new_environment("thin")
    thin.install(os.fspath(wheel), *pair)

    installed = thin.python(
        "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    )
    extra = set(installed.stdout.split()) - {"grpcio", "lrpilot", "protobuf", "typing_extensions"}
    assert extra == set()

    with serving([sys.executable, "-m", "lrpilot.server.cli"]) as (address, _):
        values = _train(thin, address, tmp_path)
    assert values[:2] == [0.0, 1e-3 * 1 / 10]
    assert len(values) == 20


@pytest.mark.parametrize("package", ["lrpilot.server", "lrpilot.core", "lrpilot.server.cli"])
def test_without_the_extra_server_code_is_refused_with_what_to_install(
    wheel: Path, package: str, new_environment: NewEnvironment
) -> None:
    thin = new_environment("thin")
    thin.install(os.fspath(wheel))
    done = thin.python(f"import {package}")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ImportError" in last
    assert "pip install 'lrpilot[server]'" in last


def test_without_the_extra_the_command_says_what_to_install(
    wheel: Path, new_environment: NewEnvironment
) -> None:
    thin = new_environment("thin")
    thin.install(os.fspath(wheel))
    done = thin.run("lrpilot", "--help")
    assert done.returncode != 0
    assert "pip install 'lrpilot[server]'" in done.stderr


def test_the_server_runs_on_the_floors_that_it_declares(
    wheel: Path, new_environment: NewEnvironment, serving: Serving, tmp_path: Path
) -> None:
    floors = new_environment("floors")
    # The health service asks for a newer grpcio than the client does.
    pins = [*[_floor(each) for each in _requirements("server")], "grpcio==1.62.0"]
    floors.install(f"{wheel}[server]", "protobuf==4.21.12", *pins)

    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    curve = floors.run("lrpilot", "curve", os.fspath(spec), "--at", "0,1", "--format", "jsonl")
    assert curve.returncode == 0, curve.stderr
    assert '"progress": 1, "lr": 0.0001' in curve.stdout
    picture = floors.run("lrpilot", "curve", os.fspath(spec), "-o", "c.png", "--format", "png")
    assert picture.returncode == 0, picture.stderr

    with serving([os.fspath(floors.bin / "lrpilot")]) as (address, http):
        assert len(_train(floors, address, tmp_path)) == 20
        with urllib.request.urlopen(f"http://{http}/metrics", timeout=30) as answer:
            assert 'run="wheel"' in answer.read().decode()
        with urllib.request.urlopen(f"http://{http}/api/runs", timeout=30) as answer:
            assert [run["name"] for run in json.load(answer)["runs"]] == ["wheel"]
        with urllib.request.urlopen(f"http://{http}/api/stream", timeout=30) as answer:
            assert answer.readline() == b"retry: 2000\n"
        shown = floors.run("lrpilot", "run", "show", "wheel", "--server", address)
        assert shown.returncode == 0, shown.stderr
