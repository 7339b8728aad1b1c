"""One run in memory: the fold of its log, and who waits for it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice

from lrpilot import core
from lrpilot.server._recent import RecentMaximum, RecentRanks
from lrpilot.server._store import LogRow
from lrpilot.v1.trainer_pb2 import SaveStateResponse

MAX_DIGESTS = 4096
"""Digests of blocks kept per run; dropped all at once, since they are cheap to make again."""

LAG_S = 60.0
"""How long the lag of a rank that asked is remembered, at least."""

RANKS_S = 120.0
"""How long a rank that asked is remembered."""


class CorruptLog(Exception):
    """The log in the store does not match its own digests."""


class LiveRun:
    """One run in memory."""

    def __init__(self, name: str, told: Callable[[str], None] | None = None) -> None:
        """`told` is called with the name whenever the state changes."""
        self._told = told
        self.state = core.RunState(name)
        self.lock = asyncio.Lock()
        self.changed = asyncio.Event()
        """Set and replaced whenever the state changes."""
        self.created_ns = 0
        self.updated_ns = 0
        """When the first and the last event were recorded, Unix nanoseconds."""
        self.seen_s: float | None = None
        """When a rank last asked for something, on the monotonic clock; None: not yet. Before a
        start of the server: when the last event was recorded."""
        self.viewed_s: float | None = None
        """When a person last looked, likewise: what other replicas write is read for them too."""
        self.blocks: dict[tuple[int, int, int, int], bytes] = {}
        """Serialized blocks of the current attempt."""
        self._digests: dict[tuple[int, int, int], bytes] = {}
        """Digests of recorded blocks of the current attempt, by begin, stride and steps."""
        self.saved: tuple[tuple[str, int], SaveStateResponse] | None = None
        """The answer with the state saved last, by digest of the log and progress."""
        self.late: set[tuple[int, int]] = set()
        """(seq, progress) of each loss that came after its step was final; of a trimmed run, of
        the newest ones."""
        self.reported_ns: int | None = None
        """When the last report was recorded, Unix nanoseconds; None: there is none."""
        self.gradient_norm: float | None = None
        """The last one that was reported; None: there is none."""
        self.lag = RecentMaximum(LAG_S)
        """How far the ranks that asked lately were behind the one that is farthest."""
        self.ranks = RecentRanks(RANKS_S)
        """Where each rank of the attempt was that asked lately."""
        self.snapshot_seq = 0
        """Where the newest snapshot ends that this server wrote or read."""
        self.unsaved = 0
        """Events, and losses in them, that were applied since that snapshot."""
        self.snapshot_ns: int | None = None
        """When the last event in it was recorded, Unix nanoseconds; None: there is none."""
        self.superseded_calls = 0
        """Calls of an older attempt that this server refused."""
        self._blocked = 0
        self._blocked_since_s = 0.0
        self._blocked_before_s = 0.0
        self._horizon = 0

    @property
    def ranks_waiting(self) -> int:
        """Number of blocked requests that wait now."""
        return self._blocked

    def blocked_s(self) -> float:
        """Return for how long, since the horizon last moved, a training thread was blocked."""
        running = time.monotonic() - self._blocked_since_s if self._blocked else 0.0
        return self._blocked_before_s + running

    @asynccontextmanager
    async def blocked(self) -> AsyncIterator[None]:
        """Count the time inside as time in which a training thread is blocked on the run."""
        if not self._blocked:
            self._blocked_since_s = time.monotonic()
        self._blocked += 1
        try:
            yield
        finally:
            self._blocked -= 1
            if not self._blocked:
                self._blocked_before_s += time.monotonic() - self._blocked_since_s

    def excuse(self) -> None:
        """Count blocked time from now on: what was before is not the reporter's fault."""
        self._blocked_before_s = 0.0
        self._blocked_since_s = time.monotonic()

    def decided(self) -> set[int]:
        """Return the `seq` of each event in which an adjustment or an advice was decided."""
        state = self.state
        every = (*state.plan.adjustments, *state.advice, *state.forgotten)
        return {item.seq for item in every}

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when the state changes, or after `timeout_s`."""
        try:
            await asyncio.wait_for(self.changed.wait(), timeout_s)
        except asyncio.TimeoutError:
            return

    def advance(self, rows: list[LogRow]) -> None:
        """Apply rows of the log and wake everyone who waits.

        Raises HistoryNeeded where the state is trimmed: the rows up to that one are applied then.
        Raises CorruptLog, and whatever a fold of what is no event raises; the run is empty then.
        """
        attempt = self.state.attempt
        try:
            for row in rows:
                self.apply(row)
        except core.HistoryNeeded:
            self._moved(attempt)
            raise
        except BaseException:
            # Half of a log is no state: nobody must be answered from it.
            self.reset()
            raise
        self._moved(attempt)

    def adopt(self, other: "LiveRun") -> None:
        """Take over what another one has from the log, and wake everyone who waits."""
        attempt = self.state.attempt
        self.reset()
        self.state, self.late = other.state, other.late
        self.reported_ns, self.gradient_norm = other.reported_ns, other.gradient_norm
        self.created_ns, self.updated_ns = other.created_ns, other.updated_ns
        self.snapshot_seq, self.snapshot_ns = other.snapshot_seq, other.snapshot_ns
        self.unsaved = other.unsaved
        self._moved(attempt)

    def _moved(self, attempt: int) -> None:
        """Act on a state that changed; `attempt` was the current one before."""
        if self.state.attempt != attempt:
            self._drop_blocks()
            self.lag = RecentMaximum(LAG_S)
            self.ranks = RecentRanks(RANKS_S)
        if self.state.horizon != self._horizon or self.state.attempt != attempt:
            self._horizon = self.state.horizon
            self.excuse()
        self.wake()

    def apply(self, row: LogRow) -> None:
        """Apply a row of the log, and wake nobody. Raises as `advance` does; then half of it may
        be applied, and nothing of it where HistoryNeeded is raised.
        """
        event = core.decode(row.payload)
        late = len(self.state.late)
        self.state.apply(event, row.payload)
        self.unsaved += 1
        if isinstance(event, core.Reported):
            # New ones stand at the end.
            new = islice(reversed(self.state.late), len(self.state.late) - late)
            self.late.update((row.seq, progress) for progress, _ in new)
            self.unsaved += len(event.reports)
            self.reported_ns = row.recorded_at_ns
            for report in event.reports:
                if report.gradient_norm is not None:
                    self.gradient_norm = report.gradient_norm
        elif isinstance(event, core.Declared):
            # It undoes what was recorded behind it.
            self._drop_blocks()
        if (self.state.seq, self.state.digest) != (row.seq, row.digest):
            raise CorruptLog(
                f"event {row.seq} of run {self.state.name!r}: the log says digest "
                f"{row.digest}, its content gives {self.state.digest} at {self.state.seq}"
            )
        self.created_ns = self.created_ns or row.recorded_at_ns
        self.updated_ns = row.recorded_at_ns

    def reset(self) -> None:
        """Forget everything that came from the log."""
        self.state = core.RunState(self.state.name)
        self.created_ns = self.updated_ns = 0
        self.reported_ns = self.gradient_norm = None
        self.snapshot_seq, self.unsaved, self.snapshot_ns = 0, 0, None
        self._drop_blocks()
        self.late.clear()

    def _drop_blocks(self) -> None:
        self.blocks.clear()
        self._digests.clear()

    def digest(self, begin: int, stride: int, steps: int) -> bytes | None:
        """Return the digest of a block as it is recorded; None: not all of it is."""
        key = (begin, stride, steps)
        found = self._digests.get(key)
        if found is None:
            found = core.recorded_digest(self.state, begin, stride, steps)
            if len(self._digests) >= MAX_DIGESTS:
                self._digests.clear()
            if found is not None:
                self._digests[key] = found
        return found

    def wake(self) -> None:
        """Wake everyone who waits."""
        self.changed.set()
        self.changed = asyncio.Event()
        if self._told is not None:
            self._told(self.state.name)
