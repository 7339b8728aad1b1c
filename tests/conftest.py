"""What holds for every test.

Programs that no Python package brings, and what root alone may do, are asked for by markers; the
time of each suite is shown at the end.
"""

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.postgres import Cluster

# What `pytest --hypothesis-profile=long` asks of the properties that leave their number open.
settings.register_profile("long", max_examples=2000)

_PACKAGES = {
    "chromedriver": "chromium-driver",
    "postgres": "postgresql",
    "promtool": "prometheus",
}
"""Debian's package of a program, where it is named otherwise."""

_NAMESPACES = "the right to make namespaces, which root has"

_LEFT_OUT = pytest.StashKey[list[tuple[str, str]]]()


def _missing(item: pytest.Item) -> str | None:
    """Return what a test needs and is not here: a program, or namespaces."""
    for marker in item.iter_markers("needs_program"):
        for name in marker.args:
            if shutil.which(name, path=_search_path()) is None:
                return f"the program {name}"
    if item.get_closest_marker("needs_namespaces") is not None and not _has_namespaces():
        return _NAMESPACES
    return None


@cache
def _has_namespaces() -> bool:
    from tests.crash.laboratory import has_namespaces

    return has_namespaces()


def _search_path() -> str:
    # Debian keeps the programs of PostgreSQL apart from the others.
    apart = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *apart])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that miss something, unless all are asked for, as in CI."""
    if os.environ.get("LRPILOT_REQUIRE_ALL") == "1":
        return
    left_out = {item: name for item in items if (name := _missing(item)) is not None}
    if not left_out:
        return
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    config.stash[_LEFT_OUT] = [(item.nodeid, name) for item, name in left_out.items()]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test that was asked for although it misses something."""
    if (name := _missing(item)) is not None:
        pytest.fail(f"LRPILOT_REQUIRE_ALL=1, and {name} is missing", pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker process left out to the process that prints."""
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:
        worker_output["left_out"] = session.config.stash.get(_LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take what a worker process left out; every worker leaves out the same."""
    output = getattr(node, "workeroutput", None)
    config = getattr(node, "config", None)
    if output is not None and isinstance(config, pytest.Config):
        config.stash[_LEFT_OUT] = [(nodeid, name) for nodeid, name in output["left_out"]]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the time of each suite; say plainly what was not run, and what to install."""
    _show_times(terminalreporter)
    left_out = config.stash.get(_LEFT_OUT, [])
    if not left_out:
        return
    programs = {what.rpartition(" ")[2] for _, what in left_out if what != _NAMESPACES}
    terminalreporter.section("NOT RUN: something is missing", sep="=", yellow=True)
    for nodeid, what in left_out:
        terminalreporter.write_line(f"{nodeid} needs {what}")
    if programs:
        packages = sorted(_PACKAGES.get(name, name) for name in programs)
        terminalreporter.write_line(f"To run all of it: apt-get install {' '.join(packages)}")


def _show_times(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what each suite took, added up over its tests: workers run several at a time."""
    seconds: defaultdict[str, float] = defaultdict(float)
    tests: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                suite = report.nodeid.partition("::")[0].rpartition("/")[0] or "."
                seconds[suite] += report.duration
                tests[suite] += report.when == "call"
    if not tests:
        return
    terminalreporter.section("time per suite", sep="=")
    for suite in sorted(seconds, key=lambda suite: -seconds[suite]):
        terminalreporter.write_line(f"{seconds[suite]:8.1f} s  {tests[suite]:5d} tests  {suite}")
    total = sum(seconds.values())
    terminalreporter.write_line(f"{total:8.1f} s  {sum(tests.values()):5d} tests  in all")


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator["Cluster"]:
    """A PostgreSQL that is quick and not durable, for tests that leave it as it is."""
    from tests.postgres import Cluster

    cluster = Cluster(durable=False)
    try:
        yield cluster.start()
    finally:
        cluster.dispose()


@pytest.fixture
def postgres(postgres_cluster: "Cluster") -> Iterator[str]:
    """The address of a fresh database."""
    name = postgres_cluster.create()
    yield postgres_cluster.address(name)
    postgres_cluster.drop(name)
