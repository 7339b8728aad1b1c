"""From one release to the next: databases of past ones, and servers of two over one database."""

from __future__ import annotations

import logging
import socket
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.command import upgrade
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from lrpilot.server import _migrate, _packing
from lrpilot.server._schema import REVISION, metadata
from lrpilot.server._sql_store import SqlStore, open_store
from lrpilot.server._store import MAX_SEQ, Append, LogRow, Snapshot, Store
from tests.e2e.harness import Rank, Runs, ask_to_end, make_spec, one_value, wait_until
from tests.e2e.training import loss_at
from tests.packing import compact_all

if TYPE_CHECKING:
    from tests.postgres import Cluster
    from tests.server.conftest import Program, Programs

GOLDEN = Path(__file__).parents[1] / "golden"

WHEEL = GOLDEN / "lrpilot-0.2.0-py3-none-any.whl"
"""The release before, whose tables are those of revision 0001."""

SECOND_NS = 1_000_000_000


def revisions() -> list[str]:
    scripts = ScriptDirectory(str(Path(_migrate.__file__).parent / "migrations"))
    return sorted(step.revision for step in scripts.walk_revisions())


def golden(revision: str, path: Path) -> sqlite3.Connection:
    """Return the database that a release with that revision left."""
    database = sqlite3.connect(path)
    database.executescript((GOLDEN / f"store_{revision}.sql").read_text("utf-8"))
    assert database.execute("SELECT * FROM alembic_version").fetchall() == [(revision,)]
    return database


def check_golden(store: Store, revision: str) -> None:
    """Check that all is there which stands in a golden database, and that the logs go on."""
    assert store.runs() == ["first", "zweiter/läuft"]
    first = [
        LogRow(n, bytes([n]) * 4, f"{n:064x}", 1_700_000_000 * SECOND_NS + n) for n in (1, 2, 3)
    ]
    assert store.read("first") == first
    second = [
        LogRow(41, b"", f"{41:064x}", 1_700_000_001 * SECOND_NS),
        LogRow(42, bytes(range(256)), f"{42:064x}", 1_700_000_002 * SECOND_NS),
    ]
    assert store.read("zweiter/läuft") == second
    assert store.recent(1_700_000_001 * SECOND_NS) == ["zweiter/läuft"]
    if revision >= "0002":
        assert isinstance(store, SqlStore)
        with store._engine.connect() as connection:
            packed = connection.exec_driver_sql("SELECT first_seq, last_seq FROM segments")
            assert sorted(map(tuple, packed)) == [(1, 2), (41, 41)]
        assert store.snapshot("first") == Snapshot(3, f"{3:064x}", 2, b"fold 3")
        assert store.snapshot("first", floor=1) == Snapshot(1, f"{1:064x}", 0, b"fold 1")
        overviews = [one.overview for run in store.runs() for one in store.segments(run)]
        assert overviews == [b"overview 2" if revision >= "0003" else None, None]
    added = LogRow(4, b"4", "digest-4", 4)
    assert store.append([Append("first", (added,), after=f"{3:064x}")]) == [None]
    assert store.append([Append("third", (LogRow(1, b"", "", 0),), create=True)]) == [None]
    assert store.read("first") == [*first, added]
    assert store.save_snapshot("first", Snapshot(2, f"{2:064x}", 0, b""))
    assert store.delete("first")
    assert store.snapshot("first") is None


def check_tables(store: Store) -> None:
    """Check that the tables are those that the code wants."""
    assert isinstance(store, SqlStore)
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == REVISION


class TestGoldenDatabases:
    def test_every_revision_has_one(self) -> None:
        found = [path.stem.removeprefix("store_") for path in GOLDEN.glob("store_*.sql")]
        assert sorted(found) == revisions()
        assert revisions()[-1] == REVISION

    @pytest.mark.parametrize("revision", revisions())
    def test_one_is_upgraded(
        self, tmp_path: Path, revision: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        golden(revision, tmp_path / "lrpilot.db").close()
        store = open_store(tmp_path)
        check_golden(store, revision)
        check_tables(store)
        store.close()
        self.check_told(caplog, revision)

    @pytest.mark.needs_program("postgres")
    @pytest.mark.parametrize("revision", revisions())
    def test_one_is_upgraded_on_postgresql(
        self, tmp_path: Path, postgres: str, revision: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The tables as the migrations make them, and in them what the golden database holds."""
        caplog.set_level(logging.INFO, "lrpilot.server")
        engine = sa.create_engine(postgres)
        with engine.begin() as connection:
            upgrade(_migrate._revisions(connection).config, revision)
            with closing(golden(revision, tmp_path / "golden.db")) as database:
                database.row_factory = sqlite3.Row
                tables = sa.MetaData()
                tables.reflect(connection)
                for table in tables.sorted_tables:
                    if table.name == "alembic_version":
                        continue
                    for row in database.execute(f"SELECT * FROM {table.name}"):
                        connection.execute(sa.insert(table).values(dict(row)))
            connection.exec_driver_sql("SELECT setval('runs_id_seq', 100)")
        engine.dispose()
        store = open_store(postgres)
        check_golden(store, revision)
        check_tables(store)
        store.close()
        self.check_told(caplog, revision)

    def check_told(self, caplog: pytest.LogCaptureFixture, revision: str) -> None:
        told = [one.getMessage() for one in caplog.records if one.name == "lrpilot.server"]
        expected = f"database upgraded from revision {revision} to {REVISION}"
        assert told == ([] if revision == REVISION else [expected])


StartOld = Callable[..., "Program"]


@pytest.fixture
def start_old(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StartOld:
    """Start a server of the release before, from its wheel."""
    unpacked = tmp_path / "release"
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(unpacked)

    def start(*options: str, **arguments: Any) -> Program:
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(unpacked))
            return programs(*options, **arguments)

    return start


class TestReleaseBefore:
    """The release before, on a database of this one."""

    def refused(self, program: Program) -> None:
        assert program.ended() == 1
        log = program.log()
        assert log.startswith("error: ")
        assert f"is at revision {REVISION}, written by a newer release of lrpilot" in log
        assert "this one knows revisions up to 0001. Start the newer release" in log
        assert "Traceback" not in log

    def test_it_refuses_a_folder(self, start_old: StartOld, tmp_path: Path) -> None:
        data = tmp_path / "data"
        old = start_old(data=data).wait_ready()
        assert old.end() != 0
        with closing(sqlite3.connect(data / "lrpilot.db")) as database:
            assert database.execute("SELECT * FROM alembic_version").fetchall() == [("0001",)]
        open_store(data).close()
        self.refused(start_old(data=data))

    @pytest.mark.needs_program("postgres")
    def test_it_refuses_a_database(self, start_old: StartOld, postgres: str) -> None:
        open_store(postgres).close()
        self.refused(start_old("--store", postgres))


@pytest.mark.needs_program("postgres")
class TestRollingUpgrade:
    OLD = "application_name = 'lrpilot'"
    NEW = f"application_name = 'lrpilot/{REVISION}'"

    async def test_the_release_before_deletes_a_run_with_snapshots(
        self, start_old: StartOld, postgres: str
    ) -> None:
        async with start_old("--store", postgres).wait_ready().connected() as old:
            await old.attach()
            store = open_store(postgres)
            head = store.head("small")
            assert head is not None
            assert store.save_snapshot("small", Snapshot(*head, 0, b"fold"))
            await old.call("DeleteRun", run="small", force=True)
            await old.attach()
            assert store.head("small") is not None
            assert store.snapshot("small") is None
            store.close()

    def test_a_job_trains_through_it(
        self,
        programs: Programs,
        start_old: StartOld,
        ranks: list[Rank],
        postgres: str,
        postgres_cluster: Cluster,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Servers of two releases serve one run at once, and then the new ones alone."""
        monkeypatch.setattr(_packing, "SEGMENT_ROWS", 20)
        database = postgres.rpartition("/")[2]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            new_address = f"127.0.0.1:{free.getsockname()[1]}"
        spec = make_spec("rolling", delay=8)

        def train(address: str) -> Rank:
            options: dict[str, Any] = {
                "world_size": 4,
                "key": "start",
                "salt": "7",
                "pause_s": 0.002,
            }
            ranks.append(Rank(tmp_path, address, spec, len(ranks), end_after=400, **options))
            return ranks[-1]

        def all_go_on() -> None:
            aims = [(rank, rank.used()[-1].progress + 20) for rank in ranks]
            for rank, aim in aims:
                wait_until(partial(rank.reached, aim), f"rank {rank.rank} goes on")

        old = start_old("--store", postgres).wait_ready()
        both = f"{old.grpc},{new_address}"
        reporter = train(both)
        train(both)
        wait_until(lambda: reporter.reached(40), "the job trains")
        assert postgres_cluster.backends(database, self.OLD)
        assert not postgres_cluster.backends(database, self.NEW)

        new = programs("--store", postgres, "--listen", new_address).wait_ready()
        # From its first step on, over the new server alone.
        late = train(new_address)
        wait_until(lambda: late.reached(60), "a rank trains over the new server alone")
        all_go_on()
        assert postgres_cluster.backends(database, self.OLD)
        store = open_store(postgres)
        check_tables(store)
        assert len(store.read("rolling")) > 40
        assert store.compact("rolling", MAX_SEQ) == 0

        assert old.end(15) == 0
        all_go_on()
        wait_until(lambda: not postgres_cluster.backends(database, self.OLD), "it is gone")
        before = store.read("rolling")
        assert compact_all(store, "rolling", MAX_SEQ) >= 40
        assert store.read("rolling")[: len(before)] == before

        # A server that has to read what is packed.
        third = programs("--store", postgres).wait_ready()
        late = train(third.grpc)
        wait_until(lambda: late.reached(60), "a rank trains over a server that was just started")
        all_go_on()
        ask_to_end(tmp_path, "start")
        for rank in ranks:
            assert rank.wait() == 0, rank.log
            assert rank.outcome() == []
        values = one_value(ranks)
        steps = len(reporter.used())
        assert sorted(values) == [(1, n) for n in range(steps)]
        for server in (new, third):
            with Runs(server.grpc) as runs:
                losses = runs.losses("rolling")[1]
                assert runs.run("rolling").waivers == 0
            logged = {n: None if loss is None else loss.hex() for n, loss in losses.items()}
            assert logged == {n: loss_at(n, "7").hex() for n in range(steps)}
        store.close()
