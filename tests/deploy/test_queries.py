"""Every query of the dashboards and of the page of metrics, asked of a real Prometheus.

It scrapes a real server, with the rules of deploy/, while a real client trains.
"""

import asyncio
import contextlib
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import lrpilot.client as lrpilot
from tests.deploy.test_dashboards import NAMES, committed, expressions
from tests.e2e.harness import make_spec, serve, wait_until
from tests.prometheus import Prometheus
from tests.server.conftest import Program

pytestmark = pytest.mark.needs_program("prometheus")

RUN = "watched"

VARIABLES = {
    "$__rate_interval": "10s",
    "$run": RUN,
    "$job": ".+",
    "$instance": ".+",
}
"""What Grafana puts in their place; a scrape comes every second."""


class Training(threading.Thread):
    """Trains until it is told to end; its loss comes down, stops improving, and swings a little."""

    def __init__(self, address: str, begin: int) -> None:
        super().__init__(daemon=True)
        self._address, self._begin = address, begin
        self._over = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Train one attempt."""
        spec = make_spec(
            RUN,
            policies=[
                {"kind": "plateau", "patience": 20, "cooldown": 5, "factor": 0.9},
                {"kind": "overfit", "mode": "advise", "window": 2},
                {"kind": "plateau", "patience": 10, "mode": "advise"},
            ],
            groups=[{"name": "decayed"}, {"name": "bias", "weight_decay_multiplier": 0}],
        )
        try:
            with lrpilot.connect(
                self._address, run=RUN, spec=spec, resume_at=self._begin or None
            ) as pilot:
                n = self._begin
                while not self._over.wait(0.02):
                    pilot.values(n)
                    loss = 2.0 + 2.0 / (1 + n) + 0.01 * (n % 7)
                    pilot.report(n, loss=loss, grad_norm=1.0 / (1 + n % 5))
                    n += 1
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        """End it; what failed in it fails the test."""
        self._over.set()
        self.join(60)
        assert not self.is_alive()
        if self.failure is not None:
            raise self.failure


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """The server."""
    program = serve(tmp_path_factory.mktemp("server") / "data")
    yield program
    program.dispose()


@pytest.fixture(scope="module")
def prometheus(
    root: Path, program: Program, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus with our rules that has seen two attempts of a run, the second under way."""
    rules = [root / "deploy/prometheus" / name for name in ("recording.yml", "alerts.yml")]
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus") / "data", program.http, rules)

    def seen(expression: str) -> bool:
        return bool(asyncio.run(prometheus.query(expression)))

    training = Training(program.grpc, 0)
    training.start()
    try:
        wait_until(lambda: seen(f'lrpilot_run_losses{{run="{RUN}"}} > 50'), "50 losses")
        training.end()
        training = Training(program.grpc, 40)
        training.start()
        wait_until(lambda: seen(f'changes(lrpilot_run_attempt{{run="{RUN}"}}[2m]) > 0'), "attempt")
        yield prometheus
    finally:
        prometheus.end()
        training.end()


def filled_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def answer(prometheus: Prometheus, expression: str) -> list[float]:
    return list(asyncio.run(prometheus.query(filled_in(expression))).values())


@pytest.mark.parametrize("name", NAMES)
def test_no_query_of_a_dashboard_finds_nothing(
    root: Path, prometheus: Prometheus, name: str
) -> None:
    queries = dict(expressions(committed(root, name)))
    assert queries
    waiting = set(queries)

    def all_found() -> bool:
        for where in list(waiting):
            if answer(prometheus, queries[where]):
                waiting.discard(where)
        return not waiting

    with contextlib.suppress(AssertionError):
        wait_until(all_found, "an answer to each query")
    assert waiting == set()
    numbers = {where: answer(prometheus, query) for where, query in queries.items()}
    assert {where: found for where, found in numbers.items() if any(map(math.isnan, found))} == {}


@pytest.mark.parametrize("name", NAMES)
def test_each_variable_has_values(
    root: Path, prometheus: Prometheus, program: Program, name: str
) -> None:
    variables = committed(root, name)["templating"]["list"]
    for variable in variables:
        if variable["type"] != "query":
            continue
        query = filled_in(variable["query"]["query"])
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert found, query
        series = prometheus.get("series", **{"match[]": found.group(1)})
        expected = {"run": RUN, "job": "lrpilot", "instance": program.http}
        assert {item[found.group(2)] for item in series} == {expected[found.group(2)]}


def test_servers_of_others_are_not_shown(root: Path, prometheus: Prometheus) -> None:
    other = '{job="prometheus"}'
    wait_until(lambda: answer(prometheus, f"process_open_fds{other}"), "a scrape of Prometheus")
    shown = {
        where: query
        for where, query in expressions(committed(root, "service"))
        if re.search(r"\b(?:up|process_\w+)\{", query)
    }
    assert len(shown) == 5
    for where, query in shown.items():
        number = query if "up{" in query else f"count({query})"
        wait_until(lambda number=number: answer(prometheus, number), where)  # type: ignore[misc]
        assert answer(prometheus, number) == [1], where


async def found(prometheus: Prometheus, expression: str) -> set[tuple[str, str]]:
    """Wait, bounded, until a query finds one series; return its labels."""
    for _ in range(600):
        for labels in await prometheus.query(expression):
            return set(labels)
        await asyncio.sleep(0.1)
    raise AssertionError(f"nothing found: {expression}")


async def test_an_alert_fires_on_a_real_loss(prometheus: Prometheus, program: Program) -> None:
    alert = 'ALERTS{alertname="LrpilotNonfiniteLosses", alertstate="firing"}'
    async with program.connected():
        job = await program.start_job("broken", **program.feedback())
        await found(prometheus, 'lrpilot_run_nonfinite_losses{run="broken"} == 0')
        assert await prometheus.query(alert) == {}
        await job.report((0, math.nan))
        labels = await found(prometheus, alert)
        assert labels >= {("run", "broken"), ("severity", "warning")}
        # The other tests ask for numbers.
        await program.call("FinishRun", run="broken", force=True, request_id="finish")
        await found(prometheus, 'absent(lrpilot_run_loss{run="broken"})')


def test_each_query_of_the_page_of_metrics_is_understood(
    root: Path, prometheus: Prometheus
) -> None:
    page = (root / "docs/metrics.md").read_text()
    row = r"^\| `lrpilot_\w+` \| \w+ \|[^|]*\| [^|]+ \| `([^`]+)`"
    queries = re.findall(row, page, re.MULTILINE)
    assert len(queries) > 40
    for query in queries:
        data = prometheus.get("query", query=query)
        assert data is not None, query
        assert data["resultType"] == "vector", query
