"""What a log store promises, whichever database is behind it.

A store keeps one log per run: rows with a dense `seq`, each an opaque payload and the digest
of the hash chain there; and snapshots of it, so that a long log need not be read from its begin.
It knows nothing of what an event means. Replicas that share a store need no leader, because of
one rule alone: a `seq` is given out once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from lrpilot.server._packing import PackedLog

MAX_SEQ = 2**63 - 1
"""The greatest `seq`: what a column of 64 bits holds."""


@dataclass(frozen=True, slots=True)
class LogRow:
    """One event of a run's log."""

    seq: int
    """Position in the log, from 1 on."""
    payload: bytes
    """The event as canonical bytes; the store does not look inside."""
    digest: str
    """Digest of the hash chain up to and with this row."""
    recorded_at_ns: int
    """When the row was made, in Unix nanoseconds. For people: nothing is computed from it."""


@dataclass(frozen=True, slots=True)
class Append:
    """Rows for the end of one run's log, which go in together or not at all."""

    run: str
    """Name of the run."""
    rows: tuple[LogRow, ...]
    """At least one row, each with the `seq` after that of the row before."""
    create: bool = False
    """Whether the run is to be made with these rows. Then it must not exist, and its log begins
    at the first row's `seq`, whatever that is; otherwise it must exist and end just before."""
    after: str | None = None
    """Digest of the row that the first one follows; None: whichever is there. A run that was
    deleted and made again may be just as long, and is another log all the same."""

    def __post_init__(self) -> None:
        """Refuse what no log can take. Raises ValueError."""
        if not self.rows:
            raise ValueError(f"run {self.run!r}: an append needs at least one row")
        first, last = self.rows[0].seq, self.rows[-1].seq
        if first < 1 or last > MAX_SEQ:
            raise ValueError(f"run {self.run!r}: seq must be 1 to {MAX_SEQ}, got {first} to {last}")
        for expected, row in enumerate(self.rows, first):
            if row.seq != expected:
                raise ValueError(f"run {self.run!r}: expected seq {expected}, got {row.seq}")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A shortcut to the fold of a run's log up to one row; the store does not look inside."""

    seq: int
    """The row up to which the log is folded."""
    digest: str
    """Digest of the hash chain there."""
    floor: int
    """The least progress that the snapshot still knows of; from 0 on."""
    data: bytes
    """The fold."""

    def __post_init__(self) -> None:
        """Refuse what belongs to no log. Raises ValueError."""
        for name, value, least in (("seq", self.seq, 1), ("floor", self.floor, 0)):
            if not least <= value <= MAX_SEQ:
                raise ValueError(f"{name} must be {least} to {MAX_SEQ}, got {value}")


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of a log that are packed."""

    first_seq: int
    last_seq: int
    checksum: str
    """Tells the content from every other one, also of another log."""
    overview: bytes | None
    """What was saved as its overview; None: nothing was. The store does not look inside."""


MILESTONE_ROWS = 32_768
"""Snapshots that are kept beside the newest are at least so many rows apart."""


class StoreError(Exception):
    """Base of what a store raises on purpose; the text is meant for people."""


class SeqTaken(StoreError):
    """Rows do not continue the log as it is: the caller reads it and evaluates again."""

    def __init__(self, run: str, seq: int, last_seq: int | None) -> None:
        if last_seq is None:
            text = f"run {run!r} does not exist, so it has no place for seq {seq}"
        elif last_seq == seq - 1:
            text = f"run {run!r} is another log: its seq {last_seq} is not what seq {seq} follows"
        else:
            text = f"run {run!r} ends at seq {last_seq}, so its next row is not seq {seq}"
        super().__init__(text)
        self.run = run
        """Name of the run."""
        self.seq = seq
        """First `seq` of the rows refused."""
        self.last_seq = last_seq
        """Where the log ended; None: no run has that name."""


Reason = Literal[
    "disk_full",
    "read_only",
    "io_error",
    "locked",
    "unreachable",
    "no_answer",
    "too_many",
    "other",
]
"""Why a store is unavailable, in words that are few and stay: metrics and clients tell them apart.

`locked`: another program or transaction holds what is wanted; `unreachable`: no connection to
the database; `no_answer`: it is connected and silent; `too_many`: more is asked for at once than
there are connections, or turns.
"""

REASONS: tuple[Reason, ...] = get_args(Reason)


class StoreUnavailable(StoreError):
    """The store cannot be read or written now, or is closed.

    After an append or a delete failed so, nobody knows whether it was carried out. The caller
    may simply try again: if it was, the `seq` is taken and the log says by whom.
    """

    def __init__(self, text: str, reason: Reason = "other") -> None:
        super().__init__(text)
        self.reason = reason
        """Why, in one of few words."""


class CorruptSegment(StoreError):
    """Packed rows of a run cannot be read: they are damaged, or a newer release packed them."""

    def __init__(self, run: str, first_seq: int, last_seq: int, why: str) -> None:
        super().__init__(
            f"run {run!r}: packed rows {first_seq} to {last_seq} cannot be read: {why}"
        )
        self.run = run
        """Name of the run."""
        self.first_seq = first_seq
        """The first row that cannot be read."""
        self.last_seq = last_seq
        """The last one; those outside can."""


class StoreLocked(StoreError):
    """Another server uses the data folder."""


class SchemaTooNew(StoreError):
    """A newer release wrote the database, in a form that this release does not know."""


AppendResult = SeqTaken | None
"""What became of one append: None says that its rows are durable."""


@dataclass(frozen=True, slots=True)
class News:
    """Word that somebody, perhaps of this process, wrote to a store."""

    run: str | None
    """Name of the run; None: any, for word may have been missed."""
    seq: int | None
    """The last `seq` that was appended; None: unknown, or the run was deleted."""


Heard = Callable[[News], None]
"""Who is told. Called on a thread of the store's: it must be quick, and raise nothing."""


class Store(Protocol):
    """The logs of all runs.

    Threads: every method may be called from any thread at any time, and blocks until it is
    done. Appends and deletes are carried out one after the other; a read sees all of an append
    or nothing of it, and every one that has returned.

    Copies: rows are immutable, and lists that go in or come out are the caller's own. To change
    them afterwards changes nothing in the store.

    Errors: every method but `close` raises StoreUnavailable where the database fails and after
    `close`. What else one raises stands with it.
    """

    def append(self, batch: Sequence[Append]) -> list[AppendResult]:
        """Append to the logs of runs in one transaction; return one result per append, in order.

        Appends are carried out in the order given, and each sees those before it, so that several
        may continue one run. One that does not continue the log of its run (its first `seq` is
        taken or leaves a gap; the row before is not `after`; the run is missing, or exists where
        `create` was asked) gets a SeqTaken as its result and leaves no row, and the others go on
        without it. When the call returns, the rows of the others are on stable storage: they
        outlive a crash of the process and of the machine.

        When StoreUnavailable is raised, either all appends of the batch that had no conflict were
        carried out or none.
        """
        ...

    def adopt(self, run: str, log: "PackedLog") -> None:
        """Make a run of a whole log, as an append with `create` does, in one transaction.

        However long the log is, it is packed already, and others wait for that to be written down
        alone. While a server of a release that cannot read packed rows is connected, the rows are
        written as an append writes them: that takes long, and holds up nobody.

        Raises SeqTaken where the run exists, and ValueError for a log without rows. As with an
        append, nobody knows what was carried out when StoreUnavailable is raised: all or nothing.
        """
        ...

    def read(self, run: str, after_seq: int = 0, limit: int | None = None) -> list[LogRow]:
        """Return the rows of a run with `seq > after_seq` in order, the first `limit` of them.

        The list is empty when there are none or no run has that name. Raises ValueError where
        `limit` is negative, and CorruptSegment where rows are asked for that cannot be unpacked.
        """
        ...

    def head(self, run: str) -> tuple[int, str] | None:
        """Return `seq` and digest of a run's last row; None: no run has that name.

        The cost does not grow with the length of the log.
        """
        ...

    def heads(self, runs: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Return what `head` does for many runs at once, without those that do not exist."""
        ...

    def runs(self, after_name: str = "", limit: int | None = None) -> list[str]:
        """Return the names of runs greater than `after_name`, the first `limit` of them.

        They are ordered by code point, as Python orders strings. Raises ValueError where `limit`
        is negative.
        """
        ...

    def delete(self, run: str, after: str | None = None) -> bool:
        """Remove a run with its whole log, for good; return whether there was one.

        `after`: digest of its last row; another log of that name stays (False). None: whichever
        is there. The name is free afterwards, and a run made under it has nothing of the old one.
        """
        ...

    def recent(self, since_ns: int) -> list[str]:
        """Return the names of the runs whose last row was recorded at or after `since_ns`.

        They are ordered as `runs` orders them. One query, whose cost does not grow with the
        length of the logs.
        """
        ...

    def save_snapshot(self, run: str, snapshot: Snapshot) -> bool:
        """Keep a snapshot of a run; return whether it is one of the log that is there.

        It is not (False, and nothing is kept) where the log has not that digest at that `seq`:
        the run was deleted, and perhaps made again. Of all snapshots of a run, the newest is kept
        and, from the oldest on, each that is at least MILESTONE_ROWS rows after the one kept
        before it; the others are dropped. One with the `seq` of another replaces it.
        """
        ...

    def snapshot(
        self, run: str, floor: int | None = None, before_seq: int | None = None
    ) -> Snapshot | None:
        """Return the newest snapshot of a run that is asked for; None: there is none.

        Only those whose own floor is at most `floor` and whose `seq` is less than `before_seq`
        count; None: any.
        """
        ...

    def compact(self, run: str, through_seq: int) -> int:
        """Pack the oldest plain rows of a run's log into one segment, so that they take less
        space; return how many.

        Only rows with `seq <= through_seq` are packed, never the last row of a log, and only
        a whole segment: fewer rows than one has are left as they are. 0 says that there is
        nothing to do, or no such run, or that somebody else packed or deleted these rows
        meanwhile. A long log takes many calls; between any two of them a caller may stop. No
        method but `size` shows a difference. Any number of callers may do so at once, and others
        may write meanwhile: they wait for the segment to be written down, and not for the packing.

        Does nothing (0) while a server of a release that cannot read packed rows is connected.
        """
        ...

    def segments(self, run: str, after_seq: int = 0) -> list[Segment]:
        """Return what is packed of a run's log behind `after_seq`, in order.

        Empty too where no run has that name. A store that packs nothing has none.
        """
        ...

    def segment(self, run: str, segment: Segment) -> bytes | None:
        """Return the packed rows of a segment, as `_segments` reads them; None: it is gone."""
        ...

    def save_overview(self, run: str, segment: Segment) -> bool:
        """Keep the overview of a segment; return whether the segment is still there."""
        ...

    def size(self) -> int:
        """Return the bytes that the store takes on disk, with what is free there for more rows."""

    @property
    def folder(self) -> Path | None:
        """The folder that grows as the logs do; None: it is not on this machine."""
        ...

    def check(self) -> None:
        """Return when the store can be read; otherwise raise StoreUnavailable.

        One that says of itself that it takes no writes is unavailable as well.
        """
        ...

    def probe(self) -> None:
        """Return once a small write is on stable storage, as an append is; it leaves nothing.

        Raises StoreUnavailable: then appends would fail as well.
        """
        ...

    def follow(self, heard: Heard) -> bool:
        """Begin to call `heard` with what is written to the store; return whether others write.

        Where none do (False), it is never called. It may be called late, and word may get lost:
        whoever must know looks at `heads` now and then. Ends with `close`.
        """
        ...

    def close(self) -> None:
        """Release connections and locks. A second call does nothing."""
        ...
