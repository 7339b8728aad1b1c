"""How long finished runs are kept, on machines whose clocks jump.

A run is deleted once its last event is older than what the server was told to keep, by a clock
that is distrusted in three ways: time that passed since the start counts as the monotonic clock
measured it, so that a wall clock set forward meanwhile makes nothing older; a run must be found
due at every look for `CONFIRMED_S` of monotonic time, in which a clock that was wrong at the start
is put right; and an event that lies in the future is not old.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol

from lrpilot import core
from lrpilot.server._journal import about
from lrpilot.server._ledger import Ledger
from lrpilot.server._store import LogRow, Store, StoreUnavailable

logger = logging.getLogger("lrpilot.server")

LOOK_S = 10 * 60.0
"""Time between two looks at which runs are due."""

CONFIRMED_S = 60 * 60.0
"""How long a run is found due before it is deleted, on the monotonic clock."""

_AFTER_THE_END = {core.Attached.kind, core.Acknowledged.kind, core.Imported.kind}
"""Kinds of events that may follow the one that finishes a run."""

_PAGE = 10_000


class RetentionObserver(Protocol):
    """Who is told of each run that was deleted for its age."""

    def run_expired(self) -> None:
        """Count one."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the time comes from."""

    wall_ns: Callable[[], int] = time.time_ns
    monotonic_s: Callable[[], float] = time.monotonic


class Retention:
    """Deletes finished runs whose time is over. Use it from one event loop."""

    def __init__(
        self,
        store: Store,
        ledger: Ledger,
        keep_s: float,
        observer: RetentionObserver,
        clock: Clock | None = None,
    ) -> None:
        """Keep finished runs for `keep_s` seconds after their last event."""
        self._store = store
        self._ledger = ledger
        self._keep_ns = round(keep_s * 1e9)
        self._observer = observer
        self._clock = clock or Clock()
        self._started = self._clock.wall_ns(), self._clock.monotonic_s()
        self._unreadable: set[str] = set()
        """Runs whose last event could not be read at the last look."""
        self._due: dict[tuple[str, str], float] = {}
        """Run and digest of its log to when it was first found due, of those found at each look
        since."""

    async def run(self) -> None:
        """Look now and then, without end."""
        while True:
            try:
                await self.look()
            except StoreUnavailable:
                # Readiness tells of it.
                pass
            except Exception:
                logger.exception("finished runs cannot be looked through")
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look once which runs are due, and delete those that were long enough."""
        now_s = self._clock.monotonic_s()
        ends = await asyncio.to_thread(self._find_due)
        self._due = {
            key: self._due.get(key, now_s) for key in ((name, row.digest) for name, row in ends)
        }
        for name, row in ends:
            if now_s - self._due[name, row.digest] >= CONFIRMED_S:
                try:
                    await self._delete(name, row)
                except StoreUnavailable:
                    raise
                except Exception:
                    logger.exception("is due and cannot be deleted", extra=about(name))

    def _find_due(self) -> list[tuple[str, LogRow]]:
        """Return the finished runs that are old enough, with their last rows."""
        wall_ns, since_s = self._started
        passed_ns = round((self._clock.monotonic_s() - since_s) * 1e9)
        before_ns = min(self._clock.wall_ns(), wall_ns + passed_ns) - self._keep_ns
        kept = set(self._store.recent(before_ns))
        due = []
        unreadable = set()
        after = ""
        while names := self._store.runs(after, _PAGE):
            after = names[-1]
            for name in names:
                if name in kept:
                    continue
                try:
                    row = self._end_of(name)
                except StoreUnavailable:
                    raise
                except Exception:
                    # An event of a newer release, or a damaged one: the other runs go all the same.
                    if name not in self._unreadable:
                        logger.exception(
                            "is kept: its last event cannot be read", extra=about(name)
                        )
                    unreadable.add(name)
                    continue
                if row is not None and row.recorded_at_ns < before_ns:
                    due.append((name, row))
        self._unreadable = unreadable
        return due

    def _end_of(self, name: str) -> LogRow | None:
        """Return the last row of a run's log; None: it is not finished, or not there."""
        head = self._store.head(name)
        seq = 0 if head is None else head[0]
        last: LogRow | None = None
        while seq > 0:
            rows = self._store.read(name, seq - 1, 1)
            if not rows:
                return None
            last = last or rows[0]
            kind = core.decode(rows[0].payload).kind
            if kind == core.Finished.kind:
                return last
            if kind not in _AFTER_THE_END:
                return None
            seq -= 1
        return None

    async def _delete(self, name: str, end: LogRow) -> None:
        run = await self._ledger.find(name)

        def check(state: core.RunState) -> None:
            # Another replica may have deleted it, and somebody made one of that name.
            if (state.seq, state.digest) != (end.seq, end.digest) or not state.finished:
                raise _NotDue

        try:
            await self._ledger.delete(run, check)
        except _NotDue:
            return
        recorded = datetime.fromtimestamp(end.recorded_at_ns // 10**9, timezone.utc)
        logger.warning(
            "deleted for its age: finished, its last event (seq %d, digest %s) was recorded "
            "at %s, and finished runs are kept for %g days",
            end.seq,
            end.digest,
            f"{recorded:%Y-%m-%d %H:%M:%S}Z",
            self._keep_ns / 1e9 / 86400,
            extra=about(name, seq=end.seq),
        )
        self._observer.run_expired()


class _NotDue(Exception):
    """The run is not the one that was found due."""
