"""How commands write: tables of plain text, numbers, JSON."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer


def write_json(value: Any) -> None:
    """Write one line of JSON; floats in shortest round-trip form, non-finite ones as strings."""
    typer.echo(json.dumps(_plain(value), allow_nan=False))


def table_lines(
    headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0
) -> Iterator[str]:
    """Return the lines of a table: columns fit their widest cell, the first `left` flush left."""
    cells = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def rate(value: float) -> str:
    """Return an LR, a WD or a loss with the digits that people look at."""
    return f"{value:.6g}"


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless it is one.

    >>> counted(1, "loss"), counted(1200, "waiver")
    ('1 loss', '1,200 waivers')
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
