"""Recorded losses: read from CSV, JSONL or a TensorBoard run, checked, made into reports.

CSV has a header; JSONL has the same names as keys, one object a line. `progress` is required, and
what is absent is an empty cell, `null` or a missing key:

- `progress`: whole, rising; a progress comes again only after a row of it that was skipped.
- `loss`: any number, `nan`, `inf` or `-inf`; absent: the step reported none.
- names that begin with `val_` or `val/`: validation losses, under those names.
- `grad_norm`, `batch` (global, in samples), `weight` or `tokens` (weight of the loss).
- `skipped`: `true` or `1` where the optimizer refused the update, so that its progress came again.
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from lrpilot.core import MAX_PROGRESS, Report, Violation
from lrpilot.server.cli._failures import INVALID, CommandError

NAMES = "progress, loss, grad_norm, batch, weight or tokens, skipped, and val_… or val/…"
"""What a column or key may be called."""

_PLAIN_NAMES = ("progress", "loss", "grad_norm", "batch", "weight", "tokens", "skipped")
_VALIDATION_NAME = re.compile(r"val[_/][a-zA-Z0-9._/-]{1,60}")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_NON_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)
_WORDS = {"true": True, "false": False}
_LONGEST_INTEGER = 18
"""Longer ones are read as floats, which is what a loss is anyway."""


@dataclass(frozen=True, slots=True)
class LossRow:
    """What was recorded of one step."""

    progress: int
    loss: float | None
    validation: Mapping[str, float] = field(default_factory=dict)
    """Validation losses by name."""
    gradient_norm: float | None = None
    batch: int | None = None
    """Global batch size in samples."""
    weight: float = 1.0
    skipped: bool = False


def read_losses(
    source: str, *, tag: str | None = None, validation_tag: str | None = None
) -> list[LossRow]:
    """Return the rows of a file, of standard input (`-`) or of a TensorBoard run.

    Args:
        source: a CSV or JSONL file, told apart by what stands in it; a folder or a file with
            `tfevents` in its name is a TensorBoard run.
        tag: TensorBoard: which scalar is the loss; None: the one that is called like one.
        validation_tag: TensorBoard: which scalar becomes `val_loss`; None: none.

    Raises CommandError that names the file, the line and what is allowed there.
    """
    path = Path(source)
    if source != "-" and (_is_folder(path) or "tfevents" in path.name):
        # Its package is optional.
        from lrpilot.server.cli._tensorboard import read_run  # noqa: PLC0415

        return read_run(path, tag, validation_tag)
    if tag is not None or validation_tag is not None:
        raise CommandError(
            f"{called(source)}: no TensorBoard run, and --tag and --val-tag are for those alone",
            INVALID,
        )
    return _Table(called(source), _read_text(source)).rows()


def make_reports(rows: Sequence[LossRow]) -> Iterator[Report]:
    """Return the reports that a trainer makes of these rows.

    It moves from each row's progress to the next one's, and from the last one's as far again as it
    came there.
    """
    tries = 0
    for row, moves_to in zip(rows, _moves(rows), strict=True):
        yield Report(
            progress=row.progress,
            loss=row.loss,
            weight=row.weight,
            moves_to=moves_to,
            skipped=row.skipped,
            tries=tries,
            validation=row.validation,
            gradient_norm=row.gradient_norm,
            batch=row.batch,
        )
        tries = tries + 1 if row.skipped else 0


def _moves(rows: Sequence[LossRow]) -> Iterator[int]:
    increment = 1
    for row, after in pairwise(rows):
        # A skipped update does not advance.
        increment = after.progress - row.progress or increment
        yield after.progress
    for row in rows[-1:]:
        yield row.progress if row.skipped else row.progress + increment


def called(source: str) -> str:
    """Return what errors call the source of losses."""
    return "standard input" if source == "-" else source


def refuse(source: str, place: str, got: str, allowed: str) -> NoReturn:
    """Raise CommandError: `got` stands at `place` of a source of losses."""
    violation = Violation(place, got, allowed)
    raise CommandError(f"{source}: the losses cannot be read", INVALID, lines=[str(violation)])


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        # ValueError: a NUL in the name; reading it says so.
        return False


def _read_text(source: str) -> str:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CommandError(f"{called(source)}: {reason}", INVALID) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        refuse(called(source), f"line {line}", f"bytes that are no UTF-8 ({error.reason})", "UTF-8")


class _Table:
    """Reads rows out of CSV or JSONL."""

    def __init__(self, source: str, text: str) -> None:
        self._source = source
        self._text = text
        self._line = 0

    def rows(self) -> list[LossRow]:
        is_json = self._text.lstrip()[:1] in ("{", "[")
        rows: list[LossRow] = []
        before, line_before = None, 0
        for values in self._objects() if is_json else self._records():
            row = self._row(values)
            if before is not None:
                self._check_order(before, line_before, row)
            rows.append(row)
            before, line_before = row, self._line
        if not rows:
            refuse(self._source, "", "no losses", f"a row a loss, with the names {NAMES}")
        return rows

    def _records(self) -> Iterator[dict[str, Any]]:
        reader = csv.reader(io.StringIO(self._text, newline=""), strict=True)
        header: list[str] | None = None
        while True:
            try:
                cells = [cell.strip() for cell in next(reader)]
            except StopIteration:
                return
            except csv.Error as error:
                self._line = reader.line_num
                self._refuse("", str(error), "valid CSV")
            self._line = reader.line_num
            if not any(cells):
                continue
            if header is None:
                header = self._header(cells)
                continue
            if len(cells) != len(header):
                self._refuse("", f"{len(cells)} cells", f"{len(header)}, as in the header")
            yield {
                name: _plain(cell) for name, cell in zip(header, cells, strict=True) if cell != ""
            }

    def _header(self, names: list[str]) -> list[str]:
        needed = "a header with progress and loss"
        if not {"progress", "loss"} & set(names):
            self._refuse("", _shown(",".join(names)), f"{needed}; the names are {NAMES}")
        for name in ("progress", "loss"):
            if names.count(name) != 1:
                self._refuse(
                    "", f"{names.count(name)} columns called {name}", f"{needed}, each once"
                )
        for name in names:
            self._check_name(name)
            if names.count(name) > 1:
                self._refuse(name, f"{names.count(name)} columns", "one column of that name")
        return names

    def _objects(self) -> Iterator[dict[str, Any]]:
        for number, text in enumerate(self._text.split("\n"), 1):
            if not text.strip():
                continue
            self._line = number
            try:
                value = json.loads(text, object_pairs_hook=list, parse_float=_plain)
            except (ValueError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                self._refuse("", what, "one JSON object a line")
            # Objects come as lists of pairs, and a list of pairs cannot be told from an empty one.
            if not text.lstrip().startswith("{"):
                self._refuse("", _shown(text.strip()), "one JSON object a line")
            names = [name for name, _ in value]
            for name in names:
                self._check_name(name)
                if names.count(name) > 1:
                    self._refuse(name, f"{names.count(name)} values", "one value")
            yield {
                name: _plain(item)
                if isinstance(item, str) and _NON_FINITE.fullmatch(item)
                else item
                for name, item in value
                if item is not None
            }

    def _check_name(self, name: str) -> None:
        if name not in _PLAIN_NAMES and not _VALIDATION_NAME.fullmatch(name):
            self._refuse("", f"the name {_shown(name)}", NAMES)

    def _row(self, values: Mapping[str, Any]) -> LossRow:
        if "weight" in values and "tokens" in values:
            self._refuse("tokens", "a value beside weight", "one of the two: both are the weight")
        return LossRow(
            progress=self._whole(values, "progress", 0, MAX_PROGRESS, "2**53"),
            loss=self._number(values, "loss"),
            validation={
                name: number
                for name in values
                if name not in _PLAIN_NAMES and (number := self._number(values, name)) is not None
            },
            gradient_norm=self._gradient_norm(values),
            batch=self._whole(values, "batch", 1, MAX_PROGRESS, "2**53")
            if "batch" in values
            else None,
            weight=self._weight(values),
            skipped=self._flag(values, "skipped"),
        )

    def _whole(self, values: Mapping[str, Any], name: str, low: int, high: int, shown: str) -> int:
        allowed = f"a whole number from {low} to {shown}"
        if name not in values:
            self._refuse(name, "nothing", f"{allowed} (required)")
        value = values[name]
        if not _is_number(value) or not low <= value <= high or value != int(value):
            self._refuse(name, _shown(value), allowed)
        return int(value)

    def _number(self, values: Mapping[str, Any], name: str) -> float | None:
        value = values.get(name)
        if value is None:
            return None
        if not _is_number(value):
            self._refuse(name, _shown(value), "a number, nan, inf or -inf, or nothing")
        try:
            return float(value)
        except OverflowError:
            self._refuse(name, _shown(value), "a number that a float64 holds")

    def _gradient_norm(self, values: Mapping[str, Any]) -> float | None:
        norm = self._number(values, "grad_norm")
        if norm is not None and norm < 0:
            self._refuse("grad_norm", _shown(norm), "a number from 0, nan or inf, or nothing")
        return norm

    def _weight(self, values: Mapping[str, Any]) -> float:
        name = "tokens" if "tokens" in values else "weight"
        weight = self._number(values, name)
        if weight is None:
            return 1.0
        if not 0 < weight < math.inf:
            self._refuse(name, _shown(weight), "a finite number above 0, or nothing")
        return weight

    def _flag(self, values: Mapping[str, Any], name: str) -> bool:
        value = values.get(name, False)
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        if value not in (0, 1) or isinstance(value, str):
            self._refuse(name, _shown(value), "true, false, 1, 0 or nothing")
        return bool(value)

    def _check_order(self, before: LossRow, line: int, row: LossRow) -> None:
        last, got = before.progress, str(row.progress)
        if before.skipped and row.progress != last:
            allowed = f"{last} again: its update was skipped (line {line})"
        elif row.progress < last:
            allowed = f"more than {last} (line {line}): rows stand in order of progress"
        elif row.progress == last and not before.skipped:
            got = f"{got} again"
            allowed = f"more than {last} (line {line}), unless the row there says skipped"
        else:
            return
        self._refuse("progress", got, allowed)

    def _refuse(self, name: str, got: str, allowed: str) -> NoReturn:
        place = f"line {self._line}, {name}" if name else f"line {self._line}"
        refuse(self._source, place, got, allowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(text: str) -> int | float | str:
    """Return the number that a text is, else the text; `1e999` is no number, `inf` is one."""
    if _NON_FINITE.fullmatch(text):
        return float(text)
    if not _NUMBER.fullmatch(text):
        return text
    if text.lstrip("+-").isdigit() and len(text) <= _LONGEST_INTEGER:
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else text


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
