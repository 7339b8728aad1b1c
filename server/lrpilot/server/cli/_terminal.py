"""Pictures in a terminal: a `Chart` as lines of text, drawn with plotext.

Plotext puts curves into cells; what stands where is decided here, in shares of the panel, so that
no value of a run reaches its compiled part. What has no Unicode gets ASCII, see `plain`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import plotext
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lrpilot.server.cli._chart import (
    Chart,
    GroupCurve,
    Point,
    ceiling,
    shared,
    split,
    thinned,
)
from lrpilot.server.cli._output import decimal, group_text, short

COLORS = (12, 5, 2, 6, 3, 13)
"""Of the 16 colours that a terminal's theme sets, those that stand out on dark and on light."""
_ALERT = 1

LEAST_WIDTH, LEAST_HEIGHT = 24, 5
"""Columns and lines below which a panel is its title alone."""
_SIDE_BY_SIDE, _WIDE = 72, 140
"""Columns from which panels may stand side by side to save lines, and from which they do."""
_GAP = 2
_LOW = 24
"""Lines below which panels stand side by side where they can."""
_TALL = {"loss": 5, "learning rate": 4, "weight decay": 3}
"""Shares of the height."""
_LEAST_SHOWN, _MOST_SHOWN = 12, 32
"""Lines of a chart that is no whole screen."""
_MOST_LINES = 4
"""Most groups that a panel draws."""
_SMALLEST, _LARGEST = 1e-300, 1e300
"""Beyond them no axis goes, although single values may."""
_LEAST_RATE = 1e-4
"""Where a logarithmic axis of LRs ends, as a share of the greatest."""

_ASCII = str.maketrans("│┊┤├┬┴┼┌┐└┘╭╮╰╯─━╌·▼→…", "|:||+++++++++++-*-.v>.")


@dataclass(frozen=True)
class _Line:
    """Points that are drawn alike."""

    points: Sequence[Point]
    color: int | None
    """None: the terminal's own, dimmed."""
    marker: str
    """`line` and `cloud`: fine dots, joined or not; else the character to draw with."""
    label: str = ""


@dataclass(frozen=True)
class _Panel:
    """One plot: what is drawn over progress."""

    title: str
    lines: Sequence[_Line]
    low: float
    high: float
    is_log: bool = False
    missing: Sequence[int] = ()
    """Where something is not finite."""
    left_out: int = 0
    """Lines that are not drawn."""

    @property
    def above(self) -> list[int]:
        """Where single values lie above the panel."""
        clouds = [line.points for line in self.lines if line.marker == "cloud"]
        return [point.at for points in clouds for point in points if point.value > self.high]


class ChartView:
    """A chart for rich, as wide as there is room; as high as told, else as there is room."""

    def __init__(
        self, chart: Chart, *, losses: bool = True, log: bool = False, height: int | None = None
    ) -> None:
        """Take what to show, and how.

        Args:
            chart: what to show.
            losses: whether there is a panel for losses.
            log: loss and LR on logarithmic axes.
            height: lines; None: what the console gives.
        """
        self._chart = chart
        self._losses = losses
        self._log = log
        self._height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        height = self._height or options.height or options.size.height
        panels = list(_panels(self._chart, losses=self._losses, log=self._log))
        drawing = _Drawing(self._chart, is_ascii=options.ascii_only)
        beside = len(panels) > 1 and (width >= _WIDE or (width >= _SIDE_BY_SIDE and height < _LOW))
        if beside:
            half = (width - _GAP) // 2
            left = drawing.stack(panels[:1], half, height)
            right = drawing.stack(panels[1:], width - _GAP - half, height)
            lines = [a + Text(" " * _GAP) + b for a, b in zip(left, right, strict=True)]
        else:
            lines = drawing.stack(panels, width, height)
        yield from lines


def show_chart(chart: Chart, *, losses: bool = True, log: bool = False) -> None:
    """Write a chart and what was decided to standard output, to fit a terminal if it can."""
    console = Console(highlight=False)
    told = Table.grid(padding=(0, 1))
    told.add_column(justify="right", width=4)
    for number, item in enumerate(chart.decisions, 1):
        told.add_row(Text(item.sign(number), style="bold"), Text(item.text))
    if chart.more:
        told.add_row("", Text(chart.more))
    # Below it stand a summary and the next prompt.
    height = console.height - len(console.render_lines(told)) - 3
    height = min(max(height, _LEAST_SHOWN), _MOST_SHOWN)
    view = ChartView(chart, losses=losses, log=log, height=height)
    console.print(Plain(Group(Text(chart.title, style="bold"), view, told)))


class Plain:
    """What it holds, in ASCII where the console has no Unicode."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._content, options):
            yield Segment(text.translate(_ASCII) if options.ascii_only else text, style, control)


class _Drawing:
    """Draws the panels of one chart."""

    def __init__(self, chart: Chart, *, is_ascii: bool) -> None:
        self._chart = chart
        self._is_ascii = is_ascii

    def stack(self, panels: Sequence[_Panel], width: int, height: int) -> list[Text]:
        """Return panels one above the other, in exactly `height` lines; the last may not fit."""
        shown = panels[: max(1, height // LEAST_HEIGHT)]
        shares = [_TALL[panel.title] for panel in shown]
        ends = [height * sum(shares[: index + 1]) // sum(shares) for index in range(len(shares))]
        heights = [end - begin for begin, end in pairwise([0, *ends])]
        ticks = [_ticks(panel, rows) for panel, rows in zip(shown, heights, strict=True)]
        labels = max(len(decimal(value)) for values in ticks for value in values)
        lines: list[Text] = []
        for panel, rows, values in zip(shown, heights, ticks, strict=True):
            lines.append(self._title(panel))
            if rows < LEAST_HEIGHT or width < LEAST_WIDTH:
                lines += [Text() for _ in range(rows - 1)]
            elif not panel.lines and not panel.missing:
                empty = [Text() for _ in range(rows - 1)]
                empty[(rows - 1) // 2] = Text(f"no {panel.title} yet".center(width), style="dim")
                lines += empty
            else:
                places = [(_y(panel, value), decimal(value).rjust(labels)) for value in values]
                has_scale = panel is shown[-1]
                text = self._plotted(panel, width, rows - 1, places, has_scale=has_scale)
                lines += Text.from_ansi(text).split("\n", allow_blank=True)[: rows - 1]
        for line in lines:
            line.truncate(width, overflow="crop", pad=True)
        return lines

    def _title(self, panel: _Panel) -> Text:
        title = Text(panel.title, style="bold", no_wrap=True)
        if panel.missing:
            title.append("  x ", style=_color(_ALERT))
            title.append(f"{len(panel.missing):,} not finite", style="not bold")
        if panel.above:
            title.append(f"  ^ {len(panel.above):,} above {decimal(panel.high)}", style="not bold")
        # What is left out of a narrow one is the base.
        for line in sorted(panel.lines, key=lambda line: line.color is None):
            if line.label:
                sign = {"line": "━", "cloud": "·"}.get(line.marker, line.marker)
                title.append(
                    f"  {sign} ", style="dim" if line.color is None else _color(line.color)
                )
                title.append(line.label, style="not bold")
        if panel.left_out:
            title.append(f"  and {panel.left_out:,} more", style="not bold")
        return title

    def _plotted(
        self,
        panel: _Panel,
        width: int,
        height: int,
        places: Sequence[tuple[float, str]],
        *,
        has_scale: bool,
    ) -> str:
        """Return a panel without its title, in ANSI; `places` are the labels of its values."""
        figure = _figure(width, height)
        figure.axes(has_scale, axis=0, side=0)
        chart, marks = self._chart, self._marks()
        columns = width - len(places[0][1]) - 1
        bars = [(item.effective, "┊") for item in chart.decisions]
        if chart.progress is not None:
            bars.append((chart.progress, "│"))
        for progress, sign in bars:
            if chart.first <= progress <= chart.last:
                at = [(self._x(progress), end) for end in (0.0, 1.0)]
                self._draw(figure, at, None, sign, joined=True)
        for line in panel.lines:
            points = thinned(line.points, 2 * columns)
            at = [(self._x(point.at), _y(panel, point.value)) for point in points]
            self._draw(figure, at, line.color, self._marker(line), joined=line.marker != "cloud")
        for edge, sign, color in ((panel.above, "^", None), (panel.missing, "x", _ALERT)):
            shown = {round(self._x(progress) * columns): self._x(progress) for progress in edge}
            at = [(place, 1.0) for place in shown.values()]
            self._draw(figure, at, color, sign, joined=False, style="bold")
        _set_ticks(figure, "y", "left", places)
        _set_ticks(figure, "x", "upper", [(self._x(progress), sign) for progress, sign in marks])
        _set_ticks(figure, "x", "lower", list(self._scale(columns)) if has_scale else [])
        text: str = figure.build().string()
        return text

    def _scale(self, columns: int) -> Iterator[tuple[float, str]]:
        """Yield the labels of progress: the last with its unit, and those that leave it room."""
        first, last = self._chart.first, self._chart.last
        end = f"{short(last)} {self._chart.unit}"
        yield 1.0, end
        step = max(1, round(_step((last - first) / max(1, columns // 12))))
        for progress in range(-(-first // step) * step, last, step):
            label = short(progress)
            if self._x(progress) * columns + len(label) / 2 < columns - len(end) - 1:
                yield self._x(progress), label

    def _marks(self) -> list[tuple[int, str]]:
        """Return what stands above a panel, the most important first: others yield to it."""
        chart = self._chart
        marks = [
            (item.effective, item.sign(number)) for number, item in enumerate(chart.decisions, 1)
        ][::-1]
        if chart.progress is not None:
            marks.append((chart.progress, "▼"))
        return [(at, sign) for at, sign in marks if chart.first <= at <= chart.last]

    def _marker(self, line: _Line) -> str:
        if line.marker not in ("line", "cloud"):
            return line.marker
        if self._is_ascii:
            return "*" if line.marker == "line" else "."
        return "braille"

    def _draw(
        self,
        figure: Any,
        points: Sequence[tuple[float, float]],
        color: int | None,
        marker: str,
        *,
        joined: bool,
        style: str | None = None,
    ) -> None:
        if not points:
            return
        if self._is_ascii:
            marker = marker if len(marker) > 1 else marker.translate(_ASCII)
        pixel = plotext.pixel(color, style=style or ("dim" if color is None else None))
        xs, ys = zip(*points, strict=True)
        signal = figure.signal(list(xs), list(ys), marker=plotext.marker(marker, pixel))
        if joined and len(points) > 1:
            signal.lines(True)
            signal.density("full")
        figure.draw(signal)

    def _x(self, progress: int) -> float:
        chart = self._chart
        return min(max((progress - chart.first) / (chart.last - chart.first), 0.0), 1.0)


def _panels(chart: Chart, *, losses: bool, log: bool) -> Iterator[_Panel]:
    if losses:
        yield _loss_panel(chart, log=log)
    yield _rate_panel(chart, log=log)
    if any(group.decays for group in chart.groups):
        found = shared(chart.groups, lambda group: (group.decays,))
        decays = [
            line
            for number, same in enumerate(found[:_MOST_LINES])
            for line in _curve(chart, same, same[0].decays, number)
        ]
        left_out = max(0, len(found) - _MOST_LINES)
        yield _Panel("weight decay", decays, 0.0, _greatest(decays), left_out=left_out)


def _loss_panel(chart: Chart, *, log: bool) -> _Panel:
    forgotten = zip(chart.forgotten, ["forgotten", *([""] * len(chart.forgotten))], strict=False)
    lines = [
        *(_Line(points, None, "cloud", label) for points, label in forgotten),
        _Line(chart.losses, COLORS[3], "cloud", "raw"),
        _Line(chart.smoothed, COLORS[0], "line", "smoothed"),
    ]
    if log:
        lines = [replace(line, points=_above_zero(line.points)) for line in lines]
    lines = [line for line in lines if line.points]
    values = [point.value for line in lines for point in line.points]
    known = [point.value for point in chart.losses if not log or point.value > 0] or values
    if not values:
        return _Panel("loss", lines, 1.0, 10.0, log, chart.missing)
    high = max(values) if log else min(ceiling(known), max(values))
    return _Panel("loss", lines, *_apart(min(values), high, log=log), log, chart.missing)


def _rate_panel(chart: Chart, *, log: bool) -> _Panel:
    lines: list[_Line] = []
    both = shared(chart.groups, lambda group: (group.rates, group.base))
    for number, same in enumerate(both[:_MOST_LINES]):
        curve = same[0]
        if curve.base and list(curve.base) != list(curve.rates):
            base = list(map(Point, curve.progress, curve.base))
            label = "base" if not any(line.label == "base" for line in lines) else ""
            lines.insert(0, _Line(base, None, "╌", label))
        lines += _curve(chart, same, curve.rates, number)
    if log:
        lines = [replace(line, points=_above_zero(line.points)) for line in lines]
        lines = [line for line in lines if line.points]
    high, left_out = _greatest(lines), max(0, len(both) - _MOST_LINES)
    if not log:
        return _Panel("learning rate", lines, 0.0, high, left_out=left_out)
    low = min((point.value for line in lines for point in line.points), default=0.1)
    low, high = _apart(max(low, high * _LEAST_RATE), high, log=True)
    return _Panel("learning rate", lines, low, high, is_log=True, left_out=left_out)


def _curve(
    chart: Chart, same: Sequence[GroupCurve], values: Sequence[float], number: int
) -> Iterator[_Line]:
    """Yield the lines of groups whose values are the same: as far as they are fixed, and beyond."""
    color = COLORS[number % len(COLORS)]
    fixed, planned = split(list(map(Point, same[0].progress, values)), chart.horizon)
    label = group_text([group.name for group in same]) if chart.is_named else ""
    is_told = chart.horizon is not None and number == 0
    if fixed:
        yield _Line(fixed, color, "line", label or ("fixed" if is_told else ""))
    if planned:
        yield _Line(planned, color, "·", "planned" if is_told else "")


def _color(number: int) -> str:
    return f"not bold color({number})"


def _above_zero(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if point.value > 0]


def _greatest(lines: Sequence[_Line]) -> float:
    high = max((point.value for line in lines for point in line.points), default=0.0)
    return min(high, _LARGEST) if high > _SMALLEST else 1.0


def _apart(low: float, high: float, *, log: bool) -> tuple[float, float]:
    """Return the ends of an axis: apart, and far from where floats end."""
    if log:
        low, high = (min(max(end, _SMALLEST), _LARGEST) for end in (low, high))
        return (low, high) if low < high else (low / 2, high * 2)
    low, high = (min(max(end, -_LARGEST), _LARGEST) for end in (low, high))
    size = max(abs(low), abs(high))
    if high - low > max(_SMALLEST, 1e-12 * size):
        return low, high
    margin = size / 10 if size > _SMALLEST else 1.0
    return low - margin, high + margin


def _y(panel: _Panel, value: float) -> float:
    """Return where a value stands, 0 at the bottom and 1 at the top; what lies beyond, there."""
    low, high = panel.low, panel.high
    if panel.is_log:
        if value <= low:
            return 0.0
        low, high, value = math.log(low), math.log(high), math.log(value)
    # Halves, so that no difference of finite values overflows.
    return min(max((value / 2 - low / 2) / (high / 2 - low / 2), 0.0), 1.0)


def _ticks(panel: _Panel, rows: int) -> list[float]:
    """Return the values to label: round ones; of a logarithmic axis powers of 10, if some."""
    low, high = panel.low, panel.high
    if panel.is_log:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        if len(powers) > 1:
            every = math.ceil(len(powers) / max(2, rows // 2))
            return [10.0**power for power in powers][::every]
    count = rows // 3 + 1
    step = _step(high / count - low / count)
    first, last = math.ceil(low / step), math.floor(high / step)
    values = [number * step for number in range(first, last + 1)]
    return values if len(values) > 1 else [low, high]


def _step(least: float) -> float:
    """Return the least of 1, 2 and 5 times a power of 10 that is no smaller."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def _set_ticks(figure: Any, axis: str, side: str, places: Sequence[tuple[float, str]]) -> None:
    ruler = figure.ruler(axis, side)
    ruler.lim(0.0, 1.0)
    ruler.ticks([place for place, _ in places], [label for _, label in places])


def _figure(width: int, height: int) -> Any:
    """Return plotext's figure, empty, without frame or colours, in this many cells."""
    plotext.terminal.limit(False, False)
    figure = plotext.figure
    figure.clear.all()
    figure.plot_size(width, height)
    figure.theme("colorless")
    figure.axes(False, axis=[0, 1], side=1)
    return figure
