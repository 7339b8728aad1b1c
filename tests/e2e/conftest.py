"""What end-to-end tests share; everything that a test started is gone when it ends."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lrpilot.client as lrpilot
from tests.e2e.harness import Nursery, Rank, Spec, serve
from tests.server.conftest import Program


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start servers on one folder, ready."""
    started: list[Program] = []

    def start(address: str = "127.0.0.1:0", *options: str) -> Program:
        started.append(serve(tmp_path / "data", address, *options))
        return started[-1]

    yield start
    for program in started:
        program.dispose()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A server for tests that take care of their own runs and leave it as it is."""
    program = serve(tmp_path_factory.mktemp("shared") / "data")
    yield program
    program.dispose()


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Callable[[str], Nursery]]:
    """Make a starter of quick servers for an address, on the folder of `servers`."""
    made: list[Nursery] = []

    def make(address: str) -> Nursery:
        made.append(Nursery(tmp_path / "data", address))
        return made[-1]

    yield make
    for item in made:
        item.close()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Start the ranks of a job."""
    started: list[Rank] = []

    def start(address: str, spec: Spec, world_size: int, **options: Any) -> list[Rank]:
        job = [
            Rank(tmp_path, address, spec, rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        started.extend(job)
        return job

    yield start
    for rank in started:
        rank.dispose()


@pytest.fixture
def connect() -> Iterator[Callable[..., lrpilot.Pilot]]:
    """Connect; what a test leaves open is closed without waiting for the server."""
    pilots: list[lrpilot.Pilot] = []

    def connect(address: str, run: str, **options: Any) -> lrpilot.Pilot:
        pilots.append(lrpilot.connect(address, run=run, **options))
        return pilots[-1]

    yield connect
    for pilot in pilots:
        pilot._end(0.0)
