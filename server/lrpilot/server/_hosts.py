"""Which host of a PostgreSQL is to be trusted: a primary that was failed over from may come back.

It takes writes as if nothing had happened, and lacks what its successor acknowledged. No setting of
libpq tells it from the successor. Two things do, and each connection is held to both before it is
used:

- the timeline, which a promotion raises. A host on an older one than this server has seen is not
  used any more. It knows nothing of what it saw before its start;
- a write, which must be confirmed as the database is set to confirm. A primary with synchronous
  standbys, whose standby has left it, confirms none. The same write makes sure that what can be
  read there is on the standby, too: after a crash of the primary that need not be so.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

Open = Callable[[Mapping[str, Any]], Any]
"""Connects as the arguments of libpq say, and bounds every wait on the connection."""

_LOOK = (
    "SELECT system_identifier,"
    " CASE WHEN NOT pg_is_in_recovery() THEN pg_walfile_name(pg_current_wal_lsn()) END"
    " FROM pg_control_system()"
)

_WRITE = (
    "SELECT CASE WHEN current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')"
    " THEN set_config('synchronous_commit', 'on', true) END,"
    " pg_logical_emit_message(true, 'lrpilot', '')"
)


class Hosts:
    """The hosts of one address, of which one at most is the primary. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timelines: dict[str, int] = {}
        """Identifier of a cluster to the greatest timeline seen there."""
        self._last = ""

    def connect(self, named: Mapping[str, Any], open_one: Open) -> Any:
        """Return a connection to the first host that is to be trusted.

        The one that was trusted last comes first. Raises psycopg.OperationalError.
        """
        import psycopg  # noqa: PLC0415 - it is optional.

        hosts = sorted(_split(named), key=lambda one: _shown(one) != self._last)
        failures = []
        for one in hosts:
            try:
                connection = open_one(one)
                try:
                    self._check(connection, one)
                except BaseException:
                    connection.close()
                    raise
            except psycopg.OperationalError as error:
                if len(hosts) == 1:
                    raise
                failures.append(str(error))
            else:
                self._last = _shown(one)
                return connection
        raise psycopg.OperationalError("; ".join(failures))

    def _check(self, connection: Any, host: Mapping[str, Any]) -> None:
        import psycopg  # noqa: PLC0415

        cluster, file = connection.execute(_LOOK).fetchone()
        # Eight digits of a segment's name are the timeline; a standby has none of its own.
        timeline = int(file[:8], 16) if file else 0
        with self._lock:
            newest = self._timelines.get(cluster, 0)
        if timeline < newest:
            raise psycopg.OperationalError(
                f"{_shown(host)} is on timeline {timeline}, and timeline {newest} was seen: an old "
                "primary that came back, and must not be used"
            )
        if timeline:
            try:
                connection.execute(_WRITE)
                connection.commit()
            except psycopg.OperationalError as error:
                raise psycopg.OperationalError(
                    f"{_shown(host)} did not confirm a write: {error}"
                ) from error
        with self._lock:
            self._timelines[cluster] = max(timeline, self._timelines.get(cluster, 0))


def _split(named: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments for each host of an address alone."""
    hosts = str(named.get("host", "")).split(",")
    if len(hosts) == 1 or "hostaddr" in named:
        return [dict(named)]
    ports = str(named.get("port", "")).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    # The wrong number of ports is for libpq to refuse.
    if len(ports) != len(hosts):
        return [dict(named)]
    return [
        {**named, "host": host, "port": port} if port else {**named, "host": host}
        for host, port in zip(hosts, ports, strict=True)
    ]


def _shown(named: Mapping[str, Any]) -> str:
    host, port = named.get("host", ""), named.get("port", "")
    return f"{host}:{port}" if port else str(host)
