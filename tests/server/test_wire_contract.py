"""What the services promise over the wire, asked over each store in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot import core
from lrpilot.server import _packing
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import MAX_SEQ, Store
from lrpilot.v1 import trainer_pb2
from tests.packing import compact_all
from tests.rules import world
from tests.rules.cases import CASES

if TYPE_CHECKING:
    from tests.postgres import Cluster
    from tests.server.conftest import Replica

POSTGRES = pytest.param("postgresql", marks=pytest.mark.needs_program("postgres"))

RECORDED = trainer_pb2.REPORT_OUTCOME_RECORDED
REPEATED = trainer_pb2.REPORT_OUTCOME_REPEATED


@pytest.fixture(params=["memory", "sqlite", POSTGRES])
async def served(
    request: pytest.FixtureRequest, tmp_path: Path, server: Replica
) -> AsyncIterator[Replica]:
    """The services on a gRPC server over a store."""
    store: Any = MemoryStore()
    if request.param == "sqlite":
        store = open_store(tmp_path / "data")
    elif request.param == "postgresql":
        store = open_store(request.getfixturevalue("postgres"))
    replica = type(server)(store)
    await replica.start()
    yield replica
    await replica.stop()
    store.close()


async def events(served: Replica, run: str, size: int) -> list[Any]:
    """Return the log of a run, page by page."""
    found: list[Any] = []
    token = ""
    while True:
        page = await served.call("ListEvents", run=run, page_size=size, page_token=token)
        found += page.events
        token = page.next_page_token
        if not token:
            return found


async def names(served: Replica, size: int) -> list[str]:
    """Return the names of all runs, page by page."""
    found: list[str] = []
    token = ""
    while True:
        page = await served.call("ListRuns", page_size=size, page_token=token)
        found += [run.name for run in page.runs]
        token = page.next_page_token
        if not token:
            return found


class TestRuns:
    async def test_a_run_is_made_once(self, served: Replica) -> None:
        answers = await asyncio.gather(*(served.attach() for _ in range(8)))
        assert [answer.created for answer in answers].count(True) == 1
        refusal = await served.refused(
            "CreateRun", spec_document=served.document(), request_id="another"
        )
        assert refusal.reason == "RunExists"

    async def test_they_are_listed_by_code_point(self, served: Replica) -> None:
        expected = ["0", "a", "a-b", "a.b", "a_b", "aa", "b"]
        for name in reversed(expected):
            await served.attach(name)
        for size in (1, 3, 100):
            assert await names(served, size) == expected

    async def test_a_deleted_one_leaves_nothing_and_its_name_is_free(self, served: Replica) -> None:
        job = await served.start_job()
        await job.report((0, 1.0))
        await served.attach("other")
        await served.call("DeleteRun", run="small", force=True)
        assert (await job.refused_report((1, 1.0))).reason == "RunNotFound"
        assert await names(served, 10) == ["other"]
        await served.start_job()
        assert [event.seq for event in await events(served, "small", 10)] == [1, 2]


class TestLog:
    async def test_it_has_no_gap_and_every_acknowledged_loss(self, served: Replica) -> None:
        job = await served.start_job()
        answers = await asyncio.gather(*(job.report((0, 1.0), (1, 2.0)) for _ in range(8)))
        outcomes = sorted(list(answer.outcomes) for answer in answers)
        assert outcomes.count([RECORDED] * 2) == 1
        assert outcomes.count([REPEATED] * 2) == 7
        for n in range(2, 30):
            await job.report((n, float(n)))
        for size in (1, 7, 1000):
            log = await events(served, "small", size)
            assert [event.seq for event in log] == list(range(1, len(log) + 1))
            losses = {loss.progress: loss.loss for event in log for loss in event.losses}
            assert losses == {0: 1.0, 1: 2.0} | {n: float(n) for n in range(2, 30)}

    async def test_it_is_one_chain_and_outlives_the_server(self, served: Replica) -> None:
        job = await served.start_job(**served.feedback())
        await job.report((0, 1.0), (1, 2.0))
        rates = await job.rates(0)
        await served.restart()
        again = type(job)(served, job.run, job.opened, job.rank, job.incarnation)
        assert await again.rates(0) == rates
        assert list((await again.report((0, 1.0), (1, 2.0))).outcomes) == [REPEATED] * 2
        state = core.RunState("small")
        for row in served.store.read("small"):
            state.apply(core.decode(row.payload), row.payload)
            assert (state.seq, state.digest) == (row.seq, row.digest)


class TestCurves:
    async def test_they_show_every_loss_also_after_a_restart(
        self, served: Replica, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 8)
        job = await served.start_job()
        for n in range(30):
            await job.report((n, float(n)))
        job = await served.open(progress=20)
        await job.report((20, 100.0))
        for _ in range(3):
            first, second = (await served.call("GetCurves", run="small", points=100)).losses
            assert list(first.loss.value) == [float(n) for n in range(30)]
            assert (first.forgotten_from, second.begin) == (20, 20)
            assert list(second.loss.value) == [100.0]
            compact_all(served.store, "small", MAX_SEQ)
            await served.restart()


@pytest.fixture(scope="module")
def database(postgres_cluster: Cluster) -> Iterator[Store]:
    """One store for all rules: each deletes its run."""
    name = postgres_cluster.create()
    store = open_store(postgres_cluster.address(name))
    yield store
    store.close()
    postgres_cluster.drop(name)


@pytest.mark.needs_program("postgres")
@pytest.mark.parametrize("name", CASES)
def test_each_rule_holds_over_postgresql(
    name: str, database: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "MemoryStore", lambda: database)
    try:
        CASES[name]()
    finally:
        database.delete(world.RUN)
