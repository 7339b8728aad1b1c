"""The store for tests and simulations: nothing outlives the process."""

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from lrpilot.server._packing import PackedLog
from lrpilot.server._store import (
    MILESTONE_ROWS,
    Append,
    AppendResult,
    Heard,
    LogRow,
    Segment,
    SeqTaken,
    Snapshot,
    StoreUnavailable,
)


class MemoryStore:
    """A Store in memory. See the protocol for what each method does.

    Durability is the one promise that it cannot keep.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logs: dict[str, list[LogRow]] = {}
        self._snapshots: dict[str, dict[int, Snapshot]] = {}
        self._closed = False

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        """Append to the logs of runs in one transaction; return one result per append."""
        with self._lock:
            self._check_open()
            return [self._append(append) for append in batch]

    def _append(self, append: Append) -> AppendResult:
        log = self._logs.get(append.run)
        first = append.rows[0].seq
        last = log[-1].seq if log else None
        if append.create:
            if last is not None:
                return SeqTaken(append.run, first, last)
            log = self._logs[append.run] = []
        elif (
            log is None
            or last is None
            or first != last + 1
            or append.after not in {None, log[-1].digest}
        ):
            return SeqTaken(append.run, first, last)
        log.extend(append.rows)
        return None

    def adopt(self, run: str, log: PackedLog) -> None:
        """Make a run of a whole log, in one transaction."""
        rows = [row for part in log.parts() for row in part]
        (conflict,) = self.append([Append(run, tuple(rows), create=True)])
        if conflict is not None:
            raise conflict

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        """Return the rows of a run with `seq > after_seq` in order, the first `limit` of them."""
        check_limit(limit)
        with self._lock:
            self._check_open()
            log = self._logs.get(run)
            if log is None:
                return []
            begin = max(0, after_seq + 1 - log[0].seq)
            return log[begin : None if limit is None else begin + limit]

    def head(self, run: str) -> tuple[int, str] | None:
        """Return `seq` and digest of a run's last row; None: no run has that name."""
        with self._lock:
            self._check_open()
            log = self._logs.get(run)
            return (log[-1].seq, log[-1].digest) if log else None

    def heads(self, runs: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Return what `head` does for many runs at once, without those that do not exist."""
        found = {run: self.head(run) for run in runs}
        return {run: head for run, head in found.items() if head is not None}

    def runs(self, after_name: str = "", limit: int | None = None) -> list[str]:
        """Return the names of runs greater than `after_name`, the first `limit` of them."""
        check_limit(limit)
        with self._lock:
            self._check_open()
            return sorted(name for name in self._logs if name > after_name)[:limit]

    def delete(self, run: str, after: str | None = None) -> bool:
        """Remove a run with its whole log, for good; return whether there was one."""
        with self._lock:
            self._check_open()
            log = self._logs.get(run)
            if log is None or after not in {None, log[-1].digest}:
                return False
            self._snapshots.pop(run, None)
            del self._logs[run]
            return True

    def recent(self, since_ns: int) -> list[str]:
        """Return the names of the runs whose last row was recorded at or after `since_ns`."""
        with self._lock:
            self._check_open()
            logs = self._logs.items()
            return sorted(run for run, log in logs if log[-1].recorded_at_ns >= since_ns)

    def save_snapshot(self, run: str, snapshot: Snapshot) -> bool:
        """Keep a snapshot of a run; return whether it is one of the log that is there."""
        with self._lock:
            self._check_open()
            log = self._logs.get(run, [])
            index = snapshot.seq - log[0].seq if log else 0
            if not 0 <= index < len(log) or log[index].digest != snapshot.digest:
                return False
            saved = self._snapshots.setdefault(run, {})
            saved[snapshot.seq] = snapshot
            for seq in needless(saved):
                del saved[seq]
            return True

    def snapshot(
        self, run: str, floor: int | None = None, before_seq: int | None = None
    ) -> Snapshot | None:
        """Return the newest snapshot of a run that is asked for; None: there is none."""
        with self._lock:
            self._check_open()
            fit = [
                one
                for one in self._snapshots.get(run, {}).values()
                if (floor is None or one.floor <= floor)
                and (before_seq is None or one.seq < before_seq)
            ]
            return max(fit, key=lambda one: one.seq, default=None)

    def compact(self, run: str, through_seq: int) -> int:  # noqa: ARG002
        """Return 0: rows in memory are not packed."""
        with self._lock:
            self._check_open()
            return 0

    def segments(self, run: str, after_seq: int = 0) -> list[Segment]:  # noqa: ARG002
        """Return nothing: rows in memory are not packed."""
        with self._lock:
            self._check_open()
            return []

    def segment(self, run: str, segment: Segment) -> bytes | None:  # noqa: ARG002
        """Return None: rows in memory are not packed."""
        with self._lock:
            self._check_open()
            return None

    def save_overview(self, run: str, segment: Segment) -> bool:  # noqa: ARG002
        """Return that the segment is not there: rows in memory are not packed."""
        with self._lock:
            self._check_open()
            return False

    def size(self) -> int:
        """Return 0: nothing is on disk."""
        with self._lock:
            self._check_open()
            return 0

    @property
    def folder(self) -> Path | None:
        """None: it is on no disk."""
        return None

    def check(self) -> None:
        """Return when the store can be read; otherwise raise StoreUnavailable."""
        with self._lock:
            self._check_open()

    def probe(self) -> None:
        """Return when the store can be written; otherwise raise StoreUnavailable."""
        self.check()

    def follow(self, heard: Heard) -> bool:  # noqa: ARG002
        """Return that nobody but this process writes to the store."""
        return False

    def close(self) -> None:
        """Forget everything. A second call does nothing."""
        with self._lock:
            self._closed = True
            self._logs.clear()
            self._snapshots.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")


def check_limit(limit: int | None) -> None:
    """Raise ValueError where `limit` is negative."""
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be at least 0, got {limit}")


def needless(seqs: Iterable[int]) -> list[int]:
    """Return which snapshots of a run, each named by its `seq`, are to be dropped."""
    *older, _ = sorted(seqs)
    dropped = []
    next_milestone = 0
    for seq in older:
        if seq < next_milestone:
            dropped.append(seq)
        else:
            next_milestone = seq + MILESTONE_ROWS
    return dropped
