"""What stands out of some rows of a log, as it is kept beside each segment.

It follows from the rows, and from which adjustments were decided in them; one that is missing or of
another release is made again. See LossHistory for what it is good for.
"""

import json
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrpilot import core
from lrpilot.server._segments import ColumnReader, ColumnWriter
from lrpilot.server._store import LogRow

_FORMAT = 1

MOST_KEPT_BYTES = 16 * 1024
"""A notable row with a longer payload is not repeated in an overview."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What stands out of some rows, one after the other, of a log."""

    attempts: Sequence[core.AttemptLosses]
    """What was reported in them, reduced."""
    sizes: Sequence[int]
    """Number of losses of each of these before that."""
    after: Mapping[str, Any] | None
    """State of the LossReader behind the rows."""
    notable: Sequence[int]
    """The `seq` of each row that is no routine, or in which something was decided, in order."""
    packed_rows: bytes = b""
    """Those of them that are not too long."""

    def rows(self) -> dict[int, LogRow]:
        """Return the notable rows that are kept, by `seq`."""
        if not self.packed_rows:
            return {}
        found = json.loads(zlib.decompress(self.packed_rows))
        return {
            seq: LogRow(seq, payload.encode("latin-1"), digest, recorded_at_ns)
            for seq, payload, digest, recorded_at_ns in found
        }


def overview_of(
    reader: core.LossReader, notable: Sequence[int], rows: Sequence[LogRow] = ()
) -> Overview:
    """Return the overview of rows that a reader, made for them, has read.

    `rows`: the notable ones, to be kept.
    """
    kept = [
        (row.seq, row.payload.decode("latin-1"), row.digest, row.recorded_at_ns)
        for row in rows
        if len(row.payload) <= MOST_KEPT_BYTES
    ]
    return Overview(
        attempts=[part.reduced() for part in reader.attempts],
        sizes=[len(part.losses.values) for part in reader.attempts],
        after=reader.state(),
        notable=notable,
        packed_rows=zlib.compress(json.dumps(kept).encode("ascii")) if kept else b"",
    )


def encode(overview: Overview) -> bytes:
    """Return an overview as bytes."""
    head = {
        "format": _FORMAT,
        "after": overview.after,
        "attempts": [
            [
                part.attempt,
                part.begin,
                part.restored,
                size,
                len(part.losses.values),
                len(part.averages.parts),
                len(part.gradient_norms.values),
                [[name, len(series.values)] for name, series in part.validation.items()],
            ]
            for part, size in zip(overview.attempts, overview.sizes, strict=True)
        ],
        "notable": len(overview.notable),
    }
    out = ColumnWriter()
    out.text(json.dumps(head, separators=(",", ":")).encode("ascii"))
    for part in overview.attempts:
        _write(out, part.losses)
        out.column(list(part.averages.progress))
        out.column(list(part.averages.counts))
        out.column(_bits(part.averages.parts))
        for series in (part.gradient_norms, *part.validation.values()):
            _write(out, series)
    out.column(list(overview.notable))
    out.text(overview.packed_rows)
    return zlib.compress(bytes(out.data))


def decode(data: bytes) -> Overview | None:
    """Return the overview that `encode` wrote; None: it is of another release."""
    read = ColumnReader(zlib.decompress(data))
    head = json.loads(read.text())
    if head["format"] != _FORMAT:
        return None
    attempts, sizes = [], []
    for attempt, begin, restored, size, losses, averages, norms, names in head["attempts"]:
        sizes.append(size)
        attempts.append(
            core.AttemptLosses(
                attempt,
                begin,
                restored and (restored[0], restored[1]),
                _series(read, losses),
                core.Averages(
                    array("q", read.column(averages)),
                    array("q", read.column(averages)),
                    _floats(read.column(averages)),
                ),
                _series(read, norms),
                {name: _series(read, count) for name, count in names},
            )
        )
    return Overview(
        attempts=attempts,
        sizes=sizes,
        after=head["after"],
        notable=read.column(head["notable"]),
        packed_rows=read.text(),
    )


def _write(out: ColumnWriter, series: core.Series) -> None:
    out.column(list(series.progress))
    out.column(_bits(series.values))


def _series(read: ColumnReader, count: int) -> core.Series:
    return core.Series(array("q", read.column(count)), _floats(read.column(count)))


def _bits(values: "array[float]") -> list[int]:
    return array("q", values.tobytes()).tolist()


def _floats(bits: list[int]) -> "array[float]":
    return array("d", array("q", bits).tobytes())
