"""What keeps long runs cheap: snapshots of their folds, and old rows packed behind them.

A run's state is trimmed now and then: it holds the last thousands of steps and what was decided,
and not all that ever happened. With it a snapshot is written, so that a server starts from there;
and the rows behind are packed. The log stays the truth: a snapshot that is missing, damaged or in
a form that this release does not know costs time and nothing else. Where a request needs what was
trimmed (a resume at an old checkpoint), the log is folded again from an older snapshot, or whole.
"""

import json
import logging
import threading
import time
import zlib
from typing import Any, Protocol

from lrpilot import core
from lrpilot.server._journal import about
from lrpilot.server._live_run import LiveRun
from lrpilot.server._store import Snapshot, Store, StoreError, StoreUnavailable

logger = logging.getLogger("lrpilot.server")

SNAPSHOT_EVERY = 8192
"""Events and losses of a run between two snapshots: what a start has to fold at most."""

KEPT_STEPS = 4096
"""Steps that a trimmed state holds at least; older ones are looked up in the log."""

KEPT_DELAYS = 4
"""Delays D that a trimmed state holds beyond that."""

KEPT_LATE = 4096
"""Losses that came late, the newest, of which a run that was trimmed knows that they did."""

ROWS_PER_READ = 10_000
"""Rows of a log that are in memory at a time while it is folded."""


class HistoryObserver(Protocol):
    """Who is told of snapshots and packed rows. Called on any thread."""

    def rows_compacted(self, rows: int) -> None:
        """Count rows that were packed."""

    def snapshot_failed(self) -> None:
        """Count a snapshot that could not be written, or rows that could not be packed."""


class History:
    """The logs of a store, as folds: found by snapshots, and kept short by them.

    What blocks may be called from any thread; the caller holds the lock of a run given.
    """

    def __init__(
        self,
        store: Store,
        observer: HistoryObserver | None = None,
        *,
        snapshot_every: int = SNAPSHOT_EVERY,
        kept_steps: int = KEPT_STEPS,
        kept_delays: int = KEPT_DELAYS,
    ) -> None:
        self._store = store
        self._observer = observer
        self._snapshot_every = snapshot_every
        self._kept_steps = kept_steps
        self._kept_delays = kept_delays
        self._has_failed = False
        self._is_ending = threading.Event()

    def stop(self) -> None:
        """Let what takes long end soon: a packing after its segment, a load after its page."""
        self._is_ending.set()

    def load(self, name: str, floor: int | None = None) -> LiveRun | None:
        """Return a run after its whole log, or None where there is no such run. Blocks.

        What lies at `floor` is known of it; None: what it takes to go on. Raises StoreError, and
        where the log itself is at fault CorruptLog, or whatever a fold of what is no event raises.
        """
        before: int | None = None
        while True:
            snapshot = self._store.snapshot(name, floor, before)
            try:
                return self._folded(name, snapshot, floor)
            except core.HistoryNeeded as error:
                # Further on in the log somebody went back behind what was kept until there.
                floor = error.progress
            except StoreError:
                raise
            except Exception as error:
                if snapshot is None:
                    raise
                before = snapshot.seq
                logger.warning(
                    "the snapshot at seq %d is of no use, more of the log is read: %s",
                    snapshot.seq,
                    error,
                    extra=about(name, seq=snapshot.seq, error=type(error).__name__),
                )

    def _folded(self, name: str, snapshot: Snapshot | None, floor: int | None) -> LiveRun | None:
        run, after = LiveRun(name), 0
        if snapshot is not None:
            # The row of the snapshot comes with those after it: it shows that they are its log's.
            run, after = _unpacked(name, snapshot), snapshot.seq - 1
        is_whole = False
        while not is_whole:
            rows = self._store.read(name, after, ROWS_PER_READ)
            is_whole = len(rows) < ROWS_PER_READ
            if snapshot is not None and after < snapshot.seq:
                if not rows or (rows[0].seq, rows[0].digest) != (snapshot.seq, snapshot.digest):
                    raise ValueError("it is of another log")
                del rows[0]
            for row in rows:
                run.apply(row)
            after = run.state.seq
            if not is_whole:
                if self._is_ending.is_set():
                    raise StoreUnavailable("the server is shutting down")
                self.trim(run, floor)
        return run if run.state.exists else None

    def trim(self, run: LiveRun, floor: int | None = None) -> None:
        """Drop what a run in memory will hardly be asked for; nothing from `floor` on."""
        trim(run, floor, kept_steps=self._kept_steps, kept_delays=self._kept_delays)

    def is_due(self, run: LiveRun) -> bool:
        """Return whether a run is to be trimmed and a snapshot to be written of it."""
        is_over = run.state.finished and run.snapshot_seq < run.state.seq
        return is_over or run.unsaved >= self._snapshot_every

    def snapshot(self, run: LiveRun) -> Snapshot:
        """Return a snapshot of a run. Some tenths of a second of work."""
        state = run.state
        return Snapshot(state.seq, state.digest, state.floor, _packed(run))

    def keep(self, name: str, snapshot: Snapshot) -> bool:
        """Write a snapshot down, and pack the rows behind it; return whether that was done.

        Blocks. Failures are counted and, the first in a row, logged: the next snapshot comes.
        """
        try:
            is_kept = self._store.save_snapshot(name, snapshot)
            while is_kept and (rows := self._store.compact(name, snapshot.seq)):
                if self._observer is not None:
                    self._observer.rows_compacted(rows)
                if self._is_ending.is_set():
                    # What is packed is packed; the next snapshot goes on with it.
                    break
        except StoreError as error:
            if self._observer is not None:
                self._observer.snapshot_failed()
            if not self._has_failed:
                logger.warning(
                    "its snapshot at seq %d could not be kept, so that the next start reads more "
                    "of its log: %s",
                    snapshot.seq,
                    error,
                    extra=about(name, seq=snapshot.seq, error=type(error).__name__),
                )
            self._has_failed = True
            return False
        self._has_failed = False
        return is_kept


def trim(
    run: LiveRun,
    floor: int | None = None,
    *,
    kept_steps: int = KEPT_STEPS,
    kept_delays: int = KEPT_DELAYS,
) -> None:
    """Drop what a run in memory will hardly be asked for; nothing from `floor` on."""
    lag = run.lag.greatest(time.monotonic()) or 0
    behind = max(kept_delays * run.state.delay, lag)
    wanted = run.state.begin_of_last(kept_steps) - behind
    run.state.trim(wanted if floor is None else min(wanted, floor))
    # Of those trimmed from the state too: people look for them. But their number has no bound.
    if len(run.late) > KEPT_LATE:
        run.late = set(sorted(run.late)[-KEPT_LATE:])


def _packed(run: LiveRun) -> bytes:
    """Return what a run has from its log as bytes: a line of what is beside the state, and it."""
    beside = {
        "created_ns": run.created_ns,
        "updated_ns": run.updated_ns,
        "reported_ns": run.reported_ns,
        "gradient_norm": run.gradient_norm,
        "late": sorted(run.late),
    }
    line = json.dumps(beside, separators=(",", ":")).encode("ascii")
    return zlib.compress(line + b"\n" + run.state.snapshot())


def _unpacked(name: str, snapshot: Snapshot) -> LiveRun:
    """Return the run of a snapshot. Raises whatever bytes of no use do."""
    line, _, state = zlib.decompress(snapshot.data).partition(b"\n")
    beside: dict[str, Any] = json.loads(line)
    run = LiveRun(name)
    run.state = core.restore_snapshot(state)
    found = (run.state.name, run.state.seq, run.state.digest)
    if found != (name, snapshot.seq, snapshot.digest):
        raise ValueError(f"it holds run {found[0]!r} at seq {found[1]} with digest {found[2]}")
    run.created_ns, run.updated_ns = beside["created_ns"], beside["updated_ns"]
    run.reported_ns, run.gradient_norm = beside["reported_ns"], beside["gradient_norm"]
    run.late = {(seq, progress) for seq, progress in beside["late"]}
    run.snapshot_seq, run.snapshot_ns = snapshot.seq, run.updated_ns
    return run
