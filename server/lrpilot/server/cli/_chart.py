"""What a picture of a run shows, whatever draws it: a file (`_plot_chart`) or a terminal."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from lrpilot.core import Adjustment, RunSpec
from lrpilot.core._changes import Note
from lrpilot.core._schedules import base_schedule, stage_schedules
from lrpilot.server.cli._failures import INVALID, CommandError
from lrpilot.server.cli._output import counted
from lrpilot.server.cli._show import change_text
from lrpilot.server.cli._trace import Trace
from lrpilot.v1 import runs_pb2

MOST_TOLD = 12
"""Most decisions that a picture numbers and tells; a table or the history tells all."""

_COLUMNS = 2000
"""Columns into which longer series are thinned for a file."""

_INTERVALS = 400
"""Intervals that a curve is divided into before its bends are."""
_FINE = 2e-3
"""A bend is divided until a straight line is this close, as a share of the curve's height."""


class Point(NamedTuple):
    """A value at a progress."""

    at: int
    value: float


class Band(NamedTuple):
    """A stage between two progresses."""

    name: str
    begin: int
    until: int


@dataclass(frozen=True)
class GroupCurve:
    """LR and WD of a parameter group; between two of its progresses they run straight."""

    name: str
    """Empty for the only one."""
    progress: Sequence[int]
    rates: Sequence[float]
    base: Sequence[float]
    """LR of the base schedule; empty: as `rates`."""
    decays: Sequence[float]
    """Empty: none is shown."""


@dataclass(frozen=True)
class Decision:
    """A change of the plan, or the advice to make one."""

    effective: int
    """First progress at which it shows."""
    decided_at: int
    """Progress of the loss that decided it."""
    is_applied: bool
    """False: advice."""
    text: str
    """What, where, by whom and why."""

    def sign(self, number: int) -> str:
        """Return how it is marked, if it is the one of this number."""
        return str(number) if self.is_applied else f"({number})"


@dataclass(frozen=True)
class Chart:
    """Losses, LR and WD over progress, and what was decided."""

    title: str
    unit: str
    """What progress counts, such as `iterations`."""
    first: int
    last: int
    """First and last progress shown; `last` is above `first`."""
    groups: Sequence[GroupCurve]
    bands: Sequence[Band] = ()
    losses: Sequence[Point] = ()
    """The finite ones that count."""
    forgotten: Sequence[Sequence[Point]] = ()
    """Losses that later attempts forgot, by attempt."""
    missing: Sequence[int] = ()
    """Where losses that count are not finite."""
    smoothed: Sequence[Point] = ()
    decisions: Sequence[Decision] = ()
    """Those that are told, numbered from 1 in this order."""
    more: str = ""
    """What to say of decisions that are not told; empty: there are none."""
    progress: int | None = None
    """Where the past ends; None: not distinguished."""
    horizon: int | None = None
    """From here on all is planned; None: nothing is."""

    @property
    def is_named(self) -> bool:
        """Whether the groups have names."""
        return any(group.name for group in self.groups)

    def check_logarithmic(self) -> None:
        """Raise CommandError where a loss cannot stand on a logarithmic axis."""
        if any(point.value <= 0 for points in (self.losses, *self.forgotten) for point in points):
            raise CommandError(
                "--log: a loss is 0 or negative, which a logarithmic axis cannot show", INVALID
            )


def chart_of_spec(spec: RunSpec, groups: Sequence[int], positions: Sequence[int] | None) -> Chart:
    """Return the base schedule of a spec.

    Args:
        spec: the spec.
        groups: indices of the parameter groups to show.
        positions: progresses to show, joined by straight lines; None: as many as the curves need.
    """
    values = base_schedule(spec)

    def row(progress: int) -> tuple[float, ...]:
        at = values(progress)
        rates = tuple(at[group][0] for group in groups)
        return rates + tuple(at[group][1] or 0.0 for group in groups if spec.has_weight_decay)

    at = bends(row, spec.total) if positions is None else sorted(set(positions))
    columns = list(zip(*(row(progress) for progress in at), strict=True))
    decays = columns[len(groups) :] or [()] * len(groups)
    return Chart(
        title=f"{spec.name}: base schedule",
        unit=spec.unit,
        first=at[0],
        last=max(at[-1], at[0] + 1),
        groups=[
            GroupCurve(spec.group_names[group], at, columns[index], (), decays[index])
            for index, group in enumerate(groups)
        ],
        bands=list(_bands_of_spec(spec, at[0], at[-1])),
    )


def chart_of_trace(spec: RunSpec, groups: Sequence[int], trace: Trace, *, log: bool) -> Chart:
    """Return a replay.

    Args:
        spec: the spec.
        groups: indices of the parameter groups that the trace has.
        trace: the replay.
        log: whether the loss will stand on a logarithmic axis. Else what is far above the other
            losses counts as `ceiling` in the average, so that one outlier does not hide the curve.
    """
    recorded = list(zip(trace.progress, trace.losses, strict=True))
    points = [Point(n, loss) for n, loss in recorded if loss is not None and math.isfinite(loss)]
    top = math.inf if log else ceiling([point.value for point in points])
    told = _told(trace.decided)
    more = len(trace.decided) - len(told)
    rows = list(_kept(trace))
    progress = [trace.progress[index] for index in rows]
    return Chart(
        title=f"{spec.name}: simulation of {counted(trace.count, 'loss')}",
        unit=spec.unit,
        first=trace.progress[0],
        last=max(trace.progress[-1], trace.progress[0] + 1),
        groups=[
            GroupCurve(
                spec.group_names[group],
                progress,
                [trace.learning_rates[index][column] for index in rows],
                [trace.base[index][column] for index in rows],
                (),
            )
            for column, group in enumerate(groups)
        ],
        bands=list(_bands_of_trace(trace)) if any(trace.stages) else [],
        losses=points,
        missing=[n for n, loss in recorded if loss is not None and not math.isfinite(loss)],
        smoothed=_smoothed(points, top),
        decisions=[_decision(item) for item in told],
        more=f"and {more:,} more: --format table lists them all" if more else "",
    )


def chart_of_run(run: runs_pb2.Run, curves: runs_pb2.GetCurvesResponse) -> Chart:
    """Return a run as it was and as it is planned."""
    losses: list[Point] = []
    missing: list[int] = []
    forgotten = []
    for curve in curves.losses:
        lost = []
        until = curve.forgotten_from if curve.HasField("forgotten_from") else math.inf
        for point in points_of(curve.loss):
            if point.at >= until:
                lost += [point] if math.isfinite(point.value) else []
            elif math.isfinite(point.value):
                losses.append(point)
            else:
                missing.append(point.at)
        forgotten.append(lost)
    known = [item for item in run.adjustments if item.status in _SHOWN]
    told = known[-MOST_TOLD:]
    more = len(known) - len(told)
    return Chart(
        title=run.name,
        unit=run.unit,
        first=curves.begin,
        last=max(curves.end, curves.begin + 1),
        groups=[
            GroupCurve(
                group.name,
                group.progress,
                group.learning_rate,
                group.base_learning_rate,
                group.weight_decay,
            )
            for group in curves.groups
        ],
        bands=[
            Band(stage.name, max(stage.begin, curves.begin), min(stage.end, curves.end))
            for stage in curves.stages
        ],
        losses=losses,
        forgotten=[points for points in forgotten if points],
        missing=missing,
        smoothed=[p for p in points_of(curves.smoothed_loss) if math.isfinite(p.value)],
        decisions=[_decision_of_run(run.name, item) for item in told],
        more=f"and {counted(more, 'older one')}: lrpilot run history {run.name}" if more else "",
        progress=curves.progress,
        horizon=curves.horizon,
    )


_SHOWN = ("planned", "in force", "ended", "noted", "advice", "asked", "done", "failed", "unhandled")
"""Statuses of what a picture of a run marks: not what was forgotten, undone or never applied."""


def points_of(curve: runs_pb2.Curve) -> Iterator[Point]:
    """Yield the points of a curve of the server."""
    return map(Point._make, zip(curve.progress, curve.value, strict=True))


def ceiling(losses: Sequence[float]) -> float:
    """Return where a loss axis ends: few far outliers do not flatten all the rest."""
    if not losses:
        return math.inf
    ordered = sorted(losses)
    low, high = ordered[0], ordered[-1]
    # Losses rarely pass the first one by much; a run that starts low is known by its middle.
    height = max(losses[0], ordered[len(ordered) // 2]) - low
    usual = min(ordered[math.ceil(0.98 * len(ordered)) - 1] - low, 5.0 * height)
    height = max(losses[0] - low, usual)
    return low + 1.2 * height if high - low > 2.0 * height > 0.0 else high


def thinned(points: Sequence[Point], columns: int = _COLUMNS) -> Sequence[Point]:
    """Return a series that looks the same: the least and the greatest value of each column."""
    if len(points) <= 2 * columns:
        return points
    kept = [points[0]]
    for column in range(columns):
        begin, end = (len(points) * edge // columns for edge in (column, column + 1))
        some = points[begin:end]
        kept += sorted({min(some, key=_value), max(some, key=_value)})
    return [*kept, points[-1]]


def shared(
    groups: Iterable[GroupCurve], values: Callable[[GroupCurve], Sequence[Sequence[float]]]
) -> list[list[GroupCurve]]:
    """Return the groups by what `values` gives for them: those that are alike share a line."""
    same: dict[tuple[tuple[float, ...], ...], list[GroupCurve]] = {}
    for group in groups:
        same.setdefault((tuple(group.progress), *map(tuple, values(group))), []).append(group)
    return list(same.values())


def split(points: Sequence[Point], at: int | None) -> tuple[Sequence[Point], Sequence[Point]]:
    """Return the part of a curve up to `at` and that from there on, which meet there.

    None: all of it is the first part.
    """
    if at is None or not points or at >= points[-1].at:
        return points, []
    if at <= points[0].at:
        return [], points
    index = bisect_left(points, at, key=_at)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    meeting = Point(at, y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return [*points[:index], meeting], [meeting, *points[index:]]


def bends(row: Callable[[int], tuple[float, ...]], end: int) -> list[int]:
    """Return the progresses up to `end` between which every curve is as good as straight.

    A jump is divided down to neighbours, so that it is drawn as one.
    """
    grid = sorted({index * end // _INTERVALS for index in range(_INTERVALS + 1)})
    rows = {progress: row(progress) for progress in grid}
    heights = [max(column) - min(column) for column in zip(*rows.values(), strict=True)]
    todo = list(pairwise(grid))
    while todo:
        left, right = todo.pop()
        if right - left < 2:
            continue
        middle = (left + right) // 2
        share = (middle - left) / (right - left)
        rows[middle] = row(middle)
        straight = zip(rows[left], rows[middle], rows[right], heights, strict=True)
        if any(abs(y - (a + share * (b - a))) > _FINE * height for a, y, b, height in straight):
            todo += ((left, middle), (middle, right))
    return sorted(rows)


def _at(point: Point) -> int:
    return point.at


def _value(point: Point) -> float:
    return point.value


def _smoothed(points: Sequence[Point], top: float) -> list[Point]:
    """Return the exponential average of the losses, bias corrected, over about 0.5% of them.

    What lies above `top` counts as `top`.
    """
    newest = 2.0 / (max(5.0, len(points) / 200.0) + 1.0)
    average = weight = 0.0
    smooth = []
    for at, value in points:
        average += newest * (min(value, top) - average)
        weight += newest * (1.0 - weight)
        smooth.append(Point(at, average / weight))
    return smooth


def _kept(trace: Trace) -> Iterator[int]:
    """Return the rows of which the LR is drawn: evenly spread, and both sides of each decision."""
    count = len(trace.progress)
    near = set()
    for item in trace.decided:
        index = bisect_left(trace.progress, item.effective)
        near |= {index - 1, index}
    step = max(1, count // _COLUMNS)
    yield from sorted({*range(0, count, step), count - 1, *(i for i in near if 0 <= i < count)})


def _told(decided: Sequence[Adjustment]) -> list[Adjustment]:
    """Return the decisions that are numbered, in order: changes before notes, these before advice.

    The order within each is that in which they were decided.
    """

    def rank(index: int) -> int:
        item = decided[index]
        return 2 if item.mode != "act" else 1 if isinstance(item.change, Note) else 0

    kept = sorted(sorted(range(len(decided)), key=rank)[:MOST_TOLD])
    return [decided[index] for index in kept]


def _decision(item: Adjustment) -> Decision:
    who = item.kind if item.mode == "act" else f"{item.kind}, {item.mode}"
    text = (
        f"at {item.effective:,} ({who}): {item.summary}; on the loss at {item.decided_at:,}: "
        f"{item.reason}"
    )
    return Decision(item.effective, item.decided_at, item.mode == "act", text)


def _decision_of_run(run: str, item: runs_pb2.Adjustment) -> Decision:
    approve = f" (lrpilot run approve {run} {item.id})" if item.status == "advice" else ""
    text = (
        f"at {item.effective:,} ({item.author or item.source}): {item.summary}, "
        f"{item.status}{approve}, {change_text(item)}: {item.reason}"
    )
    return Decision(item.effective, item.decided_at, item.status != "advice", text)


def _bands_of_spec(spec: RunSpec, first: int, last: int) -> Iterator[Band]:
    for stage in stage_schedules(spec) if spec.stages else ():
        until = min(last if stage.until is None else stage.until, last)
        yield Band(stage.name, max(stage.begin, first), until)


def _bands_of_trace(trace: Trace) -> Iterator[Band]:
    begin = 0
    for index in range(1, len(trace.stages) + 1):
        if index == len(trace.stages) or trace.stages[index] != trace.stages[begin]:
            until = trace.progress[min(index, len(trace.stages) - 1)]
            yield Band(trace.stages[begin], trace.progress[begin], until)
            begin = index
