"""What is peculiar to SQLite: engines whose commits are on disk, and the lock on a data folder."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL

from lrpilot.server._store import Reason, StoreLocked, StoreUnavailable

DATABASE_NAME = "lrpilot.db"
"""The database in a data folder."""

LOCK_NAME = "lock"
"""The file in a data folder that a running server holds locked; its content is the server's pid."""

BUSY_TIMEOUT_S = 10
"""How long SQLite waits for another connection, such as a backup's, before it gives up."""

WAL_BYTES = 64 << 20
"""Length of the write-ahead log from which on its content is moved to the database by force.
SQLite does so by itself at 4 MiB, but not while somebody reads, and there is always somebody where
many do."""

SHORTEN_TIMEOUT_S = 0.1
"""How long to move it so, tried once a second, waits for who reads: appends wait meanwhile."""

_LEAST_BYTES = 1 << 16
"""A disk with less room than this is full: no write can count on it."""

_REASONS: dict[str, Reason] = {
    "database or disk is full": "disk_full",
    "attempt to write a readonly database": "read_only",
    "disk I/O error": "io_error",
    "unable to open database file": "io_error",
    "database is locked": "locked",
}
"""Text of SQLite's to reason."""


def sqlite_reason(error: BaseException, folder: Path) -> Reason:
    """Return why SQLite refused; `folder` is that of the database."""
    reason = _REASONS.get(str(error), "other")
    if reason == "io_error":
        # It says no more where the file fails that connections share, or an open one is protected.
        with contextlib.suppress(OSError):
            found = os.statvfs(folder)
            if found.f_flag & os.ST_RDONLY:
                return "read_only"
            if found.f_bavail * found.f_frsize < _LEAST_BYTES:
                return "disk_full"
    return reason


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
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        except OSError as error:
            os.close(descriptor)
            raise StoreUnavailable(f"data folder {folder} cannot be written: {error}") from error
        self._descriptor: int | None = descriptor

    def release(self) -> None:
        """Give the folder free. A second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


BEGIN = "lrpilot_begin"
"""The option of a connection that says how its transactions begin; None: not at all."""


def sqlite_engine(path: Path) -> sa.Engine:
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
        statement = connection.get_execution_options().get(BEGIN, "BEGIN")
        if statement is not None:
            connection.exec_driver_sql(statement)

    return engine


def set_busy_timeout(connection: sa.Connection, timeout_s: float) -> None:
    """Let a connection wait at most so long for others."""
    connection.exec_driver_sql(f"PRAGMA busy_timeout = {round(timeout_s * 1000)}")


def wal_bytes(database: Path) -> int:
    """Return the length of a database's write-ahead log; 0: there is none.

    Raises StoreUnavailable where the disk does not say.
    """
    try:
        return Path(f"{database}-wal").stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StoreUnavailable(f"I/O error: {error}", "io_error") from error


def database_bytes(connection: sa.Connection) -> int:
    """Return the bytes of the database's file and of its write-ahead log.

    Raises StoreUnavailable where the disk does not say.
    """
    pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    page_bytes = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    return int(pages * page_bytes) + wal_bytes(Path(f"{connection.engine.url.database}"))
