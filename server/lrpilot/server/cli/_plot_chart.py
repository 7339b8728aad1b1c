"""The picture of a run or a replay: losses, LR and what was decided, with the reasons below."""

import textwrap
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lrpilot.server.cli._chart import Chart, GroupCurve, Point, ceiling, shared, split, thinned
from lrpilot.server.cli._output import counted, decimal
from lrpilot.server.cli._plot import (
    COLORS,
    FAINT,
    GRID_LINE,
    INK,
    draw_bands,
    dress,
    group_label,
    picture_style,
    rendered,
)

_RAW, _SMOOTH, _BASE, _ALERT = "#9db8dc", COLORS[0], "#8a929b", "#b02a37"
_ACT, _ADVICE, _FORGOTTEN = "#22262b", "#8a6d00", "#d5d9de"
_DASHED, _DOTTED = (0, (4, 3)), (0, (1, 2))

_LINES_EACH = 2
_LETTERS = 150
"""Letters in a line of the list."""
_LINE = 0.185
"""Height of a line of the list, inches."""
_MARKS = 400
"""About the most marks at the panel's edge."""
_NEAR = 0.022
"""Share of the panel's width below which two numbers would touch."""
_NUMBER_LINES = 3
_WIDTH, _LEFT, _RIGHT = 10.0, 0.85, 0.2
"""Width of the picture, and what is left of its panels and right of them, inches."""
_MOST_GROUPS = 8


def draw_chart(chart: Chart, *, log: bool, form: str) -> bytes:
    """Return the picture of a run or a replay, as `png` or `svg`.

    Args:
        chart: what it shows; groups with equal values share a line.
        log: whether the loss stands on a logarithmic axis; then all losses are above 0.
        form: `png` or `svg`.
    """
    listed = list(_list_lines(chart))
    first, last = chart.first, chart.last
    numbers = _number_lines([min(item.effective, last) for item in chart.decisions], first, last)
    has_decays = any(group.decays for group in chart.groups)
    with picture_style():
        # Heights from the top. No layout engine: what it finds differs in the last bit.
        rows = (
            ("title", 0.6),
            ("stages", 0.5 if chart.bands else 0.05),
            ("loss", 2.7),
            ("numbers", 0.2 + 0.24 * (1 + max(filter(None, numbers), default=0))),
            ("rate", 2.2),
            ("gap", 0.2 if has_decays else 0.0),
            ("decay", 1.4 if has_decays else 0.0),
            ("label", 0.6),
            ("list", _LINE * len(listed)),
            ("foot", 0.12),
        )
        figure = Figure(figsize=(_WIDTH, sum(height for _, height in rows)))
        panels = _panels(figure, rows)
        over_progress = [panels[name] for name in ("loss", "rate", "decay") if name in panels]
        _draw_losses(panels["loss"], chart, log=log)
        _draw_rates(panels["rate"], chart)
        if has_decays:
            _draw_decays(panels["decay"], chart)
        for axes in over_progress:
            axes.set_xlim(first, last)
            draw_bands(axes, chart.bands, first, last, named=axes is panels["loss"])
            if chart.progress is not None:
                axes.axvline(chart.progress, color=_ALERT, linewidth=1.0, label="_", zorder=2)
        _mark_decisions(over_progress, chart, numbers)
        for axes in over_progress[:-1]:
            axes.tick_params(labelbottom=False)
        over_progress[-1].set_xlabel(f"progress ({chart.unit})")
        _write_list(panels["list"], listed)
        handles, labels = panels["loss"].get_legend_handles_labels()
        panels["title"].axis("off")
        panels["title"].legend(
            handles, labels, loc="lower right", ncols=5, frameon=False, fontsize=9,
            borderaxespad=0.0,
        )  # fmt: skip
        figure.text(0.01, 1 - 0.21 / figure.get_figheight(), chart.title, weight="bold", size=12)
        return rendered(figure, form)


def _panels(figure: Figure, rows: Sequence[tuple[str, float]]) -> dict[str, Axes]:
    """Return the panels of a figure; each row is a name and a height in inches, from the top."""
    height, top, panels = figure.get_figheight(), figure.get_figheight(), {}
    for name, tall in rows:
        top -= tall
        if tall and name in ("title", "loss", "rate", "decay", "list"):
            place = (_LEFT / _WIDTH, top / height, 1 - (_LEFT + _RIGHT) / _WIDTH, tall / height)
            panels[name] = figure.add_axes(place)
    return panels


def _draw_losses(axes: Axes, chart: Chart, *, log: bool) -> None:
    points = chart.losses
    dress(axes)
    axes.set_ylabel("loss")
    values = [point.value for point in points]
    if log:
        axes.set_yscale("log")
        if values:
            _label_decades(axes, min(values), max(values))
    for number, lost in enumerate(chart.forgotten):
        label = "forgotten" if number == 0 else "_"
        axes.plot(*_columns(thinned(lost)), color=_FORGOTTEN, linewidth=0.8, label=label)
    marker = "o" if len(points) == 1 else None
    axes.plot(*_columns(thinned(points)), color=_RAW, linewidth=0.8, marker=marker, label="loss")
    axes.plot(*_columns(thinned(chart.smoothed)), color=_SMOOTH, linewidth=1.9, label="smoothed")
    top = float("inf") if log else ceiling(values)
    above = [point.at for point in points if point.value > top]
    if above:
        low = min(values)
        axes.set_ylim(low - 0.05 * (top - low), top)
        _mark_edge(axes, above, "^", _SMOOTH, f"above {decimal(top)}")
    _mark_edge(axes, chart.missing, "x", _ALERT, "not finite")


def _draw_rates(axes: Axes, chart: Chart) -> None:
    dress(axes)
    axes.set_ylabel("learning rate")
    positive: list[float] = []
    for number, same in enumerate(shared(chart.groups, lambda group: (group.rates, group.base))):
        curve = same[0]
        color = COLORS[number % len(COLORS)]
        names = [group.name for group in same]
        named = group_label(names) if chart.is_named else "used"
        label = "_" if number >= _MOST_GROUPS else named
        _draw_curve(axes, chart, curve, curve.rates, color=color, label=label)
        label = "base schedule" if number == 0 else "_"
        axes.plot(
            curve.progress, curve.base, color=_BASE, linewidth=1.1, linestyle=_DASHED, label=label
        )
        positive += [rate for rate in (*curve.rates, *curve.base) if rate > 0]
    if chart.horizon is not None:
        axes.plot([], [], color=_BASE, linewidth=1.9, linestyle=_DOTTED, label="planned")
    if positive:
        _scale_rates(axes, min(positive), max(positive))
    axes.legend(loc="best", ncols=4, framealpha=0.9, edgecolor=GRID_LINE, fontsize=9)


def _draw_decays(axes: Axes, chart: Chart) -> None:
    dress(axes)
    axes.set_ylabel("weight decay")
    for number, same in enumerate(shared(chart.groups, lambda group: (group.decays,))):
        curve = same[0]
        color = COLORS[number % len(COLORS)]
        names = [group.name for group in same]
        label = group_label(names) if chart.is_named and number < _MOST_GROUPS else "_"
        _draw_curve(axes, chart, curve, curve.decays, color=color, label=label)
    axes.set_ylim(bottom=0)
    if chart.is_named:
        axes.legend(loc="best", ncols=4, framealpha=0.9, edgecolor=GRID_LINE, fontsize=9)


def _draw_curve(
    axes: Axes, chart: Chart, curve: GroupCurve, values: Sequence[float], *, color: str, label: str
) -> None:
    """Draw values of a group: a line as far as they are fixed, dots from there on."""
    fixed, planned = split(list(map(Point, curve.progress, values)), chart.horizon)
    marker = "o" if len(curve.progress) == 1 else None
    style: dict[str, Any] = {"color": color, "linewidth": 1.9, "zorder": 3}
    axes.plot(*_columns(fixed), marker=marker, label=label, **style)
    if planned:
        axes.plot(*_columns(planned), linestyle=_DOTTED, label="_", **style)


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


def _mark_decisions(panels: Sequence[Axes], chart: Chart, lines: Sequence[int | None]) -> None:
    """Mark each decision in every panel, and the loss that decided it; number it between two."""
    loss_axes, rate_axes, *_ = panels
    for number, (item, line) in enumerate(zip(chart.decisions, lines, strict=True), 1):
        color = _ACT if item.is_applied else _ADVICE
        at = min(item.effective, chart.last)
        for axes in panels:
            axes.axvline(at, color=color, linewidth=0.8, linestyle=_DOTTED, zorder=2)
        loss = _loss_at(chart, item.decided_at)
        low, high = loss_axes.get_ylim()
        if loss is not None:
            loss_axes.plot(
                [item.decided_at], [min(max(loss, low), high)], "o", markersize=4.5,
                color=color if item.is_applied else "white", markeredgecolor=color, zorder=5,
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
            color="white" if item.is_applied else color,
            weight="bold",
            bbox={
                "boxstyle": "circle,pad=0.2",
                "facecolor": color if item.is_applied else "white",
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


def _list_lines(chart: Chart) -> Iterator[tuple[str, str, str]]:
    """Return (number, colour, text) of each line below the panels."""
    for number, item in enumerate(chart.decisions, 1):
        color = _ACT if item.is_applied else _ADVICE
        lines = textwrap.wrap(
            item.text, _LETTERS, max_lines=_LINES_EACH, placeholder=" …", break_long_words=True
        )
        for index, line in enumerate(lines):
            yield "" if index else str(number), color, line
    if chart.more:
        yield "", FAINT, chart.more
    if not chart.decisions:
        yield "", FAINT, "no policy decided anything"


def _loss_at(chart: Chart, progress: int) -> float | None:
    index = bisect_left(chart.losses, progress, key=lambda point: point.at)
    found = index < len(chart.losses) and chart.losses[index].at == progress
    return chart.losses[index].value if found else None


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


def _columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [point.at for point in points], [point.value for point in points]
