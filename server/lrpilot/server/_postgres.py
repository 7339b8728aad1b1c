"""What is peculiar to PostgreSQL: connections that cannot hang, and word from one server to others.

The rest is in `_sql_store`. Nothing here decides anything about a log: the unique key on
(run, seq) does, in the database.
"""

import contextlib
import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL

from lrpilot.server._hosts import Hosts
from lrpilot.server._schema import REVISION, metadata
from lrpilot.server._store import Heard, News, Reason, StoreUnavailable

logger = logging.getLogger("lrpilot.server")

CHANNEL = "lrpilot"
"""Where servers on one database tell each other what they wrote. Each database has its own."""

CONNECTIONS = 8
"""Connections that a server uses at once, besides the one that listens."""

POOL_S = 4.0
"""How long a call waits for one of them to be free."""

CONNECT_S = 4
"""How long it may take to connect, in whole seconds, as libpq counts."""

STATEMENT_S = 6.0
"""How long the database works on one statement before it gives up, waits for locks included."""

IDLE_S = 5.0
"""How long the database keeps a transaction open whose server does nothing: a server that was
stopped must not hold up the others."""

ANSWER_S = 8.0
"""How long a database may be silent before the connection is cut. More than STATEMENT_S, for a
database that lives says why; less than the 10 s after which clients give up a call."""

PAUSE_S = 1.0
"""After the database was silent for too long, calls are refused at once for so long: each would
only wait in its turn."""

MIGRATION_S = 600.0
"""How long another server's upgrade of the tables is waited for, and how long one may take."""

RELISTEN_S = 0.5
"""Pause before a listener that lost its connection tries again."""

_LOCK = 0x6C72_7069_6C6F_74
"""Key of the advisory lock under which tables are upgraded: "lrpilot" in ASCII."""

_CONFLICTS = {"40001", "40P01"}
"""SQLSTATE of a serialization failure and of a deadlock: the transaction left nothing behind."""

_NAME = "lrpilot/"
"""How connections of servers are named in pg_stat_activity, the revision of their tables behind
it."""

_ANSWER = "lrpilot_answer_s"


def shown(url: URL) -> str:
    """Return the address of a database without what may be secret in it."""
    hosts = url.query.get("host", ())
    hosts = (hosts,) if isinstance(hosts, str) else hosts
    host = f"{url.host or ','.join(hosts)}{f':{url.port}' if url.port else ''}"
    return f"postgresql://{host}/{url.database or ''}"


def is_conflict(error: BaseException) -> bool:
    """Return whether the database ended a transaction because of another one."""
    return getattr(error, "sqlstate", None) in _CONFLICTS


_REASONS: dict[str, Reason] = {
    "53100": "disk_full",
    "53300": "too_many",
    "25006": "read_only",
    "58030": "io_error",
    "55P03": "locked",
    "57014": "locked",
}
"""SQLSTATE to reason."""


def postgres_reason(error: BaseException) -> Reason:
    """Return why the database refused."""
    if not type(error).__module__.startswith("psycopg"):
        return "other"
    state = getattr(error, "sqlstate", None)
    if state in _REASONS:
        return _REASONS[state]
    text = str(error)
    if "session is read-only" in text or "server is in hot standby mode" in text:
        return "read_only"
    # Class 08: lost connections; 57P: the database shuts down, starts or ended the session.
    is_lost = state is None or state[:2] == "08" or state[:3] == "57P"
    return "unreachable" if is_lost else "other"


class Watchdog:
    """Cuts connections on which the database is silent for too long.

    A database that is stopped, or that lies behind a network which swallows everything, neither
    answers nor closes: its own timeouts do not run, and its kernel keeps the connection alive.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends_s: dict[Any, float] = {}
        self._cut: set[Any] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lrpilot-watchdog", daemon=True)
        self._thread.start()

    def expect(self, connection: Any, answer_s: float) -> None:
        """Cut a connection of psycopg after `answer_s`, unless told otherwise before."""
        with self._lock:
            self._ends_s[connection] = time.monotonic() + answer_s

    def forget(self, connection: Any) -> bool:
        """Expect nothing more of a connection; return whether it was cut."""
        with self._lock:
            self._ends_s.pop(connection, None)
            was_cut = connection in self._cut
            self._cut.discard(connection)
        return was_cut

    def close(self) -> None:
        """End the watch."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            now_s = time.monotonic()
            with self._lock:
                for connection in [one for one, end_s in self._ends_s.items() if end_s < now_s]:
                    del self._ends_s[connection]
                    self._cut.add(connection)
                    _shut_down(connection)


def _shut_down(connection: Any) -> None:
    """End a connection under whoever waits for it: to them it looks as if the other side had."""
    # It may have been closed meanwhile, which is as good.
    with contextlib.suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as one:
        one.shutdown(socket.SHUT_RDWR)


class Postgres:
    """One PostgreSQL database, as the SQL store uses it."""

    def __init__(self, url: URL) -> None:
        """Make ready to connect; nothing is connected yet. Raises StoreUnavailable."""
        if importlib.util.find_spec("psycopg") is None:
            raise StoreUnavailable(
                "PostgreSQL needs psycopg, which is not installed: pip install 'lrpilot[postgres]'"
            )
        self.name = shown(url)
        self._arguments = _arguments(url)
        self.engine = _engine(url, self._arguments)
        self._password = url.password or url.query.get("password")
        self._watchdog = Watchdog()
        self._hosts = Hosts()
        self._warnings: dict[Any, str] = {}
        """What a connection was warned of in its last transaction."""
        self._refuse_until_s = 0.0
        self._silent = ""
        self._ended = threading.Event()
        self._listeners: list[threading.Thread] = []
        self._watch_engine()

    def describe(self, error: BaseException) -> str:
        """Return what an error says, for people, without secrets and on one line."""
        text = " ".join(str(error).split())
        return text.replace(str(self._password), "***") if self._password else text

    def refuse_if_silent(self) -> None:
        """Raise StoreUnavailable right after the database has been silent for too long."""
        if time.monotonic() < self._refuse_until_s:
            raise StoreUnavailable(self._silent, "no_answer")

    def was_silent(self, error: BaseException) -> None:
        """Refuse calls for a moment where an error shows that the database does not answer."""
        # An attempt to connect that takes too long; a class of psycopg, which is optional.
        if type(error).__name__ == "ConnectionTimeout":
            self._refuse(f"it did not answer within {CONNECT_S} s")

    @contextmanager
    def watched(self, connection: sa.Connection) -> Iterator[None]:
        """Bound every wait for the database inside. Raises StoreUnavailable."""
        raw = connection.connection.dbapi_connection
        self._warnings.pop(raw, None)
        try:
            yield
            self._refuse_warned(connection, raw)
        except sa.exc.SQLAlchemyError as error:
            if not self._watchdog.forget(raw):
                raise
            self._refuse(f"it did not answer within {ANSWER_S:g} s")
            raise StoreUnavailable(self._silent, "no_answer") from error
        finally:
            self._watchdog.forget(raw)

    def _refuse_warned(self, connection: sa.Connection, raw: Any) -> None:
        """Raise StoreUnavailable where a commit is said to be done, and a standby may lack it.

        Somebody cancelled the wait for the standby. What is in the log then is found out anew, on
        connections that are held to a write of their own.
        """
        warning = self._warnings.pop(raw, None)
        if warning is not None:
            connection.invalidate()
            self.engine.dispose()
            raise StoreUnavailable(f"{self.name}: committed with a warning: {warning}")

    def _refuse(self, why: str) -> None:
        self._silent = f"{self.name}: {why}"
        self._refuse_until_s = time.monotonic() + PAUSE_S

    def begin_migration(self, connection: sa.Connection) -> None:
        """Return once no other server upgrades the tables; they stay locked until the commit.

        Raises StoreUnavailable where the database is not one that can hold a log.
        """
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise StoreUnavailable(f"{self.name}: its encoding is {encoding}, and must be UTF8")
        end_s = time.monotonic() + MIGRATION_S
        lock = sa.select(sa.func.pg_try_advisory_xact_lock(_LOCK))
        while not connection.execute(lock).scalar_one():
            if time.monotonic() > end_s:
                raise StoreUnavailable(
                    f"{self.name}: another server has been upgrading the tables for "
                    f"{MIGRATION_S:g} s"
                )
            time.sleep(0.05)
        connection.execution_options(**{_ANSWER: MIGRATION_S})
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = '{MIGRATION_S:.0f}s'")

    def refuse_read_only(self, connection: sa.Connection) -> None:
        """Raise StoreUnavailable where the database says that it takes no writes."""
        if connection.exec_driver_sql("SHOW transaction_read_only").scalar_one() == "on":
            raise StoreUnavailable(f"read-only: {self.name} takes no writes", "read_only")

    def announce(self, connection: sa.Connection, news: Sequence[News]) -> None:
        """Tell every server what this transaction wrote, once it is committed.

        And make that commit durable: a database may be set to acknowledge what it has only in
        memory. One that is set to more than its own disk, as to a standby's, is left so.
        """
        statement = sa.text(
            "SELECT CASE WHEN current_setting('synchronous_commit') IN ('off', 'local',"
            " 'remote_write') THEN set_config('synchronous_commit', 'on', true) END"
            " UNION ALL"
            " SELECT CAST(pg_notify(:channel, note) AS text)"
            " FROM unnest(CAST(:notes AS text[])) AS note"
        )
        notes = [f"{one.seq or 0} {one.run}" for one in news]
        connection.execute(statement, {"channel": CHANNEL, "notes": notes})

    def has_older_server(self, connection: sa.Connection) -> bool:
        """Return whether a server is connected whose release cannot read packed rows.

        Release 0.2.0 does not say what it is. It calls itself "lrpilot", unless its address says
        otherwise; then it is known by its listener, whose statement those may see who connect
        with the same role.
        """
        statement = sa.text(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name NOT LIKE :named"
            " AND (application_name = 'lrpilot' OR query = :listens))"
        )
        values = {"named": f"{_NAME}%", "listens": f"LISTEN {CHANNEL}"}
        return bool(connection.execute(statement, values).scalar_one())

    def table_bytes(self, connection: sa.Connection) -> int:
        """Return the bytes of the tables and their indexes."""
        statement = sa.text(
            "SELECT sum(pg_total_relation_size(CAST(name AS regclass)))"
            " FROM unnest(CAST(:names AS text[])) AS name"
        )
        return int(connection.execute(statement, {"names": list(metadata.tables)}).scalar_one())

    def follow(self, heard: Heard) -> None:
        """Call `heard` with what servers write, this one included, until `close`."""
        thread = threading.Thread(
            target=self._listen, args=(heard,), name="lrpilot-listen", daemon=True
        )
        self._listeners.append(thread)
        thread.start()

    def close(self) -> None:
        """End every connection and thread."""
        self._ended.set()
        for thread in self._listeners:
            thread.join()
        self.engine.dispose()
        self._watchdog.close()

    def _listen(self, heard: Heard) -> None:
        is_lost = False
        while not self._ended.is_set():
            try:
                with contextlib.closing(self._connect()) as connection:
                    self._watchdog.expect(connection, ANSWER_S)
                    connection.execute(f"LISTEN {CHANNEL}")
                    self._watchdog.forget(connection)
                    if is_lost:
                        logger.info("%s: listening again", self.name)
                    is_lost = False
                    # Who knows what was missed before.
                    heard(News(None, None))
                    self._pass_on(connection, heard)
            except Exception as error:
                if not is_lost and not self._ended.is_set():
                    logger.warning(
                        "%s: not listening, so what other servers write is known a second later: "
                        "%s",
                        self.name,
                        self.describe(error),
                    )
                is_lost = True
                self._ended.wait(RELISTEN_S)

    def _connect(self) -> Any:
        """Return a connection that the pool knows nothing of."""
        _, named = self.engine.dialect.create_connect_args(self.engine.url)
        return self._open({**named, **self._arguments, "autocommit": True})

    def _open(self, named: dict[str, Any]) -> Any:
        """Return a connection to the host that is to be trusted."""
        opened: list[Any] = []

        def open_one(arguments: Mapping[str, Any]) -> Any:
            connect: Any = self.engine.dialect.connect
            connection = connect(**arguments)
            self._watchdog.expect(connection, ANSWER_S)
            opened.append(connection)
            return connection

        try:
            connection = self._hosts.connect(named, open_one)
        finally:
            for one in opened:
                self._watchdog.forget(one)
        connection.add_notice_handler(partial(self._heed, connection))
        return connection

    def _heed(self, connection: Any, diagnostic: Any) -> None:
        # Code 01000 is that of warnings without a code of their own, as this one is.
        if diagnostic.severity_nonlocalized == "WARNING" and diagnostic.sqlstate == "01000":
            self._warnings[connection] = str(diagnostic.message_primary)

    def _pass_on(self, connection: Any, heard: Heard) -> None:
        while not self._ended.is_set():
            for notification in connection.notifies(timeout=0.5):
                heard(_news(notification.payload))

    def _watch_engine(self) -> None:
        listens = sa.event.listens_for

        @listens(self.engine, "do_connect")
        def connect(_dialect: Any, _record: object, _arguments: Any, named: Any) -> Any:
            connection = self._open(named)
            # SQLAlchemy asks a new connection this and that.
            self._watchdog.expect(connection, ANSWER_S)
            return connection

        def renew(connection: sa.Connection, *_: object) -> None:
            if not connection.invalidated:
                answer_s = connection.get_execution_options().get(_ANSWER, ANSWER_S)
                self._watchdog.expect(connection.connection.dbapi_connection, answer_s)

        listens(self.engine, "before_cursor_execute")(renew)
        listens(self.engine, "commit")(renew)
        listens(self.engine, "rollback")(renew)


def _news(payload: str) -> News:
    """Read what `announce` wrote."""
    seq, _, run = payload.partition(" ")
    return News(run, int(seq) or None)


def _arguments(url: URL) -> dict[str, Any]:
    """Return what libpq is told about every connection, beside what the address says."""
    given = url.query.get("options", ())
    options = [
        f"-c statement_timeout={STATEMENT_S * 1000:.0f}",
        f"-c idle_in_transaction_session_timeout={IDLE_S * 1000:.0f}",
        *([given] if isinstance(given, str) else given),
    ]
    named = url.query.get("application_name", ())
    name = named if isinstance(named, str) else "".join(named[-1:])
    defaults = {
        "connect_timeout": CONNECT_S,
        # After a failover the old primary may be back as a standby.
        "target_session_attrs": "read-write",
        # A network that swallows everything must not look like a quiet database.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }
    chosen = {name: value for name, value in defaults.items() if name not in url.query}
    # What the address says stands last, for the database keeps 63 bytes of it.
    who = f"{_NAME}{REVISION} {name}".rstrip()
    return {**chosen, "application_name": who, "options": " ".join(options)}


def _engine(url: URL, arguments: dict[str, Any]) -> sa.Engine:
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args=arguments,
        isolation_level="READ COMMITTED",
        # The log holds the tokens of attempts: errors must not show them.
        hide_parameters=True,
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_timeout=POOL_S,
    )
