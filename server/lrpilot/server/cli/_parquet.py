"""Tables as Parquet. Needs the extra `parquet`."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lrpilot.server.cli._table import Column, Row

ROWS_PER_GROUP = 16_384
"""Rows of a row group; no more are in memory at a time."""

_TYPES = {
    "time": pa.timestamp("ns", tz="UTC"),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "text": pa.string(),
}


def write_parquet(file: BinaryIO, columns: Sequence[Column], rows: Iterable[Row]) -> None:
    """Write a table as Parquet, row group after row group: an empty cell is null, NaN is NaN."""
    schema = pa.schema([(column.name, _TYPES[column.kind]) for column in columns])
    rest = iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(rest, ROWS_PER_GROUP)):
            arrays = [
                pa.array([row.get(column.name) for row in group], _TYPES[column.kind])
                for column in columns
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
