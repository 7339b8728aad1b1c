"""The store on a SQL database, SQLite for now, and the lock on its folder.

What is peculiar to SQLite stands in `_sqlite_engine`; the rest is SQL that any database takes.
Rows are unique by (run, seq) and belong to a run by a foreign key, and the database itself
keeps to both: that makes two writers on one database safe, whatever they believe.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from lrpilot.server._memory_store import MemoryStore, check_limit
from lrpilot.server._schema import events, runs
from lrpilot.server._store import (
    MAX_SEQ,
    Append,
    AppendResult,
    LogRow,
    SchemaTooNew,
    SeqTaken,
    Store,
    StoreLocked,
    StoreUnavailable,
)

T = TypeVar("T")

logger = logging.getLogger("lrpilot.server")

DATABASE_NAME = "lrpilot.db"
"""The database in a data folder."""

LOCK_NAME = "lock"
"""The file in a data folder that a running server holds locked; its content is the server's pid."""

BUSY_TIMEOUT_S = 10
"""How long SQLite waits for another connection, such as a backup's, before it gives up."""

_MIGRATIONS = Path(__file__).parent / "migrations"
_NAMES_PER_QUERY = 500
_TRIES = 20


def open_store(target: str | Path) -> Store:
    """Open the store at `target` for this process alone, and bring its tables up to date.

    `target` is a data folder, which is made where it is missing; or `sqlite:///PATH`, a database
    file, whose folder is the data folder; or `memory://`, which forgets everything at the end.

    Raises StoreLocked when another server uses the folder, SchemaTooNew when a newer release
    wrote the database, StoreUnavailable when the folder or the database cannot be used, and
    ValueError for another kind of address.
    """
    text = str(target)
    if "://" not in text:
        return SqlStore.in_folder(Path(target), DATABASE_NAME)
    if text == "memory://":
        return MemoryStore()
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise ValueError(f"not the address of a store: {text!r}") from error
    named = url.database is not None and url.database not in {"", ":memory:"}
    if url.drivername != "sqlite" or not named or url.query:
        shown = url.render_as_string(hide_password=True)
        raise ValueError(f"a store is a folder, sqlite:///PATH or memory://; got {shown!r}")
    path = Path(url.database or "")
    return SqlStore.in_folder(path.parent, path.name)


class FolderLock:
    """The right to use a data folder, held until `release` or the end of the process.

    The kernel keeps the lock, so that no crash leaves it behind; the file stays, for to remove
    it would let two servers hold locks on two files of one name.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises StoreLocked, or StoreUnavailable where the folder is unusable."""
        path = folder / LOCK_NAME
        try:
            # The log holds the tokens of attempts: others have no business in it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreUnavailable(f"data folder {folder}: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise StoreLocked(
                f"data folder {folder} is used by another server, process {holder}; "
                "stop that one or choose another folder"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise StoreUnavailable(f"data folder {folder} cannot be locked: {error}") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the folder free. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class SqlStore:
    """A Store on a SQL database. See the protocol for what each method does."""

    def __init__(self, engine: sa.Engine, lock: FolderLock | None = None) -> None:
        """Bring the tables up to date; take over `engine` and `lock`, which `close` ends.

        Raises SchemaTooNew and StoreUnavailable; then both are ended already.
        """
        self._engine = engine
        self._writer = engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"})
        self._lock = lock
        self._closed = False
        try:
            self._write(_migrate)
        except BaseException:
            self.close()
            raise

    @classmethod
    def in_folder(cls, folder: Path, database: str) -> "SqlStore":
        """Lock a data folder and open the SQLite database in it.

        Raises as `open_store` does.
        """
        lock = FolderLock(folder)
        return cls(_sqlite_engine(folder / database), lock)

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        """Append to the logs of runs in one transaction; return one result per append."""
        return self._write(lambda connection: _append(connection, batch))

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        """Return the rows of a run with `seq > after_seq` in order, the first `limit` of them."""
        check_limit(limit)
        statement = (
            sa.select(events.c.seq, events.c.payload, events.c.digest, events.c.recorded_at_ns)
            .join(runs)
            .where(runs.c.name == run, events.c.seq > min(after_seq, MAX_SEQ))
            .order_by(events.c.seq)
            .limit(limit)
        )
        with self._transaction(self._engine) as connection:
            return [LogRow(*row) for row in connection.execute(statement)]

    def head(self, run: str) -> tuple[int, str] | None:
        """Return `seq` and digest of a run's last row; None: no run has that name."""
        statement = (
            sa.select(events.c.seq, events.c.digest)
            .join(runs)
            .where(runs.c.name == run)
            .order_by(events.c.seq.desc())
            .limit(1)
        )
        with self._transaction(self._engine) as connection:
            row = connection.execute(statement).first()
        return None if row is None else (row.seq, row.digest)

    def runs(self, after_name: str = "", limit: int | None = None) -> list[str]:
        """Return the names of runs greater than `after_name`, the first `limit` of them."""
        check_limit(limit)
        statement = (
            sa.select(runs.c.name)
            .where(runs.c.name > after_name)
            .order_by(runs.c.name)
            .limit(limit)
        )
        with self._transaction(self._engine) as connection:
            return list(connection.scalars(statement))

    def delete(self, run: str) -> bool:
        """Remove a run with its whole log, for good; return whether there was one."""
        return self._write(lambda connection: _delete(connection, run))

    def close(self) -> None:
        """Release connections and locks. A second call does nothing."""
        self._closed = True
        self._engine.dispose()
        if self._lock is not None:
            self._lock.release()

    def _write(self, work: Callable[[sa.Connection], T]) -> T:
        for _ in range(_TRIES):
            try:
                with self._transaction(self._writer) as connection:
                    return work(connection)
            except IntegrityError:
                # Another writer took a seq or a name, or touched a run that goes, since this one
                # looked: look again. Each time somebody gets on, so this ends.
                continue
        raise StoreUnavailable(f"other writers were faster {_TRIES} times")

    @contextmanager
    def _transaction(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        try:
            with engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            name = self._engine.url.render_as_string(hide_password=True)
            raise StoreUnavailable(f"{name}: {cause}") from error


@dataclass(slots=True)
class _Head:
    run_id: int
    last_seq: int
    digest: str


_LAST_SEQ = (
    sa.select(sa.func.max(events.c.seq))
    .where(events.c.run_id == runs.c.id)
    .correlate(runs)
    .scalar_subquery()
)


def _append(connection: sa.Connection, batch: Sequence[Append]) -> list[AppendResult]:
    heads = _heads(connection, list({append.run for append in batch}))
    results: list[AppendResult] = []
    values: list[dict[str, Any]] = []
    for append in batch:
        head = heads.get(append.run)
        first, last = append.rows[0], append.rows[-1]
        if append.create:
            if head is not None:
                results.append(SeqTaken(append.run, first.seq, head.last_seq))
                continue
            created = connection.execute(
                sa.insert(runs).values(name=append.run, created_at_ns=first.recorded_at_ns)
            )
            run_id = created.inserted_primary_key[0]  # type: ignore[index]
            head = heads[append.run] = _Head(run_id, last.seq, last.digest)
        elif (
            head is None
            or first.seq != head.last_seq + 1
            or append.after not in {None, head.digest}
        ):
            last_seq = None if head is None else head.last_seq
            results.append(SeqTaken(append.run, first.seq, last_seq))
            continue
        head.last_seq, head.digest = last.seq, last.digest
        values.extend(
            {
                "run_id": head.run_id,
                "seq": row.seq,
                "payload": row.payload,
                "digest": row.digest,
                "recorded_at_ns": row.recorded_at_ns,
            }
            for row in append.rows
        )
        results.append(None)
    if values:
        connection.execute(sa.insert(events), values)
    return results


def _delete(connection: sa.Connection, name: str) -> bool:
    run_id = sa.select(runs.c.id).where(runs.c.name == name).scalar_subquery()
    connection.execute(sa.delete(events).where(events.c.run_id == run_id))
    return connection.execute(sa.delete(runs).where(runs.c.name == name)).rowcount > 0


def _heads(connection: sa.Connection, names: list[str]) -> dict[str, _Head]:
    heads = {}
    # A statement takes a bounded number of parameters.
    for begin in range(0, len(names), _NAMES_PER_QUERY):
        some = names[begin : begin + _NAMES_PER_QUERY]
        statement = (
            sa.select(runs.c.name, runs.c.id, events.c.seq, events.c.digest)
            .join(events)
            .where(runs.c.name.in_(some), events.c.seq == _LAST_SEQ)
        )
        for name, run_id, last_seq, digest in connection.execute(statement):
            heads[name] = _Head(run_id, last_seq, digest)
    return heads


_BEGIN = "lrpilot_begin"


def _sqlite_engine(path: Path) -> sa.Engine:
    """Return an engine whose every commit is on disk when it returns."""
    engine = sa.create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_TIMEOUT_S},
        pool_size=8,
        max_overflow=-1,
    )

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        # Transactions begin as `begin` says below, and not where the driver sees fit.
        connection.isolation_level = None
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreUnavailable(f"{path}: no write-ahead log possible here, only {mode!r}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer takes its lock at once: one that has read first could not get it afterwards
        # if another wrote in between.
        connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))

    return engine


def _migrate(connection: sa.Connection) -> None:
    """Bring the tables up to date. Raises SchemaTooNew."""
    with _quiet("alembic"):
        # Imported here, because it logs its plugins at import.
        from alembic.command import upgrade  # noqa: PLC0415
        from alembic.config import Config  # noqa: PLC0415
        from alembic.migration import MigrationContext  # noqa: PLC0415
        from alembic.script import ScriptDirectory  # noqa: PLC0415

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        scripts = ScriptDirectory.from_config(config)
        newest = scripts.get_current_head()
        found = MigrationContext.configure(connection).get_current_revision()
        if found == newest:
            return
        if found is not None and found not in {step.revision for step in scripts.walk_revisions()}:
            name = connection.engine.url.render_as_string(hide_password=True)
            raise SchemaTooNew(
                f"{name} is at revision {found}, written by a newer release of lrpilot; "
                f"this one knows revisions up to {newest}. Start the newer release, or restore "
                "a backup made before the upgrade"
            )
        upgrade(config, "head")
    if found is not None:
        logger.info("database upgraded from revision %s to %s", found, newest)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hold a library's progress reports back."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.WARNING)
    try:
        yield
    finally:
        noisy.setLevel(level)
