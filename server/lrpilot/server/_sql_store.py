"""The store on a SQL database, SQLite or PostgreSQL.

What is peculiar to SQLite stands in `_sqlite`, what is peculiar to PostgreSQL in
`_postgres`; the rest is SQL that any database takes.
Rows are unique by (run, seq) and belong to a run by a foreign key, and the database itself
keeps to both: that makes two writers on one database safe, whatever they believe.
"""

import dataclasses
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lrpilot.server._memory_store import MemoryStore, check_limit, needless
from lrpilot.server._migrate import is_newest, migrate
from lrpilot.server._packing import (
    ROW,
    PackedLog,
    Part,
    Unpacked,
    block_of,
    insert,
    next_segment,
    packed,
    replace,
    save_overview,
    segments_of,
)
from lrpilot.server._postgres import Postgres, is_conflict, postgres_reason
from lrpilot.server._schema import events, runs, snapshots
from lrpilot.server._segments import pack
from lrpilot.server._sqlite import (
    BEGIN,
    BUSY_TIMEOUT_S,
    DATABASE_NAME,
    SHORTEN_TIMEOUT_S,
    WAL_BYTES,
    FolderLock,
    database_bytes,
    set_busy_timeout,
    sqlite_engine,
    sqlite_reason,
    wal_bytes,
)
from lrpilot.server._store import (
    MAX_SEQ,
    Append,
    AppendResult,
    Heard,
    LogRow,
    News,
    Reason,
    Segment,
    SeqTaken,
    Snapshot,
    Store,
    StoreUnavailable,
)

T = TypeVar("T")

_NAMES_PER_QUERY = 500
_ROWS_PER_QUERY = 10_000
"""Rows that a statement returns at most: then the time that one takes is bounded."""
_TRIES = 20


def open_store(target: str | Path) -> Store:
    """Open the store at `target`, and bring its tables up to date.

    `target` is a data folder, which is made where it is missing; or `sqlite:///PATH`, a database
    file, whose folder is the data folder; or `postgresql+psycopg://…`, a database that any number
    of servers share; or `memory://`, which forgets everything at the end.

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
    except (ArgumentError, ValueError):
        # The driver's own words would repeat the password.
        raise ValueError(f"not the address of a store: {_masked(text)!r}") from None
    if url.drivername in {"postgresql", "postgresql+psycopg"}:
        if "@" in f"{url.host}{url.database}":
            raise ValueError("an @ in the password of a store's address is written %40")
        if not url.database:
            raise ValueError(f"the address of a store names no database: {_masked(text)!r}")
        return SqlStore.on_postgres(Postgres(url))
    named = url.database is not None and url.database not in {"", ":memory:"}
    if url.drivername != "sqlite" or not named or url.query:
        raise ValueError(
            "a store is a folder, sqlite:///PATH, postgresql+psycopg://USER@HOST/DATABASE or "
            f"memory://; got {_masked(text)!r}"
        )
    path = Path(url.database or "")
    return SqlStore.in_folder(path.parent, path.name)


def _masked(address: str) -> str:
    """Return an address, perhaps a malformed one, without its user, password and options."""
    return re.sub(r"\?.*", "?***", re.sub(r"//.*@", "//***@", address))


class SqlStore:
    """A Store on a SQL database. See the protocol for what each method does."""

    def __init__(
        self,
        engine: sa.Engine,
        lock: FolderLock | None = None,
        postgres: Postgres | None = None,
    ) -> None:
        """Bring the tables up to date; take over what is given, which `close` ends.

        `postgres` is what `engine` belongs to, where it is a PostgreSQL database. Raises
        SchemaTooNew and StoreUnavailable; then all is ended already.
        """
        self._engine = engine
        self._writer = engine.execution_options(**{BEGIN: "BEGIN IMMEDIATE"})
        self._reader = engine
        if postgres is not None:
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ")
        self._lock = lock
        self._postgres = postgres
        self._unpacked = Unpacked()
        self._closed = False
        self._name = postgres.name if postgres else engine.url.render_as_string(hide_password=True)
        self._path = None if postgres else Path(engine.url.database or "")
        try:
            if postgres is None or not self._transact(self._reader, is_newest):
                self._transact(self._writer, self._migrate)
            if postgres is None:
                self._settle()
        except BaseException:
            self.close()
            raise

    def _migrate(self, connection: sa.Connection) -> None:
        if self._postgres is not None:
            self._postgres.begin_migration(connection)
        migrate(connection, self._name)

    @classmethod
    def in_folder(cls, folder: Path, database: str) -> "SqlStore":
        """Lock a data folder and open the SQLite database in it.

        Raises as `open_store` does.
        """
        lock = FolderLock(folder)
        return cls(sqlite_engine(folder / database), lock)

    @classmethod
    def on_postgres(cls, postgres: Postgres) -> "SqlStore":
        """Open the store on a PostgreSQL database. Raises as `open_store` does."""
        return cls(postgres.engine, postgres=postgres)

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        """Append to the logs of runs in one transaction; return one result per append."""

        def work(connection: sa.Connection) -> list[AppendResult]:
            results = _append(connection, batch)
            written = {
                append.run: append.rows[-1].seq
                for append, conflict in zip(batch, results, strict=True)
                if conflict is None
            }
            self._announce(connection, [News(*item) for item in written.items()])
            return results

        return self._transact(self._writer, work)

    def adopt(self, run: str, log: PackedLog) -> None:
        """Make a run of a whole log, in one transaction."""

        def work(connection: sa.Connection) -> None:
            _adopt(connection, run, log, is_plain=self._is_old(connection))
            self._announce(connection, [News(run, log.tail[-1].seq)])

        self._transact(self._writer, work)

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        """Return the rows of a run with `seq > after_seq` in order, the first `limit` of them."""
        check_limit(limit)
        limit = MAX_SEQ if limit is None else limit
        after_seq = min(after_seq, MAX_SEQ)
        parts = self._transact(self._reader, lambda one: self._read(one, run, after_seq, limit))
        # Unpacked when the database is free again.
        return self._unpacked.rows(run, parts, after_seq, limit)

    def _read(self, connection: sa.Connection, run: str, after_seq: int, limit: int) -> list[Part]:
        rows: list[LogRow] = []
        last = after_seq
        while True:
            size = min(limit - len(rows), _ROWS_PER_QUERY)
            page = connection.execute(_ROWS_AFTER, {"name": run, "seq": last, "size": size}).all()
            rows.extend(LogRow(*row) for row in page)
            if not size or len(page) < size:
                break
            last = rows[-1].seq
        # The last row of a log is plain: where none is, none is packed either.
        if not rows or rows[0].seq == after_seq + 1:
            return [rows]
        return [*packed(connection, run, after_seq, limit, self._unpacked), rows]

    def head(self, run: str) -> tuple[int, str] | None:
        """Return `seq` and digest of a run's last row; None: no run has that name."""
        return self.heads([run]).get(run)

    def heads(self, runs: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Return what `head` does for many runs at once, without those that do not exist."""
        heads = self._transact(self._reader, lambda connection: _heads(connection, list(runs)))
        return {run: (head.last_seq, head.digest) for run, head in heads.items()}

    def runs(self, after_name: str = "", limit: int | None = None) -> list[str]:
        """Return the names of runs greater than `after_name`, the first `limit` of them."""
        check_limit(limit)
        statement = (
            sa.select(runs.c.name)
            .where(runs.c.name > after_name)
            .order_by(runs.c.name)
            .limit(limit)
        )
        return self._transact(self._reader, lambda one: list(one.scalars(statement)))

    def delete(self, run: str, after: str | None = None) -> bool:
        """Remove a run with its whole log, for good; return whether there was one."""

        def work(connection: sa.Connection) -> bool:
            existed = _delete(connection, run, after)
            if existed:
                self._announce(connection, [News(run, None)])
            return existed

        return self._transact(self._writer, work)

    def recent(self, since_ns: int) -> list[str]:
        """Return the names of the runs whose last row was recorded at or after `since_ns`."""
        statement = (
            sa.select(runs.c.name)
            .join(events)
            .where(events.c.seq == _LAST_SEQ, events.c.recorded_at_ns >= since_ns)
            .order_by(runs.c.name)
        )
        return self._transact(self._reader, lambda one: list(one.scalars(statement)))

    def save_snapshot(self, run: str, snapshot: Snapshot) -> bool:
        """Keep a snapshot of a run; return whether it is one of the log that is there."""
        # Unpacks now what has to be: others need not wait for that.
        self.read(run, snapshot.seq - 1, 1)
        return self._transact(self._writer, lambda one: self._save_snapshot(one, run, snapshot))

    def _save_snapshot(self, connection: sa.Connection, run: str, snapshot: Snapshot) -> bool:
        run_id = _hold(connection, run)
        before = snapshot.seq - 1
        at = self._unpacked.rows(run, self._read(connection, run, before, 1), before, 1)
        is_there = [(row.seq, row.digest) for row in at] == [(snapshot.seq, snapshot.digest)]
        if run_id is None or not is_there:
            return False
        of_run = snapshots.c.run_id == run_id
        found = connection.scalars(sa.select(snapshots.c.seq).where(of_run)).all()
        dropped = needless({*found, snapshot.seq})
        replaced = [*dropped, snapshot.seq]
        connection.execute(sa.delete(snapshots).where(of_run, snapshots.c.seq.in_(replaced)))
        if snapshot.seq not in dropped:
            values = {"run_id": run_id, **dataclasses.asdict(snapshot)}
            connection.execute(sa.insert(snapshots).values(values))
        return True

    def snapshot(
        self, run: str, floor: int | None = None, before_seq: int | None = None
    ) -> Snapshot | None:
        """Return the newest snapshot of a run that is asked for; None: there is none."""
        statement = (
            sa.select(snapshots.c.seq, snapshots.c.digest, snapshots.c.floor, snapshots.c.data)
            .join(runs)
            .where(runs.c.name == run)
            .order_by(snapshots.c.seq.desc())
            .limit(1)
        )
        if floor is not None:
            statement = statement.where(snapshots.c.floor <= min(floor, MAX_SEQ))
        if before_seq is not None and before_seq <= MAX_SEQ:
            statement = statement.where(snapshots.c.seq < before_seq)
        found = self._transact(self._reader, lambda one: one.execute(statement).first())
        return None if found is None else Snapshot(*found)

    def compact(self, run: str, through_seq: int) -> int:
        """Pack the next segment of a run's log, if it is due; return how many rows it holds."""
        through_seq = min(through_seq, MAX_SEQ)
        rows = self._transact(
            self._reader,
            lambda one: [] if self._is_old(one) else next_segment(one, run, through_seq),
        )
        if not rows:
            return 0
        block = pack(rows)

        def work(connection: sa.Connection) -> int:
            run_id = _hold(connection, run)
            if run_id is None or self._is_old(connection):
                return 0
            return replace(connection, run_id, rows, block)

        return self._transact(self._writer, work)

    def segments(self, run: str, after_seq: int = 0) -> list[Segment]:
        """Return what is packed of a run's log behind `after_seq`, in order."""
        after_seq = min(after_seq, MAX_SEQ)
        return self._transact(self._reader, lambda one: segments_of(one, run, after_seq))

    def segment(self, run: str, segment: Segment) -> bytes | None:
        """Return the packed rows of a segment; None: it is gone."""
        return self._transact(self._reader, lambda one: block_of(one, run, segment))

    def save_overview(self, run: str, segment: Segment) -> bool:
        """Keep the overview of a segment; return whether the segment is still there."""

        def work(connection: sa.Connection) -> bool:
            run_id = _hold(connection, run)
            return run_id is not None and save_overview(connection, run_id, segment)

        return self._transact(self._writer, work)

    def _is_old(self, connection: sa.Connection) -> bool:
        """Return whether a server is connected that cannot read packed rows."""
        return self._postgres is not None and self._postgres.has_older_server(connection)

    def size(self) -> int:
        """Return the bytes that the store takes on disk, with what is free there for more rows."""
        measure = database_bytes if self._postgres is None else self._postgres.table_bytes
        return self._transact(self._reader, measure)

    @property
    def folder(self) -> Path | None:
        """The folder that grows as the logs do; None: it is not on this machine."""
        return None if self._path is None else self._path.parent

    def check(self) -> None:
        """Return when the store can be read; otherwise raise StoreUnavailable."""

        def work(connection: sa.Connection) -> None:
            connection.execute(sa.select(runs.c.id).limit(1)).all()
            if self._postgres is not None:
                self._postgres.refuse_read_only(connection)

        self._transact(self._reader, work)
        self._shorten()

    def probe(self) -> None:
        """Return once a small write is on stable storage, as an append is; it leaves nothing."""

        def work(connection: sa.Connection) -> None:
            # The row that goes again was written all the same. No run can have this name.
            run = f" probe {secrets.token_hex(8)}"
            _append(connection, [Append(run, (LogRow(1, b"", "", 0),), create=True)])
            _delete(connection, run)
            if self._postgres is not None:
                self._postgres.announce(connection, [])

        self._transact(self._writer, work)

    def _settle(self) -> None:
        """Bring what a crashed server left in SQLite's write-ahead log to the disk.

        A commit whose fsync failed was refused, and its rows are seen by nobody: the next commit
        writes over them. But they stand in the kernel's memory, and a server that is killed then
        leaves them to the next one, which reads them as committed; the kernel takes pages that
        it failed to write for clean, and never writes them by itself. So they are written once
        more, into the database, before anyone is told of them. For the same reason a pool is not
        made anew after such a failure: connections that stay know where the log truly ends.
        """
        if not self._checkpoint(BUSY_TIMEOUT_S):
            raise StoreUnavailable(
                f"{self._name}: another program reads it; let it end, and start again", "locked"
            )

    def _shorten(self) -> None:
        """Keep SQLite's write-ahead log from growing without bound."""
        if self._path is None:
            return
        # On a disk that is full or broken it fails, which an append says loud enough.
        with suppress(StoreUnavailable):
            if wal_bytes(self._path) > WAL_BYTES:
                # Appends wait as long as this one waits for who reads.
                self._checkpoint(SHORTEN_TIMEOUT_S)

    def _checkpoint(self, timeout_s: float) -> bool:
        """Move SQLite's write-ahead log to the database, all of it; return whether that was done.

        It is not where others read for longer than `timeout_s`; nobody can write meanwhile.
        """

        def work(connection: sa.Connection) -> bool:
            set_busy_timeout(connection, timeout_s)
            try:
                done = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
            finally:
                # The connection goes back to the pool.
                set_busy_timeout(connection, BUSY_TIMEOUT_S)
            busy, _, _ = done
            return not busy

        return self._transact(self._engine.execution_options(**{BEGIN: None}), work)

    def follow(self, heard: Heard) -> bool:
        """Begin to call `heard` with what is written to the store; return whether others write."""
        if self._postgres is None:
            return False
        self._postgres.follow(heard)
        return True

    def close(self) -> None:
        """Release connections and locks. A second call does nothing."""
        self._closed = True
        if self._postgres is not None:
            self._postgres.close()
        self._engine.dispose()
        if self._lock is not None:
            self._lock.release()

    def _announce(self, connection: sa.Connection, news: list[News]) -> None:
        if self._postgres is not None and news:
            self._postgres.announce(connection, news)

    def _transact(self, engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
        """Return what `work` does in a transaction, tried again where that is harmless.

        Raises StoreUnavailable; whether the transaction was carried out is unknown then.
        """
        was_lost = False
        for _ in range(_TRIES):
            try:
                with self._transaction(engine) as connection:
                    return work(connection)
            except _Conflict:
                # Another writer took a seq or a name, or touched a run that goes, since this one
                # looked: look again. Each time somebody gets on, so this ends.
                continue
            except _ConnectionLost:
                # The pool's connections do not outlive a restart of the database; a new one does.
                if was_lost:
                    raise
                was_lost = True
        raise StoreUnavailable(
            f"{self._name}: other writers were faster {_TRIES} times", "too_many"
        )

    @contextmanager
    def _transaction(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        if self._postgres is not None:
            self._postgres.refuse_if_silent()
        is_committing = False
        try:
            with engine.connect() as connection, self._watched(connection), connection.begin():
                yield connection
                is_committing = True
        except SQLAlchemyError as error:
            raise self._translated(error, is_committing=is_committing) from error

    def _watched(self, connection: sa.Connection) -> AbstractContextManager[None]:
        return nullcontext() if self._postgres is None else self._postgres.watched(connection)

    def _translated(self, error: SQLAlchemyError, *, is_committing: bool) -> Exception:
        cause = getattr(error, "orig", None) or error
        if isinstance(error, IntegrityError) or is_conflict(cause):
            return _Conflict()
        text = str(cause)
        if self._postgres is not None:
            self._postgres.was_silent(cause)
            text = self._postgres.describe(cause)
        is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
        kind = _ConnectionLost if is_lost and not is_committing else StoreUnavailable
        reason = self._reason(error, cause)
        words = f"{_WORDS[reason]}: " if reason in _WORDS else ""
        return kind(f"{words}{self._name}: {text}", reason)

    def _reason(self, error: SQLAlchemyError, cause: BaseException) -> Reason:
        if isinstance(error, PoolTimeout):
            return "too_many"
        if self._path is None:
            return postgres_reason(cause)
        return sqlite_reason(cause, self._path.parent)


_WORDS: dict[Reason, str] = {
    "disk_full": "disk full",
    "read_only": "read-only",
    "io_error": "I/O error",
}
"""What databases say each in their own words."""


class _Conflict(Exception):
    """Another transaction was faster; nothing of this one is left."""


class _ConnectionLost(StoreUnavailable):
    """The connection ended before the commit; nothing of the transaction is left."""


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


_ROWS_AFTER = (
    sa.select(*ROW)
    # Found first: then the index has a log in its order, and nothing is sorted.
    .where(
        events.c.run_id
        == sa.select(runs.c.id).where(runs.c.name == sa.bindparam("name")).scalar_subquery(),
        events.c.seq > sa.bindparam("seq"),
    )
    .order_by(events.c.seq)
    .limit(sa.bindparam("size"))
)


def _append(connection: sa.Connection, batch: Sequence[Append]) -> list[AppendResult]:
    _share(connection, {append.run for append in batch})
    heads = _heads(connection, list({append.run for append in batch}))
    results: list[AppendResult] = [None] * len(batch)
    values: list[dict[str, Any]] = []
    # Every writer takes names, and then places in logs, in one order: else two of them may wait
    # for each other.
    for index, append in sorted(enumerate(batch), key=lambda item: item[1].run):
        head = heads.get(append.run)
        first, last = append.rows[0], append.rows[-1]
        if append.create:
            if head is not None:
                results[index] = SeqTaken(append.run, first.seq, head.last_seq)
                continue
            run_id = _create(connection, append.run, first)
            head = heads[append.run] = _Head(run_id, last.seq, last.digest)
        elif (
            head is None
            or first.seq != head.last_seq + 1
            or append.after not in {None, head.digest}
        ):
            last_seq = None if head is None else head.last_seq
            results[index] = SeqTaken(append.run, first.seq, last_seq)
            continue
        head.last_seq, head.digest = last.seq, last.digest
        values += _values(head.run_id, append.rows)
    if values:
        connection.execute(sa.insert(events), values)
    return results


def _adopt(connection: sa.Connection, run: str, log: PackedLog, *, is_plain: bool) -> None:
    """Make a run of a log; `is_plain`: no row of it is to be packed. Raises SeqTaken."""
    if log.first is None:
        raise ValueError(f"run {run!r}: a log needs at least one row")
    head = _heads(connection, [run]).get(run)
    if head is not None:
        raise SeqTaken(run, log.first.seq, head.last_seq)
    run_id = _create(connection, run, log.first)
    if not is_plain:
        for block in log.blocks:
            insert(connection, run_id, *block)
    # No statement writes more rows than a segment has: each is done long before the database, or
    # who waits for it, gives up.
    for rows in log.parts() if is_plain else [log.tail]:
        connection.execute(sa.insert(events), _values(run_id, rows))


def _create(connection: sa.Connection, name: str, first: LogRow) -> int:
    """Make a run whose log begins with `first`; return its id."""
    values = {"name": name, "created_at_ns": first.recorded_at_ns}
    created = connection.execute(sa.insert(runs).values(values))
    run_id: int = created.inserted_primary_key[0]  # type: ignore[index]
    return run_id


def _values(run_id: int, rows: Sequence[LogRow]) -> list[dict[str, Any]]:
    """Return rows as the columns of the table of events."""
    return [
        {
            "run_id": run_id,
            "seq": row.seq,
            "payload": row.payload,
            "digest": row.digest,
            "recorded_at_ns": row.recorded_at_ns,
        }
        for row in rows
    ]


def _delete(connection: sa.Connection, name: str, after: str | None = None) -> bool:
    run_id = _hold(connection, name)
    if run_id is None:
        return False
    if after is not None and _heads(connection, [name])[name].digest != after:
        return False
    connection.execute(sa.delete(events).where(events.c.run_id == run_id))
    # What else belongs to the run goes with it, by its foreign keys.
    connection.execute(sa.delete(runs).where(runs.c.id == run_id))
    return True


def _hold(connection: sa.Connection, name: str) -> int | None:
    """Return the id of a run, which nobody else appends to, packs or deletes until the commit."""
    return connection.scalar(sa.select(runs.c.id).where(runs.c.name == name).with_for_update())


def _share(connection: sa.Connection, names: Iterable[str]) -> None:
    """Let nobody pack or delete these runs until the commit; others may append to them.

    For the unique key says that a `seq` is taken only while its row is plain: where the head was
    read, another server appended, and a third packed its row, the `seq` would look free. SQLite
    lets one write at a time anyway.
    """
    if connection.dialect.name != "postgresql":
        return
    held = sa.select(runs.c.id).where(runs.c.name.in_(names)).order_by(runs.c.name)
    connection.execute(held.with_for_update(read=True, key_share=True))


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
