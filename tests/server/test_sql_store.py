"""What holds of the SQL store beyond the contract: durability, the folder's lock, its schema."""

import logging
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from lrpilot import core
from lrpilot.server import _migrate, _packing, _segments, _sql_store, _sqlite
from lrpilot.server._memory_store import MemoryStore
from lrpilot.server._schema import REVISION, metadata
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import (
    Append,
    CorruptSegment,
    LogRow,
    SchemaTooNew,
    SeqTaken,
    Snapshot,
    Store,
    StoreLocked,
    StoreUnavailable,
)
from tests.packing import compact_all

GOLDEN = Path(__file__).parents[1] / "golden"


def row(seq: int, mark: str = "") -> LogRow:
    return LogRow(seq, f"{mark}{seq}".encode(), f"digest-{mark}{seq}", seq)


def opened(folder: Path) -> SqlStore:
    store = open_store(folder)
    assert isinstance(store, SqlStore)
    return store


def put(store: Store, run: str, *seqs: int, create: bool = False) -> None:
    assert store.append([Append(run, tuple(map(row, seqs)), create)]) == [None]


@contextmanager
def python(program: str, *arguments: object, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a program that is killed at the end, if it has not ended."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


class TestDurability:
    def test_pragmas(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        expected = {
            "journal_mode": "wal",
            "synchronous": 2,
            "foreign_keys": 1,
            "busy_timeout": 10_000,
        }
        # Two at once, so that one is not the first connection that the pool made.
        with store._engine.connect() as one, store._engine.connect() as two:
            for connection in (one, two):
                found = {
                    name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                    for name in expected
                }
                assert found == expected
        store.close()

    def test_it_is_all_there_after_reopening(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        put(store, "a", 1, 2, create=True)
        store.close()
        store = opened(tmp_path)
        assert store.read("a") == [row(1), row(2)]
        put(store, "a", 3)
        store.close()

    def test_what_was_acknowledged_outlives_a_kill(self, tmp_path: Path) -> None:
        program = """
import asyncio, os, sys
from lrpilot.server._commit import GroupCommitter
from lrpilot.server._sql_store import open_store
from lrpilot.server._store import LogRow

async def write(committer, run):
    seq = 1
    while True:
        rows = [LogRow(n, f"{run}-{n}".encode(), f"{n}", n) for n in range(seq, seq + 1 + seq % 3)]
        await committer.append(run, rows, create=seq == 1)
        seq += len(rows)
        os.write(1, f"{run} {seq - 1}\\n".encode())

async def main():
    committer = GroupCommitter(open_store(sys.argv[1]))
    await asyncio.gather(*(write(committer, f"run-{n}") for n in range(4)))

asyncio.run(main())
"""
        acknowledged: dict[str, int] = defaultdict(int)
        for _ in range(3):
            with python(program, tmp_path / "data") as writer:
                assert writer.stdout is not None
                for count, line in enumerate(writer.stdout):
                    # After the kill, the lines that are still in the pipe count as well.
                    run, seq = line.split()
                    acknowledged[run] = int(seq)
                    if count == 200:
                        writer.send_signal(signal.SIGKILL)
            assert writer.returncode == -signal.SIGKILL
            store = opened(tmp_path / "data")
            assert sorted(acknowledged) == store.runs() == [f"run-{n}" for n in range(4)]
            for run, last in acknowledged.items():
                log = store.read(run)
                assert len(log) >= last
                assert log == [
                    LogRow(n, f"{run}-{n}".encode(), f"{n}", n) for n in range(1, len(log) + 1)
                ]
                store.delete(run)
            store.close()
            acknowledged.clear()

    def test_the_head_of_a_long_log_is_one_look_into_the_index(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        plans = []

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def explain(
            connection: Any, cursor: Any, statement: str, parameters: Any, *_: object
        ) -> None:
            if statement.startswith("SELECT"):
                cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
                plans.append([step[-1] for step in cursor.fetchall()])

        store.head("a")
        store.append([Append("a", (row(1),))])
        store.read("a")
        assert len(plans) == 3
        for plan in plans:
            assert not [step for step in plan if "SCAN" in step or "TEMP B-TREE" in step]
        store.close()


class TestFailures:
    def test_a_full_disk(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        put(store, "a", 1, create=True)
        big = LogRow(2, bytes(1 << 20), "", 0)
        with file_size_limit(1 << 19), pytest.raises(StoreUnavailable, match=r"lrpilot\.db"):
            store.append([Append("b", (row(1),), create=True), Append("a", (big,))])
        assert store.runs() == ["a"]
        assert store.read("a") == [row(1)]
        assert store.append([Append("a", (big,))]) == [None]
        assert store.head("a") == (2, "")
        store.close()

    def test_another_program_holds_the_database(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_sqlite, "BUSY_TIMEOUT_S", 0.01)
        store = opened(tmp_path)
        put(store, "a", 1, create=True)
        with closing(sqlite3.connect(tmp_path / "lrpilot.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="database is locked"):
                store.append([Append("a", (row(2),))])
            with pytest.raises(StoreUnavailable, match="database is locked"):
                store.delete("a")
            assert store.read("a") == [row(1)]
            other.execute("ROLLBACK")
        put(store, "a", 2)
        store.close()

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        (tmp_path / "lrpilot.db").write_text("not a database " * 100)
        with pytest.raises(StoreUnavailable, match=r"lrpilot\.db: file is not a database"):
            open_store(tmp_path)
        (tmp_path / "lrpilot.db").unlink()
        open_store(tmp_path).close()

    def test_a_database_of_another_program(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(tmp_path / "lrpilot.db")) as other:
            other.execute("CREATE TABLE runs (distance REAL)")
        with pytest.raises(StoreUnavailable, match="table runs already exists"):
            open_store(tmp_path)
        with closing(sqlite3.connect(tmp_path / "lrpilot.db")) as other:
            tables = other.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        assert tables == [("runs",)]

    def test_a_folder_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StoreUnavailable, match=f"data folder {tmp_path}/file"):
            open_store(tmp_path / "file")
        with pytest.raises(StoreUnavailable, match=f"data folder {tmp_path}/file/below"):
            open_store(tmp_path / "file" / "below")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every write of this process past `size` bytes of a file fail."""
    old, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (old, hard))


class TestTwoWriters:
    """Two stores on one database, as two servers on a shared one will be."""

    @pytest.fixture
    def stores(self, tmp_path: Path) -> Iterator[list[SqlStore]]:
        path = tmp_path / "shared.db"
        stores = [SqlStore(_sqlite.sqlite_engine(path)) for _ in range(2)]
        yield stores
        for store in stores:
            store.close()

    def test_one_wins_each_seq(self, stores: list[SqlStore]) -> None:
        put(stores[0], "a", 1, create=True)
        barrier = threading.Barrier(4)

        def contend(number: int) -> list[LogRow]:
            barrier.wait(timeout=30)
            store = stores[number % 2]
            won = []
            while (head := store.head("a")) is not None and head[0] < 40:
                given = row(head[0] + 1, f"{number}-")
                (conflict,) = store.append([Append("a", (given,))])
                if conflict is None:
                    won.append(given)
            return won

        with ThreadPoolExecutor(4) as pool:
            won = [given for of_one in pool.map(contend, range(4)) for given in of_one]
        assert stores[0].read("a", 1) == sorted(won, key=lambda given: given.seq)
        assert len(won) == 39

    def test_a_run_deleted_and_made_again_by_the_other(self, stores: list[SqlStore]) -> None:
        one, two = stores
        put(one, "a", 1, 2, 3, create=True)
        assert two.delete("a")
        put(two, "a", 1, create=True)
        (conflict,) = one.append([Append("a", (row(4),))])
        assert isinstance(conflict, SeqTaken)
        assert conflict.last_seq == 1

    def test_a_row_of_the_other_found_at_the_last_moment(self, stores: list[SqlStore]) -> None:
        """SQLite lets one write at a time; elsewhere the unique key finds the other's row."""
        store = stores[0]
        put(store, "a", 1, create=True)
        failures = 1

        @sa.event.listens_for(store._engine, "before_cursor_execute")
        def fail(connection: Any, cursor: Any, statement: str, *_: object) -> None:
            nonlocal failures
            if statement.startswith("INSERT INTO events") and failures:
                failures -= 1
                raise sa.exc.IntegrityError(statement, {}, Exception("not unique"))

        put(store, "a", 2)
        assert failures == 0
        failures = 1000
        with pytest.raises(StoreUnavailable, match="other writers were faster 20 times"):
            store.append([Append("a", (row(3),))])
        assert failures == 980
        failures = 0
        assert store.head("a") == (2, "digest-2")

    def test_the_database_itself_refuses_what_is_twice_or_belongs_to_none(
        self, stores: list[SqlStore]
    ) -> None:
        put(stores[0], "a", 1, create=True)
        insert = "INSERT INTO events VALUES ({}, {}, x'', '', 0)"
        with stores[0]._engine.connect() as connection:
            (run_id,) = connection.exec_driver_sql("SELECT id FROM runs").one()
            with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
                connection.exec_driver_sql(insert.format(run_id, 1))
            with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
                connection.exec_driver_sql(insert.format(run_id + 1, 1))
            with pytest.raises(sa.exc.IntegrityError, match="FOREIGN KEY"):
                connection.exec_driver_sql("DELETE FROM runs")


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqlStore]:
    """A run `a` of 12 rows, of which 10 are in two segments."""
    monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)
    store = opened(tmp_path)
    put(store, "a", *range(1, 13), create=True)
    assert compact_all(store, "a", 12) == 10
    yield store
    store.close()


class TestSegments:
    def change(self, store: SqlStore, statement: str) -> None:
        with store._engine.begin() as connection:
            connection.exec_driver_sql(statement)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ("data = CAST(data || x'00' AS BLOB)", "its content does not fit its checksum"),
            (
                "data = CAST(substr(data, 1, 60) || x'5a5b' || substr(data, 63) AS BLOB)",
                "does not fit its checks",
            ),
            ("data = x''", "this is no block of rows"),
            (
                "data = CAST(substr(data, 1, 4) || x'02' || substr(data, 6) AS BLOB)",
                "its format is 2",
            ),
            ("checksum = 'another'", "another block, with rows 6 to 10, is in their place"),
            (
                "(data, checksum) = (SELECT data, checksum FROM segments WHERE last_seq = 5)",
                "another block, with rows 1 to 5, is in their place",
            ),
        ],
    )
    def test_one_that_is_damaged_gives_no_rows(
        self, packed: SqlStore, change: str, why: str
    ) -> None:
        self.change(packed, f"UPDATE segments SET {change} WHERE last_seq = 10")
        for after_seq, limit in [(0, None), (5, 1), (9, 2), (0, 6)]:
            with pytest.raises(CorruptSegment, match=why) as caught:
                packed.read("a", after_seq, limit)
            assert str(caught.value).startswith("run 'a': packed rows 6 to 10 cannot be read: ")
            assert (caught.value.first_seq, caught.value.last_seq) == (6, 10)
        with pytest.raises(CorruptSegment):
            packed.save_snapshot("a", Snapshot(7, "digest-7", 0, b""))
        assert packed.read("a", 0, 5) == [row(seq) for seq in range(1, 6)]
        assert packed.read("a", 10) == [row(11), row(12)]
        assert packed.head("a") == (12, "digest-12")
        put(packed, "a", 13)
        assert packed.delete("a")

    def test_a_log_read_row_by_row_is_unpacked_once(
        self, packed: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unpacked = []

        def unpack(block: bytes) -> list[LogRow]:
            unpacked.append(block)
            return _segments.unpack(block)

        monkeypatch.setattr(_packing, "unpack", unpack)
        for _ in range(2):
            for seq in range(1, 13):
                assert packed.read("a", seq - 1, 1) == [row(seq)]
        assert len(unpacked) == 2
        # Another log, though its run has the same id.
        packed.delete("a")
        again = tuple(row(seq, "again-") for seq in range(1, 13))
        packed.append([Append("a", again, create=True)])
        compact_all(packed, "a", 12)
        assert packed.read("a") == list(again)
        assert len(unpacked) == 4

    def test_a_run_deleted_and_made_again_while_its_rows_are_packed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SQLite gives the new run the id of the old one."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 2)
        store = opened(tmp_path)
        put(store, "a", 1, 2, 3, create=True)

        def pack(rows: list[LogRow]) -> bytes:
            if rows[0] == row(1):
                assert store.delete("a")
                # All is as before, but for what one row holds.
                again = (LogRow(1, b"other", "digest-1", 1), row(2), row(3))
                assert store.append([Append("a", again, create=True)]) == [None]
            return _segments.pack(rows)

        monkeypatch.setattr(_sql_store, "pack", pack)
        assert store.compact("a", 3) == 0
        assert store.compact("a", 3) == 2
        assert store.read("a") == [LogRow(1, b"other", "digest-1", 1), row(2), row(3)]
        store.close()

    @pytest.mark.parametrize("missing", [3, 6])
    def test_what_is_left_of_a_log_with_a_gap_is_not_packed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
    ) -> None:
        """Also where the row is missing that follows those that would be packed."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 5)
        store = opened(tmp_path)
        put(store, "a", *range(1, 13), create=True)
        self.change(store, f"DELETE FROM events WHERE seq = {missing}")
        before = store.read("a")
        assert compact_all(store, "a", 12) == 0
        assert store.read("a") == before == [row(seq) for seq in range(1, 13) if seq != missing]
        store.close()

    def test_a_long_run_takes_little_of_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 500)
        store = opened(tmp_path)
        digest = "0" * 64
        sizes: list[int] = []
        for begin in range(1, 6001, 500):
            rows = []
            for seq in range(begin, begin + 500):
                payload = b'{"kind":"reported","reports":[[%d,%r,1.0,%d]]}' % (seq, seq**0.5, seq)
                digest = core.chain(digest, payload)
                rows.append(LogRow(seq, payload, digest, 10**18 + seq * 10**9))
            assert store.append([Append("a", tuple(rows), create=not sizes)]) == [None]
            compact_all(store, "a", begin)
            with store._engine.connect() as connection:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
                sizes.append(pages * connection.exec_driver_sql("PRAGMA page_size").scalar_one())
        # What a segment leaves free is taken by the next rows: only what is packed is added.
        assert sizes[-1] - sizes[2] < 9 * 500 * 20
        store.close()


class TestLock:
    HOLD = """
import sys, time
from lrpilot.server._sql_store import open_store
store = open_store(sys.argv[1])
print("open", flush=True)
time.sleep(600)
"""

    def test_a_second_process_is_refused_until_the_first_is_dead(self, tmp_path: Path) -> None:
        folder = tmp_path / "data"
        with python(self.HOLD, folder) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            with pytest.raises(StoreLocked) as caught:
                open_store(folder)
            assert f"data folder {folder} is used by" in str(caught.value)
            assert f"process {holder.pid};" in str(caught.value)
            holder.kill()
            holder.wait()
            store = open_store(folder)
        assert (folder / "lock").read_text() == f"{os.getpid()}\n"
        store.close()

    def test_a_second_store_of_one_process_is_refused(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        put(store, "a", 1, create=True)
        with pytest.raises(StoreLocked, match=f"process {os.getpid()};"):
            open_store(tmp_path)
        with pytest.raises(StoreLocked):
            open_store(f"sqlite:///{tmp_path}/lrpilot.db")
        put(store, "a", 2)
        store.close()
        open_store(tmp_path).close()

    def test_a_child_does_not_keep_the_lock(self, tmp_path: Path) -> None:
        store = open_store(tmp_path)
        program = "import time; print('up', flush=True); time.sleep(600)"
        with python(program, close_fds=False) as child:
            # Before that it may still have to close what it does not inherit.
            assert child.stdout is not None
            assert child.stdout.readline() == "up\n"
            store.close()
            open_store(tmp_path).close()

    def test_a_failed_opening_gives_the_folder_free(self, tmp_path: Path) -> None:
        (tmp_path / "lrpilot.db").write_text("not a database " * 100)
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="not a database"):
                open_store(tmp_path)

    def test_others_cannot_look_into_a_new_folder(self, tmp_path: Path) -> None:
        open_store(tmp_path / "data").close()
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


class TestAddress:
    def test_a_folder_is_made(self, tmp_path: Path) -> None:
        folder = tmp_path / "a%20b" / "with spaces"
        store = opened(folder)
        put(store, "a", 1, create=True)
        store.close()
        assert sorted(path.name for path in folder.iterdir()) == ["lock", "lrpilot.db"]

    def test_a_database_by_its_url(self, tmp_path: Path) -> None:
        store = open_store(f"sqlite:///{tmp_path}/other.db")
        put(store, "a", 1, create=True)
        store.close()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "other.db"]

    def test_memory(self) -> None:
        assert isinstance(open_store("memory://"), MemoryStore)

    @pytest.mark.parametrize(
        "address",
        [
            "mysql://someone:secret@host/db",
            "mysql://someone:sec/secret@@host:x:y/db",
            "mysql://someone@host/db?password=secret",
            "sqlite://",
            "sqlite:///:memory:",
            "sqlite:///file.db?mode=ro",
            "sqlite+aiosqlite:///file.db",
            "https://example.org/",
            "://",
        ],
    )
    def test_another_address_is_refused(self, address: str) -> None:
        with pytest.raises(ValueError, match="store") as caught:
            open_store(address)
        assert "secret" not in str(caught.value)


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the server has logged; alembic is used by the tests as well."""
    return [record.getMessage() for record in caplog.records if record.name == "lrpilot.server"]


class TestSchema:
    def test_a_fresh_database_has_the_tables_that_the_code_wants(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        with store._engine.connect() as connection:
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, metadata) == []
            assert context.get_current_revision() == REVISION
        store.close()

    STEP = """
import sqlalchemy as sa
from alembic import op

revision = "9000"
down_revision = {last!r}


def upgrade() -> None:
    op.create_table("notes", sa.Column("id", sa.Integer, primary_key=True))
    if {fails}:
        raise ZeroDivisionError
"""

    @pytest.fixture
    def migrations(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The migrations of a release to come, which may be changed."""
        folder = tmp_path / "100% of them"  # A sign that alembic's configuration would expand.
        shutil.copytree(_migrate._MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(_migrate, "_MIGRATIONS", folder)
        return folder

    def test_a_step_of_an_upgrade_is_told(
        self, tmp_path: Path, migrations: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        store = opened(tmp_path / "data")
        put(store, "a", 1, create=True)
        store.close()
        assert own_messages(caplog) == []
        last = REVISION
        step = self.STEP.format(last=last, fails=False)
        (migrations / "versions" / "r9000_notes.py").write_text(step)
        store = opened(tmp_path / "data")
        assert own_messages(caplog) == [f"database upgraded from revision {last} to 9000"]
        assert store.read("a") == [row(1)]
        with store._engine.connect() as connection:
            assert sa.inspect(connection).has_table("notes")
        store.close()

    def test_an_upgrade_that_fails_leaves_the_database_as_it_was(
        self, tmp_path: Path, migrations: Path
    ) -> None:
        store = opened(tmp_path / "data")
        put(store, "a", 1, create=True)
        store.close()
        with closing(sqlite3.connect(tmp_path / "data" / "lrpilot.db")) as database:
            before = list(database.iterdump())
        step = migrations / "versions" / "r9000_notes.py"
        step.write_text(self.STEP.format(last=REVISION, fails=True))
        with pytest.raises(ZeroDivisionError):
            open_store(tmp_path / "data")
        with closing(sqlite3.connect(tmp_path / "data" / "lrpilot.db")) as database:
            assert list(database.iterdump()) == before
        step.unlink()
        store = opened(tmp_path / "data")
        assert store.read("a") == [row(1)]
        store.close()

    def test_a_newer_database_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        store = opened(tmp_path)
        put(store, "a", 1, create=True)
        store.close()
        path = tmp_path / "lrpilot.db"
        with closing(sqlite3.connect(path)) as database:
            database.execute("UPDATE alembic_version SET version_num = '9000'")
            database.commit()
            before = list(database.iterdump())
        text = re.escape(str(path)) + ".* revision 9000, .*newer release.* up to " + REVISION
        for _ in range(2):
            with pytest.raises(SchemaTooNew, match=text):
                open_store(tmp_path)
        with closing(sqlite3.connect(path)) as database:
            assert list(database.iterdump()) == before

    def test_opening_says_nothing(self, tmp_path: Path) -> None:
        program = """
import logging, sys
logging.basicConfig(level=logging.INFO)
from lrpilot.server._sql_store import open_store
for _ in range(2):
    open_store(sys.argv[1]).close()
assert logging.getLogger("alembic").level == logging.NOTSET
"""
        with python(program, tmp_path, stderr=subprocess.STDOUT) as process:
            output, _ = process.communicate(timeout=60)
        assert (process.returncode, output) == (0, "")
