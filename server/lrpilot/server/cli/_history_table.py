"""The log of a run as one flat table: a row for each loss, each decision and each other event.

The values used at a step are nowhere beside its loss: they follow from what was recorded before, in
which attempt, and what that one inherited. So the log is folded, as a server folds it.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import BinaryIO

from lrpilot import core
from lrpilot.server._history import trim
from lrpilot.server._live_run import LiveRun
from lrpilot.server._messages import adjustment_messages, event_message
from lrpilot.server._run_file import RunFileReader
from lrpilot.server._store import LogRow
from lrpilot.server.cli._failures import REFUSED, CommandError
from lrpilot.server.cli._table import Column, Row, Value
from lrpilot.v1 import runs_pb2

_BEFORE = (
    Column("seq", "int"),
    Column("recorded_at", "time"),
    Column("kind", "text"),
    Column("attempt", "int"),
    Column("progress", "int"),
    Column("forgotten", "bool"),
    Column("rank", "int"),
    Column("loss", "float"),
    Column("weight", "float"),
    Column("skipped", "bool"),
    Column("late", "bool"),
    Column("gradient_norm", "float"),
    Column("batch", "int"),
)
_AFTER = (
    Column("adjustment", "text"),
    Column("action", "text"),
    Column("source", "text"),
    Column("mode", "text"),
    Column("effective", "int"),
    Column("status", "text"),
    Column("author", "text"),
    Column("reason", "text"),
    Column("summary", "text"),
)

_WITHOUT_PROGRESS = (
    core.Created, core.Attached, core.Joined, core.Finished, core.Imported,
)  # fmt: skip
"""Events that are about no progress."""


class HistoryTable:
    """Collects the table of one log, event after event.

    What later events say of earlier ones, and which columns there are, is known at the end: until
    then the rows are in a file.
    """

    def __init__(self, file: BinaryIO) -> None:
        """Begin; `file` is empty, open for writing and reading, and the table's own."""
        self._file = file
        self._validation: dict[str, None] = {}
        """Names of the validation losses met."""
        self._groups: dict[str, None] = {}
        """Names of the parameter groups met, in their order."""
        self._opened: list[tuple[int, int]] = []
        """Sequence number of each attempt, and the progress from which on it forgot the losses."""
        self._furthest = -1
        """Last progress that the current attempt has reported; -1: none."""
        self._declared: dict[tuple[int, int], tuple[int, Row]] = {}
        """Sequence number and cells of values that were declared behind a report of their step, by
        attempt and progress."""
        self.count = 0
        """Number of rows, without those of the decisions."""

    def add(self, run: LiveRun, row: LogRow, event: core.Event) -> None:
        """Take an event with the run after it, as RunFileReader gives them."""
        state = run.state
        cells: dict[str, Value] = {"seq": row.seq, "recorded_at": row.recorded_at_ns}
        if state.attempt:
            cells["attempt"] = state.attempt
        rows: list[dict[str, Value]] = []
        match event:
            case core.Reported():
                rank = state.reporters.ranks[0] if event.rank is None else event.rank
                for report in event.reports:
                    is_late = (row.seq, report.progress) in run.late
                    rows.append(self._loss_cells(state, report, rank, is_late=is_late))
                self._furthest = max(self._furthest, *(item.progress for item in event.reports))
            case core.Recorded():
                # Its values stand in the rows of the losses.
                pass
            case _:
                rows.append(_event_cells(row, event))
        if isinstance(event, core.Opened):
            # What a saved state brings takes the place of all losses that the log has.
            self._opened.append((row.seq, event.begin if event.fold is None else 0))
            self._furthest = -1
        elif isinstance(event, core.Declared):
            self._declare(row.seq, event, state.spec.group_names)
        self._groups.update(dict.fromkeys(state.spec.group_names))
        self._file.write(json.dumps([cells, rows]).encode("ascii") + b"\n")
        self.count += len(rows)

    def _loss_cells(
        self, state: core.RunState, report: core.Report, rank: int, *, is_late: bool
    ) -> dict[str, Value]:
        has_loss = report.loss is not None
        cells: dict[str, Value | None] = {
            "kind": "loss",
            "progress": report.progress,
            "rank": rank,
            "loss": report.loss,
            "weight": report.weight if has_loss else None,
            "skipped": report.skipped,
            "late": has_loss and is_late,
            "gradient_norm": report.gradient_norm,
            "batch": report.batch,
        }
        for name, value in report.validation.items():
            self._validation.setdefault(name)
            cells[f"validation.{name}"] = value
        used = state.records.at(report.progress)
        if used is not None:
            cells |= _used_cells(used, state.spec.group_names)
        return {name: value for name, value in cells.items() if value is not None}

    def _declare(self, seq: int, event: core.Declared, names: tuple[str, ...]) -> None:
        for block in event.blocks:
            part = block.cut(block.begin, self._furthest + 1)
            for step in range(part.steps if part is not None else 0):
                progress = block.begin + step * block.stride
                used = block.at(progress)
                if used is not None:
                    self._declared[event.attempt, progress] = (seq, _used_cells(used, names))

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns, once all events were taken."""
        return (
            *_BEFORE,
            *(Column(f"validation.{name}", "float") for name in sorted(self._validation)),
            *(Column(_of_group("learning_rate", name), "float") for name in self._groups),
            *(Column(_of_group("weight_decay", name), "float") for name in self._groups),
            *_AFTER,
        )

    def rows(self, state: core.RunState) -> Iterator[Row]:
        """Yield the rows in order; `state` is the run's after all events that were taken."""
        opened = [seq for seq, _ in self._opened]
        # From where on all attempts behind the first, the first two, ... have forgotten together.
        begins = [begin for _, begin in reversed(self._opened)]
        least = [*reversed(list(accumulate(begins, min))), math.inf]
        decided = sorted(adjustment_messages(state), key=lambda item: item.seq)
        done = 0
        self._file.seek(0)
        for line in self._file:
            cells, rows = json.loads(line)
            begin = least[bisect_right(opened, cells["seq"])]
            for row in rows:
                if row["kind"] == "loss":
                    row["forgotten"] = row["progress"] >= begin
                    # What a holder used alone takes the place of what was recorded for it.
                    seq, used = self._declared.get((cells["attempt"], row["progress"]), (0, {}))
                    if seq > cells["seq"]:
                        row.update(used)
                yield cells | row
            while done < len(decided) and decided[done].seq <= cells["seq"]:
                yield cells | _decision_cells(decided[done])
                done += 1


def _used_cells(
    used: tuple[tuple[float, ...], tuple[float, ...] | None], names: tuple[str, ...]
) -> dict[str, Value]:
    """Return the cells of the values at one progress."""
    rates, decays = used
    cells: dict[str, Value] = {}
    for index, name in enumerate(names):
        cells[_of_group("learning_rate", name)] = rates[index]
        if decays is not None:
            cells[_of_group("weight_decay", name)] = decays[index]
    return cells


def _event_cells(row: LogRow, event: core.Event) -> dict[str, Value]:
    message = event_message(row, set())
    cells: dict[str, Value] = {"kind": message.kind, "summary": message.summary}
    no_progress = isinstance(event, _WITHOUT_PROGRESS) or (
        isinstance(event, core.Revised) and event.effective is None
    )
    if not no_progress:
        cells["progress"] = message.progress
    return cells | _present(author=message.author, reason=message.reason)


def _decision_cells(item: runs_pb2.Adjustment) -> dict[str, Value]:
    return {
        "kind": "adjustment",
        "progress": item.decided_at,
        "forgotten": item.forgotten,
        "adjustment": item.id,
        "action": item.action,
        "source": item.source,
        "mode": item.mode,
        "effective": item.effective,
        "status": item.status,
        "summary": item.summary,
        **_present(author=item.author, reason=item.reason),
    }


def _present(**texts: str) -> dict[str, Value]:
    return {name: text for name, text in texts.items() if text}


def _of_group(column: str, name: str) -> str:
    """Return the column of a group; the only group of a run has no name."""
    return f"{column}.{name}" if name else column


def fold_log(name: str, parts: Iterable[bytes], table: HistoryTable) -> core.RunState:
    """Fold an exported log into a table, and return the state of the run after it.

    Raises CommandError where this release cannot read the log.
    """
    reader = RunFileReader(trim, table.add)
    try:
        for part in parts:
            reader.feed(part)
        return reader.end().run.state
    except core.InvalidRequest as error:
        raise CommandError(
            f"the log of run {name!r} cannot be read here",
            REFUSED,
            lines=[str(item) for item in error.violations],
        ) from None
