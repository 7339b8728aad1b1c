"""What the trainers of a laboratory train against: servers, their database, and the ways between.

One server on SQLite, or several on one PostgreSQL. Servers stay up from round to round. Trainers
reach each through a relay, and each reaches PostgreSQL through one.
"""

import importlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from sqlalchemy.engine import make_url

from lrpilot.server._sql_store import open_store
from lrpilot.server._sqlite import DATABASE_NAME
from lrpilot.server._store import LogRow
from tests import postgres
from tests.crash.relay import Http2Answers, Network, Relay, commits

StoreKind = Literal["sqlite", "postgresql"]

DEADLINE_S = 30.0
"""Every wait here ends by then."""

READY = b"lrpilot ready "

PROGRAM = "tests.crash.server_program"
"""What a server is started as."""

PROCESSES = multiprocessing.get_context("forkserver")
"""Starts servers and trainers from a process that has their imports behind it."""

PRELOADED = [
    "tests.crash.rounds",
    "lrpilot.server._app",
    "lrpilot.server.cli",
    "alembic.command",
    "psycopg",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite",
]


class ServerEnded(Exception):
    """A server has ended that nobody ended."""


def _become_server(log: Path, said: Any, bug: str, arguments: Sequence[str]) -> None:
    """Be `lrpilot`, in a process of its own."""
    with log.open("ab") as errors:
        os.dup2(errors.fileno(), 2)
    os.dup2(said.fileno(), 1)
    said.close()
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = [PROGRAM, *_bug_options(bug), *arguments]
    importlib.import_module(PROGRAM).main()


def _bug_options(bug: str) -> list[str]:
    return ["--bug", bug] if bug else []


class Server:
    """One `lrpilot serve`, which may be ended and started again: it stays at one address."""

    def __init__(
        self, network: Network, folder: Path, name: str, store: Sequence[str], bug: str
    ) -> None:
        self.name = name
        self.relay = network.relay(Http2Answers)
        self.to_database: Relay | None = None
        """What it reaches its database through, where that is another process."""
        self._log = folder / f"{name}.log"
        self._arguments = ["serve", *store, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        self._bug = bug
        self._process: Any = None
        self.grpc = ""
        """Where it listens itself."""

    @property
    def pid(self) -> int:
        """Of its process."""
        pid: int = self._process.pid
        return pid

    def start(self, **environment: str) -> None:
        """Start it and wait until it serves; what is given is added to its environment."""
        heard, said = PROCESSES.Pipe(duplex=False)
        with closing(heard):
            if environment:
                # Not from the fork server, which has its own.
                with self._log.open("ab") as errors:
                    self._process = subprocess.Popen(
                        [
                            *(sys.executable, "-m", PROGRAM),
                            *(*_bug_options(self._bug), *self._arguments),
                        ],
                        stdout=said.fileno(),
                        stderr=errors,
                        env={**os.environ, **environment},
                    )
            else:
                self._process = PROCESSES.Process(
                    target=_become_server, args=(self._log, said, self._bug, self._arguments)
                )
                self._process.start()
            said.close()
            self._wait_ready(heard)

    def _wait_ready(self, heard: Any) -> None:
        line = b""
        end_s = time.monotonic() + DEADLINE_S
        while not line.endswith(b"\n"):
            waited = wait([heard], max(end_s - time.monotonic(), 0.0))
            piece = os.read(heard.fileno(), 4096) if waited else b""
            if not piece:
                raise ServerEnded(f"{self.name} did not start:\n{self.log()[-3000:]}")
            line += piece
        self.grpc = line.removeprefix(READY).split()[0].partition(b"=")[2].decode()
        self.relay.lead_to(self.grpc)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def end(self, number: int = signal.SIGKILL) -> None:
        """End it by a signal. Raises ServerEnded where it ends in another way."""
        self.send(number)
        code = self._wait()
        if code != (0 if number == signal.SIGTERM else -number):
            raise self._ended(code)

    def check(self) -> None:
        """Raise ServerEnded where it runs no more."""
        if self._exit_code() is not None:
            raise self._ended(self._exit_code())

    def dispose(self) -> None:
        """Leave no process of it behind."""
        if self._process is not None and self._exit_code() is None:
            self.send(signal.SIGCONT)
            self._process.kill()
            self._wait()

    def log(self) -> str:
        """Return what it wrote to standard error."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _exit_code(self) -> int | None:
        process = self._process
        code: int | None = (
            process.poll() if isinstance(process, subprocess.Popen) else process.exitcode
        )
        return code

    def _wait(self) -> int | None:
        if isinstance(self._process, subprocess.Popen):
            return self._process.wait(DEADLINE_S)
        self._process.join(DEADLINE_S)
        return self._exit_code()

    def _ended(self, code: int | None) -> ServerEnded:
        return ServerEnded(f"{self.name} ended with {code}:\n{self.log()[-3000:]}")


class Cluster:
    """The servers of a laboratory on one database."""

    kind: StoreKind
    servers: list[Server]
    database: postgres.Cluster | None = None
    disk: Path
    """Folder of the database, on a file system of its own where the laboratory has one."""

    @property
    def address(self) -> str:
        """Where trainers find the servers."""
        return ",".join(server.relay.address for server in self.servers)

    def log(self, run: str) -> list[LogRow]:
        """Return the log of a run as the database has it."""
        raise NotImplementedError

    def start(self) -> None:
        """Start every server."""
        for server in self.servers:
            server.start()

    def mend(self) -> None:
        """Make sure, for the next round, that all of it runs. Raises ServerEnded."""
        for server in self.servers:
            server.check()

    def close(self) -> None:
        """Leave nothing of it behind."""
        for server in self.servers:
            server.dispose()


class SqliteCluster(Cluster):
    """One server on SQLite."""

    kind: StoreKind = "sqlite"

    def __init__(self, network: Network, folder: Path, disk: Path, bug: str = "") -> None:
        self.disk = disk
        self._folder = folder
        self._data = disk / "data"
        self.servers = [Server(network, folder, "s0", ["--data", str(self._data)], bug)]

    def truncate(self) -> None:
        """Bring what the write-ahead log holds into the database, and give its room back."""
        path = self._data / DATABASE_NAME
        with closing(sqlite3.connect(path, timeout=DEADLINE_S)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def log(self, run: str) -> list[LogRow]:
        """Return the log of a run as the database has it."""
        # From a copy: the folder is the server's, and no store may be opened on it.
        copy = self._folder / "copy"
        copy.mkdir(exist_ok=True)
        address = f"file:{self._data / DATABASE_NAME}?mode=ro"
        with (
            closing(sqlite3.connect(address, uri=True, timeout=DEADLINE_S)) as connection,
            closing(sqlite3.connect(copy / DATABASE_NAME)) as copied,
        ):
            connection.backup(copied)
        with closing(open_store(copy)) as store:
            return store.read(run)


class PostgresCluster(Cluster):
    """Several servers on one PostgreSQL, each with a way of its own there."""

    kind: StoreKind = "postgresql"

    def __init__(
        self, network: Network, folder: Path, disk: Path, count: int, bug: str = ""
    ) -> None:
        self.disk = disk
        self.database = postgres.Cluster(
            durable=True, within=disk, min_wal_size="32MB", max_wal_size="64MB"
        ).start()
        self._name = self.database.create()
        self.servers = []
        for number in range(count):
            relay = network.relay(lambda: commits)
            relay.lead_to(f"127.0.0.1:{self.database.port}")
            url = make_url(self.database.address(self._name)).set(port=relay.port)
            store = ["--store", url.render_as_string(hide_password=False)]
            server = Server(network, folder, f"s{number}", store, bug)
            server.to_database = relay
            self.servers.append(server)

    def log(self, run: str) -> list[LogRow]:
        """Return the log of a run as the database has it."""
        assert self.database is not None
        with closing(open_store(self.database.address(self._name))) as store:
            return store.read(run)

    def mend(self) -> None:
        """Make sure, for the next round, that all of it runs. Raises ServerEnded."""
        assert self.database is not None
        self.database.start_again()
        super().mend()

    def close(self) -> None:
        """Leave nothing of it behind."""
        super().close()
        assert self.database is not None
        self.database.dispose()
