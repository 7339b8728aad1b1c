"""What goes wrong in a round: one small class for each kind, by name.

A fault begins when the training has got somewhere, and ends a moment later. `hit` says whether it
really happened: only those that did are counted.
"""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import psycopg

from lrpilot.server._store import LogRow
from tests.crash.cluster import Cluster, Server, SqliteCluster, StoreKind
from tests.crash.meddler import Meddling
from tests.crash.power import PowerLoss
from tests.crash.relay import Direction, Relay

BOTH: tuple[StoreKind, ...] = ("sqlite", "postgresql")

DEADLINE_S = 20.0

NOTICE_S = 0.01
"""Pause between two looks at whether a fault has taken hold."""


@dataclass(frozen=True)
class Scene:
    """What a fault may touch."""

    random: random.Random
    cluster: Cluster
    folder: Path
    """Of the round."""
    trainers: Callable[[], Sequence[Any]]
    """Returns the processes of the ranks that train now."""


@dataclass(frozen=True)
class Seen:
    """What a round left behind."""

    log: Sequence[LogRow]
    """The log of the run."""
    errors: Sequence[str]
    """Texts of the errors that calls ended with."""
    meddled: int
    """How many reports were meddled with."""


class Fault:
    """One fault of one round."""

    name: ClassVar[str]
    stores: ClassVar[tuple[StoreKind, ...]] = BOTH
    programs: ClassVar[tuple[str, ...]] = ()
    """Programs that it needs."""
    namespaces: ClassVar[bool] = False
    """Whether it needs a laboratory in namespaces of its own, which root alone can make."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.random = scene.random
        self.target = ""
        """What it befalls, for people."""

    def prepare(self) -> None:
        """Do what must be done before the training starts."""

    def begin(self) -> None:
        """Let it happen."""

    def end(self) -> None:
        """Take it back."""

    def clear(self) -> None:
        """Leave the cluster as it was; called after the training has ended."""

    def hit(self, seen: Seen) -> bool:
        """Return whether it happened."""
        return True

    def pick_server(self) -> Server:
        """Return one of the servers."""
        server = self.random.choice(self.scene.cluster.servers)
        self.target = server.name
        return server

    def pick_servers(self) -> list[Server]:
        """Return some of the servers, at least one."""
        servers = self.scene.cluster.servers
        chosen = self.random.sample(servers, self.random.randint(1, len(servers)))
        self.target = " ".join(server.name for server in chosen)
        return chosen


FAULTS: dict[str, type[Fault]] = {}
"""Every kind by its name."""


def _known(kind: type[Fault]) -> type[Fault]:
    FAULTS[kind.name] = kind
    return kind


# Processes.


@_known
class ServerKilled(Fault):
    """SIGKILL of servers, which start again."""

    name = "server killed"

    def begin(self) -> None:
        self._servers = self.pick_servers()
        for server in self._servers:
            server.end()

    def end(self) -> None:
        for server in self._servers:
            server.start()


@_known
class PowerLost(Fault):
    """The machine of the server loses its power: what was not synced is gone."""

    name = "power lost"
    stores = ("sqlite",)
    programs = ("strace",)

    def prepare(self) -> None:
        self._server = self.pick_server()
        self._power = PowerLoss(self._server.pid, self.scene.cluster.disk / "data")

    def begin(self) -> None:
        self._server.end()
        self._power.cut()

    def end(self) -> None:
        self._server.start()

    def clear(self) -> None:
        self._power.close()


@_known
class ServerStopped(Fault):
    """SIGSTOP of servers: they keep their connections, and are silent."""

    name = "server stopped"

    def begin(self) -> None:
        self._servers = self.pick_servers()
        for server in self._servers:
            server.send(signal.SIGSTOP)

    def end(self) -> None:
        for server in self._servers:
            server.send(signal.SIGCONT)


@_known
class RollingRestart(Fault):
    """Every server is told to end and is started again, one after the other."""

    name = "rolling restart"

    def begin(self) -> None:
        servers = self.scene.cluster.servers
        self.target = " ".join(server.name for server in servers)
        for server in self.random.sample(servers, len(servers)):
            server.end(signal.SIGTERM)
            server.start()


@_known
class ClientKilled(Fault):
    """SIGKILL of a rank; the job starts again from its checkpoint."""

    name = "client killed"
    _killed = False

    def begin(self) -> None:
        trainers = self.scene.trainers()
        if trainers:
            rank = self.random.choice(trainers)
            self.target = rank.name
            rank.kill()
            self._killed = True

    def hit(self, seen: Seen) -> bool:
        return self._killed


@_known
class ClientStopped(Fault):
    """SIGSTOP of a rank, which goes on later."""

    name = "client stopped"
    _pid = 0

    def begin(self) -> None:
        trainers = self.scene.trainers()
        if trainers:
            rank = self.random.choice(trainers)
            self.target, self._pid = rank.name, rank.pid
            os.kill(self._pid, signal.SIGSTOP)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            if self._pid:
                os.kill(self._pid, signal.SIGCONT)

    def hit(self, seen: Seen) -> bool:
        return self._pid != 0


@_known
class DatabaseKilled(Fault):
    """SIGKILL of every process of PostgreSQL, which starts again."""

    name = "database killed"
    stores = ("postgresql",)

    def begin(self) -> None:
        assert self.scene.cluster.database is not None
        self.scene.cluster.database.kill()

    def end(self) -> None:
        assert self.scene.cluster.database is not None
        self.scene.cluster.database.start()


@_known
class DatabaseStopped(Fault):
    """SIGSTOP of every process of PostgreSQL."""

    name = "database stopped"
    stores = ("postgresql",)

    def begin(self) -> None:
        assert self.scene.cluster.database is not None
        self.scene.cluster.database.send(signal.SIGSTOP)

    def end(self) -> None:
        assert self.scene.cluster.database is not None
        self.scene.cluster.database.send(signal.SIGCONT)


# The ways to the servers, and from these to their database.


class _RelayFault(Fault):
    """What befalls connections: to the servers, or to the database."""

    to_database: ClassVar[bool] = False

    def begin(self) -> None:
        servers = self.pick_servers()
        relays = [self._relay(server) for server in servers]
        self.relays = [relay for relay in relays if relay is not None]
        for relay in self.relays:
            self.befall(relay)

    def _relay(self, server: Server) -> Relay | None:
        return server.to_database if self.to_database else server.relay

    def befall(self, relay: Relay) -> None:
        """Let it happen to the connections of one relay."""
        raise NotImplementedError

    def end(self) -> None:
        for relay in self.relays:
            relay.heal()

    def hit(self, seen: Seen) -> bool:
        return any(relay.touched for relay in self.relays)


@_known
class AnswersLost(_RelayFault):
    """Requests are carried out, and the connection is reset in place of their answers."""

    name = "answers lost"

    def befall(self, relay: Relay) -> None:
        relay.lose_answers(self.random.randint(2, 8))


@_known
class CutOneWay(_RelayFault):
    """Nothing passes in one direction; it comes later."""

    name = "cut one way"

    def befall(self, relay: Relay) -> None:
        directions: tuple[Direction, Direction] = ("to", "from")
        relay.hold(self.random.choice(directions))


@_known
class CutBothWays(_RelayFault):
    """Nothing passes in either direction; it comes later."""

    name = "cut both ways"

    def befall(self, relay: Relay) -> None:
        relay.hold("to", "from")


@_known
class Delay(_RelayFault):
    """Everything comes later."""

    name = "delay"

    def befall(self, relay: Relay) -> None:
        relay.slow_down(self.random.uniform(0.02, 0.2))


@_known
class BlackHole(_RelayFault):
    """What is sent vanishes, and nobody is told."""

    name = "black hole"

    def befall(self, relay: Relay) -> None:
        relay.swallow()


@_known
class Reset(_RelayFault):
    """Every connection is reset."""

    name = "reset"

    def befall(self, relay: Relay) -> None:
        relay.touched = relay.reset()


class _DatabaseFault(_RelayFault):
    stores = ("postgresql",)
    to_database = True


@_known
class CommitsUnanswered(_DatabaseFault, AnswersLost):
    """The database commits, and the server is not told."""

    name = "commit answers lost"


@_known
class DatabaseCut(_DatabaseFault, CutOneWay):
    """A server hears nothing of its database, or is not heard by it, for a while."""

    name = "database cut one way"


@_known
class DatabaseCutBothWays(_DatabaseFault, CutBothWays):
    """Nothing passes between a server and its database for a while."""

    name = "database cut both ways"


@_known
class DatabaseDelay(_DatabaseFault, Delay):
    """The database answers later."""

    name = "database delay"


@_known
class DatabaseBlackHole(_DatabaseFault, BlackHole):
    """What a server and its database say to each other vanishes."""

    name = "database black hole"


@_known
class DatabaseReset(_DatabaseFault, Reset):
    """The connections of a server to its database are reset."""

    name = "database reset"


class _PacketFault(Fault):
    """Packets to or from one port meet a rule of the kernel's."""

    programs = ("iptables",)
    namespaces = True
    _packets = 0

    def begin(self) -> None:
        port = self._port()
        side = self.random.choice(["--dport", "--sport"])
        self.target = f"{self.target} {side[2:]} {port}"
        self._rule = ["INPUT", "-p", "tcp", side, str(port), "-j", *self.verdict]
        _iptables("-I", *self._rule)

    verdict: ClassVar[tuple[str, ...]]

    def _port(self) -> int:
        return int(self.pick_server().grpc.rpartition(":")[2])

    def end(self) -> None:
        listed = _iptables("-nvxL", "INPUT")
        self._packets = sum(int(found) for found in re.findall(r"(?m)^ *(\d+) ", listed))
        _iptables("-D", *self._rule)

    def hit(self, seen: Seen) -> bool:
        return self._packets > 0


def _iptables(*arguments: str) -> str:
    command = ["iptables", "-w", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


@_known
class PacketsDropped(_PacketFault):
    """Packets to or from a server are dropped."""

    name = "packets dropped"
    verdict = ("DROP",)


@_known
class PacketsRejected(_PacketFault):
    """Packets to or from a server are answered by a reset."""

    name = "packets rejected"
    verdict = ("REJECT", "--reject-with", "tcp-reset")


class _DatabasePacketFault(_PacketFault):
    stores = ("postgresql",)

    def _port(self) -> int:
        assert self.scene.cluster.database is not None
        self.target = "database"
        return int(self.scene.cluster.database.port)


@_known
class DatabasePacketsDropped(_DatabasePacketFault, PacketsDropped):
    """Packets to or from the database are dropped."""

    name = "database packets dropped"


@_known
class DatabasePacketsRejected(_DatabasePacketFault, PacketsRejected):
    """Packets to or from the database are answered by a reset."""

    name = "database packets rejected"


# The disk.


@_known
class DiskFull(Fault):
    """Not a byte is left; later there is room again."""

    name = "disk full"
    programs = ("mount",)
    namespaces = True

    def prepare(self) -> None:
        cluster = self.scene.cluster
        if isinstance(cluster, SqliteCluster):
            # What the write-ahead log has of the disk already would do for the whole round.
            cluster.truncate()

    def begin(self) -> None:
        self.target = "disk"
        self._filler = self.scene.cluster.disk / "filler"
        with self._filler.open("wb") as file:
            fill(file.fileno())
        database = self.scene.cluster.database
        if database is not None:
            self._log_before = len(database.log())
            use_up(database)

    def end(self) -> None:
        self._filler.unlink()
        database = self.scene.cluster.database
        if database is not None:
            self._logged = database.log()[self._log_before :]
            database.start_again()

    def hit(self, seen: Seen) -> bool:
        if self.scene.cluster.database is not None:
            return "No space left" in self._logged
        return any("full" in text for text in seen.errors)


def fill(file: int) -> None:
    """Write to a file until its file system has no room."""
    size = 1 << 20
    end_s = time.monotonic() + DEADLINE_S
    while size:
        assert time.monotonic() < end_s, "the disk is too large to be filled"
        try:
            os.write(file, bytes(size))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            size //= 2


def use_up(database: Any) -> None:
    """Let PostgreSQL use the room that it has set aside, until it asks for more."""
    with suppress(psycopg.Error), database.connected() as connection:
        for _ in range(64):
            connection.execute("SELECT pg_logical_emit_message(true, '', 'more')")
            connection.execute("SELECT pg_switch_wal()")


class _Traced(Fault):
    """What strace does to the calls of processes that make data durable."""

    programs = ("strace",)
    # Whoever may trace processes that are not its own children; others are often kept from it.
    namespaces = True
    _injected = 0

    def begin(self) -> None:
        database = self.scene.cluster.database
        if database is None:
            server = self.pick_server()
            pids = [server.pid]
        else:
            self.target, pids = "database", database.pids()
        self._output = self.scene.folder / "strace"
        said = self.scene.folder / "strace.log"
        options = [word for pid in pids for word in ("-p", str(pid))]
        calls = "fsync,fdatasync"
        with said.open("wb") as errors:
            self._strace = subprocess.Popen(
                [
                    *("strace", "-f", "-o", str(self._output), "-e", f"trace={calls}"),
                    *("-e", f"inject={calls}:{self.injection()}", *options),
                ],
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )
        end_s = time.monotonic() + DEADLINE_S
        while "attached" not in said.read_text() and self._strace.poll() is None:
            assert time.monotonic() < end_s, "strace does not attach"
            time.sleep(NOTICE_S)

    def injection(self) -> str:
        """Return what strace is to do."""
        raise NotImplementedError

    def end(self) -> None:
        self._strace.send_signal(signal.SIGINT)
        self._strace.wait(DEADLINE_S)
        self._injected = self._output.read_text(errors="replace").count(self.mark)
        database = self.scene.cluster.database
        if database is not None:
            database.start_again()

    mark: ClassVar[str]
    """What a line of strace holds where it did something."""

    def hit(self, seen: Seen) -> bool:
        return self._injected > 0


@_known
class SyncFails(_Traced):
    """fsync ends with EIO."""

    name = "fsync fails"
    mark = "(INJECTED)"

    def injection(self) -> str:
        return "error=EIO"


@_known
class SyncSlow(_Traced):
    """fsync takes long."""

    name = "fsync slow"
    mark = "(DELAYED)"

    def injection(self) -> str:
        return f"delay_enter={self.random.randint(50, 400) * 1000}"


# The clock.


@_known
class ClockJumps(Fault):
    """The wall clock of a server jumps; the monotonic one goes on."""

    name = "clock jumps"
    programs = ("faketime",)

    def prepare(self) -> None:
        self._clock = self.scene.folder / "clock"
        self._clock.write_text("+0")
        self._server = self.pick_server()
        self._server.end()
        self._server.start(
            LD_PRELOAD=str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))),
            FAKETIME_TIMESTAMP_FILE=str(self._clock),
            FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            # What it does about clocks of condition variables otherwise lets gRPC oversleep.
            FAKETIME_FORCE_MONOTONIC_FIX="0",
        )

    def begin(self) -> None:
        self._jump()

    def end(self) -> None:
        self._jump()

    def _jump(self) -> None:
        seconds = self.random.choice([-1, 1]) * self.random.choice([2, 60, 3600, 40_000_000])
        partial = self._clock.with_suffix(".part")
        partial.write_text(f"{seconds:+d}")
        partial.replace(self._clock)

    def clear(self) -> None:
        self._server.end()
        self._server.start()

    def hit(self, seen: Seen) -> bool:
        now_ns = time.time_ns()
        return any(abs(row.recorded_at_ns - now_ns) > 1.5e9 for row in seen.log)


# The messages.


class _Meddled(Fault):
    """What the network may do to whole reports; see `meddler`."""

    kind: ClassVar[Literal["duplicated", "reordered", "late"]]

    def meddling(self, begin: int) -> Meddling:
        """Return what rank 0 does to its reports from a progress on."""
        self.target = "reports"
        return Meddling(self.kind, begin, self.random.randint(3, 30), self.random.randrange(2**32))

    def hit(self, seen: Seen) -> bool:
        return seen.meddled > 0


@_known
class Duplicated(_Meddled):
    """Reports are sent twice at the same time."""

    name = "duplicated reports"
    kind = "duplicated"


@_known
class Reordered(_Meddled):
    """Reports are sent one by one in another order, and old ones among them."""

    name = "reordered reports"
    kind = "reordered"


@_known
class Late(_Meddled):
    """Reports come once more long after their time."""

    name = "late reports"
    kind = "late"


def missing(kind: type[Fault], *, has_namespaces: bool) -> str:
    """Return why a kind cannot happen here; empty: it can."""
    if kind.namespaces and not has_namespaces:
        return "needs the right to make namespaces, which root has"
    for program in kind.programs:
        if shutil.which(program) is None:
            return f"needs the program {program}"
    return ""


def kinds(store: StoreKind) -> list[str]:
    """Return the names of the kinds that a store may meet, in order."""
    return [name for name, kind in FAULTS.items() if store in kind.stores]
