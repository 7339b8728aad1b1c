"""Tables of columns with a type, as CSV and as JSON lines. Parquet has a module of its own."""

import codecs
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import BinaryIO, Literal, NamedTuple

from lrpilot.server._json import json_line

Value = int | float | bool | str
"""A cell that is not empty; a time is a whole number of nanoseconds since 1970, UTC."""

Row = Mapping[str, Value]
"""The cells of a row that are not empty, by column."""


class Column(NamedTuple):
    """A column of the table."""

    name: str
    kind: Literal["time", "int", "float", "bool", "text"]


Writer = Callable[[BinaryIO, Sequence[Column], Iterable[Row]], None]
"""Writes a table of some columns into a file."""


def write_csv(file: BinaryIO, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Write a table as CSV; floats are in the shortest form that reads back the same."""
    # Unlike a TextIOWrapper it leaves the file open, also where writing fails.
    writer = csv.writer(codecs.getwriter("utf-8")(file), lineterminator="\n")
    writer.writerow([column.name for column in columns])
    for row in rows:
        writer.writerow([_cell(column, row.get(column.name)) for column in columns])


def write_jsonl(file: BinaryIO, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Write a table as JSON, a row a line: an empty cell is null, NaN the text `nan`."""
    for row in rows:
        cells = {
            column.name: _shown(column, row[column.name]) if column.name in row else None
            for column in columns
        }
        file.write(json_line(cells).encode("ascii") + b"\n")


def _cell(column: Column, value: Value | None) -> Value | None:
    """Return what stands in a cell of CSV, where booleans are written as in JSON."""
    if value is None:
        return None
    return str(value).lower() if isinstance(value, bool) else _shown(column, value)


def _shown(column: Column, value: Value) -> Value:
    """Return a value with times as text."""
    return time_text(int(value)) if column.kind == "time" else value


def time_text(nanoseconds: int) -> str:
    """Return Unix nanoseconds as RFC 3339, to the nanosecond.

    >>> time_text(1_700_000_000_000_000_001)
    '2023-11-14T22:13:20.000000001Z'
    """
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
