"""A real PostgreSQL for tests: a cluster of their own, and a fresh database for each.

Debian's programs or any others on the PATH do. They refuse to run as root, and run as `nobody`
then.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

DEADLINE_S = 60.0
"""Every wait here ends by then."""

USER = "lrpilot"

PASSWORD = "p@ss/w:rd %41"
"""Of the user of every cluster; with what an address must escape."""

NOBODY = 65534


def search_path() -> str:
    """Return where the programs of PostgreSQL may be: Debian keeps them apart from the others."""
    found = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return os.pathsep.join([os.environ.get("PATH", ""), *found])


def _program(name: str) -> str:
    found = shutil.which(name, path=search_path())
    assert found is not None, f"the program {name} is missing"
    return found


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _identity() -> dict[str, Any]:
    """Return as whom the programs run."""
    if os.geteuid() != 0:
        return {}
    return {"user": NOBODY, "group": NOBODY, "extra_groups": []}


class Cluster:
    """One PostgreSQL, which a test may stop, kill and start again."""

    def __init__(self, *, durable: bool, within: Path | None = None, **settings: object) -> None:
        """Make a cluster that is not started; one that need not be durable is faster.

        Its folder lies in `within`, which everyone must be able to enter.
        """
        # The folders of pytest are root's alone.
        self._folder = Path(tempfile.mkdtemp(prefix="lrpilot-postgres-", dir=within))
        self._data = self._folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._count = 0
        self.port = _free_port()
        if os.geteuid() == 0:
            os.chown(self._folder, NOBODY, NOBODY)
        secret = self._folder / "password"
        secret.write_text(PASSWORD + "\n")
        secret.chmod(0o644)
        subprocess.run(
            [
                _program("initdb"),
                f"--pgdata={self._data}",
                f"--username={USER}",
                f"--pwfile={secret}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C.UTF-8",
                "--no-sync",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self._folder,
            **_identity(),
        )
        chosen: dict[str, object] = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": self._folder,
            "shared_buffers": "16MB",
            "max_connections": 60,
            "fsync": "on" if durable else "off",
            "full_page_writes": "on" if durable else "off",
            "synchronous_commit": "on" if durable else "off",
            **settings,
        }
        with (self._data / "postgresql.auto.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in chosen.items())

    def start(self) -> "Cluster":
        """Start it and wait until it answers."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", self._data],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                **_identity(),
            )
        end_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                psycopg.connect(self.address("postgres", driver="")).close()
            except psycopg.OperationalError:
                assert self._is_running, self.log()
                assert time.monotonic() < end_s, self.log()
                time.sleep(0.02)
            else:
                return self

    def start_again(self) -> None:
        """Return once it answers, and start it if it ends by itself before that."""
        end_s = time.monotonic() + DEADLINE_S
        while self._is_running:
            try:
                psycopg.connect(self.address("postgres", driver="")).close()
            except psycopg.OperationalError:
                assert time.monotonic() < end_s, self.log()
                time.sleep(0.02)
            else:
                return
        self.start()

    @property
    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def standby(self, name: str) -> "Cluster":
        """Return a copy that is not started; it will follow this one until it is promoted."""
        other = object.__new__(Cluster)
        other._folder = Path(tempfile.mkdtemp(prefix="lrpilot-postgres-"))
        other._data = other._folder / "data"
        other._process, other._count = None, 0
        other.port = _free_port()
        if os.geteuid() == 0:
            os.chown(other._folder, NOBODY, NOBODY)
        with self.connected() as connection:
            connection.execute(f"SELECT pg_create_physical_replication_slot('{name}')")
        subprocess.run(
            [
                _program("pg_basebackup"),
                f"--dbname={self.address('postgres', driver='', application_name=name)}",
                f"--pgdata={other._data}",
                f"--slot={name}",
                "--write-recovery-conf",
                "--checkpoint=fast",
                "--no-sync",
            ],
            check=True,
            cwd=other._folder,
            **_identity(),
        )
        with (other._data / "postgresql.auto.conf").open("a") as file:
            file.write(f"port = {other.port}\nunix_socket_directories = '{other._folder}'\n")
            # Promoted, it has no standby of its own yet.
            file.write("synchronous_standby_names = ''\n")
        return other

    def confirm(self, names: str) -> None:
        """Acknowledge nothing any more that standbys have not confirmed; empty: acknowledge it."""
        with self.connected() as connection:
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
            connection.execute("SELECT pg_reload_conf()")

    def promote(self) -> None:
        """Make a standby a primary; return once it takes writes."""
        with self.connected() as connection:
            assert connection.execute("SELECT pg_promote(true, 60)").fetchone() == (True,)

    def log(self) -> str:
        """Return what it wrote."""
        return (self._folder / "log").read_text(errors="replace")

    def address(
        self, database: str, *, password: str = PASSWORD, driver: str = "+psycopg", **query: str
    ) -> str:
        """Return the address of a database."""
        options = "&".join(f"{name}={quote(value)}" for name, value in query.items())
        return (
            f"postgresql{driver}://{USER}:{quote(password, safe='')}@127.0.0.1:{self.port}"
            f"/{database}{'?' if options else ''}{options}"
        )

    @contextmanager
    def connected(self, database: str = "postgres") -> Iterator["psycopg.Connection[Any]"]:
        """Connect as an administrator would."""
        with psycopg.connect(self.address(database, driver=""), autocommit=True) as connection:
            yield connection

    def create(self) -> str:
        """Return the name of a new, empty database."""
        self._count += 1
        name = f"test_{self._count}_{secrets.token_hex(4)}"
        with self.connected() as connection:
            # Its strategy copies files, which is quicker than to log them where nothing is synced.
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 STRATEGY file_copy")
        return name

    def drop(self, database: str) -> None:
        """Remove a database and whoever is connected."""
        with self.connected() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)")

    def backends(self, database: str, where: str = "true") -> list[int]:
        """Return the processes that serve connections to a database."""
        with self.connected() as connection:
            found = connection.execute(
                f"SELECT pid FROM pg_stat_activity WHERE datname = '{database}' AND {where}"
            )
            return [pid for (pid,) in found]

    def terminate(self, database: str, where: str = "true") -> int:
        """End connections to a database; return how many."""
        pids = self.backends(database, where)
        with self.connected() as connection:
            for pid in pids:
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
        return len(pids)

    def pids(self) -> list[int]:
        """Return its processes, the one that starts the others last."""
        return [*self._children(), self._main()]

    def send(self, number: int) -> None:
        """Send a signal to every process of it, as far as there are any."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it as a crash of the machine would, but for what the kernel still holds."""
        # Stopped first: it would start processes anew that end before it does.
        os.kill(self._main(), signal.SIGSTOP)
        children = self._children()
        self.send(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(DEADLINE_S)
        self._process = None
        # It does not start while one of them has its memory.
        end_s = time.monotonic() + DEADLINE_S
        while any(map(_is_alive, children)):
            assert time.monotonic() < end_s, "its processes do not end"
            time.sleep(0.005)

    def dispose(self) -> None:
        """Leave nothing of it behind."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._folder)

    def _main(self) -> int:
        assert self._process is not None
        return self._process.pid

    def _children(self) -> list[int]:
        pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return [pid for pid in pids if _status(pid)[1:2] == [str(self._main())]]


def _status(pid: int) -> list[str]:
    """Return state, parent and more of a process; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _is_alive(pid: int) -> bool:
    return _status(pid)[:1] not in ([], ["Z"])
