"""The picture of a replay: losses, LR and what was decided, with the reasons below."""

import math
import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lrpilot.core import Adjustment, RunSpec
from lrpilot.core._changes import Note
from lrpilot.server.cli._output import counted
from lrpilot.server.cli._plot import (
    COLORS,
    FAINT,
    GRID_LINE,
    INK,
    Band,
    decimal,
    draw_bands,
    dress,
    group_label,
    picture_style,
    rendered,
)
from lrpilot.server.cli._trace import Trace

_RAW, _SMOOTH, _BASE, _ALERT = "#9db8dc", COLORS[0], "#8a929b", "#b02a37"
_ACT, _ADVICE = "#22262b", "#8a6d00"

_LISTED = 12
"""Most decisions that are numbered and told; a table tells all."""
_LINES_EACH = 2
_LETTERS = 150
"""Letters in a line of the list."""
_LINE = 0.185
"""Height of a line of the list, inches."""
_COLUMNS = 2000
"""Columns into which longer series are thinned, by their least and greatest value."""
_MARKS = 400
"""About the most marks at the panel's edge."""
_NEAR = 0.022
"""Share of the panel's width below which two numbers would touch."""
_NUMBER_LINES = 3
_WIDTH, _LEFT, _RIGHT = 10.0, 0.85, 0.2
"""Width of the picture, and what is left of its panels and right of them, inches."""
_MOST_GROUPS = 8


class _Point(NamedTuple):
    at: int
    value: float


def draw_simulation(
    spec: RunSpec, groups: Sequence[int], trace: Trace, *, log: bool, form: str
) -> bytes:
    """Return the picture of a replay, as `png` or `svg`.

    Args:
        spec: the spec.
        groups: indices of the parameter groups that the trace has; those with equal LRs share a
            line.
        trace: the replay.
        log: whether the loss stands on a logarithmic axis; then all losses are above 0.
        form: `png` or `svg`.
    """
    told = _told(trace.decided)
    listed = list(_list_lines(told, len(trace.decided) - len(told)))
    first, last = trace.progress[0], max(trace.progress[-1], trace.progress[0] + 1)
    numbers = _number_lines([min(item.effective, last) for item in told], first, last)
    bands = list(_bands(trace)) if any(trace.stages) else []
    with picture_style():
        # Heights from the top. No layout engine: what it finds differs in the last bit.
        rows = (
            ("title", 0.6),
            ("stages", 0.5 if bands else 0.05),
            ("loss", 2.7),
            ("numbers", 0.2 + 0.24 * (1 + max(filter(None, numbers), default=0))),
            ("rate", 2.2),
            ("label", 0.6),
            ("list", _LINE * len(listed)),
            ("foot", 0.12),
        )
        figure = Figure(figsize=(_WIDTH, sum(height for _, height in rows)))
        panels = _panels(figure, rows)
        _draw_losses(panels["loss"], trace, log=log)
        _draw_rates(panels["rate"], spec, groups, trace)
        for name in ("loss", "rate"):
            panels[name].set_xlim(first, last)
            draw_bands(panels[name], bands, first, last, named=name == "loss")
        _mark_decisions(panels["loss"], panels["rate"], trace, told, numbers)
        panels["loss"].tick_params(labelbottom=False)
        panels["rate"].set_xlabel(f"progress ({spec.unit})")
        _write_list(panels["list"], listed)
        handles, labels = panels["loss"].get_legend_handles_labels()
        panels["title"].axis("off")
        panels["title"].legend(
            handles, labels, loc="lower right", ncols=4, frameon=False, fontsize=9,
            borderaxespad=0.0,
        )  # fmt: skip
        title = f"{spec.name}: simulation of {counted(trace.count, 'loss')}"
        figure.text(0.01, 1 - 0.21 / figure.get_figheight(), title, weight="bold", size=12)
        return rendered(figure, form)


def _panels(figure: Figure, rows: Sequence[tuple[str, float]]) -> dict[str, Axes]:
    """Return the panels of a figure; each row is a name and a height in inches, from the top."""
    height, top, panels = figure.get_figheight(), figure.get_figheight(), {}
    for name, tall in rows:
        top -= tall
        if name in ("title", "loss", "rate", "list"):
            place = (_LEFT / _WIDTH, top / height, 1 - (_LEFT + _RIGHT) / _WIDTH, tall / height)
            panels[name] = figure.add_axes(place)
    return panels


def _draw_losses(axes: Axes, trace: Trace, *, log: bool) -> None:
    recorded = list(zip(trace.progress, trace.losses, strict=True))
    points = [_Point(n, loss) for n, loss in recorded if loss is not None and math.isfinite(loss)]
    missing = [n for n, loss in recorded if loss is not None and not math.isfinite(loss)]
    ceiling = math.inf if log else _ceiling([point.value for point in points])
    smooth = _smoothed(points, ceiling)
    dress(axes)
    axes.set_ylabel("loss")
    if log:
        axes.set_yscale("log")
        values = [point.value for point in points]
        if values:
            _label_decades(axes, min(values), max(values))
    marker = "o" if len(points) == 1 else None
    axes.plot(*_columns(_thinned(points)), color=_RAW, linewidth=0.8, marker=marker, label="loss")
    axes.plot(*_columns(_thinned(smooth)), color=_SMOOTH, linewidth=1.9, label="smoothed")
    above = [point.at for point in points if point.value > ceiling]
    if above:
        low = min(point.value for point in points)
        axes.set_ylim(low - 0.05 * (ceiling - low), ceiling)
        _mark_edge(axes, above, "^", _SMOOTH, f"above {decimal(ceiling)}")
    _mark_edge(axes, missing, "x", _ALERT, "not finite")


def _draw_rates(axes: Axes, spec: RunSpec, groups: Sequence[int], trace: Trace) -> None:
    dress(axes)
    axes.set_ylabel("learning rate")
    at = list(_kept(trace))
    positive: list[float] = []
    shared: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
    for column, group in enumerate(groups):
        used = tuple(trace.learning_rates[index][column] for index in at)
        planned = tuple(trace.base[index][column] for index in at)
        shared.setdefault((used, planned), []).append(spec.group_names[group])
        positive += [rate for rate in used + planned if rate > 0]
    progress = [trace.progress[index] for index in at]
    marker = "o" if len(at) == 1 else None
    for number, ((used, planned), owners) in enumerate(shared.items()):
        color = COLORS[number % len(COLORS)]
        label = "_" if number >= _MOST_GROUPS else group_label(owners) if spec.groups else "used"
        axes.plot(progress, used, color=color, linewidth=1.9, marker=marker, label=label, zorder=3)
        label = "base schedule" if number == 0 else "_"
        axes.plot(progress, planned, color=_BASE, linewidth=1.1, linestyle=(0, (4, 3)), label=label)
    if positive:
        _scale_rates(axes, min(positive), max(positive))
    axes.legend(loc="best", ncols=4, framealpha=0.9, edgecolor=GRID_LINE, fontsize=9)


def _scale_rates(axes: Axes, low: float, high: float) -> None:
    low = max(low, high * 1e-4)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.6, high * 1.6)
    _label_decades(axes, low, high)


def _label_decades(axes: Axes, low: float, high: float) -> None:
    """Label a logarithmic axis in decades, or evenly where it spans hardly more than one."""
    axes.yaxis.set_major_locator(AutoLocator() if high / low < 20 else LogLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: decimal(value)))


def _mark_decisions(
    loss_axes: Axes,
    rate_axes: Axes,
    trace: Trace,
    decided: Sequence[Adjustment],
    number_lines: Sequence[int | None],
) -> None:
    last = trace.progress[-1]
    for number, (item, line) in enumerate(zip(decided, number_lines, strict=True), 1):
        color = _ACT if item.mode == "act" else _ADVICE
        at = min(item.effective, last)
        for axes in (loss_axes, rate_axes):
            axes.axvline(at, color=color, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
        loss = _loss_at(trace, item.decided_at)
        low, high = loss_axes.get_ylim()
        if loss is not None and math.isfinite(loss):
            loss_axes.plot(
                [item.decided_at], [min(max(loss, low), high)], "o", markersize=4.5,
                color="white" if item.mode != "act" else color, markeredgecolor=color, zorder=5,
            )  # fmt: skip
        if line is None:
            continue
        rate_axes.annotate(
            str(number),
            (at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 10 + 17 * line),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if item.mode == "act" else color,
            weight="bold",
            bbox={
                "boxstyle": "circle,pad=0.2",
                "facecolor": color if item.mode == "act" else "white",
                "edgecolor": color,
            },
        )


def _number_lines(at: Sequence[int], first: int, last: int) -> list[int | None]:
    """Return the line above the panel in which each number finds room; None: in none."""
    # Where the last number of each line stands, as a share of the panel's width.
    ends = [-1.0] * _NUMBER_LINES
    lines: list[int | None] = [None] * len(at)
    for index in sorted(range(len(at)), key=at.__getitem__):
        share = (at[index] - first) / (last - first)
        line = next((line for line, end in enumerate(ends) if share - end >= _NEAR), None)
        lines[index] = line
        if line is not None:
            ends[line] = share
    return lines


def _told(decided: Sequence[Adjustment]) -> list[Adjustment]:
    """Return the decisions that are numbered, in order: changes before notes, these before advice.

    The order within each is that in which they were decided.
    """

    def rank(index: int) -> int:
        item = decided[index]
        return 2 if item.mode != "act" else 1 if isinstance(item.change, Note) else 0

    kept = sorted(sorted(range(len(decided)), key=rank)[:_LISTED])
    return [decided[index] for index in kept]


def _list_lines(told: Sequence[Adjustment], more: int) -> Iterator[tuple[str, str, str]]:
    """Return (number, colour, text) of each line below the panels."""
    for number, item in enumerate(told, 1):
        color = _ACT if item.mode == "act" else _ADVICE
        who = item.kind if item.mode == "act" else f"{item.kind}, {item.mode}"
        text = (
            f"at {item.effective:,} ({who}): {item.summary}; on the loss at "
            f"{item.decided_at:,}: {item.reason}"
        )
        lines = textwrap.wrap(
            text, _LETTERS, max_lines=_LINES_EACH, placeholder=" …", break_long_words=True
        )
        for index, line in enumerate(lines):
            yield "" if index else str(number), color, line
    if more:
        yield "", FAINT, f"and {more:,} more: --format table lists them all"
    if not told:
        yield "", FAINT, "no policy decided anything"


def _write_list(axes: Axes, lines: Sequence[tuple[str, str, str]]) -> None:
    axes.axis("off")
    for index, (number, color, text) in enumerate(lines):
        y = 1 - (index + 0.5) / len(lines)
        for x, part, align, weight in ((0.0, number, "right", "bold"), (0.008, text, "left", None)):
            written = axes.text(
                x, y, part, transform=axes.transAxes, ha=align, va="center", fontsize=8,
                color=color if part == number or color == FAINT else INK, weight=weight,
            )  # fmt: skip
            # Long lines may pass the panel's side; they do not make the panels narrower.
            written.set_in_layout(False)


def _mark_edge(axes: Axes, at: Sequence[int], marker: str, color: str, label: str) -> None:
    """Mark what the panel cannot show at its upper edge, and count it in the legend."""
    if not at:
        return
    shown = at[:: max(1, len(at) // _MARKS)]
    axes.plot(
        shown, [0.97] * len(shown), marker, transform=axes.get_xaxis_transform(), color=color,
        markersize=5, linestyle="none", label=f"{label}: {counted(len(at), 'loss')}", zorder=4,
    )  # fmt: skip


def _smoothed(points: Sequence[_Point], ceiling: float) -> list[_Point]:
    """Return the exponential average of the losses, bias corrected, over about 0.5% of them.

    What lies above the ceiling counts as the ceiling, so that one outlier does not hide the curve.
    """
    newest = 2.0 / (max(5.0, len(points) / 200.0) + 1.0)
    average = weight = 0.0
    smooth = []
    for at, value in points:
        average += newest * (min(value, ceiling) - average)
        weight += newest * (1.0 - weight)
        smooth.append(_Point(at, average / weight))
    return smooth


def _ceiling(losses: Sequence[float]) -> float:
    """Return where the loss axis ends: few far outliers do not flatten all the rest."""
    if not losses:
        return math.inf
    ordered = sorted(losses)
    low, high = ordered[0], ordered[-1]
    # Losses rarely pass the first one by much; a run that starts low is known by its middle.
    height = max(losses[0], ordered[len(ordered) // 2]) - low
    usual = min(ordered[math.ceil(0.98 * len(ordered)) - 1] - low, 5.0 * height)
    height = max(losses[0] - low, usual)
    return low + 1.2 * height if high - low > 2.0 * height > 0.0 else high


def _thinned(points: Sequence[_Point]) -> list[_Point]:
    """Return a series that looks the same: the least and the greatest value of each column."""
    if len(points) <= 2 * _COLUMNS:
        return list(points)
    kept = [points[0]]
    for column in range(_COLUMNS):
        begin, end = (len(points) * edge // _COLUMNS for edge in (column, column + 1))
        some = points[begin:end]
        kept += sorted({min(some, key=_value), max(some, key=_value)})
    return [*kept, points[-1]]


def _value(point: _Point) -> float:
    return point.value


def _columns(points: Sequence[_Point]) -> tuple[list[int], list[float]]:
    return [point.at for point in points], [point.value for point in points]


def _kept(trace: Trace) -> Iterator[int]:
    """Return the rows of which the LR is drawn: evenly spread, and both sides of each decision."""
    count = len(trace.progress)
    near = set()
    for item in trace.decided:
        index = bisect_left(trace.progress, item.effective)
        near |= {index - 1, index}
    step = max(1, count // _COLUMNS)
    yield from sorted({*range(0, count, step), count - 1, *(i for i in near if 0 <= i < count)})


def _loss_at(trace: Trace, progress: int) -> float | None:
    index = bisect_left(trace.progress, progress)
    found = index < len(trace.progress) and trace.progress[index] == progress
    return trace.losses[index] if found else None


def _bands(trace: Trace) -> Iterator[Band]:
    begin = 0
    for index in range(1, len(trace.stages) + 1):
        if index == len(trace.stages) or trace.stages[index] != trace.stages[begin]:
            until = trace.progress[min(index, len(trace.stages) - 1)]
            yield Band(trace.stages[begin], trace.progress[begin], until)
            begin = index
