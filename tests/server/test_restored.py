"""A database that was put back from an older copy: real files of SQLite, real databases."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lrpilot import core
from lrpilot.client._held import Held
from lrpilot.server import _ledger, _postgres
from lrpilot.server._sql_store import open_store
from lrpilot.v1 import trainer_pb2 as pb

if TYPE_CHECKING:
    from tests.postgres import Cluster
    from tests.server.conftest import Job, Replica, Until

METADATA_BYTES = 8 * 1024

Serve = Callable[[str], Awaitable["Replica"]]


class Files:
    """Databases of SQLite, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def make(self, name: str) -> str:
        """Return the address of a new database."""
        (self._folder / name).mkdir()
        return str(self._folder / name)

    def copy(self, name: str, to: str) -> str:
        """Put a copy of a database that nobody uses in the place of another."""
        shutil.rmtree(self._folder / to, ignore_errors=True)
        shutil.copytree(self._folder / name, self._folder / to)
        return str(self._folder / to)


class Databases:
    """Databases of one PostgreSQL, by name."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._names: dict[str, str] = {}

    def make(self, name: str) -> str:
        """Return the address of a new database."""
        self._names[name] = self._cluster.create()
        return self._cluster.address(self._names[name])

    def copy(self, name: str, to: str) -> str:
        """Put a copy of a database that nobody uses in the place of another."""
        source = self._names[name]
        target = self._names.setdefault(to, f"{source}_{to}")
        self._cluster.drop(target)
        with self._cluster.connected() as connection:
            connection.execute(f"CREATE DATABASE {target} TEMPLATE {source} STRATEGY file_copy")
        return self._cluster.address(target)

    def close(self) -> None:
        """Leave nothing behind."""
        for name in self._names.values():
            self._cluster.drop(name)


@pytest.fixture(
    params=["sqlite", pytest.param("postgres", marks=pytest.mark.needs_program("postgres"))]
)
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Databases that can be copied and put back."""
    if request.param == "sqlite":
        yield Files(tmp_path)
        return
    made = Databases(request.getfixturevalue("postgres_cluster"))
    yield made
    made.close()


@pytest.fixture
async def serve(server: Replica) -> AsyncIterator[Serve]:
    """Start servers on a database."""
    started: list[Replica] = []

    async def start(address: str) -> Replica:
        replica = type(server)(open_store(address))  # type: ignore[arg-type]
        await replica.start()
        started.append(replica)
        return replica

    yield start
    for replica in started:
        await stop(replica)


async def stop(replica: Replica) -> None:
    if replica.address:
        await replica.stop()
        await asyncio.to_thread(replica.store.close)
        replica.address = ""


class Rank:
    """A rank that hands back what it has, as the client does."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._held = Held(7)
        self._held.log = job.opened.log
        self._frontier = 0

    def at(self, replica: Replica) -> Rank:
        """Call another server."""
        job = self.job
        self.job = type(job)(replica, job.run, job.opened, job.rank, job.incarnation)
        return self

    @property
    def held(self) -> pb.Held:
        return self._held.message(self._frontier)

    async def values(self, begin: int, **fields: Any) -> list[float]:
        answer = await self.job.values(begin, held=self.held, **fields)
        self._frontier = max(self._frontier, answer.frontier)
        self._held.add(answer.block, 1)
        return list(answer.block.learning_rates)

    async def report(self, *reports: tuple[int, float]) -> None:
        answer = await self.job.report(*reports, held=self.held)
        self._frontier = max(self._frontier, answer.frontier)


async def halve(replica: Replica, request_id: str) -> Any:
    return await replica.call(
        "AdjustRun", run="small", scale_lr=0.5, reason="try", author="oncall", request_id=request_id
    )


async def begin(serve: Serve, address: str) -> tuple[Replica, Rank]:
    """Start a run, and train some steps."""
    server = await serve(address)
    rank = Rank(await server.start_job(**server.feedback(delay=4)))
    await rank.values(0)
    await rank.report((0, 1.0), (1, 1.0), (2, 1.0))
    await rank.values(4)
    await halve(server, "first")
    return server, rank


async def go_on(server: Replica, rank: Rank) -> bytes:
    """Train on; return the state of a checkpoint at 6."""
    rank.at(server)
    await rank.report((3, 1.0), (4, 0.5), (5, 2.0), (6, 2.0), (7, 2.0))
    await halve(server, "second")
    await rank.values(7)
    await rank.report((8, 2.0))
    return await rank.job.save(6)


async def follow(server: Replica, opened: Job) -> list[list[float]]:
    """Return what comes of a resume at 6, with losses on which the policy acts."""
    found = [await opened.rates(6)]
    for at in range(6, 16):
        await opened.report((at, 3.0))
        found.append(await opened.rates(at + 4))
    return found


async def test_what_is_missing_ends_the_attempt_and_a_newer_checkpoint_brings_it_back(
    serve: Serve, databases: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, rank = await begin(serve, databases.make("run"))
    await stop(server)
    databases.copy("run", "copy")
    server = await serve(databases.copy("run", "run2"))
    state = await go_on(server, rank)
    await stop(server)
    twin = await serve(databases.copy("run2", "twin"))

    server = await serve(databases.copy("copy", "run2"))
    begun = len(server.logs()["small"])
    refusal = await server.call_refused(
        "GetValues", **rank.at(server).job.values_fields(11, held=rank.held)
    )
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "LogForgotten")
    assert refusal.metadata_bytes < METADATA_BYTES
    assert "older copy" in refusal.text
    assert "Restart the job from a checkpoint" in refusal.text
    assert refusal.facts == {
        "run": "small",
        "attempt": "1",
        "log_attempt": "1",
        "seq": str(begun),
        "frontier": "3",
        "recorded": "6",
        "rank": "7",
        "holds": "losses",
        "progress": "9",
    }
    # The log says it, once, to whoever comes, with or without anything to show.
    rows = server.logs()["small"]
    assert [core.decode(row.payload).kind for row in rows[begun:]] == ["forgot"]
    job = rank.job
    for method, fields in (
        ("GetValues", job.values_fields(0)),
        ("ReportLosses", job.report_fields((3, 1.0))),
        ("SaveState", {**job.identity, "progress": 2}),
    ):
        assert (await server.refused(method, **fields)).reason == "LogForgotten"
    (line,) = [item for item in caplog.records if "has forgotten what it gave" in item.message]
    assert line.levelname == "ERROR"
    shown = await job.shown()
    (listed,) = (await server.call("ListRuns")).runs
    assert shown.forgotten == listed.forgotten == refusal.text
    (event,) = (await server.call("ListEvents", run="small", page_token=str(begun))).events
    assert event.summary == (
        "the log has forgotten losses: rank 7 of attempt 1 holds more, up to progress 9"
    )
    # What an operator did is known still, and may be done.
    assert (await halve(server, "first")).adjustment.id

    caplog.clear()
    opened, expected = await server.open(state=state), await twin.open(state=state)
    assert (opened.opened.restored, opened.opened.attempt.number) == (True, 2)
    assert "is taken over from that state" in caplog.text
    assert await follow(server, opened) == await follow(twin, expected)
    first, again = await halve(server, "first"), await halve(twin, "first")
    assert (first.effective, first.adjustment.id) == (again.effective, again.adjustment.id)
    assert (await job.shown()).forgotten == ""
    assert (await server.refused("GetValues", **job.values_fields(6))).reason == "AttemptSuperseded"


async def test_who_waits_hears_of_it(serve: Serve, databases: Any, until: Until) -> None:
    server, rank = await begin(serve, databases.make("run"))
    await stop(server)
    databases.copy("run", "copy")
    server = await serve(databases.copy("run", "run2"))
    await go_on(server, rank)
    await stop(server)
    server = await serve(databases.copy("copy", "run2"))
    job = rank.at(server).job
    fields = job.values_fields(9, wait_ms=30_000, blocked=True)
    waits = asyncio.create_task(server.call_refused("GetValues", **fields))
    await until(lambda: server.ledger.live() and server.live().ranks_waiting)
    refusal = await server.call_refused("ReportLosses", **job.report_fields(held=rank.held))
    assert refusal.reason == (await waits).reason == "LogForgotten"


async def test_a_copy_that_holds_all_goes_on(serve: Serve, databases: Any) -> None:
    server, rank = await begin(serve, databases.make("run"))
    await stop(server)
    server = await serve(databases.copy("run", "run2"))
    await go_on(server, rank)
    assert "forgot" not in {core.decode(row.payload).kind for row in server.logs()["small"]}


@pytest.mark.needs_program("postgres")
async def test_a_server_that_lags_accuses_nobody(
    serve: Serve, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ledger, "POLL_S", 1e6)
    monkeypatch.setattr(_postgres.Postgres, "follow", lambda *_: None)
    a, rank = await begin(serve, postgres)
    b = await serve(postgres)
    await rank.at(b).values(4)
    await go_on(a, rank)
    known = b.live().state.seq
    assert known < a.live().state.seq
    assert await rank.at(b).values(9)
    assert known < b.live().state.seq
    assert b.live().state.forgot is None


async def test_what_a_rank_holds_must_make_sense(server: Replica) -> None:
    job = await server.start_job(**server.feedback())
    for held, field in (
        (pb.Held(steps=129, stride=1), "held.steps"),
        (pb.Held(steps=-1, stride=1), "held.steps"),
        (pb.Held(steps=2, stride=0), "held.begin"),
        (pb.Held(steps=2, stride=1, begin=-1), "held.begin"),
        (pb.Held(steps=2, stride=2**53, begin=2**53), "held.begin"),
    ):
        refusal = await job.refused_values(0, held=held)
        assert (refusal.reason, list(refusal.fields)) == ("InvalidRequest", [field])
