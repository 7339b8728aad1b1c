"""Packed rows in a SQL database: which rows are packed when, and reading them again.

A log is its segments and then its plain rows, without a gap; its last row is always plain. What
a segment looks like inside stands in `_segments`.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from lrpilot.server._schema import events, overviews, runs, segments
from lrpilot.server._segments import Corrupt, checksum, pack, unpack
from lrpilot.server._store import MAX_SEQ, CorruptSegment, LogRow, Segment

SEGMENT_ROWS = 4096
"""Rows of a segment."""

SEGMENT_BYTES = 4 * 1024 * 1024
"""Payloads of so many bytes are enough for a segment, however few rows they are."""

CACHED_SEGMENTS = 4
"""Segments that are kept unpacked, so that a log read page by page is unpacked once."""

_BLOCKS_PER_QUERY = 16

ROW = (events.c.seq, events.c.payload, events.c.digest, events.c.recorded_at_ns)
"""Columns of a plain row, in the order of a LogRow."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one segment of a log is."""

    run_id: int
    last_seq: int
    first_seq: int
    checksum: str


Part = list[LogRow] | tuple[Place, bytes]
"""A piece of a log as it was read: rows, or a segment that is still packed."""


class Unpacked:
    """The segments that were read last, unpacked. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: OrderedDict[Place, list[LogRow]] = OrderedDict()

    def get(self, segment: Place) -> list[LogRow] | None:
        """Return the rows of a segment, if they are still here."""
        with self._lock:
            rows = self._rows.get(segment)
            if rows is not None:
                self._rows.move_to_end(segment)
            return rows

    def rows(self, run: str, parts: Sequence[Part], after_seq: int, limit: int) -> list[LogRow]:
        """Return the first `limit` rows of parts with `seq > after_seq`. Raises CorruptSegment."""
        found: list[LogRow] = []
        for part in parts:
            rows = self._unpack(run, *part) if isinstance(part, tuple) else part
            begin = max(0, after_seq + 1 - rows[0].seq) if rows else 0
            found += rows[begin : begin + limit - len(found)]
        return found

    def _unpack(self, run: str, segment: Place, block: bytes) -> list[LogRow]:
        """Return the rows of a segment of `run`, and keep them. Raises CorruptSegment."""
        try:
            rows = unpack(block)
        except Corrupt as error:
            raise CorruptSegment(run, segment.first_seq, segment.last_seq, str(error)) from error
        if (rows[0].seq, rows[-1].seq, checksum(block)) != (
            segment.first_seq,
            segment.last_seq,
            segment.checksum,
        ):
            why = f"another block, with rows {rows[0].seq} to {rows[-1].seq}, is in their place"
            raise CorruptSegment(run, segment.first_seq, segment.last_seq, why)
        with self._lock:
            self._rows[segment] = rows
            while len(self._rows) > CACHED_SEGMENTS:
                self._rows.popitem(last=False)
        return rows


class PackedLog:
    """A whole log in memory, as it stands in a database: packed, but for its last rows.

    So a long one takes some bytes a row, and is written down with few statements. Any thread may
    use it, one at a time.
    """

    def __init__(self, rows: Iterable[LogRow] = ()) -> None:
        self.first: LogRow | None = None
        """The first row; None: there is none."""
        self.blocks: list[tuple[int, int, bytes]] = []
        """First and last `seq` of each segment, and its rows packed."""
        self.tail: list[LogRow] = []
        """The rows that are not packed; the last row of a log is always one."""
        self._tail_bytes = 0
        for row in rows:
            self.add(row)

    def add(self, row: LogRow) -> None:
        """Add a row, and pack those before it where they make a segment.

        Raises ValueError where its `seq` is none, or not that after the last one.
        """
        expected = self.tail[-1].seq + 1 if self.tail else row.seq
        if row.seq != expected or not 1 <= row.seq <= MAX_SEQ:
            raise ValueError(f"expected seq {max(1, expected)}, got {row.seq}")
        if len(self.tail) >= SEGMENT_ROWS or self._tail_bytes >= SEGMENT_BYTES:
            self.blocks.append((self.tail[0].seq, self.tail[-1].seq, pack(self.tail)))
            self.tail = []
            self._tail_bytes = 0
        self.first = self.first or row
        self.tail.append(row)
        self._tail_bytes += len(row.payload)

    def followed_by(self, rows: Iterable[LogRow]) -> "PackedLog":
        """Return a log with these rows behind those of this one, which stays as it is."""
        log = PackedLog()
        log.first, log.blocks, log.tail = self.first, list(self.blocks), list(self.tail)
        log._tail_bytes = self._tail_bytes
        for row in rows:
            log.add(row)
        return log

    def parts(self) -> Iterator[list[LogRow]]:
        """Yield all rows in order, as many at once as one segment holds."""
        for _, _, block in self.blocks:
            yield unpack(block)
        if self.tail:
            yield list(self.tail)


def packed(
    connection: sa.Connection, run: str, after_seq: int, limit: int, unpacked: Unpacked
) -> list[Part]:
    """Return the segments that hold the first `limit` rows with `seq > after_seq`, if packed.

    Segments that were unpacked before come as their rows.
    """
    statement = (
        sa.select(segments.c.run_id, segments.c.last_seq, segments.c.first_seq, segments.c.checksum)
        .join(runs)
        .where(runs.c.name == run, segments.c.last_seq > after_seq)
        .order_by(segments.c.last_seq)
        .limit(limit)  # Each holds a row.
    )
    found: list[Place] = []
    count = 0
    for row in connection.execute(statement):
        if count >= limit:
            break
        segment = Place(*row)
        count += segment.last_seq - max(segment.first_seq - 1, after_seq)
        found.append(segment)
    parts: dict[Place, Part] = {}
    missing = []
    for segment in found:
        rows = unpacked.get(segment)
        if rows is None:
            missing.append(segment)
        else:
            parts[segment] = rows
    for begin in range(0, len(missing), _BLOCKS_PER_QUERY):
        some = {one.last_seq: one for one in missing[begin : begin + _BLOCKS_PER_QUERY]}
        blocks = sa.select(segments.c.last_seq, segments.c.data).where(
            segments.c.run_id == found[0].run_id, segments.c.last_seq.in_(some)
        )
        for last_seq, block in connection.execute(blocks):
            parts[some[last_seq]] = (some[last_seq], block)
    return [parts[segment] for segment in found]


def next_segment(connection: sa.Connection, run: str, through_seq: int) -> list[LogRow]:
    """Return the plain rows that make the next segment of a log; empty: they are too few.

    Empty also where one of them is missing: a segment says of its rows where they begin and how
    many they are. What is left of a damaged log stays as it is.
    """
    last = sa.select(sa.func.max(events.c.seq)).join(runs).where(runs.c.name == run)
    sizes = (
        sa.select(events.c.run_id, events.c.seq, sa.func.length(events.c.payload))
        .join(runs)
        .where(
            runs.c.name == run,
            events.c.seq <= through_seq,
            events.c.seq < last.scalar_subquery(),
        )
        .order_by(events.c.seq)
        .limit(SEGMENT_ROWS)
    )
    found = connection.execute(sizes).all()
    total = 0
    for count, (run_id, seq, size) in enumerate(found, 1):
        total += size
        if seq != found[0].seq + count - 1:
            return []
        if total >= SEGMENT_BYTES or count == SEGMENT_ROWS:
            return _plain(connection, run_id, found[0].seq, seq)
    return []


def _plain(connection: sa.Connection, run_id: int, first_seq: int, last_seq: int) -> list[LogRow]:
    """Return those rows of a log from `first_seq` to `last_seq` that are not packed."""
    wanted = (
        sa.select(*ROW)
        .where(events.c.run_id == run_id, events.c.seq.between(first_seq, last_seq))
        .order_by(events.c.seq)
    )
    return [LogRow(*row) for row in connection.execute(wanted)]


def replace(connection: sa.Connection, run_id: int, rows: list[LogRow], block: bytes) -> int:
    """Put a segment in the place of the rows that it holds; return how many.

    0: the log does not hold these rows, and one after them, any more.

    The caller holds the run, so that nobody else packs or deletes it meanwhile.
    """
    first, last = rows[0].seq, rows[-1].seq
    # A run that was deleted and made again may have the same id, and other rows.
    if _plain(connection, run_id, first, last + 1)[:-1] != rows:
        return 0
    connection.execute(
        sa.delete(events).where(events.c.run_id == run_id, events.c.seq.between(first, last))
    )
    insert(connection, run_id, first, last, block)
    return len(rows)


def insert(
    connection: sa.Connection, run_id: int, first_seq: int, last_seq: int, block: bytes
) -> None:
    """Write a segment down."""
    connection.execute(
        sa.insert(segments).values(
            run_id=run_id,
            last_seq=last_seq,
            first_seq=first_seq,
            checksum=checksum(block),
            data=block,
        )
    )


def segments_of(connection: sa.Connection, run: str, after_seq: int) -> list[Segment]:
    """Return what is packed of a log behind `after_seq`, in order."""
    is_its_own = sa.and_(
        overviews.c.run_id == segments.c.run_id,
        overviews.c.last_seq == segments.c.last_seq,
        overviews.c.checksum == segments.c.checksum,
    )
    statement = (
        sa.select(segments.c.first_seq, segments.c.last_seq, segments.c.checksum, overviews.c.data)
        .select_from(segments.join(runs).outerjoin(overviews, is_its_own))
        .where(runs.c.name == run, segments.c.last_seq > after_seq)
        .order_by(segments.c.last_seq)
    )
    return [Segment(*row) for row in connection.execute(statement)]


def block_of(connection: sa.Connection, run: str, segment: Segment) -> bytes | None:
    """Return the block of a segment; None: it is gone."""
    statement = (
        sa.select(segments.c.data)
        .join(runs)
        .where(
            runs.c.name == run,
            segments.c.last_seq == segment.last_seq,
            segments.c.checksum == segment.checksum,
        )
    )
    block: bytes | None = connection.scalar(statement)
    return block


def save_overview(connection: sa.Connection, run_id: int, segment: Segment) -> bool:
    """Write the overview of a segment down; return whether the segment is there.

    The caller holds the run, so that nobody else does so or deletes it meanwhile.
    """
    here = (segments.c.run_id == run_id, segments.c.last_seq == segment.last_seq)
    if connection.scalar(sa.select(segments.c.checksum).where(*here)) != segment.checksum:
        return False
    connection.execute(
        sa.delete(overviews).where(
            overviews.c.run_id == run_id, overviews.c.last_seq == segment.last_seq
        )
    )
    connection.execute(
        sa.insert(overviews).values(
            run_id=run_id,
            last_seq=segment.last_seq,
            checksum=segment.checksum,
            data=segment.overview,
        )
    )
    return True
