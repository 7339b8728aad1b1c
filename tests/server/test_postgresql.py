"""What holds of the store on PostgreSQL beyond the contract: whatever becomes of the database."""

import logging
import random
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from lrpilot.server import _packing, _postgres, _segments, _sql_store
from lrpilot.server._packing import PackedLog
from lrpilot.server._schema import REVISION, metadata
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import (
    Append,
    LogRow,
    News,
    SchemaTooNew,
    SeqTaken,
    Snapshot,
    Store,
    StoreError,
    StoreUnavailable,
)
from tests.postgres import DEADLINE_S, PASSWORD, USER, Cluster

pytestmark = pytest.mark.needs_program("postgres")


def row(seq: int, mark: str = "") -> LogRow:
    return LogRow(seq, f"{mark}{seq}".encode(), f"digest-{mark}{seq}", seq)


def put(store: Store, run: str, *seqs: int, create: bool = False) -> None:
    assert store.append([Append(run, tuple(map(row, seqs)), create)]) == [None]


def wait_until(condition: Callable[[], object]) -> None:
    """Wait, bounded, until a condition holds."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "the condition never held"
        time.sleep(0.01)


def name_of(address: str) -> str:
    """Return the name of the database that an address leads to."""
    return address.rpartition("/")[2]


Opened = Callable[[], SqlStore]


@pytest.fixture
def opened(postgres: str) -> Iterator[Opened]:
    """Open stores on one database, as so many servers do."""
    stores: list[SqlStore] = []

    def open_one() -> SqlStore:
        store = open_store(postgres)
        assert isinstance(store, SqlStore)
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster that a test may kill; what it acknowledges is on the disk."""
    cluster = Cluster(durable=True)
    try:
        yield cluster.start()
    finally:
        cluster.dispose()


class TestSchema:
    def test_it_is_that_of_the_release(self, opened: Opened) -> None:
        with opened()._engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []

    def test_servers_that_start_at_once_do_not_collide(
        self, postgres: str, postgres_cluster: Cluster
    ) -> None:
        barrier = threading.Barrier(6)

        def start(number: int) -> None:
            barrier.wait(DEADLINE_S)
            store = open_store(postgres)
            put(store, f"run-{number}", 1, create=True)
            store.close()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(start, range(6)))
        store = open_store(postgres)
        assert store.runs() == [f"run-{number}" for number in range(6)]
        store.close()
        with postgres_cluster.connected(name_of(postgres)) as connection:
            # Alembic would have written it twice.
            assert len(connection.execute("SELECT * FROM alembic_version").fetchall()) == 1

    def test_an_upgrade_waits_for_that_of_another_server(
        self, postgres: str, postgres_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with postgres_cluster.connected(name_of(postgres)) as other:
            other.execute("SELECT pg_advisory_lock(%s)", [_postgres._LOCK])
            with monkeypatch.context() as patch:
                patch.setattr(_postgres, "MIGRATION_S", 0.2)
                with pytest.raises(StoreUnavailable, match="another server has been upgrading"):
                    open_store(postgres)
            with ThreadPoolExecutor(1) as pool:
                opening = pool.submit(open_store, postgres)
                other.execute("SELECT pg_advisory_unlock(%s)", [_postgres._LOCK])
                opening.result(DEADLINE_S).close()

    def test_a_newer_database_is_refused_and_left_alone(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        put(opened(), "a", 1, create=True)
        with postgres_cluster.connected(name_of(postgres)) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9000'")
        with pytest.raises(SchemaTooNew, match=r"revision 9000, .*newer release") as caught:
            opened()
        assert PASSWORD not in str(caught.value)
        with postgres_cluster.connected(name_of(postgres)) as connection:
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [
                ("9000",)
            ]

    def test_a_database_of_another_program(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        with postgres_cluster.connected(name_of(postgres)) as connection:
            connection.execute("CREATE TABLE events (distance real)")
        with pytest.raises(StoreUnavailable, match='relation "events" already exists'):
            opened()
        with postgres_cluster.connected(name_of(postgres)) as connection:
            tables = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
            ).fetchall()
        assert tables == [("events",)]

    def test_an_encoding_that_cannot_hold_every_name(self, postgres_cluster: Cluster) -> None:
        with postgres_cluster.connected() as connection:
            connection.execute(
                "CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'"
            )
        with pytest.raises(StoreUnavailable, match="its encoding is LATIN1, and must be UTF8"):
            open_store(postgres_cluster.address("latin"))
        postgres_cluster.drop("latin")


class Writer:
    """Appends to a run, row by row, on a thread."""

    def __init__(self, store: Store, last: int) -> None:
        self.last = last
        """The last row that was acknowledged."""
        self._store = store
        self._begun, self._ended = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Writer":
        self._writing = self._pool.submit(self._write)
        assert self._begun.wait(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._writing.result(DEADLINE_S)
        self._pool.shutdown()

    def _write(self) -> None:
        while not self._ended.is_set():
            try:
                (conflict,) = self._store.append([Append("a", (row(self.last + 1),))])
            except StoreUnavailable:
                continue  # Unknown: the next try finds the seq taken if it was carried out.
            assert conflict is None or conflict.last_seq == self.last + 1
            self.last += 1
            self._begun.set()


class TestDurability:
    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            ("off", "on"),
            ("local", "on"),
            ("remote_write", "on"),
            ("on", "on"),
            ("remote_apply", "remote_apply"),
        ],
    )
    def test_no_setting_weakens_a_commit(
        self, postgres: str, postgres_cluster: Cluster, setting: str, expected: str
    ) -> None:
        with postgres_cluster.connected() as connection:
            connection.execute(
                f"ALTER DATABASE {name_of(postgres)} SET synchronous_commit = {setting}"
            )
        store = open_store(postgres)
        assert isinstance(store, SqlStore)
        found = []

        @sa.event.listens_for(store._engine, "commit")
        def look(connection: sa.Connection) -> None:
            found.append(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())

        put(store, "a", 1, create=True)
        put(store, "a", 2)
        assert store.delete("a")
        assert found == [expected] * 3
        store.close()

    def test_what_was_acknowledged_outlives_the_death_of_the_database(
        self, cluster: Cluster
    ) -> None:
        store = open_store(cluster.address(cluster.create()))
        put(store, "a", 1, create=True)
        last = 1
        for _ in range(3):
            with Writer(store, last) as writer:
                time.sleep(random.uniform(0, 0.1))
                cluster.kill()
            cluster.start()
            found = store.read("a")
            last = writer.last
            # One more may have been carried out whose answer was lost.
            assert len(found) in {last, last + 1}
            assert found == [row(seq) for seq in range(1, len(found) + 1)]
            last = len(found)
        store.close()

    def test_looks_into_a_long_log_use_the_index(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        store = opened()
        for number in range(10):
            put(store, f"run-{number}", *range(1, 1001), create=True)
        with postgres_cluster.connected(name_of(postgres)) as connection:
            connection.execute("ANALYZE")
        plans: list[str] = []

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def explain(_: object, cursor: Any, statement: str, parameters: Any, *__: object) -> None:
            if statement.startswith("SELECT") and "events" in statement:
                cursor.execute(f"EXPLAIN {statement}", parameters)
                plans.append("\n".join(line for (line,) in cursor.fetchall()))

        store.head("run-3")
        store.append([Append("run-3", (row(1001),))])
        store.read("run-3", 990)
        assert len(plans) == 3
        for plan in plans:
            assert "pk_events" in plan
            assert not re.search("Seq Scan on events|Sort", plan), plan


class TestTwoWriters:
    def test_one_wins_each_seq(self, opened: Opened) -> None:
        stores = [opened(), opened()]
        put(stores[0], "a", 1, create=True)
        barrier = threading.Barrier(4)

        def contend(number: int) -> list[LogRow]:
            barrier.wait(DEADLINE_S)
            store = stores[number % 2]
            won = []
            while (head := store.head("a")) is not None and head[0] < 60:
                given = row(head[0] + 1, f"{number}-")
                (conflict,) = store.append([Append("a", (given,))])
                if conflict is None:
                    won.append(given)
            return won

        with ThreadPoolExecutor(4) as pool:
            won = [given for of_one in pool.map(contend, range(4)) for given in of_one]
        assert stores[0].read("a", 1) == sorted(won, key=lambda given: given.seq)
        assert len(won) == 59

    def test_batches_in_any_order_do_not_wait_for_each_other(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        stores = [opened(), opened()]
        names = [f"run-{number}" for number in range(20)]
        barrier = threading.Barrier(2)

        def write(number: int) -> int:
            order = names[:: 1 if number == 0 else -1]
            won = 0
            barrier.wait(DEADLINE_S)
            for seq in range(1, 20):
                batch = [Append(name, (row(seq, f"{number}-"),), seq == 1) for name in order]
                won += stores[number].append(batch).count(None)
            return won

        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(write, range(2)))
        assert sum(won) == sum(len(stores[0].read(name)) for name in names)
        assert all(
            [one.seq for one in stores[0].read(name)] == list(range(1, 20)) for name in names
        )
        with postgres_cluster.connected() as connection:
            (deadlocks,) = connection.execute(
                "SELECT deadlocks FROM pg_stat_database WHERE datname = %s", [name_of(postgres)]
            ).fetchone() or (None,)
        assert deadlocks == 0

    def test_a_deadlock_is_tried_again(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        """A program that writes in another order, such as an older release."""
        store = opened()
        put(store, "a", 1, create=True)
        put(store, "b", 1, create=True)
        insert = "INSERT INTO events SELECT id, 2, 'x', 'theirs', 0 FROM runs WHERE name = '{}'"
        database = name_of(postgres)
        with (
            postgres_cluster.connected(database) as other,
            ThreadPoolExecutor(1) as pool,
            other.transaction(),
        ):
            other.execute(insert.format("b"))
            appending = pool.submit(store.append, [Append("b", (row(2),)), Append("a", (row(2),))])
            wait_until(lambda: postgres_cluster.backends(database, "wait_event_type = 'Lock'"))
            # Now each waits for the other; the one that waited first finds out.
            other.execute(insert.format("a"))
        results = appending.result(DEADLINE_S)
        assert [type(result) for result in results] == [SeqTaken, SeqTaken]
        assert store.heads(["a", "b"]) == {"a": (2, "theirs"), "b": (2, "theirs")}

    def test_a_delete_and_an_append_at_once(self, opened: Opened) -> None:
        stores = [opened(), opened()]
        for mark in map(str, range(20)):
            put(stores[0], "a", 1, create=True)
            appends = [Append("a", (row(seq, mark),)) for seq in range(2, 6)]
            with ThreadPoolExecutor(2) as pool:
                deleting = pool.submit(stores[0].delete, "a")
                results = [stores[1].append([append])[0] for append in appends]
                assert deleting.result(DEADLINE_S)
            # Those before the delete went with the run, and those after it found none.
            assert stores[0].runs() == []
            assert stores[0].read("a") == []
            assert results == sorted(results, key=lambda result: result is not None)

    def test_a_server_that_stops_in_a_transaction_holds_nobody_up(
        self, opened: Opened, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_postgres, "IDLE_S", 0.5)
        stopped, other = opened(), opened()
        put(other, "a", 1, create=True)

        def stop() -> None:
            with stopped._transaction(stopped._writer) as connection:
                _sql_store._append(connection, [Append("a", (row(2, "stopped-"),))])
                put(other, "a", 2)

        with pytest.raises(StoreUnavailable):
            stop()
        assert other.read("a") == [row(1), row(2)]


class TestFailures:
    def test_lost_connections(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        store = opened()
        put(store, "a", 1, create=True)
        for seq in (2, 3):
            assert store.read("a") == [row(one) for one in range(1, seq)]
            assert postgres_cluster.terminate(name_of(postgres))
            put(store, "a", seq)
            assert postgres_cluster.terminate(name_of(postgres))
            assert store.head("a") == (seq, f"digest-{seq}")
        assert postgres_cluster.terminate(name_of(postgres))
        assert store.delete("a")

    def test_a_connection_lost_in_the_commit_leaves_the_outcome_open(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        store = opened()
        put(store, "a", 1, create=True)
        name = name_of(postgres)
        cuts: list[int] = []

        @sa.event.listens_for(store._engine, "commit")
        def cut(_: sa.Connection) -> None:
            if not cuts:
                cuts.append(postgres_cluster.terminate(name))
                wait_until(lambda: not postgres_cluster.backends(name))

        # To try again by itself would answer "taken" to who may have taken it.
        with pytest.raises(StoreUnavailable):
            store.append([Append("a", (row(2),))])
        assert cuts == [1]
        put(store, "a", 2)

    def test_no_connections_allowed(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        store = opened()
        put(store, "a", 1, create=True)
        with closed(postgres_cluster, name_of(postgres)):
            for use in (store.check, store.runs, lambda: store.append([Append("a", (row(2),))])):
                with pytest.raises(StoreUnavailable, match="not currently accepting connections"):
                    use()
        store.check()
        put(store, "a", 2)

    def test_every_connection_in_use(self, monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
        monkeypatch.setattr(_postgres, "POOL_S", 0.1)
        monkeypatch.setattr(_postgres, "CONNECTIONS", 2)
        store = opened()
        put(store, "a", 1, create=True)
        with store._engine.connect(), store._engine.connect():
            for use in (store.check, lambda: store.append([Append("a", (row(2),))])):
                with pytest.raises(StoreUnavailable, match="QueuePool limit of size 2"):
                    use()
        put(store, "a", 2)

    def test_a_table_that_another_program_locks(
        self,
        opened: Opened,
        postgres: str,
        postgres_cluster: Cluster,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(_postgres, "STATEMENT_S", 0.2)
        store = opened()
        put(store, "a", 1, create=True)
        with postgres_cluster.connected(name_of(postgres)) as other, other.transaction():
            other.execute("LOCK TABLE events")
            for use in (lambda: store.read("a"), lambda: store.append([Append("a", (row(2),))])):
                with pytest.raises(StoreUnavailable, match="due to statement timeout"):
                    use()
        assert store.read("a") == [row(1)]
        put(store, "a", 2)

    def test_a_database_that_is_stopped(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_postgres, "ANSWER_S", 0.5)
        monkeypatch.setattr(_postgres, "CONNECT_S", 2)
        address = cluster.address(cluster.create())
        store = open_store(address)
        assert isinstance(store, SqlStore)
        put(store, "a", 1, create=True)
        statements = []

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def count(*_: object) -> None:
            statements.append(1)

        def silent() -> None:
            with pytest.raises(StoreUnavailable, match=r"it did not answer within 0\.5 s"):
                store.append([Append("a", (row(2),))])

        cluster.send(signal.SIGSTOP)
        silent()
        assert len(statements) == 1
        # Whoever comes next need not wait in their turn.
        silent()
        assert len(statements) == 1
        monkeypatch.setattr(_postgres, "PAUSE_S", 0.0)
        store._postgres._refuse_until_s = 0.0  # type: ignore[union-attr]
        with pytest.raises(StoreUnavailable, match=r"did not answer|timeout"):
            store.read("a")
        with pytest.raises(StoreUnavailable, match=r"did not answer|timeout"):
            open_store(address)
        cluster.send(signal.SIGCONT)
        # The append may have reached it.
        assert [type(one) for one in store.append([Append("a", (row(2),))])] in (
            [type(None)],
            [SeqTaken],
        )
        assert store.read("a") == [row(1), row(2)]
        store.close()

    def test_a_log_longer_than_a_page_is_read_whole(
        self, opened: Opened, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_sql_store, "_ROWS_PER_QUERY", 3)
        store, other = opened(), opened()
        for last in (2, 3, 4, 6, 7):
            put(store, f"run-{last}", *range(1, last + 1), create=True)
            for limit in (None, *range(9)):
                expected = [row(seq) for seq in range(1, last + 1)][:limit]
                assert store.read(f"run-{last}", 0, limit) == expected
        # Meanwhile another server deletes the run and makes it again: a read sees one log.
        calls = 0

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def interfere(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                assert other.delete("run-7")
                new = tuple(row(seq, "new-") for seq in range(1, 8))
                assert other.append([Append("run-7", new, True)]) == [None]

        assert store.read("run-7") == [row(seq) for seq in range(1, 8)]
        assert calls == 3
        assert store.read("run-7") == [row(seq, "new-") for seq in range(1, 8)]


@contextmanager
def closed(cluster: Cluster, database: str) -> Iterator[None]:
    """Let nobody connect to a database, and end those connections that there are."""
    with cluster.connected() as connection:
        connection.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    cluster.terminate(database)
    yield
    with cluster.connected() as connection:
        connection.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


class TestAddress:
    def refused(self, address: str) -> str:
        """Return why a store cannot be opened; the password appears nowhere."""
        with pytest.raises((StoreError, ValueError)) as caught:
            open_store(address)
        trace = "".join(traceback.format_exception(caught.value))
        for secret in ("wrong-one", PASSWORD, "p%40ss", "p@ss"):
            assert secret not in trace.replace("test_postgresql.py", "")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_wrong_password(self, postgres_cluster: Cluster) -> None:
        text = self.refused(postgres_cluster.address("postgres", password="wrong-one"))
        assert text.startswith(f"postgresql://127.0.0.1:{postgres_cluster.port}/postgres: ")
        assert f'password authentication failed for user "{USER}"' in text

    def test_a_wrong_database(self, postgres_cluster: Cluster) -> None:
        text = self.refused(postgres_cluster.address("nowhere"))
        assert 'database "nowhere" does not exist' in text

    def test_an_unknown_host(self) -> None:
        text = self.refused("postgresql://me:wrong-one@no-such-host.invalid/runs")
        assert text.startswith("postgresql://no-such-host.invalid/runs: ")

    def test_nobody_listens(self) -> None:
        text = self.refused("postgresql+psycopg://me:wrong-one@127.0.0.1:1/runs")
        assert "onnection refused" in text

    def test_a_standby(self, postgres_cluster: Cluster) -> None:
        address = postgres_cluster.address(
            "postgres", options="-c default_transaction_read_only=on"
        )
        assert "read-only" in self.refused(address)

    @pytest.mark.parametrize(
        ("address", "text"),
        [
            ("postgresql://me:wrong-one@two@host/runs", "%40"),
            ("postgresql://me:wrong-one@host/", "names no database"),
            ("postgresql://me:wrong-one@host:port/runs", "not the address"),
            ("postgresql+psycopg2://me:wrong-one@host/runs", r"a store is a folder"),
            ("postgresql://me:x@127.0.0.1:1/runs?password=wrong-one&nonsense=1", "nonsense"),
        ],
    )
    def test_a_malformed_one(self, address: str, text: str) -> None:
        assert text in self.refused(address)

    def test_a_driver_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(StoreUnavailable, match=r"pip install 'lrpilot\[postgres\]'"):
            open_store("postgresql://me@host/runs")


class TestCompact:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make segments short."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 2)

    @pytest.mark.parametrize(
        ("name", "statement", "is_older"),
        [
            ("lrpilot", "SELECT 1", True),
            # Release 0.2.0 as its address names it.
            ("mine", "LISTEN lrpilot", True),
            ("pg_dump", "SELECT 1", False),
            ("lrpilot/9000", "LISTEN lrpilot", False),
        ],
    )
    def test_nothing_is_packed_while_an_older_server_is_connected(
        self, opened: Opened, postgres: str, name: str, statement: str, is_older: bool
    ) -> None:
        store = opened()
        put(store, "a", 1, 2, 3, 4, 5, create=True)
        address = postgres.replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True, application_name=name) as other:
            other.execute(statement)
            assert store.compact("a", 3) == (0 if is_older else 2)
        wait_until(lambda: store.compact("a", 5) or not is_older)
        assert store.read("a") == [row(seq) for seq in range(1, 6)]

    def test_a_log_is_adopted_as_it_is_while_an_older_server_is_connected(
        self, opened: Opened, postgres: str
    ) -> None:
        store, beside = opened(), opened()
        put(beside, "b", 1, create=True)
        written: list[int] = []

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def count(_a: object, _b: object, statement: str, values: Any, *_: object) -> None:
            if statement.startswith("INSERT INTO events"):
                written.append(len(values) if isinstance(values, list) else 1)
                # The log is half there, and holds up nobody.
                put(beside, "b", 1 + len(written))
                assert beside.runs() == ["b"]

        log = PackedLog(row(seq) for seq in range(1, 8))
        address = postgres.replace("+psycopg", "")
        with psycopg.connect(address, autocommit=True, application_name="lrpilot") as other:
            store.adopt("a", log)
            # As that server reads it.
            (found,) = other.execute("SELECT count(*) FROM events JOIN runs ON id = run_id"
                                     " WHERE name = 'a'").fetchall()  # fmt: skip
        assert found == (7,)
        assert written == [2, 2, 2, 1]
        assert store.read("a") == [row(seq) for seq in range(1, 8)]
        assert beside.read("b") == [row(seq) for seq in range(1, 6)]

    def test_one_that_connects_while_rows_are_packed(
        self, opened: Opened, postgres: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = opened()
        put(store, "a", 1, 2, 3, create=True)
        older: list[psycopg.Connection[Any]] = []

        def pack(rows: list[LogRow]) -> bytes:
            address = postgres.replace("+psycopg", "")
            older.append(psycopg.connect(address, application_name="lrpilot"))
            return _segments.pack(rows)

        monkeypatch.setattr(_sql_store, "pack", pack)
        assert store.compact("a", 3) == 0
        assert len(older) == 1
        older[0].close()

    def test_a_server_says_what_it_is(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        named = open_store(f"{postgres}?application_name=mine")
        one, two = opened(), opened()
        two.follow(Heard())
        put(named, "a", 1, 2, 3, create=True)
        for name in (f"lrpilot/{REVISION}", f"lrpilot/{REVISION} mine"):
            assert postgres_cluster.backends(name_of(postgres), f"application_name = '{name}'")
        wait_until(lambda: postgres_cluster.backends(name_of(postgres), "query LIKE 'LISTEN%'"))
        assert one.compact("a", 3) == 2
        named.close()

    def test_a_seq_whose_row_was_packed_meanwhile_is_taken_all_the_same(
        self, opened: Opened, postgres: str, postgres_cluster: Cluster
    ) -> None:
        """The append of one server stands still between its look at the log and its rows."""
        slow, other = opened(), opened()
        put(slow, "a", 1, create=True)
        packing: list[Future[int]] = []

        with ThreadPoolExecutor(1) as pool:

            @sa.event.listens_for(slow._engine, "before_cursor_execute")
            def meanwhile(connection: Any, cursor: Any, statement: str, *_: object) -> None:
                if statement.startswith("INSERT INTO events") and not packing:
                    put(other, "a", 2, 3, 4)
                    packing.append(pool.submit(other.compact, "a", 3))
                    # It packs, or it waits for the slow one to end.
                    waiting = "wait_event_type = 'Lock'"
                    database = name_of(postgres)
                    wait_until(
                        lambda: packing[0].done() or postgres_cluster.backends(database, waiting)
                    )

            (conflict,) = slow.append([Append("a", (row(2, "slow-"),))])
            assert packing[0].result(DEADLINE_S) == 2
        assert isinstance(conflict, SeqTaken)
        assert conflict.last_seq == 4
        assert other.read("a") == [row(seq) for seq in range(1, 5)]

    def test_a_run_deleted_and_made_again_while_its_rows_are_packed(
        self, opened: Opened, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = opened(), opened()
        put(one, "a", 1, 2, 3, create=True)

        def pack(rows: list[LogRow]) -> bytes:
            if rows[0] == row(1):
                assert two.delete("a")
                again = tuple(row(seq, "again-") for seq in (1, 2, 3))
                assert two.append([Append("a", again, create=True)]) == [None]
            return _segments.pack(rows)

        monkeypatch.setattr(_sql_store, "pack", pack)
        assert one.compact("a", 3) == 0
        assert one.compact("a", 3) == 2
        assert one.read("a") == [row(seq, "again-") for seq in (1, 2, 3)]

    def test_runs_are_packed_deleted_and_made_again_at_once(self, opened: Opened) -> None:
        stores = [opened() for _ in range(3)]
        ended = threading.Event()

        def pack(store: SqlStore) -> int:
            count = 0
            while not ended.is_set():
                count += store.compact("a", 100)
            return count

        def write() -> None:
            for number in range(30):
                made = tuple(row(seq, f"{number}-") for seq in range(1, 8))
                assert stores[0].append([Append("a", made, create=True)]) == [None]
                assert stores[0].save_snapshot("a", Snapshot(3, f"digest-{number}-3", 0, b""))
                if number % 2:
                    stores[0].compact("a", 4)
                assert stores[0].read("a") == list(made)
                assert stores[0].delete("a")
            ended.set()

        with ThreadPoolExecutor(3) as pool:
            packing = [pool.submit(pack, store) for store in stores[1:]]
            try:
                write()
            finally:
                ended.set()
            for one in packing:
                one.result(DEADLINE_S)
        with stores[0]._engine.connect() as connection:
            for table in metadata.tables:
                assert connection.exec_driver_sql(f"SELECT * FROM {table}").all() == []


class Heard:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.news: list[News] = []

    def __call__(self, news: News) -> None:
        self.news.append(news)


class TestFollow:
    def test_writes_are_told_to_every_server(self, opened: Opened) -> None:
        one, two = opened(), opened()
        heard = Heard()
        assert two.follow(heard)
        wait_until(lambda: heard.news)
        put(one, "a b/c", 1, 2, create=True)
        one.append(
            [
                Append("a b/c", (row(3),)),
                Append("nobody", (row(3),)),
                Append("a b/c", (row(4),)),
            ]
        )
        assert two.delete("a b/c")
        assert not two.delete("a b/c")
        put(two, "😀", 1, create=True)
        wait_until(lambda: len(heard.news) >= 5)
        assert heard.news == [
            News(None, None),
            News("a b/c", 2),
            News("a b/c", 4),
            News("a b/c", None),
            News("😀", 1),
        ]

    def test_after_a_lost_connection_it_listens_again(
        self,
        opened: Opened,
        postgres: str,
        postgres_cluster: Cluster,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, "lrpilot.server")
        store, heard = opened(), Heard()
        store.follow(heard)
        for times in (1, 2):
            wait_until(lambda: heard.news.count(News(None, None)) == times)  # noqa: B023
            put(store, f"run-{times}", 1, create=True)
            wait_until(lambda: heard.news[-1] == News(f"run-{times}", 1))  # noqa: B023
            assert postgres_cluster.terminate(name_of(postgres), "query LIKE 'LISTEN%'") == 1
        wait_until(lambda: heard.news.count(News(None, None)) == 3)
        assert [one.levelname for one in caplog.records] == ["WARNING", "INFO"] * 2
        assert PASSWORD not in caplog.text

    def test_nobody_else_writes_to_a_folder(self, tmp_path: Any) -> None:
        store = open_store(tmp_path)
        assert not store.follow(Heard())
        store.close()
