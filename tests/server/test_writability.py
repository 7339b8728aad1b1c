"""A store that cannot be written: what health, metrics and clients hear, and how it comes back.

What the kernel does on a real disk stands in test_disks.py; here the store is told to fail.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
import sqlalchemy as sa
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lrpilot import core
from lrpilot.server import _app, _sql_store
from lrpilot.server._app import ServerConfig, StartupError, serve
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._metrics import Metrics
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import (
    REASONS,
    Append,
    AppendResult,
    LogRow,
    Reason,
    StoreUnavailable,
)
from tests.http_client import Http, serving

if TYPE_CHECKING:
    from tests.server.conftest import Replica, Until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Fragile(MemoryStore):
    """A store whose writes fail while it is told why."""

    def __init__(self) -> None:
        super().__init__()
        self.why: StoreUnavailable | None = None
        self.probes = 0

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        self._fail()
        return super().append(batch)

    def delete(self, run: str, after: str | None = None) -> bool:
        self._fail()
        return super().delete(run, after)

    def probe(self) -> None:
        self.probes += 1
        self._fail()

    def _fail(self) -> None:
        if self.why is not None:
            raise self.why


@pytest.fixture
def store() -> Fragile:
    return Fragile()


@pytest.fixture
async def fragile(
    server: Replica, store: Fragile, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Replica]:
    """A server over a store that can be told to fail."""
    monkeypatch.setattr(_app, "CHECK_S", 0.05)
    replica = type(server)(store)
    await replica.start()
    yield replica
    await replica.stop()


def shown(replica: Replica, name: str, **labels: str) -> float | None:
    return replica.metrics.registry.get_sample_value(name, labels)


class TestReadiness:
    async def test_a_failed_write_is_said_at_once_and_one_that_succeeds_ends_it(
        self,
        fragile: Replica,
        store: Fragile,
        until: Until,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        caplog.set_level("INFO", "lrpilot.server")
        async with grpc.aio.insecure_channel(fragile.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert (await watch.read()).status == SERVING
            job = await fragile.start_job(**fragile.feedback())
            rates = await job.rates(0)
            for times in (1, 2):
                # No look finds it: the write that fails says so itself.
                monkeypatch.setattr(_app, "CHECK_S", 60.0)
                await asyncio.sleep(0.1)
                store.why = StoreUnavailable("disk full: /data/lrpilot.db", "disk_full")
                monkeypatch.setattr(_app, "CHECK_S", 0.05)
                refusal = await fragile.call_refused(
                    "ReportLosses", **job.report_fields((times - 1, 1.0))
                )
                assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "StoreUnavailable")
                assert refusal.facts == {"reason": "disk_full"}
                assert "disk full: /data/lrpilot.db" in refusal.text
                assert (await watch.read()).status == NOT_SERVING
                assert fragile.server.not_ready == "disk full: /data/lrpilot.db"
                assert shown(fragile, "lrpilot_store_writable") == 0
                probes = store.probes
                await until(lambda: store.probes > probes + 2)  # noqa: B023
                # What was handed out and what is known is there for everyone.
                assert await job.rates(0) == rates
                assert (await job.shown()).progress == times - 1
                assert not fragile.server.is_ready
                store.why = None
                assert (await watch.read()).status == SERVING
                assert shown(fragile, "lrpilot_store_writable") == 1
                assert (await job.report((times - 1, 1.0))).frontier == times
        texts = [record.message for record in caplog.records]
        assert texts.count("not ready: disk full: /data/lrpilot.db") == 2
        assert texts.count("ready again") == 2
        failures = shown(fragile, "lrpilot_store_failures_total", reason="disk_full")
        assert failures is not None
        # The reports, and the probes after them.
        assert failures >= 6
        assert shown(fragile, "lrpilot_failed_commits_total") == 2
        assert shown(fragile, "lrpilot_store_failures_total", reason="read_only") == 0

    async def test_another_reason_is_said_as_well(
        self,
        fragile: Replica,
        store: Fragile,
        until: Until,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await fragile.attach()
        for why, reason in (
            ("first", "disk_full"),
            ("second", "read_only"),
            ("third", "read_only"),
        ):
            store.why = StoreUnavailable(why, reason)  # type: ignore[arg-type]
            await fragile.call_refused("DeleteRun", run="small", force=True)
            await until(lambda: fragile.server.not_ready == store.why.args[0])  # type: ignore[union-attr]
        assert [one.message for one in caplog.records if one.message.startswith("not")] == [
            "not ready: first",
            "not ready: second",
        ]

    async def test_what_nobody_foresaw_is_a_failure_like_any_other(
        self,
        fragile: Replica,
        store: Fragile,
        until: Until,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def check() -> None:
            raise RuntimeError("odd")

        monkeypatch.setattr(store, "check", check)
        monkeypatch.setattr(store, "probe", check)
        await until(lambda: not fragile.server.is_ready)
        assert fragile.server.not_ready == "the store: RuntimeError: odd"
        failures = shown(fragile, "lrpilot_store_failures_total", reason="other")
        assert failures is not None
        await until(
            lambda: (
                (shown(fragile, "lrpilot_store_failures_total", reason="other") or 0) > failures + 2
            )
        )
        (said,) = [one for one in caplog.records if one.message.startswith("not ready")]
        assert said.exc_info is not None
        assert isinstance(said.exc_info[1], RuntimeError)
        monkeypatch.undo()
        await until(lambda: fragile.server.is_ready)
        assert shown(fragile, "lrpilot_store_writable") == 1

    async def test_conflicts_alone_show_nothing(self, fragile: Replica, store: Fragile) -> None:
        await fragile.attach()
        store.why = StoreUnavailable("full", "disk_full")
        with pytest.raises(StoreUnavailable):
            await fragile.committer.append("other", [LogRow(1, b"", "", 0)], create=True)
        store.why = None
        with pytest.raises(Exception, match="ends at seq"):
            await fragile.committer.append("small", [LogRow(1, b"", "", 0)], create=True)
        assert fragile.committer.failure is not None
        await fragile.committer.probe()
        assert fragile.committer.failure is None

    async def test_what_ranks_wait_meanwhile_leads_to_no_waiver(
        self, fragile: Replica, store: Fragile, until: Until
    ) -> None:
        """Also where the time out is shorter than it takes the reporter to try again."""
        job = await fragile.start_job(**fragile.feedback(delay=1, timeout="300ms"))
        assert await job.rates(0)
        store.why = StoreUnavailable("full", "disk_full")
        await fragile.call_refused("ReportLosses", **job.report_fields((0, 1.0)))
        await until(lambda: not fragile.server.is_ready)
        asking = asyncio.create_task(job.values(1, wait_ms=30_000, blocked=True))
        probes = store.probes
        # Many times the time out.
        await until(lambda: store.probes > probes + 30)
        assert not asking.done()
        assert fragile.live().blocked_s() < 0.3
        store.why = None
        await until(lambda: fragile.server.is_ready)
        await job.report((0, 1.0))
        assert (await asking).block.begin == 1
        kinds = [core.decode(row.payload).kind for row in store.read("small")]
        assert "waived" not in kinds


class Broken:
    """Lets one kind of statement of an engine fail, as the driver would."""

    def __init__(self, store: SqlStore) -> None:
        self.error: Exception | None = None

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def fail(connection: Any, cursor: Any, statement: str, *_: object) -> None:
            if self.error is not None and statement.startswith("INSERT"):
                raise sa.exc.OperationalError(statement, {}, self.error)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[SqlStore]:
    store = open_store(tmp_path / "data")
    assert isinstance(store, SqlStore)
    yield store
    store.close()


class TestReasons:
    @pytest.mark.parametrize(
        ("text", "reason", "words"),
        [
            ("database or disk is full", "disk_full", "disk full: "),
            ("attempt to write a readonly database", "read_only", "read-only: "),
            ("disk I/O error", "io_error", "I/O error: "),
            ("unable to open database file", "io_error", "I/O error: "),
            ("database is locked", "locked", ""),
            ("something else", "other", ""),
        ],
    )
    def test_of_sqlite(self, opened: SqlStore, text: str, reason: Reason, words: str) -> None:
        broken = Broken(opened)
        append = Append("a", (LogRow(1, b"x", "d", 0),), create=True)
        for use in (lambda: opened.append([append]), opened.probe):
            broken.error = sqlite3.OperationalError(text)
            with pytest.raises(StoreUnavailable) as caught:
                use()
            assert caught.value.reason == reason
            assert str(caught.value).startswith(f"{words}sqlite:///")
            assert str(caught.value).endswith(f"lrpilot.db: {text}")
            # Reading goes on.
            opened.check()
            assert opened.runs() == []
        broken.error = None
        assert opened.append([append]) == [None]

    def test_there_are_few(self) -> None:
        assert len(set(REASONS)) == len(REASONS) < 12


class TestProbe:
    def test_it_leaves_nothing(self, opened: SqlStore) -> None:
        opened.append([Append("a", (LogRow(1, b"x", "d", 0),), create=True)])
        before = opened.read("a")
        for _ in range(3):
            opened.probe()
        assert opened.runs() == ["a"]
        assert opened.read("a") == before
        with opened._engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM events").scalar_one() == 1

    def test_it_writes(self, opened: SqlStore) -> None:
        assert opened.folder is not None
        wal = opened.folder / "lrpilot.db-wal"
        before = wal.stat().st_size
        opened.probe()
        assert wal.stat().st_size > before


class TestWriteAheadLog:
    def test_what_a_killed_server_left_is_in_the_database_before_it_is_used(
        self, tmp_path: Path
    ) -> None:
        """It may stand in the kernel's memory alone: see SqlStore._settle."""
        old = open_store(tmp_path / "old")
        old.append([Append("a", (LogRow(1, b"x", "d", 0),), create=True)])
        # As a kill leaves it: the log is not moved to the database.
        shutil.copytree(tmp_path / "old", tmp_path / "new")
        old.close()
        store = open_store(tmp_path / "new")
        assert store.read("a") == [LogRow(1, b"x", "d", 0)]
        assert (tmp_path / "new" / "lrpilot.db-wal").stat().st_size == 0
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copy(tmp_path / "new" / "lrpilot.db", alone)
        with_nothing_else = open_store(alone)
        assert with_nothing_else.read("a") == [LogRow(1, b"x", "d", 0)]
        with_nothing_else.close()
        store.close()

    def test_it_does_not_grow_while_somebody_always_reads(
        self, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert opened.folder is not None
        wal = opened.folder / "lrpilot.db-wal"
        monkeypatch.setattr(_sql_store, "WAL_BYTES", 1 << 20)
        big = bytes(100_000)
        opened.append([Append("a", (LogRow(1, b"x", "d", 0),), create=True)])
        readers = [opened._engine.connect() for _ in range(2)]

        def begin(reader: sa.Connection) -> None:
            reader.rollback()
            reader.exec_driver_sql("SELECT count(*) FROM runs").scalar_one()

        sizes = []
        for seq in range(2, 60):
            begin(readers[seq % 2])
            opened.append([Append("a", (LogRow(seq, big, "d", 0),))])
            sizes.append(wal.stat().st_size)
        # Each of them left the log in use: it only grew.
        assert sizes == sorted(sizes)
        assert sizes[-1] > 4 << 20
        for reader in readers:
            reader.rollback()
        opened.check()
        assert wal.stat().st_size == 0
        for reader in readers:
            reader.close()

    def test_who_reads_for_too_long_stops_nothing(
        self, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_sql_store, "WAL_BYTES", 0)
        opened.append([Append("a", (LogRow(1, b"x", "d", 0),), create=True)])
        with opened._engine.connect() as reader:
            reader.exec_driver_sql("SELECT count(*) FROM runs").scalar_one()
            opened.append([Append("a", (LogRow(2, b"x", "d", 0),))])
            monkeypatch.setattr(SqlStore, "_checkpoint", fail)
            opened.check()
        assert opened.head("a") == (2, "d")

    def test_who_reads_for_long_holds_up_appends_for_a_moment_only(
        self, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_sql_store, "WAL_BYTES", 0)
        assert opened.folder is not None
        wal = opened.folder / "lrpilot.db-wal"
        begun: list[int] = []
        fails = False

        @sa.event.listens_for(opened._engine, "before_cursor_execute")
        def look(connection: Any, cursor: Any, statement: str, *_: object) -> None:
            if "wal_checkpoint" in statement:
                begun.append(patience_ms(connection.connection))
                if fails:
                    raise sa.exc.OperationalError(
                        statement, {}, sqlite3.OperationalError("disk I/O error")
                    )

        opened.append([Append("a", (LogRow(1, b"x", "d", 0),), create=True)])
        with opened._engine.connect() as reader:
            reader.exec_driver_sql("SELECT count(*) FROM runs").scalar_one()
            opened.append([Append("a", (LogRow(2, b"x", "d", 0),))])
            opened.check()
            assert wal.stat().st_size > 0
            fails = True
            opened.check()
        fails = False
        opened.check()
        assert wal.stat().st_size == 0
        # The lock that appends need is held as long.
        assert begun == [100, 100, 100]
        with opened._engine.connect() as one, opened._engine.connect() as other:
            assert [patience_ms(item.connection) for item in (one, other)] == [10_000, 10_000]

    def test_a_disk_that_does_not_say_how_long_it_is(
        self, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened.append([Append("a", (LogRow(1, b"x", "d", 0),), create=True)])

        def stat(path: Path, **_: object) -> os.stat_result:
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))

        monkeypatch.setattr(Path, "stat", stat)
        # What is read and written says whether the store is well.
        opened.check()
        with pytest.raises(StoreUnavailable, match=r"I/O error: .*lrpilot\.db-wal") as caught:
            opened.size()
        assert caught.value.reason == "io_error"
        monkeypatch.undo()
        assert opened.size() > 0


def patience_ms(connection: Any) -> int:
    (found,) = connection.execute("PRAGMA busy_timeout").fetchone()
    assert isinstance(found, int)
    return found


def fail(_: SqlStore, _timeout_s: float) -> bool:
    raise StoreUnavailable("disk full", "disk_full")


async def test_a_server_that_cannot_write_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SqlStore) -> None:
        raise StoreUnavailable("disk full: /data/lrpilot.db", "disk_full")

    monkeypatch.setattr(SqlStore, "probe", refuse)
    config = ServerConfig(data=tmp_path / "data", listen="127.0.0.1:0", http=None)
    with pytest.raises(StartupError, match="disk full"):
        await asyncio.wait_for(serve(config), 30)
    # The folder is free again.
    open_store(tmp_path / "data").close()


async def test_ready_over_http_says_why(server: Replica) -> None:
    why: str | None = "disk full: /data/lrpilot.db"
    async with serving(server, not_ready=lambda: why) as web:
        http = Http(web.address)
        answer = await http.get("/ready")
        assert (answer.status, answer.body) == (503, b"not ready: disk full: /data/lrpilot.db\n")
        assert (await http.read("/api/server"))["ready"] == why
        # Whether to restart the process, that says nothing of.
        assert (await http.get("/live")).status == 200
        why = None
        answer = await http.get("/ready")
        assert (answer.status, answer.body) == (200, b"ready\n")
        assert (await http.read("/api/server"))["ready"] is None


def test_the_room_on_the_disk_is_shown(tmp_path: Path) -> None:
    metrics = Metrics()
    read: Callable[[], float | None] = lambda: metrics.registry.get_sample_value(  # noqa: E731
        "lrpilot_store_free_bytes", {"folder": str(tmp_path)}
    )
    assert read() is None
    metrics.watch_folder(tmp_path)
    free = read()
    assert free is not None
    assert 0 < free <= shutil.disk_usage(tmp_path).total
