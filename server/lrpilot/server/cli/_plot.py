"""The picture of a base schedule: LR and WD over progress, stages as bands.

What it shares with other pictures has names without an underscore.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lrpilot.core._schedules import base_schedule, stage_schedules
from lrpilot.core._spec import RunSpec
from lrpilot.server.cli._output import group_text

COLORS = ("#1f5fbf", "#d9601a", "#2a8a4a", "#a0348f", "#8a6d00", "#008b99", "#b02a37", "#555555")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
INK, FAINT, GRID_LINE = "#22262b", "#6b737c", "#dfe3e8"
_BANDS = ("#eef2f8", "#ffffff")

_INTERVALS = 400
"""Intervals that a curve is divided into before its bends are."""
_FINE = 2e-3
"""A bend is divided until a straight line is this close, as a share of the curve's height."""
_LONGEST_LEGEND = 12
_NAME_LINES = 3
"""Most lines of stage names; a name that fits into none is left out."""
_LETTER = 0.0085
"""About the width of a letter of a stage's name, as a share of the panel's."""

Row = tuple[float, ...]


def draw_curve(
    spec: RunSpec, groups: Sequence[int], positions: Sequence[int] | None, form: str
) -> bytes:
    """Return the picture of a spec's base schedule, as `png` or `svg`.

    Args:
        spec: the spec.
        groups: indices of the parameter groups to draw; those with equal curves share a line.
        positions: progresses to draw, joined by straight lines; None: as many as the curves need.
        form: `png` or `svg`. The same spec gives the same bytes with one release of matplotlib.
    """
    values = base_schedule(spec)

    def row(progress: int) -> Row:
        at = values(progress)
        rates = tuple(at[group][0] for group in groups)
        return rates + tuple(at[group][1] or 0.0 for group in groups if spec.has_weight_decay)

    at = _bends(row, spec.total) if positions is None else sorted(set(positions))
    columns = list(zip(*(row(progress) for progress in at), strict=True))
    names = [spec.group_names[group] for group in groups]
    panels = [("learning rate", columns[: len(groups)])]
    if spec.has_weight_decay:
        panels.append(("weight decay", columns[len(groups) :]))

    with picture_style():
        figure = Figure(figsize=(10, 3.8 if len(panels) == 1 else 6), layout="constrained")
        ratios = (3, 2)[: len(panels)]
        drawn = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
        )
        for axes, (label, curves) in zip(drawn[:, 0], panels, strict=True):
            _draw_panel(axes, label, at, curves, names)
            bands = _stage_bands(spec, at[0], at[-1])
            draw_bands(axes, bands, at[0], at[-1], named=axes is drawn[0, 0])
        drawn[-1, 0].set_xlabel(f"progress ({spec.unit})")
        figure.suptitle(f"{spec.name}: base schedule", x=0.01, ha="left", weight="bold", size=12)
        return rendered(figure, form)


@contextmanager
def picture_style() -> Iterator[None]:
    """Give pictures their type, and keep what a font lacks off standard error."""
    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.labelcolor": INK,
        "text.color": INK,
        # Names may hold a dollar sign.
        "text.parse_math": False,
        "svg.hashsalt": "lrpilot",
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes, which needs no lines on stderr.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def rendered(figure: Figure, form: str) -> bytes:
    """Return a figure as `png` or `svg`, the same bytes each time with one matplotlib."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else {}
    figure.savefig(buffer, format=form, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _bends(row: Callable[[int], Row], end: int) -> list[int]:
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


def _draw_panel(
    axes: Axes, label: str, at: Sequence[int], curves: Sequence[Row], names: Sequence[str]
) -> None:
    shared: dict[Row, list[str]] = {}
    for name, curve in zip(names, curves, strict=True):
        shared.setdefault(curve, []).append(name)
    marker = "o" if len(at) == 1 else None
    for number, (curve, owners) in enumerate(shared.items()):
        # A group keeps its colour in both panels.
        index = names.index(owners[0])
        axes.plot(
            at,
            curve,
            color=COLORS[index % len(COLORS)],
            linestyle=DASHES[index % len(DASHES)],
            linewidth=1.9,
            marker=marker,
            label=group_label(owners) if number < _LONGEST_LEGEND else "_",
            zorder=3,
            clip_on=False,
        )
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    dress(axes)
    if names != [""]:
        axes.legend(frameon=True, framealpha=0.9, edgecolor=GRID_LINE, fontsize=9)


def dress(axes: Axes) -> None:
    """Give a panel over progress its ticks, grid and spines."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: decimal(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.margins(x=0)
    axes.grid(color=GRID_LINE, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9)


class Band(NamedTuple):
    """A stage between two progresses."""

    name: str
    begin: int
    until: int


def _stage_bands(spec: RunSpec, first: int, last: int) -> list[Band]:
    bands = []
    for stage in stage_schedules(spec) if spec.stages else ():
        until = min(last if stage.until is None else stage.until, last)
        bands.append(Band(stage.name, max(stage.begin, first), until))
    return bands


def draw_bands(axes: Axes, bands: Sequence[Band], first: int, last: int, *, named: bool) -> None:
    """Draw stages as bands in a panel from `first` to `last`; `named`: their names above it.

    A name that would run into others is left out.
    """
    # Where the names in each line above the panel end, as shares of its width.
    ends = [-1.0] * _NAME_LINES
    for index, (name, begin, until) in enumerate(bands):
        if begin >= until:
            continue
        axes.axvspan(begin, until, color=_BANDS[index % len(_BANDS)], linewidth=0, zorder=-1)
        middle = ((begin + until) / 2 - first) / (last - first)
        half = len(name) * _LETTER / 2
        line = next((line for line, end in enumerate(ends) if middle - half > end), None)
        if named and line is not None:
            ends[line] = middle + half + _LETTER
            axes.text(
                middle,
                1.02 + 0.055 * line,
                name,
                transform=axes.transAxes,
                ha="center",
                va="bottom",
                fontsize=9,
                color=FAINT,
            )


def group_label(names: Sequence[str]) -> str:
    """Return the legend's text for groups that share a line."""
    label = group_text(names)
    # What begins with an underscore is left out of legends.
    return f" {label}" if label.startswith("_") else label


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'K' else size):.4g}{letter}"
    return f"{value:.4g}"


def decimal(value: float) -> str:
    """Return a tick's value; small ones as people write LRs, such as 1.5e-4."""
    if not 0 < abs(value) < 1e-2:
        return f"{value:.4g}"
    digits, _, power = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
