"""The losses of long runs, to be drawn, and their notable rows, without reading the whole log.

Behind the newest rows a log is packed in segments. Of each an overview is kept, which follows from
it: what stands out of every 64 losses, and the rows in which something happened. A picture of a
million steps is made of overviews and the rows behind the last segment. Where a picture shows a
small part of the run, and at its borders, the losses of the segments themselves are read. What is
missing of all this is made again when somebody asks for it.
"""

import itertools
import logging
import threading
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from lrpilot import core
from lrpilot.server._overview import Overview, decode, encode, overview_of
from lrpilot.server._segments import Corrupt, read_losses
from lrpilot.server._store import (
    CorruptSegment,
    LogRow,
    Segment,
    Store,
    StoreError,
    StoreUnavailable,
)

logger = logging.getLogger("lrpilot.server")

PART_LOSSES = 8192
"""Losses of rows that are not packed of which one overview is made."""

ROWS_PER_READ = 4096
"""Rows that are read at once behind the last segment."""

CACHED_RUNS = 24
"""Runs of which the overviews and the newest losses are kept in memory, those asked for last: some
megabytes each, where they are long."""

CACHED_LOSSES = 500_000
"""Losses of segments that are kept in memory, those asked for last; 40 bytes each."""

BORDER_LOSSES = 400_000
"""Losses of segments at the borders of a picture that are read at most, so that one of a run with
thousands of attempts takes no minutes. What is left out shows what stands out of it."""


State: TypeAlias = Mapping[str, Any] | None
"""Of a LossReader; None: before the first row."""


class _Tail:
    """Losses of rows behind the last segment, as they came."""

    def __init__(self, state: State = None) -> None:
        self.reader = core.LossReader(state)
        self.overview: Overview | None = None
        """Once it is long enough and closed."""

    @property
    def size(self) -> int:
        return sum(len(part.losses.values) for part in self.reader.attempts)


@dataclass(slots=True)
class _Run:
    """What is known of one run's log."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    segments: list[tuple[Segment, Overview]] = field(default_factory=list)
    """The segments, without their overviews as bytes."""
    tail: list[_Tail] = field(default_factory=list)
    seq: int = 0
    digest: str = ""
    """Where the rows end that were read. The digest is empty where that is a segment, which is
    known by its checksum."""
    notable: list[int] = field(default_factory=list)
    """The `seq` of each row in the tail that is no routine."""

    def forget(self) -> None:
        """Know nothing any more."""
        self.segments.clear()
        self.end_at(0, None)

    def end_at(self, seq: int, state: State) -> None:
        """Know nothing of what lies behind the segment that ends at a row; 0: there is none."""
        self.seq, self.digest = seq, ""
        self.tail, self.notable = [_Tail(state)], []


class LossHistory:
    """The losses and notable rows of the logs in a store. What blocks may be called from any
    thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._losses: OrderedDict[str, Sequence[core.AttemptLosses]] = OrderedDict()
        """Checksum of a segment to its losses."""
        self._is_ending = threading.Event()

    def stop(self) -> None:
        """Let what takes long end soon: the server ends."""
        self._is_ending.set()

    def between(
        self, name: str, seq: int, decided: Collection[int], *, begin: int, end: int, points: int
    ) -> list[core.AttemptLosses]:
        """Return what was reported in each attempt up to the row `seq`, in the order in which they
        opened. Blocks.

        Of what lies in [begin, end] there is what a curve of `points` points shows; of the rest
        there may be less. `decided`: see `notable`. Raises StoreError.
        """
        run = self._run(name)
        with run.lock:
            self._catch_up(name, run, seq, decided)
            known = [overview for _, overview in run.segments]
            known += [part.overview for part in run.tail if part.overview is not None]
            rough = sum(_losses_between(overview, begin, end) for overview in known)
            # Each stretch of two points has at least one bucket then.
            is_close = rough <= core.BUCKET_LOSSES // 2 * points
            room = BORDER_LOSSES
            parts: list[Sequence[core.AttemptLosses]] = []
            state: State = None
            for segment, overview in run.segments:
                wanted = _reaches_into(overview, begin, end) and (
                    is_close or _reaches_beyond(overview, begin, end)
                )
                room -= sum(overview.sizes) if wanted and not is_close else 0
                whole = self._read(name, segment, state) if wanted and room >= 0 else None
                parts.append(overview.attempts if whole is None else whole)
                state = overview.after
            for part in run.tail:
                rough_one = part.overview
                is_rough = rough_one is not None and not (
                    is_close or _reaches_beyond(rough_one, begin, end)
                )
                parts.append(rough_one.attempts if rough_one and is_rough else part.reader.attempts)
            return _joined(itertools.chain.from_iterable(parts))

    def notable(self, name: str, seq: int, decided: Collection[int]) -> list[int]:
        """Return the `seq` of each row up to `seq` that is notable, in order. Blocks.

        Such are those that are no routine, and those in `decided`. Raises StoreError.
        """
        run = self._run(name)
        with run.lock:
            self._catch_up(name, run, seq, decided)
            found = {at for at in decided if at <= seq}
            for _, overview in run.segments:
                found.update(overview.notable)
            found.update(run.notable)
        return sorted(at for at in found if at <= seq)

    def rows(self, name: str, seqs: Sequence[int]) -> list[LogRow]:
        """Return the rows that `notable` named, those that are still there. Blocks.

        Raises StoreError.
        """
        run = self._run(name)
        with run.lock:
            overviews = [overview for _, overview in run.segments]
        wanted = set(seqs)
        kept: dict[int, LogRow] = {}
        for overview in overviews:
            if not wanted.isdisjoint(overview.notable):
                kept |= overview.rows()
        found = []
        for seq in seqs:
            rows = [kept[seq]] if seq in kept else self._store.read(name, seq - 1, 1)
            found += [row for row in rows if row.seq == seq]
        return found

    def keep_up(self, name: str, decided: Collection[int]) -> None:
        """Make the overviews of what was packed since, so that nobody has to wait for that.

        Blocks. What fails is made when somebody looks.
        """
        run = self._run(name)
        try:
            with run.lock:
                self._read_segments(name, run, decided)
        except StoreError as error:
            logger.warning("run %s: what was packed has no overview yet: %s", name, error)

    def _run(self, name: str) -> _Run:
        with self._lock:
            run = self._runs.setdefault(name, _Run())
            self._runs.move_to_end(name)
            while len(self._runs) > CACHED_RUNS:
                self._runs.popitem(last=False)
            return run

    def _catch_up(self, name: str, run: _Run, seq: int, decided: Collection[int]) -> None:
        """Read what was written since, up to the row `seq`."""
        if not self._read_on(name, run, seq, decided):
            # Another log has this name now.
            run.forget()
            self._read_on(name, run, seq, decided)

    def _read_on(self, name: str, run: _Run, seq: int, decided: Collection[int]) -> bool:
        """Read on; return whether the log is the one that is known."""
        if not self._read_segments(name, run, decided):
            return False
        while True:
            # The last row known comes with those after it: it shows whether the log is the same.
            after = run.seq - 1 if run.digest else run.seq
            rows = self._store.read(name, after, max(1, min(ROWS_PER_READ, seq - after)))
            if run.digest:
                if not rows or (rows[0].seq, rows[0].digest) != (run.seq, run.digest):
                    return False
                del rows[0]
            if rows:
                self._add(run, rows)
            if not rows or run.seq >= seq:
                return True

    def _add(self, run: _Run, rows: Sequence[LogRow]) -> None:
        for row in rows:
            last = run.tail[-1]
            last.reader.read(row.payload)
            if not core.is_routine(row.payload):
                run.notable.append(row.seq)
        run.seq, run.digest = rows[-1].seq, rows[-1].digest
        last = run.tail[-1]
        if last.size >= PART_LOSSES:
            last.overview = overview_of(last.reader, ())
            run.tail.append(_Tail(last.reader.state()))

    def _read_segments(self, name: str, run: _Run, decided: Collection[int]) -> bool:
        """Read what was packed since; return whether the log is the one that is known."""
        last = run.segments[-1][0] if run.segments else None
        found = self._store.segments(name, last.last_seq - 1 if last else 0)
        if last is not None and (not found or found.pop(0).checksum != last.checksum):
            return False
        if not run.tail:
            run.end_at(0, None)
        for segment in found:
            state = run.segments[-1][1].after if run.segments else None
            overview = None if segment.overview is None else decode(segment.overview)
            if overview is None:
                overview = self._make(name, segment, state, decided)
            run.segments.append((replace(segment, overview=None), overview))
        if found:
            run.end_at(found[-1].last_seq, run.segments[-1][1].after)
        return True

    def _make(
        self, name: str, segment: Segment, state: State, decided: Collection[int]
    ) -> Overview:
        """Make the overview of a segment, and have it kept."""
        if self._is_ending.is_set():
            raise StoreUnavailable("the server is shutting down")
        reader = core.LossReader(state)
        try:
            seqs = set(self._read_block(name, segment, reader))
            seqs |= {seq for seq in decided if segment.first_seq <= seq <= segment.last_seq}
            rows: list[LogRow] = []
            if seqs:
                count = segment.last_seq - segment.first_seq + 1
                whole = self._store.read(name, segment.first_seq - 1, count)
                rows = [row for row in whole if row.seq in seqs]
        except CorruptSegment as error:
            # The rest is worth to be seen.
            logger.warning("%s; it is left out of what is drawn of the run", error)
            return overview_of(core.LossReader(state), ())
        overview = overview_of(reader, sorted(seqs), rows)
        self._store.save_overview(name, replace(segment, overview=encode(overview)))
        return overview

    def _read(
        self, name: str, segment: Segment, state: State
    ) -> Sequence[core.AttemptLosses] | None:
        """Return the losses of a segment; None: it is gone or damaged."""
        with self._lock:
            known = self._losses.get(segment.checksum)
            if known is not None:
                self._losses.move_to_end(segment.checksum)
                return known
        reader = core.LossReader(state)
        try:
            self._read_block(name, segment, reader)
        except CorruptSegment:
            return None
        with self._lock:
            self._losses[segment.checksum] = reader.attempts
            while len(self._losses) > 1 and self._cached_losses() > CACHED_LOSSES:
                self._losses.popitem(last=False)
        return reader.attempts

    def _cached_losses(self) -> int:
        return sum(len(part.losses.values) for parts in self._losses.values() for part in parts)

    def _read_block(self, name: str, segment: Segment, reader: core.LossReader) -> list[int]:
        block = self._store.segment(name, segment)
        if block is None:
            # Deleted meanwhile: the next look finds that out.
            return []
        try:
            return read_losses(block, reader)
        except Corrupt as error:
            first, last = segment.first_seq, segment.last_seq
            raise CorruptSegment(name, first, last, str(error)) from error


def _losses_between(overview: Overview, begin: int, end: int) -> int:
    """Return about how many losses of an overview lie in a range."""
    found = 0
    for part, size in zip(overview.attempts, overview.sizes, strict=True):
        at = part.losses.progress
        shown = bisect_right(at, end) - bisect_left(at, begin)
        found += -(-size * shown // len(at)) if at else 0
    return found


def _reaches_into(overview: Overview, begin: int, end: int) -> bool:
    return any(
        part.losses.progress[0] <= end and part.losses.progress[-1] >= begin
        for part in overview.attempts
        if part.losses.progress
    )


def _reaches_beyond(overview: Overview, begin: int, end: int) -> bool:
    """Return whether a border of the range lies inside an attempt's losses."""
    return any(
        first < border <= last
        for part in overview.attempts
        if part.losses.progress
        for first, last in [(part.losses.progress[0], part.losses.progress[-1])]
        for border in (begin, end + 1)
    )


def _joined(parts: Iterator[core.AttemptLosses]) -> list[core.AttemptLosses]:
    """Return the parts of each attempt as one."""
    found: list[core.AttemptLosses] = []
    for part in parts:
        if not found or found[-1].attempt != part.attempt:
            found.append(part.empty())
        found[-1].extend(part)
    return found
